// Built once per instruction set, like rows.cpp.
#include "../cross_entropy.h"

#include "passes.h"

namespace fastllm::FASTLLM_ISA {
namespace {

// z = cap * tanh(scale * x / cap), in place.
template <class A>
void transform(A* __restrict z, int64_t n, A scale, A cap) {
  if (scale != A(1))
    for (int64_t c = 0; c < n; ++c) z[c] *= scale;
  if (cap != A(0))
    for (int64_t c = 0; c < n; ++c) z[c] = cap * tanh_(z[c] / cap);
}

// Whether loss_of_vectors takes the row.
bool is_plain(const LossOptions& o, const LossRow& row) {
  return row.q == nullptr && o.cap == 0.0 && o.smoothing == 0.0 && !o.entropy;
}

// loss_of_row of 32 or 16 bits, vector by vector: the same numbers, in the same order.
template <class X>
void loss_of_vectors(const LossOptions& o, LossRow& row, float* e) {
  const int64_t n = o.classes;
  const X* x = static_cast<const X*>(row.x);
  X* dx = static_cast<X*>(row.dx);
  const float scale = static_cast<float>(o.scale), z_loss = static_cast<float>(o.z_loss);
  const float infinity = __builtin_inff();
  const bool counts = row.target >= 0;
  const float top = largest_scaled(x, n, scale), base = top == -infinity ? 0.0f : top;
  const bool past = o.past_caches && streams(dx);
  const bool fresh = dx != nullptr && dx != x && !past;
  float sum;
  sums_over<1>(n, &sum, [=](int64_t c, int64_t some) {
    __builtin_prefetch(x + n + c);
    if (fresh) __builtin_prefetch(dx + c, 1);
    const Vector one = keep_some(exp_to_88<Vector, Unsigned>(load_some(x + c, some) * scale - base), some);
    if (dx != nullptr) store_some(e + c, one, some);
    return Terms<1>{{one}};
  });
  const float rel = log_(sum);  // -log of the largest class's probability
  const float lse = top == infinity ? infinity : base + rel;
  float mass = 0.0f, loss = 0.0f;
  row.hit = 0;
  if (counts) {
    const float own = widen(x[row.target]) * scale - base;
    mass = o.weight != nullptr ? static_cast<const float*>(o.weight)[row.target] : 1.0f;
    loss = mass * (rel - own);
    row.hit = own + base >= top;
    if (z_loss != 0.0f) loss += z_loss * mass * lse * lse;
  }
  row.loss = loss;
  row.lse = lse;
  row.entropy = 0;
  if (dx == nullptr) return;
  const float factor = counts ? static_cast<float>(row.factor) : 0.0f;
  const float slope = mass + 2.0f * z_loss * mass * lse;
  const float along = (factor == 0.0f ? 0.0f : factor * slope) + static_cast<float>(row.dlse);
  if (factor == 0.0f && along == 0.0f)  // zeros, whatever the logits are
    return each_vector(n, [=](int64_t c, int64_t some) { store_some(dx + c, Vector{}, some, past); });
  const float part = along / sum;
  const int64_t at = factor == 0.0f ? -1 : row.target / kVector * kVector, lane = row.target - at;
  const float of_target = factor == 0.0f ? 0.0f : (e[row.target] * part - factor * mass) * scale;
  each_vector(n, [=](int64_t c, int64_t some) {
    Vector v = load_some(e + c, some) * part * scale;
    if (c == at) v[lane] = of_target;
    store_some(dx + c, v, some, past);
  });
}

template <class A>
void loss_of_row(const LossOptions& o, LossRow& row, void* scratch) {
  if constexpr (sizeof(A) == sizeof(float)) {
    float* const e = static_cast<float*>(scratch);
    if (is_plain(o, row)) {
      if (o.x_dtype == kBF16) return loss_of_vectors<BF16>(o, row, e);
      if (o.x_dtype == kF16) return loss_of_vectors<F16>(o, row, e);
      return loss_of_vectors<float>(o, row, e);
    }
  }
  const int64_t n = o.classes;
  A* __restrict z = static_cast<A*>(scratch);  // logits, then less the largest
  A* __restrict e = z + n;                     // their exponentials, then the gradient
  A* __restrict q = e + n;
  A* __restrict dq = q + n;
  const A* __restrict weight = static_cast<const A*>(o.weight);
  const A scale = static_cast<A>(o.scale), cap = static_cast<A>(o.cap), smoothing = static_cast<A>(o.smoothing);
  const A share = smoothing / static_cast<A>(n), z_loss = static_cast<A>(o.z_loss);
  const A infinity = static_cast<A>(__builtin_inff());
  const bool probabilities = row.q != nullptr, counts = probabilities || row.target >= 0;

  widen_row(o.x_dtype, row.x, z, n);
  transform(z, n, scale, cap);
  const A top = largest(z, n), base = top == -infinity ? A(0) : top;
  const A sum = sum_over<A>(n, [=](int64_t c) { return e[c] = exp_(z[c] -= base); });
  const A rel = log_(sum);  // -log of the largest class's probability
  const A lse = top == infinity ? infinity : base + rel;

  A mass = A(0), loss = A(0), entropy = A(0);
  row.hit = 0;
  if (probabilities) {
    widen_row(o.q_dtype, row.q, q, n);
    if (weight)
      for (int64_t c = 0; c < n; ++c) q[c] *= weight[c];
    mass = sum_over<A>(n, [=](int64_t c) { return q[c]; });
    loss = sum_over<A>(n, [=](int64_t c) { return q[c] * (rel - z[c]); });
  } else if (counts) {
    mass = weight ? weight[row.target] : A(1);
    loss = mass * (rel - z[row.target]);
    row.hit = z[row.target] + base >= top;
  }
  if (counts && smoothing != A(0)) {
    const A spread = weight ? sum_over<A>(n, [=](int64_t c) { return weight[c] * (rel - z[c]); })
                            : sum_over<A>(n, [=](int64_t c) { return rel - z[c]; });
    loss = (A(1) - smoothing) * loss + share * spread;
  }
  if (counts && z_loss != A(0)) loss += z_loss * mass * lse * lse;
  if (o.entropy) entropy = rel - sum_over<A>(n, [=](int64_t c) { return e[c] == A(0) ? A(0) : e[c] * z[c]; }) / sum;
  row.loss = loss;
  row.lse = lse;
  row.entropy = entropy;

  const A factor = counts ? static_cast<A>(row.factor) : A(0), dentropy = static_cast<A>(row.dentropy);
  if (row.dq != nullptr) {
    const A penalty = z_loss * lse * lse;
    for (int64_t c = 0; c < n; ++c) dq[c] = factor * ((A(1) - smoothing) * (rel - z[c]) + penalty);
    if (weight)
      for (int64_t c = 0; c < n; ++c) dq[c] *= weight[c];
    narrow_row(o.q_dtype, dq, row.dq, n);
  }
  if (row.dx == nullptr) return;

  A slope = (A(1) - smoothing) * mass + A(2) * z_loss * mass * lse;
  if (smoothing != A(0)) slope += share * static_cast<A>(o.weight_sum);
  const A along = (factor == A(0) ? A(0) : factor * slope) + static_cast<A>(row.dlse);
  if (factor == A(0) && along == A(0) && dentropy == A(0)) {
    // Zeros, whatever the logits are.
    for (int64_t c = 0; c < n; ++c) e[c] = A(0);
    return narrow_row(o.x_dtype, e, row.dx, n);
  }
  if (dentropy != A(0)) {
    for (int64_t c = 0; c < n; ++c)
      e[c] = e[c] == A(0) ? A(0) : e[c] / sum * (along - dentropy * (z[c] - rel + entropy));
  } else {
    const A part = along / sum;
    for (int64_t c = 0; c < n; ++c) e[c] *= part;
  }
  if (factor != A(0)) {
    const A own = factor * (A(1) - smoothing), spread = factor * share;
    if (probabilities)
      for (int64_t c = 0; c < n; ++c) e[c] -= own * q[c];
    else
      e[row.target] -= own * mass;
    if (smoothing != A(0))
      for (int64_t c = 0; c < n; ++c) e[c] -= spread * (weight ? weight[c] : A(1));
  }
  if (cap != A(0))
    for (int64_t c = 0; c < n; ++c) {
      const A t = (z[c] + base) / cap;
      e[c] *= A(1) - t * t;
    }
  if (scale != A(1))
    for (int64_t c = 0; c < n; ++c) e[c] *= scale;
  narrow_row(o.x_dtype, e, row.dx, n);
}

}  // namespace

extern const CrossEntropyKernels cross_entropy_kernels;
const CrossEntropyKernels cross_entropy_kernels = {{loss_of_row<float>, loss_of_row<double>}};

}  // namespace fastllm::FASTLLM_ISA
