// Compiled for AMX and AVX-512 whatever the rest is compiled for; see amx_tiles.h.
#include "product_amx.h"

#if defined(FASTLLM_AMX)

#include "amx_tiles.h"

namespace fastllm {
namespace {

// Pairs of rows 2i and 2i + 1 from `row` on, columns `column` to column + 15; zeros past the matrix.
inline __m512i pairs_at(const Matrix& m, int64_t row, int64_t column) {
  const __mmask16 mask = first(m.columns - column);
  const uint16_t* even = m.data + row * m.stride + column;
  const __m256i a = _mm256_maskz_loadu_epi16(row < m.rows ? mask : 0, even);
  const __m256i b = _mm256_maskz_loadu_epi16(row + 1 < m.rows ? mask : 0, even + m.stride);
  return paired(a, b);
}

}  // namespace

int64_t amx_packed_bytes(int64_t rows, int64_t columns) { return padded(rows) * padded(columns) * 2; }

int64_t amx_product_scratch(int64_t rows) {
  return kProductColumns * padded(rows) * 2 + kBlock * kBlock * static_cast<int64_t>(sizeof(float));
}

void amx_pack(const Matrix& b, int64_t panel, void* packed) {
  Pair* to = static_cast<Pair*>(packed) + panel * padded(b.rows) / 2 * kBlock;
  for (int64_t r = 0; r < padded(b.rows); r += 2)
    for (int64_t c = 0; c < kBlock; c += 16)
      _mm512_store_si512(to + r / 2 * kBlock + c, pairs_at(b, r, panel * kBlock + c));
}

void amx_add_product(float* total, int64_t stride, const Matrix& a, int64_t first_column, const Matrix& b,
                     const void* packed, void* scratch) {
  const int64_t depth = padded(a.rows);
  const int64_t columns = a.columns - first_column < kProductColumns ? a.columns - first_column : kProductColumns;
  uint16_t* turned = static_cast<uint16_t*>(scratch);  // columns x depth
  float* block = reinterpret_cast<float*>(turned + kProductColumns * depth);
  __m512i part[16];
  for (int64_t r = 0; r < depth; r += kBlock)
    for (int64_t c = 0; c < padded(columns); c += 16) {
      for (int64_t i = 0; i < 16; ++i) part[i] = pairs_at(a, r + 2 * i, first_column + c);
      transpose_16x16(part);
      for (int64_t i = 0; i < 16; ++i) _mm512_store_si512(turned + (c + i) * depth + r, part[i]);
    }
  for (int64_t panel = 0; panel * kBlock < b.columns; ++panel) {
    const Pair* pairs = static_cast<const Pair*>(packed) + panel * depth / 2 * kBlock;
    for (int64_t c = 0; c < columns; c += kBlock) {
      multiply(block, kBlock, turned + c * depth, depth, pairs, kBlock, depth / kBlock);
      see_memory();
      for (int64_t r = 0; r < kBlock && c + r < columns; ++r)
        for (int64_t d = 0; d < kBlock; d += 16) {
          float* to = total + (first_column + c + r) * stride + panel * kBlock + d;
          const __mmask16 mask = first(b.columns - panel * kBlock - d);
          const __m512 sum = _mm512_maskz_loadu_ps(mask, to);
          _mm512_mask_storeu_ps(to, mask, _mm512_add_ps(sum, _mm512_load_ps(block + r * kBlock + d)));
        }
    }
  }
}

}  // namespace fastllm

#endif  // FASTLLM_AMX
