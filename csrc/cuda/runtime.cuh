// What the launchers share: the stream, the device, errors, launch shapes.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "../tensors.h"

// Weak: the extension also loads beside a torch without CUDA, which does not have it.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace fastllm {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("fastllm: ") + what + ": " + cudaGetErrorString(error));
}

// Makes a tensor's device current while it lives, and knows torch's stream there.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor) {
    const int32_t device = tensor.get_device_index();
    if (&aoti_torch_get_current_cuda_stream == nullptr) throw std::runtime_error("fastllm: this torch has no CUDA");
    check_cuda(cudaGetDevice(&before_), "cudaGetDevice");
    void* stream = nullptr;
    if (aoti_torch_get_current_cuda_stream(device, &stream) != 0)
      throw std::runtime_error("fastllm: torch did not tell its CUDA stream");
    stream_ = static_cast<cudaStream_t>(stream);
    check_cuda(cudaSetDevice(device), "cudaSetDevice");
  }
  ~OnDevice() { (void)cudaSetDevice(before_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  cudaStream_t stream() const { return stream_; }

 private:
  int before_ = 0;
  cudaStream_t stream_ = nullptr;
};

// A grid over lines x columns, `width` columns a thread: whole warps along a line, about 256 threads a block.
struct Shape {
  dim3 grid, block;

  Shape(int64_t lines, int64_t columns, int64_t width) {
    constexpr int64_t kThreads = 256;
    const int64_t vectors = (columns + width - 1) / width;
    const int64_t x = std::min(kThreads, (vectors + 31) / 32 * 32), y = kThreads / x;
    const int64_t down = (lines + y - 1) / y, across = (vectors + x - 1) / x;
    if (down > 2147483647 || across > 65535) refuse("fastllm: too many rows or columns for one launch");
    block = dim3(static_cast<unsigned>(x), static_cast<unsigned>(y));
    grid = dim3(static_cast<unsigned>(down), static_cast<unsigned>(across));
  }
};

inline bool divides(const void* pointer, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

}  // namespace fastllm
