// Launching: on which device and stream, and how many blocks of a kernel that device holds at once.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>
#include <type_traits>

#include "device/threads.h"

namespace fastis::cuda {

// `error`, no longer the last one that the runtime remembers: libraries (CUB) that ask for the last
// error after a launch of theirs would report ours as their own.
inline cudaError_t cleared(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

// Makes `device` current for as long as this lives.
class OnDevice {
 public:
  explicit OnDevice(int64_t device) : device_(static_cast<int>(device)) {
    error_ = cleared(cudaGetDevice(&before_));
    if (error_ == cudaSuccess && before_ != device_) error_ = cleared(cudaSetDevice(device_));
  }
  ~OnDevice() {
    if (before_ != device_ && before_ >= 0) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  cudaError_t error() const { return error_; }
  int device() const { return device_; }

 private:
  int before_ = -1, device_;
  cudaError_t error_;
};

// Blocks of `kernel` that the current device, number `device`, holds at once. Asked of the driver
// once a kernel and device: asking costs more than a launch. Several threads may ask at once and
// get the same answer.
template <auto kernel>
cudaError_t most_blocks(int device, int64_t& most) {
  constexpr int kRemembered = 64;
  static std::atomic<int64_t> known[kRemembered];  // 0: not asked yet
  const bool remembered = device >= 0 && device < kRemembered;
  most = remembered ? known[device].load(std::memory_order_relaxed) : 0;
  if (most > 0) return cudaSuccess;
  int of_one = 0, multiprocessors = 0;
  cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(
      &of_one, reinterpret_cast<const void*>(kernel), device::kThreads, 0);
  if (error != cudaSuccess) return cleared(error);
  error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return cleared(error);
  most = int64_t{of_one} * multiprocessors;
  if (remembered) known[device].store(most, std::memory_order_relaxed);
  return cudaSuccess;
}

// Launches as many blocks as `items` ask for and the device holds at once; `start` is
// cudaLaunchKernel, or cudaLaunchCooperativeKernel for kernels whose blocks wait for each other.
template <auto kernel, class Start, class... A>
cudaError_t launch_by(const Start& start, int64_t device, uint64_t stream, int64_t items, A... a) {
  static_assert(std::is_same_v<decltype(kernel), void (*const)(A...)> ||
                std::is_same_v<decltype(kernel), void (*)(A...)>);
  const OnDevice on(device);
  if (on.error() != cudaSuccess) return on.error();
  int64_t most = 0;
  const cudaError_t error = most_blocks<kernel>(on.device(), most);
  if (error != cudaSuccess) return error;
  void* arguments[] = {&a...};
  return cleared(start(reinterpret_cast<const void*>(kernel), dim3(device::blocks_for(items, most)),
                       dim3(device::kThreads), arguments, size_t{0},
                       reinterpret_cast<cudaStream_t>(stream)));
}

template <auto kernel, class... A>
cudaError_t launch(int64_t device, uint64_t stream, int64_t items, A... a) {
  const auto start = [](const void* function, dim3 grid, dim3 block, void** arguments, size_t bytes,
                        cudaStream_t on) {
    return cudaLaunchKernel(function, grid, block, arguments, bytes, on);
  };
  return launch_by<kernel>(start, device, stream, items, a...);
}

template <auto kernel, class... A>
cudaError_t launch_cooperative(int64_t device, uint64_t stream, int64_t items, A... a) {
  const auto start = [](const void* function, dim3 grid, dim3 block, void** arguments, size_t bytes,
                        cudaStream_t on) {
    return cudaLaunchCooperativeKernel(function, grid, block, arguments, bytes, on);
  };
  const cudaError_t error = launch_by<kernel>(start, device, stream, items, a...);
  if (error != cudaErrorCooperativeLaunchTooLarge) return error;
  // Instrumented code (compute-sanitizer) and shared devices (MPS) hold fewer blocks than the
  // driver promised: once more with one for each multiprocessor.
  int multiprocessors = 0;
  const cudaError_t asked = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount,
                                                   static_cast<int>(device));
  if (asked != cudaSuccess) return cleared(asked);
  const int64_t fewer = int64_t{multiprocessors} * device::kThreads;
  return launch_by<kernel>(start, device, stream, fewer < items ? fewer : items, a...);
}

}  // namespace fastis::cuda
