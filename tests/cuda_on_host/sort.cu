// Sorting through the stand-ins for cub: how an operator that needs it calls it.
#include "gpu_compat.h"

#include <cub/cub.cuh>

extern "C" __attribute__((visibility("default"))) int sort_pairs(void* temp, size_t* temp_bytes, const unsigned long long* keys_in,
                                                                 unsigned long long* keys_out, const int* values_in, int* values_out, int n,
                                                                 int bits, void* stream) {
  return int(cub::DeviceRadixSort::SortPairs(temp, *temp_bytes, keys_in, keys_out, values_in, values_out, n, 0, bits,
                                             static_cast<cudaStream_t>(stream)));
}
