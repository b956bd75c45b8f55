// N numbers that a thread loads, adds and stores together; 16 bytes at a time where they fill 16 bytes.
#pragma once

#include "../scalar.h"

#if defined(__CUDACC__)
#define FASTLLM_DEVICE __device__ __forceinline__
#define FASTLLM_KERNEL __global__
#endif  // otherwise whoever emulates a GPU says what these are

namespace fastllm {
namespace {

template <class T, int N>
struct alignas(sizeof(T) * N > 16 ? 16 : sizeof(T) * N) Pack {
  T v[N];
};

// How many T make 16 bytes.
template <class T>
constexpr int kVector = 16 / sizeof(T);

template <class T, int N>
FASTLLM_DEVICE Pack<T, N> load(const T* from) {
  return *reinterpret_cast<const Pack<T, N>*>(from);
}

template <class T, int N>
FASTLLM_DEVICE void store(T* to, const Pack<T, N>& pack) {
  *reinterpret_cast<Pack<T, N>*>(to) = pack;
}

// For data that is read or written once: it need not stay in the caches.
template <class T, int N>
FASTLLM_DEVICE Pack<T, N> load_streaming(const T* from) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(Pack<T, N>) == 16) {
    const uint4 bits = __ldcs(reinterpret_cast<const uint4*>(from));
    Pack<T, N> pack;
    memcpy(&pack, &bits, sizeof pack);
    return pack;
  }
#endif
  return load<T, N>(from);
}

template <class T, int N>
FASTLLM_DEVICE void store_streaming(T* to, const Pack<T, N>& pack) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(Pack<T, N>) % 16 == 0) {
    constexpr int kWords = sizeof(Pack<T, N>) / 16;
    uint4 bits[kWords];
    memcpy(bits, &pack, sizeof pack);
#pragma unroll
    for (int i = 0; i < kWords; ++i) __stcs(reinterpret_cast<uint4*>(to) + i, bits[i]);
    return;
  }
#endif
  store(to, pack);
}

template <class T, int N>
FASTLLM_DEVICE Pack<Acc<T>, N> widened(const Pack<T, N>& pack) {
  Pack<Acc<T>, N> wide;
#pragma unroll
  for (int i = 0; i < N; ++i) wide.v[i] = widen(pack.v[i]);
  return wide;
}

template <class A, int N>
FASTLLM_DEVICE void add(Pack<A, N>& sum, const Pack<A, N>& more) {
#pragma unroll
  for (int i = 0; i < N; ++i) sum.v[i] += more.v[i];
}

}  // namespace
}  // namespace fastllm
