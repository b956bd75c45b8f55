// What the losses of rows share: cross_entropy.cpp has them of logits, linear_loss.cpp of a linear layer.
#pragma once

#include <cmath>
#include <cstdint>
#include <optional>
#include <tuple>

#include "tensor.h"

namespace fastllm {

inline const double* doubles(const std::optional<Tensor>& t) {
  return t.has_value() ? static_cast<const double*>(t->const_data_ptr()) : nullptr;
}

inline const float* floats(const std::optional<Tensor>& t) {
  return t.has_value() ? static_cast<const float*>(t->const_data_ptr()) : nullptr;
}

// A vector of the accumulator's dtype, one element a row, or one number for all rows.
struct Column {
  const float* narrow;
  const double* wide;
  double all = 0.0;
  double operator[](int64_t i) const { return wide ? wide[i] : narrow ? static_cast<double>(narrow[i]) : all; }
};

// t as such a vector, checked; zeros where there is none.
Column column(const char* op, const std::optional<Tensor>& t, int64_t rows, ScalarType dtype);

// The numbers of ops/cross_entropy/loss.py's Loss. softcap 0: none.
struct LossNumbers {
  double smoothing, softcap, scale, z_loss;
};

// Which rows count: `ignored` targets do not, and nothing at all comes of them if `skip`. And whether hits and
// entropies are asked for.
struct Counting {
  int64_t ignored;
  bool skip, accuracy, entropy;
};

// factor, dlse and dentropy (rows,), in the accumulator's dtype, are what loss, lse and entropy count in the gradients:
// of x for dx, which may be x, and of the probabilities for dtarget.
struct LossGradients {
  const std::optional<Tensor>&factor, &dlse, &dentropy, &dx, &dtarget;
};

// x (rows, classes); target (rows,) int64, or probabilities of x's shape; weight (classes,) in the accumulator's dtype.
// (loss, logsumexp, hits, entropy) of each row, without elements what was not asked for.
std::tuple<Tensor, Tensor, Tensor, Tensor> counted_rows(const Tensor& x, const Tensor& target,
                                                        const std::optional<Tensor>& weight,
                                                        const LossGradients& gradients, const LossNumbers& numbers,
                                                        Counting counting);

// The sum of n numbers over `total`, in double with what each sum loses carried on (Neumaier 1974).
template <class A>
double mean_of(const A* values, int64_t n, double total) {
  double sum = 0.0, lost = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    const double value = static_cast<double>(values[i]), next = sum + value;
    lost += std::abs(sum) >= std::abs(value) ? (sum - next) + value : (value - next) + sum;
    sum = next;
  }
  // Infinite sums lose NaN.
  return (std::isfinite(sum) ? sum + lost : sum) / total;
}

// to[i] = value, rounded to the accumulator's dtype and then to `dtype`.
void round_into(void* to, ScalarType dtype, int64_t i, double value);

}  // namespace fastllm
