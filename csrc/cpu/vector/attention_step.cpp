// Built once per instruction set, like rows.cpp.
#include "../attention_step.h"

#include <cstring>
#include <type_traits>

#include "lanes.h"
#include "numbers.h"

namespace fastllm::FASTLLM_ISA {
namespace {

constexpr int64_t kSums = 4, kRun = kSums * kVector;

template <class T>
float dot(const float* __restrict x, const T* __restrict y, int64_t n) {
  Vector sums[kSums] = {};
  int64_t c = 0;
  for (; c + kRun <= n; c += kRun)
    for (int64_t s = 0; s < kSums; ++s)
      sums[s] = multiply_add(load(x + c + s * kVector), load(y + c + s * kVector), sums[s]);
  for (; c + kVector <= n; c += kVector) sums[0] = multiply_add(load(x + c), load(y + c), sums[0]);
  float sum = sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; c < n; ++c) sum += x[c] * widen(y[c]);
  return sum;
}

// total[c] += the sum over the rows of weights[r] * rows[r][c].
template <class T>
void add_weighted(const float* __restrict weights, const T* rows, int64_t stride, int64_t count, int64_t columns,
                  float* __restrict total) {
  int64_t c = 0;
  for (; c + kRun <= columns; c += kRun) {
    Vector sums[kSums] = {};
    for (int64_t r = 0; r < count; ++r) {
      const Vector weight = Vector{} + weights[r];
      for (int64_t s = 0; s < kSums; ++s)
        sums[s] = multiply_add(load(rows + r * stride + c + s * kVector), weight, sums[s]);
    }
    for (int64_t s = 0; s < kSums; ++s) {
      const Vector to = load(total + c + s * kVector) + sums[s];
      memcpy(total + c + s * kVector, &to, sizeof to);
    }
  }
  for (; c < columns; ++c) {
    float sum = 0.0f;
    for (int64_t r = 0; r < count; ++r) sum += weights[r] * widen(rows[r * stride + c]);
    total[c] += sum;
  }
}

// Scores of one query; weights in their place: e^(score - the largest). Returns the weights' sum, 0 where all is
// hidden.
float weigh(const AttentionStep& call, int64_t g, float* scores) {
  if (call.mask != nullptr) {
    const int64_t from = g * call.mask_stride;
    if (call.boolean) {
      const auto* seen = static_cast<const uint8_t*>(call.mask) + from;
      for (int64_t j = 0; j < call.keys; ++j)
        if (seen[j * call.mask_step] == 0) scores[j] = -__builtin_inff();
    } else {
      const auto* added = static_cast<const float*>(call.mask) + from;
      for (int64_t j = 0; j < call.keys; ++j) scores[j] += added[j * call.mask_step];
    }
  }
  const float most = largest(scores, call.keys);
  const bool none = most == -__builtin_inff();
  const float base = none ? 0.0f : most;
  return sum_over<float>(call.keys, [&](int64_t j) {
    return scores[j] = none && scores[j] == most ? 0.0f : exp_(scores[j] - base);
  });
}

template <class T>
void step(const AttentionStep& call, float* scratch) {
  const int64_t group = call.group, keys = call.keys, dim = call.dim, dim_v = call.dim_v;
  float* const scores = scratch;
  float* const q = scores + group * keys;
  float* const totals = q + group * dim;
  float* const wide = totals + 2 * group * dim_v;
  for (int64_t g = 0; g < group; ++g)
    widen_row(call.dtype, static_cast<const T*>(call.q) + g * call.q_stride, q + g * dim, dim);
  // Several queries read a block of keys widened once; one reads it as it is.
  const bool widens = group > 1 && !std::is_same_v<T, float>;
  const auto block = [&](const T* rows, int64_t stride, int64_t count, int64_t columns) {
    for (int64_t r = 0; r < count; ++r) widen_row(call.dtype, rows + r * stride, wide + r * columns, columns);
  };
  for (int64_t first = 0; first < keys; first += kStepKeys) {
    const int64_t count = keys - first < kStepKeys ? keys - first : kStepKeys;
    const T* rows = static_cast<const T*>(call.k) + first * call.k_stride;
    if (widens) block(rows, call.k_stride, count, dim);
    for (int64_t g = 0; g < group; ++g)
      for (int64_t r = 0; r < count; ++r)
        scores[g * keys + first + r] = call.scale * (widens ? dot(q + g * dim, wide + r * dim, dim)
                                                            : dot(q + g * dim, rows + r * call.k_stride, dim));
  }
  float* const sums = totals + group * dim_v;
  for (int64_t g = 0; g < group; ++g) sums[g] = weigh(call, g, scores + g * keys);
  memset(totals, 0, static_cast<size_t>(group * dim_v) * sizeof(float));
  for (int64_t first = 0; first < keys; first += kStepKeys) {
    const int64_t count = keys - first < kStepKeys ? keys - first : kStepKeys;
    const T* rows = static_cast<const T*>(call.v) + first * call.v_stride;
    if (widens) block(rows, call.v_stride, count, dim_v);
    for (int64_t g = 0; g < group; ++g) {
      const float* weights = scores + g * keys + first;
      if (widens)
        add_weighted(weights, wide, dim_v, count, dim_v, totals + g * dim_v);
      else
        add_weighted(weights, rows, call.v_stride, count, dim_v, totals + g * dim_v);
    }
  }
  for (int64_t g = 0; g < group; ++g) {
    float* total = totals + g * dim_v;
    const float factor = sums[g] == 0.0f ? 0.0f : 1.0f / sums[g];
    for (int64_t c = 0; c < dim_v; ++c) total[c] = sums[g] == 0.0f ? 0.0f : total[c] * factor;
    narrow_row(call.dtype, total, static_cast<T*>(call.out) + g * call.out_stride, dim_v);
  }
}

void attention_step(const AttentionStep& call, float* scratch) {
  if (call.dtype == kF32) return step<float>(call, scratch);
  if (call.dtype == kBF16) return step<BF16>(call, scratch);
  step<F16>(call, scratch);
}

}  // namespace

extern const AttentionStepKernels attention_step_kernels;
const AttentionStepKernels attention_step_kernels = {attention_step};

}  // namespace fastllm::FASTLLM_ISA
