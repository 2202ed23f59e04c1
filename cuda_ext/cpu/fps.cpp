// Farthest point sampling on the CPU. The cloud is kept as arrays x, y, z and the distance to the nearest pick, as integer bits.
#include <algorithm>
#include <cstring>

#include "points.h"
#include "select.h"
#include "tree.h"

namespace geossl {
namespace {

constexpr int64_t kLanes = 64;  // arrays are padded to this many points, so that loops have no remainder

// Lowers the distances of n points (a multiple of kLanes) by a new pick and returns the largest.
template <class T>
GEOSSL_INLINE Bits<T> lower_distances(const T* GEOSSL_RESTRICT x, const T* GEOSSL_RESTRICT y, const T* GEOSSL_RESTRICT z,
                                      Bits<T>* GEOSSL_RESTRICT nearest, int64_t n, T px, T py, T pz) {
  Bits<T> largest = std::numeric_limits<Bits<T>>::min();
  for (int64_t i = 0; i < n; ++i) {
    const Bits<T> distance = to_bits(squared(x[i] - px, y[i] - py, z[i] - pz));
    const Bits<T> lower = distance < nearest[i] ? distance : nearest[i];
    nearest[i] = lower;
    largest = largest < lower ? lower : largest;
  }
  return largest;
}

// The first of n values that equals `wanted`, which is among them.
template <class B>
GEOSSL_INLINE int64_t find_first(const B* values, int64_t n, B wanted) {
  for (int64_t begin = 0; begin < n; begin += kLanes) {
    B found = 0;
    for (int64_t i = begin; i < begin + kLanes; ++i) found |= static_cast<B>(values[i] == wanted);
    if (found)
      for (int64_t i = begin;; ++i)
        if (values[i] == wanted) return i;
  }
  return -1;
}

// Picks position after position, each the farthest from all before it, until k are picked or none is left; returns how many.
template <class T>
GEOSSL_INLINE int64_t sample_all_steps(const Soa<T>& p, Bits<T>* nearest, int64_t n, T px, T py, T pz, int64_t k, int32_t* picks) {
  for (int64_t step = 0; step < k; ++step) {
    const Bits<T> largest = lower_distances(p.x, p.y, p.z, nearest, n, px, py, pz);
    if (largest < 0) return step;
    if (largest == 0) {  // all that is left coincides with picks: it follows in index order
      for (int64_t i = 0; i < n && step < k; ++i)
        if (nearest[i] == 0) picks[step++] = static_cast<int32_t>(i);
      return step;
    }
    const int64_t best = find_first(nearest, n, largest);
    picks[step] = static_cast<int32_t>(best);
    nearest[best] = to_bits(T(-1));
    px = p.x[best], py = p.y[best], pz = p.z[best];
  }
  return k;
}

GEOSSL_SIMD int64_t sample_steps(const Soa<float>& p, int32_t* nearest, int64_t n, float px, float py, float pz, int64_t k, int32_t* picks) {
  return sample_all_steps(p, nearest, n, px, py, pz, k, picks);
}
int64_t sample_steps(const Soa<double>& p, int64_t* nearest, int64_t n, double px, double py, double pz, int64_t k, int32_t* picks) {
  return sample_all_steps(p, nearest, n, px, py, pz, k, picks);
}

// Large clouds are cut into buckets of neighbouring points. A pick whose distance from a bucket's box is not less than the largest distance
// inside changes nothing there. Rounding is monotonic, so the distance from the box is never more than that from a point inside, computed
// the same way: the picks are exactly those of the plain loop.
constexpr int64_t kBucket = 128;

template <class T>
struct Buckets {
  Soa<T> points;            // bucket after bucket, in index order inside, each padded to whole vectors
  Bits<T>* nearest;         // as in the plain loop
  const int32_t* id;        // row of each point
  const int32_t* begin;     // first slot of each bucket, and the end
  int64_t slots, count;     // the number of buckets is a multiple of 16, the last ones empty
  const T *low[3], *high[3];
  Bits<T>* largest;         // distance inside, -1 when nothing is left
  int32_t* farthest;        // slot of the first point with that distance, -1 while unknown
  Bits<T>* test;            // scratch
  int32_t* chosen;          // scratch
};

// Chooses the buckets that a pick may change.
template <class T>
GEOSSL_INLINE int64_t choose_touched(const Buckets<T>& b, T px, T py, T pz) {
  Bits<T>* GEOSSL_RESTRICT test = b.test;
  const T pick[3] = {px, py, pz};
  for (int64_t i = 0; i < b.count; ++i) {
    T gap[3];
    GEOSSL_UNROLL(3)
    for (int a = 0; a < 3; ++a) {
      const T below = b.low[a][i] - pick[a], above = pick[a] - b.high[a][i];
      const T outside = below > above ? below : above;
      gap[a] = outside > T(0) ? outside : T(0);
    }
    test[i] = to_bits(squared(gap[0], gap[1], gap[2])) - b.largest[i];
  }
  return indices_up_to(test, b.count, Bits<T>(-1), b.chosen);
}

// Chooses the buckets that hold the largest distance of all, and returns it.
template <class T>
GEOSSL_INLINE Bits<T> choose_farthest(const Buckets<T>& b, int64_t& chosen) {
  Bits<T> best = -1;
  for (int64_t i = 0; i < b.count; ++i) best = b.largest[i] > best ? b.largest[i] : best;
  Bits<T>* GEOSSL_RESTRICT test = b.test;
  for (int64_t i = 0; i < b.count; ++i) test[i] = best - b.largest[i];
  chosen = indices_up_to(test, b.count, Bits<T>(0), b.chosen);
  return best;
}

template <class T>
GEOSSL_INLINE int64_t sample_bucket_steps(const Buckets<T>& b, T px, T py, T pz, int64_t k, int32_t* picks) {
  for (int64_t step = 0; step < k; ++step) {
    int64_t chosen = choose_touched(b, px, py, pz);
    for (int64_t c = 0; c < chosen; ++c) {
      const int64_t i = b.chosen[c], begin = b.begin[i], n = b.begin[i + 1] - begin;
      const Bits<T> largest = lower_distances(b.points.x + begin, b.points.y + begin, b.points.z + begin, b.nearest + begin, n, px, py, pz);
      b.largest[i] = largest < 0 ? Bits<T>(-1) : largest;
      b.farthest[i] = -1;
    }
    const Bits<T> best = choose_farthest(b, chosen);
    if (best < 0) return step;
    if (best == 0) {  // all that is left coincides with picks: it follows in index order
      int64_t left = 0;
      for (int64_t slot = 0; slot < b.slots; ++slot)
        if (b.nearest[slot] == 0) b.chosen[left++] = b.id[slot];
      std::sort(b.chosen, b.chosen + left);
      left = std::min(left, k - step);
      std::copy(b.chosen, b.chosen + left, picks + step);
      return step + left;
    }
    int32_t slot = -1;
    for (int64_t c = 0; c < chosen; ++c) {  // equal distances go to the lowest row, wherever its bucket is
      const int32_t i = b.chosen[c];
      if (b.farthest[i] < 0) b.farthest[i] = b.begin[i] + static_cast<int32_t>(find_first(b.nearest + b.begin[i], b.begin[i + 1] - b.begin[i], best));
      if (slot < 0 || b.id[b.farthest[i]] < b.id[slot]) slot = b.farthest[i];
    }
    picks[step] = b.id[slot];
    b.nearest[slot] = to_bits(T(-1));  // its own bucket is touched in the next step, as the pick lies in its box
    px = b.points.x[slot], py = b.points.y[slot], pz = b.points.z[slot];
  }
  return k;
}
GEOSSL_SIMD int64_t sample_buckets(const Buckets<float>& b, float px, float py, float pz, int64_t k, int32_t* picks) {
  return sample_bucket_steps(b, px, py, pz, k, picks);
}
int64_t sample_buckets(const Buckets<double>& b, double px, double py, double pz, int64_t k, int32_t* picks) {
  return sample_bucket_steps(b, px, py, pz, k, picks);
}

struct Options {
  const uint8_t* mask;  // of this cloud, may be null
  int64_t start;
  double min_sq_norm;  // negative: none
};

template <class T>
struct Memory {
  Scratch<T> x, y, z;
  Scratch<Bits<T>> nearest;
  Scratch<int32_t> id, picks;
};

// Cuts n points into buckets and samples those, writing rows.
template <class T>
int64_t sample_in_buckets(const Soa<T>& p, const int32_t* id, int64_t n, const T* start, int64_t k, int threads, int32_t* picks) {
  std::vector<int32_t> order(static_cast<size_t>(n));
  const std::vector<int32_t> ends = spatial_order(p, n, kBucket, order.data(), threads);
  const auto buckets = static_cast<int64_t>(ends.size()), count = (buckets + 15) / 16 * 16, capacity = n + buckets * kLanes;
  Scratch<T> x, y, z;
  Scratch<Bits<T>> nearest, largest, test;
  Scratch<int32_t> rows, begin, farthest, chosen;
  Boxes<T> boxes(count);
  Buckets<T> b{{x.get(capacity), y.get(capacity), z.get(capacity)}, nearest.get(capacity), nullptr, nullptr, 0, count, {}, {},
               largest.get(count), farthest.get(count), test.get(count), chosen.get(capacity + 16)};
  int32_t *row = rows.get(capacity), *first = begin.get(count + 1), slot = 0;
  for (int64_t i = 0, from = 0; i < count; ++i) {
    first[i] = slot;
    const int64_t end = i < buckets ? ends[static_cast<size_t>(i)] : from;
    std::sort(order.begin() + from, order.begin() + end);
    b.largest[i] = from < end ? to_bits(std::numeric_limits<T>::infinity()) : Bits<T>(-1);
    b.farthest[i] = -1;
    for (; from < end; ++from, ++slot) {
      const int32_t point = order[static_cast<size_t>(from)];
      const T corner[3] = {p.x[point], p.y[point], p.z[point]};
      b.points.x[slot] = corner[0], b.points.y[slot] = corner[1], b.points.z[slot] = corner[2];
      row[slot] = id[point];
      b.nearest[slot] = to_bits(std::numeric_limits<T>::infinity());
      boxes.include(i, corner, corner, row[slot], 1);
    }
    for (; slot % kLanes; ++slot) {
      b.points.x[slot] = b.points.y[slot] = b.points.z[slot] = T(0);
      b.nearest[slot] = to_bits(T(-1));
      row[slot] = -1;
    }
  }
  first[count] = slot;
  b.id = row, b.begin = first, b.slots = slot;
  GEOSSL_UNROLL(3)
  for (int a = 0; a < 3; ++a) b.low[a] = boxes.low[a].data(), b.high[a] = boxes.high[a].data();
  return sample_buckets(b, start[0], start[1], start[2], k, picks);
}

// Whether buckets take less time than updating every point at every step; measured on one core with AVX-512.
bool buckets_pay(int64_t n, int64_t k) {
  if (n > kMaxCloud / 2) return false;  // with their padding, slots would not fit int32
  const auto points = static_cast<double>(n), picks = static_cast<double>(k);
  return picks * 0.14 * points > 60 * points + picks * (400 + 0.02 * points);
}

template <class T>
bool valid(const T* p) {
  return finite(p[0]) && finite(p[1]) && finite(p[2]);
}

// The start, or the next row after it, going round, that is finite and not masked; -1 if there is none.
template <class T>
int64_t first_pick(const T* points, int64_t n, const Options& options) {
  const int64_t start = options.start >= 0 && options.start < n ? options.start : 0;
  for (int64_t step = 0; step < n; ++step) {
    const int64_t i = start + step < n ? start + step : start + step - n;
    if (valid(points + 3 * i) && (!options.mask || options.mask[i])) return i;
  }
  return -1;
}

// Copies the points that may be picked after `first`, in order, and their row numbers; returns how many.
template <class T>
int64_t load(const T* points, int64_t n, const Options& options, int64_t first, Soa<T> to, int32_t* id) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    const T *p = points + 3 * i, x = p[0], y = p[1], z = p[2];
    to.x[count] = x, to.y[count] = y, to.z[count] = z, id[count] = static_cast<int32_t>(i);
    // (x - x) is 0 for finite numbers only.
    bool keep = (x - x) + (y - y) + (z - z) == T(0) && i != first;
    if (options.mask) keep = keep && options.mask[i];
    if (options.min_sq_norm >= 0) keep = keep && static_cast<double>(squared(x, y, z)) > options.min_sq_norm;
    count += keep;
  }
  return count;
}

// Samples n points by the plain loop, writing rows.
template <class T>
int64_t sample_plainly(const Soa<T>& p, const int32_t* id, int64_t n, const T* start, int64_t k, Bits<T>* nearest, int32_t* picks) {
  const int64_t padded = (n + kLanes - 1) / kLanes * kLanes;
  std::fill(nearest, nearest + n, to_bits(std::numeric_limits<T>::infinity()));
  std::fill(nearest + n, nearest + padded, to_bits(T(-1)));
  for (T* axis : {p.x, p.y, p.z}) std::fill(axis + n, axis + padded, T(0));
  const int64_t found = sample_steps(p, nearest, padded, start[0], start[1], start[2], k, picks);
  for (int64_t i = 0; i < found; ++i) picks[i] = id[picks[i]];
  return found;
}

template <class T>
void sample_cloud(const T* points, int64_t n, int64_t k, const Options& options, int64_t base, int threads, Memory<T>& memory, int64_t* out) {
  const int64_t first = n > 0 && k > 0 ? first_pick(points, n, options) : -1;
  if (first < 0) {
    std::fill(out, out + k, int64_t{-1});
    return;
  }
  const int64_t wanted = std::min(k, n) - 1, capacity = n + kLanes;
  const Soa<T> p{memory.x.get(capacity), memory.y.get(capacity), memory.z.get(capacity)};
  int32_t *id = memory.id.get(capacity), *picks = memory.picks.get(wanted + 1);
  const int64_t count = load(points, n, options, first, p, id);
  const T* start = points + 3 * first;
  const int64_t found = buckets_pay(count, wanted) ? sample_in_buckets(p, id, count, start, wanted, threads, picks)
                                                   : sample_plainly(p, id, count, start, wanted, memory.nearest.get(capacity), picks);
  out[0] = base + first;
  for (int64_t i = 0; i < found; ++i) out[1 + i] = base + picks[i];
  std::fill(out + 1 + found, out + k, options.min_sq_norm >= 0 ? base + first : int64_t{-1});
}

}  // namespace
}  // namespace geossl

// See geossl/ops/fps.py for the arguments; `out_offsets` (packed) says how many points each cloud gives and where they go.
GEOSSL_API int geossl_fps_cpu(int threads, int is_double, const void* points, const int64_t* offsets, const int64_t* lengths, int64_t batch,
                              int64_t n, const int64_t* out_offsets, int64_t k, int64_t start, const int64_t* starts, const uint8_t* mask,
                              double min_sq_norm, void*, int64_t* out) {
  using namespace geossl;
  const Clouds clouds{offsets, lengths, batch, n};
  if (batch < 0 || n < 0 || k < 0) return GEOSSL_INVALID_ARGUMENT;
  if (!clouds_fit(clouds)) return GEOSSL_TOO_LARGE;
  return for_type(is_double, [&](auto zero) {
    using T = decltype(zero);
    int64_t work = 1;
    for (int64_t b = 0; b < batch; ++b) work += clouds.size(b) * (out_offsets ? out_offsets[b + 1] - out_offsets[b] : k);
    const int inside = static_cast<int>(std::max<int64_t>(1, threads / std::max<int64_t>(batch, 1)));  // of those for each cloud
    // A thread is worth starting for about a million distances.
    parallel_for(threads, batch, std::max<int64_t>(1, (int64_t{1} << 20) * batch / work), [&](int64_t b0, int64_t b1) {
      Memory<T> memory;
      for (int64_t b = b0; b < b1; ++b) {
        const int64_t row = clouds.begin(b);
        const Options options{mask ? mask + row : nullptr, starts ? starts[b] : start, min_sq_norm};
        const int64_t count = out_offsets ? out_offsets[b + 1] - out_offsets[b] : k;
        sample_cloud(static_cast<const T*>(points) + 3 * row, clouds.size(b), count, options, clouds.index_base(b), inside, memory,
                     out + (out_offsets ? out_offsets[b] : b * k));
      }
    });
    return int{GEOSSL_OK};
  });
}
GEOSSL_PACKED(geossl_fps_cpu)
