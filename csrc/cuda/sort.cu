#include "sort.h"

#include <cassert>
#include <cub/block/block_radix_sort.cuh>
#include <cub/device/device_radix_sort.cuh>

#include "runtime.cuh"

namespace fastllm {
namespace {

constexpr int kThreads = 256;
constexpr int kFew = 4, kMany = 16;  // tokens a thread of the one-block sort: up to 1024 or 4096 in all

template <class Index>
__device__ __forceinline__ uint32_t key_of(Index index, const Vocabulary& v, int64_t padding_idx) {
  const int64_t id = index;
  assert(id >= 0 && (v.partial || id < v.rows) && "embedding: id out of range");
  const int64_t row = id - v.start;
  return static_cast<uint32_t>(row < 0 || row >= v.rows || id == padding_idx ? v.rows : row);
}

template <class Index>
__global__ void make_keys(const Index* ids, int64_t count, Vocabulary v, int64_t padding_idx, uint32_t* keys,
                          uint32_t* tokens) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= count) return;
  keys[i] = key_of(ids[i], v, padding_idx);
  tokens[i] = static_cast<uint32_t>(i);
}

// One block sorts everything: one launch instead of about six, where launches are what costs.
template <class Index, int Items>
__global__ void __launch_bounds__(kThreads)
    sort_small(const Index* ids, int count, Vocabulary v, int64_t padding_idx, int bits, uint32_t* keys,
               uint32_t* tokens) {
  using Sort = cub::BlockRadixSort<uint32_t, kThreads, Items, uint32_t>;
  __shared__ typename Sort::TempStorage storage;
  uint32_t key[Items], token[Items];
#pragma unroll
  for (int i = 0; i < Items; ++i) {
    const int at = static_cast<int>(threadIdx.x) * Items + i;
    // The sort is stable: what is beyond the end stays behind every real token of the largest key.
    key[i] = at < count ? key_of(ids[at], v, padding_idx) : static_cast<uint32_t>(v.rows);
    token[i] = static_cast<uint32_t>(at);
  }
  Sort(storage).SortBlockedToStriped(key, token, 0, bits);
#pragma unroll
  for (int i = 0; i < Items; ++i) {
    const int at = i * kThreads + static_cast<int>(threadIdx.x);
    if (at < count) {
      keys[at] = key[i];
      tokens[at] = token[i];
    }
  }
}

int bits_for(int64_t largest) {
  int bits = 1;
  while (largest >> bits != 0) ++bits;
  return bits;
}

Tensor bytes(const Tensor& like, int64_t count) { return empty_like_device(like, {count}, ScalarType::Byte); }

template <class Index>
SortedTokens sort(const Tensor& indices, const Vocabulary& v, int64_t padding_idx, cudaStream_t stream) {
  const int64_t count = indices.numel();
  const Index* ids = static_cast<const Index*>(indices.const_data_ptr());
  const int bits = bits_for(v.rows);
  const int64_t room = (count * 4 + 255) / 256 * 256;
  const bool small = count <= kThreads * kMany;
  const Tensor memory = bytes(indices, (small ? 2 : 4) * room);
  char* at = static_cast<char*>(memory.mutable_data_ptr());
  uint32_t* keys = reinterpret_cast<uint32_t*>(at);
  uint32_t* tokens = reinterpret_cast<uint32_t*>(at + room);
  if (small) {
    const int few = static_cast<int>(count);
    if (few <= kThreads * kFew) {
      sort_small<Index, kFew><<<1, kThreads, 0, stream>>>(ids, few, v, padding_idx, bits, keys, tokens);
    } else {
      sort_small<Index, kMany><<<1, kThreads, 0, stream>>>(ids, few, v, padding_idx, bits, keys, tokens);
    }
    check_cuda(cudaGetLastError(), "sort_small");
    return {memory, keys, tokens};
  }
  uint32_t* keys_in = reinterpret_cast<uint32_t*>(at + 2 * room);
  uint32_t* tokens_in = reinterpret_cast<uint32_t*>(at + 3 * room);
  const unsigned blocks = static_cast<unsigned>((count + kThreads - 1) / kThreads);
  make_keys<<<blocks, kThreads, 0, stream>>>(ids, count, v, padding_idx, keys_in, tokens_in);
  check_cuda(cudaGetLastError(), "make_keys");
  const auto sort_pairs = [&](void* scratch, size_t& size) {
    check_cuda(
        cub::DeviceRadixSort::SortPairs(scratch, size, keys_in, keys, tokens_in, tokens, static_cast<int>(count), 0,
                                        bits, stream),
        "SortPairs");
  };
  size_t size = 0;
  sort_pairs(nullptr, size);
  const Tensor scratch = bytes(indices, static_cast<int64_t>(size));
  sort_pairs(scratch.mutable_data_ptr(), size);
  return {memory, keys, tokens};
}

}  // namespace

SortedTokens sort_tokens(const Tensor& indices, const Vocabulary& vocabulary, int64_t padding_idx,
                         cudaStream_t stream) {
  return indices.scalar_type() == ScalarType::Int ? sort<int32_t>(indices, vocabulary, padding_idx, stream)
                                                  : sort<int64_t>(indices, vocabulary, padding_idx, stream);
}

}  // namespace fastllm
