#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "backend/cpu/isa.h"
#include "core/buffer.h"
#include "core/thread_pool.h"
#include "sparse/decode_step.h"
#include "support/expect_error.h"
#include "support/paged_fixture.h"

/// Policies end to end: what each preset reads, why a sequence runs dense, and what is refused.
namespace twilight::test {
namespace {

constexpr std::int32_t kDim = 64;
constexpr std::int32_t kPage = 16;
constexpr std::int32_t kKvHeads = 2;
constexpr std::int32_t kQHeads = 8;

PagedFixture make_fixture(const IndexFormat& format,
                          std::vector<std::int32_t> lengths = {700, 0, 330, 9}) {
  FixtureShape shape{.lengths = std::move(lengths),
                     .num_q_heads = kQHeads,
                     .num_kv_heads = kKvHeads,
                     .head_dim = kDim,
                     .page_size = kPage,
                     .dtype = DType::kBf16,
                     .format = format};
  return {shape, {.distribution = Distribution::kPlanted, .seed = 11}};
}

SparsePolicy small_policy(const std::string& preset) {
  SparsePolicy policy = make_policy(preset);
  policy.dense_layers = 0;
  policy.dense_below_tokens = 0;
  policy.sink_tokens = 4;
  policy.recent_pages = 1;
  policy.min_tokens = 1;
  if (preset == "paper" || preset == "adaptive") policy.min_candidates = 64;
  return policy;
}

StepCaps caps_of(const PagedFixture& fixture) {
  StepCaps caps;
  caps.max_seqs = fixture.num_seqs();
  caps.num_q_heads = kQHeads;
  caps.num_kv_heads = kKvHeads;
  caps.head_dim = kDim;
  caps.page_size = kPage;
  caps.max_tokens = 1;
  for (const std::int32_t n : fixture.shape().lengths) {
    caps.max_tokens = std::max(caps.max_tokens, n);
  }
  return caps;
}

struct Result {
  std::vector<float> out;
  std::vector<LayerStats> stats;
};

DecodeStepParams params_of(const PagedFixture& fixture, std::vector<float>& out) {
  DecodeStepParams params;
  params.q = fixture.q();
  params.kv = fixture.kv();
  params.index = fixture.index();
  params.out_seq_stride = kQHeads * kDim;
  out.assign(static_cast<std::size_t>(fixture.num_seqs() * params.out_seq_stride), 0.0F);
  params.out = out.data();
  return params;
}

Result run(Backend& backend, const SparsePolicy& policy, const PagedFixture& fixture,
           bool audit = true) {
  DecodeStep step(backend, policy, caps_of(fixture), fixture.shape().dtype);
  Result result;
  const DecodeStepParams params = params_of(fixture, result.out);
  result.stats.resize(static_cast<std::size_t>(fixture.num_seqs()));
  Buffer workspace(step.workspace_bytes());
  step.run(params, {workspace.data(), workspace.size()}, result.stats, audit);
  return result;
}

class DecodeStepPolicies : public ::testing::TestWithParam<std::string> {
 protected:
  DecodeStepPolicies()
      : pool_(2),
        backend_(GetParam() == "ref" ? make_ref_backend() : make_cpu_backend(pool_, GetParam())) {}

  ThreadPool pool_;
  std::unique_ptr<Backend> backend_;
};

TEST_P(DecodeStepPolicies, StreamingReadsTheWindow) {
  const PagedFixture fixture = make_fixture({.summary = SummaryKind::kNone, .key_bits = 0});
  const Result result = run(*backend_, small_policy("streaming"), fixture);
  // 700 = 43 pages and 12 tokens: the page of the sinks, the last full page, the open page.
  const std::int32_t window[] = {16 + 16 + 12, 0, 16 + 16 + 10, 0};
  for (const std::size_t seq : {0U, 2U}) {
    const LayerStats& stats = result.stats[seq];
    EXPECT_EQ(stats.path, StepPath::kSparse);
    for (std::size_t head = 0; head < kKvHeads; ++head) {
      EXPECT_EQ(stats.candidates[head], window[seq]);
      EXPECT_EQ(stats.attended[head], window[seq]);
    }
    EXPECT_EQ(stats.bytes_read, std::int64_t{kKvHeads} * 2 * window[seq] * kDim * 2);
    for (const float mass : stats.estimated_mass) EXPECT_EQ(mass, 1.0F);
  }
  EXPECT_EQ(result.stats[1].path, StepPath::kDenseShort);
  EXPECT_EQ(result.stats[3].path, StepPath::kDenseAllForced);
}

TEST_P(DecodeStepPolicies, QuestTakesItsBudget) {
  for (const std::int32_t bits : {16, 4}) {
    const SummaryKind kind = bits == 4 ? SummaryKind::kQuest4 : SummaryKind::kQuestBf16;
    const PagedFixture fixture = make_fixture({kind, 0});
    SparsePolicy policy = small_policy("quest:100");
    policy.summary_bits = bits;
    const Result result = run(*backend_, policy, fixture);
    const LayerStats& stats = result.stats[0];
    // 100 tokens are 7 pages, the open one of 12 tokens among them.
    constexpr std::int32_t kTokens = 6 * 16 + 12;
    EXPECT_EQ(stats.candidates, (std::vector<std::int32_t>(kKvHeads, kTokens)));
    EXPECT_EQ(stats.attended, stats.candidates);
    EXPECT_EQ(stats.kept, (std::vector<std::int32_t>(kQHeads, kTokens)));
    const std::int64_t summary = bits == 16 ? 4 * kDim : kDim + 16;
    EXPECT_EQ(stats.bytes_read, kKvHeads * (43 * summary + 2 * kTokens * kDim * 2));
    for (const float mass : stats.estimated_mass) EXPECT_EQ(mass, 1.0F);
    for (const float mass : stats.true_mass) EXPECT_LT(mass, 1.0F);
  }
}

// Pages by their true mass: no choice of as many pages holds more of it, and none of Quest's does.
TEST_P(DecodeStepPolicies, OracleTakesTheHeaviestPages) {
  const PagedFixture fixture = make_fixture({SummaryKind::kQuestBf16, 4});
  SparsePolicy oracle = small_policy("quest:100");
  oracle.selector = "oracle";
  const Result best = run(*backend_, oracle, fixture);
  const Result quest = run(*backend_, small_policy("quest:100"), fixture);
  constexpr std::int32_t kTokens = 700;
  constexpr std::size_t kPages = 44;
  const LayerStats& stats = best.stats[0];
  EXPECT_EQ(stats.attended, (std::vector<std::int32_t>(kKvHeads, 6 * 16 + 12)));
  EXPECT_EQ(stats.bytes_read,
            std::int64_t{kKvHeads} * (43 * 16 * kDim * 2 + 2 * (6 * 16 + 12) * kDim * 2));
  for (std::int64_t kv_head = 0; kv_head < kKvHeads; ++kv_head) {
    std::vector<double> pages(kPages);  // summed over the group
    double got = 0;
    double by_quest = 0;
    for (std::int64_t g = 0; g < 4; ++g) {
      const std::int64_t head = kv_head * 4 + g;
      const std::span<const float> q = fixture.q_row(0, head);
      std::vector<double> weights;
      double top = -1e300;
      for (std::int32_t t = 0; t < kTokens; ++t) {
        const std::vector<float> k = fixture.k_row(0, t, kv_head);
        double sum = 0;
        for (std::size_t d = 0; d < k.size(); ++d) sum += double{q[d]} * double{k[d]};
        weights.push_back(sum * double{fixture.scale()});
        top = std::max(top, weights.back());
      }
      double total = 0;
      for (double& weight : weights) total += weight = std::exp(weight - top);
      for (std::size_t t = 0; t < kTokens; ++t) pages[t / kPage] += weights[t] / total;
      got += stats.true_mass[static_cast<std::size_t>(head)];
      by_quest += quest.stats[0].true_mass[static_cast<std::size_t>(head)];
    }
    // Forced: the first page, the last full one and the open one; then the four heaviest.
    double optimum = pages[0] + pages[42] + pages[43];
    std::sort(pages.begin() + 1, pages.begin() + 42, std::greater<>());
    for (std::size_t i = 1; i <= 4; ++i) optimum += pages[i];
    // Four masses, each to 2^-10: f32 scores of a few units, their error D 2^-24 of sums of |q k|.
    EXPECT_NEAR(got, optimum, 4 * 0x1p-10);
    EXPECT_LE(by_quest, got + 4 * 0x1p-10);
  }
}

// More bits and exact keys cost more bytes for records alone, and keep what they promise.
TEST_P(DecodeStepPolicies, KeyBits) {
  std::vector<double> masses;
  for (const std::int32_t bits : {4, 8, 16}) {
    SCOPED_TRACE(bits);
    SparsePolicy policy = small_policy("paper-full");
    policy.key_bits = bits;
    policy.p = 0.9F;
    const PagedFixture fixture = make_fixture(index_format_of(policy));
    const LayerStats stats = run(*backend_, policy, fixture).stats[0];
    EXPECT_EQ(stats.path, StepPath::kSparse);
    EXPECT_EQ(stats.candidates, (std::vector<std::int32_t>(kKvHeads, 700)));
    const std::int64_t record = bits == 16 ? 16 * kDim * 2 : 16 * kDim * bits / 8 + 64;
    std::int64_t bytes = kKvHeads * (43 * record + 12 * kDim * 2);
    for (const std::int32_t attended : stats.attended)
      bytes += std::int64_t{2} * attended * kDim * 2;
    EXPECT_EQ(stats.bytes_read, bytes);
    double worst = 1;
    for (const float mass : stats.true_mass) worst = std::min(worst, double{mass});
    for (const float mass : stats.estimated_mass) EXPECT_GE(mass, 0.9F - 0x1p-20F);
    masses.push_back(worst);
  }
  // The union over the group only adds, so exact keys keep p of the true mass.
  EXPECT_GE(masses[2], 0.9 - 0x1p-10);
  EXPECT_GE(masses[1], 0.85);
  EXPECT_GE(masses[0], 0.5);
}

// The bytes of the rotated planes by hand: 43 sealed pages of D = 64. A centroid is 64 bytes and
// its scales 16, a tile of 2-bit keys 16 * 64 / 4 + 32 = 288, a mean value 32.
TEST_P(DecodeStepPolicies, BytesOfTheRotatedPlanes) {
  struct Reads {
    const char* selector;
    std::int64_t summary;  // of a sealed page
    std::int64_t record;   // of a sealed candidate
    std::int64_t mean;     // of a page with a tail
    std::int32_t key_bits;
  };
  constexpr Reads kReads[] = {
      {"centroid", 64 + 16, 288, 32, 2},       {"sub_centroid", 128 + 16, 288, 32, 2},
      {"full", 0, 288 + 32 + 16, 32, 2},       {"quest", 256, 288 + 32 + 16, 32, 2},
      {"centroid", 64 + 16, 576, 32, 4},       {"quest", 256, 576, 32 + 16, 4},
      {"quest", 256, 16 * 64 * 2, 32 + 16, 16}};
  for (const Reads& reads : kReads) {
    for (const bool tail : {false, true}) {
      SCOPED_TRACE(std::string(reads.selector) + std::to_string(reads.key_bits));
      SparsePolicy policy = small_policy("adaptive");
      policy.selector = reads.selector;
      policy.key_bits = reads.key_bits;
      policy.min_candidates = 160;
      policy.tail = tail;
      const PagedFixture fixture = make_fixture(index_format_of(policy));
      if (!backend_->supports(caps_of(fixture), DType::kBf16, fixture.shape().format)) {
        GTEST_SKIP() << "no kernels for this format";
      }
      const LayerStats stats = run(*backend_, policy, fixture).stats[0];
      ASSERT_EQ(stats.path, StepPath::kSparse);
      // Budget max(700 / 4, 160) = 175 tokens: 11 pages, the open one of 12 tokens among them.
      const std::int64_t candidates = policy.selector == "full" ? 43 : 10;
      EXPECT_EQ(stats.candidates, std::vector<std::int32_t>(
                                      kKvHeads, static_cast<std::int32_t>(candidates * 16 + 12)));
      std::int64_t bytes = kKvHeads * (43 * reads.summary + candidates * reads.record + 12 * 128);
      for (const std::int32_t attended : stats.attended) bytes += std::int64_t{2} * attended * 128;
      if (!tail) {
        EXPECT_EQ(stats.bytes_read, bytes);
        continue;
      }
      // Some tokens of every candidate page are dropped but for those of the sinks (4 of 16 tokens
      // are forced there) and of the last full page, which is forced whole.
      bytes += kKvHeads * (candidates - 1) * reads.mean;
      EXPECT_EQ(stats.bytes_read, bytes);
    }
  }
}

TEST_P(DecodeStepPolicies, LayerProbabilities) {
  const PagedFixture fixture = make_fixture({SummaryKind::kNone, 4});
  SparsePolicy policy = small_policy("paper-full");
  policy.layer_p = {0.3F, 1.0F};
  DecodeStep step(*backend_, policy, caps_of(fixture), DType::kBf16);
  Buffer workspace(step.workspace_bytes());
  std::vector<float> out;
  std::vector<LayerStats> stats(4);
  DecodeStepParams params = params_of(fixture, out);
  std::vector<std::int32_t> attended;
  for (const std::int32_t layer : {0, 1, 2}) {
    params.layer = layer;
    step.run(params, {workspace.data(), workspace.size()}, stats);
    EXPECT_EQ(stats[0].path, layer == 1 ? StepPath::kDenseFullMass : StepPath::kSparse);
    attended.push_back(stats[0].attended[0]);
  }
  EXPECT_LT(attended[0], attended[2]);  // p = .3 against the policy's .95
  EXPECT_EQ(attended[1], 700);
}

TEST_P(DecodeStepPolicies, PathsAndTheirReasons) {
  const StepCaps caps = caps_of(make_fixture({SummaryKind::kQuestBf16, 4}));
  const auto path = [&](const SparsePolicy& policy, std::int32_t layer, std::int32_t n,
                        float p = 0.95F) {
    return DecodeStep(*backend_, policy, caps, DType::kBf16).path_of(layer, n, p);
  };
  EXPECT_EQ(path(make_policy("dense"), 5, 700), StepPath::kDensePolicy);
  SparsePolicy policy = small_policy("paper");
  policy.dense_layers = 2;
  policy.dense_below_tokens = 100;
  EXPECT_EQ(path(policy, 0, 700), StepPath::kDenseLayer);
  EXPECT_EQ(path(policy, 1, 50), StepPath::kDenseLayer);
  EXPECT_EQ(path(policy, 2, 100), StepPath::kDenseShort);
  EXPECT_EQ(path(policy, 2, 101), StepPath::kSparse);
  EXPECT_EQ(path(policy, 2, 101, 1.0F), StepPath::kSparse);  // p = 1 of some pages only
  policy.dense_below_tokens = 0;
  // Four sinks and the last full page: token 4 is the first that need not be read, with N = 32.
  EXPECT_EQ(path(policy, 2, 0), StepPath::kDenseShort);
  EXPECT_EQ(path(policy, 2, 31), StepPath::kDenseAllForced);
  EXPECT_EQ(path(policy, 2, 32), StepPath::kSparse);
  policy.dense_below_tokens = SparsePolicy::kDenseBelowAuto;  // counts as 0 here
  EXPECT_EQ(path(policy, 2, 32), StepPath::kSparse);
  SparsePolicy full = small_policy("paper-full");
  EXPECT_EQ(path(full, 0, 700), StepPath::kSparse);
  EXPECT_EQ(path(full, 0, 700, 1.0F), StepPath::kDenseFullMass);
  full.prune = false;
  EXPECT_EQ(path(full, 0, 700), StepPath::kDenseFullMass);
  std::set<std::string_view> names;
  for (const StepPath each :
       {StepPath::kSparse, StepPath::kDensePolicy, StepPath::kDenseLayer, StepPath::kDenseShort,
        StepPath::kDenseAllForced, StepPath::kDenseFullMass}) {
    names.insert(step_path_name(each));
    EXPECT_EQ(is_dense(each), each != StepPath::kSparse);
  }
  EXPECT_EQ(names.size(), 6U);
}

TEST_P(DecodeStepPolicies, Refusals) {
  const PagedFixture fixture = make_fixture({SummaryKind::kQuestBf16, 4});
  const StepCaps caps = caps_of(fixture);
  const SparsePolicy policy = small_policy("paper");
  std::vector<float> out;
  const DecodeStepParams params = params_of(fixture, out);
  for (const SparsePolicy& each : {policy, make_policy("dense")}) {
    DecodeStep step(*backend_, each, caps, DType::kBf16);
    if (step.workspace_bytes() == 0) continue;  // nothing to lack
    Buffer workspace(step.workspace_bytes());
    // A slice of nothing at the end may fit a workspace that lacks a cache line.
    for (const std::size_t bytes :
         {std::size_t{0}, step.workspace_bytes() / 2, step.workspace_bytes() - kBufferAlignment}) {
      if (bytes == step.workspace_bytes()) continue;
      if (bytes != 0 && backend_->workspace_bytes(step.caps()) == 0 && each.is_dense()) continue;
      expect_error(ErrorCode::kInvalidArgument, {"accepted"}, [&] {
        step.run(params, {workspace.data(), bytes});
      });
    }
    expect_error(ErrorCode::kInvalidArgument, {"[decode_step]", "workspace", "null"}, [&] {
      step.run(params, {nullptr, workspace.size()});
    });
    EXPECT_NO_THROW(step.run(params, {workspace.data(), workspace.size()}));
    std::vector<LayerStats> wrong(3);
    expect_error(ErrorCode::kInvalidArgument, {"stats", "got 3", "4"}, [&] {
      step.run(params, {workspace.data(), workspace.size()}, wrong);
    });
  }
  StepCaps fewer = caps;
  fewer.max_seqs = 3;
  StepCaps shorter = caps;
  shorter.max_tokens = 699;
  Buffer workspace(DecodeStep(*backend_, policy, caps, DType::kBf16).workspace_bytes());
  const auto run_with = [&](const StepCaps& small) {
    DecodeStep(*backend_, policy, small, DType::kBf16)
        .run(params, {workspace.data(), workspace.size()});
  };
  expect_error(ErrorCode::kInvalidArgument, {"[decode_step]", "batch size", "got 4", "3"},
               [&] { run_with(fewer); });
  expect_error(ErrorCode::kInvalidArgument, {"[decode_step]", "length", "got 700", "699"},
               [&] { run_with(shorter); });
  const std::pair<const char*, void (*)(StepCaps&)> bads[] = {
      {"batch size", [](StepCaps& c) { c.max_seqs = 0; }},
      {"kv heads", [](StepCaps& c) { c.num_kv_heads = 0; }},
      {"query heads", [](StepCaps& c) { c.num_q_heads = 7; }},
      {"head_dim", [](StepCaps& c) { c.head_dim = 0; }},
      {"page_size", [](StepCaps& c) { c.page_size = 257; }},
      {"max_tokens", [](StepCaps& c) { c.max_tokens = 0; }}};
  for (const auto& [field, edit] : bads) {
    StepCaps bad = caps;
    edit(bad);
    expect_error(ErrorCode::kInvalidArgument, {"[decode_step]", field, "got ", "accepted "},
                 [&] { DecodeStep(*backend_, policy, bad, DType::kBf16); });
  }
  SparsePolicy bad_policy = policy;
  bad_policy.p = 0;
  expect_error(ErrorCode::kInvalidArgument, {"[policy]", "p, got 0"},
               [&] { DecodeStep(*backend_, bad_policy, caps, DType::kBf16); });
}

std::vector<std::string> backend_names() {
  std::vector<std::string> names = {"ref"};
  for (const cpu::Isa isa : cpu::available_isas()) names.emplace_back(cpu::isa_name(isa));
  return names;
}

INSTANTIATE_TEST_SUITE_P(All, DecodeStepPolicies, ::testing::ValuesIn(backend_names()),
                         [](const auto& param) { return param.param; });

}  // namespace
}  // namespace twilight::test
