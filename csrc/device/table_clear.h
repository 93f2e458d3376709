// Samples that lose their score on the device, and are unseen or excluded from then on. Of the
// positions that hold the same sample the first one does it, as in an update.
#pragma once

#include "device/table_update.h"

namespace fastis::device {

// What the items of a block change besides their own states and nodes.
struct Cleared {
  uint64_t total = 0, uncapped = 0;
  int64_t seen = 0, excluded = 0, capped = 0;
  FASTIS_HD Cleared operator+(const Cleared& o) const {
    return {total + o.total, uncapped + o.uncapped, seen + o.seen, excluded + o.excluded,
            capped + o.capped};
  }
};

// One item more (or less, modulo 2^32) of its kind in the nodes above it.
FASTIS_HD inline void count(const DeviceTable& t, int64_t index, int32_t last, uint32_t one) {
  if (last == kUnseen) add_above(t, t.unseen, index, one);
  if (last == kExcluded) add_above(t, t.excluded, index, one);
}

FASTIS_HD inline Cleared clear_one(const DeviceTable& t, int64_t index, int32_t last, int64_t k) {
  if (!in_table(t, index)) return {};
  if (load_relaxed(t.claims + index) != static_cast<uint32_t>(k)) return {};
  store_relaxed(t.claims + index, kUnclaimed);
  const State old = t.states[index];
  const bool was_capped = (old.code & kCappedFlag) != 0;
  const int e0 = exponent_of_table(t);
  Cleared tally;
  tally.total = 0 - weight_of(old.code & ~kCappedFlag, e0);
  tally.uncapped = 0 - uncapped_weight(old.code, e0);
  tally.seen = -int64_t{old.last >= 0};
  tally.excluded = int64_t{last == kExcluded} - int64_t{old.last == kExcluded};
  tally.capped = -int64_t{was_capped};
  t.states[index] = State{0, 0, last, 0};
  if (!t.scalars->valid) return tally;
  if (tally.uncapped != 0) add_above(t, t.sums, index, tally.uncapped);
  if (was_capped) add_above(t, t.capped, index, ~0u);
  count(t, index, old.last, ~0u);
  count(t, index, last, 1);
  return tally;
}

// `last` is kUnseen or kExcluded. Indices out of range are left out.
template <class Grid>
FASTIS_HD void clear(Grid& grid, const DeviceTable& t, const int64_t* indices, int64_t n,
                     int32_t last) {
  Scalars& s = *t.scalars;
  const bool had_seen = s.seen > 0;
  grid.each(n, [&](int64_t k) {
    const int64_t index = indices[k];
    if (in_table(t, index) && t.states[index].last != last) {
      atomic_min(t.claims + index, static_cast<uint32_t>(k));
    }
  });
  grid.wait();  // all claims are there before the first winner is found
  grid.template reduce<Cleared>(
      n, [&](int64_t k) { return clear_one(t, indices[k], last, k); },
      [&](const Cleared& tally) {
        atomic_add(&s.total, static_cast<int64_t>(tally.total));
        atomic_add(&s.uncapped, static_cast<int64_t>(tally.uncapped));
        atomic_add(&s.seen, tally.seen);
        atomic_add(&s.excluded, tally.excluded);
        atomic_add(&s.num_capped, tally.capped);
      });
  grid.wait();                    // all sums and totals are complete
  if (had_seen && s.seen == 0) {  // as in the beginning
    grid.once([&] {
      s.exponent = kNoExponent;
      s.total = s.valid = 0;
    });
  } else if (exceeds_limit(t)) {
    rescale(grid, t);
  }
}

}  // namespace fastis::device
