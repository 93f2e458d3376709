// CUDA's words for csrc/cuda/grid.cuh and csrc/device on a CPU: a std::thread for each thread of a
// launch, and barriers that order no more than CUDA's do, so that ThreadSanitizer sees a missing
// one.
#pragma once

#include <sched.h>

#include <cstdint>
#include <cstdlib>
#include <ctime>
#include <thread>
#include <vector>

#define __CUDA_ARCH__ 900
#define __device__

struct Dim {
  unsigned x;
};
inline thread_local Dim threadIdx, blockIdx, gridDim;

constexpr unsigned kMostBlocks = 4;

template <class T>
struct PerBlock {
  T value[kMostBlocks];
  T& mine() { return value[blockIdx.x]; }
};
#define FASTIS_SHARED(type, name)             \
  static PerBlock<type> name##_of_all_blocks; \
  type& name = name##_of_all_blocks.mine()

// Each use has variables of its own, so that a thread learns of nothing that comes after the
// barrier (with pthread_barrier_t a late thread would, and races between two of its uses went
// unseen).
class Barrier {
 public:
  void start(unsigned threads) {
    threads_ = threads;
    for (Use& use : uses_) use = {0, 0};
  }

  void wait(unsigned& number) {
    Use& use = uses_[number % kUses];
    const unsigned round = number++ / kUses + 1;
    if (__atomic_add_fetch(&use.arrived, 1, __ATOMIC_ACQ_REL) == threads_ * round) {
      __atomic_store_n(&use.open, round, __ATOMIC_RELEASE);
    } else {
      const std::time_t begin = std::time(nullptr);
      while (__atomic_load_n(&use.open, __ATOMIC_ACQUIRE) < round) {
        sched_yield();
        if (std::time(nullptr) - begin > kPatience) std::_Exit(3);  // nobody else is coming
      }
    }
  }

 private:
  static constexpr int kUses = 256;
  static constexpr int kPatience = 8;  // seconds
  struct alignas(64) Use {
    unsigned arrived, open;
  };
  Use uses_[kUses];
  unsigned threads_;
};
inline Barrier block_barriers[kMostBlocks], grid_barrier;
inline thread_local unsigned block_waits, grid_waits;

// The barrier that a test leaves out, by its number in the instrumented sources.
inline int left_out = -1;

inline void __syncthreads() { block_barriers[blockIdx.x].wait(block_waits); }
inline void __threadfence() {}

// Relaxed, as CUDA's are: by themselves they order nothing.
template <class T>
T atomicAdd(T* address, T value) {
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
template <class T, class F>
T exchange(T* address, const F& f) {
  T old = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(address, &old, f(old), false, __ATOMIC_RELAXED,
                                      __ATOMIC_RELAXED)) {
  }
  return old;
}
template <class T>
T atomicMin(T* address, T value) {
  return exchange(address, [value](T old) { return old < value ? old : value; });
}
template <class T>
T atomicMax(T* address, T value) {
  return exchange(address, [value](T old) { return old > value ? old : value; });
}
// Stands for itself and the __threadfence() before it, which ThreadSanitizer does not know.
inline unsigned atomicInc(unsigned* address, unsigned most) {
  unsigned old = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(address, &old, old >= most ? 0 : old + 1, false,
                                      __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) {
  }
  return old;
}
inline uint32_t __ldcg(const uint32_t* from) { return __atomic_load_n(from, __ATOMIC_RELAXED); }
inline void __stcg(uint32_t* to, uint32_t value) { __atomic_store_n(to, value, __ATOMIC_RELAXED); }
template <class T>
T __ldg(const T* from) {
  return *from;
}
inline uint64_t __umul64hi(uint64_t a, uint64_t b) {
  return static_cast<uint64_t>((static_cast<unsigned __int128>(a) * b) >> 64);
}
struct alignas(16) ulonglong2 {
  unsigned long long x, y;
};
inline ulonglong2 make_ulonglong2(uint64_t x, uint64_t y) { return {x, y}; }

// f() on all threads of `blocks` blocks.
template <class F>
void launch(unsigned blocks, unsigned threads, const F& f) {
  for (unsigned b = 0; b < blocks; ++b) block_barriers[b].start(threads);
  grid_barrier.start(blocks * threads);
  std::vector<std::thread> all;
  for (unsigned b = 0; b < blocks; ++b) {
    for (unsigned t = 0; t < threads; ++t) {
      all.emplace_back([=, &f] {
        threadIdx.x = t;
        blockIdx.x = b;
        gridDim.x = blocks;
        f();
      });
    }
  }
  for (std::thread& thread : all) thread.join();
}
