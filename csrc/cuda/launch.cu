#include "cuda/launch.h"

#include <atomic>
#include <vector>

#ifndef LSC_EMULATION
#include <dlfcn.h>

#include <map>
#include <mutex>
#include <utility>
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

unsigned* stream_counters(const Tensor&, int64_t count) {
  static std::vector<unsigned> counters;
  if (int64_t(counters.size()) < count) counters.resize(size_t(count));
  return counters.data();
}

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

namespace {

struct Counters {
  unsigned* data = nullptr;
  int64_t count = 0;
};

// Not torch's memory: a pool that is in use (a graph's, or one that is emptied while a model sleeps) would have it.
unsigned* new_counters(int64_t count, cudaStream_t stream) {
  // allocating touches no stream, and so no capture that another thread has under way
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  check(cudaThreadExchangeStreamCaptureMode(&mode), "capture mode");
  void* data = nullptr;
  const cudaError_t status = cudaMalloc(&data, size_t(count) * sizeof(unsigned));
  check(cudaThreadExchangeStreamCaptureMode(&mode), "capture mode");
  check(status, "allocation");
  check(cudaMemsetAsync(data, 0, size_t(count) * sizeof(unsigned), stream), "memset");
  return static_cast<unsigned*>(data);
}

}  // namespace

unsigned* stream_counters(const Tensor& on, int64_t count) {
  static std::mutex mutex;
  // by device and stream; never destroyed, as the CUDA runtime may be gone by then
  static auto& known = *new std::map<std::pair<int, unsigned long long>, Counters>;
  const int device = on.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(on);
  unsigned long long id = 0;  // a handle may come again for another stream, this does not
  check(cudaStreamGetId(stream, &id), "stream");
  const std::lock_guard<std::mutex> lock(mutex);
  Counters& own = known[{device, id}];
  // what is too small stays, as kernels under way may count there
  if (own.count < count) own = {new_counters(count, stream), count};
  return own.data;
}

#endif

}  // namespace cuda
}  // namespace lsc
