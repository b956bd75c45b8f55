// The rows of a tensor of any strides: its last dimension side by side, the others counted through.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "../tensors.h"
#include "tensor.h"

namespace fastllm {

class Rows {
 public:
  int64_t count = 1;
  const Dtype dtype;
  const int64_t columns;

  // Copies only where the last dimension is not side by side.
  explicit Rows(const Tensor& x)
      : dtype(dtype_index(x.scalar_type())),
        columns(x.dim() == 0 ? 1 : x.size(x.dim() - 1)),
        tensor_(columns <= 1 || x.stride(x.dim() - 1) == 1 ? x : torch::stable::contiguous(x)),
        bytes_(element_size(x.scalar_type())) {
    for (int64_t d = tensor_.dim() - 2; d >= 0; --d) {
      const int64_t size = tensor_.size(d), stride = tensor_.stride(d);
      if (size == 1) continue;
      count *= size;
      if (!sizes_.empty() && stride == strides_.back() * sizes_.back()) {
        sizes_.back() *= size;  // steps on as the dimension within it does
      } else {
        sizes_.push_back(size);
        strides_.push_back(stride);
      }
    }
  }

  const void* at(int64_t row, int64_t column = 0) const {
    return data_ + offset(row) + column * bytes_;
  }
  void* mutable_at(int64_t row, int64_t column = 0) const {
    return const_cast<char*>(data_) + offset(row) + column * bytes_;
  }

 private:
  int64_t offset(int64_t row) const {
    if (sizes_.size() == 1) return row * strides_[0] * bytes_;  // mostly so, and a division takes as long as 10 sums
    int64_t found = 0;
    for (size_t d = 0; d < sizes_.size(); ++d) {
      found += row % sizes_[d] * strides_[d];
      row /= sizes_[d];
    }
    return found * bytes_;
  }

  Tensor tensor_;
  const char* data_ = static_cast<const char*>(tensor_.const_data_ptr());
  int64_t bytes_;
  std::vector<int64_t> sizes_, strides_;  // from the innermost on
};

// Memory of one thread, aligned for vector loads.
class Scratch {
 public:
  explicit Scratch(int64_t bytes)
      : memory_(std::aligned_alloc(64, static_cast<size_t>((bytes + 63) / 64 * 64 + 64)), &std::free) {
    if (memory_ == nullptr) throw std::bad_alloc();
  }
  void* get() const { return memory_.get(); }

 private:
  std::unique_ptr<void, decltype(&std::free)> memory_;
};

// Rows of `columns` elements that are worth a thread of their own.
inline int64_t row_grain(int64_t columns) {
  constexpr int64_t kElements = 16384;
  return columns >= kElements ? 1 : kElements / (columns < 1 ? 1 : columns);
}

}  // namespace fastllm
