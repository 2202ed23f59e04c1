// Coordinates as three arrays, which is what vectorises, and the one squared distance of all CPU kernels.
#pragma once
// Neither <cmath> nor <memory>, which would take a tenth of a second of every file.
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include "clouds.h"
#include "geossl_api.h"

#if defined(__GNUC__)
#define GEOSSL_INLINE inline __attribute__((always_inline))
#define GEOSSL_RESTRICT __restrict__
#else
#define GEOSSL_INLINE inline
#define GEOSSL_RESTRICT
#endif

namespace geossl {

constexpr int64_t kMaxCloud = std::numeric_limits<int32_t>::max() - 1024;  // rows of one cloud; indices inside are int32

// Distances are never negative, so their bits order like their values, as integers; -1, "out of the game", comes before all.
// Integer minima and maxima vectorise without -ffast-math.
template <class T>
struct BitsOf;
template <>
struct BitsOf<float> {
  using type = int32_t;
};
template <>
struct BitsOf<double> {
  using type = int64_t;
};
template <class T>
using Bits = typename BitsOf<T>::type;

template <class T>
GEOSSL_INLINE Bits<T> to_bits(T value) {
  Bits<T> bits;
  __builtin_memcpy(&bits, &value, sizeof value);
  return bits;
}
template <class T>
GEOSSL_INLINE T from_bits(Bits<T> bits) {
  T value;
  __builtin_memcpy(&value, &bits, sizeof bits);
  return value;
}

// The order of operations is part of the contract: CPU, GPU and twin agree bit for bit (compiled without contraction).
template <class T>
GEOSSL_INLINE T squared(T dx, T dy, T dz) {
  return (dx * dx + dy * dy) + dz * dz;
}

template <class T>
GEOSSL_INLINE bool finite(T value) {
  return value - value == T(0);
}

// An aligned array that is not cleared and only grows; scratch memory of one thread.
template <class T>
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { delete[] memory_; }

  T* get(int64_t count) {
    if (count > capacity_) {
      delete[] memory_;
      memory_ = nullptr, capacity_ = 0;  // should there be no more memory
      // Room to round up to whole vectors, and alignment to a cache line.
      memory_ = new unsigned char[static_cast<size_t>(count) * sizeof(T) + 192];
      const auto address = (reinterpret_cast<uintptr_t>(memory_) + 63) & ~uintptr_t{63};
      data_ = reinterpret_cast<T*>(address);
      capacity_ = count;
    }
    return data_;
  }

 private:
  unsigned char* memory_ = nullptr;
  T* data_ = nullptr;
  int64_t capacity_ = 0;
};

template <class T>
struct Soa {
  T *x, *y, *z;
};

// Copies n rows of three coordinates into three arrays.
void split_axes(const float* rows, int64_t n, const Soa<float>& to);
void split_axes(const double* rows, int64_t n, const Soa<double>& to);

// Whether all indices lie in -1 .. n - 1.
bool in_range(const int64_t* index, int64_t count, int64_t n);

// How many of n points are nearer than the limit.
template <class T>
GEOSSL_INLINE int64_t count_within(const Soa<T>& p, int64_t n, const T* q, T limit) {
  const T x = q[0], y = q[1], z = q[2];
  Bits<T> total = 0;
  for (int64_t i = 0; i < n; ++i) total += static_cast<Bits<T>>(squared(p.x[i] - x, p.y[i] - y, p.z[i] - z) < limit);
  return total;
}

// Bits of the distances under the limit, and those of infinity elsewhere.
template <class T>
GEOSSL_INLINE void distances_within(const Soa<T>& p, int64_t n, const T* q, T limit, Bits<T>* GEOSSL_RESTRICT distance) {
  const Bits<T> infinity = to_bits(std::numeric_limits<T>::infinity());
  const T x = q[0], y = q[1], z = q[2];
  for (int64_t i = 0; i < n; ++i) {
    const T d = squared(p.x[i] - x, p.y[i] - y, p.z[i] - z);
    distance[i] = d < limit ? to_bits(d) : infinity;
  }
}

// Runs the body of an exported function for float or double (it is given a zero of the type); it returns a status code.
template <class F>
int for_type(int is_double, F&& body) noexcept {
  int status = GEOSSL_OK;
  const int failure = guarded([&] { status = is_double ? body(double{}) : body(float{}); });
  return failure != GEOSSL_OK ? failure : status;
}

// Whether the rows of every cloud can be counted in int32.
inline bool clouds_fit(const Clouds& clouds) {
  for (int64_t b = 0; b < clouds.batch; ++b)
    if (clouds.size(b) > kMaxCloud) return false;
  return true;
}

}  // namespace geossl
