#include "support/cases.h"

#include <array>

namespace twilight::test {
namespace {

constexpr IndexFormat kQuestBf16Bits4{.summary = SummaryKind::kQuestBf16, .key_bits = 4};
constexpr IndexFormat kQuest4Bits4{.summary = SummaryKind::kQuest4, .key_bits = 4};
constexpr IndexFormat kQuestBf16Bits8{.summary = SummaryKind::kQuestBf16, .key_bits = 8};
constexpr IndexFormat kQuest4Bits8{.summary = SummaryKind::kQuest4, .key_bits = 8};
constexpr IndexFormat kSummariesOnly{.summary = SummaryKind::kQuestBf16, .key_bits = 0};
constexpr IndexFormat kEstimatesOnly{.summary = SummaryKind::kNone, .key_bits = 4};

/// Lengths around every edge of a page, in no order.
std::vector<std::int32_t> edge_lengths(std::int32_t p) {
  return {3 * p + 1, 0, 1, p - 1, p, p + 1};
}

OpCase base(std::string name) {
  OpCase c;
  c.name = std::move(name);
  c.shape = {.lengths = {130, 77},
             .num_q_heads = 4,
             .num_kv_heads = 2,
             .head_dim = 64,
             .page_size = 16,
             .dtype = DType::kBf16,
             .format = kQuestBf16Bits4};
  c.options.distribution = Distribution::kPlanted;
  return c;
}

void add_page_sizes(std::vector<OpCase>& cases) {
  constexpr std::array<std::int32_t, 7> kPageSizes = {1, 2, 16, 53, 61, 64, 256};
  constexpr std::array<DType, 3> kDTypes = {DType::kBf16, DType::kF16, DType::kF32};
  for (std::size_t i = 0; i < kPageSizes.size(); ++i) {
    const std::int32_t p = kPageSizes[i];
    OpCase c = base("page_size_" + std::to_string(p));
    c.shape.lengths = edge_lengths(p);
    c.shape.page_size = p;
    c.shape.dtype = kDTypes[i % 3];
    c.shape.format = i % 2 == 0 ? kQuestBf16Bits4 : kQuest4Bits8;
    c.options.token_major = i % 2 == 1;
    c.options.row_padding = static_cast<std::int32_t>(i % 4);
    c.policy.min_candidate_tokens = p;
    c.policy.fraction = 0.4;
    cases.push_back(c);
  }
}

void add_groups_and_dims(std::vector<OpCase>& cases) {
  constexpr std::array<std::int32_t, 5> kGroups = {1, 3, 4, 7, 8};
  constexpr std::array<std::int32_t, 5> kDims = {64, 80, 96, 128, 256};
  for (std::size_t i = 0; i < kGroups.size(); ++i) {
    OpCase c = base("group_" + std::to_string(kGroups[i]) + "_dim_" + std::to_string(kDims[i]));
    c.shape.num_kv_heads = i % 2 == 0 ? 2 : 3;
    c.shape.num_q_heads = kGroups[i] * c.shape.num_kv_heads;
    c.shape.head_dim = kDims[i];
    c.options.head_padding = 5;
    c.options.page_padding = 7;
    c.options.record_padding = 16;
    c.policy.mixed_p = true;
    cases.push_back(c);
    c.name = "group_" + std::to_string(kGroups[4 - i]) + "_dim_" + std::to_string(kDims[i]);
    if (i == 2) continue;
    c.shape.num_q_heads = kGroups[4 - i] * c.shape.num_kv_heads;
    c.shape.format = kQuest4Bits4;
    c.shape.dtype = DType::kF32;
    cases.push_back(c);
  }
}

void add_probabilities(std::vector<OpCase>& cases) {
  struct Named {
    const char* name;
    float p;
  };
  constexpr std::array<Named, 4> kPs = {
      {{"p_tiny", 1e-6F}, {"p_half", 0.5F}, {"p_95", 0.95F}, {"p_one", 1.0F}}};
  for (const Named& p : kPs) {
    for (const NamedDistribution& kind : kNamedDistributions) {
      OpCase c = base(std::string(p.name) + "_" + kind.name);
      c.options.distribution = kind.distribution;
      c.policy.p = p.p;
      c.policy.mode = SelectMode::kAll;
      c.policy.min_tokens = kind.distribution == Distribution::kSinkDominated ? 20 : 1;
      if (p.p == 0.95F) c.policy.forced = {};
      cases.push_back(c);
    }
  }
}

void add_pages_and_budgets(std::vector<OpCase>& cases) {
  OpCase shared = base("shared_prefix");
  shared.shape.lengths = {200, 150, 33, 15, 0};
  shared.options.shared_prefix_pages = 5;
  cases.push_back(shared);

  OpCase ordered = base("pages_in_order");
  ordered.options.shuffle_pages = false;
  cases.push_back(ordered);

  OpCase unaligned = base("unaligned_rows_f16");
  unaligned.shape.dtype = DType::kF16;
  unaligned.options.row_padding = 1;
  unaligned.options.head_padding = 3;
  unaligned.options.page_padding = 1;
  unaligned.options.token_major = true;
  cases.push_back(unaligned);

  OpCase subset = base("subset_of_sequences");
  subset.shape.lengths = {130, 40, 0, 90, 16};
  subset.subset = true;
  subset.policy.mixed_p = true;
  cases.push_back(subset);

  OpCase cap = base("budget_cap");
  cap.shape.lengths = {600, 48};
  cap.policy.fraction = 1.0;
  cap.policy.max_candidate_tokens = 64;
  cases.push_back(cap);

  OpCase floor = base("budget_below_forced");
  floor.shape.lengths = {600, 48};
  floor.policy.fraction = 0.0;
  floor.policy.min_candidate_tokens = 0;
  floor.policy.forced = {.sink_tokens = 20, .recent_pages = 3};
  cases.push_back(floor);

  OpCase none = base("no_forced_tokens");
  none.shape.lengths = {160, 161, 1};
  none.policy.forced = {};
  none.policy.fraction = 0.0;
  none.policy.min_candidate_tokens = 0;
  cases.push_back(none);

  OpCase wider = base("forced_wider_than_sequence");
  wider.shape.lengths = {40, 7, 16};
  wider.policy.forced = {.sink_tokens = 1000, .recent_pages = 100};
  cases.push_back(wider);

  OpCase score_ties = base("page_score_ties");
  score_ties.shape.lengths = {512, 130};
  score_ties.options.distribution = Distribution::kAllEqual;
  score_ties.policy.fraction = 0.3;
  cases.push_back(score_ties);

  OpCase forced_only = base("streaming_window");
  forced_only.shape.lengths = {400, 20};
  forced_only.shape.format = kEstimatesOnly;
  forced_only.policy.mode = SelectMode::kForcedOnly;
  cases.push_back(forced_only);

  OpCase no_prune = base("no_prune");
  no_prune.shape.lengths = {400, 20, 0};
  no_prune.shape.format = kSummariesOnly;
  no_prune.policy.criterion = PruneCriterion::kNone;
  cases.push_back(no_prune);

  OpCase exact = base("exact_keys");
  exact.shape.format = kSummariesOnly;
  exact.policy.exact_keys = true;
  cases.push_back(exact);

  OpCase many = base("min_tokens_above_candidates");
  many.policy.min_tokens = 100000;
  many.policy.p = 0.5F;
  cases.push_back(many);

  // The weakest of them have weights that are 0 in f32, yet different scores.
  OpCase underflow = base("min_tokens_below_f32_weights");
  underflow.options.distribution = Distribution::kWide;
  underflow.policy.mode = SelectMode::kAll;
  underflow.policy.min_tokens = 125;
  cases.push_back(underflow);

  OpCase empty = base("all_sequences_empty");
  empty.shape.lengths = {0, 0, 0};
  cases.push_back(empty);
}

std::vector<OpCase> make_corner_cases() {
  std::vector<OpCase> cases;
  add_page_sizes(cases);
  add_groups_and_dims(cases);
  add_probabilities(cases);
  add_pages_and_budgets(cases);
  return cases;
}

std::vector<OpCase> make_correctness_cases() {
  std::vector<OpCase> cases;
  struct NamedDType {
    const char* name;
    DType dtype;
  };
  constexpr std::array<NamedDType, 3> kDTypes = {
      {{"bf16", DType::kBf16}, {"f16", DType::kF16}, {"f32", DType::kF32}}};
  struct NamedFormat {
    const char* name;
    IndexFormat format;
  };
  constexpr std::array<NamedFormat, 4> kFormats = {{{"quest_bits4", kQuestBf16Bits4},
                                                    {"quest4_bits4", kQuest4Bits4},
                                                    {"quest_bits8", kQuestBf16Bits8},
                                                    {"quest4_bits8", kQuest4Bits8}}};
  constexpr std::array<Distribution, 3> kNamedDistributions = {
      Distribution::kPlanted, Distribution::kNormal, Distribution::kTiedGroups};
  std::uint64_t seed = 100;
  for (const NamedDType& dtype : kDTypes) {
    for (const NamedFormat& format : kFormats) {
      OpCase c = base(std::string(dtype.name) + "_" + format.name);
      c.shape = {.lengths = {700, 333, 1024},
                 .num_q_heads = 8,
                 .num_kv_heads = 2,
                 .head_dim = 128,
                 .page_size = 16,
                 .dtype = dtype.dtype,
                 .format = format.format};
      c.options.seed = ++seed;
      c.options.distribution = kNamedDistributions[seed % kNamedDistributions.size()];
      c.policy.min_candidate_tokens = 128;
      c.policy.min_tokens = 16;
      cases.push_back(c);
    }
  }
  OpCase full = base("full_selector");
  full.shape.lengths = {900, 257};
  full.shape.head_dim = 128;
  full.policy.mode = SelectMode::kAll;
  cases.push_back(full);
  OpCase wide_batch = base("batch_17");
  wide_batch.shape.lengths = {};
  for (std::int32_t i = 0; i < 17; ++i) wide_batch.shape.lengths.push_back(i * 37 % 300);
  wide_batch.policy.mixed_p = true;
  cases.push_back(wide_batch);
  return cases;
}

std::vector<OpCase> make_large_cases() {
  std::vector<OpCase> cases;
  OpCase one = base("one_long_sequence");
  one.shape = {.lengths = {16384 + 9},
               .num_q_heads = 8,
               .num_kv_heads = 2,
               .head_dim = 128,
               .page_size = 16,
               .dtype = DType::kBf16,
               .format = kQuestBf16Bits4};
  one.policy.min_candidate_tokens = 1024;
  one.policy.max_candidate_tokens = 8192;
  one.policy.min_tokens = 64;
  cases.push_back(one);
  OpCase flat = one;
  flat.name = "long_flat_weights";
  flat.shape.lengths = {8192 + 5};
  flat.options.distribution = Distribution::kNormal;
  flat.policy.mode = SelectMode::kAll;
  cases.push_back(flat);
  OpCase ragged = one;
  ragged.name = "ragged_batch";
  ragged.shape.lengths = {8000, 17, 4096, 0, 2047, 1};
  ragged.shape.format = kQuest4Bits4;
  ragged.policy.mixed_p = true;
  ragged.options.shared_prefix_pages = 60;
  cases.push_back(ragged);
  OpCase tied = one;
  tied.name = "long_ties";
  tied.shape.lengths = {8192};
  tied.options.distribution = Distribution::kTiedGroups;
  tied.policy.mode = SelectMode::kAll;
  cases.push_back(tied);
  OpCase adaptive = one;
  adaptive.name = "long_adaptive";
  adaptive.shape.format = {.summary = SummaryKind::kCentroid, .key_bits = 2, .value_bits = 4};
  adaptive.policy.criterion = PruneCriterion::kGroupMean;
  adaptive.policy.p = 0.9F;
  adaptive.policy.tail = true;
  cases.push_back(adaptive);
  adaptive.name = "long_ragged_adaptive";
  adaptive.shape.lengths = {8000, 17, 4096, 0, 2047, 1};
  adaptive.shape.format.summary = SummaryKind::kSubCentroid;
  adaptive.policy.mass = 0.8;
  adaptive.policy.mass_floor = 512;
  adaptive.policy.mixed_p = true;
  cases.push_back(adaptive);
  return cases;
}

}  // namespace

const std::vector<OpCase>& corner_cases() {
  static const std::vector<OpCase> kCases = make_corner_cases();
  return kCases;
}

const std::vector<OpCase>& correctness_cases() {
  static const std::vector<OpCase> kCases = make_correctness_cases();
  return kCases;
}

const std::vector<OpCase>& label_cases() {
  static const std::vector<OpCase> kCases = [] {
    std::vector<OpCase> out;
    std::uint64_t seed = 700;
    const auto add = [&](const char* name, std::int32_t head_dim, std::int32_t page_size,
                         std::int32_t q_heads, DType dtype, IndexFormat format) -> OpCase& {
      OpCase c = base(name);
      format.summary = SummaryKind::kLabels;
      c.shape = {.lengths = {700, 5, 333},
                 .num_q_heads = q_heads,
                 .num_kv_heads = 2,
                 .head_dim = head_dim,
                 .page_size = page_size,
                 .dtype = dtype,
                 .format = format};
      c.options.seed = ++seed;
      c.options.distribution = Distribution::kPlanted;
      return out.emplace_back(std::move(c));
    };
    add("labels_bf16", 128, 16, 8, DType::kBf16, {.key_bits = 4, .label_channels = 32});
    add("labels_f16_d64", 64, 16, 8, DType::kF16, {.key_bits = 8, .label_channels = 16});
    add("labels_f32_odd_pages", 80, 13, 6, DType::kF32, {.key_bits = 4, .label_channels = 16});
    add("labels_large_pages", 64, 40, 4, DType::kBf16, {.key_bits = 0, .label_channels = 32})
        .policy.criterion = PruneCriterion::kNone;
    add("labels_all_channels", 16, 1, 2, DType::kBf16, {.key_bits = 4, .label_channels = 16});
    add("labels_group_of_nine", 64, 16, 18, DType::kBf16, {.key_bits = 2, .label_channels = 48});
    add("labels_tail", 128, 16, 8, DType::kBf16,
        {.key_bits = 4, .value_bits = 4, .label_channels = 32})
        .policy.tail = true;
    for (const NamedDistribution& each : kNamedDistributions) {
      add((std::string("labels_") + each.name).c_str(), 64, 16, 8, DType::kBf16,
          {.key_bits = 4, .label_channels = 16})
          .options.distribution = each.distribution;
    }
    return out;
  }();
  return kCases;
}

const std::vector<OpCase>& large_cases() {
  static const std::vector<OpCase> kCases = make_large_cases();
  return kCases;
}

std::vector<OpCase> standard_cases() {
  std::vector<OpCase> cases = corner_cases();
  cases.insert(cases.end(), correctness_cases().begin(), correctness_cases().end());
  cases.insert(cases.end(), adaptive_cases().begin(), adaptive_cases().end());
  cases.insert(cases.end(), label_cases().begin(), label_cases().end());
  return cases;
}

std::vector<OpCase> all_cases() {
  std::vector<OpCase> cases = standard_cases();
  cases.insert(cases.end(), large_cases().begin(), large_cases().end());
  return cases;
}

std::vector<OpCase> in_layout(const std::vector<OpCase>& cases, IndexLayout layout) {
  std::vector<OpCase> out;
  for (OpCase c : cases) {
    c.shape.format.layout = layout;
    if (c.shape.head_dim % head_dim_unit(c.shape.format) != 0) continue;
    c.name += layout == IndexLayout::kMma ? "_mma" : "_token_lanes";
    out.push_back(std::move(c));
  }
  return out;
}

std::vector<OpCase> without_labels(std::vector<OpCase> cases) {
  std::erase_if(cases,
                [](const OpCase& c) { return c.shape.format.summary == SummaryKind::kLabels; });
  return cases;
}

std::ostream& operator<<(std::ostream& out, const OpCase& op_case) { return out << op_case.name; }

void PrintTo(const OpCase& op_case, std::ostream* out) { *out << op_case.name; }

}  // namespace twilight::test
