// Neighbours of sparse voxels: a binary search among the sorted keys for every kernel offset and voxel. Neighbouring threads look for
// neighbouring keys, so that a warp takes nearly the same path.
#include "warp.cuh"

namespace geossl {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) find_keys_kernel(const int64_t* keys, const int64_t* order, int64_t count, const int64_t* wanted,
                                                             const int64_t* rows, int64_t wanted_count, const int64_t* shifts,
                                                             int64_t shift_count, int64_t* out) {
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < shift_count * wanted_count; i += int64_t{gridDim.x} * kThreads) {
    const int64_t k = i / wanted_count, w = i - k * wanted_count, target = wanted[w] + shifts[k];
    int64_t low = 0, high = count;
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (keys[middle] < target) low = middle + 1;
      else high = middle;
    }
    out[k * wanted_count + (rows ? rows[w] : w)] = low < count && keys[low] == target ? order[low] : -1;
  }
}

}  // namespace
}  // namespace geossl

// See geossl/ops/sparse.py for the arguments.
GEOSSL_API int geossl_find_keys_cuda(int device, void* stream, const int64_t* keys, const int64_t* order, int64_t count, const int64_t* wanted,
                                     const int64_t* rows, int64_t wanted_count, const int64_t* shifts, int64_t shift_count, int64_t* out) {
  using namespace geossl;
  if (count < 0 || wanted_count < 0 || shift_count < 0) return GEOSSL_INVALID_ARGUMENT;
  if (wanted_count * shift_count == 0) return GEOSSL_OK;
  return on_device(device, false, [&](auto) {
    return gpu::launch(find_keys_kernel, blocks_for(shift_count * wanted_count, kThreads), dim3(kThreads), 0, as_stream(stream), keys, order,
                       count, wanted, rows, wanted_count, shifts, shift_count, out);
  });
}
GEOSSL_PACKED(geossl_find_keys_cuda)
