// total += a^T b of bfloat16 matrices, summed in float32: on the matrix units (AMX) of a CPU, or by its vector units'
// products of pairs of bfloat16, which take as long as oneDNN's products that are rounded to bfloat16 (one core of an
// AMD EPYC of the fourth generation, 631 x 8192 x 512: 0.93 of its time, 0.44 of a product in float32).
#pragma once

#include <cstdint>

#include "amx.h"

namespace fastllm {

// Rows of a and b that one product takes; more are taken in turns.
constexpr int64_t kProductDepth = 1024;
// Columns of a that one call of amx_add_product takes, and of pairs_add_product.
constexpr int64_t kProductColumns = 128;
constexpr int64_t kPairsColumns = 96;

struct Matrix {
  const uint16_t* data;
  int64_t stride;  // elements between rows, whose columns lie side by side
  int64_t rows, columns;
};

// What a product is added to: rows `stride` apart, overwritten where it is the `first`.
struct Total {
  float* data;
  int64_t stride;
  bool first;
};

// Bytes of b's rows as amx_pack leaves them, and of one thread's scratch, both to be aligned to 64.
int64_t amx_packed_bytes(int64_t rows, int64_t columns);
int64_t amx_product_scratch(int64_t rows);

int64_t pairs_product_scratch(int64_t rows);

// Packs the 32 columns of b from 32 * panel on.
void amx_pack(const Matrix& b, int64_t panel, void* packed);

// Rows `column` to `column + kProductColumns` of total (a.columns x b.columns) += a^T b.
void amx_add_product(const Total& total, const Matrix& a, int64_t column, const Matrix& b, const void* packed,
                     void* scratch);
// The same of `column` to `column + kPairsColumns`.
void pairs_add_product(const Total& total, const Matrix& a, int64_t column, const Matrix& b, const void* packed,
                       void* scratch);

}  // namespace fastllm
