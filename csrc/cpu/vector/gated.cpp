// Built once per instruction set, like rows.cpp.
#include "../gated.h"

#include "tiles.h"

namespace fastllm::FASTLLM_ISA {
namespace {

// Infinite from 88.4 on. With multiply_add, products and sums take two thirds of their time apart at AVX2: AVX2 and
// AVX-512 give the same bits, and the baseline others.
inline Vector exp_of(Vector x) { return exp_to_89(x > 89.0f ? all(89.0f) : x); }

struct Act {
  Vector value, slope;
};

// sigmoid(x) and sigmoid(-x), neither as 1 less the other, which would cancel.
struct Sigmoids {
  Vector of, of_minus;
};

inline Vector sigmoid(Vector e) { return 1.0f / (1.0f + e); }

inline Sigmoids sigmoids(Vector x) {
  const Vector e = exp_of(-x), of = sigmoid(e), of_minus = e * of;
  return {of, of_minus < 1.0f ? of_minus : all(1.0f)};  // infinite e: NaN, for 1
}

// The normal distribution's density and integral. The integral's tail is the density times a polynomial in
// t = 1 / (1 + 0.34 |x|), the form of Abramowitz and Stegun 26.2.17, here with a relative error below 3e-8 up to
// |x| = 13.3 (a minimax fit); from 13.2 on the density is 0.
struct Normal {
  Vector density, integral;
};

inline Normal normal(Vector x) {
  const Vector e = exp_of(-0.5f * x * x);
  const Vector t = 1.0f / multiply_add(all(0.34f), x < 0.0f ? -x : x, all(1.0f));
  Vector p = multiply_add(all(-2.647194266e-2f), t, all(1.411503546e-1f));
  p = multiply_add(p, t, all(-2.764146553e-1f));
  p = multiply_add(p, t, all(2.057782100e-1f));
  p = multiply_add(p, t, all(-4.708505880e-2f));
  p = multiply_add(p, t, all(1.163143607e-1f));
  p = multiply_add(p, t, all(1.149675011e-1f));
  p = multiply_add(p, t, all(1.361423869e-1f));
  p = multiply_add(p, t, all(1.356188559e-1f));
  const Vector tail = p * t * e;
  return {0.3989422804f * e, x < 0.0f ? tail : 1.0f - tail};
}

// gelu_tanh is g sigmoid(2 v): 0.5 (1 + tanh(v)) = sigmoid(2 v), which does not cancel below 0;
// v = sqrt(2 / pi) (g + 0.044715 g^3).
inline Vector twice_v(Vector g, Vector square) { return 1.5957691216f * multiply_add(0.044715f * square, g, g); }

template <int kActivation>
inline Vector value_of(Vector g) {
  if constexpr (kActivation == kGelu) return g * normal(g).integral;
  if constexpr (kActivation == kGeluTanh) return g * sigmoid(exp_of(-twice_v(g, g * g)));
  return g * sigmoid(exp_of(-g));
}

template <int kActivation>
inline Act act(Vector g) {
  if constexpr (kActivation == kGelu) {
    const Normal n = normal(g);
    return {g * n.integral, multiply_add(g, n.density, n.integral)};
  } else if constexpr (kActivation == kGeluTanh) {
    const Vector square = g * g;
    const Sigmoids s = sigmoids(twice_v(g, square));
    const Vector inner = 1.5957691216f * multiply_add(all(0.134145f), square, all(1.0f));
    return {g * s.of, multiply_add(g * s.of * s.of_minus, inner, s.of)};
  } else {
    const Sigmoids s = sigmoids(g);
    return {g * s.of, s.of * multiply_add(g, s.of_minus, all(1.0f))};
  }
}

// Whole vectors, and the rest in one that zeros fill up: an element's bits do not depend on its place.
template <class Part>
inline void each_vector(int64_t n, const Part& part) {
  int64_t c = 0;
  for (; c + kVector <= n; c += kVector) part(c, int64_t{kVector});
  if (c < n) part(c, n - c);
}

template <int kActivation>
void multiply(const float* __restrict g, const float* __restrict u, float* __restrict y, int64_t n) {
  each_vector(n, [=](int64_t c, int64_t some) {
    store_some(y + c, value_of<kActivation>(load_some(g + c, some)) * load_some(u + c, some), some);
  });
}

template <int kActivation>
void differentiate(const float* __restrict d, const float* __restrict g, const float* __restrict u,
                   float* __restrict dg, float* __restrict du, int64_t n) {
  each_vector(n, [=](int64_t c, int64_t some) {
    const Act a = act<kActivation>(load_some(g + c, some));
    const Vector dy = load_some(d + c, some);
    store_some(dg + c, dy * load_some(u + c, some) * a.slope, some);
    store_some(du + c, dy * a.value, some);
  });
}

// Elements of other dtypes at a time: few enough that a processor loads some while it computes others.
constexpr int64_t kStep = 256;

int result_dtype(int gate, int up) { return gate == up ? gate : kF32; }
int64_t bytes_of(int dtype) { return dtype == kF32 ? 4 : 2; }
const void* past(const void* from, int dtype, int64_t c) {
  return static_cast<const char*>(from) + c * bytes_of(dtype);
}
void* past(void* from, int dtype, int64_t c) { return static_cast<char*>(from) + c * bytes_of(dtype); }

template <int kActivation>
void gated_run(const GatedRun& run) {
  const int result = result_dtype(run.gate_dtype, run.up_dtype);
  if (run.gate_dtype == kF32 && run.up_dtype == kF32)
    return multiply<kActivation>(static_cast<const float*>(run.gate), static_cast<const float*>(run.up),
                                 static_cast<float*>(run.y), run.n);
  alignas(64) float g[kStep], u[kStep], y[kStep];
  for (int64_t c = 0; c < run.n; c += kStep) {
    const int64_t n = run.n - c < kStep ? run.n - c : kStep;
    widen_row(run.gate_dtype, past(run.gate, run.gate_dtype, c), g, n);
    widen_row(run.up_dtype, past(run.up, run.up_dtype, c), u, n);
    multiply<kActivation>(g, u, y, n);
    narrow_row(result, y, past(run.y, result, c), n);
  }
}

template <int kActivation>
void gated_grad_run(const GatedGradRun& run) {
  const int result = result_dtype(run.gate_dtype, run.up_dtype);
  if (run.gate_dtype == kF32 && run.up_dtype == kF32 && run.dgate != nullptr && run.dup != nullptr)
    return differentiate<kActivation>(static_cast<const float*>(run.dy), static_cast<const float*>(run.gate),
                                      static_cast<const float*>(run.up), static_cast<float*>(run.dgate),
                                      static_cast<float*>(run.dup), run.n);
  alignas(64) float d[kStep], g[kStep], u[kStep], dg[kStep], du[kStep];
  for (int64_t c = 0; c < run.n; c += kStep) {
    const int64_t n = run.n - c < kStep ? run.n - c : kStep;
    widen_row(result, past(run.dy, result, c), d, n);
    widen_row(run.gate_dtype, past(run.gate, run.gate_dtype, c), g, n);
    widen_row(run.up_dtype, past(run.up, run.up_dtype, c), u, n);
    differentiate<kActivation>(d, g, u, dg, du, n);
    if (run.dgate != nullptr) narrow_row(run.gate_dtype, dg, past(run.dgate, run.gate_dtype, c), n);
    if (run.dup != nullptr) narrow_row(run.up_dtype, du, past(run.dup, run.up_dtype, c), n);
  }
}

}  // namespace

extern const GatedKernels gated_kernels;
const GatedKernels gated_kernels = {
    {gated_run<kSilu>, gated_run<kGelu>, gated_run<kGeluTanh>},
    {gated_grad_run<kSilu>, gated_grad_run<kGelu>, gated_grad_run<kGeluTanh>},
};

}  // namespace fastllm::FASTLLM_ISA
