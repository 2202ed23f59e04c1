// What the drivers of the kernels share: each file drive_<group>.cpp calls the launchers of one operator group on small inputs, CPU kernels
// with two threads and CUDA kernels on the host, and compares them. `const Suite suite{&run};` adds its function to those main calls.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <vector>

#define BOTH(name, ...)                                            \
  extern "C" int geossl_##name##_cpu(int threads, __VA_ARGS__);    \
  extern "C" int geossl_##name##_cuda(int device, void* stream, __VA_ARGS__)

namespace drive {

inline int failures = 0;

inline void check(bool good, const char* what) {
  if (!good) std::printf("differs or failed: %s\n", what), ++failures;
}
template <class T>
bool equal(const std::vector<T>& a, const std::vector<T>& b) {
  for (size_t i = 0; i < a.size(); ++i)
    if (!(a[i] == b[i]) && !(a[i] != a[i] && b[i] != b[i])) return false;
  return a.size() == b.size();
}
template <class T>
bool close(const std::vector<T>& a, const std::vector<T>& b) {
  for (size_t i = 0; i < a.size(); ++i)
    if (!(std::fabs(a[i] - b[i]) <= 1e-5 * (1 + std::fabs(b[i])))) return false;
  return a.size() == b.size();
}

inline uint64_t state = 1;
inline double uniform() {
  state = state * 6364136223846793005ull + 1442695040888963407ull;
  return static_cast<double>(state >> 33) / 2147483648.0;
}
// Some points twice, some invalid.
template <class T>
std::vector<T> points(int64_t n) {
  std::vector<T> p(static_cast<size_t>(3 * n));
  for (size_t i = 0; i < p.size(); ++i) p[i] = static_cast<T>(i >= 30 && i % 7 < 3 ? p[i % 30] : uniform());
  for (size_t i = 20; i < p.size(); i += 97) p[i] = std::numeric_limits<T>::quiet_NaN();
  return p;
}

// The inverse map that geossl/ops/_dispatch.py makes with torch.
inline void invert(const std::vector<int64_t>& target, int64_t rows, std::vector<int64_t>& order, std::vector<int64_t>& starts) {
  starts.assign(1, 0), order.clear();
  for (int64_t row = 0; row < rows; ++row) {
    for (size_t e = 0; e < target.size(); ++e)
      if (target[e] == row) order.push_back(static_cast<int64_t>(e));
    starts.push_back(static_cast<int64_t>(order.size()));
  }
  order.push_back(0);  // never empty
}

inline constexpr bool kOnCuda[] = {false, true};

struct Suite {
  explicit Suite(void (*run)()) { all().push_back(run); }
  static std::vector<void (*)()>& all() {
    static std::vector<void (*)()> suites;
    return suites;
  }
};

}  // namespace drive
