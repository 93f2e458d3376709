// Integer weights. A weight is a code: the float32 bit pattern of the importance rounded half-even
// to 16 significant bits. Its integer is mantissa16 << (exponent - e0) with one e0 for the table,
// so sums are exact and independent of their order, and the probability reported is the one drawn.
#pragma once

#include <cstdint>

#include "state.h"

namespace fastis {

constexpr uint32_t kCappedFlag = 0x80000000u;
constexpr float kTiniest = 7.888609052210118e-31f;  // 2^-100: what a table of zero scores gets
constexpr int kNoExponent = -1000;                  // e0 of a table that has seen nothing
constexpr uint64_t kUniformWeight = 1u << 15;       // every item's weight in such a table

FASTIS_HD inline uint32_t code_of(float importance, float floor) {
  float w = importance > floor ? importance : floor;
  w = w > kTiniest ? w : kTiniest;
  const uint32_t bits = float_to_bits(w);
  return (bits + 0x7Fu + ((bits >> 8) & 1u)) & ~0xFFu;
}

FASTIS_HD inline int exponent_of(uint32_t code) {
  return static_cast<int>((code >> 23) & 0xFFu) - 127;
}

FASTIS_HD inline uint64_t mantissa_of(uint32_t code) { return ((code >> 8) & 0x7FFFu) | 0x8000u; }

// Needs e0 <= exponent_of(code); 0 for the code of an unseen sample.
FASTIS_HD inline uint64_t weight_of(uint32_t code, int e0) {
  return code == 0 ? 0 : mantissa_of(code) << (exponent_of(code) - e0);
}

// The largest code whose weight is at most `weight` (at least 2^15).
FASTIS_HD inline uint32_t code_below(uint64_t weight, int e0) {
  int shift = 0;
  while (weight >> shift > 0xFFFFu) ++shift;
  const int biased = e0 + shift + 127;
  return biased > 254 ? 0x7F7FFFFFu
                      : static_cast<uint32_t>(biased) << 23 |
                            static_cast<uint32_t>(weight >> shift & 0x7FFFu) << 8;
}

// The weight of an item that is neither capped nor unseen, else 0. No branch.
FASTIS_HD inline uint64_t uncapped_weight(uint32_t code, int e0) {
  const uint64_t weight = mantissa_of(code) << ((exponent_of(code) - e0) & 63);
  return static_cast<int32_t>(code) > 0 ? weight : 0;
}

FASTIS_HD inline int ceil_log2(uint64_t n) {
  int bits = 0;
  while (bits < 63 && (uint64_t{1} << bits) < n) ++bits;
  return bits;
}

// 2^exponent as a double, exact for the exponents of a table.
FASTIS_HD inline double two_to(int exponent) {
  const uint64_t bits = static_cast<uint64_t>(exponent + 1023) << 52;
  double value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// eps times the mean importance of the seen samples: total / seen in units of 2^(e0 - 15).
FASTIS_HD inline float floor_of(uint64_t total, int64_t seen, int e0, double eps) {
  if (seen == 0 || total == 0) return 0.0f;
  const double mean = static_cast<double>(total) / static_cast<double>(seen);
  return static_cast<float>(mean * two_to(e0 - 15) * eps);
}

}  // namespace fastis
