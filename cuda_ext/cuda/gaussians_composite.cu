// Gaussian splatting: blending and its gradient. One block per tile of 16 x 16 pixels, one thread per pixel.
#include "gaussians.h"
#include "warp.cuh"

namespace geossl {
namespace {

constexpr int kThreads = kTileSize * kTileSize, kWarps = kThreads / 32;
constexpr int kFused = 4;   // channels kept in registers; further ones go through memory
constexpr int kBasic = 6;   // of a slot: v_u, v_v, v_a, v_b, v_c, v_opacity
constexpr int kSharedBytes = 40 * 1024, kLargestBatch = 32;

struct Drawing {
  const float *means2d, *conics, *opacities, *features, *depths;
  const int32_t *ids, *places;
  const int64_t *tile_starts, *starts;
  int64_t images, cameras, count, channels;
  bool features_per_camera, with_depths;
  int width, height, across, down;
  const float* background;

  __host__ __device__ int64_t blended() const { return channels + (with_depths ? 1 : 0); }
  __host__ __device__ int64_t tiles() const { return images * across * down; }
  __device__ __forceinline__ float feature(int64_t row, int64_t channel) const {
    if (channel >= channels) return depths[row];
    return features[(features_per_camera ? row : row / (cameras * count) * count + row % count) * channels + channel];
  }
};

struct Record {
  float u, v, ha, b, hc, opacity, feature[kFused];
  int32_t row;
};

__device__ __forceinline__ void load_record(const Drawing& d, int64_t entry, Record& r) {
  const int32_t row = d.ids[entry];
  r.row = row;
  r.u = d.means2d[2 * int64_t{row}], r.v = d.means2d[2 * int64_t{row} + 1];
  r.ha = 0.5f * d.conics[3 * int64_t{row}], r.b = d.conics[3 * int64_t{row} + 1], r.hc = 0.5f * d.conics[3 * int64_t{row} + 2];
  r.opacity = d.opacities[row];
  float sum = 0;
  for (int64_t c = 0; c < d.blended(); ++c) {
    const float f = d.feature(row, c);
    sum += f - f;
  }
  const bool finite = sum == 0.0f;  // a Gaussian with a feature that is not finite is not drawn
#pragma unroll
  for (int c = 0; c < kFused; ++c) r.feature[c] = finite && c < d.blended() ? d.feature(row, c) : 0.0f;
  if (!finite) r.opacity = 0;
}

// exp(-sigma) times the opacity, 0 where nothing is to be added. The same operations as on the CPU.
struct Reach {
  float dx, dy, raw, alpha;

  __device__ __forceinline__ Reach(const Record& r, float x, float y) : dx(x - r.u), dy(y - r.v) {
    const float sigma = (r.ha * dx + r.b * dy) * dx + r.hc * dy * dy;
    raw = r.opacity * exp_minus(sigma);
    alpha = raw < kMaxAlpha<float> ? raw : kMaxAlpha<float>;
    alpha = sigma >= 0.0f && alpha >= kMinAlpha<float> ? alpha : 0.0f;
  }
};

struct Pixel {
  int64_t image, number;  // of the pixel in all images
  float x, y;
  bool inside;

  __device__ __forceinline__ Pixel(const Drawing& d, int64_t tile) {
    const int64_t per_image = int64_t{d.across} * d.down, local = tile % per_image;
    image = tile / per_image;
    const int column = static_cast<int>(local % d.across) * kTileSize + static_cast<int>(threadIdx.x) % kTileSize;
    const int row = static_cast<int>(local / d.across) * kTileSize + static_cast<int>(threadIdx.x) / kTileSize;
    x = static_cast<float>(column) + 0.5f, y = static_cast<float>(row) + 0.5f;
    inside = column < d.width && row < d.height;
    number = (image * d.height + row) * d.width + column;
  }
};

struct Images {
  float *render, *alpha, *rest;
  int32_t *last, *largest;
  float* heaviest;
};

// Four blocks a multiprocessor: with room for five, registers spill on sm_120.
__global__ void __launch_bounds__(kThreads, 4) composite_kernel(Drawing d, Images out) {
  GPU_SHARED(Record, records, kThreads);
  const int64_t blended = d.blended();
  for (int64_t tile = blockIdx.x; tile < d.tiles(); tile += gridDim.x) {
    const Pixel pixel(d, tile);
    const int64_t begin = d.tile_starts[tile], end = d.tile_starts[tile + 1];
    float rest = 1.0f, sum[kFused] = {}, heaviest = 0.0f;
    int32_t last = 0, largest = -1;
    bool done = !pixel.inside;
    float* further = out.render + pixel.number * blended;
    if (pixel.inside)
      for (int64_t c = kFused; c < blended; ++c) further[c] = 0.0f;
    for (int64_t from = begin; from < end; from += kThreads) {
      if (__syncthreads_count(done) == kThreads) break;
      const int size = static_cast<int>(end - from < kThreads ? end - from : kThreads);
      if (static_cast<int>(threadIdx.x) < size) load_record(d, from + threadIdx.x, records[threadIdx.x]);
      __syncthreads();
      for (int i = 0; i < size && !done; ++i) {
        const Record& r = records[i];
        const Reach reach(r, pixel.x, pixel.y);
        const float after = rest * (1.0f - reach.alpha), weight = reach.alpha * rest;
        if (reach.alpha == 0.0f) continue;
        if (after <= kMinTransmittance<float>) {
          done = true;
          break;
        }
        rest = after;
        last = static_cast<int32_t>(from - begin) + i + 1;
#pragma unroll
        for (int c = 0; c < kFused; ++c) sum[c] += weight * r.feature[c];
        for (int64_t c = kFused; c < blended; ++c) further[c] += weight * d.feature(r.row, c);
        if (weight > heaviest) heaviest = weight, largest = static_cast<int32_t>(r.row % d.count);
      }
    }
    __syncthreads();  // the next tile's records
    if (!pixel.inside) continue;
#pragma unroll
    for (int c = 0; c < kFused; ++c)
      if (c < blended) further[c] = sum[c];
    for (int64_t c = 0; d.background && c < d.channels; ++c) further[c] += rest * d.background[pixel.image * d.channels + c];
    out.alpha[pixel.number] = 1.0f - rest;
    out.rest[pixel.number] = rest;
    out.last[pixel.number] = last;
    if (out.largest) out.largest[pixel.number] = largest, out.heaviest[pixel.number] = heaviest;
  }
}

struct Incoming {
  const float* rest;
  const int32_t* last;
  const float *render, *alpha;
};

// Writes a number's sum over the warp to a place of the warp's own.
__device__ __forceinline__ void add_up(float value, float* to) {
  const float sum = warp_sum(value);
  if (threadIdx.x % 32 == 0) *to = sum;
}

// Walks a tile's list back to front in batches. Every warp leaves the sums over its pixels in shared memory, and the block adds up the warps'
// sums in order and writes them to the entry's slot: no atomics.
__global__ void __launch_bounds__(kThreads) gradient_kernel(Drawing d, Incoming in, bool absolute, int batch, float* slots) {
  GPU_SHARED(Record, records, kLargestBatch);
  GPU_SHARED(int32_t, last_of_warp, kWarps);
  GPU_DYNAMIC_SHARED(float, partial);  // [batch][kWarps][size]
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32, basic = kBasic + (absolute ? 2 : 0);
  const int64_t blended = d.blended();
  const int size = basic + static_cast<int>(blended);
  for (int64_t tile = blockIdx.x; tile < d.tiles(); tile += gridDim.x) {
    const Pixel pixel(d, tile);
    const int64_t begin = d.tile_starts[tile];
    const float* gradient = in.render + pixel.number * blended;
    float g[kFused] = {}, rest = 1.0f, s = 0.0f;
    int32_t last = 0;
    if (pixel.inside) {
      rest = in.rest[pixel.number], last = in.last[pixel.number];
      float behind = -in.alpha[pixel.number];
#pragma unroll
      for (int c = 0; c < kFused; ++c)
        if (c < blended) g[c] = gradient[c];
      for (int64_t c = 0; d.background && c < d.channels; ++c) behind += d.background[pixel.image * d.channels + c] * gradient[c];
      s = rest * behind;
    }
    const int last_here = warp_max(last);
    if (lane == 0) last_of_warp[warp] = last_here;
    __syncthreads();
    int last_of_all = 0;
    for (int w = 0; w < kWarps; ++w) last_of_all = last_of_warp[w] > last_of_all ? last_of_warp[w] : last_of_all;
    const int64_t entries = d.tile_starts[tile + 1] - begin;
    for (int64_t k = int64_t{last_of_all} * size + threadIdx.x; k < entries * size; k += kThreads) {
      const int64_t entry = begin + k / size;
      slots[(d.starts[d.ids[entry]] + d.places[entry]) * size + k % size] = 0.0f;
    }
    for (int to = last_of_all; to > 0; to -= batch) {
      const int from = to > batch ? to - batch : 0, filled = to - from;
      if (static_cast<int>(threadIdx.x) < filled) load_record(d, begin + from + threadIdx.x, records[threadIdx.x]);
      __syncthreads();
      for (int i = filled - 1; i >= 0; --i) {
        const Record& r = records[i];
        float* own = partial + (i * kWarps + warp) * size;
        const Reach reach(r, pixel.x, pixel.y);
        const bool active = last >= from + i + 1 && reach.alpha > 0.0f;
        if (!__any_sync(kAllLanes, active)) {
          for (int k = lane; k < size; k += 32) own[k] = 0.0f;
          continue;
        }
        float weight = 0.0f, v_sigma = 0.0f;
        if (active) {
          const float inverse = 1.0f / (1.0f - reach.alpha), before = rest * inverse;
          weight = reach.alpha * before;
          float dot = r.feature[0] * g[0] + r.feature[1] * g[1] + r.feature[2] * g[2] + r.feature[3] * g[3];
          for (int64_t c = kFused; c < blended; ++c) dot += d.feature(r.row, c) * gradient[c];
          v_sigma = reach.raw < kMaxAlpha<float> ? -reach.alpha * (before * dot - s * inverse) : 0.0f;
          rest = before, s += weight * dot;
        }
        // dx and dy point from the centre to the pixel, so moving the centre has the other sign.
        const float v_u = -v_sigma * (2.0f * r.ha * reach.dx + r.b * reach.dy), v_v = -v_sigma * (r.b * reach.dx + 2.0f * r.hc * reach.dy);
        add_up(v_u, own), add_up(v_v, own + 1);
        add_up(0.5f * v_sigma * reach.dx * reach.dx, own + 2);
        add_up(v_sigma * reach.dx * reach.dy, own + 3);
        add_up(0.5f * v_sigma * reach.dy * reach.dy, own + 4);
        add_up(-v_sigma / r.opacity, own + 5);
        if (absolute) add_up(fabsf(v_u), own + 6), add_up(fabsf(v_v), own + 7);
#pragma unroll
        for (int c = 0; c < kFused; ++c)
          if (c < blended) add_up(weight * g[c], own + basic + c);
        for (int64_t c = kFused; c < blended; ++c) add_up(pixel.inside ? weight * gradient[c] : 0.0f, own + basic + c);
      }
      __syncthreads();
      for (int k = static_cast<int>(threadIdx.x); k < filled * size; k += kThreads) {
        const int i = k / size, value = k - i * size;
        const int64_t entry = begin + from + i;
        float sum = 0.0f;
        for (int w = 0; w < kWarps; ++w) sum += partial[(i * kWarps + w) * size + value];
        slots[(d.starts[records[i].row] + d.places[entry]) * size + value] = sum;
      }
      __syncthreads();
    }
    __syncthreads();
  }
}

struct Outgoing {
  float *means2d, *conics, *opacities, *features, *depths, *absolute;
};

// Adds up the slots of every Gaussian in order; features shared by the cameras of a scene over these too. One thread per number.
__global__ void __launch_bounds__(256) add_slots_kernel(Drawing d, const float* slots, Outgoing out) {
  const int basic = kBasic + (out.absolute ? 2 : 0);
  const int64_t size = basic + d.blended(), stride = int64_t{gridDim.x} * 256;
  for (int64_t t = int64_t{blockIdx.x} * 256 + threadIdx.x; t < d.images * d.count * size; t += stride) {
    const int64_t row = t / size, k = t - row * size, feature = k - basic;
    const bool shared = feature >= 0 && feature < d.channels && !d.features_per_camera;
    if (shared && row / d.count % d.cameras != 0) continue;
    float total = 0.0f;
    for (int64_t camera = 0; camera < (shared ? d.cameras : 1); ++camera) {
      const int64_t from = row + camera * d.count;
      float sum = 0.0f;
      for (int64_t slot = d.starts[from]; slot < d.starts[from + 1]; ++slot) sum += slots[slot * size + k];
      total += sum;
    }
    if (k < 2) out.means2d[2 * row + k] = total;
    else if (k < 5) out.conics[3 * row + k - 2] = total;
    else if (k < kBasic) out.opacities[row] = total;
    else if (k < basic) out.absolute[2 * row + k - kBasic] = total;
    else if (feature >= d.channels) out.depths[row] = total;
    else out.features[(shared ? row / (d.cameras * d.count) * d.count + row % d.count : row) * d.channels + feature] = total;
  }
}

Drawing make_drawing(const void* means2d, const void* conics, const void* opacities, const void* features, const void* depths, const int32_t* ids,
                     const int32_t* places, const int64_t* tile_starts, const int64_t* starts, int64_t images, int64_t cameras, int64_t count,
                     int64_t channels, int features_per_camera, int with_depths, int width, int height, const void* background) {
  const auto in = [](const void* p) { return static_cast<const float*>(p); };
  return {in(means2d), in(conics), in(opacities), in(features), in(depths), ids, places, tile_starts, starts, images, cameras, count, channels,
          features_per_camera != 0, with_depths != 0, width, height, (width + kTileSize - 1) / kTileSize, (height + kTileSize - 1) / kTileSize, in(background)};
}

}  // namespace
}  // namespace geossl

// See geossl/ops/_gaussians.py for the arguments; float32 alone.
GEOSSL_API int geossl_gaussians_composite_cuda(int device, void* stream, int is_double, const void* means2d, const void* conics,
                                               const void* opacities, const void* features, const void* depths, const int32_t* ids,
                                               const int32_t* places, const int64_t* tile_starts, const int64_t* starts, int64_t images,
                                               int64_t cameras, int64_t count, int64_t channels, int features_per_camera, int with_depths, int width, int height,
                                               const void* background, void* render, void* alpha, void* rest, int32_t* last, int32_t* largest,
                                               void* heaviest) {
  using namespace geossl;
  if (is_double || images < 0 || cameras < 1 || count < 0 || channels < 0 || width < 1 || height < 1) return GEOSSL_INVALID_ARGUMENT;
  if (images == 0) return GEOSSL_OK;
  return on_device(device, 0, [&](auto) {
    const Drawing d = make_drawing(means2d, conics, opacities, features, depths, ids, places, tile_starts, starts, images, cameras, count,
                                   channels, features_per_camera, with_depths, width, height, background);
    const auto to = [](void* p) { return static_cast<float*>(p); };
    const Images out{to(render), to(alpha), to(rest), last, largest, to(heaviest)};
    return gpu::launch(composite_kernel, blocks_for(d.tiles(), 1), dim3(kThreads), 0, as_stream(stream), d, out);
  });
}
GEOSSL_PACKED(geossl_gaussians_composite_cuda)

GEOSSL_API int geossl_gaussians_composite_backward_cuda(
    int device, void* stream, int is_double, const void* means2d, const void* conics, const void* opacities, const void* features,
    const void* depths, const int32_t* ids, const int32_t* places, const int64_t* tile_starts, const int64_t* starts, int64_t images,
    int64_t cameras, int64_t count, int64_t channels, int features_per_camera, int with_depths, int width, int height, const void* background, const void* rest,
    const int32_t* last, const void* v_render, const void* v_alpha, void* slots, void* v_means2d, void* v_conics, void* v_opacities,
    void* v_features, void* v_depths, void*, void* v_absolute) {
  using namespace geossl;
  if (is_double || images < 0 || cameras < 1 || count < 0 || channels < 0 || width < 1 || height < 1) return GEOSSL_INVALID_ARGUMENT;
  if (images * count == 0) return GEOSSL_OK;
  const int64_t bytes = (kBasic + (v_absolute ? 2 : 0) + channels + (with_depths ? 1 : 0)) * kWarps * static_cast<int64_t>(sizeof(float));
  if (bytes > kSharedBytes) return GEOSSL_TOO_LARGE;
  const int batch = static_cast<int>(kSharedBytes / bytes < kLargestBatch ? kSharedBytes / bytes : kLargestBatch);
  return on_device(device, 0, [&](auto) {
    const Drawing d = make_drawing(means2d, conics, opacities, features, depths, ids, places, tile_starts, starts, images, cameras, count,
                                   channels, features_per_camera, with_depths, width, height, background);
    const auto in = [](const void* p) { return static_cast<const float*>(p); };
    const auto to = [](void* p) { return static_cast<float*>(p); };
    const Incoming incoming{in(rest), last, in(v_render), in(v_alpha)};
    const cudaStream_t s = as_stream(stream);
    const cudaError_t error = gpu::launch(gradient_kernel, blocks_for(d.tiles(), 1), dim3(kThreads), static_cast<size_t>(bytes * batch), s, d,
                                          incoming, v_absolute != nullptr, batch, to(slots));
    if (error != cudaSuccess) return error;
    const Outgoing out{to(v_means2d), to(v_conics), to(v_opacities), to(v_features), to(v_depths), to(v_absolute)};
    const int64_t numbers = images * count * (bytes / kWarps / static_cast<int64_t>(sizeof(float)));
    return gpu::launch(add_slots_kernel, blocks_for(numbers, 256), dim3(256), 0, s, d, static_cast<const float*>(to(slots)), out);
  });
}
GEOSSL_PACKED(geossl_gaussians_composite_backward_cuda)
