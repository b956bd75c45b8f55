// The divergence of two rows of logits and its gradients, built once per vector instruction set.
#pragma once

#include <cstdint>

namespace fastllm {

enum Direction : int { kForward, kReverse, kJensenShannon, kDirections };

// What all rows share. A cap of 0 is none.
struct DivergenceOptions {
  int64_t classes;
  int64_t kept;  // probabilities in a teacher's row, 0 where it has logits
  int direction;
  double beta, temperature, cap, teacher_cap;
  int x_dtype, teacher_dtype, dx_dtype, dteacher_dtype;
};

// One row. Null for what is not there; a gradient may be written over its logits.
struct DivergenceRow {
  const void* x;
  const void* teacher;     // logits, or the probabilities of the classes `indices`
  const int64_t* indices;  // in [0, classes)
  void* dx;
  void* dteacher;
  double factor;  // the derivative by the row's value
  double value;   // the result
};

// `scratch` holds 5 * classes + kept of the accumulator's dtype.
using DivergenceOfRow = void (*)(const DivergenceOptions&, DivergenceRow&, void* scratch);

struct DivergenceKernels {
  DivergenceOfRow divergence_of_row[2];  // accumulating in float32, float64
};

const DivergenceKernels& divergence_kernels();

}  // namespace fastllm
