#include "support/prune_promises.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "quant/page_codec.h"

/// The promises that take several runs of a backend.
namespace twilight::test {
namespace {

std::string where(const OpCase& op_case, std::int64_t seq, std::int64_t head) {
  return op_case.name + ", sequence " + std::to_string(seq) + ", head " + std::to_string(head);
}

/// One step with its own buffers.
struct StepRun {
  StepRun(Backend& backend, const OpCase& op_case, const PagedFixture& fixture)
      : step(op_case, fixture), workspace(backend, step.caps()) {
    step.run_selection(backend, workspace.get());
    backend.attend_sparse(step.attend_sparse_params(), workspace.get());
  }
  StepBuffers step;
  TestWorkspace workspace;
};

template <typename T>
bool same_bits(std::span<const T> a, std::span<const T> b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end());
}

void expect_same_sequence(const OpCase& op_case, const PagedFixture& fixture, const StepBuffers& a,
                          std::int64_t seq_a, const StepBuffers& b, std::int64_t seq_b) {
  const FixtureShape& shape = fixture.shape();
  for (std::int64_t head = 0; head < shape.num_kv_heads; ++head) {
    SCOPED_TRACE(where(op_case, seq_a, head));
    EXPECT_TRUE(same_bits(a.candidate_pages(seq_a, head), b.candidate_pages(seq_b, head)));
    EXPECT_TRUE(same_bits(a.kept_tokens(seq_a, head), b.kept_tokens(seq_b, head)));
  }
  for (std::int64_t head = 0; head < shape.num_q_heads; ++head) {
    SCOPED_TRACE(where(op_case, seq_a, head));
    const auto row_a = static_cast<std::size_t>(seq_a * shape.num_q_heads + head);
    const auto row_b = static_cast<std::size_t>(seq_b * shape.num_q_heads + head);
    EXPECT_EQ(a.head_counts[row_a], b.head_counts[row_b]);
    EXPECT_EQ(a.head_mass[row_a], b.head_mass[row_b]);
    EXPECT_TRUE(same_bits(a.out_row(seq_a, head), b.out_row(seq_b, head)));
  }
}

}  // namespace

void check_attention(const OpCase& op_case, const PagedFixture& fixture, const StepBuffers& step,
                     const Tolerance& tolerance) {
  const FixtureShape& shape = fixture.shape();
  const auto dim = static_cast<std::size_t>(shape.head_dim);
  for (std::int64_t seq = 0; seq < fixture.num_seqs(); ++seq) {
    if (!step.in_subset(seq)) continue;
    for (std::int64_t q_head = 0; q_head < shape.num_q_heads; ++q_head) {
      const std::int64_t head = q_head / fixture.group_size();
      // Logs of weights and what they weigh.
      std::vector<double> logs;
      std::vector<std::vector<float>> vectors;
      const std::span<const float> q = fixture.q_row(seq, q_head);
      for (const std::int32_t token : step.kept_tokens(seq, head)) {
        const std::vector<float> k = fixture.k_row(seq, token, head);
        double score = 0;
        for (std::size_t d = 0; d < dim; ++d) score += double{q[d]} * double{k[d]};
        logs.push_back(score * double{fixture.scale()});
        vectors.push_back(fixture.v_row(seq, token, head));
      }
      const auto add_mean = [&](std::int32_t page) {
        vectors.emplace_back(dim);
        decode_value_mean(page_records(fixture.index(), fixture.kv().page_of(seq, page), head,
                                       shape.page_size, shape.head_dim),
                          vectors.back());
      };
      const std::span<const std::int32_t> pages = step.candidate_pages(seq, head);
      for (std::size_t i = 0; i < pages.size() && step.has_tail(); ++i) {
        const double mass = step.tail_row(seq, q_head)[i];
        if (mass == 0) continue;
        const auto row = static_cast<std::size_t>(seq * shape.num_q_heads + q_head);
        logs.push_back(std::log(mass) + double{step.tail_shift[row]});
        add_mean(pages[i]);
      }
      if (step.has_far_tail()) {
        const std::span<const float> scores = step.scores_row(seq, head);
        const std::span<const float> masses = step.log_mass_row(seq, q_head);
        const float lowest =
            std::log(op_case.policy.far_floor / static_cast<float>(std::ssize(scores)));
        for (std::size_t page = 0; page < scores.size(); ++page) {
          if (scores[page] < lowest) continue;
          if (std::binary_search(pages.begin(), pages.end(), static_cast<std::int32_t>(page))) {
            continue;
          }
          logs.push_back(masses[page]);
          add_mean(static_cast<std::int32_t>(page));
        }
      }
      std::vector<float> want(dim, 0.0F);
      if (!logs.empty()) {
        const double top = *std::max_element(logs.begin(), logs.end());
        double total = 0;
        std::vector<double> sum(dim, 0.0);
        for (std::size_t i = 0; i < logs.size(); ++i) {
          const double weight = std::exp(logs[i] - top);
          total += weight;
          for (std::size_t d = 0; d < dim; ++d) sum[d] += weight * double{vectors[i][d]};
        }
        for (std::size_t d = 0; d < dim; ++d) want[d] = static_cast<float>(sum[d] / total);
      }
      EXPECT_TRUE(close(step.out_row(seq, q_head), want, tolerance)) << where(op_case, seq, q_head);
    }
  }
}

void check_full_mass_has_no_tail(Backend& backend, const OpCase& op_case) {
  const PagedFixture fixture = op_case.make_fixture();
  OpCase full = op_case;
  full.policy.p = 1.0F;
  full.policy.mixed_p = false;
  full.policy.far_tail = false;
  const StepRun with(backend, full, fixture);
  full.policy.tail = false;
  const StepRun without(backend, full, fixture);
  for (std::int64_t seq = 0; seq < fixture.num_seqs(); ++seq) {
    if (!with.step.in_subset(seq)) continue;
    for (std::int64_t head = 0; head < fixture.shape().num_q_heads; ++head) {
      EXPECT_TRUE(same_bits(with.step.out_row(seq, head), without.step.out_row(seq, head)))
          << where(op_case, seq, head);
    }
  }
}

void check_larger_p_keeps_superset(Backend& backend, const OpCase& op_case) {
  const PagedFixture fixture = op_case.make_fixture();
  OpCase varied = op_case;
  varied.policy.mixed_p = false;
  std::vector<std::vector<std::int32_t>> before;
  for (const float p : {1e-6F, 0.3F, 0.7F, 0.9F, 0.99F, 0.9999F, 1.0F}) {
    varied.policy.p = p;
    const StepRun run(backend, varied, fixture);
    std::vector<std::vector<std::int32_t>> now;
    for (std::int64_t seq = 0; seq < fixture.num_seqs(); ++seq) {
      for (std::int64_t head = 0; head < fixture.shape().num_kv_heads; ++head) {
        now.emplace_back();
        if (!run.step.in_subset(seq)) continue;
        const std::span<const std::int32_t> kept = run.step.kept_tokens(seq, head);
        now.back().assign(kept.begin(), kept.end());
        if (before.empty()) continue;
        const std::vector<std::int32_t>& smaller = before[now.size() - 1];
        EXPECT_TRUE(std::includes(kept.begin(), kept.end(), smaller.begin(), smaller.end()))
            << where(op_case, seq, head) << ", p " << p;
      }
    }
    before = std::move(now);
  }
}

void check_batch_independence(Backend& backend, const OpCase& op_case) {
  const PagedFixture fixture = op_case.make_fixture();
  OpCase all = op_case;
  all.subset = false;
  StepRun together(backend, all, fixture);

  StepBuffers alone(all, fixture);
  TestWorkspace workspace(backend, alone.caps());
  for (std::int32_t seq = 0; seq < fixture.num_seqs(); ++seq) {
    alone.set_subset({seq});
    alone.run_selection(backend, workspace.get());
    backend.attend_sparse(alone.attend_sparse_params(), workspace.get());
  }

  OpCase turned_case = all;
  std::reverse(turned_case.shape.lengths.begin(), turned_case.shape.lengths.end());
  turned_case.options.shared_prefix_pages = 0;
  turned_case.options.seed += 1000;
  PagedFixture turned_fixture = turned_case.make_fixture();
  const std::int32_t last = fixture.num_seqs() - 1;
  for (std::int32_t seq = 0; seq <= last; ++seq) {
    for (std::int32_t h = 0; h < fixture.shape().num_kv_heads; ++h) {
      for (std::int32_t t = 0; t < fixture.kv().seq_lens[seq]; ++t) {
        turned_fixture.set_k(last - seq, t, h, fixture.k_row(seq, t, h));
        turned_fixture.set_v(last - seq, t, h, fixture.v_row(seq, t, h));
      }
    }
    for (std::int32_t h = 0; h < fixture.shape().num_q_heads; ++h) {
      turned_fixture.set_q(last - seq, h, fixture.q_row(seq, h));
    }
  }
  turned_fixture.seal();
  StepBuffers turned(turned_case, turned_fixture);
  const auto heads = static_cast<std::ptrdiff_t>(fixture.shape().num_q_heads);
  for (std::ptrdiff_t seq = 0; seq <= last; ++seq) {
    std::copy_n(together.step.p.begin() + seq * heads, heads,
                turned.p.begin() + (last - seq) * heads);
  }
  turned.run_selection(backend, workspace.get());
  backend.attend_sparse(turned.attend_sparse_params(), workspace.get());

  for (std::int32_t seq = 0; seq <= last; ++seq) {
    expect_same_sequence(op_case, fixture, together.step, seq, alone, seq);
    expect_same_sequence(op_case, fixture, together.step, seq, turned, last - seq);
  }
}

void check_full_mass_is_dense(Backend& backend, const OpCase& op_case, const Tolerance& tolerance) {
  const PagedFixture fixture = op_case.make_fixture();
  OpCase full = op_case;
  full.policy.mode = SelectMode::kAll;
  full.policy.p = 1.0F;
  full.policy.mixed_p = false;
  StepRun sparse(backend, full, fixture);
  StepBuffers dense(full, fixture);
  backend.attend_dense(dense.attend_dense_params(), sparse.workspace.get());
  for (std::int64_t seq = 0; seq < fixture.num_seqs(); ++seq) {
    if (!sparse.step.in_subset(seq)) continue;
    for (std::int64_t head = 0; head < fixture.shape().num_q_heads; ++head) {
      const auto got = sparse.step.out_row(seq, head);
      const auto want = dense.out_row(seq, head);
      EXPECT_TRUE(tolerance.abs == 0 ? ::testing::AssertionResult(same_bits(got, want))
                                     : close(got, want, tolerance))
          << where(op_case, seq, head);
    }
  }
}

}  // namespace twilight::test
