#ifndef TWILIGHT_TESTS_SUPPORT_CASES_H_
#define TWILIGHT_TESTS_SUPPORT_CASES_H_

#include <array>
#include <cstdint>
#include <ostream>
#include <string>
#include <vector>

#include "ops/params.h"
#include "support/paged_fixture.h"

namespace twilight::test {

/// Distributions that a list of cases runs through, with names for the cases.
struct NamedDistribution {
  const char* name;
  Distribution distribution;
};
inline constexpr std::array<NamedDistribution, 7> kNamedDistributions = {
    {{"normal", Distribution::kNormal},
     {"all_equal", Distribution::kAllEqual},
     {"tied_groups", Distribution::kTiedGroups},
     {"one_dominant", Distribution::kOneDominant},
     {"sink_dominated", Distribution::kSinkDominated},
     {"zero_range", Distribution::kZeroRange},
     {"wide", Distribution::kWide}}};

/// Numbers of a policy as the ops take them.
struct CasePolicy {
  SelectMode mode = SelectMode::kByScore;
  double fraction = 0.25;
  std::int32_t min_candidate_tokens = 64;
  std::int32_t max_candidate_tokens = 1 << 20;
  /// Above 0: candidates stop at this share of the estimated mass, not below `mass_floor` tokens.
  double mass = 0;
  std::int32_t mass_floor = 0;
  ForcedTokens forced{.sink_tokens = 4, .recent_pages = 1};
  PruneCriterion criterion = PruneCriterion::kPerHead;
  float p = 0.95F;
  /// Every (sequence, head) has its own p around `p`; false gives `p` to all.
  bool mixed_p = false;
  std::int32_t min_tokens = 1;
  bool exact_keys = false;
  bool tail = false;  ///< wants a format with value means
  /// Pages outside the candidates count as well; wants a tail and centroids.
  bool far_tail = false;
  float far_floor = 0.2F;
};

/// One decode step: everything an op or a chain of ops needs. The same list runs against every
/// backend and instruction set.
struct OpCase {
  std::string name;  ///< letters, digits and underscores
  FixtureShape shape;
  FixtureOptions options;
  CasePolicy policy;
  /// The ops work on every second sequence (from number 0) through SeqSubset::ids; rows of the
  /// others must stay untouched.
  bool subset = false;

  [[nodiscard]] PagedFixture make_fixture() const { return {shape, options}; }
};

/// Each a hostile detail, all small (milliseconds with the scalar reference).
[[nodiscard]] const std::vector<OpCase>& corner_cases();
/// Ordinary shapes over all dtypes, index formats and distributions.
[[nodiscard]] const std::vector<OpCase>& correctness_cases();
/// Rotated index planes, the group criterion, selection by mass and the tail, all small: over page
/// sizes, head dimensions, groups, dtypes and distributions.
[[nodiscard]] const std::vector<OpCase>& adaptive_cases();
/// Summaries on label channels, over page sizes, groups, dtypes and estimates.
[[nodiscard]] const std::vector<OpCase>& label_cases();
/// A few thousand tokens and more; a second or so each with the scalar reference.
[[nodiscard]] const std::vector<OpCase>& large_cases();
/// Corner, correctness, adaptive and label.
[[nodiscard]] std::vector<OpCase> standard_cases();
/// All of them.
[[nodiscard]] std::vector<OpCase> all_cases();

/// Those of `cases` whose format a layout can hold, in that layout, with its name at the end.
[[nodiscard]] std::vector<OpCase> in_layout(const std::vector<OpCase>& cases, IndexLayout layout);

/// Those without label channels.
[[nodiscard]] std::vector<OpCase> without_labels(std::vector<OpCase> cases);

/// For GoogleTest messages.
std::ostream& operator<<(std::ostream& out, const OpCase& op_case);
void PrintTo(const OpCase& op_case, std::ostream* out);

/// For INSTANTIATE_TEST_SUITE_P's name generator.
struct CaseName {
  template <typename Info>
  std::string operator()(const Info& info) const {
    return info.param.name;
  }
};

}  // namespace twilight::test

#endif  // TWILIGHT_TESTS_SUPPORT_CASES_H_
