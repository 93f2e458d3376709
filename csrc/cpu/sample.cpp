// The draw: the next minibatch and its coefficients from the sampling structure. A point x below the
// total is scaled from 128 random bits; heavy items fill [0, k theta), the tree's items the rest in
// the order of their indices.
#include <algorithm>

#include "cpu/structure.h"
#include "fastis.h"

namespace fastis::FASTIS_ISA {
namespace {

struct Drawn {
  int64_t index;
  uint64_t weight;
};

// The weight with which the items below a node are drawn: seen, unseen, and the offset of "mix".
uint64_t weight_below(const Table& t, int level, int64_t node) {
  const Scalars& s = *t.scalars;
  const int64_t at = t.levels.first[level] + node;
  uint64_t weight = t.sums[at] + t.unseen[at] * static_cast<uint64_t>(s.unseen);
  if (s.offset != 0) {
    const int64_t span = int64_t{1} << (4 * (level + 1));
    const int64_t items = std::min(span, t.num_samples - node * span);
    weight += static_cast<uint64_t>(items * s.offset);
  }
  return weight;
}

uint64_t weight_of_item(const Table& t, int64_t index) {
  const Scalars& s = *t.scalars;
  const Record& record = t.records[index];
  if (record.code & kHeavyFlag) return 0;
  const uint64_t weight = record.last < 0 ? static_cast<uint64_t>(s.unseen)
                                          : weight_of(record.code, static_cast<int>(s.exponent));
  return weight + static_cast<uint64_t>(s.offset);
}

Drawn locate(const Table& t, uint64_t x) {
  const Scalars& s = *t.scalars;
  if (s.num_heavy > 0) {
    const uint64_t theta = static_cast<uint64_t>(s.theta);
    const uint64_t heavy_total = static_cast<uint64_t>(s.num_heavy) * theta;
    if (x < heavy_total) return {t.heavy[x / theta], theta};
    x -= heavy_total;
  }
  int64_t node = 0;
  for (int level = t.levels.depth - 1; level >= 0; --level) {
    for (uint64_t weight; x >= (weight = weight_below(t, level, node)); ++node) x -= weight;
    node *= kRadix;
  }
  for (uint64_t weight;; ++node) {
    weight = weight_of_item(t, node);
    if (x < weight) return {node, weight};
    x -= weight;
  }
}

uint64_t drawn_total(const Table& t) {
  const Scalars& s = *t.scalars;
  return static_cast<uint64_t>(s.light + s.num_heavy * s.theta * (s.num_heavy > 0) +
                               (t.num_samples - s.seen) * s.unseen + t.num_samples * s.offset);
}

// floor((b total + u) / B) without leaving 64 bits.
uint64_t slice_point(uint64_t b, uint64_t u, uint64_t total, uint64_t batch_size) {
  const uint64_t quotient = total / batch_size, remainder = total % batch_size;
  return b * quotient + (b * remainder + u) / batch_size;
}

void draw_by_importance(const Table& t, uint64_t iteration, int64_t* indices, float* weights) {
  settle(t);
  const uint64_t total = drawn_total(t);
  const double numerator = static_cast<double>(total), samples = static_cast<double>(t.num_samples);
  for (int64_t b = 0; b < t.batch_size; ++b) {
    const int64_t position = t.scheme == Scheme::systematic ? 0 : b;
    const uint64_t u = scale(random128(t.seed, Stream::draw, iteration, position), total);
    const uint64_t x =
        t.scheme == Scheme::multinomial ? u : slice_point(b, u, total, t.batch_size);
    const Drawn drawn = locate(t, x);
    indices[b] = drawn.index;
    weights[b] = static_cast<float>(numerator / (samples * static_cast<double>(drawn.weight)));
  }
}

}  // namespace

void draw(const Table& t, Pointer<int64_t> indices, Pointer<float> weights) {
  const int64_t iteration = t.scalars->draws++;
  if (iteration < t.warmup_draws) {
    const int64_t epoch = iteration / t.batches_per_epoch;
    const int64_t first = (iteration - epoch * t.batches_per_epoch) * t.batch_size;
    const Permutation permutation(t.seed, epoch, t.num_samples);
    for (int64_t b = 0; b < t.batch_size; ++b) indices[b] = permutation(first + b);
  } else if (t.records == nullptr) {
    for (int64_t b = 0; b < t.batch_size; ++b) {
      indices[b] = scale(random128(t.seed, Stream::draw, iteration, b), t.num_samples);
    }
  } else {
    return draw_by_importance(t, iteration, indices, weights);
  }
  std::fill_n(weights.address, t.batch_size, 1.0f);
}

}  // namespace fastis::FASTIS_ISA
