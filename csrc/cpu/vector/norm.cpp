// Built once per instruction set, like rows.cpp.
#include "../norm.h"

#include "dropout.h"
#include "tiles.h"

namespace fastllm::FASTLLM_ISA {
namespace {

double inverse_root(double x) { return 1.0 / __builtin_sqrt(x); }

// sum_over's partial sums in registers, for `kSums` sums over one pass of a row. `vectors(c, v)` takes kVector elements
// from c on and gives kSums terms of each; `one(c)` takes one element. In the same order, so the same bits, at every width.
template <int kSums>
struct Terms {
  Vector of[kSums];
};

template <int kSums, class Vectors>
void sums_over(int64_t n, float* sums, const Vectors& vectors) {
  constexpr int kParts = kLanes / kVector;
  Vector lanes[kSums][kParts] = {};
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes)
    for (int part = 0; part < kParts; ++part) {
      const Terms<kSums> terms = vectors(c + part * kVector, kVector);
      for (int s = 0; s < kSums; ++s) lanes[s][part] += terms.of[s];
    }
  for (int part = 0; c < n; ++part, c += kVector) {
    const Terms<kSums> terms = vectors(c, n - c < kVector ? n - c : kVector);
    for (int s = 0; s < kSums; ++s) lanes[s][part] += terms.of[s];
  }
  for (int s = 0; s < kSums; ++s) {
    for (int half = kParts / 2; half > 0; half /= 2)
      for (int part = 0; part < half; ++part) lanes[s][part] += lanes[s][part + half];
    sums[s] = sum_of(lanes[s][0]);
  }
}

// norm_of_row where all is float32 and nothing is dropped: without copies.
void norm_of_floats(const NormOptions& o, NormRow& row) {
  const int64_t n = o.columns;
  const float* x = static_cast<const float*>(row.x);
  const float* residual = static_cast<const float*>(row.residual);
  const float* weight = static_cast<const float*>(o.weight);
  const float* bias = static_cast<const float*>(o.bias);
  float* h = static_cast<float*>(row.h);
  const auto first = [&](bool squared) {
    float sum;
    if (residual != nullptr)
      sums_over<1>(n, &sum, [=](int64_t c, int64_t some) {
        const Vector v = load_some(residual + c, some) + load_some(x + c, some);
        store_some(h + c, v, some);
        return Terms<1>{{squared ? v * v : v}};
      });
    else
      sums_over<1>(n, &sum, [=](int64_t c, int64_t some) {
        const Vector v = load_some(x + c, some);
        return Terms<1>{{squared ? v * v : v}};
      });
    return sum;
  };
  const float count = static_cast<float>(n);
  float mean = 0.0f, square;
  if (o.center) {
    mean = first(false) / count;
    const float* __restrict from = residual != nullptr ? h : x;
    const auto beside_mean = [&](bool squared) {
      float sum;
      const float m = mean;
      sums_over<1>(n, &sum, [=](int64_t c, int64_t some) {
        const Vector v = keep_some(load_some(from + c, some) - m, some);
        return Terms<1>{{squared ? v * v : v}};
      });
      return sum;
    };
    // The first sum's rounding error grows with the mean, and beside a small spread it would be all of h - mean.
    mean += beside_mean(false) / count;
    square = beside_mean(true);
  } else {
    square = first(true);
  }
  const float rstd = static_cast<float>(inverse_root(static_cast<double>(square) / static_cast<double>(n) + o.eps));
  const float* __restrict from = residual != nullptr ? h : x;
  float* __restrict y = static_cast<float*>(row.y);
  if (weight != nullptr && bias != nullptr)
    for (int64_t c = 0; c < n; ++c) y[c] = (from[c] - mean) * rstd * weight[c] + bias[c];
  else if (weight != nullptr)
    for (int64_t c = 0; c < n; ++c) y[c] = (from[c] - mean) * rstd * weight[c];
  else if (bias != nullptr)
    for (int64_t c = 0; c < n; ++c) y[c] = (from[c] - mean) * rstd + bias[c];
  else
    for (int64_t c = 0; c < n; ++c) y[c] = (from[c] - mean) * rstd;
  row.mean = mean;
  row.rstd = rstd;
}

template <class A>
void norm_of_row(const NormOptions& o, NormRow& row, void* scratch) {
  if (o.x_dtype == kF32 && o.h_dtype == kF32 && o.dropout == nullptr && sizeof(A) == sizeof(float))
    return norm_of_floats(o, row);
  const int64_t n = o.columns;
  A* __restrict h = static_cast<A*>(scratch);
  A* __restrict y = h + n;
  const A* __restrict weight = static_cast<const A*>(o.weight);
  const A* __restrict bias = static_cast<const A*>(o.bias);
  widen_row(o.x_dtype, row.x, h, n);
  if (row.residual != nullptr) {
    if (o.dropout != nullptr) drop(h, h, n, *o.dropout, o.dropout->first_row + static_cast<uint64_t>(row.row), 0);
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
  const A square = o.center ? sum_over<A>(n, [=](int64_t c) {
          h[c] -= mean;
          return h[c] * h[c];
        })
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

// norm_grad_of_row where all is float32 and nothing is dropped: without copies. The sums over a row and then its gradient.
void norm_grad_of_floats(const NormOptions& o, const NormGradRow& row) {
  const int64_t n = o.columns;
  const float* __restrict x = static_cast<const float*>(row.normed);
  const float* __restrict dy = static_cast<const float*>(row.dy);
  const float* __restrict dh = static_cast<const float*>(row.dh);
  const float* __restrict weight = static_cast<const float*>(o.weight);
  float* __restrict dweight = static_cast<float*>(row.dweight);
  float* __restrict dbias = static_cast<float*>(row.dbias);
  const float mean = static_cast<float>(row.mean), rstd = static_cast<float>(row.rstd);
  float sums[2];
  sums_over<2>(n, sums, [=](int64_t c, int64_t some) {
    const Vector scaled = (load_some(x + c, some) - mean) * rstd;
    Vector g = load_some(dy + c, some);
    const Vector product = g * scaled;
    if (dweight != nullptr) store_some(dweight + c, load_some(dweight + c, some) + product, some);
    if (dbias != nullptr) store_some(dbias + c, load_some(dbias + c, some) + g, some);
    if (weight != nullptr) g *= load_some(weight + c, some);
    return Terms<2>{{g * scaled, g}};
  });
  if (row.dinput == nullptr && row.dresidual == nullptr) return;
  const float count = static_cast<float>(n), along = sums[0] / count, level = o.center ? sums[1] / count : 0.0f;
  float* __restrict out = static_cast<float*>(row.dinput != nullptr ? row.dinput : row.dresidual);
  const auto gradient = [=](int64_t c, float g) { return (g - level - (x[c] - mean) * rstd * along) * rstd; };
  if (weight != nullptr && dh != nullptr)
    for (int64_t c = 0; c < n; ++c) out[c] = gradient(c, dy[c] * weight[c]) + dh[c];
  else if (weight != nullptr)
    for (int64_t c = 0; c < n; ++c) out[c] = gradient(c, dy[c] * weight[c]);
  else
    for (int64_t c = 0; c < n; ++c) out[c] = gradient(c, dy[c]) + (dh != nullptr ? dh[c] : 0.0f);
  if (row.dinput != nullptr && row.dresidual != nullptr) __builtin_memcpy(row.dresidual, out, static_cast<size_t>(n) * sizeof(float));
}

// dx = rstd (g - mean(g) - x^ mean(g x^)), g = dy weight, x^ = (x - mean) rstd; without the middle term for RMS norm.
template <class A>
void norm_grad_of_row(const NormOptions& o, const NormGradRow& row, void* scratch) {
  if (o.x_dtype == kF32 && o.h_dtype == kF32 && o.dropout == nullptr && sizeof(A) == sizeof(float))
    return norm_grad_of_floats(o, row);
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
    if (o.dropout != nullptr) drop(g, g, n, *o.dropout, o.dropout->first_row + static_cast<uint64_t>(row.row), 0);
    narrow_row(o.x_dtype, g, row.dinput, n);
  }
}

}  // namespace

extern const NormKernels norm_kernels;
const NormKernels norm_kernels = {{norm_of_row<float>, norm_of_row<double>},
                                  {norm_grad_of_row<float>, norm_grad_of_row<double>}};

}  // namespace fastllm::FASTLLM_ISA
