// Token ids: range checks whose errors name the id, and grouping of positions by id.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>

#include "../tensors.h"

namespace fastllm {

// f(pointer to const int32_t or int64_t)
template <class F>
decltype(auto) visit_indices(const Tensor& indices, F&& f) {
  if (indices.scalar_type() == ScalarType::Int) return f(static_cast<const int32_t*>(indices.const_data_ptr()));
  return f(static_cast<const int64_t*>(indices.const_data_ptr()));
}

inline int64_t id_at(const Tensor& indices, int64_t flat) {
  return visit_indices(indices, [&](auto ids) { return static_cast<int64_t>(ids[flat]); });
}

// The first of `indices` (contiguous) that is negative, or `end` or more; -1 if none is.
inline int64_t first_outside(const Tensor& indices, uint64_t end) {
  const int64_t n = indices.numel();
  return visit_indices(indices, [&](auto ids) -> int64_t {
    const auto outside = [&](int64_t i) { return static_cast<uint64_t>(static_cast<int64_t>(ids[i])) >= end; };
    bool any = false;
    for (int64_t i = 0; i < n; ++i) any |= outside(i);
    for (int64_t i = 0; any && i < n; ++i)
      if (outside(i)) return i;
    return -1;
  });
}

// Element `flat` of `indices` in words: "1, 0, 5".
inline std::string place(const Tensor& indices, int64_t flat) {
  std::string position;
  const auto sizes = indices.sizes();
  int64_t rest = flat;
  for (int64_t d = indices.dim() - 1; d >= 0; --d) {
    position = std::to_string(rest % sizes[d]) + (position.empty() ? "" : ", ") + position;
    rest /= sizes[d];
  }
  return position;
}

[[noreturn]] inline void raise_outside(const std::string& name, const Tensor& indices, int64_t flat,
                                       const Vocabulary& vocabulary) {
  std::ostringstream text;
  text << name << '[' << place(indices, flat) << "] is " << id_at(indices, flat) << ", ";
  if (vocabulary.partial) {
    text << "and ids are not negative (the table holds ids " << vocabulary.start << " to "
         << vocabulary.start + vocabulary.rows - 1 << ')';
  } else {
    text << "outside the table of " << vocabulary.rows << " rows";
  }
  throw std::out_of_range(text.str());
}

// Raises IndexError in Python at the first id that is out of range.
inline void check_ids(const std::string& name, const Tensor& indices, const Vocabulary& vocabulary) {
  const uint64_t end = vocabulary.partial ? uint64_t{1} << 63 : static_cast<uint64_t>(vocabulary.rows);
  const int64_t outside = first_outside(indices, end);
  if (outside >= 0) raise_outside(name, indices, outside, vocabulary);
}

// The positions of each row's ids, in order: tokens[offsets[v]] .. tokens[offsets[v + 1] - 1]. A counting sort; the
// parts that threads count apart follow each other, so their number does not change the result.
struct Groups {
  std::unique_ptr<int64_t[]> offsets;
  std::unique_ptr<int64_t[]> tokens;
};

// For indices 0, 1, 2, ...: there is nothing to sort.
inline Groups group_positions(int64_t n, int64_t rows) {
  Groups groups{std::unique_ptr<int64_t[]>(new int64_t[rows + 1]), std::unique_ptr<int64_t[]>(new int64_t[n])};
  for (int64_t row = 0; row <= rows; ++row) groups.offsets[row] = std::min(row, n);
  for (int64_t i = 0; i < n; ++i) groups.tokens[i] = i;
  return groups;
}

template <class Index>
Groups group_by_id(const Index* ids, int64_t n, const Vocabulary& vocabulary, int64_t padding_idx) {
  constexpr int64_t kTokensPerPart = 65536;
  const int64_t rows = vocabulary.rows;
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), 16);
  const int64_t parts = std::max<int64_t>(1, std::min(threads, n / kTokensPerPart));
  std::unique_ptr<int64_t[]> counts(new int64_t[parts * rows]());
  Groups groups{std::unique_ptr<int64_t[]>(new int64_t[rows + 1]), std::unique_ptr<int64_t[]>(new int64_t[n])};
  const auto each = [&](int64_t part, auto&& visit) {
    const int64_t last = n * (part + 1) / parts;
    for (int64_t i = n * part / parts; i < last; ++i) {
      const int64_t id = ids[i], row = id - vocabulary.start;
      if (row >= 0 && row < rows && id != padding_idx) visit(i, counts[part * rows + row]);
    }
  };
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) each(part, [](int64_t, int64_t& count) { ++count; });
  });
  int64_t running = 0;
  for (int64_t row = 0; row < rows; ++row) {
    groups.offsets[row] = running;
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t count = counts[part * rows + row];
      counts[part * rows + row] = running;
      running += count;
    }
  }
  groups.offsets[rows] = running;
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part)
      each(part, [&](int64_t i, int64_t& next) { groups.tokens[next++] = i; });
  });
  return groups;
}

}  // namespace fastllm
