// A few rows times a matrix in float32, built once per vector instruction set.
#pragma once

#include <cstdint>

namespace fastllm {

// y[r][n] = sum over k of x[r][k] * weight[n][k], + bias[n]. x and y are contiguous, (rows, depth) and (rows, outputs);
// weight has `stride` elements from one row to the next; bias may be null.
struct LinearRows {
  const float* x;
  const float* weight;
  const float* bias;
  float* y;
  int64_t rows, depth, outputs, stride;
};

struct LinearKernels {
  void (*linear_rows)(const LinearRows&, int64_t begin, int64_t end);  // the outputs from begin to end, of every row
};

const LinearKernels& linear_kernels();

}  // namespace fastllm
