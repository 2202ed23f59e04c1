// float16 and bfloat16 as the bits they are, for kernels that read and write them and calculate in float. Plain arithmetic on integers: neither
// the compiler nor the toolkit need know the types, loops vectorise, and all give the same bits, those of torch (NaN stays NaN).
#pragma once
#include <cstdint>
#include <cstring>

#include "clouds.h"

namespace geossl {

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

GEOSSL_HD uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}
GEOSSL_HD float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// To the type in which values are calculated: exact.
GEOSSL_HD float widen(float value) { return value; }
GEOSSL_HD double widen(double value) { return value; }
GEOSSL_HD float widen(BFloat value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }
GEOSSL_HD float widen(Half value) {
  constexpr uint32_t kInfinity = 0x7c00u << 13, kSmallest = 113u << 23;  // of float16, at their places in a float; 2^-14 as a float
  const uint32_t moved = (value.bits & 0x7fffu) << 13, exponent = moved & kInfinity, normal = moved + (112u << 23);
  const uint32_t subnormal = bits_of(float_of(normal + (1u << 23)) - float_of(kSmallest));  // its leading bit was not implied
  const uint32_t special = normal + (112u << 23);                                             // infinity and NaN keep the highest exponent
  const uint32_t size = exponent == kInfinity ? special : exponent == 0 ? subnormal : normal;
  return float_of(size | (value.bits & 0x8000u) << 16);
}

// Back to the type in memory, rounded to nearest, ties to even.
GEOSSL_HD void narrow(float value, float& to) { to = value; }
GEOSSL_HD void narrow(double value, double& to) { to = value; }
GEOSSL_HD void narrow(float value, BFloat& to) {
  const uint32_t bits = bits_of(value), rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  to.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}
GEOSSL_HD void narrow(float value, Half& to) {
  const uint32_t bits = bits_of(value), size = bits & 0x7fffffffu;
  const uint32_t normal = (size - (112u << 23) + 0xfffu + (size >> 13 & 1u)) >> 13;        // may round up to infinity, as it should
  const uint32_t subnormal = bits_of(float_of(size) + 0.5f) - bits_of(0.5f);               // 0.5 has 2^-24, float16's finest step, as its last bit
  const uint32_t found = size >= 143u << 23 ? 0x7c00u : size < 113u << 23 ? subnormal : normal;
  to.bits = static_cast<uint16_t>(size > 0x7f800000u ? 0x7e00u : found | (bits >> 16 & 0x8000u));  // one NaN, whose sign means nothing
}

// What the C interface calls the types (geossl/ops/rope.py).
enum FloatType : int { kFloat = 0, kDouble = 1, kHalf = 2, kBFloat = 3 };

}  // namespace geossl
