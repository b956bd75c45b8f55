// total += a^T b of bfloat16 matrices, summed in float32, on the matrix units (AMX) of a CPU.
#pragma once

#include <cstdint>

#include "amx.h"

namespace fastllm {

// Rows of a and b that one product takes; more are taken in turns.
constexpr int64_t kProductDepth = 1024;
// Columns of a that one call of amx_add_product takes.
constexpr int64_t kProductColumns = 128;

struct Matrix {
  const uint16_t* data;
  int64_t stride;  // elements between rows, whose columns lie side by side
  int64_t rows, columns;
};

// Bytes of b's rows as amx_pack leaves them, and of one thread's scratch, both to be aligned to 64.
int64_t amx_packed_bytes(int64_t rows, int64_t columns);
int64_t amx_product_scratch(int64_t rows);

// Packs the 32 columns of b from 32 * panel on.
void amx_pack(const Matrix& b, int64_t panel, void* packed);

// Rows `first` to `first + kProductColumns` of total (a.columns x b.columns, rows `stride` apart) += a^T b.
void amx_add_product(float* total, int64_t stride, const Matrix& a, int64_t first, const Matrix& b, const void* packed,
                     void* scratch);

}  // namespace fastllm
