// Built once per instruction set, like rows.cpp.
#include "../linear_rows.h"

#include <cstring>

#include "lanes.h"
#include "numbers.h"

namespace fastllm::FASTLLM_ISA {
namespace {

constexpr int64_t kVectors = 4;
constexpr int64_t kRun = kVectors * kVector;
// Rows of x that share a weight once it is widened: 12 sums stay in AVX2's 16 registers. A row has the same bits in any
// group.
constexpr int kGroup = 3;

// One stream of weights: in pieces of 4 streams side by side, which are 2 KB apart at 512 columns, reading took 1.5
// times as long. The order of the 32 partial sums is one at every level.
template <int R, class T>
inline void add_run(const float* __restrict x, int64_t depth, const T* __restrict w, Vector (&sums)[R][kVectors]) {
  for (int64_t v = 0; v < kVectors; ++v) {
    const Vector wide = load(w + v * kVector);
    for (int r = 0; r < R; ++r) sums[r][v] = multiply_add(load(x + r * depth + v * kVector), wide, sums[r][v]);
  }
}

// Two numbers of w lie in 32 bits, and each is widened by one instruction: of 16 those at even places, then the others.
// So lies x in whole runs. Little endian.
template <int R>
inline void add_run(const float* __restrict x, int64_t depth, const BF16* __restrict w, Vector (&sums)[R][kVectors]) {
  for (int64_t v = 0; v < kVectors; v += 2) {
    const Unsigned two = read<Unsigned>(w + v * kVector);
    const Vector even = reinterpret_cast<Vector>(two << 16), odd = reinterpret_cast<Vector>(two & 0xFFFF0000u);
    for (int r = 0; r < R; ++r) {
      sums[r][v] = multiply_add(load(x + r * depth + v * kVector), even, sums[r][v]);
      sums[r][v + 1] = multiply_add(load(x + r * depth + (v + 1) * kVector), odd, sums[r][v + 1]);
    }
  }
}

template <int R, class T>
inline void products(const float* __restrict x, const T* __restrict w, int64_t depth, float (&found)[R]) {
  Vector sums[R][kVectors] = {};
  int64_t k = 0;
  for (; k + kRun <= depth; k += kRun) add_run<R>(x + k, depth, w + k, sums);
  for (int r = 0; r < R; ++r) {
    found[r] = sum_of((sums[r][0] + sums[r][1]) + (sums[r][2] + sums[r][3]));
    for (int64_t rest = k; rest < depth; ++rest) found[r] += x[r * depth + rest] * widen(w[rest]);
  }
}

// The order in which add_run() of BF16 takes the whole runs of a row.
void even_before_odd(float* x, int64_t n) {
  for (int64_t k = 0; k + 2 * kVector <= n / kRun * kRun; k += 2 * kVector) {
    float odd[kVector];
    for (int64_t i = 0; i < kVector; ++i) {
      odd[i] = x[k + 2 * i + 1];
      x[k + i] = x[k + 2 * i];
    }
    memcpy(x + k + kVector, odd, sizeof odd);
  }
}

template <int R, class T>
inline void write_group(const LinearRows& call, int64_t row, int64_t n, const float* x, const T* w, float added) {
  float found[R];
  products<R>(x + row * call.depth, w, call.depth, found);
  T* y = static_cast<T*>(call.y);
  for (int r = 0; r < R; ++r) narrow(found[r] + added, y[(row + r) * call.outputs + n]);
}

// A row of weight is read from memory for the first rows of x, and found in the cache by the others.
template <class T>
void rows_of(const LinearRows& call, int64_t begin, int64_t end, const float* x) {
  const T* bias = static_cast<const T*>(call.bias);
  for (int64_t n = begin; n < end; ++n) {
    const T* w = static_cast<const T*>(call.weight) + n * call.stride;
    const float added = bias == nullptr ? 0.0f : widen(bias[n]);
    int64_t row = 0;
    for (; row + kGroup <= call.rows; row += kGroup) write_group<kGroup>(call, row, n, x, w, added);
    if (call.rows - row == 2) write_group<2>(call, row, n, x, w, added);
    if (call.rows - row == 1) write_group<1>(call, row, n, x, w, added);
  }
}

void linear_rows(const LinearRows& call, int64_t begin, int64_t end, float* wide) {
  if (call.dtype == kF32) return rows_of<float>(call, begin, end, static_cast<const float*>(call.x));
  widen_row(call.dtype, call.x, wide, call.rows * call.depth);
  if (call.dtype == kBF16) {
    for (int64_t r = 0; r < call.rows; ++r) even_before_odd(wide + r * call.depth, call.depth);
    return rows_of<BF16>(call, begin, end, wide);
  }
  rows_of<F16>(call, begin, end, wide);
}

}  // namespace

extern const LinearKernels linear_kernels;
const LinearKernels linear_kernels = {linear_rows};

}  // namespace fastllm::FASTLLM_ISA
