// Draws from an alias table: one random access each. Bytes moved: 16 read (a cache line), 12
// written, a draw.
#include "cpu/alias.h"
#include "fastis.h"

namespace fastis::FASTIS_ISA {
namespace {

// Draws whose buckets are fetched while those of the group before are read: about as many as a core
// can wait for at once.
constexpr int kGroup = 16;

// Splits a point below the total into a bucket and an offset in it. The first `larger` buckets hold
// c + 1 units, the others c, thus their points lie where they would lie if all held c, plus
// `larger`. The quotients are exact, by products (Granlund & Montgomery 1994).
class Locator {
 public:
  explicit Locator(const Buckets& b)
      : border_(b.larger * (b.capacity + 1)), larger_(b.larger), unit_(b.capacity + 1) {
    while ((uint64_t{1} << shift_) < unit_) ++shift_;
    multiplier_ = reciprocal(unit_);
    // With c = 0 there is no point beyond the border.
    increment_ = b.capacity > 0 ? reciprocal(b.capacity) - multiplier_ : 0;
  }

  uint64_t operator()(uint64_t x, uint64_t& offset) const {
    const uint64_t beyond = 0 - static_cast<uint64_t>(x >= border_);  // all bits, or none
    const uint64_t y = x - (larger_ & beyond);
    const uint64_t bucket = mulhi(y << 2, multiplier_ + (increment_ & beyond)) >> shift_;
    offset = y - bucket * (unit_ + beyond);
    return bucket;
  }

 private:
  // x / divisor = floor(4 x reciprocal / 2^(64 + shift)) for x < 2^62.
  uint64_t reciprocal(uint64_t divisor) const {
    const unsigned __int128 power = static_cast<unsigned __int128>(1) << (62 + shift_);
    return static_cast<uint64_t>((power + (divisor - 1)) / divisor);
  }

  uint64_t border_, larger_, unit_, multiplier_, increment_;
  int shift_ = 0;
};

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
  // Without a branch: which item it is can't be foretold.
  void resolve(const Group& group, int64_t* indices, float* coefficients) const {
    const uint64_t mask = (uint64_t{1} << bits_) - 1;
    for (int i = 0; i < group.size; ++i) {
      const uint64_t index = group.bucket[i];
      const Bucket& bucket = table_[index];
      const uint64_t is_alias = group.offset[i] >= bucket.word >> bits_;
      indices[i] = static_cast<int64_t>(index ^ ((index ^ (bucket.word & mask)) & (0 - is_alias)));
      coefficients[i] = bucket.coefficient[is_alias];
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
