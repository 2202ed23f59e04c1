// Features of voxels: reductions over their points, and the voxels around a point.
#include "points.h"
#include "voxels.h"

namespace geossl {
namespace {

constexpr int64_t kBytesPerThread = int64_t{1} << 20;
constexpr int64_t kAheadBytes = 6144;  // the same for features: the hardware does not look ahead beyond a page
constexpr int64_t kAhead = 24;  // rows between asking for an accumulator and using it

struct Rows {
  int64_t rows, voxels, channels;
  const int64_t *inverse, *perm, *row_splits;
};

// kFixed is the number of channels where it is known, so that a row is a few vector instructions; else 0.
template <int kFixed, class T>
GEOSSL_INLINE void add_range(const T* GEOSSL_RESTRICT x, const Rows& r, int64_t c0, int64_t c1, T* GEOSSL_RESTRICT out) {
  const int64_t width = kFixed ? kFixed : c1 - c0;
  const int64_t bytes = r.channels * static_cast<int64_t>(sizeof(T)), ahead = (1 + kAheadBytes / std::max<int64_t>(bytes, 1)) * bytes;
  for (int64_t i = 0; i < r.rows; ++i) {
    if (i + kAhead < r.rows) {
      const auto next = static_cast<uint64_t>(r.inverse[i + kAhead]);
      if (next < static_cast<uint64_t>(r.voxels)) {
        const char* line = reinterpret_cast<const char*>(out + static_cast<int64_t>(next) * r.channels + c0);
        for (int64_t byte = 0; byte < width * static_cast<int64_t>(sizeof(T)); byte += 64) __builtin_prefetch(line + byte, 1);
      }
    }
    const int64_t v = r.inverse[i];
    if (static_cast<uint64_t>(v) >= static_cast<uint64_t>(r.voxels)) continue;
    const T* from = x + i * r.channels + c0;
    T* to = out + v * r.channels + c0;
    const char* coming = reinterpret_cast<const char*>(from) + ahead;
    for (int64_t byte = 0; byte < width * static_cast<int64_t>(sizeof(T)); byte += 64) __builtin_prefetch(coming + byte);
    for (int64_t c = 0; c < width; ++c) to[c] += from[c];
  }
}

// Adds channels c0 .. c1 of all rows into their voxels, in the order of rows: the features are read as they lie.
template <class T>
GEOSSL_INLINE void add_rows_loop(const T* x, const Rows& r, int64_t c0, int64_t c1, T* out) {
  switch (c1 - c0) {
    case 16: return add_range<16>(x, r, c0, c1, out);
    case 32: return add_range<32>(x, r, c0, c1, out);
    case 64: return add_range<64>(x, r, c0, c1, out);
    default: return add_range<0>(x, r, c0, c1, out);
  }
}
GEOSSL_SIMD void add_rows(const float* x, const Rows& r, int64_t c0, int64_t c1, float* out) { add_rows_loop(x, r, c0, c1, out); }
GEOSSL_SIMD void add_rows(const double* x, const Rows& r, int64_t c0, int64_t c1, double* out) { add_rows_loop(x, r, c0, c1, out); }

// The same sums for voxels v0 .. v1, voxel by voxel.
template <class T>
GEOSSL_INLINE void add_voxels_loop(const T* x, const Rows& r, int64_t v0, int64_t v1, T* out) {
  for (int64_t v = v0; v < v1; ++v)
    for (int64_t k = r.row_splits[v]; k < r.row_splits[v + 1]; ++k) {
      if (static_cast<uint64_t>(r.perm[k]) >= static_cast<uint64_t>(r.rows)) continue;
      if (k + kAhead < r.row_splits[v1]) {
        const char* coming = reinterpret_cast<const char*>(x + r.perm[k + kAhead] * r.channels);
        for (int64_t byte = 0; byte < r.channels * static_cast<int64_t>(sizeof(T)); byte += 64) __builtin_prefetch(coming + byte);
      }
      const T* GEOSSL_RESTRICT from = x + r.perm[k] * r.channels;
      T* GEOSSL_RESTRICT to = out + v * r.channels;
      for (int64_t c = 0; c < r.channels; ++c) to[c] += from[c];
    }
}
GEOSSL_SIMD void add_voxels(const float* x, const Rows& r, int64_t v0, int64_t v1, float* out) { add_voxels_loop(x, r, v0, v1, out); }
GEOSSL_SIMD void add_voxels(const double* x, const Rows& r, int64_t v0, int64_t v1, double* out) { add_voxels_loop(x, r, v0, v1, out); }

// The largest (kSign 1) or smallest (-1) value of voxels v0 .. v1 and the lowest row that has it; NaN comes before all.
template <int kSign, class T>
GEOSSL_INLINE void extrema_loop(const T* x, const Rows& r, int64_t v0, int64_t v1, T* out, int64_t* arg) {
  for (int64_t v = v0; v < v1; ++v) {
    T* GEOSSL_RESTRICT best = out + v * r.channels;
    int64_t* GEOSSL_RESTRICT row_of = arg + v * r.channels;
    bool started = false;
    for (int64_t k = r.row_splits[v]; k < r.row_splits[v + 1]; ++k) {
      const int64_t row = r.perm[k];
      if (static_cast<uint64_t>(row) >= static_cast<uint64_t>(r.rows)) continue;
      if (k + 4 < r.row_splits[r.voxels]) {
        const int64_t next = r.perm[k + 4];
        if (static_cast<uint64_t>(next) < static_cast<uint64_t>(r.rows)) __builtin_prefetch(x + next * r.channels);
      }
      const T* GEOSSL_RESTRICT value = x + row * r.channels;
      if (!started) {
        for (int64_t c = 0; c < r.channels; ++c) best[c] = value[c], row_of[c] = row;
        started = true;
        continue;
      }
      for (int64_t c = 0; c < r.channels; ++c) {
        const bool better = (kSign > 0 ? !(value[c] <= best[c]) : !(value[c] >= best[c])) & (best[c] == best[c]);
        best[c] = better ? value[c] : best[c];
        row_of[c] = better ? row : row_of[c];
      }
    }
  }
}
GEOSSL_SIMD void extrema(const float* x, const Rows& r, bool largest, int64_t v0, int64_t v1, float* out, int64_t* arg) {
  largest ? extrema_loop<1>(x, r, v0, v1, out, arg) : extrema_loop<-1>(x, r, v0, v1, out, arg);
}
GEOSSL_SIMD void extrema(const double* x, const Rows& r, bool largest, int64_t v0, int64_t v1, double* out, int64_t* arg) {
  largest ? extrema_loop<1>(x, r, v0, v1, out, arg) : extrema_loop<-1>(x, r, v0, v1, out, arg);
}

template <class T>
void sum(int threads, const T* x, const Rows& r, bool mean, T* out) {
  const int64_t bytes = r.channels * static_cast<int64_t>(sizeof(T));
  const int64_t per_thread = std::max<int64_t>(1, kBytesPerThread / std::max<int64_t>(bytes, 1));
  const int64_t wanted = std::clamp<int64_t>(std::min<int64_t>(threads, r.rows / per_thread), 1, 64);
  parallel_for(threads, r.voxels, per_thread, [&](int64_t v0, int64_t v1) { std::fill(out + v0 * r.channels, out + v1 * r.channels, T(0)); });
  if (wanted == 1) {
    add_rows(x, r, 0, r.channels, out);
  } else {  // not by channels: neighbouring cache lines come together, so that every thread would read all features
    parallel_for(threads, r.voxels, std::max<int64_t>(1, r.voxels / wanted), [&](int64_t v0, int64_t v1) { add_voxels(x, r, v0, v1, out); });
  }
  if (!mean) return;
  parallel_for(threads, r.voxels, per_thread, [&](int64_t v0, int64_t v1) {
    for (int64_t v = v0; v < v1; ++v) {
      const T count = static_cast<T>(std::max<int64_t>(r.row_splits[v + 1] - r.row_splits[v], 1));
      for (int64_t c = v * r.channels; c < (v + 1) * r.channels; ++c) out[c] /= count;
    }
  });
}

}  // namespace
}  // namespace geossl

// See geossl/ops/voxels.py for the arguments of both. reduce: 0 sum, 1 mean, 2 max, 3 min.
GEOSSL_API int geossl_voxel_reduce_cpu(int threads, int is_double, const void* features, int64_t rows, int64_t channels, const int64_t* inverse,
                                       const int64_t* perm, const int64_t* row_splits, int64_t voxels, int reduce, void* out, int64_t* arg) {
  using namespace geossl;
  if (rows < 0 || channels < 0 || voxels < 0 || reduce < 0 || reduce > 3) return GEOSSL_INVALID_ARGUMENT;
  return for_type(is_double, [&](auto zero) {
    using T = decltype(zero);
    const Rows r{rows, voxels, channels, inverse, perm, row_splits};
    const T* x = static_cast<const T*>(features);
    if (reduce < 2) {
      sum(threads, x, r, reduce == 1, static_cast<T*>(out));
    } else {
      const int64_t bytes = std::max<int64_t>(1, rows * channels * static_cast<int64_t>(sizeof(T)) / std::max<int64_t>(voxels, 1));
      parallel_for(threads, voxels, std::max<int64_t>(1, kBytesPerThread / bytes),
                   [&](int64_t v0, int64_t v1) { extrema(x, r, reduce == 2, v0, v1, static_cast<T*>(out), arg); });
    }
    return int{GEOSSL_OK};
  });
}

// `table` holds -1 in all of its `slots`, a power of two of at least twice the voxels.
GEOSSL_API int geossl_voxel_corners_cpu(int threads, int is_double, const void* points, const int64_t* offsets, const int64_t* lengths, int64_t n,
                                        int64_t batch, const double* grid_values, const int32_t* coords, int64_t voxels, int64_t* table,
                                        int64_t slots, int64_t* index, void* weight) {
  using namespace geossl;
  if (n < 0 || batch < 0 || voxels < 0 || slots <= voxels || (slots & (slots - 1))) return GEOSSL_INVALID_ARGUMENT;
  return for_type(is_double, [&](auto zero) {
    using T = decltype(zero);
    const Clouds clouds{offsets, lengths, batch, n};
    VoxelGrid grid;
    for (int axis = 0; axis < 3; ++axis) grid.size[axis] = grid_values[axis], grid.origin[axis] = grid_values[3 + axis];
    for (int64_t v = 0; v < voxels; ++v) {
      uint64_t at = hash_cell(coords + 4 * v);
      while (table[at & static_cast<uint64_t>(slots - 1)] >= 0) ++at;
      table[at & static_cast<uint64_t>(slots - 1)] = v;
    }
    parallel_for(threads, batch > 0 ? clouds.rows() : 0, 4096, [&](int64_t r0, int64_t r1) {
      for (int64_t row = r0; row < r1; ++row) {
        const int64_t b = clouds.cloud_of(row);
        T* w = static_cast<T*>(weight) + 8 * row;
        if (row - clouds.begin(b) < clouds.size(b)) {
          find_corners(static_cast<const T*>(points) + 3 * row, b, grid, coords, table, slots, index + 8 * row, w);
        } else {
          std::fill(index + 8 * row, index + 8 * row + 8, int64_t{-1});
          std::fill(w, w + 8, T(0));
        }
      }
    });
    return int{GEOSSL_OK};
  });
}
