// Voxel numbers of points. A key per point says where its cell stands in the order of voxels; keys become numbers by a table with one entry
// per possible key where that is not much longer than the cloud, else by a radix sort. Both are stable, so that the points of a voxel stay in
// order, and cut the rows into one piece per thread whose counts are added up in order: the result does not depend on the threads.
#include "voxels.h"

#include <cstring>

#include "points.h"

namespace geossl {
namespace {

constexpr int64_t kGrain = int64_t{1} << 15;  // rows a thread is worth starting for
constexpr int64_t kChunk = 512;               // points whose coordinates stay in the first-level cache
constexpr int64_t kTablePerRow = 4;           // keys per row up to which a table beats sorting
constexpr int64_t kSmallTable = 4096;
constexpr int64_t kAhead = 16;  // rows between asking for the place of a point and writing it
constexpr int kDigit = 11;  // bits a pass of the radix sort

// Calls f(cloud, begin, end of its points, end of its rows) on the parts of clouds that lie in [r0, r1).
template <class F>
void for_spans(const Clouds& clouds, int64_t r0, int64_t r1, F&& f) {
  if (r0 >= r1) return;
  for (int64_t b = clouds.cloud_of(r0); b < clouds.batch; ++b) {
    const int64_t begin = clouds.begin(b), end = b + 1 < clouds.batch ? clouds.begin(b + 1) : clouds.rows();
    if (begin >= r1) return;
    const int64_t from = std::max(begin, r0), to = std::min(end, r1);
    if (from < to) f(b, from, std::clamp(begin + clouds.size(b), from, to), to);
  }
}

// Bounds --------------------------------------------------------------------------------------------------------------------------------------

constexpr int kBlock = 16;  // rows looked at together

template <class T>
GEOSSL_INLINE void bounds_loop(const T* GEOSSL_RESTRICT rows, int64_t n, const Limits<T>& limits, T* bounds) {
  constexpr int kWidth = 3 * kBlock;
  T low[kWidth], high[kWidth], from[kWidth], to[kWidth];
  for (int j = 0; j < kWidth; ++j) {
    from[j] = limits.low[j % 3], to[j] = limits.high[j % 3];
    low[j] = std::numeric_limits<T>::infinity(), high[j] = -low[j];
  }
  const auto one = [&](const T* p) {
    bool kept = true;
    for (int axis = 0; axis < 3; ++axis) kept &= p[axis] >= limits.low[axis] && p[axis] <= limits.high[axis];
    if (!kept) return;
    for (int axis = 0; axis < 3; ++axis) low[axis] = std::min(low[axis], p[axis]), high[axis] = std::max(high[axis], p[axis]);
  };
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) {
    const T* p = rows + 3 * i;
    int wrong = 0;
    for (int j = 0; j < kWidth; ++j) wrong |= !(p[j] >= from[j]) | !(p[j] <= to[j]);
    if (wrong) {
      for (int row = 0; row < kBlock; ++row) one(p + 3 * row);
    } else {
      for (int j = 0; j < kWidth; ++j) low[j] = p[j] < low[j] ? p[j] : low[j], high[j] = p[j] > high[j] ? p[j] : high[j];
    }
  }
  for (; i < n; ++i) one(rows + 3 * i);
  for (int j = 0; j < kWidth; ++j) bounds[j % 3] = std::min(bounds[j % 3], low[j]), bounds[3 + j % 3] = std::max(bounds[3 + j % 3], high[j]);
}

GEOSSL_SIMD void bounds_of(const float* rows, int64_t n, const Limits<float>& limits, float* bounds) { bounds_loop(rows, n, limits, bounds); }
void bounds_of(const double* rows, int64_t n, const Limits<double>& limits, double* bounds) { bounds_loop(rows, n, limits, bounds); }

// Keys ----------------------------------------------------------------------------------------------------------------------------------------

struct KeyJob {
  const VoxelGrid* grid;
  const VoxelFrame* frame;
  const double* bounds;
  int64_t none;  // key of points that are dropped
  int order;
};

// The cell of up to kChunk coordinates relative to the lowest one; points outside the bounds are cleared from `kept`. A product with the
// rounded 1 / size is faster than a division and off by less than 2^-51 of itself: its cell is the same unless it is that close to a whole
// number, then the answer is true and the chunk is to be divided. With kDivide, divides and answers false.
template <bool kDivide, class T>
GEOSSL_INLINE bool cells_loop(const T* GEOSSL_RESTRICT p, int64_t n, int axis, const KeyJob& job, double* GEOSSL_RESTRICT cell,
                              int64_t* GEOSSL_RESTRICT kept) {
  const double low = job.bounds[axis], high = job.bounds[3 + axis], origin = job.grid->origin[axis], size = job.grid->size[axis];
  const double lowest = static_cast<double>(job.frame->low[axis]), inverse = 1 / size;
  int64_t worst = 0;  // largest distance of a product to the middle between whole numbers, as bits
  for (int64_t i = 0; i < n; ++i) {
    const double v = static_cast<double>(p[i]);
    const bool in = (v >= low) & (v <= high);
    kept[i] &= in ? -1 : 0;
    const double from = (in ? v : low) - origin;
    const double at = kDivide ? from / size : from * inverse, below = __builtin_floor(at);
    if constexpr (!kDivide) {
      const int64_t distance = to_bits(__builtin_fabs(at - below - 0.5));
      worst = distance > worst ? distance : worst;
    }
    cell[i] = below - lowest;
  }
  const double largest = std::max(__builtin_fabs(low - origin), __builtin_fabs(high - origin)) * inverse;
  return !kDivide && !(from_bits<double>(worst) < 0.5 - (largest * 0x1p-50 + 0x1p-50));
}

template <class T>
GEOSSL_INLINE void axis_cells(const T* p, int64_t n, int axis, const KeyJob& job, double* cell, int64_t* kept) {
  const double size = job.grid->size[axis];  // far from where 1 / size loses bits
  if (size < 0x1p-300 || size > 0x1p300 || cells_loop<false>(p, n, axis, job, cell, kept)) cells_loop<true>(p, n, axis, job, cell, kept);
}

template <class T, class Key>
GEOSSL_INLINE void keys_loop(const T* rows, int64_t n, const KeyJob& job, Key* GEOSSL_RESTRICT keys) {
  alignas(64) T part[3][kChunk];
  alignas(64) double cell[3][kChunk];
  alignas(64) int64_t kept[kChunk];
  for (int64_t i = 0; i < n; ++i) kept[i] = -1;
  for (int64_t i = 0; i < n; ++i) part[0][i] = rows[3 * i], part[1][i] = rows[3 * i + 1], part[2][i] = rows[3 * i + 2];
  for (int axis = 0; axis < 3; ++axis) axis_cells(part[axis], n, axis, job, cell[axis], kept);
  const VoxelFrame& f = *job.frame;
  if (job.order == kLexicographic) {
    const Key base = static_cast<Key>(f.base), none = static_cast<Key>(job.none), sx = static_cast<Key>(f.stride_x), sy = static_cast<Key>(f.stride_y);
    for (int64_t i = 0; i < n; ++i) {
      const Key key = base + ((static_cast<Key>(cell[0][i]) * sx + static_cast<Key>(cell[1][i]) * sy) + static_cast<Key>(cell[2][i]));
      keys[i] = kept[i] ? key : none;
    }
    return;
  }
  alignas(64) uint32_t x[kChunk], y[kChunk], z[kChunk], flip[kChunk];
  for (int64_t i = 0; i < n; ++i) {
    x[i] = static_cast<uint32_t>(static_cast<int32_t>(cell[0][i])), y[i] = static_cast<uint32_t>(static_cast<int32_t>(cell[1][i]));
    z[i] = static_cast<uint32_t>(static_cast<int32_t>(cell[2][i])), flip[i] = 0;
  }
  if (job.order == kHilbert) {  // as hilbert() of voxels.h, level by level so that points go side by side
    const uint32_t top = f.bits > 0 ? 1u << (f.bits - 1) : 0;
    for (uint32_t bit = top; bit > 1; bit >>= 1)
      for (int64_t i = 0; i < n; ++i) {
        hilbert_level(bit, x[i]);
        hilbert_level(bit, x[i], y[i]);
        hilbert_level(bit, x[i], z[i]);
      }
    for (int64_t i = 0; i < n; ++i) y[i] ^= x[i], z[i] ^= y[i];
    for (uint32_t bit = top; bit > 1; bit >>= 1)
      for (int64_t i = 0; i < n; ++i) flip[i] ^= hilbert_flip(bit, z[i]);
  }
  for (int64_t i = 0; i < n; ++i) {
    const auto place = static_cast<int64_t>(interleave(x[i] ^ flip[i], y[i] ^ flip[i], z[i] ^ flip[i]));
    keys[i] = static_cast<Key>(kept[i] ? f.base + place : job.none);
  }
}

GEOSSL_SIMD void chunk_keys(const float* rows, int64_t n, const KeyJob& job, int32_t* keys) { keys_loop(rows, n, job, keys); }
GEOSSL_SIMD void chunk_keys(const float* rows, int64_t n, const KeyJob& job, int64_t* keys) { keys_loop(rows, n, job, keys); }
void chunk_keys(const double* rows, int64_t n, const KeyJob& job, int32_t* keys) { keys_loop(rows, n, job, keys); }
void chunk_keys(const double* rows, int64_t n, const KeyJob& job, int64_t* keys) { keys_loop(rows, n, job, keys); }

// What one call works on. Only what reads coordinates asks for their type: all else would be compiled twice.
struct Job {
  const void* points;
  bool is_double;
  Clouds clouds;
  VoxelGrid grid;
  const double* bounds;       // six per cloud
  const VoxelFrame* frames;   // one per cloud
  int order, first;           // first: voxels are numbered by their first point
  int64_t total, cap;         // number of possible keys; points a voxel may keep
  int64_t rows;
  int pieces;
  Helpers* helpers;

  int64_t row_of(int64_t piece) const { return piece * rows / pieces; }

  template <class Key>
  void keys_of(int64_t row, int64_t n, const KeyJob& job, Key* keys) const {
    if (is_double) chunk_keys(static_cast<const double*>(points) + 3 * row, n, job, keys);
    else chunk_keys(static_cast<const float*>(points) + 3 * row, n, job, keys);
  }

  // Calls f(row, keys, count) on chunks of the rows of a piece; dropped rows and padding have the key `total`.
  template <class Key, class F>
  void each_chunk(int piece, F&& f) const {
    alignas(64) Key keys[kChunk];
    for_spans(clouds, row_of(piece), row_of(piece + 1), [&](int64_t b, int64_t begin, int64_t end, int64_t row_end) {
      if (!(bounds[6 * b] <= bounds[6 * b + 3])) end = begin;  // nothing is kept
      const KeyJob job{&grid, frames + b, bounds + 6 * b, total, order};
      for (int64_t row = begin; row < end; row += kChunk) {
        const int64_t n = std::min(kChunk, end - row);
        keys_of(row, n, job, keys);
        const int64_t bytes = 3 * (is_double ? 8 : 4);
        if (row + 2 * kChunk <= end)  // while f works, the next points come
          for (int64_t byte = (row + kChunk) * bytes; byte < (row + 2 * kChunk) * bytes; byte += 64)
            __builtin_prefetch(static_cast<const char*>(points) + byte, 0, 2);
        f(row, keys, n);
      }
      std::fill(keys, keys + kChunk, static_cast<Key>(total));
      for (int64_t row = end; row < row_end; row += kChunk) f(row, keys, std::min(kChunk, row_end - row));
    });
  }
};

struct Outputs {
  int32_t* coords;
  int64_t *inverse, *counts, *row_splits, *perm;
};

// By a table ------------------------------------------------------------------------------------------------------------------------------------

// Scratch: how many voxels and kept points lie in every piece's share of the keys; keys of all rows; keys of the voxels, each share's from where
// the share begins; then for every piece an entry per key and one for dropped rows.
struct ByTable {
  struct Entry {
    int32_t count, number;  // points of the piece, later where its next one goes; 1 + the voxel's number
  };
  struct Share {
    int64_t voxels, kept;
  };
  const Job& job;
  Share* shares;
  int32_t *keys, *occupied;
  Entry* table;

  static int64_t lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }
  static int64_t shares_bytes(const Job& job) { return lines(job.pieces * static_cast<int64_t>(sizeof(Share))); }
  static int64_t lists_bytes(const Job& job) { return shares_bytes(job) + lines(4 * job.rows) + lines(4 * job.total); }
  static int64_t bytes(const Job& job) { return lists_bytes(job) + job.pieces * (job.total + 1) * static_cast<int64_t>(sizeof(Entry)); }

  ByTable(const Job& j, void* scratch) : job(j) {
    auto* memory = static_cast<char*>(scratch);
    shares = reinterpret_cast<Share*>(memory);
    keys = reinterpret_cast<int32_t*>(memory + shares_bytes(j));
    occupied = reinterpret_cast<int32_t*>(memory + shares_bytes(j) + lines(4 * j.rows));
    table = reinterpret_cast<Entry*>(memory + lists_bytes(j));
  }

  int64_t key_of(int64_t piece) const { return piece * job.total / job.pieces; }
  Entry* of_piece(int piece) const { return table + piece * (job.total + 1); }

  int32_t count_of(int64_t key) const {
    int32_t count = table[key].count;
    for (int p = 1; p < job.pieces; ++p) count += of_piece(p)[key].count;
    return count;
  }

  void count(int64_t* voxels, int64_t* kept) const {
    job.helpers->share(job.pieces, [&](int64_t piece) {
      Entry* entries = of_piece(piece);
      std::memset(static_cast<void*>(entries), 0, static_cast<size_t>(job.total + 1) * sizeof(Entry));
      job.each_chunk<int32_t>(piece, [&](int64_t row, const int32_t* chunk, int64_t n) {
        std::memcpy(keys + row, chunk, static_cast<size_t>(n) * 4);
        for (int64_t i = 0; i < n; ++i) ++entries[chunk[i]].count;
      });
    });
    if (job.first) {
      Share all{0, 0};
      for (int64_t row = 0; row < job.rows; ++row) {
        Entry& entry = table[keys[row]];
        if (keys[row] == job.total || entry.number) continue;
        entry.number = 1;
        occupied[all.voxels++] = keys[row];
        all.kept += std::min<int64_t>(count_of(keys[row]), job.cap);
      }
      std::fill(shares, shares + job.pieces, Share{0, 0});
      shares[0] = all;
    } else {
      job.helpers->share(job.pieces, [&](int64_t piece) {
        Share share{0, 0};
        int32_t* list = occupied + key_of(piece);
        for (int64_t key = key_of(piece); key < key_of(piece + 1); ++key) {  // no branch: whether a cell is occupied cannot be guessed
          const int32_t n = count_of(key);
          list[share.voxels] = static_cast<int32_t>(key);
          share.voxels += n > 0;
          share.kept += std::min<int64_t>(n, job.cap);
        }
        shares[piece] = share;
      });
    }
    *voxels = *kept = 0;
    for (int p = 0; p < job.pieces; ++p) *voxels += shares[p].voxels, *kept += shares[p].kept;
  }

  // Numbers the voxels of a piece's share of the keys, and finds where the points of every piece go.
  void number(int piece, const Outputs& out) const {
    int64_t v = 0, start = 0;
    for (int p = 0; p < piece; ++p) v += shares[p].voxels, start += shares[p].kept;
    const int32_t* list = occupied + (job.first ? 0 : key_of(piece));
    for (int64_t i = 0; i < shares[piece].voxels; ++i, ++v) {
      auto at = static_cast<int32_t>(start);
      for (int p = 0; p < job.pieces; ++p) {
        Entry& entry = of_piece(p)[list[i]];
        const int32_t n = entry.count;
        entry = {at, static_cast<int32_t>(v + 1)};
        at += n;
      }
      out.row_splits[v] = start;
      out.counts[v] = std::min<int64_t>(at - start, job.cap);
      start += out.counts[v];
    }
    if (piece + 1 == job.pieces) out.row_splits[v] = start;
  }

  void fill(int64_t /*voxels*/, const Outputs& out) const {
    job.helpers->share(job.pieces, [&](int64_t piece) { number(piece, out); });
    for (int p = 0; p < job.pieces; ++p) of_piece(p)[job.total].number = 0;
    job.helpers->share(job.pieces, [&](int64_t piece) {
      Entry* entries = of_piece(piece);
      const bool capped = job.cap < job.rows;
      const int64_t begin = job.row_of(piece), end = job.row_of(piece + 1);
      for (int64_t row = begin; row < end; ++row) out.inverse[row] = int64_t{entries[keys[row]].number} - 1;
      for (int64_t row = begin; row < end; ++row) {
        if (row + kAhead < end) __builtin_prefetch(out.perm + entries[keys[row + kAhead]].count, 1);
        Entry& entry = entries[keys[row]];
        if (!entry.number) continue;
        const int64_t at = entry.count++;
        if (capped && at >= out.row_splits[entry.number]) out.inverse[row] = -1;
        else out.perm[at] = row;
      }
    });
  }
};

// By sorting ------------------------------------------------------------------------------------------------------------------------------------

struct Packed {  // key and row in one word
  uint64_t word;
};
struct Wide {
  uint64_t key, row;
};

// Scratch: two arrays of records, of which the sort ends in one.
template <class Record>
struct BySort {
  const Job& job;
  Record *records, *other;
  int bits, row_bits;  // of a key, and of a row in a Packed record

  static int64_t bytes(const Job& job) { return 2 * std::max<int64_t>(job.rows, 1) * static_cast<int64_t>(sizeof(Record)); }

  BySort(const Job& j, void* scratch, int key_bits, int row_bits_)
      : job(j), records(static_cast<Record*>(scratch)), other(records + std::max<int64_t>(j.rows, 1)), bits(key_bits), row_bits(row_bits_) {
    if (passes() % 2) std::swap(records, other);  // the sorted ones are always the first array
  }
  int passes() const { return (bits + kDigit - 1) / kDigit; }

  Record make(uint64_t key, int64_t row) const {
    if constexpr (sizeof(Record) == 8) return {key << row_bits | static_cast<uint64_t>(row)};
    else return {key, static_cast<uint64_t>(row)};
  }
  uint64_t key_of(const Record& r) const {
    if constexpr (sizeof(Record) == 8) return r.word >> row_bits;
    else return r.key;
  }
  int64_t row_of(const Record& r) const {
    if constexpr (sizeof(Record) == 8) return static_cast<int64_t>(r.word & ((uint64_t{1} << row_bits) - 1));
    else return static_cast<int64_t>(r.row);
  }

  void sort() {
    job.helpers->share(job.pieces, [&](int64_t piece) {
      job.each_chunk<int64_t>(piece, [&](int64_t row, const int64_t* keys, int64_t n) {
        for (int64_t i = 0; i < n; ++i) records[row + i] = make(static_cast<uint64_t>(keys[i]), row + i);
      });
    });
    const int rounds = passes();
    const int digit_bits = (bits + std::max(rounds, 1) - 1) / std::max(rounds, 1);
    const uint64_t mask = (uint64_t{1} << digit_bits) - 1;
    std::vector<int64_t> starts(static_cast<size_t>(job.pieces) << digit_bits);
    for (int shift = 0, round = 0; round < rounds; ++round, shift += digit_bits) {
      const auto digit = [&](const Record& r) { return static_cast<size_t>(key_of(r) >> shift & mask); };
      std::fill(starts.begin(), starts.end(), 0);
      job.helpers->share(job.pieces, [&](int64_t piece) {
        int64_t* count = starts.data() + (static_cast<size_t>(piece) << digit_bits);
        for (int64_t i = job.row_of(piece); i < job.row_of(piece + 1); ++i) ++count[digit(records[i])];
      });
      int64_t sum = 0;
      for (size_t d = 0; d <= mask; ++d)
        for (int piece = 0; piece < job.pieces; ++piece) {
          int64_t& count = starts[(static_cast<size_t>(piece) << digit_bits) + d];
          const int64_t start = sum;
          sum += count, count = start;
        }
      job.helpers->share(job.pieces, [&](int64_t piece) {
        int64_t* next = starts.data() + (static_cast<size_t>(piece) << digit_bits);
        for (int64_t i = job.row_of(piece); i < job.row_of(piece + 1); ++i) other[next[digit(records[i])]++] = records[i];
      });
      std::swap(records, other);
    }
  }

  bool kept(int64_t i) const {  // equal keys stand together, so a look back tells whether the voxel is full
    const uint64_t key = key_of(records[i]);
    return key != static_cast<uint64_t>(job.total) && (i < job.cap || key_of(records[i - job.cap]) != key);
  }
  bool head(int64_t i) const {
    const uint64_t key = key_of(records[i]);
    return key != static_cast<uint64_t>(job.total) && (i == 0 || key_of(records[i - 1]) != key);
  }

  std::vector<int64_t> tally() const {  // heads and kept records of every piece
    std::vector<int64_t> sums(2 * static_cast<size_t>(job.pieces));
    job.helpers->share(job.pieces, [&](int64_t piece) {
      int64_t heads = 0, keeps = 0;
      for (int64_t i = job.row_of(piece); i < job.row_of(piece + 1); ++i) heads += head(i), keeps += kept(i);
      sums[2 * static_cast<size_t>(piece)] = heads, sums[2 * static_cast<size_t>(piece) + 1] = keeps;
    });
    return sums;
  }

  void count(int64_t* voxels, int64_t* keeps) {
    sort();
    const std::vector<int64_t> sums = tally();
    *voxels = *keeps = 0;
    for (size_t i = 0; i < sums.size(); i += 2) *voxels += sums[i], *keeps += sums[i + 1];
  }

  // `records` must be the sorted array, also in the call after the one that sorted it.
  void fill(int64_t voxels, const Outputs& out) {
    if (passes() % 2) std::swap(records, other);
    if (job.first) return fill_by_first(voxels, out);
    const std::vector<int64_t> sums = tally();
    job.helpers->share(job.pieces, [&](int64_t piece) {
      int64_t v = -1, at = 0;
      for (size_t i = 0; i < 2 * static_cast<size_t>(piece); i += 2) v += sums[i], at += sums[i + 1];
      for (int64_t i = job.row_of(piece); i < job.row_of(piece + 1); ++i) {
        const int64_t row = row_of(records[i]);
        if (head(i)) out.row_splits[++v] = at;
        const bool keep = kept(i);
        out.inverse[row] = keep ? v : -1;
        if (keep) out.perm[at++] = row;
      }
      if (piece + 1 == job.pieces) out.row_splits[voxels] = at;
    });
    for (int64_t v = 0; v < voxels; ++v) out.counts[v] = out.row_splits[v + 1] - out.row_splits[v];
  }

  void fill_by_first(int64_t voxels, const Outputs& out) {
    auto* number = reinterpret_cast<int64_t*>(other);  // of the voxel whose first point a row is
    std::memset(number, 0, static_cast<size_t>(job.rows) * sizeof(int64_t));
    for (int64_t i = 0; i < job.rows; ++i)
      if (head(i)) number[row_of(records[i])] = 1;
    for (int64_t row = 0, sum = 0; row < job.rows; ++row) {
      const int64_t one = number[row];
      number[row] = sum, sum += one;
    }
    std::memset(out.counts, 0, static_cast<size_t>(voxels) * sizeof(int64_t));
    for (int64_t i = 0, v = -1; i < job.rows; ++i) {
      const int64_t row = row_of(records[i]);
      if (head(i)) v = number[row];
      const bool keep = kept(i);
      out.inverse[row] = keep ? v : -1;
      if (keep) ++out.counts[v];
    }
    out.row_splits[0] = 0;
    for (int64_t v = 0; v < voxels; ++v) out.row_splits[v + 1] = out.row_splits[v] + out.counts[v];
    for (int64_t i = 0, at = 0; i < job.rows; ++i) {
      const int64_t row = row_of(records[i]);
      if (out.inverse[row] < 0) continue;
      if (head(i)) at = out.row_splits[out.inverse[row]];
      out.perm[at++] = row;
    }
  }
};

// Both ------------------------------------------------------------------------------------------------------------------------------------------

// Calls f with the way to number the voxels of a job.
template <class F>
void with_method(const Job& job, void* scratch, F&& f) {
  constexpr int64_t kSmall = std::numeric_limits<int32_t>::max() - 1;
  if (job.rows < kSmall && job.total < kSmall && (job.total <= kSmallTable || job.total * job.pieces <= kTablePerRow * job.rows)) {
    f(ByTable(job, scratch));
    return;
  }
  const auto bits_of = [](int64_t v) { return v > 0 ? 64 - __builtin_clzll(static_cast<unsigned long long>(v)) : 0; };
  const int bits = bits_of(job.total), row_bits = bits_of(job.rows);
  if (bits + row_bits <= 64) f(BySort<Packed>(job, scratch, bits, row_bits));
  else f(BySort<Wide>(job, scratch, bits, 0));
}

// The cells of voxels v0 .. v1, from the first point of each; voxels are sorted by cloud.
template <class T>
GEOSSL_INLINE void coords_loop(const T* points, const Clouds& clouds, const VoxelGrid& grid, int64_t v0, int64_t v1, const Outputs& out) {
  int64_t b = v0 < v1 ? clouds.cloud_of(out.perm[out.row_splits[v0]]) : 0;
  for (int64_t v = v0; v < v1; ++v) {
    if (v + kAhead < v1) __builtin_prefetch(points + 3 * out.perm[out.row_splits[v + kAhead]]);
    const int64_t row = out.perm[out.row_splits[v]];
    while (b + 1 < clouds.batch && row >= clouds.begin(b + 1)) ++b;
    int32_t* to = out.coords + 4 * v;
    to[0] = static_cast<int32_t>(b);
    for (int axis = 0; axis < 3; ++axis)
      to[1 + axis] = static_cast<int32_t>(__builtin_floor((static_cast<double>(points[3 * row + axis]) - grid.origin[axis]) / grid.size[axis]));
  }
}
GEOSSL_SIMD void write_coords(const float* points, const Clouds& clouds, const VoxelGrid& grid, int64_t v0, int64_t v1, const Outputs& out) {
  coords_loop(points, clouds, grid, v0, v1, out);
}
void write_coords(const double* points, const Clouds& clouds, const VoxelGrid& grid, int64_t v0, int64_t v1, const Outputs& out) {
  coords_loop(points, clouds, grid, v0, v1, out);
}

Job make_job(Helpers& helpers, int is_double, const void* points, const Clouds& clouds, const double* grid, const double* bounds,
             const int64_t* frames, int order, int first, int64_t total, int64_t cap) {
  Job job{points, is_double != 0, clouds, {}, bounds, reinterpret_cast<const VoxelFrame*>(frames), order, first, total,
          std::max<int64_t>(cap, 1), clouds.batch > 0 ? clouds.rows() : 0, 1};
  std::memcpy(&job.grid, grid, sizeof job.grid);
  job.helpers = &helpers;
  job.pieces = static_cast<int>(pieces_of(helpers.threads(), job.rows, kGrain));
  return job;
}

}  // namespace
}  // namespace geossl

// See geossl/ops/voxels.py for the arguments of all.
GEOSSL_API int geossl_voxel_bounds_cpu(int threads, int is_double, const void* points, const int64_t* offsets, const int64_t* lengths, int64_t n,
                                       int64_t batch, const double* range, int64_t parts, double* bounds) {
  using namespace geossl;
  if (n < 0 || batch < 0 || parts < 1) return GEOSSL_INVALID_ARGUMENT;
  return for_type(is_double, [&](auto zero) {
    using T = decltype(zero);
    const Clouds clouds{offsets, lengths, batch, n};
    const Limits<T> limits(range);
    const int64_t size = batch > 0 ? clouds.rows() / batch / parts : 0;
    parallel_for(threads, batch * parts, std::max<int64_t>(1, 4 * kGrain / std::max<int64_t>(size, 1)), [&](int64_t t0, int64_t t1) {
      for (int64_t t = t0; t < t1; ++t) {
        const int64_t b = t / parts, part = t % parts, count = clouds.size(b);
        const int64_t begin = part * count / parts, end = (part + 1) * count / parts;
        T box[6];
        for (int axis = 0; axis < 3; ++axis) box[axis] = std::numeric_limits<T>::infinity(), box[3 + axis] = -box[axis];
        bounds_of(static_cast<const T*>(points) + 3 * (clouds.begin(b) + begin), end - begin, limits, box);
        for (int i = 0; i < 6; ++i) bounds[6 * t + i] = static_cast<double>(box[i]);
      }
    });
    return int{GEOSSL_OK};
  });
}
GEOSSL_PACKED(geossl_voxel_bounds_cpu)

// Without scratch, stores the bytes it must have in info[0]; with it, the numbers of voxels and of kept points in info.
GEOSSL_API int geossl_voxel_count_cpu(int threads, int is_double, const void* points, const int64_t* offsets, const int64_t* lengths, int64_t n,
                                      int64_t batch, const double* grid, const double* bounds, const int64_t* frames, int order, int first,
                                      int64_t total, int64_t cap, void* scratch, int64_t* info) {
  using namespace geossl;
  if (n < 0 || batch < 0 || total < 0 || order < 0 || order > 2) return GEOSSL_INVALID_ARGUMENT;
  return guarded([&] {
    Helpers helpers(threads);
    const Job job = make_job(helpers, is_double, points, Clouds{offsets, lengths, batch, n}, grid, bounds, frames, order, first, total, cap);
    with_method(job, scratch, [&](auto method) {
      if (scratch) method.count(info, info + 1);
      else info[0] = method.bytes(job);
    });
  });
}
GEOSSL_PACKED(geossl_voxel_count_cpu)

GEOSSL_API int geossl_voxel_fill_cpu(int threads, int is_double, const void* points, const int64_t* offsets, const int64_t* lengths, int64_t n,
                                     int64_t batch, const double* grid, const double* bounds, const int64_t* frames, int order, int first,
                                     int64_t total, int64_t cap, void* scratch, int64_t voxels, int32_t* coords, int64_t* inverse, int64_t* counts,
                                     int64_t* row_splits, int64_t* perm) {
  using namespace geossl;
  if (n < 0 || batch < 0 || total < 0 || order < 0 || order > 2 || voxels < 0) return GEOSSL_INVALID_ARGUMENT;
  return guarded([&] {
    Helpers helpers(threads);
    const Job job = make_job(helpers, is_double, points, Clouds{offsets, lengths, batch, n}, grid, bounds, frames, order, first, total, cap);
    const Outputs out{coords, inverse, counts, row_splits, perm};
    with_method(job, scratch, [&](auto method) { method.fill(voxels, out); });
    const int64_t pieces = pieces_of(job.pieces, voxels, kGrain);
    helpers.share(pieces, [&](int64_t piece) {
      const int64_t v0 = piece * voxels / pieces, v1 = (piece + 1) * voxels / pieces;
      if (is_double) write_coords(static_cast<const double*>(points), job.clouds, job.grid, v0, v1, out);
      else write_coords(static_cast<const float*>(points), job.clouds, job.grid, v0, v1, out);
    });
  });
}
GEOSSL_PACKED(geossl_voxel_fill_cpu)
