// Centrality non-maximum suppression on the GPU: one thread per point counts its neighbours; then one block per cloud keeps the most central
// point left, again and again, and in one pass over the points removes its neighbours and finds the next.
#include "warp.cuh"

namespace geossl {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;

// See geossl/ops/nms.py. Coordinates are float, double or int64_t.
template <class C>
struct Problem {
  const C* points;
  Clouds clouds;
  int64_t rows;
  C limit;
  int64_t cap;
  int32_t* last;  // the last row that a point's list may hold
  bool* keep;
  int64_t* count;
};

// Exact for integers: differences are taken without sign, and those that alone are too large (the radius is at most 2^30) never squared.
__device__ __forceinline__ uint64_t axis_distance(int64_t a, int64_t b) {
  const uint64_t d = a > b ? static_cast<uint64_t>(a) - static_cast<uint64_t>(b) : static_cast<uint64_t>(b) - static_cast<uint64_t>(a);
  return d < (uint64_t{1} << 30) ? d : (uint64_t{1} << 30);
}
__device__ __forceinline__ bool inside(const int64_t* a, const int64_t* b, int64_t limit) {
  const uint64_t x = axis_distance(a[0], b[0]), y = axis_distance(a[1], b[1]), z = axis_distance(a[2], b[2]);
  return x * x + y * y + z * z < static_cast<uint64_t>(limit);
}
template <class T>
__device__ __forceinline__ bool inside(const T* a, const T* b, T limit) {
  return squared(a[0] - b[0], a[1] - b[1], a[2] - b[2]) < limit;
}

__device__ __forceinline__ bool valid(const int64_t*) { return true; }
template <class T>
__device__ __forceinline__ bool valid(const T* p) {
  return finite(p[0], p[1], p[2]);
}

template <class C>
__global__ void __launch_bounds__(kThreads) count_kernel(Problem<C> p) {
  for (int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x; row < p.rows; row += int64_t{gridDim.x} * kThreads) {
    const int64_t b = p.clouds.cloud_of(row), first = p.clouds.begin(b), n = p.clouds.size(b);
    const C *own = p.points + 3 * row, *other = p.points + 3 * first;
    const bool real = row - first < n && valid(own);
    int64_t found = 0, last = n;
    for (int64_t j = 0; real && j < n; ++j) {
      if (!inside(own, other + 3 * j, p.limit)) continue;
      if (++found < p.cap) continue;
      last = j;
      break;
    }
    p.count[row] = found;
    p.last[row] = static_cast<int32_t>(last);
    p.keep[row] = real;
  }
}

__device__ __forceinline__ int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// The largest key of a block, known to all threads; -1 without any. `slots` is used again only after the next barrier but one.
__device__ int64_t block_largest(int64_t key, int64_t* slots) {
  for (int offset = 16; offset > 0; offset >>= 1) key = larger(key, __shfl_xor_sync(kAllLanes, static_cast<long long>(key), offset));
  if (threadIdx.x % 32 == 0) slots[threadIdx.x / 32] = key;
  __syncthreads();
  key = slots[0];
  for (int w = 1; w < kWarps; ++w) key = larger(key, slots[w]);
  return key;
}

// Each thread looks after every kThreads-th point, of which it alone reads and writes `keep`. Points come in the order of keys (count, then
// the lower row), so those that were looked at are those whose key is not below the last one.
template <class C>
__global__ void __launch_bounds__(kThreads) suppress_kernel(Problem<C> p) {
  GPU_SHARED(int64_t, slots, 2 * kWarps);
  for (int64_t b = blockIdx.x; b < p.clouds.batch; b += gridDim.x) {
    const int64_t first = p.clouds.begin(b), n = p.clouds.size(b);
    const C* points = p.points + 3 * first;
    bool* keep = p.keep + first;
    const auto key_of = [&](int64_t j) { return p.count[first + j] << 32 | (0xffffffffll - j); };
    int64_t pick = -1, picked_key = 0x7fffffffffffffffll;
    int64_t* buffer = slots;
    for (;;) {
      int64_t best = -1;
      for (int64_t j = threadIdx.x; j < n; j += kThreads) {
        if (!keep[j]) continue;
        if (pick >= 0 && j != pick && j <= p.last[first + pick] && inside(points + 3 * pick, points + 3 * j, p.limit)) {
          keep[j] = false;
          continue;
        }
        const int64_t key = key_of(j);
        if (key < picked_key) best = larger(best, key);
      }
      best = block_largest(best, buffer);
      buffer = buffer == slots ? slots + kWarps : slots;
      if (best < 0) break;
      picked_key = best;
      pick = 0xffffffffll - (best & 0xffffffffll);
    }
    __syncthreads();  // the next cloud starts with the same slots
  }
}

template <class C>
cudaError_t launch(const Problem<C>& p, cudaStream_t stream) {
  if (p.rows == 0 || p.clouds.batch == 0) return cudaSuccess;
  const cudaError_t error = gpu::launch(count_kernel<C>, blocks_for(p.rows, kThreads), dim3(kThreads), 0, stream, p);
  if (error != cudaSuccess) return error;
  return gpu::launch(suppress_kernel<C>, blocks_for(p.clouds.batch, 1), dim3(kThreads), 0, stream, p);
}

}  // namespace
}  // namespace geossl

// See geossl/ops/nms.py for the arguments; type: 0 float, 1 double, 2 int64. The workspace holds one number per row.
GEOSSL_API int geossl_centrality_nms_cuda(int device, void* stream, int type, const void* points, const int64_t* offsets,
                                          const int64_t* lengths, int64_t n, int64_t batch, double radius, int64_t limit, int64_t cap,
                                          int32_t* last, bool* keep, int64_t* count) {
  using namespace geossl;
  if (batch < 0 || n < 0 || cap < 1 || type < 0 || type > 2 || !(radius > 0)) return GEOSSL_INVALID_ARGUMENT;
  if (!offsets && n > kMaxCloud) return GEOSSL_TOO_LARGE;
  const Clouds clouds{offsets, lengths, batch, n};
  const int64_t rows = offsets ? n : batch * n;
  return on_device(device, type, [&](auto zero) {
    using T = decltype(zero);
    if (type == 2) return launch(Problem<int64_t>{static_cast<const int64_t*>(points), clouds, rows, limit, cap, last, keep, count}, as_stream(stream));
    const auto r = static_cast<T>(radius);
    return launch(Problem<T>{static_cast<const T*>(points), clouds, rows, r * r, cap, last, keep, count}, as_stream(stream));
  });
}
GEOSSL_PACKED(geossl_centrality_nms_cuda)
