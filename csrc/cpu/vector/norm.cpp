// Built once per instruction set, like rows.cpp.
#include "../norm.h"

#include "numbers.h"

namespace fastllm::FASTLLM_ISA {
namespace {

double inverse_root(double x) { return 1.0 / __builtin_sqrt(x); }

template <class A>
void norm_of_row(const NormOptions& o, NormRow& row, void* scratch) {
  const int64_t n = o.columns;
  A* __restrict h = static_cast<A*>(scratch);
  A* __restrict y = h + n;
  const A* __restrict weight = static_cast<const A*>(o.weight);
  const A* __restrict bias = static_cast<const A*>(o.bias);
  widen_row(o.x_dtype, row.x, h, n);
  if (row.residual != nullptr) {
    if (row.seed != nullptr) apply_dropout(h, n, o.dropout_p, *row.seed, row.element);
    widen_row(o.h_dtype, row.residual, y, n);
    for (int64_t c = 0; c < n; ++c) y[c] += h[c];
    narrow_row(o.h_dtype, y, row.h, n);
    widen_row(o.h_dtype, row.h, h, n);  // what is normed is h as rounded
  }
  A mean = A(0);
  if (o.center) {
    // Twice: the first sum's rounding error grows with the mean, and beside a small spread it would be all of h - mean.
    mean = sum_over<A>(n, [=](int64_t c) { return h[c]; }) / static_cast<A>(n);
    mean += sum_over<A>(n, [=](int64_t c) { return h[c] - mean; }) / static_cast<A>(n);
  }
  const A square = o.center ? sum_over<A>(n, [=](int64_t c) { return (h[c] -= mean) * h[c]; })
                            : sum_over<A>(n, [=](int64_t c) { return h[c] * h[c]; });
  const A rstd = static_cast<A>(inverse_root(static_cast<double>(square) / static_cast<double>(n) + o.eps));
  if (weight != nullptr && bias != nullptr)
    for (int64_t c = 0; c < n; ++c) y[c] = h[c] * rstd * weight[c] + bias[c];
  else if (weight != nullptr)
    for (int64_t c = 0; c < n; ++c) y[c] = h[c] * rstd * weight[c];
  else if (bias != nullptr)
    for (int64_t c = 0; c < n; ++c) y[c] = h[c] * rstd + bias[c];
  else
    for (int64_t c = 0; c < n; ++c) y[c] = h[c] * rstd;
  narrow_row(o.x_dtype, y, row.y, n);
  row.mean = mean;
  row.rstd = rstd;
}

// dx = rstd (g - mean(g) - x^ mean(g x^)), g = dy weight, x^ = (x - mean) rstd; without the middle term for RMS norm.
template <class A>
void norm_grad_of_row(const NormOptions& o, const NormGradRow& row, void* scratch) {
  const int64_t n = o.columns;
  A* __restrict x = static_cast<A*>(scratch);
  A* __restrict g = x + n;
  A* __restrict t = g + n;
  const A* __restrict weight = static_cast<const A*>(o.weight);
  const A mean = static_cast<A>(row.mean), rstd = static_cast<A>(row.rstd);
  widen_row(o.h_dtype, row.normed, x, n);
  for (int64_t c = 0; c < n; ++c) x[c] = (x[c] - mean) * rstd;
  widen_row(o.x_dtype, row.dy, g, n);
  if (row.dweight != nullptr) {
    A* __restrict dweight = static_cast<A*>(row.dweight);
    for (int64_t c = 0; c < n; ++c) dweight[c] += g[c] * x[c];
  }
  if (row.dbias != nullptr) {
    A* __restrict dbias = static_cast<A*>(row.dbias);
    for (int64_t c = 0; c < n; ++c) dbias[c] += g[c];
  }
  if (row.dinput == nullptr && row.dresidual == nullptr) return;
  if (weight != nullptr)
    for (int64_t c = 0; c < n; ++c) g[c] *= weight[c];
  const A along = sum_over<A>(n, [=](int64_t c) { return g[c] * x[c]; }) / static_cast<A>(n);
  const A level = o.center ? sum_over<A>(n, [=](int64_t c) { return g[c]; }) / static_cast<A>(n) : A(0);
  for (int64_t c = 0; c < n; ++c) g[c] = (g[c] - level - x[c] * along) * rstd;
  if (row.dh != nullptr) {
    widen_row(o.h_dtype, row.dh, t, n);
    for (int64_t c = 0; c < n; ++c) g[c] += t[c];
  }
  if (row.dresidual != nullptr) narrow_row(o.h_dtype, g, row.dresidual, n);
  if (row.dinput != nullptr) {
    if (row.seed != nullptr) apply_dropout(g, n, o.dropout_p, *row.seed, row.element);
    narrow_row(o.x_dtype, g, row.dinput, n);
  }
}

}  // namespace

extern const NormKernels norm_kernels;
const NormKernels norm_kernels = {{norm_of_row<float>, norm_of_row<double>},
                                  {norm_grad_of_row<float>, norm_grad_of_row<double>}};

}  // namespace fastllm::FASTLLM_ISA
