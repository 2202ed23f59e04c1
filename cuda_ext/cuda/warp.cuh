// Distances, and reductions over a warp, shared by the kernels on points.
#pragma once
#include <cstdint>

#include "clouds.h"
#include "geossl_cuda.h"

namespace geossl {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int64_t kMaxCloud = 0x7fffffff - 1024;  // rows of one cloud; indices inside are 32 bits

// One rounding per operation, in the order of the CPU kernels and the twin, whatever the compiler's flags.
__device__ __forceinline__ float squared(float dx, float dy, float dz) {
  return __fadd_rn(__fadd_rn(__fmul_rn(dx, dx), __fmul_rn(dy, dy)), __fmul_rn(dz, dz));
}
__device__ __forceinline__ double squared(double dx, double dy, double dz) {
  return __dadd_rn(__dadd_rn(__dmul_rn(dx, dx), __dmul_rn(dy, dy)), __dmul_rn(dz, dz));
}
__device__ __forceinline__ float manhattan(float dx, float dy, float dz) { return __fadd_rn(__fadd_rn(fabsf(dx), fabsf(dy)), fabsf(dz)); }
__device__ __forceinline__ double manhattan(double dx, double dy, double dz) { return __dadd_rn(__dadd_rn(fabs(dx), fabs(dy)), fabs(dz)); }

template <class T>
__device__ __forceinline__ T infinity() {
  return static_cast<T>(__builtin_huge_val());
}

template <class T>
__device__ __forceinline__ bool finite(T x, T y, T z) {
  return (x - x) + (y - y) + (z - z) == T(0);  // NaN for anything else
}

// (distance, index) pairs in the order of every search: nearer first, ties to the lower index.
template <class T>
__device__ __forceinline__ bool before(T d, int32_t i, T other_d, int32_t other_i) {
  return d < other_d || (d == other_d && i < other_i);
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
// Before Ampere there is no instruction for these.
template <class V, class F>
__device__ __forceinline__ V reduce_by_shuffles(V value, F better) {
  for (int offset = 16; offset > 0; offset >>= 1) {
    const V other = __shfl_xor_sync(kAllLanes, value, offset);
    if (better(other, value)) value = other;
  }
  return value;
}
__device__ __forceinline__ int warp_max(int value) {
  return reduce_by_shuffles(value, [](int a, int b) { return a > b; });
}
__device__ __forceinline__ unsigned warp_max(unsigned value) {
  return reduce_by_shuffles(value, [](unsigned a, unsigned b) { return a > b; });
}
__device__ __forceinline__ unsigned warp_min(unsigned value) {
  return reduce_by_shuffles(value, [](unsigned a, unsigned b) { return a < b; });
}
#else
__device__ __forceinline__ int warp_max(int value) { return __reduce_max_sync(kAllLanes, value); }
__device__ __forceinline__ unsigned warp_max(unsigned value) { return __reduce_max_sync(kAllLanes, value); }
__device__ __forceinline__ unsigned warp_min(unsigned value) { return __reduce_min_sync(kAllLanes, value); }
#endif

// The largest distance in the warp. Bits of numbers that are not negative order like the numbers; -1 comes before all of them.
__device__ __forceinline__ float warp_largest(float d) { return __int_as_float(warp_max(__float_as_int(d))); }
__device__ __forceinline__ double warp_largest(double d) {
  const long long bits = __double_as_longlong(d);
  const int high = warp_max(static_cast<int>(bits >> 32));
  const unsigned low = warp_max(static_cast<int>(bits >> 32) == high ? static_cast<unsigned>(bits) : 0u);
  return __longlong_as_double(static_cast<long long>(static_cast<unsigned long long>(static_cast<unsigned>(high)) << 32 | low));
}

// The smallest of numbers that are not negative.
__device__ __forceinline__ float warp_smallest(float d) { return __int_as_float(static_cast<int>(warp_min(static_cast<unsigned>(__float_as_int(d))))); }
__device__ __forceinline__ double warp_smallest(double d) {
  const auto bits = static_cast<unsigned long long>(__double_as_longlong(d));
  const auto own = static_cast<unsigned>(bits >> 32);
  const unsigned high = warp_min(own), low = warp_min(own == high ? static_cast<unsigned>(bits) : ~0u);
  return __longlong_as_double(static_cast<long long>(static_cast<unsigned long long>(high) << 32 | low));
}

template <class V>
__device__ __forceinline__ V warp_sum(V value) {
  for (int offset = 16; offset > 0; offset >>= 1) value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;
}

inline cudaStream_t as_stream(void* stream) { return static_cast<cudaStream_t>(stream); }

// Blocks of `threads` for `work` items, within what a grid can have; kernels stride over the rest.
inline dim3 blocks_for(int64_t work, int threads) {
  const int64_t blocks = (work + threads - 1) / threads;
  return dim3(static_cast<unsigned>(blocks < 1 ? 1 : blocks > (int64_t{1} << 30) ? (int64_t{1} << 30) : blocks));
}

// Runs a launcher for float or double on a device: f(zero of the type) returns a cudaError_t.
template <class F>
int on_device(int device, int is_double, F&& launch) {
  DeviceGuard guard(device);
  if (guard.error != cudaSuccess) return static_cast<int>(guard.error);
  return static_cast<int>(is_double ? launch(double{}) : launch(float{}));
}

}  // namespace geossl
