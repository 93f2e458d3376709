// The state of one sample and its update: mean and variance of the score as exponential moving
// averages at irregular intervals (Kutsuna 2025, Algorithm 1; Finch 2009; Eckner 2019).
//
// Every operation here is a single IEEE operation in a fixed order: no fma, no library exponential.
// Build without contraction and fast-math, and equal scores give equal bits on every backend.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "philox.h"

namespace fastis {

// 16 bytes, so that a touched sample is one cache line. `code` belongs to code.h; its top bit
// marks a capped item.
struct alignas(16) State {
  float mean, var;
  int32_t last;  // iteration of the last observation, modulo 2^31; or kUnseen, or kExcluded
  uint32_t code;
};
static_assert(sizeof(State) == 16);

// Of samples without a score; all else in their states is 0. Excluded ones are never drawn: the
// others are active.
constexpr int32_t kUnseen = -1, kExcluded = -2;

enum class Importance : int { rms = 0, sum = 1 };

// Scores from here on count as non-finite: their squares would leave float32.
constexpr float kLargestScore = 1152921504606846976.0f;  // 2^60

FASTIS_HD inline bool usable(float score) {
  return score > -kLargestScore && score < kLargestScore;  // false for NaN
}

FASTIS_HD inline float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

FASTIS_HD inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

struct Decay {
  float alpha, one_minus_alpha;
};

// alpha = exp(-y) and 1 - alpha = -expm1(-y), both to a few ulp, for y >= 0.
FASTIS_HD inline Decay decay(float y) {
  y = y < 80.0f ? y : 80.0f;
  const int k = static_cast<int>(y * 1.44269504f + 0.5f);
  const float kf = static_cast<float>(k);
  const float r = (kf * 0.693359375f - y) + kf * -2.12194440e-4f;
  float p = r * 1.98412698e-4f + 1.38888889e-3f;
  p = p * r + 8.33333333e-3f;
  p = p * r + 4.16666667e-2f;
  p = p * r + 1.66666667e-1f;
  p = p * r + 0.5f;
  p = p * (r * r) + r;  // expm1(r)
  const float two_to_minus_k = bits_to_float(static_cast<uint32_t>(127 - k) << 23);
  const float scaled = two_to_minus_k * p;
  return {two_to_minus_k + scaled, (1.0f - two_to_minus_k) - scaled};
}

// Mean and variance after observing x, `dt` iterations after the last observation.
FASTIS_HD inline void observe(float& mean, float& var, float x, float dt, float tau) {
  const Decay a = decay(dt / tau);
  const float d = x - mean;
  mean = mean + a.one_minus_alpha * d;
  var = a.alpha * (var + a.one_minus_alpha * d * d);
}

// The unfloored importance: sqrt(m^2 + v) or m + sqrt(v). In double: m^2 must not underflow.
FASTIS_HD inline float importance_of(float mean, float var, Importance kind) {
  const double m = mean, v = var;
  return static_cast<float>(kind == Importance::rms ? sqrt(m * m + v) : m + sqrt(v));
}

}  // namespace fastis
