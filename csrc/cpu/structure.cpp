#include "cpu/structure.h"

#include <algorithm>

namespace fastis::FASTIS_ISA {
namespace {

int e0(const Table& t) { return static_cast<int>(t.scalars->exponent); }

// Calls visit(index, weight) for every light item heavier than `threshold` below a node's children.
// A node that weighs no more has none, so at most total / threshold nodes of a level are entered.
template <class Visit>
void visit_heavier(const Table& t, int level, int64_t parent, uint64_t total, uint64_t threshold,
                   const Visit& visit) {
  const uint64_t* starts = t.starts + t.levels.first[level] + parent * kRadix;
  for (unsigned left = heavier_in_group(starts, total, threshold); left != 0; left &= left - 1) {
    const int child = __builtin_ctz(left);
    const int64_t node = parent * kRadix + child;
    if (level > 0) {
      const uint64_t end = child + 1 < kRadix ? starts[child + 1] : total;
      visit_heavier(t, level - 1, node, end - starts[child], threshold, visit);
      continue;
    }
    const int64_t end = std::min((node + 1) * kLeaf, t.num_samples);
    for (int64_t index = node * kLeaf; index < end; ++index) {
      const uint64_t weight = light_weight(t.records[index].code, e0(t));
      if (weight > threshold) visit(index, weight);
    }
  }
}

template <class Visit>
void visit_heavier(const Table& t, uint64_t threshold, const Visit& visit) {
  const uint64_t total = static_cast<uint64_t>(t.scalars->light);
  if (total > threshold) visit_heavier(t, t.levels.depth - 1, 0, total, threshold, visit);
}

// The list of heavy items is kept in the order of their indices.
void make_heavy(const Table& t, int64_t index, uint64_t weight) {
  t.records[index].code |= kCappedFlag;
  add_to_sums(t, index, ~weight + 1, t.levels.depth);
  t.scalars->light -= static_cast<int64_t>(weight);
  int64_t at = t.scalars->num_capped++;
  for (; at > 0 && t.heavy[at - 1] > index; --at) {
    t.heavy[at] = t.heavy[at - 1];
    t.heavy_weights[at] = t.heavy_weights[at - 1];
  }
  t.heavy[at] = index;
  t.heavy_weights[at] = weight;
}

void make_light(const Table& t, int64_t at) {
  Scalars& s = *t.scalars;
  const int64_t index = t.heavy[at];
  const uint64_t weight = t.heavy_weights[at];
  const int64_t last = --s.num_capped;
  for (; at < last; ++at) {
    t.heavy[at] = t.heavy[at + 1];
    t.heavy_weights[at] = t.heavy_weights[at + 1];
  }
  t.records[index].code &= ~kCappedFlag;
  add_to_sums(t, index, weight, t.levels.depth);
  s.light += static_cast<int64_t>(weight);
  s.ceiling = std::max(s.ceiling, static_cast<int64_t>(weight));
}

// Makes every light item above theta heavy; false if there is none. The ceiling is then the largest
// of the others, or a bit below theta when all are lighter: theta may fall that far before the next
// search.
bool take_heavier(const Table& t, uint64_t theta) {
  Scalars& s = *t.scalars;
  if (static_cast<uint64_t>(s.ceiling) <= theta) return false;
  const uint64_t watched = theta - theta / 8;
  uint64_t ceiling = watched;
  // Those found wait behind the end of the list. There is room: all of them will be at the cap.
  const int64_t before = s.num_capped;
  int64_t found = 0;
  visit_heavier(t, watched, [&](int64_t index, uint64_t weight) {
    if (weight <= theta) {
      ceiling = std::max(ceiling, weight);
      return;
    }
    t.heavy[before + found] = index;
    t.heavy_weights[before + found] = weight;
    ++found;
  });
  s.ceiling = static_cast<int64_t>(ceiling);
  for (int64_t i = before; i < before + found; ++i) make_heavy(t, t.heavy[i], t.heavy_weights[i]);
  return found > 0;
}

// Water filling. A set of heavy items is right when it holds exactly the items above theta, and
// dropping an item at or below theta, or taking one above it, can only lower theta: so first all
// drops, then all takes, reach it. The unseen items, all of one weight, drop and take together.
void flatten_by_cap(const Table& t, uint64_t mean_weight) {
  Scalars& s = *t.scalars;
  const uint64_t num_unseen = static_cast<uint64_t>(t.num_samples - s.seen);
  bool unseen_heavy = num_unseen > 0 && s.theta != kNoCap && mean_weight > uint64_t(s.theta);
  const auto level = [&] {
    const uint64_t rest =
        static_cast<uint64_t>(s.light) + (unseen_heavy ? 0 : num_unseen * mean_weight);
    const uint64_t capped = static_cast<uint64_t>(s.num_capped) + (unseen_heavy ? num_unseen : 0);
    if (capped * t.cap_numerator >= static_cast<uint64_t>(t.batch_size) * t.cap_denominator) {
      return uint64_t{0};  // too many to be right: take them for light and start again
    }
    return water_level(rest, capped, t.batch_size, t.cap_numerator, t.cap_denominator);
  };
  uint64_t theta = level();
  if (theta == 0) {
    unseen_heavy = false;
    while (s.num_capped > 0) make_light(t, s.num_capped - 1);
    theta = level();
  }
  for (bool dropped = true; dropped;) {
    dropped = false;
    if (unseen_heavy && mean_weight <= theta) {
      unseen_heavy = false;
      dropped = true;
    }
    for (int64_t at = s.num_capped - 1; at >= 0; --at) {
      if (t.heavy_weights[at] > theta) continue;
      make_light(t, at);
      dropped = true;
    }
    if (dropped) theta = level();
  }
  for (bool taken = true; taken;) {
    taken = take_heavier(t, theta);
    if (num_unseen > 0 && !unseen_heavy && mean_weight > theta) unseen_heavy = taken = true;
    if (taken) theta = level();
  }
  s.theta = static_cast<int64_t>(theta);
  s.unseen = static_cast<int64_t>(std::min(theta, mean_weight));
}

// A constant added to every weight, so that the largest meets the cap.
void flatten_by_mix(const Table& t, uint64_t mean_weight) {
  Scalars& s = *t.scalars;
  const int64_t num_unseen = t.num_samples - s.seen;
  const uint64_t total = static_cast<uint64_t>(s.light) + num_unseen * mean_weight;
  uint64_t peak = num_unseen > 0 ? mean_weight : 0;
  // Only what exceeds the cap as it is matters.
  const uint64_t theta = water_level(total, 0, t.batch_size, t.cap_numerator, t.cap_denominator);
  if (static_cast<uint64_t>(s.ceiling) > theta) {
    uint64_t ceiling = theta;
    visit_heavier(t, theta, [&](int64_t, uint64_t weight) { ceiling = std::max(ceiling, weight); });
    s.ceiling = static_cast<int64_t>(ceiling);
    peak = std::max(peak, ceiling);
  }
  s.offset = mix_offset(peak, total, t);
  s.theta = kNoCap;
  s.unseen = static_cast<int64_t>(mean_weight);
}

}  // namespace

void count_seen(const Table& t, int64_t index) {
  for (int level = 0; level < t.levels.depth; ++level) {
    const int64_t node = Levels::above(index, level), child = node & (kRadix - 1);
    uint32_t* group = t.unseen_starts + t.levels.first[level] + (node - child);
    for (int j = 0; j < kRadix; ++j) group[j] -= j > child ? 1 : 0;
  }
}

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

void rebuild(const Table& t) {
  Scalars& s = *t.scalars;
  const Levels& levels = t.levels;
  // First each node's own sum, level by level, then where it begins.
  std::fill_n(t.starts, levels.total(), 0);
  std::fill_n(t.unseen_starts, levels.total(), 0);
  for (int64_t i = 0; i < t.num_samples; ++i) {
    Record& record = t.records[i];
    record.code &= ~kCappedFlag;
    t.starts[i / kLeaf] += weight_of(record.code, e0(t));
    t.unseen_starts[i / kLeaf] += record.last < 0;
  }
  for (int level = 0; level < levels.depth; ++level) {
    const bool is_top = level + 1 == levels.depth;
    for (int64_t begin = 0; begin < levels.size[level]; begin += kRadix) {
      const int64_t group = levels.first[level] + begin;
      uint64_t weight = 0;
      uint32_t unseen = 0;
      for (int64_t node = group; node < group + kRadix; ++node) {
        const uint64_t own = t.starts[node];
        const uint32_t own_unseen = t.unseen_starts[node];
        t.starts[node] = weight;
        t.unseen_starts[node] = unseen;
        weight += own;
        unseen += own_unseen;
      }
      if (is_top) continue;
      t.starts[levels.first[level + 1] + begin / kRadix] = weight;
      t.unseen_starts[levels.first[level + 1] + begin / kRadix] = unseen;
    }
  }
  s.light = s.total;
  s.num_capped = 0;
  s.theta = kNoCap;
  s.offset = 0;
  s.ceiling = kNoCap;
  s.valid = 1;
}

void settle(const Table& t) {
  Scalars& s = *t.scalars;
  if (!s.valid) rebuild(t);
  const uint64_t mean_weight = s.seen == 0 ? kUniformWeight : uint64_t(s.total) / s.seen;
  switch (t.flatten) {
    case Flatten::cap:
      return flatten_by_cap(t, mean_weight);
    case Flatten::mix:
      return flatten_by_mix(t, mean_weight);
    case Flatten::none:
      s.unseen = static_cast<int64_t>(mean_weight);
  }
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
    total += weight_of(record.code, e0(t));
  }
  s.total = static_cast<int64_t>(total);
}

}  // namespace fastis::FASTIS_ISA
