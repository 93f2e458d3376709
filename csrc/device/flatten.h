// Flattening on the device. Every thread finds out for itself what items are drawn with; where
// items have crossed the cap, all of them together bring the flags, theta and the counts up to
// date.
//
// By "cap": theta is the root of f(theta) = sum of min(W, theta) - theta B / D, which is concave.
// Newton's step from a theta at or above it is the water level of the items that are capped there,
// and stays at or above the root, so the levels fall until one follows from itself (math:
// flattening). Each of them is tried without moving an item; then those that lie between the old
// theta and the new one move.
#pragma once

#include "device/tree.h"

namespace fastis::device {

// What items are drawn with: capped ones theta, unseen ones `unseen`, and `offset` more each.
struct Flattening {
  bool settled;  // all flags are right for it
  uint64_t theta, unseen, offset;
};

// The largest weight with which `capped` items meet the cap beside a rest of weight `rest`:
// water_level() of code.h. 0 if so many cannot.
FASTIS_HD inline uint64_t level_of(const DeviceTable& t, uint64_t rest, uint64_t capped) {
  if (capped > t.max_capped) return 0;
  const uint64_t numerator = t.cap_numerator;
  const Divisor divisor(static_cast<uint64_t>(t.batch_size) * t.cap_denominator -
                        capped * numerator);
  const uint64_t quotient = divisor.divide(rest), remainder = rest - quotient * divisor.value;
  if (quotient >= t.theta_quotient) return static_cast<uint64_t>(kNoCap);
  const uint64_t level = numerator * quotient + divisor.divide(numerator * remainder);
  return level < static_cast<uint64_t>(kNoCap) ? level : static_cast<uint64_t>(kNoCap);
}

// ... with the unseen items, all of one weight, on the side of `theta` where they belong.
FASTIS_HD inline uint64_t level_of(const DeviceTable& t, uint64_t light, uint64_t capped,
                                   const Unseen& unseen, uint64_t theta) {
  if (unseen.weight > theta) return level_of(t, light, capped + unseen.number);
  return level_of(t, light + unseen.number * unseen.weight, capped);
}

FASTIS_HD inline uint64_t smaller(uint64_t a, uint64_t b) { return a < b ? a : b; }
FASTIS_HD inline uint64_t larger(uint64_t a, uint64_t b) { return a < b ? b : a; }

// Changes nothing. For most minibatches no item has crossed the cap.
FASTIS_HD inline Flattening flattening_of(const DeviceTable& t) {
  const Scalars& s = *t.scalars;
  const uint64_t ceiling = static_cast<uint64_t>(s.ceiling), light = static_cast<uint64_t>(s.light);
  const uint64_t before = static_cast<uint64_t>(s.theta);
  const Unseen unseen(t);
  if (t.flatten == Flatten::none || !s.valid) return {s.valid != 0, kNoCap, unseen.weight, 0};
  const uint64_t theta = level_of(t, light, static_cast<uint64_t>(s.num_capped), unseen, before);
  if (t.flatten == Flatten::mix) {
    return {ceiling <= theta && unseen.weight <= theta, kNoCap, unseen.weight, 0};
  }
  const bool same_side = (unseen.weight > before) == (unseen.weight > theta);
  return {ceiling <= theta && theta < static_cast<uint64_t>(s.capped_floor) && same_side, theta,
          smaller(theta, unseen.weight), 0};
}

// Subtrees small enough for every thread to have one.
FASTIS_HD inline int sweep_level(const DeviceTable& t) {
  return t.levels.depth > 1 ? t.levels.depth - 2 : 0;
}

// What would change with `theta`; weights above `watched` count for the ceiling. Cuts are added up
// in one of three places in turn: the next is cleared meanwhile, as nobody reads it any more.
template <class Grid>
FASTIS_HD Cut cut_at(Grid& grid, const DeviceTable& t, int64_t turn, uint64_t watched,
                     uint64_t theta) {
  Work& work = *t.work;
  Cut* const cut = work.cuts + turn % 3;
  const int level = sweep_level(t);
  grid.once([&] { work.cuts[(turn + 1) % 3] = Cut{}; });
  grid.template reduce<Cut>(
      t.levels.size[level],
      [&](int64_t node) {
        Cut mine{};
        visit(t, level, node, watched, [&](int64_t, uint64_t weight, bool was_capped) {
          const bool is_capped = weight > theta;
          const int64_t value = static_cast<int64_t>(weight);
          const int64_t moves = int64_t{is_capped} - int64_t{was_capped};
          mine = mine + Cut{-moves * value, moves, moves * moves, is_capped ? 0 : value,
                            is_capped ? kNoFloor - value : 0};
        });
        return mine;
      },
      [&](const Cut& mine) {
        atomic_add(&cut->light, mine.light);
        atomic_add(&cut->capped, mine.capped);
        atomic_add(&cut->moved, mine.moved);
        atomic_max(&cut->ceiling, mine.ceiling);
        atomic_max(&cut->from_largest, mine.from_largest);
      });
  grid.wait();
  return *cut;
}

template <class Grid>
FASTIS_HD void move_items(Grid& grid, const DeviceTable& t, uint64_t watched, uint64_t theta) {
  const int level = sweep_level(t);
  grid.each(t.levels.size[level], [&](int64_t node) {
    // Sums and counts below the node change on the way, but only by items that were visited.
    visit(t, level, node, watched, [&](int64_t index, uint64_t weight, bool was_capped) {
      if ((weight > theta) == was_capped) return;
      t.records[index].code ^= kCappedFlag;
      add_above(t, t.sums, index, was_capped ? weight : ~weight + 1);
      add_above(t, t.capped, index, was_capped ? ~0u : 1u);
    });
  });
  grid.wait();
}

// theta may fall by an eighth before the ceiling is reached and light items are searched again.
FASTIS_HD inline uint64_t watched_below(uint64_t theta) { return theta - theta / 8; }

template <class Grid>
FASTIS_HD Flattening update_cap(Grid& grid, const DeviceTable& t, const Unseen& unseen) {
  Scalars& s = *t.scalars;
  const uint64_t light = static_cast<uint64_t>(s.light);
  const uint64_t capped = static_cast<uint64_t>(s.num_capped);
  uint64_t theta = level_of(t, light, capped, unseen, static_cast<uint64_t>(s.theta));
  // More are capped than can be: from where nothing is.
  if (theta == 0) theta = level_of(t, static_cast<uint64_t>(s.total), 0, unseen, kNoCap);
  Cut cut{};
  uint64_t ceiling = 0;
  int64_t turn = t.work->turn;
  for (;;) {
    cut = cut_at(grid, t, turn++, watched_below(theta), theta);
    ceiling = larger(static_cast<uint64_t>(cut.ceiling), watched_below(theta));
    const uint64_t next = level_of(t, light + cut.light, capped + cut.capped, unseen, theta);
    if (next >= theta || next == 0) break;
    const bool between = ceiling > next || (unseen.weight > next) != (unseen.weight > theta);
    theta = next;
    if (!between) break;  // the same cut, so the same level
  }
  if (cut.moved > 0) move_items(grid, t, watched_below(theta), theta);
  grid.once([&] {
    t.work->turn = turn % 3;
    s.light += cut.light;
    s.num_capped += cut.capped;
    s.theta = static_cast<int64_t>(theta);
    s.ceiling = static_cast<int64_t>(ceiling);
    s.capped_floor = kNoFloor - cut.from_largest;
  });
  return {true, theta, smaller(theta, unseen.weight), 0};
}

// A constant added to every weight, so that the largest meets the cap.
template <class Grid>
FASTIS_HD Flattening update_mix(Grid& grid, const DeviceTable& t, const Unseen& unseen) {
  Scalars& s = *t.scalars;
  const uint64_t total = static_cast<uint64_t>(s.total) + unseen.number * unseen.weight;
  const uint64_t level = level_of(t, total, 0);
  // Only what exceeds the cap as it is matters.
  const int64_t turn = t.work->turn;
  const Cut cut = cut_at(grid, t, turn, level, kNoCap);
  const uint64_t ceiling = larger(static_cast<uint64_t>(cut.ceiling), level);
  const uint64_t peak = larger(ceiling, unseen.weight);
  grid.once([&] {
    t.work->turn = (turn + 1) % 3;
    s.ceiling = static_cast<int64_t>(ceiling);
  });
  return {true, kNoCap, unseen.weight, static_cast<uint64_t>(mix_offset(peak, total, t))};
}

template <class Grid>
FASTIS_COLD Flattening update_flattening(Grid& grid, const DeviceTable& t) {
  if (!t.scalars->valid) {
    grid.wait();  // until every block has read that
    rebuild(grid, t);
  }
  const Unseen unseen(t);
  if (t.flatten == Flatten::cap) return update_cap(grid, t, unseen);
  if (t.flatten == Flatten::mix) return update_mix(grid, t, unseen);
  return {true, kNoCap, unseen.weight, 0};
}

}  // namespace fastis::device
