// Every entry point of fastis._C. The extension is a leaf: it takes pointers and sizes, knows
// nothing of torch, and allocates nothing that outlives a call; outputs are passed in.
#pragma once

#include <cstdint>
#include <string>

#include "device/device_table.h"
#include "format.h"
#include "integer_weights.h"
#include "layout.h"

namespace fastis {

// Throws std::bad_alloc: a MemoryError in Python. Never from within an OpenMP region.
[[noreturn]] void out_of_memory();
// Throws std::out_of_range: an IndexError in Python.
[[noreturn]] void index_out_of_range(int64_t num_samples, int64_t least, int64_t most);
// Throws std::domain_error: a ValueError in Python.
[[noreturn]] void all_are_excluded(int64_t num_samples);

// The losses: loss, score and gradient in one pass. Tensors other than the logits and the gradient
// are float (double for double); the gradient is in the logits' format (float for float16). A null
// pointer: no such tensor. B: minibatch, T: tokens, C: classes, L: outputs.
struct CrossEntropy {
  Format format;               // of the logits
  Pointer<const void> logits;  // [B T, C], rows row_stride apart
  int64_t row_stride;
  Pointer<const int64_t> target;      // [B T], or null with soft
  Pointer<const void> soft;           // [B T, C] probabilities, or null
  Pointer<const void> weights;        // [B]
  Pointer<const void> class_weights;  // [C]
  int64_t B, T, C, ignore_index;
  double smoothing;
  double denominator;  // NaN: torch's, from the labels
  bool reduce;
  Pointer<void> grad;       // [B T, C]
  Pointer<void> loss;       // [1], or [B] unless reduce
  Pointer<void> losses;     // [B]
  Pointer<void> score;      // [B]
  Pointer<void> mean_grad;  // [C], T = 1
  int threads;
};

struct ElementwiseLoss {
  enum class Kind : int { binary_cross_entropy = 0, squared_error = 1 } kind;
  Format format;
  Pointer<const void> logits;      // [B, L]
  Pointer<const void> target;      // [B, L]
  Pointer<const void> weights;     // [B]
  Pointer<const void> pos_weight;  // [L]
  int64_t B, L;
  double divisor;  // of a sample's sum over its outputs: 1 or L
  double denominator;
  bool reduce;
  Pointer<void> grad;       // [B, L]
  Pointer<void> loss;       // [1], or [B] unless reduce
  Pointer<void> losses;     // [B]
  Pointer<void> score;      // [B]
  Pointer<void> mean_grad;  // [L]
  int threads;
};

// out = grad * scale, the backward pass. `to` differs from `from` for float32 to float16 alone. In
// place (grad == out) nothing happens where a single scale is 1.
struct ScaleGrad {
  Format from, to;
  Pointer<const void> grad;   // [rows, columns]
  Pointer<void> out;          // [rows, columns]
  Pointer<const void> scale;  // [rows], scale_stride apart; float64 for float64, else float32
  int64_t rows, columns, scale_stride;
};

// [B, C, S], or [B, S, C] in memory with channels_last.
struct BatchNormShape {
  int64_t B, C, S;
  bool channels_last;
};
// Its running statistics, moved by `momentum` towards the mean and `correction` times the variance.
struct Running {
  Pointer<void> mean /* [C], or null: none */, var /* [C] */;
  Pointer<const void> correction;
  double momentum;
};

}  // namespace fastis

#ifdef FASTIS_CUDA
// Launches on `stream` of `device`; the CUDA error, 0 for none. A table's address is on the host.
namespace fastis::cuda {

const char* error_string(int64_t error);
// Why the kernels can't run on a device; empty when they can. Creates the device's context.
std::string missing(int64_t device);

int64_t scale_grad(const ScaleGrad& call, int64_t device, uint64_t stream);

int64_t update(Pointer<const DeviceTable> table, const Observation& observation, int64_t device,
               uint64_t stream);
int64_t draw(Pointer<const DeviceTable> table, const Batch& batch, int64_t device, uint64_t stream);
// Both in one launch: what is learnt of a minibatch, then the next one.
int64_t update_and_draw(Pointer<const DeviceTable> table, const Observation& observation,
                        const Batch& next_batch, int64_t device, uint64_t stream);
// These samples are unseen or excluded from now on, as `last` says.
int64_t clear(Pointer<const DeviceTable> table, Pointer<const int64_t> indices /* [n] */, int64_t n,
              int32_t last, int64_t device, uint64_t stream);
// For states that were written from outside. O(N).
int64_t rescale(Pointer<const DeviceTable> table, int64_t device, uint64_t stream);
// Loads the sampler's kernels, which a stream that is being captured might refuse to do.
int64_t load_sampler(int64_t device);

// Categorical: what cpu/entry_points.h says, in pieces. `memory` is for the launch alone, as many
// bytes as ..._bytes(n) says (an error, negated, if it can't say).

// Of the floats; reads format, values and n of the weights.
int64_t reduce(
    const IntegerWeights& weights,
    Pointer<int64_t> found /* [3], zeros: the largest and the sum, as doubles; unusable */,
    int64_t device, uint64_t stream);
int64_t prefix_sums_bytes(int64_t n, int64_t device);
// Fills weights.prefix [ceil(N / 256)]; reads all but the total.
int64_t prefix_sums(const IntegerWeights& weights, Pointer<void> memory, int64_t bytes,
                    int64_t device, uint64_t stream);
int64_t integer_weights(const IntegerWeights& weights, Pointer<uint64_t> out /* [N] */,
                        int64_t device, uint64_t stream);
int64_t categorical_draw(const IntegerWeights& weights, const Draws& draws,
                         const Batch& batch /* [count] */, int64_t device, uint64_t stream);
int64_t alias_build_bytes(int64_t n, int64_t device);
int64_t alias_build(const IntegerWeights& weights,
                    Pointer<int64_t> before /* [ceil(N / 256) + 1, 3], first 0 */,
                    Pointer<Bucket> table /* [N] */, Pointer<void> memory, int64_t bytes,
                    int64_t device, uint64_t stream);
int64_t alias_draw(const AliasTable& table, const Draws& draws, const Batch& batch /* [count] */,
                   int64_t device, uint64_t stream);
int64_t alias_inverse_cdf(const AliasTable& table, Pointer<const uint64_t> points /* [count] */,
                          int64_t count, const Batch& batch /* [count] */, int64_t device,
                          uint64_t stream);
int64_t random_below(uint64_t total, const Draws& draws, Pointer<uint64_t> out /* [count] */,
                     int64_t device, uint64_t stream);

}  // namespace fastis::cuda
#endif

// The CPU entry points exist once per instruction set, each in a namespace of its own.
#define FASTIS_NAMESPACE baseline
#include "cpu/entry_points.h"
#undef FASTIS_NAMESPACE
#ifdef FASTIS_X86
#define FASTIS_NAMESPACE avx2
#include "cpu/entry_points.h"
#undef FASTIS_NAMESPACE
#define FASTIS_NAMESPACE avx512
#include "cpu/entry_points.h"
#undef FASTIS_NAMESPACE
#endif
