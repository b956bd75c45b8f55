// Groups token positions by id on the GPU.
#pragma once

#include <cuda_runtime.h>

#include "../tensors.h"

namespace fastllm {

// Device memory from torch's allocator, so that it belongs to the stream and to a graph that captures it.
struct SortedTokens {
  Tensor memory;
  uint32_t* keys;    // ascending; `rows` for tokens without a gradient
  uint32_t* tokens;  // positions, ascending among equal keys
};

// Keys are id - start; ids of other parts of the vocabulary and padding_idx get the key `rows`. Ids out of range fail a
// device-side assertion.
SortedTokens sort_tokens(const Tensor& indices, const Vocabulary& vocabulary, int64_t padding_idx,
                         cudaStream_t stream);

}  // namespace fastllm
