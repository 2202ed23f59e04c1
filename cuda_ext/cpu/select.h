// Choosing the k smallest (distance, index) pairs: the order of every neighbour search, ties to the lower index.
#pragma once
#include <algorithm>

#include "points.h"

namespace geossl {

// A pair that compares as one number. For float it is one: the bits of a distance that is not negative order like the distance.
template <class T>
struct KeyOf;
template <>
struct KeyOf<float> {
  using type = int64_t;
};
struct DoubleKey {
  int64_t bits;
  int32_t index;
  bool operator<(const DoubleKey& other) const { return bits < other.bits || (bits == other.bits && index < other.index); }
};
template <>
struct KeyOf<double> {
  using type = DoubleKey;
};
template <class T>
using Key = typename KeyOf<T>::type;

GEOSSL_INLINE int64_t make_key(int32_t distance_bits, int32_t index) { return static_cast<int64_t>(distance_bits) << 32 | index; }
GEOSSL_INLINE DoubleKey make_key(int64_t distance_bits, int32_t index) { return {distance_bits, index}; }
GEOSSL_INLINE int32_t bits_of_key(int64_t key) { return static_cast<int32_t>(key >> 32); }
GEOSSL_INLINE int64_t bits_of_key(const DoubleKey& key) { return key.bits; }
GEOSSL_INLINE int32_t index_of_key(int64_t key) { return static_cast<int32_t>(key); }
GEOSSL_INLINE int32_t index_of_key(const DoubleKey& key) { return key.index; }

// Writes the numbers of the values that do not exceed `bound`, ascending, and returns how many. n is a multiple of 16; `found` has room
// for n + 16.
int64_t indices_up_to(const int32_t* values, int64_t n, int32_t bound, int32_t* found);
int64_t indices_up_to(const int64_t* values, int64_t n, int64_t bound, int32_t* found);

constexpr int64_t kRankSort = 160;  // up to this many keys are sorted by counting smaller ones: no branches, all lanes busy

// Writes the k smallest of n distinct keys in order.
void rank_sort(const int64_t* keys, int64_t n, int64_t k, int64_t* sorted);

// Puts the min(k, n) smallest of n distinct keys into `sorted`, ascending, and returns how many. Reorders `keys`.
template <class K>
int64_t select_smallest(K* keys, int64_t n, int64_t k, K* sorted) {
  const int64_t count = std::min(n, k);
  if (n > kRankSort && n > 2 * k) {
    std::nth_element(keys, keys + k, keys + n);
    n = k;
  }
  if constexpr (std::is_same_v<K, int64_t>) {
    if (n <= kRankSort) {
      rank_sort(keys, n, count, sorted);
      return count;
    }
  }
  std::partial_sort(keys, keys + count, keys + n);
  std::copy(keys, keys + count, sorted);
  return count;
}

}  // namespace geossl
