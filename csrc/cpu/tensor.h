#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "../order.h"
#include "../tensors.h"
#include "rows.h"

namespace fastllm {

// The index into RowKernels' tables.
inline Dtype dtype_index(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double: return kF64;
    case ScalarType::BFloat16: return kBF16;
    case ScalarType::Half: return kF16;
    default: return kF32;
  }
}

// What `seed`, the key and the number of the first row, makes of a probability; nothing without a seed.
inline std::optional<Dropout> read_dropout(const char* op, const std::optional<Tensor>& seed, double p) {
  if (!seed.has_value()) return std::nullopt;
  if (seed->numel() != 2 || seed->scalar_type() != ScalarType::Long || !seed->is_contiguous())
    refuse(op, ": seed must be two int64, the key and the first row");
  const int64_t* words = static_cast<const int64_t*>(seed->const_data_ptr());
  return Dropout{static_cast<uint64_t>(words[0]), static_cast<uint64_t>(words[1]), p};
}
inline const Dropout* pointer_to(const std::optional<Dropout>& dropout) {
  return dropout.has_value() ? &*dropout : nullptr;
}

// Ask for huge pages under a large fresh output: the page faults of its first writes cost more than the writes.
inline void advise_huge_pages(Tensor& fresh) {
#if defined(__linux__)
  constexpr uintptr_t kLeast = uintptr_t{8} << 20;
  const uintptr_t bytes = static_cast<uintptr_t>(fresh.numel() * element_size(fresh.scalar_type()));
  if (bytes < kLeast) return;
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t data = reinterpret_cast<uintptr_t>(fresh.mutable_data_ptr());
  const uintptr_t first = (data + page - 1) / page * page, last = (data + bytes) / page * page;
  // Only advice: a kernel that knows no huge pages refuses it, and the output is the same.
  (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)fresh;
#endif
}

}  // namespace fastllm
