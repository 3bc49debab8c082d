#include "sparse/decode_step.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "backend/cpu/isa.h"
#include "core/buffer.h"
#include "core/thread_pool.h"
#include "support/cases.h"
#include "support/expect_stats.h"
#include "support/step_buffers.h"

/// One decode step of a policy against the ops it is made of, on the scalar reference and every
/// instruction set: which sequences run dense and why, the same bits as the ops one by one, and
/// statistics against sums made here.
namespace twilight::test {
namespace {

std::vector<std::string> backend_names() {
  std::vector<std::string> names = {"ref"};
  for (const cpu::Isa isa : cpu::available_isas()) names.emplace_back(cpu::isa_name(isa));
  return names;
}

std::unique_ptr<Backend> make_backend(const std::string& name, ThreadPool& pool) {
  return name == "ref" ? make_ref_backend() : make_cpu_backend(pool, name);
}

// The policy that gives a case's numbers to the ops.
SparsePolicy policy_of(const OpCase& op_case) {
  const CasePolicy& from = op_case.policy;
  SparsePolicy policy;
  policy.name = op_case.name;
  const SummaryKind summary = op_case.shape.format.summary;
  policy.selector = from.mode == SelectMode::kAll           ? "full"
                    : from.mode == SelectMode::kForcedOnly  ? "streaming"
                    : summary == SummaryKind::kCentroid     ? "centroid"
                    : summary == SummaryKind::kSubCentroid  ? "sub_centroid"
                    : summary == SummaryKind::kHalfCentroid ? "half_centroid"
                    : summary == SummaryKind::kLabels       ? "double_sparsity"
                                                            : "quest";
  policy.candidate_fraction = from.fraction;
  policy.min_candidates = from.min_candidate_tokens;
  policy.max_candidates = from.max_candidate_tokens;
  policy.candidate_mass = from.mass;
  policy.prune = from.criterion != PruneCriterion::kNone;
  policy.criterion = from.criterion == PruneCriterion::kGroupMean ? "group_mean" : "per_head";
  policy.tail = from.tail;
  policy.far_tail = from.far_tail;
  policy.far_floor = from.far_floor;
  policy.p = from.p;
  policy.min_tokens = from.min_tokens;
  policy.key_bits = from.exact_keys ? 16 : op_case.shape.format.key_bits;
  if (!policy.prune) policy.key_bits = 4;
  policy.summary_bits = op_case.shape.format.summary == SummaryKind::kQuest4 ? 4 : 16;
  if (summary == SummaryKind::kLabels) {
    policy.num_labels = op_case.shape.format.label_channels;
    policy.labels =
        test_labels(op_case.shape.num_kv_heads, op_case.shape.head_dim, policy.num_labels);
  }
  policy.sink_tokens = from.forced.sink_tokens;
  policy.recent_pages = from.forced.recent_pages;
  policy.dense_layers = 0;
  policy.dense_below_tokens = 0;
  return policy;
}

// A policy has one lower limit of candidates.
OpCase step_case(OpCase op_case) {
  if (op_case.policy.mass > 0) op_case.policy.mass_floor = op_case.policy.min_candidate_tokens;
  return op_case;
}

StepCaps caps_of(const PagedFixture& fixture) {
  const FixtureShape& shape = fixture.shape();
  StepCaps caps;
  caps.max_seqs = fixture.num_seqs();
  caps.num_q_heads = shape.num_q_heads;
  caps.num_kv_heads = shape.num_kv_heads;
  caps.head_dim = shape.head_dim;
  caps.page_size = shape.page_size;
  caps.max_tokens = std::max(1, *std::max_element(shape.lengths.begin(), shape.lengths.end()));
  return caps;
}

struct Result {
  std::vector<float> out;  // [B, Hq, D] packed
  std::vector<LayerStats> stats;
};

// p of each sequence; a case without its own gives all the same.
std::vector<float> sequence_p(const OpCase& op_case, std::int32_t num_seqs) {
  std::vector<float> p(static_cast<std::size_t>(num_seqs), op_case.policy.p);
  if (op_case.policy.mixed_p) {
    for (std::size_t i = 0; i < p.size(); ++i) p[i] = i % 3 == 2 ? 1.0F : 0.4F + 0.1F * (i % 6);
  }
  return p;
}

// Sequences [first, first + count) of a fixture as one batch.
Result run_step(DecodeStep& step, const PagedFixture& fixture, const std::vector<float>& p,
                std::int32_t first, std::int32_t count, std::int32_t layer = 0,
                bool audit = false) {
  const FixtureShape& shape = fixture.shape();
  Result result;
  DecodeStepParams params;
  params.layer = layer;
  params.q = fixture.q();
  params.q.data += first * params.q.seq_stride;
  params.kv = fixture.kv();
  params.kv.num_seqs = count;
  params.kv.block_table += first * params.kv.block_table_stride;
  params.kv.seq_lens += first;
  params.index = fixture.index();
  params.p = p.empty() ? nullptr : p.data() + first;
  params.out_seq_stride = std::int64_t{shape.num_q_heads} * shape.head_dim;
  result.out.assign(static_cast<std::size_t>(count * params.out_seq_stride), -7.0F);
  params.out = result.out.data();
  result.stats.resize(static_cast<std::size_t>(count));
  Buffer workspace(step.workspace_bytes());
  std::fill_n(workspace.data(), workspace.size(), std::byte{0xff});
  step.run(params, {workspace.data(), workspace.size()}, result.stats, audit);
  return result;
}

void expect_same_bits(std::span<const float> a, std::span<const float> b, const std::string& what) {
  ASSERT_EQ(a.size(), b.size()) << what;
  EXPECT_EQ(std::memcmp(a.data(), b.data(), a.size_bytes()), 0) << what;
}

class DecodeStepCases : public ::testing::TestWithParam<std::tuple<OpCase, std::string>> {
 protected:
  DecodeStepCases()
      : case_(step_case(std::get<0>(GetParam()))),
        fixture_(case_.make_fixture()),
        pool_(2),
        backend_(make_backend(std::get<1>(GetParam()), pool_)),
        policy_(policy_of(case_)),
        p_(sequence_p(case_, fixture_.num_seqs())) {
    case_.subset = false;
  }
  void SetUp() override {
    const Support support =
        backend_->supports(caps_of(fixture_), case_.shape.dtype, case_.shape.format);
    if (!support) GTEST_SKIP() << support.reason;
  }

  [[nodiscard]] std::int64_t row_floats() const {
    return std::int64_t{case_.shape.num_q_heads} * case_.shape.head_dim;
  }
  [[nodiscard]] std::span<const float> row(const Result& result, std::int64_t seq) const {
    return std::span(result.out)
        .subspan(static_cast<std::size_t>(seq * row_floats()),
                 static_cast<std::size_t>(row_floats()));
  }
  Result run(const SparsePolicy& policy, bool audit = false) {
    DecodeStep step(*backend_, policy, caps_of(fixture_), case_.shape.dtype);
    return run_step(step, fixture_, p_, 0, fixture_.num_seqs(), 0, audit);
  }
  // Whether every token is forced, counted one by one.
  [[nodiscard]] bool all_forced(std::int32_t n) const {
    for (std::int32_t t = 0; t < n; ++t) {
      if (!case_.policy.forced.contains(t, n, case_.shape.page_size)) return false;
    }
    return true;
  }
  [[nodiscard]] std::int64_t row_bytes() const {
    return std::int64_t{case_.shape.head_dim} * dtype_bytes(case_.shape.dtype);
  }
  void expect_dense_stats(const LayerStats& stats, std::int32_t n) const {
    EXPECT_EQ(stats.num_tokens, n);
    EXPECT_EQ(stats.candidates,
              std::vector<std::int32_t>(static_cast<std::size_t>(case_.shape.num_kv_heads), n));
    EXPECT_EQ(stats.attended, stats.candidates);
    EXPECT_EQ(stats.kept,
              std::vector<std::int32_t>(static_cast<std::size_t>(case_.shape.num_q_heads), n));
    for (const float mass : stats.estimated_mass) EXPECT_EQ(mass, 1.0F);
    EXPECT_EQ(stats.bytes_dense, std::int64_t{2} * n * case_.shape.num_kv_heads * row_bytes());
    EXPECT_EQ(stats.bytes_read, stats.bytes_dense);
  }

  OpCase case_;
  PagedFixture fixture_;
  ThreadPool pool_;
  std::unique_ptr<Backend> backend_;
  SparsePolicy policy_;
  std::vector<float> p_;
};

// The dense policy, dense layers, short sequences and p = 1 over every token all give the bits of
// the backend's dense attention, and say why.
TEST_P(DecodeStepCases, DensePathsAreDenseAttention) {
  StepBuffers dense(case_, fixture_);
  {
    TestWorkspace workspace(*backend_, dense.caps());
    backend_->attend_dense(dense.attend_dense_params(), workspace.get());
  }
  SparsePolicy layers = policy_;
  layers.dense_layers = 1;
  SparsePolicy below = policy_;
  below.dense_below_tokens = caps_of(fixture_).max_tokens;
  SparsePolicy full_mass = policy_;
  full_mass.selector = "full";
  full_mass.sink_tokens = full_mass.recent_pages = 0;
  full_mass.key_bits = case_.shape.format.key_bits == 0 ? 16 : case_.shape.format.key_bits;
  full_mass.prune = true;
  full_mass.candidate_mass = 0;
  full_mass.far_tail = false;
  p_.assign(p_.size(), 1.0F);
  const std::pair<SparsePolicy, StepPath> paths[] = {{make_policy("dense"), StepPath::kDensePolicy},
                                                     {layers, StepPath::kDenseLayer},
                                                     {below, StepPath::kDenseShort},
                                                     {full_mass, StepPath::kDenseFullMass}};
  for (const auto& [policy, path] : paths) {
    SCOPED_TRACE(step_path_name(path));
    const Result result = run(policy);
    for (std::int32_t seq = 0; seq < fixture_.num_seqs(); ++seq) {
      const std::int32_t n = fixture_.kv().seq_lens[seq];
      const LayerStats& stats = result.stats[static_cast<std::size_t>(seq)];
      for (std::int64_t head = 0; head < case_.shape.num_q_heads; ++head) {
        const auto dim = static_cast<std::size_t>(case_.shape.head_dim);
        expect_same_bits(row(result, seq).subspan(static_cast<std::size_t>(head) * dim, dim),
                         dense.out_row(seq, head), "sequence " + std::to_string(seq));
      }
      expect_dense_stats(stats, n);
      // No token, open page alone and such: forced or short comes before p = 1.
      if (path == StepPath::kDenseFullMass && n < case_.shape.page_size) {
        EXPECT_EQ(stats.path, n == 0 ? StepPath::kDenseShort : StepPath::kDenseAllForced);
      } else {
        EXPECT_EQ(stats.path, path);
      }
    }
  }
}

// Each sequence by itself: dense where all is forced or wanted, else the ops one after the other.
TEST_P(DecodeStepCases, MatchesTheOpsAndCountsThem) {
  const Result result = run(policy_);
  StepBuffers ops(case_, fixture_);
  for (std::size_t i = 0; i < ops.p.size(); ++i) {
    ops.p[i] = p_[i / static_cast<std::size_t>(case_.shape.num_q_heads)];
  }
  StepBuffers dense(case_, fixture_);
  TestWorkspace workspace(*backend_, ops.caps());
  ops.run_selection(*backend_, workspace.get());
  backend_->attend_sparse(ops.attend_sparse_params(), workspace.get());
  backend_->attend_dense(dense.attend_dense_params(), workspace.get());

  const std::int32_t page_size = case_.shape.page_size;
  for (std::int32_t seq = 0; seq < fixture_.num_seqs(); ++seq) {
    SCOPED_TRACE("sequence " + std::to_string(seq));
    const std::int32_t n = fixture_.kv().seq_lens[seq];
    const LayerStats& stats = result.stats[static_cast<std::size_t>(seq)];
    const bool takes_all = case_.policy.mode == SelectMode::kAll &&
                           (!policy_.prune || p_[static_cast<std::size_t>(seq)] >= 1);
    const StepPath path = n == 0          ? StepPath::kDenseShort
                          : all_forced(n) ? StepPath::kDenseAllForced
                          : takes_all     ? StepPath::kDenseFullMass
                                          : StepPath::kSparse;
    ASSERT_EQ(stats.path, path);
    const StepBuffers& expected = is_dense(path) ? dense : ops;
    const auto dim = static_cast<std::size_t>(case_.shape.head_dim);
    for (std::int64_t head = 0; head < case_.shape.num_q_heads; ++head) {
      expect_same_bits(row(result, seq).subspan(static_cast<std::size_t>(head) * dim, dim),
                       expected.out_row(seq, head), "head " + std::to_string(head));
    }
    if (is_dense(path)) {
      expect_dense_stats(stats, n);
      continue;
    }
    // Bytes: the summary of every sealed page where pages are ranked, the record (or the keys) of
    // every sealed candidate and the keys of the open page where they are pruned, the mean value
    // of every page that has a tail for any head, K and V of every token attended. The 16 bytes of
    // scales come with the first of these that needs them.
    const std::int64_t head_dim = case_.shape.head_dim;
    const SummaryKind kind = case_.shape.format.summary;
    const bool centroids = case_.policy.mode == SelectMode::kByScore &&
                           (kind == SummaryKind::kCentroid || kind == SummaryKind::kSubCentroid ||
                            kind == SummaryKind::kHalfCentroid);
    const std::int64_t summary =
        kind == SummaryKind::kQuestBf16      ? 4 * head_dim
        : kind == SummaryKind::kQuest4       ? head_dim + 16
        : kind == SummaryKind::kCentroid     ? head_dim + 16
        : kind == SummaryKind::kSubCentroid  ? 2 * head_dim + 16
        : kind == SummaryKind::kHalfCentroid ? head_dim + 16
        : kind == SummaryKind::kLabels
            ? (page_size + 15) / 16 * (8 * case_.shape.format.label_channels + 64)
            : 0;
    const bool own_centre = kind != SummaryKind::kCentroid && kind != SummaryKind::kSubCentroid &&
                            kind != SummaryKind::kHalfCentroid;
    const std::int64_t tiles = (page_size + 15) / 16;
    const std::int64_t record =
        policy_.key_bits == 16 ? page_size * row_bytes()
        : policy_.key_bits == 2
            ? tiles * (4 * head_dim + 32) + (own_centre ? head_dim / 2 : 0) + (centroids ? 0 : 16)
            : tiles * (2 * head_dim * policy_.key_bits + 64);
    const std::int64_t mean_value = head_dim / 2 + (centroids || policy_.key_bits == 2 ? 0 : 16);
    std::int64_t bytes = 0;
    for (std::int32_t head = 0; head < case_.shape.num_kv_heads; ++head) {
      const auto h = static_cast<std::size_t>(head);
      std::int32_t candidates = 0;
      std::size_t place = 0;
      for (const std::int32_t page : ops.candidate_pages(seq, head)) {
        bool has_tail = false;
        for (std::int32_t g = 0; g < fixture_.group_size() && policy_.tail; ++g) {
          has_tail = has_tail || ops.tail_row(seq, head * fixture_.group_size() + g)[place] > 0;
        }
        ++place;
        if (has_tail) bytes += mean_value;
        const std::int32_t tokens = std::min(page_size, n - page * page_size);
        candidates += tokens;
        if (policy_.prune) bytes += tokens == page_size ? record : tokens * row_bytes();
      }
      const std::int32_t full_pages = n / page_size;
      for (std::int32_t page = 0; page < full_pages && ops.has_far_tail(); ++page) {
        const bool candidate = std::ranges::binary_search(ops.candidate_pages(seq, head), page);
        const float floor = std::log(policy_.far_floor / static_cast<float>(full_pages));
        const float score = ops.scores_row(seq, head)[static_cast<std::size_t>(page)];
        if (!candidate && score >= floor) bytes += mean_value;
      }
      const auto attended = static_cast<std::int32_t>(ops.kept_tokens(seq, head).size());
      EXPECT_EQ(stats.candidates[h], candidates);
      EXPECT_EQ(stats.attended[h], attended);
      if (case_.policy.mode == SelectMode::kByScore) bytes += n / page_size * summary;
      bytes += std::int64_t{2} * attended * row_bytes();
    }
    EXPECT_EQ(stats.bytes_read, bytes);
    EXPECT_EQ(stats.bytes_dense, std::int64_t{2} * n * case_.shape.num_kv_heads * row_bytes());
    EXPECT_EQ(stats.num_tokens, n);
    for (std::int64_t head = 0; head < case_.shape.num_q_heads; ++head) {
      const auto at = static_cast<std::size_t>(seq * case_.shape.num_q_heads + head);
      EXPECT_EQ(stats.kept[static_cast<std::size_t>(head)], ops.head_counts[at]);
      EXPECT_EQ(stats.estimated_mass[static_cast<std::size_t>(head)], ops.head_mass[at]);
    }
  }
}

TEST_P(DecodeStepCases, BatchAndThreadsDoNotMatter) {
  const Result batch = run(policy_);
  DecodeStep step(*backend_, policy_, caps_of(fixture_), case_.shape.dtype);
  for (std::int32_t seq = 0; seq < fixture_.num_seqs(); ++seq) {
    SCOPED_TRACE("sequence " + std::to_string(seq));
    const Result alone = run_step(step, fixture_, p_, seq, 1);
    expect_same_bits(alone.out, row(batch, seq), "alone");
    expect_same_stats(alone.stats[0], batch.stats[static_cast<std::size_t>(seq)]);
  }
  if (std::get<1>(GetParam()) == "ref") return;
  for (const int threads : {1, 3, 8}) {
    ThreadPool pool(threads);
    const auto backend = make_backend(std::get<1>(GetParam()), pool);
    DecodeStep other(*backend, policy_, caps_of(fixture_), case_.shape.dtype);
    const Result result = run_step(other, fixture_, p_, 0, fixture_.num_seqs());
    expect_same_bits(result.out, batch.out, std::to_string(threads) + " threads");
    for (std::size_t i = 0; i < batch.stats.size(); ++i) {
      expect_same_stats(result.stats[i], batch.stats[i]);
    }
  }
}

// True mass against a softmax in double. A score is off by at most d = (D + 8) 2^-24 sum |scale q
// k| (2^-16 more of it where a bf16 dot product takes the query as two bf16 numbers); two scores
// and the difference to the maximum move a weight by exp(2 d + 2^-23 |s|) at most, and so the
// share; 2^-23 for the final rounding.
TEST_P(DecodeStepCases, AuditGivesTheTrueMass) {
  const Result result = run(policy_, /*audit=*/true);
  StepBuffers ops(case_, fixture_);
  for (std::size_t i = 0; i < ops.p.size(); ++i) {
    ops.p[i] = p_[i / static_cast<std::size_t>(case_.shape.num_q_heads)];
  }
  TestWorkspace workspace(*backend_, ops.caps());
  ops.run_selection(*backend_, workspace.get());
  for (std::int32_t seq = 0; seq < fixture_.num_seqs(); ++seq) {
    const LayerStats& stats = result.stats[static_cast<std::size_t>(seq)];
    ASSERT_EQ(stats.true_mass.size(), static_cast<std::size_t>(case_.shape.num_q_heads));
    for (std::int64_t head = 0; head < case_.shape.num_q_heads; ++head) {
      const float mass = stats.true_mass[static_cast<std::size_t>(head)];
      if (is_dense(stats.path)) {
        EXPECT_EQ(mass, 1.0F);
        continue;
      }
      const std::int64_t kv_head = head / fixture_.group_size();
      const std::span<const float> q = fixture_.q_row(seq, head);
      std::vector<double> scores;
      double top = -1e300;
      double largest = 0;
      for (std::int32_t t = 0; t < stats.num_tokens; ++t) {
        const std::vector<float> k = fixture_.k_row(seq, t, kv_head);
        double sum = 0;
        double size = 0;
        for (std::size_t d = 0; d < k.size(); ++d) {
          sum += double{q[d]} * double{k[d]};
          size += std::abs(double{q[d]} * double{k[d]});
        }
        scores.push_back(sum * double{fixture_.scale()});
        top = std::max(top, scores.back());
        largest = std::max(largest, size * double{fixture_.scale()});
      }
      double total = 0;
      for (double& score : scores) total += score = std::exp(score - top);
      double kept = 0;
      for (const std::int32_t t : ops.kept_tokens(seq, kv_head)) {
        kept += scores[static_cast<std::size_t>(t)];
      }
      const double delta = ((case_.shape.head_dim + 8) * 0x1p-24 + 0x1p-16) * largest;
      EXPECT_NEAR(mass, kept / total, std::expm1(2 * delta + 0x1p-23 * largest) + 0x1p-23)
          << "sequence " << seq << " head " << head;
    }
  }
}

struct ParamName {
  template <typename Info>
  std::string operator()(const Info& param) const {
    return std::get<0>(param.param).name + "_" + std::get<1>(param.param);
  }
};

INSTANTIATE_TEST_SUITE_P(All, DecodeStepCases,
                         ::testing::Combine(::testing::ValuesIn(standard_cases()),
                                            ::testing::ValuesIn(backend_names())),
                         ParamName());

}  // namespace
}  // namespace twilight::test
