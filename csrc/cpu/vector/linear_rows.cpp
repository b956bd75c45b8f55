// Built once per instruction set, like rows.cpp.
#include "../linear_rows.h"

#include <cstring>

#if defined(__GNUC__) && !defined(__clang__)
// How a vector is passed without AVX: nothing here is called from elsewhere.
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

namespace fastllm::FASTLLM_ISA {
namespace {

typedef float Vector __attribute__((vector_size(32)));
constexpr int64_t kVector = 8, kVectors = 8;

inline Vector load(const float* at) {
  Vector found;
  memcpy(&found, at, sizeof found);
  return found;
}

// 64 partial sums, in one order at every level. One stream of weights: in pieces of 4 streams side by side, which are
// 2 KB apart at 512 columns, reading took 1.5 times as long.
inline float product(const float* __restrict x, const float* __restrict w, int64_t n) {
  Vector sums[kVectors] = {};
  int64_t k = 0;
  for (; k + kVectors * kVector <= n; k += kVectors * kVector)
    for (int64_t v = 0; v < kVectors; ++v) sums[v] += load(x + k + v * kVector) * load(w + k + v * kVector);
  Vector all = sums[0];
  for (int64_t v = 1; v < kVectors; ++v) all += sums[v];
  float sum = ((all[0] + all[4]) + (all[2] + all[6])) + ((all[1] + all[5]) + (all[3] + all[7]));
  for (; k < n; ++k) sum += x[k] * w[k];
  return sum;
}

// A row of weight is read from memory for the first row of x, and found in the cache by the others.
void linear_rows(const LinearRows& call, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    const float* w = call.weight + n * call.stride;
    const float bias = call.bias == nullptr ? 0.0f : call.bias[n];
    for (int64_t r = 0; r < call.rows; ++r)
      call.y[r * call.outputs + n] = product(call.x + r * call.depth, w, call.depth) + bias;
  }
}

}  // namespace

extern const LinearKernels linear_kernels;
const LinearKernels linear_kernels = {linear_rows};

}  // namespace fastllm::FASTLLM_ISA
