// Flattening on the CPU: theta, and which items are capped.
//
// theta moves to the root of csrc/flatten.h by Newton's steps, each of which flips the items that
// it passes. From below the root the first may shoot far beyond it; steps upwards are therefore
// short at first, and double.
#include <algorithm>

#include "cpu/tree.h"

namespace fastis::FASTIS_ISA {
namespace {

uint64_t weight_at(const Table& t, int64_t index) {
  return weight_of(t.states[index].code & ~kCappedFlag, exponent_of_table(t));
}

bool is_capped(const Table& t, int64_t index) { return (t.states[index].code & kCappedFlag) != 0; }

// Makes a capped item one of the others, or the other way round.
void flip(const Table& t, int64_t index) {
  Scalars& s = *t.scalars;
  const uint64_t weight = weight_at(t, index);
  const bool capped = !is_capped(t, index);
  t.states[index].code ^= kCappedFlag;
  const uint64_t delta = capped ? ~weight + 1 : weight;
  add_to_sums(t, index, delta, t.levels.depth);
  count_capped(t, index, capped);
  s.uncapped += static_cast<int64_t>(delta);
}

// Calls visit(index, weight) for seen items below theta that weigh more than `threshold`.
template <class Visit>
bool visit_uncapped(const Table& t, uint64_t threshold, const Visit& visit) {
  const uint64_t total = static_cast<uint64_t>(t.scalars->uncapped);
  if (total <= threshold) return true;
  return visit_above<uint64_t>(
      t, t.prefix, t.levels.depth - 1, 0, total, threshold, [&](int64_t index) {
        const uint64_t weight = uncapped_weight(t.states[index].code, exponent_of_table(t));
        return weight <= threshold || visit(index, weight);
      });
}

// Calls visit(index, weight) for all capped items.
template <class Visit>
bool visit_capped(const Table& t, const Visit& visit) {
  if (t.scalars->num_capped == 0) return true;
  const uint32_t none = 0, all = static_cast<uint32_t>(t.scalars->num_capped);
  return visit_above<uint32_t>(
      t, t.capped_prefix, t.levels.depth - 1, 0, all, none,
      [&](int64_t index) { return !is_capped(t, index) || visit(index, weight_at(t, index)); });
}

// Moves theta, and flips the items that it passes. When they are more than can be noted, the
// tree is rebuilt, with theta where it belongs.
void move_theta(const Table& t, uint64_t to) {
  Scalars& s = *t.scalars;
  const uint64_t from = static_cast<uint64_t>(s.theta);
  s.theta = static_cast<int64_t>(to);
  if (s.near_size >= 0 && to >= static_cast<uint64_t>(s.near_low) &&
      to <= static_cast<uint64_t>(s.near_high)) {
    for (int64_t k = 0; k < s.near_size; ++k) {
      if (is_capped(t, t.near[k]) != (weight_at(t, t.near[k]) > to)) flip(t, t.near[k]);
    }
    return;
  }
  s.near_size = -1;
  int64_t found = 0;
  const auto note = [&](int64_t index) {
    if (found == t.near_capacity) return false;
    t.near[found++] = index;
    return true;
  };
  const bool noted =
      to < from
          ? visit_uncapped(
                t, to, [&](int64_t index, uint64_t) { return note(index); })
          : visit_capped(
                t, [&](int64_t index, uint64_t weight) { return weight > to || note(index); });
  if (!noted) return rebuild(t);
  for (int64_t k = 0; k < found; ++k) flip(t, t.near[k]);
}

// How long the list of near items should be: going through it costs every draw something, making
// it anew costs as much as there are capped items.
int64_t near_wanted(const Table& t) {
  const int64_t least = t.batch_size / 8 + 64, most = t.near_capacity / 2;
  return std::min(std::max(least, t.scalars->num_capped / 16), most);
}

// Leaves no more of the near items than are wanted, those next to theta.
void trim_near(const Table& t) {
  Scalars& s = *t.scalars;
  const int64_t wanted = near_wanted(t);
  while (true) {
    const int64_t* end = std::remove_if(t.near, t.near + s.near_size, [&](int64_t index) {
      return !is_near(s, weight_at(t, index));
    });
    s.near_size = end - t.near;
    if (s.near_size <= wanted) return;
    s.near_low = s.theta - (s.theta - s.near_low) / 2;
    s.near_high = s.theta + (s.near_high - s.theta) / 2;
  }
}

// Lists what theta may pass next: items within an eighth of it, or within as much less as
// the list can hold.
void list_near(const Table& t) {
  Scalars& s = *t.scalars;
  s.near_low = s.theta - s.theta / 8;
  s.near_high = s.theta + s.theta / 8;
  s.near_size = 0;
  const auto add = [&](int64_t index, uint64_t weight) {
    if (s.near_size == t.near_capacity) trim_near(t);
    if (is_near(s, weight)) t.near[s.near_size++] = index;
    return true;
  };
  visit_uncapped(t, static_cast<uint64_t>(s.near_low), add);
  visit_capped(t, add);
}

// Brings the list of capped items up to date; it is long enough, since at most
// ceil(B/D) - 1 can be.
void list_capped(const Table& t) {
  Scalars& s = *t.scalars;
  int64_t* const list = t.listed;
  if (s.num_flipped < 0) {
    s.num_listed = 0;
    visit_capped(t, [&](int64_t index, uint64_t) {
      list[s.num_listed++] = index;
      return s.num_listed < t.list_capacity;
    });
  } else if (s.num_flipped > 0) {
    std::sort(t.flipped, t.flipped + s.num_flipped);
    const int64_t* const end = std::unique(t.flipped, t.flipped + s.num_flipped);
    int64_t *out = list + t.list_capacity, *const merged = out;
    const int64_t* kept = list;
    for (const int64_t* flipped = t.flipped; flipped < end; ++flipped) {
      while (kept < list + s.num_listed && *kept < *flipped) *out++ = *kept++;
      if (kept < list + s.num_listed && *kept == *flipped) ++kept;
      if (is_capped(t, *flipped)) *out++ = *flipped;
    }
    out = std::copy(kept, static_cast<const int64_t*>(list + s.num_listed), out);
    std::copy(merged, out, list);
    s.num_listed = out - merged;
  }
  s.num_flipped = 0;
}

void keep_lists(const Table& t) {
  const Scalars& s = *t.scalars;
  if (s.near_size < 0) list_near(t);
  if (s.near_size > 2 * near_wanted(t)) trim_near(t);
  if (t.list_capacity > 0) list_capped(t);
}

void update_theta(const Table& t) {
  Scalars& s = *t.scalars;
  const Unseen unseen(t);
  uint64_t step = static_cast<uint64_t>(s.theta) / 64 + 1;
  for (int steps = 0; s.valid; ++steps, step *= 2) {
    if (steps == 256) rebuild(t);  // far more than ever: the sums must be wrong
    if (steps > 256) break;
    const uint64_t theta = static_cast<uint64_t>(s.theta);
    uint64_t next = water_level(t, static_cast<uint64_t>(s.uncapped),
                                static_cast<uint64_t>(s.num_capped), unseen, theta);
    if (next == theta) break;
    const bool may_shoot = s.num_capped > 0 || unseen.weight > theta;
    if (next == 0 || (next > theta && may_shoot && next - theta > step)) {
      next = std::min(theta + step, uint64_t{kNoCap});
    }
    move_theta(t, next);
  }
  keep_lists(t);
  s.unseen = static_cast<int64_t>(std::min<uint64_t>(s.theta, unseen.weight));
}

// A constant added to every weight, so that the largest meets the cap.
void update_offset(const Table& t) {
  Scalars& s = *t.scalars;
  const Unseen unseen(t);
  const uint64_t total = static_cast<uint64_t>(s.uncapped) + unseen.number * unseen.weight;
  uint64_t peak = unseen.weight;
  // Only what exceeds the cap as it is matters.
  const uint64_t theta = water_level(t, total, 0);
  if (static_cast<uint64_t>(s.ceiling) > theta) {
    uint64_t ceiling = theta;  // rises with every item found: the search passes lighter nodes by
    visit_above<uint64_t>(t, t.prefix, t.levels.depth - 1, 0, static_cast<uint64_t>(s.uncapped),
                          ceiling, [&](int64_t index) {
                            ceiling = std::max(ceiling, weight_at(t, index));
                            return true;
                          });
    s.ceiling = static_cast<int64_t>(ceiling);
    peak = std::max(peak, ceiling);
  }
  s.offset = mix_offset(t, peak, total);
  s.unseen = static_cast<int64_t>(unseen.weight);
}

// Counts and sums of the seen items by the leading bits of their codes, then, within one class of
// these, by the rest.
class Histogram {
 public:
  explicit Histogram(const Table& t)
      : t_(t), first_((exponent_of_table(t) + 127) << 8), unseen_(t) {
    each([&](uint32_t code, uint64_t weight) {
      const int at = class_of(code);
      ++number_[at];
      sum_[at] += weight;
    });
  }

  // The capped are the items from the least code on at which g is negative.
  uint64_t theta() const {
    Side below{0, 0};
    int at = 0;
    for (; at < kClasses; ++at) {
      const Side with{below.number + number_[at], below.sum + sum_[at]};
      if (at + 1 == kClasses || is_beyond(weight_of(code_of_class(at + 1), e0()), with)) break;
      below = with;
    }
    uint64_t fine[kCodes] = {};
    each([&](uint32_t code, uint64_t) {
      if (class_of(code) == at) ++fine[(code >> 8) & (kCodes - 1)];
    });
    const uint32_t base = code_of_class(at);
    for (int low = 0; low < kCodes; ++low) {
      const uint64_t weight = weight_of(base | static_cast<uint32_t>(low) << 8, e0());
      if (is_beyond(weight, below)) break;
      below = {below.number + fine[low], below.sum + fine[low] * weight};
    }
    const uint64_t capped = static_cast<uint64_t>(t_.scalars->seen) - below.number;
    const uint64_t level = water_level(t_, below.sum + unseen_.number * unseen_.weight, capped);
    return level > 0 && unseen_.weight <= level
               ? level
               : water_level(t_, below.sum, capped + unseen_.number);
  }

 private:
  static constexpr int kClasses = 48 << 8;  // exponents above e0, 8 bits of the mantissa
  static constexpr int kCodes = 1 << 7;     // the other bits
  struct Side {
    uint64_t number, sum;
  };

  template <class F>
  void each(const F& f) const {
    for (int64_t i = 0; i < t_.num_samples; ++i) {
      const uint32_t code = t_.states[i].code & ~kCappedFlag;
      if (code != 0) f(code, weight_of(code, e0()));
    }
  }
  int e0() const { return exponent_of_table(t_); }
  int class_of(uint32_t code) const { return static_cast<int>(code >> 15) - first_; }
  uint32_t code_of_class(int at) const { return static_cast<uint32_t>(at + first_) << 15; }

  // g < 0, `below` being the seen items of less weight.
  bool is_beyond(uint64_t weight, Side below) const {
    using Wide = unsigned __int128;
    const uint64_t above = static_cast<uint64_t>(t_.scalars->seen) - below.number;
    const Wide filled = Wide{below.sum} + Wide{above} * weight +
                        Wide{unseen_.number} * std::min(unseen_.weight, weight);
    // D filled < B weight: both below 2^124.
    return filled * t_.cap_numerator <
           Wide{weight} * (static_cast<uint64_t>(t_.batch_size) * t_.cap_denominator);
  }

  const Table& t_;
  const int first_;
  const Unseen unseen_;
  uint32_t number_[kClasses] = {};
  uint64_t sum_[kClasses] = {};
};

}  // namespace

uint64_t find_theta(const Table& t) {
  const Unseen unseen(t);
  return t.scalars->seen > 0 ? Histogram(t).theta()
                             // All weigh the same, which no cap can change.
                             : water_level(t, unseen.number * unseen.weight, 0);
}

void hold_theta(const Table& t, uint64_t theta) {
  Scalars& s = *t.scalars;
  if (!s.valid) {
    s.theta = static_cast<int64_t>(theta);
    rebuild(t);
  } else if (theta != static_cast<uint64_t>(s.theta)) {
    move_theta(t, theta);
  }
  if (t.flatten == Flatten::cap) keep_lists(t);
  s.unseen = static_cast<int64_t>(std::min(theta, Unseen(t).weight));
}

void update_cap(const Table& t) {
  Scalars& s = *t.scalars;
  if (!s.valid) rebuild(t);
  if (drawn_alike(t)) {
    s.offset = -1;
    return;
  }
  switch (t.flatten) {
    case Flatten::cap:
      s.offset = 0;
      return update_theta(t);
    case Flatten::mix:
      return update_offset(t);
    case Flatten::none:
      s.unseen = static_cast<int64_t>(Unseen(t).weight);
  }
}

}  // namespace fastis::FASTIS_ISA
