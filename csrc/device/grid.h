// What device code is written against: all threads of a launch, in phases with barriers between
// them. csrc/cuda/grid.cuh runs it on a GPU; HostGrid below runs the same code on the CPU, one
// index after the other in an order of the test's choice, so that nothing can depend on that order.
#pragma once

#include <cstdint>
#include <vector>

#include "philox.h"

namespace fastis::device {

// Atomic where threads run at once; the value before.
template <class T>
FASTIS_HD inline T atomic_add(T* address, T value) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(T) == 8) {
    return static_cast<T>(atomicAdd(reinterpret_cast<unsigned long long*>(address),
                                    static_cast<unsigned long long>(value)));
  } else {
    return atomicAdd(address, value);
  }
#else
  const T before = *address;
  *address = before + value;
  return before;
#endif
}

template <class T>
FASTIS_HD inline void atomic_min(T* address, T value) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(T) == 8) {
    atomicMin(reinterpret_cast<unsigned long long*>(address),
              static_cast<unsigned long long>(value));
  } else {
    atomicMin(address, value);
  }
#else
  if (value < *address) *address = value;
#endif
}

FASTIS_HD inline void atomic_max(int64_t* address, int64_t value) {
#ifdef __CUDA_ARCH__
  atomicMax(reinterpret_cast<long long*>(address), static_cast<long long>(value));
#else
  if (value > *address) *address = value;
#endif
}

#ifndef __CUDACC__

// A block of threads on the host. Index i of each() is visited in an order that `stride` permutes.
class HostBlock {
 public:
  explicit HostBlock(uint64_t stride) : stride_(stride), shared_(kShared) {}

  // f(i) for i < n, then a barrier.
  template <class F>
  void each(int64_t n, const F& f) const {
    for (int64_t i = 0; i < n; ++i) f(permuted(i, n));
  }
  // f() on one thread, with a barrier before and after.
  template <class F>
  void once(const F& f) const {
    f();
  }
  void wait() const {}
  // sum over i < n of f(i), for every thread; in a fixed order.
  template <class F>
  double sum(int64_t n, const F& f) const {
    double total = 0;
    for (int64_t i = 0; i < n; ++i) total += f(i);
    return total;
  }
  // values[i] becomes the sum of those before it, for i < n <= kShared; returns the total.
  uint64_t running_sums(uint64_t* values, int64_t n) const {
    uint64_t total = 0;
    for (int64_t i = 0; i < n; ++i) {
      const uint64_t value = values[i];
      values[i] = total;
      total += value;
    }
    return total;
  }
  // use(i, x, V of all before i) for i < n, where x = make(i) and V starts with `before` and grows
  // by tally(i, x); then a barrier. Returns V of all.
  template <class V, class Make, class Tally, class Use>
  V scan(int64_t n, V before, const Make& make, const Tally& tally, const Use& use) const {
    std::vector<decltype(make(n))> made;
    std::vector<V> sums{before};
    for (int64_t i = 0; i < n; ++i) {
      made.push_back(make(i));
      sums.push_back(sums.back() + tally(i, made.back()));
    }
    each(n, [&](int64_t i) { use(i, made[i], sums[i]); });
    return sums.back();
  }
  // Memory of the block: kShared values, uninitialised.
  uint64_t* shared() { return shared_.data(); }

  int64_t permuted(int64_t i, int64_t n) const {
    if (stride_ <= 1 || n < 3) return stride_ == 0 ? n - 1 - i : i;
    uint64_t step = stride_ % static_cast<uint64_t>(n);
    while (greatest_divisor(step, static_cast<uint64_t>(n)) != 1) ++step;
    return static_cast<int64_t>(static_cast<uint64_t>(i) * step % static_cast<uint64_t>(n));
  }

  static constexpr int64_t kShared = 1024;

 private:
  static uint64_t greatest_divisor(uint64_t a, uint64_t b) {
    while (b != 0) {
      const uint64_t rest = a % b;
      a = b;
      b = rest;
    }
    return a;
  }

  uint64_t stride_;
  std::vector<uint64_t> shared_;
};

class HostGrid {
 public:
  explicit HostGrid(uint64_t stride) : block_(stride) {}

  // f(i) for i < n over all threads of all blocks, then a barrier for all.
  template <class F>
  void each(int64_t n, const F& f) const {
    block_.each(n, f);
  }
  // The same, each thread adding what its f(i) return; flush(tally) then runs once a block.
  template <class Tally, class F, class Flush>
  void reduce(int64_t n, const F& f, const Flush& flush) const {
    Tally tally{};
    for (int64_t i = 0; i < n; ++i) tally = tally + f(block_.permuted(i, n));
    flush(tally);
  }
  // f(block) by all threads of one block, then a barrier for all.
  template <class F>
  void leader(const F& f) {
    f(block_);
  }
  // f() on one thread, once all blocks have come so far; nobody waits.
  template <class F>
  void last(const F& f) const {
    f();
  }
  void wait() const {}
  HostBlock& block() { return block_; }

 private:
  HostBlock block_;
};

#endif  // !__CUDACC__

}  // namespace fastis::device
