// What every .cu file includes: the C interface and the device guard, on top of gpu_compat.h (see there for the rules that
// let the same file be compiled by g++ and run on the CPU in tests).
#pragma once
#include "geossl_api.h"
#include "gpu_compat.h"

namespace geossl {

// Makes `device` current for the duration of a launcher and puts the previous one back. The runtime is linked statically,
// so its current device is not the one torch has set in its own copy.
//   geossl::DeviceGuard guard(device);
//   if (guard.error != cudaSuccess) return int(guard.error);
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    error = cudaGetDevice(&previous_);
    if (error == cudaSuccess && device != previous_) {
      error = cudaSetDevice(device);
      changed_ = error == cudaSuccess;
    }
  }
  ~DeviceGuard() {
    if (changed_) (void)cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  cudaError_t error = cudaSuccess;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

}  // namespace geossl
