// What the searches for neighbours share: their arguments, a query, and the sorted list in which a warp keeps the best it has seen.
#pragma once
#include "warp.cuh"

namespace geossl {

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
  int64_t row, base, cloud;

  __device__ Query(const Search<T>& s, int64_t row_) : row(row_), cloud(s.queries.cloud_of(row_)) {
    const int64_t local = row - s.queries.begin(cloud);
    const T radius = s.radii ? s.radii[row] : s.radius;
    x = s.query[3 * row], y = s.query[3 * row + 1], z = s.query[3 * row + 2];
    limit = radius * radius;
    points = s.points + 3 * s.clouds.begin(cloud);
    n = local < s.queries.size(cloud) ? static_cast<int32_t>(s.clouds.size(cloud)) : 0;
    self = s.exclude_self && local < n ? static_cast<int32_t>(local) : -1;
    base = s.clouds.index_base(cloud);
  }
  // NaN and infinity are not below the limit, so invalid points and queries need no test of their own.
  __device__ T distance_to(const T* p) const { return squared(p[0] - x, p[1] - y, p[2] - z); }
  __device__ T distance_to(int32_t i) const { return distance_to(points + 3 * int64_t{i}); }
};

// The `wanted` smallest (distance, index) pairs seen by a warp, sorted: rank r is held by lane r % 32 in slot r / 32. They fill the last
// ranks; those before hold pairs that come before everything. So the worst one always has the same place, in registers.
//
// Pairs enter one by one. A queue in every lane that is merged when one is full (WarpSelect) would need a sort of the queues and a merge by
// shuffles, 20 of both numbers for each 32 pairs of k <= 32; shifting the list costs one shuffle of both for every pair that enters, and few
// do: about k ln(n / k) of n, because the vote lets only those through that beat the worst.
template <class T, int kSlots>
struct SortedList {
  static constexpr int kRanks = 32 * kSlots;
  static constexpr int32_t kNone = 0x7fffffff;
  T distance[kSlots], worst_distance;
  int32_t index[kSlots], worst_index;  // the worst pair, known to all lanes

  __device__ __forceinline__ void clear(int wanted, int lane) {
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      const bool unused = s * 32 + lane < kRanks - wanted;
      distance[s] = unused ? T(-1) : infinity<T>();
      index[s] = unused ? -1 : kNone;
    }
    worst_distance = infinity<T>(), worst_index = kNone;
  }
  // Offers one pair per lane; those of lanes with `good` enter if they are better than the worst.
  __device__ __forceinline__ void offer(bool good, T d, int32_t i, int lane) {
    unsigned candidates = __ballot_sync(kAllLanes, good && before(d, i, worst_distance, worst_index));
    for (; candidates; candidates &= candidates - 1) {
      const int source = __ffs(static_cast<int>(candidates)) - 1;
      const T new_d = __shfl_sync(kAllLanes, d, source);
      const int32_t new_i = __shfl_sync(kAllLanes, i, source);
      if (!before(new_d, new_i, worst_distance, worst_index)) continue;
      insert(new_d, new_i, lane);
      worst_distance = __shfl_sync(kAllLanes, distance[kSlots - 1], 31);
      worst_index = __shfl_sync(kAllLanes, index[kSlots - 1], 31);
    }
  }
  // Hands every pair to `store(rank, distance, index)` in the lane that holds it, and returns how many there are.
  template <class F>
  __device__ __forceinline__ int take(int wanted, int lane, F&& store) const {
    int held = 0;
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      const int rank = s * 32 + lane - (kRanks - wanted);
      const bool real = rank >= 0 && index[s] != kNone;
      if (real) store(rank, distance[s], index[s]);
      held += __popc(__ballot_sync(kAllLanes, real));
    }
    return held;
  }

 private:
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
};

// Fills the slots of a query after the neighbours that were found. Called by whole warps.
template <class T>
__device__ void fill_free_slots(const Search<T>& s, int64_t row, int64_t found, int lane) {
  T* distance = s.distance + row * s.k;
  int64_t* index = s.index + row * s.k;
  __syncwarp();  // the first neighbour was written by another lane
  const bool repeat = s.repeat && found > 0;
  const T fill_d = repeat ? distance[0] : infinity<T>();
  const int64_t fill_i = repeat ? index[0] : -1;
  for (int64_t j = found + lane; j < s.k; j += 32) distance[j] = fill_d, index[j] = fill_i;
}

}  // namespace geossl
