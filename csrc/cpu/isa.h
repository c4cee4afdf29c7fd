// Which instruction set the CPU kernels run on.
//
// The sources in cpu/kernels/ are compiled once per instruction set, each time with LSC_ISA set to one
// of the names below, and put everything they define inside
//
//     namespace lsc { namespace LSC_ISA { ... } }
//
// so that the builds cannot be mistaken for one another. Which of them exist in this binary is told by
// LSC_HAVE_AVX2 and LSC_HAVE_AVX512; which one runs is chosen once, when first asked for, from what the
// processor and the operating system support, or from LSC_KERNELS_CPU=auto|baseline|avx2|avx512.
#pragma once

#include <string>
#include <vector>

namespace lsc {

enum class Isa { baseline, avx2, avx512 };

// The instruction set in use. Throws std::invalid_argument when LSC_KERNELS_CPU names one that is
// unknown or cannot run here.
Isa isa();

// Uses another one from now on: a name as in LSC_KERNELS_CPU. Throws like isa(). `source` is how the
// error calls the place where the name came from.
void set_isa(const std::string& name, const std::string& source = "set_isa");
void set_isa(Isa isa);

const char* isa_name(Isa isa);

// Compiled into this binary, and runnable here.
bool machine_supports(Isa isa);

// All that are compiled into this binary, and all of those that run here; slowest first.
std::vector<Isa> built_isas();
std::vector<Isa> supported_isas();

}  // namespace lsc

#ifdef LSC_HAVE_AVX2
#define LSC_IF_AVX2(...) __VA_ARGS__
#else
#define LSC_IF_AVX2(...)
#endif
#ifdef LSC_HAVE_AVX512
#define LSC_IF_AVX512(...) __VA_ARGS__
#else
#define LSC_IF_AVX512(...)
#endif

// Declares functions of cpu/kernels/ once per instruction set; used inside namespace lsc:
//
//     LSC_DECLARE_KERNELS(void lsc_transform_rows(const float* reward, int64_t n, float* out);)
#define LSC_DECLARE_KERNELS(...)                  \
  namespace baseline { __VA_ARGS__ }              \
  LSC_IF_AVX2(namespace avx2 { __VA_ARGS__ })     \
  LSC_IF_AVX512(namespace avx512 { __VA_ARGS__ })

// The address of a kernel as built for the instruction set in use. Take it once per op call, outside the
// parallel region:
//
//     auto* rows = LSC_DISPATCH_ISA(lsc_transform_rows);
//     auto* typed = LSC_DISPATCH_ISA(token_kl_rows<float, float>);
#define LSC_DISPATCH_ISA(...)                                                                    \
  ([] {                                                                                          \
    [[maybe_unused]] const ::lsc::Isa lsc_isa_in_use = ::lsc::isa();                             \
    LSC_IF_AVX512(if (lsc_isa_in_use == ::lsc::Isa::avx512) return &::lsc::avx512::__VA_ARGS__;) \
    LSC_IF_AVX2(if (lsc_isa_in_use == ::lsc::Isa::avx2) return &::lsc::avx2::__VA_ARGS__;)       \
    return &::lsc::baseline::__VA_ARGS__;                                                        \
  }())
