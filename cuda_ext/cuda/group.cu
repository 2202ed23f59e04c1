// Gathering rows by index, sums over equal indices, and distances to given neighbours. Sums run over the entries of a row in order, found
// through the inverse map of geossl/ops/_dispatch.py (`order` sorted by row, `starts` of each row): no atomics, the same bits every time.
#include "warp.cuh"

namespace geossl {
namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ int64_t thread_number() { return int64_t{blockIdx.x} * kThreads + threadIdx.x; }
__device__ __forceinline__ int64_t thread_count() { return int64_t{gridDim.x} * kThreads; }

__device__ __forceinline__ float divide(float a, float b) { return __fdiv_rn(a, b); }
__device__ __forceinline__ double divide(double a, double b) { return __ddiv_rn(a, b); }

// Moves rows in units as wide as their alignment allows.
template <class Unit>
__global__ void __launch_bounds__(kThreads) gather_kernel(const Unit* features, int64_t units, int64_t n, const int64_t* index, int64_t entries,
                                                          int64_t all_entries, const Unit* fill, Unit* out) {
  for (int64_t i = thread_number(); i < all_entries * units; i += thread_count()) {
    const int64_t e = i / units, u = i - e * units, row = index[e];
    Unit value{};
    if (row >= 0 && row < n) value = features[(e / entries * n + row) * units + u];
    else if (fill) value = fill[u];
    out[i] = value;
  }
}

template <class T>
struct Relative {
  const T* points;
  int64_t n, batch;
  const T* centers;
  int64_t queries;
  const T* features;
  int64_t channels;
  const int64_t* index;
  int64_t k;
  T radius;  // 0: not divided
};

// One thread per value of the result: consecutive threads read consecutive channels.
template <class T>
__global__ void __launch_bounds__(kThreads, 4) relative_kernel(Relative<T> r, T* out) {
  const int64_t width = 3 + r.channels;
  for (int64_t i = thread_number(); i < r.batch * r.queries * r.k * width; i += thread_count()) {
    const int64_t e = i / width, c = i - e * width, q = e / r.k, row = r.index[e];
    T value = T(0);
    if (row >= 0 && row < r.n) {
      const int64_t from = q / r.queries * r.n + row;
      value = c < 3 ? r.points[3 * from + c] - r.centers[3 * q + c] : r.features[from * r.channels + c - 3];
      if (c < 3 && r.radius > T(0)) value = divide(value, r.radius);
    }
    out[i] = value;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) add_rows_kernel(const T* grad, int64_t channels, int64_t rows, const int64_t* order,
                                                            const int64_t* starts, T* out) {
  for (int64_t i = thread_number(); i < rows * channels; i += thread_count()) {
    const int64_t row = i / channels, c = i - row * channels;
    T sum = T(0);
    for (int64_t e = starts[row]; e < starts[row + 1]; ++e) sum += grad[order[e] * channels + c];
    out[i] = sum;
  }
}

template <class T>
struct Pairs {
  const T* query;
  int64_t queries;  // per cloud
  const T* points;
  int64_t n, batch;
  const int64_t* index;
  int64_t k;

  // The point an entry names, or null.
  __device__ const T* point(int64_t entry) const {
    const int64_t row = index[entry];
    return row >= 0 && row < n ? points + 3 * (entry / k / queries * n + row) : nullptr;
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads) distance_kernel(Pairs<T> p, T* out) {
  for (int64_t e = thread_number(); e < p.batch * p.queries * p.k; e += thread_count()) {
    const T *a = p.query + 3 * (e / p.k), *b = p.point(e);
    out[e] = b ? squared(a[0] - b[0], a[1] - b[1], a[2] - b[2]) : infinity<T>();
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) query_gradient_kernel(Pairs<T> p, const T* grad, T* out) {
  for (int64_t q = thread_number(); q < p.batch * p.queries; q += thread_count()) {
    const T* a = p.query + 3 * q;
    T sum[3] = {};
    for (int64_t e = q * p.k; e < (q + 1) * p.k; ++e) {
      const T* b = p.point(e);
      if (!b) continue;
      for (int axis = 0; axis < 3; ++axis) sum[axis] += 2 * grad[e] * (a[axis] - b[axis]);
    }
    for (int axis = 0; axis < 3; ++axis) out[3 * q + axis] = sum[axis];
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) point_gradient_kernel(Pairs<T> p, const T* grad, const int64_t* order, const int64_t* starts, T* out) {
  for (int64_t row = thread_number(); row < p.batch * p.n; row += thread_count()) {
    const T* b = p.points + 3 * row;
    T sum[3] = {};
    for (int64_t i = starts[row]; i < starts[row + 1]; ++i) {
      const int64_t e = order[i];
      const T* a = p.query + 3 * (e / p.k);
      for (int axis = 0; axis < 3; ++axis) sum[axis] -= 2 * grad[e] * (a[axis] - b[axis]);
    }
    for (int axis = 0; axis < 3; ++axis) out[3 * row + axis] = sum[axis];
  }
}

template <class Unit>
cudaError_t gather(const void* features, int64_t row_bytes, int64_t n, const int64_t* index, int64_t entries, int64_t all_entries,
                   const void* fill, void* out, cudaStream_t stream) {
  const int64_t units = row_bytes / static_cast<int64_t>(sizeof(Unit));
  return gpu::launch(gather_kernel<Unit>, blocks_for(all_entries * units, kThreads), dim3(kThreads), 0, stream,
                     static_cast<const Unit*>(features), units, n, index, entries, all_entries, static_cast<const Unit*>(fill),
                     static_cast<Unit*>(out));
}

}  // namespace
}  // namespace geossl

// See geossl/ops/grouping.py for the arguments of these three.
GEOSSL_API int geossl_group_cuda(int device, void* stream, int64_t row_bytes, const void* features, int64_t n, int64_t batch,
                                 const int64_t* index, int64_t entries, const void* fill, void* out) {
  using namespace geossl;
  if (row_bytes < 0 || n < 0 || batch < 0 || entries < 0) return GEOSSL_INVALID_ARGUMENT;
  const int64_t all = batch * entries;
  if (all == 0 || row_bytes == 0) return GEOSSL_OK;
  return on_device(device, false, [&](auto) {
    const auto fits = [&](size_t width) {
      const auto bits = reinterpret_cast<uintptr_t>(features) | reinterpret_cast<uintptr_t>(out) | reinterpret_cast<uintptr_t>(fill);
      return (bits | static_cast<uintptr_t>(row_bytes)) % width == 0;
    };
    const cudaStream_t s = as_stream(stream);
    if (fits(16)) return gather<int4>(features, row_bytes, n, index, entries, all, fill, out, s);
    if (fits(8)) return gather<int2>(features, row_bytes, n, index, entries, all, fill, out, s);
    if (fits(4)) return gather<int>(features, row_bytes, n, index, entries, all, fill, out, s);
    if (fits(2)) return gather<short>(features, row_bytes, n, index, entries, all, fill, out, s);
    return gather<char>(features, row_bytes, n, index, entries, all, fill, out, s);
  });
}
GEOSSL_PACKED(geossl_group_cuda)

GEOSSL_API int geossl_group_relative_cuda(int device, void* stream, int is_double, const void* points, int64_t n, int64_t batch,
                                          const void* centers, int64_t queries, const void* features, int64_t channels, const int64_t* index,
                                          int64_t k, double radius, void* out) {
  using namespace geossl;
  if (n < 0 || batch < 0 || queries < 0 || channels < 0 || k < 0) return GEOSSL_INVALID_ARGUMENT;
  const int64_t work = batch * queries * k * (3 + channels);
  if (work == 0) return GEOSSL_OK;
  return on_device(device, is_double, [&](auto zero) {
    using T = decltype(zero);
    const Relative<T> r{static_cast<const T*>(points), n, batch, static_cast<const T*>(centers), queries, static_cast<const T*>(features),
                        channels, index, k, static_cast<T>(radius)};
    return gpu::launch(relative_kernel<T>, blocks_for(work, kThreads), dim3(kThreads), 0, as_stream(stream), r, static_cast<T*>(out));
  });
}
GEOSSL_PACKED(geossl_group_relative_cuda)

GEOSSL_API int geossl_group_backward_cuda(int device, void* stream, int is_double, const void* grad, int64_t channels, int64_t n, int64_t batch,
                                          const int64_t*, int64_t entries, const int64_t* order, const int64_t* starts, void* out) {
  using namespace geossl;
  if (channels < 0 || n < 0 || batch < 0 || entries < 0) return GEOSSL_INVALID_ARGUMENT;
  const int64_t rows = batch * n;
  if (rows * channels == 0) return GEOSSL_OK;
  return on_device(device, is_double, [&](auto zero) {
    using T = decltype(zero);
    return gpu::launch(add_rows_kernel<T>, blocks_for(rows * channels, kThreads), dim3(kThreads), 0, as_stream(stream),
                       static_cast<const T*>(grad), channels, rows, order, starts, static_cast<T*>(out));
  });
}
GEOSSL_PACKED(geossl_group_backward_cuda)

// See geossl/ops/neighbors.py for the arguments of both.
GEOSSL_API int geossl_neighbor_distance_cuda(int device, void* stream, int is_double, const void* query, int64_t queries, const void* points,
                                             int64_t n, int64_t batch, const int64_t* index, int64_t k, void* out) {
  using namespace geossl;
  if (queries < 0 || n < 0 || batch < 0 || k < 0) return GEOSSL_INVALID_ARGUMENT;
  const int64_t entries = batch * queries * k;
  if (entries == 0) return GEOSSL_OK;
  return on_device(device, is_double, [&](auto zero) {
    using T = decltype(zero);
    const Pairs<T> pairs{static_cast<const T*>(query), queries, static_cast<const T*>(points), n, batch, index, k};
    return gpu::launch(distance_kernel<T>, blocks_for(entries, kThreads), dim3(kThreads), 0, as_stream(stream), pairs, static_cast<T*>(out));
  });
}
GEOSSL_PACKED(geossl_neighbor_distance_cuda)

GEOSSL_API int geossl_neighbor_distance_backward_cuda(int device, void* stream, int is_double, const void* query, int64_t queries,
                                                      const void* points, int64_t n, int64_t batch, const int64_t* index, int64_t k,
                                                      const void* grad, const int64_t* order, const int64_t* starts, void* grad_query,
                                                      void* grad_points) {
  using namespace geossl;
  if (queries < 0 || n < 0 || batch < 0 || k < 0) return GEOSSL_INVALID_ARGUMENT;
  return on_device(device, is_double, [&](auto zero) {
    using T = decltype(zero);
    const Pairs<T> pairs{static_cast<const T*>(query), queries, static_cast<const T*>(points), n, batch, index, k};
    const auto* g = static_cast<const T*>(grad);
    cudaError_t error = cudaSuccess;
    if (batch * queries > 0)
      error = gpu::launch(query_gradient_kernel<T>, blocks_for(batch * queries, kThreads), dim3(kThreads), 0, as_stream(stream), pairs, g,
                          static_cast<T*>(grad_query));
    if (batch * n > 0 && error == cudaSuccess)
      error = gpu::launch(point_gradient_kernel<T>, blocks_for(batch * n, kThreads), dim3(kThreads), 0, as_stream(stream), pairs, g, order,
                          starts, static_cast<T*>(grad_points));
    return error;
  });
}
GEOSSL_PACKED(geossl_neighbor_distance_backward_cuda)
