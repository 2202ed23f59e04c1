// A hierarchy of boxes over a cloud, for searches in more points than are worth comparing one by one.
#pragma once
#include <optional>
#include <vector>

#include "points.h"
#include "select.h"

namespace geossl {

// Puts n points into an order in which neighbours in the order are neighbours in space, and cuts it into groups of up to `largest` points
// in boxes that do not overlap: along a Morton curve through 256^3 cells of the bounding box, and again inside every cell that holds too
// many, so that dense spots and far outliers do not spoil it. Equal points stay in index order. All coordinates must be finite.
// Returns where each group ends. Groups also end where the work of a thread does, so nothing that is found may depend on how points are
// grouped.
template <class T>
std::vector<int32_t> spatial_order(const Soa<T>& points, int64_t n, int64_t largest, int32_t* order, Helpers& helpers);

// Copies the valid ones of n points into arrays, with their row numbers, and returns how many.
template <class T>
int64_t load_valid(const T* rows, int64_t n, const Soa<T>& to, int32_t* id);

constexpr int kFanout = 16;    // boxes under one box: one AVX-512 vector of them
constexpr int kLeafSize = 32;  // points under one box of the lowest level

// The boxes of one level as arrays; their number is rounded up to whole vectors with boxes that nothing is near to.
template <class T>
struct Boxes {
  explicit Boxes(int64_t count);
  // Grows box i around another box that holds `size` points, the lowest row among them `row`.
  void include(int64_t i, const T* other_low, const T* other_high, int32_t row, int32_t size);

  int64_t count;
  std::vector<T> low[3], high[3];
  std::vector<int32_t> first_row, size;
};

// What a search looks for.
template <class T>
struct TreeQuery {
  T at[3];
  T limit;                    // points must be nearer than this (in the measure that is compared)
  int64_t self = -1;          // row left out
  bool by_row = false;        // the lowest rows instead of the nearest points
  bool manhattan = false;     // compare |dx| + |dy| + |dz|
  int64_t* count = nullptr;   // also count all points under the limit
};

// Invalid points are left out. Results do not depend on the order in which boxes are visited.
template <class T>
class Tree {
 public:
  Tree(const T* rows, int64_t n, int threads);

  // Stores the k smallest keys in order and returns how many there are. A key is (distance, row), or (row, row) if `by_row`.
  int64_t search(const TreeQuery<T>& query, int64_t k, Key<T>* best) const;

  // Squared Euclidean distances: how many points are under the limit, and their keys but that of row `self`, in no order.
  int64_t count(const T* at, T limit) const;
  int64_t collect(const T* at, T limit, int64_t self, Key<T>* keys) const;

  Soa<T> points;                 // in spatial order; each leaf has kLeafSize slots, of which the last ones may be NaN
  int32_t* row;                  // where each came from
  std::vector<Boxes<T>> levels;  // leaves first, one vector of boxes last; empty without points

 private:
  Scratch<T> x_, y_, z_;
  Scratch<int32_t> row_;
};

// Trees over the clouds b for which pays(b), none for the others.
template <class T>
using Trees = std::vector<std::optional<Tree<T>>>;

template <class T, class F>
Trees<T> build_trees(const T* points, const Clouds& clouds, int threads, F&& pays) {
  Trees<T> trees(static_cast<size_t>(clouds.batch));
  std::vector<int64_t> large;
  for (int64_t b = 0; b < clouds.batch; ++b)
    if (pays(b)) large.push_back(b);
  const auto count = static_cast<int64_t>(large.size());
  // Few clouds: threads share each of them. Many: they share the batch.
  const int inside = count < 2 * threads ? threads : 1;
  parallel_for(inside > 1 ? 1 : threads, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = large[static_cast<size_t>(i)];
      trees[static_cast<size_t>(b)].emplace(points + 3 * clouds.begin(b), clouds.size(b), inside);
    }
  });
  return trees;
}

// Calls f(i) once for each of n rows: the invalid ones, then the others in spatial order, in which consecutive queries visit the same boxes.
template <class T, class F>
void in_spatial_order(const T* rows, int64_t n, F&& f) {
  if (n < 64 || n > kMaxCloud) {
    for (int64_t i = 0; i < n; ++i) f(i);
    return;
  }
  Scratch<T> x, y, z;
  Scratch<int32_t> valid, order;
  const Soa<T> loaded{x.get(n + 1), y.get(n + 1), z.get(n + 1)};
  int32_t *numbers = valid.get(n + 1), *sorted = order.get(n);
  const int64_t count = load_valid(rows, n, loaded, numbers);
  Helpers alone(1);
  spatial_order(loaded, count, kLeafSize, sorted, alone);
  for (int64_t i = 0, next = 0; i < n; ++i) {
    if (next < count && numbers[next] == i) ++next;
    else f(i);
  }
  for (int64_t i = 0; i < count; ++i) f(int64_t{numbers[sorted[i]]});
}

}  // namespace geossl
