// Draws from an alias table: one random access each. Bytes moved: 16 read (a cache line), 12
// written, a draw.
#include "cpu/random.h"
#include "fastis.h"
#include "integer_weights.h"

namespace fastis::FASTIS_ISA {
namespace {

// Draws whose buckets are fetched while those of the group before are read: about as many as a core
// can wait for at once.
constexpr int kGroup = 16;

struct Group {
  int size;
  uint64_t bucket[kGroup], offset[kGroup];
};

// The inverse of an alias table's CDF, for many points.
class InverseCdf {
 public:
  explicit InverseCdf(const AliasTable& table)
      : table_(table.buckets), buckets_(table.total, table.n), bucket_of_(buckets_) {}

  // points_of(first, size, points) gives points number first, ..., first + size - 1.
  template <class PointsOf>
  void run(int64_t count, const Batch& batch, const PointsOf& points_of) const {
    Group groups[2];
    const auto fetch = [&](int64_t first, Group& group) {
      uint64_t points[kGroup];
      const int64_t left = count - first;
      group.size = left <= 0 ? 0 : left < kGroup ? static_cast<int>(left) : kGroup;
      if (group.size == 0) return;
      points_of(first, group.size, points);
      for (int i = 0; i < group.size; ++i) {
        group.bucket[i] = bucket_of_(points[i], group.offset[i]);
        __builtin_prefetch(table_ + group.bucket[i]);
      }
    };
    int now = 0;
    fetch(0, groups[now]);
    for (int64_t first = 0; first < count; first += kGroup, now ^= 1) {
      fetch(first + kGroup, groups[now ^ 1]);
      find(groups[now], batch.indices + first, batch.weights + first);
    }
  }

 private:
  void find(const Group& group, int64_t* indices, float* weights) const {
    for (int i = 0; i < group.size; ++i) {
      const uint64_t index = group.bucket[i];
      indices[i] = item_at(BucketBits::read(table_ + index), index, group.offset[i], buckets_.bits,
                           weights[i]);
    }
  }

  const Bucket* table_;
  Buckets buckets_;
  BucketFinder bucket_of_;
};

}  // namespace

void alias_draw(const AliasTable& table, const Draws& draws, const Batch& batch) {
  InverseCdf(table).run(draws.count, batch, [&](int64_t b, int size, uint64_t* points) {
    random_points(draws.seed, Stream::weights, 0, draws.first + b, size, table.total, points);
  });
}

void alias_inverse_cdf(const AliasTable& table, Pointer<const uint64_t> points, int64_t count,
                       const Batch& batch) {
  InverseCdf(table).run(count, batch, [&](int64_t b, int size, uint64_t* out) {
    std::memcpy(out, points + b, sizeof(uint64_t) * size);
  });
}

}  // namespace fastis::FASTIS_ISA
