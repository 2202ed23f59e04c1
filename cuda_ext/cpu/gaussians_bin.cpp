// Lists of the Gaussians that each tile of 16 x 16 pixels sees, nearest first.
#include <utility>

#include "gaussians.h"
#include "points.h"

namespace geossl {
namespace {

// Stable: equal depths stay in index order. Depths are positive, so their bits order like them.
void sort_by_depth(const float* depths, std::vector<int32_t>& rows) {
  constexpr int kBits = 11, kBuckets = 1 << kBits;
  struct Item {
    uint32_t key;
    int32_t row;
  };
  const size_t n = rows.size();
  std::vector<Item> items(n), other(n);
  std::vector<uint32_t> counts(3 * kBuckets, 0);
  for (size_t i = 0; i < n; ++i) {
    const auto key = static_cast<uint32_t>(to_bits(depths[rows[i]]));
    items[i] = {key, rows[i]};
    for (int pass = 0; pass < 3; ++pass) ++counts[static_cast<size_t>(pass * kBuckets + (key >> (kBits * pass) & (kBuckets - 1)))];
  }
  for (int pass = 0; pass < 3; ++pass) {
    uint32_t* starts = counts.data() + pass * kBuckets;
    uint32_t sum = 0;
    for (int bucket = 0; bucket < kBuckets; ++bucket) sum += std::exchange(starts[bucket], sum);
    for (const Item& item : items) other[starts[item.key >> (kBits * pass) & (kBuckets - 1)]++] = item;
    items.swap(other);
  }
  for (size_t i = 0; i < n; ++i) rows[i] = items[i].row;
}
void sort_by_depth(const double* depths, std::vector<int32_t>& rows) {
  std::stable_sort(rows.begin(), rows.end(), [&](int32_t a, int32_t b) { return depths[a] < depths[b]; });
}

// Neighbouring tiles of one row that one Gaussian reaches.
struct Span {
  int32_t row, first_tile, tiles, place;
};

template <class T>
struct Image {
  const T *means2d, *conics, *opacities, *depths;
  const int32_t* radii;
  int64_t count;
  int width, height, across, down;
};

// Spans of some Gaussians in depth order, and how many entries every tile gets from them.
template <class T>
void find_spans(const Image<T>& image, const int32_t* rows, int64_t count, std::vector<Span>& spans, int64_t* entries) {
  spans.reserve(static_cast<size_t>(2 * count));
  for (int64_t i = 0; i < count; ++i) {
    const int32_t row = rows[i];
    const T *mean = image.means2d + 2 * int64_t{row}, *conic = image.conics + 3 * int64_t{row};
    const Ellipse<T> ellipse(mean[0], mean[1], conic[0], conic[1], conic[2], image.opacities[row]);
    int32_t place = 0;
    ellipse.for_tile_rows(image.width, image.height, [&](int y, int left, int right) {
      spans.push_back({row, y * image.across + left, right - left, place});
      place += right - left;
      for (int x = left; x < right; ++x) ++entries[y * image.across + x];
    });
  }
}

// Writes the lists of one image, entries `before` to `end`; false, and nothing is written, if there are not as many.
template <class T>
bool bin_image(const Image<T>& image, int threads, int64_t row_base, int64_t before, int64_t end, int32_t* ids, int32_t* places, int64_t* tile_starts) {
  std::vector<int32_t> rows;
  rows.reserve(static_cast<size_t>(image.count));
  for (int64_t i = 0; i < image.count; ++i)
    if (image.radii[2 * i] > 0 || image.radii[2 * i + 1] > 0) rows.push_back(static_cast<int32_t>(i));
  sort_by_depth(image.depths, rows);
  const auto count = static_cast<int64_t>(rows.size());
  const int64_t tiles = int64_t{image.across} * image.down;
  // Every piece of the depth order counts, then writes behind the pieces before it: the lists do not depend on the pieces.
  const int pieces = static_cast<int>(pieces_of(threads, count, 4096));
  std::vector<std::vector<Span>> spans(static_cast<size_t>(pieces));
  std::vector<int64_t> entries(static_cast<size_t>(pieces * tiles), 0);
  Helpers helpers(threads);
  const auto each_piece = [&](auto&& f) {
    helpers.share(pieces, [&](int64_t piece) { f(static_cast<size_t>(piece), entries.data() + piece * tiles); });
  };
  each_piece([&](size_t piece, int64_t* own) {
    const int64_t begin = static_cast<int64_t>(piece) * count / pieces, end = static_cast<int64_t>(piece + 1) * count / pieces;
    find_spans(image, rows.data() + begin, end - begin, spans[piece], own);
  });
  int64_t at = before;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    tile_starts[tile] = at;
    for (int piece = 0; piece < pieces; ++piece) at += std::exchange(entries[static_cast<size_t>(piece * tiles + tile)], at);
  }
  if (at != end) return false;
  each_piece([&](size_t piece, int64_t* own) {
    for (const Span& span : spans[piece])
      for (int32_t i = 0; i < span.tiles; ++i) {
        const int64_t to = own[span.first_tile + i]++;
        ids[to] = static_cast<int32_t>(row_base + span.row);
        places[to] = span.place + i;
      }
  });
  return true;
}

}  // namespace
}  // namespace geossl

// Sums of the numbers of tiles before each Gaussian, and their total.
GEOSSL_API int geossl_gaussians_starts_cpu(int, const int32_t* tiles, int64_t rows, int64_t* starts) {
  int64_t sum = 0;
  for (int64_t row = 0; row < rows; ++row) {
    starts[row] = sum;
    sum += tiles[row];
  }
  starts[rows] = sum;
  return GEOSSL_OK;
}
GEOSSL_PACKED(geossl_gaussians_starts_cpu)

// `starts` holds the number of entries before each Gaussian, as counted by the projection; its end is the length of ids and places.
GEOSSL_API int geossl_gaussians_bin_cpu(int threads, int is_double, const void* means2d, const void* conics, const void* opacities,
                                        const void* depths, const int32_t* radii, int64_t images, int64_t count, int width, int height,
                                        const int64_t* starts, int32_t* ids, int32_t* places, int64_t* tile_starts) {
  using namespace geossl;
  if (images < 0 || count < 0 || width < 1 || height < 1) return GEOSSL_INVALID_ARGUMENT;
  if (images * count > std::numeric_limits<int32_t>::max()) return GEOSSL_TOO_LARGE;
  return for_type(is_double, [&](auto zero) {
    using T = decltype(zero);
    const int across = (width + kTileSize - 1) / kTileSize, down = (height + kTileSize - 1) / kTileSize;
    for (int64_t i = 0; i < images; ++i) {
      const int64_t row = i * count;
      const Image<T> image{static_cast<const T*>(means2d) + 2 * row, static_cast<const T*>(conics) + 3 * row,
                           static_cast<const T*>(opacities) + row, static_cast<const T*>(depths) + row, radii + 2 * row,
                           count, width, height, across, down};
      if (!bin_image(image, threads, row, starts[row], starts[row + count], ids, places, tile_starts + i * across * down))
        return int{GEOSSL_INVALID_ARGUMENT};
    }
    tile_starts[images * across * down] = starts[images * count];
    return int{GEOSSL_OK};
  });
}
GEOSSL_PACKED(geossl_gaussians_bin_cpu)
