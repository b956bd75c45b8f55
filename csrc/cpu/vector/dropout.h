// Dropout of a row in float32, vector by vector: the bits of order.h's apply_dropout.
#pragma once

#include "../../order.h"
#include "tiles.h"

namespace fastllm::FASTLLM_ISA {
namespace {

#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
// Counters, words and products, a 64-bit lane for each: what is above the 32 bits of a word is not read.
constexpr int kLanes64 = kVector / 2;
typedef uint64_t Wide64 __attribute__((vector_size(4 * kVector)));

inline Wide64 product(Wide64 x, uint32_t factor) {
#if defined(__AVX512F__)
  return reinterpret_cast<Wide64>(_mm512_mul_epu32(reinterpret_cast<__m512i>(x), _mm512_set1_epi64(factor)));
#else
  return reinterpret_cast<Wide64>(_mm256_mul_epu32(reinterpret_cast<__m256i>(x), _mm256_set1_epi64x(factor)));
#endif
}

#if defined(__clang__)
#define FASTLLM_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define FASTLLM_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Wide64{__VA_ARGS__})
#endif

// a0 b0 a1 b1 ... of the lower and of the upper halves.
#if defined(__AVX512F__)
inline Wide64 lower(Wide64 a, Wide64 b) { return FASTLLM_SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11); }
inline Wide64 upper(Wide64 a, Wide64 b) { return FASTLLM_SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15); }
#else
inline Wide64 lower(Wide64 a, Wide64 b) { return FASTLLM_SHUFFLE(a, b, 0, 4, 1, 5); }
inline Wide64 upper(Wide64 a, Wide64 b) { return FASTLLM_SHUFFLE(a, b, 2, 6, 3, 7); }
#endif

// Philox's words at kLanes64 counters, in the order of the elements.
struct Words {
  Unsigned of[2];
};

inline Words words_at(Wide64 counters, Wide64 low, Wide64 high, uint64_t key) {
  Wide64 w0 = counters, w1 = low, w2 = high, w3{};
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const Wide64 p0 = product(w0, 0xD2511F53u), p1 = product(w2, 0xCD9E8D57u);
    w0 = (p1 >> 32) ^ w1 ^ k0;
    w2 = (p0 >> 32) ^ w3 ^ k1;
    w1 = p1;
    w3 = p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const Wide64 first = (w0 & 0xFFFFFFFFu) | (w1 << 32), second = (w2 & 0xFFFFFFFFu) | (w3 << 32);
  return {{reinterpret_cast<Unsigned>(lower(first, second)), reinterpret_cast<Unsigned>(upper(first, second))}};
}

// Elements of whole groups of 4 * kVector; how many those are is returned.
inline int64_t drop_vectors(const float* from, float* to, int64_t n, const Dropout& dropout, uint64_t row,
                            int64_t element) {
  Wide64 lanes;
  for (int l = 0; l < kLanes64; ++l) lanes[l] = static_cast<uint64_t>(l);
  const Wide64 low = Wide64{} + (row & 0xFFFFFFFFu), high = Wide64{} + (row >> 32);
  const uint32_t threshold = dropout_threshold(dropout);
  const Vector factor = all(static_cast<float>(dropout_factor(dropout)));
  int64_t i = 0;
  for (; i + 4 * kVector <= n; i += 4 * kVector) {
    const Wide64 counters = lanes + static_cast<uint64_t>((element + i) / 4);
    // Two at once: each product waits for the one before.
    const Words words[2] = {words_at(counters, low, high, dropout.key),
                            words_at(counters + kLanes64, low, high, dropout.key)};
    for (int part = 0; part < 4; ++part) {
      const Vector x = load(from + i + part * kVector) * factor;
      store(to + i + part * kVector, words[part / 2].of[part % 2] >= threshold ? x : Vector{});
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
