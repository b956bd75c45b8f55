// 16-bit floating-point numbers and their conversions, for CPU and CUDA code.
#pragma once

#include <cstdint>
#include <cstring>

#include "order.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace fastllm {
namespace {  // internal linkage, as in order.h

struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

template <class T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <class T>
using Acc = typename Accumulator<T>::type;

FASTLLM_HD float as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

FASTLLM_HD uint32_t as_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

FASTLLM_HD float widen(float x) { return x; }
FASTLLM_HD double widen(double x) { return x; }
FASTLLM_HD float widen(BF16 x) { return as_float(static_cast<uint32_t>(x.bits) << 16); }

FASTLLM_HD void narrow(float x, float& out) { out = x; }
FASTLLM_HD void narrow(double x, double& out) { out = x; }

#if defined(__CUDA_ARCH__)
FASTLLM_HD void narrow(float x, BF16& out) { out.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
FASTLLM_HD float widen(F16 x) { return __half2float(__ushort_as_half(x.bits)); }
FASTLLM_HD void narrow(float x, F16& out) { out.bits = __half_as_ushort(__float2half_rn(x)); }
#else
FASTLLM_HD void narrow(float x, BF16& out) {
  const uint32_t bits = as_bits(x);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet_nan = (bits >> 16) | 0x40u;
  out.bits = static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? quiet_nan : rounded);
}
// Plain arithmetic, which the compiler turns into vector code. The exponent is moved by a multiplication, which is
// exact and also normalises subnormal numbers.
FASTLLM_HD float widen(F16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t rest = static_cast<uint32_t>(x.bits & 0x7FFFu) << 13;
  const float moved = as_float(rest) * as_float(0x77800000u);  // 2^112
  const uint32_t special = rest | 0x7F800000u;
  return as_float(sign | ((x.bits & 0x7C00u) == 0x7C00u ? special : as_bits(moved)));
}
FASTLLM_HD void narrow(float x, F16& out) {
  const uint32_t bits = as_bits(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  // Below 2^-14 adding 0.5 rounds to the subnormal grid of 2^-24.
  const uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - 0x3F000000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  uint32_t result = magnitude < 0x38800000u ? subnormal : normal;
  result = magnitude >= 0x477FF000u ? 0x7C00u : result;  // 65520 and more round to infinity
  result = magnitude > 0x7F800000u ? 0x7E00u | ((magnitude >> 13) & 0x3FFu) : result;
  out.bits = static_cast<uint16_t>(sign | result);
}
#endif

}  // namespace
}  // namespace fastllm
