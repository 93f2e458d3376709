// Which thread of a launch does what: thread number k of K does k, k + K, k + 2 K, ... (grid-stride
// loops), in 64 bits throughout. Host code, so that it is tested without a device.
#pragma once

#include <cstdint>

#include "philox.h"

namespace fastis::device {

// Of a block, and of a warp. The tests of csrc/cuda/grid.cuh on a CPU have fewer.
#ifdef FASTIS_THREADS
constexpr int kThreads = FASTIS_THREADS, kWarp = FASTIS_WARP;
#else
constexpr int kThreads = 256, kWarp = 32;
#endif

struct Threads {
  int64_t number, count;  // of this thread; of all

  // Thread `thread` of block `block` of `blocks`.
  FASTIS_HD Threads(unsigned block, unsigned thread, unsigned blocks)
      : number(int64_t{block} * kThreads + thread), count(int64_t{blocks} * kThreads) {}

  // The same with the warps dealt to the blocks one by one, so that few items spread over all
  // multiprocessors. A block's first warp comes last: it has the work of single threads to do.
  FASTIS_HD static Threads dealt(unsigned block, unsigned thread, unsigned blocks) {
    Threads result(block, thread, blocks);
    const int64_t warp = (kThreads - 1 - thread) / kWarp;
    result.number = (warp * blocks + block) * kWarp + thread % kWarp;
    return result;
  }

  // f(i) for this thread's share of i < n.
  template <class F>
  FASTIS_HD void each(int64_t n, const F& f) const {
    for (int64_t i = number; i < n; i += count) f(i);
  }
};

// How many blocks to launch for `items` that threads do `each` of: at least one, at most `most`.
FASTIS_HD inline unsigned blocks_for(int64_t items, int64_t most, int64_t each = 1) {
  const int64_t share = each * kThreads;
  const int64_t wanted = items / share + (items % share != 0);
  return static_cast<unsigned>(wanted < 1 ? 1 : wanted < most ? wanted : most);
}

// Blocks of the sampler's launches: one while it suffices, since it waits without the rest of the
// device; else some to share the items, a quarter of the threads each, so that what a
// multiprocessor loads for each of its items does not queue, and one that has no share.
FASTIS_HD inline unsigned cooperating_blocks(int64_t items, int64_t most) {
  constexpr int64_t kShare = kThreads / 4;
  if (items <= kThreads || most < 3) return 1;
  const int64_t wanted = (items + kShare - 1) / kShare;
  return static_cast<unsigned>((wanted < most - 1 ? wanted : most - 1) + 1);
}

}  // namespace fastis::device
