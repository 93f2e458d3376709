#include "cpu/structure.h"

#include <algorithm>

namespace fastis::FASTIS_ISA {
namespace {

int e0(const Table& t) { return static_cast<int>(t.scalars->exponent); }

// The largest light code among 16 records. As signed integers the heavy ones are negative.
uint32_t peak_of_records(const Table& t, int64_t node) {
  const int64_t begin = node * kRadix, end = std::min(begin + kRadix, t.num_samples);
  int32_t peak = 0;
  for (int64_t i = begin; i < end; ++i) {
    peak = std::max(peak, static_cast<int32_t>(t.records[i].code));
  }
  return static_cast<uint32_t>(peak);
}

uint32_t peak_of_children(const Table& t, int level, int64_t node) {
  const uint32_t* child = t.peaks + t.levels.first[level - 1] + node * kRadix;
  return *std::max_element(child, child + kRadix);
}

// The light item of the largest code, the first of them where several have it.
int64_t find_peak(const Table& t, uint32_t peak) {
  int64_t node = 0;
  for (int level = t.levels.depth - 1; level >= 0; --level) {
    const uint32_t* peaks = t.peaks + t.levels.first[level];
    node *= level == t.levels.depth - 1 ? 0 : kRadix;
    while (peaks[node] != peak) ++node;
  }
  int64_t index = node * kRadix;
  while (t.records[index].code != peak) ++index;
  return index;
}

uint32_t top_peak(const Table& t) {
  const int top = t.levels.depth - 1;
  const uint32_t* peaks = t.peaks + t.levels.first[top];
  return *std::max_element(peaks, peaks + t.levels.size[top]);
}

void make_heavy(const Table& t, int64_t index) {
  const uint32_t code = t.records[index].code;
  const uint64_t weight = weight_of(code, e0(t));
  t.records[index].code |= kHeavyFlag;
  add_to_sums(t, index, ~weight + 1);
  t.scalars->light -= static_cast<int64_t>(weight);
  refresh_peaks(t, index, code, 0);
  int64_t at = t.scalars->num_heavy++;
  for (; at > 0 && t.heavy[at - 1] > index; --at) {
    t.heavy[at] = t.heavy[at - 1];
    t.heavy_weights[at] = t.heavy_weights[at - 1];
  }
  t.heavy[at] = index;
  t.heavy_weights[at] = weight;
}

void make_light(const Table& t, int64_t at) {
  const int64_t index = t.heavy[at];
  const uint64_t weight = t.heavy_weights[at];
  const int64_t last = --t.scalars->num_heavy;
  for (; at < last; ++at) {
    t.heavy[at] = t.heavy[at + 1];
    t.heavy_weights[at] = t.heavy_weights[at + 1];
  }
  t.records[index].code &= ~kHeavyFlag;
  add_to_sums(t, index, weight);
  t.scalars->light += static_cast<int64_t>(weight);
  refresh_peaks(t, index, 0, t.records[index].code);
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
    const uint64_t capped = static_cast<uint64_t>(s.num_heavy) + (unseen_heavy ? num_unseen : 0);
    if (capped * t.cap_numerator >= static_cast<uint64_t>(t.batch_size) * t.cap_denominator) {
      return uint64_t{0};  // too many to be right: take them for light and start again
    }
    return water_level(rest, capped, t.batch_size, t.cap_numerator, t.cap_denominator);
  };
  uint64_t theta = level();
  if (theta == 0) {
    unseen_heavy = false;
    while (s.num_heavy > 0) make_light(t, s.num_heavy - 1);
    theta = level();
  }
  for (bool dropped = true; dropped;) {
    dropped = false;
    if (unseen_heavy && mean_weight <= theta) {
      unseen_heavy = false;
      dropped = true;
    }
    for (int64_t at = s.num_heavy - 1; at >= 0; --at) {
      if (t.heavy_weights[at] > theta) continue;
      make_light(t, at);
      dropped = true;
    }
    if (dropped) theta = level();
  }
  for (uint32_t peak = top_peak(t);; peak = top_peak(t)) {
    const bool take_unseen = num_unseen > 0 && !unseen_heavy && mean_weight > theta;
    if (take_unseen) {
      unseen_heavy = true;
    } else if (weight_of(peak, e0(t)) > theta) {
      make_heavy(t, find_peak(t, peak));
    } else {
      break;
    }
    theta = level();
  }
  s.theta = static_cast<int64_t>(theta);
  s.unseen = static_cast<int64_t>(std::min(theta, mean_weight));
}

// The constant added to every weight so that the largest meets the cap:
// B (peak + c) <= D (total + N c).
void flatten_by_mix(const Table& t, uint64_t mean_weight) {
  Scalars& s = *t.scalars;
  const int64_t num_unseen = t.num_samples - s.seen;
  const uint64_t total = static_cast<uint64_t>(s.light) + num_unseen * mean_weight;
  uint64_t peak = weight_of(top_peak(t), e0(t));
  if (num_unseen > 0) peak = std::max(peak, mean_weight);
  const __int128 batch = static_cast<__int128>(t.batch_size) * t.cap_denominator;
  const __int128 over = batch * peak - static_cast<__int128>(t.cap_numerator) * total;
  const __int128 divisor = static_cast<__int128>(t.cap_numerator) * t.num_samples - batch;
  s.offset = over <= 0 ? 0 : static_cast<int64_t>((over + divisor - 1) / divisor);
  s.theta = kNoCap;
  s.unseen = static_cast<int64_t>(mean_weight);
}

}  // namespace

void add_to_sums(const Table& t, int64_t index, uint64_t delta) {
  for (int level = 0; level < t.levels.depth; ++level) {
    index /= kRadix;
    const int64_t child = index % kRadix;
    uint64_t* group = t.sums + t.levels.first[level] + (index - child);
    for (int64_t j = 0; j < kRadix; ++j) group[j] += j >= child ? delta : 0;
  }
}

void count_seen(const Table& t, int64_t index) {
  for (int level = 0; level < t.levels.depth; ++level) {
    index /= kRadix;
    const int child = static_cast<int>(index % kRadix);
    uint32_t* group = t.unseen + t.levels.first[level] + (index - child);
    for (int j = 0; j < kRadix; ++j) group[j] -= j >= child ? 1 : 0;
  }
}

void refresh_peaks(const Table& t, int64_t index, uint32_t old_code, uint32_t new_code) {
  for (int level = 0; level < t.levels.depth; ++level) {
    index /= kRadix;
    uint32_t& peak = t.peaks[t.levels.first[level] + index];
    const uint32_t before = peak;
    if (new_code >= before) {
      peak = new_code;
    } else if (old_code == before) {
      peak = level == 0 ? peak_of_records(t, index) : peak_of_children(t, level, index);
    }
    if (peak == before) return;
    old_code = before;
    new_code = peak;
  }
}

void rebuild(const Table& t) {
  Scalars& s = *t.scalars;
  const Levels& levels = t.levels;
  std::fill_n(t.sums, levels.total(), 0);
  std::fill_n(t.unseen, levels.total(), 0);
  std::fill_n(t.peaks, levels.total(), 0);
  for (int64_t i = 0; i < t.num_samples; ++i) {
    Record& record = t.records[i];
    record.code &= ~kHeavyFlag;
    const int64_t node = i / kRadix;
    t.sums[node] += weight_of(record.code, e0(t));
    t.unseen[node] += record.last < 0;
    t.peaks[node] = std::max(t.peaks[node], record.code);
  }
  for (int level = 0; level < levels.depth; ++level) {
    const bool is_top = level + 1 == levels.depth;
    for (int64_t begin = 0; begin < levels.size[level]; begin += kRadix) {
      const int64_t group = levels.first[level] + begin;
      for (int j = 1; j < kRadix; ++j) {
        t.sums[group + j] += t.sums[group + j - 1];
        t.unseen[group + j] += t.unseen[group + j - 1];
      }
      if (is_top) continue;
      const int64_t parent = levels.first[level + 1] + begin / kRadix;
      t.sums[parent] = t.sums[group + kRadix - 1];
      t.unseen[parent] = t.unseen[group + kRadix - 1];
      t.peaks[parent] = *std::max_element(t.peaks + group, t.peaks + group + kRadix);
    }
  }
  s.light = s.total;
  s.num_heavy = 0;
  s.theta = kNoCap;
  s.offset = 0;
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
    const Record& record = t.records[i];
    if (record.last < 0) continue;
    ++s.seen;
    largest = std::max(largest, code_of(importance_of(record.mean, record.var, t.importance), 0));
  }
  if (s.seen == 0) return;
  // The mean, in integers relative to the largest weight: the same on every backend.
  const int spare = 62 - 16 - ceil_log2(static_cast<uint64_t>(t.num_samples));
  uint64_t sum = 0;
  for (int64_t i = 0; i < t.num_samples; ++i) {
    const Record& record = t.records[i];
    if (record.last < 0) continue;
    const uint32_t code = code_of(importance_of(record.mean, record.var, t.importance), 0);
    const int below = exponent_of(largest) - exponent_of(code);
    sum += below > 62 ? 0 : (mantissa_of(code) << spare) >> below;
  }
  const float floor = floor_of(sum, s.seen, exponent_of(largest) - spare, t.floor);
  s.exponent = exponent_for(floor, t.headroom);
  uint64_t total = 0;
  for (int64_t i = 0; i < t.num_samples; ++i) {
    Record& record = t.records[i];
    if (record.last < 0) continue;
    record.code = code_of(importance_of(record.mean, record.var, t.importance), floor);
    total += weight_of(record.code, e0(t));
  }
  s.total = static_cast<int64_t>(total);
}

}  // namespace fastis::FASTIS_ISA
