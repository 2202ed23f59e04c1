// Centrality non-maximum suppression on the CPU: points are sorted by the cells of a grid, so that everything within the radius of a point
// lies in nine runs of the sorted arrays.
#include <algorithm>
#include <array>

#include "points.h"

namespace geossl {
namespace {

// What is asked; see geossl/ops/nms.py. Coordinates are float, double or int64_t.
template <class C>
struct Problem {
  const C* points;
  Clouds clouds;
  double radius;
  C limit;      // squared distances must be below it
  int64_t cap;  // neighbours that a list holds at most
  bool* keep;
  int64_t* count;
};

template <class C>
constexpr bool kIntegers = std::is_same_v<C, int64_t>;

// Exact for integers: differences are taken without sign, and those that alone are too large (the radius is at most 2^30) never squared.
template <class C>
GEOSSL_INLINE bool inside(C ax, C ay, C az, C bx, C by, C bz, C limit) {
  if constexpr (kIntegers<C>) {
    constexpr uint64_t kLargest = uint64_t{1} << 30;
    const auto distance = [](int64_t a, int64_t b) {
      const uint64_t d = a > b ? static_cast<uint64_t>(a) - static_cast<uint64_t>(b) : static_cast<uint64_t>(b) - static_cast<uint64_t>(a);
      return d < kLargest ? d : kLargest;
    };
    const uint64_t x = distance(ax, bx), y = distance(ay, by), z = distance(az, bz);
    return x * x + y * y + z * z < static_cast<uint64_t>(limit);
  } else {
    return squared(ax - bx, ay - by, az - bz) < limit;
  }
}

template <class C>
GEOSSL_INLINE int64_t count_loop(const Soa<C>& p, int64_t begin, int64_t end, int64_t i, C limit) {
  const C x = p.x[i], y = p.y[i], z = p.z[i];
  int64_t total = 0;
  for (int64_t j = begin; j < end; ++j) total += inside(p.x[j], p.y[j], p.z[j], x, y, z, limit);
  return total;
}
GEOSSL_SIMD int64_t count_inside(const Soa<float>& p, int64_t begin, int64_t end, int64_t i, float limit) {
  return count_loop(p, begin, end, i, limit);
}
int64_t count_inside(const Soa<double>& p, int64_t begin, int64_t end, int64_t i, double limit) {
  return count_loop(p, begin, end, i, limit);
}
int64_t count_inside(const Soa<int64_t>& p, int64_t begin, int64_t end, int64_t i, int64_t limit) {
  return count_loop(p, begin, end, i, limit);
}

using Cell = std::array<int64_t, 3>;

// Rows sorted by the cells they lie in. Nothing here depends on the type of coordinates, so it is compiled once.
class Cells {
 public:
  std::vector<int32_t> row;  // valid rows by (cell, row)

  int64_t cells() const { return static_cast<int64_t>(cells_.size()); }
  int64_t begin(int64_t cell) const { return start_[static_cast<size_t>(cell)]; }
  // The cell of a place in the sorted arrays.
  int64_t cell_at(int64_t place) const { return std::upper_bound(start_.begin(), start_.end(), place) - start_.begin() - 1; }

  // Calls f(begin, end) for the runs of the arrays that hold the 27 cells around a cell.
  template <class F>
  void around(int64_t cell, F&& f) const {
    const Cell& c = cells_[static_cast<size_t>(cell)];
    for (int64_t x = c[0] - 1; x <= c[0] + 1; ++x)
      for (int64_t y = c[1] - 1; y <= c[1] + 1; ++y) {
        const auto first = std::lower_bound(cells_.begin(), cells_.end(), Cell{x, y, c[2] - 1});
        auto last = first;
        while (last != cells_.end() && (*last)[0] == x && (*last)[1] == y && (*last)[2] <= c[2] + 1) ++last;
        if (first != last) f(begin(first - cells_.begin()), begin(last - cells_.begin()));
      }
  }

 protected:
  // Sorts `row` by the cells of all rows.
  void sort(const std::vector<Cell>& cell_of) {
    const auto cell = [&](int32_t i) -> const Cell& { return cell_of[static_cast<size_t>(i)]; };
    std::sort(row.begin(), row.end(), [&](int32_t a, int32_t b) { return cell(a) < cell(b) || (cell(a) == cell(b) && a < b); });
    for (size_t i = 0; i < row.size(); ++i)
      if (cells_.empty() || cells_.back() != cell(row[i])) cells_.push_back(cell(row[i])), start_.push_back(static_cast<int64_t>(i));
    start_.push_back(static_cast<int64_t>(row.size()));
  }

 private:
  std::vector<Cell> cells_;
  std::vector<int64_t> start_;
};

// Cells are at least as wide as the radius: points within it lie in neighbouring cells.
template <class C>
class Grid : public Cells {
 public:
  Grid(const C* rows, int64_t n, double radius) {
    edge_ = kIntegers<C> ? __builtin_ceil(radius) : static_cast<double>(static_cast<C>(radius)) * 1.0001;  // more than rounding can do
    edge_ = std::max(edge_, std::numeric_limits<double>::min());  // a radius may vanish in float
    if constexpr (std::is_same_v<C, double>) {
      // Where a cell is narrower than the rounding of its number, one cell holds everything. (Two different floats are never that close.)
      for (int64_t i = 0; i < 3 * n; ++i)
        if (finite(rows[i]) && __builtin_fabs(rows[i]) / edge_ > 1e12) edge_ = std::numeric_limits<double>::infinity();
    }
    std::vector<Cell> cell_of(static_cast<size_t>(n));
    for (int64_t i = 0; i < n; ++i) {
      const C* p = rows + 3 * i;
      if constexpr (!kIntegers<C>)
        if (!(finite(p[0]) && finite(p[1]) && finite(p[2]))) continue;
      cell_of[static_cast<size_t>(i)] = {number(p[0]), number(p[1]), number(p[2])};
      row.push_back(static_cast<int32_t>(i));
    }
    sort(cell_of);
    const auto m = static_cast<int64_t>(row.size());
    points = {x_.get(m), y_.get(m), z_.get(m)};
    for (int64_t i = 0; i < m; ++i) {
      const C* p = rows + 3 * int64_t{row[static_cast<size_t>(i)]};
      points.x[i] = p[0], points.y[i] = p[1], points.z[i] = p[2];
    }
  }

  Soa<C> points{};  // of `row`

 private:
  int64_t number(C v) const {
    if constexpr (kIntegers<C>) {
      const auto edge = static_cast<int64_t>(edge_);
      return v / edge - (v % edge < 0);
    } else {
      constexpr double kFarthest = 2305843009213693952.0;  // 2^61
      return static_cast<int64_t>(std::clamp(__builtin_floor(static_cast<double>(v) / edge_), -kFarthest, kFarthest));
    }
  }

  double edge_;
  Scratch<C> x_, y_, z_;
};

template <class C>
void count_neighbors(const Grid<C>& grid, const Problem<C>& p, int64_t first_row, int threads) {
  parallel_for(threads, grid.cells(), 64, [&](int64_t c0, int64_t c1) {
    std::vector<std::array<int64_t, 2>> runs;
    for (int64_t cell = c0; cell < c1; ++cell) {
      runs.clear();
      grid.around(cell, [&](int64_t begin, int64_t end) { runs.push_back({begin, end}); });
      for (int64_t i = grid.begin(cell); i < grid.begin(cell + 1); ++i) {
        int64_t total = 0;
        for (const auto& run : runs) {
          // In pieces, because no more than `cap` is wanted.
          for (int64_t begin = run[0]; begin < run[1] && total < p.cap; begin += 1024)
            total += count_inside(grid.points, begin, std::min(begin + 1024, run[1]), i, p.limit);
        }
        p.count[first_row + grid.row[static_cast<size_t>(i)]] = std::min(total, p.cap);
      }
    }
  });
}

// Rows from the one with the most neighbours to the one with the fewest, equal ones in order.
std::vector<int32_t> by_count(std::vector<int32_t> rows, const int64_t* count) {
  std::sort(rows.begin(), rows.end(), [&](int32_t a, int32_t b) { return count[a] > count[b] || (count[a] == count[b] && a < b); });
  return rows;
}

// The first `cap` rows of a list, in any order.
void shorten(std::vector<int32_t>& list, int64_t cap) {
  if (static_cast<int64_t>(list.size()) <= cap) return;
  std::nth_element(list.begin(), list.begin() + cap, list.end());
  list.resize(static_cast<size_t>(cap));
}

// Walks the points from the most central to the least; each one that is still kept removes the others in its list.
template <class C>
void suppress(const Grid<C>& grid, const Problem<C>& p, int64_t first_row, int64_t n) {
  bool* keep = p.keep + first_row;
  std::vector<int32_t> place(static_cast<size_t>(n), -1), list;
  for (size_t i = 0; i < grid.row.size(); ++i) place[static_cast<size_t>(grid.row[i])] = static_cast<int32_t>(i), keep[grid.row[i]] = true;
  const Soa<C>& at = grid.points;
  for (const int32_t row : by_count(grid.row, p.count + first_row)) {
    if (!keep[row]) continue;
    const int64_t i = place[static_cast<size_t>(row)];
    list.clear();
    grid.around(grid.cell_at(i), [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j)
        if (inside(at.x[j], at.y[j], at.z[j], at.x[i], at.y[i], at.z[i], p.limit)) list.push_back(grid.row[static_cast<size_t>(j)]);
    });
    shorten(list, p.cap);
    for (const int32_t other : list)
      if (other != row) keep[other] = false;
  }
}

template <class C>
int run(const Problem<C>& p, int threads) {
  const int64_t batch = p.clouds.batch;
  std::fill(p.keep, p.keep + p.clouds.rows(), false);
  std::fill(p.count, p.count + p.clouds.rows(), int64_t{0});
  const int inside_cloud = batch < 2 * threads ? threads : 1;  // few clouds: threads share each of them
  const int64_t mean = p.clouds.rows() / std::max<int64_t>(batch, 1);
  parallel_for(inside_cloud > 1 ? 1 : threads, batch, std::max<int64_t>(1, 4096 / std::max<int64_t>(mean, 1)), [&](int64_t b0, int64_t b1) {
    for (int64_t b = b0; b < b1; ++b) {
      const int64_t first = p.clouds.begin(b), n = p.clouds.size(b);
      const Grid<C> grid(p.points + 3 * first, n, p.radius);
      count_neighbors(grid, p, first, inside_cloud);
      suppress(grid, p, first, n);
    }
  });
  return GEOSSL_OK;
}

}  // namespace
}  // namespace geossl

// See geossl/ops/nms.py for the arguments; type: 0 float, 1 double, 2 int64. The workspace is for CUDA.
GEOSSL_API int geossl_centrality_nms_cpu(int threads, int type, const void* points, const int64_t* offsets, const int64_t* lengths, int64_t n,
                                         int64_t batch, double radius, int64_t limit, int64_t cap, int32_t*, bool* keep, int64_t* count) {
  using namespace geossl;
  if (batch < 0 || n < 0 || cap < 1 || type < 0 || type > 2 || !(radius > 0)) return GEOSSL_INVALID_ARGUMENT;
  const Clouds clouds{offsets, lengths, batch, n};
  if (!clouds_fit(clouds)) return GEOSSL_TOO_LARGE;
  int status = GEOSSL_OK;
  const int failure = guarded([&] {
    if (type == 2) status = run(Problem<int64_t>{static_cast<const int64_t*>(points), clouds, radius, limit, cap, keep, count}, threads);
    else if (type == 1) status = run(Problem<double>{static_cast<const double*>(points), clouds, radius, radius * radius, cap, keep, count}, threads);
    else {
      const auto r = static_cast<float>(radius);
      status = run(Problem<float>{static_cast<const float*>(points), clouds, radius, r * r, cap, keep, count}, threads);
    }
  });
  return failure != GEOSSL_OK ? failure : status;
}
GEOSSL_PACKED(geossl_centrality_nms_cpu)
