// Reductions of rows that share a segment. Rows are visited in order, so that every sum has one order of additions; threads take ranges of
// segments, which are independent of each other.
#include <algorithm>
#include <cstring>
#include <memory>

#include "exponential.h"
#include "points.h"

namespace geossl {
namespace {

constexpr int64_t kBytesPerThread = int64_t{1} << 20;  // of rows that a thread is worth starting for
constexpr int kChunk = 2048;                           // rows that are looked through before those of the range are visited
constexpr int64_t kAhead = 16;                         // rows between asking for an accumulator and using it
constexpr int64_t kBytesAhead = 6144;                  // the same for rows: the hardware does not look ahead beyond a page

inline void prefetch_row(const void* row, int64_t bytes) {
  for (int64_t byte = 0; byte < std::min<int64_t>(bytes, 256); byte += 64) __builtin_prefetch(static_cast<const char*>(row) + byte);
}

// Row e belongs to segment index[e] (negative: to none) or, without index, segment s has the rows splits[s] .. splits[s + 1]. With both, as in a
// voxel map, segment s has the rows order[splits[s]] .. order[splits[s + 1] - 1].
template <class T>
struct Rows {
  const T* x;
  int64_t rows, channels;
  const int64_t *index, *splits, *order;
  int64_t size;

  // Calls body(row, segment) for the rows of segments s0 .. s1, in order. A range with all rows takes them as they lie in memory; so that several
  // threads do not all read everything, their ranges take them by `order` where there is one. Else, by index, a chunk's rows are first listed
  // without a branch: which of them a range has cannot be guessed.
  template <class F>
  GEOSSL_INLINE void each(int64_t s0, int64_t s1, const T* accumulators, F body) const {
    if (rows == 0) return;  // then torch's pointers may be null
    if (!index) {
      for (int64_t s = s0; s < s1; ++s)
        for (int64_t e = splits[s]; e < splits[s + 1]; ++e) body(e, s);
      return;
    }
    const int64_t width = F::kWidth ? F::kWidth : channels, bytes = width * static_cast<int64_t>(sizeof(T));
    const bool all = s0 == 0 && s1 == size;
    if (order && !all) {
      const int64_t last = splits[s1] - 1;
      for (int64_t s = s0; s < s1; ++s)
        for (int64_t e = splits[s]; e < splits[s + 1]; ++e) {
          prefetch_row(x + order[std::min(e + kAhead, last)] * width, bytes);
          if (static_cast<uint64_t>(order[e]) < static_cast<uint64_t>(rows)) body(order[e], s);
        }
      return;
    }
    const int64_t rows_ahead = 1 + kBytesAhead / std::max<int64_t>(bytes, 1);
    int32_t listed[kChunk];
    for (int32_t i = 0; i < kChunk; ++i) listed[i] = i;
    for (int64_t first = 0; first < rows; first += kChunk) {
      const auto count = static_cast<int32_t>(std::min<int64_t>(kChunk, rows - first));
      int64_t found = all ? count : 0;
      for (int32_t i = 0; !all && i < count; ++i) {
        listed[found] = i;
        found += static_cast<uint64_t>(index[first + i] - s0) < static_cast<uint64_t>(s1 - s0);
      }
      for (int64_t k = 0; k < found; ++k) {
        const int64_t e = first + listed[k], s = index[e];
        prefetch_row(accumulators + index[first + listed[std::min(k + kAhead, found - 1)]] * width, bytes);
        prefetch_row(x + std::min(e + rows_ahead, rows - 1) * width, bytes);
        if (static_cast<uint64_t>(s) < static_cast<uint64_t>(size)) body(e, s);
      }
    }
  }
};

// kFixed: the number of channels where it is known, so that a row is a few vector instructions; else 0.
template <int kFixed, class T>
struct AddRow {
  static constexpr int kWidth = kFixed;
  const T* x;
  T* out;
  int64_t* count;
  int64_t channels;
  GEOSSL_INLINE void operator()(int64_t e, int64_t s) const {
    const int64_t width = kFixed ? kFixed : channels;
    const T* GEOSSL_RESTRICT from = x + e * width;
    T* GEOSSL_RESTRICT to = out + s * width;
    for (int64_t c = 0; c < width; ++c) to[c] += from[c];
    if (count) ++count[s];
  }
};

template <class T>
GEOSSL_INLINE void sum(const Rows<T>& r, int64_t s0, int64_t s1, T* out, int64_t* count) {
  std::fill(out + s0 * r.channels, out + s1 * r.channels, T(0));
  for (int64_t s = s0; count && s < s1; ++s) count[s] = r.splits ? r.splits[s + 1] - r.splits[s] : 0;
  int64_t* counted = r.splits ? nullptr : count;
  if (r.channels == 32) r.each(s0, s1, out, AddRow<32, T>{r.x, out, counted, r.channels});
  else r.each(s0, s1, out, AddRow<0, T>{r.x, out, counted, r.channels});
  if (!count) return;
  for (int64_t s = s0; s < s1; ++s)
    for (int64_t c = 0; c < r.channels && count[s] > 1; ++c) out[s * r.channels + c] /= static_cast<T>(count[s]);
}

// A value replaces the best before it if it is better, or if it is the first NaN. `sign` is 1 for the largest, -1 for the smallest: one
// function serves both, which takes half the time to compile and none to run, as memory is what rows wait for.
template <class T>
GEOSSL_INLINE bool better(T value, T best, T sign) {
  return (sign * value > sign * best) | ((value != value) & (best == best));
}

template <class T, class A>
struct KeepBest {
  static constexpr int kWidth = 0;
  const T* x;
  T* out;
  A* arg;  // null: not wanted
  uint8_t* seen;
  int64_t channels;
  T sign;
  GEOSSL_INLINE void operator()(int64_t e, int64_t s) const {
    const T* GEOSSL_RESTRICT from = x + e * channels;
    T* GEOSSL_RESTRICT to = out + s * channels;
    A* GEOSSL_RESTRICT where = arg ? arg + s * channels : nullptr;
    const A row = static_cast<A>(e);
    if (!seen[s]) {
      seen[s] = 1;
      for (int64_t c = 0; c < channels; ++c) to[c] = from[c];
      for (int64_t c = 0; where && c < channels; ++c) where[c] = row;
    } else if (where) {
      for (int64_t c = 0; c < channels; ++c) {
        const bool take = better(from[c], to[c], sign);
        to[c] = take ? from[c] : to[c];
        where[c] = take ? row : where[c];
      }
    } else {
      for (int64_t c = 0; c < channels; ++c) to[c] = better(from[c], to[c], sign) ? from[c] : to[c];
    }
  }
};

// Leaves the rows of empty segments alone. A is the type of `arg`, as wide as T so that both are compared in one go.
template <class T, class A>
GEOSSL_INLINE void extreme(const Rows<T>& r, int64_t s0, int64_t s1, T sign, T* out, A* arg, uint8_t* seen) {
  std::fill(seen + s0, seen + s1, uint8_t{0});
  r.each(s0, s1, out, KeepBest<T, A>{r.x, out, arg, seen, r.channels, sign});
}

template <class T>
struct AddExponential {
  static constexpr int kWidth = 0;
  const T *x, *shift;
  T *total, *out;
  int64_t channels, stride;  // stride: from row to row of `out`
  GEOSSL_INLINE void operator()(int64_t e, int64_t s) const {
    const T* GEOSSL_RESTRICT from = x + e * channels;
    const T* GEOSSL_RESTRICT less = shift + s * channels;
    T* GEOSSL_RESTRICT sum = total + s * channels;
    T* GEOSSL_RESTRICT to = out + e * stride;
    for (int64_t c = 0; c < channels; ++c) {
      const T value = exponential(from[c] - less[c]);
      to[c] = value;
      sum[c] += value;
    }
  }
};

template <class T>
struct DivideRow {
  static constexpr int kWidth = 0;
  const T* total;
  T* out;
  int64_t channels;
  GEOSSL_INLINE void operator()(int64_t e, int64_t s) const {
    const T* GEOSSL_RESTRICT by = total + s * channels;
    T* GEOSSL_RESTRICT to = out + e * channels;
    for (int64_t c = 0; c < channels; ++c) to[c] /= by[c];
  }
};

// `largest` [size, channels] holds the maxima of segments with rows (`seen`). With `normalize`, `out` [rows, channels] becomes the softmax and
// `total` [size, channels] is scratch; without, `total` becomes the logarithm of the sums and `out` is a row of scratch.
template <class T>
GEOSSL_INLINE void exponentials(const Rows<T>& r, int64_t s0, int64_t s1, T* largest, T* total, const uint8_t* seen, T* out, bool normalize) {
  const int64_t begin = s0 * r.channels, end = s1 * r.channels;
  std::fill(total + begin, total + end, T(0));
  if (!normalize) {  // as torch.logsumexp does: an infinite maximum is not subtracted
    for (int64_t s = s0; s < s1; ++s)
      for (int64_t i = s * r.channels; i < (s + 1) * r.channels; ++i)
        if (!seen[s] || std::isinf(largest[i])) largest[i] = T(0);
  }
  r.each(s0, s1, total, AddExponential<T>{r.x, largest, total, out, r.channels, normalize ? r.channels : 0});
  if (normalize) {
    r.each(s0, s1, total, DivideRow<T>{total, out, r.channels});
    if (r.index && s0 == 0)
      for (int64_t e = 0; e < r.rows; ++e)
        if (r.index[e] < 0) std::fill(out + e * r.channels, out + (e + 1) * r.channels, T(0));
  } else {
    for (int64_t i = begin; i < end; ++i) total[i] = largest[i] + logarithm(total[i]);
  }
}

// Instruction sets are chosen for functions, not for templates; see GEOSSL_SIMD.
#define FOR_TYPE(SIMD, T, A)                                                                                                              \
  SIMD void sum_of(const Rows<T>& r, int64_t s0, int64_t s1, T* out, int64_t* count) { sum(r, s0, s1, out, count); }                      \
  SIMD void extreme_of(const Rows<T>& r, int64_t s0, int64_t s1, T sign, T* out, A* arg, uint8_t* seen) {                                 \
    extreme(r, s0, s1, sign, out, arg, seen);                                                                                             \
  }                                                                                                                                       \
  SIMD void exponentials_of(const Rows<T>& r, int64_t s0, int64_t s1, T* largest, T* total, const uint8_t* seen, T* out, bool normalize) { \
    exponentials(r, s0, s1, largest, total, seen, out, normalize);                                                                        \
  }
FOR_TYPE(GEOSSL_SIMD, float, int32_t)
FOR_TYPE(, double, int64_t)
#undef FOR_TYPE

bool valid(int64_t rows, int64_t channels, const int64_t* index, const int64_t* splits, int64_t size) {
  if (rows < 0 || channels < 0 || size < 0) return false;
  if (!splits) return in_range(index, rows, size);
  if (!std::is_sorted(splits, splits + size + 1)) return false;
  if (!index) return splits[0] == 0 && splits[size] == rows;
  return splits[0] == 0 && splits[size] <= rows;  // rows that are in no range of segments are passed over
}

// Calls f(s0, s1) on ranges of segments; of equally many rows, where splits tell how many there are.
template <class T, class F>
void split_segments(int threads, const Rows<T>& r, F&& f) {
  const int64_t bytes = r.rows * r.channels * static_cast<int64_t>(sizeof(T));
  const int64_t pieces = std::clamp<int64_t>(r.size, 1, pieces_of(threads, bytes, kBytesPerThread));
  const auto begin = [&](int64_t piece) {
    if (!r.splits || piece == 0 || piece == pieces) return piece * r.size / pieces;
    return std::lower_bound(r.splits, r.splits + r.size, piece * r.splits[r.size] / pieces) - r.splits;
  };
  parallel_for(threads, pieces, 1, [&](int64_t p0, int64_t p1) { f(begin(p0), begin(p1)); });
}

template <class T>
std::unique_ptr<T[]> scratch(int64_t count) {
  return std::unique_ptr<T[]>(new T[static_cast<size_t>(count)]);
}

}  // namespace
}  // namespace geossl

// See geossl/ops/segments.py for the arguments of all.
GEOSSL_API int geossl_segment_sum_cpu(int threads, int is_double, const void* x, int64_t rows, int64_t channels, const int64_t* index,
                                      const int64_t* splits, const int64_t* order, int64_t size, void* out, int64_t* count) {
  using namespace geossl;
  if (!valid(rows, channels, index, splits, size)) return GEOSSL_INVALID_ARGUMENT;
  return for_type(is_double, [&](auto zero) {
    using T = decltype(zero);
    const Rows<T> r{static_cast<const T*>(x), rows, channels, index, splits, order, size};
    split_segments(threads, r, [&](int64_t s0, int64_t s1) { sum_of(r, s0, s1, static_cast<T*>(out), count); });
    return int{GEOSSL_OK};
  });
}
GEOSSL_PACKED(geossl_segment_sum_cpu)

GEOSSL_API int geossl_segment_extreme_cpu(int threads, int is_double, const void* x, int64_t rows, int64_t channels, const int64_t* index,
                                          const int64_t* splits, const int64_t* order, int64_t size, int largest, double fill, void* out,
                                          int64_t* arg) {
  using namespace geossl;
  if (!valid(rows, channels, index, splits, size)) return GEOSSL_INVALID_ARGUMENT;
  if (rows > std::numeric_limits<int32_t>::max() && arg && !is_double) return GEOSSL_TOO_LARGE;
  return for_type(is_double, [&](auto zero) {
    using T = decltype(zero);
    const Rows<T> r{static_cast<const T*>(x), rows, channels, index, splits, order, size};
    const auto seen = scratch<uint8_t>(size);
    const auto narrow = scratch<Bits<T>>(arg ? size * channels : 0);  // row numbers as wide as T
    T* values = static_cast<T*>(out);
    split_segments(threads, r, [&](int64_t s0, int64_t s1) {
      extreme_of(r, s0, s1, largest ? T(1) : T(-1), values, arg ? narrow.get() : nullptr, seen.get());
      for (int64_t s = s0; s < s1; ++s) {
        if (!seen[s]) std::fill(values + s * channels, values + (s + 1) * channels, static_cast<T>(fill));
        for (int64_t i = s * channels; arg && i < (s + 1) * channels; ++i) arg[i] = seen[s] ? narrow[i] : -1;
      }
    });
    return int{GEOSSL_OK};
  });
}
GEOSSL_PACKED(geossl_segment_extreme_cpu)

GEOSSL_API int geossl_segment_softmax_cpu(int threads, int is_double, const void* x, int64_t rows, int64_t channels, const int64_t* index,
                                          const int64_t* splits, const int64_t* order, int64_t size, void* out) {
  using namespace geossl;
  if (!valid(rows, channels, index, splits, size)) return GEOSSL_INVALID_ARGUMENT;
  return for_type(is_double, [&](auto zero) {
    using T = decltype(zero);
    const Rows<T> r{static_cast<const T*>(x), rows, channels, index, splits, order, size};
    const auto largest = scratch<T>(size * channels), total = scratch<T>(size * channels);
    const auto seen = scratch<uint8_t>(size);
    T* to = static_cast<T*>(out);
    if (size == 0) std::fill(to, to + rows * channels, T(0));
    split_segments(threads, r, [&](int64_t s0, int64_t s1) {
      extreme_of(r, s0, s1, T(1), largest.get(), static_cast<Bits<T>*>(nullptr), seen.get());
      exponentials_of(r, s0, s1, largest.get(), total.get(), seen.get(), to, true);
    });
    return int{GEOSSL_OK};
  });
}
GEOSSL_PACKED(geossl_segment_softmax_cpu)

GEOSSL_API int geossl_segment_logsumexp_cpu(int threads, int is_double, const void* x, int64_t rows, int64_t channels, const int64_t* index,
                                            const int64_t* splits, const int64_t* order, int64_t size, void* out) {
  using namespace geossl;
  if (!valid(rows, channels, index, splits, size)) return GEOSSL_INVALID_ARGUMENT;
  return for_type(is_double, [&](auto zero) {
    using T = decltype(zero);
    const Rows<T> r{static_cast<const T*>(x), rows, channels, index, splits, order, size};
    const auto largest = scratch<T>(size * channels);
    const auto seen = scratch<uint8_t>(size);
    split_segments(threads, r, [&](int64_t s0, int64_t s1) {
      extreme_of(r, s0, s1, T(1), largest.get(), static_cast<Bits<T>*>(nullptr), seen.get());
      const auto row = scratch<T>(channels);
      exponentials_of(r, s0, s1, largest.get(), static_cast<T*>(out), seen.get(), row.get(), false);
    });
    return int{GEOSSL_OK};
  });
}
GEOSSL_PACKED(geossl_segment_logsumexp_cpu)
