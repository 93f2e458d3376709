// Fixed weights: their largest value and sum, the prefix sums of their integers over tiles of 256,
// the integers themselves, and draws by search in the prefix sums. Bytes moved an item, of a
// weight's s: reduction s, prefix sums s (and 8 / 256 three times), integers s + 8. A draw touches
// a sector for each of log2(N / 256) steps, and on average half a tile.
#include <cub/block/block_reduce.cuh>
#include <cub/device/device_scan.cuh>

#include "cuda/launch.h"
#include "cuda/tiles.cuh"
#include "fastis.h"

namespace fastis::cuda {
namespace {

using device::kThreads;
using device::Reduction;
using device::TiledWeights;

__global__ void __launch_bounds__(kThreads)
    reduce_kernel(const TiledWeights weights, Reduction* reduction) {
  using Reduce = cub::BlockReduce<Reduction, kThreads>;
  __shared__ typename Reduce::TempStorage storage;
  Reduction mine;
  threads().each(weights.quads(),
                 [&](int64_t quad) { mine = mine + device::reduce(weights, quad); });
  const Reduction found = Reduce(storage).Reduce(mine, Plus());
  if (threadIdx.x != 0) return;
  // Doubles that are not negative are ordered as their bits are.
  atomicMax(reinterpret_cast<unsigned long long*>(&reduction->most),
            static_cast<unsigned long long>(__double_as_longlong(found.most)));
  atomicAdd(&reduction->sum, found.sum);
  device::atomic_add(&reduction->unusable, found.unusable);
}

__global__ void __launch_bounds__(kThreads) sums_kernel(const TiledWeights weights) {
  sum_tiles(weights, weights.prefix.address,
            [&](int64_t quad) { return device::sum_of(weights.read(quad)); });
}

__global__ void __launch_bounds__(kThreads)
    integer_weights_kernel(const TiledWeights weights, uint64_t* out) {
  threads().each(weights.quads(), [&](int64_t quad) {
    const device::Quad items = weights.read(quad);
#pragma unroll
    for (int j = 0; j < device::kQuad; ++j) {
      if (j < items.size) out[quad * device::kQuad + j] = items.weight[j];
    }
  });
}

__global__ void __launch_bounds__(kThreads)
    categorical_draw_kernel(const TiledWeights weights, const Draws draws, const Batch batch) {
  threads().each(draws.count,
                 [&](int64_t b) { device::categorical_draw(weights, draws, b, batch); });
}

__global__ void __launch_bounds__(kThreads)
    random_below_kernel(uint64_t total, const Draws draws, uint64_t* out) {
  threads().each(draws.count, [&](int64_t b) { out[b] = device::random_below(draws, b, total); });
}

}  // namespace

int64_t reduce(const IntegerWeights& weights, Pointer<int64_t> found, int64_t device,
               uint64_t stream) {
  const TiledWeights tiled(weights);
  return launch<reduce_kernel>(device, stream, tiled.quads(), tiled,
                               reinterpret_cast<Reduction*>(found.address));
}

int64_t prefix_sums(const IntegerWeights& weights, Pointer<void> memory, int64_t bytes,
                    int64_t device, uint64_t stream) {
  const TiledWeights tiled(weights);
  const OnDevice on(device);
  if (on.error() != cudaSuccess) return on.error();
  const cudaError_t error = launch<sums_kernel>(device, stream, tiled.tiles() * kWarp, tiled);
  if (error != cudaSuccess) return error;
  size_t size = static_cast<size_t>(bytes);
  uint64_t* const prefix = weights.prefix;
  return cleared(cub::DeviceScan::InclusiveSum(memory.address, size, prefix, prefix, tiled.tiles(),
                                               reinterpret_cast<cudaStream_t>(stream)));
}

int64_t prefix_sums_bytes(int64_t n, int64_t device) {
  const OnDevice on(device);
  size_t bytes = 0;
  uint64_t* const none = nullptr;
  cudaError_t error = on.error();
  if (error == cudaSuccess) {
    error = cub::DeviceScan::InclusiveSum(nullptr, bytes, none, none, device::tiles_of(n));
  }
  return error == cudaSuccess ? static_cast<int64_t>(bytes) : -int64_t{cleared(error)};
}

int64_t integer_weights(const IntegerWeights& weights, Pointer<uint64_t> out, int64_t device,
                        uint64_t stream) {
  const TiledWeights tiled(weights);
  return launch<integer_weights_kernel>(device, stream, tiled.quads(), tiled, out.address);
}

int64_t categorical_draw(const IntegerWeights& weights, const Draws& draws, const Batch& batch,
                         int64_t device, uint64_t stream) {
  return launch<categorical_draw_kernel>(device, stream, draws.count, TiledWeights(weights), draws,
                                         batch);
}

int64_t random_below(uint64_t total, const Draws& draws, Pointer<uint64_t> out, int64_t device,
                     uint64_t stream) {
  return launch<random_below_kernel>(device, stream, draws.count, total, draws, out.address);
}

}  // namespace fastis::cuda
