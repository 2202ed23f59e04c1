// What the CPU and the CUDA kernels of the Gaussian rasterizer share: the projection of one Gaussian and its gradient, and which pixels an
// ellipse can reach. The equations are those of EWA splatting (Zwicker et al. 2001) with the conventions of gsplat.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "clouds.h"
#include "exponential.h"

namespace geossl {

constexpr int kTileSize = 16;
template <class T>
constexpr T kMinAlpha = T(1) / T(255);  // fainter contributions are skipped
template <class T>
constexpr T kMaxAlpha = T(0.999);
template <class T>
constexpr T kMinTransmittance = T(1e-4);  // a pixel ends before the Gaussian that would leave it this or less
template <class T>
constexpr T kSmallestNormal = sizeof(T) == 4 ? T(1.17549435e-38) : T(2.2250738585072014e-308);

GEOSSL_HD float square_root(float x) { return sqrtf(x); }
GEOSSL_HD double square_root(double x) { return sqrt(x); }
template <class T>
GEOSSL_HD T between(T x, T low, T high) {
  return x < low ? low : x > high ? high : x;
}
// For numbers that may be anything, with low >= 0: NaN becomes the lower bound. Without the functions of libm, which are calls.
template <class T>
GEOSSL_HD int clamped_floor(T x, int low, int high) {
  return x > T(low) ? (x < T(high) ? static_cast<int>(x) : high) : low;
}
template <class T>
GEOSSL_HD int clamped_ceil(T x, int low, int high) {
  const int down = clamped_floor(x, low, high);
  return down + static_cast<int>(down < high && T(down) < x);
}

// exp(-s) for s >= 0, to 4e-7 for the s <= 5.6 that matter here; anything for other s. Half the work of exponential().
GEOSSL_HD float exp_minus(float s) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number, kept in the low bits
  float y = s * -1.44269504f;
  y = y < -64.0f ? -64.0f : y;  // far above the denormal numbers, which are slow
  const float shifted = y + kRound, f = y - (shifted - kRound);
  float p = 1.3276471e-3f;
  p = p * f + 9.6755410e-3f;
  p = p * f + 5.5507131e-2f;
  p = p * f + 2.4022120e-1f;
  p = p * f + 6.9314694e-1f;
  p = p * f + 1.0f;
  uint32_t bits, exponent;
  memcpy(&bits, &p, sizeof bits);
  memcpy(&exponent, &shifted, sizeof exponent);
  bits += exponent << 23;
  memcpy(&p, &bits, sizeof p);
  return p;
}
GEOSSL_HD double exp_minus(double s) { return ::exp(-s); }

// Logarithm of a normal number, to 2e-7: ln m by the series of artanh.
GEOSSL_HD float quick_log(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  const uint32_t from = bits - 0x3f3504f3u;  // of sqrt(1/2)
  const auto exponent = static_cast<float>(static_cast<int32_t>(from) >> 23);
  bits = (from & 0x007fffffu) + 0x3f3504f3u;
  memcpy(&x, &bits, sizeof x);
  const float f = (x - 1.0f) / (x + 1.0f), s = f * f;
  return exponent * 0.693147181f + f * (2.0f + s * (0.666666667f + s * (0.4f + s * (0.285714286f + s * 0.222222222f))));
}
GEOSSL_HD double quick_log(double x) { return ::log(x); }

template <class T>
struct Camera {
  T r[9], t[3], fx, fy, cx, cy;
  T low_x, high_x, low_y, high_y;  // where x/z and y/z are clamped for the Jacobian
  T width, height, near_plane, far_plane, radius_clip, eps;
  bool antialiased;

  Camera() = default;
  GEOSSL_HD Camera(const T* view, const T* k, int w, int h, double near_, double far_, double clip, double eps2d, bool antialias) {
    for (int i = 0; i < 3; ++i) {
      for (int j = 0; j < 3; ++j) r[3 * i + j] = view[4 * i + j];
      t[i] = view[4 * i + 3];
    }
    fx = k[0], cx = k[2], fy = k[4], cy = k[5];
    width = T(w), height = T(h);
    const T room_x = T(0.15) * width / fx, room_y = T(0.15) * height / fy;
    low_x = -(cx / fx + room_x), high_x = (width - cx) / fx + room_x;
    low_y = -(cy / fy + room_y), high_y = (height - cy) / fy + room_y;
    near_plane = T(near_), far_plane = T(far_), radius_clip = T(clip), eps = T(eps2d);
    antialiased = antialias;
  }
};

// The shape of a Gaussian: the square root M = R diag(s) of its covariance, or the covariance.
template <class T>
struct Shape {
  T m[9];
  T unit[4], length, scale[3];  // with quaternion and scales
  bool is_covariance;

  // Returns whether the numbers make sense.
  GEOSSL_HD bool set(const T* quat, const T* scales, const T* covariance) {
    is_covariance = covariance != nullptr;
    if (is_covariance) {
      T sum = 0;
      for (int i = 0; i < 9; ++i) m[i] = T(0.5) * (covariance[i] + covariance[i % 3 * 3 + i / 3]), sum += m[i] - m[i];
      return sum == T(0);
    }
    length = square_root(quat[0] * quat[0] + quat[1] * quat[1] + quat[2] * quat[2] + quat[3] * quat[3]);
    if (!(length - length == T(0)) || !(length >= T(1e-15))) {  // 0, infinite, or squares that left the range of normal numbers
      T largest = 0;
      for (int i = 0; i < 4; ++i) {
        const T a = quat[i] < 0 ? -quat[i] : quat[i];
        if (!(a - a == T(0))) return false;
        largest = a > largest ? a : largest;
      }
      if (!(largest > T(0))) return false;
      T sum = 0;
      for (int i = 0; i < 4; ++i) unit[i] = quat[i] / largest, sum += unit[i] * unit[i];
      const T root = square_root(sum);
      for (int i = 0; i < 4; ++i) unit[i] /= root;
      length = largest * root;
      if (!(length >= kSmallestNormal<T>)) return false;  // its gradient would leave the range
    } else {
      const T inverse = T(1) / length;
      for (int i = 0; i < 4; ++i) unit[i] = quat[i] * inverse;
    }
    for (int i = 0; i < 3; ++i) {
      scale[i] = scales[i];
      if (!(scale[i] >= T(0)) || !(scale[i] - scale[i] == T(0))) return false;
    }
    rotation(m);
    for (int i = 0; i < 9; ++i) m[i] *= scale[i % 3];
    return true;
  }
  GEOSSL_HD void rotation(T* out) const {
    const T w = unit[0], x = unit[1], y = unit[2], z = unit[3];
    out[0] = 1 - 2 * (y * y + z * z), out[1] = 2 * (x * y - w * z), out[2] = 2 * (x * z + w * y);
    out[3] = 2 * (x * y + w * z), out[4] = 1 - 2 * (x * x + z * z), out[5] = 2 * (y * z - w * x);
    out[6] = 2 * (x * z - w * y), out[7] = 2 * (y * z + w * x), out[8] = 1 - 2 * (x * x + y * y);
  }
};

template <class T>
struct Splat {
  T u, v, depth, a, b, c, opacity;
  int rx, ry;
};

// What projection and its gradient both need.
template <class T>
struct Projection {
  T p[3], iz, tx, ty, j[6];  // camera coordinates, 1/z, clamped x and y, Jacobian times the camera's rotation (2 x 3)
  T xx, yy, xy, det, blurred, ratio;
  bool clamped_x, clamped_y;

  // Camera coordinates; false when behind or beyond. Cheap, so it comes before the shape is known.
  GEOSSL_HD bool set_center(const Camera<T>& cam, const T* mean) {
    for (int i = 0; i < 3; ++i) p[i] = cam.r[3 * i] * mean[0] + cam.r[3 * i + 1] * mean[1] + cam.r[3 * i + 2] * mean[2] + cam.t[i];
    const T z = p[2];
    if (!(z >= cam.near_plane && z <= cam.far_plane && z > T(0))) return false;
    iz = T(1) / z;
    return p[0] - p[0] == T(0) && p[1] - p[1] == T(0);
  }
  // The rest; false when the Gaussian is not drawn. xx and yy include the blur.
  GEOSSL_HD bool set(const Camera<T>& cam, const Shape<T>& shape) {
    const T z = p[2];
    const T x = p[0] * iz, y = p[1] * iz, cx = between(x, cam.low_x, cam.high_x), cy = between(y, cam.low_y, cam.high_y);
    clamped_x = x != cx, clamped_y = y != cy;
    tx = z * cx, ty = z * cy;
    const T fx = cam.fx * iz, fy = cam.fy * iz;
    for (int i = 0; i < 3; ++i) {
      j[i] = fx * (cam.r[i] - cx * cam.r[6 + i]);
      j[3 + i] = fy * (cam.r[3 + i] - cy * cam.r[6 + i]);
    }
    T a[6];  // j times the shape
    for (int row = 0; row < 2; ++row)
      for (int i = 0; i < 3; ++i)
        a[3 * row + i] = j[3 * row] * shape.m[i] + j[3 * row + 1] * shape.m[3 + i] + j[3 * row + 2] * shape.m[6 + i];
    if (shape.is_covariance) {
      xx = a[0] * j[0] + a[1] * j[1] + a[2] * j[2];
      xy = a[0] * j[3] + a[1] * j[4] + a[2] * j[5];
      yy = a[3] * j[3] + a[4] * j[4] + a[5] * j[5];
      det = xx * yy - xy * xy;
    } else {
      xx = a[0] * a[0] + a[1] * a[1] + a[2] * a[2];
      xy = a[0] * a[3] + a[1] * a[4] + a[2] * a[5];
      yy = a[3] * a[3] + a[4] * a[4] + a[5] * a[5];
      const T m0 = a[0] * a[4] - a[1] * a[3], m1 = a[0] * a[5] - a[2] * a[3], m2 = a[1] * a[5] - a[2] * a[4];
      det = m0 * m0 + m1 * m1 + m2 * m2;  // squares of minors: exact for needles too, where xx yy - xy^2 cancels
    }
    blurred = det + cam.eps * (xx + yy) + cam.eps * cam.eps;
    xx += cam.eps, yy += cam.eps;
    ratio = T(1);
    if (!(blurred > T(0) && blurred - blurred == T(0) && xx > T(0) && yy > T(0))) return false;
    if (cam.antialiased) ratio = det > T(0) ? square_root(det / blurred) : T(0);
    return true;
  }

  GEOSSL_HD bool splat(const Camera<T>& cam, T opacity, Splat<T>& out) const {
    out.opacity = opacity * ratio;
    if (!(out.opacity >= kMinAlpha<T> && out.opacity - out.opacity == T(0))) return false;
    out.u = cam.fx * p[0] * iz + cam.cx, out.v = cam.fy * p[1] * iz + cam.cy, out.depth = p[2];
    const T inverse = T(1) / blurred;
    out.a = yy * inverse, out.b = -xy * inverse, out.c = xx * inverse;
    const T log2 = T(2) * quick_log(T(255) * out.opacity);
    T k = square_root(log2 > T(0) ? log2 : T(0));
    k = k < T(3.33) ? k : T(3.33);
    out.rx = clamped_ceil(k * square_root(xx), 0, 1 << 30), out.ry = clamped_ceil(k * square_root(yy), 0, 1 << 30);
    const T rx = T(out.rx), ry = T(out.ry);
    return (rx > cam.radius_clip || ry > cam.radius_clip) && out.u + rx > T(0) && out.u - rx < cam.width && out.v + ry > T(0) &&
           out.v - ry < cam.height && out.a > T(0) && out.c > T(0) && out.a - out.a == T(0) && out.c - out.c == T(0);
  }
};

// Gradients of one Gaussian in one camera, added to sums.
template <class T>
struct SplatGradient {
  T u, v, depth, a, b, c, opacity;
};

template <class T>
GEOSSL_HD void project_gradient(const Camera<T>& cam, const T* mean, const Shape<T>& shape, const Projection<T>& q, T opacity,
                                const SplatGradient<T>& g, T* v_mean, T* v_m, T* v_opacity, T* v_view) {
  // Conic to covariance in the image: -P G P with the conic P and the symmetric gradient G.
  const T inverse = T(1) / q.blurred, a = q.yy * inverse, b = -q.xy * inverse, c = q.xx * inverse, half = T(0.5) * g.b;
  const T k00 = a * g.a + b * half, k01 = a * half + b * g.c, k10 = b * g.a + c * half, k11 = b * half + c * g.c;
  T s00 = -(k00 * a + k01 * b), s01 = -(k00 * b + k01 * c), s11 = -(k10 * b + k11 * c);
  *v_opacity += q.ratio * g.opacity;
  if (cam.antialiased && q.ratio > T(0)) {
    const T scale = T(0.5) * opacity * g.opacity / q.ratio, one = T(1) - q.ratio * q.ratio, rest = cam.eps * inverse;
    s00 += scale * (one * a - rest), s01 += scale * one * b, s11 += scale * (one * c - rest);
  }
  const T *j = q.j, *m = shape.m;
  // L = J Rv Sigma (2 x 3), with Sigma = M M^T.
  T l[6];
  if (shape.is_covariance) {
    for (int row = 0; row < 2; ++row)
      for (int i = 0; i < 3; ++i) l[3 * row + i] = j[3 * row] * m[i] + j[3 * row + 1] * m[3 + i] + j[3 * row + 2] * m[6 + i];
    // Gradient of the covariance: J^T S J.
    for (int i = 0; i < 3; ++i)
      for (int k = 0; k < 3; ++k)
        v_m[3 * i + k] += j[i] * (s00 * j[k] + s01 * j[3 + k]) + j[3 + i] * (s01 * j[k] + s11 * j[3 + k]);
  } else {
    T a2[6];
    for (int row = 0; row < 2; ++row)
      for (int i = 0; i < 3; ++i) a2[3 * row + i] = j[3 * row] * m[i] + j[3 * row + 1] * m[3 + i] + j[3 * row + 2] * m[6 + i];
    for (int row = 0; row < 2; ++row)
      for (int i = 0; i < 3; ++i) l[3 * row + i] = a2[3 * row] * m[3 * i] + a2[3 * row + 1] * m[3 * i + 1] + a2[3 * row + 2] * m[3 * i + 2];
    // Gradient of M: 2 J^T S (J M).
    for (int k = 0; k < 3; ++k) {
      const T first = 2 * (s00 * a2[k] + s01 * a2[3 + k]), second = 2 * (s01 * a2[k] + s11 * a2[3 + k]);
      for (int i = 0; i < 3; ++i) v_m[3 * i + k] += j[i] * first + j[3 + i] * second;
    }
  }
  // Gradient of J Rv: 2 S L.
  T v_j[6];
  for (int i = 0; i < 3; ++i) {
    v_j[i] = 2 * (s00 * l[i] + s01 * l[3 + i]);
    v_j[3 + i] = 2 * (s01 * l[i] + s11 * l[3 + i]);
  }
  // J has the entries fx/z, -fx tx/z^2, fy/z, -fy ty/z^2.
  const T fx = cam.fx * q.iz, fy = cam.fy * q.iz, gx = fx * q.tx * q.iz, gy = fy * q.ty * q.iz;
  T v00 = 0, v02 = 0, v11 = 0, v12 = 0;
  for (int i = 0; i < 3; ++i) {
    v00 += v_j[i] * cam.r[i], v02 += v_j[i] * cam.r[6 + i];
    v11 += v_j[3 + i] * cam.r[3 + i], v12 += v_j[3 + i] * cam.r[6 + i];
  }
  T v_p[3] = {fx * g.u, fy * g.v, -(fx * q.p[0] * q.iz * g.u + fy * q.p[1] * q.iz * g.v) + g.depth};
  v_p[2] += -q.iz * (fx * v00 + fy * v11);
  if (q.clamped_x) v_p[2] += gx * q.iz * v02;
  else v_p[0] += -fx * q.iz * v02, v_p[2] += 2 * gx * q.iz * v02;
  if (q.clamped_y) v_p[2] += gy * q.iz * v12;
  else v_p[1] += -fy * q.iz * v12, v_p[2] += 2 * gy * q.iz * v12;
  for (int i = 0; i < 3; ++i) v_mean[i] += cam.r[i] * v_p[0] + cam.r[3 + i] * v_p[1] + cam.r[6 + i] * v_p[2];
  if (!v_view) return;
  for (int i = 0; i < 3; ++i) {
    for (int k = 0; k < 3; ++k) v_view[4 * i + k] += v_p[i] * mean[k];
    v_view[4 * i + 3] += v_p[i];
  }
  for (int k = 0; k < 3; ++k) {
    v_view[k] += fx * v_j[k];
    v_view[4 + k] += fy * v_j[3 + k];
    v_view[8 + k] += -gx * v_j[k] - gy * v_j[3 + k];
  }
}

// From the gradient of M = R diag(s) to those of the scales and the quaternion as given.
template <class T>
GEOSSL_HD void shape_gradient(const Shape<T>& shape, const T* v_m, T* v_quat, T* v_scale) {
  T r[9], g[9];
  shape.rotation(r);
  for (int k = 0; k < 3; ++k) v_scale[k] = r[k] * v_m[k] + r[3 + k] * v_m[3 + k] + r[6 + k] * v_m[6 + k];
  for (int i = 0; i < 9; ++i) g[i] = v_m[i] * shape.scale[i % 3];
  const T w = shape.unit[0], x = shape.unit[1], y = shape.unit[2], z = shape.unit[3];
  const T unit[4] = {
      2 * (x * (g[7] - g[5]) + y * (g[2] - g[6]) + z * (g[3] - g[1])),
      2 * (-2 * x * (g[4] + g[8]) + y * (g[3] + g[1]) + z * (g[6] + g[2]) + w * (g[7] - g[5])),
      2 * (x * (g[3] + g[1]) - 2 * y * (g[0] + g[8]) + z * (g[7] + g[5]) + w * (g[2] - g[6])),
      2 * (x * (g[6] + g[2]) + y * (g[7] + g[5]) - 2 * z * (g[0] + g[4]) + w * (g[3] - g[1])),
  };
  const T along = unit[0] * w + unit[1] * x + unit[2] * y + unit[3] * z;
  for (int i = 0; i < 4; ++i) v_quat[i] = (unit[i] - along * shape.unit[i]) / shape.length;
}

// The pixels an ellipse a ex^2 + 2 b ex ey + c ey^2 <= q around (u, v) can reach: q = 2 ln(255 opacity), widened against rounding.
template <class T>
struct Ellipse {
  T u, v, slack;
  T b_c, q_c, det_cc, turn_x;  // ey = -b/c ex +- sqrt(q/c - ex^2 det/c^2), largest at ex = turn_x
  T b_a, q_a, det_aa, turn_y;
  T reach_x, reach_y;

  GEOSSL_HD Ellipse(T u_, T v_, T a, T b, T c, T opacity) : u(u_), v(v_) {
    const T log2 = T(2) * quick_log(T(255) * opacity), q = (log2 > T(0) ? log2 : T(0)) * T(1.0001) + T(1e-4);
    const double product = static_cast<double>(a) * static_cast<double>(c);
    double exact = product - static_cast<double>(b) * static_cast<double>(b);
    exact = exact > 1e-12 * product ? exact : 1e-12 * product;
    const T det = static_cast<T>(exact), inverse_a = T(1) / a, inverse_c = T(1) / c, extent = q / det;
    slack = T(1e-3) + T(1e-6) * ((u < 0 ? -u : u) + (v < 0 ? -v : v));
    b_a = b * inverse_a, b_c = b * inverse_c;
    q_a = q * inverse_a, q_c = q * inverse_c;
    det_aa = det * inverse_a * inverse_a, det_cc = det * inverse_c * inverse_c;
    reach_x = square_root(extent * c), reach_y = square_root(extent * a);
    turn_x = -b_a * reach_y, turn_y = -b_c * reach_x;
  }

  // Pixels whose centres lie between, as tiles [first, end).
  GEOSSL_HD static void tiles_between(T low, T high, int size, int& first, int& end) {
    const int from = clamped_ceil(low - T(0.5), 0, size), to = clamped_floor(high + T(0.5), 0, size);
    first = from / kTileSize, end = from < to ? (to + kTileSize - 1) / kTileSize : first;
  }
  // Tile columns [first, end) that it reaches in a tile row.
  GEOSSL_HD void tile_columns(int row, int width, int height, int& first, int& end) const {
    const int bottom = row * kTileSize + kTileSize < height ? row * kTileSize + kTileSize : height;
    const T low = T(row * kTileSize) + T(0.5) - v, high = T(bottom) - T(0.5) - v;
    const T right_y = between(turn_y, low, high), left_y = between(-turn_y, low, high);
    const T right = q_a - right_y * right_y * det_aa, left = q_a - left_y * left_y * det_aa;
    const T right_x = -b_a * right_y + square_root(right > T(0) ? right : T(0)), left_x = -b_a * left_y - square_root(left > T(0) ? left : T(0));
    tiles_between(u + left_x - slack, u + right_x + slack, width, first, end);
  }
  // Calls f(row, first, end) for the tiles of every row. Most Gaussians are small: one row or column of tiles is known from the box.
  template <class F>
  GEOSSL_HD void for_tile_rows(int width, int height, F&& f) const {
    int top, bottom, left, right;
    tiles_between(v - reach_y - slack, v + reach_y + slack, height, top, bottom);
    tiles_between(u - reach_x - slack, u + reach_x + slack, width, left, right);
    if (left >= right) return;
    const bool box = bottom - top == 1 || right - left == 1;
    for (int row = top; row < bottom; ++row) {
      int first = left, end = right;
      if (!box) tile_columns(row, width, height, first, end);
      if (first < end) f(row, first, end);
    }
  }
};

template <class T>
GEOSSL_HD int count_tiles(const Splat<T>& s, int width, int height) {
  int total = 0;
  Ellipse<T>(s.u, s.v, s.a, s.b, s.c, s.opacity).for_tile_rows(width, height, [&](int, int first, int end) { total += end - first; });
  return total;
}

}  // namespace geossl
