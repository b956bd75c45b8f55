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
  m.def(
      "attention_rows(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? sinks, Tensor? slopes, Tensor? seed, "
      "Tensor(a!) out, Tensor(b!) lse, Tensor(c!) most, Tensor(d!) log, float scale, float softcap, int left, "
      "int right, int offset, float dropout_p, int first_plane) -> ()");
  m.def(
      "attention_grad_rows(Tensor dout, Tensor? dlse, Tensor out, Tensor most, Tensor log, Tensor q, Tensor k, "
      "Tensor v, Tensor? bias, Tensor? slopes, Tensor? seed, Tensor(a!)? dq, Tensor(b!)? dk, Tensor(c!)? dv, "
      "Tensor(d!)? dbias, Tensor(e!) delta, float scale, float softcap, int left, int right, int offset, "
      "float dropout_p, int first_plane) -> ()");
  m.def(
      "cross_entropy_rows(Tensor x, Tensor target, Tensor? weight, Tensor? factor, Tensor? dlse, Tensor? dentropy, "
      "Tensor(a!)? dx, Tensor(b!)? dtarget, int ignore_index, float smoothing, float softcap, float scale, "
      "float z_loss, bool accuracy, bool entropy) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "cross_entropy_loss(Tensor x, Tensor target, Tensor? weight, int reduction, ScalarType dtype, int ignore_index, "
      "float smoothing, float softcap, float scale, float z_loss, bool need_lse, bool need_x)"
      " -> (int, float, Tensor?, Tensor?, Tensor?)");
  m.def(
      "cross_entropy_of_classes(Tensor x, Tensor target, int ignore_index, int reduction, bool need_x)"
      " -> (int, Tensor, Tensor)");
  m.def(
      "cross_entropy_of_classes_grad(Tensor x, Tensor target, Tensor? dloss, int ignore_index, int reduction)"
      " -> Tensor");
  m.def("linear_loss_counts(Tensor x, Tensor target, int ignore_index, int classes) -> int");
  m.def(
      "linear_loss_rows(Tensor x, Tensor weight, Tensor target, Tensor(a!)? logits, Tensor? factor, Tensor? dlse, "
      "Tensor? dentropy, int ignore_index, bool skip, float smoothing, float softcap, float scale, float z_loss, "
      "float total, ScalarType? mean, bool keep, bool accuracy, bool entropy, bool need_x, bool need_weight)"
      " -> (bool, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "divergence_rows(Tensor student, Tensor teacher, Tensor? indices, Tensor? factor, Tensor(a!)? dstudent, "
      "Tensor(b!)? dteacher, int direction, float beta, float temperature, float softcap, float teacher_softcap)"
      " -> Tensor");
  m.def(
      "norm_rows(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? seed, float eps, float dropout_p, "
      "bool center) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("normed_rows(Tensor x, Tensor? weight, Tensor? bias, float eps, bool center) -> Tensor");
  m.def(
      "norm_grad_rows(Tensor dy, Tensor? dh, Tensor normed, Tensor? weight, Tensor? seed, Tensor mean, Tensor rstd, "
      "ScalarType input_dtype, ScalarType weight_dtype, ScalarType bias_dtype, float dropout_p, bool center, "
      "bool need_input, bool need_residual, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("gated_rows(Tensor gate, Tensor? up, int activation) -> Tensor");
  m.def(
      "gated_grad_rows(Tensor dy, Tensor gate, Tensor? up, int activation, bool need_gate, bool need_up)"
      " -> (Tensor, Tensor)");
  m.def(
      "rotary_rows(Tensor query, Tensor? key, Tensor cos, Tensor sin, Tensor? position_ids, SymInt offset, "
      "bool interleaved, bool inverse) -> (Tensor, Tensor)");
  m.def("attention_step(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale) -> Tensor");
  m.def("linear_rows(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def("add_product_(Tensor(a!) total, Tensor a, Tensor b, bool first) -> ()");
  m.def("dropout_rows(Tensor x, float p, Tensor seed) -> Tensor");
}
