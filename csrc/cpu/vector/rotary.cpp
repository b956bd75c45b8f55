// Built once per instruction set, like rows.cpp.
#include "../rotary.h"

#include "numbers.h"

namespace fastllm::FASTLLM_ISA {
namespace {

template <class T, bool kInterleaved>
void turn_run(const RotaryRun& run) {
  const int64_t half = run.half;
  const int64_t second = kInterleaved ? 1 : half, step = kInterleaved ? 2 : 1;  // of a pair; from pair to pair
  for (int64_t i = 0; i < run.count; ++i) {
    const T* __restrict x = static_cast<const T*>(run.x) + i * run.x_stride;
    T* __restrict y = static_cast<T*>(run.y) + i * run.y_stride;
    const float* __restrict cos = run.cos + i * run.angle_stride;
    const float* __restrict sin = run.sin + i * run.angle_stride;
    FASTLLM_INDEPENDENT
    for (int64_t c = 0; c < half; ++c) {
      const float a = widen(x[step * c]), b = widen(x[step * c + second]);
      narrow(a * cos[c] - b * sin[c], y[step * c]);
      narrow(b * cos[c] + a * sin[c], y[step * c + second]);
    }
    for (int64_t c = 2 * half; c < 2 * half + run.rest; ++c) y[c] = x[c];
  }
}

template <class T>
void read_angles(const void* from, int64_t stride, float sign, float* __restrict to, int64_t n) {
  const T* __restrict x = static_cast<const T*>(from);
  for (int64_t c = 0; c < n; ++c) to[c] = sign * widen(x[c * stride]);
}

}  // namespace

extern const RotaryKernels rotary_kernels;
const RotaryKernels rotary_kernels = {
    {{turn_run<float, false>, turn_run<float, true>},
     {nullptr, nullptr},
     {turn_run<BF16, false>, turn_run<BF16, true>},
     {turn_run<F16, false>, turn_run<F16, true>}},
    {read_angles<float>, nullptr, read_angles<BF16>, read_angles<F16>},
};

}  // namespace fastllm::FASTLLM_ISA
