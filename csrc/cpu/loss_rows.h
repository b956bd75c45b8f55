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

// Which rows count: `ignored` targets do not, and nothing at all comes of them if `skip`.
struct Counting {
  int64_t ignored;
  bool skip;
};

// x (rows, classes); target (rows,) int64, or probabilities of x's shape; weight (classes,), factor, dlse and dentropy
// (rows,) in the accumulator's dtype. The gradient for them goes to dx, which may be x, and to dtarget. softcap 0:
// none. (loss, logsumexp, hits, entropy) of each row, without elements what was not asked for.
std::tuple<Tensor, Tensor, Tensor, Tensor> counted_rows(
    const Tensor& x, const Tensor& target, const std::optional<Tensor>& weight, const std::optional<Tensor>& factor,
    const std::optional<Tensor>& dlse, const std::optional<Tensor>& dentropy, const std::optional<Tensor>& dx,
    const std::optional<Tensor>& dtarget, Counting counting, double smoothing, double softcap, double scale,
    double z_loss, bool accuracy, bool entropy);

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
