// Bounds of clouds and the voxels around points.
#include "drive.h"

BOTH(voxel_bounds, int, const void*, const int64_t*, const int64_t*, int64_t, int64_t, const double*, int64_t, double*);
BOTH(voxel_corners, int, const void*, const int64_t*, const int64_t*, int64_t, int64_t, const double*, const int32_t*, int64_t, int64_t*, int64_t,
     int64_t*, void*);

namespace {

using namespace drive;

template <class T>
void voxels() {
  const int is_double = sizeof(T) == 8;
  const int64_t n = 300, batch = 2, lengths[] = {n, 40}, count = 4;
  const double all[] = {-1e300, -1e300, -1e300, 1e300, 1e300, 1e300}, grid[] = {0.5, 0.5, 0.5, 0, 0, 0};
  const std::vector<T> p = points<T>(batch * n);
  std::vector<double> bounds[2];
  std::vector<int64_t> index[2];
  std::vector<T> weight[2];
  const std::vector<int32_t> coords{0, 0, 0, 0, 0, 0, 1, 1, 0, 1, 1, 0, 1, 0, 0, 0};
  for (bool cuda : kOnCuda) {
    bounds[cuda].assign(batch * 3 * 6, -7), index[cuda].assign(static_cast<size_t>(batch * n * 8), -7), weight[cuda].assign(index[cuda].size(), T(-7));
    std::vector<int64_t> table(16, -1);
    check(0 == (cuda ? geossl_voxel_bounds_cuda(0, nullptr, is_double, p.data(), nullptr, lengths, n, batch, all, 3, bounds[1].data())
                     : geossl_voxel_bounds_cpu(2, is_double, p.data(), nullptr, lengths, n, batch, all, 3, bounds[0].data())), "voxel bounds");
    check(0 == (cuda ? geossl_voxel_corners_cuda(0, nullptr, is_double, p.data(), nullptr, lengths, n, batch, grid, coords.data(), count,
                                                 table.data(), 16, index[1].data(), weight[1].data())
                     : geossl_voxel_corners_cpu(2, is_double, p.data(), nullptr, lengths, n, batch, grid, coords.data(), count, table.data(), 16,
                                                index[0].data(), weight[0].data())), "voxel corners");
  }
  check(equal(bounds[0], bounds[1]) && equal(index[0], index[1]) && equal(weight[0], weight[1]), "voxel bounds and corners");
}

void run() {
  voxels<float>();
  voxels<double>();
}
const Suite suite{&run};

}  // namespace
