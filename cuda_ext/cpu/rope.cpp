// Rotary position encoding in two dimensions. Every number is read once, rotated by the angle of its row's position and written to the result.
#include "half.h"
#include "points.h"

namespace geossl {
namespace {

constexpr int64_t kBytesPerThread = int64_t{1} << 21;  // that a thread is worth starting for
constexpr int64_t kBlock = 8;                          // pairs that are rotated at once

// Rows begin at multiples of row_stride, the heads in them at multiples of head_stride; row t is rotated by row t % positions of the table.
struct Rope {
  int64_t row_stride, head_stride, rows, heads, dim, positions;
  bool inverse;  // turns back: the same with the two numbers of every pair exchanged
};

// Pairs (u, v) of one half of a head.
template <class W>
GEOSSL_INLINE void rotate(const W* GEOSSL_RESTRICT u, const W* GEOSSL_RESTRICT v, const W* GEOSSL_RESTRICT cosine, const W* GEOSSL_RESTRICT sine,
                          int64_t pairs, W* GEOSSL_RESTRICT u_out, W* GEOSSL_RESTRICT v_out) {
  for (int64_t k = 0; k < pairs; ++k) {
    const W a = u[k], b = v[k];
    u_out[k] = a * cosine[k] - b * sine[k];
    v_out[k] = b * cosine[k] + a * sine[k];
  }
}

// All heads of a row. Pairs go by kBlock, which makes a loop without conditions, and what is left over.
template <class W>
GEOSSL_INLINE void rotate_row(const Rope& r, const W* x, int64_t head_stride, const W* angles, W* out) {
  const int64_t half = r.dim / 2, pairs = r.dim / 4, u = r.inverse ? pairs : 0, v = pairs - u;
  for (int64_t part = 0; part < 2 * r.heads; ++part) {
    const W *from = x + part / 2 * head_stride + part % 2 * half, *cosine = angles + part % 2 * pairs, *sine = cosine + half;
    W* to = out + part * half;
    int64_t k = 0;
    for (; k + kBlock <= pairs; k += kBlock) rotate(from + u + k, from + v + k, cosine + k, sine + k, kBlock, to + u + k, to + v + k);
    if (k < pairs) rotate(from + u + k, from + v + k, cosine + k, sine + k, pairs - k, to + u + k, to + v + k);
  }
}
#define FOR_TYPE(SIMD, W)                                                                              \
  SIMD void rotate_row_of(const Rope& r, const W* x, int64_t head_stride, const W* angles, W* out) { \
    rotate_row(r, x, head_stride, angles, out);                                                        \
  }
FOR_TYPE(GEOSSL_SIMD, float)
FOR_TYPE(, double)
#undef FOR_TYPE

// Conversion of the half types apart from the rotation, in long loops. Clones for bfloat16 alone, as models on CPUs do not run in float16.
#define FOR_TYPE(SIMD, T)                                                                        \
  SIMD void widen_all(const T* GEOSSL_RESTRICT x, int64_t count, float* GEOSSL_RESTRICT out) {  \
    for (int64_t i = 0; i < count; ++i) out[i] = widen(x[i]);                                    \
  }                                                                                              \
  SIMD void narrow_all(const float* GEOSSL_RESTRICT x, int64_t count, T* GEOSSL_RESTRICT out) { \
    for (int64_t i = 0; i < count; ++i) narrow(x[i], out[i]);                                    \
  }
FOR_TYPE(, Half)
FOR_TYPE(GEOSSL_SIMD, BFloat)
#undef FOR_TYPE

template <class T, class W>
void rotate_rows(const Rope& r, int64_t begin, int64_t end, const T* x, const W* table, T* out) {
  Scratch<W> wide, rotated;
  const int64_t size = r.heads * r.dim;
  for (int64_t row = begin; row < end; ++row) {
    const W* angles = table + row % r.positions * r.dim;
    const T* from = x + row * r.row_stride;
    if constexpr (std::is_same_v<T, W>) {
      rotate_row_of(r, from, r.head_stride, angles, out + row * size);
    } else {
      W *in = wide.get(size), *result = rotated.get(size);
      for (int64_t head = 0; head < r.heads; ++head) widen_all(from + head * r.head_stride, r.dim, in + head * r.dim);
      rotate_row_of(r, in, r.dim, angles, result);
      narrow_all(result, size, out + row * size);
    }
  }
}

template <class T, class W>
void run(int threads, const Rope& r, const void* x, const void* table, void* out) {
  const int64_t bytes = r.heads * r.dim * static_cast<int64_t>(sizeof(T));
  parallel_for(threads, r.rows, kBytesPerThread / std::max<int64_t>(bytes, 1) + 1, [&](int64_t begin, int64_t end) {
    rotate_rows(r, begin, end, static_cast<const T*>(x), static_cast<const W*>(table), static_cast<T*>(out));
  });
}

}  // namespace
}  // namespace geossl

// See geossl/ops/rope.py for the arguments.
GEOSSL_API int geossl_rope_2d_cpu(int threads, int type, const void* x, int64_t row_stride, int64_t head_stride, int64_t rows, int64_t heads,
                                  int64_t dim, const void* table, int64_t positions, int inverse, void* out) {
  using namespace geossl;
  if (rows < 0 || heads < 0 || dim < 4 || dim % 4 != 0 || (rows > 0 && (positions < 1 || rows % positions != 0))) return GEOSSL_INVALID_ARGUMENT;
  const Rope r{row_stride, head_stride, rows, heads, dim, positions, inverse != 0};
  return guarded([&] {
    switch (type) {
      case kDouble: return run<double, double>(threads, r, x, table, out);
      case kHalf: return run<Half, float>(threads, r, x, table, out);
      case kBFloat: return run<BFloat, float>(threads, r, x, table, out);
      default: return run<float, float>(threads, r, x, table, out);
    }
  });
}
GEOSSL_PACKED(geossl_rope_2d_cpu)
