// Batch normalisation whose statistics are weighted by sample (fastis/batch_norm.py):
//   mean_c = sum_b w_b sum_s x_bcs / S,  var_c = sum_b w_b sum_s (x_bcs - mean_c)^2 / S
//   y = weight_c xhat + bias_c,  xhat = (x - mean_c) rstd_c,  rstd_c = 1 / sqrt(var_c + eps)
//   dx = weight_c rstd_c [dy - (w_b / S) (sum dy + xhat sum dy xhat)]
// A block is solved start to end while its values are in the cache: a channel, or vectors of
// channels that lie side by side.
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
  void sum(double (&total)[N][kRun<F>], const Body& body) const {
    const int64_t runs = shape.channels_last ? shape.S : (shape.S + kRun<F> - 1) / kRun<F>;
    const int64_t step = runs < kSummed ? kSummed / runs : 1;
    for (auto& lanes : total) std::memset(lanes, 0, sizeof(lanes));
    for (int64_t b = 0; b < shape.B; b += step) {
      Vec<F> sum[N][kVectors] = {};
      samples(b, b + step < shape.B ? b + step : shape.B, [&](const At& at) { body(at, sum); });
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

  // out[lane] = value(channel, lane), the same for all lanes of a single channel.
  template <class Value>
  void fill(F (&out)[kRun<F>], const Value& value) const {
    for (int i = 0; i < channels; ++i) out[i] = static_cast<F>(value(begin + i, i));
    for (int i = channels; i < kRun<F>; ++i) out[i] = channels == 1 ? out[0] : F(0);
  }
};

template <class F, class Solve>
void for_blocks(const BatchNormShape& shape, int threads, const Solve& solve) {
  int width = 1;
  if (shape.channels_last) {
    for (width = kRun<F>; width > kLanes<F> && shape.C < int64_t(width) * threads;) width /= 2;
  }
  const int64_t blocks = (shape.C + width - 1) / width;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t begin = i * width, rest = shape.C - begin;
    solve(Block<F>{shape, begin, static_cast<int>(rest < width ? rest : width)});
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
  for_blocks<F>(shape, threads, [&](const Block<F>& block) {
    alignas(64) F center[kRun<F>], scale[kRun<F>], shift[kRun<F>];
    double total[1][kRun<F>];
    block.template sum<1>(total, [&](const At& at, Vec<F>(&sum)[1][kVectors]) {
      sum[0][at.u] = fma<F>(splat<F>(share[at.b]), read(x, at, F(0)), sum[0][at.u]);
    });
    block.fill(center, [&](int64_t, int lane) { return total[0][lane] * inverse; });
    block.template sum<1>(total, [&](const At& at, Vec<F>(&sum)[1][kVectors]) {
      const Vec<F> d = read(x, at, center[0]) - load(center + at.lane);
      sum[0][at.u] = fma<F>(share[at.b] * d, d, sum[0][at.u]);
    });
    block.fill(scale, [&](int64_t c, int lane) {
      mean[c] = center[lane];
      var[c] = static_cast<F>(total[0][lane] * inverse);
      const F rstd = 1 / root<F>(var[c] + static_cast<F>(eps));
      return weight != nullptr ? rstd * weight[c] : rstd;
    });
    for (int64_t c = block.begin; running_mean && c < block.begin + block.channels; ++c) {
      running_mean[c] += momentum * (mean[c] - running_mean[c]);
      running_var[c] += momentum * (var[c] * correction - running_var[c]);
    }
    block.fill(shift, [&](int64_t c, int) { return bias != nullptr ? bias[c] : F(0); });
    block.samples(0, shape.B, [&](const At& at) {
      const Vec<F> d = read(x, at, F(0)) - load(center + at.lane);
      write(y, at, fma<F>(d, load(scale + at.lane), load(shift + at.lane)));
    });
  });
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
  for_blocks<F>(shape, threads, [&](const Block<F>& block) {
    alignas(64) F center[kRun<F>], rstd[kRun<F>], scale[kRun<F>], sum_dy[kRun<F>],
        sum_dy_xhat[kRun<F>];
    block.fill(center, [&](int64_t c, int) { return mean[c]; });
    block.fill(rstd, [&](int64_t c, int) { return 1 / root<F>(var[c] + static_cast<F>(eps)); });
    block.fill(scale,
               [&](int64_t c, int lane) { return (weight ? weight[c] : F(1)) * rstd[lane]; });
    double total[2][kRun<F>];
    block.template sum<2>(total, [&](const At& at, Vec<F>(&sum)[2][kVectors]) {
      const Vec<F> g = read(dy, at, F(0)), d = read(x, at, F(0)) - load(center + at.lane);
      sum[0][at.u] += g;
      sum[1][at.u] = fma<F>(g, d, sum[1][at.u]);
    });
    block.fill(sum_dy, [&](int64_t, int lane) { return total[0][lane]; });
    block.fill(sum_dy_xhat, [&](int64_t, int lane) { return total[1][lane] * rstd[lane]; });
    for (int i = 0; i < block.channels; ++i) {
      grad_weight[block.begin + i] = sum_dy_xhat[i];
      grad_bias[block.begin + i] = sum_dy[i];
    }
    if (dx == nullptr) return;
    block.samples(0, shape.B, [&](const At& at) {
      const Vec<F> xhat = (read(x, at, F(0)) - load(center + at.lane)) * load(rstd + at.lane);
      const Vec<F> common = fma<F>(xhat, load(sum_dy_xhat + at.lane), load(sum_dy + at.lane));
      const Vec<F> own = fma<F>(splat<F>(-share[at.b] * inverse), common, read(dy, at, F(0)));
      write(dx, at, own * load(scale + at.lane));
    });
  });
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
