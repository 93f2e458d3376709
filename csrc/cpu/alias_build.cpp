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
#include "cpu/alias_side.h"
#include "fastis.h"

namespace fastis::FASTIS_ISA {
namespace {

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

  void add(const uint64_t* integer, int begin, int end, uint64_t capacity) {
    int64_t count = 0, gap_of_light = 0, gap_of_all = 0;
    for (int i = begin; i < end; ++i) {
      const int64_t gap = static_cast<int64_t>(capacity - integer[i]);
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
  alignas(64) uint64_t integer[kBlock + kPadding];
  const int count = job.size(block), border = job.larger(block);
  read(job.weights, block * kBlock, count, integer);
  BlockSums sums;
  sums.add(integer, 0, border, job.buckets.capacity + 1);
  sums.add(integer, border, count, job.buckets.capacity);
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

void alias_build(const IntegerWeights& weights, int threads, Pointer<Bucket> table) {
  const int64_t n = weights.n;
  const Job job{weights,
                Buckets(weights.total, n),
                static_cast<double>(weights.total),
                static_cast<double>(n),
                table,
                (n + kBlock - 1) / kBlock};
  if (threads > 1) {
    build_in_parts(job, threads);
  } else {
    Part(job, nullptr, Split{}).run(n);
  }
}

}  // namespace fastis::FASTIS_ISA
