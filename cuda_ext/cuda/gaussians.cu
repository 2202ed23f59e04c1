// Gaussian splatting: projection with its gradient, and the lists of tiles. One thread per Gaussian and image.
#include "gaussians.h"
#include "warp.cuh"

namespace geossl {
namespace {

constexpr int kThreads = 256;

struct Scenes {
  const float *means, *quats, *scales, *covars, *opacities, *viewmats, *Ks;
  int64_t batch, cameras, count;
  int width, height;
  double near_plane, far_plane, radius_clip, eps;
  bool antialiased;

  __device__ __forceinline__ Camera<float> camera(int64_t image) const {
    return Camera<float>(viewmats + 16 * image, Ks + 9 * image, width, height, near_plane, far_plane, radius_clip, eps, antialiased);
  }
  __device__ __forceinline__ bool shape(int64_t row, Shape<float>& out) const {
    return covars ? out.set(nullptr, nullptr, covars + 9 * row) : out.set(quats + 4 * row, scales + 3 * row, nullptr);
  }
};

struct Splats {
  float *means2d, *depths, *conics, *opacities;
  int32_t *radii, *tiles;
};

__global__ void __launch_bounds__(kThreads) project_kernel(Scenes scene, Splats out) {
  const int64_t total = scene.batch * scene.cameras * scene.count, stride = int64_t{gridDim.x} * kThreads;
  for (int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x; at < total; at += stride) {
    const int64_t image = at / scene.count, row = image / scene.cameras * scene.count + at % scene.count;
    const Camera<float> camera = scene.camera(image);
    Shape<float> shape;
    Projection<float> projection;
    Splat<float> s{};
    int tiles = 0;
    if (projection.set_center(camera, scene.means + 3 * row) && scene.shape(row, shape) && projection.set(camera, shape) &&
        projection.splat(camera, scene.opacities[row], s))
      tiles = count_tiles(s, scene.width, scene.height);
    else s = {};
    out.means2d[2 * at] = s.u, out.means2d[2 * at + 1] = s.v;
    out.depths[at] = s.depth;
    out.conics[3 * at] = s.a, out.conics[3 * at + 1] = s.b, out.conics[3 * at + 2] = s.c;
    out.opacities[at] = s.opacity;
    out.radii[2 * at] = s.rx, out.radii[2 * at + 1] = s.ry;
    out.tiles[at] = tiles;
  }
}

struct Gradients {
  const int32_t* radii;
  const float *means2d, *depths, *conics, *opacities;
};
struct SceneGradients {
  float *means, *quats, *scales, *covars, *opacities, *poses;  // poses: sums of 256 Gaussians each
};

// Sums 12 numbers over a block, in a fixed order.
__device__ void sum_pose(float* view, float* out) {
  constexpr int kWarps = kThreads / 32;
  GPU_SHARED(float, sums, kWarps * 12);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < 12; ++k) {
    const float sum = warp_sum(view[k]);
    if (lane == 0) sums[warp * 12 + k] = sum;
  }
  __syncthreads();
  if (threadIdx.x < 12) {
    float sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += sums[w * 12 + threadIdx.x];
    out[threadIdx.x] = sum;
  }
  __syncthreads();
}

// One block per 256 Gaussians of a scene; a thread goes through the cameras in order.
__global__ void __launch_bounds__(kThreads) project_gradient_kernel(Scenes scene, Gradients in, SceneGradients out) {
  const int64_t blocks = (scene.count + kThreads - 1) / kThreads;
  for (int64_t block = blockIdx.x; block < scene.batch * blocks; block += gridDim.x) {
    const int64_t b = block / blocks, i = block % blocks * kThreads + threadIdx.x, row = b * scene.count + i;
    const bool inside = i < scene.count;
    Shape<float> shape;
    const bool known = inside && scene.shape(row, shape);
    float v_mean[3] = {}, v_m[9] = {}, v_opacity = 0;
    for (int64_t c = 0; c < scene.cameras; ++c) {
      const int64_t image = b * scene.cameras + c, at = image * scene.count + i;
      float v_view[12] = {};
      if (known && (in.radii[2 * at] > 0 || in.radii[2 * at + 1] > 0)) {
        const Camera<float> camera = scene.camera(image);
        Projection<float> projection;
        const float* mean = scene.means + 3 * row;
        if (projection.set_center(camera, mean) && projection.set(camera, shape)) {
          const SplatGradient<float> g{in.means2d[2 * at],    in.means2d[2 * at + 1], in.depths[at],   in.conics[3 * at],
                                       in.conics[3 * at + 1], in.conics[3 * at + 2],  in.opacities[at]};
          project_gradient(camera, mean, shape, projection, scene.opacities[row], g, v_mean, v_m, &v_opacity, v_view);
        }
      }
      if (out.poses) sum_pose(v_view, out.poses + 12 * (image * blocks + block % blocks));
    }
    if (!inside) continue;
    for (int k = 0; k < 3; ++k) out.means[3 * row + k] = v_mean[k];
    out.opacities[row] = v_opacity;
    if (scene.covars) {
      for (int k = 0; k < 9; ++k) out.covars[9 * row + k] = v_m[k];
    } else {
      float v_quat[4] = {}, v_scale[3] = {};
      if (known) shape_gradient(shape, v_m, v_quat, v_scale);
      for (int k = 0; k < 4; ++k) out.quats[4 * row + k] = v_quat[k];
      for (int k = 0; k < 3; ++k) out.scales[3 * row + k] = v_scale[k];
    }
  }
}

// One key per Gaussian and tile: the tile, counted over all images, above the bits of the depth, which is positive. The sort is stable and
// entries are written in the order of Gaussians, so equal depths stay in that order.
__global__ void __launch_bounds__(kThreads) emit_kernel(const float* means2d, const float* conics, const float* opacities, const float* depths,
                                                        const int32_t* radii, int64_t images, int64_t count, int width, int height,
                                                        const int64_t* starts, uint64_t* keys, uint64_t* rows) {
  const int across = (width + kTileSize - 1) / kTileSize, down = (height + kTileSize - 1) / kTileSize;
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  for (int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x; row < images * count; row += stride) {
    if (radii[2 * row] == 0 && radii[2 * row + 1] == 0) continue;
    const int64_t first_tile = row / count * across * down, start = starts[row], end = starts[row + 1];
    const uint64_t depth = static_cast<uint32_t>(__float_as_int(depths[row]));
    int64_t at = start;
    const Ellipse<float> ellipse(means2d[2 * row], means2d[2 * row + 1], conics[3 * row], conics[3 * row + 1], conics[3 * row + 2], opacities[row]);
    ellipse.for_tile_rows(width, height, [&](int y, int left, int right) {
      for (int x = left; x < right && at < end; ++x, ++at) {
        keys[at] = static_cast<uint64_t>(first_tile + int64_t{y} * across + x) << 32 | depth;
        rows[at] = static_cast<uint64_t>(at - start) << 32 | static_cast<uint64_t>(row);
      }
    });
  }
}

// Splits sorted entries and notes where every tile begins.
__global__ void __launch_bounds__(kThreads) tile_range_kernel(const uint64_t* keys, const uint64_t* rows, int64_t entries, int64_t tiles,
                                                              int32_t* ids, int32_t* places, int64_t* tile_starts) {
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < entries; i += stride) {
    ids[i] = static_cast<int32_t>(rows[i] & 0xffffffffu), places[i] = static_cast<int32_t>(rows[i] >> 32);
    const auto tile = static_cast<int64_t>(keys[i] >> 32);
    const int64_t before = i > 0 ? static_cast<int64_t>(keys[i - 1] >> 32) : -1;
    for (int64_t t = before + 1; t <= tile; ++t) tile_starts[t] = i;
    if (i + 1 == entries)
      for (int64_t t = tile + 1; t <= tiles; ++t) tile_starts[t] = entries;
  }
}

const float* in(const void* p) { return static_cast<const float*>(p); }
float* to(void* p) { return static_cast<float*>(p); }

}  // namespace
}  // namespace geossl

// See geossl/ops/_gaussians.py for the arguments; float32 alone.
GEOSSL_API int geossl_gaussians_project_cuda(int device, void* stream, int is_double, const void* means, const void* quats, const void* scales,
                                             const void* covars, const void* opacities, const void* viewmats, const void* Ks, int64_t batch,
                                             int64_t cameras, int64_t count, int width, int height, double near_plane, double far_plane,
                                             double radius_clip, double eps, int antialiased, void* means2d, void* depths, void* conics,
                                             void* opacities_out, int32_t* radii, int32_t* tiles) {
  using namespace geossl;
  if (is_double || batch < 0 || cameras < 0 || count < 0 || width < 1 || height < 1) return GEOSSL_INVALID_ARGUMENT;
  if (batch * cameras * count == 0) return GEOSSL_OK;
  return on_device(device, 0, [&](auto) {
    const Scenes scene{in(means), in(quats), in(scales), in(covars), in(opacities), in(viewmats), in(Ks), batch, cameras, count,
                       width, height, near_plane, far_plane, radius_clip, eps, antialiased != 0};
    const Splats out{to(means2d), to(depths), to(conics), to(opacities_out), radii, tiles};
    return gpu::launch(project_kernel, blocks_for(batch * cameras * count, kThreads), dim3(kThreads), 0, as_stream(stream), scene, out);
  });
}
GEOSSL_PACKED(geossl_gaussians_project_cuda)

GEOSSL_API int geossl_gaussians_project_backward_cuda(
    int device, void* stream, int is_double, const void* means, const void* quats, const void* scales, const void* covars,
    const void* opacities, const void* viewmats, const void* Ks, int64_t batch, int64_t cameras, int64_t count, int width, int height,
    double near_plane, double far_plane, double radius_clip, double eps, int antialiased, const int32_t* radii, const void* v_means2d,
    const void* v_depths, const void* v_conics, const void* v_opacities_out, void* v_means, void* v_quats, void* v_scales, void* v_covars,
    void* v_opacities, void*, void* partial_poses) {
  using namespace geossl;
  if (is_double || batch < 0 || cameras < 0 || count < 0 || width < 1 || height < 1) return GEOSSL_INVALID_ARGUMENT;
  if (batch * count == 0) return GEOSSL_OK;
  return on_device(device, 0, [&](auto) {
    const Scenes scene{in(means), in(quats), in(scales), in(covars), in(opacities), in(viewmats), in(Ks), batch, cameras, count,
                       width, height, near_plane, far_plane, radius_clip, eps, antialiased != 0};
    const Gradients gradients{radii, in(v_means2d), in(v_depths), in(v_conics), in(v_opacities_out)};
    const SceneGradients out{to(v_means), to(v_quats), to(v_scales), to(v_covars), to(v_opacities), to(partial_poses)};
    const int64_t blocks = batch * ((count + kThreads - 1) / kThreads);
    return gpu::launch(project_gradient_kernel, blocks_for(blocks, 1), dim3(kThreads), 0, as_stream(stream), scene, gradients, out);
  });
}
GEOSSL_PACKED(geossl_gaussians_project_backward_cuda)

GEOSSL_API int geossl_gaussians_emit_cuda(int device, void* stream, const void* means2d, const void* conics, const void* opacities,
                                          const void* depths, const int32_t* radii, int64_t images, int64_t count, int width, int height,
                                          const int64_t* starts, void* keys, void* rows) {
  using namespace geossl;
  if (images < 0 || count < 0 || width < 1 || height < 1) return GEOSSL_INVALID_ARGUMENT;
  if (images * count > std::numeric_limits<int32_t>::max()) return GEOSSL_TOO_LARGE;
  if (images * count == 0) return GEOSSL_OK;
  return on_device(device, 0, [&](auto) {
    return gpu::launch(emit_kernel, blocks_for(images * count, kThreads), dim3(kThreads), 0, as_stream(stream), in(means2d), in(conics),
                       in(opacities), in(depths), radii, images, count, width, height, starts, static_cast<uint64_t*>(keys),
                       static_cast<uint64_t*>(rows));
  });
}
GEOSSL_PACKED(geossl_gaussians_emit_cuda)

GEOSSL_API int geossl_gaussians_tile_ranges_cuda(int device, void* stream, const void* keys, const void* rows, int64_t entries, int64_t tiles,
                                                 int32_t* ids, int32_t* places, int64_t* tile_starts) {
  using namespace geossl;
  if (entries < 0 || tiles < 0) return GEOSSL_INVALID_ARGUMENT;
  if (entries == 0) return GEOSSL_OK;
  return on_device(device, 0, [&](auto) {
    return gpu::launch(tile_range_kernel, blocks_for(entries, kThreads), dim3(kThreads), 0, as_stream(stream), static_cast<const uint64_t*>(keys),
                       static_cast<const uint64_t*>(rows), entries, tiles, ids, places, tile_starts);
  });
}
GEOSSL_PACKED(geossl_gaussians_tile_ranges_cuda)
