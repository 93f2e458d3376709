// The variance traces from minibatch moments (Kutsuna 2025, Proposition 4.1), for host and device.
#pragma once

#include <cmath>

#include "layout.h"

namespace fastis {

FASTIS_HD inline bool finite(double x) { return x - x == 0; }

// Of one minibatch: A = E[r^2 x^2], U = E[r x^2], O^2 = E[r x]^2, |G|^2 (math: variance traces).
struct Moments {
  double second, uniform, first_squared, mean_squared;
};

// Traces, effective minibatch size, efficiency, factor and gain from the smoothed moments.
FASTIS_HD inline void derive(const Table& t, double n) {
  Variance& v = *t.variance;
  const double A = v.second / v.weight, U = v.uniform / v.weight;
  const double O2 = v.first_squared / v.weight, G2 = v.mean_squared / v.weight;
  const double bessel = n / (n - 1);
  const double mu2 = t.unbiased ? (n * G2 - A) / (n - 1) : G2;
  v.trace_is = t.unbiased ? bessel * (A - G2) : A - G2;
  v.trace_uniform = U - mu2;
  v.trace_optimal = t.unbiased ? bessel * (O2 - G2) : O2 - G2;
  v.effective_batch_size = n * v.trace_uniform / v.trace_is;
  const double o2 = t.unbiased ? (n * O2 - A) / (n - 1) : O2;
  const double gap = U - o2;
  v.efficiency = gap > 0 ? (A - o2) / gap : static_cast<double>(NAN);
  const double factor = v.effective_batch_size / n;
  const double signal = n * (mu2 > 0 ? mu2 : 0);
  const double gain = (signal + v.trace_uniform) / (signal + v.trace_is);
  // Not for minibatches without replacement.
  const Scalars& s = *t.scalars;
  const bool adjust = s.updates >= t.warmup_draws && !without_replacement(t, s.draws - 1);
  v.factor = adjust && finite(factor) && factor > 0 ? factor : 1.0;
  v.gain = adjust && finite(gain) && gain > 0 ? gain : 1.0;
}

// The averages are those of this many time constants at least when anything is decided by them.
constexpr double kSettled = 0.95;      // 1 - exp(-3)
constexpr double kResumeAbove = 1.05;  // times the least gain: not to and fro

// Stops importance sampling where the gain is too small, and goes on where it would be large enough
// if S were as it was: uniform minibatches show tr V_uni and tr V_opt alone. From the draw after
// the next on, whether that one has begun or not.
FASTIS_HD inline void pause_or_resume(const Table& t, double n) {
  Variance& v = *t.variance;
  Scalars& s = *t.scalars;
  if (!(t.least_gain > 0) || v.weight < kSettled || s.updates < t.warmup_draws) return;
  if (s.draws - 1 >= s.uniform_from) return;  // the user wants it so
  const bool paused = v.paused_efficiency >= 0;
  if (paused) {
    const double G2 = v.mean_squared / v.weight, A = v.second / v.weight;
    const double mu2 = t.unbiased ? (n * G2 - A) / (n - 1) : G2;
    const double signal = n * (mu2 > 0 ? mu2 : 0);
    const double trace =
        v.trace_optimal + v.paused_efficiency * (v.trace_uniform - v.trace_optimal);
    const double gain = (signal + v.trace_uniform) / (signal + trace);
    if (!(gain > kResumeAbove * t.least_gain)) return;
    v.paused_efficiency = -1;
  } else {
    if (!(v.gain < t.least_gain)) return;
    // Above 0.9, or not defined: it may not be so bad later.
    const double efficiency = v.efficiency < 0.9 ? v.efficiency : 0.9;
    v.paused_efficiency = efficiency > 0 ? efficiency : 0;
  }
  s.pause = static_cast<int64_t>((static_cast<uint64_t>(s.draws) + 1) * 2 + !paused);
  v.weight = v.second = v.uniform = v.first_squared = v.mean_squared = 0;  // another distribution
}

// Takes the moments of a minibatch of n into the moving averages, unless one is not finite.
// Averages are smoothed before any ratio is formed.
FASTIS_HD inline void smooth(const Table& t, const Moments& m, double n) {
  Variance& v = *t.variance;
  if (!finite(m.second + m.uniform + m.first_squared + m.mean_squared)) return;
  if (t.scalars->updates == t.warmup_draws) {  // another distribution from here on
    v.weight = v.second = v.uniform = v.first_squared = v.mean_squared = 0;
  }
  const double keep = t.smoothing, add = 1 - keep;
  v.weight = keep * v.weight + add;
  v.second = keep * v.second + add * m.second;
  v.uniform = keep * v.uniform + add * m.uniform;
  v.first_squared = keep * v.first_squared + add * m.first_squared;
  v.mean_squared = keep * v.mean_squared + add * m.mean_squared;
  derive(t, n);
  pause_or_resume(t, n);
}

}  // namespace fastis
