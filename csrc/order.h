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
FASTLLM_HD Philox4 philox(uint64_t key, uint64_t counter) {
  return philox_at(key, static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), 0);
}

// Dropout keeps element e of a flat tensor when word e % 4 of philox(seed, e / 4) is at least this.
FASTLLM_HD uint32_t dropout_threshold(double p) {
  const double scaled = p * 4294967296.0;
  return scaled >= 4294967295.0 ? 4294967295u : static_cast<uint32_t>(scaled);
}

// sum[i] is element `element + i` of the tensor; what is kept is divided by 1 - p.
template <class A>
FASTLLM_HD void apply_dropout(A* sum, int64_t n, double p, uint64_t seed, int64_t element) {
  const uint32_t threshold = dropout_threshold(p);
  const A kept = p < 1.0 ? static_cast<A>(1.0 / (1.0 - p)) : A(0);
  Philox4 random{};
  for (int64_t i = 0; i < n; ++i) {
    const uint64_t e = static_cast<uint64_t>(element + i);
    if (i == 0 || e % 4 == 0) random = philox(seed, e / 4);
    // Not random.word[e % 4]: a computed index would put the words in a GPU's local memory.
    const uint32_t low = e & 1 ? random.word[1] : random.word[0], high = e & 1 ? random.word[3] : random.word[2];
    sum[i] = p < 1.0 && (e & 2 ? high : low) >= threshold ? sum[i] * kept : A(0);
  }
}

}  // namespace
}  // namespace fastllm
