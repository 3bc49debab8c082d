#ifndef TWILIGHT_TESTS_SUPPORT_CACHE_WRITES_H_
#define TWILIGHT_TESTS_SUPPORT_CACHE_WRITES_H_

#include "ops/backend.h"
#include "support/cases.h"
#include "support/paged_fixture.h"

/// What writes a cache and its index must write the same bytes in every backend, and nothing else:
/// whole pools are compared, padding included.
namespace twilight::test {

/// Seals every sealed page of the case from poisoned records, `backend` in `fixture` (one of the
/// case), `reference` in another of its fixtures.
void expect_same_seal(Backend& reference, Backend& backend, const OpCase& op_case,
                      PagedFixture& fixture);

/// Appends rows with every value that rounding treats apart over existing tokens, then copies a
/// chain of two pages, whose second copy reads what the first wrote.
void expect_same_append_and_copy(Backend& reference, Backend& backend, const OpCase& op_case,
                                 PagedFixture& fixture);

}  // namespace twilight::test

#endif  // TWILIGHT_TESTS_SUPPORT_CACHE_WRITES_H_
