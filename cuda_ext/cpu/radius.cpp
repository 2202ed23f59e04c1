// All points in a ball on the CPU, in two calls: the first counts, the second writes what the caller has made room for.
#include <algorithm>

#include "points.h"
#include "select.h"
#include "tree.h"

namespace geossl {
namespace {

// What is asked of one batch of queries; see geossl/ops/radius.py.
template <class T>
struct Search {
  const T *query, *points;
  Clouds queries, clouds;
  T radius;
  const T* radii;  // per query row, may be null
  bool exclude_self;
  int64_t* count;         // per query row; null in the second call
  const int64_t* splits;  // first entry of each row, the rest for the second call
  T* distance;
  int64_t* index;

  // A NaN or infinite distance is never below it, so invalid points and queries need no test of their own.
  T limit(int64_t row) const { return radii ? radii[row] * radii[row] : radius * radius; }
};

// All points -------------------------------------------------------------------------------------------------------------------------

GEOSSL_SIMD int64_t count_inside(const Soa<float>& p, int64_t n, const float* q, float limit) { return count_within(p, n, q, limit); }
int64_t count_inside(const Soa<double>& p, int64_t n, const double* q, double limit) { return count_within(p, n, q, limit); }

GEOSSL_SIMD void distances_inside(const Soa<float>& p, int64_t n, const float* q, float limit, int32_t* distance) {
  distances_within(p, n, q, limit, distance);
}
void distances_inside(const Soa<double>& p, int64_t n, const double* q, double limit, int64_t* distance) {
  distances_within(p, n, q, limit, distance);
}

// A cloud as three arrays of whole vectors; the rest is infinity.
template <class T>
class BruteForce {
 public:
  void load(const T* rows, int64_t n) {
    padded_ = (n + 15) / 16 * 16;
    soa_ = {x_.get(padded_), y_.get(padded_), z_.get(padded_)};
    split_axes(rows, n, soa_);
    for (T* axis : {soa_.x, soa_.y, soa_.z}) std::fill(axis + n, axis + padded_, std::numeric_limits<T>::infinity());
  }
  int64_t count(const T* q, T limit) const { return count_inside(soa_, padded_, q, limit); }
  int64_t collect(const T* q, T limit, int64_t self, Key<T>* keys) {
    Bits<T>* distance = distance_.get(padded_);
    int32_t* found = found_.get(padded_ + 16);
    distances_inside(soa_, padded_, q, limit, distance);
    const int64_t hits = indices_up_to(distance, padded_, to_bits(std::numeric_limits<T>::max()), found);
    int64_t kept = 0;
    for (int64_t i = 0; i < hits; ++i)
      if (found[i] != self) keys[kept++] = make_key(distance[found[i]], found[i]);
    return kept;
  }

 private:
  Scratch<T> x_, y_, z_;
  Scratch<Bits<T>> distance_;
  Scratch<int32_t> found_;
  Soa<T> soa_{};
  int64_t padded_ = 0;
};

// A tree ------------------------------------------------------------------------------------------------------------------------------

// Whether building and descending a tree takes less time than comparing all pairs: nanoseconds, measured on one core with AVX-512.
bool tree_pays(int64_t queries, int64_t n) {
  const auto q = static_cast<double>(queries), points = static_cast<double>(n);
  return q * 0.15 * points > 30 * points + q * 300;
}

// --------------------------------------------------------------------------------------------------------------------------------------

template <class T>
struct Memory {
  BruteForce<T> brute;
  Scratch<Key<T>> keys, sorted;
};

// One query: counts or writes. `tree` may be null.
template <class T>
void one_row(const Search<T>& s, const Tree<T>* tree, int64_t b, int64_t row, Memory<T>& memory) {
  const T *q = s.query + 3 * row, limit = s.limit(row);
  const int64_t local = row - s.queries.begin(b), n = s.clouds.size(b);
  const int64_t self = s.exclude_self && local < n ? local : -1;
  if (s.count) {
    int64_t found = tree ? tree->count(q, limit) : memory.brute.count(q, limit);
    if (self >= 0) {
      const T* p = s.points + 3 * (s.clouds.begin(b) + self);
      found -= squared(p[0] - q[0], p[1] - q[1], p[2] - q[2]) < limit;
    }
    s.count[row] = found;
    return;
  }
  const int64_t begin = s.splits[row], wanted = s.splits[row + 1] - begin;
  if (wanted == 0) return;
  Key<T>* keys = memory.keys.get(wanted);
  const int64_t found = tree ? tree->collect(q, limit, self, keys) : memory.brute.collect(q, limit, self, keys);
  if constexpr (std::is_same_v<Key<T>, int64_t>) {
    if (found <= kRankSort) {
      Key<T>* sorted = memory.sorted.get(kRankSort);
      rank_sort(keys, found, found, sorted);
      keys = sorted;
    } else {
      std::sort(keys, keys + found);
    }
  } else {
    std::sort(keys, keys + found);
  }
  const int64_t base = s.clouds.index_base(b);
  for (int64_t j = 0; j < found; ++j) {
    s.distance[begin + j] = from_bits<T>(bits_of_key(keys[j]));
    s.index[begin + j] = base + index_of_key(keys[j]);
  }
}

template <class T>
void search_rows(const Search<T>& s, const Trees<T>& trees, int64_t begin, int64_t end) {
  Memory<T> memory;
  for (int64_t row = begin; row < end;) {
    const int64_t b = s.queries.cloud_of(row), first = s.queries.begin(b), last = first + s.queries.size(b);
    const int64_t stop = std::max(row, std::min(end, last));
    const int64_t n = s.clouds.size(b);
    if (row < stop && n > 0) {
      if (const auto& tree = trees[static_cast<size_t>(b)]) {
        in_spatial_order(s.query + 3 * row, stop - row, [&](int64_t i) { one_row(s, &*tree, b, row + i, memory); });
      } else {
        memory.brute.load(s.points + 3 * s.clouds.begin(b), n);
        for (int64_t i = row; i < stop; ++i) one_row<T>(s, nullptr, b, i, memory);
      }
      row = stop;
    }
    // Queries of an empty cloud, and padding.
    const int64_t next = std::min(end, s.queries.offsets ? last : first + s.queries.stride);
    if (s.count) std::fill(s.count + row, s.count + std::max(row, next), int64_t{0});
    row = std::max(row, next);
  }
}

template <class T>
int run(const Search<T>& s, int threads) {
  const int64_t batch = s.clouds.batch, rows = s.queries.rows();
  int64_t work = 1;
  for (int64_t b = 0; b < batch; ++b) work += s.queries.size(b) * std::min<int64_t>(s.clouds.size(b), 8192);
  const Trees<T> trees = build_trees(s.points, s.clouds, threads, [&](int64_t b) { return tree_pays(s.queries.size(b), s.clouds.size(b)); });
  // A thread is worth starting for about two million distances.
  parallel_for(threads, rows, std::max<int64_t>(64, (int64_t{1} << 21) * rows / work),
               [&](int64_t begin, int64_t end) { search_rows(s, trees, begin, end); });
  return GEOSSL_OK;
}

}  // namespace
}  // namespace geossl

// See geossl/ops/radius.py for the arguments of both.
GEOSSL_API int geossl_radius_count_cpu(int threads, int is_double, const void* query, const int64_t* query_offsets,
                                       const int64_t* query_lengths, int64_t queries, const void* points, const int64_t* offsets,
                                       const int64_t* lengths, int64_t n, int64_t batch, double radius, const void* radii, int exclude_self,
                                       int64_t* count) {
  using namespace geossl;
  if (batch < 0 || n < 0 || queries < 0) return GEOSSL_INVALID_ARGUMENT;
  const Clouds query_clouds{query_offsets, query_lengths, batch, queries}, clouds{offsets, lengths, batch, n};
  if (!clouds_fit(clouds)) return GEOSSL_TOO_LARGE;
  return for_type(is_double, [&](auto zero) {
    using T = decltype(zero);
    return run(Search<T>{static_cast<const T*>(query), static_cast<const T*>(points), query_clouds, clouds, static_cast<T>(radius),
                         static_cast<const T*>(radii), exclude_self != 0, count, nullptr, nullptr, nullptr},
               threads);
  });
}
GEOSSL_PACKED(geossl_radius_count_cpu)

GEOSSL_API int geossl_radius_fill_cpu(int threads, int is_double, const void* query, const int64_t* query_offsets,
                                      const int64_t* query_lengths, int64_t queries, const void* points, const int64_t* offsets,
                                      const int64_t* lengths, int64_t n, int64_t batch, double radius, const void* radii, int exclude_self,
                                      const int64_t* row_splits, int64_t* index, void* distance) {
  using namespace geossl;
  if (batch < 0 || n < 0 || queries < 0) return GEOSSL_INVALID_ARGUMENT;
  const Clouds query_clouds{query_offsets, query_lengths, batch, queries}, clouds{offsets, lengths, batch, n};
  if (!clouds_fit(clouds)) return GEOSSL_TOO_LARGE;
  return for_type(is_double, [&](auto zero) {
    using T = decltype(zero);
    return run(Search<T>{static_cast<const T*>(query), static_cast<const T*>(points), query_clouds, clouds, static_cast<T>(radius),
                         static_cast<const T*>(radii), exclude_self != 0, nullptr, row_splits, static_cast<T*>(distance), index},
               threads);
  });
}
GEOSSL_PACKED(geossl_radius_fill_cpu)
