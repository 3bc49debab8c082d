#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "backend/cuda/cuda_backend.h"
#include "backend/cuda/fast/sample.h"
#include "cuda/host_cuda_backend.h"
#include "support/sampling_cases.h"

/// Tokens drawn on the GPU against the scalar reference.
namespace twilight::test {
namespace {

std::vector<std::int32_t> run(Backend& backend, const std::vector<float>& x, std::int64_t cols,
                              const std::vector<RowDraw>& draws) {
  std::vector<std::int32_t> out(draws.size(), 42);
  backend.sample_rows(
      {x.data(), static_cast<std::int32_t>(out.size()), cols, draws.data(), out.data()});
  return out;
}

// The form for GPUs without clusters.
std::vector<std::int32_t> run_without_clusters(const std::vector<float>& x, std::int64_t cols,
                                               const std::vector<RowDraw>& draws) {
  auto& backend = dynamic_cast<cuda::CudaBackend&>(gpu().inner());
  DeviceMemory& memory = backend.memory();
  const DeviceBuffer rows(memory, x.size() * sizeof(float));
  const DeviceBuffer draw_rows(memory, draws.size() * sizeof(RowDraw));
  const DeviceBuffer tokens(memory, draws.size() * sizeof(std::int32_t));
  memory.upload(rows.data(), x.data(), rows.size());
  memory.upload(draw_rows.data(), draws.data(), draw_rows.size());
  cuda_fast::sample_rows({rows.as<float>(), static_cast<std::int32_t>(draws.size()), cols,
                          draw_rows.as<RowDraw>(), tokens.as<std::int32_t>()},
                         false, backend.stream());
  std::vector<std::int32_t> out(draws.size(), 42);
  memory.download(out.data(), tokens.data(), tokens.size());
  return out;
}

class SampleCuda : public ::testing::TestWithParam<std::int64_t> {};

// The weights of 151,936 logits are integers of 2^44 for the largest: sums are off by less than
// 2^-28 of it. Of the list's random numbers only those next to 1 lie so close to a boundary whose
// sums are not exact; the others give the reference's tokens.
TEST_P(SampleCuda, DrawsWhatTheReferenceDraws) {
  const std::unique_ptr<Backend> ref = make_ref_backend();
  for (const SamplingCase& c : sampling_cases(GetParam())) {
    SCOPED_TRACE(c.name);
    const SamplingOracle oracle(c.logits);
    const std::vector<float> x = c.rows();
    const std::vector<std::int32_t> got = run(gpu(), x, c.cols, c.draws);
    const std::vector<std::int32_t> want = run(*ref, x, c.cols, c.draws);
    for (std::size_t i = 0; i < got.size(); ++i) {
      if (c.draws[i].uniform < 1 - 1e-9) {
        EXPECT_EQ(got[i], want[i]) << describe(c.draws[i]);
      }
      EXPECT_TRUE(oracle.allows(c.draws[i], got[i], 1e-8))
          << got[i] << ": " << describe(c.draws[i]);
    }
    EXPECT_EQ(run(gpu(), x, c.cols, c.draws), got) << "another run";
    EXPECT_EQ(run_without_clusters(x, c.cols, c.draws), got);
  }
}

INSTANTIATE_TEST_SUITE_P(Vocabularies, SampleCuda, ::testing::ValuesIn(sampling_vocabularies()));

TEST(SampleCudaRows, BrokenRowsHaveNoToken) {
  constexpr std::int64_t kCols = 5003;
  constexpr float kInf = std::numeric_limits<float>::infinity();
  std::vector<float> x(4 * kCols, 1.0F);
  x[5002] = std::numeric_limits<float>::quiet_NaN();
  x[kCols + 17] = kInf;
  std::fill_n(x.begin() + 2 * kCols, kCols, -kInf);
  std::fill_n(x.begin() + 3 * kCols, kCols, -kInf);
  x[3 * kCols + 4444] = -3.0F;
  for (const double temperature : {0.0, 1.0}) {
    const std::vector<RowDraw> draws(4, {temperature, 1, 0.5, 0});
    EXPECT_EQ(run(gpu(), x, kCols, draws), (std::vector<std::int32_t>{-1, -1, -1, 4444}));
  }
}

TEST(SampleCudaRows, OneLogitAndManyRows) {
  std::vector<RowDraw> draws;
  for (int i = 0; i < 300; ++i) draws.push_back({0.5 * (i % 3), 1, i / 300.0, 0});
  EXPECT_EQ(run(gpu(), std::vector<float>(300, -2.0F), 1, draws),
            std::vector<std::int32_t>(300, 0));
}

}  // namespace
}  // namespace twilight::test
