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

// Whether a row has nothing but a class, a scale of its logits, weights and a penalty.
inline bool is_plain(const LossOptions& o, bool probabilities) {
  return !probabilities && o.cap == 0.0 && o.smoothing == 0.0 && !o.entropy;
}

// Rows that are computed at once. `target` is -1 where a row does not count; `dx`, `lse` and `hit` may be null.
struct FewRows {
  static constexpr int64_t kMost = 16;  // a vector of the widest instruction set
  static constexpr int64_t kMostClasses = 128;
  int64_t count;
  const void* x[kMost];
  void* dx[kMost];
  int64_t target[kMost];
  float factor[kMost], dlse[kMost];
  float *loss, *lse, *hit;  // results, count of each
};

// The bits of loss_of_row in float32, of plain rows of at most kMostClasses: each row is in a lane of its own. All x
// are of one matrix, and all dx.
using LossesOfFew = void (*)(const LossOptions&, const FewRows&);

struct CrossEntropyKernels {
  LossOfRow loss_of_row[2];  // accumulating in float32, float64
  LossesOfFew losses_of_few;
};

const CrossEntropyKernels& cross_entropy_kernels();

}  // namespace fastllm
