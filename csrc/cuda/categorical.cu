// Weights that a caller gives: their survey, the running sums of their integers by tiles of 256,
// the integers themselves, and draws by search in the sums. Bytes moved an item, of a weight's s:
// survey s, sums s (and 8 / 256 three times), integers s + 8. A searched draw touches a sector for
// each of log2(N / 256) steps, and on average half a tile.
#include <cub/block/block_reduce.cuh>
#include <cub/device/device_scan.cuh>

#include "cuda/launch.h"
#include "cuda/tiles.cuh"
#include "fastis.h"

namespace fastis::cuda {
namespace {

using device::Format;
using device::GivenWeights;
using device::kThreads;
using device::Survey;

__global__ void __launch_bounds__(kThreads)
    survey_kernel(const GivenWeights weights, Survey* survey) {
  using Reduce = cub::BlockReduce<Survey, kThreads>;
  __shared__ typename Reduce::TempStorage storage;
  Survey mine;
  threads().each(weights.quads(),
                 [&](int64_t quad) { mine = mine + device::survey(weights, quad); });
  const Survey found = Reduce(storage).Reduce(mine, Plus());
  if (threadIdx.x != 0) return;
  // Doubles that are not negative are ordered as their bits are.
  atomicMax(reinterpret_cast<unsigned long long*>(&survey->most),
            static_cast<unsigned long long>(__double_as_longlong(found.most)));
  atomicAdd(&survey->sum, found.sum);
  device::atomic_add(&survey->unusable, found.unusable);
}

__global__ void __launch_bounds__(kThreads)
    sums_kernel(const GivenWeights weights, uint64_t* sums) {
  sum_tiles(weights, sums, [&](int64_t quad) { return device::sum_of(weights.read(quad)); });
}

__global__ void __launch_bounds__(kThreads)
    integers_kernel(const GivenWeights weights, uint64_t* out) {
  threads().each(weights.quads(), [&](int64_t quad) {
    const device::Quad items = weights.read(quad);
#pragma unroll
    for (int j = 0; j < device::kQuad; ++j) {
      if (j < items.size) out[quad * device::kQuad + j] = items.weight[j];
    }
  });
}

__global__ void __launch_bounds__(kThreads)
    search_kernel(const GivenWeights weights, const uint64_t* ends, uint64_t total, uint64_t seed,
                  uint64_t first, int64_t count, int64_t* indices, float* coefficients) {
  threads().each(count, [&](int64_t b) {
    device::search(weights, ends, total, seed, first, b, indices, coefficients);
  });
}

}  // namespace

int64_t survey(int64_t format, Pointer<const void> values, int64_t n, Pointer<int64_t> found,
               int64_t device, uint64_t stream) {
  const GivenWeights weights{static_cast<Format>(format), values, n, 0};
  return launch<survey_kernel>(device, stream, weights.quads(), weights,
                               reinterpret_cast<Survey*>(found.address));
}

int64_t running_sums(int64_t format, Pointer<const void> values, int64_t n, int64_t shift,
                     Pointer<uint64_t> ends, Pointer<void> memory, int64_t bytes, int64_t device,
                     uint64_t stream) {
  const GivenWeights weights{static_cast<Format>(format), values, n, static_cast<int>(shift)};
  const OnDevice on(device);
  if (on.error() != cudaSuccess) return on.error();
  const cudaError_t error =
      launch<sums_kernel>(device, stream, weights.tiles() * kWarp, weights, ends.address);
  if (error != cudaSuccess) return error;
  size_t size = static_cast<size_t>(bytes);
  return cleared(cub::DeviceScan::InclusiveSum(memory.address, size, ends.address, ends.address,
                                               weights.tiles(),
                                               reinterpret_cast<cudaStream_t>(stream)));
}

int64_t running_sums_bytes(int64_t n, int64_t device) {
  const OnDevice on(device);
  size_t bytes = 0;
  uint64_t* const none = nullptr;
  cudaError_t error = on.error();
  if (error == cudaSuccess) {
    error = cub::DeviceScan::InclusiveSum(nullptr, bytes, none, none,
                                          GivenWeights{{}, {}, n, 0}.tiles());
  }
  return error == cudaSuccess ? static_cast<int64_t>(bytes) : -int64_t{cleared(error)};
}

int64_t integers(int64_t format, Pointer<const void> values, int64_t n, int64_t shift,
                 Pointer<uint64_t> out, int64_t device, uint64_t stream) {
  const GivenWeights weights{static_cast<Format>(format), values, n, static_cast<int>(shift)};
  return launch<integers_kernel>(device, stream, weights.quads(), weights, out.address);
}

int64_t search(int64_t format, Pointer<const void> values, int64_t n, int64_t shift,
               Pointer<const uint64_t> ends, uint64_t total, uint64_t seed, int64_t first,
               int64_t count, Pointer<int64_t> indices, Pointer<float> coefficients, int64_t device,
               uint64_t stream) {
  const GivenWeights weights{static_cast<Format>(format), values, n, static_cast<int>(shift)};
  return launch<search_kernel>(device, stream, count, weights, ends.address, total, seed,
                               static_cast<uint64_t>(first), count, indices.address,
                               coefficients.address);
}

}  // namespace fastis::cuda
