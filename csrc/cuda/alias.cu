// Alias tables: construction and draws in bulk.
// Bytes moved an item by the construction, of a weight's s: the sums of tiles s, the parts 2.4 s
// (either side reads its tiles, a fifth of them for two parts) and 16 written; with the survey and
// the running sums of given_weights.cu that is 4.4 s + 16, for float32 34. A draw: a random sector
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

using device::AliasJob;
using device::AliasTable;
using device::Format;
using device::GivenPoints;
using device::GivenWeights;
using device::kThreads;
using device::Place;
using device::RandomPoints;
using device::TileSums;

__global__ void __launch_bounds__(kThreads)
    tile_sums_kernel(const GivenWeights weights, const Buckets buckets, TileSums* sums) {
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
    alias_draw_kernel(const AliasTable table, const Points points, int64_t count, int64_t* indices,
                      float* coefficients) {
  device::draw_from(table, points, threads(), count, indices, coefficients);
}

__global__ void __launch_bounds__(kThreads)
    draw_points_kernel(const RandomPoints points, int64_t count, uint64_t* out) {
  threads().each(count, [&](int64_t b) { out[b] = points(b); });
}

int64_t bytes_of_places(int64_t parts) { return (parts + 1) * int64_t{sizeof(Place)}; }

}  // namespace

int64_t alias_build(int64_t format, Pointer<const void> values, int64_t n, int64_t shift,
                    uint64_t total, Pointer<int64_t> before, Pointer<uint64_t> table,
                    Pointer<void> memory, int64_t bytes, int64_t device, uint64_t stream) {
  const GivenWeights weights{static_cast<Format>(format), values, n, static_cast<int>(shift)};
  TileSums* const sums = reinterpret_cast<TileSums*>(before.address);  // [0] is 0 already
  const AliasJob job(weights, total, sums, reinterpret_cast<Bucket*>(table.address));
  const OnDevice on(device);
  if (on.error() != cudaSuccess) return on.error();
  cudaError_t error = launch<tile_sums_kernel>(device, stream, weights.tiles() * kWarp, weights,
                                               job.buckets, sums + 1);
  if (error != cudaSuccess) return error;
  const auto on_stream = reinterpret_cast<cudaStream_t>(stream);
  // The places of the parts, then what the scan needs.
  Place* const places = reinterpret_cast<Place*>(memory.address);
  size_t size = static_cast<size_t>(bytes - bytes_of_places(job.parts()));
  error = cub::DeviceScan::InclusiveScan(places + job.parts() + 1, size, sums + 1, sums + 1, Plus(),
                                         weights.tiles(), on_stream);
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
  const GivenWeights weights{{}, {}, n, 0};
  cudaError_t error = on.error();
  if (error == cudaSuccess) {
    error = cub::DeviceScan::InclusiveScan(nullptr, bytes, none, none, Plus(), weights.tiles());
  }
  if (error != cudaSuccess) return -int64_t{cleared(error)};
  return bytes_of_places(device::parts_of(weights)) + static_cast<int64_t>(bytes);
}

int64_t alias_draw(Pointer<const uint64_t> table, int64_t n, uint64_t total, uint64_t seed,
                   int64_t first, int64_t count, Pointer<int64_t> indices,
                   Pointer<float> coefficients, int64_t device, uint64_t stream) {
  const RandomPoints points{seed, static_cast<uint64_t>(first), total};
  return launch<alias_draw_kernel<RandomPoints>>(device, stream, count, AliasTable(table, n, total),
                                                 points, count, indices.address,
                                                 coefficients.address);
}

int64_t alias_resolve(Pointer<const uint64_t> table, int64_t n, uint64_t total,
                      Pointer<const uint64_t> points, int64_t count, Pointer<int64_t> indices,
                      Pointer<float> coefficients, int64_t device, uint64_t stream) {
  return launch<alias_draw_kernel<GivenPoints>>(device, stream, count, AliasTable(table, n, total),
                                                GivenPoints{points}, count, indices.address,
                                                coefficients.address);
}

int64_t draw_points(uint64_t total, uint64_t seed, int64_t first, int64_t count,
                    Pointer<uint64_t> points, int64_t device, uint64_t stream) {
  return launch<draw_points_kernel>(device, stream, count,
                                    RandomPoints{seed, static_cast<uint64_t>(first), total}, count,
                                    points.address);
}

}  // namespace fastis::cuda
