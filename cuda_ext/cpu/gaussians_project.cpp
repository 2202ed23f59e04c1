// Projection of Gaussians onto images, and its gradient.
#include "gaussians.h"
#include "points.h"

namespace geossl {
namespace {

constexpr int64_t kBlock = 1024;  // Gaussians whose gradients of the camera are summed together, whatever the number of threads

template <class T>
struct Scenes {
  const T *means, *quats, *scales, *covars, *opacities, *viewmats, *Ks;
  int64_t batch, cameras, count;
  int width, height;
  double near_plane, far_plane, radius_clip, eps;
  bool antialiased;

  Camera<T> camera(int64_t image) const {
    return Camera<T>(viewmats + 16 * image, Ks + 9 * image, width, height, near_plane, far_plane, radius_clip, eps, antialiased);
  }
  bool shape(int64_t row, Shape<T>& out) const {
    return covars ? out.set(nullptr, nullptr, covars + 9 * row) : out.set(quats + 4 * row, scales + 3 * row, nullptr);
  }
};

template <class T>
struct Splats {
  T *means2d, *depths, *conics, *opacities;
  int32_t *radii, *tiles;

  void set(int64_t row, const Splat<T>& s, int tile_count) const {
    means2d[2 * row] = s.u, means2d[2 * row + 1] = s.v;
    depths[row] = s.depth;
    conics[3 * row] = s.a, conics[3 * row + 1] = s.b, conics[3 * row + 2] = s.c;
    opacities[row] = s.opacity;
    radii[2 * row] = s.rx, radii[2 * row + 1] = s.ry;
    tiles[row] = tile_count;
  }
};

template <class T>
void project(const Scenes<T>& scene, int threads, const Splats<T>& out) {
  for (int64_t image = 0; image < scene.batch * scene.cameras; ++image) {
    const Camera<T> camera = scene.camera(image);
    const int64_t base = image / scene.cameras * scene.count, to = image * scene.count;
    parallel_for(threads, scene.count, 4096, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        Shape<T> shape;
        Projection<T> projection;
        Splat<T> splat{};
        const T* mean = scene.means + 3 * (base + i);
        const bool drawn = projection.set_center(camera, mean) && scene.shape(base + i, shape) && projection.set(camera, shape) &&
                           projection.splat(camera, scene.opacities[base + i], splat);
        if (drawn) out.set(to + i, splat, count_tiles(splat, scene.width, scene.height));
        else out.set(to + i, Splat<T>{}, 0);
      }
    });
  }
}

template <class T>
struct SceneGradients {
  T *means, *quats, *scales, *covars, *opacities, *viewmats;  // viewmats may be null
};

template <class T>
void project_backward(const Scenes<T>& scene, int threads, const Splats<T>& splats, const T* v_means2d, const T* v_depths, const T* v_conics,
                      const T* v_opacities, const SceneGradients<T>& out) {
  const int64_t images = scene.batch * scene.cameras, blocks = (scene.count + kBlock - 1) / kBlock;
  std::vector<Camera<T>> cameras;
  for (int64_t image = 0; image < images; ++image) cameras.push_back(scene.camera(image));
  std::vector<double> poses(out.viewmats ? static_cast<size_t>(12 * images * blocks) : 0);
  parallel_for(threads, scene.batch * blocks, 4, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t b = block / blocks, first = block % blocks * kBlock, last = std::min(first + kBlock, scene.count);
      for (int64_t i = first; i < last; ++i) {
        const int64_t row = b * scene.count + i;
        const T* mean = scene.means + 3 * row;
        Shape<T> shape;
        T v_mean[3] = {}, v_m[9] = {}, v_opacity = 0;
        bool known = false;
        for (int64_t c = 0; c < scene.cameras; ++c) {
          const int64_t image = b * scene.cameras + c, at = image * scene.count + i;
          if (splats.radii[2 * at] == 0 && splats.radii[2 * at + 1] == 0) continue;
          if (!known) known = scene.shape(row, shape);
          Projection<T> projection;
          const Camera<T>& camera = cameras[static_cast<size_t>(image)];
          if (!projection.set_center(camera, mean) || !projection.set(camera, shape)) continue;
          const SplatGradient<T> g{v_means2d[2 * at],    v_means2d[2 * at + 1], v_depths[at],   v_conics[3 * at],
                                   v_conics[3 * at + 1], v_conics[3 * at + 2],  v_opacities[at]};
          T v_view[12] = {};
          project_gradient(camera, mean, shape, projection, scene.opacities[row], g, v_mean, v_m, &v_opacity, out.viewmats ? v_view : nullptr);
          if (out.viewmats)
            for (int k = 0; k < 12; ++k) poses[static_cast<size_t>(12 * (image * blocks + first / kBlock) + k)] += static_cast<double>(v_view[k]);
        }
        std::copy(v_mean, v_mean + 3, out.means + 3 * row);
        out.opacities[row] = v_opacity;
        if (scene.covars) {
          std::copy(v_m, v_m + 9, out.covars + 9 * row);
        } else {
          T v_quat[4] = {}, v_scale[3] = {};
          if (known) shape_gradient(shape, v_m, v_quat, v_scale);
          std::copy(v_quat, v_quat + 4, out.quats + 4 * row);
          std::copy(v_scale, v_scale + 3, out.scales + 3 * row);
        }
      }
    }
  });
  if (!out.viewmats) return;
  for (int64_t image = 0; image < images; ++image)
    for (int k = 0; k < 16; ++k) {
      double sum = 0;
      for (int64_t block = 0; k < 12 && block < blocks; ++block) sum += poses[static_cast<size_t>(12 * (image * blocks + block) + k)];
      out.viewmats[16 * image + k] = static_cast<T>(sum);
    }
}

}  // namespace
}  // namespace geossl

// See geossl/ops/_gaussians.py for the arguments of both.
GEOSSL_API int geossl_gaussians_project_cpu(int threads, int is_double, const void* means, const void* quats, const void* scales,
                                            const void* covars, const void* opacities, const void* viewmats, const void* Ks, int64_t batch,
                                            int64_t cameras, int64_t count, int width, int height, double near_plane, double far_plane,
                                            double radius_clip, double eps, int antialiased, void* means2d, void* depths, void* conics,
                                            void* opacities_out, int32_t* radii, int32_t* tiles) {
  using namespace geossl;
  if (batch < 0 || cameras < 0 || count < 0 || width < 1 || height < 1) return GEOSSL_INVALID_ARGUMENT;
  return for_type(is_double, [&](auto zero) {
    using T = decltype(zero);
    const auto in = [](const void* p) { return static_cast<const T*>(p); };
    const Scenes<T> scene{in(means), in(quats), in(scales), in(covars), in(opacities), in(viewmats), in(Ks), batch, cameras, count,
                          width, height, near_plane, far_plane, radius_clip, eps, antialiased != 0};
    project(scene, threads, Splats<T>{static_cast<T*>(means2d), static_cast<T*>(depths), static_cast<T*>(conics),
                                      static_cast<T*>(opacities_out), radii, tiles});
    return int{GEOSSL_OK};
  });
}
GEOSSL_PACKED(geossl_gaussians_project_cpu)

GEOSSL_API int geossl_gaussians_project_backward_cpu(
    int threads, int is_double, const void* means, const void* quats, const void* scales, const void* covars, const void* opacities,
    const void* viewmats, const void* Ks, int64_t batch, int64_t cameras, int64_t count, int width, int height, double near_plane,
    double far_plane, double radius_clip, double eps, int antialiased, const int32_t* radii, const void* v_means2d, const void* v_depths,
    const void* v_conics, const void* v_opacities_out, void* v_means, void* v_quats, void* v_scales, void* v_covars, void* v_opacities,
    void* v_viewmats, void*) {
  using namespace geossl;
  if (batch < 0 || cameras < 0 || count < 0 || width < 1 || height < 1) return GEOSSL_INVALID_ARGUMENT;
  return for_type(is_double, [&](auto zero) {
    using T = decltype(zero);
    const auto in = [](const void* p) { return static_cast<const T*>(p); };
    const auto to = [](void* p) { return static_cast<T*>(p); };
    const Scenes<T> scene{in(means), in(quats), in(scales), in(covars), in(opacities), in(viewmats), in(Ks), batch, cameras, count,
                          width, height, near_plane, far_plane, radius_clip, eps, antialiased != 0};
    const Splats<T> splats{nullptr, nullptr, nullptr, nullptr, const_cast<int32_t*>(radii), nullptr};
    project_backward(scene, threads, splats, in(v_means2d), in(v_depths), in(v_conics), in(v_opacities_out),
                     SceneGradients<T>{to(v_means), to(v_quats), to(v_scales), to(v_covars), to(v_opacities), to(v_viewmats)});
    return int{GEOSSL_OK};
  });
}
GEOSSL_PACKED(geossl_gaussians_project_backward_cpu)
