// Rotary position encoding in two dimensions. A thread owns the two numbers of a pair: it reads both, rotates them and writes both, so there is
// no shared memory and nothing to wait for. The operations are those of the CPU, without contraction: the bits agree.
#include "half.h"
#include "warp.cuh"

namespace geossl {
namespace {

constexpr unsigned kThreads = 256;
constexpr int64_t kMost = 0x7fffffff;  // heads and channels, which are counted in 32 bits

// Rows begin at multiples of row_stride, the heads in them at multiples of head_stride; row t has the position t % positions.
struct Rope {
  int64_t row_stride, head_stride, images, positions;
  int heads, dim;
  bool inverse;  // turns back: the same with the two numbers of every pair exchanged
};

// A block takes one position in some of the images. Its threads are (pair, head): each reads its cosine and sine once for all its heads.
template <class T, class W>
__global__ void __launch_bounds__(kThreads) rope_kernel(Rope r, const T* x, const W* table, T* out) {
  const int pairs = r.dim / 2, quarter = r.dim / 4, step = static_cast<int>(blockDim.y);
  for (int64_t position = blockIdx.x; position < r.positions; position += gridDim.x) {
    for (int pair = static_cast<int>(threadIdx.x); pair < pairs; pair += static_cast<int>(blockDim.x)) {
      const W cosine = table[position * r.dim + pair], sine = table[position * r.dim + pairs + pair];
      const int low = pair < quarter ? pair : pair + quarter;  // the columns' pairs follow those of the rows
      const int first = r.inverse ? low + quarter : low, second = r.inverse ? low : low + quarter;
      for (int64_t image = blockIdx.y; image < r.images; image += gridDim.y) {
        const int64_t row = image * r.positions + position;
        const T* from = x + row * r.row_stride + threadIdx.y * r.head_stride;
        T* to = out + (row * r.heads + threadIdx.y) * r.dim;
        for (int head = static_cast<int>(threadIdx.y); head < r.heads; head += step) {
          const W u = widen(from[first]), v = widen(from[second]);
          narrow(u * cosine - v * sine, to[first]);
          narrow(v * cosine + u * sine, to[second]);
          from += step * r.head_stride, to += static_cast<int64_t>(step) * r.dim;
        }
      }
    }
  }
}

template <class T, class W>
cudaError_t run(void* stream, const Rope& r, const void* x, const void* table, void* out) {
  const unsigned across = std::min(static_cast<unsigned>(r.dim / 2), kThreads), down = std::min(static_cast<unsigned>(r.heads), kThreads / across);
  const dim3 grid(blocks_for(r.positions, 1).x, static_cast<unsigned>(std::min<int64_t>(r.images, 65535)));
  return gpu::launch(rope_kernel<T, W>, grid, dim3(across, down), 0, as_stream(stream), r, static_cast<const T*>(x),
                     static_cast<const W*>(table), static_cast<T*>(out));
}

}  // namespace
}  // namespace geossl

// See geossl/ops/rope.py for the arguments.
GEOSSL_API int geossl_rope_2d_cuda(int device, void* stream, int type, const void* x, int64_t row_stride, int64_t head_stride, int64_t rows,
                                   int64_t heads, int64_t dim, const void* table, int64_t positions, int inverse, void* out) {
  using namespace geossl;
  if (rows < 0 || heads < 0 || dim < 4 || dim % 4 != 0 || (rows > 0 && (positions < 1 || rows % positions != 0))) return GEOSSL_INVALID_ARGUMENT;
  if (rows == 0 || heads == 0) return GEOSSL_OK;
  if (heads > kMost || dim > kMost) return GEOSSL_TOO_LARGE;
  DeviceGuard guard(device);
  if (guard.error != cudaSuccess) return static_cast<int>(guard.error);
  const Rope r{row_stride, head_stride, rows / positions, positions, static_cast<int>(heads), static_cast<int>(dim), inverse != 0};
  switch (type) {
    case kDouble: return run<double, double>(stream, r, x, table, out);
    case kHalf: return run<Half, float>(stream, r, x, table, out);
    case kBFloat: return run<BFloat, float>(stream, r, x, table, out);
    default: return run<float, float>(stream, r, x, table, out);
  }
}
GEOSSL_PACKED(geossl_rope_2d_cuda)
