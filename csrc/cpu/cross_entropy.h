// The loss of one row of logits and its gradient, built once per vector instruction set.
#pragma once

#include <cstdint>

namespace fastllm {

// What all rows share. `weight` (classes, in the accumulator's dtype) may be null; `cap` 0 is none.
struct LossOptions {
  int64_t classes;
  const void* weight;
  double weight_sum;
  double smoothing, scale, cap, z_loss;
  bool entropy;
  int x_dtype, q_dtype;
  bool past_caches;  // dx is more than the caches hold, and not x
};

// One row. Null for what is not there; dx may be x.
struct LossRow {
  const void* x;
  const void* q;   // class probabilities, else `target`
  int64_t target;  // -1: the row does not count
  void* dx;
  void* dq;
  double factor, dlse, dentropy;  // what loss, lse and entropy count in the gradient
  double loss, lse, hit, entropy;  // results
};

// `scratch` holds 4 * classes of the accumulator's dtype.
using LossOfRow = void (*)(const LossOptions&, LossRow&, void* scratch);

struct CrossEntropyKernels {
  LossOfRow loss_of_row[2];  // accumulating in float32, float64
};

const CrossEntropyKernels& cross_entropy_kernels();

}  // namespace fastllm
