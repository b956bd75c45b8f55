// Runs the GPU kernels of csrc/cuda, those very functions, thread by thread on a CPU, and compares with sums in double
// and, bit for bit, with sums in the order that csrc/order.h lays down. Built with AddressSanitizer and UBSan, so that
// an index out of bounds or a misaligned vector ends the run. tests/ops/test_embedding_native.py builds and runs it.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

struct Dim {
  unsigned x = 1, y = 1;
};
static Dim gridDim, blockDim, blockIdx, threadIdx;
#define FASTLLM_DEVICE inline
#define FASTLLM_KERNEL inline
static bool id_refused = false;
#define FASTLLM_ASSERT(condition) (id_refused |= !(condition))
#define FASTLLM_STORE_STREAMING(to, value) (*(to) = (value))

#include "../csrc/cuda/embedding_backward_kernels.cuh"
#include "../csrc/cuda/embedding_forward_kernels.cuh"

using namespace fastllm;

#define REQUIRE(condition, ...)                                      \
  do {                                                               \
    if (!(condition)) {                                              \
      std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition);    \
      std::printf(__VA_ARGS__);                                      \
      std::printf("\n");                                             \
      std::exit(1);                                                  \
    }                                                                \
  } while (0)

static std::mt19937_64 random_bits(1);
static int64_t below(int64_t n) { return static_cast<int64_t>(random_bits() % static_cast<uint64_t>(n)); }

// An allocation of its own, of exactly this many elements, at a 16-byte boundary and no better.
template <class T>
struct Buffer {
  explicit Buffer(int64_t n) : size(n), owner(nullptr, std::free) {
    const size_t bytes = static_cast<size_t>(n) * sizeof(T);
    void* memory = nullptr;
    if (posix_memalign(&memory, 16, bytes) != 0) std::abort();
    std::memset(memory, 0xFF, bytes);  // NaNs, where a kernel reads what nobody wrote
    owner.reset(static_cast<T*>(memory));
  }
  T* data() const { return owner.get(); }
  T& operator[](int64_t i) const { return owner.get()[i]; }
  int64_t size;
  std::unique_ptr<T, void (*)(void*)> owner;
};

// The launch shape of csrc/cuda/runtime.cuh.
template <class F>
void run_grid(int64_t lines, int64_t columns, int64_t width, F&& kernel) {
  const int64_t vectors = (columns + width - 1) / width;
  const int64_t x = std::min<int64_t>(256, (vectors + 31) / 32 * 32), y = 256 / x;
  blockDim = {static_cast<unsigned>(x), static_cast<unsigned>(y)};
  gridDim = {static_cast<unsigned>((lines + y - 1) / y), static_cast<unsigned>((vectors + x - 1) / x)};
  // The hardware promises no order of blocks and threads: from the last to the first here, to show that none matters.
  for (blockIdx.y = gridDim.y; blockIdx.y-- > 0;)
    for (blockIdx.x = gridDim.x; blockIdx.x-- > 0;)
      for (threadIdx.y = blockDim.y; threadIdx.y-- > 0;)
        for (threadIdx.x = blockDim.x; threadIdx.x-- > 0;) kernel();
}

template <class F>
void run_line(int64_t count, F&& kernel) {
  blockDim = {256, 1};
  gridDim = {static_cast<unsigned>((count + 255) / 256), 1};
  threadIdx.y = blockIdx.y = 0;
  for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x)
    for (threadIdx.x = 0; threadIdx.x < 256; ++threadIdx.x) kernel();
}

struct Case {
  int64_t rows, columns, tokens, repeats, padding;
  bool positions, by_freq, accumulate, narrow_vectors;
  double scale;
  int distribution;
};

// The sum of a segment in the order of order.h, one element at a time.
template <class T>
Acc<T> in_order(const std::vector<const T*>& segment, int64_t column) {
  using A = Acc<T>;
  const int64_t n = static_cast<int64_t>(segment.size());
  A total = 0;
  for (int64_t outer = 0; outer < n; outer += kChunk * kChunk) {
    A group = 0;
    for (int64_t first = outer; first < std::min(n, outer + kChunk * kChunk); first += kChunk) {
      A part = widen(segment[first][column]);
      for (int64_t k = first + 1; k < std::min(n, first + kChunk); ++k) part += widen(segment[k][column]);
      group = first == outer ? part : group + part;
    }
    total = outer == 0 ? group : total + group;
  }
  return total;
}

template <class T, class O, int N>
void backward(const Case& c) {
  using A = Acc<T>;
  const int64_t grad_rows = c.tokens * c.repeats;
  Buffer<T> grad(grad_rows * c.columns);
  for (int64_t i = 0; i < grad.size; ++i) narrow(static_cast<A>(below(1 << 24) - (1 << 23)) / A(1234567), grad[i]);
  std::vector<int64_t> ids(c.tokens);
  for (int64_t t = 0; t < c.tokens; ++t) {
    const int64_t kinds[] = {below(c.rows), c.rows - 1, below(below(c.rows) + 1), below(2) * (c.rows - 1)};
    ids[t] = c.positions ? t : kinds[c.distribution];
  }

  // What sort_tokens gives.
  Buffer<uint32_t> keys(c.tokens), tokens(c.tokens);
  std::vector<uint32_t> order(c.tokens);
  std::iota(order.begin(), order.end(), 0u);
  const auto key = [&](int64_t t) { return static_cast<uint32_t>(ids[t] == c.padding ? c.rows : ids[t]); };
  std::stable_sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) { return key(a) < key(b); });
  for (int64_t i = 0; i < c.tokens; ++i) {
    tokens[i] = order[i];
    keys[i] = key(order[i]);
  }

  const int64_t stride = c.columns + (c.accumulate ? N : 0);  // a gap between the rows of an existing gradient
  Buffer<O> out(c.rows * stride);
  for (int64_t i = 0; i < out.size; ++i) narrow(static_cast<A>(below(64) - 32), out[i]);
  std::vector<O> before(out.data(), out.data() + out.size);

  Buffer<Bounds> bounds(c.positions ? 0 : c.rows);
  if (!c.positions) std::fill_n(bounds.data(), c.rows, Bounds{0, 0});
  const int64_t slots = slots_for(grad_rows);
  Buffer<Task> tasks(slots);
  std::fill_n(tasks.data(), slots, Task{0, 0});
  Buffer<A> parts(slots * c.columns);
  const Sorted s{keys.data(), tokens.data(), bounds.data(), c.positions, c.tokens, c.repeats};
  const Output output{out.data(), stride, c.rows, c.columns, c.scale, c.by_freq, c.accumulate};

  if (!c.positions) run_line(c.tokens, [&] { find_bounds(keys.data(), c.tokens, c.rows, bounds.data()); });
  const T* g = grad.data();
  if (c.accumulate) {
    const int64_t lines = c.positions ? std::min(c.tokens, c.rows) : c.tokens;
    run_grid(lines, c.columns, N, [&] { write_rows<T, O, N, true>(g, s, output, tasks.data()); });
  } else {
    run_grid(c.rows, c.columns, N, [&] { write_rows<T, O, N, false>(g, s, output, tasks.data()); });
  }
  if (grad_rows > kChunk) {
    run_grid(slots, c.columns, N, [&] { sum_parts<T, N>(g, s, tasks.data(), slots, c.columns, parts.data()); });
    if (grad_rows > kChunk * kChunk)
      run_grid(slots, c.columns, N, [&] { sum_groups<A, N>(s, tasks.data(), slots, c.columns, parts.data()); });
    run_grid(slots, c.columns, N, [&] { write_long_rows<A, O, N>(s, output, tasks.data(), slots, parts.data()); });
  }

  std::vector<std::vector<const T*>> segments(c.rows);
  for (int64_t i = 0; i < c.tokens; ++i) {
    const int64_t t = order[i];
    if (ids[t] == c.padding || ids[t] >= c.rows) continue;
    for (int64_t r = 0; r < c.repeats; ++r) segments[ids[t]].push_back(g + (t + r * c.tokens) * c.columns);
  }
  for (int64_t row = 0; row < c.rows; ++row) {
    const auto& segment = segments[row];
    const double factor = c.by_freq && !segment.empty() ? c.scale / static_cast<double>(segment.size()) : c.scale;
    for (int64_t column = 0; column < stride; ++column) {
      const O got = out[row * stride + column], old = before[row * stride + column];
      O expected = old;
      double truth = static_cast<double>(widen(old));
      if (column < c.columns) {
        if (!c.accumulate) narrow(A(0), expected);
        if (!c.accumulate) truth = 0;
        if (!segment.empty()) {
          const A sum = static_cast<A>(factor) * in_order<T>(segment, column);
          narrow(c.accumulate ? widen(old) + sum : sum, expected);
          for (const T* from : segment) truth += factor * static_cast<double>(widen(from[column]));
        }
      }
      const double error = std::abs(static_cast<double>(widen(got)) - truth);
      const double eps = sizeof(O) == 8 ? 1e-14 : sizeof(O) == 4 ? 2e-6 : 1e-2;
      REQUIRE(widen(got) == widen(expected), "row %ld column %ld: %g, in order %g", row, column,
              static_cast<double>(widen(got)), static_cast<double>(widen(expected)));
      REQUIRE(error <= eps * (std::abs(truth) + static_cast<double>(segment.size() + 1)),
              "row %ld column %ld: %g, truth %g", row, column, static_cast<double>(widen(got)), truth);
    }
  }
}

template <class T, class O>
void backward_of_any_width(Case c) {
  constexpr int N = kVector<T>;
  if (c.narrow_vectors) {
    backward<T, O, 1>(c);
  } else {
    c.columns = (c.columns + N - 1) / N * N;
    backward<T, O, N>(c);
  }
}

template <class U, class Index>
void forward(int64_t rows, int64_t units, int64_t tokens, Vocabulary v) {
  const int64_t stride = units + below(3);
  Buffer<U> table(rows * stride), out(tokens * units);
  for (int64_t i = 0; i < rows * stride; ++i) table[i] = static_cast<U>(random_bits());
  Buffer<Index> ids(tokens);
  for (int64_t t = 0; t < tokens; ++t) ids[t] = static_cast<Index>(v.partial ? below(3 * rows) : below(rows));
  id_refused = false;
  run_grid((tokens + kTokensPerThread - 1) / kTokensPerThread, units, 1,
           [&] { gather_rows(table.data(), stride, ids.data(), tokens, units, v, out.data()); });
  REQUIRE(!id_refused, "a good id was refused");
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t u = 0; u < units; ++u) {
      const int64_t row = ids[t] - v.start;
      const U expected = row < 0 || row >= rows ? U{} : table[row * stride + u];
      REQUIRE(out[t * units + u] == expected, "token %ld unit %ld", t, u);
    }
  if (tokens == 0) return;
  for (const int64_t bad : {int64_t{-1}, v.partial ? int64_t{-7} : rows}) {
    ids[below(tokens)] = static_cast<Index>(bad);
    id_refused = false;
    run_grid((tokens + kTokensPerThread - 1) / kTokensPerThread, units, 1,
             [&] { gather_rows(table.data(), stride, ids.data(), tokens, units, v, out.data()); });
    REQUIRE(id_refused, "id %ld was taken", bad);
    ids[0] = static_cast<Index>(v.start);
    for (int64_t t = 0; t < tokens; ++t) ids[t] = static_cast<Index>(v.start);
  }
}

template <class T, int N>
void sum_forward(int64_t columns, double p) {
  using A = Acc<T>;
  const int64_t rows = 12, counts[] = {12, 4, 1};
  std::vector<Buffer<T>> data;
  std::vector<Buffer<int64_t>> long_ids;
  std::vector<Buffer<int32_t>> int_ids;
  Tables t{};
  t.number = 3;
  for (int i = 0; i < 3; ++i) {
    const int64_t height = 5 + i, stride = columns + i * N;
    data.emplace_back(height * stride);
    for (int64_t e = 0; e < height * stride; ++e) narrow(static_cast<A>(below(512) - 256) / A(64), data[i][e]);
    long_ids.emplace_back(counts[i]);
    int_ids.emplace_back(counts[i]);
    for (int64_t e = 0; e < counts[i]; ++e) int_ids[i][e] = static_cast<int32_t>(long_ids[i][e] = below(height));
    t.data[i] = data[i].data();
    t.stride[i] = stride;
    t.rows[i] = height;
    t.is_long[i] = i != 1;
    t.ids[i] = i != 1 ? static_cast<const void*>(long_ids[i].data()) : int_ids[i].data();
    t.count[i] = counts[i];
    t.scale[i] = 1.0 + i;
  }
  const int64_t seed[] = {static_cast<int64_t>(random_bits() >> 2), static_cast<int64_t>(random_bits() >> 2)};
  const Dropout dropout{static_cast<uint64_t>(seed[0]), static_cast<uint64_t>(seed[1]), p};
  Buffer<T> out(rows * columns), dropped(rows * columns);
  run_grid(rows, columns, N, [&] { sum_tables<T, N>(t, rows, columns, p, seed, out.data()); });
  Buffer<T> ones(rows * columns);
  for (int64_t e = 0; e < rows * columns; ++e) narrow(A(1), ones[e]);
  run_grid(rows, columns, N, [&] { drop<T, N>(ones.data(), rows, columns, p, seed, dropped.data()); });
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t c = 0; c < columns; ++c) {
      A sum = 0;
      for (int i = 0; i < 3; ++i)
        sum += static_cast<A>(t.scale[i]) * widen(data[i][long_ids[i][row % counts[i]] * t.stride[i] + c]);
      const int64_t e = row * columns + c;
      const uint32_t word = dropout_words(dropout, dropout.first_row + static_cast<uint64_t>(row), c / 4).word[c % 4];
      const A factor = p < 1.0 && word >= dropout_threshold(dropout) ? static_cast<A>(1.0 / (1.0 - p)) : A(0);
      T expected, mask;
      narrow(sum * factor, expected);
      narrow(factor, mask);
      REQUIRE(widen(out[e]) == widen(expected), "row %ld column %ld", row, c);
      REQUIRE(widen(dropped[e]) == widen(mask), "mask at row %ld column %ld", row, c);
    }
}

int main(int argc, char** argv) {
  const int cases = argc > 1 ? std::atoi(argv[1]) : 100;
  for (int i = 0; i < cases; ++i) {
    Case c{};
    c.rows = 1 + below(i % 4 == 0 ? 3 : 200);
    c.columns = 1 + below(i % 7 == 0 ? 2100 : 40);
    c.repeats = i % 3 == 0 ? 1 + below(150) : 1;
    c.positions = i % 5 == 0;
    c.tokens = c.positions ? 1 + below(c.rows) : below(i % 2 == 0 ? 60 : 9000 / c.repeats + 1);
    if (c.columns > 40) c.tokens = std::min<int64_t>(c.tokens, 300 / c.repeats + 1);
    if (c.positions) c.tokens = std::min(c.tokens, c.rows);
    c.padding = c.positions ? -1 : below(4) - 1;
    c.by_freq = i % 6 == 1;
    c.accumulate = i % 2 == 1;
    c.narrow_vectors = i % 4 == 3;
    c.scale = i % 3 == 1 ? 0.37 : 1.0;
    c.distribution = static_cast<int>(below(4));
    switch (i % 6) {
      case 0: backward_of_any_width<float, float>(c); break;
      case 1: backward_of_any_width<BF16, BF16>(c); break;
      case 2: backward_of_any_width<F16, F16>(c); break;
      case 3: backward_of_any_width<double, double>(c); break;
      case 4: backward_of_any_width<BF16, float>(c); break;
      default: backward_of_any_width<F16, float>(c); break;
    }
    const int64_t rows = 1 + below(30);
    const Vocabulary whole{0, rows, false}, part{rows, rows, true};
    forward<uint16_t, int32_t>(rows, 1 + below(300), below(50), i % 2 == 0 ? whole : part);
    forward<uint64_t, int64_t>(rows, 1 + below(70), below(50), i % 2 == 0 ? part : whole);
    const double p[] = {0.0, 0.3, 1.0};
    sum_forward<BF16, 8>(8 * (1 + below(5)), p[i % 3]);
    sum_forward<float, 1>(1 + below(30), p[i % 3]);
  }
  // One id with more than kChunk * kChunk rows: parts, groups and the row.
  Case hot{2, 8, 20000, 1, -1, false, false, false, false, 1.0, 1};
  backward_of_any_width<BF16, BF16>(hot);
  backward_of_any_width<float, float>(hot);
  std::printf("%d cases agree\n", cases);
}
