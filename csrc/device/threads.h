// Which thread of a launch does what: thread number k of K does k, k + K, k + 2 K, ... (grid-stride
// loops), in 64 bits throughout. Host code, so that it is tested without a device.
#pragma once

#include <cstdint>

#include "philox.h"

namespace fastis::device {

constexpr int kThreads = 256;  // of a block

struct Threads {
  int64_t number, count;  // of this thread; of all

  // Thread `thread` of block `block` of `blocks`.
  FASTIS_HD Threads(unsigned block, unsigned thread, unsigned blocks)
      : number(int64_t{block} * kThreads + thread), count(int64_t{blocks} * kThreads) {}

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

}  // namespace fastis::device
