// Everything that needs cub, alone in a file because cub takes ten times as long to compile as all else.
#include "warp.cuh"

#include <cub/cub.cuh>

// Sorts rows by the lowest `bits` bits of their keys, stably; keys and rows are uint32, or uint64 when wide. As in cub, a call without
// temporary memory only stores how many bytes that must have.
GEOSSL_API int geossl_sort_pairs_cuda(int device, void* stream, int wide, void* temp, int64_t* temp_bytes, const void* keys, void* sorted_keys,
                                      const void* rows, void* sorted_rows, int64_t count, int bits) {
  using namespace geossl;
  constexpr int64_t kNarrow = std::numeric_limits<int32_t>::max();
  if (count < 0 || (!wide && count > kNarrow) || bits < 1 || bits > (wide ? 64 : 32)) return GEOSSL_INVALID_ARGUMENT;
  return on_device(device, wide, [&](auto zero) {
    using Word = std::conditional_t<sizeof(zero) == 8, uint64_t, uint32_t>;
    using Count = std::conditional_t<sizeof(zero) == 8, int64_t, int32_t>;  // cub's kernels for 64 bit counts spill registers
    size_t bytes = temp ? static_cast<size_t>(*temp_bytes) : 0;
    const cudaError_t error = cub::DeviceRadixSort::SortPairs(temp, bytes, static_cast<const Word*>(keys), static_cast<Word*>(sorted_keys),
                                                              static_cast<const Word*>(rows), static_cast<Word*>(sorted_rows),
                                                              static_cast<Count>(count), 0, bits, as_stream(stream));
    *temp_bytes = static_cast<int64_t>(bytes);
    return error;
  });
}
GEOSSL_PACKED(geossl_sort_pairs_cuda)
