// Draws from an alias table on the device. A thread has kInFlight of them under way at once: the
// points are all made, the buckets all asked for, then all resolved, so that the waits for memory
// overlap. Bytes a draw: 16 read at random (a sector of 32), 12 written.
#pragma once

#include "alias.h"
#include "device/threads.h"

namespace fastis::device {

constexpr int kInFlight = 4;

// The points of one stream of random numbers; points that the caller has.
struct RandomPoints {
  uint64_t seed, first, total;
  FASTIS_HD uint64_t operator()(int64_t b) const {
    return scale(random128(seed, Stream::weights, 0, first + static_cast<uint64_t>(b)), total);
  }
};
struct GivenPoints {
  const uint64_t* points;
  FASTIS_HD uint64_t operator()(int64_t b) const { return points[b]; }
};

struct AliasTable {
  const Bucket* buckets;  // [N]
  int bits;
  Locator locate;

  AliasTable(const uint64_t* table, int64_t n, uint64_t total)
      : buckets(reinterpret_cast<const Bucket*>(table)),
        bits(Buckets(total, static_cast<uint64_t>(n)).bits),
        locate(Buckets(total, static_cast<uint64_t>(n))) {}
};

// All draws of one thread of a launch; those of neighbouring threads are neighbours.
template <class Points>
FASTIS_HD void draw_from(const AliasTable& table, const Points& points, const Threads& threads,
                         int64_t count, int64_t* indices, float* coefficients) {
  for (int64_t b = threads.number; b < count; b += kInFlight * threads.count) {
    uint64_t place[kInFlight], offset[kInFlight];
    BucketBits bucket[kInFlight];
    for (int j = 0; j < kInFlight; ++j) {
      const int64_t at = b + j * threads.count;
      place[j] = table.locate(at < count ? points(at) : 0, offset[j]);
    }
    for (int j = 0; j < kInFlight; ++j) bucket[j] = BucketBits::read(table.buckets + place[j]);
    for (int j = 0; j < kInFlight; ++j) {
      const int64_t at = b + j * threads.count;
      if (at >= count) continue;
      indices[at] = resolve(bucket[j], place[j], offset[j], table.bits, coefficients[at]);
    }
  }
}

}  // namespace fastis::device
