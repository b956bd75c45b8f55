// What fixes the order of every sum and the place of every random number, shared by the CPU and CUDA code: both give
// the same bits.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FASTLLM_HD __host__ __device__ __forceinline__
#else
#define FASTLLM_HD inline
#endif

namespace fastllm {

// Dropout with probability p. A mask has 64-bit rows, counted from `first_row` on: of a tensor the rows along its last
// dimension, of attention's probabilities (batch * heads + head) * 2^32 + query. Word j % 4 of Philox with the key and
// the counter (j / 4, row's low word, row's high word, 0) decides on element j of a row.
struct Dropout {
  uint64_t key;
  uint64_t first_row;
  double p;
};

// Internal linkage: these are compiled for several instruction sets, and a merged copy would run with the wrong one.
namespace {

// A segment is the rows that one id gathered, in the order of their positions. Each run of kChunk rows is summed from
// its first row on to a part, each run of kChunk parts to a group, and the groups from the first on. So a long segment
// can be shared among thread blocks, and its rounding errors grow with a small power of its length.
constexpr int64_t kChunk = 64;

// Philox 4x32-10 (Salmon et al. 2011): four 32-bit random words that are a pure function of key and counter.
struct Philox4 {
  uint32_t word[4];
};

FASTLLM_HD Philox4 philox_at(uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32), c3 = 0;
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(0xD2511F53u) * c0;
    const uint64_t p1 = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    const uint32_t n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// An element is kept where its word is at least this.
FASTLLM_HD uint32_t dropout_threshold(const Dropout& dropout) {
  const double scaled = dropout.p * 4294967296.0;
  return scaled >= 4294967295.0 ? 4294967295u : static_cast<uint32_t>(scaled);
}
// What is kept is multiplied by this.
FASTLLM_HD double dropout_factor(const Dropout& dropout) { return dropout.p < 1.0 ? 1.0 / (1.0 - dropout.p) : 0.0; }
// The words of the elements 4 * group to 4 * group + 3.
FASTLLM_HD Philox4 dropout_words(const Dropout& dropout, uint64_t row, int64_t group) {
  return philox_at(dropout.key, static_cast<uint32_t>(group), static_cast<uint32_t>(row),
                   static_cast<uint32_t>(row >> 32));
}

// x[i] is element `element + i` of `row`.
template <class A>
FASTLLM_HD void apply_dropout(A* x, int64_t n, const Dropout& dropout, uint64_t row, int64_t element) {
  const uint32_t threshold = dropout_threshold(dropout);
  const A factor = static_cast<A>(dropout_factor(dropout));
  Philox4 random{};
  for (int64_t i = 0; i < n; ++i) {
    const int64_t e = element + i;
    if (i == 0 || e % 4 == 0) random = dropout_words(dropout, row, e / 4);
    // Not random.word[e % 4]: a computed index would put the words in a GPU's local memory.
    const uint32_t low = e & 1 ? random.word[1] : random.word[0], high = e & 1 ? random.word[3] : random.word[2];
    x[i] = dropout.p < 1.0 && (e & 2 ? high : low) >= threshold ? x[i] * factor : A(0);
  }
}

}  // namespace
}  // namespace fastllm
