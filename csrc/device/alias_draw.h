// Draws from an alias table on the device. A thread has kInFlight of them under way at once: the
// points are all made, the buckets all asked for, then all read, so that the waits for memory
// overlap. Bytes a draw: 16 read at random (a sector of 32), 12 written.
#pragma once

#include "device/categorical.h"
#include "device/threads.h"

namespace fastis::device {

constexpr int kInFlight = 4;

// Points for the inverse of the CDF: random ones, or those that lie in memory.
struct RandomPoints {
  Draws draws;
  uint64_t total;
  FASTIS_HD uint64_t operator()(int64_t b) const { return random_below(draws, b, total); }
};
struct PointsInMemory {
  const uint64_t* points;
  FASTIS_HD uint64_t operator()(int64_t b) const { return points[b]; }
};

// The inverse of an alias table's CDF.
struct AliasInverseCdf {
  const Bucket* buckets;  // [N]
  int bits;
  BucketFinder bucket_of;

  explicit AliasInverseCdf(const AliasTable& table)
      : buckets(table.buckets),
        bits(Buckets(table.total, static_cast<uint64_t>(table.n)).bits),
        bucket_of(Buckets(table.total, static_cast<uint64_t>(table.n))) {}
};

// All draws of one thread of a launch; those of neighbouring threads are neighbours.
template <class Points>
FASTIS_HD void alias_draw(const AliasInverseCdf& table, const Points& points,
                          const Threads& threads, int64_t count, const Batch& batch) {
  for (int64_t b = threads.number; b < count; b += kInFlight * threads.count) {
    uint64_t place[kInFlight], offset[kInFlight];
    BucketBits bucket[kInFlight];
    for (int j = 0; j < kInFlight; ++j) {
      const int64_t at = b + j * threads.count;
      place[j] = table.bucket_of(at < count ? points(at) : 0, offset[j]);
    }
    for (int j = 0; j < kInFlight; ++j) bucket[j] = BucketBits::read(table.buckets + place[j]);
    for (int j = 0; j < kInFlight; ++j) {
      const int64_t at = b + j * threads.count;
      if (at >= count) continue;
      batch.indices[at] = item_at(bucket[j], place[j], offset[j], table.bits, batch.weights[at]);
    }
  }
}

}  // namespace fastis::device
