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

// A number of the device's that costs more than a launch to ask for, so it is asked for once.
// Several threads may ask at once and get the same answer.
class Remembered {
 public:
  template <class Ask>
  cudaError_t operator()(int device, int64_t& value, const Ask& ask) {
    const bool remembered = device >= 0 && device < kDevices;
    value = remembered ? known_[device].load(std::memory_order_relaxed) : 0;
    if (value > 0) return cudaSuccess;
    const cudaError_t error = ask(value);
    if (error == cudaSuccess && remembered) {
      known_[device].store(value, std::memory_order_relaxed);
    }
    return cleared(error);
  }

 private:
  static constexpr int kDevices = 64;
  std::atomic<int64_t> known_[kDevices] = {};  // 0: not asked yet
};

inline cudaError_t multiprocessors(int device, int64_t& number) {
  static Remembered remembered;
  return remembered(device, number, [&](int64_t& value) {
    int asked = 0;
    const cudaError_t error =
        cudaDeviceGetAttribute(&asked, cudaDevAttrMultiProcessorCount, device);
    value = asked;
    return error;
  });
}

// Blocks of `kernel` that the current device, number `device`, holds at once.
template <auto kernel>
cudaError_t most_blocks(int device, int64_t& most) {
  static Remembered remembered;
  return remembered(device, most, [&](int64_t& value) {
    int of_one = 0;
    cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(
        &of_one, reinterpret_cast<const void*>(kernel), device::kThreads, 0);
    if (error != cudaSuccess) return error;
    error = multiprocessors(device, value);
    value *= of_one;
    return error;
  });
}

template <auto kernel, class... A>
constexpr bool takes() {
  return std::is_same_v<decltype(kernel), void (*const)(A...)> ||
         std::is_same_v<decltype(kernel), void (*)(A...)>;
}

// Launches as many blocks as `items` ask for and the device holds at once.
template <auto kernel, class... A>
cudaError_t launch(int64_t device, uint64_t stream, int64_t items, A... a) {
  static_assert(takes<kernel, A...>());
  const OnDevice on(device);
  if (on.error() != cudaSuccess) return on.error();
  int64_t most = 0;
  const cudaError_t error = most_blocks<kernel>(on.device(), most);
  if (error != cudaSuccess) return error;
  void* arguments[] = {&a...};
  return cleared(cudaLaunchKernel(reinterpret_cast<const void*>(kernel),
                                  dim3(device::blocks_for(items, most)), dim3(device::kThreads),
                                  arguments, 0, reinterpret_cast<cudaStream_t>(stream)));
}

// ... of a kernel whose blocks wait for each other: at most one for each multiprocessor, since
// instrumented code (compute-sanitizer) and shared devices (MPS) hold fewer than the driver
// promises.
template <auto kernel, class... A>
cudaError_t launch_cooperative(int64_t device, uint64_t stream, int64_t items, A... a) {
  static_assert(takes<kernel, A...>());
  const OnDevice on(device);
  if (on.error() != cudaSuccess) return on.error();
  int64_t most = 0;
  const cudaError_t error = multiprocessors(on.device(), most);
  if (error != cudaSuccess) return error;
  void* arguments[] = {&a...};
  const unsigned blocks = device::cooperating_blocks(items, most);
  using Start = cudaError_t(const void*, dim3, dim3, void**, size_t, cudaStream_t);
  Start* start = cudaLaunchCooperativeKernel;
  if (blocks == 1) start = cudaLaunchKernel;
  return cleared(start(reinterpret_cast<const void*>(kernel), dim3(blocks), dim3(device::kThreads),
                       arguments, 0, reinterpret_cast<cudaStream_t>(stream)));
}

}  // namespace fastis::cuda
