// build_part() of csrc/device/alias_build.h on threads: equal to what HostBlock builds. Arguments:
// blocks, and the number of the barrier to leave out (-1: none).
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>

#include "cuda/grid.cuh"
#include "device/alias_build.h"

using namespace fastis;
using namespace fastis::device;

namespace {

int64_t weight_of(int shape, int64_t i, int64_t n, double normal) {
  if (shape == 0) return static_cast<int64_t>(1e6 * std::exp(2 * normal));
  if (shape == 1) return i % 3001 == 0 ? 100 : 1;
  if (shape == 2) return i % 2048 < 1024 ? 1 : 3;
  return 2 + (i == n / 2) - (i == n / 3);
}

bool equal(int shape, unsigned blocks) {
  const int64_t n = 9007;
  std::mt19937_64 random(static_cast<unsigned>(shape));
  std::normal_distribution<double> normal;
  std::vector<int64_t> values(n + kQuad);
  uint64_t total = 0;
  for (int64_t i = 0; i < n; ++i) {
    values[i] = weight_of(shape, i, n, normal(random));
    total += static_cast<uint64_t>(values[i]);
  }
  const TiledWeights weights(
      IntegerWeights{Format::int64, {values.data()}, n, 0, total, {nullptr}});
  std::vector<TileSums> sums(static_cast<size_t>(weights.tiles() + 1), TileSums{0, 0, 0});
  std::vector<Bucket> ours(n), theirs(n);
  const AliasJob job(weights, sums.data(), ours.data());
  for (int64_t tile = 0; tile < weights.tiles(); ++tile) {
    sums[tile + 1] = sums[tile];
    for (int64_t quad = tile * kQuads; quad < (tile + 1) * kQuads; ++quad) {
      if (quad >= weights.quads()) break;
      sums[tile + 1] = sums[tile + 1] + sums_of(job.buckets, quad, weights.read(quad));
    }
  }
  static PartMemory memory[kMostBlocks];
  const auto place = [&](int64_t part) { return place_after(job, part * kSteps); };
  for (int64_t part = 0; part < job.parts(); part += blocks) {
    launch(blocks, kThreads, [&] {
      const CudaBlock block;
      const int64_t mine = part + blockIdx.x;
      if (mine < job.parts()) {
        build_part(block, memory[blockIdx.x], job, place(mine), place(mine + 1));
      }
    });
  }
  const AliasJob expected(weights, sums.data(), theirs.data());
  const HostBlock host(7919);
  const auto host_memory = std::make_unique<PartMemory>();
  for (int64_t part = 0; part < job.parts(); ++part) {
    build_part(host, *host_memory, expected, place(part), place(part + 1));
  }
  return std::memcmp(ours.data(), theirs.data(), n * sizeof(Bucket)) == 0;
}

}  // namespace

int main(int argc, char** argv) {
  const unsigned blocks = argc > 1 ? static_cast<unsigned>(std::atoi(argv[1])) : 2;
  left_out = argc > 2 ? std::atoi(argv[2]) : -1;
  for (int shape = 0; shape < 4; ++shape) {
    if (equal(shape, blocks)) continue;
    std::printf("DIFFERS: shape %d\n", shape);
    return 1;
  }
  return 0;
}
