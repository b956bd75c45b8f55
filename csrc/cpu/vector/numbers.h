// Rows of any dtype as rows of the accumulator's, sums over a row, exp and tanh: plain loops that compilers turn into
// vector code. Internal linkage, because each instruction set has its own copy.
#pragma once

#include "../../scalar.h"
#include "../rows.h"

namespace fastllm::FASTLLM_ISA {
namespace {

template <class T, class A>
void widen_as(const void* from, A* __restrict to, int64_t n) {
  const T* __restrict x = static_cast<const T*>(from);
  for (int64_t c = 0; c < n; ++c) to[c] = static_cast<A>(widen(x[c]));
}

// to = from, n elements of `dtype`.
template <class A>
void widen_row(int dtype, const void* from, A* to, int64_t n) {
  switch (dtype) {
    case kF64: return widen_as<double>(from, to, n);
    case kBF16: return widen_as<BF16>(from, to, n);
    case kF16: return widen_as<F16>(from, to, n);
    default: return widen_as<float>(from, to, n);
  }
}

template <class T, class A>
void narrow_as(const A* __restrict from, void* to, int64_t n) {
  T* __restrict y = static_cast<T*>(to);
  for (int64_t c = 0; c < n; ++c) narrow(static_cast<Acc<T>>(from[c]), y[c]);
}

// The reverse, rounded to nearest even.
template <class A>
void narrow_row(int dtype, const A* from, void* to, int64_t n) {
  switch (dtype) {
    case kF64: return narrow_as<double>(from, to, n);
    case kBF16: return narrow_as<BF16>(from, to, n);
    case kF16: return narrow_as<F16>(from, to, n);
    default: return narrow_as<float>(from, to, n);
  }
}

// Partial sums side by side: enough to keep vector units busy, and each so short that rounding errors stay small.
constexpr int64_t kLanes = 64;

// Elements of one row do not depend on each other, whatever the compiler can prove.
#if defined(__clang__)
#define FASTLLM_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define FASTLLM_INDEPENDENT _Pragma("GCC ivdep")
#else
#define FASTLLM_INDEPENDENT
#endif

// The sum over c < n of term(c), which may also write its element.
template <class A, class Term>
A sum_over(int64_t n, const Term& term) {
  A lanes[kLanes];
  for (int64_t l = 0; l < kLanes; ++l) lanes[l] = A(0);
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes) {
    FASTLLM_INDEPENDENT
    for (int64_t l = 0; l < kLanes; ++l) lanes[l] += term(c + l);
  }
  for (int64_t l = 0; c + l < n; ++l) lanes[l] += term(c + l);
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  return lanes[0];
}

// The largest of a row; NaNs are passed over, and of no elements it is -inf.
template <class A>
A largest(const A* __restrict x, int64_t n) {
  A lanes[kLanes];
  for (int64_t l = 0; l < kLanes; ++l) lanes[l] = -static_cast<A>(__builtin_inff());
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes)
    for (int64_t l = 0; l < kLanes; ++l) lanes[l] = x[c + l] > lanes[l] ? x[c + l] : lanes[l];
  for (int64_t l = 0; c + l < n; ++l) lanes[l] = x[c + l] > lanes[l] ? x[c + l] : lanes[l];
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t l = 0; l < half; ++l) lanes[l] = lanes[l + half] > lanes[l] ? lanes[l + half] : lanes[l];
  return lanes[0];
}

// e^x of numbers of type V, one or a vector, for x <= 88 and NaN: 2^n times a polynomial in what is left of x,
// |r| <= ln(2) / 2, as in Cephes' expf (Moshier). Relative error below 2e-7; 0 below -87, where it would be subnormal.
// multiply_add(a, b, c) is a * b + c, rounded once or twice. U: as many unsigned integers.
template <class V, class U, class MultiplyAdd>
inline V exp_by(const V& x, const MultiplyAdd& multiply_add) {
  const auto all = [](float c) { return V{} + c; };
  const V shifted = multiply_add(x, all(1.44269504f), all(12582912.0f));  // 1.5 * 2^23: an integer in the low bits
  const V n = shifted - 12582912.0f;
  V r = multiply_add(n, all(-0.693359375f), x);
  r = multiply_add(n, all(2.12194440e-4f), r);
  V p = all(1.9875691500e-4f);
  p = multiply_add(p, r, all(1.3981999507e-3f));
  p = multiply_add(p, r, all(8.3334519073e-3f));
  p = multiply_add(p, r, all(4.1665795894e-2f));
  p = multiply_add(p, r, all(1.6666665459e-1f));
  p = multiply_add(p, r, all(5.0000001201e-1f));
  const V y = multiply_add(p, r * r, r) + 1.0f;
  U bits;
  __builtin_memcpy(&bits, &shifted, sizeof bits);
  bits = (bits - 0x4B400000u + 127u) << 23;
  V power;
  __builtin_memcpy(&power, &bits, sizeof power);
  return x < -87.0f ? V{} : y * power;
}

// exp_by with products and sums rounded apart: the same bits on every instruction set.
template <class V, class U>
inline V exp_to_88(const V& x) {
  return exp_by<V, U>(x, [](const V& a, const V& b, const V& c) { return a * b + c; });
}

inline float exp_(float x) { return exp_to_88<float, uint32_t>(x > 88.0f ? 88.0f : x); }
inline double exp_(double x) { return __builtin_exp(x); }

// Cephes' tanhf: an odd polynomial below 0.625, where 1 - 2 / (e^2x + 1) would cancel.
inline float tanh_(float x) {
  const float u = x < 0.0f ? -x : x;
  const float s = u * u;
  float p = -5.70498872745e-3f;
  p = p * s + 2.06390887954e-2f;
  p = p * s - 5.37397155531e-2f;
  p = p * s + 1.33314422036e-1f;
  p = p * s - 3.33332819422e-1f;
  const float near = p * s * u + u;
  const float far = 1.0f - 2.0f / (exp_(2.0f * u) + 1.0f);
  const float y = u < 0.625f ? near : far;
  // NaN takes the far branch and stays NaN.
  return x < 0.0f ? -y : y;
}
inline double tanh_(double x) { return __builtin_tanh(x); }

inline float log_(float x) { return static_cast<float>(__builtin_log(static_cast<double>(x))); }
inline double log_(double x) { return __builtin_log(x); }

// log x by Cephes' logf, for loops that the compiler turns into vector code: log_'s double is faster for one number.
// Relative error below 2e-7. -inf of 0, NaN below it.
inline float log_of(float x) {
  const bool small = x < 1.17549435e-38f;
  const float scaled = small ? x * 33554432.0f : x;  // 2^25: subnormal numbers become normal
  const uint32_t bits = as_bits(scaled);
  const float half = as_float((bits & 0x007FFFFFu) | 0x3F000000u);  // in [0.5, 1)
  const bool low = half < 0.707106781f;
  const float e =
      static_cast<float>(static_cast<int32_t>(bits >> 23) - 126) - (small ? 25.0f : 0.0f) - (low ? 1.0f : 0.0f);
  const float m = low ? half + half - 1.0f : half - 1.0f;
  const float z = m * m;
  float p = 7.0376836292e-2f;
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  const float y = m + (p * m * z + e * -2.12194440e-4f - 0.5f * z) + e * 0.693359375f;
  const float infinity = __builtin_inff();
  const float found = x == infinity ? infinity : y;
  return x > 0.0f ? found : x == 0.0f ? -infinity : __builtin_nanf("");
}
inline double log_of(double x) { return __builtin_log(x); }

}  // namespace
}  // namespace fastllm::FASTLLM_ISA
