// What compositing and its gradient share on the CPU: Gaussians packed for one cache line, and tiles dealt out to threads.
#pragma once
#include <atomic>

#include "gaussians.h"
#include "points.h"

// Before a loop over the 16 pixels of a row with a short body: gcc would unroll it before it could vectorise it.
#if defined(__GNUC__) && !defined(__clang__)
#define GEOSSL_LANES _Pragma("GCC unroll 1")
#else
#define GEOSSL_LANES
#endif

namespace geossl {

constexpr int kPixels = kTileSize * kTileSize;
constexpr int kFused = 4;  // channels that are kept in the record and blended in the main loop

// sigma = ha dx^2 + b dx dy + hc dy^2. Which rows it reaches between two columns follows as in Ellipse.
template <class T>
struct alignas(16 * sizeof(T)) Record {
  T u, v, ha, b, hc, opacity;
  T turn_x, b_c, q_c, det_cc, slack;
  T feature[kFused];
};

// What one tile list is blended from.
template <class T>
struct Drawing {
  const T *means2d, *conics, *opacities;  // one row per image and Gaussian
  const T* features;                      // per scene (or image) and Gaussian, `channels` wide
  const T* depths;                        // one more channel, if wanted
  const int32_t *ids, *places;
  const int64_t *tile_starts, *starts;
  int64_t images, cameras, count, channels;
  bool features_per_camera, with_depths;
  int width, height, across, down;

  int64_t blended() const { return channels + (with_depths ? 1 : 0); }
  int64_t tiles() const { return images * across * down; }
  // Row of the features of a Gaussian of an image.
  int64_t feature_row(int64_t row) const {
    return features_per_camera || cameras == 1 ? row : row / (cameras * count) * count + row % count;
  }
  const T* features_of(int64_t row) const { return features + feature_row(row) * channels; }
  // One of them: `own` is what features_of gave.
  T feature(const T* own, int64_t row, int64_t channel) const { return channel < channels ? own[channel] : depths[row]; }
};

template <class T>
Record<T> make_record(const Drawing<T>& d, int64_t row) {
  const T *mean = d.means2d + 2 * row, *conic = d.conics + 3 * row;
  const Ellipse<T> e(mean[0], mean[1], conic[0], conic[1], conic[2], d.opacities[row]);
  Record<T> r{e.u, e.v, T(0.5) * conic[0], conic[1], T(0.5) * conic[2], d.opacities[row], e.turn_x, e.b_c, e.q_c, e.det_cc, e.slack, {}};
  const int64_t blended = d.blended();
  const T* own = d.features_of(row);
  T sum = 0;
  for (int64_t c = 0; c < blended; ++c) {
    const T f = d.feature(own, row, c);
    sum += f - f;
    if (c < kFused) r.feature[c] = f;
  }
  if (!(sum == T(0))) {  // a feature that is not finite: not drawn
    r.opacity = 0;
    for (T& f : r.feature) f = 0;
  }
  return r;
}

// One record per Gaussian and image; those in no list are left as they are.
template <class T>
const Record<T>* pack(const Drawing<T>& d, int threads, Scratch<Record<T>>& memory) {
  Record<T>* records = memory.get(d.images * d.count);
  parallel_for(threads, d.images * d.count, 8192, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      if (d.starts[row] < d.starts[row + 1]) records[row] = make_record(d, row);
  });
  return records;
}

// Rows [first, end) of a tile's live rows [low, high) that an ellipse reaches in its columns; x and y are those of the first pixel's centre.
template <class T>
GEOSSL_INLINE bool reached_rows(const Record<T>& r, T x, T y, int low, int high, int& first, int& end) {
  const T left = x - r.u, right = left + T(kTileSize - 1);
  const T top = between(r.turn_x, left, right), bottom = between(-r.turn_x, left, right);
  T high_root = r.q_c - top * top * r.det_cc, low_root = r.q_c - bottom * bottom * r.det_cc;
  high_root = high_root > T(0) ? high_root : T(0), low_root = low_root > T(0) ? low_root : T(0);
  const T high_y = std::sqrt(high_root) - r.b_c * top, low_y = -std::sqrt(low_root) - r.b_c * bottom, base = r.v - y;
  // Truncation of a number that is not negative rounds down: the first row is at or under the exact one.
  first = clamped_floor(base + low_y - r.slack + T(1), low, high);
  end = clamped_floor(base + high_y + r.slack + T(1), low, high);
  return first < end;
}

// A tile's place in the images.
struct TilePlace {
  int64_t image;
  int x, y, columns, rows;
};
template <class T>
TilePlace tile_place(const Drawing<T>& d, int64_t tile) {
  const int64_t per_image = int64_t{d.across} * d.down, local = tile % per_image;
  const int x = static_cast<int>(local % d.across) * kTileSize, y = static_cast<int>(local / d.across) * kTileSize;
  return {tile / per_image, x, y, std::min(kTileSize, d.width - x), std::min(kTileSize, d.height - y)};
}

// Calls f(next) in every thread, where next() hands out tiles until they are all taken, -1 then. Which thread gets a tile does not matter:
// tiles write to places of their own.
template <class T, class F>
void share_tiles(const Drawing<T>& d, int threads, F&& f) {
  const int64_t tiles = d.tiles(), entries = d.tile_starts[tiles];
  const int64_t pieces = std::clamp<int64_t>(entries / 2048 + d.images * d.width * d.height / 262144, 1, std::max(threads, 1));
  std::atomic<int64_t> taken{0};
  parallel_for(threads, pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece)
      f([&] {
        const int64_t tile = taken.fetch_add(1, std::memory_order_relaxed);
        return tile < tiles ? tile : int64_t{-1};
      });
  });
}

}  // namespace geossl
