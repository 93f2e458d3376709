#include "cpu/tree.h"

#include <algorithm>

namespace fastis::FASTIS_ISA {

Spread::Spread(const Table& t, int64_t num_items) : table_(t) {
  const int64_t most = std::min(kMostNodes, num_items);
  while (level_ < t.levels.depth && t.levels.size[level_] > most) ++level_;
  if (level_ < t.levels.depth) std::fill_n(delta_, t.levels.size[level_] + kRadix, 0);
}

void Spread::finish() {
  for (; level_ < table_.levels.depth; ++level_) {
    uint64_t* starts = table_.starts + table_.levels.first[level_];
    int64_t group = 0;
    for (int64_t begin = 0; begin < table_.levels.size[level_]; begin += kRadix) {
      uint64_t running = 0;
      for (int64_t node = begin; node < begin + kRadix; ++node) {
        starts[node] += running;
        running += delta_[node];
      }
      delta_[group++] = running;
    }
    std::fill_n(delta_ + group, kRadix, 0);
  }
}

namespace {

// From each node's own sum to where it begins among its siblings; the level above gets the sums.
template <class T>
void add_up(const Levels& levels, T* starts) {
  for (int level = 0; level < levels.depth; ++level) {
    for (int64_t begin = 0; begin < levels.size[level]; begin += kRadix) {
      T* const group = starts + levels.first[level] + begin;
      T running = 0;
      for (int child = 0; child < kRadix; ++child) {
        const T own = group[child];
        group[child] = running;
        running += own;
      }
      if (level + 1 < levels.depth) starts[levels.first[level + 1] + begin / kRadix] = running;
    }
  }
}

}  // namespace

void rebuild(const Table& t) {
  Scalars& s = *t.scalars;
  const uint64_t theta = t.flatten == Flatten::cap ? find_theta(t) : uint64_t{kNoCap};
  const int e0 = exponent_of_table(t);
  std::fill_n(t.starts, t.levels.total(), 0);
  std::fill_n(t.unseen_starts, t.levels.total(), 0);
  std::fill_n(t.capped_starts, t.levels.total(), 0);
  s.light = s.num_capped = 0;
  for (int64_t i = 0; i < t.num_samples; ++i) {
    Record& record = t.records[i];
    const uint64_t weight = weight_of(record.code & ~kCappedFlag, e0);
    const bool capped = weight > theta;
    record.code = (record.code & ~kCappedFlag) | (capped ? kCappedFlag : 0);
    t.starts[i / kLeaf] += capped ? 0 : weight;
    t.unseen_starts[i / kLeaf] += record.last < 0;
    t.capped_starts[i / kLeaf] += capped;
    s.light += static_cast<int64_t>(capped ? 0 : weight);
    s.num_capped += capped;
  }
  add_up(t.levels, t.starts);
  add_up(t.levels, t.unseen_starts);
  add_up(t.levels, t.capped_starts);
  s.theta = static_cast<int64_t>(theta);
  s.offset = 0;
  s.ceiling = kNoCap;
  s.near_size = s.num_flipped = -1;
  s.valid = 1;
}

void rescale(const Table& t) {
  Scalars& s = *t.scalars;
  s.valid = 0;
  s.seen = 0;
  uint32_t largest = 0;
  for (int64_t i = 0; i < t.num_samples; ++i) {
    Record& record = t.records[i];
    if (record.last < 0) continue;
    ++s.seen;
    record.code = code_of(importance_of(record.mean, record.var, t.importance), 0);
    largest = std::max(largest, record.code);
  }
  if (s.seen == 0) return;
  // The mean, in integers relative to the largest weight: the same on every backend.
  const int spare = 62 - 16 - ceil_log2(static_cast<uint64_t>(t.num_samples));
  uint64_t sum = 0;
  for (int64_t i = 0; i < t.num_samples; ++i) {
    const Record& record = t.records[i];
    if (record.last < 0) continue;
    const int below = exponent_of(largest) - exponent_of(record.code);
    sum += below > 62 ? 0 : (mantissa_of(record.code) << spare) >> below;
  }
  const float floor = floor_of(sum, s.seen, exponent_of(largest) - spare, t.floor);
  s.exponent = exponent_for(floor, t.headroom);
  const uint32_t least = code_of(floor, 0);  // rounding keeps the order: floor before it or after
  uint64_t total = 0;
  for (int64_t i = 0; i < t.num_samples; ++i) {
    Record& record = t.records[i];
    if (record.last < 0) continue;
    record.code = std::max(record.code, least);
    total += weight_of(record.code, exponent_of_table(t));
  }
  s.total = static_cast<int64_t>(total);
}

}  // namespace fastis::FASTIS_ISA
