// A few rows times a matrix, in float32, built once per vector instruction set.
#pragma once

#include <cstdint>

namespace fastllm {

// y[r][n] = sum over k of x[r][k] * weight[n][k], + bias[n], rounded once. All are of `dtype`: float32, bfloat16 or
// float16. x and y are contiguous, (rows, depth) and (rows, outputs); weight has `stride` elements from one row to the
// next; bias may be null.
struct LinearRows {
  const void* x;
  const void* weight;
  const void* bias;
  void* y;
  int dtype;
  int64_t rows, depth, outputs, stride;
};

struct LinearKernels {
  // The outputs from begin to end, of every row. `wide` holds rows * depth floats; it is not used where all is float32.
  void (*linear_rows)(const LinearRows&, int64_t begin, int64_t end, float* wide);
};

const LinearKernels& linear_kernels();

}  // namespace fastllm
