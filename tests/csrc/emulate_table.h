// csrc/cuda/table.cu on the host, in an order of threads that `stride` permutes.
#pragma once

#include "device/table_draw.h"
#include "fastis.h"

namespace fastis::emulated {

inline void update(Pointer<const DeviceTable> table, Pointer<const int64_t> indices,
                   Pointer<const float> observed, Pointer<const float> weights,
                   Pointer<const float> score, int64_t n, Pointer<const float> mean_grad,
                   int64_t num_classes, uint64_t stride) {
  device::HostGrid grid(stride);
  device::update(grid, *table.address,
                 {indices, observed, weights, score, n, mean_grad, num_classes});
}

inline void draw(Pointer<const DeviceTable> table, Pointer<int64_t> indices, Pointer<float> weights,
                 uint64_t stride) {
  device::HostGrid grid(stride);
  device::draw(grid, *table.address, indices.address, weights.address);
}

inline void rescale(Pointer<const DeviceTable> table, uint64_t stride) {
  device::HostGrid grid(stride);
  device::rescale(grid, *table.address);
}

inline void update_and_draw(Pointer<const DeviceTable> table, Pointer<const int64_t> indices,
                            Pointer<const float> observed, Pointer<const float> weights,
                            Pointer<const float> score, int64_t n, Pointer<const float> mean_grad,
                            int64_t num_classes, Pointer<int64_t> next_indices,
                            Pointer<float> next_weights, uint64_t stride) {
  device::HostGrid grid(stride);
  device::update_and_draw(grid, *table.address,
                          {indices, observed, weights, score, n, mean_grad, num_classes},
                          next_indices.address, next_weights.address);
}

}  // namespace fastis::emulated
