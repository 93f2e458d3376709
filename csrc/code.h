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

// The largest code whose weight is at most `weight`; below 2^15, which all codes weigh at least,
// one that all are above.
FASTIS_HD inline uint32_t code_below(uint64_t weight, int e0) {
  int shift = 0;
  if (weight < 0x8000u) return (static_cast<uint32_t>(e0 + 127) << 23) - 1;
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

// What a table's shard is a part of besides: the sum of the importances there, and of how many
// samples. Zeros for a table on its own.
struct Others {
  double sum;
  int64_t number;
};

// The least importance of an item, eps times the mean of all, and what e0 is chosen by, which is at
// least eps times the mean that the shard's own items then have. One number for a table on its own.
struct Floors {
  float wanted, base;
};

// `total` and `seen` are the shard's own, in units of 2^(e0 - 15).
FASTIS_HD inline Floors floors_of(uint64_t total, int64_t seen, int e0, double eps,
                                  const Others& others) {
  const double sum = static_cast<double>(total) * two_to(e0 - 15);
  const int64_t all = seen + others.number;
  const double own = seen > 0 ? sum / static_cast<double>(seen) * eps : 0.0;
  const double wanted = all > 0 ? (sum + others.sum) / static_cast<double>(all) * eps : 0.0;
  return {static_cast<float>(wanted), static_cast<float>(wanted > own ? own + eps * wanted : own)};
}

// The floor of new codes under an e0 in force. Far below the shard's own mean it gives way to what
// e0 can express; when that mean itself has fallen below it, the next code asks for another e0.
FASTIS_HD inline float floor_above(const Floors& floors, int e0) {
  const float least = static_cast<float>(two_to(e0));
  const float allowed = least < floors.base ? least : floors.base;
  return floors.wanted > allowed ? floors.wanted : allowed;
}

}  // namespace fastis
