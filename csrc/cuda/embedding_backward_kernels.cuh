// The kernels of embedding_bwd after the sort. None has a barrier or an atomic: what a thread does is a function of its
// indices alone, so tests/emulate_embedding.cpp runs these very functions thread by thread on a CPU.
//
// A segment is the rows of grad that belong to one row of the table. Short ones are summed where they are found. Long
// ones (over kChunk rows) are listed as tasks of kChunk rows each, summed to parts, the parts to groups, and the groups
// to the row, always in order (order.h).
#pragma once

#include "../order.h"
#include "../scalar.h"
#include "vector.cuh"

namespace fastllm {
namespace {

struct alignas(8) Bounds {
  uint32_t begin, end;  // in sorted tokens
};
struct alignas(8) Task {
  uint32_t row_plus_one;  // 0: no task
  uint32_t chunk;
};

struct Sorted {
  const uint32_t* keys;    // rows of the table in ascending order; `rows` for tokens without a gradient
  const uint32_t* tokens;  // their positions among the indices
  const Bounds* bounds;    // of each row of the table
  bool positions;          // the indices are 0, 1, 2, ...: no need of the three above
  int64_t count;           // tokens
  int64_t repeats;         // token t stands for rows t, t + count, t + 2 * count, ... of grad
};

struct Output {
  void* data;
  int64_t stride;  // between rows, in elements
  int64_t rows, columns;
  double scale;
  bool scale_grad_by_freq;
  bool accumulate;
};

FASTLLM_HD Bounds bounds_of(const Sorted& s, int64_t row) {
  if (!s.positions) return s.bounds[row];
  if (row >= s.count) return {0, 0};
  return {static_cast<uint32_t>(row), static_cast<uint32_t>(row) + 1};
}

FASTLLM_HD int64_t length(const Sorted& s, Bounds b) { return static_cast<int64_t>(b.end - b.begin) * s.repeats; }

// The row of grad that is number k of a segment.
FASTLLM_HD int64_t grad_row(const Sorted& s, Bounds b, int64_t k) {
  if (s.repeats == 1) return s.positions ? b.begin + k : s.tokens[b.begin + k];
  const int64_t token = s.positions ? b.begin + k / s.repeats : s.tokens[b.begin + k / s.repeats];
  return token + k % s.repeats * s.count;
}

FASTLLM_HD int64_t chunks_of(int64_t length) { return (length + kChunk - 1) / kChunk; }

// The slot of a long segment's first task. A segment of L > kChunk rows spans floor(L / (kChunk / 2)) slots or more
// before the next one may begin, and that is never less than its chunks: no two segments share a slot, without a scan.
FASTLLM_HD int64_t first_slot(const Sorted& s, Bounds b) { return b.begin * s.repeats / (kChunk / 2); }
FASTLLM_HD int64_t slots_for(int64_t grad_rows) { return grad_rows / (kChunk / 2) + 1; }

// Rows first .. last - 1 of a segment, left to right. Several loads are under way at a time: first their rows, then
// their data, so that no load waits for another's address.
template <class T, int N>
FASTLLM_DEVICE Pack<Acc<T>, N> sum_run(const T* grad, const Sorted& s, Bounds b, int64_t first, int64_t last,
                                       int64_t columns, int64_t column) {
  constexpr int kAhead = 4;
  const bool plain = s.repeats == 1 && !s.positions;
  Pack<Acc<T>, N> sum = widened(load_streaming<T, N>(grad + grad_row(s, b, first) * columns + column));
  int64_t k = first + 1;
  for (; k + kAhead <= last; k += kAhead) {
    int64_t row[kAhead];
    if (plain) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) row[i] = s.tokens[b.begin + k + i];
    } else {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) row[i] = grad_row(s, b, k + i);
    }
    Pack<T, N> next[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) next[i] = load_streaming<T, N>(grad + row[i] * columns + column);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) add(sum, widened(next[i]));
  }
  for (; k < last; ++k) add(sum, widened(load_streaming<T, N>(grad + grad_row(s, b, k) * columns + column)));
  return sum;
}

template <class O, class A, int N>
FASTLLM_DEVICE void write(const Output& out, int64_t row, int64_t column, const Pack<A, N>& sum, int64_t rows) {
  const A scale = static_cast<A>(out.scale_grad_by_freq ? out.scale / static_cast<double>(rows) : out.scale);
  O* to = static_cast<O*>(out.data) + row * out.stride + column;
  Pack<O, N> result;
  if (out.accumulate) {
    const Pack<O, N> before = load<O, N>(to);
#pragma unroll
    for (int i = 0; i < N; ++i) narrow(widen(before.v[i]) + scale * sum.v[i], result.v[i]);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) narrow(scale * sum.v[i], result.v[i]);
  }
  store_streaming(to, result);
}

// bounds of every row that occurs; the others were set to zero before.
FASTLLM_KERNEL void find_bounds(const uint32_t* keys, int64_t count, int64_t rows, Bounds* bounds) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const uint32_t key = keys[i];
  if (key >= rows) return;
  if (i == 0 || keys[i - 1] != key) bounds[key].begin = static_cast<uint32_t>(i);
  if (i == count - 1 || keys[i + 1] != key) bounds[key].end = static_cast<uint32_t>(i) + 1;
}

// Writes every row of the table whose segment is short, zeros included, and lists the tasks of the long ones. With
// `Touched` (for adding into a gradient) a line is a sorted token, and acts if it is the first of its segment; else a
// line is a row of the table.
template <class T, class O, int N, bool Touched>
FASTLLM_KERNEL void write_rows(const T* grad, Sorted s, Output out, Task* tasks) {
  const int64_t line = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  int64_t row = line;
  if (Touched && !s.positions) {
    if (line >= s.count) return;
    row = s.keys[line];
  }
  if (row >= out.rows) return;
  const Bounds b = bounds_of(s, row);
  if (Touched && !s.positions && b.begin != line) return;
  const int64_t rows = length(s, b);
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * N;
  if (rows > kChunk) {
    if (blockIdx.y == 0)
      for (int64_t c = threadIdx.x; c < chunks_of(rows); c += blockDim.x)
        tasks[first_slot(s, b) + c] = {static_cast<uint32_t>(row) + 1, static_cast<uint32_t>(c)};
    return;
  }
  if (column >= out.columns) return;
  if (rows == 0) {
    if (!out.accumulate) store_streaming(static_cast<O*>(out.data) + row * out.stride + column, Pack<O, N>{});
    return;
  }
  write<O>(out, row, column, sum_run<T, N>(grad, s, b, 0, rows, out.columns, column), rows);
}

template <class T, int N>
FASTLLM_KERNEL void sum_parts(const T* grad, Sorted s, const Task* tasks, int64_t slots, int64_t columns,
                              Acc<T>* parts) {
  const int64_t slot = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * N;
  if (slot >= slots || column >= columns) return;
  const Task task = tasks[slot];
  if (task.row_plus_one == 0) return;
  const Bounds b = bounds_of(s, static_cast<int64_t>(task.row_plus_one) - 1);
  const int64_t rows = length(s, b), first = task.chunk * kChunk;
  const int64_t last = first + kChunk < rows ? first + kChunk : rows;
  store(parts + slot * columns + column, sum_run<T, N>(grad, s, b, first, last, columns, column));
}

// parts[slot], parts[slot + step], ... in order, `count` of them.
template <class A, int N>
FASTLLM_DEVICE Pack<A, N> sum_of_parts(const A* parts, int64_t slot, int64_t step, int64_t count, int64_t columns,
                                       int64_t column) {
  constexpr int kAhead = 4;
  const A* at = parts + slot * columns + column;
  Pack<A, N> sum = load<A, N>(at);
  int64_t k = 1;
  for (; k + kAhead <= count; k += kAhead) {
    Pack<A, N> next[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) next[i] = load<A, N>(at + (k + i) * step * columns);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) add(sum, next[i]);
  }
  for (; k < count; ++k) add(sum, load<A, N>(at + k * step * columns));
  return sum;
}

// For segments of more than kChunk parts: each group's sum takes the place of its first part.
template <class A, int N>
FASTLLM_KERNEL void sum_groups(Sorted s, const Task* tasks, int64_t slots, int64_t columns, A* parts) {
  const int64_t slot = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * N;
  if (slot >= slots || column >= columns) return;
  const Task task = tasks[slot];
  if (task.row_plus_one == 0 || task.chunk % kChunk != 0) return;
  const int64_t chunks = chunks_of(length(s, bounds_of(s, static_cast<int64_t>(task.row_plus_one) - 1)));
  if (chunks <= kChunk) return;
  const int64_t count = chunks - task.chunk < kChunk ? chunks - task.chunk : kChunk;
  store(parts + slot * columns + column, sum_of_parts<A, N>(parts, slot, 1, count, columns, column));
}

template <class A, class O, int N>
FASTLLM_KERNEL void write_long_rows(Sorted s, Output out, const Task* tasks, int64_t slots, const A* parts) {
  const int64_t slot = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * N;
  if (slot >= slots || column >= out.columns) return;
  const Task task = tasks[slot];
  if (task.row_plus_one == 0 || task.chunk != 0) return;
  const int64_t row = static_cast<int64_t>(task.row_plus_one) - 1, rows = length(s, bounds_of(s, row));
  const int64_t chunks = chunks_of(rows), step = chunks > kChunk ? kChunk : 1;
  write<O>(out, row, column, sum_of_parts<A, N>(parts, slot, step, (chunks + step - 1) / step, out.columns, column),
           rows);
}

}  // namespace
}  // namespace fastllm
