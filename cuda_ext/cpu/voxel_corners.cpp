// The voxels around a point.
#include "points.h"
#include "voxels.h"

// `table` holds -1 in all of its `slots`, a power of two of at least twice the voxels.
GEOSSL_API int geossl_voxel_corners_cpu(int threads, int is_double, const void* points, const int64_t* offsets, const int64_t* lengths, int64_t n,
                                        int64_t batch, const double* grid_values, const int32_t* coords, int64_t voxels, int64_t* table,
                                        int64_t slots, int64_t* index, void* weight) {
  using namespace geossl;
  if (n < 0 || batch < 0 || voxels < 0 || slots <= voxels || (slots & (slots - 1))) return GEOSSL_INVALID_ARGUMENT;
  return for_type(is_double, [&](auto zero) {
    using T = decltype(zero);
    const Clouds clouds{offsets, lengths, batch, n};
    VoxelGrid grid;
    for (int axis = 0; axis < 3; ++axis) grid.size[axis] = grid_values[axis], grid.origin[axis] = grid_values[3 + axis];
    for (int64_t v = 0; v < voxels; ++v) {
      uint64_t at = hash_cell(coords + 4 * v);
      while (table[at & static_cast<uint64_t>(slots - 1)] >= 0) ++at;
      table[at & static_cast<uint64_t>(slots - 1)] = v;
    }
    parallel_for(threads, batch > 0 ? clouds.rows() : 0, 4096, [&](int64_t r0, int64_t r1) {
      for (int64_t row = r0; row < r1; ++row) {
        const int64_t b = clouds.cloud_of(row);
        T* w = static_cast<T*>(weight) + 8 * row;
        if (row - clouds.begin(b) < clouds.size(b)) {
          find_corners(static_cast<const T*>(points) + 3 * row, b, grid, coords, table, slots, index + 8 * row, w);
        } else {
          std::fill(index + 8 * row, index + 8 * row + 8, int64_t{-1});
          std::fill(w, w + 8, T(0));
        }
      }
    });
    return int{GEOSSL_OK};
  });
}
GEOSSL_PACKED(geossl_voxel_corners_cpu)
