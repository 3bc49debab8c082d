#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>
#include <memory>
#include <vector>

#include <gtest/gtest.h>

#include "backend/cuda/cuda_backend.h"
#include "core/float16.h"
#include "cuda/host_cuda_backend.h"
#include "support/compare.h"
#include "support/random.h"

/// Products between two attentions, which run as one launch where their shapes allow it (gates of
/// more than 4,200 rows on an H200): against the scalar reference, the same bits in every batch and
/// in every replay. Bounds as in block_cuda_test.cc, twice as wide for what comes after the hidden
/// rows: their x is rounded once more.
namespace twilight::test {
namespace {

struct LayerCase {
  std::int32_t m;
  std::int64_t hidden, inner;
  std::int32_t q_heads, kv_heads, head_dim;
  DType dtype;
  bool bias, head_norms, next;
};

std::ostream& operator<<(std::ostream& out, const LayerCase& c) {
  return out << c.m << " rows of " << c.hidden << ", " << c.inner << ", " << c.q_heads << "/"
             << c.kv_heads << " heads of " << c.head_dim;
}

std::vector<std::uint16_t> matrix(std::uint64_t seed, std::int64_t rows, std::int64_t cols,
                                  DType dtype) {
  const std::vector<float> values =
      normals(seed, rows * cols, 1.0F / std::sqrt(static_cast<float>(cols)));
  std::vector<std::uint16_t> out(values.size());
  for (std::size_t i = 0; i < values.size(); ++i) {
    out[i] = dtype == DType::kBf16 ? f32_to_bf16(values[i]) : f32_to_f16(values[i]);
  }
  return out;
}

/// Weights of a layer, rows before it, and what comes out.
class Layer {
 public:
  explicit Layer(const LayerCase& c) : c_(c) {
    for (float& x : cos_) {
      x = std::cos(x);
      sin_.push_back(std::sqrt(1 - x * x));
    }
  }

  /// `place(values)` says where values lie for the backend; rows [first, first + rows).
  template <typename Place>
  AdvanceLayerParams params(const Place& place, std::int32_t first, std::int32_t rows,
                            ProjectParams& next, AppendKvParams& append) {
    set_rows(first, rows);
    float* const hidden = place(hidden_now);
    float* const normed = place(normed_);
    const std::int64_t q_rows = std::int64_t{c_.q_heads} * c_.head_dim;
    const std::int64_t kv_rows = std::int64_t{c_.kv_heads} * c_.head_dim;
    const auto product = [&](std::vector<std::uint16_t>& w, std::int64_t w_rows, std::int64_t cols,
                             std::vector<float>& bias, const float* x, float* y) -> LinearParams {
      return {.x = x,
              .x_stride = cols,
              .num_rows = rows,
              .weight = {reinterpret_cast<const std::byte*>(place(w)), c_.dtype, w_rows, cols},
              .bias = c_.bias ? place(bias) : nullptr,
              .y = y,
              .y_stride = w_rows,
              .row_invariant = true};
    };
    const auto norm = [&](std::vector<float>& weight) -> RmsNormParams {
      return {hidden, place(weight), normed, rows, c_.hidden, 1e-5F};
    };
    AdvanceLayerParams p;
    p.out = product(out_w_, c_.hidden, q_rows, hidden_bias_, place(mixed_now), hidden);
    p.out.accumulate = true;
    p.feed.norm = norm(norm_a_);
    p.feed.gate = product(gate_w_, c_.inner, c_.hidden, inner_bias_, normed, place(gate_));
    p.feed.up = product(up_w_, c_.inner, c_.hidden, inner_bias_, normed, place(up_));
    if (c_.head_norms) p.feed.up.bias = nullptr;
    p.feed.down = product(down_w_, c_.hidden, c_.inner, hidden_bias_, p.feed.gate.y, hidden);
    p.feed.down.accumulate = true;
    if (!c_.next) return p;
    next.norm = norm(norm_b_);
    next.q = product(q_w_, q_rows, c_.hidden, q_bias_, normed, place(q));
    next.k = product(k_w_, kv_rows, c_.hidden, kv_bias_, normed, place(k));
    next.v = product(v_w_, kv_rows, c_.hidden, kv_bias_, normed, place(v));
    float* const head_norm = c_.head_norms ? place(head_norm_) : nullptr;
    next.q_norm = {next.q.y, head_norm, next.q.y, rows * c_.q_heads, c_.head_dim, 1e-5F};
    next.k_norm = {next.k.y, head_norm, next.k.y, rows * c_.kv_heads, c_.head_dim, 1e-5F};
    const std::int64_t at = std::int64_t{first} * (c_.head_dim / 2);
    next.q_rope = {next.q.y,         q_rows,          rows, c_.q_heads, c_.head_dim,
                   place(cos_) + at, place(sin_) + at};
    next.k_rope = next.q_rope;
    next.k_rope.x = next.k.y;
    next.k_rope.token_stride = kv_rows;
    next.k_rope.num_heads = c_.kv_heads;
    p.next = &next;
    append = {cache(place), next.k.y, next.v.y, kv_rows, kv_rows, place(slots_) + first, rows};
    p.append = &append;
    return p;
  }

  /// The cache holds what k and v round to, at the slots of the rows and nowhere else.
  void expect_appended(std::int32_t first) const {
    for (const bool keys : {true, false}) {
      const std::vector<float>& rows = keys ? k : v;
      std::vector<std::uint16_t> want(k_cache_.size(), kPoison);
      for (std::size_t i = 0; i < rows.size(); ++i) {
        const auto row = static_cast<std::int64_t>(i) / kv_size_;
        const auto channel = static_cast<std::int64_t>(i) % kv_size_;
        const std::int64_t slot = slots_[static_cast<std::size_t>(first + row)];
        const std::int64_t page = (channel / c_.head_dim * kPages + slot / kPageSize) * kPageSize;
        const std::int64_t at = (page + slot % kPageSize) * c_.head_dim + channel % c_.head_dim;
        want[static_cast<std::size_t>(at)] =
            c_.dtype == DType::kBf16 ? f32_to_bf16(rows[i]) : f32_to_f16(rows[i]);
      }
      EXPECT_EQ(keys ? k_cache_ : v_cache_, want) << (keys ? "keys" : "values");
    }
  }

  /// Hidden rows, q, k and v after a call on host memory.
  std::vector<std::vector<float>> run(Backend& backend, std::int32_t first, std::int32_t rows) {
    ProjectParams next;
    AppendKvParams append;
    backend.advance_layer(
        params([](auto& values) { return values.data(); }, first, rows, next, append));
    std::vector<std::vector<float>> out = {hidden_now};
    if (c_.next) {
      out.insert(out.end(), {q, k, v});
      expect_appended(first);
    }
    return out;
  }

  std::vector<float> hidden_now, mixed_now, q, k, v;

 private:
  void set_rows(std::int32_t first, std::int32_t rows) {
    const auto part = [&](const std::vector<float>& all) {
      const std::int64_t row = std::ssize(all) / c_.m;
      return std::vector<float>(all.begin() + first * row, all.begin() + (first + rows) * row);
    };
    hidden_now = part(hidden_);
    mixed_now = part(mixed_);
    const auto count = static_cast<std::size_t>(rows);
    normed_.assign(count * static_cast<std::size_t>(c_.hidden), 42.0F);
    gate_.assign(count * static_cast<std::size_t>(c_.inner), 42.0F);
    up_ = gate_;
    q.assign(count * static_cast<std::size_t>(c_.q_heads * c_.head_dim), 42.0F);
    k.assign(count * static_cast<std::size_t>(c_.kv_heads * c_.head_dim), 42.0F);
    v = k;
    k_cache_.assign(static_cast<std::size_t>(kPages * kPageSize * kv_size_), kPoison);
    v_cache_ = k_cache_;
    slots_.resize(static_cast<std::size_t>(c_.m));
    for (std::size_t i = 0; i < slots_.size(); ++i) {
      slots_[i] = static_cast<std::int64_t>(i) * 37 % (kPages * kPageSize);
    }
  }
  template <typename Place>
  PagedKvView cache(const Place& place) {
    PagedKvView kv;
    kv.dtype = c_.dtype;
    kv.num_kv_heads = c_.kv_heads;
    kv.head_dim = c_.head_dim;
    kv.page_size = kPageSize;
    const std::int64_t page = std::int64_t{kPageSize} * c_.head_dim;
    kv.k = {reinterpret_cast<std::byte*>(place(k_cache_)), page, page * kPages, c_.head_dim};
    kv.v = {reinterpret_cast<std::byte*>(place(v_cache_)), page, page * kPages, c_.head_dim};
    return kv;
  }

  static constexpr std::int32_t kPageSize = 16;
  static constexpr std::int64_t kPages = 9;
  static constexpr std::uint16_t kPoison = 0x7bcd;

  LayerCase c_;
  std::int64_t q_size_ = std::int64_t{c_.q_heads} * c_.head_dim;
  std::int64_t kv_size_ = std::int64_t{c_.kv_heads} * c_.head_dim;
  std::vector<float> hidden_ = normals(1, c_.m* c_.hidden, 2.0F);
  std::vector<float> mixed_ = normals(2, c_.m* q_size_);
  std::vector<float> norm_a_ = normals(3, c_.hidden);
  std::vector<float> norm_b_ = normals(4, c_.hidden);
  std::vector<float> head_norm_ = normals(5, c_.head_dim);
  std::vector<float> hidden_bias_ = normals(6, c_.hidden);
  std::vector<float> inner_bias_ = normals(15, c_.inner);
  std::vector<float> q_bias_ = normals(16, q_size_);
  std::vector<float> kv_bias_ = normals(17, kv_size_);
  std::vector<float> cos_ = normals(7, c_.m*(c_.head_dim / 2));
  std::vector<float> sin_;
  std::vector<std::uint16_t> out_w_ = matrix(8, c_.hidden, q_size_, c_.dtype);
  std::vector<std::uint16_t> gate_w_ = matrix(9, c_.inner, c_.hidden, c_.dtype);
  std::vector<std::uint16_t> up_w_ = matrix(10, c_.inner, c_.hidden, c_.dtype);
  std::vector<std::uint16_t> down_w_ = matrix(11, c_.hidden, c_.inner, c_.dtype);
  std::vector<std::uint16_t> q_w_ = matrix(12, q_size_, c_.hidden, c_.dtype);
  std::vector<std::uint16_t> k_w_ = matrix(13, kv_size_, c_.hidden, c_.dtype);
  std::vector<std::uint16_t> v_w_ = matrix(14, kv_size_, c_.hidden, c_.dtype);
  std::vector<float> normed_, gate_, up_;
  std::vector<std::uint16_t> k_cache_, v_cache_;
  std::vector<std::int64_t> slots_;
};

class LayerCuda : public ::testing::TestWithParam<LayerCase> {};

TEST_P(LayerCuda, MatchesReferenceInEveryBatch) {
  const LayerCase& c = GetParam();
  Layer layer(c);
  const auto got = layer.run(gpu(), 0, c.m);
  const auto want = layer.run(*make_ref_backend(), 0, c.m);
  ASSERT_EQ(got.size(), want.size());
  for (std::size_t i = 0; i < got.size(); ++i) {
    const double bound = i == 0 ? 3e-2 : 6e-2;
    EXPECT_TRUE(close(got[i], want[i], {.abs = bound, .rel = bound, .cosine = 1e-4})) << i;
  }
  for (const std::int32_t rows : {1, 2, 8, 9, 16, 17, 32, 33, 64}) {
    if (rows >= c.m) break;
    for (const std::int32_t first : {0, c.m - rows}) {
      const auto some = layer.run(gpu(), first, rows);
      for (std::size_t i = 0; i < got.size(); ++i) {
        const std::size_t row = some[i].size() / static_cast<std::size_t>(rows);
        EXPECT_EQ(0,
                  std::memcmp(some[i].data(), got[i].data() + static_cast<std::size_t>(first) * row,
                              some[i].size() * sizeof(float)))
            << rows << " rows from " << first << ", output " << i;
      }
    }
  }
}

// Counts that blocks wait for must be as they were after every launch, and sums in the same order.
TEST_P(LayerCuda, ReplaysGiveTheSameBits) {
  const LayerCase& c = GetParam();
  Layer layer(c);
  const std::unique_ptr<Backend> backend = make_cuda_backend(0);
  DeviceMemory& memory = backend->memory();
  std::deque<DeviceBuffer> buffers;
  std::vector<std::pair<const void*, std::byte*>> placed;
  const auto place = [&](auto& values) {
    using T = typename std::remove_reference_t<decltype(values)>::value_type;
    const auto known = std::find_if(placed.begin(), placed.end(),
                                    [&](const auto& p) { return p.first == values.data(); });
    if (known != placed.end()) return reinterpret_cast<T*>(known->second);
    const std::size_t bytes = values.size() * sizeof(T);
    DeviceBuffer& buffer = buffers.emplace_back(memory, bytes);
    memory.upload(buffer.data(), values.data(), bytes);
    placed.emplace_back(values.data(), buffer.data());
    return buffer.as<T>();
  };
  ProjectParams next;
  AppendKvParams append;
  const AdvanceLayerParams p = layer.params(place, 0, c.m, next, append);
  const auto outputs = [&] {
    std::vector<std::vector<float>> out = {layer.hidden_now};
    memory.download(out[0].data(), p.out.y, out[0].size() * sizeof(float));
    if (c.next) {
      for (const LinearParams* linear : {&next.q, &next.k, &next.v}) {
        out.emplace_back(static_cast<std::size_t>(c.m * linear->weight.rows));
        memory.download(out.back().data(), linear->y, out.back().size() * sizeof(float));
      }
    }
    return out;
  };
  const auto restart = [&] {
    memory.upload(p.out.y, layer.hidden_now.data(), layer.hidden_now.size() * sizeof(float));
  };
  backend->advance_layer(p);
  const auto want = outputs();
  const std::unique_ptr<RecordedOps> recorded = backend->record([&] { backend->advance_layer(p); });
  for (int i = 0; i < 200; ++i) {
    restart();
    recorded->replay();
    const auto got = outputs();
    for (std::size_t k = 0; k < want.size(); ++k) {
      ASSERT_EQ(0, std::memcmp(got[k].data(), want[k].data(), want[k].size() * sizeof(float)))
          << "replay " << i << ", output " << k;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    All, LayerCuda,
    ::testing::Values(
        // One launch on an H200.
        LayerCase{1, 1032, 4232, 8, 2, 128, DType::kBf16, false, false, true},
        LayerCase{16, 1024, 4608, 16, 4, 64, DType::kF16, true, false, true},
        LayerCase{64, 1032, 4352, 8, 2, 128, DType::kBf16, true, true, true},
        LayerCase{70, 1024, 4232, 8, 2, 128, DType::kF16, false, false, false},
        LayerCase{3, 4232, 4232, 8, 1, 64, DType::kBf16, true, false, true},  // norms in two turns
        LayerCase{9, 256, 4800, 34, 2, 128, DType::kBf16, false, false, true},  // many parts
        LayerCase{20, 1024, 4232, 8, 2, 66, DType::kBf16, false, false, true},
        // One by one: few rows of the gate, or of all.
        LayerCase{5, 512, 1408, 8, 4, 64, DType::kBf16, true, false, true},
        LayerCase{2, 64, 4800, 2, 1, 32, DType::kF16, false, false, true}));

}  // namespace
}  // namespace twilight::test
