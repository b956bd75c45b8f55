// Products of small matrices in float32, held in registers. Internal linkage, because each instruction set has its own.
//
// The left operand is read element by element, with any strides. The right one is packed in panels of kPanel columns:
// row k of a panel is kPanel numbers side by side. An element's sum runs over k in order, whatever is multiplied beside
// it.
#pragma once

#include <cstdint>

#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
#include <immintrin.h>
#endif

#include "numbers.h"

namespace fastllm::FASTLLM_ISA {
namespace {

#if defined(__AVX512F__)
#define FASTLLM_LANES 16
constexpr int kTileRows = 12;  // with 2 vectors a row 24 of 32 registers
#elif defined(__AVX2__) && defined(__FMA__)
#define FASTLLM_LANES 8
constexpr int kTileRows = 6;  // with 2 vectors a row 12 of 16 registers
#else
#define FASTLLM_LANES 4
constexpr int kTileRows = 6;
#endif
constexpr int kVector = FASTLLM_LANES;
constexpr int64_t kPanel = 2 * kVector;

typedef float Vector __attribute__((vector_size(4 * kVector)));
typedef int32_t Integers __attribute__((vector_size(4 * kVector)));
// For bits of numbers that may be anything, NaN included: signed sums of them could overflow.
typedef uint32_t Unsigned __attribute__((vector_size(4 * kVector)));

}  // namespace
}  // namespace fastllm::FASTLLM_ISA

#include "halves.h"

namespace fastllm::FASTLLM_ISA {
namespace {

// x where there are elements, zeros after them.
inline Vector keep_some(Vector x, int64_t n) {
  if (n == kVector) return x;
  Vector kept{};
  __builtin_memcpy(&kept, &x, static_cast<size_t>(n) * sizeof(float));
  return kept;
}
inline Vector all(float x) { return Vector{} + x; }

// a * b + c, rounded once where the instruction set has it.
inline Vector multiply_add(Vector a, Vector b, Vector c) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vector>(
      _mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
#elif defined(__AVX2__) && defined(__FMA__)
  return reinterpret_cast<Vector>(
      _mm256_fmadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(c)));
#else
  return a * b + c;
#endif
}

// numbers.h's exp_by for x <= 89, NaN and -inf; infinite from 88.4 on.
inline Vector exp_to_89(Vector x) {
  return exp_by<Vector, Unsigned>(x, [](Vector a, Vector b, Vector c) { return multiply_add(a, b, c); });
}

#if defined(__AVX2__)
// The halves of a vector, and of its half, added until one number is left.
inline float sum_of_eight(__m256 x) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
// The same of the larger of two, the first where one is NaN.
inline float largest_of_eight(__m256 x) {
  const __m128 lower = _mm256_castps256_ps128(x), four = _mm_max_ps(_mm256_extractf128_ps(x, 1), lower);
  const __m128 two = _mm_max_ps(_mm_movehl_ps(four, four), four);
  return _mm_cvtss_f32(_mm_max_ss(_mm_movehdup_ps(two), two));
}
#endif
#if defined(__AVX512F__)
inline __m256 lower_half(__m512 x) { return _mm512_castps512_ps256(x); }
inline __m256 upper_half(__m512 x) {
  return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x), 1));
}
#endif

inline float sum_of(Vector x) {
#if defined(__AVX512F__)
  const __m512 all = reinterpret_cast<__m512>(x);
  return sum_of_eight(_mm256_add_ps(lower_half(all), upper_half(all)));
#elif FASTLLM_LANES == 8
  return sum_of_eight(reinterpret_cast<__m256>(x));
#else
  float lanes[kVector];
  store(lanes, x);
  for (int half = kVector / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  return lanes[0];
#endif
}

// NaNs are passed over.
inline float largest_of(Vector x) {
#if defined(__AVX512F__)
  const __m512 all = reinterpret_cast<__m512>(x);
  return largest_of_eight(_mm256_max_ps(upper_half(all), lower_half(all)));
#elif FASTLLM_LANES == 8
  return largest_of_eight(reinterpret_cast<__m256>(x));
#else
  float lanes[kVector];
  store(lanes, x);
  for (int half = kVector / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) lanes[l] = lanes[l + half] > lanes[l] ? lanes[l + half] : lanes[l];
  return lanes[0];
#endif
}

inline int64_t panels(int64_t columns) { return (columns + kPanel - 1) / kPanel; }
inline int64_t in_panels(int64_t columns) { return panels(columns) * kPanel; }

// The left operand of a product: element (m, k) is data[m * row + k * column].
struct Left {
  const float* data;
  int64_t row, column;
};

// R rows and N vectors of c = (kAdd ? c : 0) + a b, b one panel of `depth` rows. kTurned: a.row is 1.
template <int R, int N, bool kAdd, bool kTurned>
inline void tile(float* c, int64_t to, const Left& a, const float* b, int64_t depth) {
  Vector sum[R][N];
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) sum[r][n] = kAdd ? load(c + r * to + n * kVector) : Vector{};
  const float* left = a.data;
  for (int64_t k = 0; k < depth; ++k, left += a.column, b += kPanel) {
    Vector right[N];
    for (int n = 0; n < N; ++n) right[n] = load(b + n * kVector);
    for (int r = 0; r < R; ++r) {
      const Vector one = all(left[kTurned ? r : r * a.row]);
      for (int n = 0; n < N; ++n) sum[r][n] = multiply_add(one, right[n], sum[r][n]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) store(c + r * to + n * kVector, sum[r][n]);
}

// R rows of c, `columns` columns rounded up to whole vectors; panels of b are `panel` numbers apart.
template <int R, bool kAdd, bool kTurned>
void strip(float* c, int64_t to, int64_t columns, const Left& a, const float* b, int64_t panel, int64_t depth) {
  for (int64_t n = 0; n < columns; n += kPanel, b += panel) {
    if (columns - n > kVector)
      tile<R, 2, kAdd, kTurned>(c + n, to, a, b, depth);
    else
      tile<R, 1, kAdd, kTurned>(c + n, to, a, b, depth);
  }
}

// The same of up to kTileRows rows.
template <bool kAdd, bool kTurned, int R = kTileRows>
void multiply(int64_t rows, float* c, int64_t to, int64_t columns, const Left& a, const float* b, int64_t panel,
              int64_t depth) {
  if constexpr (R > 1) {
    if (rows < R) return multiply<kAdd, kTurned, R - 1>(rows, c, to, columns, a, b, panel, depth);
  }
  strip<R, kAdd, kTurned>(c, to, columns, a, b, panel, depth);
}

// A matrix in float32, rows `width` apart.
struct Wide {
  const float* data;
  int64_t width;
};

// n rows of any dtype, `stride` bytes apart, in float32: as they are, or in `room`, where zeros fill up whole panels.
inline Wide widened(float* room, int dtype, const char* from, int64_t stride, int64_t n, int64_t columns) {
  if (dtype == kF32 && columns % kPanel == 0) return {reinterpret_cast<const float*>(from), stride / 4};
  const int64_t width = in_panels(columns);
  for (int64_t r = 0; r < n; ++r) {
    widen_row(dtype, from + r * stride, room + r * width, columns);
    for (int64_t c = columns; c < width; ++c) room[r * width + c] = 0.0f;
  }
  return {room, width};
}

// Panels of n rows of a matrix that has whole panels of columns.
inline void pack(float* to, const Wide& from, int64_t n, int64_t columns) {
  for (int64_t c = 0; c < columns; c += kPanel)
    for (int64_t r = 0; r < n; ++r, to += kPanel) {
      store(to, load(from.data + r * from.width + c));
      store(to + kVector, load(from.data + r * from.width + c + kVector));
    }
}

#if defined(__AVX2__)
// 8 x 8: to, rows `across` apart, = from, rows `along` apart, turned. Rows are written in order, and may overlap.
inline void turn_8x8(float* to, int64_t across, const float* from, int64_t along) {
  __m256 r[8], t[8];
  for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(from + i * along);
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) _mm256_storeu_ps(to + i * across, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
  for (int i = 0; i < 4; ++i) _mm256_storeu_ps(to + (i + 4) * across, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
}
#endif

// Panels of n rows of a matrix, turned: each of `columns` rows, zeros where there are no columns.
inline void pack_turned(float* to, const Wide& from, int64_t n, int64_t columns) {
  for (int64_t r = 0; r < n; r += kPanel, to += kPanel * columns) {
    const int64_t some = n - r < kPanel ? n - r : kPanel;
    if (some < kPanel) __builtin_memset(to, 0, static_cast<size_t>(kPanel * columns) * sizeof(float));
    int64_t l = 0;
#if defined(__AVX2__)
    for (; l + 8 <= some; l += 8) {
      int64_t c = 0;
      for (; c + 8 <= columns; c += 8)
        turn_8x8(to + c * kPanel + l, kPanel, from.data + (r + l) * from.width + c, from.width);
      for (; c < columns; ++c)
        for (int64_t i = l; i < l + 8; ++i) to[c * kPanel + i] = from.data[(r + i) * from.width + c];
    }
#endif
    for (; l < some; ++l)
      for (int64_t c = 0; c < columns; ++c) to[c * kPanel + l] = from.data[(r + l) * from.width + c];
  }
}

}  // namespace
}  // namespace fastllm::FASTLLM_ISA
