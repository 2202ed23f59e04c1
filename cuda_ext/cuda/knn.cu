// k nearest neighbours and ball query on the GPU by comparing each query with all points: one warp per query, 32 points at a time. For large
// clouds there is tree.cu; geossl/ops/_tree.py chooses.
#include "search.cuh"

namespace geossl {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = 512;  // points; three numbers of each lie together, which 32 lanes read without a conflict of banks

// Up to 32 * kSlots neighbours are found in one pass over the points; for more, each further pass finds those after the last one found. The
// queries of a block are neighbours in the batch, mostly of one cloud, and go through its points together: a tile is loaded once for all.
template <class T, int kSlots>
__global__ void __launch_bounds__(kThreads, 2) nearest_kernel(Search<T> s) {
  constexpr int kWarps = kThreads / 32;
  GPU_SHARED(T, tile, 3 * kTile);
  const int t = threadIdx.x, lane = t & 31;
  for (int64_t first = int64_t{blockIdx.x} * kWarps; first < s.rows; first += int64_t{gridDim.x} * kWarps) {
    const int64_t row = first + t / 32, last = min(first + kWarps, s.rows) - 1;
    const int64_t from = s.queries.cloud_of(first), to = s.queries.cloud_of(last);
    const Query<T> q(s, min(row, last));
    T *distance = s.distance + q.row * s.k, last_d = T(-1);
    int64_t *index = s.index + q.row * s.k, found = 0, inside = 0;
    int32_t last_i = -1;
    for (bool more = row <= last && q.n > 0; __syncthreads_or(more);) {
      SortedList<T, kSlots> list;
      const int wanted = static_cast<int>(min(s.k - found, int64_t{list.kRanks}));
      list.clear(wanted, lane);
      for (int64_t b = from; b <= to; ++b) {
        const T* p = s.points + 3 * s.clouds.begin(b);
        const int64_t n = s.clouds.size(b);
        for (int64_t begin = 0; begin < n; begin += kTile) {
          const int count = static_cast<int>(min(int64_t{kTile}, n - begin));
          for (int i = t; i < 3 * count; i += kThreads) tile[i] = p[3 * begin + i];
          __syncthreads();
          for (int at = 0; more && b == q.cloud && at < count; at += 32) {
            const int32_t i = static_cast<int32_t>(begin) + at + lane;
            const T d = at + lane < count ? q.distance_to(tile + 3 * (at + lane)) : infinity<T>();
            const bool hit = d < q.limit && i != q.self;
            if (s.count && found == 0) inside += __popc(__ballot_sync(kAllLanes, hit));
            list.offer(hit && before(last_d, last_i, d, i), d, i, lane);
          }
          __syncthreads();
        }
      }
      if (!more) continue;
      const int held = list.take(wanted, lane, [&](int rank, T d, int32_t i) { distance[found + rank] = d, index[found + rank] = q.base + i; });
      found += held;
      last_d = list.worst_distance, last_i = list.worst_index;
      more = held == wanted && found < s.k;
    }
    if (row > last) continue;
    fill_free_slots(s, row, found, lane);
    if (s.count && lane == 0) s.count[row] = inside;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 4) first_kernel(Search<T> s) {
  const int lane = threadIdx.x & 31;
  const int64_t warps = int64_t{gridDim.x} * (kThreads / 32);
  for (int64_t row = int64_t{blockIdx.x} * (kThreads / 32) + threadIdx.x / 32; row < s.rows; row += warps) {
    const Query<T> q(s, row);
    T *distance = s.distance + row * s.k, first_d = infinity<T>();
    int64_t *index = s.index + row * s.k, inside = 0, first_i = -1;
    for (int32_t begin = 0; begin < q.n; begin += 32) {
      const int32_t i = begin + lane;
      const T d = i < q.n ? q.distance_to(i) : infinity<T>();
      const bool hit = d < q.limit;
      const unsigned hits = __ballot_sync(kAllLanes, hit);
      if (hits == 0) continue;
      if (inside == 0) {
        const int source = __ffs(static_cast<int>(hits)) - 1;
        first_d = __shfl_sync(kAllLanes, d, source);
        first_i = q.base + begin + source;
      }
      const int64_t slot = inside + __popc(hits & ((1u << lane) - 1u));
      if (hit && slot < s.k) distance[slot] = d, index[slot] = q.base + i;
      inside += __popc(hits);
    }
    const bool repeat = s.repeat && inside > 0;
    for (int64_t j = min(inside, s.k) + lane; j < s.k; j += 32) {
      distance[j] = repeat ? first_d : infinity<T>();
      index[j] = repeat ? first_i : -1;
    }
    if (lane == 0) s.count[row] = inside;
  }
}

template <class T>
cudaError_t launch(const Search<T>& s, cudaStream_t stream) {
  if (s.rows == 0) return cudaSuccess;
  const dim3 grid = blocks_for(s.rows, kThreads / 32), block(kThreads);
  if (s.first) return gpu::launch(first_kernel<T>, grid, block, 0, stream, s);
  if (s.k <= 32) return gpu::launch(nearest_kernel<T, 1>, grid, block, 0, stream, s);
  return gpu::launch(nearest_kernel<T, 4>, grid, block, 0, stream, s);
}

}  // namespace
}  // namespace geossl

// See geossl/ops/neighbors.py for the arguments of both.
GEOSSL_API int geossl_knn_cuda(int device, void* stream, int is_double, const void* query, const int64_t* query_offsets,
                               const int64_t* query_lengths, int64_t queries, const void* points, const int64_t* offsets,
                               const int64_t* lengths, int64_t n, int64_t batch, int64_t k, double radius, int exclude_self, void* distance,
                               int64_t* index) {
  using namespace geossl;
  if (batch < 0 || n < 0 || queries < 0 || k < 1) return GEOSSL_INVALID_ARGUMENT;
  if (!offsets && n > kMaxCloud) return GEOSSL_TOO_LARGE;
  return on_device(device, is_double, [&](auto zero) {
    using T = decltype(zero);
    const Search<T> search{static_cast<const T*>(query), static_cast<const T*>(points), {query_offsets, query_lengths, batch, queries},
                           {offsets, lengths, batch, n}, query_offsets ? queries : batch * queries, k, static_cast<T>(radius), nullptr,
                           exclude_self != 0, false, false, static_cast<T*>(distance), index, nullptr};
    return launch(search, as_stream(stream));
  });
}
GEOSSL_PACKED(geossl_knn_cuda)

GEOSSL_API int geossl_ball_query_cuda(int device, void* stream, int is_double, const void* query, const int64_t* query_offsets,
                                      const int64_t* query_lengths, int64_t queries, const void* points, const int64_t* offsets,
                                      const int64_t* lengths, int64_t n, int64_t batch, int64_t k, double radius, const void* radii, int first,
                                      int repeat, void* distance, int64_t* index, int64_t* count) {
  using namespace geossl;
  if (batch < 0 || n < 0 || queries < 0 || k < 1) return GEOSSL_INVALID_ARGUMENT;
  if (!offsets && n > kMaxCloud) return GEOSSL_TOO_LARGE;
  return on_device(device, is_double, [&](auto zero) {
    using T = decltype(zero);
    const Search<T> search{static_cast<const T*>(query), static_cast<const T*>(points), {query_offsets, query_lengths, batch, queries},
                           {offsets, lengths, batch, n}, query_offsets ? queries : batch * queries, k, static_cast<T>(radius),
                           static_cast<const T*>(radii), false, first != 0, repeat != 0, static_cast<T*>(distance), index, count};
    return launch(search, as_stream(stream));
  });
}
GEOSSL_PACKED(geossl_ball_query_cuda)
