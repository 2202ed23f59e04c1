// All points in a ball on the GPU, in two launches: the first counts, the second writes what the caller has made room for. One warp per query
// compares it with all points, 32 at a time, and then sorts what it has found in place.
#include "warp.cuh"

namespace geossl {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

template <class T>
struct Search {
  const T *query, *points;
  Clouds queries, clouds;
  int64_t rows;
  T radius;
  const T* radii;
  bool exclude_self;
};

// One query, known to the whole warp.
template <class T>
struct Query {
  T x, y, z, limit;
  const T* points;
  int32_t n, self;  // n is 0 for rows of padding
  int64_t base;

  __device__ Query(const Search<T>& s, int64_t row) {
    const int64_t b = s.queries.cloud_of(row), local = row - s.queries.begin(b);
    const T radius = s.radii ? s.radii[row] : s.radius;
    x = s.query[3 * row], y = s.query[3 * row + 1], z = s.query[3 * row + 2];
    limit = radius * radius;
    points = s.points + 3 * s.clouds.begin(b);
    n = local < s.queries.size(b) ? static_cast<int32_t>(s.clouds.size(b)) : 0;
    self = s.exclude_self && local < n ? static_cast<int32_t>(local) : -1;
    base = s.clouds.index_base(b);
  }
  // The squared distance to point i, infinity where it is no neighbour. NaN is not below the limit, so invalid points need no test.
  __device__ T distance_to(int32_t i) const {
    if (i >= n || i == self) return infinity<T>();
    const T* p = points + 3 * int64_t{i};
    const T d = squared(p[0] - x, p[1] - y, p[2] - z);
    return d < limit ? d : infinity<T>();
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads) count_kernel(Search<T> s, int64_t* count) {
  const int lane = threadIdx.x & 31;
  for (int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32; row < s.rows; row += int64_t{gridDim.x} * kWarps) {
    const Query<T> q(s, row);
    int64_t found = 0;
    for (int64_t i = lane; i < q.n; i += 32) found += q.distance_to(static_cast<int32_t>(i)) < infinity<T>();
    found = warp_sum(found);
    if (lane == 0) count[row] = found;
  }
}

// Sorts n (distance, index) pairs by a bitonic network whose comparisons all put the smaller pair first, so that any n will do: what would
// lie beyond the end is larger than everything and never moves. Pairs are distinct, so the result does not depend on the network.
template <class T>
__device__ void sort_pairs(T* distance, int64_t* index, int64_t n, int lane) {
  for (int64_t block = 2; block / 2 < n; block *= 2)
    for (int64_t step = block / 2; step > 0; step /= 2) {
      const bool mirrored = step == block / 2;  // the first step compares with the mirror image, the others with a fixed distance
      __syncwarp();
      for (int64_t i = lane; i < (n + 1) / 2 + step; i += 32) {
        const int64_t inside = i & (step - 1), begin = 2 * (i - inside);  // step is a power of two
        const int64_t low = begin + inside, high = mirrored ? begin + 2 * step - 1 - inside : low + step;
        if (high >= n) continue;
        const T a = distance[low], b = distance[high];
        const int64_t ia = index[low], ib = index[high];
        if (b < a || (b == a && ib < ia)) distance[low] = b, distance[high] = a, index[low] = ib, index[high] = ia;
      }
    }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) fill_kernel(Search<T> s, const int64_t* splits, int64_t* index, T* distance) {
  const int lane = threadIdx.x & 31;
  for (int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32; row < s.rows; row += int64_t{gridDim.x} * kWarps) {
    const Query<T> q(s, row);
    const int64_t begin = splits[row], wanted = splits[row + 1] - begin;
    int64_t found = 0;
    for (int32_t first = 0; first < q.n && found < wanted; first += 32) {
      const T d = q.distance_to(first + lane);
      const bool hit = d < infinity<T>();
      const unsigned hits = __ballot_sync(kAllLanes, hit);
      const int64_t slot = found + __popc(hits & ((1u << lane) - 1u));
      if (hit && slot < wanted) distance[begin + slot] = d, index[begin + slot] = q.base + first + lane;
      found += __popc(hits);
    }
    sort_pairs(distance + begin, index + begin, wanted, lane);
  }
}

template <class T>
Search<T> make_search(const void* query, const int64_t* query_offsets, const int64_t* query_lengths, int64_t queries, const void* points,
                      const int64_t* offsets, const int64_t* lengths, int64_t n, int64_t batch, double radius, const void* radii,
                      int exclude_self) {
  return {static_cast<const T*>(query), static_cast<const T*>(points), {query_offsets, query_lengths, batch, queries},
          {offsets, lengths, batch, n}, query_offsets ? queries : batch * queries, static_cast<T>(radius), static_cast<const T*>(radii),
          exclude_self != 0};
}

}  // namespace
}  // namespace geossl

// See geossl/ops/radius.py for the arguments of both.
GEOSSL_API int geossl_radius_count_cuda(int device, void* stream, int is_double, const void* query, const int64_t* query_offsets,
                                        const int64_t* query_lengths, int64_t queries, const void* points, const int64_t* offsets,
                                        const int64_t* lengths, int64_t n, int64_t batch, double radius, const void* radii, int exclude_self,
                                        int64_t* count) {
  using namespace geossl;
  if (batch < 0 || n < 0 || queries < 0) return GEOSSL_INVALID_ARGUMENT;
  if (!offsets && n > kMaxCloud) return GEOSSL_TOO_LARGE;
  return on_device(device, is_double, [&](auto zero) {
    using T = decltype(zero);
    const Search<T> search = make_search<T>(query, query_offsets, query_lengths, queries, points, offsets, lengths, n, batch, radius, radii,
                                            exclude_self);
    if (search.rows == 0 || batch == 0) return cudaSuccess;
    return gpu::launch(count_kernel<T>, blocks_for(search.rows, kWarps), dim3(kThreads), 0, as_stream(stream), search, count);
  });
}
GEOSSL_PACKED(geossl_radius_count_cuda)

GEOSSL_API int geossl_radius_fill_cuda(int device, void* stream, int is_double, const void* query, const int64_t* query_offsets,
                                       const int64_t* query_lengths, int64_t queries, const void* points, const int64_t* offsets,
                                       const int64_t* lengths, int64_t n, int64_t batch, double radius, const void* radii, int exclude_self,
                                       const int64_t* row_splits, int64_t* index, void* distance) {
  using namespace geossl;
  if (batch < 0 || n < 0 || queries < 0) return GEOSSL_INVALID_ARGUMENT;
  if (!offsets && n > kMaxCloud) return GEOSSL_TOO_LARGE;
  return on_device(device, is_double, [&](auto zero) {
    using T = decltype(zero);
    const Search<T> search = make_search<T>(query, query_offsets, query_lengths, queries, points, offsets, lengths, n, batch, radius, radii,
                                            exclude_self);
    if (search.rows == 0 || batch == 0) return cudaSuccess;
    return gpu::launch(fill_kernel<T>, blocks_for(search.rows, kWarps), dim3(kThreads), 0, as_stream(stream), search, row_splits, index,
                       static_cast<T*>(distance));
  });
}
GEOSSL_PACKED(geossl_radius_fill_cuda)
