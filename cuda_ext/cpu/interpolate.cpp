// Weighted sums of the features of neighbours, and their gradients.
#include <algorithm>

#include "points.h"

namespace geossl {
namespace {

constexpr int64_t kWorkPerThread = int64_t{1} << 18;  // products that a thread is worth starting for

// to += weight * from, channel by channel.
template <class T>
GEOSSL_INLINE void add_loop(T weight, const T* GEOSSL_RESTRICT from, T* GEOSSL_RESTRICT to, int64_t channels) {
  for (int64_t c = 0; c < channels; ++c) to[c] += weight * from[c];
}

// The rows of one query; of entries without a row nothing is read.
template <class T>
GEOSSL_INLINE void sum_loop(const T* features, int64_t channels, int64_t n, const int64_t* index, const T* weight, int64_t k, T* out) {
  for (int64_t c = 0; c < channels; ++c) out[c] = T(0);
  for (int64_t j = 0; j < k; ++j)
    if (index[j] >= 0 && index[j] < n) add_loop(weight[j], features + index[j] * channels, out, channels);
}
GEOSSL_SIMD void weighted_sum(const float* features, int64_t channels, int64_t n, const int64_t* index, const float* weight, int64_t k,
                              float* out) {
  sum_loop(features, channels, n, index, weight, k, out);
}
void weighted_sum(const double* features, int64_t channels, int64_t n, const int64_t* index, const double* weight, int64_t k,
                              double* out) {
  sum_loop(features, channels, n, index, weight, k, out);
}

// Products of two rows, in 16 sums that are then added in pairs: one order for any vector width.
template <class T>
GEOSSL_INLINE T dot_loop(const T* a, const T* b, int64_t channels) {
  constexpr int64_t kSums = 16;
  T sum[kSums] = {};
  int64_t c = 0;
  for (; c + kSums <= channels; c += kSums)
    for (int64_t s = 0; s < kSums; ++s) sum[s] += a[c + s] * b[c + s];
  for (int64_t s = 0; c + s < channels; ++s) sum[s] += a[c + s] * b[c + s];
  for (int64_t half = kSums / 2; half > 0; half /= 2)
    for (int64_t s = 0; s < half; ++s) sum[s] += sum[s + half];
  return sum[0];
}
GEOSSL_SIMD float dot(const float* a, const float* b, int64_t channels) { return dot_loop(a, b, channels); }
double dot(const double* a, const double* b, int64_t channels) { return dot_loop(a, b, channels); }

// out[row] += weight * grad[query], entry by entry, for a range of channels of one cloud.
template <class T>
GEOSSL_INLINE void scatter_loop(const T* grad, int64_t channels, const int64_t* index, const T* weight, int64_t queries, int64_t k, int64_t n,
                                int64_t c0, int64_t c1, T* out) {
  for (int64_t row = 0; row < n; ++row)
    for (int64_t c = c0; c < c1; ++c) out[row * channels + c] = T(0);
  for (int64_t e = 0; e < queries * k; ++e)
    if (index[e] >= 0 && index[e] < n) add_loop(weight[e], grad + e / k * channels + c0, out + index[e] * channels + c0, c1 - c0);
}
GEOSSL_SIMD void scatter(const float* grad, int64_t channels, const int64_t* index, const float* weight, int64_t queries, int64_t k, int64_t n,
                         int64_t c0, int64_t c1, float* out) {
  scatter_loop(grad, channels, index, weight, queries, k, n, c0, c1, out);
}
void scatter(const double* grad, int64_t channels, const int64_t* index, const double* weight, int64_t queries, int64_t k, int64_t n,
             int64_t c0, int64_t c1, double* out) {
  scatter_loop(grad, channels, index, weight, queries, k, n, c0, c1, out);
}

}  // namespace
}  // namespace geossl

// See geossl/ops/interpolation.py for the arguments of both.
GEOSSL_API int geossl_interpolate_cpu(int threads, int is_double, const void* features, int64_t channels, int64_t n, int64_t batch,
                                      const int64_t* index, const void* weight, int64_t queries, int64_t k, void* out) {
  using namespace geossl;
  if (channels < 0 || n < 0 || batch < 0 || queries < 0 || k < 0) return GEOSSL_INVALID_ARGUMENT;
  if (!in_range(index, batch * queries * k, n)) return GEOSSL_INVALID_ARGUMENT;
  return for_type(is_double, [&](auto zero) {
    using T = decltype(zero);
    parallel_for(threads, batch * queries, kWorkPerThread / std::max<int64_t>(k * channels, 1), [&](int64_t q0, int64_t q1) {
      for (int64_t q = q0; q < q1; ++q)
        weighted_sum(static_cast<const T*>(features) + q / queries * n * channels, channels, n, index + q * k, static_cast<const T*>(weight) + q * k,
                     k, static_cast<T*>(out) + q * channels);
    });
    return int{GEOSSL_OK};
  });
}
GEOSSL_PACKED(geossl_interpolate_cpu)

GEOSSL_API int geossl_interpolate_backward_cpu(int threads, int is_double, const void* grad, const void* features, int64_t channels, int64_t n,
                                               int64_t batch, const int64_t* index, const void* weight, int64_t queries, int64_t k,
                                               const int64_t*, const int64_t*, void* grad_features, void* grad_weight) {
  using namespace geossl;
  if (channels < 0 || n < 0 || batch < 0 || queries < 0 || k < 0) return GEOSSL_INVALID_ARGUMENT;
  return for_type(is_double, [&](auto zero) {
    using T = decltype(zero);
    const auto *g = static_cast<const T*>(grad), *f = static_cast<const T*>(features), *w = static_cast<const T*>(weight);
    parallel_for(threads, batch * queries, kWorkPerThread / std::max<int64_t>(k * channels, 1), [&](int64_t q0, int64_t q1) {
      for (int64_t q = q0; q < q1; ++q)
        for (int64_t e = q * k; e < (q + 1) * k; ++e) {
          const bool found = index[e] >= 0 && index[e] < n;
          static_cast<T*>(grad_weight)[e] = found ? dot(g + q * channels, f + (q / queries * n + index[e]) * channels, channels) : T(0);
        }
    });
    // Each sum runs over its entries in order, whichever thread does it: clouds and blocks of channels are independent.
    const int64_t blocks = std::clamp<int64_t>(std::min<int64_t>(threads, channels / 16), 1, 64);
    const int64_t work = std::max<int64_t>(1, queries * k * channels / blocks);
    parallel_for(threads, batch * blocks, std::max<int64_t>(1, kWorkPerThread / work), [&](int64_t t0, int64_t t1) {
      for (int64_t t = t0; t < t1; ++t) {
        const int64_t b = t / blocks, block = t % blocks, entries = queries * k;
        scatter(g + b * queries * channels, channels, index + b * entries, w + b * entries, queries, k, n, channels * block / blocks,
                channels * (block + 1) / blocks, static_cast<T*>(grad_features) + b * n * channels);
      }
    });
    return int{GEOSSL_OK};
  });
}
GEOSSL_PACKED(geossl_interpolate_backward_cpu)
