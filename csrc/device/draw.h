// The draw on the device: a thread a draw. A block reads the top level whole and searches it in
// shared memory; below it a draw reads 16 sums a level (128 bytes), then one cache line of records.
#pragma once

#include "device/settle.h"

namespace fastis::device {

class Distribution {
 public:
  template <class Block>
  FASTIS_HD Distribution(Block& block, const DeviceTable& t, const Flattening& flattening)
      : t_(t),
        unseen_(flattening.unseen),
        offset_(flattening.offset),
        theta_(flattening.theta),
        heavy_total_(t.scalars->num_capped > 0 ? t.scalars->num_capped * flattening.theta : 0),
        starts_(block.shared()) {
    const int top = t.levels.depth - 1;
    block.each(t.levels.size[top],
               [&](int64_t node) { starts_[node] = weight_of_node(top, node); });
    total_ = heavy_total_ + block.running_sums(starts_, t.levels.size[top]);
  }

  FASTIS_HD uint64_t total() const { return total_; }

  FASTIS_HD void find(uint64_t x, int64_t& index, float& coefficient) const {
    if (x < heavy_total_) {
      index = t_.heavy[x / theta_];
      coefficient = coefficient_of(theta_);
      return;
    }
    x -= heavy_total_;
    int64_t node = find_at_top(x);
    x -= starts_[node];
    for (int level = t_.levels.depth - 2; level >= 0; --level) {
      int64_t child = node * kRadix;
      for (const int64_t last = child + kRadix - 1; child < last; ++child) {
        const uint64_t weight = weight_of_node(level, child);
        if (x < weight) break;
        x -= weight;
      }
      node = child;
    }
    uint64_t weight = 0;
    for (index = node * kLeaf;; ++index) {
      weight = weight_of_record(t_.records[index]);
      if (x < weight) break;
      x -= weight;
    }
    coefficient = coefficient_of(weight);
  }

 private:
  FASTIS_HD uint64_t weight_of_node(int level, int64_t node) const {
    const int64_t at = t_.levels.first[level] + node;
    uint64_t weight = t_.sums[at] + t_.unseen[at] * unseen_;
    if (offset_ != 0) {
      const int64_t span = int64_t{1} << (2 + 4 * level), begin = node * span;
      const int64_t left = t_.num_samples - begin;
      weight += static_cast<uint64_t>(left < 0 ? 0 : left < span ? left : span) * offset_;
    }
    return weight;
  }

  FASTIS_HD uint64_t weight_of_record(const Record& record) const {
    if (record.code & kCappedFlag) return 0;
    const uint64_t unseen = record.last < 0 ? unseen_ : 0;
    return light_weight(record.code, exponent_of_table(t_)) + unseen + offset_;
  }

  // The last node that starts at or below x.
  FASTIS_HD int64_t find_at_top(uint64_t x) const {
    int64_t low = 0, high = t_.levels.size[t_.levels.depth - 1];
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (starts_[middle] <= x ? low : high) = middle;
    }
    return low;
  }

  // 1 / (N p)
  FASTIS_HD float coefficient_of(uint64_t weight) const {
    const double samples = static_cast<double>(t_.num_samples);
    return static_cast<float>(static_cast<double>(total_) /
                              (samples * static_cast<double>(weight)));
  }

  const DeviceTable& t_;
  uint64_t unseen_, offset_, theta_, heavy_total_, total_ = 0;
  uint64_t* starts_;
};

FASTIS_HD inline uint64_t point_of(const Table& t, uint64_t iteration, uint64_t total, int64_t b) {
  const uint64_t position = t.scheme == Scheme::systematic ? 0 : static_cast<uint64_t>(b);
  const uint64_t x = scale(random128(t.seed, Stream::draw, iteration, position), total);
  return t.scheme == Scheme::multinomial ? x : slice_point(b, x, total, t.batch_size);
}

// The next minibatch; one tick of the clock of draws.
template <class Grid>
FASTIS_HD void draw(Grid& grid, const DeviceTable& t, int64_t* indices, float* weights) {
  Scalars& s = *t.scalars;
  const int64_t iteration = s.draws;
  if (iteration < t.warmup_draws) {
    const int64_t epoch = iteration / t.batches_per_epoch;
    const int64_t first = (iteration - epoch * t.batches_per_epoch) * t.batch_size;
    const Permutation permutation(t.seed, epoch, t.num_samples);
    grid.each(t.batch_size, [&](int64_t b) {
      indices[b] = static_cast<int64_t>(permutation(first + b));
      weights[b] = 1.0f;
    });
  } else if (t.records == nullptr) {
    grid.each(t.batch_size, [&](int64_t b) {
      const Random128 random = random128(t.seed, Stream::draw, iteration, b);
      indices[b] = static_cast<int64_t>(scale(random, t.num_samples));
      weights[b] = 1.0f;
    });
  } else {
    Flattening flattening = flattening_of(grid.block(), t);
    if (!flattening.settled) {
      const bool valid = s.valid != 0;
      grid.wait();  // until every block has read the above
      if (!valid) rebuild(grid, t);
      grid.leader([&](auto& block) { settle(block, t); });
      flattening.theta = static_cast<uint64_t>(s.theta);
      flattening.unseen = static_cast<uint64_t>(s.unseen);
      flattening.offset = static_cast<uint64_t>(s.offset);
    }
    const Distribution distribution(grid.block(), t, flattening);
    grid.each(t.batch_size, [&](int64_t b) {
      distribution.find(point_of(t, iteration, distribution.total(), b), indices[b], weights[b]);
    });
  }
  grid.last([&] { ++s.draws; });
}

}  // namespace fastis::device
