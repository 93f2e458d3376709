// The draw: the next minibatch and its coefficients from the sampling structure. A point x below
// the total is scaled from 128 random bits; heavy items fill [0, k theta), the tree's items the
// rest in the order of their indices.
#include <algorithm>

#include "cpu/group.h"
#include "cpu/random.h"
#include "cpu/structure.h"
#include "fastis.h"

namespace fastis::FASTIS_ISA {
namespace {

constexpr int kBlock = 64;

// What remains to be found for a block of draws: `x` counts from the first item below `node`.
struct Search {
  int size = 0;
  int position[kBlock];
  uint64_t x[kBlock], weight[kBlock];
  int64_t node[kBlock];
};

// Unseen items and the constant of "mix" have weights beside what the group's starts tell.
int find_in_mixed_group(const Table& t, int level, int64_t parent, uint64_t& x) {
  const int64_t first = parent * kRadix, at = t.levels.first[level] + first;
  const int64_t span = int64_t{1} << (2 + 4 * level), offset = t.scalars->offset;
  const uint64_t unseen = static_cast<uint64_t>(t.scalars->unseen);
  uint64_t starts[kRadix];
  for (int j = 0; j < kRadix; ++j) {
    const int64_t begin = std::min((first + j) * span, t.num_samples);
    starts[j] = t.starts[at + j] + t.unseen_starts[at + j] * unseen +
                static_cast<uint64_t>((begin - first * span) * offset);
  }
  const int child = find_in_group(starts, x);
  x -= starts[child];
  return child;
}

int find_in_plain_group(const Table& t, int level, int64_t parent, uint64_t& x) {
  const uint64_t* starts = t.starts + t.levels.first[level] + parent * kRadix;
  const int child = find_in_group(starts, x);
  x -= starts[child];
  return child;
}

// The record of a leaf that x falls into, and its weight. Records beyond the last weigh nothing.
template <bool kPlain>
int64_t find_in_leaf(const Table& t, int64_t node, uint64_t x, uint64_t& weight) {
  const Record* records = t.records + node * kLeaf;
  const int e0 = static_cast<int>(t.scalars->exponent);
  uint64_t weights[kLeaf];
  for (int j = 0; j < kLeaf; ++j) {
    weights[j] = light_weight(records[j].code, e0);
    if (kPlain) continue;
    const bool is_unseen = records[j].last < 0, is_heavy = (records[j].code & kHeavyFlag) != 0;
    weights[j] =
        is_heavy ? 0 : weights[j] + (is_unseen ? t.scalars->unseen : 0) + t.scalars->offset;
  }
  const uint64_t second = weights[0], third = second + weights[1], fourth = third + weights[2];
  const int at = (x >= second) + (x >= third) + (x >= fourth);
  weight = weights[at];
  return node * kLeaf + at;
}

// Level by level for the whole block, so that the cache misses of its draws overlap.
template <bool kPlain>
void descend(const Table& t, Search& s) {
  std::fill_n(s.node, s.size, 0);
  for (int level = t.levels.depth - 1; level >= 0; --level) {
    for (int b = 0; b < s.size; ++b) {
      const int child = kPlain ? find_in_plain_group(t, level, s.node[b], s.x[b])
                               : find_in_mixed_group(t, level, s.node[b], s.x[b]);
      const int64_t node = s.node[b] * kRadix + child;
      s.node[b] = node;
      if (level == 0) {
        __builtin_prefetch(t.records + node * kLeaf);
      } else {
        const uint64_t* group = t.starts + t.levels.first[level - 1] + node * kRadix;
        __builtin_prefetch(group);
        __builtin_prefetch(group + kRadix / 2);
      }
    }
  }
  for (int b = 0; b < s.size; ++b) {
    s.node[b] = find_in_leaf<kPlain>(t, s.node[b], s.x[b], s.weight[b]);
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

// The points of draws b, b + 1, ... below the total.
void place(const Table& t, uint64_t iteration, uint64_t total, int64_t first, int size,
           uint64_t* points) {
  if (t.scheme == Scheme::systematic) {
    random_points(t.seed, Stream::draw, iteration, 0, 1, total, points);
    std::fill_n(points + 1, size - 1, points[0]);
  } else {
    random_points(t.seed, Stream::draw, iteration, first, size, total, points);
  }
  if (t.scheme == Scheme::multinomial) return;
  for (int b = 0; b < size; ++b) {
    points[b] = slice_point(first + b, points[b], total, t.batch_size);
  }
}

void draw_by_importance(const Table& t, uint64_t iteration, int64_t* indices, float* weights) {
  settle(t);
  const Scalars& s = *t.scalars;
  const bool plain = s.seen == t.num_samples && s.offset == 0;
  const uint64_t total = drawn_total(t), theta = static_cast<uint64_t>(s.theta);
  const uint64_t heavy_total = s.num_heavy > 0 ? s.num_heavy * theta : 0;
  const double numerator = static_cast<double>(total), samples = static_cast<double>(t.num_samples);
  const auto coefficient = [&](uint64_t weight) {
    return static_cast<float>(numerator / (samples * static_cast<double>(weight)));
  };
  const float heavy_coefficient = coefficient(theta);
  uint64_t points[kBlock];
  Search search;
  for (int64_t first = 0; first < t.batch_size; first += kBlock) {
    const int size = static_cast<int>(std::min<int64_t>(kBlock, t.batch_size - first));
    place(t, iteration, total, first, size, points);
    search.size = 0;
    for (int b = 0; b < size; ++b) {
      if (points[b] < heavy_total) {
        indices[first + b] = t.heavy[points[b] / theta];
        weights[first + b] = heavy_coefficient;
      } else {
        search.position[search.size] = b;
        search.x[search.size++] = points[b] - heavy_total;
      }
    }
    plain ? descend<true>(t, search) : descend<false>(t, search);
    for (int b = 0; b < search.size; ++b) {
      indices[first + search.position[b]] = search.node[b];
      weights[first + search.position[b]] = coefficient(search.weight[b]);
    }
  }
}

}  // namespace

void draw(Pointer<const Table> table, Pointer<int64_t> indices, Pointer<float> weights) {
  const Table& t = *table.address;
  const int64_t iteration = t.scalars->draws++;
  if (iteration < t.warmup_draws) {
    const int64_t epoch = iteration / t.batches_per_epoch;
    const int64_t first = (iteration - epoch * t.batches_per_epoch) * t.batch_size;
    const Permutation permutation(t.seed, epoch, t.num_samples);
    for (int64_t b = 0; b < t.batch_size; ++b) indices[b] = permutation(first + b);
  } else if (t.records == nullptr) {
    random_points(t.seed, Stream::draw, iteration, 0, t.batch_size, t.num_samples,
                  reinterpret_cast<uint64_t*>(indices.address));
  } else {
    return draw_by_importance(t, iteration, indices, weights);
  }
  std::fill_n(weights.address, t.batch_size, 1.0f);
}

}  // namespace fastis::FASTIS_ISA
