// The update on the device: scores of a minibatch into the state, the tree and the variance traces.
// Of the positions that hold the same sample the first one wins: it is the least that claims it.
#pragma once

#include "device/tree.h"
#include "variance.h"

namespace fastis::device {

struct Minibatch {
  const int64_t* indices;  // [n]
  const float* observed;   // [n]
  const float* weights;    // [n]
  const float* score;      // [n]
  int64_t n;
  const float* mean_grad;  // [C]
  int64_t num_classes;
};

// What the items of a block change besides their own records and nodes.
struct Tally {
  uint64_t total = 0, light = 0;
  int64_t seen = 0, skipped = 0, outside = 0, ceiling = 0;
  FASTIS_HD Tally operator+(const Tally& o) const {
    return {total + o.total,     light + o.light,     seen + o.seen,
            skipped + o.skipped, outside | o.outside, ceiling > o.ceiling ? ceiling : o.ceiling};
  }
};

FASTIS_HD inline bool in_table(const Table& t, int64_t index) {
  return static_cast<uint64_t>(index) < static_cast<uint64_t>(t.num_samples);
}

struct Clock {
  int32_t now;
  float tau, floor;
  int exponent, max_shift;
};

FASTIS_HD inline Clock clock_of(const Table& t, int64_t n) {
  const Scalars& s = *t.scalars;
  const int exponent = exponent_of_table(t);
  return {clock_at(s.updates), tau_at(t, s.updates),
          floor_of(static_cast<uint64_t>(s.total), s.seen, exponent, t.floor), exponent,
          max_shift(n)};
}

FASTIS_HD inline void claim(const DeviceTable& t, const Minibatch& m, int32_t now, int64_t b) {
  const int64_t index = m.indices[b];
  if (in_table(t, index) && usable(m.observed[b]) && t.records[index].last != now) {
    atomic_min(t.claims + index, static_cast<uint32_t>(b));
  }
}

// The winner gives the claim back; a loser then finds another's position or none, never its own.
FASTIS_HD inline Tally apply(const DeviceTable& t, const Minibatch& m, const Clock& clock,
                             bool valid, int64_t b) {
  Tally tally;
  const int64_t index = m.indices[b];
  if (!in_table(t, index)) return tally;
  const float x = m.observed[b];
  if (!usable(x)) {
    tally.skipped = 1;
    return tally;
  }
  if (t.claims[index] != static_cast<uint32_t>(b)) return tally;
  t.claims[index] = kUnclaimed;
  const Record old = t.records[index];
  const bool fresh = old.last < 0, anew = fresh || t.tau < 0;
  Record record{anew ? x : old.mean, anew ? 0.0f : old.var, clock.now, 0};
  observe(record.mean, record.var, x, static_cast<float>(fresh ? 1 : age(old.last, clock.now)),
          clock.tau);
  const uint32_t code = code_of(importance_of(record.mean, record.var, t.importance), clock.floor);
  record.code = code | (old.code & kCappedFlag);
  t.records[index] = record;
  const int shift = exponent_of(code) - clock.exponent;
  if (shift < 0 || shift > clock.max_shift) {
    tally.outside = 1;  // the table will be rescaled from its state
    return tally;
  }
  const uint64_t weight = weight_of(code, clock.exponent);
  const uint64_t delta = weight - light_weight(old.code & ~kCappedFlag, clock.exponent);
  tally.total = delta;
  tally.seen = fresh;
  if (!valid || (old.code & kCappedFlag)) return tally;
  tally.light = delta;
  tally.ceiling = static_cast<int64_t>(weight);
  add_to_sums(t, index, delta);
  if (fresh) count_seen(t, index);
  return tally;
}

template <class Block>
FASTIS_HD void update_variance(Block& block, const Table& t, const Minibatch& m) {
  const auto product = [&m](int64_t b) { return double(m.weights[b]) * double(m.score[b]); };
  const double n = static_cast<double>(m.n);
  const double A = block.sum(m.n, [&](int64_t b) { return product(b) * product(b); }) / n;
  const double U = block.sum(m.n, [&](int64_t b) { return product(b) * double(m.score[b]); }) / n;
  const double O = block.sum(m.n, product) / n;
  const double G2 = block.sum(
      m.num_classes, [&](int64_t c) { return double(m.mean_grad[c]) * double(m.mean_grad[c]); });
  // With records, the tally of the observations has counted them.
  const double unusable = t.records != nullptr ? 0.0 : block.sum(m.n, [&](int64_t b) {
    return usable(m.observed[b]) ? 0.0 : 1.0;
  });
  block.once([&] {
    t.scalars->skipped += static_cast<int64_t>(unusable);
    smooth(t, {A, U, O * O, G2}, n);
  });
}

// One iteration of the clock of updates. Indices out of range are left out.
template <class Grid>
FASTIS_HD void update(Grid& grid, const DeviceTable& t, const Minibatch& m) {
  Scalars& s = *t.scalars;
  if (t.records != nullptr) {
    const Clock clock = clock_of(t, m.n);
    const bool valid = s.valid != 0;
    grid.each(m.n, [&](int64_t b) { claim(t, m, clock.now, b); });
    grid.template reduce<Tally>(
        m.n, [&](int64_t b) { return apply(t, m, clock, valid, b); },
        [&](const Tally& tally) {
          atomic_add(&s.total, static_cast<int64_t>(tally.total));
          atomic_add(&s.light, static_cast<int64_t>(tally.light));
          atomic_add(&s.seen, tally.seen);
          atomic_add(&s.skipped, tally.skipped);
          atomic_add(&s.reserved[kOutside], tally.outside);
          atomic_max(&s.ceiling, tally.ceiling);
        });
    const bool must_rescale = s.reserved[kOutside] != 0 || exceeds_limit(t);
    if (must_rescale) {
      grid.wait();  // until every thread has read the above
      rescale(grid, t);
    }
  }
  grid.leader([&](auto& block) {
    update_variance(block, t, m);
    block.once([&] { ++s.updates; });
  });
}

}  // namespace fastis::device
