#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include <gtest/gtest.h>

#include "cuda/host_cuda_backend.h"
#include "quant/codec.h"
#include "quant/page_codec.h"
#include "quant/rotation.h"
#include "support/cache_writes.h"
#include "support/cases.h"
#include "support/paged_fixture.h"
#include "support/step_buffers.h"

/// Cache and index ops of the GPU against the scalar reference: records, appends and copies byte
/// for byte, scores within the rounding of f32 sums.
namespace twilight::test {
namespace {

/// Rounding of an f32 sum over channels and of the query's rotation, of |q| |k|.
double sum_rounding(std::int64_t head_dim) { return static_cast<double>(head_dim + 64) * 0x1p-23; }

double norm(std::span<const float> x) {
  double sum = 0;
  for (const float value : x) sum += double{value} * double{value};
  return std::sqrt(sum);
}

std::vector<OpCase> both_layouts() {
  std::vector<OpCase> cases = in_layout(without_labels(standard_cases()), IndexLayout::kTokenLanes);
  for (OpCase& c : in_layout(without_labels(standard_cases()), IndexLayout::kMma))
    cases.push_back(std::move(c));
  return cases;
}

class IndexCuda : public ::testing::TestWithParam<OpCase> {
 protected:
  template <typename Op>
  void run_both(const Op& op) {
    TestWorkspace ref_workspace(*ref_, expected_.caps());
    op(*ref_, expected_, ref_workspace.get());
    TestWorkspace gpu_workspace(gpu(), actual_.caps());
    op(gpu(), actual_, gpu_workspace.get());
  }
  void expect_near(float actual, float expected, double bound) const {
    if (std::isinf(expected)) {
      ASSERT_EQ(actual, expected);
    } else {
      ASSERT_NEAR(actual, expected, bound);
    }
  }
  static std::ptrdiff_t count_nan(const std::vector<float>& x) {
    return std::count_if(x.begin(), x.end(), [](float v) { return std::isnan(v); });
  }

  OpCase case_ = GetParam();
  PagedFixture fixture_ = case_.make_fixture();
  std::unique_ptr<Backend> ref_ = make_ref_backend();
  StepBuffers expected_{case_, fixture_};
  StepBuffers actual_{case_, fixture_};
};

TEST_P(IndexCuda, SealPagesByteForByte) { expect_same_seal(*ref_, gpu(), case_, fixture_); }

TEST_P(IndexCuda, AppendAndCopyByteForByte) {
  expect_same_append_and_copy(*ref_, gpu(), case_, fixture_);
}

TEST_P(IndexCuda, ExactScores) {
  run_both([](Backend& backend, StepBuffers& buffers, Workspace workspace) {
    backend.exact_scores(buffers.exact_scores_params(), workspace);
  });
  EXPECT_EQ(count_nan(actual_.exact_scores), count_nan(expected_.exact_scores));
  const std::int64_t heads = case_.shape.num_q_heads;
  for (std::int64_t seq = 0; seq < fixture_.num_seqs(); ++seq) {
    for (std::int64_t head = 0; actual_.in_subset(seq) && head < heads; ++head) {
      const double q = norm(fixture_.q_row(seq, head));
      for (std::int64_t token = 0; token < fixture_.kv().seq_lens[seq]; ++token) {
        const double k = norm(fixture_.k_row(seq, token, head / fixture_.group_size()));
        const auto at =
            static_cast<std::size_t>((seq * heads + head) * actual_.token_stride + token);
        expect_near(actual_.exact_scores[at], expected_.exact_scores[at],
                    q * k * fixture_.scale() * sum_rounding(case_.shape.head_dim) + 1e-30);
      }
    }
  }
}

TEST_P(IndexCuda, EstimateScores) {
  const IndexFormat& format = case_.shape.format;
  if (format.key_bits == 0 && !case_.policy.exact_keys) GTEST_SKIP() << "no estimates";
  const PagedKvView kv = fixture_.kv();
  // The last page first, then every second one: scattered candidates, the open page in front.
  for (StepBuffers* buffers : {&expected_, &actual_}) {
    for (std::int64_t row = 0; row < std::int64_t{kv.num_seqs} * kv.num_kv_heads; ++row) {
      std::int32_t* pages = buffers->pages.data() + row * buffers->candidate_stride;
      std::int32_t count = 0;
      for (std::int32_t page = kv.total_pages(row / kv.num_kv_heads) - 1; page >= 0; page -= 2) {
        pages[count++] = page;
      }
      buffers->page_counts[static_cast<std::size_t>(row)] = count;
    }
  }
  run_both([](Backend& backend, StepBuffers& buffers, Workspace workspace) {
    backend.estimate_scores(buffers.estimate_params(), workspace);
  });
  EXPECT_EQ(count_nan(actual_.estimates), count_nan(expected_.estimates));
  std::vector<float> key(static_cast<std::size_t>(kv.head_dim));
  for (std::int64_t seq = 0; seq < fixture_.num_seqs(); ++seq) {
    for (std::int64_t q_head = 0; actual_.in_subset(seq) && q_head < case_.shape.num_q_heads;
         ++q_head) {
      const std::int64_t head = q_head / fixture_.group_size();
      const auto pages = expected_.candidate_pages(seq, head);
      const auto want = expected_.estimates_row(expected_.estimates, seq, q_head);
      const auto got = actual_.estimates_row(actual_.estimates, seq, q_head);
      const double q = norm(fixture_.q_row(seq, q_head));
      for (std::size_t i = 0; i < want.size(); ++i) {
        const std::int32_t page = pages[i / static_cast<std::size_t>(kv.page_size)];
        const int slot = static_cast<int>(i) % kv.page_size;
        double k = 0;
        if (std::isfinite(want[i]) && page < kv.sealed_pages(seq) && !case_.policy.exact_keys) {
          const PageRecords records = page_records(fixture_.index(), kv.page_of(seq, page), head,
                                                   kv.page_size, kv.head_dim);
          decode_estimated_key(format, kv.page_size, kv.head_dim, records, slot, key);
          k = norm(key);
        } else if (std::isfinite(want[i])) {
          k = norm(fixture_.k_row(seq, std::int64_t{page} * kv.page_size + slot, head));
        }
        expect_near(got[i], want[i], q * k * fixture_.scale() * sum_rounding(kv.head_dim) + 1e-30);
      }
    }
  }
}

TEST_P(IndexCuda, ScorePages) {
  const SummaryKind kind = case_.shape.format.summary;
  if (kind == SummaryKind::kNone) GTEST_SKIP() << "no summaries";
  run_both([](Backend& backend, StepBuffers& buffers, Workspace workspace) {
    backend.score_pages(buffers.score_params(), workspace);
  });
  EXPECT_EQ(count_nan(actual_.scores), count_nan(expected_.scores));
  const PagedKvView kv = fixture_.kv();
  const auto dim = static_cast<std::size_t>(kv.head_dim);
  std::vector<float> a(dim);
  std::vector<float> b(dim);
  for (std::int64_t seq = 0; seq < fixture_.num_seqs(); ++seq) {
    for (std::int64_t head = 0; actual_.in_subset(seq) && head < kv.num_kv_heads; ++head) {
      const auto want = expected_.scores_row(seq, head);
      const auto got = actual_.scores_row(seq, head);
      double q = 0;
      for (std::int64_t g = 0; g < fixture_.group_size(); ++g) {
        q = std::max(q, norm(fixture_.q_row(seq, head * fixture_.group_size() + g)));
      }
      q *= fixture_.scale();
      // A normaliser carries the error of every page's log mass.
      double largest = 0;
      for (std::size_t i = 0; i < want.size(); ++i) {
        const PageRecords records =
            page_records(fixture_.index(), kv.page_of(seq, static_cast<std::int64_t>(i)), head,
                         kv.page_size, kv.head_dim);
        double k = 0;
        if (num_centroids(kind) > 0) {
          for (int c = 0; c < num_centroids(kind); ++c) {
            decode_centre(records, c, a);
            k = std::max(k, norm(a));
          }
          if (kind == SummaryKind::kCentroid) {
            decode_deviant(records, b);
            k += norm(b);
          }
          const double variance = load_element(
              DType::kF16, reinterpret_cast<const std::byte*>(&records.params->variance), 0);
          k = q * k + 0.5 * q * q * variance;
        } else {
          decode_quest_summary(kind, kv.head_dim, records.summary, a, b);
          k = q * (norm(a) + norm(b)) * std::sqrt(static_cast<double>(dim));
        }
        largest = std::max(largest, k);
        if (num_centroids(kind) == 0) {
          expect_near(got[i], want[i], k * sum_rounding(kv.head_dim) + 1e-30);
        }
      }
      for (std::size_t i = 0; num_centroids(kind) > 0 && i < want.size(); ++i) {
        expect_near(got[i], want[i],
                    3 * largest * sum_rounding(kv.head_dim) + 4e-6 * (4 + std::fabs(want[i])));
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Cases, IndexCuda, ::testing::ValuesIn(both_layouts()), CaseName());

}  // namespace
}  // namespace twilight::test
