// The tree for large clouds on CUDA, built as geossl/ops/_tree.py does, against the search of the CPU.
#include <algorithm>
#include <numeric>

#include "drive.h"

extern "C" int geossl_tree_keys_cuda(int device, void* stream, int, const void*, const int64_t*, const int64_t*, int64_t, int64_t, const int64_t*,
                                     const int64_t*, int64_t, void*, int64_t*);
extern "C" int geossl_tree_build_cuda(int device, void* stream, int, const void*, const int64_t*, const int64_t*, int64_t, int64_t,
                                      const int64_t*, const int64_t*, int64_t, void*, int32_t*, void*, int32_t*);
extern "C" int geossl_tree_search_cuda(int device, void* stream, int, const void*, const int64_t*, const int64_t*, int64_t, const void*,
                                       const int64_t*, const int64_t*, int64_t, int64_t, int64_t, double, const void*, int, int, int,
                                       const int64_t*, int64_t, void*, int32_t*, void*, int32_t*, void*, int64_t*, int64_t*);
BOTH(knn, int, const void*, const int64_t*, const int64_t*, int64_t, const void*, const int64_t*, const int64_t*, int64_t, int64_t, int64_t,
     double, int, void*, int64_t*);
BOTH(ball_query, int, const void*, const int64_t*, const int64_t*, int64_t, const void*, const int64_t*, const int64_t*, int64_t, int64_t,
     int64_t, double, const void*, int, int, void*, int64_t*, int64_t*);

namespace {

using namespace drive;

// Exactly as large as the wrapper makes them, so that AddressSanitizer sees a kernel that needs more.
template <class T>
struct Tree {
  std::vector<int64_t> leaf_begin{0};
  int64_t leaves = 0;
  std::vector<T> coordinates, boxes;
  std::vector<int32_t> rows, numbers;
};

template <class T>
Tree<T> build(const std::vector<T>& p, const int64_t* offsets, const int64_t* lengths, int64_t n, int64_t batch, const char* what) {
  const int is_double = sizeof(T) == 8;
  const auto rows = static_cast<int64_t>(p.size() / 3);
  std::vector<int64_t> order(static_cast<size_t>(rows)), group = order, key = order;
  std::iota(order.begin(), order.end(), 0);
  for (int64_t row = 0; row < rows; ++row)
    group[static_cast<size_t>(row)] = offsets ? std::upper_bound(offsets, offsets + batch + 1, row) - offsets - 1 : row / n;
  const int64_t groups = std::max(rows, batch + 1);
  std::vector<int64_t> bounds(static_cast<size_t>((6 * groups * static_cast<int64_t>(sizeof(T)) + 7) / 8));
  for (int round = 0; round < 3; ++round) {
    check(0 == geossl_tree_keys_cuda(0, nullptr, is_double, p.data(), offsets, lengths, n, batch, order.data(), group.data(), groups,
                                     bounds.data(), key.data()), what);
    std::vector<size_t> moved(key.size());
    std::iota(moved.begin(), moved.end(), size_t{0});
    std::stable_sort(moved.begin(), moved.end(), [&](size_t a, size_t b) { return key[a] < key[b]; });
    const std::vector<int64_t> old_order = order;
    for (size_t i = 0; i < moved.size(); ++i) {
      order[i] = old_order[moved[i]];
      group[i] = i == 0 ? 0 : group[i - 1] + (key[moved[i]] != key[moved[i - 1]]);
    }
  }
  Tree<T> tree;
  for (int64_t b = 0; b < batch; ++b) tree.leaf_begin.push_back(tree.leaf_begin.back() + ((offsets ? offsets[b + 1] - offsets[b] : n) + 31) / 32);
  tree.leaves = offsets ? rows / 32 + batch : tree.leaf_begin.back();
  int64_t nodes = 0;
  for (int64_t level = tree.leaves;; level /= 32) {
    level = (level + 31) / 32 * 32;
    nodes += level;
    if (level == 32) break;
  }
  tree.coordinates.resize(static_cast<size_t>(96 * tree.leaves)), tree.rows.resize(static_cast<size_t>(32 * tree.leaves));
  tree.boxes.resize(static_cast<size_t>(6 * nodes)), tree.numbers.resize(static_cast<size_t>(2 * nodes));
  check(0 == geossl_tree_build_cuda(0, nullptr, is_double, p.data(), offsets, lengths, n, batch, order.data(), tree.leaf_begin.data(), tree.leaves,
                                    tree.coordinates.data(), tree.rows.data(), tree.boxes.data(), tree.numbers.data()), what);
  return tree;
}

template <class T>
void search(int64_t q, int64_t n, int64_t k, double radius, bool packed, const char* what) {
  const int is_double = sizeof(T) == 8;
  const int64_t batch = 3, lengths[] = {n, 0, n / 3}, offsets[] = {0, n, n, n + n / 3}, query_offsets[] = {0, q, q, 2 * q};
  const int64_t *l = packed ? nullptr : lengths, *o = packed ? offsets : nullptr, *qo = packed ? query_offsets : nullptr;
  const int64_t queries = packed ? 2 * q : batch * q, per = packed ? queries : q, rows = packed ? offsets[3] : batch * n, size = packed ? rows : n;
  const std::vector<T> query = points<T>(queries), p = points<T>(rows);
  Tree<T> tree = build(p, o, l, size, batch, what);
  const auto slots = static_cast<size_t>(queries * k);
  std::vector<T> d[2];
  std::vector<int64_t> i[2], c[2];
  const auto by_tree = [&](int exclude_self, int first, int64_t* count) {
    return geossl_tree_search_cuda(0, nullptr, is_double, query.data(), qo, nullptr, per, p.data(), o, l, size, batch, k, radius, nullptr,
                                   exclude_self, first, count != nullptr, tree.leaf_begin.data(), tree.leaves, tree.coordinates.data(),
                                   tree.rows.data(), tree.boxes.data(), tree.numbers.data(), d[1].data(), i[1].data(), count);
  };
  for (auto& v : d) v.assign(slots, T(-7));
  for (auto& v : i) v.assign(slots, -7);
  for (auto& v : c) v.assign(static_cast<size_t>(queries), -7);
  check(0 == geossl_knn_cpu(2, is_double, query.data(), qo, nullptr, per, p.data(), o, l, size, batch, k, radius, 1, d[0].data(), i[0].data()), what);
  check(0 == by_tree(1, 0, nullptr), what);
  check(equal(d[0], d[1]) && equal(i[0], i[1]), what);
  for (int first : {0, 1}) {
    check(0 == geossl_ball_query_cpu(2, is_double, query.data(), qo, nullptr, per, p.data(), o, l, size, batch, k, radius, nullptr, first, 1,
                                     d[0].data(), i[0].data(), c[0].data()), what);
    check(0 == by_tree(0, first, c[1].data()), what);
    check(equal(d[0], d[1]) && equal(i[0], i[1]) && equal(c[0], c[1]), what);
  }
}

constexpr double kInfinity = std::numeric_limits<double>::infinity();

template <class T>
void one_level(bool packed) {
  search<T>(2, 500, 5, 0.4, packed, "tree, k = 5");
  search<T>(2, 300, 45, kInfinity, packed, "tree, k = 45");
  search<T>(1, 400, 150, 0.9, packed, "tree, k = 150");
}

void run() {
  one_level<float>(true);
#ifndef __SANITIZE_THREAD__  // the same kernels again, for minutes
  one_level<float>(false);
  one_level<double>(false);
  one_level<double>(true);
  search<double>(1, 1400, 6, kInfinity, true, "tree of two levels, double");
#endif
  search<float>(1, 1100, 6, kInfinity, true, "tree of two levels");
}
const Suite suite{&run};

}  // namespace
