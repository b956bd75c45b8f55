// Vectors of float32 read from and written to rows of float32, bfloat16 and float16: the bits of scalar.h's widen() and
// narrow(). tiles.h and lanes.h include it after their FASTLLM_LANES, kVector, Vector and Unsigned.
#pragma once

#include "../../scalar.h"

namespace fastllm::FASTLLM_ISA {
namespace {

typedef uint16_t Halves __attribute__((vector_size(2 * kVector)));

template <class V>
inline V read(const void* from) {
  V x;
  __builtin_memcpy(&x, from, sizeof x);
  return x;
}

inline Vector load(const float* from) { return read<Vector>(from); }

inline Unsigned widened(Halves x) {
  // GCC 12 makes 4 instructions of the last.
#if FASTLLM_LANES == 16
  return reinterpret_cast<Unsigned>(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(x)));
#elif FASTLLM_LANES == 8 && defined(__AVX2__)
  return reinterpret_cast<Unsigned>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(x)));
#else
  return __builtin_convertvector(x, Unsigned);
#endif
}

inline Vector load(const BF16* from) { return reinterpret_cast<Vector>(widened(read<Halves>(from)) << 16); }

inline Vector load(const F16* from) {
#if FASTLLM_LANES == 16
  return reinterpret_cast<Vector>(_mm512_cvtph_ps(read<__m256i>(from)));
#elif FASTLLM_LANES == 8 && defined(__F16C__)
  return reinterpret_cast<Vector>(_mm256_cvtph_ps(read<__m128i>(from)));
#else
  const Unsigned bits = widened(read<Halves>(from)), rest = (bits & 0x7FFFu) << 13;
  const Unsigned moved = reinterpret_cast<Unsigned>(reinterpret_cast<Vector>(rest) * as_float(0x77800000u));  // 2^112
  const Unsigned special = rest | 0x7F800000u;
  const Unsigned magnitude = rest >= 0x0F800000u ? special : moved;
  return reinterpret_cast<Vector>((bits & 0x8000u) << 16 | magnitude);
#endif
}

// Rounded to nearest even, as 16 bits of the row's dtype; bfloat16's in the upper half of 32.
inline Unsigned rounded_bits(Vector x) {
  const Unsigned bits = reinterpret_cast<Unsigned>(x);
  return x == x ? bits + 0x7FFFu + ((bits >> 16) & 1u) : bits | 0x400000u;
}

inline Halves narrowed(Vector x, const BF16*) {
  const Unsigned found = rounded_bits(x) >> 16;
#if FASTLLM_LANES == 16
  return reinterpret_cast<Halves>(_mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(found)));
#elif FASTLLM_LANES == 8 && defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32(reinterpret_cast<__m256i>(found), reinterpret_cast<__m256i>(found));
  return reinterpret_cast<Halves>(_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
#else
  return __builtin_convertvector(found, Halves);
#endif
}

inline Halves narrowed(Vector x, const F16*) {
#if FASTLLM_LANES == 16
  return reinterpret_cast<Halves>(
      _mm512_cvtps_ph(reinterpret_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif FASTLLM_LANES == 8 && defined(__F16C__)
  return reinterpret_cast<Halves>(
      _mm256_cvtps_ph(reinterpret_cast<__m256>(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  Halves y;
  for (int64_t i = 0; i < kVector; ++i) {
    F16 one;
    narrow(x[i], one);
    y[i] = one.bits;
  }
  return y;
#endif
}

inline void store(float* to, Vector x) { __builtin_memcpy(to, &x, sizeof x); }
template <class T>
inline void store(T* to, Vector x) {
  const Halves y = narrowed(x, to);
  __builtin_memcpy(to, &y, sizeof y);
}

// x as a row of the dtype would give it back.
inline Vector rounded(Vector x, const float*) { return x; }
inline Vector rounded(Vector x, const BF16*) { return reinterpret_cast<Vector>(rounded_bits(x) & 0xFFFF0000u); }
inline Vector rounded(Vector x, const F16* dtype) {
  const Halves y = narrowed(x, dtype);
  return load(reinterpret_cast<const F16*>(&y));
}

// n elements, at most a vector; zeros after them.
template <class T>
inline Vector load_some(const T* from, int64_t n) {
  if (n == kVector) return load(from);
  T x[kVector] = {};
  __builtin_memcpy(x, from, static_cast<size_t>(n) * sizeof(T));
  return load(x);
}
template <class T>
inline void store_some(T* to, Vector x, int64_t n) {
  if (n == kVector) return store(to, x);
  T y[kVector];
  store(y, x);
  __builtin_memcpy(to, y, static_cast<size_t>(n) * sizeof(T));
}

// Whether a row that starts here can be written past the caches: its vectors do not cross cache lines.
template <class T>
inline bool streams(const T* to) {
  return reinterpret_cast<uintptr_t>(to) % 64 == 0;
}

// store_some, for `past` past the caches: the line is not read first. A fence must follow before others read it.
template <class T>
inline void store_some(T* to, Vector x, int64_t n, bool past) {
#if defined(__AVX2__) && FASTLLM_LANES >= 8
  if (past && n == kVector) {
    if constexpr (sizeof(T) == sizeof(float)) {
#if FASTLLM_LANES == 16
      return _mm512_stream_ps(to, reinterpret_cast<__m512>(x));
#else
      return _mm256_stream_ps(to, reinterpret_cast<__m256>(x));
#endif
    } else {
      const Halves y = narrowed(x, to);
#if FASTLLM_LANES == 16
      return _mm256_stream_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<__m256i>(y));
#else
      return _mm_stream_si128(reinterpret_cast<__m128i*>(to), reinterpret_cast<__m128i>(y));
#endif
    }
  }
#endif
  store_some(to, x, n);
}

}  // namespace
}  // namespace fastllm::FASTLLM_ISA
