// The update: scores of a minibatch into the states, the tree and the variance traces. Block by
// block: a pass of gathers, one of arithmetic (vectorised by the compiler), one of scatters. A
// sample that was drawn twice is updated once: its first position sets `last` to the present
// iteration, so that the second finds dt = 0.
#include <algorithm>
#include <cmath>

#include "cpu/tree.h"
#include "fastis.h"
#include "variance.h"

namespace fastis::FASTIS_ISA {
namespace {

// Small, so that two blocks' cache lines (five or more an item) fit the innermost cache: while one
// is worked on, the next one's arrive.
constexpr int kBlock = 32;

// A block of observations after the gather: one lane each, duplicates and non-finite ones left out.
struct Block {
  int size = 0, num_fresh = 0;
  int64_t index[kBlock];
  float mean[kBlock], var[kBlock], x[kBlock];
  int32_t dt[kBlock];
  uint32_t old_code[kBlock], code[kBlock];  // with the flags of capped items
  uint64_t weight[kBlock], delta[kBlock];   // the new integer weight, less the old one
  bool near_cap;  // may items be capped, or near that? else uncapped_delta is not set
  uint64_t uncapped_delta[kBlock];  // the same with capped items weighing nothing
};

void prefetch_state(const Table& t, int64_t index) { __builtin_prefetch(t.states + index, 1); }

// The nodes above an item, below level `end`.
void prefetch_nodes(const Table& t, int64_t index, int end) {
  for (int level = 0; level < end; ++level) {
    const uint64_t* prefix =
        t.prefix + t.levels.first[level] + Levels::above(index, level + 1) * kRadix;
    __builtin_prefetch(prefix, 1);
    __builtin_prefetch(prefix + kRadix / 2, 1);
  }
}

// Reads the states of a block, and calls for those of the next.
void gather(const Table& t, const int64_t* indices, const float* observed, int64_t n, int64_t ahead,
            int32_t now, Block& block) {
  block.size = block.num_fresh = 0;
  for (int64_t b = 0; b < n; ++b) {
    if (b < ahead) prefetch_state(t, indices[n + b]);
    State& state = t.states[indices[b]];
    if (state.last == kExcluded) continue;
    if (!usable(observed[b])) {
      ++t.scalars->skipped;
      continue;
    }
    const int32_t dt = interval(now, state.last);
    const bool fresh = state.last == kUnseen;
    if (dt == 0 && !fresh) continue;
    const int at = block.size++;
    const bool anew = fresh || t.tau < 0;
    block.num_fresh += fresh;
    block.index[at] = indices[b];
    block.mean[at] = anew ? observed[b] : state.mean;  // d = 0: the mean is x and the variance 0
    block.var[at] = anew ? 0.0f : state.var;
    block.x[at] = observed[b];
    block.dt[at] = fresh ? 1 : dt;
    block.old_code[at] = state.code;
    state.last = now;
  }
}

// False when a new weight lies outside the range of e0: deltas are then of no use.
bool compute(const UpdateParameters& p, Importance importance, uint32_t near_code, Block& block) {
  for (int at = 0; at < block.size; ++at) {
    observe(block.mean[at], block.var[at], block.x[at], static_cast<float>(block.dt[at]), p.tau);
  }
  for (int at = 0; at < block.size; ++at) {
    block.code[at] = code_of(importance_of(block.mean[at], block.var[at], importance), p.floor);
  }
  int32_t outside = 0, near_cap = 0;  // below 0: an item is
  for (int at = 0; at < block.size; ++at) {
    const int32_t shift = exponent_of(block.code[at]) - p.exponent;
    outside |= shift | (p.max_shift - shift);
    near_cap |= static_cast<int32_t>(near_code - block.code[at]);
    near_cap |= static_cast<int32_t>(block.old_code[at]);  // a flag is the sign
  }
  block.near_cap = near_cap < 0;
  if (outside < 0) return false;
  for (int at = 0; at < block.size; ++at) {
    block.weight[at] = weight_of(block.code[at], p.exponent);
    block.delta[at] =
        block.weight[at] - uncapped_weight(block.old_code[at] & ~kCappedFlag, p.exponent);
  }
  return true;
}

// For a block in which items are capped, or were, or are near the cap.
void mark_capped(const UpdateParameters& p, Block& block) {
  for (int at = 0; at < block.size; ++at) {
    const uint64_t weight = block.weight[at], old_weight = weight - block.delta[at];
    const bool capped = weight > p.theta, was_capped = (block.old_code[at] & kCappedFlag) != 0;
    block.uncapped_delta[at] = (capped ? 0 : weight) - (was_capped ? 0 : old_weight);
    block.code[at] |= capped ? kCappedFlag : 0;
  }
}

void write_back(const Table& t, const Block& block) {
  for (int at = 0; at < block.size; ++at) {
    State& state = t.states[block.index[at]];
    state.mean = block.mean[at];
    state.var = block.var[at];
    state.code = block.code[at];
  }
}

// An item of a block near the cap: whether it is capped, and near.
void follow_cap(const Table& t, const Block& block, int at) {
  const uint32_t code = block.code[at], old_code = block.old_code[at];
  if ((code ^ old_code) & kCappedFlag) {
    count_capped(t, block.index[at], (code & kCappedFlag) != 0);
  }
  const uint64_t weight = block.weight[at];
  const Scalars& s = *t.scalars;
  if (is_near(s, weight) && !is_near(s, weight - block.delta[at])) add_near(t, block.index[at]);
}

// ... and calls for the nodes of the next block's items.
template <bool kNearCap>
void add_to_tree(const Table& t, const Block& block, int exponent, Spread& spread,
                 const int64_t* next, int64_t ahead) {
  Scalars& s = *t.scalars;
  const int end = spread.level();
  const bool spreads = end < t.levels.depth, any_fresh = block.num_fresh > 0;
  uint64_t uncapped = 0;
  uint32_t largest = 0;
  for (int at = 0; at < block.size; ++at) {
    const int64_t index = block.index[at];
    const uint64_t delta = kNearCap ? block.uncapped_delta[at] : block.delta[at];
    if (at < ahead) prefetch_nodes(t, next[at], end);
    if (kNearCap) follow_cap(t, block, at);
    largest = std::max(largest, block.code[at] & ~kCappedFlag);
    uncapped += delta;
    add_to_sums(t, index, delta, end);
    if (spreads) spread.add(index, delta);
    if (any_fresh && block.old_code[at] == 0) add_to_counts(t, t.unseen_prefix, index, ~0u);
  }
  s.uncapped += static_cast<int64_t>(uncapped);
  s.ceiling = std::max(s.ceiling, static_cast<int64_t>(weight_of(largest, exponent)));
}

void update_states(const Table& t, const Observation& o, int64_t iteration) {
  Scalars& s = *t.scalars;
  const UpdateParameters p(t, o.n, iteration);
  // Items of larger codes may be near theta.
  const uint32_t near_code = code_below(s.near_size < 0 ? s.theta : s.near_low, p.exponent);
  bool in_range = true;
  Block block;
  Spread spread(t, o.n);
  for (int64_t b = 0; b < std::min<int64_t>(kBlock, o.n); ++b) {
    prefetch_state(t, o.indices[b]);
    if (p.valid) prefetch_nodes(t, o.indices[b], spread.level());
  }
  for (int64_t begin = 0; begin < o.n; begin += kBlock) {
    const int64_t size = std::min<int64_t>(kBlock, o.n - begin), end = begin + size;
    const int64_t ahead = std::min<int64_t>(size, o.n - end);
    gather(t, o.indices + begin, o.observed + begin, size, ahead, p.now, block);
    in_range = compute(p, t.importance, near_code, block) && in_range;
    if (in_range && p.valid && block.near_cap) mark_capped(p, block);
    write_back(t, block);
    if (!in_range) continue;  // the table will be rescaled from its state
    uint64_t added = 0;
    for (int at = 0; at < block.size; ++at) added += block.delta[at];
    s.total += static_cast<int64_t>(added);
    s.seen += block.num_fresh;
    if (!p.valid) continue;
    if (block.near_cap) {
      add_to_tree<true>(t, block, p.exponent, spread, o.indices + end, ahead);
    } else {
      add_to_tree<false>(t, block, p.exponent, spread, o.indices + end, ahead);
    }
  }
  if (!in_range || exceeds_limit(t)) {
    rescale(t);
  } else if (p.valid) {
    spread.finish();
  }
}

void update_variance(const Table& t, const Observation& o) {
  constexpr int kLanes = 8;
  double a[kLanes] = {}, u[kLanes] = {}, m[kLanes] = {}, A = 0, U = 0, O = 0, G2 = 0;
  const float *weights = o.weights, *score = o.score;
  for (int64_t b = 0; b + kLanes <= o.n; b += kLanes) {
    for (int j = 0; j < kLanes; ++j) {
      const double r = weights[b + j], x = score[b + j], rx = r * x;
      a[j] += rx * rx;
      u[j] += rx * x;
      m[j] += rx;
    }
  }
  for (int64_t b = o.n - o.n % kLanes; b < o.n; ++b) {
    const double r = weights[b], x = score[b], rx = r * x;
    A += rx * rx;
    U += rx * x;
    O += rx;
  }
  for (int j = 0; j < kLanes; ++j) {
    A += a[j];
    U += u[j];
    O += m[j];
  }
  for (int64_t c = 0; c < o.num_classes; ++c) G2 += double(o.mean_grad[c]) * double(o.mean_grad[c]);
  A /= o.n;
  U /= o.n;
  O /= o.n;
  smooth(t, {A, U, O * O, G2}, static_cast<double>(o.n));
}

void check_indices(const Table& t, const int64_t* indices, int64_t n) {
  bool good = true;
  for (int64_t b = 0; b < n; ++b) {
    good &= static_cast<uint64_t>(indices[b]) < static_cast<uint64_t>(t.num_samples);
  }
  if (good) return;
  const auto [least, most] = std::minmax_element(indices, indices + n);
  index_out_of_range(t.num_samples, *least, *most);
}

// The counts above an item, where they are many.
void prefetch_counts(const Table& t, const uint32_t* prefix, int64_t index) {
  for (int level = 0; level < 2 && level < t.levels.depth; ++level) {
    const int64_t parent = Levels::above(index, level + 1);
    __builtin_prefetch(prefix + t.levels.first[level] + parent * kRadix, 1);
  }
}

// A seen item's weight out of the totals and the tree.
void take_out(const Table& t, int64_t index, Spread& spread) {
  Scalars& s = *t.scalars;
  const uint32_t code = t.states[index].code;
  const uint64_t weight = weight_of(code & ~kCappedFlag, exponent_of_table(t));
  s.total -= static_cast<int64_t>(weight);
  --s.seen;
  if (!s.valid) return;
  if (code & kCappedFlag) return count_capped(t, index, false);
  s.uncapped -= static_cast<int64_t>(weight);
  add_to_sums(t, index, ~weight + 1, spread.level());
  if (spread.level() < t.levels.depth) spread.add(index, ~weight + 1);
}

// One item more (or less, modulo 2^32) that is unseen or excluded.
void count(const Table& t, int64_t index, int32_t last, uint32_t one) {
  Scalars& s = *t.scalars;
  const bool excluded = last == kExcluded;
  if (excluded) s.excluded += static_cast<int32_t>(one);
  if (!s.valid) return;
  add_to_counts(t, excluded ? t.excluded_prefix : t.unseen_prefix, index, one);
  if (excluded) t.excluded_prefix[t.levels.total()] = 1;
}

void clear_states(const Table& t, const int64_t* indices, int64_t n, int32_t last) {
  constexpr int64_t kAhead = 16;
  Scalars& s = *t.scalars;
  const int64_t seen = s.seen;
  uint32_t* const counts = last == kExcluded ? t.excluded_prefix : t.unseen_prefix;
  Spread spread(t, n);
  for (int64_t k = 0; k < n; ++k) {
    if (k + kAhead < n) {
      prefetch_state(t, indices[k + kAhead]);
      if (s.valid) prefetch_nodes(t, indices[k + kAhead], spread.level());
      if (s.valid) prefetch_counts(t, counts, indices[k + kAhead]);
    }
    State& state = t.states[indices[k]];
    if (state.last == last) continue;
    if (state.last >= 0) {
      take_out(t, indices[k], spread);
    } else {
      count(t, indices[k], state.last, ~0u);
    }
    count(t, indices[k], last, 1);
    state = {0, 0, last, 0};
  }
  if (s.valid) spread.finish();
  if (s.seen == 0 && seen > 0) {  // as in the beginning
    s.exponent = kNoExponent;
    s.total = s.valid = 0;
  } else if (exceeds_limit(t)) {
    rescale(t);
  }
}

}  // namespace

void update(Pointer<const Table> table, const Observation& o) {
  const Table& t = *table.address;
  check_indices(t, o.indices, o.n);
  if (o.n == 0) return;
  if (t.states != nullptr) {
    update_states(t, o, t.scalars->updates);
  } else {
    for (int64_t b = 0; b < o.n; ++b) t.scalars->skipped += !usable(o.observed[b]);
  }
  if (t.keeps_moments) update_variance(t, o);
  ++t.scalars->updates;
}

void fold(Pointer<const Table> table, const Observation& o, int64_t iteration) {
  const Table& t = *table.address;
  check_indices(t, o.indices, o.n);
  if (o.n > 0) update_states(t, o, iteration < 0 ? t.scalars->updates : iteration);
}

void clear(Pointer<const Table> table, Pointer<const int64_t> indices, int64_t n, int32_t last) {
  const Table& t = *table.address;
  check_indices(t, indices, n);
  clear_states(t, indices, n, last);
}

void rescale(Pointer<const Table> table) { rescale(*table.address); }

}  // namespace fastis::FASTIS_ISA
