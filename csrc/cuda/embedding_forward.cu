// embedding_fwd and embedding_sum on a GPU.
#include <cassert>

#include "runtime.cuh"

#define FASTLLM_ASSERT(condition) assert((condition) && "embedding: id out of range")
#define FASTLLM_STORE_STREAMING(to, value) __stcs(to, value)
#include "embedding_forward_kernels.cuh"

namespace fastllm {
namespace {

Tensor rows_packed(const Tensor& weight) {
  return weight.size(1) <= 1 || weight.stride(1) == 1 ? weight : torch::stable::contiguous(weight);
}

template <class U>
void gather(const Tensor& weight, const Tensor& indices, const Vocabulary& v, Tensor& out, int64_t row_bytes,
            int64_t stride_bytes, cudaStream_t stream) {
  const int64_t unit = sizeof(U), tokens = indices.numel(), units = row_bytes / unit;
  const Shape shape((tokens + kTokensPerThread - 1) / kTokensPerThread, units, 1);
  const U* table = static_cast<const U*>(weight.const_data_ptr());
  U* rows = static_cast<U*>(out.mutable_data_ptr());
  const auto launch = [&](auto ids) {
    gather_rows<<<shape.grid, shape.block, 0, stream>>>(table, stride_bytes / unit, ids, tokens, units, v, rows);
    check_cuda(cudaGetLastError(), "gather_rows");
  };
  if (indices.scalar_type() == ScalarType::Int) {
    launch(static_cast<const int32_t*>(indices.const_data_ptr()));
  } else {
    launch(static_cast<const int64_t*>(indices.const_data_ptr()));
  }
}

Tensor embedding_fwd(const Tensor& weight_, const Tensor& indices_, std::optional<int64_t> vocab_start) {
  check_table("embedding_fwd", weight_);
  const Tensor indices = check_indices("embedding_fwd", indices_), weight = rows_packed(weight_);
  const Vocabulary vocabulary{vocab_start.value_or(0), weight.size(0), vocab_start.has_value()};
  Tensor out = empty_like_device(weight, with_last(indices, weight.size(1)), weight.scalar_type());
  if (out.numel() == 0) return out;
  const OnDevice device(weight);
  const int64_t element = element_size(weight.scalar_type());
  const int64_t row = weight.size(1) * element, stride = weight.stride(0) * element;
  const auto fits = [&](int64_t unit) {
    return row % unit == 0 && stride % unit == 0 && divides(weight.const_data_ptr(), static_cast<uintptr_t>(unit)) &&
           divides(out.const_data_ptr(), static_cast<uintptr_t>(unit));
  };
  if (fits(16)) {
    gather<uint4>(weight, indices, vocabulary, out, row, stride, device.stream());
  } else if (fits(8)) {
    gather<uint2>(weight, indices, vocabulary, out, row, stride, device.stream());
  } else if (fits(4)) {
    gather<unsigned>(weight, indices, vocabulary, out, row, stride, device.stream());
  } else {
    gather<unsigned short>(weight, indices, vocabulary, out, row, stride, device.stream());
  }
  return out;
}

// f(a value of the element's type)
template <class F>
void visit_float(ScalarType dtype, F&& f) {
  switch (dtype) {
    case ScalarType::Double: return f(double{});
    case ScalarType::BFloat16: return f(BF16{});
    case ScalarType::Half: return f(F16{});
    default: return f(float{});
  }
}

const int64_t* seed_pointer(const char* op, const Tensor& seed) {
  if (seed.numel() != 2 || seed.scalar_type() != ScalarType::Long || !seed.is_cuda() || !seed.is_contiguous())
    refuse(op, ": seed must be two int64 on the GPU, the key and the first row");
  return static_cast<const int64_t*>(seed.const_data_ptr());
}

Tensor embedding_sum_fwd(const std::vector<Tensor>& weights_, const std::vector<Tensor>& indices_, int64_t rows,
                         const std::vector<double>& scales, double dropout_p, std::optional<Tensor> seed_) {
  const char* op = "embedding_sum_fwd";
  check_sum(op, weights_, indices_, rows, scales);
  if (weights_.size() > kMaxTables) refuse(op, ": at most ", kMaxTables, " tables on a GPU");
  std::vector<Tensor> held;
  Tables tables{};
  tables.number = static_cast<int>(weights_.size());
  const ScalarType dtype = weights_[0].scalar_type();
  const int64_t columns = weights_[0].size(1), element = element_size(dtype), vector = 16 / element;
  bool vectors = columns % vector == 0;
  for (size_t t = 0; t < weights_.size(); ++t) {
    const Tensor weight = rows_packed(weights_[t]), indices = check_indices(op, indices_[t]);
    held.push_back(weight);
    held.push_back(indices);
    tables.data[t] = weight.const_data_ptr();
    tables.stride[t] = weight.stride(0);
    tables.rows[t] = weight.size(0);
    tables.ids[t] = indices.const_data_ptr();
    tables.count[t] = indices.numel();
    tables.is_long[t] = indices.scalar_type() == ScalarType::Long;
    tables.scale[t] = scales[t];
    vectors = vectors && divides(tables.data[t], 16) && tables.stride[t] % vector == 0;
  }
  Tensor out = empty_like_device(weights_[0], {rows, columns}, dtype);
  if (out.numel() == 0) return out;
  const OnDevice device(out);
  const int64_t* seed = seed_.has_value() ? seed_pointer(op, *seed_) : nullptr;
  visit_float(dtype, [&](auto zero) {
    using T = decltype(zero);
    T* data = static_cast<T*>(out.mutable_data_ptr());
    if (vectors) {
      const Shape shape(rows, columns, kVector<T>);
      sum_tables<T, kVector<T>>
          <<<shape.grid, shape.block, 0, device.stream()>>>(tables, rows, columns, dropout_p, seed, data);
    } else {
      const Shape shape(rows, columns, 1);
      sum_tables<T, 1><<<shape.grid, shape.block, 0, device.stream()>>>(tables, rows, columns, dropout_p, seed, data);
    }
  });
  check_cuda(cudaGetLastError(), "sum_tables");
  return out;
}

// What dropout leaves of the rows of x, (rows, columns).
Tensor dropout_rows(const Tensor& x_, double p, const Tensor& seed_) {
  const char* op = "dropout_rows";
  const Tensor x = check_dropped(op, x_);
  const int64_t rows = x.size(0), columns = x.size(1);
  Tensor out = empty_like_device(x, {rows, columns}, x.scalar_type());
  if (out.numel() == 0) return out;
  const OnDevice device(x);
  const int64_t* seed = seed_pointer(op, seed_);
  visit_float(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T* from = static_cast<const T*>(x.const_data_ptr());
    T* to = static_cast<T*>(out.mutable_data_ptr());
    if (columns % kVector<T> == 0 && divides(from, 16)) {
      const Shape shape(rows, columns, kVector<T>);
      drop<T, kVector<T>><<<shape.grid, shape.block, 0, device.stream()>>>(from, rows, columns, p, seed, to);
    } else {
      const Shape shape(rows, columns, 1);
      drop<T, 1><<<shape.grid, shape.block, 0, device.stream()>>>(from, rows, columns, p, seed, to);
    }
  });
  check_cuda(cudaGetLastError(), "drop");
  return out;
}

}  // namespace
}  // namespace fastllm

STABLE_TORCH_LIBRARY_IMPL(fastllm, CUDA, m) {
  m.impl("embedding_fwd", TORCH_BOX(&fastllm::embedding_fwd));
  m.impl("embedding_sum_fwd", TORCH_BOX(&fastllm::embedding_sum_fwd));
  m.impl("dropout_rows", TORCH_BOX(&fastllm::dropout_rows));
}
