#include "backend/cpu/prefill_attention.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "core/float16.h"
#include "core/thread_pool.h"
#include "support/elements.h"
#include "twilight/error.h"

namespace twilight::cpu {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

struct Case {
  int tokens, start, page_size, head_dim, group, kv_heads;
  DType dtype;
  float spread = 1;          // standard deviation of q
  bool token_major = false;  // rows of one token side by side, instead of [head][slot][D]
};

std::string text(const Case& c) {
  return "T " + std::to_string(c.tokens) + " start " + std::to_string(c.start) + " P " +
         std::to_string(c.page_size) + " D " + std::to_string(c.head_dim) + " G " +
         std::to_string(c.group) + " Hkv " + std::to_string(c.kv_heads) + " " +
         std::string(dtype_name(c.dtype)) + " spread " + std::to_string(c.spread);
}

// A sequence in a pool with shuffled pages, spare pages and padding between rows. Everything that
// is not one of its N tokens is NaN.
struct Problem {
  explicit Problem(const Case& shape) : c(shape), n(c.start + c.tokens) {
    std::mt19937 random(11);
    std::normal_distribution<float> normal;
    const int pages = (n + c.page_size - 1) / c.page_size;
    const std::int64_t pad = 3;
    if (c.token_major) {
      head_stride = c.head_dim + pad;
      token_stride = c.kv_heads * head_stride;
      page_stride = c.page_size * token_stride + pad;
    } else {
      token_stride = c.head_dim;
      head_stride = c.page_size * token_stride + pad;
      page_stride = c.kv_heads * head_stride;
    }
    table.resize(static_cast<std::size_t>(pages));
    std::vector<std::int32_t> physical(static_cast<std::size_t>(pages + 2));
    std::iota(physical.begin(), physical.end(), 0);
    std::shuffle(physical.begin(), physical.end(), random);
    std::copy_n(physical.begin(), pages, table.begin());

    const std::int64_t bytes = dtype_bytes(c.dtype);
    const std::int64_t elements = (pages + 2) * page_stride;
    for (auto* pool : {&k_pool, &v_pool}) {
      pool->resize(static_cast<std::size_t>(elements * bytes));
      for (std::int64_t i = 0; i < elements; ++i)
        store_element(pool->data() + i * bytes, c.dtype, kNan);
    }
    k.resize(static_cast<std::size_t>(n) * c.kv_heads * c.head_dim);
    v.resize(k.size());
    for (int t = 0; t < n; ++t) {
      for (int h = 0; h < c.kv_heads; ++h) {
        for (int d = 0; d < c.head_dim; ++d) {
          const std::size_t at = kv_at(t, h, d);
          k[at] = round_to(normal(random), c.dtype);
          v[at] = round_to(normal(random), c.dtype);
          const std::int64_t element =
              table[static_cast<std::size_t>(t / c.page_size)] * page_stride + h * head_stride +
              t % c.page_size * token_stride + d;
          store_element(k_pool.data() + element * bytes, c.dtype, k[at]);
          store_element(v_pool.data() + element * bytes, c.dtype, v[at]);
        }
      }
    }
    q_stride = c.kv_heads * c.group * c.head_dim + 5;
    out_stride = q_stride + 2;
    q.assign(static_cast<std::size_t>(c.tokens * q_stride), kNan);
    for (int t = 0; t < c.tokens; ++t) {
      for (std::int64_t i = 0; i < q_stride - 5; ++i) {
        q[static_cast<std::size_t>(t * q_stride + i)] = c.spread * normal(random);
      }
    }
  }

  [[nodiscard]] std::size_t kv_at(int t, int h, int d) const {
    return (static_cast<std::size_t>(t) * c.kv_heads + h) * c.head_dim + d;
  }
  [[nodiscard]] float scale() const { return 1.0F / std::sqrt(static_cast<float>(c.head_dim)); }

  std::vector<float> run(PrefillAttention& attention, bool full_precision) {
    std::vector<float> out(static_cast<std::size_t>(c.tokens * out_stride), -7.0F);
    AttendPrefillParams params;
    params.q = q.data();
    params.q_token_stride = q_stride;
    params.num_q_heads = c.group * c.kv_heads;
    params.num_tokens = c.tokens;
    params.kv.dtype = c.dtype;
    params.kv.num_seqs = 1;
    params.kv.num_kv_heads = c.kv_heads;
    params.kv.head_dim = c.head_dim;
    params.kv.page_size = c.page_size;
    params.kv.k = {k_pool.data(), page_stride, head_stride, token_stride};
    params.kv.v = {v_pool.data(), page_stride, head_stride, token_stride};
    params.kv.block_table = table.data();
    params.kv.block_table_stride = static_cast<std::int64_t>(table.size());
    params.kv.seq_lens = &n;
    params.scale = scale();
    params.out = out.data();
    params.out_token_stride = out_stride;
    params.full_precision = full_precision;
    attention.run(params);
    return out;
  }

  // Every `step`-th token and the last, all heads, against softmax in double over the operands as
  // rounded to `compute` (bf16 or f32). With w the exact weights (sum 1), o the exact output:
  //   e_s = 2 max_j |ds_j| + 2^-20: relative error of one weight, from the score's f32 sum of D
  //         terms and its scaling, |ds_j| <= (D + 4) 2^-24 scale sum_d |q_d k_jd|, twice (itself
  //         and the maximum); exp2 and the bookkeeping of maxima take the 2^-20;
  //   u   = 2^-8 where weights are stored as bf16, else 0. The sum is over stored weights;
  //   |error| <= (u + e_s) / (1 - u - e_s) sum_j w_j |v_j - o|        weights, normalised
  //            + (N + 8 + N / 256) 2^-23 sum_j w_j |v_j|              f32 sums of P V and of P.
  void check(const std::vector<float>& out, DType compute, int step) const {
    const auto dims = static_cast<std::size_t>(c.head_dim);
    for (int t = 0; t < c.tokens;
         t = t == c.tokens - 1 ? c.tokens : std::min(t + step, c.tokens - 1)) {
      const int visible = c.start + t + 1;
      for (int head = 0; head < c.group * c.kv_heads; ++head) {
        const int h = head / c.group;
        std::vector<double> scores(static_cast<std::size_t>(visible));
        double score_error = 0;
        for (int j = 0; j < visible; ++j) {
          double dot = 0;
          double size = 0;
          for (int d = 0; d < c.head_dim; ++d) {
            const auto at = static_cast<std::size_t>(t * q_stride + head * c.head_dim + d);
            const double product = static_cast<double>(round_to(q[at], compute)) *
                                   round_to(k[kv_at(j, h, d)], compute);
            dot += product;
            size += std::abs(product);
          }
          scores[static_cast<std::size_t>(j)] = dot * scale();
          score_error = std::max(score_error, (c.head_dim + 4) * 0x1p-24 * scale() * size);
        }
        const double max = *std::max_element(scores.begin(), scores.end());
        double total = 0;
        for (double& s : scores) total += s = std::exp(s - max);
        std::vector<double> exact(dims), absolute(dims), spread(dims);
        for (int j = 0; j < visible; ++j) {
          const double w = scores[static_cast<std::size_t>(j)] /= total;
          for (std::size_t d = 0; d < dims; ++d) {
            const double value = round_to(v[kv_at(j, h, static_cast<int>(d))], compute);
            exact[d] += w * value;
            absolute[d] += w * std::abs(value);
          }
        }
        for (int j = 0; j < visible; ++j) {
          for (std::size_t d = 0; d < dims; ++d) {
            const double value = round_to(v[kv_at(j, h, static_cast<int>(d))], compute);
            spread[d] += scores[static_cast<std::size_t>(j)] * std::abs(value - exact[d]);
          }
        }
        const double weight_error =
            2 * score_error + 0x1p-20 + (compute == DType::kBf16 ? 0x1p-8 : 0.0);
        const int roundings = visible + 8 + visible / 256;
        const double sum_error = roundings * 0x1p-23;
        for (std::size_t d = 0; d < dims; ++d) {
          const double tolerance =
              weight_error / (1 - weight_error) * spread[d] + sum_error * absolute[d];
          const auto at = static_cast<std::size_t>(t * out_stride + head * c.head_dim) + d;
          ASSERT_NEAR(out[at], exact[d], tolerance)
              << text(c) << " token " << t << " head " << head << " d " << d;
        }
      }
      for (std::int64_t i = out_stride - 7; i < out_stride; ++i) {
        ASSERT_EQ(out[static_cast<std::size_t>(t * out_stride + i)], -7.0F)
            << text(c) << ": wrote between rows, token " << t;
      }
    }
  }

  Case c;
  std::int32_t n;
  std::int64_t page_stride = 0, head_stride = 0, token_stride = 0, q_stride = 0, out_stride = 0;
  std::vector<float> q, k, v;
  std::vector<std::byte> k_pool, v_pool;
  std::vector<std::int32_t> table;
};

std::vector<Case> cases() {
  std::vector<Case> all;
  const DType dtypes[] = {DType::kBf16, DType::kF16, DType::kF32};
  const int page_sizes[] = {1, 16, 61};
  const int head_dims[] = {64, 80, 96, 128, 256};
  const int groups[] = {1, 3, 4, 8};
  // Every (T, start) with the other axes cycled, so that each value of each axis appears often.
  std::size_t i = 0;
  for (const int tokens : {1, 7, 64, 300}) {
    for (const int start : {0, 5, 1000}) {
      for (int repeat = 0; repeat < 2; ++repeat, ++i) {
        all.push_back({tokens, start, page_sizes[i % 3], head_dims[i % 5], groups[i % 4],
                       1 + static_cast<int>(i % 2), dtypes[(i / 3) % 3], i % 3 == 2 ? 6.0F : 1.0F,
                       i % 4 == 1});
      }
    }
  }
  all.push_back({260, 250, 16, 128, 1, 1, DType::kBf16});  // query and key tiles, both crossed
  all.push_back({2, 300, 16, 64, 300, 1, DType::kBf16});   // more heads than rows in a tile
  return all;
}

TEST(PrefillAttention, MatchesDouble) {
  ThreadPool pool(2);
  PrefillAttention attention(pool, parse_isa("auto"));
  for (const Case& c : cases()) {
    Problem problem(c);
    const int step = c.tokens > 64 ? 37 : c.tokens > 7 ? 9 : 1;
    problem.check(problem.run(attention, false), attention.uses_bf16() ? DType::kBf16 : DType::kF32,
                  step);
    if (HasFatalFailure()) return;
    problem.check(problem.run(attention, true), DType::kF32, step);
    if (HasFatalFailure()) return;
  }
}

TEST(PrefillAttention, MatchesDoubleOnEveryInstructionSet) {
  ThreadPool pool(2);
  for (const Isa isa : available_isas()) {
    SCOPED_TRACE(isa_name(isa));
    PrefillAttention attention(pool, isa);
    for (const DType dtype : {DType::kBf16, DType::kF16, DType::kF32}) {
      Problem problem({70, 390, 16, 80, 3, 2, dtype, 4.0F});
      problem.check(problem.run(attention, false),
                    attention.uses_bf16() ? DType::kBf16 : DType::kF32, 11);
      problem.check(problem.run(attention, true), DType::kF32, 11);
    }
  }
}

TEST(PrefillAttention, KeysInSeveralBlocks) {
  // 64 KV heads of D = 256 in f32 fill a block of 32 MiB with 256 keys: 700 keys come in three.
  ThreadPool pool(2);
  PrefillAttention attention(pool, parse_isa("auto"));
  Problem problem({90, 610, 16, 256, 1, 64, DType::kF32, 2.0F});
  problem.check(problem.run(attention, false), attention.uses_bf16() ? DType::kBf16 : DType::kF32,
                45);
  problem.check(problem.run(attention, true), DType::kF32, 45);
}

TEST(PrefillAttention, BitIdenticalForAnyNumberOfThreads) {
  for (const Case& c : cases()) {
    Problem problem(c);
    for (const bool full_precision : {false, true}) {
      std::vector<float> one;
      for (const int threads : {1, 2, 3}) {
        ThreadPool pool(threads);
        PrefillAttention attention(pool, parse_isa("auto"));
        const std::vector<float> out = problem.run(attention, full_precision);
        if (threads == 1) one = out;
        ASSERT_EQ(std::memcmp(one.data(), out.data(), out.size() * sizeof(float)), 0)
            << text(c) << " threads " << threads;
      }
    }
  }
}

TEST(PrefillAttention, ScratchOfALargerCallDoesNotLeakIntoASmaller) {
  ThreadPool pool(1);
  PrefillAttention used(pool, parse_isa("auto"));
  PrefillAttention fresh(pool, parse_isa("auto"));
  Problem large({300, 700, 16, 128, 4, 2, DType::kF32, 3.0F});
  for (std::size_t i = 0; i < large.v_pool.size(); i += 4) {
    store_element(large.v_pool.data() + i, DType::kF32, 1e30F);
  }
  (void)large.run(used, false);
  (void)large.run(used, true);
  Problem small({9, 3, 16, 64, 3, 1, DType::kBf16});
  EXPECT_EQ(small.run(used, false), small.run(fresh, false));
  EXPECT_EQ(small.run(used, true), small.run(fresh, true));
}

TEST(PrefillAttention, RejectsOddHeadDim) {
  ThreadPool pool(1);
  PrefillAttention attention(pool, parse_isa("auto"));
  Problem problem({2, 3, 16, 72, 1, 1, DType::kBf16});
  EXPECT_THROW((void)problem.run(attention, false), Error);
}

TEST(PrefillKernels, SoftmaxTileIsAccurateToTwoUlp) {
  // One row against double: the weight of every column, in f32. The argument s * scale_log2 - max
  // is one fused rounding of at most 2^-24 |argument|, worth ln 2 of that in the weight; exp2
  // itself is within 2 ulp.
  for (const Isa isa : available_isas()) {
    constexpr int kCols = 512;
    std::vector<float> scores(kCols), weights(kCols), out(16, 0.0F);
    for (int j = 0; j < kCols; ++j)
      scores[static_cast<std::size_t>(j)] = -0.33F * static_cast<float>(j);
    float max = -std::numeric_limits<float>::infinity();
    float sum = 0;
    const int visible = 300;
    prefill_kernels(isa).softmax_f32({.scores = scores.data(),
                                      .weights = weights.data(),
                                      .out = out.data(),
                                      .max = &max,
                                      .sum = &sum,
                                      .first_visible = visible,
                                      .rows = 1,
                                      .cols = kCols,
                                      .head_dim = 16,
                                      .group = 1,
                                      .scale_log2 = 1.0F});
    EXPECT_EQ(max, 0.0F);
    double total = 0;
    for (int j = 0; j < kCols; ++j) {
      const auto at = static_cast<std::size_t>(j);
      const double exact = j < visible ? std::exp2(static_cast<double>(scores[at])) : 0.0;
      total += exact;
      const double relative = 0x1p-22 + 0x1p-24 * std::abs(scores[at]);
      ASSERT_NEAR(weights[at], exact, exact * relative) << isa_name(isa) << " column " << j;
    }
    EXPECT_NEAR(sum, total, total * 0x1p-18) << isa_name(isa);

    // The bf16 form stores the same weights, rounded to nearest, and sums them as stored.
    std::vector<std::uint16_t> halves(kCols);
    float half_max = -std::numeric_limits<float>::infinity();
    float half_sum = 0;
    prefill_kernels(isa).softmax_bf16({.scores = scores.data(),
                                       .weights = halves.data(),
                                       .out = out.data(),
                                       .max = &half_max,
                                       .sum = &half_sum,
                                       .first_visible = visible,
                                       .rows = 1,
                                       .cols = kCols,
                                       .head_dim = 16,
                                       .group = 1,
                                       .scale_log2 = 1.0F});
    double half_total = 0;
    for (std::size_t j = 0; j < kCols; ++j) {
      ASSERT_EQ(halves[j], f32_to_bf16(weights[j])) << isa_name(isa) << " column " << j;
      half_total += bf16_to_f32(halves[j]);
    }
    EXPECT_NEAR(half_sum, half_total, half_total * 0x1p-18) << isa_name(isa);
  }
}

}  // namespace
}  // namespace twilight::cpu
