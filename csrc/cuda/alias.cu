// Alias tables: construction and draws in bulk.
// Bytes moved an item by the construction, of a weight's s: the sums of tiles s, the parts 2.4 s
// (either side reads its tiles, a fifth of them for two parts) and 16 written; with the reduction
// and the prefix sums of categorical.cu that is 4.4 s + 16, for float32 34. A draw: a random sector
// of 32 and 12 written.
#include <cub/device/device_scan.cuh>

#include "cuda/grid.cuh"
#include "cuda/launch.h"
#include "cuda/tiles.cuh"
#include "device/alias_build.h"
#include "device/alias_draw.h"
#include "fastis.h"

namespace fastis::cuda {
namespace {

using device::AliasInverseCdf;
using device::AliasJob;
using device::kThreads;
using device::Place;
using device::PointsInMemory;
using device::RandomPoints;
using device::TiledWeights;
using device::TileSums;

__global__ void __launch_bounds__(kThreads)
    tile_sums_kernel(const TiledWeights weights, const Buckets buckets, TileSums* sums) {
  sum_tiles(weights, sums,
            [&](int64_t quad) { return sums_of(buckets, quad, weights.read(quad)); });
}

// Blocks that a multiprocessor is to hold at once. On the newest targets the registers that four
// would leave a thread do not suffice.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kPartsAtOnce = 3;
#else
constexpr int kPartsAtOnce = 4;
#endif

// A thread a part, and one for the end of the last.
__global__ void __launch_bounds__(kThreads)
    alias_places_kernel(const __grid_constant__ AliasJob job, Place* places) {
  threads().each(job.parts() + 1,
                 [&](int64_t part) { places[part] = place_after(job, part * device::kSteps); });
}

// A block a part.
__global__ void __launch_bounds__(kThreads, kPartsAtOnce)
    alias_parts_kernel(const __grid_constant__ AliasJob job, const Place* places) {
  __shared__ device::PartMemory memory;
  const device::CudaBlock block;
  device::build_part(block, memory, job, places[blockIdx.x], places[blockIdx.x + 1]);
}

template <class Points>
__global__ void __launch_bounds__(kThreads)
    alias_draw_kernel(const AliasInverseCdf table, const Points points, int64_t count,
                      const Batch batch) {
  device::alias_draw(table, points, threads(), count, batch);
}

int64_t bytes_of_places(int64_t parts) { return (parts + 1) * int64_t{sizeof(Place)}; }

}  // namespace

int64_t alias_build(const IntegerWeights& weights, Pointer<int64_t> before, Pointer<Bucket> table,
                    Pointer<void> memory, int64_t bytes, int64_t device, uint64_t stream) {
  const TiledWeights tiled(weights);
  TileSums* const sums = reinterpret_cast<TileSums*>(before.address);  // [0] is 0 already
  const AliasJob job(tiled, sums, table);
  const OnDevice on(device);
  if (on.error() != cudaSuccess) return on.error();
  cudaError_t error =
      launch<tile_sums_kernel>(device, stream, tiled.tiles() * kWarp, tiled, job.buckets, sums + 1);
  if (error != cudaSuccess) return error;
  const auto on_stream = reinterpret_cast<cudaStream_t>(stream);
  // The places of the parts, then what the scan needs.
  Place* const places = reinterpret_cast<Place*>(memory.address);
  size_t size = static_cast<size_t>(bytes - bytes_of_places(job.parts()));
  error = cub::DeviceScan::InclusiveScan(places + job.parts() + 1, size, sums + 1, sums + 1, Plus(),
                                         tiled.tiles(), on_stream);
  if (error != cudaSuccess) return cleared(error);
  error = launch<alias_places_kernel>(device, stream, job.parts() + 1, job, places);
  if (error != cudaSuccess) return error;
  const Place* from = places;
  void* arguments[] = {const_cast<AliasJob*>(&job), &from};
  return cleared(cudaLaunchKernel(reinterpret_cast<const void*>(alias_parts_kernel),
                                  dim3(static_cast<unsigned>(job.parts())), dim3(kThreads),
                                  arguments, 0, on_stream));
}

int64_t alias_build_bytes(int64_t n, int64_t device) {
  const OnDevice on(device);
  size_t bytes = 0;
  TileSums* const none = nullptr;
  cudaError_t error = on.error();
  if (error == cudaSuccess) {
    error = cub::DeviceScan::InclusiveScan(nullptr, bytes, none, none, Plus(), device::tiles_of(n));
  }
  if (error != cudaSuccess) return -int64_t{cleared(error)};
  return bytes_of_places(device::parts_of(n)) + static_cast<int64_t>(bytes);
}

int64_t alias_draw(const AliasTable& table, const Draws& draws, const Batch& batch, int64_t device,
                   uint64_t stream) {
  return launch<alias_draw_kernel<RandomPoints>>(
      device, stream, draws.count, AliasInverseCdf(table), RandomPoints{draws, table.total},
      draws.count, batch);
}

int64_t alias_inverse_cdf(const AliasTable& table, Pointer<const uint64_t> points, int64_t count,
                          const Batch& batch, int64_t device, uint64_t stream) {
  return launch<alias_draw_kernel<PointsInMemory>>(device, stream, count, AliasInverseCdf(table),
                                                   PointsInMemory{points}, count, batch);
}

}  // namespace fastis::cuda
