// The 16 children of a node, stored as where each begins: 0, w0, w0 + w1, ... Sums are 16 x 8 bytes
// (two cache lines), counts 16 x 4 bytes (one). All sums stay below 2^63, so that signed
// comparisons serve.
#pragma once

#include "cpu/simd.h"
#include "layout.h"

namespace fastis::FASTIS_ISA {

typedef int64_t Sums __attribute__((vector_size(FASTIS_VECTOR_BYTES)));
constexpr int kSums = FASTIS_VECTOR_BYTES / 8;

// The child that point x falls into: the last of those that begin at or below it.
inline int find_in_node(const uint64_t* starts, uint64_t x) {
#if defined(__AVX2__) && FASTIS_VECTOR_BYTES >= 32
  // Also with AVX-512, whose comparisons go through 8-bit masks: GCC 12 reloads a spilled one as 32
  // bits at -O1 -fsanitize=undefined, and the same pattern may meet the same fault elsewhere.
  const __m256i point = _mm256_set1_epi64x(static_cast<int64_t>(x));
  const auto beyond = [&](int j) {
    return _mm256_cmpgt_epi64(load_as<__m256i>(starts + j), point);
  };
  const __m256i low = _mm256_packs_epi32(beyond(0), beyond(4));
  const __m256i high = _mm256_packs_epi32(beyond(8), beyond(12));
  const int bytes = _mm256_movemask_epi8(_mm256_packs_epi16(low, high));  // 2 a child, shuffled
  return kRadix - 1 - __builtin_popcount(static_cast<unsigned>(bytes)) / 2;
#else
  int at_or_below = 0;
  for (int j = 0; j < kRadix; ++j) at_or_below += starts[j] <= x;
  return at_or_below - 1;
#endif
}

inline int find_in_node(const uint32_t* starts, uint32_t x) {
  int at_or_below = 0;
  for (int j = 0; j < kRadix; ++j) at_or_below += starts[j] <= x;
  return at_or_below - 1;
}

// Adds `delta` to child number `child`: every child after it begins that much later.
inline void add_in_node(uint64_t* starts, int64_t child, uint64_t delta) {
  alignas(64) static constexpr int64_t kRamp[2 * kRadix] = {
      0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,
      -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};
  const int64_t* after = kRamp + (kRadix - 1 - child);
  const Sums added = Sums{} + static_cast<int64_t>(delta);
  for (int j = 0; j < kRadix; j += kSums) {
    store_as(starts + j, load_as<Sums>(starts + j) + (load_as<Sums>(after + j) & added));
  }
}

inline void add_in_node(uint32_t* starts, int64_t child, uint32_t delta) {
  for (int j = 0; j < kRadix; ++j) starts[j] += j > child ? delta : 0;
}

// Bit j: child j holds more than `threshold`. `total`: all children.
template <class T>
inline unsigned heavier_in_node(const T* starts, T total, T threshold) {
  unsigned found = 0;
  for (int j = 0; j + 1 < kRadix; ++j) {
    found |= static_cast<unsigned>(starts[j + 1] - starts[j] > threshold) << j;
  }
  return found | static_cast<unsigned>(total - starts[kRadix - 1] > threshold) << (kRadix - 1);
}

}  // namespace fastis::FASTIS_ISA
