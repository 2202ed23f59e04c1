// Gathering rows by index, sums over equal indices, and distances to given neighbours.
#include <algorithm>
#include <cstring>

#include "points.h"

namespace geossl {
namespace {

constexpr int64_t kBytesPerThread = int64_t{1} << 20;  // moved memory that a thread is worth starting for

// out[row] += grad[entry], entry by entry, for a range of channels.
template <class T>
void add_rows(const T* grad, int64_t channels, const int64_t* index, int64_t entries, int64_t c0, int64_t c1, int64_t n, T* out) {
  for (int64_t row = 0; row < n; ++row) std::fill(out + row * channels + c0, out + row * channels + c1, T(0));
  for (int64_t e = 0; e < entries; ++e) {
    const int64_t row = index[e];
    if (row < 0 || row >= n) continue;
    const T* from = grad + e * channels;
    T* to = out + row * channels;
    for (int64_t c = c0; c < c1; ++c) to[c] += from[c];
  }
}

template <class T>
struct Pairs {
  const T *query, *points;
  const int64_t* index;
  int64_t queries, n, k;  // of one cloud

  // Calls f(entry, query row, point row) for all entries with a neighbour, in order.
  template <class F>
  void each(F&& f) const {
    for (int64_t q = 0, e = 0; q < queries; ++q)
      for (int64_t j = 0; j < k; ++j, ++e)
        if (index[e] >= 0 && index[e] < n) f(e, query + 3 * q, points + 3 * index[e]);
  }
};

}  // namespace
}  // namespace geossl

// See geossl/ops/grouping.py for the arguments of these three. A null `fill` stands for zeros.
GEOSSL_API int geossl_group_cpu(int threads, int64_t row_bytes, const void* features, int64_t n, int64_t batch, const int64_t* index,
                                int64_t entries, const void* fill, void* out) {
  using namespace geossl;
  if (row_bytes < 0 || n < 0 || batch < 0 || entries < 0) return GEOSSL_INVALID_ARGUMENT;
  if (!in_range(index, batch * entries, n)) return GEOSSL_INVALID_ARGUMENT;
  return guarded([&] {
    parallel_for(threads, batch * entries, kBytesPerThread / std::max<int64_t>(row_bytes, 1), [&](int64_t e0, int64_t e1) {
      for (int64_t e = e0; e < e1; ++e) {
        char* to = static_cast<char*>(out) + e * row_bytes;
        const int64_t row = index[e];
        if (row >= 0)
          std::memcpy(to, static_cast<const char*>(features) + (e / entries * n + row) * row_bytes, static_cast<size_t>(row_bytes));
        else if (fill)
          std::memcpy(to, fill, static_cast<size_t>(row_bytes));
        else
          std::memset(to, 0, static_cast<size_t>(row_bytes));
      }
    });
  });
}
GEOSSL_PACKED(geossl_group_cpu)

// A radius of 0 stands for none, null features for no channels.
GEOSSL_API int geossl_group_relative_cpu(int threads, int is_double, const void* points, int64_t n, int64_t batch, const void* centers,
                                         int64_t queries, const void* features, int64_t channels, const int64_t* index, int64_t k,
                                         double radius, void* out) {
  using namespace geossl;
  if (n < 0 || batch < 0 || queries < 0 || channels < 0 || k < 0) return GEOSSL_INVALID_ARGUMENT;
  if (!in_range(index, batch * queries * k, n)) return GEOSSL_INVALID_ARGUMENT;
  return for_type(is_double, [&](auto zero) {
    using T = decltype(zero);
    const int64_t width = 3 + channels, row_bytes = width * static_cast<int64_t>(sizeof(T));
    const T divisor = static_cast<T>(radius);
    parallel_for(threads, batch * queries, kBytesPerThread / std::max<int64_t>(k * row_bytes, 1), [&](int64_t q0, int64_t q1) {
      for (int64_t q = q0; q < q1; ++q) {
        const T* center = static_cast<const T*>(centers) + 3 * q;
        const int64_t cloud = q / queries * n;
        T* to = static_cast<T*>(out) + q * k * width;
        for (int64_t j = 0; j < k; ++j, to += width) {
          const int64_t row = index[q * k + j];
          if (row < 0) {
            std::fill(to, to + width, T(0));
            continue;
          }
          const T* p = static_cast<const T*>(points) + 3 * (cloud + row);
          for (int axis = 0; axis < 3; ++axis) {
            const T local = p[axis] - center[axis];
            to[axis] = radius > 0 ? local / divisor : local;
          }
          const T* from = static_cast<const T*>(features) + (cloud + row) * channels;
          for (int64_t c = 0; c < channels; ++c) to[3 + c] = from[c];
        }
      }
    });
    return int{GEOSSL_OK};
  });
}
GEOSSL_PACKED(geossl_group_relative_cpu)

GEOSSL_API int geossl_group_backward_cpu(int threads, int is_double, const void* grad, int64_t channels, int64_t n, int64_t batch,
                                         const int64_t* index, int64_t entries, const int64_t*, const int64_t*, void* out) {
  using namespace geossl;
  if (channels < 0 || n < 0 || batch < 0 || entries < 0) return GEOSSL_INVALID_ARGUMENT;
  return for_type(is_double, [&](auto zero) {
    using T = decltype(zero);
    // Each sum runs over its entries in order, whichever thread does it: clouds and blocks of channels are independent.
    const int64_t blocks = std::clamp<int64_t>(std::min<int64_t>(threads, channels / 16), 1, 64);
    const int64_t bytes = std::max<int64_t>(1, entries * channels / blocks * static_cast<int64_t>(sizeof(T)));
    parallel_for(threads, batch * blocks, std::max<int64_t>(1, kBytesPerThread / bytes), [&](int64_t t0, int64_t t1) {
      for (int64_t t = t0; t < t1; ++t) {
        const int64_t b = t / blocks, block = t % blocks;
        add_rows(static_cast<const T*>(grad) + b * entries * channels, channels, index + b * entries, entries, channels * block / blocks,
                 channels * (block + 1) / blocks, n, static_cast<T*>(out) + b * n * channels);
      }
    });
    return int{GEOSSL_OK};
  });
}
GEOSSL_PACKED(geossl_group_backward_cpu)

// See geossl/ops/neighbors.py for the arguments of both.
GEOSSL_API int geossl_neighbor_distance_cpu(int threads, int is_double, const void* query, int64_t queries, const void* points, int64_t n,
                                            int64_t batch, const int64_t* index, int64_t k, void* out) {
  using namespace geossl;
  if (queries < 0 || n < 0 || batch < 0 || k < 0) return GEOSSL_INVALID_ARGUMENT;
  return for_type(is_double, [&](auto zero) {
    using T = decltype(zero);
    parallel_for(threads, batch * queries, (int64_t{1} << 17) / std::max<int64_t>(k, 1), [&](int64_t q0, int64_t q1) {
      for (int64_t q = q0; q < q1; ++q) {
        T* distance = static_cast<T*>(out) + q * k;
        std::fill(distance, distance + k, std::numeric_limits<T>::infinity());
        const Pairs<T> pairs{static_cast<const T*>(query) + 3 * q, static_cast<const T*>(points) + 3 * n * (q / queries), index + q * k, 1, n, k};
        pairs.each([&](int64_t e, const T* a, const T* b) { distance[e] = squared(a[0] - b[0], a[1] - b[1], a[2] - b[2]); });
      }
    });
    return int{GEOSSL_OK};
  });
}
GEOSSL_PACKED(geossl_neighbor_distance_cpu)

GEOSSL_API int geossl_neighbor_distance_backward_cpu(int threads, int is_double, const void* query, int64_t queries, const void* points,
                                                     int64_t n, int64_t batch, const int64_t* index, int64_t k, const void* grad,
                                                     const int64_t*, const int64_t*, void* grad_query, void* grad_points) {
  using namespace geossl;
  if (queries < 0 || n < 0 || batch < 0 || k < 0) return GEOSSL_INVALID_ARGUMENT;
  return for_type(is_double, [&](auto zero) {
    using T = decltype(zero);
    const int64_t work = std::max<int64_t>(1, queries * k);
    parallel_for(threads, batch, std::max<int64_t>(1, (int64_t{1} << 17) / work), [&](int64_t b0, int64_t b1) {
      for (int64_t b = b0; b < b1; ++b) {
        const Pairs<T> pairs{static_cast<const T*>(query) + 3 * queries * b, static_cast<const T*>(points) + 3 * n * b,
                             index + b * queries * k, queries, n, k};
        const T* g = static_cast<const T*>(grad) + b * queries * k;
        T *to_query = static_cast<T*>(grad_query) + 3 * queries * b, *to_points = static_cast<T*>(grad_points) + 3 * n * b;
        std::fill(to_query, to_query + 3 * queries, T(0));
        std::fill(to_points, to_points + 3 * n, T(0));
        pairs.each([&](int64_t e, const T* a, const T* p) {
          T *from = to_query + (a - pairs.query), *to = to_points + (p - pairs.points);
          for (int axis = 0; axis < 3; ++axis) {
            const T pull = 2 * g[e] * (a[axis] - p[axis]);
            from[axis] += pull;
            to[axis] -= pull;
          }
        });
      }
    });
    return int{GEOSSL_OK};
  });
}
GEOSSL_PACKED(geossl_neighbor_distance_backward_cpu)
