// Nearest points among some hundred to some ten thousand: blocks of neighbours, most of which the distance of their boxes rules out.
#pragma once
#include "tree.h"

namespace geossl {

constexpr int kBlock = 16;  // points side by side: one AVX-512 vector of float32

// gcc and clang vectors as wide as the machine's, of coordinates or distances and of rows.
template <class T, int kBytes>
struct Vector {
  static constexpr int kWidth = kBytes / static_cast<int>(sizeof(T));
  typedef T Values __attribute__((vector_size(kBytes)));
  typedef Bits<T> Numbers __attribute__((vector_size(kBytes)));
};

// For kParts vectors of queries, compares with n points: where one is nearer than `best`, takes its distance and number_of(its place). NaN
// compares false, so invalid points never win.
template <class T, int kBytes, bool kL1, int kParts, class F>
GEOSSL_INLINE void keep_nearest(const typename Vector<T, kBytes>::Values* x, const typename Vector<T, kBytes>::Values* y,
                                const typename Vector<T, kBytes>::Values* z, const Soa<T>& p, int64_t n, F&& number_of,
                                typename Vector<T, kBytes>::Values* best, typename Vector<T, kBytes>::Numbers* number) {
  for (int64_t j = 0; j < n; ++j) {
    const typename Vector<T, kBytes>::Numbers current = typename Vector<T, kBytes>::Numbers{} + number_of(j);
#pragma GCC unroll 2
    for (int i = 0; i < kParts; ++i) {
      const typename Vector<T, kBytes>::Values dx = x[i] - p.x[j], dy = y[i] - p.y[j], dz = z[i] - p.z[j];
      typename Vector<T, kBytes>::Values d;
      if constexpr (kL1) d = ((dx < 0 ? -dx : dx) + (dy < 0 ? -dy : dy)) + (dz < 0 ? -dz : dz);
      else d = (dx * dx + dy * dy) + dz * dz;
      const auto closer = d < best[i];
      best[i] = closer ? d : best[i];
      number[i] = closer ? current : number[i];
    }
  }
}

// The finite points of a cloud in blocks of neighbours.
template <class T>
class Blocks {
 public:
  void load(const T* rows, int64_t n, int threads);

  int64_t count = 0;
  Soa<T> points;        // kBlock slots for each block, the empty ones last and NaN
  Bits<T>* row;         // where each came from; they ascend within a block
  int32_t* size;        // filled slots
  T *low[3], *high[3];  // boxes

 private:
  Scratch<T> memory_[3], slots_, boxes_;
  Scratch<Bits<T>> row_;
  Scratch<int32_t> numbers_, sizes_;
};

// For the points of blocks [b0, b1) of `own`, the distance to the nearest point of `other` (squared, or with `manhattan` the sum of absolute
// differences) and its row, the lowest of equally near ones, both stored at the point's row; nothing is stored where there is none.
void nearest_in_blocks(const Blocks<float>& own, const Blocks<float>& other, int64_t b0, int64_t b1, bool manhattan, float* distance,
                       int64_t* nearest);
void nearest_in_blocks(const Blocks<double>& own, const Blocks<double>& other, int64_t b0, int64_t b1, bool manhattan, double* distance,
                       int64_t* nearest);

}  // namespace geossl
