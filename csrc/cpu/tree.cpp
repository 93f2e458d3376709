#include "cpu/tree.h"

#include <algorithm>

namespace fastis::FASTIS_ISA {

Spread::Spread(const Table& t, int64_t num_items) : table_(t) {
  const int64_t most = std::min(kMostNodes, num_items);
  while (level_ < t.levels.depth && t.levels.size[level_] > most) ++level_;
  if (level_ < t.levels.depth) std::fill_n(delta_, t.levels.size[level_] + kRadix, 0);
}

void Spread::finish() {
  for (; level_ < table_.levels.depth; ++level_) {
    uint64_t* prefix = table_.prefix + table_.levels.first[level_];
    int64_t parent = 0;
    for (int64_t begin = 0; begin < table_.levels.size[level_]; begin += kRadix) {
      uint64_t running = 0;
      for (int64_t node = begin; node < begin + kRadix; ++node) {
        prefix[node] += running;
        running += delta_[node];
      }
      delta_[parent++] = running;
    }
    std::fill_n(delta_ + parent, kRadix, 0);
  }
}

namespace {

// One thread in place of a grid's. (Of this instruction set: what is built upon it must not be
// shared with another's.)
struct SerialGrid {
  template <class T, class F, class Flush>
  void reduce(int64_t n, const F& f, const Flush& flush) const {
    T sum{};
    for (int64_t i = 0; i < n; ++i) sum = sum + f(i);
    flush(sum);
  }
  template <class F>
  void once(const F& f) const {
    f();
  }
  void wait() const {}
};

// From sums to prefix sums among siblings; the level above gets the sums.
template <class T>
void add_up(const Levels& levels, T* prefix) {
  for (int level = 0; level < levels.depth; ++level) {
    for (int64_t begin = 0; begin < levels.size[level]; begin += kRadix) {
      T* const node = prefix + levels.first[level] + begin;
      T running = 0;
      for (int child = 0; child < kRadix; ++child) {
        const T own = node[child];
        node[child] = running;
        running += own;
      }
      if (level + 1 < levels.depth) prefix[levels.first[level + 1] + begin / kRadix] = running;
    }
  }
}

}  // namespace

void rebuild(const Table& t) {
  Scalars& s = *t.scalars;
  const uint64_t theta = t.flatten != Flatten::cap ? uint64_t{kNoCap}
                         : t.shard                 ? static_cast<uint64_t>(s.theta)
                         : drawn_alike(t)          ? uint64_t{kNoCap}
                                                   : find_theta(t);
  const int e0 = exponent_of_table(t);
  std::fill_n(t.prefix, t.levels.total(), 0);
  std::fill_n(t.unseen_prefix, t.levels.total(), 0);
  std::fill_n(t.capped_prefix, t.levels.total(), 0);
  uint32_t& any_excluded = t.excluded_prefix[t.levels.total()];
  if (any_excluded) std::fill_n(t.excluded_prefix, t.levels.total(), 0);
  any_excluded = s.excluded > 0;
  s.uncapped = s.num_capped = 0;
  for (int64_t i = 0; i < t.num_samples; ++i) {
    State& state = t.states[i];
    const uint64_t weight = weight_of(state.code & ~kCappedFlag, e0);
    const bool capped = weight > theta;
    state.code = (state.code & ~kCappedFlag) | (capped ? kCappedFlag : 0);
    t.prefix[i / kLeaf] += capped ? 0 : weight;
    t.unseen_prefix[i / kLeaf] += state.last == kUnseen;
    if (state.last == kExcluded) ++t.excluded_prefix[i / kLeaf];
    t.capped_prefix[i / kLeaf] += capped;
    s.uncapped += static_cast<int64_t>(capped ? 0 : weight);
    s.num_capped += capped;
  }
  add_up(t.levels, t.prefix);
  add_up(t.levels, t.unseen_prefix);
  add_up(t.levels, t.capped_prefix);
  if (any_excluded) add_up(t.levels, t.excluded_prefix);
  s.theta = static_cast<int64_t>(theta);
  s.offset = 0;
  s.ceiling = kNoCap;
  s.near_size = s.num_flipped = -1;
  s.valid = 1;
}

void rescale(const Table& t) {
  const SerialGrid grid;
  Rescale found{};
  fastis::rescale(grid, t, found);
}

}  // namespace fastis::FASTIS_ISA
