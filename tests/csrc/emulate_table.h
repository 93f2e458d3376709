// csrc/cuda/table.cu on the host, in an order of threads that `stride` permutes.
#pragma once

#include "device/table_clear.h"
#include "device/table_draw.h"
#include "fastis.h"

namespace fastis::emulated {

inline void update(Pointer<const DeviceTable> table, const Observation& observation,
                   uint64_t stride) {
  device::HostGrid grid(stride);
  device::update(grid, *table.address, observation);
}

inline void draw(Pointer<const DeviceTable> table, const Batch& batch, uint64_t stride) {
  device::HostGrid grid(stride);
  device::draw(grid, *table.address, batch);
}

inline void update_and_draw(Pointer<const DeviceTable> table, const Observation& observation,
                            const Batch& next_batch, uint64_t stride) {
  device::HostGrid grid(stride);
  device::update_and_draw(grid, *table.address, observation, next_batch);
}

inline void clear(Pointer<const DeviceTable> table, Pointer<const int64_t> indices, int64_t n,
                  int32_t last, uint64_t stride) {
  device::HostGrid grid(stride);
  device::clear(grid, *table.address, indices, n, last);
}

inline void rescale(Pointer<const DeviceTable> table, uint64_t stride) {
  device::HostGrid grid(stride);
  device::rescale(grid, *table.address);
}

}  // namespace fastis::emulated
