// The threads of a launch, as device/grid.h describes them. All blocks of a launch wait for each
// other: it is cooperative, unless it has one block only.
#pragma once

#include <cooperative_groups.h>

#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>

#include "device/grid.h"
#include "device/threads.h"

// A variable of a block. The tests on a CPU have a definition of their own.
#ifndef FASTIS_SHARED
#define FASTIS_SHARED(type, name) __shared__ type name
#endif

namespace fastis::device {

struct Add {
  template <class T>
  __device__ T operator()(const T& a, const T& b) const {
    return a + b;
  }
};

class CudaBlock {
 public:
  template <class F>
  __device__ void each(int64_t n, const F& f) const {
    for (int64_t i = threadIdx.x; i < n; i += kThreads) f(i);
  }

  __device__ void wait() const { __syncthreads(); }

  // Which thread adds what is fixed, and so is the order: the same bits every time.
  template <class T, class F, class Use>
  __device__ void reduce(int64_t n, const F& f, const Use& use) const {
    T mine{};
    for (int64_t i = threadIdx.x; i < n; i += kThreads) mine = mine + f(i);
    reduce(mine, use);
  }

  // use(sum of all threads' `mine`) on the first thread.
  template <class T, class Use>
  __device__ void reduce(const T& mine, const Use& use) const {
    using Reduce = cub::BlockReduce<T, kThreads>;
    using Storage = typename Reduce::TempStorage;
    FASTIS_SHARED(Storage, storage);
    const T sum = Reduce(storage).Reduce(mine, Add());
    if (threadIdx.x == 0) use(sum);
  }

  static constexpr int kItems = (1024 + kThreads - 1) / kThreads;

  template <class T>
  struct Held {
    int64_t n;
    T items[kItems];
  };

  template <class Make>
  __device__ auto hold(int64_t n, const Make& make) const {
    Held<decltype(make(n))> held;
    held.n = n;
    for (int j = 0; j < kItems; ++j) {
      const int64_t i = threadIdx.x * kItems + j;
      if (i < n) held.items[j] = make(i);
    }
    return held;
  }

  template <class V, class T, class Tally, class Use>
  __device__ V running_sums(const Held<T>& held, const Tally& tally, const Use& use) const {
    using Scan = cub::BlockScan<V, kThreads, cub::BLOCK_SCAN_WARP_SCANS>;
    using Storage = typename Scan::TempStorage;
    FASTIS_SHARED(Storage, storage);
    V items[kItems], mine{}, before, all;
    for (int j = 0; j < kItems; ++j) {
      const int64_t i = threadIdx.x * kItems + j;
      items[j] = i < held.n ? tally(i, held.items[j]) : V{};
      mine = mine + items[j];
    }
    Scan(storage).ExclusiveScan(mine, before, V{}, Add(), all);
    for (int j = 0; j < kItems; ++j) {
      const int64_t i = threadIdx.x * kItems + j;
      if (i < held.n) use(i, before);
      before = before + items[j];
    }
    __syncthreads();
    return all;
  }

  // A thread holds what it made in registers until it uses it.
  template <class V, class Make, class Tally, class Use>
  __device__ V scan(int64_t n, V before, const Make& make, const Tally& tally,
                    const Use& use) const {
    using Scan = cub::BlockScan<V, kThreads, cub::BLOCK_SCAN_WARP_SCANS>;  // little memory
    using Storage = typename Scan::TempStorage;
    FASTIS_SHARED(Storage, storage);
    for (int64_t begin = 0; begin < n; begin += kThreads) {
      const int64_t i = begin + threadIdx.x;
      if (begin > 0) __syncthreads();  // until the storage has been read
      decltype(make(n)) made{};
      V mine{}, sum, all;
      if (i < n) {
        made = make(i);
        mine = tally(i, made);
      }
      Scan(storage).ExclusiveScan(mine, sum, V{}, Add(), all);
      if (i < n) use(i, made, before + sum);
      before = before + all;
    }
    return before;
  }

  template <class T>
  __device__ T& memory() const {
    FASTIS_SHARED(T, value);
    return value;
  }
};

class CudaGrid {
 public:
  __device__ explicit CudaGrid(unsigned* arrivals) : arrivals_(arrivals) {}

  template <class F>
  __device__ void each(int64_t n, const F& f) const {
    if (has_share()) threads().each(n, f);
  }

  template <class T, class F, class Flush>
  __device__ void reduce(int64_t n, const F& f, const Flush& flush) const {
    if (!has_share()) return;
    T mine{};
    threads().each(n, [&](int64_t i) { mine = mine + f(i); });
    block_.reduce(mine, flush);
  }

  template <class F>
  __device__ void aside(const F& f) const {
    if (blockIdx.x == gridDim.x - 1) f(block_);
  }

  template <class F>
  __device__ void once(const F& f) const {
    if (blockIdx.x == gridDim.x - 1 && threadIdx.x == 0) f();
  }

  template <class F>
  __device__ void last(const F& f) const {
    __syncthreads();
    if (threadIdx.x != 0) return;
    __threadfence();
    if (atomicInc(arrivals_, gridDim.x - 1) == gridDim.x - 1) f();  // and back to 0 for the next
  }

  __device__ void wait() const {
    if (gridDim.x == 1) {
      __syncthreads();
    } else {
      cooperative_groups::this_grid().sync();
    }
  }

  __device__ const CudaBlock& block() const { return block_; }

 private:
  // Of several blocks the last has none.
  __device__ static bool has_share() { return gridDim.x == 1 || blockIdx.x < gridDim.x - 1; }
  __device__ static Threads threads() {
    return Threads::dealt(blockIdx.x, threadIdx.x, gridDim.x == 1 ? 1 : gridDim.x - 1);
  }

  CudaBlock block_;
  unsigned* arrivals_;
};

}  // namespace fastis::device
