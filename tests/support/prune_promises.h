#ifndef TWILIGHT_TESTS_SUPPORT_PRUNE_PROMISES_H_
#define TWILIGHT_TESTS_SUPPORT_PRUNE_PROMISES_H_

#include "ops/backend.h"
#include "support/cases.h"
#include "support/compare.h"
#include "support/step_buffers.h"

/// What selection and pruning promise, checked from their inputs and outputs alone and in double.
/// Failures are GoogleTest failures that name the case, the sequence and the head.
namespace twilight::test {

/// How far a backend's f32 arithmetic may move a decision. `mass` is relative to the row's total
/// mass; scores closer than `score` may count as tied.
struct PromiseTolerance {
  double mass = 0;
  double score = 0;
};

/// f32 exponentials and a sum of N of them in any blocked order (docs/numerics.md).
inline constexpr PromiseTolerance kF32Promises{.mass = 2e-6, .score = 4e-6};

/// Candidate lists of `step`: ascending, in range, forced pages in, within the budget, and no page
/// left out scores above one taken. By mass: the fewest pages that reach it, but for floor and
/// budget. Sequences outside the subset are untouched.
void check_select_promises(const OpCase& op_case, const PagedFixture& fixture,
                           const StepBuffers& step, PromiseTolerance tolerance = {});

/// Kept lists of `step`, given its candidates, `estimates_before_prune` and p:
///  - ascending tokens of candidate pages below N, forced tokens among them;
///  - every head keeps a token exactly if the strictly heavier ones have mass below p, or are fewer
///    than min_tokens: so mass is >= p, dropping the weakest kept (with its ties) falls below p,
///    and ties stay together; at p = 1 nothing but -inf and NaN is dropped;
///  - for the group criterion the same of the mean of the group's weights and its largest p;
///  - the list is the union over the group and forced, head_counts and head_mass say what they
///    should; without a criterion everything is kept;
///  - the tail holds, page by page, the weight of what was dropped.
void check_prune_promises(const OpCase& op_case, const PagedFixture& fixture,
                          const StepBuffers& step, PromiseTolerance tolerance);

/// `out` of a step against softmax over its kept tokens, with its tail, in double.
void check_attention(const OpCase& op_case, const PagedFixture& fixture, const StepBuffers& step,
                     const Tolerance& tolerance);

/// p = 1 drops nothing, so that the tail changes no bit.
void check_full_mass_has_no_tail(Backend& backend, const OpCase& op_case);

/// Runs the selection at rising p: every kept list holds the one before it.
void check_larger_p_keeps_superset(Backend& backend, const OpCase& op_case);

/// Runs the whole step on the case, one sequence at a time, and with the sequences in reverse order
/// on other physical pages: the same bits for each sequence.
void check_batch_independence(Backend& backend, const OpCase& op_case);

/// p = 1 over all pages, attended sparsely, is attend_dense bit for bit.
void check_full_mass_is_dense(Backend& backend, const OpCase& op_case,
                              const Tolerance& tolerance = {});

}  // namespace twilight::test

#endif  // TWILIGHT_TESTS_SUPPORT_PRUNE_PROMISES_H_
