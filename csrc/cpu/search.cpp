// Draws straight from weights, by search in the running sums of their groups. Nothing is built, so
// this is for a few draws from weights that change. Bytes moved a draw: a cache line for each of
// log2(N / 64) steps, and a group of weights.
#include "cpu/integers.h"
#include "fastis.h"

namespace fastis::FASTIS_ISA {
namespace {

constexpr int kDraws = 64;  // searched abreast, so that their cache misses overlap

// group[i]: the first whose running sum is above points[i].
void find_groups(const uint64_t* ends, int64_t groups, const uint64_t* points, int size,
                 int64_t* group) {
  for (int i = 0; i < size; ++i) group[i] = 0;
  for (int64_t length = groups; length > 1;) {
    const int64_t half = length / 2;
    length -= half;
    for (int i = 0; i < size; ++i) {
      group[i] += ends[group[i] + half - 1] <= points[i] ? half : 0;
      __builtin_prefetch(ends + group[i] + length / 2 - 1);
    }
  }
}

}  // namespace

void search(int format, Pointer<const void> values, int64_t n, int shift,
            Pointer<const uint64_t> ends, uint64_t total, uint64_t seed, int64_t first,
            int64_t count, Pointer<int64_t> indices, Pointer<float> coefficients) {
  const Weights weights{format, values, n, shift};
  const int64_t groups = (n + kGroup - 1) / kGroup;
  const double numerator = static_cast<double>(total), samples = static_cast<double>(n);
  for (int64_t b = 0; b < count; b += kDraws) {
    const int size = count - b < kDraws ? static_cast<int>(count - b) : kDraws;
    uint64_t points[kDraws];
    int64_t group[kDraws];
    random_points(seed, Stream::weights, 0, first + b, size, total, points);
    find_groups(ends, groups, points, size, group);
    for (int i = 0; i < size; ++i) {
      const int64_t begin = group[i] * kGroup;
      const int items = static_cast<int>(n - begin < kGroup ? n - begin : kGroup);
      alignas(64) uint64_t integers[kGroup];
      weights.read(begin, items, integers);
      uint64_t x = points[i] - (group[i] > 0 ? ends[group[i] - 1] : 0);
      int item = 0;
      while (x >= integers[item]) x -= integers[item++];
      indices[b + i] = begin + item;
      coefficients[b + i] =
          static_cast<float>(numerator / (samples * static_cast<double>(integers[item])));
    }
  }
}

// The points of `count` draws.
void draw_points(uint64_t total, uint64_t seed, int64_t first, int64_t count,
                 Pointer<uint64_t> points) {
  random_points(seed, Stream::weights, 0, first, count, total, points);
}

}  // namespace fastis::FASTIS_ISA
