// Vectors of 8 floats, and what is loaded as such from any dtype. Internal linkage, because each instruction set has
// its own copy.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__F16C__) || defined(__FMA__)
#include <immintrin.h>
#endif

#if defined(__GNUC__) && !defined(__clang__)
// How a vector is passed without AVX: nothing here is called from elsewhere.
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

namespace fastllm::FASTLLM_ISA {
namespace {

typedef float Vector __attribute__((vector_size(32)));
typedef uint32_t Unsigned __attribute__((vector_size(32)));
#define FASTLLM_LANES 8
constexpr int64_t kVector = FASTLLM_LANES;

}  // namespace
}  // namespace fastllm::FASTLLM_ISA

#include "halves.h"

namespace fastllm::FASTLLM_ISA {
namespace {

// a * b + c, rounded once where there is an instruction for it.
inline Vector multiply_add(const Vector& a, const Vector& b, const Vector& c) {
#if defined(__FMA__)
  return reinterpret_cast<Vector>(
      _mm256_fmadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(c)));
#else
  return a * b + c;
#endif
}

inline float sum_of(const Vector& all) {
  return ((all[0] + all[4]) + (all[2] + all[6])) + ((all[1] + all[5]) + (all[3] + all[7]));
}

}  // namespace
}  // namespace fastllm::FASTLLM_ISA
