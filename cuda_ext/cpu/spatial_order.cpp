#include <algorithm>
#include <array>

#include "tree.h"

namespace geossl {
namespace {

constexpr int64_t kGrain = int64_t{1} << 15;  // points a thread is worth starting for

struct Coded {
  uint32_t code;
  int32_t item;
};

// Spreads the lowest 8 bits three apart.
inline uint32_t spread_8_bits(uint32_t v) {
  v = (v | v << 8) & 0x0300f00fu;
  v = (v | v << 4) & 0x030c30c3u;
  return (v | v << 2) & 0x09249249u;
}

constexpr int kCells = 1 << 8, kCodeBits = 24;  // along each axis; of all three
constexpr int kTopBits = 10, kTops = 1 << kTopBits;
inline size_t top_of(uint32_t code) { return code >> (kCodeBits - kTopBits); }

// Sorts n items by code, stably; `other` is scratch.
void sort_by_code(Coded* items, Coded* other, int64_t n) {
  if (n < 256) return std::stable_sort(items, items + n, [](const Coded& a, const Coded& b) { return a.code < b.code; });
  const int bits = n < 8192 ? 8 : 12;  // three passes over few items or two over many: there are no more places to count than items
  const uint32_t digits = 1u << bits;
  Coded* from = items;
  for (int shift = 0; shift < kCodeBits; shift += bits) {
    std::array<int32_t, 4096> start;
    std::fill_n(start.begin(), digits, 0);
    for (int64_t i = 0; i < n; ++i) ++start[from[i].code >> shift & (digits - 1)];
    for (uint32_t digit = 0, sum = 0; digit < digits; ++digit) {
      const int32_t count = start[digit];
      start[digit] = static_cast<int32_t>(sum), sum += static_cast<uint32_t>(count);
    }
    for (int64_t i = 0; i < n; ++i) other[start[from[i].code >> shift & (digits - 1)]++] = from[i];
    std::swap(from, other);
  }
  if (from != items) std::copy(from, from + n, items);
}

// The lowest and the highest of n values, at least one; lane by lane, which vectorises.
template <class T>
void bounds_of(const T* values, int64_t n, T& low, T& high) {
  constexpr int kLanes = 64;  // more than gcc unrolls into single values
  T lows[kLanes], highs[kLanes];
  for (int l = 0; l < kLanes; ++l) lows[l] = highs[l] = values[std::min<int64_t>(l, n - 1)];
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int l = 0; l < kLanes; ++l) {
      const T value = values[i + l];
      lows[l] = value < lows[l] ? value : lows[l];
      highs[l] = value > highs[l] ? value : highs[l];
    }
  low = *std::min_element(lows, lows + kLanes), high = *std::max_element(highs, highs + kLanes);
  for (; i < n; ++i) low = std::min(low, values[i]), high = std::max(high, values[i]);
}

// Orders the items of ranges and cuts them into groups.
template <class T>
class Grouping {
 public:
  Grouping(const Soa<T>& points, int64_t largest, int32_t* order) : axes_{points.x, points.y, points.z}, largest_(largest), order_(order) {}

  // Orders and cuts the items order[begin] .. order[end], whose coordinates are at[0 .. 2].
  void run(const T* const* at, int64_t begin, int64_t end, Helpers& helpers, std::vector<int32_t>& ends) const {
    const int64_t n = end - begin;
    T low[3], extent = 0;
    for (int a = 0; a < 3; ++a) {
      T high;
      bounds_of(at[a], n, low[a], high);
      extent = std::max(extent, high - low[a]);
    }
    const T scale = T(kCells - 1) / extent;
    if (n <= largest_ || !(extent > 0) || !finite(scale) || !(scale > 0)) {
      // Few, all equal, or further apart than the type can tell: in index order.
      for (int64_t i = begin; i < end; i += largest_) ends.push_back(static_cast<int32_t>(std::min(i + largest_, end)));
      return;
    }
    const int pieces = static_cast<int>(pieces_of(helpers.threads(), n, kGrain));
    Scratch<Coded> memory[2];
    Coded *items = memory[0].get(n), *other = memory[1].get(n);
    std::vector<Digits> count(static_cast<size_t>(pieces > 1 ? pieces : 0));
    helpers.share(pieces, [&](int64_t piece) {
      const int64_t from = piece * n / pieces, to = (piece + 1) * n / pieces;
      for (int64_t i = from; i < to; ++i) {
        uint32_t code = 0;
        for (int a = 0; a < 3; ++a) code |= spread_8_bits(static_cast<uint32_t>(static_cast<int32_t>((at[a][i] - low[a]) * scale))) << a;
        items[i] = {code, order_[begin + i]};
      }
      if (pieces == 1) return;
      Digits& own = count[static_cast<size_t>(piece)];
      for (int64_t i = from; i < to; ++i) ++own[top_of(items[i].code)];
    });
    if (pieces == 1) {
      sort_by_code(items, other, n);
      for (int64_t i = 0; i < n; ++i) order_[begin + i] = items[i].item;
      return cut({items, items + n, begin}, ends);
    }
    const std::vector<int64_t> bound = deal_out(items, other, n, count, helpers);
    std::swap(items, other);
    std::vector<std::vector<int32_t>> parts(static_cast<size_t>(pieces));
    helpers.share(pieces, [&](int64_t piece) {
      const int64_t from = bound[static_cast<size_t>(piece)], to = bound[static_cast<size_t>(piece) + 1];
      sort_by_code(items + from, other + from, to - from);
      for (int64_t i = from; i < to; ++i) order_[begin + i] = items[i].item;
      if (from < to) cut({items + from, items + to, begin + from}, parts[static_cast<size_t>(piece)]);
    });
    for (const auto& part : parts) ends.insert(ends.end(), part.begin(), part.end());
  }

 private:
  using Digits = std::array<int64_t, kTops>;  // how many items have each highest digit

  // Deals n items out to as many pieces as there are counts, about as many to each, all of one highest digit to the same piece, in order.
  // Returns where pieces begin, and the end.
  std::vector<int64_t> deal_out(const Coded* items, Coded* other, int64_t n, std::vector<Digits>& count, Helpers& helpers) const {
    const auto pieces = static_cast<int64_t>(count.size());
    std::array<int64_t, kTops + 1> before{};  // items of lower digits
    for (size_t digit = 0; digit < kTops; ++digit) {
      before[digit + 1] = before[digit];
      for (const Digits& own : count) before[digit + 1] += own[digit];
    }
    std::vector<int64_t> bound{0};
    for (int64_t piece = 1, digit = 1; piece < pieces; ++piece) {
      while (before[static_cast<size_t>(digit)] < piece * n / pieces) ++digit;
      bound.push_back(before[static_cast<size_t>(digit)]);
    }
    bound.push_back(n);
    for (size_t digit = 0; digit < kTops; ++digit) {  // counts become places
      int64_t at = before[digit];
      for (Digits& own : count) at += own[digit], own[digit] = at - own[digit];
    }
    helpers.share(pieces, [&](int64_t piece) {
      Digits& next = count[static_cast<size_t>(piece)];
      for (int64_t i = piece * n / pieces; i < (piece + 1) * n / pieces; ++i) {
        const Coded item = items[i];
        other[next[top_of(item.code)]++] = item;
      }
    });
    return bound;
  }

  struct Range {
    const Coded *first, *last;
    int64_t begin;  // of the range in the order
    int64_t size() const { return last - first; }
    Range until(const Coded* middle) const { return {first, middle, begin}; }
    Range from(const Coded* middle) const { return {middle, last, begin + (middle - first)}; }
  };

  // Where a range of codes is halved: at its highest differing bit, that is by a plane across its box; null if it is small enough or all in
  // one cell.
  const Coded* middle(const Range& range) const {
    if (range.size() <= largest_) return nullptr;
    const uint32_t last = (range.last - 1)->code;
    uint32_t bit = range.first->code ^ last;
    if (bit == 0) return nullptr;
    while (bit & (bit - 1)) bit &= bit - 1;
    return std::lower_bound(range.first, range.last, last & ~(bit - 1), [](const Coded& item, uint32_t code) { return item.code < code; });
  }

  void cut(const Range& range, std::vector<int32_t>& ends) const {
    if (const Coded* half = middle(range)) {
      cut(range.until(half), ends);
      cut(range.from(half), ends);
    } else if (range.size() <= largest_) {
      ends.push_back(static_cast<int32_t>(range.begin + range.size()));
    } else {
      // One cell; inside, the extent is 256 times smaller.
      std::vector<T> gathered[3];
      for (int a = 0; a < 3; ++a) {
        gathered[a].resize(static_cast<size_t>(range.size()));
        for (int64_t i = 0; i < range.size(); ++i) gathered[a][static_cast<size_t>(i)] = axes_[a][range.first[i].item];
      }
      const T* const at[] = {gathered[0].data(), gathered[1].data(), gathered[2].data()};
      Helpers alone(1);
      run(at, range.begin, range.begin + range.size(), alone, ends);
    }
  }

  const T* axes_[3];
  int64_t largest_;
  int32_t* order_;
};

}  // namespace

template <class T>
std::vector<int32_t> spatial_order(const Soa<T>& points, int64_t n, int64_t largest, int32_t* order, Helpers& helpers) {
  std::vector<int32_t> ends;
  for (int64_t i = 0; i < n; ++i) order[i] = static_cast<int32_t>(i);
  const T* const at[] = {points.x, points.y, points.z};
  if (n > 0) Grouping<T>(points, largest, order).run(at, 0, n, helpers, ends);
  return ends;
}

template <class T>
int64_t load_valid(const T* rows, int64_t n, const Soa<T>& to, int32_t* id) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    const T x = rows[3 * i], y = rows[3 * i + 1], z = rows[3 * i + 2];
    to.x[count] = x, to.y[count] = y, to.z[count] = z, id[count] = static_cast<int32_t>(i);
    count += (x - x) + (y - y) + (z - z) == T(0);  // 0 for finite numbers only
  }
  return count;
}

template std::vector<int32_t> spatial_order(const Soa<float>&, int64_t, int64_t, int32_t*, Helpers&);
template std::vector<int32_t> spatial_order(const Soa<double>&, int64_t, int64_t, int32_t*, Helpers&);
template int64_t load_valid(const float*, int64_t, const Soa<float>&, int32_t*);
template int64_t load_valid(const double*, int64_t, const Soa<double>&, int32_t*);

}  // namespace geossl
