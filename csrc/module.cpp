// The Python module `lsc_kernels._C`: what was built and what runs. The ops themselves are registered
// with torch by the static initialisers of cpu/<op>.cpp, when this library is loaded.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

#include <torch/headeronly/version.h>

#include "cpu/isa.h"

namespace py = pybind11;

#define LSC_TEXT_(x) #x
#define LSC_TEXT(x) LSC_TEXT_(x)

#ifdef LSC_HAVE_CUDA
namespace lsc {
namespace cuda {
int64_t launches();
}
}  // namespace lsc
#endif

namespace {

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');) parts.push_back(part);
  return parts;
}

std::vector<std::string> names(const std::vector<lsc::Isa>& isas) {
  std::vector<std::string> names;
  for (lsc::Isa each : isas) names.emplace_back(lsc::isa_name(each));
  return names;
}

py::dict build_info() {
  constexpr unsigned long long target = TORCH_TARGET_VERSION;
  py::dict info;
  info["version"] = LSC_VERSION;
  info["compiler"] = LSC_COMPILER;
  info["cxx_flags"] = LSC_CXX_FLAGS;
  info["isas"] = names(lsc::built_isas());
  info["cuda_compiler"] = LSC_CUDA_COMPILER;
  info["torch_headers"] = TORCH_VERSION;
  info["torch_minimum"] = std::to_string(target >> 56) + "." + std::to_string((target >> 48) & 0xff);
  info["pybind11"] =
      LSC_TEXT(PYBIND11_VERSION_MAJOR) "." LSC_TEXT(PYBIND11_VERSION_MINOR) "." LSC_TEXT(PYBIND11_VERSION_PATCH);
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native kernels of lsc_kernels.";
  module.def("isa", [] { return lsc::isa_name(lsc::isa()); }, "The instruction set the CPU kernels use.");
  module.def("isas", [] { return names(lsc::supported_isas()); },
             "The instruction sets built into this binary that run here, slowest first.");
  module.def("set_isa", [](const std::string& name) { lsc::set_isa(name); }, py::arg("name"),
             "Use another instruction set from now on: 'auto' or one of isas().");
  module.def("cuda_architectures", [] { return split(LSC_CUDA_ARCHITECTURES); },
             "The CUDA architectures built into this binary, the one it has PTX of (compute_...) last.");
  module.def("cuda_skipped", [] { return std::string(LSC_CUDA_SKIPPED); },
             "Why this binary has no CUDA kernels; empty when it has.");
#ifdef LSC_HAVE_CUDA
  module.def("cuda_launches", &lsc::cuda::launches, "CUDA kernels launched by this process so far.");
#else
  module.def("cuda_launches", [] { return int64_t(0); }, "CUDA kernels launched by this process so far.");
#endif
  module.def("build_info", &build_info, "Compiler, flags and torch version this binary was built with.");
}
