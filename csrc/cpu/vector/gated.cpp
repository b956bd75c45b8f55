// Built once per instruction set, like rows.cpp.
#include "../gated.h"

#include "numbers.h"

namespace fastllm::FASTLLM_ISA {
namespace {

struct Act {
  float value, slope;
};

// sigmoid(x) and sigmoid(-x), neither by way of the other, which would cancel.
struct Sigmoids {
  float of, of_minus;
};

inline Sigmoids sigmoids(float x) {
  const float e = exp_(x < 0.0f ? x : -x);
  const float large = 1.0f / (1.0f + e), small = e * large;
  return {x < 0.0f ? small : large, x < 0.0f ? large : small};
}

// The normal distribution's density and integral. The integral's tail is the density times a polynomial in
// t = 1 / (1 + 0.34 |x|), the form of Abramowitz and Stegun 26.2.17, here with a relative error below 3e-8 up to
// |x| = 13.3 (a minimax fit); from 13.2 on the density is 0.
inline Act normal(float x) {
  const float e = exp_(-0.5f * x * x);
  const float t = 1.0f / (1.0f + 0.34f * (x < 0.0f ? -x : x));
  float p = -2.647194266e-2f;
  p = p * t + 1.411503546e-1f;
  p = p * t - 2.764146553e-1f;
  p = p * t + 2.057782100e-1f;
  p = p * t - 4.708505880e-2f;
  p = p * t + 1.163143607e-1f;
  p = p * t + 1.149675011e-1f;
  p = p * t + 1.361423869e-1f;
  p = p * t + 1.356188559e-1f;
  const float tail = p * t * e;
  return {x < 0.0f ? tail : 1.0f - tail, 0.3989422804f * e};
}

template <int kActivation>
inline Act act(float g) {
  if constexpr (kActivation == kGelu) {
    const Act cdf = normal(g);
    return {g * cdf.value, cdf.value + g * cdf.slope};
  } else if constexpr (kActivation == kGeluTanh) {
    // 0.5 (1 + tanh(v)) = sigmoid(2 v), which does not cancel below 0; v = sqrt(2 / pi) (g + 0.044715 g^3).
    const float square = g * g;
    const Sigmoids s = sigmoids(1.5957691216f * (g + 0.044715f * square * g));
    return {g * s.of, s.of + g * s.of * s.of_minus * (1.5957691216f * (1.0f + 0.134145f * square))};
  } else {
    const Sigmoids s = sigmoids(g);
    return {g * s.of, s.of * (1.0f + g * s.of_minus)};
  }
}

// One loop each, so that loads, arithmetic and stores go side by side.
template <int kActivation>
void multiply(const float* __restrict g, const float* __restrict u, float* __restrict y, int64_t n) {
  for (int64_t c = 0; c < n; ++c) y[c] = act<kActivation>(g[c]).value * u[c];
}

template <int kActivation>
void differentiate(const float* __restrict d, const float* __restrict g, const float* __restrict u,
                   float* __restrict dg, float* __restrict du, int64_t n) {
  for (int64_t c = 0; c < n; ++c) {
    const Act a = act<kActivation>(g[c]);
    dg[c] = d[c] * u[c] * a.slope;
    du[c] = d[c] * a.value;
  }
}

// Elements of other dtypes at a time: few enough that a processor loads some while it computes others.
constexpr int64_t kStep = 256;

int result_dtype(int gate, int up) { return gate == up ? gate : kF32; }
int64_t bytes_of(int dtype) { return dtype == kF32 ? 4 : 2; }
const void* past(const void* from, int dtype, int64_t c) { return static_cast<const char*>(from) + c * bytes_of(dtype); }
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
