// Flattening and rescaling: the arithmetic that host and device share.
//
// Flattening by "cap" draws items with min(W, theta). theta is the root of
//   g(theta) = sum of min(W, theta) - theta B / D
// over all items (math: water filling), which is concave, so that it is the one point but 0 where g
// is 0. At any time the items flagged as capped are exactly the seen ones above scalars.theta, and
// Newton's step from there is the water level of what is capped and what is not. A step from the
// root or above never passes it, so the levels fall until one follows from itself; a step from
// below may shoot far beyond it. How theta is moved is the backend's: cpu/update_cap.cpp flips the
// items that a step passes, one by one; device/update_cap.h tries levels with all threads and then
// moves items.
#pragma once

#include "code.h"
#include "device/grid.h"
#include "layout.h"

namespace fastis {

// The unseen items, before flattening.
struct Unseen {
  uint64_t number, weight;  // how many; the mean of the seen, 0 if there are none unseen

  FASTIS_HD explicit Unseen(const Table& t)
      : number(static_cast<uint64_t>(active(t) - t.scalars->seen)), weight(0) {
    const Scalars& s = *t.scalars;
    if (number > 0) {
      weight = s.seen == 0 ? kUniformWeight
                           : Divisor(static_cast<uint64_t>(s.seen)).divide(uint64_t(s.total));
    }
  }
};

// The largest weight with which `capped` items, beside a rest of weight `rest`, have B p <= D each:
// floor(D rest / (B - capped D)). 0 if so many can't all be at the cap.
FASTIS_HD inline uint64_t water_level(const Table& t, uint64_t rest, uint64_t capped) {
  if (capped > t.max_capped) return 0;
  const uint64_t numerator = t.cap_numerator, most = static_cast<uint64_t>(kNoCap);
  const Divisor divisor(t.batch.value * t.cap_denominator - capped * numerator);
  const uint64_t quotient = divisor.divide(rest), remainder = rest - quotient * divisor.value;
  if (quotient >= t.theta_quotient) return most;
  const uint64_t level = numerator * quotient + divisor.divide(numerator * remainder);
  return level < most ? level : most;
}

// ... with the unseen items, all of one weight, on the side of `theta` where they belong.
FASTIS_HD inline uint64_t water_level(const Table& t, uint64_t uncapped, uint64_t capped,
                                      const Unseen& unseen, uint64_t theta) {
  return unseen.weight > theta ? water_level(t, uncapped, capped + unseen.number)
                               : water_level(t, uncapped + unseen.number * unseen.weight, capped);
}

// Flattening by "mix": the least constant c with B (peak + c) <= D (total + N c), N being the
// active items, more than max_alike. Below 0: of so few a draw can't take the sum, and they are
// drawn alike.
FASTIS_HD inline int64_t mix_offset(const Table& t, uint64_t peak, uint64_t total) {
  const __int128 batch = static_cast<__int128>(t.batch_size) * t.cap_denominator;
  const __int128 over = batch * peak - static_cast<__int128>(t.cap_numerator) * total;
  if (over <= 0) return 0;
  const __int128 divisor = static_cast<__int128>(t.cap_numerator) * active(t) - batch;
  const __int128 offset = (over + divisor - 1) / divisor;
  const bool fits = offset < kNoCap && total + offset * active(t) < kNoCap;
  return fits ? static_cast<int64_t>(offset) : -1;
}

// Is the sum of all weights, those of the unseen included, more than the draw can take?
FASTIS_HD inline bool exceeds_limit(const Table& t) {
  const Scalars& s = *t.scalars;
  if (s.total > t.total_limit) return true;
  if (s.seen == 0) return false;
  const Unseen unseen(t);
  return mulhi(unseen.number, unseen.weight) != 0 ||
         unseen.number * unseen.weight > static_cast<uint64_t>(t.total_limit - s.total);
}

// What a rescale adds up, and why there is one.
struct Rescale {
  int64_t outside;  // new weights beyond the range of e0
  int64_t seen, largest, sum, total;
};

struct SeenCodes {
  int64_t number = 0, largest = 0;
  FASTIS_HD SeenCodes operator+(const SeenCodes& o) const {
    return {number + o.number, largest > o.largest ? largest : o.largest};
  }
};

struct Sum {
  uint64_t value = 0;
  FASTIS_HD Sum operator+(const Sum& o) const { return {value + o.value}; }
};

// Codes without a floor; how many are seen, and the largest.
template <class Grid>
FASTIS_HD void code_states(Grid& grid, const Table& t, Rescale& found) {
  grid.template reduce<SeenCodes>(
      t.num_samples,
      [&](int64_t i) -> SeenCodes {
        State& state = t.states[i];
        if (state.last < 0) return {};
        state.code = code_of(importance_of(state.mean, state.var, t.importance), 0);
        return {1, static_cast<int64_t>(state.code)};
      },
      [&](const SeenCodes& codes) {
        device::atomic_add(&found.seen, codes.number);
        device::atomic_max(&found.largest, codes.largest);
      });
  grid.wait();
}

// The floors, from a mean in integers relative to the largest weight: the same on every backend.
template <class Grid>
FASTIS_HD Floors floors_of_states(Grid& grid, const Table& t, Rescale& found) {
  const int largest = exponent_of(static_cast<uint32_t>(found.largest));
  const int spare = 62 - 16 - ceil_log2(static_cast<uint64_t>(t.num_samples));
  grid.template reduce<Sum>(
      t.num_samples,
      [&](int64_t i) -> Sum {
        const State& state = t.states[i];
        const int below = largest - exponent_of(state.code);
        if (state.last < 0 || below > 62) return {};
        return {(mantissa_of(state.code) << spare) >> below};
      },
      [&](const Sum& sum) { device::atomic_add(&found.sum, static_cast<int64_t>(sum.value)); });
  grid.wait();
  return floors_of(static_cast<uint64_t>(found.sum), found.seen, largest - spare, t.floor,
                   t.scalars->others);
}

// Raises codes to `least`; the sum of the integer weights.
template <class Grid>
FASTIS_HD void raise_codes(Grid& grid, const Table& t, Rescale& found, uint32_t least,
                           int exponent) {
  grid.template reduce<Sum>(
      t.num_samples,
      [&](int64_t i) -> Sum {
        State& state = t.states[i];
        if (state.last < 0) return {};
        if (state.code < least) state.code = least;
        return {weight_of(state.code, exponent)};
      },
      [&](const Sum& sum) { device::atomic_add(&found.total, static_cast<int64_t>(sum.value)); });
  grid.wait();
}

// Codes, e0 and totals anew from the states, with the floor at the present mean. O(N).
template <class Grid>
FASTIS_COLD void rescale(Grid& grid, const Table& t, Rescale& found) {
  Scalars& s = *t.scalars;
  grid.once([&] { found.seen = found.largest = found.sum = found.total = 0; });
  grid.wait();  // ... and until every block has read why it rescales
  code_states(grid, t, found);
  int exponent = exponent_of_table(t);
  if (found.seen > 0) {
    const Floors floors = floors_of_states(grid, t, found);
    // `headroom` below the floor's exponent, so that the mean may fall by that many powers of two
    // (and rise by about as many) before the next rescale.
    exponent = exponent_of(code_of(floors.base, 0)) - t.headroom;
    // Rounding keeps the order: the floor may come after it.
    const float least = static_cast<float>(two_to(exponent));
    raise_codes(grid, t, found, code_of(floors.wanted, least), exponent);
  }
  grid.once([&] {
    s.valid = found.outside = 0;
    s.seen = found.seen;
    s.exponent = exponent;
    if (found.seen > 0) s.total = found.total;
  });
  grid.wait();  // for a draw in the same launch
}

}  // namespace fastis
