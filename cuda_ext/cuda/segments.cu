// Reductions of rows that share a segment. One thread per segment and channel visits the rows in order, through `order`, the rows sorted by
// segment (null: they stand in that order), and where each segment `starts` in it: neighbouring threads read neighbouring channels, and
// there are no atomics, so the bits are the same every time and those of the CPU.
#include "exponential.h"
#include "warp.cuh"

namespace geossl {
namespace {

constexpr int kThreads = 256;

template <class T>
struct Rows {
  const T* x;
  int64_t rows, channels;
  const int64_t *order, *starts;
  int64_t size;

  __device__ int64_t begin(int64_t s) const { return clamp(starts[s]); }
  __device__ int64_t end(int64_t s) const { return clamp(starts[s + 1]); }
  __device__ int64_t row(int64_t i) const {
    const int64_t found = order ? order[i] : i;
    return static_cast<uint64_t>(found) < static_cast<uint64_t>(rows) ? found : 0;
  }

 private:
  // Neither splits nor order have been checked: they must not reach past the rows.
  __device__ int64_t clamp(int64_t i) const { return i < 0 ? 0 : i > rows ? rows : i; }
};

// Calls f(segment, channel, place in the output).
template <class T, class F>
__device__ __forceinline__ void each_segment(const Rows<T>& r, F f) {
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < r.size * r.channels; i += int64_t{gridDim.x} * kThreads) {
    const int64_t s = i / r.channels;
    f(s, i - s * r.channels, i);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) sum_kernel(Rows<T> r, T* out, int64_t* count) {
  each_segment(r, [&](int64_t s, int64_t c, int64_t i) {
    const int64_t begin = r.begin(s), end = r.end(s);
    T sum = T(0);
    for (int64_t e = begin; e < end; ++e) sum += r.x[r.row(e) * r.channels + c];
    if (count) {
      const int64_t n = end > begin ? end - begin : 0;
      if (c == 0) count[s] = n;
      if (n > 1) sum /= static_cast<T>(n);
    }
    out[i] = sum;
  });
}

// Of the rows of a segment: the best value and its row, -1 if there is none. A NaN is better than any number.
template <bool largest, class T>
__device__ __forceinline__ int64_t best_row(const Rows<T>& r, int64_t s, int64_t c, T& best) {
  int64_t found = -1;
  for (int64_t e = r.begin(s); e < r.end(s); ++e) {
    const int64_t row = r.row(e);
    const T value = r.x[row * r.channels + c];
    if (found < 0 || (largest ? value > best : value < best) || (value != value && best == best)) best = value, found = row;
  }
  return found;
}

template <bool largest, class T>
__global__ void __launch_bounds__(kThreads) extreme_kernel(Rows<T> r, T fill, T* out, int64_t* arg) {
  each_segment(r, [&](int64_t s, int64_t c, int64_t i) {
    T best = fill;
    const int64_t row = best_row<largest>(r, s, c, best);
    out[i] = best;
    if (arg) arg[i] = row;
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads) softmax_kernel(Rows<T> r, T* out) {
  each_segment(r, [&](int64_t s, int64_t c, int64_t) {
    T shift = T(0), total = T(0);
    best_row<true>(r, s, c, shift);
    for (int64_t e = r.begin(s); e < r.end(s); ++e) {
      const int64_t at = r.row(e) * r.channels + c;
      const T value = exponential(r.x[at] - shift);
      out[at] = value;
      total += value;
    }
    for (int64_t e = r.begin(s); e < r.end(s); ++e) out[r.row(e) * r.channels + c] /= total;
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads) logsumexp_kernel(Rows<T> r, T* out) {
  each_segment(r, [&](int64_t s, int64_t c, int64_t i) {
    T shift = T(0), total = T(0);
    best_row<true>(r, s, c, shift);
    if (shift == infinity<T>() || shift == -infinity<T>()) shift = T(0);
    const int64_t end = r.end(s);
#pragma unroll 1  // unrolled, it spills on sm_90
    for (int64_t e = r.begin(s); e < end; ++e) total += exponential(r.x[r.row(e) * r.channels + c] - shift);
    out[i] = shift + logarithm(total);
  });
}

// Launches kernel(rows, arguments...) for float or double: launch(rows of the type, launcher) calls launcher(kernel, arguments...).
template <class F>
int for_segments(int device, void* stream, int is_double, const void* x, int64_t rows, int64_t channels, const int64_t* order,
                 const int64_t* starts, int64_t size, F&& launch) {
  if (rows < 0 || channels < 0 || size < 0) return GEOSSL_INVALID_ARGUMENT;
  if (size * channels == 0) return GEOSSL_OK;
  return on_device(device, is_double, [&](auto zero) {
    using T = decltype(zero);
    const Rows<T> r{static_cast<const T*>(x), rows, channels, order, starts, size};
    return launch(zero, [&](auto kernel, auto... arguments) {
      return gpu::launch(kernel, blocks_for(size * channels, kThreads), dim3(kThreads), 0, as_stream(stream), r, arguments...);
    });
  });
}

}  // namespace
}  // namespace geossl

// See geossl/ops/segments.py for the arguments of all.
GEOSSL_API int geossl_segment_sum_cuda(int device, void* stream, int is_double, const void* x, int64_t rows, int64_t channels, const int64_t*,
                                       const int64_t* starts, const int64_t* order, int64_t size, void* out, int64_t* count) {
  using namespace geossl;
  return for_segments(device, stream, is_double, x, rows, channels, order, starts, size, [&](auto zero, auto launch) {
    using T = decltype(zero);
    return launch(sum_kernel<T>, static_cast<T*>(out), count);
  });
}
GEOSSL_PACKED(geossl_segment_sum_cuda)

GEOSSL_API int geossl_segment_extreme_cuda(int device, void* stream, int is_double, const void* x, int64_t rows, int64_t channels,
                                           const int64_t*, const int64_t* starts, const int64_t* order, int64_t size, int largest, double fill,
                                           void* out, int64_t* arg) {
  using namespace geossl;
  return for_segments(device, stream, is_double, x, rows, channels, order, starts, size, [&](auto zero, auto launch) {
    using T = decltype(zero);
    return launch(largest ? extreme_kernel<true, T> : extreme_kernel<false, T>, static_cast<T>(fill), static_cast<T*>(out), arg);
  });
}
GEOSSL_PACKED(geossl_segment_extreme_cuda)

GEOSSL_API int geossl_segment_softmax_cuda(int device, void* stream, int is_double, const void* x, int64_t rows, int64_t channels,
                                           const int64_t*, const int64_t* starts, const int64_t* order, int64_t size, void* out) {
  using namespace geossl;
  return for_segments(device, stream, is_double, x, rows, channels, order, starts, size, [&](auto zero, auto launch) {
    using T = decltype(zero);
    return launch(softmax_kernel<T>, static_cast<T*>(out));
  });
}
GEOSSL_PACKED(geossl_segment_softmax_cuda)

GEOSSL_API int geossl_segment_logsumexp_cuda(int device, void* stream, int is_double, const void* x, int64_t rows, int64_t channels,
                                             const int64_t*, const int64_t* starts, const int64_t* order, int64_t size, void* out) {
  using namespace geossl;
  return for_segments(device, stream, is_double, x, rows, channels, order, starts, size, [&](auto zero, auto launch) {
    using T = decltype(zero);
    return launch(logsumexp_kernel<T>, static_cast<T*>(out));
  });
}
GEOSSL_PACKED(geossl_segment_logsumexp_cuda)
