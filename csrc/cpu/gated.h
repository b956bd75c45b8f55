// act(gate) * up of a run of elements, forward and backward, built once per vector instruction set.
#pragma once

#include <cstdint>

namespace fastllm {

enum Activation : int { kSilu, kGelu, kGeluTanh, kActivations };

// y = act(gate) * up; y is of the dtype that gate and up share, else float32, and so is dy.
struct GatedRun {
  const void* gate;
  const void* up;
  void* y;
  int64_t n;
  int gate_dtype, up_dtype;
};

// dgate = dy * up * act'(gate), as gate; dup = dy * act(gate), as up. Null for what is not wanted.
struct GatedGradRun {
  const void* dy;
  const void* gate;
  const void* up;
  void* dgate;
  void* dup;
  int64_t n;
  int gate_dtype, up_dtype;
};

// Computed in float32, for any dtype but float64.
struct GatedKernels {
  void (*gated_run[kActivations])(const GatedRun&);
  void (*gated_grad_run[kActivations])(const GatedGradRun&);
};

const GatedKernels& gated_kernels();

}  // namespace fastllm
