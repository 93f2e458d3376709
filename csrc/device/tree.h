// The device's tree: adding to it, visiting what lies around the cap, filling it, and recomputing
// weights from the state.
#pragma once

#include "device/device_table.h"
#include "device/grid.h"
#include "code.h"

namespace fastis::device {

FASTIS_HD inline int exponent_of_table(const Table& t) {
  return static_cast<int>(t.scalars->exponent);
}

// Adds `delta` (modulo 2^32 or 2^64) to every node above record `index`.
template <class T>
FASTIS_HD inline void add_above(const DeviceTable& t, T* nodes, int64_t index, T delta) {
  for (int level = 0; level < t.levels.depth; ++level) {
    atomic_add(nodes + t.levels.first[level] + Levels::above(index, level), delta);
  }
}

// The four records of a leaf; those beyond the last sample are unseen and never counted as such.
FASTIS_HD inline void read_leaf(const DeviceTable& t, int64_t leaf, Record (&records)[kLeaf]) {
  for (int j = 0; j < kLeaf; ++j) records[j] = t.records[leaf * kLeaf + j];
}

// f(index, weight, whether capped) for the seen items below a node that are capped or weigh more
// than `watched`. A node that has none of the former and weighs no more has none of either.
template <class F>
FASTIS_HD void visit(const DeviceTable& t, int top, int64_t root, uint64_t watched, const F& f) {
  const int e0 = exponent_of_table(t);
  int level = top;
  int64_t node = root;
  do {
    const int64_t at = t.levels.first[level] + node;
    const bool wanted = t.sums[at] > watched || t.capped[at] > 0;
    if (wanted && level > 0) {
      --level;
      node *= kRadix;
      continue;
    }
    if (wanted) {
      Record records[kLeaf];
      read_leaf(t, node, records);
      for (int j = 0; j < kLeaf; ++j) {
        const bool is_capped = (records[j].code & kCappedFlag) != 0;
        const uint64_t weight = light_weight(records[j].code & ~kCappedFlag, e0);
        if (is_capped || weight > watched) f(node * kLeaf + j, weight, is_capped);
      }
    }
    for (; level < top && node % kRadix == kRadix - 1; ++level) node /= kRadix;
    ++node;
  } while (level < top);
}

struct Unseen {
  uint64_t number, weight;  // how many; the mean of the seen, 0 if there are none unseen

  FASTIS_HD explicit Unseen(const Table& t)
      : number(static_cast<uint64_t>(t.num_samples - t.scalars->seen)), weight(0) {
    const Scalars& s = *t.scalars;
    if (number > 0) {
      weight = s.seen == 0 ? kUniformWeight
                           : Divisor(static_cast<uint64_t>(s.seen)).divide(uint64_t(s.total));
    }
  }
};

// exceeds_limit() of table.h, by a product.
FASTIS_HD inline bool exceeds_limit(const DeviceTable& t, const Unseen& unseen) {
  const Scalars& s = *t.scalars;
  if (s.total > t.total_limit) return true;
  if (s.seen == 0) return false;
  const uint64_t room = static_cast<uint64_t>(t.total_limit - s.total);
  return mulhi(unseen.number, unseen.weight) != 0 || unseen.number * unseen.weight > room;
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
// csrc/cpu/tree.cpp. O(N).
template <class Grid>
FASTIS_COLD void rescale(Grid& grid, const DeviceTable& t) {
  Scalars& s = *t.scalars;
  Work& work = *t.work;
  const auto importance = [&t](int64_t i) {
    return importance_of(t.records[i].mean, t.records[i].var, t.importance);
  };
  grid.once([&] { work.seen = work.largest = work.sum = work.total = 0; });
  grid.wait();  // ... and until every block has read why it rescales
  grid.template reduce<Largest>(
      t.num_samples,
      [&](int64_t i) -> Largest {
        if (t.records[i].last < 0) return {};
        return {1, static_cast<int64_t>(code_of(importance(i), 0))};
      },
      [&](const Largest& largest) {
        atomic_add(&work.seen, largest.seen);
        atomic_max(&work.largest, largest.code);
      });
  grid.wait();
  const int64_t seen = work.seen;
  int exponent = exponent_of_table(t);
  if (seen > 0) {
    const uint32_t largest = static_cast<uint32_t>(work.largest);
    // The mean, in integers relative to the largest weight: the same on every backend.
    const int spare = 62 - 16 - ceil_log2(static_cast<uint64_t>(t.num_samples));
    grid.template reduce<Sum>(
        t.num_samples,
        [&](int64_t i) -> Sum {
          if (t.records[i].last < 0) return {};
          const uint32_t code = code_of(importance(i), 0);
          const int below = exponent_of(largest) - exponent_of(code);
          return {below > 62 ? 0 : (mantissa_of(code) << spare) >> below};
        },
        [&](const Sum& sum) { atomic_add(&work.sum, static_cast<int64_t>(sum.value)); });
    grid.wait();
    const float floor =
        floor_of(static_cast<uint64_t>(work.sum), seen, exponent_of(largest) - spare, t.floor);
    exponent = exponent_for(floor, t.headroom);
    grid.template reduce<Sum>(
        t.num_samples,
        [&](int64_t i) -> Sum {
          if (t.records[i].last < 0) return {};
          t.records[i].code = code_of(importance(i), floor);
          return {weight_of(t.records[i].code, exponent)};
        },
        [&](const Sum& sum) { atomic_add(&work.total, static_cast<int64_t>(sum.value)); });
    grid.wait();
  }
  grid.once([&] {
    s.valid = work.outside = 0;
    s.seen = seen;
    s.exponent = exponent;
    if (seen > 0) s.total = work.total;
  });
  grid.wait();  // for a draw in the same launch
}

// Fills the tree from the codes; no item is capped afterwards. O(N).
template <class Grid>
FASTIS_COLD void rebuild(Grid& grid, const DeviceTable& t) {
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
    t.capped[node] = 0;
  });
  for (int level = 1; level < t.levels.depth; ++level) {
    grid.wait();
    const int64_t first = t.levels.first[level], below = t.levels.first[level - 1];
    const int64_t size = t.levels.size[level - 1];
    grid.each(t.levels.size[level], [&](int64_t node) {
      uint64_t weight = 0;
      uint32_t unseen = 0;
      for (int64_t child = node * kRadix; child < (node + 1) * kRadix && child < size; ++child) {
        weight += t.sums[below + child];
        unseen += t.unseen[below + child];
      }
      t.sums[first + node] = weight;
      t.unseen[first + node] = unseen;
      t.capped[first + node] = 0;
    });
  }
  grid.once([&] {
    Scalars& s = *t.scalars;
    s.light = s.total;
    s.num_capped = 0;
    s.theta = kNoCap;
    s.ceiling = kNoCap;
    s.capped_floor = kNoFloor;
    s.valid = 1;
  });
  grid.wait();
}

}  // namespace fastis::device
