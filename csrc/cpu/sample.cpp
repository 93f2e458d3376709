// The draw: the next minibatch and its coefficients from the sampling structure. A point x below
// the total is scaled from 128 random bits; heavy items fill [0, k theta), the tree's items the
// rest in the order of their indices.
#include <algorithm>

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

// How many of a group's 16 running sums are at or below x: the child that x falls into.
// kPlain: nothing but sums. Otherwise unseen items and the constant of "mix" have weights too.
template <bool kPlain>
int find_child(const Table& t, int level, int64_t parent, uint64_t& x) {
  const int64_t first = parent * kRadix, at = t.levels.first[level] + first;
  uint64_t ends[kRadix];
  for (int j = 0; j < kRadix; ++j) ends[j] = t.sums[at + j];
  if (!kPlain) {
    const uint64_t unseen = static_cast<uint64_t>(t.scalars->unseen);
    for (int j = 0; j < kRadix; ++j) ends[j] += t.unseen[at + j] * unseen;
  }
  if (!kPlain && t.scalars->offset != 0) {
    const int64_t span = int64_t{1} << (4 * (level + 1)), offset = t.scalars->offset;
    for (int j = 0; j < kRadix; ++j) {
      const int64_t end = std::min((first + j + 1) * span, t.num_samples);
      ends[j] += static_cast<uint64_t>((end - first * span) * offset);
    }
  }
  int child = 0;
  for (int j = 0; j < kRadix; ++j)
    child += static_cast<int64_t>(ends[j]) <= static_cast<int64_t>(x);
  x -= child == 0 ? 0 : ends[child - 1];
  return child;
}

template <bool kPlain>
uint64_t weight_of_item(const Table& t, const Record& record) {
  if (record.code & kHeavyFlag) return 0;
  const int e0 = static_cast<int>(t.scalars->exponent);
  if (kPlain) return weight_of(record.code, e0);
  const int64_t weight =
      record.last < 0 ? t.scalars->unseen : static_cast<int64_t>(weight_of(record.code, e0));
  return static_cast<uint64_t>(weight + t.scalars->offset);
}

template <bool kPlain>
void find_item(const Table& t, int64_t& node, uint64_t& x, uint64_t& weight) {
  int64_t index = node * kRadix;
  for (;; ++index) {
    weight = weight_of_item<kPlain>(t, t.records[index]);
    if (x < weight) break;
    x -= weight;
  }
  node = index;
}

// Level by level for the whole block, so that the cache misses of its draws overlap.
template <bool kPlain>
void descend(const Table& t, Search& s) {
  std::fill_n(s.node, s.size, 0);
  for (int level = t.levels.depth - 1; level >= 0; --level) {
    const uint64_t* below = level > 0 ? t.sums + t.levels.first[level - 1] : nullptr;
    for (int b = 0; b < s.size; ++b) {
      const int child = find_child<kPlain>(t, level, s.node[b], s.x[b]);
      s.node[b] = s.node[b] * kRadix + child;
      const void* next = level > 0 ? static_cast<const void*>(below + s.node[b] * kRadix)
                                   : static_cast<const void*>(t.records + s.node[b] * kRadix);
      __builtin_prefetch(next);
      __builtin_prefetch(static_cast<const char*>(next) + 64);
      if (level > 0) continue;
      __builtin_prefetch(static_cast<const char*>(next) + 128);
      __builtin_prefetch(static_cast<const char*>(next) + 192);
    }
  }
  for (int b = 0; b < s.size; ++b) find_item<kPlain>(t, s.node[b], s.x[b], s.weight[b]);
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
  for (int b = 0; b < size; ++b) {
    const int64_t position = t.scheme == Scheme::systematic ? 0 : first + b;
    points[b] = scale(random128(t.seed, Stream::draw, iteration, position), total);
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
    for (int64_t b = 0; b < t.batch_size; ++b) {
      indices[b] = scale(random128(t.seed, Stream::draw, iteration, b), t.num_samples);
    }
  } else {
    return draw_by_importance(t, iteration, indices, weights);
  }
  std::fill_n(weights.address, t.batch_size, 1.0f);
}

}  // namespace fastis::FASTIS_ISA
