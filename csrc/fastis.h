// Every entry point of fastis._C. The extension is a leaf: it takes pointers and sizes, knows
// nothing of torch, and allocates nothing that outlives a call; outputs are passed in.
#pragma once

#include <cstdint>

#include "device/device_table.h"
#include "table.h"

namespace fastis {

// A raw device or host address that arrives from Python as an integer (0: no such tensor).
template <class T>
struct Pointer {
  T* address = nullptr;
  operator T*() const { return address; }
  T* operator->() const { return address; }
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

}  // namespace fastis::emulated

#ifdef FASTIS_CUDA
// Launches on `stream` of `device`; the CUDA error, 0 for none. A table's address is on the host.
namespace fastis::cuda {

const char* error_string(int64_t error);
int64_t update(Pointer<const DeviceTable> table, Pointer<const int64_t> indices,
               Pointer<const float> observed, Pointer<const float> weights,
               Pointer<const float> score, int64_t n, Pointer<const float> mean_grad,
               int64_t num_classes, int64_t device, uint64_t stream);
int64_t draw(Pointer<const DeviceTable> table, Pointer<int64_t> indices, Pointer<float> weights,
             int64_t device, uint64_t stream);
// Both in one launch: what is learnt of a minibatch, then the next one.
int64_t update_and_draw(Pointer<const DeviceTable> table, Pointer<const int64_t> indices,
                        Pointer<const float> observed, Pointer<const float> weights,
                        Pointer<const float> score, int64_t n, Pointer<const float> mean_grad,
                        int64_t num_classes, Pointer<int64_t> next_indices,
                        Pointer<float> next_weights, int64_t device, uint64_t stream);

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
