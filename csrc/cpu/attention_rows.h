// Attention of one head in float32, built once per vector instruction set.
#pragma once

#include <cstdint>

#include "../order.h"

namespace fastllm {

// What all heads share. The dtypes are rows.h's; a boolean bias is bytes.
struct AttentionShape {
  int64_t rows, columns, dim, dim_v;
  float scale, softcap;    // softcap 0: none
  int64_t left, right;     // row i sees columns i + offset - left to i + offset + right; -1: unbounded
  int64_t offset;
  int dtype;
  bool boolean;            // the bias hides where it is 0, else it is float32 and added
  const Dropout* dropout;  // null: none
};

// The rows of a matrix, `stride` elements apart, columns side by side.
struct AttentionRows {
  const void* data;
  int64_t stride;
};
struct AttentionRowsOut {
  void* data;
  int64_t stride;
};

// An element of `stride`d rows and columns, or of broadcast ones, whose stride is 0.
struct AttentionBias {
  const void* data;  // null: none
  int64_t row, column;
};

struct AttentionHead {
  AttentionRows q, k, v;
  AttentionBias bias;
  float slope;     // ALiBi's: 0 for none
  float sink;      // -inf for none
  int64_t plane;   // batch * heads + head, for dropout
};

// One number a row, `stride` apart.
struct AttentionColumn {
  float* data;
  int64_t stride;
  float& at(int64_t row) const { return data[row * stride]; }
};

// lse = max + log; a row that sees nothing has lse -inf, max 0 and log inf.
struct AttentionOutput {
  AttentionRowsOut out;
  AttentionColumn lse, max, log;
};

struct AttentionUpstream {
  AttentionRows out, dout;
  AttentionColumn dlse;  // data null: none
  AttentionColumn max, log;
};

// Null data: not wanted. dk and dv are of dkv_dtype, which need not be the shape's. dbias, float32, is added to. delta,
// a number a row, is always written: the sum of dout * out less dlse; 0 where a row sees nothing.
struct AttentionGradient {
  AttentionRowsOut dq, dk, dv;
  int dkv_dtype;
  float* dbias;
  int64_t dbias_row, dbias_column;
  AttentionColumn delta;
};

// Rows first to last - 1 of a head; `scratch` holds forward_bytes(shape, last - first).
struct AttentionKernels {
  void (*forward)(const AttentionShape&, const AttentionHead&, const AttentionOutput&, int64_t first, int64_t last,
                  void* scratch);
  int64_t (*forward_bytes)(const AttentionShape&, int64_t rows);
};

struct AttentionGradKernels {
  void (*backward)(const AttentionShape&, const AttentionHead&, const AttentionUpstream&, const AttentionGradient&,
                   void* scratch);
  int64_t (*backward_bytes)(const AttentionShape&);
};

const AttentionKernels& attention_kernels();
const AttentionGradKernels& attention_grad_kernels();

}  // namespace fastllm
