// Products of 32 x 32 blocks on matrix tiles, for the sources that are compiled for AMX and AVX-512 whatever the rest
// is compiled for. Internal linkage, and nothing of the standard library: the linker could take it for everybody's.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace fastllm {
namespace {

// Matrix tiles hold 16 rows of 64 bytes; every product is of 32 x 32 blocks, four tiles of sums at once.
constexpr int64_t kBlock = 32;

inline int64_t padded(int64_t n) { return (n + kBlock - 1) / kBlock * kBlock; }

// A product's right operand holds rows 2r and 2r + 1 side by side, as pairs of bfloat16 in 32 bits.
using Pair = uint32_t;

template <class T>
inline T* take(char*& scratch, int64_t count) {
  T* begin = reinterpret_cast<T*>(scratch);
  scratch += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
  return begin;
}

inline __mmask16 first(int64_t n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : static_cast<__mmask16>((1u << n) - 1); }
inline __mmask32 first32(int64_t n) { return n >= 32 ? 0xffffffffu : n <= 0 ? 0 : (1u << n) - 1; }

inline __m256i to_bf16(__m512 x) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)); }

inline __m512i paired(__m256i even, __m256i odd) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
}

inline void transpose_16x16(__m512i r[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 16; i += 8)
    for (int j = 0; j < 4; ++j) {
      t[i + j] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0x88);
      t[i + j + 4] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0xdd);
    }
  for (int j = 0; j < 8; ++j) {
    r[j] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0x88);
    r[j + 8] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0xdd);
  }
}

// GCC's tile loads are assembly that does not say what memory it reads: stores before them must be done.
inline void see_memory() { __asm__ volatile("" ::: "memory"); }

// c (32 x 32, rows `to` apart) = a (32 x 32 blocks, rows `along` apart) times b (16 blocks pairs x 32, `across` apart).
inline void multiply(float* c, int64_t to, const uint16_t* a, int64_t along, const Pair* b, int64_t across,
                     int64_t blocks) {
  see_memory();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < blocks; ++k) {
    _tile_loadd(4, a + k * kBlock, along * 2);
    _tile_loadd(6, b + k * 16 * across, across * 4);
    _tile_loadd(7, b + k * 16 * across + 16, across * 4);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a + 16 * along + k * kBlock, along * 2);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, to * 4);
  _tile_stored(1, c + 16, to * 4);
  _tile_stored(2, c + 16 * to, to * 4);
  _tile_stored(3, c + 16 * to + 16, to * 4);
}

}  // namespace
}  // namespace fastllm
