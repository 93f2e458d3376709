// A sampler's memory on the device: that of table.h, with a tree of plain sums (one integer atomic
// a level adds to it, and integer atomics commute), a top level of up to 1024 nodes that a block
// reads whole, and what a launch needs besides. Bytes a sample: 16 for the record, 16/15 x (8 +
// 4)/4 = 3.2 for the nodes, 4 for the claims.
#pragma once

#include "table.h"

namespace fastis {

constexpr int64_t kDeviceTop = 1024;
constexpr uint32_t kUnclaimed = 0xFFFFFFFFu;

struct DeviceTable : Table {
  uint64_t* sums = nullptr;    // [K] weights of the seen light items below a node
  uint32_t* unseen = nullptr;  // [K] how many items below a node are unseen
  uint32_t* claims = nullptr;  // [N] the position that updates a sample; kUnclaimed between updates
  int64_t* work = nullptr;     // [5 x room] lists of a settling block, see device/settle.h
  unsigned* arrivals = nullptr;  // [1] blocks that have arrived at the end of a launch
  int64_t room = 0;              // of each list; more than 8/7 ceil(B/D) nodes are never entered
};

// Positions of Scalars::reserved that the device uses.
enum Reserved { kOutside = 0, kFound = 1, kNext = 2 };

}  // namespace fastis
