// Compiled for AMX and AVX-512 whatever the rest is compiled for, so it includes nothing that has inline functions of
// the standard library in it: the linker could take those for everybody's.
#include "attention_amx.h"

#if defined(FASTLLM_AMX)

#include "amx_tiles.h"

namespace fastllm {
namespace {

// to (padded rows x columns) = from, zeros around it.
void copy_rows(uint16_t* to, Plane from, int64_t rows, int64_t columns, int64_t width) {
  for (int64_t r = 0; r < padded(rows); ++r)
    for (int64_t c = 0; c < width; c += kBlock) {
      const __mmask32 mask = r < rows ? first32(columns - c) : 0;
      _mm512_store_si512(to + r * width + c, _mm512_maskz_loadu_epi16(mask, from.data + r * from.stride + c));
    }
}

// to (padded rows / 2 x width) = pairs of the rows of `from`, which copy_rows made.
void pair_rows(Pair* to, const uint16_t* from, int64_t rows, int64_t width) {
  for (int64_t r = 0; r < rows; r += 2)
    for (int64_t c = 0; c < width; c += 16) {
      const auto even = _mm256_load_si256(reinterpret_cast<const __m256i*>(from + r * width + c));
      const auto odd = _mm256_load_si256(reinterpret_cast<const __m256i*>(from + (r + 1) * width + c));
      _mm512_store_si512(to + r / 2 * width + c, paired(even, odd));
    }
}

// to (columns x rows) = from (rows x columns) transposed, both multiples of 16.
void transpose(Pair* to, const Pair* from, int64_t rows, int64_t columns) {
  __m512i block[16];
  for (int64_t r = 0; r < rows; r += 16)
    for (int64_t c = 0; c < columns; c += 16) {
      for (int i = 0; i < 16; ++i) block[i] = _mm512_load_si512(from + (r + i) * columns + c);
      transpose_16x16(block);
      for (int i = 0; i < 16; ++i) _mm512_store_si512(to + (c + i) * rows + r, block[i]);
    }
}

// 2^x; relative error below 2e-7 for x in [-126, 0], NaN and infinities as they should be.
__m512 exp2(__m512 x) {
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  // x - whole is NaN for -inf, whose power is 0.
  const __m512 part = _mm512_maskz_sub_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(-1e30f), _CMP_NLT_UQ), x, whole);
  // Taylor's series of 2^part, |part| <= 1/2: ln(2)^n / n!.
  __m512 y = _mm512_set1_ps(1.5403530e-4f);
  constexpr float kFactors[] = {1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.0f};
  for (const float factor : kFactors) y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(factor));
  return _mm512_scalef_ps(y, whole);
}

// Scores of one query: 2^(t - max) into `t`, zeros where keys are hidden or there are none. Returns their sum.
float soften(float* t, int64_t seen, int64_t width, float scale) {
  const __m512 lowest = _mm512_set1_ps(-__builtin_inff());
  __m512 most = lowest;
  for (int64_t c = 0; c < seen; c += 16)
    most = _mm512_max_ps(_mm512_mask_loadu_ps(lowest, first(seen - c), t + c), most);
  // A negative scale turns the order around.
  __m512 least = _mm512_set1_ps(__builtin_inff());
  if (scale < 0)
    for (int64_t c = 0; c < seen; c += 16)
      least = _mm512_min_ps(_mm512_mask_loadu_ps(least, first(seen - c), t + c), least);
  const __m512 factor = _mm512_set1_ps(scale * 1.44269504f);  // log2(e)
  // Taken off before the product, so that the largest weight is exactly 1.
  const __m512 top = _mm512_set1_ps(scale < 0 ? _mm512_reduce_min_ps(least) : _mm512_reduce_max_ps(most));
  __m512 sum = _mm512_setzero_ps();
  for (int64_t c = 0; c < width; c += 16) {
    const __mmask16 mask = first(seen - c);
    const __m512 x = _mm512_mul_ps(_mm512_sub_ps(_mm512_load_ps(t + c), top), factor);
    const __m512 y = _mm512_maskz_mov_ps(mask, exp2(x));
    _mm512_store_ps(t + c, y);
    sum = _mm512_add_ps(sum, y);
  }
  return _mm512_reduce_add_ps(sum);
}

int64_t seen_by(const PlaneShape& s, int64_t query) {
  return s.causal && query + 1 < s.keys ? query + 1 : s.keys;
}

// Columns that some query of the 32 from `query` on sees, in whole blocks.
int64_t width_of(const PlaneShape& s, int64_t query) { return padded(seen_by(s, query + kBlock - 1)); }

// Rows of a 32 x 32 block of sums, times `factors` by row, as bfloat16 where there are rows and columns for them.
void write_rows(PlaneOut to, int64_t row, int64_t rows, int64_t column, int64_t columns, const float* block,
                const float* factors) {
  for (int64_t r = 0; r < kBlock && row + r < rows; ++r)
    for (int64_t c = 0; c < kBlock; c += 16) {
      const __m512 x = _mm512_mul_ps(_mm512_load_ps(block + r * kBlock + c), _mm512_set1_ps(factors[r]));
      const __mmask16 mask = first(columns - column - c);
      _mm256_mask_storeu_epi16(to.data + (row + r) * to.stride + column + c, mask, to_bf16(x));
    }
}

// The same of a block that holds columns as rows.
void write_columns(PlaneOut to, int64_t row, int64_t rows, int64_t column, int64_t columns, const float* block) {
  __m512i part[16];
  for (int64_t r = 0; r < kBlock; r += 16)
    for (int64_t c = 0; c < kBlock; c += 16) {
      for (int i = 0; i < 16; ++i) part[i] = _mm512_load_si512(block + (c + i) * kBlock + r);
      transpose_16x16(part);
      const __mmask16 mask = first(columns - column - c);
      for (int64_t i = 0; i < 16 && row + r + i < rows; ++i)
        _mm256_mask_storeu_epi16(to.data + (row + r + i) * to.stride + column + c, mask,
                                 to_bf16(_mm512_castsi512_ps(part[i])));
    }
}

struct Forward {
  uint16_t *q, *rows, *p;
  Pair *keys, *values;
  float *t, *block;

  Forward(const PlaneShape& s, char* scratch) {
    const int64_t queries = padded(s.queries), count = padded(s.keys), width = padded(s.columns);
    q = take<uint16_t>(scratch, queries * width);
    rows = take<uint16_t>(scratch, count * width);
    keys = take<Pair>(scratch, width / 2 * count);
    values = take<Pair>(scratch, count / 2 * width);
    t = take<float>(scratch, kBlock * count);
    p = take<uint16_t>(scratch, kBlock * count);
    block = take<float>(scratch, kBlock * kBlock);
    end = scratch;
  }

  char* end;
};

struct Backward {
  uint16_t *q, *dout, *rows, *q_turned, *dout_turned, *ds;
  Pair *keys, *keys_turned, *values_turned, *pairs, *p_pairs, *ds_pairs;
  float *t, *dp, *block;

  Backward(const PlaneShape& s, char* scratch) {
    const int64_t queries = padded(s.queries), count = padded(s.keys), width = padded(s.columns);
    const int64_t most = queries > count ? queries : count;
    q = take<uint16_t>(scratch, queries * width);
    dout = take<uint16_t>(scratch, queries * width);
    q_turned = take<uint16_t>(scratch, queries * width);
    dout_turned = take<uint16_t>(scratch, queries * width);
    rows = take<uint16_t>(scratch, count * width);
    keys = take<Pair>(scratch, count / 2 * width);
    keys_turned = take<Pair>(scratch, width / 2 * count);
    values_turned = take<Pair>(scratch, width / 2 * count);
    pairs = take<Pair>(scratch, most / 2 * width);
    p_pairs = take<Pair>(scratch, queries / 2 * count);
    ds_pairs = take<Pair>(scratch, queries / 2 * count);
    t = take<float>(scratch, kBlock * count);
    dp = take<float>(scratch, kBlock * count);
    ds = take<uint16_t>(scratch, kBlock * count);
    block = take<float>(scratch, kBlock * kBlock);
    end = scratch;
  }

  char* end;
};

const float kOnes[kBlock] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
                             1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

// Where scratch is laid out only to be measured.
char* const kNowhere = reinterpret_cast<char*>(uintptr_t{64});

}  // namespace

int64_t amx_forward_scratch(const PlaneShape& s) { return Forward(s, kNowhere).end - kNowhere; }
int64_t amx_backward_scratch(const PlaneShape& s) { return Backward(s, kNowhere).end - kNowhere; }

void amx_forward(const PlaneShape& s, Plane q, Plane k, Plane v, PlaneOut out, void* scratch) {
  const Forward w(s, static_cast<char*>(scratch));
  const int64_t count = padded(s.keys), width = padded(s.columns);
  copy_rows(w.q, q, s.queries, s.columns, width);
  copy_rows(w.rows, k, s.keys, s.columns, width);
  transpose(w.keys, reinterpret_cast<const Pair*>(w.rows), count, width / 2);
  copy_rows(w.rows, v, s.keys, s.columns, width);
  pair_rows(w.values, w.rows, count, width);
  for (int64_t i = 0; i < s.queries; i += kBlock) {
    const int64_t seen = width_of(s, i);
    for (int64_t j = 0; j < seen; j += kBlock)
      multiply(w.t + j, count, w.q + i * width, width, w.keys + j, count, width / kBlock);
    float factors[kBlock];
    for (int64_t r = 0; r < kBlock; ++r) {
      float* t = w.t + r * count;
      factors[r] = 1 / soften(t, seen_by(s, i + r), seen, s.scale);
      for (int64_t c = 0; c < seen; c += 16)
        _mm256_store_si256(reinterpret_cast<__m256i*>(w.p + r * count + c), to_bf16(_mm512_load_ps(t + c)));
    }
    for (int64_t c = 0; c < width; c += kBlock) {
      multiply(w.block, kBlock, w.p, count, w.values + c, width, seen / kBlock);
      write_rows(out, i, s.queries, c, s.columns, w.block, factors);
    }
  }
}

void amx_backward(const PlaneShape& s, Plane dout, Plane q, Plane k, Plane v, PlaneOut dq, PlaneOut dk, PlaneOut dv,
                  void* scratch) {
  const Backward w(s, static_cast<char*>(scratch));
  const int64_t queries = padded(s.queries), count = padded(s.keys), width = padded(s.columns);
  copy_rows(w.q, q, s.queries, s.columns, width);
  pair_rows(w.pairs, w.q, queries, width);
  transpose(reinterpret_cast<Pair*>(w.q_turned), w.pairs, queries / 2, width);
  copy_rows(w.dout, dout, s.queries, s.columns, width);
  pair_rows(w.pairs, w.dout, queries, width);
  transpose(reinterpret_cast<Pair*>(w.dout_turned), w.pairs, queries / 2, width);
  copy_rows(w.rows, v, s.keys, s.columns, width);
  transpose(w.values_turned, reinterpret_cast<const Pair*>(w.rows), count, width / 2);
  copy_rows(w.rows, k, s.keys, s.columns, width);
  transpose(w.keys_turned, reinterpret_cast<const Pair*>(w.rows), count, width / 2);
  pair_rows(w.keys, w.rows, count, width);

  // By queries: the softmax p and the scores' gradient ds = p (dp - sum(p dp)) scale, kept in pairs; dq = ds k.
  for (int64_t i = 0; i < queries; i += kBlock) {
    const int64_t seen = width_of(s, i);
    for (int64_t j = 0; j < seen; j += kBlock) {
      multiply(w.t + j, count, w.q + i * width, width, w.keys_turned + j, count, width / kBlock);
      multiply(w.dp + j, count, w.dout + i * width, width, w.values_turned + j, count, width / kBlock);
    }
    for (int64_t r = 0; r < kBlock; r += 2) {
      __m512 inverse[2], delta[2];
      for (int64_t h = 0; h < 2; ++h) {
        float *t = w.t + (r + h) * count, *dp = w.dp + (r + h) * count;
        inverse[h] = _mm512_set1_ps(1 / soften(t, seen_by(s, i + r + h), seen, s.scale));
        __m512 sum = _mm512_setzero_ps();
        for (int64_t c = 0; c < seen; c += 16)
          sum = _mm512_fmadd_ps(_mm512_load_ps(t + c), _mm512_load_ps(dp + c), sum);
        delta[h] = _mm512_mul_ps(_mm512_set1_ps(_mm512_reduce_add_ps(sum)), inverse[h]);
      }
      for (int64_t c = 0; c < seen; c += 16) {
        __m256i p[2], ds[2];
        for (int64_t h = 0; h < 2; ++h) {
          const __m512 weight = _mm512_mul_ps(_mm512_load_ps(w.t + (r + h) * count + c), inverse[h]);
          const __m512 slope = _mm512_sub_ps(_mm512_load_ps(w.dp + (r + h) * count + c), delta[h]);
          p[h] = to_bf16(weight);
          ds[h] = to_bf16(_mm512_mul_ps(_mm512_mul_ps(weight, slope), _mm512_set1_ps(s.scale)));
          _mm256_store_si256(reinterpret_cast<__m256i*>(w.ds + (r + h) * count + c), ds[h]);
        }
        _mm512_store_si512(w.p_pairs + (i + r) / 2 * count + c, paired(p[0], p[1]));
        _mm512_store_si512(w.ds_pairs + (i + r) / 2 * count + c, paired(ds[0], ds[1]));
      }
    }
    for (int64_t c = 0; c < width; c += kBlock) {
      multiply(w.block, kBlock, w.ds, count, w.keys + c, width, seen / kBlock);
      write_rows(dq, i, s.queries, c, s.columns, w.block, kOnes);
    }
  }

  // By keys: dv^T = dout^T p and dk^T = q^T ds, from the first query that sees one of them.
  for (int64_t j = 0; j < count; j += kBlock) {
    const int64_t from = s.causal && j < queries ? j : 0;
    const int64_t blocks = s.causal && j >= queries ? 0 : (queries - from) / kBlock;
    for (int64_t c = 0; c < width; c += kBlock) {
      multiply(w.block, kBlock, w.dout_turned + c * queries + from, queries, w.p_pairs + from / 2 * count + j, count,
               blocks);
      write_columns(dv, j, s.keys, c, s.columns, w.block);
      multiply(w.block, kBlock, w.q_turned + c * queries + from, queries, w.ds_pairs + from / 2 * count + j, count,
               blocks);
      write_columns(dk, j, s.keys, c, s.columns, w.block);
    }
  }
}

}  // namespace fastllm

#endif  // FASTLLM_AMX
