#include "points.h"

namespace geossl {
namespace {

template <class T>
GEOSSL_INLINE void split_loop(const T* GEOSSL_RESTRICT rows, int64_t n, T* GEOSSL_RESTRICT x, T* GEOSSL_RESTRICT y, T* GEOSSL_RESTRICT z) {
  for (int64_t i = 0; i < n; ++i) x[i] = rows[3 * i], y[i] = rows[3 * i + 1], z[i] = rows[3 * i + 2];
}

}  // namespace

GEOSSL_SIMD void split_axes(const float* rows, int64_t n, const Soa<float>& to) { split_loop(rows, n, to.x, to.y, to.z); }
void split_axes(const double* rows, int64_t n, const Soa<double>& to) { split_loop(rows, n, to.x, to.y, to.z); }

GEOSSL_SIMD bool in_range(const int64_t* index, int64_t count, int64_t n) {
  int64_t wrong = 0;
  for (int64_t i = 0; i < count; ++i) wrong |= (index[i] < -1) | (index[i] >= n);
  return wrong == 0;
}

}  // namespace geossl
