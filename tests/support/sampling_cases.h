#ifndef TWILIGHT_TESTS_SUPPORT_SAMPLING_CASES_H_
#define TWILIGHT_TESTS_SUPPORT_SAMPLING_CASES_H_

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "ops/block_params.h"

/// Rows of logits and draws that every form of sample_rows runs through, and the op's definition
/// once more, to judge what comes out.
namespace twilight::test {

struct SamplingCase {
  std::string name;  ///< letters, digits and underscores
  std::int64_t cols = 0;
  std::vector<float> logits;  ///< [cols], the same for every draw
  std::vector<RowDraw> draws;

  /// The row once for each draw.
  [[nodiscard]] std::vector<float> rows() const;
};

/// Vocabularies of 17, 512, 32,000 and 151,936, each with normal, tied, all equal, one dominant,
/// partly -inf, wide and narrow logits; temperatures of 0, tiny, usual and huge, every kind of cut,
/// random numbers at both ends.
[[nodiscard]] std::vector<SamplingCase> sampling_cases();
[[nodiscard]] std::vector<std::int64_t> sampling_vocabularies();
/// Those of one vocabulary.
[[nodiscard]] std::vector<SamplingCase> sampling_cases(std::int64_t cols);

/// The definition for one row: by a sort, and sums in extended precision.
class SamplingOracle {
 public:
  /// `logits` must outlive it.
  explicit SamplingOracle(std::span<const float> logits);
  /// Whether the definition allows `token` where sums are `slack` of the whole off.
  [[nodiscard]] bool allows(const RowDraw& draw, std::int32_t token, double slack) const;

 private:
  std::span<const float> logits_;
  std::vector<std::int32_t> order_;
};

/// For messages.
[[nodiscard]] std::string describe(const RowDraw& draw);

}  // namespace twilight::test

#endif  // TWILIGHT_TESTS_SUPPORT_SAMPLING_CASES_H_
