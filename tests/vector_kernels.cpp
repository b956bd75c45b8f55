// Every table of csrc/cpu/vector, called on numbers that are the same everywhere; what it writes goes to stdout as bytes.
// Built without PyTorch, so that a cross compiler and an emulator of another processor are all that it needs.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "../csrc/cpu/attention_rows.h"
#include "../csrc/cpu/attention_step.h"
#include "../csrc/cpu/cross_entropy.h"
#include "../csrc/cpu/gated.h"
#include "../csrc/cpu/linear_rows.h"
#include "../csrc/cpu/norm.h"
#include "../csrc/cpu/rotary.h"
#include "../csrc/cpu/rows.h"
#include "../csrc/scalar.h"

namespace fastllm::isa_default {
extern const AttentionKernels attention_kernels;
extern const AttentionGradKernels attention_grad_kernels;
extern const AttentionStepKernels attention_step_kernels;
extern const CrossEntropyKernels cross_entropy_kernels;
extern const GatedKernels gated_kernels;
extern const LinearKernels linear_kernels;
extern const NormKernels norm_kernels;
extern const RotaryKernels rotary_kernels;
extern const RowKernels kernels;
}  // namespace fastllm::isa_default

namespace fastllm {
namespace {

constexpr int64_t kRows = 7, kColumns = 203;
constexpr Dropout kDropout{0x123456789abcdefull, 7, 0.25};

template <class T>
constexpr int dtype_of() {
  return std::is_same_v<T, float> ? kF32 : std::is_same_v<T, BF16> ? kBF16 : kF16;
}

template <class T>
std::vector<T> made(int64_t n, int64_t step, float scale = 1.0f) {
  std::vector<T> x(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i)
    narrow(scale * static_cast<float>(i * step % 1009 - 504) / 256.0f, x[static_cast<size_t>(i)]);
  return x;
}

template <class T>
void write(const std::vector<T>& x) {
  std::fwrite(x.data(), sizeof(T), x.size(), stdout);
}

template <class T>
void gated() {
  const auto gate = made<T>(kColumns, 7919, 9.0f), up = made<T>(kColumns, 31), dy = made<T>(kColumns, 17);
  for (int kind = 0; kind < kActivations; ++kind) {
    std::vector<T> y(kColumns), dgate(kColumns), dup(kColumns);
    isa_default::gated_kernels.gated_run[kind]({gate.data(), up.data(), y.data(), kColumns, dtype_of<T>(), dtype_of<T>()});
    isa_default::gated_kernels.gated_grad_run[kind](
        {dy.data(), gate.data(), up.data(), dgate.data(), dup.data(), kColumns, dtype_of<T>(), dtype_of<T>()});
    write(y), write(dgate), write(dup);
  }
}

template <class T>
void norms() {
  const auto x = made<T>(kColumns, 7919), residual = made<T>(kColumns, 31), dy = made<T>(kColumns, 17);
  const auto weight = made<float>(kColumns, 13), bias = made<float>(kColumns, 11);
  std::vector<float> scratch(3 * kColumns);
  for (int variant = 0; variant < 4; ++variant) {
    const bool center = variant % 2 != 0, dropped = variant / 2 != 0;
    const NormOptions options{kColumns, weight.data(), bias.data(), 1e-5, dropped ? &kDropout : nullptr,
                              center, dtype_of<T>(), dtype_of<T>(), false};
    std::vector<T> y(kColumns), h(kColumns), dx(kColumns), dresidual(kColumns);
    std::vector<float> dweight(kColumns), dbias(kColumns);
    NormRow row{x.data(), residual.data(), y.data(), h.data(), 5, 0, 0};
    isa_default::norm_kernels.norm_of_row[0](options, row, scratch.data());
    isa_default::norm_kernels.norm_grad_of_row[0](
        options,
        {dy.data(), x.data(), h.data(), dx.data(), dresidual.data(), dweight.data(), dbias.data(), row.row,
         row.mean, row.rstd},
        scratch.data());
    write(y), write(h), write(dx), write(dresidual), write(dweight), write(dbias);
  }
}

template <class T>
void losses() {
  std::vector<float> scratch(4 * kColumns);
  for (double cap : {0.0, 9.0}) {
    auto x = made<T>(kColumns, 7919, 5.0f);
    std::vector<T> dx(kColumns);
    const LossOptions options{kColumns, nullptr, 0.0, 0.1, 1.0, cap, 0.01, true, dtype_of<T>(), dtype_of<T>()};
    LossRow row{};
    row.x = x.data(), row.target = 100, row.dx = dx.data(), row.factor = 0.5, row.dlse = 0.25, row.dentropy = 0.125;
    isa_default::cross_entropy_kernels.loss_of_row[0](options, row, scratch.data());
    write(dx);
    write(std::vector<float>{static_cast<float>(row.loss), static_cast<float>(row.lse), static_cast<float>(row.entropy)});
  }
}

template <class T>
void rotary() {
  constexpr int64_t kHalf = 50, kWidth = 2 * kHalf + 3;
  const auto x = made<T>(kRows * kWidth, 7919);
  const auto cos = made<float>(kRows * kHalf, 31), sin = made<float>(kRows * kHalf, 17);
  for (int interleaved = 0; interleaved < 2; ++interleaved) {
    std::vector<T> y(kRows * kWidth);
    isa_default::rotary_kernels.turn_run[dtype_of<T>()][interleaved](
        {x.data(), y.data(), cos.data(), sin.data(), kRows, kWidth, kWidth, kHalf, kHalf, 3});
    write(y);
  }
}

template <class T>
void linear() {
  constexpr int64_t kOutputs = 33;
  const auto x = made<T>(3 * kColumns, 7919), weight = made<T>(kOutputs * kColumns, 31), bias = made<T>(kOutputs, 17);
  std::vector<T> y(3 * kOutputs);
  std::vector<float> wide(3 * kColumns);
  isa_default::linear_kernels.linear_rows(
      {x.data(), weight.data(), bias.data(), y.data(), dtype_of<T>(), 3, kColumns, kOutputs, kColumns}, 0, kOutputs,
      wide.data());
  write(y);
}

template <class T>
void one_query() {
  constexpr int64_t kKeys = 150, kDim = 43, kDimV = 37, kGroup = 3;
  const auto q = made<T>(kGroup * kDim, 7919), k = made<T>(kKeys * kDim, 31), v = made<T>(kKeys * kDimV, 17);
  const auto mask = made<float>(kKeys, 13);
  std::vector<T> out(kGroup * kDimV);
  std::vector<float> scratch(static_cast<size_t>(step_scratch(kGroup, kKeys, kDim, kDimV)));
  isa_default::attention_step_kernels.attention_step(
      {q.data(), k.data(), v.data(), out.data(), mask.data(), kDim, kDim, kDimV, kDimV, 0, 1, kGroup, kKeys, kDim, kDimV,
       0.2f, dtype_of<T>(), false},
      scratch.data());
  write(out);
}

template <class T>
void attention() {
  constexpr int64_t kColumnsOf = 150, kDim = 24, kDimV = 19;
  const int dtype = dtype_of<T>();
  const auto q = made<T>(kRows * kDim, 7919), k = made<T>(kColumnsOf * kDim, 31), v = made<T>(kColumnsOf * kDimV, 17);
  const auto dout = made<T>(kRows * kDimV, 13);
  for (float softcap : {0.0f, 5.0f}) {
    const AttentionShape shape{kRows, kColumnsOf, kDim, kDimV, 0.2f, softcap, 90, 0, kColumnsOf - kRows,
                               dtype, false, nullptr};
    const AttentionHead head{{q.data(), kDim}, {k.data(), kDim}, {v.data(), kDimV}, {nullptr, 0, 0},
                             softcap / 50.0f, -std::numeric_limits<float>::infinity(), 0};
    std::vector<T> out(kRows * kDimV), dq(kRows * kDim), dk(kColumnsOf * kDim), dv(kColumnsOf * kDimV);
    std::vector<float> lse(kRows), most(kRows), log(kRows), delta(kRows);
    const auto bytes = [](int64_t n) { return std::vector<float>(static_cast<size_t>(n / 4 + 64)); };
    auto scratch = bytes(isa_default::attention_kernels.forward_bytes(shape, kRows));
    isa_default::attention_kernels.forward(
        shape, head, {{out.data(), kDimV}, {lse.data(), 1}, {most.data(), 1}, {log.data(), 1}}, 0, kRows, scratch.data());
    auto back = bytes(isa_default::attention_grad_kernels.backward_bytes(shape));
    isa_default::attention_grad_kernels.backward(
        shape, head, {{out.data(), kDimV}, {dout.data(), kDimV}, {nullptr, 0}, {most.data(), 1}, {log.data(), 1}},
        {{dq.data(), kDim}, {dk.data(), kDim}, {dv.data(), kDimV}, dtype, nullptr, 0, 0, {delta.data(), 1}}, back.data());
    write(out), write(lse), write(delta), write(dq), write(dk), write(dv);
  }
}

template <class T>
void rows() {
  const auto a = made<T>(kColumns, 7919), b = made<T>(kColumns, 31);
  const void* tables[] = {a.data(), nullptr, b.data()};
  const double scales[] = {1.0, 2.0, 0.5};
  std::vector<T> sum(kColumns), total(kColumns);
  isa_default::kernels.combine_rows[dtype_of<T>()](sum.data(), tables, scales, 3, kColumns, &kDropout, 3);
  const auto grad = made<T>(kRows * kColumns, 17);
  const int64_t tokens[] = {1, 3, 5, 6};
  std::vector<double> scratch(3 * kColumns);
  isa_default::kernels.sum_rows[dtype_of<T>()][0](total.data(), {grad.data(), kColumns, tokens, 4, 1, kRows}, 0, kColumns,
                                                  0.5, false, scratch.data());
  write(sum), write(total);
}

template <class T>
void everything() {
  gated<T>(), norms<T>(), losses<T>(), rotary<T>(), linear<T>(), one_query<T>(), attention<T>(), rows<T>();
}

}  // namespace
}  // namespace fastllm

int main() {
  fastllm::everything<float>();
  fastllm::everything<fastllm::BF16>();
  fastllm::everything<fastllm::F16>();
}
