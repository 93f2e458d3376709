// The device's tree: adding to it, filling it, and recomputing weights from the state.
#pragma once

#include "device/device_table.h"
#include "device/grid.h"
#include "weights.h"

namespace fastis::device {

FASTIS_HD inline int exponent_of_table(const Table& t) {
  return static_cast<int>(t.scalars->exponent);
}

// Adds `delta` (modulo 2^64) to every node above record `index`.
FASTIS_HD inline void add_to_sums(const DeviceTable& t, int64_t index, uint64_t delta) {
  for (int level = 0; level < t.levels.depth; ++level) {
    atomic_add(t.sums + t.levels.first[level] + Levels::above(index, level), delta);
  }
}

FASTIS_HD inline void count_seen(const DeviceTable& t, int64_t index) {
  for (int level = 0; level < t.levels.depth; ++level) {
    atomic_add(t.unseen + t.levels.first[level] + Levels::above(index, level), ~0u);
  }
}

struct Largest {
  int64_t seen = 0, code = 0;
  FASTIS_HD Largest operator+(const Largest& o) const {
    return {seen + o.seen, code > o.code ? code : o.code};
  }
};

struct Sum {
  uint64_t value = 0;
  FASTIS_HD Sum operator+(const Sum& o) const { return {value + o.value}; }
};

// Codes, e0 and totals anew from the state, with the floor at the present mean: rescale() of
// csrc/cpu/structure.cpp. O(N); `found` and `next` of the scalars hold partial results.
template <class Grid>
FASTIS_HD void rescale(Grid& grid, const DeviceTable& t) {
  Scalars& s = *t.scalars;
  const auto importance = [&t](int64_t i) {
    return importance_of(t.records[i].mean, t.records[i].var, t.importance);
  };
  grid.leader([&](auto& block) {
    block.once([&] { s.valid = s.seen = s.reserved[kOutside] = s.reserved[kFound] = 0; });
  });
  grid.template reduce<Largest>(
      t.num_samples,
      [&](int64_t i) -> Largest {
        if (t.records[i].last < 0) return {};
        return {1, static_cast<int64_t>(code_of(importance(i), 0))};
      },
      [&](const Largest& largest) {
        atomic_add(&s.seen, largest.seen);
        atomic_max(&s.reserved[kFound], largest.code);
      });
  if (s.seen == 0) return;
  const uint32_t largest = static_cast<uint32_t>(s.reserved[kFound]);
  const int spare = 62 - 16 - ceil_log2(static_cast<uint64_t>(t.num_samples));
  grid.leader([&](auto& block) { block.once([&] { s.reserved[kNext] = 0; }); });
  grid.template reduce<Sum>(
      t.num_samples,
      [&](int64_t i) -> Sum {
        if (t.records[i].last < 0) return {};
        const uint32_t code = code_of(importance(i), 0);
        const int below = exponent_of(largest) - exponent_of(code);
        return {below > 62 ? 0 : (mantissa_of(code) << spare) >> below};
      },
      [&](const Sum& sum) { atomic_add(&s.reserved[kNext], static_cast<int64_t>(sum.value)); });
  const float floor = floor_of(static_cast<uint64_t>(s.reserved[kNext]), s.seen,
                               exponent_of(largest) - spare, t.floor);
  const int exponent = exponent_for(floor, t.headroom);
  grid.leader([&](auto& block) {
    block.once([&] {
      s.exponent = exponent;
      s.total = 0;
    });
  });
  grid.template reduce<Sum>(
      t.num_samples,
      [&](int64_t i) -> Sum {
        if (t.records[i].last < 0) return {};
        t.records[i].code = code_of(importance(i), floor);
        return {weight_of(t.records[i].code, exponent)};
      },
      [&](const Sum& sum) { atomic_add(&s.total, static_cast<int64_t>(sum.value)); });
}

// Fills the tree from the codes; no item is heavy afterwards. O(N).
template <class Grid>
FASTIS_HD void rebuild(Grid& grid, const DeviceTable& t) {
  const int e0 = exponent_of_table(t);
  grid.each(t.levels.size[0], [&](int64_t node) {
    uint64_t weight = 0;
    uint32_t unseen = 0;
    for (int64_t i = node * kLeaf; i < (node + 1) * kLeaf && i < t.num_samples; ++i) {
      Record& record = t.records[i];
      record.code &= ~kCappedFlag;
      weight += light_weight(record.code, e0);
      unseen += record.last < 0;
    }
    t.sums[node] = weight;
    t.unseen[node] = unseen;
  });
  for (int level = 1; level < t.levels.depth; ++level) {
    const int64_t below = t.levels.first[level - 1], size = t.levels.size[level - 1];
    grid.each(t.levels.size[level], [&](int64_t node) {
      uint64_t weight = 0;
      uint32_t unseen = 0;
      for (int64_t child = node * kRadix; child < (node + 1) * kRadix && child < size; ++child) {
        weight += t.sums[below + child];
        unseen += t.unseen[below + child];
      }
      t.sums[t.levels.first[level] + node] = weight;
      t.unseen[t.levels.first[level] + node] = unseen;
    });
  }
  grid.leader([&](auto& block) {
    block.once([&] {
      Scalars& s = *t.scalars;
      s.light = s.total;
      s.num_capped = 0;
      s.theta = kNoCap;
      s.offset = 0;
      s.ceiling = kNoCap;
      s.valid = 1;
    });
  });
}

}  // namespace fastis::device
