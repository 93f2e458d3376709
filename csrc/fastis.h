// Every entry point of fastis._C. The extension is a leaf: it takes pointers and sizes, knows
// nothing of torch, and allocates nothing that outlives a call; outputs are passed in.
#pragma once

#include <cstdint>
#include <string>

#include "device/device_table.h"
#include "format.h"
#include "layout.h"

namespace fastis {

// Throws std::bad_alloc: a MemoryError in Python. Never from within an OpenMP region.
[[noreturn]] void out_of_memory();

// A raw device or host address that arrives from Python as an integer (0: no such tensor).
template <class T>
struct Pointer {
  T* address = nullptr;
  operator T*() const { return address; }
  T* operator->() const { return address; }
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

// The device's code run on the host, in an order that `stride` permutes: for tests of everything
// but the launch (see device/grid.h).
namespace fastis::emulated {

void update(Pointer<const DeviceTable> table, Pointer<const int64_t> indices,
            Pointer<const float> observed, Pointer<const float> weights, Pointer<const float> score,
            int64_t n, Pointer<const float> mean_grad, int64_t num_classes, uint64_t stride);
void draw(Pointer<const DeviceTable> table, Pointer<int64_t> indices, Pointer<float> weights,
          uint64_t stride);
void rescale(Pointer<const DeviceTable> table, uint64_t stride);
void update_and_draw(Pointer<const DeviceTable> table, Pointer<const int64_t> indices,
                     Pointer<const float> observed, Pointer<const float> weights,
                     Pointer<const float> score, int64_t n, Pointer<const float> mean_grad,
                     int64_t num_classes, Pointer<int64_t> next_indices,
                     Pointer<float> next_weights, uint64_t stride);
int64_t survey(int64_t format, Pointer<const void> values, int64_t n, Pointer<int64_t> found,
               uint64_t stride);
int64_t running_sums_bytes(int64_t n);
int64_t running_sums(int64_t format, Pointer<const void> values, int64_t n, int64_t shift,
                     Pointer<uint64_t> ends, Pointer<void> memory, int64_t bytes, uint64_t stride);
int64_t integers(int64_t format, Pointer<const void> values, int64_t n, int64_t shift,
                 Pointer<uint64_t> out, uint64_t stride);
int64_t search(int64_t format, Pointer<const void> values, int64_t n, int64_t shift,
               Pointer<const uint64_t> ends, uint64_t total, uint64_t seed, int64_t first,
               int64_t count, Pointer<int64_t> indices, Pointer<float> coefficients,
               uint64_t stride);
int64_t alias_build_bytes(int64_t n);
int64_t alias_build(int64_t format, Pointer<const void> values, int64_t n, int64_t shift,
                    uint64_t total, Pointer<int64_t> before, Pointer<uint64_t> table,
                    Pointer<void> memory, int64_t bytes, uint64_t stride);
int64_t alias_draw(Pointer<const uint64_t> table, int64_t n, uint64_t total, uint64_t seed,
                   int64_t first, int64_t count, Pointer<int64_t> indices,
                   Pointer<float> coefficients, uint64_t stride);
int64_t alias_resolve(Pointer<const uint64_t> table, int64_t n, uint64_t total,
                      Pointer<const uint64_t> points, int64_t count, Pointer<int64_t> indices,
                      Pointer<float> coefficients, uint64_t stride);
int64_t draw_points(uint64_t total, uint64_t seed, int64_t first, int64_t count,
                    Pointer<uint64_t> points, uint64_t stride);
int64_t scale_grad(int64_t from, int64_t to, Pointer<const void> grad, Pointer<void> out,
                   Pointer<const void> scale, int64_t rows, int64_t columns, int64_t scale_stride,
                   uint64_t stride);
// What thread number `thread` of block `block` of `blocks` does of n items: the first, the step to
// the next, and how many.
void share(unsigned block, unsigned thread, unsigned blocks, int64_t n, Pointer<int64_t> found);
unsigned blocks_for(int64_t items, int64_t most);

}  // namespace fastis::emulated

#ifdef FASTIS_CUDA
// Launches on `stream` of `device`; the CUDA error, 0 for none. A table's address is on the host.
namespace fastis::cuda {

const char* error_string(int64_t error);
// Why the kernels can't run on a device; empty when they can. Creates the device's context.
std::string missing(int64_t device);
int64_t update(Pointer<const DeviceTable> table, Pointer<const int64_t> indices,
               Pointer<const float> observed, Pointer<const float> weights,
               Pointer<const float> score, int64_t n, Pointer<const float> mean_grad,
               int64_t num_classes, int64_t device, uint64_t stream);
int64_t draw(Pointer<const DeviceTable> table, Pointer<int64_t> indices, Pointer<float> weights,
             int64_t device, uint64_t stream);
// For states that were written from outside. O(N).
int64_t rescale(Pointer<const DeviceTable> table, int64_t device, uint64_t stream);
// Loads the sampler's kernels, which a stream that is being captured might refuse to do.
int64_t load_sampler(int64_t device);
// Both in one launch: what is learnt of a minibatch, then the next one.
int64_t update_and_draw(Pointer<const DeviceTable> table, Pointer<const int64_t> indices,
                        Pointer<const float> observed, Pointer<const float> weights,
                        Pointer<const float> score, int64_t n, Pointer<const float> mean_grad,
                        int64_t num_classes, Pointer<int64_t> next_indices,
                        Pointer<float> next_weights, int64_t device, uint64_t stream);

// Given weights: what cpu/entry_points.h says of them, in pieces. `values` are aligned to 16 bytes;
// `memory` is for the launch alone, as many bytes as ..._bytes(n) says (an error, negated, if it
// can't say).
int64_t survey(
    int64_t format, Pointer<const void> values /* [N] */, int64_t n,
    Pointer<int64_t> found /* [3], zeros: the largest and the sum, as doubles; unusable */,
    int64_t device, uint64_t stream);
int64_t running_sums_bytes(int64_t n, int64_t device);
int64_t running_sums(int64_t format, Pointer<const void> values, int64_t n, int64_t shift,
                     Pointer<uint64_t> ends /* [ceil(N / 256)] */, Pointer<void> memory,
                     int64_t bytes, int64_t device, uint64_t stream);
int64_t integers(int64_t format, Pointer<const void> values, int64_t n, int64_t shift,
                 Pointer<uint64_t> out /* [N] */, int64_t device, uint64_t stream);
int64_t search(int64_t format, Pointer<const void> values, int64_t n, int64_t shift,
               Pointer<const uint64_t> ends, uint64_t total, uint64_t seed, int64_t first,
               int64_t count, Pointer<int64_t> indices /* [count] */,
               Pointer<float> coefficients /* [count] */, int64_t device, uint64_t stream);
int64_t alias_build_bytes(int64_t n, int64_t device);
int64_t alias_build(int64_t format, Pointer<const void> values, int64_t n, int64_t shift,
                    uint64_t total, Pointer<int64_t> before /* [ceil(N / 256) + 1, 3], first 0 */,
                    Pointer<uint64_t> table /* [N, 2] */, Pointer<void> memory, int64_t bytes,
                    int64_t device, uint64_t stream);
int64_t alias_draw(Pointer<const uint64_t> table /* [N, 2] */, int64_t n, uint64_t total,
                   uint64_t seed, int64_t first, int64_t count,
                   Pointer<int64_t> indices /* [count] */,
                   Pointer<float> coefficients /* [count] */, int64_t device, uint64_t stream);
int64_t alias_resolve(Pointer<const uint64_t> table /* [N, 2] */, int64_t n, uint64_t total,
                      Pointer<const uint64_t> points /* [count] */, int64_t count,
                      Pointer<int64_t> indices, Pointer<float> coefficients, int64_t device,
                      uint64_t stream);
int64_t draw_points(uint64_t total, uint64_t seed, int64_t first, int64_t count,
                    Pointer<uint64_t> points /* [count] */, int64_t device, uint64_t stream);

// out = grad * scale. Formats as above; `to` differs from `from` for float32 to float16 alone.
// In place (grad == out) nothing happens where a single scale is 1.
int64_t scale_grad(int64_t from, int64_t to, Pointer<const void> grad /* [rows, columns] */,
                   Pointer<void> out /* [rows, columns] */,
                   Pointer<const void> scale /* [rows], scale_stride apart; float64 for float64,
                                                else float32 */
                   ,
                   int64_t rows, int64_t columns, int64_t scale_stride, int64_t device,
                   uint64_t stream);

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
