// A sampler's memory on the device: that of layout.h, with a tree of plain sums and counts (one
// integer atomic a level adds to it, and integer atomics commute), a top level of up to 1024 nodes
// that a block reads whole, and the partial results of a launch. Bytes a sample: 16 for the state,
// 16/15 x (8 + 4 + 4 + 4)/4 = 5.3 for the nodes, 4 for the claims.
//
// An item is capped, by the flag of its code, exactly if it weighs more than scalars.theta. A draw
// finds the theta that follows from the present sums; while no weight lies between the two, as
// scalars.ceiling and capped_floor tell, all flags are right for it as well.
#pragma once

#include "flatten.h"

namespace fastis {

constexpr int64_t kDeviceTop = 1024;
constexpr uint32_t kUnclaimed = 0xFFFFFFFFu;
constexpr int64_t kNoFloor = 0x7FFFFFFFFFFFFFFF;  // capped_floor while nothing is capped

// What changes when the items are cut at another theta than that of their flags.
struct Cut {
  int64_t uncapped, capped;  // weight that uncapped items gain, number that capped ones gain
  int64_t moved;             // items that change sides
  int64_t ceiling;           // the largest weight seen that is uncapped then
  int64_t from_largest;      // kNoFloor less the smallest weight that is capped then
  FASTIS_HD Cut operator+(const Cut& o) const {
    return {uncapped + o.uncapped, capped + o.capped, moved + o.moved,
            ceiling > o.ceiling ? ceiling : o.ceiling,
            from_largest > o.from_largest ? from_largest : o.from_largest};
  }
};

// Partial results of a launch, zeros at first.
struct Work {
  Rescale rescale;
  int64_t turn;  // which of the cuts is clear and next in turn
  Cut cuts[3];
};
static_assert(sizeof(Work) == 21 * 8);

struct DeviceTable : Table {
  uint64_t* sums = nullptr;    // [K] weights of the uncapped (seen, not capped) items below a node
  uint32_t* unseen = nullptr;  // [K] how many items below a node are unseen
  uint32_t* capped = nullptr;  // [K] how many are capped
  uint32_t* excluded = nullptr;  // [K] how many are excluded
  uint32_t* claims = nullptr;  // [N] the position that updates a sample; kUnclaimed between updates
  Work* work = nullptr;        // [1]
  unsigned* arrivals = nullptr;  // [1] blocks that have arrived at the end of a launch
};

}  // namespace fastis
