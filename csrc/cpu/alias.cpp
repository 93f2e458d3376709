// The alias table (Walker 1977; the sweep of Huebschle-Schneider & Sanders 2019) in integers.
// N buckets share the total T: the first T mod N hold floor(T/N) + 1 units, the others floor(T/N).
// Bucket i gives its first own[i] units to item i and the rest to item alias[i]; added up over all
// buckets, an item has exactly its integer weight.
// Bytes moved: build 24 a item, draw 24 a draw (two random accesses).
#include "cpu/random.h"
#include "fastis.h"

namespace fastis::FASTIS_ISA {
namespace {

struct Buckets {
  uint64_t capacity, larger;  // floor(T/N); how many buckets hold one unit more

  Buckets(uint64_t total, uint64_t n) : capacity(total / n), larger(total % n) {}
  uint64_t operator[](uint64_t bucket) const { return capacity + (bucket < larger); }

  // Splits a point below the total into a bucket and an offset in it.
  uint64_t locate(uint64_t x, uint64_t& offset) const {
    const uint64_t border = larger * (capacity + 1);
    const uint64_t unit = x < border ? capacity + 1 : capacity;
    const uint64_t base = x < border ? 0 : border;
    const uint64_t bucket = (x - base) / unit;
    offset = x - base - bucket * unit;
    return bucket + (x < border ? 0 : larger);
  }
};

}  // namespace

void alias_build(Pointer<const uint64_t> weights, int64_t n, uint64_t total, Pointer<uint64_t> own,
                 Pointer<int64_t> alias) {
  const Buckets capacity(total, n);
  const auto next = [&](int64_t i, bool heavy) {
    while (i < n && (weights[i] >= capacity[i]) != heavy) ++i;
    return i;
  };
  int64_t light = next(0, false), heavy = next(0, true);
  uint64_t left = heavy < n ? weights[heavy] : 0;  // what the heavy item has not given away yet
  while (heavy < n) {
    if (left > capacity[heavy]) {
      own[light] = weights[light];
      alias[light] = heavy;
      left -= capacity[light] - weights[light];
      light = next(light + 1, false);
    } else {
      const int64_t follower = next(heavy + 1, true);
      own[heavy] = left;
      alias[heavy] = follower < n ? follower : heavy;
      if (follower < n) left = weights[follower] - (capacity[heavy] - left);
      heavy = follower;
    }
  }
}

void alias_draw(Pointer<const uint64_t> weights, Pointer<const uint64_t> own,
                Pointer<const int64_t> alias, int64_t n, uint64_t total, uint64_t seed,
                int64_t first, int64_t count, Pointer<int64_t> indices,
                Pointer<float> coefficients) {
  const Buckets buckets(total, n);
  for (int64_t b = 0; b < count; ++b) {
    uint64_t offset;
    const uint64_t x = scale(random128(seed, Stream::weights, 0, first + b), total);
    const uint64_t bucket = buckets.locate(x, offset);
    const int64_t index = offset < own[bucket] ? static_cast<int64_t>(bucket) : alias[bucket];
    indices[b] = index;
    coefficients[b] =
        static_cast<float>(static_cast<double>(total) /
                           (static_cast<double>(n) * static_cast<double>(weights[index])));
  }
}

// The points of `count` draws, for searching in a cumulative sum.
void draw_points(uint64_t total, uint64_t seed, int64_t first, int64_t count,
                 Pointer<uint64_t> points) {
  random_points(seed, Stream::weights, 0, first, count, total, points);
}

}  // namespace fastis::FASTIS_ISA
