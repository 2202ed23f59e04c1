// Gradient of blending: every tile walks its list back to front, writes the sums over its pixels into a slot of its own for every entry, and
// then each Gaussian adds up its slots, which lie side by side, in order. The same bits for any number of threads.
#include <memory>

#include "gaussians_tiles.h"

namespace geossl {
namespace {

constexpr int kMoments = 3, kBasic = 6;

// The pixels of one tile. With S_k the colour blended so far from the back, only s = S.g enters the gradient: one number per pixel.
template <class T>
struct Canvas {
  alignas(64) T rest[kPixels], s[kPixels], front[kFused][kPixels];  // transmittance, s, gradient of the first channels
  alignas(64) int32_t last[kPixels];
  int32_t last_of_row[kTileSize], last_of_all;
  T *more = nullptr, *more_sums = nullptr;  // gradients of further channels; what Columns holds of the first ones, for these
};

// Sums over the rows of a tile, column by column.
template <class T>
struct Columns {
  alignas(64) T sum[kMoments + kFused + 2][kTileSize];  // v_sigma times 1, dy, dy^2; weights times gradients of channels; |v_u|, |v_v|
};

template <class T>
struct TileJob {
  const Record<T>* records;
  const int32_t *ids, *places;
  T x, y;
  int64_t more;
  const Drawing<T>* drawing;
  T* slots;
  int64_t slot_size;
  bool absolute;
};

template <class T>
GEOSSL_INLINE void row_gradient(const Record<T>& r, const T* GEOSSL_RESTRICT dx, T y, int32_t number, Canvas<T>& canvas, int row,
                                const T* GEOSSL_RESTRICT further, T* GEOSSL_RESTRICT weight, Columns<T>& columns, T* GEOSSL_RESTRICT v_sigmas) {
  const T dy = y + T(row) - r.v, slope = r.b * dy, offset = r.hc * dy * dy, dy2 = dy * dy;
  const T ha = r.ha, opacity = r.opacity, f0 = r.feature[0], f1 = r.feature[1], f2 = r.feature[2], f3 = r.feature[3];
  T* GEOSSL_RESTRICT rest = canvas.rest + row * kTileSize;
  T* GEOSSL_RESTRICT s = canvas.s + row * kTileSize;
  const T* GEOSSL_RESTRICT g0 = canvas.front[0] + row * kTileSize;
  const T* GEOSSL_RESTRICT g1 = canvas.front[1] + row * kTileSize;
  const T* GEOSSL_RESTRICT g2 = canvas.front[2] + row * kTileSize;
  const T* GEOSSL_RESTRICT g3 = canvas.front[3] + row * kTileSize;
  const int32_t* GEOSSL_RESTRICT last = canvas.last + row * kTileSize;
  T* GEOSSL_RESTRICT m0 = columns.sum[0];
  T* GEOSSL_RESTRICT m1 = columns.sum[1];
  T* GEOSSL_RESTRICT m2 = columns.sum[2];
  T* GEOSSL_RESTRICT v0 = columns.sum[3];
  T* GEOSSL_RESTRICT v1 = columns.sum[4];
  T* GEOSSL_RESTRICT v2 = columns.sum[5];
  T* GEOSSL_RESTRICT v3 = columns.sum[6];
  GEOSSL_LANES
  for (int l = 0; l < kTileSize; ++l) {
    const T sigma = (ha * dx[l] + slope) * dx[l] + offset, raw = opacity * exp_minus(sigma);
    T alpha = raw < kMaxAlpha<T> ? raw : kMaxAlpha<T>;
    alpha = alpha >= kMinAlpha<T> ? alpha : T(0);  // one condition at a time: gcc does not vectorise their conjunction
    alpha = sigma >= T(0) ? alpha : T(0);
    alpha = last[l] >= number ? alpha : T(0);
    const T inverse = T(1) / (T(1) - alpha), before = rest[l] * inverse, w = alpha * before;
    const T dot = f0 * g0[l] + f1 * g1[l] + f2 * g2[l] + f3 * g3[l] + further[l];
    const T v_alpha = before * dot - s[l] * inverse, v_sigma = raw < kMaxAlpha<T> ? -alpha * v_alpha : T(0);
    rest[l] = before;
    s[l] += w * dot;
    m0[l] += v_sigma;
    m1[l] += v_sigma * dy;
    m2[l] += v_sigma * dy2;
    v0[l] += w * g0[l];
    v1[l] += w * g1[l];
    v2[l] += w * g2[l];
    v3[l] += w * g3[l];
    weight[l] = w;
    v_sigmas[l] = v_sigma;
  }
}

// Halves are added to halves: a fixed tree.
template <class T, int kRows>
GEOSSL_INLINE void sum_columns(T (&sum)[kRows][kTileSize]) {
  for (int half = kTileSize / 2; half > 0; half /= 2)
    for (int i = 0; i < kRows; ++i)
      for (int l = 0; l < half; ++l) sum[i][l] += sum[i][l + half];
}

// Slot: v_u, v_v, v_a, v_b, v_c, v_opacity, |v_u| and |v_v| if wanted, features.
template <class T>
GEOSSL_INLINE void store_slot(const Record<T>& r, const T* GEOSSL_RESTRICT dx, Columns<T>& columns, bool absolute, int64_t channels,
                              T* GEOSSL_RESTRICT slot) {
  alignas(64) T moment[6][kTileSize];
  GEOSSL_LANES
  for (int l = 0; l < kTileSize; ++l) {
    const T m0 = columns.sum[0][l], m1 = columns.sum[1][l];
    moment[0][l] = m0;
    moment[1][l] = m0 * dx[l];
    moment[2][l] = m0 * dx[l] * dx[l];
    moment[3][l] = m1;
    moment[4][l] = m1 * dx[l];
    moment[5][l] = columns.sum[2][l];
  }
  sum_columns(moment);
  sum_columns(columns.sum);
  const T x = moment[1][0], y = moment[3][0];  // dx and dy point from the centre to the pixel, so moving the centre has the other sign
  slot[0] = -(2 * r.ha * x + r.b * y), slot[1] = -(r.b * x + 2 * r.hc * y);
  slot[2] = T(0.5) * moment[2][0], slot[3] = moment[4][0], slot[4] = T(0.5) * moment[5][0];
  slot[5] = -moment[0][0] / r.opacity;
  T* to = slot + kBasic;
  if (absolute) *to++ = columns.sum[kMoments + kFused][0], *to++ = columns.sum[kMoments + kFused + 1][0];
  for (int64_t c = 0; c < std::min<int64_t>(channels, kFused); ++c) to[c] = columns.sum[kMoments + c][0];
}

template <class T>
GEOSSL_INLINE void walk_back(const TileJob<T>& job, Canvas<T>& canvas, int64_t entries) {
  const Drawing<T>& d = *job.drawing;
  alignas(64) T dx[kTileSize], weight[kTileSize], v_sigma[kTileSize], further[kTileSize] = {};
  const int64_t channels = d.blended(), features = kBasic + (job.absolute ? 2 : 0);
  const auto slot_of = [&](int64_t i) { return job.slots + (d.starts[job.ids[i]] + job.places[i]) * job.slot_size; };
  for (int64_t i = entries - 1; i >= canvas.last_of_all; --i) {
    T* slot = slot_of(i);
    for (int64_t k = 0; k < job.slot_size; ++k) slot[k] = T(0);
  }
  for (int32_t i = canvas.last_of_all - 1; i >= 0; --i) {
    if (i >= 8) __builtin_prefetch(job.records + job.ids[i - 8]), __builtin_prefetch(slot_of(i - 8), 1);
    T* slot = slot_of(i);
    const Record<T>& r = job.records[job.ids[i]];
    int first, end;
    const bool reached = r.opacity > T(0) && reached_rows(r, job.x, job.y, 0, kTileSize, first, end);
    if (!reached) {
      for (int64_t k = 0; k < job.slot_size; ++k) slot[k] = T(0);
      continue;
    }
    GEOSSL_LANES
    for (int l = 0; l < kTileSize; ++l) dx[l] = job.x + T(l) - r.u;
    const T* own = job.more ? d.features_of(job.ids[i]) : nullptr;
    Columns<T> columns;
    for (auto& sum : columns.sum)
      GEOSSL_LANES
      for (int l = 0; l < kTileSize; ++l) sum[l] = T(0);
    std::fill(canvas.more_sums, canvas.more_sums + job.more * kTileSize, T(0));
    for (int row = first; row < end; ++row) {
      if (canvas.last_of_row[row] <= i) continue;
      for (int64_t c = 0; c < job.more; ++c) {
        const T f = d.feature(own, job.ids[i], kFused + c);
        const T* GEOSSL_RESTRICT g = canvas.more + c * kPixels + row * kTileSize;
        GEOSSL_LANES
        for (int l = 0; l < kTileSize; ++l) further[l] = c ? further[l] + f * g[l] : f * g[l];
      }
      row_gradient(r, dx, job.y, i + 1, canvas, row, further, weight, columns, v_sigma);
      for (int64_t c = 0; c < job.more; ++c) {
        const T* GEOSSL_RESTRICT g = canvas.more + c * kPixels + row * kTileSize;
        T* GEOSSL_RESTRICT sum = canvas.more_sums + c * kTileSize;
        GEOSSL_LANES
        for (int l = 0; l < kTileSize; ++l) sum[l] += weight[l] * g[l];
      }
      if (!job.absolute) continue;
      const T dy = job.y + T(row) - r.v;
      T* GEOSSL_RESTRICT au = columns.sum[kMoments + kFused];
      T* GEOSSL_RESTRICT av = columns.sum[kMoments + kFused + 1];
      GEOSSL_LANES
      for (int l = 0; l < kTileSize; ++l) {
        au[l] += std::fabs(v_sigma[l] * (2 * r.ha * dx[l] + r.b * dy));
        av[l] += std::fabs(v_sigma[l] * (r.b * dx[l] + 2 * r.hc * dy));
      }
    }
    store_slot(r, dx, columns, job.absolute, channels, slot);
    for (int64_t c = 0; c < job.more; ++c) {
      alignas(64) T sum[1][kTileSize];
      std::copy(canvas.more_sums + c * kTileSize, canvas.more_sums + (c + 1) * kTileSize, sum[0]);
      sum_columns(sum);
      slot[features + kFused + c] = sum[0][0];
    }
  }
}

GEOSSL_SIMD void walk(const TileJob<float>& job, Canvas<float>& canvas, int64_t entries) { walk_back(job, canvas, entries); }
void walk(const TileJob<double>& job, Canvas<double>& canvas, int64_t entries) { walk_back(job, canvas, entries); }

template <class T>
struct Incoming {
  const T *render, *alpha, *rest, *background;
  const int32_t* last;
};

template <class T>
struct Outgoing {
  T *means2d, *conics, *opacities, *features, *depths, *background, *absolute;  // the last two may be null
};

// Reads the gradients of a tile's pixels; `v_background` gets their share of the gradient of the background.
template <class T>
void load(const Drawing<T>& d, const TilePlace& place, const Incoming<T>& in, Canvas<T>& canvas, T* v_background) {
  const int64_t blended = d.blended();
  for (int p = 0; p < kPixels; ++p) {
    canvas.rest[p] = T(1), canvas.s[p] = T(0), canvas.last[p] = 0;
    for (int64_t c = 0; c < std::max<int64_t>(blended, kFused); ++c)
      (c < kFused ? canvas.front[c][p] : canvas.more[(c - kFused) * kPixels + p]) = T(0);
  }
  canvas.last_of_all = 0;
  for (int row = 0; row < kTileSize; ++row) canvas.last_of_row[row] = 0;
  for (int row = 0; row < place.rows; ++row)
    for (int column = 0; column < place.columns; ++column) {
      const int p = row * kTileSize + column;
      const int64_t pixel = (place.image * d.height + place.y + row) * d.width + place.x + column;
      const T rest = in.rest[pixel], *g = in.render + pixel * blended;
      T behind = -in.alpha[pixel];
      for (int64_t c = 0; c < blended; ++c) {
        (c < kFused ? canvas.front[c][p] : canvas.more[(c - kFused) * kPixels + p]) = g[c];
        if (in.background && c < d.channels) behind += in.background[place.image * d.channels + c] * g[c];
        if (v_background && c < d.channels) v_background[c] += rest * g[c];
      }
      canvas.rest[p] = rest, canvas.s[p] = rest * behind, canvas.last[p] = in.last[pixel];
      canvas.last_of_row[row] = std::max(canvas.last_of_row[row], in.last[pixel]);
    }
  for (int row = 0; row < kTileSize; ++row) canvas.last_of_all = std::max(canvas.last_of_all, canvas.last_of_row[row]);
}

// Adds up the slots of every Gaussian; features shared by the cameras of a scene also over these.
template <class T>
void add_slots(const Drawing<T>& d, int threads, const T* slots, int64_t slot_size, const Outgoing<T>& out) {
  const int64_t shared = d.features_per_camera ? 1 : d.cameras, first = kBasic + (out.absolute ? 2 : 0);
  parallel_for(threads, d.images / shared * d.count, 4096, [&](int64_t begin, int64_t end) {
    std::vector<T> sums(static_cast<size_t>(slot_size));
    T* sum = sums.data();
    for (int64_t i = begin; i < end; ++i) {
      T* v_features = out.features + i * d.channels;
      std::fill(v_features, v_features + d.channels, T(0));
      for (int64_t camera = 0; camera < shared; ++camera) {
        const int64_t row = (i / d.count * shared + camera) * d.count + i % d.count;
        std::fill(sum, sum + slot_size, T(0));
        for (int64_t slot = d.starts[row]; slot < d.starts[row + 1]; ++slot)
          for (int64_t k = 0; k < slot_size; ++k) sum[k] += slots[slot * slot_size + k];
        out.means2d[2 * row] = sum[0], out.means2d[2 * row + 1] = sum[1];
        out.conics[3 * row] = sum[2], out.conics[3 * row + 1] = sum[3], out.conics[3 * row + 2] = sum[4];
        out.opacities[row] = sum[5];
        if (out.absolute) out.absolute[2 * row] = sum[6], out.absolute[2 * row + 1] = sum[7];
        for (int64_t c = 0; c < d.channels; ++c) v_features[c] += sum[first + c];
        if (d.with_depths) out.depths[row] = sum[first + d.channels];
      }
    }
  });
}

template <class T>
void backward(const Drawing<T>& d, int threads, const Incoming<T>& in, const Outgoing<T>& out) {
  Scratch<Record<T>> memory;
  const Record<T>* records = pack(d, threads, memory);
  const int64_t slot_size = kBasic + (out.absolute ? 2 : 0) + d.blended(), tiles = d.tiles();
  Scratch<T> slot_memory;
  T* slots = slot_memory.get(d.tile_starts[tiles] * slot_size);
  std::vector<T> behind(out.background ? static_cast<size_t>(tiles * d.channels) : 0, T(0));
  share_tiles(d, threads, [&](auto&& next) {
    const auto canvas = std::make_unique<Canvas<T>>();
    const int64_t more = std::max<int64_t>(d.blended() - kFused, 0);
    Scratch<T> further;
    canvas->more = further.get(more * (kPixels + kTileSize));
    canvas->more_sums = canvas->more + more * kPixels;
    for (int64_t tile = next(); tile >= 0; tile = next()) {
      const TilePlace place = tile_place(d, tile);
      load(d, place, in, *canvas, out.background ? behind.data() + tile * d.channels : nullptr);
      const int64_t begin = d.tile_starts[tile];
      const TileJob<T> job{records, d.ids + begin, d.places + begin, T(place.x) + T(0.5), T(place.y) + T(0.5), more, &d, slots, slot_size,
                           out.absolute != nullptr};
      walk(job, *canvas, d.tile_starts[tile + 1] - begin);
    }
  });
  add_slots(d, threads, slots, slot_size, out);
  if (!out.background) return;
  const int64_t per_image = tiles / std::max<int64_t>(d.images, 1);
  for (int64_t image = 0; image < d.images; ++image)
    for (int64_t c = 0; c < d.channels; ++c) {
      double sum = 0;
      for (int64_t tile = image * per_image; tile < (image + 1) * per_image; ++tile)
        sum += static_cast<double>(behind[static_cast<size_t>(tile * d.channels + c)]);
      out.background[image * d.channels + c] = static_cast<T>(sum);
    }
}

}  // namespace
}  // namespace geossl

// See geossl/ops/_gaussians.py for the arguments.
GEOSSL_API int geossl_gaussians_composite_backward_cpu(
    int threads, int is_double, const void* means2d, const void* conics, const void* opacities, const void* features, const void* depths,
    const int32_t* ids, const int32_t* places, const int64_t* tile_starts, const int64_t* starts, int64_t images, int64_t cameras, int64_t count,
    int64_t channels, int features_per_camera, int with_depths, int width, int height, const void* background, const void* rest, const int32_t* last,
    const void* v_render, const void* v_alpha, void*, void* v_means2d, void* v_conics, void* v_opacities, void* v_features, void* v_depths,
    void* v_background, void* v_absolute) {
  using namespace geossl;
  if (images < 0 || cameras < 1 || count < 0 || channels < 0 || width < 1 || height < 1) return GEOSSL_INVALID_ARGUMENT;
  return for_type(is_double, [&](auto zero) {
    using T = decltype(zero);
    const auto in = [](const void* p) { return static_cast<const T*>(p); };
    const auto to = [](void* p) { return static_cast<T*>(p); };
    const Drawing<T> drawing{in(means2d), in(conics), in(opacities), in(features), in(depths), ids, places, tile_starts, starts, images, cameras,
                             count, channels, features_per_camera != 0, with_depths != 0, width, height, (width + kTileSize - 1) / kTileSize,
                             (height + kTileSize - 1) / kTileSize};
    backward(drawing, threads, Incoming<T>{in(v_render), in(v_alpha), in(rest), in(background), last},
             Outgoing<T>{to(v_means2d), to(v_conics), to(v_opacities), to(v_features), to(v_depths), to(v_background), to(v_absolute)});
    return int{GEOSSL_OK};
  });
}
GEOSSL_PACKED(geossl_gaussians_composite_backward_cpu)
