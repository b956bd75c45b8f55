// Built once per instruction set, like rows.cpp.
#include "../norm.h"

#include "dropout.h"
#include "passes.h"

namespace fastllm::FASTLLM_ISA {
namespace {

double inverse_root(double x) { return 1.0 / __builtin_sqrt(x); }

// The number of a row in the whole batch.
inline uint64_t of_batch(const NormOptions& o, int64_t row) {
  return o.dropout->first_row + static_cast<uint64_t>(row);
}

// Calls with(x, h), numbers of o's two dtypes, where they are one dtype or h's is float32; says whether they are.
template <class With>
inline bool of_pair(const NormOptions& o, const With& with) {
  if (o.h_dtype == kF32) {
    if (o.x_dtype == kF32) return with(0.0f, 0.0f), true;
    if (o.x_dtype == kBF16) return with(BF16{}, 0.0f), true;
    if (o.x_dtype == kF16) return with(F16{}, 0.0f), true;
  }
  if (o.h_dtype == kBF16 && o.x_dtype == kBF16) return with(BF16{}, BF16{}), true;
  if (o.h_dtype == kF16 && o.x_dtype == kF16) return with(F16{}, F16{}), true;
  return false;
}

// The statistics of the row `from` and what it becomes. `sum` is of its elements, or without a mean of their squares;
// kept(c, some, x) sees each vector of `from` in the last pass, and next(c) every place in a pass that reads no memory.
template <class X, class From, class Next, class Kept>
inline void finish_row(const NormOptions& o, NormRow& row, const From* from, float sum, const Next& next,
                       const Kept& kept) {
  const int64_t n = o.columns;
  const float* weight = static_cast<const float*>(o.weight);
  const float* bias = static_cast<const float*>(o.bias);
  X* y = static_cast<X*>(row.y);
  const bool past = o.past_caches && streams(y);
  const float count = static_cast<float>(n);
  float mean = 0.0f, square = sum;
  if (o.center) {
    const float near = sum / count;
    // The first sum's rounding error grows with the mean, and beside a small spread it would be all of x - mean: the
    // sum of x - near corrects it. The squares beside `near` serve where they are those beside the mean but for a small
    // part.
    float sums[2];
    sums_over<2>(n, sums, [=](int64_t c, int64_t some) {
      next(c);
      if (!past) __builtin_prefetch(y + c, 1);
      const Vector d = keep_some(load_some(from + c, some) - near, some);
      return Terms<2>{{d, d * d}};
    });
    mean = near + sums[0] / count;
    const float part = sums[0] * (sums[0] / count);
    square = sums[1] - part;
    if (!(part < sums[1] * 0.015625f))
      sums_over<1>(n, &square, [=](int64_t c, int64_t some) {
        const Vector d = keep_some(load_some(from + c, some) - mean, some);
        return Terms<1>{{d * d}};
      });
  }
  const float rstd = static_cast<float>(inverse_root(static_cast<double>(square) / static_cast<double>(n) + o.eps));
  each_vector(n, [=](int64_t c, int64_t some) {
    const Vector x = load_some(from + c, some);
    kept(c, some, x);
    Vector v = (x - mean) * rstd;
    if (weight != nullptr) v *= load_some(weight + c, some);
    if (bias != nullptr) v += load_some(bias + c, some);
    store_some(y + c, v, some, past);
  });
  row.mean = mean;
  row.rstd = rstd;
}

// norm_of_row of 32 or 16 bits, vector by vector. What is normed is h as it was rounded.
template <class X, class H>
void norm_of_vectors(const NormOptions& o, NormRow& row, void* scratch) {
  const int64_t n = o.columns;
  const X* x = static_cast<const X*>(row.x);
  const bool center = o.center;
  // Rows mostly lie one after another, and the next one is on its way while this one is computed.
  const auto next = [=](int64_t c) { __builtin_prefetch(x + n + c); };
  float sum;
  if (row.residual == nullptr) {
    sums_over<1>(n, &sum, [=](int64_t c, int64_t some) {
      const Vector v = load_some(x + c, some);
      return Terms<1>{{center ? v : v * v}};
    });
    return finish_row<X>(o, row, x, sum, next, [](int64_t, int64_t, Vector) {});
  }
  const H* residual = static_cast<const H*>(row.residual);
  H* h = static_cast<H*>(row.h);
  float* wide = static_cast<float*>(scratch);
  const bool past = o.past_caches && streams(h);
  const auto add = [&](const auto* branch) {
    sums_over<1>(n, &sum, [=](int64_t c, int64_t some) {
      const Vector v = rounded(load_some(residual + c, some) + load_some(branch + c, some), h);
      store_some(wide + c, v, some);
      if (!past) __builtin_prefetch(h + c, 1);
      return Terms<1>{{center ? v : v * v}};
    });
  };
  if (o.dropout == nullptr) {
    add(x);
  } else {
    each_vector(n, [=](int64_t c, int64_t some) { store_some(wide + c, load_some(x + c, some), some); });
    drop(wide, wide, n, *o.dropout, of_batch(o, row.row), 0);
    add(static_cast<const float*>(wide));
  }
  finish_row<X>(o, row, static_cast<const float*>(wide), sum, next, [=](int64_t c, int64_t some, Vector v) {
    __builtin_prefetch(residual + n + c);
    store_some(h + c, v, some, past);
  });
}

template <class A>
void norm_of_row(const NormOptions& o, NormRow& row, void* scratch) {
  if constexpr (sizeof(A) == sizeof(float))
    if (of_pair(o, [&](auto x, auto h) { norm_of_vectors<decltype(x), decltype(h)>(o, row, scratch); })) return;
  const int64_t n = o.columns;
  A* __restrict h = static_cast<A*>(scratch);
  A* __restrict y = h + n;
  const A* __restrict weight = static_cast<const A*>(o.weight);
  const A* __restrict bias = static_cast<const A*>(o.bias);
  widen_row(o.x_dtype, row.x, h, n);
  if (row.residual != nullptr) {
    if (o.dropout != nullptr) drop(h, h, n, *o.dropout, of_batch(o, row.row), 0);
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

// norm_grad_of_row of 32 or 16 bits, vector by vector: the sums over a row and then its gradient.
template <class X, class H>
void norm_grad_of_vectors(const NormOptions& o, const NormGradRow& row, void* scratch) {
  const int64_t n = o.columns;
  const H* x = static_cast<const H*>(row.normed);
  const X* dy = static_cast<const X*>(row.dy);
  const H* dh = static_cast<const H*>(row.dh);
  const float* weight = static_cast<const float*>(o.weight);
  float* dweight = static_cast<float*>(row.dweight);
  float* dbias = static_cast<float*>(row.dbias);
  const float mean = static_cast<float>(row.mean), rstd = static_cast<float>(row.rstd);
  X* dinput = static_cast<X*>(row.dinput);
  H* dresidual = static_cast<H*>(row.dresidual);
  const bool input_past = o.past_caches && streams(dinput), residual_past = o.past_caches && streams(dresidual);
  float sums[2];
  sums_over<2>(n, sums, [=](int64_t c, int64_t some) {
    // Beside the last elements there is 0, and (0 - mean) * rstd may be infinite.
    const Vector scaled = keep_some((load_some(x + c, some) - mean) * rstd, some);
    if (dinput != nullptr && !input_past) __builtin_prefetch(dinput + c, 1);
    if (dresidual != nullptr && !residual_past) __builtin_prefetch(dresidual + c, 1);
    Vector g = load_some(dy + c, some);
    const Vector product = g * scaled;
    if (dweight != nullptr) store_some(dweight + c, load_some(dweight + c, some) + product, some);
    if (dbias != nullptr) store_some(dbias + c, load_some(dbias + c, some) + g, some);
    if (weight != nullptr) g *= load_some(weight + c, some);
    return Terms<2>{{g * scaled, g}};
  });
  if (dinput == nullptr && dresidual == nullptr) return;
  const float count = static_cast<float>(n), along = sums[0] / count, level = o.center ? sums[1] / count : 0.0f;
  float* dropped = o.dropout != nullptr && dinput != nullptr ? static_cast<float*>(scratch) : nullptr;
  each_vector(n, [=](int64_t c, int64_t some) {
    __builtin_prefetch(x + n + c);
    __builtin_prefetch(dy + n + c);
    if (dh != nullptr) __builtin_prefetch(dh + n + c);
    Vector g = load_some(dy + c, some);
    if (weight != nullptr) g *= load_some(weight + c, some);
    g = (g - level - (load_some(x + c, some) - mean) * rstd * along) * rstd;
    if (dh != nullptr) g += load_some(dh + c, some);
    if (dropped != nullptr) store_some(dropped + c, g, some);
    else if (dinput != nullptr) store_some(dinput + c, g, some, input_past);
    if (dresidual != nullptr) store_some(dresidual + c, g, some, residual_past);
  });
  if (dropped == nullptr) return;
  drop(dropped, dropped, n, *o.dropout, of_batch(o, row.row), 0);
  each_vector(n, [=](int64_t c, int64_t some) {
    store_some(dinput + c, load_some(dropped + c, some), some, input_past);
  });
}

// dx = rstd (g - mean(g) - x^ mean(g x^)), g = dy weight, x^ = (x - mean) rstd; without the middle term for RMS norm.
template <class A>
void norm_grad_of_row(const NormOptions& o, const NormGradRow& row, void* scratch) {
  if constexpr (sizeof(A) == sizeof(float))
    if (of_pair(o, [&](auto x, auto h) { norm_grad_of_vectors<decltype(x), decltype(h)>(o, row, scratch); })) return;
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
    if (o.dropout != nullptr) drop(g, g, n, *o.dropout, of_batch(o, row.row), 0);
    narrow_row(o.x_dtype, g, row.dinput, n);
  }
}

template <class A>
void widened(int dtype, const void* from, void* to, int64_t n) {
  widen_row(dtype, from, static_cast<A*>(to), n);
}
template <class A>
void narrowed(int dtype, const void* from, void* to, int64_t n) {
  narrow_row(dtype, static_cast<const A*>(from), to, n);
}

}  // namespace

extern const NormKernels norm_kernels;
const NormKernels norm_kernels = {{norm_of_row<float>, norm_of_row<double>},
                                  {norm_grad_of_row<float>, norm_grad_of_row<double>},
                                  {widened<float>, widened<double>},
                                  {narrowed<float>, narrowed<double>}};

}  // namespace fastllm::FASTLLM_ISA
