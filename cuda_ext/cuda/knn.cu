// k nearest neighbours and ball query on the GPU: one warp per query, which compares it with all points, 32 at a time.
#include "warp.cuh"

namespace geossl {
namespace {

constexpr int kThreads = 256;

template <class T>
struct Search {
  const T *query, *points;
  Clouds queries, clouds;
  int64_t rows, k;
  T radius;
  const T* radii;
  bool exclude_self, first, repeat;
  T* distance;
  int64_t *index, *count;
};

// One query, known to the whole warp.
template <class T>
struct Query {
  T x, y, z, limit;
  const T* points;
  int32_t n, self;  // n is 0 for rows of padding
  int64_t row, base;

  __device__ Query(const Search<T>& s, int64_t row_) : row(row_) {
    const int64_t b = s.queries.cloud_of(row), local = row - s.queries.begin(b);
    const T radius = s.radii ? s.radii[row] : s.radius;
    x = s.query[3 * row], y = s.query[3 * row + 1], z = s.query[3 * row + 2];
    limit = radius * radius;
    points = s.points + 3 * s.clouds.begin(b);
    n = local < s.queries.size(b) ? static_cast<int32_t>(s.clouds.size(b)) : 0;
    self = s.exclude_self && local < n ? static_cast<int32_t>(local) : -1;
    base = s.clouds.index_base(b);
  }
  // NaN and infinity are not below the limit, so invalid points and queries need no test of their own.
  __device__ T distance_to(int32_t i) const {
    const T* p = points + 3 * int64_t{i};
    return squared(p[0] - x, p[1] - y, p[2] - z);
  }
};

// The `wanted` smallest (distance, index) pairs seen by a warp, sorted: rank r is held by lane r % 32 in slot r / 32. They fill the last
// ranks; those before hold pairs that come before everything. So the worst one always has the same place, in registers.
template <class T, int kSlots>
struct SortedList {
  static constexpr int kRanks = 32 * kSlots;
  static constexpr int32_t kNone = 0x7fffffff;
  T distance[kSlots];
  int32_t index[kSlots];

  __device__ __forceinline__ void clear(int wanted, int lane) {
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      const bool unused = s * 32 + lane < kRanks - wanted;
      distance[s] = unused ? T(-1) : infinity<T>();
      index[s] = unused ? -1 : kNone;
    }
  }
  // Inserts a pair that all lanes know; the last one falls out.
  __device__ __forceinline__ void insert(T d, int32_t i, int lane) {
#pragma unroll
    for (int s = kSlots - 1; s >= 0; --s) {
      T left_d = __shfl_up_sync(kAllLanes, distance[s], 1);
      int32_t left_i = __shfl_up_sync(kAllLanes, index[s], 1);
      bool left_before = before(left_d, left_i, d, i);
      if (s > 0) {
        const T end_d = __shfl_sync(kAllLanes, distance[s - 1], 31);
        const int32_t end_i = __shfl_sync(kAllLanes, index[s - 1], 31);
        if (lane == 0) left_d = end_d, left_i = end_i, left_before = before(end_d, end_i, d, i);
      } else if (lane == 0) {
        left_before = true;
      }
      if (!before(distance[s], index[s], d, i)) {
        distance[s] = left_before ? d : left_d;
        index[s] = left_before ? i : left_i;
      }
    }
  }
  // The last pair, known to all lanes.
  __device__ __forceinline__ void worst(T& d, int32_t& i) const {
    d = __shfl_sync(kAllLanes, distance[kSlots - 1], 31);
    i = __shfl_sync(kAllLanes, index[kSlots - 1], 31);
  }
};

// Up to 32 * kSlots neighbours are found in one pass over the points; for more, each further pass finds those after the last one found.
template <class T, int kSlots>
__global__ void __launch_bounds__(kThreads, 2) nearest_kernel(Search<T> s) {
  const int lane = threadIdx.x & 31;
  const int64_t warps = int64_t{gridDim.x} * (kThreads / 32);
  for (int64_t row = int64_t{blockIdx.x} * (kThreads / 32) + threadIdx.x / 32; row < s.rows; row += warps) {
    const Query<T> q(s, row);
    T *distance = s.distance + row * s.k, last_d = T(-1);
    int64_t *index = s.index + row * s.k, found = 0, inside = 0;
    int32_t last_i = -1;
    for (bool more = q.n > 0; more;) {
      using List = SortedList<T, kSlots>;
      const int wanted = static_cast<int>(min(s.k - found, int64_t{List::kRanks})), unused = List::kRanks - wanted;
      List list;
      list.clear(wanted, lane);
      T worst_d = infinity<T>();
      int32_t worst_i = List::kNone;
      for (int32_t begin = 0; begin < q.n; begin += 32) {
        const int32_t i = begin + lane;
        const T d = i < q.n ? q.distance_to(i) : infinity<T>();
        const bool hit = d < q.limit && i != q.self;
        if (s.count && found == 0) inside += __popc(__ballot_sync(kAllLanes, hit));
        unsigned candidates = __ballot_sync(kAllLanes, hit && before(last_d, last_i, d, i) && before(d, i, worst_d, worst_i));
        for (; candidates; candidates &= candidates - 1) {
          const int source = __ffs(static_cast<int>(candidates)) - 1;
          const T new_d = __shfl_sync(kAllLanes, d, source);
          if (!before(new_d, begin + source, worst_d, worst_i)) continue;
          list.insert(new_d, begin + source, lane);
          list.worst(worst_d, worst_i);
        }
      }
      int held = 0;
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) {
        const int r = slot * 32 + lane - unused;
        const bool real = r >= 0 && list.index[slot] != List::kNone;
        if (real) distance[found + r] = list.distance[slot], index[found + r] = q.base + list.index[slot];
        held += __popc(__ballot_sync(kAllLanes, real));
      }
      found += held;
      last_d = worst_d, last_i = worst_i;
      more = held == wanted && found < s.k;
    }
    __syncwarp();  // the first neighbour was written by another lane
    const bool repeat = s.repeat && found > 0;
    const T fill_d = repeat ? distance[0] : infinity<T>();
    const int64_t fill_i = repeat ? index[0] : -1;
    for (int64_t j = found + lane; j < s.k; j += 32) distance[j] = fill_d, index[j] = fill_i;
    if (s.count && lane == 0) s.count[row] = inside;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) first_kernel(Search<T> s) {
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
