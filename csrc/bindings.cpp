// Every entry point of fastis.h by its name in Python, and the choice of the instruction set.
#include <pybind11/pybind11.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdlib>
#include <new>
#include <stdexcept>
#include <string>

#include "fastcall.h"
#include "fastis.h"

namespace py = pybind11;

void fastis::out_of_memory() { throw std::bad_alloc(); }

void fastis::index_out_of_range(int64_t num_samples, int64_t least, int64_t most) {
  throw std::out_of_range("batch.indices must be in [0, " + std::to_string(num_samples) +
                          "), got values from " + std::to_string(least) + " to " +
                          std::to_string(most));
}

void fastis::all_are_excluded(int64_t num_samples) {
  throw std::domain_error("there must be samples to draw from, but all " +
                          std::to_string(num_samples) + " are excluded: reset() some first");
}

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

Isa isa() {
  static const Isa chosen = chosen_isa();
  return chosen;
}

// False for a tensor without memory.
bool is_one(fastis::Pointer<const float> x) { return x != nullptr && *x == 1.0f; }

std::string build_info() {
  std::string info = std::string("C++ by ") + __VERSION__;
#ifdef FASTIS_CUDA
  info += std::string(", with CUDA for ") + FASTIS_CUDA_TARGETS;
#else
  info += ", without CUDA (no nvcc at build time, or FASTIS_CUDA=0)";
#endif
  return info;
}

template <class T>
T* address(const py::dict& tensors, const char* name) {
  return reinterpret_cast<T*>(tensors[name].cast<uintptr_t>());
}

// From the tensors' addresses and the constants of fastis/kernels/constants.py, both by name.
void fill_table(fastis::Table& t, const py::dict& tensors, const py::dict& constants) {
  const auto integer = [&](const char* name) { return constants[name].cast<int64_t>(); };
  t.states = address<fastis::State>(tensors, "states");
  t.scalars = address<fastis::Scalars>(tensors, "scalars");
  t.variance = address<fastis::Variance>(tensors, "variance");
  t.num_samples = integer("num_samples");
  t.batch_size = integer("batch_size");
  t.warmup_draws = integer("warmup_draws");
  t.batches_per_epoch = integer("batches_per_epoch");
  t.seed = constants["seed"].cast<uint64_t>();
  t.cap_numerator = constants["cap_numerator"].cast<uint64_t>();
  t.cap_denominator = constants["cap_denominator"].cast<uint64_t>();
  t.total_limit = integer("total_limit");
  t.headroom = static_cast<int>(integer("headroom"));
  t.floor = constants["floor"].cast<double>();
  t.smoothing = constants["smoothing"].cast<double>();
  t.tau = constants["tau"].cast<float>();
  t.tau_scale = constants["tau_scale"].cast<float>();
  t.least_gain = constants["least_gain"].cast<double>();
  t.unbiased = constants["unbiased"].cast<bool>();
  t.shard = constants["shard"].cast<bool>();
  t.keeps_moments = constants["keeps_moments"].cast<bool>();
  t.importance = static_cast<fastis::Importance>(integer("importance"));
  t.flatten = static_cast<fastis::Flatten>(integer("flatten"));
  t.scheme = static_cast<fastis::Scheme>(integer("scheme"));
  t.derive();
}

fastis::Table make_table(const py::dict& tensors, const py::dict& constants) {
  fastis::Table t;
  fill_table(t, tensors, constants);
  t.prefix = address<uint64_t>(tensors, "prefix");
  t.unseen_prefix = address<uint32_t>(tensors, "unseen_prefix");
  t.capped_prefix = address<uint32_t>(tensors, "capped_prefix");
  t.excluded_prefix = address<uint32_t>(tensors, "excluded_prefix");
  t.near = address<int64_t>(tensors, "near");
  t.listed = address<int64_t>(tensors, "listed");
  t.flipped = address<int64_t>(tensors, "flipped");
  t.near_capacity = constants["near_capacity"].cast<int64_t>();
  t.list_capacity = constants["list_capacity"].cast<int64_t>();
  t.levels = fastis::Levels(t.num_samples);
  return t;
}

fastis::DeviceTable make_device_table(const py::dict& tensors, const py::dict& constants) {
  fastis::DeviceTable t;
  fill_table(t, tensors, constants);
  t.sums = address<uint64_t>(tensors, "sums");
  t.unseen = address<uint32_t>(tensors, "unseen");
  t.capped = address<uint32_t>(tensors, "capped");
  t.excluded = address<uint32_t>(tensors, "excluded");
  t.claims = address<uint32_t>(tensors, "claims");
  t.work = address<fastis::Work>(tensors, "work");
  t.arrivals = address<unsigned>(tensors, "arrivals");
  t.levels = fastis::Levels(t.num_samples, fastis::kDeviceTop);
  return t;
}

// Asks for 2 MiB pages, before the memory is first touched: random accesses to a large table then
// seldom miss the TLB. Best effort.
void advise_huge_pages(uintptr_t address, size_t bytes) {
#ifdef __linux__
  constexpr uintptr_t kPage = 4096;
  const uintptr_t begin = (address + kPage - 1) / kPage * kPage;
  const uintptr_t end = (address + bytes) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)address;
  (void)bytes;
#endif
}

}  // namespace

#ifdef FASTIS_X86
#define FASTIS_OF_ISA(function)                     \
  (isa() == Isa::avx512 ? &fastis::avx512::function \
   : isa() == Isa::avx2 ? &fastis::avx2::function   \
                        : &fastis::baseline::function)
#else
#define FASTIS_OF_ISA(function) (&fastis::baseline::function)
#endif

#define FASTIS_CPU(name) FASTIS_DEFINE(m, #name, FASTIS_OF_ISA(name))
#define FASTIS_DEVICE(name) FASTIS_DEFINE(m, "cuda_" #name, &fastis::cuda::name)

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "Compiled kernels of fastis: raw pointers and sizes, no checks. Use the fastis package.";
  py::class_<fastis::Table>(m, "Table")
      .def(py::init(&make_table))
      .def_readwrite("seed", &fastis::Table::seed)
      .def_readwrite("least_gain", &fastis::Table::least_gain)
      .def_property_readonly("address", [](const fastis::Table& t) { return uintptr_t(&t); });
  py::class_<fastis::DeviceTable>(m, "DeviceTable")
      .def(py::init(&make_device_table))
      .def_readwrite("seed", &fastis::DeviceTable::seed)
      .def_readwrite("least_gain", &fastis::DeviceTable::least_gain)
      .def_property_readonly("address", [](const fastis::DeviceTable& t) { return uintptr_t(&t); });
  m.attr("DEVICE_WORK") = sizeof(fastis::Work) / sizeof(int64_t);

  FASTIS_DEFINE(m, "isa", +[] { return name(isa()); })
  FASTIS_DEFINE(m, "build_info", &build_info)
  FASTIS_DEFINE(m, "advise_huge_pages", &advise_huge_pages)
  FASTIS_DEFINE(m, "tree_nodes", +[](int64_t n) { return fastis::Levels(n).total(); })
  FASTIS_DEFINE(
      m, "device_tree_nodes",
      +[](int64_t n) { return fastis::Levels(n, fastis::kDeviceTop).total(); })

  FASTIS_CPU(cross_entropy)
  FASTIS_CPU(elementwise_loss)
  FASTIS_DEFINE(m, "is_one", &is_one)
  FASTIS_CPU(batch_norm_forward)
  FASTIS_CPU(batch_norm_backward)

  FASTIS_CPU(update)
  FASTIS_CPU(fold)
  FASTIS_CPU(clear)
  FASTIS_CPU(draw)
  FASTIS_CPU(shard_total)
  FASTIS_CPU(draw_share)
  FASTIS_CPU(rescale)
  FASTIS_CPU(copy_state)
  FASTIS_CPU(check_states)

  FASTIS_CPU(quantize)
  FASTIS_CPU(integer_weights)
  FASTIS_CPU(categorical_draw)
  FASTIS_CPU(alias_build)
  FASTIS_CPU(alias_draw)
  FASTIS_CPU(alias_inverse_cdf)
  FASTIS_CPU(random_below)

#ifdef FASTIS_CUDA
  m.attr("cuda_targets") = FASTIS_CUDA_TARGETS;
  FASTIS_DEVICE(error_string)
  FASTIS_DEVICE(missing)

  FASTIS_DEVICE(scale_grad)

  FASTIS_DEVICE(update)
  FASTIS_DEVICE(draw)
  FASTIS_DEVICE(update_and_draw)
  FASTIS_DEVICE(clear)
  FASTIS_DEVICE(rescale)
  FASTIS_DEVICE(load_sampler)

  FASTIS_DEVICE(reduce)
  FASTIS_DEVICE(prefix_sums_bytes)
  FASTIS_DEVICE(prefix_sums)
  FASTIS_DEVICE(integer_weights)
  FASTIS_DEVICE(categorical_draw)
  FASTIS_DEVICE(alias_build_bytes)
  FASTIS_DEVICE(alias_build)
  FASTIS_DEVICE(alias_draw)
  FASTIS_DEVICE(alias_inverse_cdf)
  FASTIS_DEVICE(random_below)
#endif
}
