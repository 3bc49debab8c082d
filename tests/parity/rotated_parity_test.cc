#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include <gtest/gtest.h>

#include "backend/cpu/isa.h"
#include "backend/cpu/kernels/index.h"
#include "core/float16.h"
#include "core/thread_pool.h"
#include "ops/backend.h"
#include "quant/page_codec.h"
#include "quant/rotation.h"
#include "support/cases.h"
#include "support/paged_fixture.h"
#include "support/same_bits.h"
#include "support/step_buffers.h"

/// Scores by mass and 2-bit estimates of the CPU backend on every instruction set of this machine
/// against the scalar reference. Tolerances are sums over the actual operands; see
/// docs/numerics.md.
namespace twilight::test {
namespace {

// Rounding of an f32 sum of n products, relative to the sum of their magnitudes.
double sum_rounding(std::int64_t n) { return static_cast<double>(n + 16) * 0x1p-23; }

/// A query head in the rotated basis, exact and as the kernels round it.
struct RotatedQuery {
  std::vector<float> q;
  std::vector<double> bytes;  // against means, and residuals without table look-ups
  double byte_step = 0;       // 0 where a set multiplies the query itself
  double table_step = 0;      // of the table look-ups; 0 for other sets

  RotatedQuery(std::span<const float> row, const std::string& isa) : q(row.begin(), row.end()) {
    rotate(q);
    bytes.assign(q.begin(), q.end());
    if (isa == "scalar" || isa == "neon") return;
    float largest = 0;
    for (const float x : q) largest = std::max(largest, std::fabs(x));
    const float step = largest / 127.0F;
    const float inverse = step > 0 ? 1.0F / step : 0.0F;
    for (std::size_t d = 0; d < q.size(); ++d) {
      bytes[d] = double{step} * std::nearbyint(std::clamp(q[d] * inverse, -127.0F, 127.0F));
    }
    byte_step = step;
    if (isa != "avx512_bf16") return;
    float pair = 0;
    for (std::size_t d = 0; d < q.size(); d += 8) {
      for (std::size_t b = d; b < d + 4; ++b) {
        pair = std::max(pair, 1.5F * (std::fabs(q[b]) + std::fabs(q[b + 4])));
      }
    }
    table_step = pair / 63.0F;
  }

  /// sum_d q_d levels_d as the kernels see it.
  [[nodiscard]] double residual_dot(std::span<const float> levels) const {
    double sum = 0;
    if (table_step == 0) {
      for (std::size_t d = 0; d < q.size(); ++d) sum += bytes[d] * double{levels[d]};
      return sum;
    }
    const float inverse = 1.0F / static_cast<float>(table_step);
    for (std::size_t d = 0; d < q.size(); d += 8) {
      for (std::size_t b = d; b < d + 4; ++b) {
        const float high = (q[b + 4] * inverse) * levels[b + 4];
        sum += table_step * double{std::nearbyint(std::fma(q[b] * inverse, levels[b], high))};
      }
    }
    return sum;
  }
  /// What rounding the query may change in a sum against codes within `reach` of their centre.
  [[nodiscard]] double byte_error(double reach) const {
    return 0.5001 * byte_step * reach * static_cast<double>(q.size());
  }
  [[nodiscard]] double residual_error() const {
    return table_step == 0 ? byte_error(1.5)
                           : 0.5001 * table_step * static_cast<double>(q.size()) / 2;
  }
};

double dot(std::span<const double> a, std::span<const float> b) {
  double sum = 0;
  for (std::size_t d = 0; d < b.size(); ++d) sum += a[d] * double{b[d]};
  return sum;
}
double magnitude(std::span<const float> a, std::span<const float> b) {
  double sum = 0;
  for (std::size_t d = 0; d < b.size(); ++d) sum += std::fabs(double{a[d]} * double{b[d]});
  return sum;
}

double log_sum(const std::vector<double>& x) {
  const double top = *std::max_element(x.begin(), x.end());
  double sum = 0;
  for (const double value : x) sum += std::exp(value - top);
  return top + std::log(sum);
}

using Param = std::tuple<OpCase, std::string>;

class RotatedParity : public ::testing::TestWithParam<Param> {
 protected:
  RotatedParity()
      : case_(std::get<0>(GetParam())),
        isa_(std::get<1>(GetParam())),
        fixture_(case_.make_fixture()),
        kv_(fixture_.kv()),
        format_(fixture_.shape().format),
        ref_(make_ref_backend()),
        one_(make_cpu_backend(one_thread_, isa_)),
        three_(make_cpu_backend(three_threads_, isa_)) {}
  static std::int64_t count_nan(const std::vector<float>& values) {
    return std::count_if(values.begin(), values.end(), [](float x) { return std::isnan(x); });
  }
  [[nodiscard]] PageRecords records(std::int64_t seq, std::int64_t page, std::int64_t head) const {
    return page_records(fixture_.index(), kv_.page_of(seq, page), head, kv_.page_size,
                        kv_.head_dim);
  }

  // A head's log mass of a page as the kernels compute it, without f32 rounding; what that and the
  // query's rounding may change.
  struct Mass {
    double value = 0;
    double query_error = 0;
    double rounding = 0;
  };
  [[nodiscard]] Mass mass_of(const RotatedQuery& q, std::int64_t seq, std::int64_t page,
                             std::int64_t head) const {
    const PageRecords r = records(seq, page, head);
    const double scale = fixture_.scale();
    std::vector<float> vector(q.q.size());
    double square = 0;
    for (const float x : q.q) square += double{x} * double{x};
    const double spread = 0.5 * scale * scale * square * double{f16_to_f32(r.params->variance)};
    Mass mass;
    const auto add = [&](int field, double& sum, double& error) {
      sum += scale * dot(q.bytes, vector);
      error += scale * q.byte_error(7.5) * double{f16_to_f32(r.params->centre_scale[field])};
      mass.rounding =
          std::max(mass.rounding, scale * magnitude(q.q, vector) * sum_rounding(kv_.head_dim));
    };
    std::vector<double> terms;
    if (num_centroids(format_.summary) > 1) {
      const int tokens = centroid_tokens(format_.summary, kv_.page_size);
      for (int i = 0; i * tokens < kv_.page_size; ++i) {
        decode_centre(r, i, vector);
        double value = 0;
        double error = 0;
        add(i, value, error);
        const int covered = std::min(tokens, kv_.page_size - i * tokens);
        terms.push_back(value + std::log(double(covered)) + spread);
        mass.query_error = std::max(mass.query_error, error);
      }
    } else {
      double centre = 0;
      decode_centre(r, 0, vector);
      add(0, centre, mass.query_error);
      double deviant = centre;
      decode_deviant(r, vector);
      add(1, deviant, mass.query_error);
      mass.rounding *= 2;
      terms.push_back(deviant);
      if (kv_.page_size > 1) terms.push_back(centre + spread + std::log(kv_.page_size - 1.0));
    }
    mass.value = log_sum(terms);
    // Products aside: a few sums of terms of these sizes, an exponential and a logarithm.
    mass.rounding += 0x1p-20 + 0x1p-21 * (std::fabs(mass.value) + spread);
    return mass;
  }

  OpCase case_;
  std::string isa_;
  PagedFixture fixture_;
  PagedKvView kv_;
  IndexFormat format_;
  ThreadPool one_thread_{1};
  ThreadPool three_threads_{3};
  std::unique_ptr<Backend> ref_;
  std::unique_ptr<Backend> one_;
  std::unique_ptr<Backend> three_;
  StepBuffers expected_{case_, fixture_};
  StepBuffers actual_{case_, fixture_};
  StepBuffers threaded_{case_, fixture_};
};

TEST_P(RotatedParity, ScoresByMass) {
  if (num_centroids(format_.summary) == 0) GTEST_SKIP() << "no means in the summary";
  const auto run = [&](Backend& backend, StepBuffers& buffers, bool with_masses) {
    TestWorkspace workspace(backend, buffers.caps());
    std::vector<float> masses(
        static_cast<std::size_t>(kv_.num_seqs * fixture_.shape().num_q_heads * buffers.page_stride),
        std::numeric_limits<float>::quiet_NaN());
    ScorePagesParams params = buffers.score_params();
    params.log_masses = with_masses ? masses.data() : nullptr;
    backend.score_pages(params, workspace.get());
    return masses;
  };
  const std::vector<float> expected = run(*ref_, expected_, true);
  const std::vector<float> actual = run(*one_, actual_, true);
  run(*three_, threaded_, false);
  EXPECT_TRUE(same_bits(actual_.scores, threaded_.scores));
  EXPECT_EQ(count_nan(actual_.scores), count_nan(expected_.scores));
  EXPECT_EQ(count_nan(actual), count_nan(expected));

  const std::int64_t group = fixture_.group_size();
  const std::int64_t num_q_heads = fixture_.shape().num_q_heads;
  for (std::int64_t seq = 0; seq < fixture_.num_seqs(); ++seq) {
    if (!actual_.in_subset(seq)) continue;
    const std::int64_t pages = kv_.sealed_pages(seq);
    for (std::int64_t head = 0; head < kv_.num_kv_heads && pages > 0; ++head) {
      std::vector<std::vector<Mass>> masses;
      std::vector<double> norms;
      double worst = 0;
      for (std::int64_t g = 0; g < group; ++g) {
        const std::int64_t q_head = head * group + g;
        const RotatedQuery q(fixture_.q_row(seq, q_head), isa_);
        auto& row = masses.emplace_back();
        std::vector<double> values;
        for (std::int64_t page = 0; page < pages; ++page) {
          const Mass mass = mass_of(q, seq, page, head);
          const auto at =
              static_cast<std::size_t>((seq * num_q_heads + q_head) * actual_.page_stride + page);
          ASSERT_NEAR(actual[at], mass.value, mass.rounding) << "page " << page;
          ASSERT_NEAR(actual[at], expected[at], mass.query_error + mass.rounding);
          row.push_back(mass);
          values.push_back(mass.value);
          worst = std::max(worst, mass.query_error + mass.rounding);
        }
        norms.push_back(log_sum(values));
      }
      for (std::int64_t page = 0; page < pages; ++page) {
        std::vector<double> shares;
        double error = 0;
        double rounding = 0;
        for (std::size_t g = 0; g < masses.size(); ++g) {
          const Mass& mass = masses[g][static_cast<std::size_t>(page)];
          shares.push_back(mass.value - norms[g]);
          error = std::max(error, mass.query_error + mass.rounding);
          rounding = std::max(rounding, 0x1p-21 * (std::fabs(mass.value) + std::fabs(norms[g])));
          for (const Mass& other : masses[g]) rounding = std::max(rounding, other.rounding);
        }
        const auto at =
            static_cast<std::size_t>(actual_.row(seq, head) * actual_.page_stride + page);
        const double value = log_sum(shares) - std::log(double(group));
        rounding = 3 * rounding + 0x1p-18;
        ASSERT_NEAR(actual_.scores[at], value, rounding) << "page " << page;
        ASSERT_NEAR(actual_.scores[at], expected_.scores[at], worst + error + rounding);
      }
    }
  }
}

TEST_P(RotatedParity, Estimates) {
  if (format_.key_bits != 2) GTEST_SKIP() << "no 2-bit estimates";
  // The last page first, then every second one: scattered candidates, the open page in front.
  for (StepBuffers* buffers : {&expected_, &actual_, &threaded_}) {
    for (std::int64_t seq = 0; seq < fixture_.num_seqs(); ++seq) {
      for (std::int64_t head = 0; head < kv_.num_kv_heads; ++head) {
        const std::int64_t row = buffers->row(seq, head);
        std::int32_t* pages = buffers->pages.data() + row * buffers->candidate_stride;
        std::int32_t count = 0;
        const std::int32_t total = kv_.total_pages(seq);
        if (total > 0) pages[count++] = total - 1;
        for (auto page = static_cast<std::int32_t>(head % 2); page < total - 1; page += 2) {
          pages[count++] = page;
        }
        buffers->page_counts[static_cast<std::size_t>(row)] = count;
      }
    }
  }
  const auto run = [&](Backend& backend, StepBuffers& buffers) {
    TestWorkspace workspace(backend, buffers.caps());
    backend.estimate_scores(buffers.estimate_params(), workspace.get());
  };
  run(*ref_, expected_);
  run(*one_, actual_);
  run(*three_, threaded_);
  EXPECT_TRUE(same_bits(actual_.estimates, threaded_.estimates));
  EXPECT_EQ(count_nan(actual_.estimates), count_nan(expected_.estimates));

  const double scale = fixture_.scale();
  const auto dim = static_cast<std::size_t>(kv_.head_dim);
  std::vector<float> key(dim);
  std::vector<float> centre(dim);
  for (std::int64_t seq = 0; seq < fixture_.num_seqs(); ++seq) {
    if (!actual_.in_subset(seq)) continue;
    for (std::int64_t q_head = 0; q_head < fixture_.shape().num_q_heads; ++q_head) {
      const std::int64_t head = q_head / fixture_.group_size();
      const RotatedQuery q(fixture_.q_row(seq, q_head), isa_);
      const auto written = actual_.estimates_row(actual_.estimates, seq, q_head);
      const auto expected = expected_.estimates_row(expected_.estimates, seq, q_head);
      const auto candidates = actual_.candidate_pages(seq, head);
      for (std::size_t i = 0; i < written.size(); ++i) {
        const std::int64_t page = candidates[i / static_cast<std::size_t>(kv_.page_size)];
        const auto slot = static_cast<int>(i % static_cast<std::size_t>(kv_.page_size));
        if (std::isinf(expected[i])) {
          ASSERT_EQ(written[i], expected[i]) << "element " << i;
          continue;
        }
        if (case_.policy.exact_keys || page >= kv_.sealed_pages(seq)) {
          const auto k = fixture_.k_row(seq, page * kv_.page_size + slot, head);
          const double size = magnitude(fixture_.q_row(seq, q_head), k);
          ASSERT_NEAR(written[i], expected[i], size * sum_rounding(kv_.head_dim) * scale + 1e-30);
          continue;
        }
        const PageRecords r = records(seq, page, head);
        decode_estimated_key(format_, kv_.page_size, kv_.head_dim, r, slot, key);
        const int run_of = slot / centroid_tokens(format_.summary, kv_.page_size);
        decode_centre(r, run_of, centre);
        // Residual levels from the record itself: the decoded key has lost some bits of them.
        const std::byte* tile =
            r.estimate + slot / kEstimateTileTokens * estimate_tile_bytes(2, kv_.head_dim);
        const int t = slot % kEstimateTileTokens;
        const double step =
            load_element(DType::kF16, tile + estimate_code_bytes(2, kv_.head_dim), t);
        std::vector<float> levels(dim);
        for (std::size_t d = 0; d < dim; ++d) {
          const std::size_t byte = d / 16 * 64 + 4 * static_cast<std::size_t>(t) + d % 4;
          const unsigned code = std::to_integer<unsigned>(tile[byte]) >> (2 * (d / 4 % 4)) & 3U;
          levels[d] = static_cast<float>(code) - 1.5F;
        }
        const double model = scale * (dot(q.bytes, centre) + step * q.residual_dot(levels));
        const double rounding = scale * sum_rounding(kv_.head_dim) *
                                    (magnitude(q.q, centre) + step * magnitude(q.q, levels)) +
                                1e-30;
        const double query_error =
            scale * (q.byte_error(7.5) * double{f16_to_f32(r.params->centre_scale[run_of])} +
                     q.residual_error() * step);
        ASSERT_NEAR(written[i], model, rounding) << "element " << i;
        ASSERT_NEAR(written[i], expected[i], query_error + 2 * rounding) << "element " << i;
      }
    }
  }
}

// What the fused step hands on: dots of the means from the scores, and the rows' maxima.
TEST_P(RotatedParity, DotsAndMaxima) {
  if (format_.key_bits == 0) GTEST_SKIP() << "no estimates";
  const cpu::IndexKernels& kernels = cpu::index_kernels(cpu::parse_isa(isa_));
  const std::int64_t group = fixture_.group_size();
  Buffer score_query(cpu::prepared_query_bytes(kv_.head_dim, static_cast<int>(group)));
  Buffer query(score_query.size());
  EstimateParams estimate = actual_.estimate_params();
  for (std::int32_t seq = 0; seq < kv_.num_seqs; ++seq) {
    const std::int64_t pages = kv_.total_pages(seq);
    const std::int64_t sealed = kv_.sealed_pages(seq);
    std::vector<std::int32_t> list;
    for (std::int32_t page = 0; page < pages; ++page) {
      if (page % 3 != 1 || page + 1 == pages) list.push_back(page);
    }
    const auto count = static_cast<std::int64_t>(list.size());
    const std::int64_t stride = count * kv_.page_size + 3;
    for (std::int32_t head = 0; head < kv_.num_kv_heads; ++head) {
      const cpu::IndexUnit unit = cpu::index_unit(estimate, seq, head);
      kernels.prepare_estimates(unit, query.data());
      std::vector<float> whole(static_cast<std::size_t>(group * stride));
      std::vector<float> parts(whole.size());
      std::vector<float> whole_max(static_cast<std::size_t>(group));
      std::vector<float> part_max(whole_max.size());
      kernels.estimate(unit, query.data(), false, list.data(), 0, count, {}, whole.data(), stride,
                       whole_max.data());
      cpu::CentreDots dots;
      std::vector<float> memory;
      if (num_centroids(format_.summary) > 0 && format_.key_bits == 2) {
        memory.resize(static_cast<std::size_t>(group * (sealed + 5) * kSubCentroids));
        dots = {memory.data(), sealed + 5};
        std::vector<float> masses(static_cast<std::size_t>(group * sealed));
        kernels.prepare_masses(unit, score_query.data());
        for (std::int64_t page = 0; page < sealed; page += 7) {
          kernels.log_masses(unit, score_query.data(), page, std::min(page + 7, sealed),
                             masses.data(), sealed, memory.data(), sealed + 5);
        }
      }
      for (std::int64_t i = 0; i < count; i += 5) {
        kernels.estimate(unit, query.data(), false, list.data(), i, std::min(i + 5, count), dots,
                         parts.data(), stride, part_max.data());
        for (std::int64_t g = 0; g < group; ++g) {
          const float* row = parts.data() + g * stride;
          ASSERT_EQ(part_max[static_cast<std::size_t>(g)],
                    *std::max_element(row + i * kv_.page_size,
                                      row + std::min(i + 5, count) * kv_.page_size));
        }
      }
      EXPECT_TRUE(same_bits(whole, parts));
      for (std::int64_t g = 0; g < group && count > 0; ++g) {
        const float* row = whole.data() + g * stride;
        ASSERT_EQ(whole_max[static_cast<std::size_t>(g)],
                  *std::max_element(row, row + count * kv_.page_size));
      }
    }
  }
}

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const cpu::Isa isa : cpu::available_isas()) names.emplace_back(cpu::isa_name(isa));
  return names;
}

std::vector<OpCase> rotated_cases() {
  std::vector<OpCase> cases;
  for (const OpCase& c : standard_cases()) {
    if (c.shape.format.key_bits == 2 || num_centroids(c.shape.format.summary) > 0) {
      cases.push_back(c);
    }
  }
  return cases;
}

INSTANTIATE_TEST_SUITE_P(Cases, RotatedParity,
                         ::testing::Combine(::testing::ValuesIn(rotated_cases()),
                                            ::testing::ValuesIn(isas())),
                         [](const ::testing::TestParamInfo<Param>& test) {
                           return std::get<0>(test.param).name + "_" + std::get<1>(test.param);
                         });

}  // namespace
}  // namespace twilight::test
