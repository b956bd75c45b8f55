// Built once per instruction set, like rows.cpp. The scores are computed again, block by block; a head is one thread's.
#include "attention.h"

namespace fastllm::FASTLLM_ISA {
namespace {

// Rows in a block of scores: over so many run the products that give dk and dv.
constexpr int64_t kRows = 96;

struct Backward {
  int64_t block, width, dim, dim_v;
  Wide q, dout;  // read_rows() sets them
  float *q_room, *dout_room, *q_panels, *dout_panels, *dq, *most, *log, *delta;
  float *rows, *keys_turned, *values_turned, *keys, *dk, *dv, *p, *ds, *slopes;
  char* end;

  Backward(const AttentionShape& s, char* scratch)
      : block(smaller(128, block_of(s))), width(score_width(block)), dim(in_panels(s.dim)), dim_v(in_panels(s.dim_v)) {
    q_room = take<float>(scratch, s.rows * dim);
    dout_room = take<float>(scratch, s.rows * dim_v);
    q_panels = take<float>(scratch, s.rows * dim);
    dout_panels = take<float>(scratch, s.rows * dim_v);
    dq = take<float>(scratch, s.rows * dim);
    most = take<float>(scratch, s.rows);
    log = take<float>(scratch, s.rows);
    delta = take<float>(scratch, s.rows);
    rows = take<float>(scratch, block * larger(dim, dim_v));
    keys_turned = take<float>(scratch, block * s.dim);
    values_turned = take<float>(scratch, block * s.dim_v);
    keys = take<float>(scratch, block * dim);
    dk = take<float>(scratch, block * dim);
    dv = take<float>(scratch, block * dim_v);
    p = take<float>(scratch, kRows * width);
    ds = take<float>(scratch, kRows * width);
    slopes = take<float>(scratch, kTileRows * width);
    end = scratch;
  }
};

// The rows that see some of the columns from `first` to `last`.
Span seeing(const AttentionShape& s, int64_t first, int64_t last) {
  Span span{0, s.rows};
  if (s.right >= 0) span.begin = larger(0, first - s.offset - s.right);
  if (s.left >= 0) span.end = smaller(s.rows, last - s.offset + s.left + 1);
  return span;
}

float dot(const float* a, const float* b, int64_t n) {
  Vector sum{};
  for (int64_t c = 0; c < n; c += kVector) sum = multiply_add(load(a + c), load(b + c), sum);
  return sum_of(sum);
}

// What a head's blocks all read: rows in float32, as they are and in panels of kRows rows; delta.
void read_rows(const AttentionShape& s, const AttentionHead& h, const AttentionUpstream& u, const AttentionGradient& g,
               Backward& b) {
  b.q = widened_from(b.q_room, s.dtype, h.q, 0, s.rows, s.dim);
  b.dout = widened_from(b.dout_room, s.dtype, u.dout, 0, s.rows, s.dim_v);
  for (int64_t row = 0; row < s.rows; row += kRows) {
    const int64_t n = smaller(kRows, s.rows - row);
    pack(b.q_panels + row * b.dim, from_row(b.q, row), n, s.dim);
    pack(b.dout_panels + row * b.dim_v, from_row(b.dout, row), n, s.dim_v);
  }
  for (int64_t r = 0; r < s.rows; ++r) {
    b.most[r] = u.max.at(r);
    b.log[r] = u.log.at(r);
    const Wide out = widened_from(b.rows, s.dtype, u.out, r, 1, s.dim_v);
    const float along =
        dot(out.data, from_row(b.dout, r).data, b.dim_v) - (u.dlse.data == nullptr ? 0.0f : u.dlse.at(r));
    b.delta[r] = b.log[r] == __builtin_inff() ? 0.0f : along;
    g.delta.at(r) = b.delta[r];
  }
}

void clear(float* x, int64_t n) { __builtin_memset(x, 0, static_cast<size_t>(n) * sizeof(float)); }

void clear_outside(float* x, const Span& span, int64_t n) {
  clear(x, span.begin);
  clear(x + span.end, n - span.end);
}

// The probabilities of a strip with a block, and the gradient of its products q k: p and ds, zeros where nothing is
// seen. Adds ds k to dq.
void differentiate(const AttentionShape& s, const AttentionHead& h, const AttentionGradient& g, const Backward& b,
                   const Strip& strip, const Block& block, float* p, float* ds) {
  const Span span = score(s, h, strip, block, p, b.width, b.slopes);
  const int64_t count = span.end - span.begin;
  for (int64_t r = 0; r < strip.rows; ++r) {
    clear_outside(p + r * b.width, span, b.width);
    clear_outside(ds + r * b.width, span, b.width);
  }
  if (count == 0) return;
  multiply<false, false>(strip.rows, ds + span.begin, b.width, count,
                         {from_row(b.dout, strip.row).data, b.dout.width, 1}, b.values_turned + span.begin * s.dim_v,
                         kPanel * s.dim_v, s.dim_v);
  const float scale = has_features(s, h) ? 1.0f : s.scale;
  for (int64_t r = 0; r < strip.rows; ++r) {
    const int64_t row = strip.row + r, column = block.column + span.begin;
    float *weights = p + r * b.width + span.begin, *grads = ds + r * b.width + span.begin;
    const float* slopes = b.slopes + r * b.width + span.begin;
    if (s.dropout != nullptr) drop_scores(s, h, row, column, count, grads);
    const float most = b.most[row], log = b.log[row], delta = b.delta[row];
    for (int64_t c = 0; c < count; c += kVector) {
      const Vector weight = exp_to_89(load(weights + c) * scale - most - log);
      store(weights + c, weight);
      store(grads + c, (load(grads + c) - delta) * weight);
    }
    if (s.dropout != nullptr) drop_scores(s, h, row, column, count, weights);
    if (g.dbias != nullptr) {
      float* dbias = g.dbias + row * g.dbias_row + column * g.dbias_column;
      const int64_t there = smaller(count, s.columns - column);
      for (int64_t c = 0; c < there; ++c) dbias[c * g.dbias_column] += grads[c];
    }
    if (s.softcap > 0)
      for (int64_t c = 0; c < count; ++c) grads[c] = grads[c] == 0.0f ? 0.0f : grads[c] * slopes[c];
    for (int64_t c = 0; c < count; ++c) grads[c] *= s.scale;
  }
  if (g.dq.data != nullptr)
    multiply<true, false>(strip.rows, b.dq + strip.row * b.dim, b.dim, s.dim, {ds + span.begin, b.width, 1},
                          b.keys + span.begin * kPanel, block.n * kPanel, smaller(span.end, block.n) - span.begin);
}

// to (columns of the block x width) += x^T from, where x holds the scores' rows from `row` on, n of them.
void collect(const AttentionShape& s, const Backward& b, const Block& block, int64_t row, int64_t n, const float* x,
             const float* from, float* to, int64_t width, int64_t columns) {
  for (int64_t c = 0; c < block.n; c += kTileRows) {
    const int64_t some = smaller(kTileRows, block.n - c);
    const Span rows = seeing(s, block.column + c, block.column + c + some - 1);
    const int64_t begin = larger(rows.begin - row, 0), end = smaller(rows.end - row, n);
    if (begin < end)
      multiply<true, true>(some, to + c * width, width, columns, {x + begin * b.width + c, 1, b.width},
                           from + begin * kPanel, n * kPanel, end - begin);
  }
}

void backward(const AttentionShape& s, const AttentionHead& h, const AttentionUpstream& u, const AttentionGradient& g,
              void* scratch) {
  Backward b(s, static_cast<char*>(scratch));
  read_rows(s, h, u, g, b);
  clear(b.dq, s.rows * b.dim);
  for (int64_t column = 0; column < s.columns; column += b.block) {
    const Block block{column, smaller(b.block, s.columns - column), b.keys_turned};
    clear(b.dk, block.n * b.dim);
    clear(b.dv, block.n * b.dim_v);
    const Span rows = seeing(s, column, column + block.n - 1);
    if (rows.begin < rows.end) {
      const Wide keys = widened_from(b.rows, s.dtype, h.k, column, block.n, s.dim);
      pack(b.keys, keys, block.n, s.dim);
      pack_turned(b.keys_turned, keys, block.n, s.dim);
      pack_turned(b.values_turned, widened_from(b.rows, s.dtype, h.v, column, block.n, s.dim_v), block.n, s.dim_v);
    }
    for (int64_t row = rows.begin / kRows * kRows; row < rows.end; row += kRows) {
      const int64_t n = smaller(kRows, s.rows - row);
      for (int64_t r = 0; r < n; r += kTileRows) {
        const Strip strip{row + r, smaller(kTileRows, n - r), from_row(b.q, row + r)};
        differentiate(s, h, g, b, strip, block, b.p + r * b.width, b.ds + r * b.width);
      }
      if (g.dv.data != nullptr)
        collect(s, b, block, row, n, b.p, b.dout_panels + row * b.dim_v, b.dv, b.dim_v, s.dim_v);
      if (g.dk.data != nullptr) collect(s, b, block, row, n, b.ds, b.q_panels + row * b.dim, b.dk, b.dim, s.dim);
    }
    for (int64_t c = 0; c < block.n; ++c) {
      if (g.dk.data != nullptr) narrow_to(g.dk, g.dkv_dtype, column + c, b.dk + c * b.dim, s.dim);
      if (g.dv.data != nullptr) narrow_to(g.dv, g.dkv_dtype, column + c, b.dv + c * b.dim_v, s.dim_v);
    }
  }
  if (g.dq.data != nullptr)
    for (int64_t r = 0; r < s.rows; ++r) narrow_to(g.dq, s.dtype, r, b.dq + r * b.dim, s.dim);
}

int64_t backward_bytes(const AttentionShape& s) { return Backward(s, nullptr).end - static_cast<char*>(nullptr); }

}  // namespace

extern const AttentionGradKernels attention_grad_kernels;
const AttentionGradKernels attention_grad_kernels = {backward, backward_bytes};

}  // namespace fastllm::FASTLLM_ISA
