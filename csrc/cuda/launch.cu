#include "cuda/launch.h"

#include <atomic>

#ifndef LSC_EMULATION
#include <dlfcn.h>
#endif

namespace lsc {
namespace cuda {

namespace {
std::atomic<int64_t> launched{0};
}

int64_t launches() { return launched; }
void count_launch() { ++launched; }

#ifdef LSC_EMULATION

namespace {
int emulated_multiprocessors = 4;
}

int multiprocessors(const Tensor&) { return emulated_multiprocessors; }

extern "C" __attribute__((visibility("default"))) void lsc_emulation_set_multiprocessors(int count) { emulated_multiprocessors = count; }
extern "C" __attribute__((visibility("default"))) int64_t lsc_emulation_launches() { return launches(); }

#else

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("lsc_kernels, CUDA ") + what + ": " + cudaGetErrorString(status));
  }
}

cudaStream_t current_stream(const Tensor& on) {
  using CurrentStream = AOTITorchError (*)(int32_t, void**);
  static const auto function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<CurrentStream>(library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr);
  }();
  if (!function) throw std::runtime_error("this torch has no CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(function(on.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

int multiprocessors(const Tensor& on) {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];
  const int device = on.get_device_index();
  int count = device < kDevices ? known[device].load(std::memory_order_relaxed) : 0;
  if (count == 0) {
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "device attribute");
    if (device < kDevices) known[device] = count;
  }
  return count;
}

#endif

}  // namespace cuda
}  // namespace lsc
