// The schemas of the extension's operators. Their kernels are in cpu/ and cuda/; fakes and gradients are in
// fastllm/ops/. A fragment, because Python defines other operators in the same namespace.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(fastllm, m) {
  m.def("embedding_fwd(Tensor weight, Tensor indices, SymInt? vocab_start) -> Tensor");
  m.def(
      "embedding_bwd(Tensor grad, Tensor indices, SymInt num_rows, SymInt padding_idx, bool scale_grad_by_freq, "
      "SymInt? vocab_start, float scale, bool positions) -> Tensor");
  m.def(
      "embedding_bwd_(Tensor(a!) out, Tensor grad, Tensor indices, SymInt padding_idx, bool scale_grad_by_freq, "
      "SymInt? vocab_start, float scale, bool accumulate) -> ()");
  m.def(
      "embedding_sum_fwd(Tensor[] weights, Tensor[] indices, SymInt rows, float[] scales, float dropout_p, "
      "Tensor? seed) -> Tensor");
  m.def("attention_amx_fwd(Tensor q, Tensor k, Tensor v, float scale, bool causal) -> Tensor");
  m.def(
      "attention_amx_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, float scale, bool causal)"
      " -> (Tensor, Tensor, Tensor)");
  m.def("embedding_sum_dropout(Tensor grad, float dropout_p, Tensor seed) -> Tensor");
}
