// The draw on the device: one thread per draw. A block reads the top level whole and searches it in
// shared memory; below it a draw reads the 16 sums (and numbers of unseen items) of a level at
// once, then one cache line of states.
#pragma once

#include "device/table_update.h"
#include "device/update_cap.h"

namespace fastis::device {

// A node of the top level, and the weights and capped items before one.
struct TopNode {
  uint64_t sum;
  uint32_t unseen, capped;
};

struct Prefix {
  uint64_t weight = 0;
  uint32_t capped = 0;
  FASTIS_HD Prefix operator+(const Prefix& o) const {
    return {weight + o.weight, capped + o.capped};
  }
};

struct TopPrefix {
  uint64_t weight[kDeviceTop];
  uint32_t capped[kDeviceTop];
};

template <class Block>
FASTIS_HD auto read_top(const Block& block, const DeviceTable& t) {
  const int top = t.levels.depth - 1;
  return block.hold(t.levels.size[top], [&t, first = t.levels.first[top]](int64_t node) {
    return TopNode{t.sums[first + node], t.unseen[first + node], t.capped[first + node]};
  });
}

// kRadix numbers that lie side by side, aligned to 16 bytes: on a GPU a few accesses at once.
template <class T>
FASTIS_HD inline void read_node(const T* from, uint64_t (&out)[kRadix]) {
  constexpr int kPart = 16 / sizeof(T);
  struct alignas(16) Part {
    T value[kPart];
  };
  Part parts[kRadix / kPart];
  for (int i = 0; i < kRadix / kPart; ++i) parts[i] = reinterpret_cast<const Part*>(from)[i];
  for (int i = 0; i < kRadix; ++i) out[i] = parts[i / kPart].value[i % kPart];
}

// The first weight whose running sum exceeds x, or the last; x then counts from its beginning.
template <int n>
FASTIS_HD inline int pick(const uint64_t (&weights)[n], uint64_t& x) {
  uint64_t end = 0, start = 0;
  int which = 0;
  for (int i = 0; i < n - 1; ++i) {
    end += weights[i];
    const bool beyond = x >= end;
    which += beyond;
    start = beyond ? end : start;
  }
  x -= start;
  return which;
}

// The last of the nodes whose prefix sum is at most x.
template <class T>
FASTIS_HD inline int64_t last_at_or_below(const T* prefix, int64_t size, uint64_t x) {
  int64_t low = 0, high = size;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (prefix[middle] <= x ? low : high) = middle;
  }
  return low;
}

// Capped items fill [0, k theta), all others the rest, both in the order of their indices. Whatever
// the tree holds, no access is outside of it and no index out of range.
class Distribution {
 public:
  template <class Block, class Top>
  FASTIS_HD Distribution(const Block& block, const DeviceTable& t, const Flattening& flattening,
                         const Top& held)
      : t_(t),
        top_(t.levels.depth - 1),
        alike_(flattening.alike),
        unseen_(flattening.unseen),
        offset_(flattening.offset),
        theta_(flattening.theta),
        prefix_(block.template memory<TopPrefix>()) {
    const Prefix all = block.template running_sums<Prefix>(
        held,
        [&](int64_t node, const TopNode& of) {
          const uint64_t offset = offset_of(top_, node);
          if (alike_) return Prefix{offset, 0};
          return Prefix{of.sum + of.unseen * unseen_ + offset, of.capped};
        },
        [&](int64_t node, const Prefix& before) {
          prefix_.weight[node] = before.weight;
          prefix_.capped[node] = before.capped;
        });
    capped_total_ = all.capped > 0 ? all.capped * theta_.value : 0;
    total_ = capped_total_ + all.weight;
  }

  FASTIS_HD uint64_t total() const { return total_; }

  FASTIS_HD void find(uint64_t x, int64_t& index, float& coefficient) const {
    uint64_t weight = theta_.value;
    const int64_t found = x < capped_total_ ? find_capped(theta_.divide(x))
                                            : find_uncapped(x - capped_total_, weight);
    index = found < t_.num_samples ? found : t_.num_samples - 1;
    // 1 / (N p)
    const double samples = static_cast<double>(active(t_));
    coefficient =
        static_cast<float>(static_cast<double>(total_) / (samples * static_cast<double>(weight)));
  }

 private:
  // Capped item number x.
  FASTIS_HD int64_t find_capped(uint64_t x) const {
    int64_t node = last_at_or_below(prefix_.capped, t_.levels.size[top_], x);
    x -= prefix_.capped[node];
    for (int level = top_ - 1; level >= 0; --level) {
      uint64_t counts[kRadix];
      read_node(t_.capped + t_.levels.first[level] + node * kRadix, counts);
      node = child_of(level, node, pick(counts, x));
    }
    State states[kLeaf];
    read_leaf(t_, node, states);
    uint64_t flags[kLeaf];
    for (int j = 0; j < kLeaf; ++j) flags[j] = states[j].code >> 31;
    return node * kLeaf + pick(flags, x);
  }

  FASTIS_HD int64_t find_uncapped(uint64_t x, uint64_t& weight) const {
    int64_t node = last_at_or_below(prefix_.weight, t_.levels.size[top_], x);
    x -= prefix_.weight[node];
    for (int level = top_ - 1; level >= 0; --level) {
      node = child_of(level, node, pick_child(level, node * kRadix, x));
    }
    State states[kLeaf];
    read_leaf(t_, node, states);
    uint64_t weights[kLeaf];
    for (int j = 0; j < kLeaf; ++j) weights[j] = weight_of(states[j]);
    const int j = pick(weights, x);
    weight = j < 2 ? (j == 0 ? weights[0] : weights[1]) : (j == 2 ? weights[2] : weights[3]);
    return node * kLeaf + j;
  }

  FASTIS_HD int pick_child(int level, int64_t first, uint64_t& x) const {
    const int64_t at = t_.levels.first[level] + first;
    uint64_t weights[kRadix] = {};
    if (!alike_) read_node(t_.sums + at, weights);
    if (unseen_ != 0) {
      uint64_t unseen[kRadix];
      read_node(t_.unseen + at, unseen);
      for (int i = 0; i < kRadix; ++i) weights[i] += unseen[i] * unseen_;
    }
    if (offset_ != 0) {
      for (int i = 0; i < kRadix; ++i) weights[i] += offset_of(level, first + i);
    }
    return pick(weights, x);
  }

  FASTIS_HD int64_t child_of(int level, int64_t node, int child) const {
    const int64_t found = node * kRadix + child, last = t_.levels.size[level] - 1;
    return found < last ? found : last;
  }

  // What a node's items weigh more than they would without the offset.
  FASTIS_HD uint64_t offset_of(int level, int64_t node) const {
    if (offset_ == 0) return 0;
    const int64_t span = int64_t{1} << (2 + 4 * level), left = t_.num_samples - node * span;
    int64_t items = left < 0 ? 0 : left < span ? left : span;
    if (t_.scalars->excluded > 0) items -= t_.excluded[t_.levels.first[level] + node];
    return static_cast<uint64_t>(items) * offset_;
  }

  FASTIS_HD uint64_t weight_of(const State& state) const {
    const bool is_active = state.last != kExcluded;
    if (alike_) return is_active;
    const uint64_t beside = (is_active ? offset_ : 0) + (state.last == kUnseen ? unseen_ : 0);
    return uncapped_weight(state.code, exponent_of_table(t_)) +
           (state.code & kCappedFlag ? 0 : beside);
  }

  const DeviceTable& t_;
  int top_;
  bool alike_;
  uint64_t unseen_, offset_, capped_total_ = 0, total_ = 0;
  Divisor theta_;
  TopPrefix& prefix_;
};

FASTIS_HD inline uint64_t point_of(const DeviceTable& t, uint64_t iteration, uint64_t total,
                                   int64_t b) {
  const uint64_t position = t.scheme == Scheme::systematic ? 0 : static_cast<uint64_t>(b);
  const uint64_t x = scale(random128(t.seed, Stream::draw, iteration, position), total);
  return t.scheme == Scheme::multinomial ? x : slice_point(t, static_cast<uint64_t>(b), x, total);
}

template <class Grid>
FASTIS_HD void draw_by_importance(Grid& grid, const DeviceTable& t, int64_t iteration,
                                  const Batch& batch) {
  const auto& block = grid.block();
  auto top = read_top(block, t);  // under way while the flattening is computed
  Flattening flattening = flattening_of(t);
  if (!flattening.up_to_date) {
    flattening = update_flattening(grid, t);
    top = read_top(block, t);
  }
  const Distribution distribution(block, t, flattening, top);
  grid.each(t.batch_size, [&](int64_t b) {
    distribution.find(point_of(t, iteration, distribution.total(), b), batch.indices[b],
                      batch.weights[b]);
  });
}

// A minibatch without replacement where samples are excluded. (The minibatch by value: a reference
// would cost the kernel a stack.)
template <class Grid>
FASTIS_COLD void draw_active(Grid& grid, const DeviceTable& t, int64_t iteration, Batch batch) {
  ensure_tree(grid, t);
  const InEpoch place(t, iteration);
  const int64_t items = active(t);
  const Permutation permutation(t.seed, place.epoch, items);
  const auto& block = grid.block();
  const Distribution distribution(block, t, all_alike(true), read_top(block, t));
  grid.each(t.batch_size, [&](int64_t b) {
    const uint64_t found = permutation(static_cast<uint64_t>((place.first + b) % items));
    distribution.find(found, batch.indices[b], batch.weights[b]);
  });
}

// The minibatch of `iteration`, the clock of draws, which stands still meanwhile. Of no active
// samples any, with weights of 0, since nobody could be told.
template <class Grid>
FASTIS_HD void draw_minibatch(Grid& grid, const DeviceTable& t, int64_t iteration,
                              const Batch& batch) {
  const int64_t items = active(t);
  if (items == 0) {
    grid.each(t.batch_size, [&](int64_t b) {
      batch.indices[b] = 0;
      batch.weights[b] = 0;
    });
  } else if (without_replacement(t, iteration) && items < t.num_samples) {
    draw_active(grid, t, iteration, batch);
  } else if (without_replacement(t, iteration)) {
    const InEpoch place(t, iteration);
    const Permutation permutation(t.seed, place.epoch, t.num_samples);
    grid.each(t.batch_size, [&](int64_t b) {
      batch.indices[b] = static_cast<int64_t>(permutation(place.first + b));
      batch.weights[b] = 1.0f;
    });
  } else if (t.states == nullptr) {
    grid.each(t.batch_size, [&](int64_t b) {
      const Random128 random = random128(t.seed, Stream::draw, iteration, b);
      batch.indices[b] = static_cast<int64_t>(scale(random, t.num_samples));
      batch.weights[b] = 1.0f;
    });
  } else {
    draw_by_importance(grid, t, iteration, batch);
  }
}

template <class Grid>
FASTIS_HD void draw(Grid& grid, const DeviceTable& t, const Batch& batch) {
  draw_minibatch(grid, t, t.scalars->draws, batch);
  grid.last([&] { ++t.scalars->draws; });
}

template <class Grid>
FASTIS_HD void update_and_draw(Grid& grid, const DeviceTable& t, const Observation& o,
                               const Batch& next_batch) {
  const int64_t iteration = t.scalars->draws;
  const Products products = add_products(grid, o);
  if (t.states != nullptr) {
    update_states(grid, t, o);
  } else {
    grid.wait();  // all have read the clock
  }
  draw_minibatch(grid, t, iteration, next_batch);
  grid.once([&] {
    finish_update(t, o, products);
    ++t.scalars->draws;
  });
}

}  // namespace fastis::device
