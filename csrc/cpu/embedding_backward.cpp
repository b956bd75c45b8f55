// embedding_bwd on the CPU: group the positions by id, then let each row of the table have one owner.
#include <cstring>
#include <vector>

#include "../order.h"
#include "../tensors.h"
#include "ids.h"
#include "rows.h"
#include "tensor.h"

namespace fastllm {
namespace {

struct Table {
  char* data;
  int64_t row_bytes;  // between the starts of rows
  int64_t element;    // bytes
  int64_t rows;
  int64_t columns;
};

struct Plan {
  const Groups& groups;
  Segment segment;  // of no row yet
  SumRows sum_rows;
  double scale;
  bool scale_grad_by_freq;
  bool accumulate;
};

int64_t gathered(const Plan& plan, int64_t row) {
  return (plan.groups.offsets[row + 1] - plan.groups.offsets[row]) * plan.segment.repeats;
}

void write_row(const Plan& plan, const Table& table, int64_t row, int64_t begin, int64_t columns, void* scratch) {
  char* out = table.data + row * table.row_bytes + begin * table.element;
  const int64_t count = plan.groups.offsets[row + 1] - plan.groups.offsets[row];
  if (count == 0) {
    if (!plan.accumulate) std::memset(out, 0, static_cast<size_t>(columns * table.element));
    return;
  }
  Segment segment = plan.segment;
  segment.tokens = plan.groups.tokens.get() + plan.groups.offsets[row];
  segment.count = count;
  const double scale = plan.scale_grad_by_freq ? plan.scale / static_cast<double>(gathered(plan, row)) : plan.scale;
  plan.sum_rows(out, segment, begin, columns, scale, plan.accumulate, scratch);
}

// Zeros in the rows from `row` on, before `last`, that gathered nothing; the first row after them. At once: 8 ids of
// 32000 rows of 1 KB take 0.65 of the time of a row at a time.
int64_t fill_empty_rows(const Plan& plan, const Table& table, int64_t row, int64_t last) {
  const auto& offsets = plan.groups.offsets;
  int64_t end = row;
  while (end < last && offsets[end + 1] == offsets[row]) ++end;
  if (end > row)
    std::memset(table.data + row * table.row_bytes, 0, static_cast<size_t>((end - row) * table.row_bytes));
  return end;
}

// Rows that gathered so much that one thread would still be at it when the others are done: these are shared out by
// columns, which leaves the order of each sum alone.
std::vector<int64_t> hot_rows(const Plan& plan, int64_t rows, int64_t total, int64_t threads) {
  std::vector<int64_t> hot;
  if (threads == 1) return hot;
  const int64_t limit = std::max<int64_t>(4 * kChunk, total / (2 * threads));
  for (int64_t row = 0; row < rows; ++row)
    if (gathered(plan, row) > limit) hot.push_back(row);
  return hot;
}

void write_hot_rows(const Plan& plan, const Table& table, const std::vector<int64_t>& hot, int64_t threads) {
  constexpr int64_t kColumns = 64;  // 128 bytes of bf16: threads seldom share a line
  const int64_t width = ((table.columns + threads - 1) / threads + kColumns - 1) / kColumns * kColumns;
  const int64_t pieces = (table.columns + width - 1) / width;
  const int64_t rows = static_cast<int64_t>(hot.size());
  torch::stable::parallel_for(0, rows * pieces, 1, [&](int64_t first, int64_t last) {
    std::vector<double> scratch(static_cast<size_t>(3 * width));
    for (int64_t i = first; i < last; ++i) {
      const int64_t begin = i % pieces * width;
      write_row(plan, table, hot[i / pieces], begin, std::min(width, table.columns - begin), scratch.data());
    }
  });
}

void write_table(const Plan& plan, const Table& table) {
  constexpr int64_t kElementsPerThread = 32768;
  const auto& offsets = plan.groups.offsets;
  const int64_t repeats = plan.segment.repeats;
  const int64_t total = offsets[table.rows] * repeats + (plan.accumulate ? 0 : table.rows);
  int64_t threads = torch::stable::get_num_threads();
  threads = std::max<int64_t>(1, std::min(threads, total * table.columns / kElementsPerThread));
  const std::vector<int64_t> hot = hot_rows(plan, table.rows, total, threads);
  write_hot_rows(plan, table, hot, threads);

  // The cost of all rows before `row`, hot ones left out: what they gathered and, where all are written, themselves.
  const auto cost_before = [&](int64_t row) {
    int64_t cost = offsets[row] * repeats + (plan.accumulate ? row / 16 : row);
    for (const int64_t h : hot)
      if (h < row) cost -= gathered(plan, h);
    return cost;
  };
  const int64_t cost = cost_before(table.rows);
  std::vector<int64_t> bounds(static_cast<size_t>(threads) + 1, table.rows);
  bounds[0] = 0;
  for (int64_t t = 1; t < threads; ++t) {
    int64_t low = bounds[t - 1], high = table.rows;
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (cost_before(middle) < cost / threads * t) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    bounds[t] = low;
  }
  const bool fills = !plan.accumulate && table.row_bytes == table.columns * table.element;  // rows side by side
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    std::vector<double> scratch(static_cast<size_t>(3 * table.columns));
    auto next_hot = std::lower_bound(hot.begin(), hot.end(), bounds[first]);
    for (int64_t row = bounds[first]; row < bounds[last]; ++row) {
      if (fills) row = fill_empty_rows(plan, table, row, bounds[last]);
      if (row == bounds[last]) break;
      if (next_hot != hot.end() && *next_hot == row) {
        ++next_hot;
        continue;
      }
      write_row(plan, table, row, 0, table.columns, scratch.data());
    }
  });
}

void backward_into(Tensor& out, const Backward& b, int64_t padding_idx, bool scale_grad_by_freq,
                   std::optional<int64_t> vocab_start, double scale, bool accumulate) {
  check_output("embedding_bwd", out, b);
  const ScalarType from = b.grad.scalar_type(), to = out.scalar_type();
  const Vocabulary vocabulary{vocab_start.value_or(0), out.size(0), vocab_start.has_value()};
  if (!b.positions) check_ids("embedding: input", b.indices, vocabulary);
  if (out.numel() == 0) return;

  const Groups groups =
      b.positions ? group_positions(b.tokens, vocabulary.rows) : visit_indices(b.indices, [&](auto ids) {
        return group_by_id(ids, b.tokens, vocabulary, padding_idx);
      });
  const int64_t element = element_size(to);
  const Table table{static_cast<char*>(out.mutable_data_ptr()), out.stride(0) * element, element, vocabulary.rows,
                    b.columns};
  const Plan plan{groups,
                  {b.grad.const_data_ptr(), b.columns, nullptr, 0, b.repeats, b.tokens},
                  row_kernels().sum_rows[dtype_index(from)][from != to],
                  scale,
                  scale_grad_by_freq,
                  accumulate};
  write_table(plan, table);
}

Tensor embedding_bwd(const Tensor& grad, const Tensor& indices, int64_t num_rows, int64_t padding_idx,
                     bool scale_grad_by_freq, std::optional<int64_t> vocab_start, double scale, bool positions) {
  const Backward b = check_backward("embedding_bwd", grad, indices, positions);
  Tensor out = empty_like_device(b.grad, {num_rows, b.columns}, grad.scalar_type());
  advise_huge_pages(out);
  backward_into(out, b, padding_idx, scale_grad_by_freq, vocab_start, scale, false);
  return out;
}

void embedding_bwd_(Tensor out, const Tensor& grad, const Tensor& indices, int64_t padding_idx,
                    bool scale_grad_by_freq, std::optional<int64_t> vocab_start, double scale, bool accumulate) {
  backward_into(out, check_backward("embedding_bwd_", grad, indices, false), padding_idx, scale_grad_by_freq,
                vocab_start, scale, accumulate);
}

}  // namespace
}  // namespace fastllm

STABLE_TORCH_LIBRARY_IMPL(fastllm, CPU, m) {
  m.impl("embedding_bwd", TORCH_BOX(&fastllm::embedding_bwd));
  m.impl("embedding_bwd_", TORCH_BOX(&fastllm::embedding_bwd_));
}
