// The Gaussian rasterizer: projection, tile lists, blending and all gradients.
#include <algorithm>

#include "drive.h"

#define SCENE                                                                                                                               \
  int, const void*, const void*, const void*, const void*, const void*, const void*, const void*, int64_t, int64_t, int64_t, int, int, double, \
      double, double, double, int
#define DRAWING                                                                                                                            \
  int, const void*, const void*, const void*, const void*, const void*, const int32_t*, const int32_t*, const int64_t*, const int64_t*, int64_t, \
      int64_t, int64_t, int64_t, int, int, int, int, const void*

BOTH(gaussians_project, SCENE, void*, void*, void*, void*, int32_t*, int32_t*);
BOTH(gaussians_project_backward, SCENE, const int32_t*, const void*, const void*, const void*, const void*, void*, void*, void*, void*, void*, void*,
     void*);
BOTH(gaussians_composite, DRAWING, void*, void*, void*, int32_t*, int32_t*, void*);
BOTH(gaussians_composite_backward, DRAWING, const void*, const int32_t*, const void*, const void*, void*, void*, void*, void*, void*, void*, void*,
     void*);
extern "C" {
int geossl_gaussians_bin_cpu(int, int, const void*, const void*, const void*, const void*, const int32_t*, int64_t, int64_t, int, int,
                             const int64_t*, int32_t*, int32_t*, int64_t*);
int geossl_gaussians_starts_cpu(int, const int32_t*, int64_t, int64_t*);
int geossl_gaussians_emit_cuda(int, void*, const void*, const void*, const void*, const void*, const int32_t*, int64_t, int64_t, int, int,
                               const int64_t*, void*, void*);
int geossl_gaussians_tile_ranges_cuda(int, void*, const void*, const void*, int64_t, int64_t, int32_t*, int32_t*, int64_t*);
int geossl_sort_pairs_cuda(int, void*, int, void*, int64_t*, const void*, void*, const void*, void*, int64_t, int);
}

namespace {

using namespace drive;

template <class T>
struct Scene {
  int64_t batch, cameras, count, channels;
  int width, height;
  bool covariances, shared;
  std::vector<T> means, quats, scales, covars, opacities, views, lenses, features, background;

  Scene(int64_t batch_, int64_t cameras_, int64_t count_, int64_t channels_, int width_, int height_, double size, bool covariances_, bool shared_)
      : batch(batch_), cameras(cameras_), count(count_), channels(channels_), width(width_), height(height_), covariances(covariances_),
        shared(shared_) {
    const auto fill = [](std::vector<T>& v, int64_t n, double low, double high) {
      v.resize(static_cast<size_t>(n));
      for (T& x : v) x = static_cast<T>(low + (high - low) * uniform());
    };
    fill(means, batch * count * 3, -1, 1), fill(quats, batch * count * 4, -1, 1), fill(scales, batch * count * 3, 0.005, size);
    fill(opacities, batch * count, 0.1, 1), fill(features, batch * (shared ? 1 : cameras) * count * channels, 0, 1);
    fill(background, batch * cameras * channels, 0, 1), fill(covars, batch * count * 9, 0, 0);
    for (size_t i = 0; i < covars.size(); i += 9) covars[i] = covars[i + 4] = covars[i + 8] = static_cast<T>(size * size * uniform());
    if (count > 5) means[15] = std::numeric_limits<T>::quiet_NaN(), quats[8] = quats[9] = quats[10] = quats[11] = 0;
    for (int64_t i = 0; i < batch * cameras; ++i) {
      const T view[16] = {1, 0, 0, static_cast<T>(0.2 * uniform()), 0, 1, 0, 0, 0, 0, 1, 3, 0, 0, 0, 1};
      const T lens[9] = {static_cast<T>(0.9 * width), 0, static_cast<T>(0.5 * width), 0, static_cast<T>(0.9 * height), static_cast<T>(0.5 * height),
                         0, 0, 1};
      views.insert(views.end(), view, view + 16), lenses.insert(lenses.end(), lens, lens + 9);
    }
  }
};

template <class T>
struct Result {
  std::vector<T> means2d, depths, conics, opacities, render, alpha, rest, heaviest, v[6], w[7];
  std::vector<int32_t> radii, tiles, ids, places, last, largest;
  std::vector<int64_t> starts, tile_starts;
};

template <class T>
void make_lists(const Scene<T>& s, bool cuda, Result<T>& r, const char* what) {
  const int64_t images = s.batch * s.cameras, tiles = images * ((s.width + 15) / 16) * ((s.height + 15) / 16);
  r.starts.assign(r.tiles.size() + 1, -7);
  check(0 == geossl_gaussians_starts_cpu(2, r.tiles.data(), static_cast<int64_t>(r.tiles.size()), r.starts.data()), "where Gaussians start");
  const int64_t entries = r.starts.back();
  r.ids.assign(static_cast<size_t>(entries), -7), r.places = r.ids, r.tile_starts.assign(static_cast<size_t>(tiles + 1), 0);
  if (!cuda) {
    check(0 == geossl_gaussians_bin_cpu(2, sizeof(T) == 8, r.means2d.data(), r.conics.data(), r.opacities.data(), r.depths.data(), r.radii.data(),
                                        images, s.count, s.width, s.height, r.starts.data(), r.ids.data(), r.places.data(), r.tile_starts.data()),
          what);
    return;
  }
  std::vector<uint64_t> keys(static_cast<size_t>(entries)), rows = keys, sorted_keys = keys, sorted_rows = keys;
  check(0 == geossl_gaussians_emit_cuda(0, nullptr, r.means2d.data(), r.conics.data(), r.opacities.data(), r.depths.data(), r.radii.data(), images,
                                        s.count, s.width, s.height, r.starts.data(), keys.data(), rows.data()),
        what);
  int64_t size = 0;
  check(0 == geossl_sort_pairs_cuda(0, nullptr, 1, nullptr, &size, keys.data(), sorted_keys.data(), rows.data(), sorted_rows.data(), entries, 48), what);
  std::vector<char> memory(static_cast<size_t>(size + 1));
  check(0 == geossl_sort_pairs_cuda(0, nullptr, 1, memory.data(), &size, keys.data(), sorted_keys.data(), rows.data(), sorted_rows.data(), entries, 48),
        what);
  check(0 == geossl_gaussians_tile_ranges_cuda(0, nullptr, sorted_keys.data(), sorted_rows.data(), entries, tiles, r.ids.data(), r.places.data(),
                                               r.tile_starts.data()),
        what);
}

template <class T>
Result<T> rasterize(const Scene<T>& s, bool cuda, const char* what) {
  Result<T> r;
  const int64_t images = s.batch * s.cameras, rows = images * s.count, pixels = images * s.width * s.height, blended = s.channels + 1;
  const auto numbers = [](int64_t n) { return std::vector<T>(static_cast<size_t>(n), T(-7)); };
  r.means2d = numbers(2 * rows), r.depths = numbers(rows), r.conics = numbers(3 * rows), r.opacities = numbers(rows);
  r.radii.assign(static_cast<size_t>(2 * rows), -7), r.tiles.assign(static_cast<size_t>(rows), -7);
  const auto scene = [&](auto cpu, auto gpu, auto... rest) {
    const auto call = [&](auto f, auto... place) {
      return f(place..., sizeof(T) == 8, s.means.data(), s.covariances ? nullptr : s.quats.data(), s.covariances ? nullptr : s.scales.data(),
               s.covariances ? s.covars.data() : nullptr, s.opacities.data(), s.views.data(), s.lenses.data(), s.batch, s.cameras, s.count, s.width,
               s.height, 0.01, 1e10, 0.0, 0.3, 1, rest...);
    };
    check(0 == (cuda ? call(gpu, 0, static_cast<void*>(nullptr)) : call(cpu, 2)), what);
  };
  const auto any = [](auto& v) { return static_cast<void*>(v.data()); };
  scene(geossl_gaussians_project_cpu, geossl_gaussians_project_cuda, any(r.means2d), any(r.depths), any(r.conics), any(r.opacities), r.radii.data(),
        r.tiles.data());
  make_lists(s, cuda, r, what);
  r.render = numbers(pixels * blended), r.alpha = numbers(pixels), r.rest = numbers(pixels), r.heaviest = numbers(pixels);
  r.last.assign(static_cast<size_t>(pixels), -7), r.largest = r.last;
  const auto draw = [&](auto cpu, auto gpu, auto... rest) {
    const auto call = [&](auto f, auto... place) {
      return f(place..., sizeof(T) == 8, r.means2d.data(), r.conics.data(), r.opacities.data(), s.features.data(), r.depths.data(), r.ids.data(),
               r.places.data(), r.tile_starts.data(), r.starts.data(), images, s.cameras, s.count, s.channels, s.shared ? 0 : 1, 1, s.width, s.height,
               s.background.data(), rest...);
    };
    check(0 == (cuda ? call(gpu, 0, static_cast<void*>(nullptr)) : call(cpu, 2)), what);
  };
  draw(geossl_gaussians_composite_cpu, geossl_gaussians_composite_cuda, any(r.render), any(r.alpha), any(r.rest), r.last.data(), r.largest.data(),
       any(r.heaviest));
  const int64_t sizes[] = {2 * rows, 3 * rows, rows, static_cast<int64_t>(s.features.size()), rows, static_cast<int64_t>(s.background.size()), 2 * rows};
  for (int i = 0; i < 7; ++i) r.w[i] = numbers(sizes[i]);
  std::vector<T> slots = numbers(cuda ? r.starts.back() * (8 + blended) : 0), ones(static_cast<size_t>(pixels * blended), T(1));
  draw(geossl_gaussians_composite_backward_cpu, geossl_gaussians_composite_backward_cuda, static_cast<const void*>(r.rest.data()),
       static_cast<const int32_t*>(r.last.data()), static_cast<const void*>(ones.data()), static_cast<const void*>(ones.data()), any(slots), any(r.w[0]),
       any(r.w[1]), any(r.w[2]), any(r.w[3]), any(r.w[4]), any(r.w[5]), any(r.w[6]));
  const int64_t n = s.batch * s.count;
  const int64_t inputs[] = {3 * n, s.covariances ? 0 : 4 * n, s.covariances ? 0 : 3 * n, s.covariances ? 9 * n : 0, n, 16 * images};
  for (int i = 0; i < 6; ++i) r.v[i] = numbers(inputs[i]);
  std::vector<T> partial = numbers(12 * images * ((s.count + 255) / 256));
  scene(geossl_gaussians_project_backward_cpu, geossl_gaussians_project_backward_cuda, static_cast<const int32_t*>(r.radii.data()),
        static_cast<const void*>(r.w[0].data()), static_cast<const void*>(r.w[4].data()), static_cast<const void*>(r.w[1].data()),
        static_cast<const void*>(r.w[2].data()), any(r.v[0]), any(r.v[1]), any(r.v[2]), any(r.v[3]), any(r.v[4]), any(r.v[5]), any(partial));
  return r;
}

// Gradients are sums of numbers of both signs: compared with the largest of them.
template <class T>
bool near(const std::vector<T>& a, const std::vector<T>& b) {
  T largest = 0;
  for (const T& x : b) largest = std::max(largest, std::fabs(x));
  for (size_t i = 0; i < a.size(); ++i)
    if (!(std::fabs(a[i] - b[i]) <= T(2e-4) * largest)) return false;
  return a.size() == b.size();
}

void both(const Scene<float>& scene, const char* what) {
  const Result<float> cpu = rasterize(scene, false, what), gpu = rasterize(scene, true, what);
  check(equal(cpu.radii, gpu.radii) && equal(cpu.starts, gpu.starts) && equal(cpu.ids, gpu.ids) && equal(cpu.tile_starts, gpu.tile_starts) &&
            equal(cpu.alpha, gpu.alpha) && equal(cpu.last, gpu.last) && equal(cpu.largest, gpu.largest),
        what);
  check(close(cpu.render, gpu.render), what);
  for (int i : {0, 1, 2, 3, 4, 6}) check(near(gpu.w[i], cpu.w[i]), what);
  for (int i = 0; i < 5; ++i) check(near(gpu.v[i], cpu.v[i]), what);
}

// Enough for two threads of the CPU everywhere, and the same once more, bit for bit.
template <class T>
void threads(const char* what) {
  const Scene<T> scene(1, 2, 9000, 5, 100, 60, 0.03, false, true);
  const Result<T> first = rasterize(scene, false, what), second = rasterize(scene, false, what);
  check(equal(first.render, second.render) && equal(first.v[0], second.v[0]) && equal(first.v[5], second.v[5]) && equal(first.w[5], second.w[5]), what);
}

void run() {
  both(Scene<float>(1, 1, 12, 3, 20, 17, 0.3, false, false), "gaussians");
#ifndef __SANITIZE_THREAD__  // the same kernels again
  both(Scene<float>(2, 2, 7, 6, 9, 8, 0.5, true, true), "gaussians by covariance, six channels for two cameras");
#endif
  both(Scene<float>(1, 1, 0, 3, 5, 5, 0.3, false, true), "no gaussians");
  threads<float>("gaussians with threads");
#if !defined(__SANITIZE_THREAD__)
  threads<double>("gaussians in double precision");
#endif
}

const Suite suite{&run};

}  // namespace
