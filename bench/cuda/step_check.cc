#include <algorithm>
#include <cmath>
#include <cstring>
#include <set>
#include <string>

#include "backend/cuda/fast/fast_step.h"
#include "device_fixture.h"

/// The fused CUDA step against the scalar reference over shapes, distributions, lengths and launch
/// shapes. Each stage is judged on what the one before it gave: candidate lists by scores, kept
/// sets by the reference's weights of the same candidates, the output by the reference's attention
/// over the same lists. Prints one line a failure and a summary; exit status 1 where anything
/// failed.
namespace twilight {
namespace {

using bench::DeviceFixture;
using test::OpCase;
using test::PagedFixture;
using test::StepBuffers;

struct Worst {
  double page_gap = 0;
  double kept_gap = 0;
  double mass = 0;
  double out = 0;
  std::int64_t kept = 0;
  std::int64_t kept_other = 0;
};

struct Shape {
  int threads;
  int cluster;
};

class Check {
 public:
  explicit Check(const OpCase& op_case)
      : case_(op_case),
        fixture_(op_case.make_fixture()),
        device_(fixture_),
        ref_(make_ref_backend()),
        expected_(op_case, fixture_) {
    expected_.run_selection(*ref_, {});
  }

  bool run(Shape shape, Worst& worst) {
    StepBuffers got(case_, fixture_);
    if (!step(shape, got)) return true;
    StepBuffers again(case_, fixture_);
    step(shape, again);
    ok_ = true;
    label_ = case_.name + " " + std::to_string(shape.threads) + "x" + std::to_string(shape.cluster);
    if (std::memcmp(got.out.data(), again.out.data(), got.out.size() * 4) != 0) {
      fail("two runs differ", 0, 0, 0);
    }
    if (last_out_.empty()) {
      last_pages_ = got.pages;
      last_kept_ = got.kept;
      last_out_ = got.out;
    } else if (last_pages_ != got.pages || last_kept_ != got.kept) {
      fail("lists depend on the launch shape", 0, 0, 0);
    }
    compare(got, worst);
    return ok_;
  }

 private:
  void fail(const char* what, int seq, int head, double value) {
    if (ok_)
      std::printf("FAIL %s: %s (seq %d head %d: %g)\n", label_.c_str(), what, seq, head, value);
    ok_ = false;
  }

  bool step(Shape shape, StepBuffers& got) {
    SparseStepParams params = got.sparse_step_params();
    DeviceFixture& d = device_;
    const auto points = [&](auto& p) { p.kv = d.kv; };
    points(params.prune.score), points(params.prune.select), points(params.prune.estimate),
        points(params.prune.prune), points(params.attend);
    params.prune.score.q = params.prune.estimate.q = params.attend.q = d.q;
    params.prune.score.index = params.prune.estimate.index = params.attend.tail.index = d.index;
    PruneParams& prune = params.prune.prune;
    params.prune.select.pages = d.copy(got.pages);
    params.prune.select.page_counts = d.copy(got.page_counts);
    prune.kept = d.copy(got.kept);
    prune.kept_counts = d.copy(got.kept_counts);
    prune.head_counts = d.copy(got.head_counts);
    prune.head_mass = d.copy(got.head_mass);
    if (prune.tail_mass != nullptr) {
      prune.tail_mass = d.copy(got.tail_mass);
      prune.tail_shift = d.copy(got.tail_shift);
    }
    params.attend.out = d.copy(got.out);
    const float* p = d.copy(got.p);
    const std::int32_t* ids = nullptr;
    if (params.attend.seqs.ids != nullptr) {
      ids = d.copy(params.attend.seqs.ids, static_cast<std::size_t>(params.attend.seqs.count));
    }
    cuda_fast::StepOptions options;
    options.shape = {shape.threads, shape.cluster};
    const Support support = cuda_fast::fast_step_supports(params, 0, options);
    if (!support) {
      std::printf("skip %s %dx%d: %s\n", case_.name.c_str(), shape.threads, shape.cluster,
                  support.reason.c_str());
      return false;
    }
    cuda_fast::launch_fast_step(params, {ids, 0, params.attend.seqs.count}, {p, 0.0F}, 0, nullptr,
                                options);
    bench::check_cuda(cudaDeviceSynchronize(), (case_.name + " step").c_str());
    const auto back = [](auto& host, const auto* from) {
      bench::check_cuda(
          cudaMemcpy(host.data(), from, host.size() * sizeof(host[0]), cudaMemcpyDeviceToHost),
          "read back");
    };
    back(got.pages, params.prune.select.pages);
    back(got.page_counts, params.prune.select.page_counts);
    back(got.kept, prune.kept);
    back(got.kept_counts, prune.kept_counts);
    back(got.head_counts, prune.head_counts);
    back(got.head_mass, prune.head_mass);
    if (prune.tail_mass != nullptr) {
      back(got.tail_mass, prune.tail_mass);
      back(got.tail_shift, prune.tail_shift);
    }
    back(got.out, params.attend.out);
    return true;
  }

  void compare(StepBuffers& got, Worst& worst) {
    const auto& shape = fixture_.shape();
    const int group = fixture_.group_size();
    // The reference on this candidate list.
    StepBuffers mine(case_, fixture_);
    mine.pages = got.pages;
    mine.page_counts = got.page_counts;
    for (int seq = 0; seq < fixture_.num_seqs(); ++seq) {
      if (!got.in_subset(seq)) continue;
      for (int head = 0; head < shape.num_kv_heads; ++head) {
        const auto row = static_cast<std::size_t>(got.row(seq, head));
        const auto limit = (fixture_.kv().seq_lens[seq] + 15) / 16;
        if (got.page_counts[row] != expected_.page_counts[row] && case_.policy.mass <= 0) {
          fail("number of candidates", seq, head, got.page_counts[row]);
        }
        if (got.page_counts[row] < 0 || got.page_counts[row] > limit) {
          fail("candidates", seq, head, got.page_counts[row]);
          return;
        }
        compare_pages(got, seq, head, worst);
      }
    }
    if (!ok_) return;
    ref_->estimate_scores(mine.estimate_params(), {});
    mine.estimates_before_prune = mine.estimates;
    ref_->prune_top_p(mine.prune_params(), {});
    StepBuffers attend(case_, fixture_);
    attend.pages = got.pages;
    attend.page_counts = got.page_counts;
    attend.kept = got.kept;
    attend.kept_counts = got.kept_counts;
    attend.tail_mass = got.tail_mass;
    attend.tail_shift = got.tail_shift;
    for (int seq = 0; seq < fixture_.num_seqs(); ++seq) {
      if (!got.in_subset(seq)) continue;
      for (int head = 0; head < shape.num_kv_heads; ++head) {
        compare_kept(got, mine, seq, head, worst);
      }
    }
    if (!ok_) return;
    ref_->attend_sparse(attend.attend_sparse_params(), {});
    for (int seq = 0; seq < fixture_.num_seqs(); ++seq) {
      for (int head = 0; head < shape.num_q_heads; ++head) {
        if (!got.in_subset(seq)) continue;
        const auto a = got.out_row(seq, head);
        const auto b = attend.out_row(seq, head);
        double error = 0;
        double size = 0;
        for (std::size_t d = 0; d < a.size(); ++d) {
          error += std::pow(double{a[d]} - b[d], 2);
          size += std::pow(double{b[d]}, 2);
        }
        const double relative = size > 0 ? std::sqrt(error / size) : std::sqrt(error);
        worst.out = std::max(worst.out, relative);
        if (!(relative < 1e-2)) fail("output", seq, head, relative);
        const auto at = static_cast<std::size_t>(seq * shape.num_q_heads + head);
        const double mass = std::abs(double{got.head_mass[at]} - mine.head_mass[at]);
        worst.mass = std::max(worst.mass, mass);
        if (!(mass < 0.02)) fail("kept mass", seq, head, mass);
        if (group > 0 && got.head_counts[at] < 0) fail("head count", seq, head, 0);
      }
    }
    // Nothing else was written.
    for (int seq = 0; seq < fixture_.num_seqs(); ++seq) {
      if (got.in_subset(seq)) continue;
      if (!std::isnan(got.out[static_cast<std::size_t>(seq * got.out_seq_stride)])) {
        fail("wrote outside the subset", seq, 0, 0);
      }
    }
  }

  void compare_pages(const StepBuffers& got, int seq, int head, Worst& worst) {
    const auto a = got.candidate_pages(seq, head);
    const auto b = expected_.candidate_pages(seq, head);
    if (!std::is_sorted(a.begin(), a.end())) fail("page order", seq, head, 0);
    const std::set<int> mine(a.begin(), a.end());
    const std::set<int> theirs(b.begin(), b.end());
    if (mine.size() != a.size()) fail("page twice", seq, head, 0);
    const auto scores = expected_.scores_row(seq, head);
    double lowest = 1e300;
    const int n = fixture_.kv().seq_lens[seq];
    for (const int page : theirs) {
      if (case_.policy.forced.contains_page(page, n, 16)) {
        if (mine.count(page) == 0) fail("forced page missing", seq, head, page);
      } else {
        lowest = std::min(lowest, double{scores[static_cast<std::size_t>(page)]});
      }
    }
    for (int page = 0; page < (n + 15) / 16; ++page) {
      if (mine.count(page) == theirs.count(page)) continue;
      const double score = scores[static_cast<std::size_t>(page)];
      // Scores beyond 256 octaves below the best share one key.
      const double gap = case_.policy.criterion == PruneCriterion::kPerHead
                             ? std::abs(score - lowest) / (1e-3 + std::abs(lowest))
                             : (score < -150 ? 0 : std::abs(score - lowest));
      worst.page_gap = std::max(worst.page_gap, gap);
      if (!(gap < 0.02)) fail("candidate page", seq, head, gap);
    }
  }

  void compare_kept(const StepBuffers& got, const StepBuffers& mine, int seq, int head,
                    Worst& worst) {
    const auto a = got.kept_tokens(seq, head);
    const auto b = mine.kept_tokens(seq, head);
    if (!std::is_sorted(a.begin(), a.end())) fail("kept order", seq, head, 0);
    const std::set<int> x(a.begin(), a.end());
    const std::set<int> y(b.begin(), b.end());
    if (x.size() != a.size()) fail("kept twice", seq, head, 0);
    worst.kept += std::ssize(y);
    std::int64_t other = 0;
    for (const int token : x) other += y.count(token) == 0 ? 1 : 0;
    for (const int token : y) other += x.count(token) == 0 ? 1 : 0;
    worst.kept_other += other;
    const double gap = double(other) / (double(y.size()) + 50);
    worst.kept_gap = std::max(worst.kept_gap, gap);
    if (gap > 0.08) fail("kept set", seq, head, double(other));
    const int n = fixture_.kv().seq_lens[seq];
    for (const int token : y) {
      if (case_.policy.forced.contains(token, n, 16) && x.count(token) == 0) {
        fail("forced token missing", seq, head, token);
      }
    }
  }

  OpCase case_;
  PagedFixture fixture_;
  DeviceFixture device_;
  std::unique_ptr<Backend> ref_;
  StepBuffers expected_;
  bool ok_ = true;
  std::string label_;
  std::vector<std::int32_t> last_pages_;
  std::vector<std::int32_t> last_kept_;
  std::vector<float> last_out_;
};

std::vector<OpCase> cases(bool tuned_only) {
  std::vector<OpCase> list;
  const auto add = [&](const std::string& name, bool paper, int group, int dim, DType dtype,
                       test::Distribution distribution,
                       std::vector<std::int32_t> lengths) -> OpCase& {
    OpCase c;
    c.name = name;
    c.shape.lengths = std::move(lengths);
    c.shape.num_kv_heads = 2;
    c.shape.num_q_heads = 2 * group;
    c.shape.head_dim = dim;
    c.shape.page_size = 16;
    c.shape.dtype = dtype;
    c.shape.format = paper ? IndexFormat{SummaryKind::kQuestBf16, 4, 0, IndexLayout::kMma}
                           : IndexFormat{name.starts_with("halves")     ? SummaryKind::kHalfCentroid
                                         : name.starts_with("quarters") ? SummaryKind::kSubCentroid
                                                                        : SummaryKind::kCentroid,
                                         2, 4, IndexLayout::kMma};
    c.options.distribution = distribution;
    c.options.seed = list.size() + 1;
    c.policy.criterion = paper ? PruneCriterion::kPerHead : PruneCriterion::kGroupMean;
    c.policy.tail = !paper;
    c.policy.p = paper ? 0.95F : 0.9F;
    c.policy.min_tokens = 16;
    c.policy.min_candidate_tokens = 256;
    c.policy.forced = {16, 3};
    list.push_back(c);
    return list.back();
  };
  using D = test::Distribution;
  const std::vector<std::int32_t> ragged = {0, 1, 15, 16, 17, 100, 333, 1024, 2500};
  const std::pair<const char*, D> kinds[] = {{"normal", D::kNormal},   {"planted", D::kPlanted},
                                             {"equal", D::kAllEqual},  {"tied", D::kTiedGroups},
                                             {"one", D::kOneDominant}, {"sink", D::kSinkDominated},
                                             {"zero", D::kZeroRange},  {"wide", D::kWide}};
  for (const std::string scheme : {"adaptive_", "halves_", "quarters_", "paper_"}) {
    const bool paper = scheme == "paper_";
    for (const auto& [name, kind] : kinds) {
      add(scheme + name, paper, 4, 128, DType::kBf16, kind, ragged);
    }
    OpCase& p1 = add(scheme + "p1", paper, 4, 128, DType::kBf16, D::kNormal, ragged);
    p1.policy.p = 1.0F;
    add(scheme + "mixed_p", paper, 4, 128, DType::kBf16, D::kPlanted, ragged).policy.mixed_p = true;
    OpCase& bare = add(scheme + "no_forced", paper, 4, 128, DType::kBf16, D::kPlanted, ragged);
    bare.policy.forced = {0, 0};
    OpCase& many = add(scheme + "min_tokens", paper, 4, 128, DType::kBf16, D::kPlanted, ragged);
    many.policy.min_tokens = 400;
    OpCase& half = add(scheme + "half", paper, 4, 128, DType::kBf16, D::kNormal, {5000, 7000});
    half.policy.fraction = 0.5;
    half.policy.p = 0.99F;
    OpCase& subset = add(scheme + "subset", paper, 4, 128, DType::kBf16, D::kPlanted, ragged);
    subset.subset = true;
    OpCase& token_major =
        add(scheme + "token_major", paper, 4, 128, DType::kBf16, D::kPlanted, ragged);
    token_major.options.token_major = true;
    if (!paper) {
      add(scheme + "no_tail", false, 4, 128, DType::kBf16, D::kPlanted, ragged).policy.tail = false;
      OpCase& mass = add(scheme + "mass", false, 4, 128, DType::kBf16, D::kPlanted, ragged);
      mass.policy.mass = 0.8;
      mass.policy.mass_floor = 64;
      mass.policy.fraction = 0.5;
    }
    add(scheme + "group3", paper, 3, 128, DType::kBf16, D::kPlanted, ragged);
    if (tuned_only) continue;
    for (const int group : {1, 2, 5, 7, 8}) {
      add(scheme + "group" + std::to_string(group), paper, group, 128, DType::kBf16, D::kPlanted,
          ragged);
    }
    add(scheme + "f16", paper, 4, 128, DType::kF16, D::kPlanted, ragged);
    add(scheme + "d64", paper, 4, 64, DType::kBf16, D::kPlanted, ragged);
    add(scheme + "d64_f16_group1", paper, 1, 64, DType::kF16, D::kPlanted, ragged);
    add(scheme + "d64_group8", paper, 8, 64, DType::kBf16, D::kNormal, ragged);
  }
  return list;
}

}  // namespace
}  // namespace twilight

int main(int argc, char** argv) {
  using namespace twilight;
  bool tuned_only = false;
  std::string filter;
  for (int i = 1; i < argc; ++i) {
    if (std::string(argv[i]) == "--tuned")
      tuned_only = true;
    else
      filter = argv[i];
  }
  int failed = 0;
  int count = 0;
  Worst all;
  for (const test::OpCase& c : cases(tuned_only)) {
    if (c.name.find(filter) == std::string::npos) continue;
    try {
      Check check(c);
      Worst worst;
      bool ok = true;
      for (const Shape shape : {Shape{512, 1}, Shape{1024, 1}, Shape{512, 2}, Shape{512, 8}}) {
        ok = check.run(shape, worst) && ok;
      }
      ++count;
      failed += ok ? 0 : 1;
      std::printf("%-24s %s page %.4f kept %lld other %lld (%.3f) mass %.4f out %.5f\n",
                  c.name.c_str(), ok ? "ok  " : "FAIL", worst.page_gap,
                  static_cast<long long>(worst.kept), static_cast<long long>(worst.kept_other),
                  worst.kept_gap, worst.mass, worst.out);
    } catch (const std::exception& e) {
      std::printf("%-24s FAIL %s\n", c.name.c_str(), e.what());
      ++failed;
    }
    std::fflush(stdout);
  }
  std::printf("%d cases, %d failed\n", count, failed);
  return failed == 0 ? 0 : 1;
}
