// Batch normalisation whose statistics are weighted by sample (fastis/batch_norm.py):
//   mean_c = sum_b w_b sum_s x_bcs / S,  var_c = sum_b w_b sum_s (x_bcs - mean_c)^2 / S
//   y = weight_c xhat + bias_c,  xhat = (x - mean_c) rstd_c,  rstd_c = 1 / sqrt(var_c + eps)
//   dx = weight_c rstd_c [dy - (w_b / S) (sum dy + xhat sum dy xhat)]
// A block of channels is solved start to end while its values are in the cache. Images with
// channels last have no such blocks: there each step runs over slices of the minibatch.
#include "fastis.h"
#include "simd.h"

namespace fastis::FASTIS_ISA {

namespace {

constexpr int kVectors = 4;  // of a run: independent sums hide the latency of the additions
template <class F>
constexpr int kRun = kVectors * kLanes<F>;
// Vectors that are summed in F; beyond them in double.
constexpr int64_t kSummed = 128;

// One vector of a run of consecutive elements: sample b, `some` elements at `offset` of x; the
// block's constants of these lanes are at `lane`.
struct At {
  int64_t b, offset;
  int u, lane, some;
};

template <class S>
inline Vec<Compute<S>> read(const S* p, const At& at, Compute<S> fill) {
  return at.some == kLanes<Compute<S>> ? load(p + at.offset)
                                       : load_some(p + at.offset, at.some, fill);
}

template <class S, class V>
inline void write(S* p, const At& at, V x) {
  if (at.some == sizeof(x) / sizeof(x[0])) {
    store(p + at.offset, x);
  } else {
    store_some(p + at.offset, x, at.some);
  }
}

// Where a block's values lie in [B, C, S], or in [B, S, C] (channels last).
template <class F>
struct Block {
  BatchNormShape shape;
  int64_t begin;  // the first channel
  int channels;   // 1, or with channels last up to kRun

  template <class Body>
  void run(int64_t b, int64_t offset, int64_t count, const Body& body) const {
    constexpr int V = kLanes<F>;
    // Unrolled, so that the sums of a run stay in registers.
    if (count == kRun<F>) {
#pragma GCC unroll 4
      for (int u = 0; u < kVectors; ++u) body(At{b, offset + u * V, u, u * V, V});
      return;
    }
    if (count == kRun<F> / 2) {
#pragma GCC unroll 2
      for (int u = 0; u < kVectors / 2; ++u) body(At{b, offset + u * V, u, u * V, V});
      return;
    }
#pragma GCC unroll 4
    for (int u = 0; u < kVectors; ++u) {
      const int rest = static_cast<int>(count) - u * V;
      if (rest <= 0) break;
      body(At{b, offset + u * V, u, u * V, rest < V ? rest : V});
    }
  }

  // Calls body(At) for all vectors of the samples [from, to).
  template <class Body>
  void samples(int64_t from, int64_t to, const Body& body) const {
    const int64_t C = shape.C, S = shape.S;
    for (int64_t b = from; b < to; ++b) {
      if (shape.channels_last) {
        for (int64_t s = 0; s < S; ++s) run(b, (b * S + s) * C + begin, channels, body);
      } else {
        const int64_t plane = (b * C + begin) * S;
        for (int64_t i = 0; i < S; i += kRun<F>) {
          run(b, plane + i, S - i < kRun<F> ? S - i : kRun<F>, body);
        }
      }
    }
  }

  // total[n][lane]: the sums of what body(At, sum) adds to sum[n][u], by channel.
  template <int N, class Body>
  void sum(int64_t from, int64_t to, double (&total)[N][kRun<F>], const Body& body) const {
    const int64_t runs = shape.channels_last ? shape.S : (shape.S + kRun<F> - 1) / kRun<F>;
    const int64_t step = runs < kSummed ? kSummed / runs : 1;
    for (auto& lanes : total) std::memset(lanes, 0, sizeof(lanes));
    for (int64_t b = from; b < to; b += step) {
      Vec<F> sum[N][kVectors] = {};
      samples(b, b + step < to ? b + step : to, [&](const At& at) { body(at, sum); });
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) {
        alignas(64) F lanes[kRun<F>];
#pragma GCC unroll 4
        for (int u = 0; u < kVectors; ++u) store(lanes + u * kLanes<F>, sum[n][u]);
        for (int i = 0; i < kRun<F>; ++i) total[n][i] += lanes[i];
      }
    }
    if (shape.channels_last) return;
    for (auto& lanes : total) {
      double all = 0;
      for (const double lane : lanes) all += lane;
      for (double& lane : lanes) lane = all;
    }
  }

  // out[lane] = from[channel] (0 if null), the same for all lanes of a single channel.
  void fill(F (&out)[kRun<F>], const F* from) const {
    for (int i = 0; i < kRun<F>; ++i) {
      out[i] = from == nullptr ? F(0)
               : i < channels  ? from[begin + i]
               : channels == 1 ? out[0]
                               : F(0);
    }
  }

  // lanes[lane] *= by[channel], unless null.
  void scale(F (&lanes)[kRun<F>], const F* by) const {
    if (by == nullptr) return;
    for (int i = 0; i < kRun<F>; ++i) {
      if (i < channels || channels == 1) lanes[i] *= by[begin + (i < channels ? i : 0)];
    }
  }
};

template <class F>
Block<F> block_at(const BatchNormShape& shape, int64_t begin, int64_t width) {
  const int64_t rest = shape.C - begin;
  return {shape, begin, static_cast<int>(rest < width ? rest : width)};
}

// The samples of a slice: as many slices whatever the threads, so that sums have the same bits.
struct Slices {
  int64_t B;
  int64_t count() const { return B < 64 ? B : 64; }
  int64_t begin(int64_t slice) const { return slice * B / count(); }
};

// Calls solve(block, slice) for all of them, a slice's blocks one after the other.
template <class F, class Solve>
void for_slices(const BatchNormShape& shape, int threads, const Solve& solve) {
  const int64_t slices = Slices{shape.B}.count();
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t slice = 0; slice < slices; ++slice) {
    for (int64_t c = 0; c < shape.C; c += kRun<F>) solve(block_at<F>(shape, c, kRun<F>), slice);
  }
}

// N sums over the minibatch for every channel: sum(block, from, to, total), then finish(channel,
// first sum, last sum).
template <class F, int N, class Sum, class Finish>
struct Reduce {
  Sum sum;
  Finish finish;

  void operator()(const Block<F>& block) const {
    double total[N][kRun<F>];
    sum(block, 0, block.shape.B, total);
    for (int i = 0; i < block.channels; ++i) finish(block.begin + i, total[0][i], total[N - 1][i]);
  }

  void in_slices(const BatchNormShape& shape, int threads) const {
    const Slices slices{shape.B};
    const Scratch<double> partial(slices.count() * N * shape.C);
    for_slices<F>(shape, threads, [&](const Block<F>& block, int64_t slice) {
      double total[N][kRun<F>];
      sum(block, slices.begin(slice), slices.begin(slice + 1), total);
      for (int n = 0; n < N; ++n) {
        std::memcpy(partial + (slice * N + n) * shape.C + block.begin, total[n],
                    sizeof(double) * static_cast<size_t>(block.channels));
      }
    });
    for (int64_t c = 0; c < shape.C; ++c) {
      double total[N] = {};
      for (int64_t i = 0; i < slices.count() * N; ++i) total[i % N] += partial[i * shape.C + c];
      finish(c, total[0], total[N - 1]);
    }
  }
};
template <class F, int N, class Sum, class Finish>
Reduce<F, N, Sum, Finish> reduce(const Sum& sum, const Finish& finish) {
  return {sum, finish};
}

// apply(block, from, to): every element by itself.
template <class F, class Apply>
struct Map {
  Apply apply;

  void operator()(const Block<F>& block) const { apply(block, 0, block.shape.B); }

  void in_slices(const BatchNormShape& shape, int threads) const {
    const Slices slices{shape.B};
    for_slices<F>(shape, threads, [&](const Block<F>& block, int64_t slice) {
      apply(block, slices.begin(slice), slices.begin(slice + 1));
    });
  }
};
template <class F, class Apply>
Map<F, Apply> map(const Apply& apply) {
  return {apply};
}

// Rows of images with channels last that are worth slices.
constexpr int64_t kSlicedRows = 4096;

template <class F, class... Steps>
void run(const BatchNormShape& shape, int threads, const Steps&... steps) {
  if (shape.channels_last && shape.S > 1 && shape.B * shape.S >= kSlicedRows) {
    (steps.in_slices(shape, threads), ...);
    return;
  }
  const int64_t width = shape.channels_last ? kRun<F> : 1, blocks = (shape.C + width - 1) / width;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t i = 0; i < blocks; ++i) {
    const Block<F> block = block_at<F>(shape, i * width, width);
    (steps(block), ...);
  }
}

template <class F>
inline F root(F x) {
  if constexpr (sizeof(F) == 4) return __builtin_sqrtf(x);
  return static_cast<F>(__builtin_sqrt(x));
}

template <class S>
void forward_as(const BatchNormShape& shape, const void* input, const void* shares,
                const void* weights, const void* biases, double eps, const Running& running,
                void* means, void* vars, void* output, int threads) {
  using F = Compute<S>;
  const S* const x = static_cast<const S*>(input);
  const F *const share = static_cast<const F*>(shares), *const weight =
                                                            static_cast<const F*>(weights);
  const F* const bias = static_cast<const F*>(biases);
  F *const mean = static_cast<F*>(means), *const var = static_cast<F*>(vars);
  F* const running_mean = static_cast<F*>(running.mean.address);
  F* const running_var = static_cast<F*>(running.var.address);
  const F momentum = static_cast<F>(running.momentum);
  const F correction =
      running_mean != nullptr ? *static_cast<const F*>(running.correction.address) : F(1);
  S* const y = static_cast<S*>(output);
  const double inverse = 1.0 / static_cast<double>(shape.S);
  const auto sum_x = [&](const Block<F>& block, int64_t from, int64_t to, auto& total) {
    block.template sum<1>(from, to, total, [&](const At& at, Vec<F>(&sum)[1][kVectors]) {
      sum[0][at.u] = fma<F>(splat<F>(share[at.b]), read(x, at, F(0)), sum[0][at.u]);
    });
  };
  const auto set_mean = [&](int64_t c, double sum, double) {
    mean[c] = static_cast<F>(sum * inverse);
  };
  const auto sum_squares = [&](const Block<F>& block, int64_t from, int64_t to, auto& total) {
    alignas(64) F center[kRun<F>];
    block.fill(center, mean);
    block.template sum<1>(from, to, total, [&](const At& at, Vec<F>(&sum)[1][kVectors]) {
      const Vec<F> d = read(x, at, center[0]) - load(center + at.lane);
      sum[0][at.u] = fma<F>(share[at.b] * d, d, sum[0][at.u]);
    });
  };
  const auto set_var = [&](int64_t c, double sum, double) {
    var[c] = static_cast<F>(sum * inverse);
    if (running_mean == nullptr) return;
    running_mean[c] += momentum * (mean[c] - running_mean[c]);
    running_var[c] += momentum * (var[c] * correction - running_var[c]);
  };
  const auto normalize = [&](const Block<F>& block, int64_t from, int64_t to) {
    alignas(64) F center[kRun<F>], scale[kRun<F>], shift[kRun<F>];
    block.fill(center, mean);
    block.fill(scale, var);
    for (F& lane : scale) lane = 1 / root<F>(lane + static_cast<F>(eps));
    block.scale(scale, weight);
    block.fill(shift, bias);
    block.samples(from, to, [&](const At& at) {
      const Vec<F> d = read(x, at, F(0)) - load(center + at.lane);
      write(y, at, fma<F>(d, load(scale + at.lane), load(shift + at.lane)));
    });
  };
  run<F>(shape, threads, reduce<F, 1>(sum_x, set_mean), reduce<F, 1>(sum_squares, set_var),
         map<F>(normalize));
}

template <class S>
void backward_as(const BatchNormShape& shape, const void* grad_output, const void* input,
                 const void* shares, const void* weights, const void* means, const void* vars,
                 double eps, void* grad_input, void* grad_weights, void* grad_biases, int threads) {
  using F = Compute<S>;
  const S *const dy = static_cast<const S*>(grad_output), *const x = static_cast<const S*>(input);
  const F *const share = static_cast<const F*>(shares), *const weight =
                                                            static_cast<const F*>(weights);
  const F *const mean = static_cast<const F*>(means), *const var = static_cast<const F*>(vars);
  S* const dx = static_cast<S*>(grad_input);
  F* const grad_weight = static_cast<F*>(grad_weights);
  F* const grad_bias = static_cast<F*>(grad_biases);
  const F inverse = static_cast<F>(1.0 / static_cast<double>(shape.S));
  const auto sum_dy = [&](const Block<F>& block, int64_t from, int64_t to, auto& total) {
    alignas(64) F center[kRun<F>];
    block.fill(center, mean);
    block.template sum<2>(from, to, total, [&](const At& at, Vec<F>(&sum)[2][kVectors]) {
      const Vec<F> g = read(dy, at, F(0)), d = read(x, at, F(0)) - load(center + at.lane);
      sum[0][at.u] += g;
      sum[1][at.u] = fma<F>(g, d, sum[1][at.u]);
    });
  };
  const auto set_grads = [&](int64_t c, double of_dy, double of_dy_d) {
    grad_bias[c] = static_cast<F>(of_dy);
    grad_weight[c] = static_cast<F>(of_dy_d) / root<F>(var[c] + static_cast<F>(eps));
  };
  const auto set_dx = [&](const Block<F>& block, int64_t from, int64_t to) {
    alignas(64) F center[kRun<F>], rstd[kRun<F>], scale[kRun<F>], of_dy[kRun<F>],
        of_dy_xhat[kRun<F>];
    block.fill(center, mean);
    block.fill(rstd, var);
    for (F& lane : rstd) lane = 1 / root<F>(lane + static_cast<F>(eps));
    std::memcpy(scale, rstd, sizeof(scale));
    block.scale(scale, weight);
    block.fill(of_dy, grad_bias);
    block.fill(of_dy_xhat, grad_weight);
    block.samples(from, to, [&](const At& at) {
      const Vec<F> xhat = (read(x, at, F(0)) - load(center + at.lane)) * load(rstd + at.lane);
      const Vec<F> common = fma<F>(xhat, load(of_dy_xhat + at.lane), load(of_dy + at.lane));
      const Vec<F> own = fma<F>(splat<F>(-share[at.b] * inverse), common, read(dy, at, F(0)));
      write(dx, at, own * load(scale + at.lane));
    });
  };
  const auto sums = reduce<F, 2>(sum_dy, set_grads);
  if (dx == nullptr) {
    run<F>(shape, threads, sums);
  } else {
    run<F>(shape, threads, sums, map<F>(set_dx));
  }
}

}  // namespace

void batch_norm_forward(fastis::Format format, BatchNormShape shape, Pointer<const void> x,
                        Pointer<const void> share, Pointer<const void> weight,
                        Pointer<const void> bias, double eps, Running running, Pointer<void> mean,
                        Pointer<void> var, Pointer<void> y, int threads) {
  const auto run = format == fastis::Format::float32   ? forward_as<float>
                   : format == fastis::Format::float64 ? forward_as<double>
                                                       : forward_as<BFloat16>;
  run(shape, x, share, weight, bias, eps, running, mean, var, y, threads);
}

void batch_norm_backward(fastis::Format format, BatchNormShape shape, Pointer<const void> dy,
                         Pointer<const void> x, Pointer<const void> share,
                         Pointer<const void> weight, Pointer<const void> mean,
                         Pointer<const void> var, double eps, Pointer<void> dx,
                         Pointer<void> grad_weight, Pointer<void> grad_bias, int threads) {
  const auto run = format == fastis::Format::float32   ? backward_as<float>
                   : format == fastis::Format::float64 ? backward_as<double>
                                                       : backward_as<BFloat16>;
  run(shape, dy, x, share, weight, mean, var, eps, dx, grad_weight, grad_bias, threads);
}

}  // namespace fastis::FASTIS_ISA
