// The alias table (Walker 1977) in integers, 16 bytes an item. Shared by host and device.
// N buckets share the total T: the first T mod N hold floor(T/N) + 1 units, the others floor(T/N).
// Bucket i gives its first `own` units to item i and the rest to item `alias`; added up over all
// buckets, an item has exactly its integer weight. Both numbers fit one word for any N, since their
// bits make up those of T; beside it lie the coefficients of the two items, so that a draw is one
// random access.
#pragma once

#include <cstring>

#include "state.h"

namespace fastis {

struct alignas(16) Bucket {
  uint64_t word;         // own << bits | alias
  float coefficient[2];  // r = T / (N W) of the item itself and of its alias
};
static_assert(sizeof(Bucket) == 16);

struct Buckets {
  uint64_t capacity, larger;  // floor(T/N); how many buckets hold one unit more
  int bits;                   // of an index

  FASTIS_HD Buckets(uint64_t total, uint64_t n) : capacity(total / n), larger(total % n), bits(0) {
    while (bits < 63 && (uint64_t{1} << bits) < n) ++bits;
  }
  FASTIS_HD uint64_t operator[](uint64_t bucket) const { return capacity + (bucket < larger); }
};

// r = T / (N W), rounded as the reference does.
FASTIS_HD inline float coefficient_of(double total, double n, uint64_t weight) {
  return static_cast<float>(total / (n * static_cast<double>(weight)));
}

// Splits a point below the total into a bucket and an offset in it. The first `larger` buckets hold
// c + 1 units, the others c, thus their points lie where they would lie if all held c, plus
// `larger`. The quotients are exact, by products (Granlund & Montgomery 1994).
class BucketFinder {
 public:
  FASTIS_HD explicit BucketFinder(const Buckets& b)
      : border_(b.larger * (b.capacity + 1)), larger_(b.larger), unit_(b.capacity + 1) {
    while ((uint64_t{1} << shift_) < unit_) ++shift_;
    multiplier_ = reciprocal(unit_);
    // With c = 0 there is no point beyond the border.
    increment_ = b.capacity > 0 ? reciprocal(b.capacity) - multiplier_ : 0;
  }

  FASTIS_HD uint64_t operator()(uint64_t x, uint64_t& offset) const {
    const uint64_t beyond = 0 - static_cast<uint64_t>(x >= border_);  // all bits, or none
    const uint64_t y = x - (larger_ & beyond);
    const uint64_t bucket = mulhi(y << 2, multiplier_ + (increment_ & beyond)) >> shift_;
    offset = y - bucket * (unit_ + beyond);
    return bucket;
  }

 private:
  // x / divisor = floor(4 x reciprocal / 2^(64 + shift)) for x < 2^62.
  FASTIS_HD uint64_t reciprocal(uint64_t divisor) const {
    const unsigned __int128 power = static_cast<unsigned __int128>(1) << (62 + shift_);
    return static_cast<uint64_t>((power + (divisor - 1)) / divisor);
  }

  uint64_t border_, larger_, unit_, multiplier_, increment_;
  int shift_ = 0;
};

// A bucket as 128 bits. A GPU is told so: copied member by member it takes several accesses.
struct BucketBits {
  uint64_t word, pair;  // little-endian: the item's own coefficient is the low half of the pair

  FASTIS_HD static BucketBits read(const Bucket* from) {
#ifdef __CUDA_ARCH__
    const ulonglong2 bits = __ldg(reinterpret_cast<const ulonglong2*>(from));
    return {bits.x, bits.y};
#else
    BucketBits bits;
    memcpy(&bits, from, sizeof bits);
    return bits;
#endif
  }

  FASTIS_HD static void write(Bucket* to, uint64_t word, float own, float alias) {
    const BucketBits bits{word, float_to_bits(own) | uint64_t{float_to_bits(alias)} << 32};
#ifdef __CUDA_ARCH__
    *reinterpret_cast<ulonglong2*>(to) = make_ulonglong2(bits.word, bits.pair);
#else
    memcpy(static_cast<void*>(to), &bits, sizeof bits);
#endif
  }
};
static_assert(sizeof(BucketBits) == sizeof(Bucket));

// The item at `offset` of bucket `index`, and its r. Without a branch, since which it is can't be
// foretold, and without an index into the pair, which would put it into a GPU's local memory.
FASTIS_HD inline int64_t item_at(const BucketBits& bucket, uint64_t index, uint64_t offset,
                                 int bits, float& coefficient) {
  const uint64_t mask = (uint64_t{1} << bits) - 1;
  const uint64_t is_alias = offset >= bucket.word >> bits;
  coefficient = bits_to_float(static_cast<uint32_t>(bucket.pair >> (32 * is_alias)));
  return static_cast<int64_t>(index ^ ((index ^ (bucket.word & mask)) & (0 - is_alias)));
}

}  // namespace fastis
