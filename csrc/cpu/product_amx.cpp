// Compiled for AMX and AVX-512 BF16 whatever the rest is compiled for; see amx_tiles.h.
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

// Columns of a in one block of sums: 12 rows of 32 floats take 24 of the 32 registers.
constexpr int64_t kRows = 12;
static_assert(kPairsColumns % kRows == 0 && kPairsColumns % 16 == 0);

// The first `rows` of 12 rows of total += a (pairs x 12, `across` apart) times b (pairs x 32).
inline void add_block(const Total& total, int64_t rows, int64_t columns, const Pair* a, int64_t across, const Pair* b,
                      int64_t pairs) {
  __m512 sums[kRows][2];
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
  for (int64_t k = 0; k < pairs; ++k) {
    const __m512bh low = reinterpret_cast<__m512bh>(_mm512_load_si512(b + k * kBlock));
    const __m512bh high = reinterpret_cast<__m512bh>(_mm512_load_si512(b + k * kBlock + 16));
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      const __m512bh one = reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(a[k * across + r])));
      sums[r][0] = _mm512_dpbf16_ps(sums[r][0], one, low);
      sums[r][1] = _mm512_dpbf16_ps(sums[r][1], one, high);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r)
    for (int half = 0; half < 2; ++half) {
      const __mmask16 mask = r < rows ? first(columns - 16 * half) : 0;
      float* at = total.data + r * total.stride + 16 * half;
      const __m512 before = _mm512_maskz_loadu_ps(total.first ? 0 : mask, at);
      _mm512_mask_storeu_ps(at, mask, _mm512_add_ps(before, sums[r][half]));
    }
}

}  // namespace

int64_t amx_packed_bytes(int64_t rows, int64_t columns) { return padded(rows) * padded(columns) * 2; }

int64_t amx_product_scratch(int64_t rows) {
  return kProductColumns * padded(rows) * 2 + kBlock * kBlock * static_cast<int64_t>(sizeof(float));
}

int64_t pairs_product_scratch(int64_t rows) { return kPairsColumns * padded(rows) * 2; }

void amx_pack(const Matrix& b, int64_t panel, void* packed) {
  Pair* to = static_cast<Pair*>(packed) + panel * padded(b.rows) / 2 * kBlock;
  for (int64_t r = 0; r < padded(b.rows); r += 2)
    for (int64_t c = 0; c < kBlock; c += 16)
      _mm512_store_si512(to + r / 2 * kBlock + c, pairs_at(b, r, panel * kBlock + c));
}

void amx_add_product(const Total& total, const Matrix& a, int64_t first_column, const Matrix& b, const void* packed,
                     void* scratch) {
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
          float* to = total.data + (first_column + c + r) * total.stride + panel * kBlock + d;
          const __mmask16 mask = first(b.columns - panel * kBlock - d);
          const __m512 sum = _mm512_maskz_loadu_ps(total.first ? 0 : mask, to);
          _mm512_mask_storeu_ps(to, mask, _mm512_add_ps(sum, _mm512_load_ps(block + r * kBlock + d)));
        }
    }
  }
}

void pairs_add_product(const Total& total, const Matrix& a, int64_t first_column, const Matrix& b, const void* packed,
                       void* scratch) {
  const int64_t pairs = padded(a.rows) / 2, left = a.columns - first_column;
  const int64_t columns = left < kPairsColumns ? left : kPairsColumns;
  Pair* rows = static_cast<Pair*>(scratch);  // pairs x kPairsColumns
  for (int64_t p = 0; p < pairs; ++p)
    for (int64_t c = 0; c < kPairsColumns; c += 16)
      _mm512_store_si512(rows + p * kPairsColumns + c, pairs_at(a, 2 * p, first_column + c));
  for (int64_t panel = 0; panel * kBlock < b.columns; ++panel)
    for (int64_t c = 0; c < columns; c += kRows)
      add_block({total.data + (first_column + c) * total.stride + panel * kBlock, total.stride, total.first},
                columns - c, b.columns - panel * kBlock, rows + c, kPairsColumns,
                static_cast<const Pair*>(packed) + panel * pairs * kBlock, pairs);
}

}  // namespace fastllm

#endif  // FASTLLM_AMX
