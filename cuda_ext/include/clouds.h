// A batch of point clouds as every kernel sees it, padded or packed, and the one squared distance.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define GEOSSL_HD __host__ __device__ __forceinline__
#else
#define GEOSSL_HD inline
#endif

namespace geossl {

// Padded: `offsets` is null, cloud b starts at row b * stride and has lengths[b] rows (null: stride), indices are local.
// Packed: cloud b is the rows offsets[b] .. offsets[b + 1], indices are rows of the whole tensor.
struct Clouds {
  const int64_t* offsets;
  const int64_t* lengths;
  int64_t batch, stride;

  GEOSSL_HD int64_t begin(int64_t b) const { return offsets ? offsets[b] : b * stride; }
  GEOSSL_HD int64_t size(int64_t b) const {
    if (offsets) return offsets[b + 1] - offsets[b];
    if (!lengths) return stride;
    const int64_t n = lengths[b];  // unchecked on CUDA: a wrong length must not reach past the cloud's rows
    return n < 0 ? 0 : n > stride ? stride : n;
  }
  GEOSSL_HD int64_t index_base(int64_t b) const { return offsets ? offsets[b] : 0; }
  GEOSSL_HD int64_t rows() const { return offsets ? offsets[batch] : batch * stride; }
  // The cloud that holds a row: the last one that begins at or before it (empty clouds before it hold nothing).
  GEOSSL_HD int64_t cloud_of(int64_t row) const {
    if (!offsets) return row / stride;
    int64_t low = 0, high = batch - 1;
    while (low < high) {
      const int64_t middle = (low + high + 1) / 2;
      if (offsets[middle] <= row) low = middle;
      else high = middle - 1;
    }
    return low;
  }
};

}  // namespace geossl
