// Sums over tiles of weights: a warp a tile.
#pragma once

#include <cub/warp/warp_reduce.cuh>

#include "device/categorical.h"
#include "device/threads.h"

namespace fastis::cuda {

using device::kWarp;

struct Plus {
  template <class T>
  __host__ __device__ T operator()(const T& a, const T& b) const {
    return a + b;
  }
};

__device__ inline device::Threads threads() { return {blockIdx.x, threadIdx.x, gridDim.x}; }

// sums[tile] = sum of of_quad(quad) over its quads. The tiles of a warp follow from Threads as
// those of a thread do, with a warp for a thread.
template <class Sum, class OfQuad>
__device__ void sum_tiles(const device::TiledWeights& weights, Sum* sums, const OfQuad& of_quad) {
  using Reduce = cub::WarpReduce<Sum>;
  __shared__ typename Reduce::TempStorage storage[device::kThreads / kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const device::Threads all = threads();
  for (int64_t tile = all.number / kWarp; tile < weights.tiles(); tile += all.count / kWarp) {
    Sum mine{};
#pragma unroll
    for (int step = 0; step < device::kQuads / kWarp; ++step) {
      const int64_t quad = tile * device::kQuads + step * kWarp + lane;
      if (quad < weights.quads()) mine = mine + of_quad(quad);
    }
    const Sum sum = Reduce(storage[warp]).Reduce(mine, Plus());
    if (lane == 0) sums[tile] = sum;
    __syncwarp();
  }
}

}  // namespace fastis::cuda
