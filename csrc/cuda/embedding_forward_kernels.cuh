// The kernels of embedding_fwd and embedding_sum; without barriers and atomics, as those of the backward are.
#pragma once

#include "../order.h"
#include "../scalar.h"
#include "../vocabulary.h"
#include "vector.cuh"

namespace fastllm {
namespace {

// Rows as units U of 2 to 16 bytes. Each thread copies one unit of kTokensPerThread rows, all loads before the stores.
constexpr int kTokensPerThread = 4;

template <class U, class Index>
FASTLLM_KERNEL void gather_rows(const U* table, int64_t row_stride, const Index* ids, int64_t tokens, int64_t units,
                                Vocabulary v, U* out) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y * kTokensPerThread + threadIdx.y;
  const int64_t unit = static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x;
  if (unit >= units) return;
  U value[kTokensPerThread];
#pragma unroll
  for (int i = 0; i < kTokensPerThread; ++i) {
    const int64_t token = first + static_cast<int64_t>(i) * blockDim.y;
    value[i] = U{};
    if (token < tokens) {
      const int64_t id = ids[token], row = id - v.start;
      FASTLLM_ASSERT(id >= 0 && (v.partial || id < v.rows));
      if (row >= 0 && row < v.rows) value[i] = table[row * row_stride + unit];
    }
  }
#pragma unroll
  for (int i = 0; i < kTokensPerThread; ++i) {
    const int64_t token = first + static_cast<int64_t>(i) * blockDim.y;
    if (token < tokens) FASTLLM_STORE_STREAMING(out + token * units + unit, value[i]);
  }
}

constexpr int kMaxTables = 8;

struct Tables {
  const void* data[kMaxTables];
  int64_t stride[kMaxTables];  // between rows, in elements
  int64_t rows[kMaxTables];
  const void* ids[kMaxTables];
  int64_t count[kMaxTables];  // of ids; row r of the sum takes number r % count
  bool is_long[kMaxTables];
  double scale[kMaxTables];
  int number;
};

FASTLLM_DEVICE int64_t id_of(const Tables& t, int table, int64_t row) {
  const int64_t at = row % t.count[table];
  return t.is_long[table] ? static_cast<const int64_t*>(t.ids[table])[at]
                          : static_cast<const int32_t*>(t.ids[table])[at];
}

// Dropout of a row's elements from `column` on; `seed` is the key and the number of the first row.
template <class A, int N>
FASTLLM_DEVICE void drop_pack(Pack<A, N>& values, int64_t row, int64_t column, double p, const int64_t* seed) {
  const Dropout dropout{static_cast<uint64_t>(seed[0]), static_cast<uint64_t>(seed[1]), p};
  apply_dropout(values.v, N, dropout, dropout.first_row + static_cast<uint64_t>(row), column);
}

template <class T, int N>
FASTLLM_KERNEL void sum_tables(Tables t, int64_t rows, int64_t columns, double dropout_p, const int64_t* seed,
                               T* out) {
  using A = Acc<T>;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * N;
  if (row >= rows || column >= columns) return;
  Pack<A, N> sum{};
  for (int i = 0; i < t.number; ++i) {
    const int64_t id = id_of(t, i, row);
    const bool inside = id >= 0 && id < t.rows[i];
    FASTLLM_ASSERT(inside);
    if (!inside) continue;
    const A scale = static_cast<A>(t.scale[i]);
    const Pack<T, N> part = load<T, N>(static_cast<const T*>(t.data[i]) + id * t.stride[i] + column);
#pragma unroll
    for (int c = 0; c < N; ++c) sum.v[c] += scale * widen(part.v[c]);
  }
  if (seed != nullptr) drop_pack(sum, row, column, dropout_p, seed);
  Pack<T, N> result;
#pragma unroll
  for (int c = 0; c < N; ++c) narrow(sum.v[c], result.v[c]);
  store_streaming(out + row * columns + column, result);
}

template <class T, int N>
FASTLLM_KERNEL void drop(const T* from, int64_t rows, int64_t columns, double p, const int64_t* seed, T* to) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * N;
  if (row >= rows || column >= columns) return;
  const int64_t element = row * columns + column;
  Pack<Acc<T>, N> values = widened(load_streaming<T, N>(from + element));
  drop_pack(values, row, column, p, seed);
  Pack<T, N> result;
#pragma unroll
  for (int c = 0; c < N; ++c) narrow(values.v[c], result.v[c]);
  store(to + element, result);
}

}  // namespace
}  // namespace fastllm
