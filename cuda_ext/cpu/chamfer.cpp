// Chamfer distance on the CPU. Nearest points are found by comparing all pairs, 32 queries at a time, one in each vector lane; in clouds of
// up to three channels that are not small, by blocks of neighbours, and in large ones by a tree. Fewer than three channels are three with
// zeros, which changes no bit of a distance.
#include <algorithm>
#include <cmath>

#include "blocks.h"

namespace geossl {
namespace {

enum Norm { kSquared = 0, kEuclidean = 1, kManhattan = 2 };
enum Direction { kBoth = 0, kFromX = 1, kFromY = 2 };

// Queries side by side: sixteen of float32, two of float64, which has no vector clones and would take seconds to compile for more.
template <class T>
constexpr int kLanes = sizeof(T) == 4 ? 16 : 2;
template <class T>
constexpr int kTile = 2 * kLanes<T>;

// They are taken in vectors as wide as the machine's: written as a plain loop, the running minima below would live in memory, and gcc compares
// the numbers of a wider vector one by one.

// For `kTile` queries, the distance to the nearest of n points and its number (-1: none). NaN compares false, so invalid points never win.
template <class T, int kBytes, bool kL1>
GEOSSL_INLINE void nearest_loop(const T* qx, const T* qy, const T* qz, const Soa<T>& p, int64_t n, T* distance, Bits<T>* index) {
  using Values = typename Vector<T, kBytes>::Values;
  using Numbers = typename Vector<T, kBytes>::Numbers;
  constexpr int kParts = 2, kWidth = Vector<T, kBytes>::kWidth;
  for (int first = 0; first < kTile<T>; first += kParts * kWidth) {
    Values x[kParts], y[kParts], z[kParts], best[kParts];
    Numbers number[kParts];
#pragma GCC unroll 2
    for (int i = 0; i < kParts; ++i) {
      __builtin_memcpy(&x[i], qx + first + kWidth * i, sizeof(Values));
      __builtin_memcpy(&y[i], qy + first + kWidth * i, sizeof(Values));
      __builtin_memcpy(&z[i], qz + first + kWidth * i, sizeof(Values));
      best[i] = Values{} + std::numeric_limits<T>::infinity();
      number[i] = Numbers{} - 1;
    }
    keep_nearest<T, kBytes, kL1, kParts>(x, y, z, p, n, [](int64_t j) { return static_cast<Bits<T>>(j); }, best, number);
#pragma GCC unroll 2
    for (int i = 0; i < kParts; ++i) {
      __builtin_memcpy(distance + first + kWidth * i, &best[i], sizeof(Values));
      __builtin_memcpy(index + first + kWidth * i, &number[i], sizeof(Numbers));
    }
  }
}
GEOSSL_VECTORS(void nearest_tile(const float* qx, const float* qy, const float* qz, const Soa<float>& p, int64_t n, bool l1, float* distance,
                                 int32_t* index),
               {
                 if (l1) nearest_loop<float, kBytes, true>(qx, qy, qz, p, n, distance, index);
                 else nearest_loop<float, kBytes, false>(qx, qy, qz, p, n, distance, index);
               })
void nearest_tile(const double* qx, const double* qy, const double* qz, const Soa<double>& p, int64_t n, bool l1, double* distance,
                  int64_t* index) {
  if (l1) nearest_loop<double, 16, true>(qx, qy, qz, p, n, distance, index);
  else nearest_loop<double, 16, false>(qx, qy, qz, p, n, distance, index);
}

// The same for more channels: `q` holds the channels of `kLanes` queries one after the other. Four points at a time share what is loaded of q.
template <class T, int kBytes, bool kL1>
GEOSSL_INLINE void nearest_channels_loop(const T* q, const T* points, int64_t n, int64_t channels, T* distance, Bits<T>* index) {
  using Values = typename Vector<T, kBytes>::Values;
  using Numbers = typename Vector<T, kBytes>::Numbers;
  constexpr int64_t kPoints = 4;
  for (int first = 0; first < kLanes<T>; first += Vector<T, kBytes>::kWidth) {
    Values best = Values{} + std::numeric_limits<T>::infinity();
    Numbers number = Numbers{} - 1;
    for (int64_t j = 0; j < n; j += kPoints) {
      Values sum[kPoints] = {};
      const T* p[kPoints];
#pragma GCC unroll 4
      for (int64_t i = 0; i < kPoints; ++i) p[i] = points + std::min(j + i, n - 1) * channels;
      for (int64_t c = 0; c < channels; ++c) {
        Values own;
        __builtin_memcpy(&own, q + kLanes<T> * c + first, sizeof own);
#pragma GCC unroll 4
        for (int64_t i = 0; i < kPoints; ++i) {
          const Values d = own - p[i][c];
          if constexpr (kL1) sum[i] = sum[i] + (d < 0 ? -d : d);
          else sum[i] = sum[i] + d * d;
        }
      }
#pragma GCC unroll 4
      for (int64_t i = 0; i < kPoints; ++i) {  // the last point once more is not closer than itself
        const auto closer = sum[i] < best;
        best = closer ? sum[i] : best;
        number = closer ? Numbers{} + static_cast<Bits<T>>(j + i) : number;
      }
    }
    __builtin_memcpy(distance + first, &best, sizeof best);
    __builtin_memcpy(index + first, &number, sizeof number);
  }
}
GEOSSL_VECTORS(void nearest_channels(const float* q, const float* points, int64_t n, int64_t channels, bool l1, float* distance, int32_t* index),
               {
                 if (l1) nearest_channels_loop<float, kBytes, true>(q, points, n, channels, distance, index);
                 else nearest_channels_loop<float, kBytes, false>(q, points, n, channels, distance, index);
               })
void nearest_channels(const double* q, const double* points, int64_t n, int64_t channels, bool l1, double* distance, int64_t* index) {
  if (l1) nearest_channels_loop<double, 16, true>(q, points, n, channels, distance, index);
  else nearest_channels_loop<double, 16, false>(q, points, n, channels, distance, index);
}

// A cloud as three arrays whose length is rounded up to whole tiles; the rest are copies of NaN. With more channels, only the rows.
template <class T>
class Cloud {
 public:
  void load(const T* points, int64_t n, int64_t channels) {
    size = n, rows = points;
    if (channels > 3) return;
    if (channels < 3) {
      T* wide = wide_.get(3 * n);
      for (int64_t i = 0; i < n; ++i)
        for (int64_t c = 0; c < 3; ++c) wide[3 * i + c] = c < channels ? points[i * channels + c] : T(0);
      rows = points = wide;
    }
    const int64_t padded = (n + kTile<T> - 1) / kTile<T> * kTile<T>;
    soa = {x_.get(padded), y_.get(padded), z_.get(padded)};
    split_axes(points, n, soa);
    for (T* axis : {soa.x, soa.y, soa.z}) std::fill(axis + n, axis + padded, std::numeric_limits<T>::quiet_NaN());
  }
  Soa<T> soa;
  Blocks<T> blocks;
  const T* rows = nullptr;
  int64_t size = 0;

 private:
  Scratch<T> x_, y_, z_, wide_;
};

template <class T>
struct Problem {
  const T *x, *y;
  Clouds xs, ys;
  int64_t channels;
  int norm, direction;
};

// Finds, for the queries of some tiles, the nearest points of `other`; distances [n] as the norm wants them, rows or -1.
template <class T>
void nearest_rows(const Cloud<T>& own, const Cloud<T>& other, int64_t other_row, int norm, int64_t tile0, int64_t tile1, T* distance,
                  int64_t* nearest) {
  T d[kTile<T>];
  Bits<T> index[kTile<T>];
  for (int64_t tile = tile0; tile < tile1; ++tile) {
    const int64_t begin = tile * kTile<T>, count = std::min<int64_t>(kTile<T>, own.size - begin);
    nearest_tile(own.soa.x + begin, own.soa.y + begin, own.soa.z + begin, other.soa, other.size, norm == kManhattan, d, index);
    for (int64_t l = 0; l < count; ++l) {
      distance[begin + l] = norm == kEuclidean ? std::sqrt(d[l]) : d[l];
      nearest[begin + l] = index[l] < 0 ? -1 : other_row + index[l];
    }
  }
}

// The same for more than three channels and tiles of `kLanes`.
template <class T>
void nearest_rows_of_channels(const Cloud<T>& own, const Cloud<T>& other, int64_t channels, int64_t other_row, int norm, int64_t tile0,
                              int64_t tile1, T* distance, int64_t* nearest) {
  Scratch<T> scratch;
  constexpr int64_t kWidth = kLanes<T>;
  T *q = scratch.get(kWidth * channels), d[kWidth];
  Bits<T> index[kWidth];
  for (int64_t tile = tile0; tile < tile1; ++tile) {
    const int64_t begin = tile * kWidth, count = std::min<int64_t>(kWidth, own.size - begin);
    for (int64_t l = 0; l < kWidth; ++l)
      for (int64_t c = 0; c < channels; ++c) q[kWidth * c + l] = own.rows[(begin + std::min(l, count - 1)) * channels + c];
    nearest_channels(q, other.rows, other.size, channels, norm == kManhattan, d, index);
    for (int64_t l = 0; l < count; ++l) {
      distance[begin + l] = norm == kEuclidean ? std::sqrt(d[l]) : d[l];
      nearest[begin + l] = index[l] < 0 ? -1 : other_row + index[l];
    }
  }
}

// The same for a range of queries, by a tree over `other`.
template <class T>
void nearest_by_tree(const Cloud<T>& own, const Tree<T>& tree, int64_t other_row, int norm, int64_t begin, int64_t end, T* distance,
                     int64_t* nearest) {
  for (int64_t i = begin; i < end; ++i) {
    TreeQuery<T> query{{own.soa.x[i], own.soa.y[i], own.soa.z[i]}, std::numeric_limits<T>::infinity()};
    query.manhattan = norm == kManhattan;
    Key<T> best;
    const bool found = tree.search(query, 1, &best) > 0;
    const T d = found ? from_bits<T>(bits_of_key(best)) : T(0);
    distance[i] = norm == kEuclidean ? std::sqrt(d) : d;
    nearest[i] = found ? other_row + index_of_key(best) : -1;
  }
}

// Nanoseconds, measured on one core with AVX-512.
bool tree_pays(int64_t queries, int64_t n) {
  const auto q = static_cast<double>(queries), points = static_cast<double>(n);
  return q * 0.14 * points > 55 * points + 500 * q;
}

// Blocks have to be made of both clouds; they serve both directions. They take two thirds (of 1,024 points) to a quarter (of 8,192) of the time
// of comparing all pairs or of a tree, but half as long again as all pairs on clouds far apart, of which all blocks are looked at.
bool blocks_pay(int64_t n, int64_t m) { return std::min(n, m) >= 768 && std::max(n, m) <= 16384; }

// Mean of the distances of the rows that have a nearest point, summed in double in a fixed order; 0 without any.
template <class T>
double mean_distance(const T* distance, const int64_t* nearest, int64_t n) {
  constexpr int kSums = 8;
  double sum[kSums] = {};
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    sum[i % kSums] += nearest[i] >= 0 ? static_cast<double>(distance[i]) : 0.0;
    count += nearest[i] >= 0;
  }
  for (int half = kSums / 2; half > 0; half /= 2)
    for (int s = 0; s < half; ++s) sum[s] += sum[s + half];
  return sum[0] / static_cast<double>(std::max<int64_t>(count, 1));
}

template <class T>
struct Memory {
  Cloud<T> x, y;
  Scratch<T> distance;
};

// One direction of one pair; `nearest` points at the first row of the cloud.
template <class T>
double one_direction(const Cloud<T>& own, const Cloud<T>& other, int64_t channels, int64_t other_row, int norm, int threads,
                     Scratch<T>& scratch, int64_t* nearest) {
  T* distance = scratch.get(own.size);
  if (channels > 3) {
    const int64_t grain = std::max<int64_t>(1, (int64_t{1} << 21) / (4 * channels * std::max<int64_t>(other.size, 1)));
    parallel_for(threads, (own.size + kLanes<T> - 1) / kLanes<T>, grain, [&](int64_t t0, int64_t t1) {
      nearest_rows_of_channels(own, other, channels, other_row, norm, t0, t1, distance, nearest);
    });
  } else if (blocks_pay(own.size, other.size)) {
    std::fill(nearest, nearest + own.size, int64_t{-1});
    parallel_for(threads, own.blocks.count, 64, [&](int64_t b0, int64_t b1) {
      nearest_in_blocks(own.blocks, other.blocks, b0, b1, norm == kManhattan, distance, nearest);
    });
    for (int64_t i = 0; i < own.size; ++i) {
      if (nearest[i] < 0) continue;
      nearest[i] += other_row;
      if (norm == kEuclidean) distance[i] = std::sqrt(distance[i]);
    }
  } else if (tree_pays(own.size, other.size)) {
    const Tree<T> tree(other.rows, other.size, threads);
    parallel_for(threads, own.size, 2048, [&](int64_t i0, int64_t i1) { nearest_by_tree(own, tree, other_row, norm, i0, i1, distance, nearest); });
  } else {
    const int64_t tiles = (own.size + kTile<T> - 1) / kTile<T>;
    const int64_t grain = std::max<int64_t>(1, (int64_t{1} << 21) / (kTile<T> * std::max<int64_t>(other.size, 1)));
    parallel_for(threads, tiles, grain, [&](int64_t t0, int64_t t1) { nearest_rows(own, other, other_row, norm, t0, t1, distance, nearest); });
  }
  return mean_distance(distance, nearest, own.size);
}

template <class T>
void forward(const Problem<T>& p, int threads, int64_t* nearest_y, int64_t* nearest_x, T* loss) {
  const int64_t batch = p.xs.batch;
  int64_t pairs = 1;
  for (int64_t b = 0; b < batch; ++b) pairs += p.xs.size(b) * p.ys.size(b) * std::max<int64_t>(1, p.channels / 3);
  const int64_t grain = std::max<int64_t>(1, (int64_t{1} << 20) * batch / pairs);
  // Few pairs of clouds: threads share each of them. Many: they share the batch.
  const int inside = batch < 2 * threads ? threads : 1;
  parallel_for(inside > 1 ? 1 : threads, batch, grain, [&](int64_t b0, int64_t b1) {
    Memory<T> memory;
    for (int64_t b = b0; b < b1; ++b) {
      const int64_t x_row = p.xs.begin(b), y_row = p.ys.begin(b);
      memory.x.load(p.x + p.channels * x_row, p.xs.size(b), p.channels);
      memory.y.load(p.y + p.channels * y_row, p.ys.size(b), p.channels);
      if (p.channels <= 3 && blocks_pay(memory.x.size, memory.y.size))
        for (Cloud<T>* cloud : {&memory.x, &memory.y}) cloud->blocks.load(cloud->rows, cloud->size, inside);
      double total = 0;
      if (p.direction != kFromY) {
        total += one_direction(memory.x, memory.y, p.channels, y_row, p.norm, inside, memory.distance, nearest_y + x_row);
        if (!p.xs.offsets) std::fill(nearest_y + x_row + memory.x.size, nearest_y + x_row + p.xs.stride, int64_t{-1});
      }
      if (p.direction != kFromX) {
        total += one_direction(memory.y, memory.x, p.channels, x_row, p.norm, inside, memory.distance, nearest_x + y_row);
        if (!p.ys.offsets) std::fill(nearest_x + y_row + memory.y.size, nearest_x + y_row + p.ys.stride, int64_t{-1});
      }
      loss[b] = static_cast<T>(total);
    }
  });
}

// Adds the gradient of the mean distance of rows [0, n) of `own` to both clouds, row by row.
template <class T>
void add_pulls(const T* own, const T* other, const int64_t* nearest, int64_t n, int64_t other_row, int norm, T grad, T* grad_own, T* grad_other) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) count += nearest[i] >= 0;
  const T weight = grad / static_cast<T>(std::max<int64_t>(count, 1));
  for (int64_t i = 0; i < n; ++i) {
    if (nearest[i] < 0) continue;
    const int64_t j = nearest[i] - other_row;
    const T *a = own + 3 * i, *b = other + 3 * j;
    T d[3] = {a[0] - b[0], a[1] - b[1], a[2] - b[2]}, scale = 2 * weight;
    if (norm == kManhattan) {
      scale = weight;
      for (T& v : d) v = static_cast<T>((v > 0) - (v < 0));
    } else if (norm == kEuclidean) {
      const T length = std::sqrt(squared(d[0], d[1], d[2]));
      scale = length > 0 ? weight / length : T(0);
    }
    for (int axis = 0; axis < 3; ++axis) {
      grad_own[3 * i + axis] += scale * d[axis];
      grad_other[3 * j + axis] -= scale * d[axis];
    }
  }
}

// The same for any number of channels.
template <class T>
void add_pulls_of_channels(const T* own, const T* other, int64_t channels, const int64_t* nearest, int64_t n, int64_t other_row, int norm,
                           T grad, T* grad_own, T* grad_other) {
  if (channels == 3) return add_pulls(own, other, nearest, n, other_row, norm, grad, grad_own, grad_other);
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) count += nearest[i] >= 0;
  const T weight = grad / static_cast<T>(std::max<int64_t>(count, 1));
  for (int64_t i = 0; i < n; ++i) {
    if (nearest[i] < 0) continue;
    const int64_t j = nearest[i] - other_row;
    const T *a = own + channels * i, *b = other + channels * j;
    T scale = norm == kManhattan ? weight : 2 * weight, square = 0;
    if (norm == kEuclidean) {
      for (int64_t c = 0; c < channels; ++c) square += (a[c] - b[c]) * (a[c] - b[c]);
      scale = square > 0 ? weight / std::sqrt(square) : T(0);
    }
    for (int64_t c = 0; c < channels; ++c) {
      const T d = a[c] - b[c], pull = scale * (norm == kManhattan ? static_cast<T>((d > 0) - (d < 0)) : d);
      grad_own[channels * i + c] += pull;
      grad_other[channels * j + c] -= pull;
    }
  }
}

template <class T>
void backward(const Problem<T>& p, int threads, const int64_t* nearest_y, const int64_t* nearest_x, const T* grad, T* grad_x, T* grad_y) {
  const int64_t batch = p.xs.batch;
  int64_t rows = 1;
  for (int64_t b = 0; b < batch; ++b) rows += p.xs.size(b) + p.ys.size(b);
  parallel_for(threads, batch, std::max<int64_t>(1, (int64_t{1} << 17) * batch / rows), [&](int64_t b0, int64_t b1) {
    for (int64_t b = b0; b < b1; ++b) {
      const int64_t x_row = p.xs.begin(b), y_row = p.ys.begin(b), n = p.xs.size(b), m = p.ys.size(b);
      T *gx = grad_x + p.channels * x_row, *gy = grad_y + p.channels * y_row;
      std::fill(gx, gx + p.channels * (p.xs.offsets ? n : p.xs.stride), T(0));
      std::fill(gy, gy + p.channels * (p.ys.offsets ? m : p.ys.stride), T(0));
      const T *x = p.x + p.channels * x_row, *y = p.y + p.channels * y_row;
      if (p.direction != kFromY) add_pulls_of_channels(x, y, p.channels, nearest_y + x_row, n, y_row, p.norm, grad[b], gx, gy);
      if (p.direction != kFromX) add_pulls_of_channels(y, x, p.channels, nearest_x + y_row, m, x_row, p.norm, grad[b], gy, gx);
    }
  });
}

}  // namespace
}  // namespace geossl

// See geossl/ops/chamfer.py for the arguments of both; `nearest` holds the rows found for x, then those for y.
GEOSSL_API int geossl_chamfer_cpu(int threads, int is_double, const void* x, const int64_t* x_offsets, const int64_t* x_lengths, int64_t n,
                                  const void* y, const int64_t* y_offsets, const int64_t* y_lengths, int64_t m, int64_t batch,
                                  int64_t channels, int norm, int direction, int64_t* nearest, void*, void* loss) {
  using namespace geossl;
  const Clouds xs{x_offsets, x_lengths, batch, n}, ys{y_offsets, y_lengths, batch, m};
  if (batch < 0 || n < 0 || m < 0 || channels < 1) return GEOSSL_INVALID_ARGUMENT;
  if (!clouds_fit(xs) || !clouds_fit(ys)) return GEOSSL_TOO_LARGE;
  return for_type(is_double, [&](auto zero) {
    using T = decltype(zero);
    int64_t* nearest_x = nearest + (direction == kFromY ? 0 : xs.rows());
    forward(Problem<T>{static_cast<const T*>(x), static_cast<const T*>(y), xs, ys, channels, norm, direction}, threads, nearest, nearest_x,
            static_cast<T*>(loss));
    return int{GEOSSL_OK};
  });
}
GEOSSL_PACKED(geossl_chamfer_cpu)

GEOSSL_API int geossl_chamfer_backward_cpu(int threads, int is_double, const void* x, const int64_t* x_offsets, const int64_t* x_lengths,
                                           int64_t n, const void* y, const int64_t* y_offsets, const int64_t* y_lengths, int64_t m,
                                           int64_t batch, int64_t channels, int norm, int direction, const int64_t* nearest,
                                           const void* grad, const int64_t*, const int64_t*, void*, void* grad_x, void* grad_y) {
  using namespace geossl;
  const Clouds xs{x_offsets, x_lengths, batch, n}, ys{y_offsets, y_lengths, batch, m};
  if (batch < 0 || n < 0 || m < 0 || channels < 1) return GEOSSL_INVALID_ARGUMENT;
  return for_type(is_double, [&](auto zero) {
    using T = decltype(zero);
    const int64_t* nearest_x = nearest + (direction == kFromY ? 0 : xs.rows());
    backward(Problem<T>{static_cast<const T*>(x), static_cast<const T*>(y), xs, ys, channels, norm, direction}, threads, nearest, nearest_x,
             static_cast<const T*>(grad), static_cast<T*>(grad_x), static_cast<T*>(grad_y));
    return int{GEOSSL_OK};
  });
}
GEOSSL_PACKED(geossl_chamfer_backward_cpu)
