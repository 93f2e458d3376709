// exp and log1p on vectors. Float: polynomials with the coefficients of Cephes (expf, logf), within
// 2 ulp on the ranges used here. Double: the C library, lane by lane.
#pragma once

#include <cmath>

#include "simd.h"

namespace fastis::FASTIS_ISA {

// exp(x) = poly * 2^n.
struct ExpParts {
  Vec<float> poly;
  Simd<float>::Bits n;
};

inline ExpParts exp_parts(Vec<float> x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: its last bits are the integer
  const Vec<float> shifted = fma<float>(x, splat(1.44269504088896341f), splat(kRound));
  const Vec<float> n = shifted - kRound;
  Vec<float> r = fma<float>(n, splat(-0.693359375f), x);
  r = fma<float>(n, splat(2.12194440e-4f), r);
  Vec<float> p = splat(1.9875691500e-4f);
  p = fma<float>(p, r, splat(1.3981999507e-3f));
  p = fma<float>(p, r, splat(8.3334519073e-3f));
  p = fma<float>(p, r, splat(4.1665795894e-2f));
  p = fma<float>(p, r, splat(1.6666665459e-1f));
  p = fma<float>(p, r, splat(5.0000001201e-1f));
  p = fma<float>(p, r * r, r) + 1.0f;
  return {p, bit_cast<Simd<float>::Bits>(shifted)};
}

// exp of x <= 0 (or NaN) for terms of a sum that has a term 1: below -87 it is 0.
inline Vec<float> exp_term(Vec<float> x) {
  const ExpParts parts = exp_parts(x);
  // A product, not an addition to the exponent: a NaN must come out as one.
  const Vec<float> e = parts.poly * bit_cast<Vec<float>>((parts.n + 127u) << 23);
  return bit_cast<Vec<float>>(bit_cast<Simd<float>::Bits>(e) &
                              ~bit_cast<Simd<float>::Bits>(x < -87.0f));
}

// exp of x <= 0 (or NaN) down to the smallest subnormal: a margin of 88 is exp(-88) = 6e-39.
inline Vec<float> exp_full(Vec<float> x) {
  x = select<float>(x < -105.0f, splat(-105.0f), x);
  const ExpParts parts = exp_parts(x);
  const auto n = bit_cast<Mask<float>>(parts.n - 0x4b400000u);
  const auto half = n >> 1;
  const auto power = [](Mask<float> k) { return bit_cast<Vec<float>>((k + 127) << 23); };
  return parts.poly * power(half) * power(n - half);
}

// log(1 + y) for y >= 0 (or NaN), right to the last ulps for tiny y too.
inline Vec<float> log1p(Vec<float> y) {
  const Vec<float> w = 1.0f + y;
  const Vec<float> lost = (y - (w - 1.0f)) / w;
  const auto bits = bit_cast<Mask<float>>(w);
  // Mantissa in [sqrt(1/2), sqrt(2)).
  const auto exponent = (bits - 0x3f3504f3) >> 23;
  const Vec<float> e = __builtin_convertvector(exponent, Vec<float>);
  const Vec<float> f = bit_cast<Vec<float>>(bits - (exponent << 23)) - 1.0f;
  Vec<float> p = splat(7.0376836292e-2f);
  p = fma<float>(p, f, splat(-1.1514610310e-1f));
  p = fma<float>(p, f, splat(1.1676998740e-1f));
  p = fma<float>(p, f, splat(-1.2420140846e-1f));
  p = fma<float>(p, f, splat(1.4249322787e-1f));
  p = fma<float>(p, f, splat(-1.6668057665e-1f));
  p = fma<float>(p, f, splat(2.0000714765e-1f));
  p = fma<float>(p, f, splat(-2.4999993993e-1f));
  p = fma<float>(p, f, splat(3.3333331174e-1f));
  const Vec<float> f2 = f * f;
  Vec<float> small = fma<float>(p * f, f2, e * -2.12194440e-4f);
  small = fma<float>(f2, splat(-0.5f), small) + lost;
  return fma<float>(e, splat(0.693359375f), f + small);
}

inline Vec<double> exp_full(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}
inline Vec<double> exp_term(Vec<double> x) { return exp_full(x); }
inline Vec<double> log1p(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::log1p(x[i]);
  return x;
}

}  // namespace fastis::FASTIS_ISA
