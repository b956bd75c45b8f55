// Dropout of a row in float32, vector by vector: the bits of order.h's apply_dropout.
#pragma once

#include "../../order.h"
#include "tiles.h"

namespace fastllm::FASTLLM_ISA {
namespace {

#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
typedef uint64_t Products __attribute__((vector_size(4 * kVector)));

// The products with `factor` of x's even elements.
inline Products even_products(Unsigned x, uint32_t factor) {
#if defined(__AVX512F__)
  return reinterpret_cast<Products>(_mm512_mul_epu32(reinterpret_cast<__m512i>(x), _mm512_set1_epi64(factor)));
#else
  return reinterpret_cast<Products>(_mm256_mul_epu32(reinterpret_cast<__m256i>(x), _mm256_set1_epi64x(factor)));
#endif
}

struct HighLow {
  Unsigned high, low;
};

inline HighLow products(Unsigned x, uint32_t factor) {
  const Products even = even_products(x, factor);
  const Products odd = even_products(reinterpret_cast<Unsigned>(reinterpret_cast<Products>(x) >> 32), factor);
  return {reinterpret_cast<Unsigned>((even >> 32) | (odd & 0xFFFFFFFF00000000u)),
          reinterpret_cast<Unsigned>((even & 0xFFFFFFFFu) | (odd << 32))};
}

#if defined(__clang__)
#define FASTLLM_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define FASTLLM_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Integers{__VA_ARGS__})
#endif

// a0 b0 a1 b1 ... of the lower and of the upper halves.
#if defined(__AVX512F__)
inline Vector lower(Vector a, Vector b) {
  return FASTLLM_SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
inline Vector upper(Vector a, Vector b) {
  return FASTLLM_SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
#else
inline Vector lower(Vector a, Vector b) { return FASTLLM_SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11); }
inline Vector upper(Vector a, Vector b) { return FASTLLM_SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15); }
#endif

// Elements of whole groups of 4 * kVector; how many those are is returned.
inline int64_t drop_vectors(const float* from, float* to, int64_t n, const Dropout& dropout, uint64_t row,
                            int64_t element) {
  Unsigned lanes;
  for (int l = 0; l < kVector; ++l) lanes[l] = static_cast<uint32_t>(l);
  const Unsigned low = Unsigned{} + static_cast<uint32_t>(row), high = Unsigned{} + static_cast<uint32_t>(row >> 32);
  const uint32_t threshold = dropout_threshold(dropout);
  const Integers ones = Integers{} - 1;
  const Vector factor = all(static_cast<float>(dropout_factor(dropout)));
  int64_t i = 0;
  for (; i + 4 * kVector <= n; i += 4 * kVector) {
    Unsigned words[4] = {lanes + static_cast<uint32_t>((element + i) / 4), low, high, Unsigned{}};
    uint32_t k0 = static_cast<uint32_t>(dropout.key), k1 = static_cast<uint32_t>(dropout.key >> 32);
    for (int round = 0; round < 10; ++round) {
      const HighLow p0 = products(words[0], 0xD2511F53u), p1 = products(words[2], 0xCD9E8D57u);
      words[0] = p1.high ^ words[1] ^ k0;
      words[2] = p0.high ^ words[3] ^ k1;
      words[1] = p1.low;
      words[3] = p0.low;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    Vector kept[4];
    for (int w = 0; w < 4; ++w) kept[w] = reinterpret_cast<Vector>((words[w] >= threshold) & ones);
    const Vector even[2] = {lower(kept[0], kept[2]), upper(kept[0], kept[2])};
    const Vector odd[2] = {lower(kept[1], kept[3]), upper(kept[1], kept[3])};
    const Vector in_order[4] = {lower(even[0], odd[0]), upper(even[0], odd[0]),
                                lower(even[1], odd[1]), upper(even[1], odd[1])};
    for (int part = 0; part < 4; ++part) {
      const Vector x = load(from + i + part * kVector) * factor;
      const Integers bits = reinterpret_cast<Integers>(x) & reinterpret_cast<Integers>(in_order[part]);
      store(to + i + part * kVector, reinterpret_cast<Vector>(bits));
    }
  }
  return i;
}
#else
inline int64_t drop_vectors(const float*, float*, int64_t, const Dropout&, uint64_t, int64_t) { return 0; }
#endif

// to[i] = from[i] times the factor where element `element + i` of `row` is kept, else 0; `element` is a multiple of 4.
// `to` may be `from`.
template <class A>
inline void drop(const A* from, A* to, int64_t n, const Dropout& dropout, uint64_t row, int64_t element) {
  int64_t done = 0;
  if constexpr (sizeof(A) == sizeof(float))
    if (dropout.p < 1.0) done = drop_vectors(from, to, n, dropout, row, element);
  if (to != from)
    for (int64_t i = done; i < n; ++i) to[i] = from[i];
  apply_dropout(to + done, n - done, dropout, row, element + done);
}

}  // namespace
}  // namespace fastllm::FASTLLM_ISA
