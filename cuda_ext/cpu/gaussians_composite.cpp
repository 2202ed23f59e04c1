// Blending of Gaussians front to back. The vector is one row of 16 pixels of a tile.
#include <memory>

#include "gaussians_tiles.h"

namespace geossl {
namespace {

// The pixels of one tile. Transmittance is negative once a pixel has ended (from the start outside the image), so that one product says
// both what is left and that nothing more is to be added.
template <class T>
struct Canvas {
  alignas(64) T rest[kPixels], front[kFused][kPixels], heaviest[kPixels];
  alignas(64) int32_t last[kPixels], largest[kPixels];
  T* more = nullptr;  // channels after the first four, 256 pixels each
};

template <class T>
struct TileJob {
  const Record<T>* records;
  const int32_t* ids;
  int32_t entries;
  T x, y;             // centre of the first pixel
  int64_t more;       // channels after the first four
  const Drawing<T>* drawing;
  bool with_ids;
};

// Adds one Gaussian to one row of pixels; `weight` is what each pixel takes of it.
template <class T>
GEOSSL_INLINE void blend_row(const Record<T>& r, const T* GEOSSL_RESTRICT dx, T y, int32_t number, Canvas<T>& canvas, int row,
                             T* GEOSSL_RESTRICT weight) {
  const T dy = y + T(row) - r.v, slope = r.b * dy, offset = r.hc * dy * dy;
  const T ha = r.ha, opacity = r.opacity, f0 = r.feature[0], f1 = r.feature[1], f2 = r.feature[2], f3 = r.feature[3];
  T* GEOSSL_RESTRICT rest = canvas.rest + row * kTileSize;
  T* GEOSSL_RESTRICT c0 = canvas.front[0] + row * kTileSize;
  T* GEOSSL_RESTRICT c1 = canvas.front[1] + row * kTileSize;
  T* GEOSSL_RESTRICT c2 = canvas.front[2] + row * kTileSize;
  T* GEOSSL_RESTRICT c3 = canvas.front[3] + row * kTileSize;
  int32_t* GEOSSL_RESTRICT last = canvas.last + row * kTileSize;
  GEOSSL_LANES
  for (int l = 0; l < kTileSize; ++l) {
    const T sigma = (ha * dx[l] + slope) * dx[l] + offset;
    T alpha = opacity * exp_minus(sigma);
    alpha = alpha < kMaxAlpha<T> ? alpha : kMaxAlpha<T>;
    alpha = alpha >= kMinAlpha<T> ? alpha : T(0);  // one condition at a time: gcc does not vectorise their conjunction
    alpha = sigma >= T(0) ? alpha : T(0);
    const T before = rest[l], after = before * (T(1) - alpha), w = after <= kMinTransmittance<T> ? T(0) : alpha * before;
    rest[l] = after <= kMinTransmittance<T> ? -std::fabs(before) : after;
    last[l] = w > T(0) ? number : last[l];
    c0[l] += w * f0;
    c1[l] += w * f1;
    c2[l] += w * f2;
    c3[l] += w * f3;
    weight[l] = w;
  }
}

template <class T>
GEOSSL_INLINE void find_largest(const T* GEOSSL_RESTRICT weight, int32_t number, T* GEOSSL_RESTRICT heaviest, int32_t* GEOSSL_RESTRICT largest) {
  GEOSSL_LANES
  for (int l = 0; l < kTileSize; ++l) {
    largest[l] = weight[l] > heaviest[l] ? number : largest[l];
    heaviest[l] = weight[l] > heaviest[l] ? weight[l] : heaviest[l];
  }
}

// Whether any pixel of a row goes on.
template <class T>
GEOSSL_INLINE bool row_lives(const T* rest) {
  int alive = 0;
  GEOSSL_LANES
  for (int l = 0; l < kTileSize; ++l) alive |= rest[l] > T(0);
  return alive != 0;
}

template <class T>
GEOSSL_INLINE void blend_tile(const TileJob<T>& job, Canvas<T>& canvas) {
  int low = 0, high = kTileSize;
  alignas(64) T dx[kTileSize], weight[kTileSize];
  for (int32_t i = 0; i < job.entries; ++i) {
    if (i % 16 == 0) {
      while (low < high && !row_lives(canvas.rest + low * kTileSize)) ++low;
      while (low < high && !row_lives(canvas.rest + (high - 1) * kTileSize)) --high;
      if (low == high) return;
    }
    if (i + 8 < job.entries) __builtin_prefetch(job.records + job.ids[i + 8]);
    const Record<T>& r = job.records[job.ids[i]];
    int first, end;
    if (!reached_rows(r, job.x, job.y, low, high, first, end)) continue;
    GEOSSL_LANES
    for (int l = 0; l < kTileSize; ++l) dx[l] = job.x + T(l) - r.u;
    const int64_t more = r.opacity > T(0) ? job.more : 0;
    const T* own = more ? job.drawing->features_of(job.ids[i]) : nullptr;
    for (int row = first; row < end; ++row) {
      blend_row(r, dx, job.y, i + 1, canvas, row, weight);
      if (job.with_ids) find_largest(weight, i + 1, canvas.heaviest + row * kTileSize, canvas.largest + row * kTileSize);
      for (int64_t c = 0; c < more; ++c) {
        const T f = job.drawing->feature(own, job.ids[i], kFused + c);
        T* GEOSSL_RESTRICT to = canvas.more + c * kPixels + row * kTileSize;
        GEOSSL_LANES
        for (int l = 0; l < kTileSize; ++l) to[l] += weight[l] * f;
      }
    }
  }
}

// The clones are for float; double is for tests and pays for no more code.
GEOSSL_SIMD void blend(const TileJob<float>& job, Canvas<float>& canvas) { blend_tile(job, canvas); }
void blend(const TileJob<double>& job, Canvas<double>& canvas) { blend_tile(job, canvas); }

template <class T>
struct Images {
  T *render, *alpha, *rest;
  int32_t *last, *largest;
  T* heaviest;  // like largest null unless asked for
};

template <class T>
void store(const Drawing<T>& d, const TilePlace& place, const Canvas<T>& canvas, const int32_t* ids, const T* background, const Images<T>& out) {
  const int64_t blended = d.blended();
  for (int row = 0; row < place.rows; ++row)
    for (int column = 0; column < place.columns; ++column) {
      const int p = row * kTileSize + column;
      const int64_t pixel = (place.image * d.height + place.y + row) * d.width + place.x + column;
      const T rest = std::fabs(canvas.rest[p]);
      T* to = out.render + pixel * blended;
      for (int64_t c = 0; c < blended; ++c) {
        const T value = c < kFused ? canvas.front[c][p] : canvas.more[(c - kFused) * kPixels + p];
        to[c] = background && c < d.channels ? value + rest * background[place.image * d.channels + c] : value;
      }
      out.alpha[pixel] = T(1) - rest;
      out.rest[pixel] = rest;
      out.last[pixel] = canvas.last[p];
      if (!out.largest) continue;
      out.largest[pixel] = canvas.largest[p] ? static_cast<int32_t>(ids[canvas.largest[p] - 1] % d.count) : -1;
      out.heaviest[pixel] = canvas.heaviest[p];
    }
}

template <class T>
void composite(const Drawing<T>& d, int threads, const T* background, const Images<T>& out) {
  Scratch<Record<T>> memory;
  const Record<T>* records = pack(d, threads, memory);
  share_tiles(d, threads, [&](auto&& next) {
    const auto canvas = std::make_unique<Canvas<T>>();
    const int64_t more = std::max<int64_t>(d.blended() - kFused, 0);
    Scratch<T> further;
    canvas->more = further.get(more * kPixels);
    for (int64_t tile = next(); tile >= 0; tile = next()) {
      const TilePlace place = tile_place(d, tile);
      T* more_channels = canvas->more;
      std::fill(more_channels, more_channels + more * kPixels, T(0));
      *canvas = {};
      canvas->more = more_channels;
      for (int p = 0; p < kPixels; ++p) canvas->rest[p] = p / kTileSize < place.rows && p % kTileSize < place.columns ? T(1) : T(-1);
      const int64_t begin = d.tile_starts[tile];
      const TileJob<T> job{records, d.ids + begin, static_cast<int32_t>(d.tile_starts[tile + 1] - begin), T(place.x) + T(0.5),
                           T(place.y) + T(0.5), more, &d, out.largest != nullptr};
      blend(job, *canvas);
      store(d, place, *canvas, d.ids + begin, background, out);
    }
  });
}

}  // namespace
}  // namespace geossl

// See geossl/ops/_gaussians.py for the arguments.
GEOSSL_API int geossl_gaussians_composite_cpu(int threads, int is_double, const void* means2d, const void* conics, const void* opacities,
                                              const void* features, const void* depths, const int32_t* ids, const int32_t* places,
                                              const int64_t* tile_starts, const int64_t* starts, int64_t images, int64_t cameras, int64_t count,
                                              int64_t channels, int features_per_camera, int with_depths, int width, int height, const void* background,
                                              void* render, void* alpha, void* rest, int32_t* last, int32_t* largest, void* heaviest) {
  using namespace geossl;
  if (images < 0 || cameras < 1 || count < 0 || channels < 0 || width < 1 || height < 1) return GEOSSL_INVALID_ARGUMENT;
  return for_type(is_double, [&](auto zero) {
    using T = decltype(zero);
    const auto in = [](const void* p) { return static_cast<const T*>(p); };
    const Drawing<T> drawing{in(means2d), in(conics), in(opacities), in(features), in(depths), ids, places, tile_starts, starts, images, cameras,
                             count, channels, features_per_camera != 0, with_depths != 0, width, height, (width + kTileSize - 1) / kTileSize,
                             (height + kTileSize - 1) / kTileSize};
    composite(drawing, threads, in(background),
              Images<T>{static_cast<T*>(render), static_cast<T*>(alpha), static_cast<T*>(rest), last, largest, static_cast<T*>(heaviest)});
    return int{GEOSSL_OK};
  });
}
GEOSSL_PACKED(geossl_gaussians_composite_cpu)
