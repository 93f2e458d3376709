#pragma once

#include "cuda_on_threads.h"

namespace cub {

enum BlockScanAlgorithm { BLOCK_SCAN_RAKING, BLOCK_SCAN_WARP_SCANS };

template <class T, int threads, BlockScanAlgorithm>
class BlockScan {
 public:
  struct TempStorage {
    T value[threads];
  };
  explicit BlockScan(TempStorage& storage) : storage_(storage) {}

  template <class F>
  void ExclusiveScan(const T& mine, T& before, const T& initial, const F& f, T& all) {
    storage_.value[threadIdx.x] = mine;
    block_barriers[blockIdx.x].wait(block_waits);
    all = initial;
    for (unsigned i = 0; i < threads; ++i) {
      if (i == threadIdx.x) before = all;
      all = f(all, storage_.value[i]);
    }
  }

 private:
  TempStorage& storage_;
};

}  // namespace cub
