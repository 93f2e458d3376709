// The threads of a cooperative launch, as device/grid.h describes them.
#pragma once

#include <cooperative_groups.h>

#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>

#include "device/grid.h"
#include "device/threads.h"

namespace fastis::device {

class CudaBlock {
 public:
  static constexpr int64_t kShared = 1024;

  __device__ explicit CudaBlock(uint64_t* shared) : shared_(shared) {}

  template <class F>
  __device__ void each(int64_t n, const F& f) const {
    for (int64_t i = threadIdx.x; i < n; i += kThreads) f(i);
    __syncthreads();
  }

  template <class F>
  __device__ void once(const F& f) const {
    __syncthreads();
    if (threadIdx.x == 0) f();
    __syncthreads();
  }

  __device__ void wait() const { __syncthreads(); }

  // Which thread adds what is fixed, and so is the order: the same bits every time.
  template <class F>
  __device__ double sum(int64_t n, const F& f) const {
    using Reduce = cub::BlockReduce<double, kThreads>;
    __shared__ typename Reduce::TempStorage storage;
    __shared__ double total;
    double mine = 0;
    for (int64_t i = threadIdx.x; i < n; i += kThreads) mine += f(i);
    const double all = Reduce(storage).Sum(mine);
    if (threadIdx.x == 0) total = all;
    __syncthreads();
    const double result = total;
    __syncthreads();
    return result;
  }

  __device__ uint64_t running_sums(uint64_t* values, int64_t n) const {
    constexpr int kItems = kShared / kThreads;
    using Scan = cub::BlockScan<uint64_t, kThreads>;
    __shared__ typename Scan::TempStorage storage;
    uint64_t items[kItems], total;
    for (int j = 0; j < kItems; ++j) {
      const int64_t i = threadIdx.x * kItems + j;
      items[j] = i < n ? values[i] : 0;
    }
    Scan(storage).ExclusiveSum(items, items, total);
    for (int j = 0; j < kItems; ++j) {
      const int64_t i = threadIdx.x * kItems + j;
      if (i < n) values[i] = items[j];
    }
    __syncthreads();
    return total;
  }

  // A thread holds what it made in registers until it uses it.
  template <class V, class Make, class Tally, class Use>
  __device__ V scan(int64_t n, V before, const Make& make, const Tally& tally,
                    const Use& use) const {
    using Scan = cub::BlockScan<V, kThreads, cub::BLOCK_SCAN_WARP_SCANS>;  // little memory
    __shared__ typename Scan::TempStorage storage;
    const auto plus = [](const V& a, const V& b) { return a + b; };
    for (int64_t begin = 0; begin < n; begin += kThreads) {
      const int64_t i = begin + threadIdx.x;
      decltype(make(n)) made{};
      V mine{}, sum, all;
      if (i < n) {
        made = make(i);
        mine = tally(i, made);
      }
      Scan(storage).ExclusiveScan(mine, sum, V{}, plus, all);
      if (i < n) use(i, made, before + sum);
      before = before + all;
      __syncthreads();
    }
    return before;
  }

  __device__ uint64_t* shared() { return shared_; }

 private:
  uint64_t* shared_;
};

class CudaGrid {
 public:
  __device__ CudaGrid(uint64_t* shared, unsigned* arrivals) : block_(shared), arrivals_(arrivals) {}

  template <class F>
  __device__ void each(int64_t n, const F& f) const {
    threads().each(n, f);
    wait();
  }

  template <class Tally, class F, class Flush>
  __device__ void reduce(int64_t n, const F& f, const Flush& flush) const {
    using Reduce = cub::BlockReduce<Tally, kThreads>;
    __shared__ typename Reduce::TempStorage storage;
    Tally mine{};
    threads().each(n, [&](int64_t i) { mine = mine + f(i); });
    const Tally tally =
        Reduce(storage).Reduce(mine, [](const Tally& a, const Tally& b) { return a + b; });
    if (threadIdx.x == 0) flush(tally);
    wait();
  }

  template <class F>
  __device__ void leader(const F& f) {
    if (blockIdx.x == 0) f(block_);
    wait();
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

  __device__ CudaBlock& block() { return block_; }

 private:
  __device__ static Threads threads() { return {blockIdx.x, threadIdx.x, gridDim.x}; }

  CudaBlock block_;
  unsigned* arrivals_;
};

}  // namespace fastis::device
