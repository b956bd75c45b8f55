// Built once per instruction set, like rows.cpp.
#include "../divergence.h"

#include "passes.h"

namespace fastllm::FASTLLM_ISA {
namespace {

// x = cap * tanh(x / cap) / temperature, in place.
template <class A>
void transform(A* __restrict x, int64_t n, A cap, A temperature) {
  if (cap != A(0))
    for (int64_t c = 0; c < n; ++c) x[c] = cap * tanh_(x[c] / cap);
  if (temperature != A(1))
    for (int64_t c = 0; c < n; ++c) x[c] /= temperature;
}

// log_p = the logarithm of p = softmax(log_p).
template <class A>
void log_softmax(A* __restrict log_p, A* __restrict p, int64_t n) {
  const A infinity = static_cast<A>(__builtin_inff());
  const A top = largest(log_p, n), base = top == -infinity ? A(0) : top;
  const A sum = sum_over<A>(n, [=](int64_t c) { return p[c] = exp_(log_p[c] -= base); });
  const A rel = log_(sum), part = A(1) / sum;
  for (int64_t c = 0; c < n; ++c) {
    log_p[c] -= rel;
    p[c] *= part;
  }
}

// KL(p || q), and difference = log p - log q where p is not 0, else 0. `difference` may be log_q.
template <class A>
A relative(const A* p, const A* log_p, const A* log_q, A* difference, int64_t n) {
  return sum_over<A>(n, [=](int64_t c) {
    const A d = p[c] == A(0) ? A(0) : log_p[c] - log_q[c];
    difference[c] = d;
    return p[c] * d;
  });
}

// slope = slope * (1 - tanh(x / cap)^2) * factor, as dtype to `to`; `bent` is scratch.
template <class A>
void write(const void* x, int x_dtype, A cap, A factor, A* __restrict slope, A* __restrict bent, void* to, int dtype,
           int64_t n) {
  if (cap != A(0)) {
    widen_row(x_dtype, x, bent, n);
    for (int64_t c = 0; c < n; ++c) {
      const A t = tanh_(bent[c] / cap);
      slope[c] *= A(1) - t * t;
    }
  }
  for (int64_t c = 0; c < n; ++c) slope[c] *= factor;
  narrow_row(dtype, slope, to, n);
}

// A row of logits, and what their softmax is made of.
template <class X>
struct Logits {
  const X* x;
  float temperature, base, rel, part;

  Logits(const X* x, int64_t n, float temperature) : x(x), temperature(temperature) {
    const float largest = largest_scaled(x, n, 1.0f), top = temperature == 1.0f ? largest : largest / temperature;
    base = top == -__builtin_inff() ? 0.0f : top;
  }

  void summed(float sum) {
    rel = log_(sum);
    part = 1.0f / sum;
  }

  // Less the largest.
  Vector at(int64_t c, int64_t some) const {
    const Vector z = load_some(x + c, some);
    return (temperature == 1.0f ? z : z / temperature) - base;
  }
};

// Whether divergence_of_vectors takes the row.
bool is_plain(const DivergenceOptions& o, const DivergenceRow& row) {
  return o.direction == kForward && row.indices == nullptr && o.cap == 0.0 && o.teacher_cap == 0.0 &&
         o.x_dtype == o.teacher_dtype && o.dx_dtype == o.x_dtype && o.dteacher_dtype == o.x_dtype;
}

// divergence_of_row of the forward direction, of 32 or 16 bits, vector by vector: the same numbers, in the same order.
// Four passes with two rows of scratch, where divergence_of_row takes a dozen with four.
template <class X>
void divergence_of_vectors(const DivergenceOptions& o, DivergenceRow& row, float* scratch) {
  const int64_t n = o.classes;
  const float temperature = static_cast<float>(o.temperature), factor = static_cast<float>(row.factor) * temperature;
  Logits<X> student(static_cast<const X*>(row.x), n, temperature);
  Logits<X> teacher(static_cast<const X*>(row.teacher), n, temperature);
  float* const of_student = scratch;
  float* const of_teacher = scratch + n;
  float sums[2];
  sums_over<2>(n, sums, [=](int64_t c, int64_t some) {
    const Vector mine = keep_some(exp_to_88<Vector, Unsigned>(student.at(c, some)), some);
    const Vector theirs = keep_some(exp_to_88<Vector, Unsigned>(teacher.at(c, some)), some);
    store_some(of_student + c, mine, some);
    store_some(of_teacher + c, theirs, some);
    return Terms<2>{{mine, theirs}};
  });
  student.summed(sums[0]);
  teacher.summed(sums[1]);
  // log p - log q where p is not 0, else 0.
  const auto difference = [=](Vector p, int64_t c, int64_t some) {
    const Vector d = (teacher.at(c, some) - teacher.rel) - (student.at(c, some) - student.rel);
    return p == 0.0f ? Vector{} : d;
  };
  sums_over<2>(n, sums, [=](int64_t c, int64_t some) {
    const Vector p = load_some(of_teacher + c, some) * teacher.part;
    return Terms<2>{{p, p * difference(p, c, some)}};
  });
  const float mass = sums[0], value = sums[1];
  row.value = value * temperature * temperature;
  X* const dx = static_cast<X*>(row.dx);
  X* const dteacher = static_cast<X*>(row.dteacher);
  if (dx == nullptr && dteacher == nullptr) return;
  each_vector(n, [=](int64_t c, int64_t some) {
    const Vector p = load_some(of_teacher + c, some) * teacher.part;
    const Vector q = load_some(of_student + c, some) * student.part;
    const Vector by_teacher = dteacher == nullptr ? Vector{} : p * (difference(p, c, some) - value) * factor;
    if (dx != nullptr) store_some(dx + c, (q * mass - p) * factor, some);
    if (dteacher != nullptr) store_some(dteacher + c, by_teacher, some);
  });
}

template <class A>
void divergence_of_row(const DivergenceOptions& o, DivergenceRow& row, void* scratch) {
  if constexpr (sizeof(A) == sizeof(float)) {
    if (is_plain(o, row)) {
      float* const room = static_cast<float*>(scratch);
      if (o.x_dtype == kBF16) return divergence_of_vectors<BF16>(o, row, room);
      if (o.x_dtype == kF16) return divergence_of_vectors<F16>(o, row, room);
      return divergence_of_vectors<float>(o, row, room);
    }
  }
  const int64_t n = o.classes;
  A* __restrict log_q = static_cast<A*>(scratch);
  A* __restrict q = log_q + n;
  A* __restrict log_p = q + n;
  A* __restrict p = log_p + n;
  A* __restrict spare = p + n;
  A* __restrict given = spare + n;
  const A cap = static_cast<A>(o.cap), teacher_cap = static_cast<A>(o.teacher_cap);
  const A temperature = static_cast<A>(o.temperature), beta = static_cast<A>(o.beta), rest = A(1) - beta;
  // The square of the temperature in the loss, over the temperature that the logits are divided by.
  const A factor = static_cast<A>(row.factor) * temperature;

  widen_row(o.x_dtype, row.x, log_q, n);
  transform(log_q, n, cap, temperature);
  log_softmax(log_q, q, n);
  if (row.indices != nullptr) {
    for (int64_t c = 0; c < n; ++c) p[c] = A(0);
    widen_row(o.teacher_dtype, row.teacher, given, o.kept);
    for (int64_t k = 0; k < o.kept; ++k) p[row.indices[k]] += given[k];
    for (int64_t c = 0; c < n; ++c) log_p[c] = log_of(p[c]);
  } else {
    widen_row(o.teacher_dtype, row.teacher, log_p, n);
    transform(log_p, n, teacher_cap, temperature);
    log_softmax(log_p, p, n);
  }

  A value;
  // Each direction leaves the slope by the student's logits in log_q and that by the teacher's in log_p.
  if (o.direction == kForward) {
    const A mass = sum_over<A>(n, [=](int64_t c) { return p[c]; });
    value = relative(p, log_p, log_q, log_p, n);
    for (int64_t c = 0; c < n; ++c) log_q[c] = q[c] * mass - p[c];
    if (row.dteacher != nullptr)
      for (int64_t c = 0; c < n; ++c) log_p[c] = p[c] * (log_p[c] - value);
  } else if (o.direction == kReverse) {
    value = relative(q, log_q, log_p, log_q, n);
    for (int64_t c = 0; c < n; ++c) log_q[c] = q[c] * (log_q[c] - value);
    if (row.dteacher != nullptr)
      for (int64_t c = 0; c < n; ++c) log_p[c] = p[c] - q[c];
  } else {
    // Of the mixture, finite where p and q are 0 or underflow in the sum.
    const A least = sizeof(A) == 8 ? static_cast<A>(__DBL_MIN__) : static_cast<A>(__FLT_MIN__);
    for (int64_t c = 0; c < n; ++c) {
      const A m = beta * p[c] + rest * q[c];
      spare[c] = log_of(m < least ? least : m);
    }
    const A of_p = relative(p, log_p, spare, log_p, n), of_q = relative(q, log_q, spare, log_q, n);
    value = beta * of_p + rest * of_q;
    for (int64_t c = 0; c < n; ++c) log_q[c] = rest * (q[c] * (log_q[c] - of_q));
    if (row.dteacher != nullptr)
      for (int64_t c = 0; c < n; ++c) log_p[c] = beta * (p[c] * (log_p[c] - of_p));
  }
  row.value = value * temperature * temperature;
  if (row.dteacher != nullptr)
    write(row.teacher, o.teacher_dtype, teacher_cap, factor, log_p, spare, row.dteacher, o.dteacher_dtype, n);
  if (row.dx != nullptr) write(row.x, o.x_dtype, cap, factor, log_q, spare, row.dx, o.dx_dtype, n);
}

}  // namespace

extern const DivergenceKernels divergence_kernels;
const DivergenceKernels divergence_kernels = {{divergence_of_row<float>, divergence_of_row<double>}};

}  // namespace fastllm::FASTLLM_ISA
