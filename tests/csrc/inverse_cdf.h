// The compiled draw at points of the tests' choice. Its distribution is internal to the file that
// draws, so this file contains that one.
#pragma once

#include "cpu/table_draw.cpp"

namespace fastis {

// The items at `points`, each below the total of the distribution as it stands (past the warm-up;
// only for tables with states), and their coefficients.
inline void inverse_cdf(Pointer<const Table> table, Pointer<const uint64_t> points /* [count] */,
                        int64_t count, const Batch& batch /* [count] */) {
  using namespace FASTIS_ISA;
  const Distribution distribution(*table.address);
  for (int64_t first = 0; first < count; first += kBlock) {
    const int size = static_cast<int>(std::min<int64_t>(kBlock, count - first));
    distribution.find(points + first, size, {batch.indices + first, batch.weights + first});
  }
}

}  // namespace fastis
