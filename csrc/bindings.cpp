// One m.def per entry point of fastis.h, and the choice of the instruction set.
#include <pybind11/pybind11.h>

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "fast_call.h"
#include "fastis.h"

namespace py = pybind11;

namespace pybind11::detail {

// tensor.data_ptr() in, typed address out.
template <class T>
struct type_caster<fastis::Pointer<T>> {
  PYBIND11_TYPE_CASTER(fastis::Pointer<T>, const_name("int"));
  bool load(handle source, bool) {
    const unsigned long long address = PyLong_AsUnsignedLongLong(source.ptr());
    if (PyErr_Occurred()) {
      PyErr_Clear();
      return false;
    }
    value.address = reinterpret_cast<T*>(address);
    return true;
  }
};

}  // namespace pybind11::detail

namespace {

enum class Isa { baseline, avx2, avx512 };

const char* name(Isa isa) {
  return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "baseline";
}

Isa best_isa() {
#ifdef FASTIS_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  return avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::baseline;
#else
  return Isa::baseline;
#endif
}

// FASTIS_CPU_ISA lowers the instruction set (for tests and for hunting a difference).
Isa chosen_isa() {
  const Isa best = best_isa();
  const char* wanted = std::getenv("FASTIS_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return best;
  for (const Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512}) {
    if (std::string(wanted) != name(isa)) continue;
    if (isa > best) {
      throw std::runtime_error(std::string("FASTIS_CPU_ISA=") + wanted +
                               ", but the best this machine has is " + name(best));
    }
    return isa;
  }
  throw std::runtime_error(std::string("FASTIS_CPU_ISA must be baseline, avx2 or avx512, got ") +
                           wanted);
}

bool is_one(fastis::Pointer<const float> x) { return *x == 1.0f; }

std::string build_info() {
  std::string info = std::string("C++ by ") + __VERSION__;
#ifdef FASTIS_CUDA
  info += ", with CUDA";
#else
  info += ", without CUDA (no nvcc at build time, or FASTIS_CUDA=0)";
#endif
  return info;
}

}  // namespace

#ifdef FASTIS_X86
#define FASTIS_CPU(function)                      \
  (isa == Isa::avx512 ? &fastis::avx512::function \
   : isa == Isa::avx2 ? &fastis::avx2::function   \
                      : &fastis::baseline::function)
#else
#define FASTIS_CPU(function) (&fastis::baseline::function)
#endif

PYBIND11_MODULE(_C, m) {
  const Isa isa = chosen_isa();
  m.doc() =
      "Compiled kernels of fastis: raw pointers and sizes, no checks. Use the fastis package.";
  m.def("isa", [isa] { return name(isa); });
  m.def("build_info", &build_info);
  m.def("lanes", FASTIS_CPU(lanes));
  fastis::define_fast<struct CrossEntropy>(m, "cross_entropy", FASTIS_CPU(cross_entropy));
  fastis::define_fast<struct LabelLoss>(m, "label_loss", FASTIS_CPU(label_loss));
  fastis::define_fast<struct IsOne>(m, "is_one", &is_one);
}
