// Built once per instruction set, like rows.cpp.
#include "../linear_rows.h"

#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "numbers.h"

#if defined(__GNUC__) && !defined(__clang__)
// How a vector is passed without AVX: nothing here is called from elsewhere.
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

namespace fastllm::FASTLLM_ISA {
namespace {

typedef float Vector __attribute__((vector_size(32)));
typedef uint32_t Bits __attribute__((vector_size(32)));
typedef uint16_t Halves __attribute__((vector_size(16)));
constexpr int64_t kVector = 8, kVectors = 8;

template <class V>
inline V read(const void* at) {
  V found;
  memcpy(&found, at, sizeof found);
  return found;
}

inline Vector load(const float* at) { return read<Vector>(at); }
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

constexpr int64_t kRun = kVectors * kVector;

inline float sum_of(const Vector* sums) {
  Vector all = sums[0];
  for (int64_t v = 1; v < kVectors; ++v) all += sums[v];
  return ((all[0] + all[4]) + (all[2] + all[6])) + ((all[1] + all[5]) + (all[3] + all[7]));
}

// 64 partial sums, in one order at every level. One stream of weights: in pieces of 4 streams side by side, which are
// 2 KB apart at 512 columns, reading took 1.5 times as long.
template <class T>
inline float product(const float* __restrict x, const T* __restrict w, int64_t n) {
  Vector sums[kVectors] = {};
  int64_t k = 0;
  for (; k + kRun <= n; k += kRun)
    for (int64_t v = 0; v < kVectors; ++v) sums[v] += load(x + k + v * kVector) * load(w + k + v * kVector);
  float sum = sum_of(sums);
  for (; k < n; ++k) sum += x[k] * widen(w[k]);
  return sum;
}

// Two numbers of w lie in 32 bits, and each is widened by one instruction: of 16 those at even places, then the others. So
// lies x in whole runs. Little endian.
inline float product(const float* __restrict x, const BF16* __restrict w, int64_t n) {
  Vector sums[kVectors] = {};
  int64_t k = 0;
  for (; k + kRun <= n; k += kRun)
    for (int64_t v = 0; v < kVectors; v += 2) {
      const Bits two = read<Bits>(w + k + v * kVector);
      sums[v] += load(x + k + v * kVector) * reinterpret_cast<Vector>(two << 16);
      sums[v + 1] += load(x + k + (v + 1) * kVector) * reinterpret_cast<Vector>(two & 0xFFFF0000u);
    }
  float sum = sum_of(sums);
  for (; k < n; ++k) sum += x[k] * widen(w[k]);
  return sum;
}

// The order in which product() of BF16 takes the whole runs of a row.
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

// A row of weight is read from memory for the first row of x, and found in the cache by the others.
template <class T>
void rows_of(const LinearRows& call, int64_t begin, int64_t end, const float* x) {
  const T* bias = static_cast<const T*>(call.bias);
  T* y = static_cast<T*>(call.y);
  for (int64_t n = begin; n < end; ++n) {
    const T* w = static_cast<const T*>(call.weight) + n * call.stride;
    const float level = bias == nullptr ? 0.0f : widen(bias[n]);
    for (int64_t r = 0; r < call.rows; ++r)
      narrow(product(x + r * call.depth, w, call.depth) + level, y[r * call.outputs + n]);
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
