#ifndef TWILIGHT_TESTS_SUPPORT_EXPECT_STATS_H_
#define TWILIGHT_TESTS_SUPPORT_EXPECT_STATS_H_

#include <gtest/gtest.h>

#include "twilight/stats.h"

namespace twilight::test {

/// What a step reports without an audit, bit for bit.
inline void expect_same_stats(const LayerStats& a, const LayerStats& b) {
  EXPECT_EQ(a.path, b.path);
  EXPECT_EQ(a.num_tokens, b.num_tokens);
  EXPECT_EQ(a.candidates, b.candidates);
  EXPECT_EQ(a.attended, b.attended);
  EXPECT_EQ(a.kept, b.kept);
  EXPECT_EQ(a.estimated_mass, b.estimated_mass);
  EXPECT_EQ(a.bytes_read, b.bytes_read);
  EXPECT_EQ(a.bytes_dense, b.bytes_dense);
}

}  // namespace twilight::test

#endif  // TWILIGHT_TESTS_SUPPORT_EXPECT_STATS_H_
