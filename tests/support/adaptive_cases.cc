#include <array>

#include "support/cases.h"

namespace twilight::test {
namespace {

struct NamedFormat {
  const char* name;
  IndexFormat format;
};
constexpr std::array<NamedFormat, 9> kFormats = {{
    {"centroid_bits2", {.summary = SummaryKind::kCentroid, .key_bits = 2, .value_bits = 4}},
    {"own_centre", {.summary = SummaryKind::kNone, .key_bits = 2, .value_bits = 4}},
    {"sub_centroid_bits2", {.summary = SummaryKind::kSubCentroid, .key_bits = 2, .value_bits = 4}},
    {"quest_bits2", {.summary = SummaryKind::kQuestBf16, .key_bits = 2, .value_bits = 0}},
    {"centroid_bits4", {.summary = SummaryKind::kCentroid, .key_bits = 4, .value_bits = 0}},
    {"quest4_bits2", {.summary = SummaryKind::kQuest4, .key_bits = 2, .value_bits = 4}},
    {"sub_centroid_bits8", {.summary = SummaryKind::kSubCentroid, .key_bits = 8, .value_bits = 4}},
    {"bits4_values", {.summary = SummaryKind::kNone, .key_bits = 4, .value_bits = 4}},
    {"half_centroid_bits2",
     {.summary = SummaryKind::kHalfCentroid, .key_bits = 2, .value_bits = 4}},
}};

/// The i-th combination of criterion, tail and selection that the format allows.
void vary_policy(OpCase& c, std::size_t i) {
  const IndexFormat& format = c.shape.format;
  c.policy.criterion = i % 3 == 1 ? PruneCriterion::kPerHead : PruneCriterion::kGroupMean;
  c.policy.tail = format.value_bits != 0 && i % 4 != 3;
  c.policy.mode = format.summary == SummaryKind::kNone ? SelectMode::kAll : SelectMode::kByScore;
  if (num_centroids(format.summary) > 0 && i % 2 == 0) {
    c.policy.mass = 0.6;
    c.policy.mass_floor = c.shape.page_size;
  }
}

OpCase base(std::string name, const IndexFormat& format) {
  OpCase c;
  c.name = std::move(name);
  c.shape = {.lengths = {130, 77},
             .num_q_heads = 4,
             .num_kv_heads = 2,
             .head_dim = 64,
             .page_size = 16,
             .dtype = DType::kBf16,
             .format = format};
  c.options.distribution = Distribution::kPlanted;
  c.policy.p = 0.9F;
  vary_policy(c, 0);
  return c;
}

void add_page_sizes(std::vector<OpCase>& cases) {
  constexpr std::array<std::int32_t, 10> kPageSizes = {1, 2, 3, 5, 16, 17, 53, 61, 64, 256};
  constexpr std::array<DType, 3> kDTypes = {DType::kBf16, DType::kF16, DType::kF32};
  for (std::size_t i = 0; i < 2 * kPageSizes.size(); ++i) {
    const std::int32_t p = kPageSizes[i % kPageSizes.size()];
    const NamedFormat& format = kFormats[(i + i / kPageSizes.size()) % kFormats.size()];
    OpCase c = base("adaptive_page_" + std::to_string(p) + "_" + format.name, format.format);
    c.shape.lengths = {3 * p + 1, 0, 1, p - 1, p, p + 1, 7 * p};
    c.shape.page_size = p;
    c.shape.dtype = kDTypes[i % 3];
    c.options.token_major = i % 2 == 1;
    c.options.row_padding = static_cast<std::int32_t>(i % 4);
    c.options.record_padding = i % 3 == 0 ? 32 : 0;
    c.policy.min_candidate_tokens = p;
    c.policy.fraction = 0.6;
    vary_policy(c, i);
    cases.push_back(c);
  }
}

void add_groups_and_dims(std::vector<OpCase>& cases) {
  constexpr std::array<std::int32_t, 5> kGroups = {1, 3, 4, 7, 8};
  constexpr std::array<std::int32_t, 5> kDims = {64, 80, 96, 128, 256};
  for (std::size_t i = 0; i < 2 * kDims.size(); ++i) {
    const std::int32_t dim = kDims[i % 5];
    const std::int32_t group = kGroups[(i + 2 * (i / 5)) % 5];
    const NamedFormat& format = kFormats[(3 * i + i / 5) % kFormats.size()];
    OpCase c = base("adaptive_group_" + std::to_string(group) + "_dim_" + std::to_string(dim) +
                        "_" + format.name,
                    format.format);
    c.shape.num_kv_heads = i % 2 == 0 ? 2 : 3;
    c.shape.num_q_heads = group * c.shape.num_kv_heads;
    c.shape.head_dim = dim;
    c.shape.dtype = i % 3 == 1 ? DType::kF32 : DType::kBf16;
    c.options.head_padding = 5;
    c.options.page_padding = 7;
    c.options.record_padding = 16;
    c.policy.mixed_p = true;
    vary_policy(c, i);
    cases.push_back(c);
  }
}

void add_distributions(std::vector<OpCase>& cases) {
  constexpr std::array<float, 4> kPs = {0.5F, 0.95F, 1e-6F, 1.0F};
  for (std::size_t i = 0; i < 3 * kNamedDistributions.size(); ++i) {
    const NamedDistribution& kind = kNamedDistributions[i % kNamedDistributions.size()];
    const NamedFormat& format = kFormats[i / kNamedDistributions.size()];
    OpCase c = base(std::string("adaptive_") + kind.name + "_" + format.name, format.format);
    c.shape.lengths = {210, 97};
    c.options.distribution = kind.distribution;
    c.policy.p = kPs[(i + i / kNamedDistributions.size()) % kPs.size()];
    c.policy.min_tokens = kind.distribution == Distribution::kSinkDominated ? 20 : 1;
    c.policy.fraction = 0.7;
    vary_policy(c, i);
    if (i % 3 == 0) c.policy.forced = {};
    cases.push_back(c);
  }
}

void add_selection_by_mass(std::vector<OpCase>& cases) {
  const IndexFormat centroid = kFormats[0].format;
  OpCase mass = base("mass", centroid);
  mass.shape.lengths = {600, 48, 15};
  mass.policy.fraction = 1.0;
  mass.policy.mass = 0.8;
  mass.policy.mass_floor = 0;

  OpCase tiny = mass;
  tiny.name = "mass_tiny_without_forced";
  tiny.policy.forced = {};
  tiny.policy.mass = 1e-9;
  cases.push_back(tiny);

  OpCase floor = mass;
  floor.name = "mass_below_floor";
  floor.policy.mass = 1e-9;
  floor.policy.mass_floor = 100;
  cases.push_back(floor);

  OpCase cap = mass;
  cap.name = "mass_above_cap";
  cap.policy.mass = 0.999999;
  cap.policy.fraction = 0;
  cap.policy.min_candidate_tokens = cap.policy.max_candidate_tokens = 96;
  cap.shape.format = kFormats[2].format;
  cases.push_back(cap);

  OpCase floor_above_cap = cap;
  floor_above_cap.name = "mass_floor_above_cap";
  floor_above_cap.policy.mass_floor = 500;
  cases.push_back(floor_above_cap);

  OpCase ties = mass;
  ties.name = "mass_ties";
  ties.options.distribution = Distribution::kAllEqual;
  ties.policy.mass = 0.37;
  cases.push_back(ties);

  OpCase wide = mass;
  wide.name = "mass_of_wide_scores";
  wide.options.distribution = Distribution::kWide;
  wide.policy.mass = 0.99;
  cases.push_back(wide);

  OpCase sinks = mass;
  sinks.name = "mass_in_forced_pages";
  sinks.options.distribution = Distribution::kSinkDominated;
  cases.push_back(sinks);
}

void add_far_tails(std::vector<OpCase>& cases) {
  OpCase far = base("far_tail", kFormats[0].format);
  far.shape.lengths = {410, 150, 33, 15, 0};
  far.policy.far_tail = true;
  far.policy.mass = 0;
  far.policy.mixed_p = true;
  cases.push_back(far);

  OpCase all = far;
  all.name = "far_tail_of_every_page";
  all.shape.format = kFormats[2].format;
  all.policy.far_floor = 0;
  all.subset = true;
  cases.push_back(all);

  OpCase some = all;
  some.name = "far_tail_above_the_mean";
  some.policy.far_floor = 1.0F;
  some.policy.mass = 0.3;
  some.policy.criterion = PruneCriterion::kPerHead;
  some.options.distribution = Distribution::kNormal;
  cases.push_back(some);

  OpCase none = far;
  none.name = "far_tail_of_no_page";
  none.policy.far_floor = 1e6F;
  cases.push_back(none);

  OpCase wide = far;
  wide.name = "far_tail_of_wide_scores";
  wide.shape.dtype = DType::kF32;
  wide.shape.head_dim = 96;
  wide.options.distribution = Distribution::kWide;
  cases.push_back(wide);

  OpCase odd = far;
  odd.name = "far_tail_odd_pages";
  odd.shape.page_size = 5;
  odd.shape.head_dim = 80;
  odd.shape.format = {SummaryKind::kSubCentroid, 4, 4};
  odd.policy.p = 1.0F;
  odd.policy.mixed_p = false;
  cases.push_back(odd);
}

void add_corners(std::vector<OpCase>& cases) {
  const IndexFormat centroid = kFormats[0].format;
  const IndexFormat own = kFormats[1].format;
  OpCase shared = base("adaptive_shared_prefix", centroid);
  shared.shape.lengths = {200, 150, 33, 15, 0};
  shared.options.shared_prefix_pages = 5;
  cases.push_back(shared);

  OpCase subset = base("adaptive_subset_of_sequences", kFormats[2].format);
  subset.shape.lengths = {130, 40, 0, 90, 16};
  subset.subset = true;
  subset.policy.mixed_p = true;
  cases.push_back(subset);

  OpCase exact = base("exact_keys_with_tail", {SummaryKind::kCentroid, 0, 4});
  exact.policy.exact_keys = true;
  cases.push_back(exact);

  OpCase no_prune = base("centroid_no_prune", {SummaryKind::kSubCentroid, 0, 0});
  no_prune.shape.lengths = {400, 20, 0};
  no_prune.policy.criterion = PruneCriterion::kNone;
  no_prune.policy.tail = false;
  cases.push_back(no_prune);

  OpCase window = base("streaming_window_bits2", own);
  window.shape.lengths = {400, 20};
  window.policy.mode = SelectMode::kForcedOnly;
  cases.push_back(window);

  OpCase many = base("group_min_tokens_above_candidates", own);
  many.policy.min_tokens = 100000;
  many.policy.p = 0.5F;
  cases.push_back(many);

  // The weakest of them have weights that are 0 in f32, yet different scores.
  OpCase underflow = base("group_min_tokens_below_f32_weights", own);
  underflow.options.distribution = Distribution::kWide;
  underflow.policy.min_tokens = 125;
  cases.push_back(underflow);

  OpCase full_mass = base("group_full_mass", own);
  full_mass.policy.p = 1.0F;
  cases.push_back(full_mass);

  OpCase empty = base("adaptive_all_sequences_empty", centroid);
  empty.shape.lengths = {0, 0, 0};
  cases.push_back(empty);
}

void add_ordinary(std::vector<OpCase>& cases) {
  struct NamedDType {
    const char* name;
    DType dtype;
  };
  constexpr std::array<NamedDType, 3> kDTypes = {
      {{"bf16", DType::kBf16}, {"f16", DType::kF16}, {"f32", DType::kF32}}};
  constexpr std::array<Distribution, 2> kNamedDistributions = {Distribution::kPlanted,
                                                               Distribution::kNormal};
  std::uint64_t seed = 300;
  for (const NamedDType& dtype : kDTypes) {
    for (std::size_t i = 0; i < 3; ++i) {
      OpCase c = base(std::string(dtype.name) + "_" + kFormats[i].name, kFormats[i].format);
      c.shape.lengths = {700, 333, 1024};
      c.shape.num_q_heads = 8;
      c.shape.head_dim = 128;
      c.shape.dtype = dtype.dtype;
      c.options.seed = ++seed;
      c.options.distribution = kNamedDistributions[seed % kNamedDistributions.size()];
      c.policy.min_candidate_tokens = 128;
      c.policy.min_tokens = 16;
      vary_policy(c, static_cast<std::size_t>(seed));
      cases.push_back(c);
    }
  }
}

}  // namespace

const std::vector<OpCase>& adaptive_cases() {
  static const std::vector<OpCase> cases = [] {
    std::vector<OpCase> made;
    add_page_sizes(made);
    add_groups_and_dims(made);
    add_distributions(made);
    add_selection_by_mass(made);
    add_far_tails(made);
    add_corners(made);
    add_ordinary(made);
    return made;
  }();
  return cases;
}

}  // namespace twilight::test
