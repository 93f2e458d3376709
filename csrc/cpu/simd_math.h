// exp and log1p on vectors. Float: polynomials with the coefficients of Cephes (expf, logf), within
// 2 ulp on the ranges used here. Double: the C library, lane by lane.
#pragma once

#include <cmath>

#include "simd.h"

namespace fastis::FASTIS_ISA {

// exp(x) = poly * 2^n; the low bits of `biased` are n + 127. The polynomial is summed in pairs: a
// scheduler holds few of its steps.
struct ExpParts {
  Vec<float> poly;
  Simd<float>::Bits biased;
};

inline ExpParts exp_parts(Vec<float> x) {
  constexpr float kRound = 12583039.0f;  // 1.5 * 2^23 + 127: the last bits are an integer
  const Vec<float> shifted = fma<float>(x, splat(1.44269504088896341f), splat(kRound));
  const Vec<float> n = shifted - kRound;
#ifdef __FMA__
  const Vec<float> r = fma<float>(n, splat(-0.693147182464599609375f), x);  // off by 2e-9 n
#else
  const Vec<float> r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
#endif
  const Vec<float> r2 = r * r;
  const Vec<float> a = fma<float>(r, splat(1.9875691500e-4f), splat(1.3981999507e-3f));
  const Vec<float> b = fma<float>(r, splat(8.3334519073e-3f), splat(4.1665795894e-2f));
  const Vec<float> c = fma<float>(r, splat(1.6666665459e-1f), splat(5.0000001201e-1f));
  const Vec<float> p = fma<float>(fma<float>(a, r2, b), r2, c);
  return {fma<float>(p, r2, r) + 1.0f, bit_cast<Simd<float>::Bits>(shifted)};
}

// exp of x <= 0 (or NaN) for terms of a sum that has a term 1: below -87.7 it is 0.
inline Vec<float> exp_term(Vec<float> x) {
  // At the bound n is -127 and the factor's bits are those of 0; a NaN passes max as second
  // operand.
  const ExpParts parts = exp_parts(max<float>(splat(-88.0f), x));
  // A product, not an addition to the exponent: a NaN must come out as one.
  return parts.poly * bit_cast<Vec<float>>(parts.biased << 23);
}

// exp of x <= 0 (or NaN) down to the smallest subnormal: a margin of 88 is exp(-88) = 6e-39.
inline Vec<float> exp_full(Vec<float> x) {
  x = select<float>(x < -105.0f, splat(-105.0f), x);
  const ExpParts parts = exp_parts(x);
  const auto n = bit_cast<Mask<float>>(parts.biased - 0x4b40007fu);
  const auto half = n >> 1;
  const auto power = [](Mask<float> k) { return bit_cast<Vec<float>>((k + 127) << 23); };
  return parts.poly * power(half) * power(n - half);
}

// log(1 + y) for y >= 0 (or NaN), right to the last ulps for tiny y too; `inverse` is 1 / (1 + y)
// to a few ulps, for what 1 + y rounds away.
inline Vec<float> log1p(Vec<float> y, Vec<float> inverse) {
  const Vec<float> w = 1.0f + y;
  const Vec<float> lost = (y - (w - 1.0f)) * inverse;
  const auto bits = bit_cast<Mask<float>>(w);
  // Mantissa in [sqrt(1/2), sqrt(2)).
  const auto exponent = (bits - 0x3f3504f3) >> 23;
  const Vec<float> e = __builtin_convertvector(exponent, Vec<float>);
  const Vec<float> f = bit_cast<Vec<float>>(bits - (exponent << 23)) - 1.0f;
  const Vec<float> g = f * f;
  Vec<float> even = fma<float>(g, splat(7.0376836292e-2f), splat(1.1676998740e-1f));
  Vec<float> odd = fma<float>(g, splat(-1.1514610310e-1f), splat(-1.2420140846e-1f));
  even = fma<float>(g, even, splat(1.4249322787e-1f));
  odd = fma<float>(g, odd, splat(-1.6668057665e-1f));
  even = fma<float>(g, even, splat(2.0000714765e-1f));
  odd = fma<float>(g, odd, splat(-2.4999993993e-1f));
  even = fma<float>(g, even, splat(3.3333331174e-1f));
  const Vec<float> p = fma<float>(f, odd, even);
  const Vec<float> small = fma<float>(p * f, g, fma<float>(e, splat(-2.12194440e-4f), lost));
  return fma<float>(e, splat(0.693359375f), f + fma<float>(g, splat(-0.5f), small));
}

inline Vec<double> exp_full(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}
inline Vec<double> exp_term(Vec<double> x) { return exp_full(x); }
inline Vec<double> log1p(Vec<double> x, Vec<double>) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::log1p(x[i]);
  return x;
}

}  // namespace fastis::FASTIS_ISA
