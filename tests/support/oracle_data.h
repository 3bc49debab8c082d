#ifndef TWILIGHT_TESTS_SUPPORT_ORACLE_DATA_H_
#define TWILIGHT_TESTS_SUPPORT_ORACLE_DATA_H_

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "support/cases.h"
#include "support/paged_fixture.h"

namespace twilight::test {

/// One array of tests/golden/oracle as doubles, C order; every dtype there converts exactly.
struct OracleArray {
  std::vector<std::int64_t> shape;
  std::vector<double> values;
};

/// A golden case of one decode step, computed elsewhere in NumPy (see make_oracle.py for what each
/// array is). `op_case` describes the same step; its p list is per (sequence, query head).
struct OracleCase {
  OpCase op_case;
  std::vector<float> p;  ///< [B, Hq]
  bool has_selector = false;
  std::map<std::string, OracleArray> inputs;    ///< q, k, v
  std::map<std::string, OracleArray> expected;  ///< absent where the policy does not use them

  /// The inputs in a shuffled, padded, poisoned paged cache.
  [[nodiscard]] PagedFixture make_fixture() const;
  [[nodiscard]] bool has(const std::string& name) const { return expected.contains(name); }
  [[nodiscard]] const OracleArray& array(const std::string& name) const {
    return expected.at(name);
  }
};

/// Reads manifest.json and the files it names in `folder`.
[[nodiscard]] std::vector<OracleCase> load_oracle(const std::string& folder);

}  // namespace twilight::test

#endif  // TWILIGHT_TESTS_SUPPORT_ORACLE_DATA_H_
