// Farthest point sampling on the CPU. The cloud is kept as arrays x, y, z and the distance to the nearest pick, as integer bits.
#include <algorithm>
#include <cstring>

#include "points.h"

namespace geossl {
namespace {

constexpr int64_t kLanes = 64;  // arrays are padded to this many points, so that loops have no remainder

// Lowers the distances of n points (a multiple of kLanes) by a new pick and returns the largest.
template <class T>
GEOSSL_INLINE Bits<T> lower_distances(const T* GEOSSL_RESTRICT x, const T* GEOSSL_RESTRICT y, const T* GEOSSL_RESTRICT z,
                                      Bits<T>* GEOSSL_RESTRICT nearest, int64_t n, T px, T py, T pz) {
  Bits<T> largest = std::numeric_limits<Bits<T>>::min();
  for (int64_t i = 0; i < n; ++i) {
    const Bits<T> distance = to_bits(squared(x[i] - px, y[i] - py, z[i] - pz));
    const Bits<T> lower = distance < nearest[i] ? distance : nearest[i];
    nearest[i] = lower;
    largest = largest < lower ? lower : largest;
  }
  return largest;
}

// The first of n values that equals `wanted`, which is among them.
template <class B>
GEOSSL_INLINE int64_t find_first(const B* values, int64_t n, B wanted) {
  for (int64_t begin = 0; begin < n; begin += kLanes) {
    B found = 0;
    for (int64_t i = begin; i < begin + kLanes; ++i) found |= static_cast<B>(values[i] == wanted);
    if (found)
      for (int64_t i = begin;; ++i)
        if (values[i] == wanted) return i;
  }
  return -1;
}

// Picks position after position, each the farthest from all before it, until k are picked or none is left; returns how many.
template <class T>
GEOSSL_INLINE int64_t sample_all_steps(const Soa<T>& p, Bits<T>* nearest, int64_t n, T px, T py, T pz, int64_t k, int32_t* picks) {
  for (int64_t step = 0; step < k; ++step) {
    const Bits<T> largest = lower_distances(p.x, p.y, p.z, nearest, n, px, py, pz);
    if (largest < 0) return step;
    const int64_t best = find_first(nearest, n, largest);
    picks[step] = static_cast<int32_t>(best);
    nearest[best] = to_bits(T(-1));
    px = p.x[best], py = p.y[best], pz = p.z[best];
  }
  return k;
}

GEOSSL_SIMD int64_t sample_steps(const Soa<float>& p, int32_t* nearest, int64_t n, float px, float py, float pz, int64_t k, int32_t* picks) {
  return sample_all_steps(p, nearest, n, px, py, pz, k, picks);
}
GEOSSL_SIMD int64_t sample_steps(const Soa<double>& p, int64_t* nearest, int64_t n, double px, double py, double pz, int64_t k, int32_t* picks) {
  return sample_all_steps(p, nearest, n, px, py, pz, k, picks);
}

struct Options {
  const uint8_t* mask;  // of this cloud, may be null
  int64_t start;
  double min_sq_norm;  // negative: none
};

template <class T>
struct Memory {
  Scratch<T> x, y, z;
  Scratch<Bits<T>> nearest;
  Scratch<int32_t> id, picks;
};

template <class T>
bool finite(const T* p) {
  return std::isfinite(p[0]) && std::isfinite(p[1]) && std::isfinite(p[2]);
}

// The start, or the next row after it, going round, that is finite and not masked; -1 if there is none.
template <class T>
int64_t first_pick(const T* points, int64_t n, const Options& options) {
  const int64_t start = options.start >= 0 && options.start < n ? options.start : 0;
  for (int64_t step = 0; step < n; ++step) {
    const int64_t i = start + step < n ? start + step : start + step - n;
    if (finite(points + 3 * i) && (!options.mask || options.mask[i])) return i;
  }
  return -1;
}

// Copies the points that may be picked after `first`, in order, and their row numbers; returns how many.
template <class T>
int64_t load(const T* points, int64_t n, const Options& options, int64_t first, Soa<T> to, int32_t* id) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    const T *p = points + 3 * i, x = p[0], y = p[1], z = p[2];
    to.x[count] = x, to.y[count] = y, to.z[count] = z, id[count] = static_cast<int32_t>(i);
    // (x - x) is 0 for finite numbers only.
    bool keep = (x - x) + (y - y) + (z - z) == T(0) && i != first;
    if (options.mask) keep = keep && options.mask[i];
    if (options.min_sq_norm >= 0) keep = keep && static_cast<double>(squared(x, y, z)) > options.min_sq_norm;
    count += keep;
  }
  return count;
}

template <class T>
void sample_cloud(const T* points, int64_t n, int64_t k, const Options& options, int64_t base, Memory<T>& memory, int64_t* out) {
  const int64_t first = n > 0 && k > 0 ? first_pick(points, n, options) : -1;
  if (first < 0) {
    std::fill(out, out + k, int64_t{-1});
    return;
  }
  out[0] = base + first;
  int64_t found = 0;
  if (k > 1) {
    const int64_t capacity = n + kLanes;
    const Soa<T> p{memory.x.get(capacity), memory.y.get(capacity), memory.z.get(capacity)};
    int32_t *id = memory.id.get(capacity), *picks = memory.picks.get(k);
    Bits<T>* nearest = memory.nearest.get(capacity);
    const int64_t count = load(points, n, options, first, p, id);
    const int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
    std::fill(nearest, nearest + count, to_bits(std::numeric_limits<T>::infinity()));
    std::fill(nearest + count, nearest + padded, to_bits(T(-1)));
    for (T* axis : {p.x, p.y, p.z}) std::fill(axis + count, axis + padded, T(0));
    const T* start = points + 3 * first;
    found = sample_steps(p, nearest, padded, start[0], start[1], start[2], k - 1, picks);
    for (int64_t i = 0; i < found; ++i) out[1 + i] = base + id[picks[i]];
  }
  std::fill(out + 1 + found, out + k, options.min_sq_norm >= 0 ? base + first : int64_t{-1});
}

}  // namespace
}  // namespace geossl

// See geossl/ops/fps.py for the arguments; `out_offsets` (packed) says how many points each cloud gives and where they go.
GEOSSL_API int geossl_fps_cpu(int threads, int is_double, const void* points, const int64_t* offsets, const int64_t* lengths, int64_t batch,
                              int64_t n, const int64_t* out_offsets, int64_t k, int64_t start, const int64_t* starts, const uint8_t* mask,
                              double min_sq_norm, void*, int64_t* out) {
  using namespace geossl;
  const Clouds clouds{offsets, lengths, batch, n};
  if (batch < 0 || n < 0 || k < 0) return GEOSSL_INVALID_ARGUMENT;
  if (!clouds_fit(clouds)) return GEOSSL_TOO_LARGE;
  return for_type(is_double, [&](auto zero) {
    using T = decltype(zero);
    int64_t work = 1;
    for (int64_t b = 0; b < batch; ++b) work += clouds.size(b) * (out_offsets ? out_offsets[b + 1] - out_offsets[b] : k);
    // A thread is worth starting for about a million distances.
    parallel_for(threads, batch, std::max<int64_t>(1, (int64_t{1} << 20) * batch / work), [&](int64_t b0, int64_t b1) {
      Memory<T> memory;
      for (int64_t b = b0; b < b1; ++b) {
        const int64_t row = clouds.begin(b);
        const Options options{mask ? mask + row : nullptr, starts ? starts[b] : start, min_sq_norm};
        const int64_t count = out_offsets ? out_offsets[b + 1] - out_offsets[b] : k;
        sample_cloud(static_cast<const T*>(points) + 3 * row, clouds.size(b), count, options, clouds.index_base(b), memory,
                     out + (out_offsets ? out_offsets[b] : b * k));
      }
    });
    return int{GEOSSL_OK};
  });
}
