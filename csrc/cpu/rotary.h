// Rotary embedding of rows of features, built once per vector instruction set.
#pragma once

#include <cstdint>

#include "rows.h"

namespace fastllm {

// `count` rows of 2 * half + rest features, strides in elements. Row i is turned by the angles whose cosines and sines
// are `half` floats from i * angle_stride on; its last `rest` features are copied.
struct RotaryRun {
  const void* x;
  void* y;
  const float* cos;
  const float* sin;
  int64_t count, x_stride, y_stride, angle_stride;
  int64_t half, rest;
};

using TurnRun = void (*)(const RotaryRun&);
// to = sign * from, n elements `stride` apart.
using ReadAngles = void (*)(const void* from, int64_t stride, float sign, float* to, int64_t n);

// By dtype; float64 has none. turn_run also by whether pairs are interleaved.
struct RotaryKernels {
  TurnRun turn_run[kDtypes][2];
  ReadAngles read_angles[kDtypes];
};

const RotaryKernels& rotary_kernels();

}  // namespace fastllm
