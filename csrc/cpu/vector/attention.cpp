// Built once per instruction set, like rows.cpp. Dao 2023 (FlashAttention-2): the scores of a few rows with a block of
// keys are in a cache, and no others.
#include "attention.h"

namespace fastllm::FASTLLM_ISA {
namespace {

struct Forward {
  int64_t block, width, dim, dim_v;
  float *q, *out, *keys, *values, *rows, *t, *most, *sum;
  char* end;

  Forward(const AttentionShape& s, int64_t n, char* scratch)
      : block(block_of(s)), width(score_width(block)), dim(in_panels(s.dim)), dim_v(in_panels(s.dim_v)) {
    q = take<float>(scratch, n * dim);
    out = take<float>(scratch, n * dim_v);
    keys = take<float>(scratch, block * s.dim);
    values = take<float>(scratch, block * dim_v);
    rows = take<float>(scratch, block * larger(dim, dim_v));
    t = take<float>(scratch, kTileRows * width);
    most = take<float>(scratch, n);
    sum = take<float>(scratch, n);
    end = scratch;
  }
};

// t = exp(t * scale - top) for n numbers, whole vectors; their sum.
float soften(float* t, int64_t n, float scale, float top) {
  Vector sum{};
  for (int64_t c = 0; c < n; c += kVector) {
    const Vector p = exp_to_89(load(t + c) * scale - top);
    store(t + c, p);
    sum += p;
  }
  return sum_of(sum);
}

float largest_score(const float* t, int64_t n) {
  Vector most = all(-__builtin_inff());
  for (int64_t c = 0; c < n; c += kVector) {
    const Vector x = load(t + c);
    most = x > most ? x : most;
  }
  return largest_of(most);
}

void forward(const AttentionShape& s, const AttentionHead& h, const AttentionOutput& o, int64_t first, int64_t last,
             void* scratch) {
  const int64_t n = last - first;
  const Forward f(s, n, static_cast<char*>(scratch));
  const float scale = has_features(s, h) ? 1.0f : s.scale;
  const Wide q = widened_from(f.q, s.dtype, h.q, first, n, s.dim);
  __builtin_memset(f.out, 0, static_cast<size_t>(n * f.dim_v) * sizeof(float));
  for (int64_t r = 0; r < n; ++r) {
    f.most[r] = h.sink;  // a column without a value
    f.sum[r] = h.sink == -__builtin_inff() ? 0.0f : 1.0f;
  }
  const Span seen = seen_by(s, first, last - 1);
  for (int64_t column = seen.begin / f.block * f.block; column < seen.end; column += f.block) {
    const Block block{column, smaller(f.block, s.columns - column), f.keys};
    pack_turned(f.keys, widened_from(f.rows, s.dtype, h.k, column, block.n, s.dim), block.n, s.dim);
    pack(f.values, widened_from(f.rows, s.dtype, h.v, column, block.n, s.dim_v), block.n, s.dim_v);
    for (int64_t row = 0; row < n; row += kTileRows) {
      const Strip strip{first + row, smaller(kTileRows, n - row), from_row(q, row)};
      const Span span = score(s, h, strip, block, f.t, f.width, nullptr);
      const int64_t count = span.end - span.begin;
      if (count == 0) continue;
      for (int64_t r = row; r < row + strip.rows; ++r) {
        float* t = f.t + (r - row) * f.width + span.begin;
        const float before = f.most[r], here = largest_score(t, count) * scale, most = here > before ? here : before;
        const float top = most == -__builtin_inff() ? 0.0f : most;
        const float sum = soften(t, count, scale, top);
        if (s.dropout != nullptr) drop_scores(s, h, first + r, column + span.begin, count, t);
        if (most != before) {
          const float factor = exp_(before - top);
          float* __restrict out = f.out + r * f.dim_v;
          f.sum[r] *= factor;
          for (int64_t c = 0; c < f.dim_v; ++c) out[c] *= factor;
        }
        f.sum[r] += sum;
        f.most[r] = most;
      }
      multiply<true, false>(strip.rows, f.out + row * f.dim_v, f.dim_v, s.dim_v, {f.t + span.begin, f.width, 1},
                            f.values + span.begin * kPanel, block.n * kPanel, smaller(span.end, block.n) - span.begin);
    }
  }
  for (int64_t r = 0; r < n; ++r) {
    const bool empty = f.sum[r] == 0.0f;
    const float sum = empty ? 1.0f : f.sum[r], most = empty ? 0.0f : f.most[r], log = log_(sum);
    float* __restrict out = f.out + r * f.dim_v;
    for (int64_t c = 0; c < f.dim_v; ++c) out[c] /= sum;
    narrow_to(o.out, s.dtype, first + r, out, s.dim_v);
    o.max.at(first + r) = most;
    o.log.at(first + r) = empty ? __builtin_inff() : log;
    o.lse.at(first + r) = empty ? -__builtin_inff() : most + log;
  }
}

int64_t forward_bytes(const AttentionShape& s, int64_t rows) {
  return Forward(s, rows, nullptr).end - static_cast<char*>(nullptr);
}

}  // namespace

extern const AttentionKernels attention_kernels;
const AttentionKernels attention_kernels = {forward, forward_bytes};

}  // namespace fastllm::FASTLLM_ISA
