// The sampler's launches: update, draw, and both in one. Cooperative, since a launch's phases wait
// for each other; a minibatch of up to 256 is one block, which waits without the rest of the
// device. Bytes touched a sample: an update 64 (record, claim) and 8 a level, a draw 128 a level
// and 64.
#include "cuda/grid.cuh"
#include "device/draw.h"
#include "device/update.h"
#include "fastis.h"

namespace fastis::cuda {
namespace {

using device::CudaGrid;
using device::kThreads;
using device::Minibatch;

__global__ void __launch_bounds__(kThreads, 1)
    update_kernel(const __grid_constant__ DeviceTable table, const Minibatch minibatch) {
  __shared__ uint64_t shared[device::CudaBlock::kShared];
  CudaGrid grid(shared, table.arrivals);
  device::update(grid, table, minibatch);
}

__global__ void __launch_bounds__(kThreads, 1)
    draw_kernel(const __grid_constant__ DeviceTable table, int64_t* indices, float* weights) {
  __shared__ uint64_t shared[device::CudaBlock::kShared];
  CudaGrid grid(shared, table.arrivals);
  device::draw(grid, table, indices, weights);
}

__global__ void __launch_bounds__(kThreads, 1)
    update_and_draw_kernel(const __grid_constant__ DeviceTable table, const Minibatch minibatch,
                           int64_t* indices, float* weights) {
  __shared__ uint64_t shared[device::CudaBlock::kShared];
  CudaGrid grid(shared, table.arrivals);
  device::update(grid, table, minibatch);
  device::draw(grid, table, indices, weights);
}

// As many blocks as the items ask for and the device can hold at once.
template <class... A>
cudaError_t launch(int device, uint64_t stream, int64_t items, void (*kernel)(A...), A... a) {
  int before = 0, per_multiprocessor = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess && before != device) error = cudaSetDevice(device);
  if (error != cudaSuccess) return error;
  error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, kernel, kThreads, 0);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error == cudaSuccess) {
    const int64_t most = int64_t{per_multiprocessor} * multiprocessors;
    const int64_t wanted = (items + kThreads - 1) / kThreads;
    const int64_t blocks = wanted < 1 ? 1 : wanted < most ? wanted : most;
    void* arguments[] = {&a...};
    error = cudaLaunchCooperativeKernel(reinterpret_cast<void*>(kernel),
                                        dim3(static_cast<unsigned>(blocks)), dim3(kThreads),
                                        arguments, 0, reinterpret_cast<cudaStream_t>(stream));
  }
  if (before != device) cudaSetDevice(before);
  return error;
}

}  // namespace

const char* error_string(int64_t error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

int64_t update(Pointer<const DeviceTable> table, Pointer<const int64_t> indices,
               Pointer<const float> observed, Pointer<const float> weights,
               Pointer<const float> score, int64_t n, Pointer<const float> mean_grad,
               int64_t num_classes, int64_t device, uint64_t stream) {
  const Minibatch minibatch{indices, observed, weights, score, n, mean_grad, num_classes};
  return launch<DeviceTable, Minibatch>(static_cast<int>(device), stream, n, &update_kernel, *table,
                                        minibatch);
}

int64_t draw(Pointer<const DeviceTable> table, Pointer<int64_t> indices, Pointer<float> weights,
             int64_t device, uint64_t stream) {
  return launch<DeviceTable, int64_t*, float*>(static_cast<int>(device), stream, table->batch_size,
                                               &draw_kernel, *table, indices.address,
                                               weights.address);
}

int64_t update_and_draw(Pointer<const DeviceTable> table, Pointer<const int64_t> indices,
                        Pointer<const float> observed, Pointer<const float> weights,
                        Pointer<const float> score, int64_t n, Pointer<const float> mean_grad,
                        int64_t num_classes, Pointer<int64_t> next_indices,
                        Pointer<float> next_weights, int64_t device, uint64_t stream) {
  const Minibatch minibatch{indices, observed, weights, score, n, mean_grad, num_classes};
  const int64_t items = n > table->batch_size ? n : table->batch_size;
  return launch<DeviceTable, Minibatch, int64_t*, float*>(
      static_cast<int>(device), stream, items, &update_and_draw_kernel, *table, minibatch,
      next_indices.address, next_weights.address);
}

}  // namespace fastis::cuda
