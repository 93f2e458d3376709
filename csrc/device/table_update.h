// The update on the device: scores of a minibatch into the state, the tree and the variance traces.
// Of the positions that hold the same sample the first one wins: it is the least that claims it.
#pragma once

#include "device/tree.h"
#include "variance.h"

namespace fastis::device {

// What the items of a block change besides their own states and nodes; what seldom changes is
// added one by one.
struct Tally {
  uint64_t total = 0, uncapped = 0;
  int64_t seen = 0, ceiling = 0, capped_floor = kNoFloor;
  FASTIS_HD Tally operator+(const Tally& o) const {
    return {total + o.total, uncapped + o.uncapped, seen + o.seen,
            ceiling > o.ceiling ? ceiling : o.ceiling,
            capped_floor < o.capped_floor ? capped_floor : o.capped_floor};
  }
};

FASTIS_HD inline bool in_table(const Table& t, int64_t index) {
  return static_cast<uint64_t>(index) < static_cast<uint64_t>(t.num_samples);
}

FASTIS_HD inline void claim(const DeviceTable& t, const Observation& o, int32_t now, int64_t b) {
  const int64_t index = o.indices[b];
  if (!in_table(t, index)) return;
  const int32_t last = t.states[index].last;
  if (last == kExcluded) return;
  if (!usable(o.observed[b])) {
    atomic_add(&t.scalars->skipped, int64_t{1});
    return;
  }
  if (last == kUnseen || interval(now, last) > 0) {
    atomic_min(t.claims + index, static_cast<uint32_t>(b));
  }
}

// An item's new weight in the tree, on the side of theta where it belongs.
FASTIS_HD inline void move_weight(const DeviceTable& t, int64_t index, const State& old,
                                  uint64_t weight, bool is_capped, Tally& tally) {
  const bool was_capped = (old.code & kCappedFlag) != 0;
  const uint64_t before = uncapped_weight(old.code, exponent_of_table(t));
  tally.uncapped = (is_capped ? 0 : weight) - before;
  if (tally.uncapped != 0) add_above(t, t.sums, index, tally.uncapped);
  if (old.last == kUnseen) add_above(t, t.unseen, index, ~0u);
  if (is_capped != was_capped) {
    add_above(t, t.capped, index, is_capped ? 1u : ~0u);
    atomic_add(&t.scalars->num_capped, int64_t{is_capped} - int64_t{was_capped});
  }
  (is_capped ? tally.capped_floor : tally.ceiling) = static_cast<int64_t>(weight);
}

// The winner gives the claim back; a loser then finds another's position or none, never its own.
FASTIS_HD inline Tally apply(const DeviceTable& t, const Observation& o, const UpdateParameters& p,
                             int64_t b) {
  Tally tally;
  const int64_t index = o.indices[b];
  if (!in_table(t, index)) return tally;
  if (load_relaxed(t.claims + index) != static_cast<uint32_t>(b)) return tally;
  store_relaxed(t.claims + index, kUnclaimed);
  const float x = o.observed[b];
  const State old = t.states[index];
  const bool fresh = old.last == kUnseen, anew = fresh || t.tau < 0;
  State state{anew ? x : old.mean, anew ? 0.0f : old.var, p.now, 0};
  observe(state.mean, state.var, x, static_cast<float>(fresh ? 1 : interval(p.now, old.last)),
          p.tau);
  state.code = code_of(importance_of(state.mean, state.var, t.importance), p.floor);
  const int shift = exponent_of(state.code) - p.exponent;
  if (shift < 0 || shift > p.max_shift) {
    t.states[index] = state;
    atomic_add(&t.work->rescale.outside, int64_t{1});  // the table will be rescaled from its state
    return tally;
  }
  const uint64_t weight = weight_of(state.code, p.exponent);
  tally.total = weight - uncapped_weight(old.code & ~kCappedFlag, p.exponent);
  tally.seen = fresh;
  const bool is_capped = weight > p.theta;
  if (p.valid) move_weight(t, index, old, weight, is_capped, tally);
  if (is_capped) state.code |= kCappedFlag;
  t.states[index] = state;
  return tally;
}

// Sums over a minibatch, for its moments, and how many scores are unusable.
struct Products {
  double second = 0, uniform = 0, first = 0, mean_squared = 0, unusable = 0;
  FASTIS_HD Products operator+(const Products& o) const {
    return {second + o.second, uniform + o.uniform, first + o.first, mean_squared + o.mean_squared,
            unusable + o.unusable};
  }
};

FASTIS_HD inline Products products_of(const Observation& o, int64_t i) {
  Products p;
  if (i < o.n && o.weights != nullptr) {
    const double score = o.score[i], first = double(o.weights[i]) * score;
    p = {first * first, first * score, first, 0, 0};
  }
  if (i < o.n) p.unusable = usable(o.observed[i]) ? 0.0 : 1.0;
  if (i < o.num_classes) p.mean_squared = double(o.mean_grad[i]) * double(o.mean_grad[i]);
  return p;
}

// On the first thread of a block that is not needed elsewhere.
template <class Grid>
FASTIS_HD Products add_products(Grid& grid, const Observation& o) {
  Products sum;
  grid.aside([&](auto& block) {
    block.template reduce<Products>(
        o.n > o.num_classes ? o.n : o.num_classes, [&](int64_t i) { return products_of(o, i); },
        [&](const Products& all) { sum = all; });
  });
  return sum;
}

// The end of an iteration of the clock of updates, on the thread that has the products. Nobody
// waits for it: a dozen divisions, one after the other.
FASTIS_HD inline void finish_update(const Table& t, const Observation& o, const Products& p) {
  const double n = static_cast<double>(o.n), first = p.first / n;
  // In a table with states claim() has counted them.
  if (t.states == nullptr) t.scalars->skipped += static_cast<int64_t>(p.unusable);
  if (o.weights == nullptr) return;
  if (t.keeps_moments) {
    smooth(t, {p.second / n, p.uniform / n, first * first, p.mean_squared}, n);
  }
  ++t.scalars->updates;
}

template <class Grid>
FASTIS_HD void update_states(Grid& grid, const DeviceTable& t, const Observation& o) {
  Scalars& s = *t.scalars;
  const UpdateParameters p(t, o.n);
  grid.each(o.n, [&](int64_t b) { claim(t, o, p.now, b); });
  grid.wait();  // all claims are there before the first winner is found
  grid.template reduce<Tally>(
      o.n, [&](int64_t b) { return apply(t, o, p, b); },
      [&](const Tally& tally) {
        atomic_add(&s.total, static_cast<int64_t>(tally.total));
        atomic_add(&s.uncapped, static_cast<int64_t>(tally.uncapped));
        atomic_add(&s.seen, tally.seen);
        atomic_max(&s.ceiling, tally.ceiling);
        atomic_min(&s.capped_floor, tally.capped_floor);
      });
  grid.wait();  // all sums and totals are complete
  if (t.work->rescale.outside != 0 || exceeds_limit(t)) rescale(grid, t);
}

// Indices out of range are left out.
template <class Grid>
FASTIS_HD void update(Grid& grid, const DeviceTable& t, const Observation& o) {
  const Products products = add_products(grid, o);
  if (t.states != nullptr) update_states(grid, t, o);
  grid.once([&] { finish_update(t, o, products); });
}

}  // namespace fastis::device
