// csrc/cuda/{categorical,alias}.cu on the host: the same shares of threads and blocks, one after
// the other, in an order that `stride` permutes.
#pragma once

#include <memory>

#include "device/alias_build.h"
#include "device/alias_draw.h"
#include "device/threads.h"
#include "fastis.h"

namespace fastis::emulated {

using device::HostBlock;
using device::Threads;
using device::TiledWeights;
using device::TileSums;

constexpr unsigned kBlocks = 3;  // few, so that threads go round several times

// f(threads) for every thread of a launch.
template <class F>
inline void each_thread(uint64_t stride, const F& f) {
  HostBlock(stride).each(int64_t{kBlocks} * device::kThreads, [&](int64_t k) {
    f(Threads(static_cast<unsigned>(k / device::kThreads),
              static_cast<unsigned>(k % device::kThreads), kBlocks));
  });
}

template <class Sum, class OfQuad>
inline void sum_tiles(const TiledWeights& weights, uint64_t stride, Sum* sums,
                      const OfQuad& of_quad) {
  HostBlock(stride).each(weights.tiles(), [&](int64_t tile) {
    Sum sum{};
    for (int64_t quad = tile * device::kQuads; quad < (tile + 1) * device::kQuads; ++quad) {
      if (quad < weights.quads()) sum = sum + of_quad(quad);
    }
    sums[tile] = sum;
  });
}

template <class Sum>
inline void add_up(Sum* sums, int64_t n) {
  for (int64_t i = 1; i < n; ++i) sums[i] = sums[i - 1] + sums[i];
}

inline int64_t reduce(const IntegerWeights& integer_weights, Pointer<int64_t> found,
                      uint64_t stride) {
  const TiledWeights weights(integer_weights);
  device::Reduction& all = *reinterpret_cast<device::Reduction*>(found.address);
  each_thread(stride, [&](const Threads& threads) {
    threads.each(weights.quads(), [&](int64_t quad) { all = all + device::reduce(weights, quad); });
  });
  return 0;
}

inline int64_t prefix_sums(const IntegerWeights& integer_weights, Pointer<void>, int64_t,
                           uint64_t stride) {
  const TiledWeights weights(integer_weights);
  sum_tiles(weights, stride, weights.prefix.address,
            [&](int64_t quad) { return device::sum_of(weights.read(quad)); });
  add_up(weights.prefix.address, weights.tiles());
  return 0;
}

inline int64_t integer_weights(const IntegerWeights& integer_weights, Pointer<uint64_t> out,
                               uint64_t stride) {
  const TiledWeights weights(integer_weights);
  each_thread(stride, [&](const Threads& threads) {
    threads.each(weights.quads(), [&](int64_t quad) {
      const device::Quad items = weights.read(quad);
      for (int j = 0; j < items.size; ++j) out[quad * device::kQuad + j] = items.weight[j];
    });
  });
  return 0;
}

inline int64_t categorical_draw(const IntegerWeights& integer_weights, const Draws& draws,
                                const Batch& batch, uint64_t stride) {
  const TiledWeights weights(integer_weights);
  each_thread(stride, [&](const Threads& threads) {
    threads.each(draws.count,
                 [&](int64_t b) { device::categorical_draw(weights, draws, b, batch); });
  });
  return 0;
}

inline int64_t alias_build(const IntegerWeights& integer_weights, Pointer<int64_t> before,
                           Pointer<Bucket> table, Pointer<void>, int64_t, uint64_t stride) {
  const TiledWeights weights(integer_weights);
  TileSums* const sums = reinterpret_cast<TileSums*>(before.address);
  const device::AliasJob job(weights, sums, table);
  sum_tiles(weights, stride, sums + 1,
            [&](int64_t quad) { return sums_of(job.buckets, quad, weights.read(quad)); });
  add_up(sums, weights.tiles() + 1);
  HostBlock block(stride);
  const auto memory = std::make_unique<device::PartMemory>();
  block.each(job.parts(), [&](int64_t part) {
    device::build_part(block, *memory, job, place_after(job, part * device::kSteps),
                       place_after(job, (part + 1) * device::kSteps));
  });
  return 0;
}

template <class Points>
int64_t alias_draw_at(const AliasTable& table, const Points& points, int64_t count,
                      const Batch& batch, uint64_t stride) {
  const device::AliasInverseCdf inverse_cdf(table);
  each_thread(stride, [&](const Threads& threads) {
    device::alias_draw(inverse_cdf, points, threads, count, batch);
  });
  return 0;
}

inline int64_t alias_draw(const AliasTable& table, const Draws& draws, const Batch& batch,
                          uint64_t stride) {
  const device::RandomPoints points{draws, table.total};
  return alias_draw_at(table, points, draws.count, batch, stride);
}

inline int64_t alias_inverse_cdf(const AliasTable& table, Pointer<const uint64_t> points,
                                 int64_t count, const Batch& batch, uint64_t stride) {
  return alias_draw_at(table, device::PointsInMemory{points}, count, batch, stride);
}

inline int64_t random_below(uint64_t total, const Draws& draws, Pointer<uint64_t> out,
                            uint64_t stride) {
  each_thread(stride, [&](const Threads& threads) {
    threads.each(draws.count, [&](int64_t b) { out[b] = device::random_below(draws, b, total); });
  });
  return 0;
}

// What thread number `thread` of block `block` of `blocks` does of n items: the first, the step to
// the next, and how many.
inline void share(unsigned block, unsigned thread, unsigned blocks, int64_t n,
                  Pointer<int64_t> found) {
  const Threads threads(block, thread, blocks);
  const int64_t left = n - threads.number;
  found[0] = threads.number;
  found[1] = threads.count;
  found[2] = left <= 0 ? 0 : (left + threads.count - 1) / threads.count;
}

inline int64_t blocks_for(int64_t items, int64_t most) { return device::blocks_for(items, most); }

}  // namespace fastis::emulated
