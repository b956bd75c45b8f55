// add_product_ on CPUs that multiply bfloat16: what sums a layer's gradient over chunks of rows.
#include "product.h"

#include <algorithm>
#include <string>

#include "product_amx.h"
#include "strided.h"

namespace fastllm {

const char* bf16_products() {
#if defined(FASTLLM_AMX)
  if (amx_usable()) return "amx";
  if (bf16_pairs_usable()) return "avx512_bf16";
#endif
  return "none";
}

}  // namespace fastllm

#if defined(FASTLLM_AMX)
namespace fastllm {
namespace {

Matrix matrix(const char* op, const Tensor& x) {
  if (x.dim() != 2 || x.scalar_type() != ScalarType::BFloat16 || (x.size(1) > 1 && x.stride(1) != 1))
    refuse(op, ": a and b must be bfloat16 matrices with their columns side by side");
  return {static_cast<const uint16_t*>(x.const_data_ptr()), x.stride(0), x.size(0), x.size(1)};
}

// total (M, N) float32 += a^T b for a (rows, M) and b (rows, N) in bfloat16; `first`: total is not read.
void add_product_(Tensor total, const Tensor& a_, const Tensor& b_, bool first) {
  const char* op = "add_product_";
  static const std::string units = bf16_products();
  if (units == "none") refuse(op, ": this machine has no products of bfloat16");
  const bool tiles = units == "amx";
  const Matrix a = matrix(op, a_), b = matrix(op, b_);
  if (a.rows != b.rows || total.dim() != 2 || total.size(0) != a.columns || total.size(1) != b.columns ||
      total.scalar_type() != ScalarType::Float || !total.is_contiguous())
    refuse(op, ": total must be float32 (M, N), contiguous, for a (rows, M) and b (rows, N)");
  if (total.numel() == 0) return;
  float* sums = static_cast<float*>(total.mutable_data_ptr());
  if (a.rows == 0 && first) std::fill_n(sums, total.numel(), 0.0f);
  for (int64_t row = 0; row < a.rows; row += kProductDepth) {
    const int64_t rows = std::min(kProductDepth, a.rows - row);
    const Matrix left{a.data + row * a.stride, a.stride, rows, a.columns};
    const Matrix right{b.data + row * b.stride, b.stride, rows, b.columns};
    const Scratch packed(amx_packed_bytes(rows, b.columns));
    torch::stable::parallel_for(0, (b.columns + 31) / 32, 1, [&](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; ++panel) amx_pack(right, panel, packed.get());
    });
    const int64_t taken = tiles ? kProductColumns : kPairsColumns;
    torch::stable::parallel_for(0, (a.columns + taken - 1) / taken, 1, [&](int64_t begin, int64_t end) {
      const Scratch scratch(tiles ? amx_product_scratch(rows) : pairs_product_scratch(rows));
      if (tiles) amx_begin();
      for (int64_t group = begin; group < end; ++group)
        (tiles ? amx_add_product : pairs_add_product)({sums, b.columns, first && row == 0}, left, group * taken, right,
                                                      packed.get(), scratch.get());
      if (tiles) amx_end();
    });
  }
}

}  // namespace
}  // namespace fastllm

STABLE_TORCH_LIBRARY_IMPL(fastllm, CPU, m) { m.impl("add_product_", TORCH_BOX(&fastllm::add_product_)); }
#endif
