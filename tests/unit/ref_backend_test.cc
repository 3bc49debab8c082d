#include <gtest/gtest.h>

#include <memory>

#include "ops/backend.h"
#include "support/prune_promises.h"

namespace twilight::test {
namespace {

class RefPromises : public ::testing::TestWithParam<OpCase> {
 protected:
  std::unique_ptr<Backend> backend_ = make_ref_backend();
};

TEST_P(RefPromises, SelectAndPrune) {
  const OpCase& op_case = GetParam();
  const PagedFixture fixture = op_case.make_fixture();
  StepBuffers step(op_case, fixture);
  step.run_selection(*backend_, {});
  check_select_promises(op_case, fixture, step);
  check_prune_promises(op_case, fixture, step, {});
}

TEST_P(RefPromises, LargerPKeepsSuperset) { check_larger_p_keeps_superset(*backend_, GetParam()); }

TEST_P(RefPromises, BatchDoesNotMatter) { check_batch_independence(*backend_, GetParam()); }

TEST_P(RefPromises, FullMassIsDense) { check_full_mass_is_dense(*backend_, GetParam()); }

INSTANTIATE_TEST_SUITE_P(Cases, RefPromises, ::testing::ValuesIn(standard_cases()), CaseName());

class RefLargePromises : public ::testing::TestWithParam<OpCase> {};

TEST_P(RefLargePromises, SelectAndPrune) {
  const OpCase& op_case = GetParam();
  const PagedFixture fixture = op_case.make_fixture();
  const std::unique_ptr<Backend> backend = make_ref_backend();
  StepBuffers step(op_case, fixture);
  step.run_selection(*backend, {});
  check_select_promises(op_case, fixture, step);
  check_prune_promises(op_case, fixture, step, {});
}

INSTANTIATE_TEST_SUITE_P(Cases, RefLargePromises, ::testing::ValuesIn(large_cases()), CaseName());

}  // namespace
}  // namespace twilight::test
