#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include <gtest/gtest.h>

#include "backend/cpu/isa.h"
#include "core/thread_pool.h"
#include "ops/backend.h"
#include "quant/codec.h"
#include "support/cache_writes.h"
#include "support/cases.h"
#include "support/paged_fixture.h"
#include "support/same_bits.h"
#include "support/step_buffers.h"

/// Index ops of the CPU backend on every instruction set of this machine against the scalar
/// reference. Tolerances are sums over the actual operands, not guesses; see docs/numerics.md.
namespace twilight::test {
namespace {

// Rounding of an f32 sum of n products, relative to the sum of their magnitudes.
double sum_rounding(std::int64_t n) { return static_cast<double>(n + 16) * 0x1p-23; }

// The query as byte or 16-bit products see it: step * rounded[d].
struct RoundedQuery {
  float step = 0;
  std::vector<double> rounded;

  RoundedQuery(std::span<const float> q, int levels) {
    float largest = 0;
    for (const float x : q) largest = std::max(largest, std::fabs(x));
    step = largest / static_cast<float>(levels);
    const float inverse = step > 0 ? 1.0F / step : 0.0F;
    const auto limit = static_cast<float>(levels);
    for (const float x : q) {
      rounded.push_back(std::nearbyint(std::clamp(x * inverse, -limit, limit)));
    }
  }
};

using Param = std::tuple<OpCase, std::string>;

class IndexParity : public ::testing::TestWithParam<Param> {
 protected:
  IndexParity()
      : case_(std::get<0>(GetParam())),
        isa_(std::get<1>(GetParam())),
        fixture_(case_.make_fixture()),
        ref_(make_ref_backend()),
        one_(make_cpu_backend(one_thread_, isa_)),
        three_(make_cpu_backend(three_threads_, isa_)) {}

  void SetUp() override {
    const Support support = one_->supports(actual_.caps(), case_.shape.dtype, case_.shape.format);
    if (!support) GTEST_SKIP() << support.reason;
  }

  // Runs `op(backend, buffers, workspace)` with the reference, one thread and three.
  template <typename Op>
  void run_all(const Op& op) {
    run(*ref_, expected_, op);
    run(*one_, actual_, op);
    run(*three_, threaded_, op);
  }
  template <typename Op>
  void run(Backend& backend, StepBuffers& buffers, const Op& op) {
    TestWorkspace workspace(backend, buffers.caps());
    op(backend, buffers, workspace.get());
  }
  // `bound(i)` for the elements an op writes; everything else must be as the reference left it.
  template <typename Bound>
  void expect_close(const std::vector<float>& actual, const std::vector<float>& expected,
                    std::size_t begin, std::size_t count, const Bound& bound) {
    double worst = 0;
    for (std::size_t i = 0; i < count; ++i) {
      const double a = actual[begin + i];
      const double e = expected[begin + i];
      if (!std::isfinite(e) || !std::isfinite(a)) {
        ASSERT_EQ(a, e) << "element " << i;
        continue;
      }
      const double allowed = bound(i);
      ASSERT_LE(std::fabs(a - e), allowed)
          << "element " << i << " of " << count << ", expected " << e << ", got " << a;
      worst = std::max(worst, std::fabs(a - e) / allowed);
    }
  }
  // NaN garbage outside the written ranges is still there.
  static std::size_t count_nan(const std::vector<float>& values) {
    return static_cast<std::size_t>(
        std::count_if(values.begin(), values.end(), [](float x) { return std::isnan(x); }));
  }
  bool rounds_queries() const { return isa_ != "scalar" && isa_ != "neon"; }

  OpCase case_;
  std::string isa_;
  PagedFixture fixture_;
  ThreadPool one_thread_{1};
  ThreadPool three_threads_{3};
  std::unique_ptr<Backend> ref_;
  std::unique_ptr<Backend> one_;
  std::unique_ptr<Backend> three_;
  StepBuffers expected_{case_, fixture_};
  StepBuffers actual_{case_, fixture_};
  StepBuffers threaded_{case_, fixture_};
};

TEST_P(IndexParity, ScorePages) {
  const SummaryKind kind = fixture_.shape().format.summary;
  if (kind == SummaryKind::kNone) GTEST_SKIP() << "no summaries";
  if (num_centroids(kind) > 0) GTEST_SKIP() << "rotated_parity_test.cc has these";
  if (kind == SummaryKind::kLabels) GTEST_SKIP() << "LabelScores has these";
  run_all([](Backend& backend, StepBuffers& buffers, Workspace workspace) {
    backend.score_pages(buffers.score_params(), workspace);
  });
  EXPECT_TRUE(same_bits(actual_.scores, threaded_.scores));
  EXPECT_EQ(count_nan(actual_.scores), count_nan(expected_.scores));

  const PagedKvView kv = fixture_.kv();
  const auto dim = static_cast<std::size_t>(kv.head_dim);
  const std::int64_t group = fixture_.group_size();
  std::vector<float> min(dim);
  std::vector<float> max(dim);
  for (std::int64_t seq = 0; seq < fixture_.num_seqs(); ++seq) {
    if (!actual_.in_subset(seq)) continue;
    for (std::int64_t head = 0; head < kv.num_kv_heads; ++head) {
      const std::int64_t row = actual_.row(seq, head) * actual_.page_stride;
      const auto bound = [&](std::size_t page) {
        const std::byte* record =
            fixture_.index().summary(kv.page_of(seq, static_cast<std::int64_t>(page)), head);
        decode_quest_summary(kind, kv.head_dim, record, min, max);
        float steps[2] = {};  // scale of the min codes, of the max codes
        if (kind == SummaryKind::kQuest4) {
          for (int side = 0; side < 2; ++side) {
            steps[side] = load_element(DType::kF16, record + kv.head_dim, 2 * side);
          }
        }
        double largest = 0;
        for (std::int64_t g = 0; g < group; ++g) {
          const auto q = fixture_.q_row(seq, head * group + g);
          double magnitude = 0;
          double crossed = 0;
          double code_steps = 0;
          float q_max = 0;
          for (std::size_t d = 0; d < dim; ++d) {
            const double wide = std::max(std::fabs(min[d]), std::fabs(max[d])) +
                                15.0F * std::max(steps[0], steps[1]);
            magnitude += std::fabs(q[d]) * wide;
            crossed += std::fabs(q[d]) * std::max(0.0, double{min[d]} - double{max[d]});
            code_steps += 7.5 * steps[q[d] >= 0 ? 1 : 0];
            q_max = std::max(q_max, std::fabs(q[d]));
          }
          const double rounding = magnitude * (0x1p-17 + sum_rounding(kv.head_dim));
          largest = std::max(largest, rounding + crossed + 1.001 * q_max / 254 * code_steps);
        }
        return largest * fixture_.scale() + 1e-30;
      };
      expect_close(actual_.scores, expected_.scores, static_cast<std::size_t>(row),
                   static_cast<std::size_t>(kv.sealed_pages(seq)), bound);
    }
  }
}

// The largest of estimates differs by no more than the estimates do: the rounding of the query on
// codes centred on 7.5, and sums over the label channels.
TEST_P(IndexParity, LabelScores) {
  const IndexFormat& format = fixture_.shape().format;
  if (format.summary != SummaryKind::kLabels) GTEST_SKIP() << "no label channels";
  run_all([](Backend& backend, StepBuffers& buffers, Workspace workspace) {
    backend.score_pages(buffers.score_params(), workspace);
  });
  EXPECT_TRUE(same_bits(actual_.scores, threaded_.scores));
  EXPECT_EQ(count_nan(actual_.scores), count_nan(expected_.scores));
  const PagedKvView kv = fixture_.kv();
  const std::int32_t channels = format.label_channels;
  const std::int64_t group = fixture_.group_size();
  for (std::int64_t seq = 0; seq < fixture_.num_seqs(); ++seq) {
    if (!actual_.in_subset(seq)) continue;
    for (std::int64_t head = 0; head < kv.num_kv_heads; ++head) {
      const std::int32_t* labels = fixture_.index().head_labels(head);
      const auto bound = [&](std::size_t page) {
        const std::byte* record =
            fixture_.index().summary(kv.page_of(seq, static_cast<std::int64_t>(page)), head);
        double largest = 0;
        for (std::int32_t slot = 0; slot < kv.page_size; ++slot) {
          const std::byte* scales = record +
                                    slot / kEstimateTileTokens * estimate_tile_bytes(4, channels) +
                                    estimate_code_bytes(4, channels);
          const double scale = load_element(DType::kF16, scales, slot % kEstimateTileTokens);
          const double zero = load_element(DType::kF16, scales + 2 * kEstimateTileTokens,
                                           slot % kEstimateTileTokens);
          for (std::int64_t g = 0; g < group; ++g) {
            const auto q = fixture_.q_row(seq, head * group + g);
            double q_sum = 0;
            double q_max = 0;
            for (std::int32_t c = 0; c < channels; ++c) {
              const double x = std::fabs(q[static_cast<std::size_t>(labels[c])]);
              q_sum += x;
              q_max = std::max(q_max, x);
            }
            const double rounded = rounds_queries() ? channels * q_max / 254 * 7.5 * scale : 0;
            const double magnitude = q_sum * (std::fabs(zero) + 15 * scale);
            largest = std::max(largest, 1.001 * rounded + magnitude * sum_rounding(channels));
          }
        }
        return largest * fixture_.scale() + 1e-30;
      };
      expect_close(actual_.scores, expected_.scores,
                   static_cast<std::size_t>(actual_.row(seq, head) * actual_.page_stride),
                   static_cast<std::size_t>(kv.sealed_pages(seq)), bound);
    }
  }
}

TEST_P(IndexParity, ExactScores) {
  run_all([](Backend& backend, StepBuffers& buffers, Workspace workspace) {
    backend.exact_scores(buffers.exact_scores_params(), workspace);
  });
  EXPECT_TRUE(same_bits(actual_.exact_scores, threaded_.exact_scores));
  EXPECT_EQ(count_nan(actual_.exact_scores), count_nan(expected_.exact_scores));
  const PagedKvView kv = fixture_.kv();
  const std::int64_t num_q_heads = fixture_.shape().num_q_heads;
  for (std::int64_t seq = 0; seq < fixture_.num_seqs(); ++seq) {
    if (!actual_.in_subset(seq)) continue;
    for (std::int64_t q_head = 0; q_head < num_q_heads; ++q_head) {
      const auto q = fixture_.q_row(seq, q_head);
      const auto bound = [&](std::size_t token) {
        const auto k =
            fixture_.k_row(seq, static_cast<std::int64_t>(token), q_head / fixture_.group_size());
        double magnitude = 0;
        for (std::size_t d = 0; d < k.size(); ++d) magnitude += std::fabs(double{q[d]} * k[d]);
        return magnitude * sum_rounding(kv.head_dim) * fixture_.scale() + 1e-30;
      };
      expect_close(actual_.exact_scores, expected_.exact_scores,
                   static_cast<std::size_t>((seq * num_q_heads + q_head) * actual_.token_stride),
                   static_cast<std::size_t>(kv.seq_lens[seq]), bound);
    }
  }
}

TEST_P(IndexParity, EstimateScores) {
  const PagedKvView kv = fixture_.kv();
  const int key_bits = fixture_.shape().format.key_bits;
  if (key_bits == 0 && !case_.policy.exact_keys) GTEST_SKIP() << "no estimates";
  if (key_bits == 2) GTEST_SKIP() << "rotated_parity_test.cc has these";
  // The last page first, then every second one: scattered candidates, the open page in front.
  for (StepBuffers* buffers : {&expected_, &actual_, &threaded_}) {
    for (std::int64_t seq = 0; seq < fixture_.num_seqs(); ++seq) {
      for (std::int64_t head = 0; head < kv.num_kv_heads; ++head) {
        const std::int64_t row = buffers->row(seq, head);
        std::int32_t* pages = buffers->pages.data() + row * buffers->candidate_stride;
        std::int32_t count = 0;
        const std::int32_t total = kv.total_pages(seq);
        if (total > 0) pages[count++] = total - 1;
        for (auto page = static_cast<std::int32_t>(head % 2); page < total - 1; page += 2) {
          pages[count++] = page;
        }
        buffers->page_counts[static_cast<std::size_t>(row)] = count;
      }
    }
  }
  run_all([](Backend& backend, StepBuffers& buffers, Workspace workspace) {
    backend.estimate_scores(buffers.estimate_params(), workspace);
  });
  EXPECT_TRUE(same_bits(actual_.estimates, threaded_.estimates));
  EXPECT_EQ(count_nan(actual_.estimates), count_nan(expected_.estimates));

  const double centre = key_bits == 4 ? 7.5 : isa_ == "avx512_bf16" ? 127.5 : 128.0;
  const std::int64_t num_q_heads = fixture_.shape().num_q_heads;
  const auto dim = static_cast<std::size_t>(kv.head_dim);
  std::vector<float> key(dim);
  for (std::int64_t seq = 0; seq < fixture_.num_seqs(); ++seq) {
    if (!actual_.in_subset(seq)) continue;
    for (std::int64_t q_head = 0; q_head < num_q_heads; ++q_head) {
      const std::int64_t head = q_head / fixture_.group_size();
      const auto q = fixture_.q_row(seq, q_head);
      const RoundedQuery rounded(q, key_bits == 4 ? 127 : 127 * 128);
      const std::int64_t row = (seq * num_q_heads + q_head) * actual_.estimate_stride;
      const auto candidates = actual_.candidate_pages(seq, head);
      std::vector<float> model(candidates.size() * static_cast<std::size_t>(kv.page_size));
      std::vector<double> rounding(model.size());
      const auto bound = [&](std::size_t i) {
        const std::int64_t page = candidates[i / static_cast<std::size_t>(kv.page_size)];
        const auto slot = static_cast<int>(i % static_cast<std::size_t>(kv.page_size));
        const double scale = fixture_.scale();
        model[i] = expected_.estimates[static_cast<std::size_t>(row) + i];
        double magnitude = 0;
        double query_error = 0;
        if (case_.policy.exact_keys || page >= kv.sealed_pages(seq)) {
          const auto k = fixture_.k_row(seq, page * kv.page_size + slot, head);
          for (std::size_t d = 0; d < dim; ++d) magnitude += std::fabs(double{q[d]} * k[d]);
        } else {
          const std::byte* record = fixture_.index().estimate(kv.page_of(seq, page), head);
          decode_estimate(IndexLayout::kTokenLanes, key_bits, kv.page_size, kv.head_dim, record,
                          slot, key);
          const std::byte* parameters =
              record + slot / kEstimateTileTokens * estimate_tile_bytes(key_bits, kv.head_dim) +
              estimate_code_bytes(key_bits, kv.head_dim);
          const int t = slot % kEstimateTileTokens;
          const double s = load_element(DType::kF16, parameters, t);
          const double z = load_element(DType::kF16, parameters, kEstimateTileTokens + t);
          double sum = 0;
          double q_sum = 0;
          double q_max = 0;
          for (std::size_t d = 0; d < dim; ++d) {
            const double code = s == 0 ? 0 : std::nearbyint((key[d] - z) / s);
            sum += rounded.rounded[d] * (code - centre);
            q_sum += q[d];
            q_max = std::max(q_max, std::fabs(double{q[d]}));
            magnitude += std::fabs(q[d]) * (2 * centre * s + std::fabs(z + centre * s));
          }
          if (rounds_queries()) {
            model[i] =
                static_cast<float>(scale * (s * rounded.step * sum + (z + centre * s) * q_sum));
            query_error = static_cast<double>(dim) * rounded.step / 2 * 1.001 * centre * s;
          }
        }
        rounding[i] = magnitude * sum_rounding(kv.head_dim) * scale + 1e-30;
        return query_error * scale + rounding[i];
      };
      // First the bound of numerics.md against the exact query, then the rounded query's own value.
      expect_close(actual_.estimates, expected_.estimates, static_cast<std::size_t>(row),
                   model.size(), bound);
      const std::vector<float> written(
          actual_.estimates.begin() + row,
          actual_.estimates.begin() + row + static_cast<std::ptrdiff_t>(model.size()));
      for (std::size_t i = 0; i < model.size(); ++i) {
        if (std::isinf(written[i])) continue;
        ASSERT_NEAR(written[i], model[i], rounding[i]) << "element " << i;
      }
    }
  }
}

TEST_P(IndexParity, SealPagesByteForByte) { expect_same_seal(*ref_, *three_, case_, fixture_); }

TEST_P(IndexParity, AppendAndCopy) { expect_same_append_and_copy(*ref_, *three_, case_, fixture_); }

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const cpu::Isa isa : cpu::available_isas()) names.emplace_back(cpu::isa_name(isa));
  return names;
}

INSTANTIATE_TEST_SUITE_P(Cases, IndexParity,
                         ::testing::Combine(::testing::ValuesIn(standard_cases()),
                                            ::testing::ValuesIn(isas())),
                         [](const ::testing::TestParamInfo<Param>& test) {
                           return std::get<0>(test.param).name + "_" + std::get<1>(test.param);
                         });

}  // namespace
}  // namespace twilight::test
