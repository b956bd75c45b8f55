// The scores of a few rows of attention, which forward and backward compute alike: the same bits in both.
#pragma once

#include "../attention_rows.h"
#include "dropout.h"
#include "tiles.h"

namespace fastllm::FASTLLM_ISA {
namespace {

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// The columns [begin, end) that a row sees.
struct Span {
  int64_t begin, end;
};

inline Span seen_by(const AttentionShape& s, int64_t first_row, int64_t last_row) {
  Span span{0, s.columns};
  if (s.left >= 0) span.begin = larger(0, first_row + s.offset - s.left);
  if (s.right >= 0) span.end = smaller(s.columns, last_row + s.offset + s.right + 1);
  return span;
}

// Columns in a block of keys: as many as leave keys and values, packed, in half of a small L2 cache, and no more than
// pay for their row maxima. It depends on the head dims alone, so a row's sums do not depend on what is around it.
inline int64_t block_of(const AttentionShape& s) {
  const int64_t fit = (int64_t{1} << 15) / larger(1, in_panels(s.dim) + in_panels(s.dim_v)) / 64 * 64;
  return larger(64, smaller(fit, 256));
}

// Scores lie in rows of this many numbers: no power of 2, so that a column of them is not in one set of a cache.
inline int64_t score_width(int64_t block) { return block + 16; }

// Whether a score is more than the product times a positive scale.
inline bool has_features(const AttentionShape& s, const AttentionHead& h) {
  return !(s.scale > 0) || s.softcap > 0 || h.slope != 0 || h.bias.data != nullptr;
}

// Products t of one row with the n columns from `column` on, as scores. `slope`, where not null, gets the derivative of
// the soft cap.
inline void add_features(const AttentionShape& s, const AttentionHead& h, int64_t row, int64_t column, int64_t n,
                         float* __restrict t, float* __restrict slope) {
  if (s.softcap > 0) {
    for (int64_t c = 0; c < n; ++c) t[c] = tanh_(t[c] * s.scale / s.softcap);
    if (slope != nullptr)
      for (int64_t c = 0; c < n; ++c) slope[c] = 1.0f - t[c] * t[c];
    for (int64_t c = 0; c < n; ++c) t[c] *= s.softcap;
  } else {
    for (int64_t c = 0; c < n; ++c) t[c] *= s.scale;
  }
  if (h.slope != 0) {
    const int64_t diagonal = row + s.columns - s.rows - column;
    for (int64_t c = 0; c < n; ++c) {
      const int64_t distance = diagonal > c ? diagonal - c : c - diagonal;
      t[c] -= h.slope * static_cast<float>(distance);
    }
  }
  if (h.bias.data == nullptr) return;
  const int64_t first = row * h.bias.row + column * h.bias.column, step = h.bias.column;
  if (s.boolean) {
    const uint8_t* seen = static_cast<const uint8_t*>(h.bias.data) + first;
    for (int64_t c = 0; c < n; ++c) t[c] = seen[c * step] ? t[c] : -__builtin_inff();
  } else {
    const float* bias = static_cast<const float*>(h.bias.data) + first;
    if (step == 1)
      for (int64_t c = 0; c < n; ++c) t[c] += bias[c];
    else
      for (int64_t c = 0; c < n; ++c) t[c] += bias[c * step];
  }
}

// Some columns of a head's keys: n from `column` on.
struct Block {
  int64_t column, n;
  const float* keys;  // panels of the keys, turned
};

// `rows` rows from `row` on, whose queries are q.
struct Strip {
  int64_t row, rows;
  Wide q;
};

// The scores of a strip with a block: written to `t`, rows `width` apart, -inf where a row does not see a column. What
// is returned are the columns that were written, from a whole panel to a whole vector. Without features the scores
// still lack the scale. `slopes`, laid out as t, is as add_features's.
inline Span score(const AttentionShape& s, const AttentionHead& h, const Strip& strip, const Block& block, float* t,
                  int64_t width, float* slopes) {
  const Span seen = seen_by(s, strip.row, strip.row + strip.rows - 1);
  const int64_t begin = larger(seen.begin - block.column, 0), end = smaller(seen.end - block.column, block.n);
  if (begin >= end) return {0, 0};
  const int64_t from = begin / kPanel * kPanel, to = (end + kVector - 1) / kVector * kVector;
  multiply<false, false>(strip.rows, t + from, width, to - from, {strip.q.data, strip.q.width, 1},
                         block.keys + from * s.dim, kPanel * s.dim, s.dim);
  const bool features = has_features(s, h);
  for (int64_t r = 0; r < strip.rows; ++r) {
    float* one = t + r * width;
    const Span mine = seen_by(s, strip.row + r, strip.row + r);
    const int64_t low = smaller(larger(mine.begin - block.column, from), to);
    const int64_t high = larger(smaller(mine.end - block.column, end), low);
    if (features)
      add_features(s, h, strip.row + r, block.column + low, high - low, one + low,
                   slopes == nullptr ? nullptr : slopes + r * width + low);
    for (int64_t c = from; c < low; ++c) one[c] = -__builtin_inff();
    for (int64_t c = high; c < to; ++c) one[c] = -__builtin_inff();
  }
  return {from, to};
}

// What dropout leaves of one row's probabilities, from a multiple of 4 on.
inline void drop_scores(const AttentionShape& s, const AttentionHead& h, int64_t row, int64_t column, int64_t n,
                        float* p) {
  const uint64_t plane = s.dropout->first_row + static_cast<uint64_t>(h.plane);
  drop(p, p, n, *s.dropout, (plane << 32) + static_cast<uint64_t>(row), column);
}

inline Wide from_row(const Wide& x, int64_t row) { return {x.data + row * x.width, x.width}; }

template <class T>
T* take(char*& scratch, int64_t count) {
  T* begin = reinterpret_cast<T*>(scratch);
  scratch += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
  return begin;
}

inline int64_t element_bytes(int dtype) { return dtype == kF32 ? 4 : 2; }

// n rows of x from `row` on, in float32; `room` is for as many in whole panels.
inline Wide widened_from(float* room, int dtype, const AttentionRows& x, int64_t row, int64_t n, int64_t columns) {
  const int64_t stride = x.stride * element_bytes(dtype);
  return widened(room, dtype, static_cast<const char*>(x.data) + row * stride, stride, n, columns);
}

inline void narrow_to(const AttentionRowsOut& x, int dtype, int64_t row, const float* from, int64_t columns) {
  narrow_row(dtype, from, static_cast<char*>(x.data) + row * x.stride * element_bytes(dtype), columns);
}

}  // namespace
}  // namespace fastllm::FASTLLM_ISA
