// Vectors of 8 floats, and what is loaded as such from any dtype. Internal linkage, because each instruction set has its
// own copy.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__F16C__) || defined(__FMA__)
#include <immintrin.h>
#endif

#include "../../scalar.h"

#if defined(__GNUC__) && !defined(__clang__)
// How a vector is passed without AVX: nothing here is called from elsewhere.
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

namespace fastllm::FASTLLM_ISA {
namespace {

typedef float Vector __attribute__((vector_size(32)));
typedef uint32_t Bits __attribute__((vector_size(32)));
typedef uint16_t Halves __attribute__((vector_size(16)));
constexpr int64_t kVector = 8;

template <class V>
inline V read(const void* at) {
  V found;
  memcpy(&found, at, sizeof found);
  return found;
}

inline Vector load(const float* at) { return read<Vector>(at); }
inline Vector load(const BF16* at) {
  return reinterpret_cast<Vector>(__builtin_convertvector(read<Halves>(at), Bits) << 16);
}
#if defined(__F16C__)
inline Vector load(const F16* at) { return reinterpret_cast<Vector>(_mm256_cvtph_ps(read<__m128i>(at))); }
#else
// scalar.h's widen() of 8 numbers.
inline Vector load(const F16* at) {
  const Bits bits = __builtin_convertvector(read<Halves>(at), Bits), rest = (bits & 0x7FFFu) << 13;
  const Bits moved = reinterpret_cast<Bits>(reinterpret_cast<Vector>(rest) * as_float(0x77800000u));  // 2^112
  const Bits special = rest | 0x7F800000u;
  const Bits magnitude = rest >= 0x0F800000u ? special : moved;
  return reinterpret_cast<Vector>((bits & 0x8000u) << 16 | magnitude);
}
#endif

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
