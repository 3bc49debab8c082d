// The reference backend against golden steps that NumPy computed with no code in common. The data
// leaves wide margins around every decision, so lists must be equal, not close.
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <memory>

#include "core/float16.h"
#include "ops/backend.h"
#include "quant/code_place.h"
#include "quant/codec.h"
#include "quant/page_codec.h"
#include "support/compare.h"
#include "support/oracle_data.h"
#include "support/prune_promises.h"

namespace twilight::test {
namespace {

/// Both sides accumulate in double and round to f32 once or, for estimates, decode in f32.
constexpr Tolerance kRounding{.abs = 2e-6, .rel = 1e-6, .cosine = 1e-9};

const std::vector<OracleCase>& oracle() {
  static const std::vector<OracleCase> kCases =
      load_oracle(TWILIGHT_SOURCE_DIR "/tests/golden/oracle");
  return kCases;
}

class Oracle : public ::testing::TestWithParam<std::size_t> {
 protected:
  Oracle() : golden_(oracle()[GetParam()]), fixture_(golden_.make_fixture()) {}

  [[nodiscard]] std::vector<float> values(const std::string& name, std::int64_t begin,
                                          std::int64_t count) const {
    const auto first = golden_.array(name).values.begin() + begin;
    return {first, first + count};
  }
  [[nodiscard]] std::int64_t integer(const std::string& name, std::int64_t at) const {
    return static_cast<std::int64_t>(golden_.array(name).values[static_cast<std::size_t>(at)]);
  }

  [[nodiscard]] PageRecords records(std::int64_t seq, std::int64_t head, std::int64_t page) const {
    return page_records(fixture_.index(), fixture_.kv().page_of(seq, page), head,
                        golden_.op_case.shape.page_size, golden_.op_case.shape.head_dim);
  }
  /// Number of a page of a head in the arrays of pages.
  [[nodiscard]] std::int64_t page_at(std::int64_t seq, std::int64_t head, std::int64_t page) const {
    const std::int64_t pages = golden_.array("candidates").shape[2];
    return (seq * golden_.op_case.shape.num_kv_heads + head) * pages + page;
  }
  void expect_codes(const std::string& name, std::int64_t at, const std::byte* codes) const {
    for (std::int32_t d = 0; d < golden_.op_case.shape.head_dim; ++d) {
      const CodePlace place = nibble_place(d);
      ASSERT_EQ(std::to_integer<std::int64_t>(codes[place.byte]) >> place.shift & 15,
                integer(name, at + d))
          << name << " channel " << d;
    }
  }
  // Means, the deviant and the variance as stored.
  void check_rotated(std::int64_t seq, std::int64_t head, std::int64_t page) const {
    const IndexFormat& format = golden_.op_case.shape.format;
    const std::int64_t dim = golden_.op_case.shape.head_dim;
    const PageRecords got = records(seq, head, page);
    const std::int64_t at = page_at(seq, head, page);
    for (std::int64_t i = 0; i < (format.own_centre() ? 1 : num_centroids(format.summary)); ++i) {
      expect_codes("centre_codes", (at * 4 + i) * dim,
                   got.centres + i * nibble_bytes(golden_.op_case.shape.head_dim));
    }
    for (std::int64_t i = 0; i < 4; ++i) {
      EXPECT_EQ(got.params->centre_scale[i], integer("centre_scales", at * 4 + i));
    }
    EXPECT_EQ(got.params->variance, integer("variance_bits", at));
    if (golden_.has("deviant_codes")) {
      expect_codes("deviant_codes", at * dim,
                   got.summary + nibble_bytes(golden_.op_case.shape.head_dim));
    }
  }
  void check_value_mean(std::int64_t seq, std::int64_t head, std::int64_t page) const {
    const PageRecords got = records(seq, head, page);
    const std::int64_t at = page_at(seq, head, page);
    expect_codes("value_codes", at * golden_.op_case.shape.head_dim, got.value_mean);
    EXPECT_EQ(got.params->value_scale, integer("value_bits", at));
  }
  // The decoded key without its mean is scale * (code - 1.5), up to the rounding of the sum.
  void check_residual(std::int64_t seq, std::int64_t head, std::int64_t page, std::int32_t slot,
                      float scale, std::int64_t codes) const {
    const FixtureShape& shape = golden_.op_case.shape;
    const PageRecords got = records(seq, head, page);
    std::vector<float> key(static_cast<std::size_t>(shape.head_dim));
    std::vector<float> centre(key.size());
    decode_estimated_key(shape.format, shape.page_size, shape.head_dim, got, slot, key);
    decode_centre(got, slot / centroid_tokens(shape.format.summary, shape.page_size), centre);
    for (std::size_t d = 0; d < key.size(); ++d) {
      const auto code = static_cast<float>(integer("codes", codes + static_cast<std::int64_t>(d)));
      ASSERT_EQ(key[d], centre[d] + scale * (code - 1.5F)) << "slot " << slot << " d " << d;
    }
  }

  const OracleCase& golden_;
  PagedFixture fixture_;
  std::unique_ptr<Backend> backend_ = make_ref_backend();
};

TEST_P(Oracle, SummariesAndEstimatesOnDisk) {
  const FixtureShape& shape = golden_.op_case.shape;
  const PagedKvView kv = fixture_.kv();
  const std::int64_t dim = shape.head_dim;
  // Sealed by the op rather than by the fixture.
  fixture_.clear_index();
  const std::vector<std::int32_t> pages = fixture_.sealed_physical_pages();
  backend_->seal_pages({.kv = kv,
                        .index = fixture_.index(),
                        .pages = pages.data(),
                        .num_pages = static_cast<std::int32_t>(pages.size())});
  std::vector<float> min(static_cast<std::size_t>(dim));
  std::vector<float> max(static_cast<std::size_t>(dim));
  std::int64_t first_token = 0;
  for (std::int64_t seq = 0; seq < kv.num_seqs; ++seq) {
    for (std::int64_t head = 0; head < kv.num_kv_heads; ++head) {
      for (std::int32_t page = 0; page < kv.sealed_pages(seq); ++page) {
        if (golden_.has("summary_min")) {
          decode_quest_summary(shape.format.summary, shape.head_dim,
                               fixture_.index().summary(kv.page_of(seq, page), head), min, max);
          const std::int64_t at =
              ((seq * kv.num_kv_heads + head) * golden_.array("summary_min").shape[2] + page) * dim;
          EXPECT_TRUE(close(min, values("summary_min", at, dim), kRounding));
          EXPECT_TRUE(close(max, values("summary_max", at, dim), kRounding));
        }
        if (golden_.has("centre_codes")) check_rotated(seq, head, page);
        if (golden_.has("value_codes")) check_value_mean(seq, head, page);
        if (!golden_.has("codes")) continue;
        for (std::int32_t slot = 0; slot < shape.page_size; ++slot) {
          const std::int64_t at =
              (first_token + page * shape.page_size + slot) * kv.num_kv_heads + head;
          const auto scale = f16_to_f32(static_cast<std::uint16_t>(integer("scale_bits", at)));
          if (shape.format.key_bits == 2) {
            check_residual(seq, head, page, slot, scale, at * dim);
            continue;
          }
          const auto zero = f16_to_f32(static_cast<std::uint16_t>(integer("zero_bits", at)));
          decode_estimate(shape.format.layout, shape.format.key_bits, shape.page_size,
                          shape.head_dim, fixture_.index().estimate(kv.page_of(seq, page), head),
                          slot, min);
          for (std::int64_t d = 0; d < dim; ++d) {
            const auto code = static_cast<float>(integer("codes", at * dim + d));
            ASSERT_EQ(min[static_cast<std::size_t>(d)], scale * code + zero)
                << "sequence " << seq << " page " << page << " slot " << slot << " d " << d;
          }
        }
      }
    }
    first_token += kv.seq_lens[seq];
  }
}

TEST_P(Oracle, Step) {
  const FixtureShape& shape = golden_.op_case.shape;
  const PagedKvView kv = fixture_.kv();
  const std::int64_t group = fixture_.group_size();
  StepBuffers step(golden_.op_case, fixture_);
  step.p = golden_.p;
  step.run_selection(*backend_, {});
  for (std::int64_t seq = 0; seq < kv.num_seqs; ++seq) {
    for (std::int64_t head = 0; head < kv.num_kv_heads; ++head) {
      SCOPED_TRACE("sequence " + std::to_string(seq) + ", KV head " + std::to_string(head));
      const std::int64_t row = seq * kv.num_kv_heads + head;
      if (golden_.has_selector) {
        const std::int64_t stride = golden_.array("page_scores").shape[2];
        EXPECT_TRUE(close(step.scores_row(seq, head),
                          values("page_scores", row * stride, kv.sealed_pages(seq)), kRounding));
      }
      const std::span<const std::int32_t> pages = step.candidate_pages(seq, head);
      ASSERT_EQ(std::ssize(pages), integer("candidate_counts", row));
      const std::int64_t page_stride = golden_.array("candidates").shape[2];
      for (std::int64_t i = 0; i < std::ssize(pages); ++i) {
        EXPECT_EQ(pages[static_cast<std::size_t>(i)], integer("candidates", row * page_stride + i));
      }
      for (std::int64_t g = 0; g < group && golden_.has("estimates"); ++g) {
        const std::int64_t q_row = seq * shape.num_q_heads + head * group + g;
        const std::span<const float> estimates =
            step.estimates_row(step.estimates_before_prune, seq, head * group + g);
        EXPECT_TRUE(close(
            estimates,
            values("estimates", q_row * golden_.array("estimates").shape[3], std::ssize(estimates)),
            kRounding));
        EXPECT_EQ(step.head_counts[static_cast<std::size_t>(q_row)], integer("head_counts", q_row));
        EXPECT_NEAR(step.head_mass[static_cast<std::size_t>(q_row)],
                    golden_.array("head_mass").values[static_cast<std::size_t>(q_row)], 2e-6);
        if (golden_.has("log_masses")) {
          EXPECT_TRUE(close(step.log_mass_row(seq, head * group + g),
                            values("log_masses", q_row * page_stride, kv.sealed_pages(seq)),
                            kRounding));
        }
        if (!golden_.has("tail_mass")) continue;
        EXPECT_TRUE(close({&step.tail_shift[static_cast<std::size_t>(q_row)], 1},
                          values("tail_shift", q_row, 1), kRounding));
        // Weights move by as much as the scores they come from: 2e-6 and 1e-6 of up to some tens.
        EXPECT_TRUE(close(step.tail_row(seq, head * group + g),
                          values("tail_mass", q_row * page_stride, std::ssize(pages)),
                          {.abs = 1e-6, .rel = 5e-5, .cosine = 1e-8}));
      }
      const std::span<const std::int32_t> kept = step.kept_tokens(seq, head);
      ASSERT_EQ(std::ssize(kept), integer("kept_counts", row));
      const std::int64_t kept_stride = golden_.array("kept").shape[2];
      for (std::int64_t i = 0; i < std::ssize(kept); ++i) {
        EXPECT_EQ(kept[static_cast<std::size_t>(i)], integer("kept", row * kept_stride + i));
      }
    }
  }
  for (const char* name : {"out", "dense_out"}) {
    if (std::string(name) == "out") {
      backend_->attend_sparse(step.attend_sparse_params(), {});
    } else {
      backend_->attend_dense(step.attend_dense_params(), {});
    }
    for (std::int64_t seq = 0; seq < kv.num_seqs; ++seq) {
      for (std::int64_t head = 0; head < shape.num_q_heads; ++head) {
        const std::int64_t at = (seq * shape.num_q_heads + head) * shape.head_dim;
        EXPECT_TRUE(close(step.out_row(seq, head), values(name, at, shape.head_dim), kRounding))
            << name << " of sequence " << seq << ", head " << head;
      }
    }
  }
}

TEST_P(Oracle, ExactScoresAgreeWithTheKeys) {
  const FixtureShape& shape = golden_.op_case.shape;
  StepBuffers step(golden_.op_case, fixture_);
  backend_->exact_scores(step.exact_scores_params(), {});
  for (std::int64_t seq = 0; seq < fixture_.num_seqs(); ++seq) {
    for (std::int64_t head = 0; head < shape.num_q_heads; ++head) {
      const std::span<const float> q = fixture_.q_row(seq, head);
      const std::int64_t row = (seq * shape.num_q_heads + head) * step.token_stride;
      for (std::int32_t t = 0; t < fixture_.kv().seq_lens[seq]; ++t) {
        const std::vector<float> k = fixture_.k_row(seq, t, head / fixture_.group_size());
        double want = 0;
        for (std::size_t d = 0; d < k.size(); ++d) want += double{q[d]} * double{k[d]};
        EXPECT_NEAR(step.exact_scores[static_cast<std::size_t>(row + t)],
                    want / std::sqrt(static_cast<double>(shape.head_dim)), 2e-5);
      }
    }
  }
}

struct GoldenName {
  template <typename Info>
  std::string operator()(const Info& info) const {
    return oracle()[info.param].op_case.name;
  }
};

INSTANTIATE_TEST_SUITE_P(Golden, Oracle, ::testing::Range(std::size_t{0}, oracle().size()),
                         GoldenName());

}  // namespace
}  // namespace twilight::test
