// Builds an alias table on the device: the sweep of Huebschle-Schneider & Sanders 2019 that
// cpu/alias_build.cpp describes, cut into parts that blocks of threads do at the same time.
//
// Let D_i be the deficits of the light items before item i, and S_j the surpluses of the heavy ones
// up to and including item j. Light item i is filled by the first heavy item with S_j > D_i; of
// heavy item j's bucket capacity + S_j - D stays its own, D the first deficit with D >= S_j, and
// the rest goes to the next heavy item. Given D and S, no item depends on another.
//
// The sums over whole tiles say where D and S stand at the ends of tiles. These ends, merged in
// ascending order, are the steps of the sweep; a part is kSteps of them. It reads the tiles that it
// touches, at most kSteps + 2 between both sides, keeps their items' sums in shared memory, and
// finds for each of its items the partner on the other side by binary search there. So all parts
// are about as long, whatever the weights are. Where parts begin is searched beforehand, by a
// thread for each.
#pragma once

#include "device/categorical.h"

namespace fastis::device {

constexpr uint64_t kNone = ~uint64_t{0};
constexpr int kSteps = 10;
constexpr int kPartItems = (kSteps + 2) * kTile;  // of both sides; 14 bytes of shared memory each

// Over the tiles before a tile, or of one: number of light items, their deficits, the surpluses of
// the heavy items.
struct TileSums {
  int64_t lights;
  uint64_t deficit, surplus;
  FASTIS_HD TileSums operator+(const TileSums& o) const {
    return {lights + o.lights, deficit + o.deficit, surplus + o.surplus};
  }
};
static_assert(sizeof(TileSums) == 24);

FASTIS_HD inline int64_t parts_of(int64_t n) { return (2 * tiles_of(n) + kSteps - 1) / kSteps; }

struct AliasJob {
  TiledWeights weights;
  Buckets buckets;
  double total, n;         // for the coefficients
  const TileSums* before;  // [tiles + 1]
  Bucket* table;           // [N]

  FASTIS_HD AliasJob(const TiledWeights& all, const TileSums* sums, Bucket* out)
      : weights(all),
        buckets(all.total, static_cast<uint64_t>(all.n)),
        total(static_cast<double>(all.total)),
        n(static_cast<double>(all.n)),
        before(sums),
        table(out) {}

  FASTIS_HD int64_t parts() const { return parts_of(weights.n); }
  FASTIS_HD int64_t heavies(int64_t tile) const {
    const int64_t items = tile * kTile;
    return (items < weights.n ? items : weights.n) - before[tile].lights;
  }
};

FASTIS_HD inline TileSums sums_of(const Buckets& buckets, int64_t quad, const Quad& items) {
  TileSums sums{0, 0, 0};
  for (int j = 0; j < kQuad; ++j) {
    const uint64_t weight = items.weight[j], capacity = buckets[quad * kQuad + j];
    const bool there = j < items.size, light = there && weight < capacity;
    sums.lights += light;
    sums.deficit += light ? capacity - weight : 0;
    sums.surplus += there && !light ? weight - capacity : 0;
  }
  return sums;
}

// Where the sweep stands after a number of steps: so many tiles are used up on either side. Of
// tile `light` the items with D below light_end are behind it too, and of tile `heavy` those with S
// below heavy_end.
struct Place {
  int64_t light, heavy;
  uint64_t light_end, heavy_end;
};
static_assert(sizeof(Place) == 32);

// An end of a heavy tile comes before an equal one of a light tile.
FASTIS_HD inline Place place_after(const AliasJob& job, int64_t steps) {
  const TileSums* const before = job.before;
  const int64_t tiles = job.weights.tiles();
  if (steps > 2 * tiles) steps = 2 * tiles;
  int64_t low = steps > tiles ? steps - tiles : 0, high = steps < tiles ? steps : tiles;
  while (low < high) {
    const int64_t light = (low + high) / 2, heavy = steps - 1 - light;
    if (before[light + 1].deficit < before[heavy + 1].surplus) {
      low = light + 1;
    } else {
      high = light;
    }
  }
  const int64_t light = low, heavy = steps - low;
  if (steps == 0) return {0, 0, 0, 0};
  const uint64_t deficit = before[light].deficit, surplus = before[heavy].surplus;
  const bool heavy_was_last = light == 0 || (heavy > 0 && surplus > deficit);
  if (heavy_was_last) return {light, heavy, surplus, 0};
  return {light, heavy, deficit, deficit + 1};
}

// A block's memory for one part.
struct PartMemory {
  uint64_t sums[kPartItems + 1];  // of light items D, and one more; then S of heavy ones
  float coefficient[kPartItems];  // of the heavy items
  uint16_t position[kPartItems];  // among the items read
  uint64_t next;                  // the first heavy item after the part's tiles, or kNone
};

// How many items of a side come before the one that is scanned, and their deficits or surpluses.
struct Running {
  uint64_t sum;
  int count;
  FASTIS_HD Running operator+(const Running& o) const { return {sum + o.sum, count + o.count}; }
};

// One side of a part: the light or the heavy items of a stretch of tiles.
template <bool kHeavy>
class Side {
 public:
  int size = 0;
  int64_t base;  // of the positions

  // Reads the tiles [first, last].
  template <class Block>
  FASTIS_HD Side(Block& block, const AliasJob& job, int64_t first, int64_t last, uint64_t* sums,
                 uint16_t* position, float* coefficient)
      : base(first * kTile), sums_(sums), position_(position) {
    const int64_t tiles = job.weights.tiles(), end = last + 1 < tiles ? last + 1 : tiles;
    const TileSums &begin_sums = job.before[first < tiles ? first : tiles],
                   &end_sums = job.before[end];
    const int64_t items = end > first ? (end - first) * kTile : 0;
    const int64_t all =
        kHeavy ? job.heavies(end) - job.heavies(first) : end_sums.lights - begin_sums.lights;
    if (all > 0) {
      const Running zero{kHeavy ? begin_sums.surplus : begin_sums.deficit, 0};
      const int64_t first_quad = first * kQuads, last_quad = job.weights.quads();
      const int64_t most = last_quad - first_quad, wanted = items / kQuad;
      const Running found = block.scan(
          wanted < most ? wanted : most, zero,
          [&](int64_t q) { return job.weights.read(first_quad + q); },
          [&](int64_t q, const Quad& quad) {
            Running tally{0, 0};
            each(job, first_quad + q, quad, [&](int, uint64_t, uint64_t difference) {
              tally = tally + Running{difference, 1};
            });
            return tally;
          },
          [&](int64_t q, const Quad& quad, Running at) {
            each(job, first_quad + q, quad, [&](int j, uint64_t weight, uint64_t difference) {
              sums[at.count] = kHeavy ? at.sum + difference : at.sum;
              position[at.count] = static_cast<uint16_t>(q * kQuad + j);
              if (kHeavy) coefficient[at.count] = coefficient_of(job.total, job.n, weight);
              at = at + Running{difference, 1};
            });
          });
      size = found.count;
    }
    if (!kHeavy) block.each(1, [&](int64_t) { sums[size] = end_sums.deficit; });
  }

  FASTIS_HD int64_t index(int item) const { return base + position_[item]; }
  // D before a light item, S after a heavy one.
  FASTIS_HD uint64_t sum(int item) const { return sums_[item]; }
  // A light item's deficit.
  FASTIS_HD uint64_t deficit(int item) const { return sums_[item + 1] - sums_[item]; }

  // The first item whose sum is at least x: `size` where there is none.
  FASTIS_HD int first_from(uint64_t x) const {
    int low = 0, high = size;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (sum(middle) < x) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }

 private:
  template <class F>
  FASTIS_HD static void each(const AliasJob& job, int64_t quad, const Quad& items, const F& f) {
    for (int j = 0; j < kQuad; ++j) {
      const uint64_t weight = items.weight[j], capacity = job.buckets[quad * kQuad + j];
      if (j >= items.size || (weight >= capacity) != kHeavy) continue;
      f(j, weight, kHeavy ? weight - capacity : capacity - weight);
    }
  }

  const uint64_t* sums_;
  const uint16_t* position_;
};

// The first heavy item from tile `tile` on, or kNone.
template <class Block>
FASTIS_HD void find_next_heavy(Block& block, const AliasJob& job, int64_t tile, uint64_t* next) {
  const int64_t tiles = job.weights.tiles(), seen = tile < tiles ? job.heavies(tile) : 0;
  block.each(1, [&](int64_t) { *next = kNone; });
  block.wait();
  if (tile >= tiles || job.heavies(tiles) == seen) return;
  int64_t low = tile, high = tiles - 1;
  while (low < high) {  // the first tile at whose end there are more
    const int64_t middle = (low + high) / 2;
    if (job.heavies(middle + 1) > seen) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  block.each(kQuads, [&](int64_t q) {
    const int64_t quad = low * kQuads + q;
    if (quad >= job.weights.quads()) return;
    const Quad items = job.weights.read(quad);
    for (int j = 0; j < kQuad; ++j) {
      const int64_t index = quad * kQuad + j;
      const bool heavy = j < items.size && items.weight[j] >= job.buckets[index];
      if (heavy) atomic_min(next, static_cast<uint64_t>(index));
    }
  });
  block.wait();
}

// The buckets of the items that a part of the sweep passes.
template <class Block>
FASTIS_HD void build_part(Block& block, PartMemory& memory, const AliasJob& job, const Place& from,
                          const Place& to) {
  const int light_capacity = static_cast<int>((to.light - from.light + 1) * kTile);
  const Side<false> light(block, job, from.light, to.light, memory.sums, memory.position, nullptr);
  const Side<true> heavy(block, job, from.heavy, to.heavy, memory.sums + light_capacity + 1,
                         memory.position + light_capacity, memory.coefficient);
  block.wait();  // until all items' sums are there
  const int bits = job.buckets.bits;
  const int first_light = light.first_from(from.light_end),
            end_light = light.first_from(to.light_end);
  block.each(end_light - first_light, [&](int64_t k) {
    const int i = first_light + static_cast<int>(k), j = heavy.first_from(light.sum(i) + 1);
    const int64_t index = light.index(i);
    const uint64_t own = job.buckets[index] - light.deficit(i);
    BucketBits::write(job.table + index, own << bits | static_cast<uint64_t>(heavy.index(j)),
                      coefficient_of(job.total, job.n, own), memory.coefficient[j]);
  });
  const int first_heavy = heavy.first_from(from.heavy_end);
  // Whole tiles lie behind a place even where their last items add nothing to the surpluses.
  const int in_tiles = static_cast<int>(job.heavies(to.heavy) - job.heavies(from.heavy));
  const int below = heavy.first_from(to.heavy_end), end_heavy = below > in_tiles ? below : in_tiles;
  if (end_heavy <= first_heavy) return;
  if (end_heavy == heavy.size) find_next_heavy(block, job, to.heavy + 1, &memory.next);
  block.each(end_heavy - first_heavy, [&](int64_t k) {
    const int j = first_heavy + static_cast<int>(k);
    const int64_t index = heavy.index(j);
    int64_t next = index;
    float next_coefficient = memory.coefficient[j];
    if (j + 1 < heavy.size) {
      next = heavy.index(j + 1);
      next_coefficient = memory.coefficient[j + 1];
    } else if (memory.next != kNone) {
      next = static_cast<int64_t>(memory.next);
      next_coefficient =
          coefficient_of(job.total, job.n, job.weights.read(next / kQuad).at(next % kQuad));
    }
    const uint64_t filled = light.sum(light.first_from(heavy.sum(j)));
    const uint64_t own = job.buckets[index] + heavy.sum(j) - filled;
    BucketBits::write(job.table + index, own << bits | static_cast<uint64_t>(next),
                      memory.coefficient[j], next_coefficient);
  });
}

}  // namespace fastis::device
