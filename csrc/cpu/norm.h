// Layer norm and RMS norm of one row, forward and backward, built once per vector instruction set.
#pragma once

#include <cstdint>

#include "../order.h"

namespace fastllm {

// What all rows share. weight (with its offset added) and bias, (columns) in the accumulator's dtype, may be null.
struct NormOptions {
  int64_t columns;
  const void* weight;
  const void* bias;
  double eps;
  const Dropout* dropout;  // null: none
  bool center;
  int x_dtype, h_dtype;
  bool past_caches;  // what is written is more than the caches hold
};

// One row. Null for what is not there. With a residual, h = residual + dropout(x) is written and normed, else x.
struct NormRow {
  const void* x;
  const void* residual;
  void* y;
  void* h;
  int64_t row;
  double mean, rstd;  // results
};

// y is of x_dtype, like dy; what was normed is of h_dtype, like dh and dresidual. dweight and dbias, in the
// accumulator's dtype, are added to; mean and rstd are the forward's.
struct NormGradRow {
  const void* dy;
  const void* dh;
  const void* normed;
  void* dinput;
  void* dresidual;
  void* dweight;
  void* dbias;
  int64_t row;
  double mean, rstd;
};

// `scratch` holds 2 * columns of the accumulator's dtype for the forward, 3 * columns for the backward.
using NormOfRow = void (*)(const NormOptions&, NormRow&, void* scratch);
using NormGradOfRow = void (*)(const NormOptions&, const NormGradRow&, void* scratch);

// n numbers of `dtype` as the accumulator's, and the reverse, rounded to nearest even.
using WidenRow = void (*)(int dtype, const void* from, void* to, int64_t n);
using NarrowRow = void (*)(int dtype, const void* from, void* to, int64_t n);

struct NormKernels {
  NormOfRow norm_of_row[2];  // accumulating in float32, float64
  NormGradOfRow norm_grad_of_row[2];
  WidenRow widen[2];
  NarrowRow narrow[2];
};

const NormKernels& norm_kernels();

}  // namespace fastllm
