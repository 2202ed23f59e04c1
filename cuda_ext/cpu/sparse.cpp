// Neighbours of sparse voxels: their packed coordinates are sorted once; then each kernel offset is one constant added to all keys, and
// one merge of the keys with themselves.
#include <algorithm>
#include <array>
#include <memory>
#include <utility>

#include "points.h"

namespace geossl {
namespace {

constexpr int kDigitBits = 11;

struct Entry {
  int64_t key, row;
};

// Stable sort of keys that are not negative by their low `bits`, from `entries` into either array; returns where the result is.
Entry* radix_sort(Entry* entries, Entry* other, int64_t count, int bits) {
  constexpr int64_t kDigits = int64_t{1} << kDigitBits;
  for (int shift = 0; shift < bits; shift += kDigitBits) {
    std::array<int64_t, kDigits> begin{};
    for (int64_t i = 0; i < count; ++i) ++begin[(entries[i].key >> shift) & (kDigits - 1)];
    int64_t total = 0;
    bool single = false;  // every key has the same digit
    for (int64_t& n : begin) {
      single |= n == count;
      total += std::exchange(n, total);
    }
    if (single) continue;
    for (int64_t i = 0; i < count; ++i) other[begin[(entries[i].key >> shift) & (kDigits - 1)]++] = entries[i];
    std::swap(entries, other);
  }
  return entries;
}

// The rows of the keys wanted[w] + shift, for w in w0 .. w1; both lists ascend.
void merge(const int64_t* keys, const int64_t* order, int64_t count, const int64_t* wanted, const int64_t* rows, int64_t w0, int64_t w1,
           int64_t shift, int64_t* out) {
  if (w0 >= w1) return;
  int64_t i = std::lower_bound(keys, keys + count, wanted[w0] + shift) - keys;
  for (int64_t w = w0; w < w1; ++w) {
    const int64_t target = wanted[w] + shift;
    while (i < count && keys[i] < target) ++i;
    out[rows ? rows[w] : w] = i < count && keys[i] == target ? order[i] : -1;
  }
}

}  // namespace
}  // namespace geossl

// See geossl/ops/sparse.py for the arguments of both.
GEOSSL_API int geossl_sort_keys_cpu(int, const int64_t* keys, int64_t count, int bits, int64_t* sorted, int64_t* order) {
  using namespace geossl;
  if (count < 0 || bits < 0 || bits > 63) return GEOSSL_INVALID_ARGUMENT;
  return guarded([&] {
    if (std::is_sorted(keys, keys + count)) {
      for (int64_t i = 0; i < count; ++i) sorted[i] = keys[i], order[i] = i;
      return;
    }
    const std::unique_ptr<Entry[]> memory(new Entry[static_cast<size_t>(2 * count)]);
    for (int64_t i = 0; i < count; ++i) memory[i] = {keys[i], i};
    const Entry* result = radix_sort(memory.get(), memory.get() + count, count, bits);
    for (int64_t i = 0; i < count; ++i) sorted[i] = result[i].key, order[i] = result[i].row;
  });
}
GEOSSL_PACKED(geossl_sort_keys_cpu)

GEOSSL_API int geossl_find_keys_cpu(int threads, const int64_t* keys, const int64_t* order, int64_t count, const int64_t* wanted,
                                    const int64_t* rows, int64_t wanted_count, const int64_t* shifts, int64_t shift_count, int64_t* out) {
  using namespace geossl;
  if (count < 0 || wanted_count < 0 || shift_count < 0) return GEOSSL_INVALID_ARGUMENT;
  return guarded([&] {
    // Pieces of the K x W table: each begins with a search, and goes on by merging.
    parallel_for(threads, shift_count * wanted_count, int64_t{1} << 17, [&](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t k = begin / wanted_count, w = begin - k * wanted_count, stop = std::min(wanted_count, w + end - begin);
        merge(keys, order, count, wanted, rows, w, stop, shifts[k], out + k * wanted_count);
        begin += stop - w;
      }
    });
  });
}
GEOSSL_PACKED(geossl_find_keys_cpu)
