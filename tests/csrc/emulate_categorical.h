// csrc/cuda/{categorical,alias}.cu on the host: the same shares of threads and blocks, one after
// the other, in an order that `stride` permutes.
#pragma once

#include <memory>

#include "device/alias_build.h"
#include "device/alias_draw.h"
#include "device/threads.h"
#include "fastis.h"

namespace fastis::emulated {

using device::GivenWeights;
using device::HostBlock;
using device::Threads;
using device::TileSums;

constexpr unsigned kBlocks = 3;  // few, so that threads go round several times

inline GivenWeights given(int64_t format, Pointer<const void> values, int64_t n, int64_t shift) {
  return {static_cast<device::Format>(format), values, n, static_cast<int>(shift)};
}

// f(threads) for every thread of a launch.
template <class F>
inline void each_thread(uint64_t stride, const F& f) {
  HostBlock(stride).each(int64_t{kBlocks} * device::kThreads, [&](int64_t k) {
    f(Threads(static_cast<unsigned>(k / device::kThreads),
              static_cast<unsigned>(k % device::kThreads), kBlocks));
  });
}

template <class Sum, class OfQuad>
inline void sum_tiles(const GivenWeights& weights, uint64_t stride, Sum* sums,
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

inline int64_t survey(int64_t format, Pointer<const void> values, int64_t n, Pointer<int64_t> found,
                      uint64_t stride) {
  const GivenWeights weights = given(format, values, n, 0);
  device::Survey& all = *reinterpret_cast<device::Survey*>(found.address);
  each_thread(stride, [&](const Threads& threads) {
    threads.each(weights.quads(), [&](int64_t quad) { all = all + device::survey(weights, quad); });
  });
  return 0;
}

inline int64_t running_sums(int64_t format, Pointer<const void> values, int64_t n, int64_t shift,
                            Pointer<uint64_t> ends, Pointer<void>, int64_t, uint64_t stride) {
  const GivenWeights weights = given(format, values, n, shift);
  sum_tiles(weights, stride, ends.address,
            [&](int64_t quad) { return device::sum_of(weights.read(quad)); });
  add_up(ends.address, weights.tiles());
  return 0;
}

inline int64_t integers(int64_t format, Pointer<const void> values, int64_t n, int64_t shift,
                        Pointer<uint64_t> out, uint64_t stride) {
  const GivenWeights weights = given(format, values, n, shift);
  each_thread(stride, [&](const Threads& threads) {
    threads.each(weights.quads(), [&](int64_t quad) {
      const device::Quad items = weights.read(quad);
      for (int j = 0; j < items.size; ++j) out[quad * device::kQuad + j] = items.weight[j];
    });
  });
  return 0;
}

inline int64_t search(int64_t format, Pointer<const void> values, int64_t n, int64_t shift,
                      Pointer<const uint64_t> ends, uint64_t total, uint64_t seed, int64_t first,
                      int64_t count, Pointer<int64_t> indices, Pointer<float> coefficients,
                      uint64_t stride) {
  const GivenWeights weights = given(format, values, n, shift);
  each_thread(stride, [&](const Threads& threads) {
    threads.each(count, [&](int64_t b) {
      device::search(weights, ends, total, seed, static_cast<uint64_t>(first), b, indices,
                     coefficients);
    });
  });
  return 0;
}

inline int64_t alias_build(int64_t format, Pointer<const void> values, int64_t n, int64_t shift,
                           uint64_t total, Pointer<int64_t> before, Pointer<uint64_t> table,
                           Pointer<void>, int64_t, uint64_t stride) {
  const GivenWeights weights = given(format, values, n, shift);
  TileSums* const sums = reinterpret_cast<TileSums*>(before.address);
  const device::AliasJob job(weights, total, sums, reinterpret_cast<Bucket*>(table.address));
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

inline int64_t alias_draw(Pointer<const uint64_t> table, int64_t n, uint64_t total, uint64_t seed,
                          int64_t first, int64_t count, Pointer<int64_t> indices,
                          Pointer<float> coefficients, uint64_t stride) {
  const device::AliasTable buckets(table, n, total);
  const device::RandomPoints points{seed, static_cast<uint64_t>(first), total};
  each_thread(stride, [&](const Threads& threads) {
    device::draw_from(buckets, points, threads, count, indices.address, coefficients.address);
  });
  return 0;
}

inline int64_t alias_resolve(Pointer<const uint64_t> table, int64_t n, uint64_t total,
                             Pointer<const uint64_t> points, int64_t count,
                             Pointer<int64_t> indices, Pointer<float> coefficients,
                             uint64_t stride) {
  const device::AliasTable buckets(table, n, total);
  each_thread(stride, [&](const Threads& threads) {
    device::draw_from(buckets, device::GivenPoints{points}, threads, count, indices.address,
                      coefficients.address);
  });
  return 0;
}

inline int64_t draw_points(uint64_t total, uint64_t seed, int64_t first, int64_t count,
                           Pointer<uint64_t> points, uint64_t stride) {
  const device::RandomPoints random{seed, static_cast<uint64_t>(first), total};
  each_thread(stride, [&](const Threads& threads) {
    threads.each(count, [&](int64_t b) { points[b] = random(b); });
  });
  return 0;
}

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
