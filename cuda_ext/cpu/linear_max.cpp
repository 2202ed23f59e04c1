// Gradient of a linear layer that is followed by a maximum over each segment of its rows: one entry per segment and channel is not zero. Entries
// are added in the order of channels (to the rows) and of segments (to the weight), so the bits do not depend on the number of threads.
#include <algorithm>
#include <vector>

#include "points.h"

namespace geossl {
namespace {

constexpr int64_t kProductsPerThread = int64_t{1} << 21;  // that a thread is worth starting for
constexpr int64_t kBlockBytes = int64_t{1} << 18;         // of rows that stay in the cache while all channels visit them

// Segment s has the rows splits[s] .. splits[s + 1]; its entry of channel c is grad[s, c] at the row arg[s, c] (-1: there is none).
template <class T>
struct Entries {
  const T* grad;
  const int64_t *arg, *splits;
  int64_t segments, channels, width;
};

// Rows with the factors they are multiplied by.
template <class T>
struct Terms {
  std::vector<const T*> row;
  std::vector<T> factor;

  void clear() { row.clear(), factor.clear(); }
  void add(const T* r, T f) { row.push_back(r), factor.push_back(f); }
};

// out += the sum of the terms, one after the other; four in one pass over `out`, which is most of the traffic.
template <class T>
GEOSSL_INLINE void add_terms(const T* const* row, const T* factor, int64_t count, int64_t width, T* GEOSSL_RESTRICT out) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    const T *GEOSSL_RESTRICT a = row[i], *GEOSSL_RESTRICT b = row[i + 1], *GEOSSL_RESTRICT c = row[i + 2], *GEOSSL_RESTRICT d = row[i + 3];
    const T fa = factor[i], fb = factor[i + 1], fc = factor[i + 2], fd = factor[i + 3];
    for (int64_t k = 0; k < width; ++k) out[k] = (((out[k] + fa * a[k]) + fb * b[k]) + fc * c[k]) + fd * d[k];
  }
  for (; i < count; ++i) {
    const T* GEOSSL_RESTRICT a = row[i];
    const T f = factor[i];
    for (int64_t k = 0; k < width; ++k) out[k] += f * a[k];
  }
}
#define FOR_TYPE(SIMD, T)                                                                               \
  SIMD void add_terms_of(const T* const* row, const T* factor, int64_t count, int64_t width, T* out) { \
    add_terms(row, factor, count, width, out);                                                          \
  }
FOR_TYPE(GEOSSL_SIMD, float)
FOR_TYPE(, double)
#undef FOR_TYPE
template <class T>
void add_terms_of(const Terms<T>& terms, int64_t width, T* out) {
  add_terms_of(terms.row.data(), terms.factor.data(), static_cast<int64_t>(terms.row.size()), width, out);
}

template <class T>
bool valid(const Entries<T>& e, int64_t rows) {
  if (e.segments < 0 || e.channels < 0 || e.width < 0 || rows < 0) return false;
  if (!std::is_sorted(e.splits, e.splits + e.segments + 1) || e.splits[0] != 0 || e.splits[e.segments] != rows) return false;
  for (int64_t s = 0; s < e.segments; ++s)
    for (const int64_t *arg = e.arg + s * e.channels, *end = arg + e.channels; arg < end; ++arg)
      if (*arg != -1 && (*arg < e.splits[s] || *arg >= e.splits[s + 1])) return false;
  return true;
}

// Gradient of the rows of segments s0 .. s1. The channels of each row are listed first, so that its sum stays in the cache.
template <class T>
void rows_gradient(const Entries<T>& e, int64_t s0, int64_t s1, const T* weight, T* grad_x) {
  std::vector<Terms<T>> terms;
  for (int64_t s = s0; s < s1; ++s) {
    const int64_t first = e.splits[s], rows = e.splits[s + 1] - first;
    if (static_cast<int64_t>(terms.size()) < rows) terms.resize(static_cast<size_t>(rows));
    for (int64_t r = 0; r < rows; ++r) terms[static_cast<size_t>(r)].clear();
    for (int64_t c = 0; c < e.channels; ++c) {
      const int64_t row = e.arg[s * e.channels + c];
      if (row >= 0) terms[static_cast<size_t>(row - first)].add(weight + c * e.width, e.grad[s * e.channels + c]);
    }
    std::fill(grad_x + first * e.width, grad_x + (first + rows) * e.width, T(0));
    for (int64_t r = 0; r < rows; ++r) add_terms_of(terms[static_cast<size_t>(r)], e.width, grad_x + (first + r) * e.width);
  }
}

// Gradient of the weight's rows c0 .. c1.
template <class T>
void weight_gradient(const Entries<T>& e, int64_t c0, int64_t c1, const T* x, T* grad_weight) {
  std::fill(grad_weight + c0 * e.width, grad_weight + c1 * e.width, T(0));
  const int64_t most = kBlockBytes / std::max<int64_t>(e.width * static_cast<int64_t>(sizeof(T)), 1);
  Terms<T> terms;
  for (int64_t begin = 0, end; begin < e.segments; begin = end) {
    end = begin + 1;
    while (end < e.segments && e.splits[end + 1] - e.splits[begin] <= most) ++end;
    for (int64_t c = c0; c < c1; ++c) {
      terms.clear();
      for (int64_t s = begin; s < end; ++s) {
        const int64_t row = e.arg[s * e.channels + c];
        if (row >= 0) terms.add(x + row * e.width, e.grad[s * e.channels + c]);
      }
      add_terms_of(terms, e.width, grad_weight + c * e.width);
    }
  }
}

}  // namespace
}  // namespace geossl

// See geossl/ops/linear_max.py for the arguments.
GEOSSL_API int geossl_linear_max_backward_cpu(int threads, int is_double, const void* grad, const int64_t* arg, const int64_t* splits,
                                              int64_t segments, int64_t channels, const void* x, int64_t rows, int64_t width,
                                              const void* weight, void* grad_x, void* grad_weight) {
  using namespace geossl;
  return for_type(is_double, [&](auto zero) {
    using T = decltype(zero);
    const Entries<T> e{static_cast<const T*>(grad), arg, splits, segments, channels, width};
    if (!valid(e, rows)) return int{GEOSSL_INVALID_ARGUMENT};
    const auto grain = [&](int64_t count) { return kProductsPerThread / std::max<int64_t>(count * width, 1) + 1; };
    parallel_for(threads, segments, grain(channels),
                 [&](int64_t s0, int64_t s1) { rows_gradient(e, s0, s1, static_cast<const T*>(weight), static_cast<T*>(grad_x)); });
    parallel_for(threads, channels, grain(segments),
                 [&](int64_t c0, int64_t c1) { weight_gradient(e, c0, c1, static_cast<const T*>(x), static_cast<T*>(grad_weight)); });
    return int{GEOSSL_OK};
  });
}
GEOSSL_PACKED(geossl_linear_max_backward_cpu)
