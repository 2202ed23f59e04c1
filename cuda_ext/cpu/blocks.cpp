#include "blocks.h"

#include <algorithm>

namespace geossl {

template <class T>
void Blocks<T>::load(const T* rows, int64_t n, int threads) {
  const Soa<T> valid{memory_[0].get(n), memory_[1].get(n), memory_[2].get(n)};
  int32_t* number = numbers_.get(3 * n);  // rows of the valid points; their order; their blocks
  const int64_t found = load_valid(rows, n, valid, number);
  int32_t *order = number + n, *block_of = order + n;
  Helpers helpers(threads);
  const std::vector<int32_t> ends = spatial_order(valid, found, kBlock, order, helpers);
  count = static_cast<int64_t>(ends.size());
  size = sizes_.get(count);
  for (int64_t b = 0; b < count; ++b) size[b] = ends[static_cast<size_t>(b)] - (b > 0 ? ends[static_cast<size_t>(b - 1)] : 0);
  const int64_t slots = kBlock * count;
  T* slot = slots_.get(3 * slots);
  points = {slot, slot + slots, slot + 2 * slots};
  row = row_.get(slots);
  std::fill(slot, slot + 3 * slots, std::numeric_limits<T>::quiet_NaN());
  for (int64_t b = 0, i = 0; b < count; ++b)
    for (; i < ends[static_cast<size_t>(b)]; ++i) block_of[order[i]] = static_cast<int32_t>(b);
  int32_t* next = order;  // no longer needed
  for (int64_t b = 0; b < count; ++b) next[b] = static_cast<int32_t>(kBlock * b);
  for (int64_t i = 0; i < found; ++i) {  // in the order of rows
    const int64_t at = next[block_of[i]]++;
    points.x[at] = valid.x[i], points.y[at] = valid.y[i], points.z[at] = valid.z[i], row[at] = number[i];
  }
  T* box = boxes_.get(6 * count);
  const T* const axes[] = {points.x, points.y, points.z};
  for (int a = 0; a < 3; ++a) {
    low[a] = box + a * count, high[a] = box + (3 + a) * count;
    for (int64_t b = 0; b < count; ++b) {
      T least = axes[a][kBlock * b], most = least;
      for (int64_t i = kBlock * b + 1; i < kBlock * (b + 1); ++i) {  // NaN compares false
        least = axes[a][i] < least ? axes[a][i] : least;
        most = axes[a][i] > most ? axes[a][i] : most;
      }
      low[a][b] = least, high[a][b] = most;
    }
  }
}

namespace {

// How near points in every box of `other` can be at least to any point in the box of block b of `own`; returns the block for which that is
// least. Rounding keeps the order of numbers, so that no distance, computed in the same steps, is less.
template <bool kL1, class T>
GEOSSL_INLINE int64_t bound_boxes(const Blocks<T>& own, int64_t b, const Blocks<T>& other, T* GEOSSL_RESTRICT bound) {
  const auto count = static_cast<Bits<T>>(other.count);
  const T own_low[] = {own.low[0][b], own.low[1][b], own.low[2][b]}, own_high[] = {own.high[0][b], own.high[1][b], own.high[2][b]};
  const T *GEOSSL_RESTRICT low[] = {other.low[0], other.low[1], other.low[2]}, *GEOSSL_RESTRICT high[] = {other.high[0], other.high[1], other.high[2]};
  Bits<T> least = std::numeric_limits<Bits<T>>::max(), first = least;
  for (Bits<T> j = 0; j < count; ++j) {
    const auto gap = [&](int axis) {
      const T above = low[axis][j] - own_high[axis], below = own_low[axis] - high[axis][j], larger = above > below ? above : below;
      return larger > T(0) ? larger : T(0);
    };
    const T x = gap(0), y = gap(1), z = gap(2);
    bound[j] = kL1 ? (x + y) + z : squared(x, y, z);
    least = std::min(least, to_bits(bound[j]));
  }
  for (Bits<T> j = 0; j < count; ++j) first = std::min(first, to_bits(bound[j]) == least ? j : count);
  return first;
}

template <class T, int kBytes, bool kL1>
struct Nearest {
  using Values = typename Vector<T, kBytes>::Values;
  using Numbers = typename Vector<T, kBytes>::Numbers;
  static constexpr int kWidth = Vector<T, kBytes>::kWidth;
  static constexpr int kVectors = kBlock / kWidth;
  typedef Bits<T> Four __attribute__((vector_size(16)));

  Values x[kVectors], y[kVectors], z[kVectors], best[kVectors];
  Numbers row[kVectors];

  GEOSSL_INLINE void start(const Soa<T>& q) {
    constexpr T kInfinity = std::numeric_limits<T>::infinity();
    for (int v = 0; v < kVectors; ++v) {
      __builtin_memcpy(&x[v], q.x + kWidth * v, sizeof(Values));
      __builtin_memcpy(&y[v], q.y + kWidth * v, sizeof(Values));
      __builtin_memcpy(&z[v], q.z + kWidth * v, sizeof(Values));
      best[v] = x[v] == x[v] ? Values{} + kInfinity : Values{} - kInfinity;  // empty slots want nothing
      row[v] = Numbers{} + std::numeric_limits<Bits<T>>::max();
    }
  }

  // The largest of the distances found: what is farther away than that concerns nobody.
  GEOSSL_INLINE T limit() const {
    // Integers order as distances do, and -infinity is below them; four at a time is what gcc keeps in registers.
    constexpr int kFours = kBlock * static_cast<int>(sizeof(T)) / 16;
    Four four[kFours];
    __builtin_memcpy(four, best, sizeof four);
    for (int i = 1; i < kFours; ++i) four[0] = four[i] > four[0] ? four[i] : four[0];
    Bits<T> largest = four[0][0];
    for (int l = 1; l < 16 / static_cast<int>(sizeof(T)); ++l) largest = std::max(largest, Bits<T>{four[0][l]});
    return from_bits<T>(largest);
  }

  // Compares with the points of one block.
  GEOSSL_INLINE void look(const Soa<T>& p, const Bits<T>* p_row, int32_t size) {
    constexpr int kParts = kVectors == 1 ? 1 : 2;
#pragma GCC unroll 16
    for (int first = 0; first < kVectors; first += kParts) {
      Values near[kParts];
      Numbers whose[kParts];
      for (int i = 0; i < kParts; ++i) {
        near[i] = Values{} + std::numeric_limits<T>::infinity();
        whose[i] = Numbers{} + std::numeric_limits<Bits<T>>::max();
      }
      keep_nearest<T, kBytes, kL1, kParts>(x + first, y + first, z + first, p, size, [&](int64_t j) { return p_row[j]; }, near, whose);  // rows ascend
#pragma GCC unroll 2
      for (int i = 0; i < kParts; ++i) {  // one comparison after the other: gcc would combine their outcomes number by number
        Values& own = best[first + i];
        Numbers& own_row = row[first + i];
        const Numbers lower = whose[i] < own_row ? whose[i] : own_row, same = near[i] == own ? lower : own_row;
        const auto closer = near[i] < own;
        own = closer ? near[i] : own;
        own_row = closer ? whose[i] : same;
      }
    }
  }

  GEOSSL_INLINE void store(const Bits<T>* own_row, T* distance, int64_t* nearest) const {
    T values[kBlock];
    Bits<T> rows[kBlock];
    __builtin_memcpy(values, best, sizeof values);
    __builtin_memcpy(rows, row, sizeof rows);
    for (int l = 0; l < kBlock; ++l)
      if (rows[l] != std::numeric_limits<Bits<T>>::max()) distance[own_row[l]] = values[l], nearest[own_row[l]] = rows[l];
  }
};

template <class T, int kBytes, bool kL1>
GEOSSL_INLINE void nearest_loop(const Blocks<T>& own, const Blocks<T>& other, int64_t b0, int64_t b1, T* bound, T* distance, int64_t* nearest) {
  const auto at = [](const Soa<T>& p, int64_t block) { return Soa<T>{p.x + kBlock * block, p.y + kBlock * block, p.z + kBlock * block}; };
  for (int64_t b = b0; b < b1; ++b) {
    const int64_t first = bound_boxes<kL1>(own, b, other, bound);
    Nearest<T, kBytes, kL1> found;
    found.start(at(own.points, b));
    found.look(at(other.points, first), other.row + kBlock * first, other.size[first]);
    T limit = found.limit();
    for (int64_t j = 0; j < other.count; ++j) {
      if (bound[j] > limit || j == first) continue;
      found.look(at(other.points, j), other.row + kBlock * j, other.size[j]);
      limit = found.limit();
    }
    found.store(own.row + kBlock * b, distance, nearest);
  }
}
GEOSSL_VECTORS(void nearest_of(const Blocks<float>& own, const Blocks<float>& other, int64_t b0, int64_t b1, bool manhattan, float* bound,
                               float* distance, int64_t* nearest),
               {
                 if (manhattan) nearest_loop<float, kBytes, true>(own, other, b0, b1, bound, distance, nearest);
                 else nearest_loop<float, kBytes, false>(own, other, b0, b1, bound, distance, nearest);
               })
void nearest_of(const Blocks<double>& own, const Blocks<double>& other, int64_t b0, int64_t b1, bool manhattan, double* bound, double* distance,
                int64_t* nearest) {
  if (manhattan) nearest_loop<double, 16, true>(own, other, b0, b1, bound, distance, nearest);
  else nearest_loop<double, 16, false>(own, other, b0, b1, bound, distance, nearest);
}

template <class T>
void nearest_in(const Blocks<T>& own, const Blocks<T>& other, int64_t b0, int64_t b1, bool manhattan, T* distance, int64_t* nearest) {
  if (other.count == 0) return;
  Scratch<T> bound;
  nearest_of(own, other, b0, b1, manhattan, bound.get(other.count), distance, nearest);
}

}  // namespace

void nearest_in_blocks(const Blocks<float>& own, const Blocks<float>& other, int64_t b0, int64_t b1, bool manhattan, float* distance,
                       int64_t* nearest) {
  nearest_in(own, other, b0, b1, manhattan, distance, nearest);
}
void nearest_in_blocks(const Blocks<double>& own, const Blocks<double>& other, int64_t b0, int64_t b1, bool manhattan, double* distance,
                       int64_t* nearest) {
  nearest_in(own, other, b0, b1, manhattan, distance, nearest);
}

template class Blocks<float>;
template class Blocks<double>;

}  // namespace geossl
