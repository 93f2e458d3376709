// The two sides of the merge that alias_build.cpp does: a block's light or heavy items, selected a
// vector at a time, with their prefix sums. Bytes read: each side the weights, once.
#pragma once

#include "cpu/categorical.h"

namespace fastis::FASTIS_ISA {

constexpr int kBlock = 256;   // items that are read at once; both sides of a part stay in the L1
constexpr int kPadding = 16;  // items: vectors are read and written whole

// The table to build, and of what.
struct Job {
  const IntegerWeights& weights;
  Buckets buckets;
  double total, n;  // for the coefficients
  Bucket* table;
  int64_t blocks;

  int size(int64_t block) const {
    const int64_t left = weights.n - block * kBlock;
    return static_cast<int>(left < kBlock ? left : kBlock);
  }
  // How many of a block's buckets hold one unit more: its first ones.
  int larger(int64_t block) const {
    const int64_t left = static_cast<int64_t>(buckets.larger) - block * kBlock;
    return left < 0 ? 0 : left > size(block) ? size(block) : static_cast<int>(left);
  }
};

// Over all blocks before each one: the number of light items, their deficits and the surpluses of
// the heavy ones. [blocks + 1] each; only where there are several parts.
struct Before {
  const int64_t* lights;
  const uint64_t *deficit, *surplus;

  template <bool kHeavy>
  bool has(const Job& job, int64_t block) const {
    return lights[block + 1] - lights[block] != (kHeavy ? job.size(block) : 0);
  }
};

// Moves the items [begin, end) on one side of the capacity to the end of place and weight, which
// hold `size` so far; whole vectors are written.
#if defined(__AVX512F__) && FASTIS_VECTOR_BYTES == 64
template <bool kHeavy>
inline int select_items(const uint64_t* integer, int begin, int end, uint64_t capacity,
                        uint32_t* place, uint64_t* weight, int size) {
  const __m512i limit = _mm512_set1_epi64(static_cast<int64_t>(capacity));
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  for (int i = begin; i < end; i += 8) {
    const __m512i w = _mm512_loadu_si512(integer + i);
    const __mmask8 valid = end - i < 8 ? (1 << (end - i)) - 1 : 0xFF;
    const __mmask8 chosen = kHeavy ? _mm512_mask_cmpge_epu64_mask(valid, w, limit)
                                   : _mm512_mask_cmplt_epu64_mask(valid, w, limit);
    _mm512_storeu_si512(weight + size, _mm512_maskz_compress_epi64(chosen, w));
    store_as(place + size,
             _mm256_maskz_compress_epi32(chosen, _mm256_add_epi32(lanes, _mm256_set1_epi32(i))));
    size += __builtin_popcount(chosen);
  }
  return size;
}
#elif defined(__AVX2__) && FASTIS_VECTOR_BYTES == 32
// By the mask of the chosen among four lanes: their numbers, and the same for pairs of half lanes.
struct Packing {
  int32_t lanes[16][4], halves[16][8];

  constexpr Packing() : lanes(), halves() {
    for (int mask = 0; mask < 16; ++mask) {
      for (int lane = 0, size = 0; lane < 4; ++lane) {
        if ((mask >> lane & 1) == 0) continue;
        lanes[mask][size] = lane;
        halves[mask][2 * size] = 2 * lane;
        halves[mask][2 * size + 1] = 2 * lane + 1;
        ++size;
      }
    }
  }
};
alignas(64) inline constexpr Packing kPacking;

template <bool kHeavy>
inline int select_items(const uint64_t* integer, int begin, int end, uint64_t capacity,
                        uint32_t* place, uint64_t* weight, int size) {
  const __m256i limit = _mm256_set1_epi64x(static_cast<int64_t>(capacity));
  for (int i = begin; i < end; i += 4) {
    const __m256i w = load_as<__m256i>(integer + i);
    int chosen = _mm256_movemask_pd((__m256d)_mm256_cmpgt_epi64(limit, w));
    if (kHeavy) chosen ^= 15;
    if (end - i < 4) chosen &= (1 << (end - i)) - 1;
    store_as(weight + size,
             _mm256_permutevar8x32_epi32(w, load_as<__m256i>(kPacking.halves[chosen])));
    store_as(place + size,
             _mm_add_epi32(load_as<__m128i>(kPacking.lanes[chosen]), _mm_set1_epi32(i)));
    size += __builtin_popcount(chosen);
  }
  return size;
}
#else
template <bool kHeavy>
inline int select_items(const uint64_t* integer, int begin, int end, uint64_t capacity,
                        uint32_t* place, uint64_t* weight, int size) {
  for (int i = begin; i < end; ++i) {
    place[size] = static_cast<uint32_t>(i);
    weight[size] = integer[i];
    size += (integer[i] >= capacity) == kHeavy;
  }
  return size;
}
#endif

// The light or the heavy items of one block, and how far the merge has come in them.
template <bool kHeavy>
class Side {
 public:
  int size = 0, at = 0;
  int64_t base;    // index of the block's first item
  int64_t next;    // block to read after this one
  uint64_t total;  // 1 + D or S at the end of the block
  alignas(64) uint32_t place[kBlock + kPadding];
  alignas(64) uint64_t weight[kBlock + kPadding];  // of heavy items 1 + S_(j-1) + weight
  alignas(64) float coefficient[kBlock + kPadding];

  Side(int64_t block, uint64_t before) : next(block), total(1 + before) { sums_[0] = 0; }

  // 1 + D_i of light items, 1 + S_j of heavy ones. Item -1 is there for the merge that runs
  // backwards: no other sum is as low.
  uint64_t sum(int item) const { return sums_[item + 1]; }
  const uint64_t* sums() const { return sums_ + 1; }
  int64_t index(int item) const { return base + place[item]; }

  // On to the next block that has such items; false: there is none.
  bool advance(const Job& job, const Before* before) {
    size = at = 0;
    while (size == 0 && next < job.blocks) {
      if (before == nullptr || before->has<kHeavy>(job, next)) select(job, next);
      ++next;
    }
    return size > 0;
  }

  // Stands for a light item after the last, which no heavy item reaches.
  void finish() {
    at = 0;
    size = 1;
    sums_[1] = total;
  }

 private:
  void select(const Job& job, int64_t block) {
    alignas(64) uint64_t integer[kBlock + kPadding];
    const int count = job.size(block), border = job.larger(block);
    const uint64_t capacity = job.buckets.capacity;
    base = block * kBlock;
    read(job.weights, base, count, integer);
    const int before_border =
        select_items<kHeavy>(integer, 0, border, capacity + 1, place, weight, 0);
    size = select_items<kHeavy>(integer, border, count, capacity, place, weight, before_border);
    for (int i = 0; i < size; i += kWords) {
      const Vec<double> w = to_double(load_as<Words>(weight + i));
      store_as(coefficient + i, narrow(job.total / (job.n * w)));
    }
    add_up(0, before_border, capacity + 1);
    add_up(before_border, size, capacity);
  }

  void add_up(int begin, int end, uint64_t capacity) {
    uint64_t running = total;
    for (int i = begin; i < end; ++i) {
      const uint64_t before = running;
      running += kHeavy ? weight[i] - capacity : capacity - weight[i];
      sums_[i + 1] = kHeavy ? running : before;
      if (kHeavy) weight[i] += before;
    }
    total = running;
  }

  uint64_t sums_[1 + kBlock + kPadding];
};

}  // namespace fastis::FASTIS_ISA
