// Built once per instruction set, like rows.cpp.
#include "../cross_entropy.h"

#include <type_traits>

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

// A plain row, or a vector of them: the logit of the target less the largest, its class's weight, and what loss and
// lse count in the gradient. `counts` is 1 or 0, and where it is 0 the others but `dlse` are 0 too.
template <class V>
struct Targets {
  V counts, own, mass, factor, dlse;
};

// What comes of them. The gradient is the exponentials times `part`, less `less` at the target; 0 where `along` and the
// factor are, whatever the logits are.
template <class V>
struct PlainLoss {
  V loss, lse, hit, along, part, less;
};

// `rel` is log(sum), so -log of the largest class's probability.
template <class V>
PlainLoss<V> plain_loss(const LossOptions& o, const Targets<V>& t, V top, V sum, V rel) {
  const float z_loss = static_cast<float>(o.z_loss), infinity = __builtin_inff();
  const V none = V{}, one = V{} + 1.0f, base = top == -infinity ? none : top;
  const V lse = top == infinity ? V{} + infinity : base + rel;
  V loss = t.mass * (rel - t.own);
  if (z_loss != 0.0f) loss += z_loss * t.mass * lse * lse;
  const V slope = t.mass + 2.0f * z_loss * t.mass * lse;
  const V along = (t.factor == 0.0f ? none : t.factor * slope) + t.dlse, reached = t.own + base >= top ? one : none;
  return {t.counts != 0.0f ? loss : none, lse, t.counts != 0.0f ? reached : none, along, along / sum,
          t.factor * t.mass};
}

// loss_of_row of 32 or 16 bits, vector by vector: the same numbers, in the same order.
template <class X>
void loss_of_vectors(const LossOptions& o, LossRow& row, float* e) {
  const int64_t n = o.classes;
  const X* x = static_cast<const X*>(row.x);
  X* dx = static_cast<X*>(row.dx);
  const float scale = static_cast<float>(o.scale), infinity = __builtin_inff();
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
  Targets<float> target{0.0f, 0.0f, 0.0f, 0.0f, static_cast<float>(row.dlse)};
  if (row.target >= 0)
    target = {1.0f, widen(x[row.target]) * scale - base,
              o.weight != nullptr ? static_cast<const float*>(o.weight)[row.target] : 1.0f,
              static_cast<float>(row.factor), target.dlse};
  const PlainLoss<float> found = plain_loss(o, target, top, sum, log_(sum));
  row.loss = found.loss;
  row.lse = found.lse;
  row.hit = found.hit;
  row.entropy = 0;
  if (dx == nullptr) return;
  if (target.factor == 0.0f && found.along == 0.0f)
    return each_vector(n, [=](int64_t c, int64_t some) { store_some(dx + c, Vector{}, some, past); });
  const int64_t at = target.factor == 0.0f ? -1 : row.target / kVector * kVector, lane = row.target - at;
  const float of_target = target.factor == 0.0f ? 0.0f : (e[row.target] * found.part - found.less) * scale;
  each_vector(n, [=](int64_t c, int64_t some) {
    Vector v = load_some(e + c, some) * found.part * scale;
    if (c == at) v[lane] = of_target;
    store_some(dx + c, v, some, past);
  });
}

// log_ of numbers in [1, 256), in a loop that the compiler turns into vector code: the same bits of each of the 2^26
// floats there. fdlibm's log, in double.
inline float log_of_sum(float x) {
  const uint32_t above = as_bits(x) - 0x3F3504F3u;  // over the root of 1/2, whose exponent it begins to count at
  const double k = static_cast<double>(static_cast<int32_t>(above >> 23));
  const double f = static_cast<double>(as_float((above & 0x007FFFFFu) + 0x3F3504F3u)) - 1.0;
  const double s = f / (2.0 + f), z = s * s, w = z * z, half = 0.5 * f * f;
  const double even = w * (3.999999999940941908e-01 + w * (2.222219843214978396e-01 + w * 1.531383769920937332e-01));
  const double last = 1.818357216161805012e-01 + w * 1.479819860511658591e-01;
  const double odd = z * (6.666666666666735130e-01 + w * (2.857142874366239149e-01 + w * last));
  return static_cast<float>(k * 6.93147180369123816490e-01 -
                            ((half - (s * (half + (even + odd)) + k * 1.90821492927058770002e-10)) - f));
}

// log_ of each.
Vector logs_of(Vector sums) {
  alignas(64) float x[kVector];
  store(x, sums);
  bool usual = true;  // what sums of exponentials beside the largest mostly are
  for (int l = 0; l < kVector; ++l) usual &= x[l] >= 1.0f && x[l] < 256.0f;
  if (usual)
    for (int l = 0; l < kVector; ++l) x[l] = log_of_sum(x[l]);
  else
    for (int l = 0; l < kVector; ++l) x[l] = log_(x[l]);
  return load(x);
}

// What turn() may read and write after the last element.
constexpr int64_t kSlack = 8;

// to, `columns` rows of `across`, = from, `rows` rows of `along`, turned. Of both the last rows go on to a multiple of
// 8, and so do their elements: what is written past the end of a row is where the next one begins, which comes later.
void turn(float* to, int64_t across, const float* from, int64_t along, int64_t rows, int64_t columns) {
#if defined(__AVX2__)
  for (int64_t r = (rows - 1) / 8 * 8; r >= 0; r -= 8)
    for (int64_t c = 0; c < columns; c += 8) turn_8x8(to + c * across + r, across, from + r * along + c, along);
#else
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) to[c * across + r] = from[r * along + c];
#endif
}

// with(row, at, n) for what lies side by side in memory: all rows of n elements at once, or each.
template <class T, class With>
void each_stretch(T* rows, int64_t step, int64_t count, int64_t n, const With& with) {
  if (step == n * static_cast<int64_t>(sizeof(T))) return with(rows, 0, count * n);
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  for (int64_t l = 0; l < count; ++l) with(reinterpret_cast<T*>(reinterpret_cast<Byte*>(rows) + l * step), l * n, n);
}

// Whether turn() may take rows, or write them, where they are.
template <class T>
bool turns_in_place(int64_t step, int64_t count, int64_t n) {
  return std::is_same_v<T, float> && count == kVector && n % 8 == 0 && step == 4 * n;
}

// The sum of n vectors, as sums_over adds: partial sums, then halves onto halves.
Vector sum_of_classes(const float (*e)[kVector], int64_t n) {
  Vector sums[kLanes];
  for (int64_t c = 0; c < n && c < kLanes; ++c) sums[c] = load(e[c]);
  for (int64_t c = kLanes; c < n; ++c) sums[c % kLanes] += load(e[c]);
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t c = 0; c < half && c + half < n; ++c) sums[c] += sums[c + half];
  return sums[0];
}

// Up to a vector of rows from `first` on.
template <class X>
void losses_of_lanes(const LossOptions& o, const FewRows& rows, int64_t first) {
  const int64_t n = o.classes, left = rows.count - first, count = left < kVector ? left : kVector;
  const float scale = static_cast<float>(o.scale), none = -__builtin_inff();
  alignas(64) float flat[FewRows::kMostClasses * kVector + kSlack], e[FewRows::kMostClasses][kVector];
  const X* x = reinterpret_cast<const X*>(rows.x + first * rows.x_step);
  if (turns_in_place<X>(rows.x_step, count, n)) {
    turn(e[0], kVector, reinterpret_cast<const float*>(x), n, kVector, n);
  } else {
    each_stretch(x, rows.x_step, count, n, [&](const X* from, int64_t at, int64_t some) {
      each_vector(some, [=, to = flat + at](int64_t c, int64_t few) {
        store_some(to + c, load_some(from + c, few), few);
      });
    });
    __builtin_memset(flat + count * n, 0, static_cast<size_t>((kVector - count) * n + kSlack) * sizeof(float));
    turn(e[0], kVector, flat, n, kVector, n);
  }
  Vector top = all(none);
  for (int64_t c = 0; c < n; ++c) top = larger(load(e[c]) * scale, top);
  const Vector base = top == none ? Vector{} : top;
  alignas(64) float counts[kVector] = {}, own[kVector] = {}, mass[kVector] = {};
  alignas(64) float factor[kVector] = {}, dlse[kVector] = {};
  const int64_t* ids = rows.targets + first;
  for (int64_t l = 0; l < count; ++l) {
    dlse[l] = rows.dlses != nullptr ? rows.dlses[first + l] : rows.dlse;
    if (ids[l] == rows.ignored || static_cast<uint64_t>(ids[l]) >= static_cast<uint64_t>(n)) continue;
    counts[l] = 1.0f;
    own[l] = e[ids[l]][l];
    mass[l] = o.weight != nullptr ? static_cast<const float*>(o.weight)[ids[l]] : 1.0f;
    factor[l] = rows.factors != nullptr ? rows.factors[first + l] : rows.factor;
  }
  const Targets<Vector> targets{load(counts), load(own) * scale - base, load(mass), load(factor), load(dlse)};
  for (int64_t c = 0; c < n; ++c) store(e[c], exp_to_88<Vector, Unsigned>(load(e[c]) * scale - base));
  const Vector sum = sum_of_classes(e, n);
  const PlainLoss<Vector> found = plain_loss(o, targets, top, sum, logs_of(sum));
  store_some(rows.loss + first, found.loss, count);
  if (rows.lse != nullptr) store_some(rows.lse + first, found.lse, count);
  if (rows.hit != nullptr) store_some(rows.hit + first, found.hit, count);
  if (rows.dx == nullptr) return;
  const Vector along = found.along != 0.0f ? found.along : targets.factor;  // 0: the row's gradient is 0
  for (int64_t l = 0; l < count; ++l)
    if (factor[l] != 0.0f) own[l] = e[ids[l]][l];
  store(own, (load(own) * found.part - found.less) * scale);
  for (int64_t c = 0; c < n; ++c) {
    const Vector v = load(e[c]) * found.part * scale;
    store(e[c], along != 0.0f ? v : Vector{});
  }
  for (int64_t l = 0; l < count; ++l)
    if (factor[l] != 0.0f) e[ids[l]][l] = own[l];
  X* dx = reinterpret_cast<X*>(rows.dx + first * rows.dx_step);
  if (turns_in_place<X>(rows.dx_step, count, n))
    return turn(reinterpret_cast<float*>(dx), n, e[0], kVector, n, kVector);
  turn(flat, n, e[0], kVector, n, kVector);
  each_stretch(dx, rows.dx_step, count, n, [&](X* to, int64_t at, int64_t some) {
    each_vector(some, [=, from = flat + at](int64_t c, int64_t few) {
      store_some(to + c, load_some(from + c, few), few);
    });
  });
}

void losses_of_few(const LossOptions& o, const FewRows& rows) {
  for (int64_t first = 0; first < rows.count; first += kVector) {
    if (o.x_dtype == kBF16)
      losses_of_lanes<BF16>(o, rows, first);
    else if (o.x_dtype == kF16)
      losses_of_lanes<F16>(o, rows, first);
    else
      losses_of_lanes<float>(o, rows, first);
  }
}

template <class A>
void loss_of_row(const LossOptions& o, LossRow& row, void* scratch) {
  if constexpr (sizeof(A) == sizeof(float)) {
    float* const e = static_cast<float*>(scratch);
    if (is_plain(o, row.q != nullptr)) {
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
const CrossEntropyKernels cross_entropy_kernels = {{loss_of_row<float>, loss_of_row<double>}, losses_of_few};

}  // namespace fastllm::FASTLLM_ISA
