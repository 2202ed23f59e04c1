#include "tree.h"

#include <algorithm>
#include <cmath>

namespace geossl {
// Boxes ------------------------------------------------------------------------------------------------------------------------------

template <class T>
Boxes<T>::Boxes(int64_t boxes) : count(boxes) {
  const auto padded = static_cast<size_t>((boxes + kFanout - 1) / kFanout * kFanout);
  for (auto& values : low) values.assign(padded, std::numeric_limits<T>::infinity());
  for (auto& values : high) values.assign(padded, -std::numeric_limits<T>::infinity());
  first_row.assign(padded, std::numeric_limits<int32_t>::max());
  size.assign(padded, 0);
}

template <class T>
void Boxes<T>::include(int64_t box, const T* other_low, const T* other_high, int32_t row, int32_t points) {
  const auto i = static_cast<size_t>(box);
  GEOSSL_UNROLL(3)
  for (int a = 0; a < 3; ++a) {
    low[a][i] = std::min(low[a][i], other_low[a]);
    high[a][i] = std::max(high[a][i], other_high[a]);
  }
  first_row[i] = std::min(first_row[i], row);
  size[i] += points;
}

template <class T>
Tree<T>::Tree(const T* rows, int64_t n, int threads) {
  Scratch<T> x, y, z;
  Scratch<int32_t> valid, order;
  const Soa<T> loaded{x.get(n), y.get(n), z.get(n)};
  int32_t *loaded_row = valid.get(n), *sorted = order.get(n);
  const int64_t count = load_valid(rows, n, loaded, loaded_row);
  Helpers helpers(threads);
  const std::vector<int32_t> ends = spatial_order(loaded, count, kLeafSize, sorted, helpers);

  const auto leaves = static_cast<int64_t>(ends.size()), slots = leaves * kLeafSize;
  points = {x_.get(slots), y_.get(slots), z_.get(slots)};
  row = row_.get(slots);
  if (count == 0) return;
  levels.emplace_back(leaves);
  const int64_t pieces = pieces_of(threads, leaves, 1024);
  helpers.share(pieces, [&](int64_t piece) {
    const int64_t leaf0 = piece * leaves / pieces, leaf1 = (piece + 1) * leaves / pieces;
    for (int64_t leaf = leaf0, from = leaf ? ends[static_cast<size_t>(leaf) - 1] : 0; leaf < leaf1; ++leaf) {
      int64_t slot = leaf * kLeafSize;
      for (; from < ends[static_cast<size_t>(leaf)]; ++from, ++slot) {
        const int32_t i = sorted[from];
        const T corner[3] = {loaded.x[i], loaded.y[i], loaded.z[i]};
        points.x[slot] = corner[0], points.y[slot] = corner[1], points.z[slot] = corner[2], row[slot] = loaded_row[i];
        levels[0].include(leaf, corner, corner, loaded_row[i], 1);
      }
      for (; slot < (leaf + 1) * kLeafSize; ++slot)
        points.x[slot] = points.y[slot] = points.z[slot] = std::numeric_limits<T>::quiet_NaN(), row[slot] = -1;
    }
  });
  while (levels.back().count > kFanout) {
    const Boxes<T>& below = levels.back();
    Boxes<T> above((below.count + kFanout - 1) / kFanout);
    for (int64_t i = 0; i < below.count; ++i) {
      const auto b = static_cast<size_t>(i);
      const T low[3] = {below.low[0][b], below.low[1][b], below.low[2][b]}, high[3] = {below.high[0][b], below.high[1][b], below.high[2][b]};
      above.include(i / kFanout, low, high, below.first_row[b], below.size[b]);
    }
    levels.push_back(std::move(above));
  }
}

// Search -----------------------------------------------------------------------------------------------------------------------------

namespace {

// Keys side by side, as gcc and clang vectors as wide as the machine's: gcc compares the numbers of a wider vector one by one. They are
// never passed by value: without AVX-512 that has no calling convention.
template <int kWidth>
struct KeyVector {
  typedef int64_t Keys __attribute__((vector_size(8 * kWidth)));
};
#if defined(__clang__)
#define GEOSSL_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define GEOSSL_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Keys{__VA_ARGS__})
#endif

// Inserts a key into a sorted array of whole vectors, whose last key falls out: every slot becomes the middle one of its left neighbour, the
// new key and itself. No branch depends on the data.
template <int kWidth>
GEOSSL_INLINE void insert_sorted(int64_t* keys, int64_t padded, int64_t key) {
  using Keys = typename KeyVector<kWidth>::Keys;
  const Keys added = Keys{} + key;
  Keys left = Keys{} + std::numeric_limits<int64_t>::min();
  for (int64_t i = 0; i < padded; i += kWidth) {
    Keys here, shifted;
    __builtin_memcpy(&here, keys + i, sizeof here);
    if constexpr (kWidth == 8) shifted = GEOSSL_SHUFFLE(left, here, 7, 8, 9, 10, 11, 12, 13, 14);
    else if constexpr (kWidth == 4) shifted = GEOSSL_SHUFFLE(left, here, 3, 4, 5, 6);
    else shifted = GEOSSL_SHUFFLE(left, here, 1, 2);
    const Keys lower = here < added ? here : added;
    const Keys merged = shifted < lower ? lower : shifted;
    __builtin_memcpy(keys + i, &merged, sizeof merged);
    left = here;
  }
}
template <int kWidth>
GEOSSL_INLINE void insert_sorted(DoubleKey* keys, int64_t padded, const DoubleKey& key) {
  int64_t i = padded - 1;
  for (; i > 0 && key < keys[i - 1]; --i) keys[i] = keys[i - 1];
  if (key < keys[i]) keys[i] = key;
}

GEOSSL_INLINE void set_largest(int64_t& key) { key = std::numeric_limits<int64_t>::max(); }
GEOSSL_INLINE void set_largest(DoubleKey& key) { key = {std::numeric_limits<int64_t>::max(), std::numeric_limits<int32_t>::max()}; }

// The k smallest keys seen. Up to kInserted they are kept sorted all the time; more are sorted out every k arrivals.
template <class K, int kWidth>
class Best {
 public:
  static constexpr int64_t kInserted = 64;

  Best(K* keys, int64_t k) : keys_(keys), k_(k), padded_((k + 7) / 8 * 8) {
    set_largest(worst_);
    if (k <= kInserted) std::fill(sorted_, sorted_ + padded_, worst_);
  }

  // Keys that are not below it are not wanted any more; the largest number as long as fewer than k have come.
  const K& worst() const { return worst_; }

  GEOSSL_INLINE void push(const K& key) {
    if (!(key < worst_)) return;
    if (k_ > kInserted) return push_many(key);
    insert_sorted<kWidth>(sorted_, padded_, key);
    worst_ = sorted_[k_ - 1];
    ++count_;
  }

  int64_t finish() {
    if (k_ <= kInserted) {
      count_ = std::min(count_, k_);
      std::copy(sorted_, sorted_ + count_, keys_);
    } else {
      count_ = std::min<int64_t>(k_, static_cast<int64_t>(many_.size()));
      std::partial_sort_copy(many_.begin(), many_.end(), keys_, keys_ + count_);
    }
    return count_;
  }

 private:
  void push_many(const K& key) {
    many_.push_back(key);
    if (static_cast<int64_t>(many_.size()) < 2 * k_) return;
    std::nth_element(many_.begin(), many_.begin() + (k_ - 1), many_.end());
    many_.resize(static_cast<size_t>(k_));
    worst_ = many_.back();
  }

  K* keys_;
  int64_t k_, padded_, count_ = 0;
  K worst_;
  alignas(64) K sorted_[kInserted];
  std::vector<K> many_;
};

// Distances from a query to the nearest and to the farthest corner of 16 boxes. Rounding is monotonic, so the first is never more than the
// distance to a point inside, computed the same way, and the second never less.
template <class T>
GEOSSL_INLINE void box_distances(const Boxes<T>& boxes, int64_t begin, const TreeQuery<T>& query, T* GEOSSL_RESTRICT nearest) {
  const T* q = query.at;
  const bool manhattan = query.manhattan;
  for (int i = 0; i < kFanout; ++i) {
    T gap[3];
    GEOSSL_UNROLL(3)
    for (int a = 0; a < 3; ++a) {
      const T below = boxes.low[a][begin + i] - q[a], above = q[a] - boxes.high[a][begin + i];
      const T outside = below > above ? below : above;
      gap[a] = outside > T(0) ? outside : T(0);
    }
    nearest[i] = manhattan ? (gap[0] + gap[1]) + gap[2] : squared(gap[0], gap[1], gap[2]);
  }
}

template <class T>
T farthest_corner(const Boxes<T>& boxes, int64_t box, const TreeQuery<T>& query) {
  T gap[3];
  GEOSSL_UNROLL(3)
  for (int a = 0; a < 3; ++a) {
    const auto i = static_cast<size_t>(box);
    gap[a] = std::max(std::fabs(boxes.low[a][i] - query.at[a]), std::fabs(query.at[a] - boxes.high[a][i]));
  }
  return query.manhattan ? (gap[0] + gap[1]) + gap[2] : squared(gap[0], gap[1], gap[2]);
}

// Sixteen boxes on the way down, and in which order to look into them: numbers that grow with the distance (or the row), all different
// because the box is in the lowest bits; `last` is the one looked into last.
template <class T>
struct Frame {
  alignas(64) int64_t order[kFanout];
  T nearest[kFanout];
  int64_t begin, last;
  const Boxes<T>* boxes;
};
constexpr int64_t kNever = std::numeric_limits<int64_t>::max();
constexpr int kDeepest = 12;  // 16^12 leaves

// The smallest number over `last`, kNever if there is none.
template <int kWidth>
GEOSSL_INLINE int64_t next_in_order(const int64_t* order, int64_t last) {
  using Keys = typename KeyVector<kWidth>::Keys;
  const Keys never = Keys{} + kNever;
  Keys a = never, b;
  GEOSSL_UNROLL(8)
  for (int i = 0; i < kFanout; i += kWidth) {
    __builtin_memcpy(&b, order + i, sizeof b);
    b = b > last ? b : never;
    a = a < b ? a : b;
  }
  if constexpr (kWidth == 8) {
    b = GEOSSL_SHUFFLE(a, a, 4, 5, 6, 7, 0, 1, 2, 3);
    a = a < b ? a : b;
    b = GEOSSL_SHUFFLE(a, a, 2, 3, 0, 1, 6, 7, 4, 5);
    a = a < b ? a : b;
  } else if constexpr (kWidth == 4) {
    b = GEOSSL_SHUFFLE(a, a, 2, 3, 0, 1);
    a = a < b ? a : b;
  }
  return std::min(a[0], a[1]);
}

GEOSSL_INLINE int64_t order_of(float distance, int lane) { return int64_t{to_bits(distance)} << 4 | lane; }
GEOSSL_INLINE int64_t order_of(double distance, int lane) { return (to_bits(distance) & ~int64_t{15}) | lane; }

// What the distances of a box with this order, and of all later ones, have at least.
GEOSSL_INLINE int32_t least_distance(int64_t order, float) { return static_cast<int32_t>(order >> 4); }
GEOSSL_INLINE int64_t least_distance(int64_t order, double) { return order & ~int64_t{15}; }

template <class T>
GEOSSL_INLINE void enter(Frame<T>& frame, const Boxes<T>& boxes, int64_t begin, const TreeQuery<T>& query) {
  frame.begin = begin, frame.last = -1, frame.boxes = &boxes;
  box_distances(boxes, begin, query, frame.nearest);
  for (int i = 0; i < kFanout; ++i) {
    const int64_t order = query.by_row ? int64_t{boxes.first_row[static_cast<size_t>(begin) + i]} << 4 | i : order_of(frame.nearest[i], i);
    frame.order[i] = frame.nearest[i] < query.limit ? order : kNever;
  }
}

template <class T, int kWidth>
GEOSSL_INLINE int64_t search_loop(const Tree<T>& tree, const TreeQuery<T>& query, int64_t k, Key<T>* keys) {
  const Bits<T> infinity = to_bits(std::numeric_limits<T>::infinity());
  const T *q = query.at, limit = query.limit;
  const bool manhattan = query.manhattan;
  const bool valid = (q[0] - q[0]) + (q[1] - q[1]) + (q[2] - q[2]) == T(0);
  Best<Key<T>, kWidth> best(keys, k);
  int64_t inside = 0;
  Frame<T> frames[kDeepest];
  int depth = 0;
  const int levels = valid ? static_cast<int>(tree.levels.size()) : 0;
  if (levels > 0) enter(frames[depth++], tree.levels[static_cast<size_t>(levels - 1)], 0, query);
  while (depth > 0) {
    Frame<T>& frame = frames[depth - 1];
    const int64_t next = next_in_order<kWidth>(frame.order, frame.last);
    if (next == kNever) {
      --depth;
      continue;
    }
    const auto lane = static_cast<size_t>(next & (kFanout - 1));
    const size_t box = static_cast<size_t>(frame.begin) + lane;
    frame.last = next;
    const int32_t first_row = frame.boxes->first_row[box];
    const Key<T> key = query.by_row ? make_key(Bits<T>(first_row), first_row) : make_key(to_bits(frame.nearest[lane]), first_row);
    if (!(key < best.worst())) {  // none of its points is wanted
      if (!query.count) {
        // In order of distance no later box is nearer; of two at the same distance, either may hold the lower row.
        if (!query.by_row && bits_of_key(best.worst()) < least_distance(next, T(0))) --depth;
        continue;
      }
      if (farthest_corner(*frame.boxes, static_cast<int64_t>(box), query) < limit) {  // but all of them count
        inside += frame.boxes->size[box];
        continue;
      }
    }
    const int level = levels - depth;
    if (level > 0) {
      enter(frames[depth], tree.levels[static_cast<size_t>(level - 1)], static_cast<int64_t>(box) * kFanout, query);
      ++depth;
      continue;
    }
    const int64_t begin = static_cast<int64_t>(box) * kLeafSize;
    __builtin_prefetch(tree.row + begin);
    __builtin_prefetch(tree.row + begin + kLeafSize / 2);
    Bits<T> distance[kLeafSize];
    int32_t hits = 0;
    for (int i = 0; i < kLeafSize; ++i) {
      const T dx = tree.points.x[begin + i] - q[0], dy = tree.points.y[begin + i] - q[1], dz = tree.points.z[begin + i] - q[2];
      const T d = manhattan ? (std::fabs(dx) + std::fabs(dy)) + std::fabs(dz) : squared(dx, dy, dz);
      distance[i] = d < limit ? to_bits(d) : infinity;
      hits += d < limit;
    }
    inside += hits;
    const Bits<T> bound = query.by_row ? infinity - 1 : std::min(bits_of_key(best.worst()), infinity - 1);
    int32_t found[kLeafSize + 16];
    const int64_t candidates = indices_up_to(distance, kLeafSize, bound, found);
    for (int64_t c = 0; c < candidates; ++c) {
      const int32_t row = tree.row[begin + found[c]];
      if (row == query.self) continue;
      best.push(query.by_row ? make_key(Bits<T>(row), row) : make_key(distance[found[c]], row));
    }
  }
  if (query.count) *query.count = inside;
  return best.finish();
}

GEOSSL_VECTORS(int64_t search_tree(const Tree<float>& tree, const TreeQuery<float>& query, int64_t k, int64_t* best),
               { return search_loop<float, kBytes / 8>(tree, query, k, best); })
int64_t search_tree(const Tree<double>& tree, const TreeQuery<double>& query, int64_t k, DoubleKey* best) {
  return search_loop<double, 2>(tree, query, k, best);
}

// All points in a ball -------------------------------------------------------------------------------------------------------------

// Distances from a query to the nearest and to the farthest corner of 16 boxes; rounding is monotonic, so they bound those of all points.
template <class T>
GEOSSL_INLINE void corner_distances(const Boxes<T>& boxes, int64_t begin, const T* q, T* GEOSSL_RESTRICT nearest, T* GEOSSL_RESTRICT farthest) {
  const T* GEOSSL_RESTRICT low[3] = {boxes.low[0].data() + begin, boxes.low[1].data() + begin, boxes.low[2].data() + begin};
  const T* GEOSSL_RESTRICT high[3] = {boxes.high[0].data() + begin, boxes.high[1].data() + begin, boxes.high[2].data() + begin};
  for (int i = 0; i < kFanout; ++i) {
    T gap[3], far[3];
    GEOSSL_UNROLL(3)
    for (int a = 0; a < 3; ++a) {
      const T below = low[a][i] - q[a], above = q[a] - high[a][i];
      const T outside = below > above ? below : above;
      gap[a] = outside > T(0) ? outside : T(0);
      far[a] = below < above ? below : above;  // minus the distance to the farther side
    }
    nearest[i] = squared(gap[0], gap[1], gap[2]);
    farthest[i] = squared(far[0], far[1], far[2]);
  }
}

struct Visit {
  int32_t level;
  int64_t begin;
};

// Counts (keys is null) or collects the points under the limit; the order of keys does not matter. Counts include `self`, keys do not.
template <class T>
GEOSSL_INLINE int64_t ball_loop(const Tree<T>& tree, const T* q, T limit, int64_t self, Key<T>* keys) {
  const bool valid = (q[0] - q[0]) + (q[1] - q[1]) + (q[2] - q[2]) == T(0);
  if (!valid || tree.levels.empty()) return 0;
  Visit stack[kDeepest * kFanout];
  int waiting = 0;
  int64_t found = 0;
  stack[waiting++] = {static_cast<int32_t>(tree.levels.size()) - 1, 0};
  while (waiting > 0) {
    const Visit visit = stack[--waiting];
    const Boxes<T>& boxes = tree.levels[static_cast<size_t>(visit.level)];
    T nearest[kFanout], farthest[kFanout];
    corner_distances(boxes, visit.begin, q, nearest, farthest);
    for (int i = 0; i < kFanout; ++i) {
      if (!(nearest[i] < limit)) continue;
      const int64_t box = visit.begin + i;
      if (!keys && farthest[i] < limit) {
        found += boxes.size[static_cast<size_t>(box)];
        continue;
      }
      if (visit.level > 0) {
        stack[waiting++] = {visit.level - 1, box * kFanout};
        continue;
      }
      const int64_t begin = box * kLeafSize;
      const Soa<T> leaf{tree.points.x + begin, tree.points.y + begin, tree.points.z + begin};
      if (!keys) {
        found += count_within(leaf, kLeafSize, q, limit);
        continue;
      }
      Bits<T> distance[kLeafSize];
      int32_t slots[kLeafSize + 16];
      distances_within(leaf, kLeafSize, q, limit, distance);
      const int64_t hits = indices_up_to(distance, kLeafSize, to_bits(std::numeric_limits<T>::max()), slots);
      for (int64_t h = 0; h < hits; ++h) {
        const int32_t row = tree.row[begin + slots[h]];
        if (row != self) keys[found++] = make_key(distance[slots[h]], row);
      }
    }
  }
  return found;
}
GEOSSL_SIMD int64_t search_ball(const Tree<float>& tree, const float* q, float limit, int64_t self, int64_t* keys) {
  return ball_loop(tree, q, limit, self, keys);
}
int64_t search_ball(const Tree<double>& tree, const double* q, double limit, int64_t self, DoubleKey* keys) {
  return ball_loop(tree, q, limit, self, keys);
}

}  // namespace

template <class T>
int64_t Tree<T>::search(const TreeQuery<T>& query, int64_t k, Key<T>* best) const {
  return search_tree(*this, query, k, best);
}

template <class T>
int64_t Tree<T>::count(const T* at, T limit) const {
  return search_ball(*this, at, limit, -1, static_cast<Key<T>*>(nullptr));
}

template <class T>
int64_t Tree<T>::collect(const T* at, T limit, int64_t self, Key<T>* keys) const {
  return search_ball(*this, at, limit, self, keys);
}

template struct Boxes<float>;
template struct Boxes<double>;
template class Tree<float>;
template class Tree<double>;

}  // namespace geossl
