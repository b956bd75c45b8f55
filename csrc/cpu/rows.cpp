// Built once per instruction set: FASTLLM_ISA names the variant. Only plain loops over plain types, nothing from the
// standard library: an inline function that the linker merged would carry the wider instructions to other callers.
#include "rows.h"

#include "../order.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace fastllm::FASTLLM_ISA {
namespace {

struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

float as_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

uint32_t as_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(BF16 x) { return as_float(static_cast<uint32_t>(x.bits) << 16); }

inline void narrow(float x, float& out) { out = x; }
inline void narrow(double x, double& out) { out = x; }
inline void narrow(float x, BF16& out) {
  const uint32_t bits = as_bits(x);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet_nan = (bits >> 16) | 0x40u;
  out.bits = static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? quiet_nan : rounded);
}

#if defined(__F16C__)
inline float widen(F16 x) { return _cvtsh_ss(x.bits); }
inline void narrow(float x, F16& out) { out.bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
#else
// The exponent is moved by a multiplication, which is exact and also normalises subnormal numbers.
inline float widen(F16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t rest = static_cast<uint32_t>(x.bits & 0x7FFFu) << 13;
  const float moved = as_float(rest) * as_float(0x77800000u);  // 2^112
  const uint32_t special = rest | 0x7F800000u;
  return as_float(sign | ((x.bits & 0x7C00u) == 0x7C00u ? special : as_bits(moved)));
}
inline void narrow(float x, F16& out) {
  const uint32_t bits = as_bits(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  uint32_t result;
  if (magnitude > 0x7F800000u) {
    result = 0x7E00u | ((magnitude >> 13) & 0x3FFu);
  } else if (magnitude >= 0x477FF000u) {  // 65520 and more round to infinity
    result = 0x7C00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 rounds to the subnormal grid of 2^-24
    result = as_bits(as_float(magnitude) + 0.5f) - 0x3F000000u;
  } else {
    result = (magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  }
  out.bits = static_cast<uint16_t>(sign | result);
}
#endif

template <class T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <class T>
using Acc = typename Accumulator<T>::type;

template <class T>
const T* row_of(const Segment& s, int64_t k) {
  const int64_t token = s.repeats == 1 ? s.tokens[k] : s.tokens[k / s.repeats] + (k % s.repeats) * s.period;
  return static_cast<const T*>(s.grad) + token * s.stride;
}

// sum = rows first .. last - 1, left to right.
template <class T>
void sum_chunk(Acc<T>* __restrict sum, const Segment& s, int64_t first, int64_t last, int64_t begin, int64_t columns) {
  const T* __restrict a = row_of<T>(s, first) + begin;
  for (int64_t c = 0; c < columns; ++c) sum[c] = widen(a[c]);
  int64_t k = first + 1;
  for (; k + 4 <= last; k += 4) {
    const T* __restrict r0 = row_of<T>(s, k) + begin;
    const T* __restrict r1 = row_of<T>(s, k + 1) + begin;
    const T* __restrict r2 = row_of<T>(s, k + 2) + begin;
    const T* __restrict r3 = row_of<T>(s, k + 3) + begin;
    for (int64_t c = 0; c < columns; ++c)
      sum[c] = (((sum[c] + widen(r0[c])) + widen(r1[c])) + widen(r2[c])) + widen(r3[c]);
  }
  for (; k < last; ++k) {
    const T* __restrict r = row_of<T>(s, k) + begin;
    for (int64_t c = 0; c < columns; ++c) sum[c] += widen(r[c]);
  }
}

template <class T, class O>
void sum_rows(void* out_, const Segment& s, int64_t begin, int64_t columns, double scale_, bool accumulate,
              void* scratch) {
  using A = Acc<T>;
  O* __restrict out = static_cast<O*>(out_);
  const A scale = static_cast<A>(scale_);
  const int64_t rows = s.count * s.repeats;
  if (rows == 1) {
    const T* __restrict row = row_of<T>(s, 0) + begin;
    if (accumulate) {
      for (int64_t c = 0; c < columns; ++c) narrow(widen(out[c]) + scale * widen(row[c]), out[c]);
    } else if (scale == A(1)) {
      for (int64_t c = 0; c < columns; ++c) narrow(widen(row[c]), out[c]);
    } else {
      for (int64_t c = 0; c < columns; ++c) narrow(scale * widen(row[c]), out[c]);
    }
    return;
  }
  A* __restrict total = static_cast<A*>(scratch);
  A* __restrict part = total + columns;
  for (int64_t first = 0; first < rows; first += kChunk) {
    const int64_t last = first + kChunk < rows ? first + kChunk : rows;
    sum_chunk<T>(first == 0 ? total : part, s, first, last, begin, columns);
    if (first != 0)
      for (int64_t c = 0; c < columns; ++c) total[c] += part[c];
  }
  if (accumulate) {
    for (int64_t c = 0; c < columns; ++c) narrow(widen(out[c]) + scale * total[c], out[c]);
  } else {
    for (int64_t c = 0; c < columns; ++c) narrow(scale * total[c], out[c]);
  }
}

constexpr int64_t kBlock = 512;

template <class A>
void apply_dropout(A* __restrict sum, int64_t n, double p, uint64_t seed, int64_t element) {
  const uint32_t threshold = dropout_threshold(p);
  const A kept = p < 1.0 ? static_cast<A>(1.0 / (1.0 - p)) : A(0);
  for (int64_t c = 0; c < n;) {
    const uint64_t e = static_cast<uint64_t>(element + c);
    const Philox4 random = philox(seed, e / 4);
    for (int64_t w = static_cast<int64_t>(e % 4); w < 4 && c < n; ++w, ++c)
      sum[c] = p < 1.0 && random.word[w] >= threshold ? sum[c] * kept : A(0);
  }
}

template <class T>
void combine_rows(void* out_, const void* const* rows, const double* scales, int64_t tables, int64_t columns,
                  double dropout_p, const uint64_t* seed, int64_t element) {
  using A = Acc<T>;
  T* __restrict out = static_cast<T*>(out_);
  A sum[kBlock];
  for (int64_t begin = 0; begin < columns; begin += kBlock) {
    const int64_t n = columns - begin < kBlock ? columns - begin : kBlock;
    for (int64_t c = 0; c < n; ++c) sum[c] = A(0);
    for (int64_t t = 0; t < tables; ++t) {
      if (rows[t] == nullptr) continue;
      const T* __restrict row = static_cast<const T*>(rows[t]) + begin;
      const A scale = static_cast<A>(scales[t]);
      for (int64_t c = 0; c < n; ++c) sum[c] += scale * widen(row[c]);
    }
    if (seed != nullptr) apply_dropout(sum, n, dropout_p, *seed, element + begin);
    for (int64_t c = 0; c < n; ++c) narrow(sum[c], out[begin + c]);
  }
}

}  // namespace

#define FASTLLM_TEXT_(x) #x
#define FASTLLM_TEXT(x) FASTLLM_TEXT_(x)

extern const RowKernels kernels;
const RowKernels kernels = {
    FASTLLM_TEXT(FASTLLM_ISA) + sizeof("isa_") - 1,
    {{sum_rows<float, float>, sum_rows<float, float>},
     {sum_rows<double, double>, nullptr},
     {sum_rows<BF16, BF16>, sum_rows<BF16, float>},
     {sum_rows<F16, F16>, sum_rows<F16, float>}},
    {combine_rows<float>, combine_rows<double>, combine_rows<BF16>, combine_rows<F16>},
};

}  // namespace fastllm::FASTLLM_ISA
