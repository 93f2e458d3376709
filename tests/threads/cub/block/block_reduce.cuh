// In plain arrays and without a barrier at the end, so that using them again too early is a race.
#pragma once

#include "cuda_on_threads.h"

namespace cub {

template <class T, int threads>
class BlockReduce {
 public:
  struct TempStorage {
    T value[threads];
  };
  explicit BlockReduce(TempStorage& storage) : storage_(storage) {}

  template <class F>
  T Reduce(const T& mine, const F& f) {
    storage_.value[threadIdx.x] = mine;
    block_barriers[blockIdx.x].wait(block_waits);
    T all = storage_.value[0];
    if (threadIdx.x == 0) {
      for (int i = 1; i < threads; ++i) all = f(all, storage_.value[i]);
    }
    return all;
  }

 private:
  TempStorage& storage_;
};

}  // namespace cub
