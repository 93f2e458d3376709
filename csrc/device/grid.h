// What device code is written against: all threads of a launch, in phases with barriers between
// them. csrc/cuda/grid.cuh runs it on a GPU (and in tests/threads on the threads of a CPU);
// HostGrid below runs the same code one index after the other in an order of the test's choice, so
// that nothing can depend on that order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "philox.h"

// For what is seldom run: its code is kept out of the way of the rest.
#ifdef __CUDACC__
#define FASTIS_COLD __noinline__ FASTIS_HD
#else
#define FASTIS_COLD
#endif

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

// For words that one thread writes while others read them, where either value will do.
FASTIS_HD inline uint32_t load_relaxed(const uint32_t* address) {
#ifdef __CUDA_ARCH__
  return __ldcg(address);
#else
  return *address;
#endif
}

FASTIS_HD inline void store_relaxed(uint32_t* address, uint32_t value) {
#ifdef __CUDA_ARCH__
  __stcg(address, value);
#else
  *address = value;
#endif
}

#ifndef __CUDACC__

// A block of threads on the host. Only wait() and what says so is a barrier. Index i of each() is
// visited in an order that `stride` permutes.
class HostBlock {
 public:
  explicit HostBlock(uint64_t stride) : stride_(stride) {}

  // f(i) for i < n.
  template <class F>
  void each(int64_t n, const F& f) const {
    for (int64_t i = 0; i < n; ++i) f(permuted(i, n));
  }
  void wait() const {}
  // use(the sum over i < n of f(i)) on one thread, added in a fixed order. No barrier: there must
  // be one before the next sum of the same type.
  template <class T, class F, class Use>
  void reduce(int64_t n, const F& f, const Use& use) const {
    T total{};
    for (int64_t i = 0; i < n; ++i) total = total + f(i);
    use(total);
  }
  // make(i) for i < n <= kHeld, in the threads' registers; kHeld is at least 1024.
  template <class Make>
  auto hold(int64_t n, const Make& make) const {
    std::vector<decltype(make(n))> held;
    for (int64_t i = 0; i < n; ++i) held.push_back(make(i));
    return held;
  }
  // use(i, V of all before i) for what is held, V being the sum of tally(i, x); then a barrier.
  // Returns V of all.
  template <class V, class Held, class Tally, class Use>
  V running_sums(const Held& held, const Tally& tally, const Use& use) const {
    V sum{};
    for (std::size_t i = 0; i < held.size(); ++i) {
      use(static_cast<int64_t>(i), sum);
      sum = sum + tally(static_cast<int64_t>(i), held[i]);
    }
    return sum;
  }
  // use(i, x, V of all before i) for i < n, where x = make(i) and V starts with `before` and grows
  // by tally(i, x). Returns V of all.
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
  // The block's own T, uninitialised.
  template <class T>
  T& memory() const {
    static thread_local T value;
    return value;
  }

  int64_t permuted(int64_t i, int64_t n) const {
    if (stride_ <= 1 || n < 3) return stride_ == 0 ? n - 1 - i : i;
    uint64_t step = stride_ % static_cast<uint64_t>(n);
    while (greatest_divisor(step, static_cast<uint64_t>(n)) != 1) ++step;
    return static_cast<int64_t>(static_cast<uint64_t>(i) * step % static_cast<uint64_t>(n));
  }

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
};

// All blocks of a launch on the host. Only wait() is a barrier.
class HostGrid {
 public:
  explicit HostGrid(uint64_t stride) : block_(stride) {}

  // f(i) for i < n over all threads of all blocks.
  template <class F>
  void each(int64_t n, const F& f) const {
    block_.each(n, f);
  }
  // The same, each thread adding what its f(i) return; flush(sum) then runs once a block. There
  // must be a barrier before the next sum of the same type.
  template <class T, class F, class Flush>
  void reduce(int64_t n, const F& f, const Flush& flush) const {
    T sum{};
    for (int64_t i = 0; i < n; ++i) sum = sum + f(block_.permuted(i, n));
    flush(sum);
  }
  // f(block) by one block: one without a share of each(), where there are several.
  template <class F>
  void aside(const F& f) const {
    f(block_);
  }
  // f() on one thread, the first of that block.
  template <class F>
  void once(const F& f) const {
    f();
  }
  // f() on one thread, when all blocks have come so far.
  template <class F>
  void last(const F& f) const {
    f();
  }
  void wait() const {}
  const HostBlock& block() const { return block_; }

 private:
  HostBlock block_;
};

#endif  // !__CUDACC__

}  // namespace fastis::device
