// What draws from fixed weights take, on the CPU and on a device: weights as integers, alias
// tables, and stretches of a stream of random numbers.
#pragma once

#include "alias.h"
#include "format.h"
#include "layout.h"

namespace fastis {

// The integers floor(w 2^shift) of floats w, but at least 1 where w > 0, or (Format::int64) the
// values themselves. In the order of fastis.kernels.quantize.IntegerWeights.
struct IntegerWeights {
  Format format;
  Pointer<const void> values;  // [N]; on a device aligned to 16 bytes
  int64_t n;
  int shift;
  uint64_t total;
  Pointer<uint64_t> prefix;  // prefix sums over groups of 64 (CPU) or 256 (device) integers
};

struct AliasTable {
  Pointer<Bucket> buckets;  // [N]
  int64_t n;
  uint64_t total;
};

// Numbers first, ..., first + count - 1 of the stream of `seed`.
struct Draws {
  uint64_t seed, first;
  int64_t count;
};

}  // namespace fastis
