#include "select.h"

#if GEOSSL_HAS_SIMD_CLONES
#include <immintrin.h>
#endif

namespace geossl {
namespace {

// Loops like this, which write some of what they read, are the one kind that compilers do not vectorise.
template <class B>
int64_t find_up_to(const B* values, int64_t n, B bound, int32_t* found) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    found[count] = static_cast<int32_t>(i);
    count += values[i] <= bound;
  }
  return count;
}

#if GEOSSL_HAS_SIMD_CLONES
__attribute__((target("default"))) int64_t find_up_to_simd(const int32_t* values, int64_t n, int32_t bound, int32_t* found) {
  return find_up_to(values, n, bound, found);
}
__attribute__((target("avx2"))) int64_t find_up_to_simd(const int32_t* values, int64_t n, int32_t bound, int32_t* found) {
  int64_t count = 0;
  const __m256i limit = _mm256_set1_epi32(bound);
  for (int64_t i = 0; i < n; i += 8) {
    const __m256i above = _mm256_cmpgt_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + i)), limit);
    for (unsigned bits = ~static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(above))) & 0xffu; bits; bits &= bits - 1)
      found[count++] = static_cast<int32_t>(i) + __builtin_ctz(bits);
  }
  return count;
}
__attribute__((target("avx512f"))) int64_t find_up_to_simd(const int32_t* values, int64_t n, int32_t bound, int32_t* found) {
  int64_t count = 0;
  const __m512i limit = _mm512_set1_epi32(bound), step = _mm512_set1_epi32(16);
  __m512i number = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int64_t i = 0; i < n; i += 16, number = _mm512_add_epi32(number, step)) {
    const __mmask16 chosen = _mm512_cmple_epi32_mask(_mm512_loadu_si512(values + i), limit);
    _mm512_storeu_si512(found + count, _mm512_maskz_compress_epi32(chosen, number));
    count += __builtin_popcount(chosen);
  }
  return count;
}
#else
int64_t find_up_to_simd(const int32_t* values, int64_t n, int32_t bound, int32_t* found) { return find_up_to(values, n, bound, found); }
#endif

}  // namespace

// Callers in other files would not see the versions: gcc chooses among them where they are declared.
int64_t indices_up_to(const int32_t* values, int64_t n, int32_t bound, int32_t* found) { return find_up_to_simd(values, n, bound, found); }
int64_t indices_up_to(const int64_t* values, int64_t n, int64_t bound, int32_t* found) { return find_up_to(values, n, bound, found); }

GEOSSL_SIMD void rank_sort(const int64_t* GEOSSL_RESTRICT keys, int64_t n, int64_t k, int64_t* GEOSSL_RESTRICT sorted) {
  for (int64_t i = 0; i < n; ++i) {
    const int64_t key = keys[i];
    int64_t rank = 0;
    for (int64_t j = 0; j < n; ++j) rank += keys[j] < key;
    if (rank < k) sorted[rank] = key;
  }
}

}  // namespace geossl
