// Whether a device can run the kernels: whether its driver is new enough, and whether this build
// holds code for it.
#include <string>

#include "cuda/launch.h"
#include "fastis.h"

namespace fastis::cuda {
namespace {

__global__ void probe_kernel() {}  // for the same targets as every other kernel

std::string version(int number) {
  return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
}

}  // namespace

std::string missing(int64_t device) {
  int driver = 0;
  cudaDriverGetVersion(&driver);
  if (driver == 0) return "no CUDA driver is installed";
  if (driver / 1000 < CUDART_VERSION / 1000) {
    return "the CUDA driver serves CUDA " + version(driver) + ", and fastis._C was built with " +
           version(CUDART_VERSION) + ": install a newer driver, or build with an older nvcc";
  }
  const OnDevice on(device);
  cudaFuncAttributes attributes;
  const cudaError_t error =
      on.error() != cudaSuccess
          ? on.error()
          : cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(probe_kernel));
  if (error == cudaSuccess) return "";
  return "cuda:" + std::to_string(device) + " can't run fastis._C (" +
         cudaGetErrorString(cleared(error)) + ")";
}

}  // namespace fastis::cuda
