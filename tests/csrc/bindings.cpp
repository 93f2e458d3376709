// The tests' extension: what fastis._C does not show. Built by tests/native.py.
#include "emulate_categorical.h"
#include "emulate_scale.h"
#include "emulate_table.h"
#include "fastcall.h"
#include "inverse_cdf.h"

void fastis::out_of_memory() { throw std::bad_alloc(); }

PYBIND11_MODULE(native, m) {
  using namespace fastis;
  define_fast<struct Update>(m, "update", &emulated::update);
  define_fast<struct Draw>(m, "draw", &emulated::draw);
  define_fast<struct Rescale>(m, "rescale", &emulated::rescale);
  define_fast<struct UpdateAndDraw>(m, "update_and_draw", &emulated::update_and_draw);
  define_fast<struct Survey>(m, "survey", &emulated::survey);
  define_fast<struct RunningSums>(m, "running_sums", &emulated::running_sums);
  define_fast<struct Integers>(m, "integers", &emulated::integers);
  define_fast<struct Search>(m, "search", &emulated::search);
  define_fast<struct AliasBuild>(m, "alias_build", &emulated::alias_build);
  define_fast<struct AliasDraw>(m, "alias_draw", &emulated::alias_draw);
  define_fast<struct AliasResolve>(m, "alias_resolve", &emulated::alias_resolve);
  define_fast<struct DrawPoints>(m, "draw_points", &emulated::draw_points);
  define_fast<struct Share>(m, "share", &emulated::share);
  define_fast<struct BlocksFor>(m, "blocks_for", &emulated::blocks_for);
  define_fast<struct ScaleGrad>(m, "scale_grad", &emulated::scale_grad);
  define_fast<struct InverseCdf>(m, "inverse_cdf", &inverse_cdf);
}
