// Chamfer distance on the GPU. Patches of up to kPatch points: one warp per pair holds both clouds in shared memory and does everything.
// Larger clouds: one thread per point, the other cloud staged through shared memory, then one block per pair adds up. Patches of one, two or
// four channels are handled like those of three (a channel of zeros changes no bit); everything else by kernels for any number of channels.
#include "warp.cuh"

namespace geossl {
namespace {

enum Norm { kSquared = 0, kEuclidean = 1, kManhattan = 2 };
enum Direction { kBoth = 0, kFromX = 1, kFromY = 2 };

constexpr int kPatch = 64;         // _PATCH in geossl/ops/chamfer.py
constexpr int kPatchThreads = 128;  // four pairs
constexpr int kThreads = 256;
constexpr int kTile = 256;

__device__ __forceinline__ float root(float v) { return __fsqrt_rn(v); }
__device__ __forceinline__ double root(double v) { return __dsqrt_rn(v); }

// One cloud batch with what is known about each of its rows; `nearest` and `distance` are null in a direction that is not asked for.
template <class T>
struct Side {
  const T* points;
  Clouds clouds;
  int64_t rows;
  int64_t* nearest;
  T* distance;
};

template <class T>
struct Job {
  Side<T> x, y;
  int64_t channels;
  int norm;
  T* loss;
};

template <class T>
__device__ __forceinline__ T measure(int norm, T dx, T dy, T dz) {
  return norm == kManhattan ? manhattan(dx, dy, dz) : squared(dx, dy, dz);
}

// Adds one more channel to the distance, with one rounding per operation as in `squared` and `manhattan`.
__device__ __forceinline__ float add_channel(int norm, float sum, float d) { return __fadd_rn(sum, norm == kManhattan ? fabsf(d) : __fmul_rn(d, d)); }
__device__ __forceinline__ double add_channel(int norm, double sum, double d) {
  return __dadd_rn(sum, norm == kManhattan ? fabs(d) : __dmul_rn(d, d));
}

// Keeps the nearer of what is known and point j; equal distances stay with the lower j, and NaN is never nearer.
template <class T>
__device__ __forceinline__ void keep_nearer(T d, int32_t j, T& best, int32_t& index) {
  if (d < best) best = d, index = j;
}

// Patches -------------------------------------------------------------------------------------------------------------------------------

template <class T, int kChannels>
struct Patch {
  T at[kChannels][kPatch];
};

template <class T, int kChannels>
__device__ int load_patch(const Side<T>& side, int64_t channels, int64_t b, int lane, Patch<T, kChannels>& patch) {
  const int n = static_cast<int>(side.clouds.size(b));
  const T* p = side.points + channels * side.clouds.begin(b);
  for (int i = lane; i < n; i += 32)
    for (int c = 0; c < kChannels; ++c) patch.at[c][i] = c < channels ? p[channels * i + c] : T(0);
  return n;
}

template <class T, int kChannels>
__device__ __forceinline__ T patch_distance(int norm, const Patch<T, kChannels>& own, int i, const Patch<T, kChannels>& other, int j) {
  T d = measure(norm, own.at[0][i] - other.at[0][j], own.at[1][i] - other.at[1][j], own.at[2][i] - other.at[2][j]);
  if constexpr (kChannels == 4) d = add_channel(norm, d, own.at[3][i] - other.at[3][j]);
  return d;
}

// Mean distance from the points of `own` to the nearest of `other`, the same in all lanes; writes the rows of the nearest.
template <class T, int kChannels>
__device__ double patch_direction(const Side<T>& side, const Patch<T, kChannels>& own, int n, const Patch<T, kChannels>& other, int m,
                                  int64_t other_row, int64_t b, int norm, int lane) {
  const int64_t row = side.clouds.begin(b);
  double sum = 0;
  int count = 0;
  for (int i = lane; i < side.clouds.stride; i += 32) {
    T best = infinity<T>();
    int32_t index = -1;
    if (i < n)
      for (int j = 0; j < m; ++j) keep_nearer(patch_distance(norm, own, i, other, j), j, best, index);
    side.nearest[row + i] = index < 0 ? -1 : other_row + index;
    if (index >= 0) sum += static_cast<double>(norm == kEuclidean ? root(best) : best), ++count;
  }
  sum = warp_sum(sum), count = warp_sum(count);
  return sum / static_cast<double>(count > 0 ? count : 1);
}

template <class T, int kChannels>
__global__ void __launch_bounds__(kPatchThreads) patch_kernel(Job<T> job) {
  constexpr int kWarps = kPatchThreads / 32;
  using Points = Patch<T, kChannels>;
  GPU_SHARED(Points, patches, 2 * kWarps);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int64_t b = int64_t{blockIdx.x} * kWarps + warp;
  if (b >= job.x.clouds.batch) return;  // whole warps, and no barrier below
  Points &x = patches[2 * warp], &y = patches[2 * warp + 1];
  const int n = load_patch(job.x, job.channels, b, lane, x), m = load_patch(job.y, job.channels, b, lane, y);
  __syncwarp();
  double total = 0;
  if (job.x.nearest) total += patch_direction(job.x, x, n, y, m, job.y.clouds.begin(b), b, job.norm, lane);
  if (job.y.nearest) total += patch_direction(job.y, y, m, x, n, job.x.clouds.begin(b), b, job.norm, lane);
  if (lane == 0) job.loss[b] = static_cast<T>(total);
}

// Large clouds --------------------------------------------------------------------------------------------------------------------------

// A block has `kThreads` consecutive rows of one side, whichever clouds they belong to, and goes through those clouds one by one.
template <class T>
__global__ void __launch_bounds__(kThreads) nearest_kernel(Side<T> own, Side<T> other, int norm) {
  GPU_SHARED(T, tile, 3 * kTile);
  const int t = threadIdx.x;
  const int64_t first = int64_t{blockIdx.x} * kThreads, row = first + t, last = min(first + kThreads, own.rows) - 1;
  const int64_t from = own.clouds.cloud_of(first), to = own.clouds.cloud_of(last);
  int64_t mine = -1;
  T x = T(0), y = T(0), z = T(0), best = infinity<T>();
  if (row < own.rows) {
    mine = own.clouds.cloud_of(row);
    if (row - own.clouds.begin(mine) >= own.clouds.size(mine)) mine = -1;  // padding
    x = own.points[3 * row], y = own.points[3 * row + 1], z = own.points[3 * row + 2];
  }
  int32_t index = -1;
  for (int64_t b = from; b <= to; ++b) {
    const T* p = other.points + 3 * other.clouds.begin(b);
    const int64_t n = other.clouds.size(b);
    for (int64_t begin = 0; begin < n; begin += kTile) {
      const int count = static_cast<int>(min(int64_t{kTile}, n - begin));
      for (int i = t; i < 3 * count; i += kThreads) tile[i] = p[3 * begin + i];
      __syncthreads();
      if (mine == b)
        for (int j = 0; j < count; ++j)
          keep_nearer(measure(norm, x - tile[3 * j], y - tile[3 * j + 1], z - tile[3 * j + 2]), static_cast<int32_t>(begin) + j, best, index);
      __syncthreads();
    }
  }
  if (row >= own.rows) return;
  own.nearest[row] = index < 0 ? -1 : other.clouds.begin(mine) + index;
  own.distance[row] = norm == kEuclidean ? root(best) : best;
}

// The same for any number of channels: the distances to kPoints points grow channel by channel, from tiles of kPoints x kChannels values.
template <class T>
__global__ void __launch_bounds__(kThreads) nearest_of_channels_kernel(Side<T> own, Side<T> other, int64_t channels, int norm) {
  constexpr int kPoints = 16, kChannels = 32;
  GPU_SHARED(T, tile, kPoints * kChannels);
  const int t = threadIdx.x;
  const int64_t first = int64_t{blockIdx.x} * kThreads, row = first + t, last = min(first + kThreads, own.rows) - 1;
  const int64_t from = own.clouds.cloud_of(first), to = own.clouds.cloud_of(last);
  int64_t mine = -1;
  if (row < own.rows) {
    mine = own.clouds.cloud_of(row);
    if (row - own.clouds.begin(mine) >= own.clouds.size(mine)) mine = -1;  // padding
  }
  T best = infinity<T>();
  int32_t index = -1;
  for (int64_t b = from; b <= to; ++b) {
    const T* p = other.points + channels * other.clouds.begin(b);
    const int64_t n = other.clouds.size(b);
    for (int64_t begin = 0; begin < n; begin += kPoints) {
      T sum[kPoints] = {};
      for (int64_t c0 = 0; c0 < channels; c0 += kChannels) {
        const int width = static_cast<int>(min(int64_t{kChannels}, channels - c0));
        __syncthreads();  // the last tile is still being read
        for (int i = t; i < kPoints * width; i += kThreads) {
          const int64_t j = min(begin + i / width, n - 1);  // the last point once more is not closer than itself
          tile[i / width * kChannels + i % width] = p[j * channels + c0 + i % width];
        }
        __syncthreads();
        if (mine != b) continue;
        for (int c = 0; c < width; ++c) {
          const T q = own.points[row * channels + c0 + c];
#pragma unroll
          for (int j = 0; j < kPoints; ++j) sum[j] = add_channel(norm, sum[j], q - tile[j * kChannels + c]);
        }
      }
      if (mine != b) continue;
#pragma unroll
      for (int j = 0; j < kPoints; ++j) keep_nearer(sum[j], static_cast<int32_t>(begin) + j, best, index);
    }
  }
  if (row >= own.rows) return;
  own.nearest[row] = index < 0 ? -1 : other.clouds.begin(mine) + index;
  own.distance[row] = norm == kEuclidean ? root(best) : best;
}

// Sum over the rows of one cloud and their number, in a fixed order; valid in thread 0. Called by whole blocks.
template <class T, class F>
__device__ double block_mean(const Side<T>& side, int64_t b, F value) {
  constexpr int kWarps = kThreads / 32;
  GPU_SHARED(double, sums, kWarps);
  GPU_SHARED(int64_t, counts, kWarps);
  const int t = threadIdx.x;
  const int64_t begin = side.clouds.begin(b), end = begin + side.clouds.size(b);
  double sum = 0;
  int64_t count = 0;
  for (int64_t row = begin + t; row < end; row += kThreads)
    if (side.nearest[row] >= 0) sum += value(row), ++count;
  sum = warp_sum(sum), count = warp_sum(count);
  __syncthreads();  // the arrays may still be read from an earlier call
  if (t % 32 == 0) sums[t / 32] = sum, counts[t / 32] = count;
  __syncthreads();
  sum = 0, count = 0;
  for (int w = 0; w < kWarps; ++w) sum += sums[w], count += counts[w];
  return sum / static_cast<double>(count > 0 ? count : 1);
}

template <class T>
__global__ void __launch_bounds__(kThreads) loss_kernel(Job<T> job) {
  for (int64_t b = blockIdx.x; b < job.x.clouds.batch; b += gridDim.x) {
    double total = 0;
    if (job.x.nearest) total += block_mean(job.x, b, [&](int64_t row) { return static_cast<double>(job.x.distance[row]); });
    if (job.y.nearest) total += block_mean(job.y, b, [&](int64_t row) { return static_cast<double>(job.y.distance[row]); });
    if (threadIdx.x == 0) job.loss[b] = static_cast<T>(total);
  }
}

// Gradient ------------------------------------------------------------------------------------------------------------------------------

// What one unit of loss of a pair weighs for each of the points that have a nearest one: grad / their number.
template <class T>
__global__ void __launch_bounds__(kThreads) weight_kernel(Side<T> side, const T* grad, T* weight) {
  constexpr int kWarps = kThreads / 32;
  GPU_SHARED(int64_t, counts, kWarps);
  const int t = threadIdx.x;
  for (int64_t b = blockIdx.x; b < side.clouds.batch; b += gridDim.x) {
    const int64_t begin = side.clouds.begin(b), end = begin + side.clouds.size(b);
    int64_t count = 0;
    for (int64_t row = begin + t; row < end; row += kThreads) count += side.nearest[row] >= 0;
    count = warp_sum(count);
    __syncthreads();
    if (t % 32 == 0) counts[t / 32] = count;
    __syncthreads();
    if (t == 0) {
      count = 0;
      for (int w = 0; w < kWarps; ++w) count += counts[w];
      weight[b] = grad[b] / static_cast<T>(count > 0 ? count : 1);
    }
  }
}

// Adds sign * the gradient of weight * d(a, b) with respect to a.
template <class T>
__device__ __forceinline__ void add_pull(int norm, const T* a, const T* b, T weight, T sign, T* sum) {
  T d[3] = {a[0] - b[0], a[1] - b[1], a[2] - b[2]}, scale = 2 * weight;
  if (norm == kManhattan) {
    scale = weight;
    for (T& v : d) v = static_cast<T>((v > T(0)) - (v < T(0)));
  } else if (norm == kEuclidean) {
    const T length = root(squared(d[0], d[1], d[2]));
    scale = length > T(0) ? weight / length : T(0);
  }
  for (int axis = 0; axis < 3; ++axis) sum[axis] += sign * (scale * d[axis]);
}

template <class T>
struct Gradient {
  int norm;
  const T *x_weight, *y_weight;   // per pair, null in a direction that is not asked for
  const int64_t *order, *starts;  // inverse map over the rows of y, then those of x; null for patches
  int64_t x_entries;              // entries of the map that come from rows of x
};

// Gradient of one row of `own`: the pull of its nearest point, and those of the points of the other side to which it is the nearest, in the
// order of the CPU kernel. `map_row` is the row's number in the inverse map.
template <class T>
__device__ void gradient_of_row(const Side<T>& own, const Side<T>& other, const Gradient<T>& g, const T* own_weight, const T* other_weight,
                                int64_t row, int64_t map_row, int64_t entry_base, bool own_first, T* out) {
  const int64_t b = own.clouds.cloud_of(row);
  const T* a = own.points + 3 * row;
  T sum[3] = {};
  const auto pull_own = [&] {
    const int64_t nearest = own_weight ? own.nearest[row] : -1;
    if (nearest >= 0) add_pull(g.norm, a, other.points + 3 * nearest, own_weight[b], T(1), sum);
  };
  if (own_first) pull_own();
  if (other_weight) {
    if (g.order) {
      for (int64_t i = g.starts[map_row]; i < g.starts[map_row + 1]; ++i)
        add_pull(g.norm, other.points + 3 * (g.order[i] - entry_base), a, other_weight[b], T(-1), sum);
    } else {
      const int64_t begin = other.clouds.begin(b), end = begin + other.clouds.size(b);
      for (int64_t j = begin; j < end; ++j)
        if (other.nearest[j] == row) add_pull(g.norm, other.points + 3 * j, a, other_weight[b], T(-1), sum);
    }
  }
  if (!own_first) pull_own();
  for (int axis = 0; axis < 3; ++axis) out[3 * row + axis] = sum[axis];
}

template <class T>
__global__ void __launch_bounds__(kThreads) gradient_kernel(Side<T> x, Side<T> y, Gradient<T> g, T* grad_x, T* grad_y) {
  const int64_t threads = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < x.rows + y.rows; i += threads) {
    if (i < x.rows) gradient_of_row(x, y, g, g.x_weight, g.y_weight, i, y.rows + i, g.x_entries, true, grad_x);
    else gradient_of_row(y, x, g, g.y_weight, g.x_weight, i - x.rows, i - x.rows, int64_t{0}, false, grad_y);
  }
}

// The same for one channel of a row of any number of channels.
template <class T>
__device__ T pull_of_channel(int norm, const T* a, const T* b, int64_t channels, int64_t c, T weight) {
  const T d = a[c] - b[c];
  if (norm == kManhattan) return weight * static_cast<T>((d > T(0)) - (d < T(0)));
  if (norm == kSquared) return 2 * weight * d;
  T square = T(0);
  for (int64_t i = 0; i < channels; ++i) square = add_channel(kSquared, square, a[i] - b[i]);
  return square > T(0) ? weight / root(square) * d : T(0);
}

template <class T>
__device__ void gradient_of_channel(const Side<T>& own, const Side<T>& other, const Gradient<T>& g, int64_t channels, const T* own_weight,
                                    const T* other_weight, int64_t row, int64_t c, int64_t map_row, int64_t entry_base, bool own_first,
                                    T* out) {
  const int64_t b = own.clouds.cloud_of(row);
  const T* a = own.points + channels * row;
  T sum = T(0);
  const auto pull_own = [&] {
    const int64_t nearest = own_weight ? own.nearest[row] : -1;
    if (nearest >= 0) sum += pull_of_channel(g.norm, a, other.points + channels * nearest, channels, c, own_weight[b]);
  };
  const auto pull_other = [&](int64_t j) { sum -= pull_of_channel(g.norm, other.points + channels * j, a, channels, c, other_weight[b]); };
  if (own_first) pull_own();
  if (other_weight && g.order) {
    for (int64_t i = g.starts[map_row]; i < g.starts[map_row + 1]; ++i) pull_other(g.order[i] - entry_base);
  } else if (other_weight) {
    const int64_t begin = other.clouds.begin(b), end = begin + other.clouds.size(b);
    for (int64_t j = begin; j < end; ++j)
      if (other.nearest[j] == row) pull_other(j);
  }
  if (!own_first) pull_own();
  out[channels * row + c] = sum;
}

template <class T>
__global__ void __launch_bounds__(kThreads) gradient_of_channels_kernel(Side<T> x, Side<T> y, Gradient<T> g, int64_t channels, T* grad_x,
                                                                        T* grad_y) {
  const int64_t threads = int64_t{gridDim.x} * kThreads, all = (x.rows + y.rows) * channels;
  for (int64_t e = int64_t{blockIdx.x} * kThreads + threadIdx.x; e < all; e += threads) {
    const int64_t i = e / channels, c = e - i * channels;
    if (i < x.rows) gradient_of_channel(x, y, g, channels, g.x_weight, g.y_weight, i, c, y.rows + i, g.x_entries, true, grad_x);
    else gradient_of_channel(y, x, g, channels, g.y_weight, g.x_weight, i - x.rows, c, i - x.rows, int64_t{0}, false, grad_y);
  }
}

// Launches what finds the nearest points of one side.
template <class T>
cudaError_t find_nearest(const Side<T>& own, const Side<T>& other, int64_t channels, int norm, cudaStream_t stream) {
  if (!own.nearest || own.rows == 0) return cudaSuccess;
  const dim3 grid = blocks_for(own.rows, kThreads), block(kThreads);
  if (channels == 3) return gpu::launch(nearest_kernel<T>, grid, block, 0, stream, own, other, norm);
  return gpu::launch(nearest_of_channels_kernel<T>, grid, block, 0, stream, own, other, channels, norm);
}

template <class T>
Job<T> make_job(const void* x, const int64_t* x_offsets, const int64_t* x_lengths, int64_t n, const void* y, const int64_t* y_offsets,
                const int64_t* y_lengths, int64_t m, int64_t batch, int64_t channels, int norm, int direction, int64_t* nearest, T* distance,
                T* loss) {
  Side<T> xs{static_cast<const T*>(x), {x_offsets, x_lengths, batch, n}, x_offsets ? n : batch * n, nullptr, nullptr};
  Side<T> ys{static_cast<const T*>(y), {y_offsets, y_lengths, batch, m}, y_offsets ? m : batch * m, nullptr, nullptr};
  const int64_t x_entries = direction == kFromY ? 0 : xs.rows;
  if (direction != kFromY) xs.nearest = nearest, xs.distance = distance;
  if (direction != kFromX) ys.nearest = nearest + x_entries, ys.distance = distance ? distance + x_entries : nullptr;
  return {xs, ys, channels, norm, loss};
}

inline dim3 one_per(int64_t batch) { return dim3(static_cast<unsigned>(batch > (1 << 20) ? (1 << 20) : batch)); }

}  // namespace
}  // namespace geossl

// See geossl/ops/chamfer.py for the arguments of both; the last workspace of the second holds two weights per pair.
GEOSSL_API int geossl_chamfer_cuda(int device, void* stream, int is_double, const void* x, const int64_t* x_offsets, const int64_t* x_lengths,
                                   int64_t n, const void* y, const int64_t* y_offsets, const int64_t* y_lengths, int64_t m, int64_t batch,
                                   int64_t channels, int norm, int direction, int64_t* nearest, void* distance, void* loss) {
  using namespace geossl;
  if (batch < 0 || n < 0 || m < 0 || channels < 1) return GEOSSL_INVALID_ARGUMENT;
  if ((!x_offsets && n > kMaxCloud) || (!y_offsets && m > kMaxCloud)) return GEOSSL_TOO_LARGE;
  if (batch == 0) return GEOSSL_OK;
  return on_device(device, is_double, [&](auto zero) {
    using T = decltype(zero);
    const cudaStream_t s = as_stream(stream);
    const Job<T> job = make_job<T>(x, x_offsets, x_lengths, n, y, y_offsets, y_lengths, m, batch, channels, norm, direction, nearest,
                                   static_cast<T*>(distance), static_cast<T*>(loss));
    if (!x_offsets && n <= kPatch && m <= kPatch && channels <= 4) {
      const dim3 grid = blocks_for(batch, kPatchThreads / 32), block(kPatchThreads);
      return channels == 4 ? gpu::launch(patch_kernel<T, 4>, grid, block, 0, s, job) : gpu::launch(patch_kernel<T, 3>, grid, block, 0, s, job);
    }
    cudaError_t error = find_nearest(job.x, job.y, channels, norm, s);
    if (error == cudaSuccess) error = find_nearest(job.y, job.x, channels, norm, s);
    return error != cudaSuccess ? error : gpu::launch(loss_kernel<T>, one_per(batch), dim3(kThreads), 0, s, job);
  });
}
GEOSSL_PACKED(geossl_chamfer_cuda)

GEOSSL_API int geossl_chamfer_backward_cuda(int device, void* stream, int is_double, const void* x, const int64_t* x_offsets,
                                            const int64_t* x_lengths, int64_t n, const void* y, const int64_t* y_offsets,
                                            const int64_t* y_lengths, int64_t m, int64_t batch, int64_t channels, int norm,
                                            int direction, const int64_t* nearest, const void* grad, const int64_t* order, const int64_t* starts,
                                            void* weights, void* grad_x, void* grad_y) {
  using namespace geossl;
  if (batch < 0 || n < 0 || m < 0 || channels < 1) return GEOSSL_INVALID_ARGUMENT;
  return on_device(device, is_double, [&](auto zero) {
    using T = decltype(zero);
    const cudaStream_t s = as_stream(stream);
    const Job<T> job = make_job<T>(x, x_offsets, x_lengths, n, y, y_offsets, y_lengths, m, batch, channels, norm, direction,
                                   const_cast<int64_t*>(nearest), nullptr, nullptr);
    if (job.x.rows + job.y.rows == 0) return cudaSuccess;
    auto* weight = static_cast<T*>(weights);
    cudaError_t error = cudaSuccess;
    if (job.x.nearest) error = gpu::launch(weight_kernel<T>, one_per(batch), dim3(kThreads), 0, s, job.x, static_cast<const T*>(grad), weight);
    if (error == cudaSuccess && job.y.nearest)
      error = gpu::launch(weight_kernel<T>, one_per(batch), dim3(kThreads), 0, s, job.y, static_cast<const T*>(grad), weight + batch);
    const Gradient<T> gradient{norm, job.x.nearest ? weight : nullptr, job.y.nearest ? weight + batch : nullptr, order, starts,
                               job.x.nearest ? job.x.rows : 0};
    if (error != cudaSuccess) return error;
    const int64_t rows = job.x.rows + job.y.rows;
    auto *gx = static_cast<T*>(grad_x), *gy = static_cast<T*>(grad_y);
    if (channels == 3) return gpu::launch(gradient_kernel<T>, blocks_for(rows, kThreads), dim3(kThreads), 0, s, job.x, job.y, gradient, gx, gy);
    return gpu::launch(gradient_of_channels_kernel<T>, blocks_for(rows * channels, kThreads), dim3(kThreads), 0, s, job.x, job.y, gradient,
                       channels, gx, gy);
  });
}
GEOSSL_PACKED(geossl_chamfer_backward_cuda)
