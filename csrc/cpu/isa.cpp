#include "cpu/isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace lsc {
namespace {

constexpr Isa kAll[] = {Isa::baseline, Isa::avx2, Isa::avx512};

#if defined(__x86_64__)
// __builtin_cpu_supports also asks the operating system whether it saves the wide registers. Not every
// compiler lets it be asked about F16C, hence cpuid, after AVX2 has vouched for the registers.
[[maybe_unused]] bool has_avx2() {
  unsigned a, b, c, d;
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __get_cpuid(1, &a, &b, &c, &d) &&
         (c & bit_F16C);
}

[[maybe_unused]] bool has_avx512() {
#if defined(LSC_AVX512_EMULATED)
  return has_avx2();
#else
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#endif
}
#endif

std::string names(const std::vector<Isa>& isas) {
  std::string text;
  for (Isa each : isas) text += std::string(text.empty() ? "" : ", ") + isa_name(each);
  return text;
}

Isa parse(const std::string& name, const std::string& source) {
  if (name.empty() || name == "auto") return supported_isas().back();
  for (Isa each : kAll) {
    if (name != isa_name(each)) continue;
    if (machine_supports(each)) return each;
    throw std::invalid_argument(source + ": '" + name + "' cannot run here (what can: " + names(supported_isas()) +
                                "); use one of those, or 'auto'");
  }
  throw std::invalid_argument(source + ": unknown instruction set '" + name + "'; use one of auto, " +
                              names({std::begin(kAll), std::end(kAll)}));
}

std::atomic<Isa>& in_use() {
  static std::atomic<Isa> chosen = [] {
    const char* wanted = std::getenv("LSC_KERNELS_CPU");
    return parse(wanted ? wanted : "", "LSC_KERNELS_CPU");
  }();
  return chosen;
}

}  // namespace

Isa isa() { return in_use().load(std::memory_order_relaxed); }

void set_isa(const std::string& name, const std::string& source) { in_use() = parse(name, source); }

void set_isa(Isa isa) { set_isa(std::string(isa_name(isa))); }

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::baseline: return "baseline";
    case Isa::avx2: return "avx2";
    case Isa::avx512: return "avx512";
  }
  return "unknown";
}

std::vector<Isa> built_isas() {
  return {Isa::baseline, LSC_IF_AVX2(Isa::avx2, ) LSC_IF_AVX512(Isa::avx512)};
}

bool machine_supports(Isa isa) {
  LSC_IF_AVX2(if (isa == Isa::avx2) return has_avx2();)
  LSC_IF_AVX512(if (isa == Isa::avx512) return has_avx512();)
  return isa == Isa::baseline;
}

std::vector<Isa> supported_isas() {
  std::vector<Isa> runnable = built_isas();
  std::erase_if(runnable, [](Isa each) { return !machine_supports(each); });
  return runnable;
}

}  // namespace lsc
