// Bounds of clouds, the numbering of voxels as geossl/ops/voxels.py goes about it, and the voxels around points.
#include <algorithm>

#include "drive.h"

BOTH(voxel_bounds, int, const void*, const int64_t*, const int64_t*, int64_t, int64_t, const double*, int64_t, double*);
BOTH(voxel_corners, int, const void*, const int64_t*, const int64_t*, int64_t, int64_t, const double*, const int32_t*, int64_t, int64_t*, int64_t,
     int64_t*, void*);
extern "C" int geossl_voxel_count_cpu(int, int, const void*, const int64_t*, const int64_t*, int64_t, int64_t, const double*, const double*,
                                      const int64_t*, int, int, int64_t, int64_t, void*, int64_t*);
extern "C" int geossl_voxel_fill_cpu(int, int, const void*, const int64_t*, const int64_t*, int64_t, int64_t, const double*, const double*,
                                     const int64_t*, int, int, int64_t, int64_t, void*, int64_t, int32_t*, int64_t*, int64_t*, int64_t*, int64_t*);
extern "C" int geossl_voxel_keys_cuda(int, void*, int, const void*, const int64_t*, const int64_t*, int64_t, int64_t, const double*, const double*,
                                      const int64_t*, int, int64_t, int, void*, void*);
extern "C" int geossl_sort_pairs_cuda(int, void*, int, void*, int64_t*, const void*, void*, const void*, void*, int64_t, int);
extern "C" int geossl_voxel_heads_cuda(int, void*, int, const void*, int64_t, int64_t, int64_t*);
extern "C" int geossl_voxel_starts_cuda(int, void*, int, const void*, const void*, int64_t, int64_t, const int64_t*, int64_t*, int64_t*);
extern "C" int geossl_voxel_fill_cuda(int, void*, int, const void*, const void*, int64_t, int64_t, const int64_t*, const int64_t*, const int64_t*,
                                      const int64_t*, int64_t*, int64_t*);
extern "C" int geossl_voxel_coords_cuda(int, void*, int, const void*, const int64_t*, const int64_t*, int64_t, int64_t, const double*,
                                        const int64_t*, const int64_t*, int64_t, int32_t*);

namespace {

using namespace drive;

struct Found {
  std::vector<int32_t> coords;
  std::vector<int64_t> inverse, counts, row_splits, perm;
  void resize(int64_t rows, int64_t voxels, int64_t kept) {
    coords.assign(static_cast<size_t>(4 * voxels), -7), inverse.assign(static_cast<size_t>(rows), -7), perm.assign(static_cast<size_t>(kept), -7);
    counts.assign(static_cast<size_t>(voxels), -7), row_splits.assign(static_cast<size_t>(voxels) + 1, -7);
  }
};

// Voxels of 2 clouds in the unit cube, 4 cells an axis; Word is the type of keys and rows on CUDA. `total` numbers beyond the cells decide
// whether the CPU counts in a table or sorts.
template <class T, class Word>
void number_voxels(int order, int64_t total, int64_t cap, const char* what) {
  const int is_double = sizeof(T) == 8, wide = sizeof(Word) == 8;
  const int64_t n = 150, batch = 2, lengths[] = {n, 40}, rows = batch * n;
  const double all[] = {-1e300, -1e300, -1e300, 1e300, 1e300, 1e300}, grid[] = {0.25, 0.25, 0.25, 0, 0, 0};
  const int64_t frames[] = {0, 0, 0, 0, 16, 4, 2, 64, 0, 0, 0, 16, 4, 2};
  const std::vector<T> p = points<T>(rows);
  std::vector<double> bounds(12);
  check(0 == geossl_voxel_bounds_cpu(2, is_double, p.data(), nullptr, lengths, n, batch, all, 1, bounds.data()), what);
  Found cpu, cuda;
  int64_t info[2] = {0, 0};
  const auto count = [&](void* scratch) {
    check(0 == geossl_voxel_count_cpu(2, is_double, p.data(), nullptr, lengths, n, batch, grid, bounds.data(), frames, order, 0, total, cap,
                                      scratch, info), what);
  };
  count(nullptr);
  std::vector<char> scratch(static_cast<size_t>(info[0]) + 64);
  count(scratch.data());
  const int64_t voxels = info[0], kept = info[1];
  cpu.resize(rows, voxels, kept), cuda.resize(rows, voxels, kept);
  check(0 == geossl_voxel_fill_cpu(2, is_double, p.data(), nullptr, lengths, n, batch, grid, bounds.data(), frames, order, 0, total, cap,
                                   scratch.data(), voxels, cpu.coords.data(), cpu.inverse.data(), cpu.counts.data(), cpu.row_splits.data(),
                                   cpu.perm.data()), what);

  std::vector<Word> keys(static_cast<size_t>(rows)), sorted(keys), row(keys), by_key(keys);
  std::vector<int64_t> numbers(keys.size()), starts(static_cast<size_t>(voxels) + 1), firsts(starts.size());
  check(0 == geossl_voxel_keys_cuda(0, nullptr, is_double, p.data(), nullptr, lengths, n, batch, grid, bounds.data(), frames, order, total, wide,
                                    keys.data(), row.data()), what);
  int64_t bytes = 0;
  int bits = 0;
  while (total >> bits) ++bits;
  const auto sort = [&](void* memory) {
    check(0 == geossl_sort_pairs_cuda(0, nullptr, wide, memory, &bytes, keys.data(), sorted.data(), row.data(), by_key.data(), rows, bits), what);
  };
  sort(nullptr);
  std::vector<char> memory(static_cast<size_t>(bytes) + 1);
  sort(memory.data());
  check(0 == geossl_voxel_heads_cuda(0, nullptr, wide, sorted.data(), rows, total, numbers.data()), what);
  for (size_t i = 1; i < numbers.size(); ++i) numbers[i] += numbers[i - 1];
  check(numbers.back() == voxels, what);
  check(0 == geossl_voxel_starts_cuda(0, nullptr, wide, sorted.data(), by_key.data(), rows, total, numbers.data(), starts.data(), firsts.data()), what);
  cuda.row_splits[0] = 0;
  for (size_t v = 0; v < cuda.counts.size(); ++v) {
    cuda.counts[v] = std::min(starts[v + 1] - starts[v], cap);
    cuda.row_splits[v + 1] = cuda.row_splits[v] + cuda.counts[v];
  }
  check(0 == geossl_voxel_fill_cuda(0, nullptr, wide, sorted.data(), by_key.data(), rows, total, numbers.data(), starts.data(), nullptr,
                                    cuda.row_splits.data(), cuda.inverse.data(), cuda.perm.data()), what);
  check(0 == geossl_voxel_coords_cuda(0, nullptr, is_double, p.data(), nullptr, lengths, n, batch, grid, cuda.perm.data(), cuda.row_splits.data(),
                                      voxels, cuda.coords.data()), what);
  check(equal(cpu.coords, cuda.coords) && equal(cpu.inverse, cuda.inverse) && equal(cpu.counts, cuda.counts) &&
            equal(cpu.row_splits, cuda.row_splits) && equal(cpu.perm, cuda.perm), what);
}

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
  number_voxels<float, uint32_t>(2, 128, 1000, "voxels by table");
#ifndef __SANITIZE_THREAD__  // the same kernels again, for minutes
  number_voxels<float, uint32_t>(0, 128, 1000, "voxels by table, lexicographic");
  number_voxels<double, uint32_t>(1, 128, 2, "voxels by table, capped");
  number_voxels<float, uint64_t>(1, int64_t{1} << 40, 3, "voxels by sorting");
  number_voxels<double, uint64_t>(0, int64_t{1} << 60, 1000, "voxels by sorting wide records");
#endif
  voxels<float>();
  voxels<double>();
}
const Suite suite{&run};

}  // namespace
