// Weighted sums of the features of neighbours, and their gradients. Sums over equal indices run over the entries of a row in order, found
// through the inverse map of geossl/ops/_dispatch.py: no atomics, the same bits every time.
#include "warp.cuh"

namespace geossl {
namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ int64_t thread_number() { return int64_t{blockIdx.x} * kThreads + threadIdx.x; }
__device__ __forceinline__ int64_t thread_count() { return int64_t{gridDim.x} * kThreads; }
__device__ __forceinline__ float multiply_add(float a, float b, float sum) { return __fadd_rn(sum, __fmul_rn(a, b)); }
__device__ __forceinline__ double multiply_add(double a, double b, double sum) { return __dadd_rn(sum, __dmul_rn(a, b)); }

template <class T>
struct Job {
  const T* features;
  int64_t channels, n, batch;
  const int64_t* index;
  const T* weight;
  int64_t queries, k;

  // The features of query q's j-th neighbour, or null.
  __device__ const T* row(int64_t q, int64_t j) const {
    const int64_t i = index[q * k + j];
    return i >= 0 && i < n ? features + (q / queries * n + i) * channels : nullptr;
  }
};

// One thread per query and channel: consecutive threads read consecutive channels.
template <class T>
__global__ void __launch_bounds__(kThreads) interpolate_kernel(Job<T> job, T* out) {
  for (int64_t i = thread_number(); i < job.batch * job.queries * job.channels; i += thread_count()) {
    const int64_t q = i / job.channels, c = i - q * job.channels;
    T sum = T(0);
    for (int64_t j = 0; j < job.k; ++j)
      if (const T* row = job.row(q, j)) sum = multiply_add(job.weight[q * job.k + j], row[c], sum);
    out[i] = sum;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 4) feature_gradient_kernel(Job<T> job, const T* grad, const int64_t* order, const int64_t* starts, T* out) {
  for (int64_t i = thread_number(); i < job.batch * job.n * job.channels; i += thread_count()) {
    const int64_t row = i / job.channels, c = i - row * job.channels;
    T sum = T(0);
    for (int64_t s = starts[row]; s < starts[row + 1]; ++s)
      sum = multiply_add(job.weight[order[s]], grad[order[s] / job.k * job.channels + c], sum);
    out[i] = sum;
  }
}

// One warp per entry: its lanes share the channels.
template <class T>
__global__ void __launch_bounds__(kThreads) weight_gradient_kernel(Job<T> job, const T* grad, T* out) {
  const int lane = threadIdx.x & 31;
  for (int64_t e = thread_number() / 32; e < job.batch * job.queries * job.k; e += thread_count() / 32) {
    const int64_t q = e / job.k;
    const T* row = job.row(q, e - q * job.k);
    T sum = T(0);
    if (row)
      for (int64_t c = lane; c < job.channels; c += 32) sum = multiply_add(grad[q * job.channels + c], row[c], sum);
    sum = warp_sum(sum);
    if (lane == 0) out[e] = sum;
  }
}

}  // namespace
}  // namespace geossl

// See geossl/ops/interpolation.py for the arguments of both.
GEOSSL_API int geossl_interpolate_cuda(int device, void* stream, int is_double, const void* features, int64_t channels, int64_t n,
                                       int64_t batch, const int64_t* index, const void* weight, int64_t queries, int64_t k, void* out) {
  using namespace geossl;
  if (channels < 0 || n < 0 || batch < 0 || queries < 0 || k < 0) return GEOSSL_INVALID_ARGUMENT;
  const int64_t work = batch * queries * channels;
  if (work == 0) return GEOSSL_OK;
  return on_device(device, is_double, [&](auto zero) {
    using T = decltype(zero);
    const Job<T> job{static_cast<const T*>(features), channels, n, batch, index, static_cast<const T*>(weight), queries, k};
    return gpu::launch(interpolate_kernel<T>, blocks_for(work, kThreads), dim3(kThreads), 0, as_stream(stream), job, static_cast<T*>(out));
  });
}
GEOSSL_PACKED(geossl_interpolate_cuda)

GEOSSL_API int geossl_interpolate_backward_cuda(int device, void* stream, int is_double, const void* grad, const void* features,
                                                int64_t channels, int64_t n, int64_t batch, const int64_t* index, const void* weight,
                                                int64_t queries, int64_t k, const int64_t* order, const int64_t* starts, void* grad_features,
                                                void* grad_weight) {
  using namespace geossl;
  if (channels < 0 || n < 0 || batch < 0 || queries < 0 || k < 0) return GEOSSL_INVALID_ARGUMENT;
  return on_device(device, is_double, [&](auto zero) {
    using T = decltype(zero);
    const Job<T> job{static_cast<const T*>(features), channels, n, batch, index, static_cast<const T*>(weight), queries, k};
    const auto* g = static_cast<const T*>(grad);
    const int64_t values = batch * n * channels, entries = batch * queries * k;
    cudaError_t error = cudaSuccess;
    if (values > 0)
      error = gpu::launch(feature_gradient_kernel<T>, blocks_for(values, kThreads), dim3(kThreads), 0, as_stream(stream), job, g, order, starts,
                          static_cast<T*>(grad_features));
    if (entries > 0 && error == cudaSuccess)
      error = gpu::launch(weight_gradient_kernel<T>, blocks_for(entries, kThreads / 32), dim3(kThreads), 0, as_stream(stream), job, g,
                          static_cast<T*>(grad_weight));
    return error;
  });
}
GEOSSL_PACKED(geossl_interpolate_backward_cuda)
