// Voxels on the GPU: a key per point, sorted stably by geossl_sort_pairs_cuda, then the voxels are the runs of equal keys.
#include "voxels.h"

#include "warp.cuh"

namespace geossl {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocks = 4;  // that fit a multiprocessor at least: 64 registers a thread, where the compiler would rather spill for more blocks

__device__ __forceinline__ int64_t thread_number() { return int64_t{blockIdx.x} * kThreads + threadIdx.x; }
__device__ __forceinline__ int64_t thread_count() { return int64_t{gridDim.x} * kThreads; }

template <class T>
struct Points {
  const T* rows;
  Clouds clouds;
};

VoxelGrid grid_from(const double* values) {
  VoxelGrid grid;
  for (int axis = 0; axis < 3; ++axis) grid.size[axis] = values[axis], grid.origin[axis] = values[3 + axis];
  return grid;
}

// One block per part of a cloud; bounds has six numbers per part.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks) bounds_kernel(Points<T> points, Limits<T> limits, int64_t parts, double* bounds) {
  GPU_SHARED(T, shared, 6 * kThreads);
  for (int64_t t = blockIdx.x; t < points.clouds.batch * parts; t += gridDim.x) {
    const int64_t b = t / parts, part = t - b * parts, count = points.clouds.size(b);
    const int64_t begin = part * count / parts, end = (part + 1) * count / parts;
    const T* rows = points.rows + 3 * points.clouds.begin(b);
    T low[3] = {infinity<T>(), infinity<T>(), infinity<T>()}, high[3] = {-low[0], -low[0], -low[0]};
    for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
      const T p[3] = {rows[3 * i], rows[3 * i + 1], rows[3 * i + 2]};
      bool kept = true;
      for (int axis = 0; axis < 3; ++axis) kept &= p[axis] >= limits.low[axis] && p[axis] <= limits.high[axis];
      for (int axis = 0; axis < 3; ++axis)
        if (kept) low[axis] = p[axis] < low[axis] ? p[axis] : low[axis], high[axis] = p[axis] > high[axis] ? p[axis] : high[axis];
    }
    for (int axis = 0; axis < 3; ++axis) shared[axis * kThreads + threadIdx.x] = low[axis], shared[(3 + axis) * kThreads + threadIdx.x] = high[axis];
    __syncthreads();
    for (int half = kThreads / 2; half > 0; half /= 2) {
      if (static_cast<int>(threadIdx.x) < half)
        for (int k = 0; k < 6; ++k) {
          T* a = shared + k * kThreads + threadIdx.x;
          const T other = a[half];
          if (k < 3 ? other < *a : other > *a) *a = other;
        }
      __syncthreads();
    }
    if (threadIdx.x < 6) bounds[6 * t + threadIdx.x] = static_cast<double>(shared[threadIdx.x * kThreads]);
    __syncthreads();
  }
}

template <class T, class Word>
__global__ void __launch_bounds__(kThreads, kBlocks)
    keys_kernel(Points<T> points, VoxelGrid grid, const double* bounds, const VoxelFrame* frames, int order,
                                                        int64_t total, int64_t count, Word* keys, Word* rows) {
  for (int64_t row = thread_number(); row < count; row += thread_count()) {
    const int64_t b = points.clouds.cloud_of(row);
    const T* p = points.rows + 3 * row;
    uint64_t key = static_cast<uint64_t>(total);
    if (row - points.clouds.begin(b) < points.clouds.size(b) && inside(p, bounds + 6 * b)) {
      const VoxelFrame& f = frames[b];
      uint64_t cell[3];
      for (int axis = 0; axis < 3; ++axis)
        cell[axis] = static_cast<uint64_t>(static_cast<int64_t>(grid.cell(static_cast<double>(p[axis]), axis)) - f.low[axis]);
      const auto x = static_cast<uint32_t>(cell[0]), y = static_cast<uint32_t>(cell[1]), z = static_cast<uint32_t>(cell[2]);
      key = static_cast<uint64_t>(f.base);
      if (order == kLexicographic) key += cell[0] * static_cast<uint64_t>(f.stride_x) + cell[1] * static_cast<uint64_t>(f.stride_y) + cell[2];
      else key += order == kMorton ? interleave(x, y, z) : hilbert(x, y, z, f.bits);
    }
    keys[row] = static_cast<Word>(key), rows[row] = static_cast<Word>(row);
  }
}

template <class Word>
__global__ void __launch_bounds__(kThreads, kBlocks) heads_kernel(const Word* keys, int64_t count, int64_t total, int64_t* heads) {
  for (int64_t i = thread_number(); i < count; i += thread_count())
    heads[i] = static_cast<int64_t>(keys[i]) != total && (i == 0 || keys[i - 1] != keys[i]);
}

// Where the points of each voxel begin and end among the sorted rows, and its first point. numbers: heads up to and with each row.
template <class Word>
__global__ void __launch_bounds__(kThreads, kBlocks)
    starts_kernel(const Word* keys, const Word* rows, int64_t count, int64_t total, const int64_t* numbers,
                                                          int64_t* starts, int64_t* firsts) {
  for (int64_t i = thread_number(); i < count; i += thread_count()) {
    const bool kept = static_cast<int64_t>(keys[i]) != total;
    if (kept && (i == 0 || keys[i - 1] != keys[i])) starts[numbers[i] - 1] = i, firsts[numbers[i] - 1] = static_cast<int64_t>(rows[i]);
    if (kept && (i + 1 == count || static_cast<int64_t>(keys[i + 1]) == total)) starts[numbers[i]] = i + 1;
    if (i == 0 && !kept) starts[0] = 0;
  }
}

template <class Word>
__global__ void __launch_bounds__(kThreads, kBlocks)
    fill_kernel(const Word* keys, const Word* rows, int64_t count, int64_t total, const int64_t* numbers,
                                                        const int64_t* starts, const int64_t* rank, const int64_t* row_splits, int64_t* inverse,
                                                        int64_t* perm) {
  for (int64_t i = thread_number(); i < count; i += thread_count()) {
    const auto row = static_cast<int64_t>(rows[i]);
    int64_t v = -1;
    if (static_cast<int64_t>(keys[i]) != total) {
      const int64_t sorted = numbers[i] - 1, number = rank ? rank[sorted] : sorted, at = row_splits[number] + (i - starts[sorted]);
      if (at < row_splits[number + 1]) perm[at] = row, v = number;
    }
    inverse[row] = v;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    coords_kernel(Points<T> points, VoxelGrid grid, const int64_t* perm, const int64_t* row_splits,
                                                          int64_t voxels, int32_t* coords) {
  for (int64_t v = thread_number(); v < voxels; v += thread_count()) {
    const int64_t row = perm[row_splits[v]];
    coords[4 * v] = static_cast<int32_t>(points.clouds.cloud_of(row));
    for (int axis = 0; axis < 3; ++axis)
      coords[4 * v + 1 + axis] = static_cast<int32_t>(grid.cell(static_cast<double>(points.rows[3 * row + axis]), axis));
  }
}

__global__ void __launch_bounds__(kThreads, kBlocks)
    table_kernel(const int32_t* coords, int64_t voxels, unsigned long long* table, int64_t slots) {
  for (int64_t v = thread_number(); v < voxels; v += thread_count()) {
    uint64_t at = hash_cell(coords + 4 * v);
    while (atomicCAS(table + (at & static_cast<uint64_t>(slots - 1)), ~0ull, static_cast<unsigned long long>(v)) != ~0ull) ++at;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks) corners_kernel(Points<T> points, int64_t rows, VoxelGrid grid, const int32_t* coords,
                                                           const int64_t* table, int64_t slots, int64_t* index, T* weight) {
  for (int64_t row = thread_number(); row < rows; row += thread_count()) {
    const int64_t b = points.clouds.cloud_of(row);
    if (row - points.clouds.begin(b) < points.clouds.size(b)) {
      find_corners(points.rows + 3 * row, b, grid, coords, table, slots, index + 8 * row, weight + 8 * row);
    } else {
      for (int k = 0; k < 8; ++k) index[8 * row + k] = -1, weight[8 * row + k] = T(0);
    }
  }
}

// Runs f(zero of the key type).
template <class F>
int for_word(int device, int wide, F&& f) {
  return on_device(device, wide, [&](auto zero) { return f(std::conditional_t<sizeof(zero) == 8, uint64_t, uint32_t>{}); });
}

template <class T>
Points<T> points_from(const void* points, const int64_t* offsets, const int64_t* lengths, int64_t n, int64_t batch) {
  return {static_cast<const T*>(points), Clouds{offsets, lengths, batch, n}};
}

}  // namespace
}  // namespace geossl

// See geossl/ops/voxels.py for the arguments of all. range and grid are read on the host. n is the number of all rows for packed clouds.
GEOSSL_API int geossl_voxel_bounds_cuda(int device, void* stream, int is_double, const void* points, const int64_t* offsets, const int64_t* lengths,
                                        int64_t n, int64_t batch, const double* range, int64_t parts, double* bounds) {
  using namespace geossl;
  if (n < 0 || batch < 0 || parts < 1) return GEOSSL_INVALID_ARGUMENT;
  if (batch == 0) return GEOSSL_OK;
  return on_device(device, is_double, [&](auto zero) {
    using T = decltype(zero);
    return gpu::launch(bounds_kernel<T>, blocks_for(batch * parts, 1), dim3(kThreads), 0, as_stream(stream),
                       points_from<T>(points, offsets, lengths, n, batch), Limits<T>(range), parts, bounds);
  });
}
GEOSSL_PACKED(geossl_voxel_bounds_cuda)

GEOSSL_API int geossl_voxel_keys_cuda(int device, void* stream, int is_double, const void* points, const int64_t* offsets, const int64_t* lengths,
                                      int64_t n, int64_t batch, const double* grid, const double* bounds, const int64_t* frames, int order,
                                      int64_t total, int wide, void* keys, void* rows) {
  using namespace geossl;
  const int64_t count = offsets ? n : n * batch;
  if (n < 0 || batch < 0 || total < 0 || order < 0 || order > 2) return GEOSSL_INVALID_ARGUMENT;
  if (count == 0) return GEOSSL_OK;
  return for_word(device, wide, [&](auto word) {
    using Word = decltype(word);
    const auto* frame = reinterpret_cast<const VoxelFrame*>(frames);
    const auto launch = [&](auto zero) {
      using T = decltype(zero);
      return gpu::launch(keys_kernel<T, Word>, blocks_for(count, kThreads), dim3(kThreads), 0, as_stream(stream),
                         points_from<T>(points, offsets, lengths, n, batch), grid_from(grid), bounds, frame, order, total, count,
                         static_cast<Word*>(keys), static_cast<Word*>(rows));
    };
    return is_double ? launch(double{}) : launch(float{});
  });
}
GEOSSL_PACKED(geossl_voxel_keys_cuda)

GEOSSL_API int geossl_voxel_heads_cuda(int device, void* stream, int wide, const void* keys, int64_t count, int64_t total, int64_t* heads) {
  using namespace geossl;
  if (count <= 0) return count < 0 ? GEOSSL_INVALID_ARGUMENT : GEOSSL_OK;
  return for_word(device, wide, [&](auto word) {
    using Word = decltype(word);
    return gpu::launch(heads_kernel<Word>, blocks_for(count, kThreads), dim3(kThreads), 0, as_stream(stream), static_cast<const Word*>(keys),
                       count, total, heads);
  });
}
GEOSSL_PACKED(geossl_voxel_heads_cuda)

GEOSSL_API int geossl_voxel_starts_cuda(int device, void* stream, int wide, const void* keys, const void* rows, int64_t count, int64_t total,
                                        const int64_t* numbers, int64_t* starts, int64_t* firsts) {
  using namespace geossl;
  if (count <= 0) return count < 0 ? GEOSSL_INVALID_ARGUMENT : GEOSSL_OK;
  return for_word(device, wide, [&](auto word) {
    using Word = decltype(word);
    return gpu::launch(starts_kernel<Word>, blocks_for(count, kThreads), dim3(kThreads), 0, as_stream(stream), static_cast<const Word*>(keys),
                       static_cast<const Word*>(rows), count, total, numbers, starts, firsts);
  });
}
GEOSSL_PACKED(geossl_voxel_starts_cuda)

GEOSSL_API int geossl_voxel_fill_cuda(int device, void* stream, int wide, const void* keys, const void* rows, int64_t count, int64_t total,
                                      const int64_t* numbers, const int64_t* starts, const int64_t* rank, const int64_t* row_splits,
                                      int64_t* inverse, int64_t* perm) {
  using namespace geossl;
  if (count <= 0) return count < 0 ? GEOSSL_INVALID_ARGUMENT : GEOSSL_OK;
  return for_word(device, wide, [&](auto word) {
    using Word = decltype(word);
    return gpu::launch(fill_kernel<Word>, blocks_for(count, kThreads), dim3(kThreads), 0, as_stream(stream), static_cast<const Word*>(keys),
                       static_cast<const Word*>(rows), count, total, numbers, starts, rank, row_splits, inverse, perm);
  });
}
GEOSSL_PACKED(geossl_voxel_fill_cuda)

GEOSSL_API int geossl_voxel_coords_cuda(int device, void* stream, int is_double, const void* points, const int64_t* offsets, const int64_t* lengths,
                                        int64_t n, int64_t batch, const double* grid, const int64_t* perm, const int64_t* row_splits,
                                        int64_t voxels, int32_t* coords) {
  using namespace geossl;
  if (n < 0 || batch < 0 || voxels < 0) return GEOSSL_INVALID_ARGUMENT;
  if (voxels == 0) return GEOSSL_OK;
  return on_device(device, is_double, [&](auto zero) {
    using T = decltype(zero);
    return gpu::launch(coords_kernel<T>, blocks_for(voxels, kThreads), dim3(kThreads), 0, as_stream(stream),
                       points_from<T>(points, offsets, lengths, n, batch), grid_from(grid), perm, row_splits, voxels, coords);
  });
}
GEOSSL_PACKED(geossl_voxel_coords_cuda)

GEOSSL_API int geossl_voxel_corners_cuda(int device, void* stream, int is_double, const void* points, const int64_t* offsets, const int64_t* lengths,
                                         int64_t n, int64_t batch, const double* grid, const int32_t* coords, int64_t voxels, int64_t* table,
                                         int64_t slots, int64_t* index, void* weight) {
  using namespace geossl;
  const int64_t count = offsets ? n : n * batch;
  if (n < 0 || batch < 0 || voxels < 0 || slots <= voxels || (slots & (slots - 1))) return GEOSSL_INVALID_ARGUMENT;
  return on_device(device, is_double, [&](auto zero) {
    using T = decltype(zero);
    cudaError_t error = cudaSuccess;
    if (voxels > 0)
      error = gpu::launch(table_kernel, blocks_for(voxels, kThreads), dim3(kThreads), 0, as_stream(stream), coords, voxels,
                          reinterpret_cast<unsigned long long*>(table), slots);
    if (count > 0 && error == cudaSuccess)
      error = gpu::launch(corners_kernel<T>, blocks_for(count, kThreads), dim3(kThreads), 0, as_stream(stream),
                          points_from<T>(points, offsets, lengths, n, batch), count, grid_from(grid), coords, static_cast<const int64_t*>(table),
                          slots, index, static_cast<T*>(weight));
    return error;
  });
}
GEOSSL_PACKED(geossl_voxel_corners_cuda)
