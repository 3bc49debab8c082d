#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <string>
#include <tuple>
#include <vector>

#include <gtest/gtest.h>

#include "backend/cpu/isa.h"
#include "core/thread_pool.h"
#include "ops/backend.h"
#include "quant/page_codec.h"
#include "support/cases.h"
#include "support/paged_fixture.h"
#include "support/random.h"
#include "support/same_bits.h"
#include "support/step_buffers.h"

/// Decode attention of the CPU backend on every instruction set of this machine against the scalar
/// reference, and against itself for other numbers of threads and other batches.
namespace twilight::test {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const cpu::Isa isa : cpu::available_isas()) names.emplace_back(cpu::isa_name(isa));
  return names;
}

struct ParamName {
  static std::string text(const OpCase& op_case) { return op_case.name; }
  static std::string text(DType dtype) { return std::string(dtype_name(dtype)); }

  template <typename Info>
  std::string operator()(const Info& param) const {
    return text(std::get<0>(param.param)) + "_" + std::get<1>(param.param);
  }
};

// Cases of several tiles, of tiles that take several KV heads (N >= 2048), and of groups that are
// cut into passes of 4, 2 and 1 heads.
std::vector<OpCase> tiled_cases() {
  const auto make = [](std::string name, std::vector<std::int32_t> lengths, std::int32_t q_heads,
                       std::int32_t kv_heads, std::int32_t dim, std::int32_t page_size,
                       DType dtype) {
    OpCase result;
    result.name = std::move(name);
    result.shape.lengths = std::move(lengths);
    result.shape.num_q_heads = q_heads;
    result.shape.num_kv_heads = kv_heads;
    result.shape.head_dim = dim;
    result.shape.page_size = page_size;
    result.shape.dtype = dtype;
    result.policy.mode = SelectMode::kAll;
    result.policy.criterion = PruneCriterion::kNone;
    return result;
  };
  std::vector<OpCase> cases = {
      make("tiles_group3_dim80", {2600, 0, 33, 700}, 15, 5, 80, 16, DType::kBf16),
      make("tiles_group15_dim96", {2049, 257}, 30, 2, 96, 16, DType::kBf16),
      make("tiles_group8_dim256", {2100}, 16, 2, 256, 32, DType::kBf16),
      make("tiles_group1_dim64", {2304, 2047}, 17, 17, 64, 16, DType::kBf16),
      make("tiles_group4_dim128", {17000}, 4, 1, 128, 16, DType::kBf16),
      make("tiles_group2_f16_page7", {2200, 300}, 6, 3, 48, 7, DType::kF16),
      make("tiles_group7_f32", {2200, 31, 32, 1}, 14, 2, 112, 16, DType::kF32),
  };
  cases[0].options.token_major = true;
  cases[0].options.row_padding = 3;
  cases[1].options.distribution = Distribution::kWide;
  cases[3].options.distribution = Distribution::kOneDominant;
  cases[5].options.row_padding = 1;
  cases[5].options.distribution = Distribution::kSinkDominated;
  return cases;
}

std::vector<OpCase> cases_under_test() {
  std::vector<OpCase> cases = standard_cases();
  for (OpCase& op_case : tiled_cases()) cases.push_back(std::move(op_case));
  return cases;
}

class AttendParity : public ::testing::TestWithParam<std::tuple<OpCase, std::string>> {
 protected:
  AttendParity()
      : case_(std::get<0>(GetParam())),
        isa_(std::get<1>(GetParam())),
        fixture_(case_.make_fixture()),
        ref_(make_ref_backend()),
        expected_(case_, fixture_) {}

  void SetUp() override {
    ThreadPool pool(1);
    const Support support = make_cpu_backend(pool, isa_)
                                ->supports(expected_.caps(), case_.shape.dtype, case_.shape.format);
    if (!support) GTEST_SKIP() << support.reason;
  }

  template <typename Op>
  static void run(Backend& backend, StepBuffers& buffers, const Op& op) {
    TestWorkspace workspace(backend, buffers.caps());
    op(backend, buffers, workspace.get());
  }
  static void dense(Backend& backend, StepBuffers& buffers, Workspace workspace) {
    backend.attend_dense(buffers.attend_dense_params(), workspace);
  }
  static void sparse(Backend& backend, StepBuffers& buffers, Workspace workspace) {
    backend.attend_sparse(buffers.attend_sparse_params(), workspace);
  }
  void copy_kept(StepBuffers& to) const {
    to.kept = expected_.kept;
    to.kept_counts = expected_.kept_counts;
    to.pages = expected_.pages;
    to.page_counts = expected_.page_counts;
    to.tail_mass = expected_.tail_mass;
    to.tail_shift = expected_.tail_shift;
    to.scores = expected_.scores;
    to.log_masses = expected_.log_masses;
  }

  // A far tail of random masses, some of them large.
  void make_far_tail() {
    Random random(21);
    const std::int64_t stride = expected_.page_stride;
    far_masses_.resize(
        static_cast<std::size_t>(fixture_.num_seqs() * case_.shape.num_q_heads * stride));
    for (float& x : far_masses_) x = 6 * random.normal();
    far_scores_.resize(
        static_cast<std::size_t>(fixture_.num_seqs() * case_.shape.num_kv_heads * stride));
    for (float& x : far_scores_) x = 2 * random.normal() - 3;
  }
  AttendSparseParams with_far_tail(StepBuffers& buffers) const {
    AttendSparseParams params = buffers.attend_sparse_params();
    params.tail.log_masses = far_masses_.data();
    params.tail.scores = far_scores_.data();
    params.tail.page_stride = expected_.page_stride;
    params.tail.far_floor = 0.25F;
    return params;
  }

  // A page that counts by its mean value.
  struct PageTerm {
    double log_mass = 0;
    std::vector<float> mean;
  };
  std::vector<PageTerm> tail_terms(std::int64_t seq, std::int64_t q_head) {
    std::vector<PageTerm> terms;
    if (!expected_.has_tail()) return terms;
    const std::int64_t head = q_head / fixture_.group_size();
    const std::int64_t q_row = seq * case_.shape.num_q_heads + q_head;
    const auto add = [&](std::int64_t page_idx, double log_mass) {
      const PageRecords records =
          page_records(fixture_.index(), fixture_.kv().page_of(seq, page_idx), head,
                       case_.shape.page_size, case_.shape.head_dim);
      PageTerm term{log_mass, std::vector<float>(static_cast<std::size_t>(case_.shape.head_dim))};
      decode_value_mean(records, term.mean);
      terms.push_back(std::move(term));
    };
    const std::span<const std::int32_t> pages = expected_.candidate_pages(seq, head);
    const std::span<const float> masses = expected_.tail_row(seq, q_head);
    for (std::size_t i = 0; i < pages.size(); ++i) {
      if (!(masses[i] > 0)) continue;
      add(pages[i], std::log(double{masses[i]}) +
                        double{expected_.tail_shift[static_cast<std::size_t>(q_row)]});
    }
    const TailParams tail =
        (far_masses_.empty() ? expected_.attend_sparse_params() : with_far_tail(expected_)).tail;
    if (tail.log_masses == nullptr) return terms;
    const std::int32_t sealed = fixture_.kv().sealed_pages(seq);
    for (std::int32_t page = 0; page < sealed; ++page) {
      if (std::ranges::binary_search(pages, page)) continue;
      const float score = tail.scores[expected_.row(seq, head) * tail.page_stride + page];
      if (!(score >= tail.lowest_far_score(sealed))) continue;
      add(page, double{tail.log_masses[q_row * tail.page_stride + page]});
    }
    return terms;
  }

  // Bit for bit the same with 1, 2, 3 and 8 threads; returns the result.
  template <typename Op>
  std::vector<float> run_with_threads(const Op& op) {
    std::vector<float> first;
    for (const int threads : {1, 2, 3, 8}) {
      ThreadPool pool(threads);
      const auto backend = make_cpu_backend(pool, isa_);
      StepBuffers buffers(case_, fixture_);
      copy_kept(buffers);
      run(*backend, buffers, op);
      if (threads == 1) {
        first = buffers.out;
      } else {
        EXPECT_TRUE(same_bits(buffers.out, first)) << threads << " threads";
      }
    }
    return first;
  }

  // Error of o = sum p_t v_t with p the softmax of s_t = scale q.k_t over `tokens`. A relative
  // error of at most e in each unnormalised weight moves o by at most e / (1 - e) sum p_t |v_t -
  // o|, because the weights are normalised by their own sum. e adds up from
  //   twice the error of a score (its own and that of the maximum): of sum |scale q k| a share of
  //     (D + 8) 2^-24 for the f32 sum, the scaled query and the factor log2(e), and for the bf16
  //     dot product 2^-16 for the query kept as two bf16 numbers;
  //   2^-24 |s| for the difference to the maximum, in units of log2;
  //   2^-22 for the polynomial and one rescaling per block and tile, 2^-24 each, n / 32 + 64;
  //   2^-8 where weights are rounded to bf16 (8 significant bits).
  // The weighted sum and the normaliser add (n + 64) 2^-24 of sum p |v| each; weights below 2^-126
  // of the largest are dropped.
  std::vector<double> bounds(std::int64_t seq, std::int64_t q_head,
                             std::span<const std::int32_t> tokens,
                             const std::vector<PageTerm>& terms,
                             std::span<const float> expected) const {
    const bool bf16_dot = isa_ == "avx512_bf16" && case_.shape.dtype == DType::kBf16;
    const std::int64_t head = q_head / fixture_.group_size();
    const std::span<const float> q = fixture_.q_row(seq, q_head);
    const double dim = case_.shape.head_dim;
    const auto n = static_cast<double>(tokens.size() + terms.size());
    const double score_share = (dim + 8) * 0x1p-24 + (bf16_dot ? 0x1p-16 : 0.0);
    std::vector<double> scores;
    double score_error = 0;
    double largest = 0;
    for (const std::int32_t token : tokens) {
      const std::vector<float> k = fixture_.k_row(seq, token, head);
      double sum = 0;
      double magnitude = 0;
      for (std::size_t d = 0; d < k.size(); ++d) {
        sum += double{q[d]} * double{k[d]};
        magnitude += std::abs(double{q[d]} * double{k[d]});
      }
      scores.push_back(sum * fixture_.scale());
      score_error = std::max(score_error, magnitude * fixture_.scale() * score_share);
      largest = std::max(largest, std::abs(scores.back()));
    }
    for (const PageTerm& term : terms) {
      scores.push_back(term.log_mass);
      largest = std::max(largest, std::abs(term.log_mass));
    }
    const double e = 2 * score_error + 0x1p-23 * 1.5 * largest + 0x1p-22 + (n / 32 + 64) * 0x1p-24 +
                     (bf16_dot ? 0x1p-8 : 0.0);
    const double top = *std::max_element(scores.begin(), scores.end());
    double total = 0;
    for (double& score : scores) total += score = std::exp(score - top);
    std::vector<double> bound(expected.size());
    for (std::size_t i = 0; i < scores.size(); ++i) {
      const std::vector<float> v =
          i < tokens.size() ? fixture_.v_row(seq, tokens[i], head) : terms[i - tokens.size()].mean;
      const double p = scores[i] / total;
      for (std::size_t d = 0; d < v.size(); ++d) {
        bound[d] += p * e / (1 - std::min(e, 0.5)) * std::abs(double{v[d]} - double{expected[d]}) +
                    (p * 2 * (n + 64) * 0x1p-24 + 0x1p-126) * std::abs(double{v[d]});
      }
    }
    return bound;
  }

  // The same over what `expected_` kept, and the case's tail.
  void expect_sparse_parity(const std::vector<float>& actual) {
    expect_parity(
        actual,
        [&](std::int64_t seq, std::int64_t head) {
          const std::span<const std::int32_t> kept = expected_.kept_tokens(seq, head);
          return std::vector<std::int32_t>(kept.begin(), kept.end());
        },
        true);
  }

  // Rows of the sequences an op works on within their bounds, all else untouched.
  template <typename TokensOf>
  void expect_parity(const std::vector<float>& actual, const TokensOf& tokens_of,
                     bool with_tail = false) {
    double worst = 0;
    std::vector<bool> written(actual.size());
    const auto dim = static_cast<std::size_t>(case_.shape.head_dim);
    for (std::int64_t seq = 0; seq < fixture_.num_seqs(); ++seq) {
      if (!expected_.in_subset(seq)) continue;
      for (std::int64_t q_head = 0; q_head < case_.shape.num_q_heads; ++q_head) {
        const std::span<const float> expected = expected_.out_row(seq, q_head);
        const auto begin = static_cast<std::size_t>(expected.data() - expected_.out.data());
        const std::vector<std::int32_t> tokens = tokens_of(seq, q_head / fixture_.group_size());
        std::vector<double> bound(dim);
        std::vector<PageTerm> terms;
        if (with_tail) terms = tail_terms(seq, q_head);
        if (tokens.size() + terms.size() > 0) bound = bounds(seq, q_head, tokens, terms, expected);
        for (std::size_t d = 0; d < dim; ++d) {
          written[begin + d] = true;
          const double error = std::abs(double{actual[begin + d]} - double{expected[d]});
          if (error == 0) continue;
          const double ratio = bound[d] > 0 && std::isfinite(error) ? error / bound[d] : kInfinity;
          if (ratio <= worst) continue;
          worst = ratio;
          ASSERT_LE(ratio, 1) << "sequence " << seq << " head " << q_head << " channel " << d
                              << ": got " << actual[begin + d] << ", expected " << expected[d]
                              << ", allowed error " << bound[d];
        }
      }
    }
    for (std::size_t i = 0; i < actual.size(); ++i) {
      if (!written[i]) {
        ASSERT_TRUE(std::isnan(actual[i])) << "element " << i << " is not an output";
      }
    }
    RecordProperty("worst_share_of_bound", std::to_string(worst));
  }

  OpCase case_;
  std::string isa_;
  PagedFixture fixture_;
  std::unique_ptr<Backend> ref_;
  StepBuffers expected_;
  std::vector<float> far_masses_;
  std::vector<float> far_scores_;
};

TEST_P(AttendParity, DenseMatchesReference) {
  run(*ref_, expected_, dense);
  const std::vector<float> actual = run_with_threads(dense);
  expect_parity(actual, [&](std::int64_t seq, std::int64_t) {
    std::vector<std::int32_t> all(
        static_cast<std::size_t>(case_.shape.lengths[static_cast<std::size_t>(seq)]));
    std::iota(all.begin(), all.end(), 0);
    return all;
  });
}

TEST_P(AttendParity, SparseMatchesReference) {
  run(*ref_, expected_, [](Backend& backend, StepBuffers& buffers, Workspace workspace) {
    buffers.run_selection(backend, workspace);
    sparse(backend, buffers, workspace);
  });
  const std::vector<float> actual = run_with_threads(sparse);
  expect_sparse_parity(actual);
}

TEST_P(AttendParity, FarTailMatchesReference) {
  if (!case_.policy.tail) GTEST_SKIP() << "no tail";
  make_far_tail();
  const auto far = [&](Backend& backend, StepBuffers& buffers, Workspace workspace) {
    backend.attend_sparse(with_far_tail(buffers), workspace);
  };
  run(*ref_, expected_, [&](Backend& backend, StepBuffers& buffers, Workspace workspace) {
    buffers.run_selection(backend, workspace);
    far(backend, buffers, workspace);
  });
  const std::vector<float> actual = run_with_threads(far);
  expect_sparse_parity(actual);
}

// Ragged lists: none, one, odd lengths, runs and gaps; what lies behind the counts is garbage.
TEST_P(AttendParity, SparseRaggedLists) {
  if (case_.policy.tail) {
    run(*ref_, expected_, [](Backend& backend, StepBuffers& buffers, Workspace workspace) {
      buffers.run_selection(backend, workspace);
    });
  }
  Random random(5);
  for (std::int64_t seq = 0; seq < fixture_.num_seqs(); ++seq) {
    const std::int32_t length = case_.shape.lengths[static_cast<std::size_t>(seq)];
    for (std::int64_t head = 0; head < case_.shape.num_kv_heads; ++head) {
      const std::int64_t row = expected_.row(seq, head);
      std::int32_t* const kept = expected_.kept.data() + row * expected_.kept_stride;
      const float density = random.below(4) == 0 ? 0.0F : random.uniform();
      std::int32_t count = 0;
      for (std::int32_t t = 0; t < length && count < expected_.kept_stride; ++t) {
        if (random.uniform() < density) kept[count++] = t;
      }
      expected_.kept_counts[static_cast<std::size_t>(row)] = count;
    }
  }
  run(*ref_, expected_, sparse);
  const std::vector<float> actual = run_with_threads(sparse);
  expect_sparse_parity(actual);
}

// A sequence gets the same bits alone as in its batch.
TEST_P(AttendParity, BatchDoesNotMatter) {
  ThreadPool pool(2);
  const auto backend = make_cpu_backend(pool, isa_);
  StepBuffers batch(case_, fixture_);
  run(*backend, batch, dense);
  for (std::int32_t seq = 0; seq < fixture_.num_seqs(); ++seq) {
    if (!batch.in_subset(seq)) continue;
    StepBuffers alone(case_, fixture_);
    alone.set_subset({seq});
    run(*backend, alone, dense);
    for (std::int64_t q_head = 0; q_head < case_.shape.num_q_heads; ++q_head) {
      EXPECT_TRUE(same_bits(alone.out_row(seq, q_head), batch.out_row(seq, q_head)))
          << "sequence " << seq << " head " << q_head;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, AttendParity,
                         ::testing::Combine(::testing::ValuesIn(cases_under_test()),
                                            ::testing::ValuesIn(isas())),
                         ParamName());

// Special values, on one small shape: G = 4, D = 64, N = 100, two KV heads.
class AttendSpecial : public ::testing::TestWithParam<std::tuple<DType, std::string>> {
 protected:
  AttendSpecial()
      : case_(make_case(std::get<0>(GetParam()))),
        fixture_(case_.make_fixture()),
        pool_(2),
        backend_(make_cpu_backend(pool_, std::get<1>(GetParam()))) {}

  static OpCase make_case(DType dtype) {
    OpCase result;
    result.name = "special";
    result.shape.lengths = {100};
    result.shape.num_q_heads = 8;
    result.shape.num_kv_heads = 2;
    result.shape.head_dim = 64;
    result.shape.page_size = 16;
    result.shape.dtype = dtype;
    result.policy.mode = SelectMode::kAll;
    result.policy.criterion = PruneCriterion::kNone;
    return result;
  }
  std::vector<float> run_dense(const PagedFixture& fixture) {
    StepBuffers buffers(case_, fixture);
    TestWorkspace workspace(*backend_, buffers.caps());
    backend_->attend_dense(buffers.attend_dense_params(), workspace.get());
    std::vector<float> out;
    for (int h = 0; h < 8; ++h) {
      const std::span<const float> row = buffers.out_row(0, h);
      out.insert(out.end(), row.begin(), row.end());
    }
    return out;
  }

  OpCase case_;
  PagedFixture fixture_;
  ThreadPool pool_;
  std::unique_ptr<Backend> backend_;
};

TEST_P(AttendSpecial, NanKeyReachesItsGroupAlone) {
  const std::vector<float> clean = run_dense(fixture_);
  std::vector<float> key = fixture_.k_row(0, 57, 1);
  key[9] = kNaN;
  fixture_.set_k(0, 57, 1, key);
  const std::vector<float> out = run_dense(fixture_);
  EXPECT_TRUE(same_bits(std::span(out).first(4 * 64), std::span(clean).first(4 * 64)));
  for (std::size_t i = 4 * 64; i < out.size(); ++i) EXPECT_TRUE(std::isnan(out[i])) << i;
}

TEST_P(AttendSpecial, NanValueReachesItsChannelAlone) {
  const std::vector<float> clean = run_dense(fixture_);
  std::vector<float> value = fixture_.v_row(0, 99, 0);
  value[37] = kNaN;
  fixture_.set_v(0, 99, 0, value);
  const std::vector<float> out = run_dense(fixture_);
  for (std::size_t i = 0; i < out.size(); ++i) {
    if (i < 4 * 64 && i % 64 == 37) {
      EXPECT_TRUE(std::isnan(out[i])) << i;
    } else {
      EXPECT_EQ(out[i], clean[i]) << i;
    }
  }
}

// Scores that overflow to -inf weigh nothing, also where a whole first block consists of them.
TEST_P(AttendSpecial, MinusInfinityScoresWeighNothing) {
  for (int h = 0; h < 8; ++h) fixture_.set_q(0, h, std::vector<float>(64, 1e36F));
  const std::vector<float> key(64, 0.25F);
  std::vector<float> low = key;
  low[3] = -6e4F;
  for (int t = 0; t < 100; ++t) {
    fixture_.set_v(0, t, 0, std::vector<float>(64, t < 70 ? 100.0F : 2.0F));
    fixture_.set_k(0, t, 0, t < 70 ? low : key);
  }
  const std::vector<float> out = run_dense(fixture_);
  for (std::size_t i = 0; i < 4 * 64; ++i) EXPECT_EQ(out[i], 2.0F) << i;
}

TEST_P(AttendSpecial, NoTokensGiveZeros) {
  StepBuffers buffers(case_, fixture_);
  TestWorkspace workspace(*backend_, buffers.caps());
  std::fill(buffers.kept_counts.begin(), buffers.kept_counts.end(), 0);
  backend_->attend_sparse(buffers.attend_sparse_params(), workspace.get());
  for (int h = 0; h < 8; ++h) {
    for (const float x : buffers.out_row(0, h)) EXPECT_EQ(x, 0.0F);
  }
}

INSTANTIATE_TEST_SUITE_P(All, AttendSpecial,
                         ::testing::Combine(::testing::Values(DType::kBf16, DType::kF16,
                                                              DType::kF32),
                                            ::testing::ValuesIn(isas())),
                         ParamName());

}  // namespace
}  // namespace twilight::test
