// The launches of the table: update, draw, both in one, clear, and rescale. A minibatch of up to
// 256 is one block, launched like any kernel; more blocks are launched cooperatively, since a
// launch's phases wait for each other. Bytes touched a sample: an update 64 (state, claim) and 8 a
// level, a draw 128 a level (192 while samples are unseen) and 64.
#include "cuda/grid.cuh"
#include "cuda/launch.h"
#include "device/table_clear.h"
#include "device/table_draw.h"
#include "fastis.h"

namespace fastis::cuda {
namespace {

using device::CudaGrid;
using device::kThreads;

__global__ void __launch_bounds__(kThreads, 1)
    update_kernel(const __grid_constant__ DeviceTable table, const Observation observation) {
  CudaGrid grid(table.arrivals);
  device::update(grid, table, observation);
}

__global__ void __launch_bounds__(kThreads, 1)
    draw_kernel(const __grid_constant__ DeviceTable table, const Batch batch) {
  CudaGrid grid(table.arrivals);
  device::draw(grid, table, batch);
}

__global__ void __launch_bounds__(kThreads, 1)
    update_and_draw_kernel(const __grid_constant__ DeviceTable table, const Observation observation,
                           const Batch next_batch) {
  CudaGrid grid(table.arrivals);
  device::update_and_draw(grid, table, observation, next_batch);
}

__global__ void __launch_bounds__(kThreads, 1)
    clear_kernel(const __grid_constant__ DeviceTable table, const int64_t* indices, int64_t n,
                 int32_t last) {
  CudaGrid grid(table.arrivals);
  device::clear(grid, table, indices, n, last);
}

__global__ void __launch_bounds__(kThreads, 1)
    rescale_kernel(const __grid_constant__ DeviceTable table) {
  CudaGrid grid(table.arrivals);
  device::rescale(grid, table);
}

// What the blocks share: the minibatch, and the subtrees around the cap where many items can be.
int64_t items_of(const DeviceTable& t, int64_t minibatch) {
  constexpr int64_t kSubtree = 16;
  const int64_t capped = t.flatten == Flatten::cap ? static_cast<int64_t>(t.max_capped) : 0;
  return minibatch > capped / kSubtree ? minibatch : capped / kSubtree;
}

}  // namespace

const char* error_string(int64_t error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

int64_t update(Pointer<const DeviceTable> table, const Observation& observation, int64_t device,
               uint64_t stream) {
  return launch_cooperative<update_kernel>(device, stream, observation.n, *table.address,
                                           observation);
}

int64_t draw(Pointer<const DeviceTable> table, const Batch& batch, int64_t device,
             uint64_t stream) {
  return launch_cooperative<draw_kernel>(
      device, stream, items_of(*table.address, table->batch_size), *table.address, batch);
}

int64_t update_and_draw(Pointer<const DeviceTable> table, const Observation& observation,
                        const Batch& next_batch, int64_t device, uint64_t stream) {
  const int64_t items = observation.n > table->batch_size ? observation.n : table->batch_size;
  return launch_cooperative<update_and_draw_kernel>(device, stream, items_of(*table.address, items),
                                                    *table.address, observation, next_batch);
}

int64_t clear(Pointer<const DeviceTable> table, Pointer<const int64_t> indices, int64_t n,
              int32_t last, int64_t device, uint64_t stream) {
  return launch_cooperative<clear_kernel>(device, stream, n, *table.address, indices.address, n,
                                          last);
}

int64_t load_sampler(int64_t device) {
  const OnDevice on(device);
  if (on.error() != cudaSuccess) return on.error();
  int64_t most = 0;
  cudaError_t error = most_blocks<update_kernel>(on.device(), most);
  if (error == cudaSuccess) error = most_blocks<draw_kernel>(on.device(), most);
  if (error == cudaSuccess) error = most_blocks<update_and_draw_kernel>(on.device(), most);
  if (error == cudaSuccess) error = most_blocks<clear_kernel>(on.device(), most);
  if (error == cudaSuccess) error = most_blocks<rescale_kernel>(on.device(), most);
  return error;
}

int64_t rescale(Pointer<const DeviceTable> table, int64_t device, uint64_t stream) {
  return launch_cooperative<rescale_kernel>(device, stream, table->num_samples, *table.address);
}

}  // namespace fastis::cuda
