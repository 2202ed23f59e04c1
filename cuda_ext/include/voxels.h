// What the CPU and the CUDA kernels on voxels share: cells, the keys that order them, and the hash of a cell.
#pragma once
#include <cmath>
#include <cstdint>
#include <limits>

#include "clouds.h"

namespace geossl {

enum VoxelOrder : int { kLexicographic = 0, kMorton = 1, kHilbert = 2 };

// One cloud's numbering of cells, made by geossl/ops/voxels.py from the bounds of its points. A cell relative to the lowest one has the key
// base + ((x * stride_x) + y * stride_y) + z, or base + the place on a space-filling curve of `bits` bits an axis. Keys of clouds do not meet.
struct VoxelFrame {
  int64_t base, low[3], stride_x, stride_y, bits;
};

struct VoxelGrid {
  double size[3], origin[3];

  // The definition: float64, a true division, rounded down. CPU, CUDA and twin give the same cell, bit for bit.
  GEOSSL_HD double cell(double p, int axis) const { return floor((p - origin[axis]) / size[axis]); }
};

// Bounds of a cloud's kept points: low x, y, z, then high x, y, z; low above high when there are none. A point lies inside exactly when it is
// kept: NaN and infinity compare false, and a point outside the wanted range is outside the box of those inside it.
template <class T>
GEOSSL_HD bool inside(const T* p, const double* bounds) {
  bool in = true;
  for (int axis = 0; axis < 3; ++axis) in &= static_cast<double>(p[axis]) >= bounds[axis] && static_cast<double>(p[axis]) <= bounds[3 + axis];
  return in;
}

// low <= p < high as a closed interval of finite numbers of type T.
template <class T>
struct Limits {
  T low[3], high[3];

  explicit Limits(const double* range) {
    constexpr T largest = std::numeric_limits<T>::max();
    for (int axis = 0; axis < 3; ++axis) {
      const double from = range[axis], to = range[3 + axis];
      low[axis] = from <= -static_cast<double>(largest) ? -largest : from > static_cast<double>(largest) ? largest : static_cast<T>(from);
      if (static_cast<double>(low[axis]) < from) low[axis] = std::nextafter(low[axis], std::numeric_limits<T>::infinity());
      high[axis] = to > static_cast<double>(largest) ? largest : to < -static_cast<double>(largest) ? -largest : static_cast<T>(to);
      if (static_cast<double>(high[axis]) >= to) high[axis] = std::nextafter(high[axis], -std::numeric_limits<T>::infinity());
    }
  }
};

// Spreads 21 bits so that two zero bits follow each.
GEOSSL_HD uint64_t spread_21_bits(uint64_t v) {
  v = (v | v << 32) & 0x001f00000000ffffull;
  v = (v | v << 16) & 0x001f0000ff0000ffull;
  v = (v | v << 8) & 0x100f00f00f00f00full;
  v = (v | v << 4) & 0x10c30c30c30c30c3ull;
  return (v | v << 2) & 0x1249249249249249ull;
}

GEOSSL_HD uint64_t interleave(uint32_t x, uint32_t y, uint32_t z) { return spread_21_bits(x) << 2 | spread_21_bits(y) << 1 | spread_21_bits(z); }

// One level of the Hilbert transform (Skilling 2004, "Programming the Hilbert curve"): reflects or swaps the lower bits of an axis with x.
GEOSSL_HD void hilbert_level(uint32_t bit, uint32_t& x, uint32_t& axis) {
  const uint32_t below = bit - 1, set = axis & bit ? ~0u : 0u, swap = (x ^ axis) & below & ~set;
  x ^= swap ^ (below & set);
  axis ^= swap;
}
// x itself as the axis: nothing to swap.
GEOSSL_HD void hilbert_level(uint32_t bit, uint32_t& x) { x ^= x & bit ? bit - 1 : 0; }

GEOSSL_HD uint32_t hilbert_flip(uint32_t bit, uint32_t z) { return z & bit ? bit - 1 : 0; }

GEOSSL_HD uint64_t hilbert(uint32_t x, uint32_t y, uint32_t z, int64_t bits) {
  for (uint32_t bit = bits > 0 ? 1u << (bits - 1) : 0; bit > 1; bit >>= 1) {
    hilbert_level(bit, x);
    hilbert_level(bit, x, y);
    hilbert_level(bit, x, z);
  }
  y ^= x;
  z ^= y;
  uint32_t flip = 0;
  for (uint32_t bit = bits > 0 ? 1u << (bits - 1) : 0; bit > 1; bit >>= 1) flip ^= hilbert_flip(bit, z);
  return interleave(x ^ flip, y ^ flip, z ^ flip);
}

// A cell (cloud, x, y, z) in a table of 2^n slots; the table holds voxel numbers, so that equality is checked on the cell itself.
GEOSSL_HD uint64_t hash_cell(const int32_t* c) {
  uint64_t h = static_cast<uint32_t>(c[0]) * 0x9e3779b97f4a7c15ull;
  for (int i = 1; i < 4; ++i) {
    h = (h ^ static_cast<uint32_t>(c[i])) * 0xff51afd7ed558ccdull;
    h ^= h >> 32;
  }
  return h;
}
GEOSSL_HD bool same_cell(const int32_t* a, const int32_t* b) { return a[0] == b[0] && a[1] == b[1] && a[2] == b[2] && a[3] == b[3]; }

// The number of the voxel at a cell, -1 if there is none.
GEOSSL_HD int64_t find_voxel(const int32_t* cell, const int32_t* coords, const int64_t* table, int64_t slots) {
  for (uint64_t at = hash_cell(cell);; ++at) {
    const int64_t v = table[at & static_cast<uint64_t>(slots - 1)];
    if (v < 0 || same_cell(cell, coords + 4 * v)) return v;
  }
}

// The 8 voxel centres around a point, those that exist, and their trilinear weights, which add up to 1 over those found.
template <class T>
GEOSSL_HD void find_corners(const T* p, int64_t cloud, const VoxelGrid& grid, const int32_t* coords, const int64_t* table, int64_t slots,
                            int64_t* index, T* weight) {
  double part[3], sum = 0;
  int32_t base[3];
  bool valid = true;
  for (int axis = 0; axis < 3; ++axis) {
    const double at = (static_cast<double>(p[axis]) - grid.origin[axis]) / grid.size[axis] - 0.5;
    valid &= at >= -2147483647.0 && at <= 2147483645.0;
    const double below = floor(valid ? at : 0.0);
    part[axis] = (valid ? at : 0.0) - below, base[axis] = static_cast<int32_t>(below);
  }
  double weights[8];
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int k = 0; k < 8; ++k) {
    const int32_t cell[4] = {static_cast<int32_t>(cloud), base[0] + (k >> 2), base[1] + (k >> 1 & 1), base[2] + (k & 1)};
    const int64_t v = valid ? find_voxel(cell, coords, table, slots) : -1;
    const double w = ((k >> 2 ? part[0] : 1 - part[0]) * (k >> 1 & 1 ? part[1] : 1 - part[1])) * (k & 1 ? part[2] : 1 - part[2]);
    index[k] = v, weights[k] = v < 0 ? 0 : w;
    sum += weights[k];
  }
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int k = 0; k < 8; ++k) weight[k] = sum > 0 ? static_cast<T>(weights[k] / sum) : T(0);
}

}  // namespace geossl
