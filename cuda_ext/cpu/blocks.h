// Nearest points among some hundred to some ten thousand: blocks of neighbours, most of which the distance of their boxes rules out.
#pragma once
#include "tree.h"

namespace geossl {

constexpr int kBlock = 16;  // points side by side: one AVX-512 vector of float32

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
