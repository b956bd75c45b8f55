// Built once per instruction set: FASTLLM_ISA names the variant. Only plain loops over plain types, nothing from the
// standard library: an inline function that the linker merged would carry the wider instructions to other callers.
#include "../rows.h"

#include "../../order.h"
#include "../../scalar.h"
#include "dropout.h"

namespace fastllm::FASTLLM_ISA {
namespace {

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
  A* __restrict group = total + columns;
  A* __restrict part = group + columns;
  for (int64_t outer = 0; outer < rows; outer += kChunk * kChunk) {
    const int64_t end = outer + kChunk * kChunk < rows ? outer + kChunk * kChunk : rows;
    A* __restrict sum = outer == 0 ? total : group;
    for (int64_t first = outer; first < end; first += kChunk) {
      const int64_t last = first + kChunk < end ? first + kChunk : end;
      sum_chunk<T>(first == outer ? sum : part, s, first, last, begin, columns);
      if (first != outer)
        for (int64_t c = 0; c < columns; ++c) sum[c] += part[c];
    }
    if (outer != 0)
      for (int64_t c = 0; c < columns; ++c) total[c] += group[c];
  }
  if (accumulate) {
    for (int64_t c = 0; c < columns; ++c) narrow(widen(out[c]) + scale * total[c], out[c]);
  } else {
    for (int64_t c = 0; c < columns; ++c) narrow(scale * total[c], out[c]);
  }
}

constexpr int64_t kBlock = 512;

// combine_rows of 32 or 16 bits with nothing dropped, in registers: the same numbers, in the same order.
template <class T>
void combine_vectors(T* out, const void* const* rows, const double* scales, int64_t tables, int64_t columns) {
  constexpr int kParts = 4;
  const auto add = [=](int64_t c, auto& sum, const auto& load_part) {
    for (int64_t t = 0; t < tables; ++t) {
      if (rows[t] == nullptr) continue;
      const T* const one = static_cast<const T*>(rows[t]) + c;
      const float scale = static_cast<float>(scales[t]);
      for (int part = 0; part < static_cast<int>(sizeof sum / sizeof sum[0]); ++part)
        sum[part] += scale * load_part(one + part * kVector);
    }
  };
  int64_t c = 0;
  for (; c + kParts * kVector <= columns; c += kParts * kVector) {
    Vector sum[kParts] = {};
    add(c, sum, [](const T* from) { return load(from); });
    for (int part = 0; part < kParts; ++part) store(out + c + part * kVector, sum[part]);
  }
  for (; c < columns; c += kVector) {
    const int64_t some = columns - c < kVector ? columns - c : kVector;
    Vector sum[1] = {};
    add(c, sum, [=](const T* from) { return load_some(from, some); });
    store_some(out + c, sum[0], some);
  }
}

template <class T>
void combine_rows(void* out_, const void* const* rows, const double* scales, int64_t tables, int64_t columns,
                  const Dropout* dropout, int64_t row) {
  using A = Acc<T>;
  T* __restrict out = static_cast<T*>(out_);
  if constexpr (sizeof(A) == sizeof(float)) {
    if (dropout == nullptr) return combine_vectors(out, rows, scales, tables, columns);
  }
  A sum[kBlock];
  for (int64_t begin = 0; begin < columns; begin += kBlock) {
    const int64_t n = columns - begin < kBlock ? columns - begin : kBlock;
    for (int64_t c = 0; c < n; ++c) sum[c] = A(0);
    for (int64_t t = 0; t < tables; ++t) {
      if (rows[t] == nullptr) continue;
      const T* __restrict one = static_cast<const T*>(rows[t]) + begin;
      const A scale = static_cast<A>(scales[t]);
      for (int64_t c = 0; c < n; ++c) sum[c] += scale * widen(one[c]);
    }
    if (dropout != nullptr) drop(sum, sum, n, *dropout, dropout->first_row + static_cast<uint64_t>(row), begin);
    for (int64_t c = 0; c < n; ++c) narrow(sum[c], out[begin + c]);
  }
}

template <class T>
void drop_row(const void* x_, void* out_, int64_t columns, const Dropout& dropout, int64_t row_) {
  using A = Acc<T>;
  const T* x = static_cast<const T*>(x_);
  T* out = static_cast<T*>(out_);
  const uint64_t row = dropout.first_row + static_cast<uint64_t>(row_);
  if constexpr (sizeof(T) == sizeof(A)) {
    drop(x, out, columns, dropout, row, 0);
  } else {
    A wide[kBlock];
    for (int64_t begin = 0; begin < columns; begin += kBlock) {
      const int64_t n = columns - begin < kBlock ? columns - begin : kBlock;
      for (int64_t c = 0; c < n; ++c) wide[c] = widen(x[begin + c]);
      drop(wide, wide, n, dropout, row, begin);
      for (int64_t c = 0; c < n; ++c) narrow(wide[c], out[begin + c]);
    }
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
    {drop_row<float>, drop_row<double>, drop_row<BF16>, drop_row<F16>},
};

}  // namespace fastllm::FASTLLM_ISA
