// Attention of one query to all keys, as a decoder's step needs it, built once per vector instruction set.
#pragma once

#include <cstdint>

namespace fastllm {

// The `group` query heads that read one head of keys. Of one dtype: float32, bfloat16 or float16. Strides in elements;
// the columns of all are side by side. `out` is written as `q` is read.
struct AttentionStep {
  const void* q;     // group x dim
  const void* k;     // keys x dim
  const void* v;     // keys x dim_v
  void* out;         // group x dim_v
  const void* mask;  // null, or group x keys: boolean (true takes part), or float32 added to the scores
  int64_t q_stride, k_stride, v_stride, out_stride, mask_stride, mask_step;
  int64_t group, keys, dim, dim_v;
  float scale;
  int dtype;
  bool boolean;
};

struct AttentionStepKernels {
  // `scratch` holds step_scratch() floats. A query that sees nothing gives 0.
  void (*attention_step)(const AttentionStep&, float* scratch);
};

// Keys that are widened and multiplied at once: of 128 columns 32 KB in float32.
constexpr int64_t kStepKeys = 64;

inline int64_t step_scratch(int64_t group, int64_t keys, int64_t dim, int64_t dim_v) {
  return group * (keys + dim + 2 * dim_v) + kStepKeys * (dim > dim_v ? dim : dim_v);
}

const AttentionStepKernels& attention_step_kernels();

}  // namespace fastllm
