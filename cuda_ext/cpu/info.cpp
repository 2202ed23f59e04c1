// What libgeossl_cpu says about itself; `geossl doctor` and geossl.native_info() print it.
#include "geossl_api.h"

#ifndef GEOSSL_WITHOUT_CUDA
#define GEOSSL_WITHOUT_CUDA ""
#endif

GEOSSL_API int geossl_abi_version() { return GEOSSL_ABI_VERSION; }

GEOSSL_API const char* geossl_cpu_compiler() {
#if defined(__VERSION__)
  return __VERSION__;
#else
  return "unknown";
#endif
}

// The vector instructions that functions marked GEOSSL_SIMD use on this processor.
GEOSSL_API const char* geossl_cpu_simd() {
#if GEOSSL_HAS_SIMD_CLONES
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return "AVX-512 (x86-64-v4)";
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) return "AVX2 (x86-64-v3)";
  return "SSE2 (x86-64 baseline)";
#elif defined(__x86_64__)
  return "SSE2 (built without vector clones)";
#elif defined(__aarch64__)
  return "NEON (AArch64 baseline)";
#else
  return "compiler's baseline";
#endif
}

// Why libgeossl_cuda was not built along with this library, as the build found it; empty when it was, or nobody said.
GEOSSL_API const char* geossl_cpu_without_cuda() { return GEOSSL_WITHOUT_CUDA; }
