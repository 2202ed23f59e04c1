// Gradient of a linear layer that is followed by a maximum over each segment of its rows. One thread per entry of the result walks what
// could contribute to it, in the order of the CPU: neighbouring threads read neighbouring columns, there are no atomics, and the bits agree.
#include "warp.cuh"

namespace geossl {
namespace {

constexpr int kThreads = 256;

template <class T>
struct Entries {
  const T* grad;
  const int64_t *arg, *splits;
  int64_t segments, channels, rows, width;

  // The segment that holds a row: the last one that begins at or before it.
  __device__ int64_t segment_of(int64_t row) const {
    int64_t low = 0, high = segments - 1;
    while (low < high) {
      const int64_t middle = (low + high + 1) / 2;
      if (splits[middle] <= row) low = middle;
      else high = middle - 1;
    }
    return low;
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads) rows_kernel(Entries<T> e, const T* weight, T* grad_x) {
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < e.rows * e.width; i += int64_t{gridDim.x} * kThreads) {
    const int64_t row = i / e.width, column = i - row * e.width, first = e.segments ? e.segment_of(row) * e.channels : 0;
    T sum = T(0);
    for (int64_t c = 0; c < (e.segments ? e.channels : 0); ++c)
      if (e.arg[first + c] == row) sum += e.grad[first + c] * weight[c * e.width + column];
    grad_x[i] = sum;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) weight_kernel(Entries<T> e, const T* x, T* grad_weight) {
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < e.channels * e.width; i += int64_t{gridDim.x} * kThreads) {
    const int64_t channel = i / e.width, column = i - channel * e.width;
    T sum = T(0);
    for (int64_t s = 0; s < e.segments; ++s) {
      const int64_t row = e.arg[s * e.channels + channel];  // unchecked: it must not reach past the rows
      if (static_cast<uint64_t>(row) < static_cast<uint64_t>(e.rows)) sum += e.grad[s * e.channels + channel] * x[row * e.width + column];
    }
    grad_weight[i] = sum;
  }
}

}  // namespace
}  // namespace geossl

// See geossl/ops/linear_max.py for the arguments.
GEOSSL_API int geossl_linear_max_backward_cuda(int device, void* stream, int is_double, const void* grad, const int64_t* arg,
                                               const int64_t* splits, int64_t segments, int64_t channels, const void* x, int64_t rows,
                                               int64_t width, const void* weight, void* grad_x, void* grad_weight) {
  using namespace geossl;
  if (segments < 0 || channels < 0 || rows < 0 || width < 0) return GEOSSL_INVALID_ARGUMENT;
  return on_device(device, is_double, [&](auto zero) {
    using T = decltype(zero);
    const Entries<T> e{static_cast<const T*>(grad), arg, splits, segments, channels, rows, width};
    cudaError_t error = cudaSuccess;
    if (rows * width > 0)
      error = gpu::launch(rows_kernel<T>, blocks_for(rows * width, kThreads), dim3(kThreads), 0, as_stream(stream), e,
                          static_cast<const T*>(weight), static_cast<T*>(grad_x));
    if (error == cudaSuccess && channels * width > 0)
      error = gpu::launch(weight_kernel<T>, blocks_for(channels * width, kThreads), dim3(kThreads), 0, as_stream(stream), e,
                          static_cast<const T*>(x), static_cast<T*>(grad_weight));
    return error;
  });
}
GEOSSL_PACKED(geossl_linear_max_backward_cuda)
