// Flattening on the device: what of csrc/cpu/structure.cpp brings the heavy list, theta and the
// weight of unseen items up to date, by one block. The same integers follow, since a set of heavy
// items is right when it holds exactly the items above theta, however it was reached.
#pragma once

#include "device/tree.h"

namespace fastis::device {

// The lists of a settling block, `room` long each.
struct Lists {
  int64_t *nodes, *next, *found;
  uint64_t* weights;
  int64_t* kept;

  FASTIS_HD explicit Lists(const DeviceTable& t)
      : nodes(t.work),
        next(t.work + t.room),
        found(t.work + 2 * t.room),
        weights(reinterpret_cast<uint64_t*>(t.work + 3 * t.room)),
        kept(t.work + 4 * t.room) {}
};

FASTIS_HD inline uint64_t mean_weight_of(const Scalars& s) {
  return s.seen == 0 ? kUniformWeight : static_cast<uint64_t>(s.total) / s.seen;
}

// theta for what is heavy at present; 0 when more is at the cap than can be right.
FASTIS_HD inline uint64_t level_of(const DeviceTable& t, bool unseen_heavy) {
  const Scalars& s = *t.scalars;
  const uint64_t num_unseen = static_cast<uint64_t>(t.num_samples - s.seen);
  const uint64_t rest =
      static_cast<uint64_t>(s.light) + (unseen_heavy ? 0 : num_unseen * mean_weight_of(s));
  const uint64_t capped = static_cast<uint64_t>(s.num_capped) + (unseen_heavy ? num_unseen : 0);
  if (capped * t.cap_numerator >= static_cast<uint64_t>(t.batch_size) * t.cap_denominator) return 0;
  return water_level(rest, capped, t.batch_size, t.cap_numerator, t.cap_denominator);
}

FASTIS_HD inline uint64_t heavy_weight(const DeviceTable& t, int64_t at) {
  return weight_of(t.records[t.heavy[at]].code & ~kCappedFlag, exponent_of_table(t));
}

// Collects the light items above `threshold`, with their weights, in lists.found and lists.weights;
// returns how many. Items above `watched` (at most the threshold) raise the ceiling to their
// weight. A node that weighs no more than `watched` has none, which bounds the nodes entered.
template <class Block>
FASTIS_HD int64_t find_heavier(Block& block, const DeviceTable& t, const Lists& lists,
                               uint64_t watched, uint64_t threshold) {
  Scalars& s = *t.scalars;
  int64_t* nodes = lists.nodes;
  int64_t* next = lists.next;
  const int top = t.levels.depth - 1;
  // Never more than there is room for; a table whose sums are wrong must not write elsewhere.
  const auto appended = [&] { return s.reserved[kFound] < t.room ? s.reserved[kFound] : t.room; };
  const auto append = [&](int64_t* list, int64_t value) {
    const int64_t at = atomic_add(&s.reserved[kFound], int64_t{1});
    if (at < t.room) list[at] = value;
    return at;
  };
  block.once([&] {
    s.reserved[kFound] = 0;
    s.ceiling = static_cast<int64_t>(watched);
  });
  block.each(t.levels.size[top], [&](int64_t node) {
    if (t.sums[t.levels.first[top] + node] > watched) append(nodes, node);
  });
  int64_t count = appended();
  for (int level = top - 1; level >= 0; --level) {
    const uint64_t* sums = t.sums + t.levels.first[level];
    block.once([&] { s.reserved[kFound] = 0; });
    block.each(count * kRadix, [&](int64_t i) {
      const int64_t node = nodes[i / kRadix] * kRadix + i % kRadix;
      if (node < t.levels.size[level] && sums[node] > watched) append(next, node);
    });
    count = appended();
    int64_t* const swapped = nodes;
    nodes = next;
    next = swapped;
  }
  block.once([&] { s.reserved[kFound] = 0; });
  block.each(count * kLeaf, [&](int64_t i) {
    const int64_t index = nodes[i / kLeaf] * kLeaf + i % kLeaf;
    if (index >= t.num_samples) return;
    const uint64_t weight = light_weight(t.records[index].code, exponent_of_table(t));
    if (weight > threshold) {
      const int64_t at = append(lists.found, index);
      if (at < t.room) lists.weights[at] = weight;
    } else if (weight > watched) {
      atomic_max(&s.ceiling, static_cast<int64_t>(weight));
    }
  });
  return appended();
}

// Moves the heavy items at or below theta back into the tree; true if there were any.
template <class Block>
FASTIS_HD bool drop_lighter(Block& block, const DeviceTable& t, const Lists& lists,
                            uint64_t theta) {
  Scalars& s = *t.scalars;
  const int64_t before = s.num_capped;
  block.once([&] { s.reserved[kNext] = 0; });
  block.each(before, [&](int64_t i) {
    const uint64_t weight = heavy_weight(t, i);
    const int64_t index = t.heavy[i];
    if (weight > theta) {
      lists.kept[atomic_add(&s.reserved[kNext], int64_t{1})] = index;
      return;
    }
    t.records[index].code &= ~kCappedFlag;
    add_to_sums(t, index, weight);
    atomic_add(&s.light, static_cast<int64_t>(weight));
    atomic_max(&s.ceiling, static_cast<int64_t>(weight));
  });
  const int64_t kept = s.reserved[kNext];
  block.each(kept, [&](int64_t i) { t.heavy[i] = lists.kept[i]; });
  block.once([&] { s.num_capped = kept; });
  return kept < before;
}

// Takes the light items above theta out of the tree; true if there were any.
template <class Block>
FASTIS_HD bool take_heavier(Block& block, const DeviceTable& t, const Lists& lists,
                            uint64_t theta) {
  Scalars& s = *t.scalars;
  const bool search = static_cast<uint64_t>(s.ceiling) > theta;
  block.wait();
  if (!search) return false;
  const int64_t found = find_heavier(block, t, lists, theta - theta / 8, theta);
  const int64_t before = s.num_capped;
  block.wait();
  block.each(found, [&](int64_t i) {
    const int64_t index = lists.found[i];
    t.records[index].code |= kCappedFlag;
    t.heavy[before + i] = index;
    add_to_sums(t, index, ~lists.weights[i] + 1);
    atomic_add(&s.light, -static_cast<int64_t>(lists.weights[i]));
  });
  block.once([&] { s.num_capped = before + found; });
  return found > 0;
}

// The order of the points: ascending indices. By rank: no two are equal.
template <class Block>
FASTIS_HD void sort_heavy(Block& block, const DeviceTable& t, const Lists& lists) {
  const int64_t count = t.scalars->num_capped;
  block.each(count, [&](int64_t i) {
    int64_t rank = 0;
    for (int64_t j = 0; j < count; ++j) rank += t.heavy[j] < t.heavy[i];
    lists.kept[rank] = t.heavy[i];
  });
  block.each(count, [&](int64_t i) { t.heavy[i] = lists.kept[i]; });
}

// Water filling: all drops, then all takes, as each can only lower theta.
template <class Block>
FASTIS_HD void settle_cap(Block& block, const DeviceTable& t) {
  Scalars& s = *t.scalars;
  const Lists lists(t);
  const uint64_t mean_weight = mean_weight_of(s);
  const bool has_unseen = s.seen < t.num_samples;
  bool unseen_heavy = has_unseen && s.theta != kNoCap && mean_weight > uint64_t(s.theta);
  uint64_t theta = level_of(t, unseen_heavy);
  block.wait();
  if (theta == 0) {  // too many to be right: take them for light and start again
    unseen_heavy = false;
    drop_lighter(block, t, lists, ~uint64_t{0});
    theta = level_of(t, unseen_heavy);
    block.wait();
  }
  for (bool dropped = true; dropped;) {
    const bool unseen_drops = unseen_heavy && mean_weight <= theta;
    if (unseen_drops) unseen_heavy = false;
    dropped = drop_lighter(block, t, lists, theta) || unseen_drops;
    theta = level_of(t, unseen_heavy);
    block.wait();
  }
  for (bool taken = true; taken;) {
    taken = take_heavier(block, t, lists, theta);
    if (has_unseen && !unseen_heavy && mean_weight > theta) unseen_heavy = taken = true;
    theta = level_of(t, unseen_heavy);
    block.wait();
  }
  sort_heavy(block, t, lists);
  block.once([&] {
    s.theta = static_cast<int64_t>(theta);
    s.unseen = static_cast<int64_t>(theta < mean_weight ? theta : mean_weight);
  });
}

// A constant added to every weight, so that the largest meets the cap.
template <class Block>
FASTIS_HD void settle_mix(Block& block, const DeviceTable& t) {
  Scalars& s = *t.scalars;
  const Lists lists(t);
  const uint64_t mean_weight = mean_weight_of(s);
  const int64_t num_unseen = t.num_samples - s.seen;
  const uint64_t total = static_cast<uint64_t>(s.light) + num_unseen * mean_weight;
  const uint64_t theta = water_level(total, 0, t.batch_size, t.cap_numerator, t.cap_denominator);
  const bool search = static_cast<uint64_t>(s.ceiling) > theta;
  block.wait();
  uint64_t peak = num_unseen > 0 ? mean_weight : 0;
  if (search) {
    find_heavier(block, t, lists, theta, ~uint64_t{0});
    const uint64_t ceiling = static_cast<uint64_t>(s.ceiling);
    peak = peak > ceiling ? peak : ceiling;
  }
  block.once([&] {
    s.offset = mix_offset(peak, total, t);
    s.theta = kNoCap;
    s.unseen = static_cast<int64_t>(mean_weight);
  });
}

template <class Block>
FASTIS_HD void settle(Block& block, const DeviceTable& t) {
  if (t.flatten == Flatten::cap) return settle_cap(block, t);
  if (t.flatten == Flatten::mix) return settle_mix(block, t);
  block.once([&] { t.scalars->unseen = static_cast<int64_t>(mean_weight_of(*t.scalars)); });
}

// What items are drawn with: heavy ones theta, unseen ones `unseen`, and `offset` more each.
struct Flattening {
  bool settled;  // the heavy list is right as it is, and the rest of this too
  uint64_t theta, unseen, offset;
};

// Changes nothing, so that every block can find out for itself. For most minibatches no item
// crosses the cap, and theta follows from the present sums.
template <class Block>
FASTIS_HD Flattening flattening_of(Block& block, const DeviceTable& t) {
  const Scalars& s = *t.scalars;
  const uint64_t mean_weight = mean_weight_of(s), ceiling = static_cast<uint64_t>(s.ceiling);
  if (!s.valid) return {false, 0, 0, 0};
  if (t.flatten == Flatten::none) return {true, static_cast<uint64_t>(kNoCap), mean_weight, 0};
  const bool has_unseen = s.seen < t.num_samples;
  if (t.flatten == Flatten::mix) {
    const uint64_t total = static_cast<uint64_t>(s.light) + (t.num_samples - s.seen) * mean_weight;
    const uint64_t level = water_level(total, 0, t.batch_size, t.cap_numerator, t.cap_denominator);
    const bool below = ceiling <= level && (!has_unseen || mean_weight <= level);
    return {below, static_cast<uint64_t>(kNoCap), mean_weight, 0};
  }
  const bool unseen_heavy =
      has_unseen && s.theta != kNoCap && mean_weight > static_cast<uint64_t>(s.theta);
  const uint64_t theta = level_of(t, unseen_heavy);
  const double lighter =
      block.sum(s.num_capped, [&](int64_t i) { return heavy_weight(t, i) <= theta ? 1.0 : 0.0; });
  const bool same_side = !has_unseen || unseen_heavy == (mean_weight > theta);
  return {theta > 0 && ceiling <= theta && lighter == 0 && same_side, theta,
          theta < mean_weight ? theta : mean_weight, 0};
}

}  // namespace fastis::device
