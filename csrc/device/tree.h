// The device's tree: adding to it, visiting what lies around the cap, and filling it.
#pragma once

#include "code.h"
#include "device/device_table.h"
#include "device/grid.h"

namespace fastis::device {

// Adds `delta` (modulo 2^32 or 2^64) to every node above sample `index`.
template <class T>
FASTIS_HD inline void add_above(const DeviceTable& t, T* nodes, int64_t index, T delta) {
  for (int level = 0; level < t.levels.depth; ++level) {
    atomic_add(nodes + t.levels.first[level] + Levels::above(index, level), delta);
  }
}

// The four states of a leaf; those beyond the last sample are unseen and never counted as such.
FASTIS_HD inline void read_leaf(const DeviceTable& t, int64_t leaf, State (&states)[kLeaf]) {
  for (int j = 0; j < kLeaf; ++j) states[j] = t.states[leaf * kLeaf + j];
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
      State states[kLeaf];
      read_leaf(t, node, states);
      for (int j = 0; j < kLeaf; ++j) {
        const bool is_capped = (states[j].code & kCappedFlag) != 0;
        const uint64_t weight = uncapped_weight(states[j].code & ~kCappedFlag, e0);
        if (is_capped || weight > watched) f(node * kLeaf + j, weight, is_capped);
      }
    }
    for (; level < top && node % kRadix == kRadix - 1; ++level) node /= kRadix;
    ++node;
  } while (level < top);
}

template <class Grid>
FASTIS_HD void rescale(Grid& grid, const DeviceTable& t) {
  fastis::rescale(grid, t, t.work->rescale);
}

// Fills the tree from the codes; no item is capped afterwards. O(N).
template <class Grid>
FASTIS_COLD void rebuild(Grid& grid, const DeviceTable& t) {
  const int e0 = exponent_of_table(t);
  grid.each(t.levels.size[0], [&](int64_t node) {
    uint64_t weight = 0;
    uint32_t unseen = 0, excluded = 0;
    for (int64_t i = node * kLeaf; i < (node + 1) * kLeaf && i < t.num_samples; ++i) {
      State& state = t.states[i];
      state.code &= ~kCappedFlag;
      weight += uncapped_weight(state.code, e0);
      unseen += state.last == kUnseen;
      excluded += state.last == kExcluded;
    }
    t.sums[node] = weight;
    t.unseen[node] = unseen;
    t.excluded[node] = excluded;
    t.capped[node] = 0;
  });
  for (int level = 1; level < t.levels.depth; ++level) {
    grid.wait();
    const int64_t first = t.levels.first[level], below = t.levels.first[level - 1];
    grid.each(t.levels.size[level], [&](int64_t node) {
      uint64_t weight = 0;
      uint32_t unseen = 0, excluded = 0;
      for (int64_t child = node * kRadix; child < (node + 1) * kRadix; ++child) {
        weight += t.sums[below + child];  // 0 beyond the last
        unseen += t.unseen[below + child];
        excluded += t.excluded[below + child];
      }
      t.sums[first + node] = weight;
      t.unseen[first + node] = unseen;
      t.excluded[first + node] = excluded;
      t.capped[first + node] = 0;
    });
  }
  grid.once([&] {
    Scalars& s = *t.scalars;
    s.uncapped = s.total;
    s.num_capped = 0;
    s.theta = s.ceiling = kNoCap;
    s.capped_floor = kNoFloor;
    s.valid = 1;
  });
  grid.wait();
}

template <class Grid>
FASTIS_HD void ensure_tree(Grid& grid, const DeviceTable& t) {
  if (t.scalars->valid) return;
  grid.wait();  // until every block has read that
  rebuild(grid, t);
}

}  // namespace fastis::device
