// rotary_rows on the CPU: query and key turned by the angles of their positions.
#include "rotary.h"

#include "ids.h"
#include "strided.h"

namespace fastllm {
namespace {

constexpr int64_t kPositions = 32;  // whose angles one thread holds at a time

// Query or key and what becomes of it, (batch, heads, positions, features).
struct Turned {
  Tensor x, y;
  int64_t heads, bytes;
  bool heads_inside;  // the heads of a position lie closer than the positions of a head
  TurnRun turn_run;

  Turned(const char* op, const Tensor& x_, bool interleaved)
      : x(x_.dim() != 4 || x_.size(3) <= 1 || x_.stride(3) == 1 ? x_ : torch::stable::contiguous(x_)), y(x) {
    if (x_.dim() != 4 || !is_narrow_float(x_.scalar_type()))
      refuse(op, ": query and key must be float32, float16 or bfloat16 of 4 dimensions");
    heads = x.size(1);
    bytes = element_size(x.scalar_type());
    turn_run = rotary_kernels().turn_run[dtype_index(x.scalar_type())][interleaved];
    // By the strides that came, so that a fake tensor's say the same.
    heads_inside = x_.stride(1) < x_.stride(2);
    std::vector<int64_t> shape = shape_of(x);
    if (heads_inside) std::swap(shape[1], shape[2]);
    y = empty_like_device(x, shape, x.scalar_type());
    advise_huge_pages(y);
    if (heads_inside) y = torch::stable::transpose(y, 1, 2);
  }

  // Heads [head, head + n) of one position, or one head of n positions.
  void turn(RotaryRun run, int64_t batch, int64_t head, int64_t position, int64_t along) const {
    run.x = static_cast<const char*>(x.const_data_ptr()) +
            (batch * x.stride(0) + head * x.stride(1) + position * x.stride(2)) * bytes;
    run.y = static_cast<char*>(y.mutable_data_ptr()) +
            (batch * y.stride(0) + head * y.stride(1) + position * y.stride(2)) * bytes;
    run.x_stride = x.stride(along);
    run.y_stride = y.stride(along);
    run.rest = x.size(3) - 2 * run.half;
    turn_run(run);
  }

  // Positions `first` to `first + n`, whose angles are those of `angles`.
  void turn_positions(const RotaryRun& angles, int64_t batch, int64_t first, int64_t n) const {
    RotaryRun run = angles;
    if (heads_inside) {
      run.count = heads;
      run.angle_stride = 0;
      for (int64_t p = 0; p < n; ++p, run.cos += run.half, run.sin += run.half) turn(run, batch, 0, first + p, 1);
    } else {
      run.count = n;
      run.angle_stride = run.half;
      for (int64_t head = 0; head < heads; ++head) turn(run, batch, head, first, 2);
    }
  }
};

// Cosines or sines, (positions, half) or (batch, positions, half).
struct Table {
  const char* data;
  int64_t batch_stride, row_stride, column_stride, bytes;
  ReadAngles read_angles;

  Table(const char* op, const Tensor& t, int64_t batch) {
    const int64_t d = t.dim();
    if (d < 2 || d > 3 || !is_narrow_float(t.scalar_type()) || (d == 3 && t.size(0) != 1 && t.size(0) != batch))
      refuse(op, ": cos and sin must be float32, float16 or bfloat16 of (P, half) or (batch, P, half)");
    data = static_cast<const char*>(t.const_data_ptr());
    batch_stride = d == 3 && t.size(0) != 1 ? t.stride(0) : 0;
    row_stride = t.stride(d - 2);
    column_stride = t.stride(d - 1);
    bytes = element_size(t.scalar_type());
    read_angles = rotary_kernels().read_angles[dtype_index(t.scalar_type())];
  }

  void read(int64_t batch, int64_t row, float sign, float* to, int64_t half) const {
    read_angles(data + (batch * batch_stride + row * row_stride) * bytes, column_stride, sign, to, half);
  }
};

// (position_ids, contiguous, or none), once every position is found to be a row of the tables.
std::optional<Tensor> check_positions(const char* op, const std::optional<Tensor>& ids, int64_t offset, int64_t batch,
                                      int64_t length, int64_t rows) {
  if (!ids.has_value()) {
    if (offset < 0 || offset > rows - length) refuse(op, ": positions must be rows of cos and sin");
    return std::nullopt;
  }
  if (ids->numel() != length && ids->numel() != batch * length) refuse(op, ": position_ids must be one a position");
  const Tensor found = check_indices(op, *ids);
  const int64_t bad = first_outside(found, static_cast<uint64_t>(rows));
  if (bad >= 0) {
    std::ostringstream text;
    text << "rotary_embedding: position_ids " << id_at(found, bad) << " at [" << place(found, bad)
         << "] is out of range: expected a row of cos, in [0, " << rows << ')';
    throw std::out_of_range(text.str());
  }
  return found;
}

// The turned query and key; an empty one for a key that is none. Features past twice the tables' columns are copied.
std::tuple<Tensor, Tensor> rotary_rows(const Tensor& query, const std::optional<Tensor>& key, const Tensor& cos_,
                                       const Tensor& sin_, const std::optional<Tensor>& position_ids, int64_t offset,
                                       bool interleaved, bool inverse) {
  const char* op = "rotary_rows";
  std::vector<Turned> turned{Turned(op, query, interleaved)};
  if (key.has_value()) turned.emplace_back(op, *key, interleaved);
  const int64_t batch = query.size(0), length = query.size(2), half = cos_.size(cos_.dim() - 1);
  const Table cos(op, cos_, batch), sin(op, sin_, batch);
  if (shape_of(cos_) != shape_of(sin_)) refuse(op, ": cos and sin must have one shape");
  for (const Turned& t : turned)
    if (t.x.size(0) != batch || t.x.size(2) != length || t.x.size(3) < 2 * half)
      refuse(op, ": key must have query's batch and positions, and both the features that are turned");
  const std::optional<Tensor> ids =
      check_positions(op, position_ids, offset, batch, length, cos_.size(cos_.dim() - 2));
  const bool shared = ids.has_value() && ids->numel() == length;  // by all sequences
  const auto row_of = [&](int64_t b, int64_t s) {
    return ids.has_value() ? id_at(*ids, shared ? s : b * length + s) : offset + s;
  };
  int64_t features = 0;
  for (const Turned& t : turned) features += t.heads * t.x.size(3);
  torch::stable::parallel_for(0, batch * length, row_grain(features), [&](int64_t begin, int64_t end) {
    const Scratch scratch(2 * kPositions * half * static_cast<int64_t>(sizeof(float)));
    float* cosines = static_cast<float*>(scratch.get());
    float* sines = cosines + kPositions * half;
    for (int64_t i = begin, n = 0; i < end; i += n) {
      const int64_t b = i / length, s = i % length;
      n = std::min({kPositions, end - i, length - s});
      for (int64_t p = 0; p < n; ++p) {
        cos.read(b, row_of(b, s + p), 1.0f, cosines + p * half, half);
        sin.read(b, row_of(b, s + p), inverse ? -1.0f : 1.0f, sines + p * half, half);
      }
      const RotaryRun angles{nullptr, nullptr, cosines, sines, 0, 0, 0, 0, half, 0};
      for (const Turned& t : turned) t.turn_positions(angles, b, s, n);
    }
  });
  return {turned[0].y, key.has_value() ? turned[1].y : empty_like_device(query, {0}, query.scalar_type())};
}

}  // namespace
}  // namespace fastllm

STABLE_TORCH_LIBRARY_IMPL(fastllm, CPU, m) { m.impl("rotary_rows", TORCH_BOX(&fastllm::rotary_rows)); }
