// Writes that go past the caches, where little of them could stay there.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "../tensors.h"

namespace fastllm {

inline int64_t bytes_of(const Tensor& x) { return x.numel() * element_size(x.scalar_type()); }

// Whether a call that writes so many bytes writes them past the caches, which does not read the lines first: half of a
// last cache of 32 MiB, beside as much that is read. There an add and a layer norm of 8192 x 2304 in float32 take 0.68
// of their time (one core of an AMD EPYC, AVX-512). Short rows lose by it, while other work uses the memory too: layer
// norm takes 1.9 (AVX-512) and 1.4 times (AVX2) as long for 128 columns in bfloat16, 1.3 and 1.15 times for 768, 1.1
// and 1.3 times for 768 in float32; for 2304 in float32 0.87 and 0.98.
inline bool past_caches(int64_t bytes, int64_t bytes_of_row) {
  return bytes >= int64_t{32} << 20 && bytes_of_row > 8192;
}

// Others see a thread's writes past the caches after this.
inline void order_past_caches() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace fastllm
