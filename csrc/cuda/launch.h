// Host: from tensors to a kernel's launch, on the tensors' device and its current stream.
//
// Nothing here waits for the device, and all of it can be captured in a graph. The CUDA runtime is linked statically and
// asks for the driver at the first launch, so the library loads where there is none. torch's current stream comes from a
// function that only a CUDA build of torch has; it is looked up when first needed.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>

#ifndef LSC_EMULATION
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#endif

#include "cuda/device.h"

// Registers the ops of a file for CUDA tensors; emulated, for CPU tensors in a library of their own.
#ifdef LSC_EMULATION
#define LSC_CUDA_OPS(m) STABLE_TORCH_LIBRARY_IMPL(lsc_kernels_emulated, CPU, m)
#else
#define LSC_CUDA_OPS(m) STABLE_TORCH_LIBRARY_IMPL(lsc_kernels, CUDA, m)
#endif

namespace lsc {
namespace cuda {

using torch::stable::Tensor;

// Kernels launched by this process so far.
int64_t launches();

// The multiprocessors of a tensor's device.
int multiprocessors(const Tensor& on);

// At least `count` counters of the current stream of a tensor's device, 0 whenever none of its kernels runs: a kernel that
// counts leaves them at 0, and kernels of one stream follow one another. There for good; a kernel that is aborted takes the
// whole context with it, so no counter outlives it. Not for a stream that is being captured.
unsigned* stream_counters(const Tensor& on, int64_t count);

#ifdef LSC_EMULATION

void count_launch();

template <typename Arguments>
void launch(void (*kernel)(Arguments), int64_t blocks, unsigned threads, const Tensor&, const Arguments& arguments) {
  if (blocks == 0) return;
  count_launch();
  emulation::run(blocks, threads, [&] { kernel(arguments); });
}

inline bool is_captured(const Tensor&) { return false; }
inline void clear(const Tensor&, void* memory, size_t bytes) { std::memset(memory, 0, bytes); }

#else

void count_launch();
cudaStream_t current_stream(const Tensor& on);
void check(cudaError_t status, const char* what);

template <typename Arguments>
void launch(void (*kernel)(Arguments), int64_t blocks, unsigned threads, const Tensor& on, const Arguments& arguments) {
  if (blocks == 0) return;
  if (blocks > 0x7fffffff) throw std::invalid_argument("too many rows for one launch: " + std::to_string(blocks) + " blocks");
  const torch::stable::accelerator::DeviceGuard guard(on.get_device_index());
  kernel<<<unsigned(blocks), threads, 0, current_stream(on)>>>(arguments);
  check(cudaGetLastError(), "launch");
  count_launch();
}

// Whether what is launched becomes a part of a graph.
inline bool is_captured(const Tensor& on) {
  const torch::stable::accelerator::DeviceGuard guard(on.get_device_index());
  cudaStreamCaptureStatus status;
  check(cudaStreamIsCapturing(current_stream(on), &status), "capture status");
  return status != cudaStreamCaptureStatusNone;
}

inline void clear(const Tensor& on, void* memory, size_t bytes) {
  const torch::stable::accelerator::DeviceGuard guard(on.get_device_index());
  check(cudaMemsetAsync(memory, 0, bytes, current_stream(on)), "memset");
}

#endif

}  // namespace cuda
}  // namespace lsc
