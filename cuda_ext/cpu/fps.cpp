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
//
// Picks are made in rounds. All buckets are brought up to date with the picks of the last round, each thread its share; then one thread
// picks on, as long as it can without looking at many buckets again. Largest distances that are out of date are too large, never too small:
// the largest of all, where no pick of the round has come nearer to its point, is the next pick whatever happened elsewhere.
constexpr int64_t kBucket = 128, kRound = 16, kStale = 8;
constexpr int64_t kGroup = 16, kShare = kGroup * kGroup;  // buckets in one box above theirs, buckets that a thread takes at a time

// Boxes, and the largest distance inside each, -1 when nothing is left.
template <class T>
struct Level {
  T *low[3], *high[3];
  Bits<T>* largest;
};

template <class T>
struct Buckets {
  Soa<T> points;          // bucket after bucket, each padded to whole vectors
  Bits<T>* nearest;       // as in the plain loop
  int32_t* row;           // of each point
  const int32_t* begin;   // first slot of each bucket, and the end
  int64_t slots, count;   // the number of buckets is a multiple of kShare, the last ones empty
  Level<T> bucket, group;
  int32_t* farthest;      // slot of the point with a bucket's largest distance, of several the one of the lowest row; -1 while unknown
};

// The picks of a round.
template <class T>
struct Round {
  T x[kRound], y[kRound], z[kRound];
  int64_t count = 0;
  void add(T px, T py, T pz) { x[count] = px, y[count] = py, z[count++] = pz; }
};

template <class T>
GEOSSL_INLINE void lower_bucket(const Buckets<T>& b, int64_t i, T px, T py, T pz) {
  const int64_t begin = b.begin[i], n = b.begin[i + 1] - begin;
  const Bits<T> largest = lower_distances(b.points.x + begin, b.points.y + begin, b.points.z + begin, b.nearest + begin, n, px, py, pz);
  b.bucket.largest[i] = largest < 0 ? Bits<T>(-1) : largest;
  b.farthest[i] = -1;
}

template <class T>
GEOSSL_INLINE void update_group(const Buckets<T>& b, int64_t group) {
  Bits<T> largest = -1;
  for (int64_t i = group * kGroup; i < (group + 1) * kGroup; ++i) largest = b.bucket.largest[i] > largest ? b.bucket.largest[i] : largest;
  b.group.largest[group] = largest;
}

// Which of the boxes begin .. begin + 15 a pick may change.
template <class T>
GEOSSL_INLINE int64_t choose_touched(const Level<T>& boxes, int64_t begin, T px, T py, T pz, int32_t* chosen) {
  const T pick[3] = {px, py, pz};
  Bits<T> test[kGroup];
  for (int64_t i = 0; i < kGroup; ++i) {
    T gap[3];
    GEOSSL_UNROLL(3)
    for (int a = 0; a < 3; ++a) {
      const T below = boxes.low[a][begin + i] - pick[a], above = pick[a] - boxes.high[a][begin + i];
      const T outside = below > above ? below : above;
      gap[a] = outside > T(0) ? outside : T(0);
    }
    test[i] = to_bits(squared(gap[0], gap[1], gap[2])) - boxes.largest[begin + i];
  }
  return indices_up_to(test, kGroup, Bits<T>(-1), chosen);
}

// Brings a share of the buckets up to date with the picks of a round.
template <class T>
GEOSSL_INLINE void lower_share(const Buckets<T>& b, const Round<T>& round, int64_t share) {
  int32_t groups[2 * kGroup], buckets[2 * kGroup];
  for (int64_t p = 0; p < round.count; ++p) {
    const T x = round.x[p], y = round.y[p], z = round.z[p];
    const int64_t touched = choose_touched(b.group, share * kGroup, x, y, z, groups);
    for (int64_t g = 0; g < touched; ++g) {
      const int64_t group = share * kGroup + groups[g];
      const int64_t count = choose_touched(b.bucket, group * kGroup, x, y, z, buckets);
      for (int64_t c = 0; c < count; ++c) lower_bucket(b, group * kGroup + buckets[c], x, y, z);
      update_group(b, group);
    }
  }
}

// The slot of the point in bucket i with its largest distance, of several the one of the lowest row.
template <class T>
GEOSSL_INLINE int32_t find_farthest(const Buckets<T>& b, int64_t i) {
  const Bits<T> wanted = b.bucket.largest[i];
  int32_t lowest = std::numeric_limits<int32_t>::max();
  for (int64_t slot = b.begin[i]; slot < b.begin[i + 1]; ++slot) {
    const int32_t row = b.nearest[slot] == wanted ? b.row[slot] : std::numeric_limits<int32_t>::max();
    lowest = row < lowest ? row : lowest;
  }
  return b.begin[i] + static_cast<int32_t>(find_first(b.row + b.begin[i], b.begin[i + 1] - b.begin[i], lowest));
}

// The bucket of the farthest point; equal distances go to the lowest row, wherever its bucket is.
template <class T>
GEOSSL_INLINE int64_t find_bucket(const Buckets<T>& b, Bits<T> best) {
  int64_t found = -1;
  for (int64_t group = 0; group < b.count / kGroup; ++group) {
    if (b.group.largest[group] != best) continue;
    for (int64_t i = group * kGroup; i < (group + 1) * kGroup; ++i) {
      if (b.bucket.largest[i] != best) continue;
      if (b.farthest[i] < 0) b.farthest[i] = find_farthest(b, i);
      if (found < 0 || b.row[b.farthest[i]] < b.row[b.farthest[found]]) found = i;
    }
  }
  return found;
}

// Writes up to k rows of points that coincide with picks, in order, and returns how many there are.
template <class T>
int64_t pick_coinciding(const Buckets<T>& b, int64_t k, int32_t* picks) {
  std::vector<int32_t> rows;
  for (int64_t slot = 0; slot < b.slots; ++slot)
    if (b.nearest[slot] == 0) rows.push_back(b.row[slot]);
  const auto count = std::min<int64_t>(k, static_cast<int64_t>(rows.size()));
  std::partial_sort(rows.begin(), rows.begin() + count, rows.end());
  std::copy(rows.begin(), rows.begin() + count, picks);
  return count;
}

// Makes a round of picks, up to k, from distances that are up to date, and returns how many, 0 when only coinciding points are left.
template <class T>
GEOSSL_INLINE int64_t pick_some(const Buckets<T>& b, Round<T>& round, int64_t k, int32_t* picks) {
  round.count = 0;
  for (int64_t stale = 0; round.count < std::min(kRound, k);) {
    Bits<T> best = -1;
    for (int64_t group = 0; group < b.count / kGroup; ++group) best = b.group.largest[group] > best ? b.group.largest[group] : best;
    if (best <= 0) break;
    const int64_t bucket = find_bucket(b, best), slot = b.farthest[bucket];
    const T x = b.points.x[slot], y = b.points.y[slot], z = b.points.z[slot];
    bool nearer = false;
    for (int64_t p = 0; p < round.count; ++p) nearer |= to_bits(squared(x - round.x[p], y - round.y[p], z - round.z[p])) < best;
    if (nearer) {
      if (++stale > kStale) break;
      for (int64_t p = 0; p < round.count; ++p) lower_bucket(b, bucket, round.x[p], round.y[p], round.z[p]);
    } else {
      picks[round.count] = b.row[slot];
      round.add(x, y, z);
      b.nearest[slot] = to_bits(T(-1));
      lower_bucket(b, bucket, x, y, z);
    }
    update_group(b, bucket / kGroup);
  }
  return round.count;
}

GEOSSL_SIMD void lower_buckets(const Buckets<float>& b, const Round<float>& round, int64_t share) { lower_share(b, round, share); }
void lower_buckets(const Buckets<double>& b, const Round<double>& round, int64_t share) { lower_share(b, round, share); }
GEOSSL_SIMD int64_t pick_round(const Buckets<float>& b, Round<float>& round, int64_t k, int32_t* picks) { return pick_some(b, round, k, picks); }
int64_t pick_round(const Buckets<double>& b, Round<double>& round, int64_t k, int32_t* picks) { return pick_some(b, round, k, picks); }

template <class T>
int64_t sample_buckets(const Buckets<T>& b, const T* start, int64_t k, Helpers& helpers, int32_t* picks) {
  Round<T> round;
  round.add(start[0], start[1], start[2]);
  int64_t found = 0;
  while (found < k) {
    helpers.share(b.count / kShare, [&](int64_t share) { lower_buckets(b, round, share); });
    const int64_t more = pick_round(b, round, k - found, picks + found);
    if (more == 0) return found + pick_coinciding(b, k - found, picks + found);
    found += more;
  }
  return found;
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

// Copies the points of bucket i, whose rows begin at `row`, and sets its box.
template <class T>
void fill_bucket(const Buckets<T>& b, int64_t i, const T* points, const int32_t* row, int64_t n) {
  const int64_t begin = b.begin[i], end = b.begin[i + 1];
  const T infinity = std::numeric_limits<T>::infinity();
  T *x = b.points.x, *y = b.points.y, *z = b.points.z, low[3] = {infinity, infinity, infinity}, high[3] = {-infinity, -infinity, -infinity};
  for (int64_t j = 0; j < n; ++j) {
    const T* p = points + 3 * int64_t{row[j]};
    x[begin + j] = p[0], y[begin + j] = p[1], z[begin + j] = p[2];
    b.row[begin + j] = row[j];
    GEOSSL_UNROLL(3)
    for (int a = 0; a < 3; ++a) {
      low[a] = p[a] < low[a] ? p[a] : low[a];
      high[a] = p[a] > high[a] ? p[a] : high[a];
    }
  }
  for (T* axis : {x, y, z}) std::fill(axis + begin + n, axis + end, T(0));
  std::fill(b.row + begin + n, b.row + end, -1);
  std::fill(b.nearest + begin, b.nearest + begin + n, to_bits(infinity));
  std::fill(b.nearest + begin + n, b.nearest + end, to_bits(T(-1)));
  for (int a = 0; a < 3; ++a) b.bucket.low[a][i] = low[a], b.bucket.high[a][i] = high[a];
  b.bucket.largest[i] = n > 0 ? to_bits(infinity) : Bits<T>(-1);
  b.farthest[i] = -1;
}

template <class T>
struct LevelMemory {
  Scratch<T> boxes;
  Scratch<Bits<T>> largest;
  Level<T> get(int64_t n) {
    T* box = boxes.get(6 * n);
    return {{box, box + n, box + 2 * n}, {box + 3 * n, box + 4 * n, box + 5 * n}, largest.get(n)};
  }
};

// Cuts the n points p, whose rows in `points` are `id`, into buckets and samples those, writing rows.
template <class T>
int64_t sample_in_buckets(const T* points, const Soa<T>& p, const int32_t* id, int64_t n, const T* start, int64_t k, int threads, int32_t* picks) {
  Scratch<int32_t> order_memory, row_memory, begin_memory, farthest;
  int32_t* order = order_memory.get(n);
  Helpers helpers(threads);
  const std::vector<int32_t> ends = spatial_order(p, n, kBucket, order, helpers);
  const auto buckets = static_cast<int64_t>(ends.size()), count = (buckets + kShare - 1) / kShare * kShare;
  int32_t* begin = begin_memory.get(count + 1);
  const auto first = [&](int64_t i) { return i == 0 ? 0 : ends[static_cast<size_t>(std::min(i, buckets) - 1)]; };
  begin[0] = 0;
  for (int64_t i = 0; i < count; ++i) begin[i + 1] = begin[i] + (first(i + 1) - first(i) + kLanes - 1) / kLanes * kLanes;
  const int64_t slots = begin[count];
  Scratch<T> x, y, z;
  Scratch<Bits<T>> nearest;
  LevelMemory<T> bucket, group;
  const Buckets<T> b{{x.get(slots), y.get(slots), z.get(slots)}, nearest.get(slots), row_memory.get(slots), begin, slots, count,
                     bucket.get(count), group.get(count / kGroup), farthest.get(count)};
  helpers.share(count / kShare, [&](int64_t share) {
    for (int64_t i = share * kShare; i < (share + 1) * kShare; ++i) {
      for (int64_t j = first(i); j < first(i + 1); ++j) order[j] = id[order[j]];
      fill_bucket(b, i, points, order + first(i), first(i + 1) - first(i));
    }
    for (int64_t g = share * kGroup; g < (share + 1) * kGroup; ++g) {
      for (int a = 0; a < 3; ++a) {
        b.group.low[a][g] = *std::min_element(b.bucket.low[a] + g * kGroup, b.bucket.low[a] + (g + 1) * kGroup);
        b.group.high[a][g] = *std::max_element(b.bucket.high[a] + g * kGroup, b.bucket.high[a] + (g + 1) * kGroup);
      }
      update_group(b, g);
    }
  });
  return sample_buckets(b, start, k, helpers, picks);
}

// Whether buckets take less time than updating every point at every step; measured on one core with AVX-512.
bool buckets_pay(int64_t n, int64_t k) {
  if (n > kMaxCloud / 2) return false;  // with their padding, slots would not fit int32
  const auto points = static_cast<double>(n), picks = static_cast<double>(k);
  return picks * 0.16 * points > 21 * points + picks * (300 + 0.008 * points);
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
  const int64_t found = buckets_pay(count, wanted) ? sample_in_buckets(points, p, id, count, start, wanted, threads, picks)
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
