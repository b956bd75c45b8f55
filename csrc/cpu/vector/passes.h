// Passes over a row, vector by vector. Internal linkage, because each instruction set has its own copy.
#pragma once

#include "tiles.h"

namespace fastllm::FASTLLM_ISA {
namespace {

// sum_over's partial sums in registers, for `kSums` sums over one pass of a row. vectors(c, some) takes `some` elements
// from c on, at most a vector, and gives kSums terms of each. In the same order, so the same bits, at every width.
template <int kSums>
struct Terms {
  Vector of[kSums];
};

template <int kSums, class Vectors>
void sums_over(int64_t n, float* sums, const Vectors& vectors) {
  constexpr int kParts = kLanes / kVector;
  Vector lanes[kSums][kParts] = {};
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes)
    for (int part = 0; part < kParts; ++part) {
      const Terms<kSums> terms = vectors(c + part * kVector, kVector);
      for (int s = 0; s < kSums; ++s) lanes[s][part] += terms.of[s];
    }
  for (int part = 0; c < n; ++part, c += kVector) {
    const Terms<kSums> terms = vectors(c, n - c < kVector ? n - c : kVector);
    for (int s = 0; s < kSums; ++s) lanes[s][part] += terms.of[s];
  }
  for (int s = 0; s < kSums; ++s) {
    for (int half = kParts / 2; half > 0; half /= 2)
      for (int part = 0; part < half; ++part) lanes[s][part] += lanes[s][part + half];
    sums[s] = sum_of(lanes[s][0]);
  }
}

// Vector by vector over a row: with(c, some) takes `some` elements from c on.
template <class With>
inline void each_vector(int64_t n, const With& with) {
  int64_t c = 0;
  for (; c + kVector <= n; c += kVector) with(c, static_cast<int64_t>(kVector));
  if (c < n) with(c, n - c);
}

inline Vector larger(Vector x, Vector than) { return x > than ? x : than; }

// The largest of n logits times `scale`; NaNs are passed over.
template <class X>
float largest_scaled(const X* x, int64_t n, float scale) {
  constexpr int kParts = 4;
  const float none = -__builtin_inff();
  Vector found[kParts] = {all(none), all(none), all(none), all(none)};
  int64_t c = 0;
  for (; c + kParts * kVector <= n; c += kParts * kVector)
    for (int part = 0; part < kParts; ++part)
      found[part] = larger(load(x + c + part * kVector) * scale, found[part]);
  for (; c + kVector <= n; c += kVector) found[0] = larger(load(x + c) * scale, found[0]);
  float top = largest_of(larger(larger(found[0], found[1]), larger(found[2], found[3])));
  for (; c < n; ++c) {
    const float one = widen(x[c]) * scale;
    top = one > top ? one : top;
  }
  return top;
}

}  // namespace
}  // namespace fastllm::FASTLLM_ISA
