// The sampling structure on the CPU: a tree of integer sums over the records, 4 records a leaf and
// 16 nodes a group, with the items above the flattening cap ("heavy", at most ceil(B/D) - 1 of
// them) kept outside in a list. Bytes a sample: 16 for the record, 16/15 x (8 + 4)/4 = 3.2 for the
// nodes' starts. Bytes touched a level: an update 128 (shared by the whole minibatch where a level
// is small, 64 more for a new sample), a draw 128; and 64 of records each.
#pragma once

#include "cpu/group.h"
#include "table.h"

namespace fastis::FASTIS_ISA {

// Recomputes codes, e0 and totals from the state, with the floor at the present mean. O(N).
void rescale(const Table& table);

// Fills the tree from the codes; the heavy list is empty afterwards. O(N).
void rebuild(const Table& table);

// Brings the heavy list, theta and the weight of unseen items up to date: O((changes) log N).
void settle(const Table& table);

// Adds `delta` (modulo 2^64) to the nodes above record `index`, from level 0 to below level `end`.
inline void add_to_sums(const Table& table, int64_t index, uint64_t delta, int end) {
  for (int level = 0; level < end; ++level) {
    const int64_t node = Levels::above(index, level), child = node & (kRadix - 1);
    add_in_group(table.starts + table.levels.first[level] + (node - child), child, delta);
  }
}

// One unseen item less above record `index`.
void count_seen(const Table& table, int64_t index);

// What a minibatch adds to the levels that have fewer nodes than it has items: collected by node of
// the lowest of them, then spread over it and the levels above in one sweep.
class Spread {
 public:
  Spread(const Table& table, int64_t num_items);

  int level() const { return level_; }
  void add(int64_t index, uint64_t delta) { delta_[Levels::above(index, level_)] += delta; }
  void finish();

 private:
  static constexpr int64_t kMostNodes = 1024;

  const Table& table_;
  int level_ = 0;                        // the table's depth: no level is small enough
  uint64_t delta_[kMostNodes + kRadix];  // zeros to a multiple of kRadix
};

}  // namespace fastis::FASTIS_ISA
