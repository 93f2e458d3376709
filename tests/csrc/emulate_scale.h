// csrc/cuda/scale.cu on the host: the same packs, in an order that `stride` permutes.
#pragma once

#include "device/grid.h"
#include "device/scale.h"
#include "fastis.h"

namespace fastis::emulated {

inline int64_t scale_grad(int64_t from, int64_t to, Pointer<const void> grad, Pointer<void> out,
                          Pointer<const void> scale, int64_t rows, int64_t columns,
                          int64_t scale_stride, uint64_t stride) {
  const device::GradScaling all{static_cast<device::Floating>(from),
                                static_cast<device::Floating>(to),
                                grad,
                                out,
                                scale,
                                rows,
                                columns,
                                scale_stride};
  return all.with_formats([&](const auto& scaling) -> int64_t {
    if (!scaling.nothing_to_do()) device::HostBlock(stride).each(scaling.packs(), scaling);
    return 0;
  });
}

}  // namespace fastis::emulated
