// Flattening on the device; the arithmetic is that of csrc/flatten.h. Every thread finds out for
// itself what items are drawn with; where items have crossed the cap, all of them together bring
// theta, the flags and the counts up to date: levels are tried from above the root without moving
// an item, then the items between the old theta and the new one move.
#pragma once

#include "device/tree.h"

namespace fastis::device {

// What active items are drawn with: capped ones theta, unseen ones `unseen`, and `offset` more
// each.
struct Flattening {
  bool up_to_date;  // all flags are right for it
  uint64_t theta, unseen, offset;
  bool alike = false;  // drawn with the offset alone
};

FASTIS_HD inline Flattening all_alike(bool up_to_date) {
  return {up_to_date, static_cast<uint64_t>(kNoCap), 0, 1, true};
}

FASTIS_HD inline uint64_t smaller(uint64_t a, uint64_t b) { return a < b ? a : b; }
FASTIS_HD inline uint64_t larger(uint64_t a, uint64_t b) { return a < b ? b : a; }

// Changes nothing. For most minibatches no item has crossed the cap.
FASTIS_HD inline Flattening flattening_of(const DeviceTable& t) {
  const Scalars& s = *t.scalars;
  const uint64_t ceiling = static_cast<uint64_t>(s.ceiling),
                 uncapped = static_cast<uint64_t>(s.uncapped);
  const uint64_t before = static_cast<uint64_t>(s.theta);
  const Unseen unseen(t);
  if (drawn_alike(t)) return all_alike(s.valid != 0);
  if (t.flatten == Flatten::none || !s.valid) return {s.valid != 0, kNoCap, unseen.weight, 0};
  const uint64_t theta =
      water_level(t, uncapped, static_cast<uint64_t>(s.num_capped), unseen, before);
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
        atomic_add(&cut->uncapped, mine.uncapped);
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
      t.states[index].code ^= kCappedFlag;
      add_above(t, t.sums, index, was_capped ? weight : ~weight + 1);
      add_above(t, t.capped, index, was_capped ? ~0u : 1u);
    });
  });
  grid.wait();
}

// theta may fall by an eighth before the ceiling is reached and uncapped items are searched again.
FASTIS_HD inline uint64_t watched_below(uint64_t theta) { return theta - theta / 8; }

template <class Grid>
FASTIS_HD Flattening update_cap(Grid& grid, const DeviceTable& t, const Unseen& unseen) {
  Scalars& s = *t.scalars;
  const uint64_t uncapped = static_cast<uint64_t>(s.uncapped);
  const uint64_t capped = static_cast<uint64_t>(s.num_capped);
  uint64_t theta = water_level(t, uncapped, capped, unseen, static_cast<uint64_t>(s.theta));
  // More are capped than can be: from where nothing is.
  if (theta == 0) theta = water_level(t, static_cast<uint64_t>(s.total), 0, unseen, kNoCap);
  Cut cut{};
  uint64_t ceiling = 0;
  int64_t turn = t.work->turn;
  for (;;) {
    cut = cut_at(grid, t, turn++, watched_below(theta), theta);
    ceiling = larger(static_cast<uint64_t>(cut.ceiling), watched_below(theta));
    const uint64_t next =
        water_level(t, uncapped + cut.uncapped, capped + cut.capped, unseen, theta);
    if (next >= theta || next == 0) break;
    const bool between = ceiling > next || (unseen.weight > next) != (unseen.weight > theta);
    theta = next;
    if (!between) break;  // the same cut, so the same level
  }
  if (cut.moved > 0) move_items(grid, t, watched_below(theta), theta);
  grid.once([&] {
    t.work->turn = turn % 3;
    s.uncapped += cut.uncapped;
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
  const uint64_t level = water_level(t, total, 0);
  // Only what exceeds the cap as it is matters.
  const int64_t turn = t.work->turn;
  const Cut cut = cut_at(grid, t, turn, level, kNoCap);
  const uint64_t ceiling = larger(static_cast<uint64_t>(cut.ceiling), level);
  const uint64_t peak = larger(ceiling, unseen.weight);
  grid.once([&] {
    t.work->turn = (turn + 1) % 3;
    s.ceiling = static_cast<int64_t>(ceiling);
  });
  const int64_t offset = mix_offset(t, peak, total);
  if (offset < 0) return all_alike(true);
  return {true, kNoCap, unseen.weight, static_cast<uint64_t>(offset)};
}

template <class Grid>
FASTIS_COLD Flattening update_flattening(Grid& grid, const DeviceTable& t) {
  ensure_tree(grid, t);
  if (drawn_alike(t)) return all_alike(true);
  const Unseen unseen(t);
  if (t.flatten == Flatten::cap) return update_cap(grid, t, unseen);
  if (t.flatten == Flatten::mix) return update_mix(grid, t, unseen);
  return {true, kNoCap, unseen.weight, 0};
}

}  // namespace fastis::device
