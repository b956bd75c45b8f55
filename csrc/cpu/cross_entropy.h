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

// Rows that are computed at once, each a lane of a vector, a step of so many bytes apart. `dx`, `lse` and `hit` may be
// null. A target that is `ignored` or no class does not count.
struct FewRows {
  static constexpr int64_t kMostClasses = 128;
  int64_t count;
  const char* x;
  int64_t x_step;
  char* dx;
  int64_t dx_step;
  const int64_t* targets;
  int64_t ignored;
  const float *factors, *dlses;  // count of each, or null: then the next two are all rows'
  float factor, dlse;
  float *loss, *lse, *hit;  // results, count of each
};

// The bits of loss_of_row in float32, of plain rows of at most kMostClasses.
using LossesOfFew = void (*)(const LossOptions&, const FewRows&);

struct CrossEntropyKernels {
  LossOfRow loss_of_row[2];  // accumulating in float32, float64
  LossesOfFew losses_of_few;
};

const CrossEntropyKernels& cross_entropy_kernels();

}  // namespace fastllm
