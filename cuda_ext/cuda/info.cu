// What libgeossl_cuda says about itself; `geossl doctor` and geossl.native_info() print it. None of this needs a GPU.
#include "geossl_cuda.h"

#ifndef GEOSSL_CUDA_ARCHS
#define GEOSSL_CUDA_ARCHS "host"
#endif

GEOSSL_API int geossl_abi_version() { return GEOSSL_ABI_VERSION; }

// CMake's list of architectures: "80-real 90-real 100-real 120". A number without "-real" includes PTX for newer GPUs.
GEOSSL_API const char* geossl_cuda_archs() { return GEOSSL_CUDA_ARCHS; }

// Version of the CUDA runtime inside the library as 1000 * major + 10 * minor; 0 in the build that runs kernels on the CPU.
GEOSSL_API int geossl_cuda_runtime_version() {
#ifdef CUDART_VERSION
  return CUDART_VERSION;
#else
  return 0;
#endif
}

// The newest CUDA version that the machine's driver supports, in the same form; 0 without a driver.
GEOSSL_API int geossl_cuda_driver_version() {
#ifdef CUDART_VERSION
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
#else
  return 0;
#endif
}

GEOSSL_API const char* geossl_cuda_error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
