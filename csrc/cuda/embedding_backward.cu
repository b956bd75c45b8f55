// embedding_bwd on a GPU: sort the tokens by id, then one pass over the table's rows. No host sync, no atomics.
#include "runtime.cuh"

#include "embedding_backward_kernels.cuh"
#include "sort.h"

namespace fastllm {
namespace {

template <class T, class O, int N>
void launch(const T* grad, const Sorted& s, const Output& out, Task* tasks, Acc<T>* parts, cudaStream_t stream) {
  const int64_t columns = out.columns, grad_rows = s.count * s.repeats;
  if (out.accumulate) {
    if (s.count == 0) return;
    const Shape shape(s.positions ? std::min(s.count, out.rows) : s.count, columns, N);
    write_rows<T, O, N, true><<<shape.grid, shape.block, 0, stream>>>(grad, s, out, tasks);
  } else {
    const Shape shape(out.rows, columns, N);
    write_rows<T, O, N, false><<<shape.grid, shape.block, 0, stream>>>(grad, s, out, tasks);
  }
  check_cuda(cudaGetLastError(), "write_rows");
  if (tasks == nullptr) return;
  const int64_t slots = slots_for(grad_rows);
  const Shape shape(slots, columns, N);
  sum_parts<T, N><<<shape.grid, shape.block, 0, stream>>>(grad, s, tasks, slots, columns, parts);
  check_cuda(cudaGetLastError(), "sum_parts");
  if (grad_rows > kChunk * kChunk) {
    sum_groups<Acc<T>, N><<<shape.grid, shape.block, 0, stream>>>(s, tasks, slots, columns, parts);
    check_cuda(cudaGetLastError(), "sum_groups");
  }
  write_long_rows<Acc<T>, O, N><<<shape.grid, shape.block, 0, stream>>>(s, out, tasks, slots, parts);
  check_cuda(cudaGetLastError(), "write_long_rows");
}

template <class T, class O>
void run(const Backward& b, const Sorted& s, const Output& out, Task* tasks, void* parts_, cudaStream_t stream) {
  const T* grad = static_cast<const T*>(b.grad.const_data_ptr());
  Acc<T>* parts = static_cast<Acc<T>*>(parts_);
  constexpr int N = kVector<T>;
  const bool vectors = out.columns % N == 0 && divides(grad, 16) && divides(out.data, 16) &&
                       out.stride * static_cast<int64_t>(sizeof(O)) % 16 == 0;
  if (vectors) {
    launch<T, O, N>(grad, s, out, tasks, parts, stream);
  } else {
    launch<T, O, 1>(grad, s, out, tasks, parts, stream);
  }
}

void backward_into(Tensor& out, const Backward& b, int64_t padding_idx, bool scale_grad_by_freq,
                   std::optional<int64_t> vocab_start, double scale, bool accumulate) {
  check_output("embedding_bwd", out, b);
  const ScalarType from = b.grad.scalar_type(), to = out.scalar_type();
  const int64_t rows = out.size(0), columns = b.columns;
  if (b.tokens >= int64_t{1} << 31 || rows >= int64_t{1} << 32)
    refuse("embedding_bwd: 2^31 ids or more, or a table of 2^32 rows or more, are not supported on a GPU");
  if (rows == 0 && b.tokens == 0) return;
  const OnDevice device(b.grad);
  const cudaStream_t stream = device.stream();
  const bool positions = b.positions || b.tokens == 0;

  // Bounds of every row, then the tasks: one piece of memory, set to zero at once.
  const bool may_be_long = b.rows > kChunk;
  const int64_t bounds_bytes = positions ? 0 : rows * static_cast<int64_t>(sizeof(Bounds));
  const int64_t task_bytes = may_be_long ? slots_for(b.rows) * static_cast<int64_t>(sizeof(Task)) : 0;
  const Tensor zeroed = empty_like_device(b.grad, {bounds_bytes + task_bytes}, ScalarType::Byte);
  char* zeroes = static_cast<char*>(zeroed.mutable_data_ptr());
  if (bounds_bytes + task_bytes > 0)
    check_cuda(cudaMemsetAsync(zeroes, 0, static_cast<size_t>(bounds_bytes + task_bytes), stream), "cudaMemsetAsync");
  Bounds* bounds = reinterpret_cast<Bounds*>(zeroes);
  Task* tasks = may_be_long ? reinterpret_cast<Task*>(zeroes + bounds_bytes) : nullptr;

  Sorted sorted{nullptr, nullptr, bounds, positions, b.tokens, b.repeats};
  std::optional<SortedTokens> memory;
  if (!positions) {
    const Vocabulary vocabulary{vocab_start.value_or(0), rows, vocab_start.has_value()};
    memory = sort_tokens(b.indices, vocabulary, padding_idx, stream);
    sorted.keys = memory->keys;
    sorted.tokens = memory->tokens;
    constexpr int kThreads = 256;
    const unsigned blocks = static_cast<unsigned>((b.tokens + kThreads - 1) / kThreads);
    find_bounds<<<blocks, kThreads, 0, stream>>>(sorted.keys, b.tokens, rows, bounds);
    check_cuda(cudaGetLastError(), "find_bounds");
  }
  if (rows == 0 || columns == 0) return;
  const Tensor parts = empty_like_device(b.grad, {may_be_long ? slots_for(b.rows) * columns : 0},
                                         from == ScalarType::Double ? ScalarType::Double : ScalarType::Float);
  const Output output{out.mutable_data_ptr(), out.stride(0), rows, columns, scale, scale_grad_by_freq, accumulate};
  void* room = parts.mutable_data_ptr();
  switch (from) {
    case ScalarType::Double: return run<double, double>(b, sorted, output, tasks, room, stream);
    case ScalarType::Float: return run<float, float>(b, sorted, output, tasks, room, stream);
    case ScalarType::BFloat16:
      return to == from ? run<BF16, BF16>(b, sorted, output, tasks, room, stream)
                        : run<BF16, float>(b, sorted, output, tasks, room, stream);
    default:
      return to == from ? run<F16, F16>(b, sorted, output, tasks, room, stream)
                        : run<F16, float>(b, sorted, output, tasks, room, stream);
  }
}

Tensor embedding_bwd(const Tensor& grad, const Tensor& indices, int64_t num_rows, int64_t padding_idx,
                     bool scale_grad_by_freq, std::optional<int64_t> vocab_start, double scale, bool positions) {
  const Backward b = check_backward("embedding_bwd", grad, indices, positions);
  Tensor out = empty_like_device(b.grad, {num_rows, b.columns}, grad.scalar_type());
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

STABLE_TORCH_LIBRARY_IMPL(fastllm, CUDA, m) {
  m.impl("embedding_bwd", TORCH_BOX(&fastllm::embedding_bwd));
  m.impl("embedding_bwd_", TORCH_BOX(&fastllm::embedding_bwd_));
}
