// The sum tree on the CPU: integer sums over the samples, 4 of them a leaf and 16 children a node.
// Three numbers a node: the weights of its seen items at or below theta, how many of its items are
// unseen, and how many are capped (above theta; these are drawn with weight theta each, and found
// by their number); and where items are excluded, how many of its items are. Bytes a sample: 16 for
// the state, 16/15 x (8 + 4 + 4)/4 = 4.3 for the nodes, 1.1 more with excluded items.
// Bytes touched a level: an update 128 (shared by the whole minibatch where a level is small, 64
// more for a new sample or one that crosses theta), a draw 128; and 64 of states each.
#pragma once

#include "cpu/simd.h"
#include "flatten.h"

namespace fastis::FASTIS_ISA {

// A node's 16 children, stored as prefix sums: 0, w0, w0 + w1, ... Sums are 16 x 8 bytes (two cache
// lines), counts 16 x 4 bytes (one). All sums stay below 2^63, so signed comparisons serve.
typedef int64_t Sums __attribute__((vector_size(FASTIS_VECTOR_BYTES)));
constexpr int kSums = FASTIS_VECTOR_BYTES / 8;

// The child that point x falls into: the last whose prefix sum is at most x.
inline int find_in_node(const uint64_t* prefix, uint64_t x) {
#if defined(__AVX2__) && FASTIS_VECTOR_BYTES >= 32
  // Also with AVX-512, whose comparisons go through 8-bit masks: GCC 12 reloads a spilled one as 32
  // bits at -O1 -fsanitize=undefined, and the same pattern may meet the same fault elsewhere.
  const __m256i point = _mm256_set1_epi64x(static_cast<int64_t>(x));
  const auto beyond = [&](int j) {
    return _mm256_cmpgt_epi64(load_as<__m256i>(prefix + j), point);
  };
  const __m256i low = _mm256_packs_epi32(beyond(0), beyond(4));
  const __m256i high = _mm256_packs_epi32(beyond(8), beyond(12));
  const int bytes = _mm256_movemask_epi8(_mm256_packs_epi16(low, high));  // 2 a child, shuffled
  return kRadix - 1 - __builtin_popcount(static_cast<unsigned>(bytes)) / 2;
#else
  int at_or_below = 0;
  for (int j = 0; j < kRadix; ++j) at_or_below += prefix[j] <= x;
  return at_or_below - 1;
#endif
}

inline int find_in_node(const uint32_t* prefix, uint32_t x) {
  int at_or_below = 0;
  for (int j = 0; j < kRadix; ++j) at_or_below += prefix[j] <= x;
  return at_or_below - 1;
}

// Adds `delta` to child number `child`: to the prefix sums of all children after it.
inline void add_in_node(uint64_t* prefix, int64_t child, uint64_t delta) {
  alignas(64) static constexpr int64_t kRamp[2 * kRadix] = {
      0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,
      -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};
  const int64_t* after = kRamp + (kRadix - 1 - child);
  const Sums added = Sums{} + static_cast<int64_t>(delta);
  for (int j = 0; j < kRadix; j += kSums) {
    store_as(prefix + j, load_as<Sums>(prefix + j) + (load_as<Sums>(after + j) & added));
  }
}

inline void add_in_node(uint32_t* prefix, int64_t child, uint32_t delta) {
  for (int j = 0; j < kRadix; ++j) prefix[j] += j > child ? delta : 0;
}

// Bit j: child j holds more than `threshold`. `total`: the sum of all children.
template <class T>
inline unsigned children_above(const T* prefix, T total, T threshold) {
  unsigned found = 0;
  for (int j = 0; j + 1 < kRadix; ++j) {
    found |= static_cast<unsigned>(prefix[j + 1] - prefix[j] > threshold) << j;
  }
  return found | static_cast<unsigned>(total - prefix[kRadix - 1] > threshold) << (kRadix - 1);
}

// Recomputes codes, e0 and totals from the state, with the floor at the present mean. O(N).
void rescale(const Table& table);

// Fills the tree from the codes, with theta where it belongs (a shard's: as the scalars have it).
// O(N).
void rebuild(const Table& table);

// Brings a shard's tree up to date for capped items that weigh theta.
void hold_theta(const Table& table, uint64_t theta);

// Brings theta, what is capped and the weight of unseen items up to date: O((changes) log N).
void update_cap(const Table& table);

// theta as it follows from all codes (flattening by "cap"). O(N).
uint64_t find_theta(const Table& table);

// Adds `delta` (modulo 2^64) to the nodes above sample `index`, from level 0 to below level `end`.
inline void add_to_sums(const Table& t, int64_t index, uint64_t delta, int end) {
  for (int level = 0; level < end; ++level) {
    const int64_t node = Levels::above(index, level), child = node & (kRadix - 1);
    add_in_node(t.prefix + t.levels.first[level] + (node - child), child, delta);
  }
}

// Adds `delta` (modulo 2^32) to the counts above sample `index`.
inline void add_to_counts(const Table& t, uint32_t* prefix, int64_t index, uint32_t delta) {
  for (int level = 0; level < t.levels.depth; ++level) {
    const int64_t node = Levels::above(index, level), child = node & (kRadix - 1);
    add_in_node(prefix + t.levels.first[level] + (node - child), child, delta);
  }
}

// The items that may cross theta soon: all seen ones whose weight is in (near_low, near_high] of
// the scalars, and perhaps others. near_size < 0: the list is not up to date.
inline bool is_near(const Scalars& s, uint64_t weight) {
  return weight > static_cast<uint64_t>(s.near_low) && weight <= static_cast<uint64_t>(s.near_high);
}

inline void add_near(const Table& t, int64_t index) {
  Scalars& s = *t.scalars;
  if (s.near_size == t.near_capacity) s.near_size = -1;
  if (s.near_size >= 0) t.near[s.near_size++] = index;
}

// Item `index` has become capped, or is no longer. Where there are seldom more capped items than
// draws, they are listed too; num_flipped of the scalars tells how many changes the list waits for,
// or < 0 when it must be made anew.
inline void count_capped(const Table& t, int64_t index, bool capped) {
  Scalars& s = *t.scalars;
  add_to_counts(t, t.capped_prefix, index, capped ? 1 : ~0u);
  s.num_capped += capped ? 1 : -1;
  if (s.num_flipped == t.list_capacity) s.num_flipped = -1;
  if (s.num_flipped >= 0) t.flipped[s.num_flipped++] = index;
}

// Calls visit(index) for the states of every leaf below the children of `parent` that holds more
// than `threshold`; false when a visit returned false and the rest was left out. `total`: of the
// parent. `threshold` may rise on the way. Of a node that holds no more no item does, so that at
// most total / threshold nodes of a level are entered.
template <class T, class Visit>
bool visit_above(const Table& t, const T* all_prefix, int level, int64_t parent, T total,
                 const T& threshold, const Visit& visit) {
  const T* prefix = all_prefix + t.levels.first[level] + parent * kRadix;
  for (unsigned left = children_above<T>(prefix, total, threshold); left != 0; left &= left - 1) {
    const int child = __builtin_ctz(left);
    const int64_t node = parent * kRadix + child;
    if (level > 0) {
      const T end = child + 1 < kRadix ? prefix[child + 1] : total;
      const T below = end - prefix[child];
      if (below > threshold &&
          !visit_above<T>(t, all_prefix, level - 1, node, below, threshold, visit)) {
        return false;
      }
      continue;
    }
    const int64_t first = node * kLeaf, last = first + kLeaf;
    for (int64_t index = first; index < last && index < t.num_samples; ++index) {
      if (!visit(index)) return false;
    }
  }
  return true;
}

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
