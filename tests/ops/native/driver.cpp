// Runs the native CPU kernel over many shapes under sanitizers: every buffer is allocated to its exact size, so that a
// read or write beyond it is seen. It checks ranges of the results, not their values; the Python tests check those.
#include <cmath>
#include <cstdio>
#include <random>

#include "../../../fx_passes/ops/cpu/src/sus.cpp"

namespace {

std::mt19937 random_bits(1);

// Numbers as a diverging run has them.
float wild(float x) {
  const float scales[] = {1, 1, 1e-38f, 1e-20f, 1e9f, 1e19f, 1e38f}, special[] = {INFINITY, -INFINITY, NAN, 3e38f, 1e-45f};
  return random_bits() % 50 ? x * scales[random_bits() % 7] : special[random_bits() % 5];
}

struct Shape {
  int64_t batch, heads, groups, m, n, dk, dv, left, right;
  int effects;  // 1: a mask per query and key; 2: a bias; 4: document ids
  SusDtype dtype;
  bool masked;
  double c;
  int threads;
  uint32_t drop_below;
  bool wild;  // infinities, NaNs and numbers near overflow here and there
};

// A tensor [batch, rows, heads, width] in memory, handed on as [batch, heads, rows, width].
struct Tensor {
  std::vector<uint8_t> bytes;
  SusStrides strides;

  Tensor(int64_t batch, int64_t heads, int64_t rows, int64_t width, SusDtype dtype, bool is_wild = false)
      : bytes(size_t(batch * heads * rows * width) * (dtype ? 2 : 4)), strides{rows * heads * width, width, heads * width} {
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < batch * heads * rows * width; i++) {
      float x = normal(random_bits);
      if (is_wild) x = wild(x);
      sus::store_row(bytes.data(), i, dtype, 1, &x);
    }
  }
};

#define CHECK(x) \
  if (!(x)) return fprintf(stderr, "%s failed\n", #x), false

bool run(const Shape& s) {
  auto maybe = [&] { return s.wild && random_bits() % 3 == 0; };
  Tensor query(s.batch, s.heads, s.m, s.dk, s.dtype, maybe()), key(s.batch, s.groups, s.n, s.dk, s.dtype, maybe());
  Tensor value(s.batch, s.groups, s.n, s.dv, s.dtype, maybe()), out(s.batch, s.heads, s.m, s.dv, s.dtype);
  Tensor grad(s.batch, s.heads, s.m, s.dv, s.dtype, maybe());
  std::vector<uint8_t> mask(size_t(s.batch * s.n));
  for (auto& x : mask) x = random_bits() % 4 != 0;
  // Masks and biases per query and key, also as sizes of 1; some biases hide a whole row.
  const int64_t mask_rows = s.m % 3 ? s.m : 1, bias_heads = s.n % 2 ? s.heads : 1;
  std::vector<uint8_t> places(size_t(mask_rows * s.n));
  for (auto& x : places) x = random_bits() % 4 != 0;
  std::vector<float> bias(size_t(bias_heads * s.m * s.n));
  for (size_t i = 0; i < bias.size(); i++) bias[i] = random_bits() % 4 && i % 997 > 200 ? 0.5f : i % 2 ? -3.4e38f : -1e9f;
  const bool wild_bias = maybe();
  for (auto& x : bias)
    if (wild_bias) x = wild(x);
  std::vector<int64_t> query_ids(size_t(s.batch * s.m)), key_ids(size_t(s.n));
  for (auto& x : query_ids) x = random_bits() % 3;
  for (auto& x : key_ids) x = random_bits() % 3;
  const bool ascend = s.n % 2;
  for (int64_t b = 0; ascend && b < s.batch; b++)
    std::sort(query_ids.begin() + b * s.m, query_ids.begin() + (b + 1) * s.m);
  if (ascend) std::sort(key_ids.begin(), key_ids.end());
  std::vector<float> sinks(size_t(s.heads), 1.0f);
  if (maybe()) sinks[0] = wild(1.0f);
  const std::vector<int64_t> prefix(size_t(s.batch), s.n / 2);
  const bool prefixed = s.n % 3 == 0, documents = s.effects & 4;
  const int64_t rows = s.batch * s.heads * s.m;
  std::vector<float> maximum(rows), total(rows);
  SusCall call{query.bytes.data(), key.bytes.data(), value.bytes.data(), query.strides, key.strides, value.strides,
               s.masked ? mask.data() : nullptr, s.n, 1,
               s.effects & 1 ? places.data() : nullptr, {0, 0, mask_rows > 1 ? s.n : 0, 1},
               s.effects & 2 ? bias.data() : nullptr, {0, bias_heads > 1 ? s.m * s.n : 0, s.n, 1},
               documents ? query_ids.data() : nullptr, documents ? key_ids.data() : nullptr, s.m, 0,
               prefixed ? prefix.data() : nullptr, 1,
               s.n % 4 ? nullptr : sinks.data(), s.batch, s.heads, s.groups, s.m, s.n, ceil_div(s.dk, 16) * 16, ceil_div(s.dv, 16) * 16, s.dk, s.dv, s.left, s.right,
               0.2f, s.dtype, s.threads, ascend, s.m % 3 ? 0.0f : 2.0f, 1.25f};
  SusForward forward{call, s.c, 0x123456789abcdefull, 0xfedcba987654321ull, 4, 6, s.drop_below, out.bytes.data(),
                     out.strides, maximum.data(), total.data()};
  SusLists* lists = sus_forward(&forward);
  CHECK(lists);
  const bool usable = sus_lists_usable(lists);
  CHECK(usable || s.wild);
  const int64_t count = sus_lists_count(lists);
  std::vector<int64_t> offsets(rows + 1);
  std::vector<int32_t> keys(count);
  std::vector<float> weights(count);
  if (s.c > 0 && usable) sus_lists_export(lists, offsets.data(), keys.data(), weights.data(), s.threads);
  sus_lists_free(lists);
  CHECK(offsets[rows] == count || !usable);
  for (int64_t i = 0; i < rows && usable; i++) {
    CHECK(offsets[i + 1] - offsets[i] <= std::ceil(s.c) + 1);
    for (int64_t e = offsets[i]; e < offsets[i + 1]; e++)
      CHECK(keys[e] >= 0 && keys[e] < s.n && (prefixed || keys[e] <= i % s.m + s.right) && (s.drop_below ? weights[e] != 0 : weights[e] > 0));
  }
  for (float x : total) CHECK(!usable || (x >= 0.99f && std::isfinite(x)));
  Tensor query_grad(s.batch, s.heads, s.m, s.dk, s.dtype), key_grad(s.batch, s.groups, s.n, s.dk, s.dtype);
  Tensor value_grad(s.batch, s.groups, s.n, s.dv, s.dtype);
  std::vector<float> bias_grad(bias.size());
  SusBackward backward{call, grad.bytes.data(), out.bytes.data(), grad.strides, out.strides, offsets.data(), keys.data(),
                       weights.data(), query_grad.bytes.data(), key_grad.bytes.data(), value_grad.bytes.data(),
                       s.effects & 2 ? bias_grad.data() : nullptr, call.bias_strides};
  const int status = sus_backward(&backward);
  CHECK(status == 0 || (s.wild && status == 2));
  forward.out = nullptr;  // sampling only
  forward.maximum = forward.total = nullptr;
  lists = sus_forward(&forward);
  CHECK(lists && (!usable || (sus_lists_usable(lists) && sus_lists_count(lists) == count)));  // values do not matter
  sus_lists_free(lists);
  return true;
}

// What calls leave behind: as much as 512 MiB and 256 pieces, given to whoever wants about that size.
bool memory() {
  constexpr size_t MIB = size_t(1) << 20;
  auto floats = [](size_t mib) { return mib * MIB / sizeof(float); };
  auto leave = [&](int count, size_t mib) {
    std::vector<std::unique_ptr<Buffer>> buffers;
    for (int i = 0; i < count; i++) buffers.push_back(std::make_unique<Buffer>(floats(mib)));
  };
  sus_release_memory();
  leave(300, 2);
  CHECK(sus_release_memory() == int64_t(256 * 2 * MIB));
  leave(100, 6);
  CHECK(sus_release_memory() == int64_t(85 * 6 * MIB));
  leave(1, 514);
  leave(100, 1);
  CHECK(sus_release_memory() == 0);
  leave(1, 16);
  leave(1, 9);  // 16 would be too much for it: both are left
  leave(1, 13);
  CHECK(sus_release_memory() == int64_t((16 + 10) * MIB));
  return true;
}

}  // namespace

int main() {
  if (!memory()) return 1;
  const int64_t none = int64_t(1) << 60, widths[] = {16, 20, 48, 64, 79, 128, 256};
  for (int i = 0; i < 180; i++) {
    auto pick = [](int64_t low, int64_t high) { return low + int64_t(random_bits() % uint32_t(high - low + 1)); };
    Shape s{};
    s.batch = pick(1, 2), s.groups = pick(1, 2), s.heads = s.groups * pick(1, 2);
    s.m = i < 6 ? 1 : pick(1, 300), s.n = i % 6 == 0 ? 1 : i == 17 || i == 29 ? pick(8193, 8500) : pick(1, 700);
    s.dk = widths[pick(0, 6)], s.dv = i % 3 ? s.dk : widths[pick(0, 6)];
    s.right = i % 2 ? none : pick(-5, 5);
    s.left = i % 7 < 4 ? none : pick(0, 300);
    s.effects = i % 8;
    s.dtype = i % 4 == 1 ? SUS_BFLOAT16 : i % 4 == 2 ? SUS_FLOAT16 : SUS_FLOAT32, s.masked = i % 5 == 2, s.threads = int(pick(1, 3));
    if (s.n > 8192) s.m = pick(1, 30);
    const double budgets[] = {0, 0.3, 1, 8, 30, 5000, 1073741824.0};
    s.c = budgets[pick(0, 6)];
    s.drop_below = i % 3 == 1 ? uint32_t(random_bits()) : 0;
    s.wild = i >= 60;
    if (!run(s)) return fprintf(stderr, "case %d\n", i), 1;
  }
  puts("ok");
}
