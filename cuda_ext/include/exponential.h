// The exponential function of CPU and CUDA kernels: plain arithmetic without calls, so that loops over it vectorise and all give the same bits.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "clouds.h"

namespace geossl {

// Reduction to |r| <= ln 2 / 2 and a polynomial of degree 7 (Cephes' coefficients); within 2 units in the last place, exp(0) = 1 exactly.
GEOSSL_HD float exponential(float x) {
  x = x < -104.0f ? -104.0f : x;  // under it is 0, above 89 infinity; NaN passes both
  x = x > 89.0f ? 89.0f : x;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number, kept in the low bits
  const float shifted = x * 1.44269504f + kRound, whole = shifted - kRound;
  const float r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float value = (p * (r * r) + r) + 1.0f;
  uint32_t bits;
  memcpy(&bits, &shifted, sizeof bits);
  // 2^n in two factors, as n alone may leave the exponent's range. Unsigned, because the bits of NaN give any n.
  const uint32_t n = bits - 0x4b400000u, half = static_cast<uint32_t>(static_cast<int32_t>(n) >> 1);
  const uint32_t first = (half + 127u) << 23, second = (n - half + 127u) << 23;
  float a, b;
  memcpy(&a, &first, sizeof a);
  memcpy(&b, &second, sizeof b);
  return value * a * b;
}
GEOSSL_HD double exponential(double x) { return ::exp(x); }

// The logarithm of a sum, rounded from double so that libraries of different makers agree.
GEOSSL_HD float logarithm(float x) { return static_cast<float>(::log(static_cast<double>(x))); }
GEOSSL_HD double logarithm(double x) { return ::log(x); }

}  // namespace geossl
