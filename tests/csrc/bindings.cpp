// The tests' extension: what fastis._C does not show. Built by tests/native.py.
#include "emulate_categorical.h"
#include "emulate_scale.h"
#include "emulate_table.h"
#include "fastcall.h"
#include "inverse_cdf.h"

void fastis::out_of_memory() { throw std::bad_alloc(); }
void fastis::all_are_excluded(int64_t) { throw std::domain_error("all samples are excluded"); }

#define FASTIS_EMULATED(name) FASTIS_DEFINE(m, #name, &fastis::emulated::name)

PYBIND11_MODULE(native, m) {
  FASTIS_EMULATED(update)
  FASTIS_EMULATED(draw)
  FASTIS_EMULATED(clear)
  FASTIS_EMULATED(rescale)
  FASTIS_EMULATED(update_and_draw)
  FASTIS_EMULATED(reduce)
  FASTIS_EMULATED(prefix_sums)
  FASTIS_EMULATED(integer_weights)
  FASTIS_EMULATED(categorical_draw)
  FASTIS_EMULATED(alias_build)
  FASTIS_EMULATED(alias_draw)
  FASTIS_EMULATED(alias_inverse_cdf)
  FASTIS_EMULATED(random_below)
  FASTIS_EMULATED(share)
  FASTIS_EMULATED(blocks_for)
  FASTIS_EMULATED(scale_grad)
  FASTIS_DEFINE(m, "inverse_cdf", &fastis::inverse_cdf)
}
