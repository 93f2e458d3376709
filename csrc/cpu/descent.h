// The descents through the tree: from points below a total to the items that they fall into.
#pragma once

#include <algorithm>

#include "cpu/tree.h"

namespace fastis::FASTIS_ISA {

constexpr int kBlock = 64;

// What remains to be found for a block of draws: `x` counts from the first item below `node`.
struct Descent {
  int size = 0;
  int position[kBlock];
  uint64_t x[kBlock], weight[kBlock];
  int64_t node[kBlock];
};

// What has weights beside the seen, uncapped items that the prefix sums add up; or the weight of
// every active item is 1.
enum class Beside { nothing, unseen, unseen_and_offset, alike };

// before[j]: how many active items there are in the children before the j-th of `parent`.
inline void count_active(const Table& t, int level, int64_t parent, int64_t (&before)[kRadix]) {
  const int64_t span = int64_t{1} << (2 + 4 * level);
  const int64_t items = t.num_samples - parent * kRadix * span;
  for (int j = 0; j < kRadix; ++j) before[j] = j * span < items ? j * span : items;
  if (t.scalars->excluded == 0) return;
  const uint32_t* excluded = t.excluded_prefix + t.levels.first[level] + parent * kRadix;
  for (int j = 0; j < kRadix; ++j) before[j] -= excluded[j];
}

// The child of `parent` that x falls into; x is then counted from that child's beginning.
template <Beside beside>
int find_child(const Table& t, int level, int64_t parent, uint64_t& x) {
  const int64_t at = t.levels.first[level] + parent * kRadix;
  const uint64_t* prefix = t.prefix + at;
  alignas(64) uint64_t all[kRadix];
  if (beside == Beside::unseen || beside == Beside::unseen_and_offset) {
    const uint32_t* before = t.unseen_prefix + at;
    const uint64_t unseen = static_cast<uint64_t>(t.scalars->unseen);
    for (int j = 0; j < kRadix; ++j) all[j] = prefix[j] + before[j] * unseen;
    prefix = all;
  }
  if (beside == Beside::unseen_and_offset || beside == Beside::alike) {
    const bool alike = beside == Beside::alike;
    const int64_t offset = alike ? 1 : t.scalars->offset;
    int64_t before[kRadix];
    count_active(t, level, parent, before);
    for (int j = 0; j < kRadix; ++j) {
      all[j] = (alike ? 0 : all[j]) + static_cast<uint64_t>(before[j] * offset);
    }
    prefix = all;
  }
  const int child = find_in_node(prefix, x);
  x -= prefix[child];
  return child;
}

// The state of a leaf that x falls into, and its weight. States beyond the last weigh nothing
// that x could fall into.
template <Beside beside>
int64_t find_in_leaf(const Table& t, int64_t node, uint64_t x, uint64_t& weight) {
  const State* states = t.states + node * kLeaf;
  const int e0 = static_cast<int>(t.scalars->exponent);
  uint64_t weights[kLeaf];
  for (int j = 0; j < kLeaf; ++j) {
    const bool is_active = states[j].last != kExcluded;
    weights[j] = beside == Beside::alike ? is_active : uncapped_weight(states[j].code, e0);
    if (beside == Beside::nothing || beside == Beside::alike) continue;
    const uint64_t unseen = states[j].last == kUnseen ? t.scalars->unseen : 0;
    const uint64_t offset = is_active ? t.scalars->offset : 0;
    weights[j] += states[j].code & kCappedFlag ? 0 : unseen + offset;
  }
  const uint64_t second = weights[0], third = second + weights[1], fourth = third + weights[2];
  const int at = (x >= second) + (x >= third) + (x >= fourth);
  weight = weights[at];
  return node * kLeaf + at;
}

// Level by level for the whole block, so that the cache misses of its draws overlap.
template <Beside beside>
void descend(const Table& t, Descent& s) {
  std::fill_n(s.node, s.size, 0);
  for (int level = t.levels.depth - 1; level >= 0; --level) {
    const int64_t below = level > 0 ? t.levels.first[level - 1] : 0;
    for (int b = 0; b < s.size; ++b) {
      const int child = find_child<beside>(t, level, s.node[b], s.x[b]);
      const int64_t node = s.node[b] * kRadix + child;
      s.node[b] = node;
      if (level == 0) {
        __builtin_prefetch(t.states + node * kLeaf);
        continue;
      }
      const int64_t at = below + node * kRadix;
      if (beside == Beside::alike) {
        __builtin_prefetch(t.excluded_prefix + at);
        continue;
      }
      __builtin_prefetch(t.prefix + at);
      __builtin_prefetch(t.prefix + at + kRadix / 2);
      if (beside != Beside::nothing) __builtin_prefetch(t.unseen_prefix + at);
    }
  }
  for (int b = 0; b < s.size; ++b) {
    s.node[b] = find_in_leaf<beside>(t, s.node[b], s.x[b], s.weight[b]);
  }
}

// The same for capped items: x is the number of the item among them.
inline void descend_capped(const Table& t, Descent& s) {
  std::fill_n(s.node, s.size, 0);
  for (int level = t.levels.depth - 1; level >= 0; --level) {
    const int64_t below = level > 0 ? t.levels.first[level - 1] : 0;
    for (int b = 0; b < s.size; ++b) {
      const uint32_t* prefix = t.capped_prefix + t.levels.first[level] + s.node[b] * kRadix;
      const int child = find_in_node(prefix, static_cast<uint32_t>(s.x[b]));
      s.x[b] -= prefix[child];
      s.node[b] = s.node[b] * kRadix + child;
      __builtin_prefetch(
          level > 0 ? static_cast<const void*>(t.capped_prefix + below + s.node[b] * kRadix)
                    : t.states + s.node[b] * kLeaf);
    }
  }
  for (int b = 0; b < s.size; ++b) {
    const State* states = t.states + s.node[b] * kLeaf;
    int at = 0;
    for (uint64_t left = s.x[b]; at < kLeaf - 1; ++at) {
      if ((states[at].code & kCappedFlag) != 0 && left-- == 0) break;
    }
    s.node[b] = s.node[b] * kLeaf + at;
  }
}

}  // namespace fastis::FASTIS_ISA
