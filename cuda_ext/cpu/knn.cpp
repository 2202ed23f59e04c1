// k nearest neighbours and ball query on the CPU.
#include <algorithm>
#include <cmath>

#include "points.h"
#include "select.h"
#include "tree.h"

namespace geossl {
namespace {

// What is asked of one batch of queries; see geossl/ops/neighbors.py.
template <class T>
struct Search {
  const T *query, *points;
  Clouds queries, clouds;
  int64_t k;
  T radius;
  const T* radii;  // per query row, may be null
  bool exclude_self, first, repeat;
  T* distance;
  int64_t *index, *count;  // count may be null

  // A NaN or infinite distance is never below it, so invalid points and queries need no test of their own.
  T limit(int64_t row) const { return radii ? radii[row] * radii[row] : radius * radius; }
};

template <class T>
void write_row(const Search<T>& s, int64_t row, const Key<T>* sorted, int64_t found, int64_t base) {
  T* distance = s.distance + row * s.k;
  int64_t* index = s.index + row * s.k;
  for (int64_t j = 0; j < found; ++j) {
    distance[j] = from_bits<T>(bits_of_key(sorted[j]));
    index[j] = base + index_of_key(sorted[j]);
  }
  const bool repeat = s.repeat && found > 0;
  std::fill(distance + found, distance + s.k, repeat ? distance[0] : std::numeric_limits<T>::infinity());
  std::fill(index + found, index + s.k, repeat ? index[0] : int64_t{-1});
}

// All distances ---------------------------------------------------------------------------------------------------------------------
//
// Distances to all n points go into one array, in which point i belongs to group i % groups. The k-th smallest of the groups' minima
// is a bound that few points keep below; they are collected and sorted. Nothing in it depends on how often the bound improves.

template <class T>
GEOSSL_INLINE void distances_loop(const Soa<T>& p, int64_t n, int64_t groups, T qx, T qy, T qz, T limit, Bits<T>* GEOSSL_RESTRICT distance,
                                  Bits<T>* GEOSSL_RESTRICT minima) {
  const Bits<T> infinity = to_bits(std::numeric_limits<T>::infinity());
  const T *GEOSSL_RESTRICT x = p.x, *GEOSSL_RESTRICT y = p.y, *GEOSSL_RESTRICT z = p.z;
  for (int64_t g = 0; g < groups; ++g) minima[g] = infinity;
  for (int64_t begin = 0; begin < n; begin += groups)
    for (int64_t g = 0; g < groups; ++g) {
      const T d2 = squared(x[begin + g] - qx, y[begin + g] - qy, z[begin + g] - qz);
      const Bits<T> bits = d2 < limit ? to_bits(d2) : infinity;
      distance[begin + g] = bits;
      minima[g] = bits < minima[g] ? bits : minima[g];
    }
}
GEOSSL_SIMD void all_distances(const Soa<float>& p, int64_t n, int64_t groups, float qx, float qy, float qz, float limit, int32_t* distance,
                               int32_t* minima) {
  distances_loop(p, n, groups, qx, qy, qz, limit, distance, minima);
}
void all_distances(const Soa<double>& p, int64_t n, int64_t groups, double qx, double qy, double qz, double limit,
                               int64_t* distance, int64_t* minima) {
  distances_loop(p, n, groups, qx, qy, qz, limit, distance, minima);
}

// The smallest bound found by bisection that at least k of n values do not exceed (or that all finite ones do not exceed).
template <class B>
GEOSSL_INLINE B bound_loop(const B* values, int64_t n, int64_t k, B largest_finite) {
  const auto count = [&](B bound) {
    B total = 0;
    for (int64_t i = 0; i < n; ++i) total += static_cast<B>(values[i] <= bound);
    return static_cast<int64_t>(total);
  };
  B low = values[0], high = values[0];
  for (int64_t i = 0; i < n; ++i) {
    low = values[i] < low ? values[i] : low;
    high = values[i] > high ? values[i] : high;
  }
  high = high < largest_finite ? high : largest_finite;
  if (low > high || count(low) >= k) return low < high ? low : high;
  if (count(high) <= k) return high;
  const int64_t enough = k + k / 4 + 2;
  while (high - low > 1) {  // count(low) < k <= count(high)
    const B middle = low + (high - low) / 2;
    const int64_t reached = count(middle);
    (reached < k ? low : high) = middle;
    if (reached >= k && reached <= enough) break;
  }
  return high;
}
GEOSSL_SIMD int32_t upper_bound_of_kth(const int32_t* values, int64_t n, int64_t k) {
  return bound_loop(values, n, k, to_bits(std::numeric_limits<float>::max()));
}
int64_t upper_bound_of_kth(const int64_t* values, int64_t n, int64_t k) {
  return bound_loop(values, n, k, to_bits(std::numeric_limits<double>::max()));
}

GEOSSL_SIMD int64_t count_finite(const int32_t* values, int64_t n) {
  int32_t total = 0;
  for (int64_t i = 0; i < n; ++i) total += values[i] < 0x7f800000;
  return total;
}
int64_t count_finite(const int64_t* values, int64_t n) {
  int64_t total = 0;
  for (int64_t i = 0; i < n; ++i) total += values[i] < 0x7ff0000000000000;
  return total;
}

template <class T>
struct BruteMemory {
  Scratch<T> x, y, z;
  Scratch<Bits<T>> distance, minima;
  Scratch<Key<T>> keys, sorted;
  Scratch<int32_t> chosen;
};

template <class T>
class BruteForce {
 public:
  BruteForce(const T* points, int64_t n, int64_t k, BruteMemory<T>& memory) : n_(n), memory_(memory) {
    // Whole vectors, enough groups for a close bound, and not so many that their minima cost more than the distances.
    groups_ = 16;
    while (groups_ < 8 * k + 64 && groups_ < n / 4) groups_ *= 2;
    padded_ = (n + groups_ - 1) / groups_ * groups_;
    soa_ = {memory.x.get(padded_), memory.y.get(padded_), memory.z.get(padded_)};
    split_axes(points, n, soa_);
    for (T* axis : {soa_.x, soa_.y, soa_.z}) std::fill(axis + n, axis + padded_, std::numeric_limits<T>::infinity());
    distance_ = memory.distance.get(padded_);
    minima_ = memory.minima.get(groups_);
    keys_ = memory.keys.get(padded_);
    sorted_ = memory.sorted.get(k + 1);
    chosen_ = memory.chosen.get(padded_ + 16);
  }

  void nearest(const Search<T>& s, int64_t row, int64_t self, int64_t base) {
    const T* q = s.query + 3 * row;
    all_distances(soa_, padded_, groups_, q[0], q[1], q[2], s.limit(row), distance_, minima_);
    if (self >= 0 && self < n_) leave_out(self);
    const bool all = s.k > groups_ || padded_ <= 16;
    const Bits<T> bound = all ? to_bits(std::numeric_limits<T>::max()) : upper_bound_of_kth(minima_, groups_, s.k);
    const int64_t count = indices_up_to(distance_, padded_, bound, chosen_);
    for (int64_t i = 0; i < count; ++i) keys_[i] = make_key(distance_[chosen_[i]], chosen_[i]);
    write_row(s, row, sorted_, select_smallest(keys_, count, s.k, sorted_), base);
    if (s.count) s.count[row] = count_finite(distance_, padded_);
  }

  void first(const Search<T>& s, int64_t row, int64_t base) {
    const T* q = s.query + 3 * row;
    all_distances(soa_, padded_, groups_, q[0], q[1], q[2], s.limit(row), distance_, minima_);
    const int64_t total = count_finite(distance_, padded_), wanted = std::min(total, s.k);
    int64_t found = 0;
    for (int64_t i = 0; found < wanted; ++i) {
      sorted_[found] = make_key(distance_[i], static_cast<int32_t>(i));
      found += distance_[i] < to_bits(std::numeric_limits<T>::infinity());
    }
    write_row(s, row, sorted_, found, base);
    s.count[row] = total;
  }

 private:
  void leave_out(int64_t self) {
    const Bits<T> infinity = to_bits(std::numeric_limits<T>::infinity());
    distance_[self] = infinity;
    Bits<T> smallest = infinity;
    for (int64_t i = self % groups_; i < padded_; i += groups_) smallest = std::min(smallest, distance_[i]);
    minima_[self % groups_] = smallest;
  }

  int64_t n_, padded_, groups_;
  BruteMemory<T>& memory_;
  Soa<T> soa_;
  Bits<T>*distance_, *minima_;
  Key<T>*keys_, *sorted_;
  int32_t* chosen_;
};

// A tree ------------------------------------------------------------------------------------------------------------------------------

// Whether building and descending a tree takes less time than comparing all pairs: nanoseconds, measured on one core with AVX-512.
bool tree_pays(int64_t queries, int64_t n, int64_t k) {
  const auto q = static_cast<double>(queries), points = static_cast<double>(n), kept = static_cast<double>(k);
  return q * (250 + 8 * kept + 0.2 * points) > 30 * points + q * (280 + 22 * kept);
}

// What one query tells the next one, which is likely to be close to it.
template <class T>
struct Previous {
  T at[3];
  T reach = std::numeric_limits<T>::infinity();  // distance of its k-th neighbour
  int64_t count = 0;                             // points in its ball

  // By the triangle inequality the k-th neighbour of q is not further than this; rounding may make it too small.
  T bound(const T* q) const {
    const T sum = reach + std::sqrt(squared(q[0] - at[0], q[1] - at[1], q[2] - at[2]));
    return sum * sum * T(1.0001);
  }
};

template <class T>
void tree_row(const Search<T>& s, const Tree<T>& tree, int64_t cloud_row, int64_t row, int64_t self, int64_t base, Key<T>* best,
              Previous<T>& previous) {
  const T* q = s.query + 3 * row;
  TreeQuery<T> query{{q[0], q[1], q[2]}, s.limit(row)};
  query.self = self;
  query.by_row = s.first;
  // Where balls hold many more points than are kept, counting them apart lets the search stop at the k-th.
  const bool apart = s.count && previous.count > 4 * s.k;
  query.count = apart ? nullptr : s.count ? s.count + row : nullptr;
  const T limit = query.limit;
  if (apart) s.count[row] = tree.count(q, limit);
  if (!query.count) query.limit = std::min(limit, std::max(previous.bound(q), std::numeric_limits<T>::min()));
  int64_t found = tree.search(query, s.k, best);
  if (found < s.k && query.limit < limit) {  // fewer are in reach; with k of them, no other can be nearer
    query.limit = limit;
    found = tree.search(query, s.k, best);
  }
  previous = {{q[0], q[1], q[2]}, std::numeric_limits<T>::infinity(), s.count ? s.count[row] : 0};
  if (found == s.k && !s.first) previous.reach = std::sqrt(from_bits<T>(bits_of_key(best[found - 1])));
  if (s.first)
    for (int64_t j = 0; j < found; ++j) {
      const int32_t i = index_of_key(best[j]);
      const T* p = s.points + 3 * (cloud_row + i);
      best[j] = make_key(to_bits(squared(p[0] - q[0], p[1] - q[1], p[2] - q[2])), i);
    }
  write_row(s, row, best, found, base);
}

// Queries that lie close together visit the same boxes and bound each other, so they are taken in spatial order.
template <class T>
void tree_rows(const Search<T>& s, const Tree<T>& tree, int64_t b, int64_t begin, int64_t end) {
  const int64_t cloud_row = s.clouds.begin(b), base = s.clouds.index_base(b), first = s.queries.begin(b);
  Scratch<Key<T>> keys;
  Key<T>* best = keys.get(s.k);
  Previous<T> previous{};
  in_spatial_order(s.query + 3 * begin, end - begin, [&](int64_t i) {
    const int64_t row = begin + i;
    tree_row(s, tree, cloud_row, row, s.exclude_self ? row - first : -1, base, best, previous);
  });
}

// --------------------------------------------------------------------------------------------------------------------------------------

template <class T>
void search_rows(const Search<T>& s, const Trees<T>& trees, int64_t begin, int64_t end) {
  BruteMemory<T> memory;
  for (int64_t row = begin; row < end;) {
    const int64_t b = s.queries.cloud_of(row), first = s.queries.begin(b), last = first + s.queries.size(b);
    const int64_t stop = std::max(row, std::min(end, last));
    const int64_t n = s.clouds.size(b), base = s.clouds.index_base(b);
    if (row < stop && n > 0) {
      if (const auto& tree = trees[static_cast<size_t>(b)]) {
        tree_rows(s, *tree, b, row, stop);
        row = stop;
      } else {
        BruteForce<T> search(s.points + 3 * s.clouds.begin(b), n, s.k, memory);
        for (; row < stop; ++row) {
          if (s.first) search.first(s, row, base);
          else search.nearest(s, row, s.exclude_self ? row - first : -1, base);
        }
      }
    }
    // Queries of an empty cloud, and padding.
    for (const int64_t next = s.queries.offsets ? last : first + s.queries.stride; row < std::min(end, next); ++row) {
      write_row<T>(s, row, nullptr, 0, base);
      if (s.count) s.count[row] = 0;
    }
  }
}

template <class T>
int run(const Search<T>& s, int threads) {
  const int64_t batch = s.clouds.batch, rows = s.queries.rows();
  int64_t work = 1;
  for (int64_t b = 0; b < batch; ++b) work += s.queries.size(b) * std::min<int64_t>(s.clouds.size(b), 8192);
  const Trees<T> trees = build_trees(s.points, s.clouds, threads, [&](int64_t b) { return tree_pays(s.queries.size(b), s.clouds.size(b), s.k); });
  // A thread is worth starting for about two million distances.
  parallel_for(threads, rows, std::max<int64_t>(64, (int64_t{1} << 21) * rows / work),
               [&](int64_t begin, int64_t end) { search_rows(s, trees, begin, end); });
  return GEOSSL_OK;
}

}  // namespace
}  // namespace geossl

// See geossl/ops/neighbors.py for the arguments.
GEOSSL_API int geossl_knn_cpu(int threads, int is_double, const void* query, const int64_t* query_offsets, const int64_t* query_lengths,
                              int64_t queries, const void* points, const int64_t* offsets, const int64_t* lengths, int64_t n, int64_t batch,
                              int64_t k, double radius, int exclude_self, void* distance, int64_t* index) {
  using namespace geossl;
  if (batch < 0 || n < 0 || queries < 0 || k < 1) return GEOSSL_INVALID_ARGUMENT;
  const Clouds query_clouds{query_offsets, query_lengths, batch, queries}, clouds{offsets, lengths, batch, n};
  if (!clouds_fit(clouds)) return GEOSSL_TOO_LARGE;
  return for_type(is_double, [&](auto zero) {
    using T = decltype(zero);
    return run(Search<T>{static_cast<const T*>(query), static_cast<const T*>(points), query_clouds, clouds, k, static_cast<T>(radius), nullptr,
                         exclude_self != 0, false, false, static_cast<T*>(distance), index, nullptr},
               threads);
  });
}
GEOSSL_PACKED(geossl_knn_cpu)

GEOSSL_API int geossl_ball_query_cpu(int threads, int is_double, const void* query, const int64_t* query_offsets, const int64_t* query_lengths,
                                     int64_t queries, const void* points, const int64_t* offsets, const int64_t* lengths, int64_t n,
                                     int64_t batch, int64_t k, double radius, const void* radii, int first, int repeat, void* distance,
                                     int64_t* index, int64_t* count) {
  using namespace geossl;
  if (batch < 0 || n < 0 || queries < 0 || k < 1) return GEOSSL_INVALID_ARGUMENT;
  const Clouds query_clouds{query_offsets, query_lengths, batch, queries}, clouds{offsets, lengths, batch, n};
  if (!clouds_fit(clouds)) return GEOSSL_TOO_LARGE;
  return for_type(is_double, [&](auto zero) {
    using T = decltype(zero);
    return run(Search<T>{static_cast<const T*>(query), static_cast<const T*>(points), query_clouds, clouds, k, static_cast<T>(radius),
                         static_cast<const T*>(radii), false, first != 0, repeat != 0, static_cast<T*>(distance), index, count},
               threads);
  });
}
GEOSSL_PACKED(geossl_ball_query_cpu)
