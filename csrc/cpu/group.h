// The 16 nodes of a group, stored as where each begins: 0, w0, w0 + w1, ... (16 x 8 bytes, two
// cache lines). All values stay below 2^63, so that signed comparisons serve.
#pragma once

#include "cpu/simd.h"
#include "table.h"

namespace fastis::FASTIS_ISA {

typedef int64_t Starts __attribute__((vector_size(FASTIS_VECTOR_BYTES)));
constexpr int kStarts = FASTIS_VECTOR_BYTES / 8;

// The node that point x falls into: the last of those that begin at or below it.
inline int find_in_group(const uint64_t* starts, uint64_t x) {
#if defined(__AVX512F__) && FASTIS_VECTOR_BYTES == 64
  const __m512i point = _mm512_set1_epi64(static_cast<int64_t>(x));
  const unsigned low = _mm512_cmple_epi64_mask(_mm512_loadu_si512(starts), point);
  const unsigned high = _mm512_cmple_epi64_mask(_mm512_loadu_si512(starts + 8), point);
  return __builtin_popcount(low | high << 8) - 1;
#elif defined(__AVX2__) && FASTIS_VECTOR_BYTES == 32
  const __m256i point = _mm256_set1_epi64x(static_cast<int64_t>(x));
  const auto beyond = [&](int j) {
    return _mm256_cmpgt_epi64(load_as<__m256i>(starts + j), point);
  };
  const __m256i low = _mm256_packs_epi32(beyond(0), beyond(4));
  const __m256i high = _mm256_packs_epi32(beyond(8), beyond(12));
  const int bytes = _mm256_movemask_epi8(_mm256_packs_epi16(low, high));  // 2 a node, shuffled
  return kRadix - 1 - __builtin_popcount(static_cast<unsigned>(bytes)) / 2;
#else
  int at_or_below = 0;
  for (int j = 0; j < kRadix; ++j) at_or_below += starts[j] <= x;
  return at_or_below - 1;
#endif
}

// Adds `delta` to node `child`: every node after it begins that much later.
inline void add_in_group(uint64_t* starts, int64_t child, uint64_t delta) {
  alignas(64) static constexpr int64_t kRamp[2 * kRadix] = {
      0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,
      -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};
  const int64_t* after = kRamp + (kRadix - 1 - child);
  const Starts added = Starts{} + static_cast<int64_t>(delta);
  for (int j = 0; j < kRadix; j += kStarts) {
    store_as(starts + j, load_as<Starts>(starts + j) + (load_as<Starts>(after + j) & added));
  }
}

// Bit j: node j weighs more than `threshold`. `total`: the whole group.
inline unsigned heavier_in_group(const uint64_t* starts, uint64_t total, uint64_t threshold) {
  unsigned found = 0;
  for (int j = 0; j + 1 < kRadix; ++j) {
    found |= static_cast<unsigned>(starts[j + 1] - starts[j] > threshold) << j;
  }
  return found | static_cast<unsigned>(total - starts[kRadix - 1] > threshold) << (kRadix - 1);
}

}  // namespace fastis::FASTIS_ISA
