// Builds an alias table: the sweep of Huebschle-Schneider & Sanders 2019 (light and heavy items in
// order; the heavy item fills light buckets until what is left of it fits its own), without a
// branch that depends on the weights.
//
// Let D_i be the deficits of the light items before item i, and S_j the surpluses of the heavy ones
// up to and including item j. The sweep is the merge of these two ascending sequences: light item i
// is filled by heavy item j where S_(j-1) <= D_i < S_j, and heavy item j is closed (its bucket
// topped up by the next heavy item) when D has reached S_j. So a part of the merge can begin
// anywhere, once the sums over whole blocks of items say where it stands, and the table is the same
// however many parts there are.
// Bytes moved: the weights read twice (thrice by several threads) and 16 written, an item.
#include "alias.h"
#include "cpu/integers.h"
#include "fastis.h"

namespace fastis::FASTIS_ISA {
namespace {

constexpr int kBlock = 256;   // items that are read at once; both sides of a part stay in the L1
constexpr int kPadding = 16;  // items: vectors are read and written whole

struct Job {
  Weights weights;
  Buckets buckets;
  double total, n;  // for the coefficients
  Bucket* table;
  int64_t blocks;

  int size(int64_t block) const {
    const int64_t left = weights.n - block * kBlock;
    return static_cast<int>(left < kBlock ? left : kBlock);
  }
  // How many of a block's buckets hold one unit more: its first ones.
  int larger(int64_t block) const {
    const int64_t left = static_cast<int64_t>(buckets.larger) - block * kBlock;
    return left < 0 ? 0 : left > size(block) ? size(block) : static_cast<int>(left);
  }
};

// Over all blocks before each one: the number of light items, their deficits and the surpluses of
// the heavy ones. [blocks + 1] each; only where there are several parts.
struct Before {
  const int64_t* lights;
  const uint64_t *deficit, *surplus;

  template <bool kHeavy>
  bool has(const Job& job, int64_t block) const {
    return lights[block + 1] - lights[block] != (kHeavy ? job.size(block) : 0);
  }
};

// Moves the items [begin, end) on one side of the capacity to the end of place and weight, which
// hold `size` so far; whole vectors are written.
#if defined(__AVX512F__) && FASTIS_VECTOR_BYTES == 64
template <bool kHeavy>
inline int select_items(const uint64_t* integers, int begin, int end, uint64_t capacity,
                        uint32_t* place, uint64_t* weight, int size) {
  const __m512i limit = _mm512_set1_epi64(static_cast<int64_t>(capacity));
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  for (int i = begin; i < end; i += 8) {
    const __m512i w = _mm512_loadu_si512(integers + i);
    const __mmask8 valid = end - i < 8 ? (1 << (end - i)) - 1 : 0xFF;
    const __mmask8 chosen = kHeavy ? _mm512_mask_cmpge_epu64_mask(valid, w, limit)
                                   : _mm512_mask_cmplt_epu64_mask(valid, w, limit);
    _mm512_storeu_si512(weight + size, _mm512_maskz_compress_epi64(chosen, w));
    store_as(place + size,
             _mm256_maskz_compress_epi32(chosen, _mm256_add_epi32(lanes, _mm256_set1_epi32(i))));
    size += __builtin_popcount(chosen);
  }
  return size;
}
#elif defined(__AVX2__) && FASTIS_VECTOR_BYTES == 32
// By the mask of the chosen among four lanes: their numbers, and the same for pairs of half lanes.
struct Packing {
  int32_t lanes[16][4], halves[16][8];

  constexpr Packing() : lanes(), halves() {
    for (int mask = 0; mask < 16; ++mask) {
      for (int lane = 0, size = 0; lane < 4; ++lane) {
        if ((mask >> lane & 1) == 0) continue;
        lanes[mask][size] = lane;
        halves[mask][2 * size] = 2 * lane;
        halves[mask][2 * size + 1] = 2 * lane + 1;
        ++size;
      }
    }
  }
};
constexpr Packing kPacking;

template <bool kHeavy>
inline int select_items(const uint64_t* integers, int begin, int end, uint64_t capacity,
                        uint32_t* place, uint64_t* weight, int size) {
  const __m256i limit = _mm256_set1_epi64x(static_cast<int64_t>(capacity));
  for (int i = begin; i < end; i += 4) {
    const __m256i w = load_as<__m256i>(integers + i);
    int chosen = _mm256_movemask_pd((__m256d)_mm256_cmpgt_epi64(limit, w));
    if (kHeavy) chosen ^= 15;
    if (end - i < 4) chosen &= (1 << (end - i)) - 1;
    store_as(weight + size,
             _mm256_permutevar8x32_epi32(w, load_as<__m256i>(kPacking.halves[chosen])));
    store_as(place + size,
             _mm_add_epi32(load_as<__m128i>(kPacking.lanes[chosen]), _mm_set1_epi32(i)));
    size += __builtin_popcount(chosen);
  }
  return size;
}
#else
template <bool kHeavy>
inline int select_items(const uint64_t* integers, int begin, int end, uint64_t capacity,
                        uint32_t* place, uint64_t* weight, int size) {
  for (int i = begin; i < end; ++i) {
    place[size] = static_cast<uint32_t>(i);
    weight[size] = integers[i];
    size += (integers[i] >= capacity) == kHeavy;
  }
  return size;
}
#endif

// The light or the heavy items of one block, and how far the merge has come in them.
template <bool kHeavy>
class Side {
 public:
  int size = 0, at = 0;
  int64_t base;    // index of the block's first item
  int64_t next;    // block to read after this one
  uint64_t total;  // 1 + D or S at the end of the block
  alignas(64) uint32_t place[kBlock + kPadding];
  alignas(64) uint64_t weight[kBlock + kPadding];  // of heavy items 1 + S_(j-1) + weight
  alignas(64) float coefficient[kBlock + kPadding];

  Side(int64_t block, uint64_t before) : next(block), total(1 + before) { sums_[0] = 0; }

  // 1 + D_i of light items, 1 + S_j of heavy ones. Item -1 is there for the merge that runs
  // backwards: no other sum is as low.
  uint64_t sum(int item) const { return sums_[item + 1]; }
  const uint64_t* sums() const { return sums_ + 1; }
  int64_t index(int item) const { return base + place[item]; }

  // On to the next block that has such items; false: there is none.
  bool advance(const Job& job, const Before* before) {
    size = at = 0;
    while (size == 0 && next < job.blocks) {
      if (before == nullptr || before->has<kHeavy>(job, next)) read(job, next);
      ++next;
    }
    return size > 0;
  }

  // Stands for a light item after the last, which no heavy item reaches.
  void finish() {
    at = 0;
    size = 1;
    sums_[1] = total;
  }

 private:
  void read(const Job& job, int64_t block) {
    alignas(64) uint64_t integers[kBlock + kPadding];
    const int count = job.size(block), border = job.larger(block);
    const uint64_t capacity = job.buckets.capacity;
    base = block * kBlock;
    job.weights.read(base, count, integers);
    const int before_border =
        select_items<kHeavy>(integers, 0, border, capacity + 1, place, weight, 0);
    size = select_items<kHeavy>(integers, border, count, capacity, place, weight, before_border);
    for (int i = 0; i < size; i += kWords) {
      const Vec<double> w = to_double(load_as<Words>(weight + i));
      store_as(coefficient + i, narrow(job.total / (job.n * w)));
    }
    add_up(0, before_border, capacity + 1);
    add_up(before_border, size, capacity);
  }

  void add_up(int begin, int end, uint64_t capacity) {
    uint64_t running = total;
    for (int i = begin; i < end; ++i) {
      const uint64_t before = running;
      running += kHeavy ? weight[i] - capacity : capacity - weight[i];
      sums_[i + 1] = kHeavy ? running : before;
      if (kHeavy) weight[i] += before;
    }
    total = running;
  }

  uint64_t sums_[1 + kBlock + kPadding];
};

// How many items of either side's block have been merged.
struct Ranks {
  int light, heavy;
};

// Where a part begins: light item number `light` of those in block `light_block`, and so on.
struct Split {
  int64_t light_block = 0, heavy_block = 0;
  int light = 0, heavy = 0;
  int64_t rank = 0;  // items merged before
};

// A stretch of the merge: the buckets of the items in it.
class Part {
 public:
  Part(const Job& job, const Before* before, const Split& from)
      : job_(job),
        before_(before),
        light_(from.light_block, before == nullptr ? 0 : before->deficit[from.light_block]),
        heavy_(from.heavy_block, before == nullptr ? 0 : before->surplus[from.heavy_block]) {
    if (!light_.advance(job_, before_)) light_.finish();
    heavy_.advance(job_, before_);
    light_.at = from.light;
    heavy_.at = from.heavy;
  }

  // Merges the next `items` > 0.
  void run(int64_t items) {
    while (items > 0) {
      items -= round(items);
      if (light_.at == light_.size && !light_.advance(job_, before_)) light_.finish();
      if (open_ >= 0) close(heavy_.advance(job_, before_));
    }
  }

 private:
  // Merges until one side's block is used up, or `most` items, and fills their buckets. Returns how
  // many there were.
  int64_t round(int64_t most) {
    Ranks end{light_.size, heavy_.size};
    const uint64_t last_light = light_.sum(end.light - 1), last_heavy = heavy_.sum(end.heavy - 1);
    if (last_light < last_heavy) {
      end.heavy = first_above(heavy_, heavy_.at, end.heavy, last_light);
    } else {
      end.light = first_above(light_, light_.at, end.light, last_heavy - 1);
    }
    int items = end.light - light_.at + end.heavy - heavy_.at;
    if (items > most) {
      items = static_cast<int>(most);
      end = after(items, end);
    }
    const Ranks middle = merge(end);
    fill_light(light_.at, middle.light, heavy_of_);
    fill_light(middle.light, end.light, heavy_of_ + 1);
    close_heavy(heavy_.at, middle.heavy, light_of_);
    close_heavy(middle.heavy, end.heavy, light_of_ + 1);
    light_.at = end.light;
    heavy_.at = end.heavy;
    return items;
  }

  void fill_light(int begin, int end, const uint16_t* heavy_of) {
    Bucket* const table = job_.table + light_.base;
    const int bits = job_.buckets.bits;
    const uint64_t base = static_cast<uint64_t>(heavy_.base);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t j = heavy_of[i];
      table[light_.place[i]] = {light_.weight[i] << bits | (base + heavy_.place[j]),
                                {light_.coefficient[i], heavy_.coefficient[j]}};
    }
  }

  // Of a heavy item's bucket the sweep leaves capacity + S_j - D_i to itself; the rest goes to the
  // next heavy item. The last one of a block stays open until that is known.
  void close_heavy(int begin, int end, const uint16_t* light_of) {
    const int closed = end < heavy_.size ? end : heavy_.size - 1;
    Bucket* const table = job_.table + heavy_.base;
    const int bits = job_.buckets.bits;
    const uint64_t base = static_cast<uint64_t>(heavy_.base);
    const uint64_t* const deficits = light_.sums();
    for (int64_t j = begin; j < closed; ++j) {
      const uint64_t own = heavy_.weight[j] - deficits[light_of[j]];
      table[heavy_.place[j]] = {own << bits | (base + heavy_.place[j + 1]),
                                {heavy_.coefficient[j], heavy_.coefficient[j + 1]}};
    }
    if (begin < end && closed < end) {
      open_ = heavy_.index(closed);
      open_own_ = heavy_.weight[closed] - deficits[light_of[closed]];
      open_coefficient_ = heavy_.coefficient[closed];
    }
  }

  void close(bool more) {
    const int64_t next = more ? heavy_.index(0) : open_;
    job_.table[open_] = {open_own_ << job_.buckets.bits | static_cast<uint64_t>(next),
                         {open_coefficient_, more ? heavy_.coefficient[0] : open_coefficient_}};
    open_ = -1;
  }

  // The first item of [begin, end) whose sum is above x; the last one's is.
  template <class S>
  static int first_above(const S& side, int begin, int end, uint64_t x) {
    for (int length = end - begin; length > 1;) {
      const int half = length / 2;
      begin += side.sum(begin + half - 1) <= x ? half : 0;
      length -= half;
    }
    return begin;
  }

  // Where the merge stands after so many items; it goes no further than `end`.
  Ranks after(int items, Ranks end) const {
    const int heavies = end.heavy - heavy_.at;
    int low = items > heavies ? items - heavies : 0;
    int high = items < end.light - light_.at ? items : end.light - light_.at;
    while (low < high) {
      const int lights = (low + high) / 2;
      const bool more = light_.sum(light_.at + lights) < heavy_.sum(heavy_.at + items - lights - 1);
      low = more ? lights + 1 : low;
      high = more ? high : lights;
    }
    return {light_.at + low, heavy_.at + items - low};
  }

  // From both ends to the middle, since a step waits for the comparison before it. A forward step
  // says of item l (or h) where the other side stands, a backward step of item l - 1 (or h - 1),
  // both in slot l (or h). What is written of the item that is not taken is overwritten when it
  // is; only the slots at the meeting point stay rubbish.
  Ranks merge(Ranks end) {
    const uint64_t *D = light_.sums(), *S = heavy_.sums();
    int64_t l = light_.at, h = heavy_.at, back_l = end.light, back_h = end.heavy;
    const int64_t steps = back_l - l + back_h - h;
    const auto forward = [&] {
      heavy_of_[l] = static_cast<uint16_t>(h);
      light_of_[h] = static_cast<uint16_t>(l);
      const int64_t next = l + h + 1;
      l += D[l] < S[h];
      h = next - l;
    };
    for (int64_t step = 0; step < steps / 2; ++step) {
      forward();
      heavy_of_[back_l] = static_cast<uint16_t>(back_h);
      light_of_[back_h] = static_cast<uint16_t>(back_l);
      const int64_t next = back_l + back_h - 1;
      back_l = back_l - 1 + (D[back_l - 1] < S[back_h - 1]);
      back_h = next - back_l;
    }
    if (steps % 2 == 1) forward();
    return {static_cast<int>(l), static_cast<int>(h)};
  }

  const Job& job_;
  const Before* before_;
  Side<false> light_;
  Side<true> heavy_;
  uint16_t heavy_of_[kBlock + kPadding], light_of_[kBlock + kPadding];
  int64_t open_ = -1;
  uint64_t open_own_;
  float open_coefficient_;
};

// Light items in one block and what they lack; what the heavy ones have too much.
struct BlockSums {
  int64_t lights = 0;
  uint64_t deficit = 0, surplus = 0;

  void add(const uint64_t* integers, int begin, int end, uint64_t capacity) {
    int64_t count = 0, gap_of_light = 0, gap_of_all = 0;
    for (int i = begin; i < end; ++i) {
      const int64_t gap = static_cast<int64_t>(capacity - integers[i]);
      count += gap > 0;
      gap_of_light += gap > 0 ? gap : 0;
      gap_of_all += gap;
    }
    lights += count;
    deficit += static_cast<uint64_t>(gap_of_light);
    surplus += static_cast<uint64_t>(gap_of_light - gap_of_all);
  }
};

BlockSums sum_block(const Job& job, int64_t block) {
  alignas(64) uint64_t integers[kBlock + kPadding];
  const int count = job.size(block), border = job.larger(block);
  job.weights.read(block * kBlock, count, integers);
  BlockSums sums;
  sums.add(integers, 0, border, job.buckets.capacity + 1);
  sums.add(integers, border, count, job.buckets.capacity);
  return sums;
}

// How many of a block's items of one side have a sum below `limit`.
template <bool kHeavy>
int count_below(const Job& job, const Before& before, int64_t block, uint64_t limit) {
  if (block == job.blocks || !before.has<kHeavy>(job, block)) return 0;
  Side<kHeavy> side(block, kHeavy ? before.surplus[block] : before.deficit[block]);
  side.advance(job, nullptr);
  int count = 0;
  while (count < side.size && side.sum(count) < limit + 1) ++count;
  return count;
}

// The merge block by block: stops at the ends of blocks, in their order, from which each part is at
// most two blocks away.
void find_splits(const Job& job, const Before& before, int parts, Split* splits) {
  const int64_t n = job.weights.n;
  const auto heavies = [&](int64_t block) {
    return (block < job.blocks ? block * kBlock : n) - before.lights[block];
  };
  int64_t light = 0, heavy = 0;
  bool is_heavy = false;
  for (int part = 1; part < parts; ++part) {
    const int64_t target = n / parts * part;
    while (before.lights[light] + heavies(heavy) < target) {
      is_heavy = light == job.blocks ||
                 (heavy < job.blocks && before.surplus[heavy + 1] <= before.deficit[light + 1]);
      ++(is_heavy ? heavy : light);
    }
    Split& split = splits[part];
    split.light_block = light;
    split.heavy_block = heavy;
    if (is_heavy) {
      split.light = count_below<false>(job, before, light, before.surplus[heavy]);
    } else {
      split.heavy = count_below<true>(job, before, heavy, before.deficit[light] + 1);
    }
    split.rank = before.lights[light] + split.light + heavies(heavy) + split.heavy;
  }
}

void build_in_parts(const Job& job, int threads) {
  const int64_t blocks = job.blocks;
  const Scratch<int64_t> lights(blocks + 1);
  const Scratch<uint64_t> deficit(blocks + 1), surplus(blocks + 1);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t block = 0; block < blocks; ++block) {
    const BlockSums sums = sum_block(job, block);
    lights[block + 1] = sums.lights;
    deficit[block + 1] = sums.deficit;
    surplus[block + 1] = sums.surplus;
  }
  lights[0] = 0;
  deficit[0] = surplus[0] = 0;
  for (int64_t block = 0; block < blocks; ++block) {
    lights[block + 1] += lights[block];
    deficit[block + 1] += deficit[block];
    surplus[block + 1] += surplus[block];
  }
  const Before before{lights, deficit, surplus};
  const int parts = threads * 8;  // some threads are slower than others
  const Scratch<Split> splits(parts + 1);
  splits[0] = {};
  for (int part = 1; part <= parts; ++part) splits[part] = {};
  find_splits(job, before, parts, splits);
  splits[parts].rank = job.weights.n;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int part = 0; part < parts; ++part) {
    const int64_t items = splits[part + 1].rank - splits[part].rank;
    if (items > 0) Part(job, &before, splits[part]).run(items);
  }
}

}  // namespace

void alias_build(int format, Pointer<const void> values, int64_t n, int shift, uint64_t total,
                 int threads, Pointer<uint64_t> table) {
  const Job job{{format, values, n, shift},
                Buckets(total, n),
                static_cast<double>(total),
                static_cast<double>(n),
                reinterpret_cast<Bucket*>(table.address),
                (n + kBlock - 1) / kBlock};
  if (threads > 1) {
    build_in_parts(job, threads);
  } else {
    Part(job, nullptr, Split{}).run(n);
  }
}

}  // namespace fastis::FASTIS_ISA
