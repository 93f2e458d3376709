// Draws from an alias table: one random access each. Bytes moved: 16 read (a cache line), 12
// written, a draw.
#include "alias.h"
#include "cpu/random.h"
#include "fastis.h"

namespace fastis::FASTIS_ISA {
namespace {

// Draws whose buckets are fetched while those of the group before are read: about as many as a core
// can wait for at once.
constexpr int kGroup = 16;

struct Group {
  int size;
  uint64_t bucket[kGroup], offset[kGroup];
};

class Draws {
 public:
  Draws(const Bucket* table, int64_t n, uint64_t total)
      : table_(table), bits_(Buckets(total, n).bits), locate_(Buckets(total, n)) {}

  // points_of(first, size, points) gives the points of draws first, ..., first + size - 1.
  template <class PointsOf>
  void run(int64_t count, int64_t* indices, float* coefficients, const PointsOf& points_of) const {
    Group groups[2];
    const auto fetch = [&](int64_t first, Group& group) {
      uint64_t points[kGroup];
      const int64_t left = count - first;
      group.size = left <= 0 ? 0 : left < kGroup ? static_cast<int>(left) : kGroup;
      if (group.size == 0) return;
      points_of(first, group.size, points);
      for (int i = 0; i < group.size; ++i) {
        group.bucket[i] = locate_(points[i], group.offset[i]);
        __builtin_prefetch(table_ + group.bucket[i]);
      }
    };
    int now = 0;
    fetch(0, groups[now]);
    for (int64_t first = 0; first < count; first += kGroup, now ^= 1) {
      fetch(first + kGroup, groups[now ^ 1]);
      resolve(groups[now], indices + first, coefficients + first);
    }
  }

 private:
  void resolve(const Group& group, int64_t* indices, float* coefficients) const {
    for (int i = 0; i < group.size; ++i) {
      const uint64_t index = group.bucket[i];
      indices[i] = fastis::resolve(BucketBits::read(table_ + index), index, group.offset[i], bits_,
                                   coefficients[i]);
    }
  }

  const Bucket* table_;
  int bits_;
  Locator locate_;
};

}  // namespace

void alias_draw(Pointer<const uint64_t> table, int64_t n, uint64_t total, uint64_t seed,
                int64_t first, int64_t count, Pointer<int64_t> indices,
                Pointer<float> coefficients) {
  const Draws draws(reinterpret_cast<const Bucket*>(table.address), n, total);
  draws.run(count, indices, coefficients, [&](int64_t b, int size, uint64_t* points) {
    random_points(seed, Stream::weights, 0, first + b, size, total, points);
  });
}

void alias_resolve(Pointer<const uint64_t> table, int64_t n, uint64_t total,
                   Pointer<const uint64_t> points, int64_t count, Pointer<int64_t> indices,
                   Pointer<float> coefficients) {
  const Draws draws(reinterpret_cast<const Bucket*>(table.address), n, total);
  draws.run(count, indices, coefficients, [&](int64_t b, int size, uint64_t* out) {
    std::memcpy(out, points + b, sizeof(uint64_t) * size);
  });
}

}  // namespace fastis::FASTIS_ISA
