#include <gtest/gtest.h>
#include <sys/resource.h>

#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "core/buffer.h"
#include "core/check.h"
#include "core/float16.h"
#include "core/thread_pool.h"
#include "twilight/types.h"

namespace twilight {
namespace {

TEST(Float16, EveryHalfSurvivesTheRoundTrip) {
  for (std::uint32_t bits = 0; bits < 0x10000U; ++bits) {
    const auto half = static_cast<std::uint16_t>(bits);
    const float value = f16_to_f32(half);
    if (std::isnan(value)) {
      EXPECT_TRUE(std::isnan(f16_to_f32(f32_to_f16(value))));
    } else {
      EXPECT_EQ(f32_to_f16(value), half) << value;
    }
  }
}

TEST(Float16, RoundsToNearestEvenAndSaturatesToInfinity) {
  EXPECT_EQ(f32_to_f16(1.0F + 0x1p-11F), 0x3c00);      // tie, even below
  EXPECT_EQ(f32_to_f16(1.0F + 3 * 0x1p-11F), 0x3c02);  // tie, even above
  EXPECT_EQ(f32_to_f16(65519.0F), 0x7bff);
  EXPECT_EQ(f32_to_f16(65520.0F), 0x7c00);
  EXPECT_EQ(f32_to_f16(0x1p-25F), 0x0000);  // tie with zero
  EXPECT_EQ(f32_to_bf16(1.0F + 0x1p-8F), 0x3f80);
  EXPECT_EQ(f32_to_bf16(1.0F + 3 * 0x1p-8F), 0x3f82);
  EXPECT_TRUE(std::isnan(bf16_to_f32(f32_to_bf16(std::numeric_limits<float>::quiet_NaN()))));
}

TEST(ThreadPool, VisitsEveryIndexOnceForAnyThreadCount) {
  for (int threads : {1, 2, 3, 8}) {
    ThreadPool pool(threads);
    for (int round = 0; round < 200; ++round) {
      std::vector<std::atomic<int>> hits(static_cast<std::size_t>(round));
      pool.parallel_for(round, [&](std::int64_t index, int worker) {
        ASSERT_GE(worker, 0);
        ASSERT_LT(worker, threads);
        ++hits[static_cast<std::size_t>(index)];
      });
      for (const auto& hit : hits) ASSERT_EQ(hit.load(), 1);
    }
  }
}

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kLimitsAddressSpace = false;  // shadow memory needs terabytes of it
#else
constexpr bool kLimitsAddressSpace = true;
#endif

TEST(ThreadPoolDeathTest, ThreadsThatCannotStartAreAnErrorNotAnAbort) {
  if (!kLimitsAddressSpace) GTEST_SKIP() << "sanitizers reserve too much address space";
  // In a process of its own: stacks of 1,024 threads do not fit 1 GiB of address space.
  const auto start = [] {
    const rlimit limit{1ULL << 30, 1ULL << 30};
    if (setrlimit(RLIMIT_AS, &limit) != 0) std::exit(3);
    try {
      ThreadPool pool(1024);
    } catch (const Error& e) {
      std::fputs(e.what(), stderr);
      std::exit(e.code() == ErrorCode::kOutOfMemory ? 0 : 2);
    }
    std::exit(1);
  };
  EXPECT_EXIT(start(), testing::ExitedWithCode(0), "cannot start thread [0-9]+ of 1024");
}

TEST(ThreadPool, RethrowsAndStaysUsable) {
  ThreadPool pool(2);
  EXPECT_THROW(
      pool.parallel_for(16, [](std::int64_t index, int) { require(index != 7, "test", "seven"); }),
      Error);
  std::atomic<int> count{0};
  pool.parallel_for(16, [&](std::int64_t, int) { ++count; });
  EXPECT_EQ(count.load(), 16);
  EXPECT_THROW(ThreadPool(-1), Error);
}

TEST(Arena, CountsWithoutMemoryAndNamesWhatDoesNotFit) {
  Arena counter;
  EXPECT_EQ(counter.take<float>("a", 3), nullptr);
  EXPECT_EQ(counter.take<float>("b", 5), nullptr);
  EXPECT_EQ(counter.used_bytes(), 64U + 20U);

  Buffer buffer(counter.used_bytes());
  Arena arena(buffer.data(), buffer.size());
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(arena.take<float>("a", 3)) % 64, 0U);
  EXPECT_NE(arena.take<float>("b", 5), nullptr);
  try {
    (void)arena.take<float>("scores", 1000);
    FAIL();
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("scores"), std::string::npos);
  }
}

TEST(Types, NamesRoundTripAndUnknownNamesAreRejected) {
  for (DType dtype : {DType::kF32, DType::kF16, DType::kBf16}) {
    EXPECT_EQ(parse_dtype(dtype_name(dtype)), dtype);
  }
  EXPECT_THROW((void)parse_dtype("int8"), Error);
  EXPECT_THROW((void)narrow<std::int32_t>(std::int64_t{1} << 40), Error);
  EXPECT_THROW((void)narrow<std::uint32_t>(-1), Error);
}

}  // namespace
}  // namespace twilight
