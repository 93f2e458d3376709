// The draw: the next minibatch and its coefficients, found in the tree by points below the total,
// each of 128 random bits.
#include <algorithm>

#include "cpu/random.h"
#include "cpu/tree.h"
#include "fastis.h"

namespace fastis::FASTIS_ISA {
namespace {

constexpr int kBlock = 64;

// What remains to be found for a block of draws: `x` counts from the first item below `node`.
struct Descent {
  int size = 0;
  int position[kBlock];
  uint64_t x[kBlock], weight[kBlock];
  int64_t node[kBlock];
};

// What has weights beside the seen, uncapped items that the prefix sums add up.
enum class Beside { nothing, unseen, unseen_and_offset };

// The child of `parent` that x falls into; x is then counted from that child's beginning.
template <Beside beside>
int find_child(const Table& t, int level, int64_t parent, uint64_t& x) {
  const int64_t first = parent * kRadix, at = t.levels.first[level] + first;
  const uint64_t* prefix = t.prefix + at;
  alignas(64) uint64_t all[kRadix];
  if (beside != Beside::nothing) {
    const uint32_t* before = t.unseen_prefix + at;
    const uint64_t unseen = static_cast<uint64_t>(t.scalars->unseen);
    for (int j = 0; j < kRadix; ++j) all[j] = prefix[j] + before[j] * unseen;
    prefix = all;
  }
  if (beside == Beside::unseen_and_offset) {
    const int64_t span = int64_t{1} << (2 + 4 * level), offset = t.scalars->offset;
    const int64_t items = t.num_samples - first * span;
    for (int j = 0; j < kRadix; ++j) {
      all[j] += static_cast<uint64_t>((j * span < items ? j * span : items) * offset);
    }
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
    weights[j] = uncapped_weight(states[j].code, e0);
    if (beside == Beside::nothing) continue;
    const uint64_t unseen = states[j].last < 0 ? t.scalars->unseen : 0;
    weights[j] += states[j].code & kCappedFlag ? 0 : unseen + t.scalars->offset;
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
void descend_capped(const Table& t, Descent& s) {
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

// The distribution as it stands and its inverse CDF: from points below its total to items. Capped
// items fill [0, k theta), the others the rest, both in the order of their indices.
class Distribution {
 public:
  explicit Distribution(const Table& table) : t_(table) {
    update_cap(t_);
    const Scalars& s = *t_.scalars;
    beside_ = s.offset != 0             ? Beside::unseen_and_offset
              : s.seen < t_.num_samples ? Beside::unseen
                                        : Beside::nothing;
    theta_ = static_cast<uint64_t>(s.theta);
    capped_total_ = s.num_capped > 0 ? s.num_capped * theta_ : 0;
    total_ =
        capped_total_ + static_cast<uint64_t>(s.uncapped + (t_.num_samples - s.seen) * s.unseen +
                                              t_.num_samples * s.offset);
  }

  uint64_t total() const { return total_; }

  // The items that at most kBlock points fall into, and their coefficients. (Inlined into the loop
  // over blocks, the descents are 2 % slower.)
  __attribute__((noinline)) void find(const uint64_t* points, int size, const Batch& found) const {
    Descent capped, uncapped;
    for (int b = 0; b < size; ++b) {
      Descent& side = points[b] < capped_total_ ? capped : uncapped;
      side.position[side.size] = b;
      side.weight[side.size] = theta_;
      side.x[side.size++] =
          points[b] < capped_total_ ? points[b] / theta_ : points[b] - capped_total_;
    }
    if (t_.list_capacity > 0) {
      for (int b = 0; b < capped.size; ++b) capped.node[b] = t_.listed[capped.x[b]];
    } else if (capped.size > 0) {
      descend_capped(t_, capped);
    }
    switch (beside_) {
      case Beside::nothing:
        descend<Beside::nothing>(t_, uncapped);
        break;
      case Beside::unseen:
        descend<Beside::unseen>(t_, uncapped);
        break;
      case Beside::unseen_and_offset:
        descend<Beside::unseen_and_offset>(t_, uncapped);
    }
    put(capped, found);
    put(uncapped, found);
  }

 private:
  // Coefficients are 1 / (N p).
  void put(const Descent& s, const Batch& found) const {
    const double total = static_cast<double>(total_), n = static_cast<double>(t_.num_samples);
    for (int b = 0; b < s.size; ++b) {
      found.indices[s.position[b]] = s.node[b];
      found.weights[s.position[b]] =
          static_cast<float>(total / (n * static_cast<double>(s.weight[b])));
    }
  }

  const Table& t_;
  Beside beside_;
  uint64_t total_, theta_, capped_total_;
};

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
    points[b] = slice_point(t, static_cast<uint64_t>(first + b), points[b], total);
  }
}

void draw_by_importance(const Table& t, uint64_t iteration, const Batch& batch) {
  const Distribution distribution(t);
  uint64_t points[kBlock];
  for (int64_t first = 0; first < t.batch_size; first += kBlock) {
    const int size = static_cast<int>(std::min<int64_t>(kBlock, t.batch_size - first));
    place(t, iteration, distribution.total(), first, size, points);
    distribution.find(points, size, {batch.indices + first, batch.weights + first});
  }
}

}  // namespace

void draw(Pointer<const Table> table, const Batch& batch) {
  const Table& t = *table.address;
  const int64_t iteration = t.scalars->draws++;
  if (without_replacement(t, iteration)) {
    const InEpoch place(t, iteration);
    const Permutation permutation(t.seed, place.epoch, t.num_samples);
    for (int64_t b = 0; b < t.batch_size; ++b) batch.indices[b] = permutation(place.first + b);
  } else if (t.states == nullptr) {
    random_points(t.seed, Stream::draw, iteration, 0, t.batch_size, t.num_samples,
                  reinterpret_cast<uint64_t*>(batch.indices.address));
  } else {
    return draw_by_importance(t, iteration, batch);
  }
  std::fill_n(batch.weights.address, t.batch_size, 1.0f);
}

}  // namespace fastis::FASTIS_ISA
