#include "sparse/selector.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "core/check.h"

namespace twilight {

Selector::~Selector() = default;

std::int64_t Selector::bytes_per_page(const PagedKvView& kv) const {
  return summary_record_bytes(summary(), kv.head_dim);
}

void Selector::score(Backend& /*backend*/, const ScorePagesParams& /*params*/, float* /*scratch*/,
                     std::int64_t /*scratch_tokens*/, Workspace /*workspace*/) const {
  fail(ErrorCode::kInternal, "selector", name(), " does not rank pages");
}

namespace {

class FullSelector final : public Selector {
 public:
  [[nodiscard]] std::string_view name() const override { return "full"; }
  [[nodiscard]] SelectMode mode() const override { return SelectMode::kAll; }
};

class StreamingSelector final : public Selector {
 public:
  [[nodiscard]] std::string_view name() const override { return "streaming"; }
  [[nodiscard]] SelectMode mode() const override { return SelectMode::kForcedOnly; }
};

// Tang et al. 2024, "Quest": an upper bound of q.k over the page from per-channel min and max.
class QuestSelector final : public Selector {
 public:
  explicit QuestSelector(SummaryKind kind) : kind_(kind) {}
  [[nodiscard]] std::string_view name() const override { return "quest"; }
  [[nodiscard]] SelectMode mode() const override { return SelectMode::kByScore; }
  [[nodiscard]] SummaryKind summary() const override { return kind_; }
  [[nodiscard]] bool scores_in_backend() const override { return true; }
  void score(Backend& backend, const ScorePagesParams& params, float* /*scratch*/,
             std::int64_t /*scratch_tokens*/, Workspace workspace) const override {
    backend.score_pages(params, workspace);
  }

 private:
  SummaryKind kind_;
};

// Yang et al. 2024, "Double Sparsity": the largest logit of the page's tokens on a few channels
// that calibration found to carry most of q.k.
class LabelSelector final : public Selector {
 public:
  explicit LabelSelector(std::int32_t channels) : channels_(channels) {}
  [[nodiscard]] std::string_view name() const override { return "double_sparsity"; }
  [[nodiscard]] SelectMode mode() const override { return SelectMode::kByScore; }
  [[nodiscard]] SummaryKind summary() const override { return SummaryKind::kLabels; }
  [[nodiscard]] bool scores_in_backend() const override { return true; }
  [[nodiscard]] std::int64_t bytes_per_page(const PagedKvView& kv) const override {
    IndexFormat format;
    format.summary = SummaryKind::kLabels;
    format.label_channels = channels_;
    return summary_record_bytes(format, kv.page_size, kv.head_dim);
  }
  void score(Backend& backend, const ScorePagesParams& params, float* /*scratch*/,
             std::int64_t /*scratch_tokens*/, Workspace workspace) const override {
    backend.score_pages(params, workspace);
  }

 private:
  std::int32_t channels_;
};

// Estimated softmax mass of a page from means of its keys: see ScorePagesParams.
class CentroidSelector final : public Selector {
 public:
  explicit CentroidSelector(SummaryKind kind) : kind_(kind) {}
  [[nodiscard]] std::string_view name() const override {
    return kind_ == SummaryKind::kCentroid       ? "centroid"
           : kind_ == SummaryKind::kHalfCentroid ? "half_centroid"
                                                 : "sub_centroid";
  }
  [[nodiscard]] SelectMode mode() const override { return SelectMode::kByScore; }
  [[nodiscard]] SummaryKind summary() const override { return kind_; }
  [[nodiscard]] bool scores_in_backend() const override { return true; }
  [[nodiscard]] std::int64_t bytes_per_page(const PagedKvView& kv) const override {
    return Selector::bytes_per_page(kv) + static_cast<std::int64_t>(sizeof(PageParams));
  }
  void score(Backend& backend, const ScorePagesParams& params, float* /*scratch*/,
             std::int64_t /*scratch_tokens*/, Workspace workspace) const override {
    backend.score_pages(params, workspace);
  }

 private:
  SummaryKind kind_;
};

// True softmax mass of a page, mean over the group's heads.
class OracleSelector final : public Selector {
 public:
  [[nodiscard]] std::string_view name() const override { return "oracle"; }
  [[nodiscard]] SelectMode mode() const override { return SelectMode::kByScore; }
  [[nodiscard]] int scratch_floats_per_token() const override { return 1; }
  [[nodiscard]] std::int64_t bytes_per_page(const PagedKvView& kv) const override {
    return std::int64_t{kv.page_size} * kv.head_dim * dtype_bytes(kv.dtype);
  }
  void score(Backend& backend, const ScorePagesParams& params, float* scratch,
             std::int64_t scratch_tokens, Workspace workspace) const override {
    ExactScoresParams exact{params.seqs,  params.q, params.kv,
                            params.scale, scratch,  scratch_tokens};
    backend.exact_scores(exact, workspace);
    DeviceMemory& memory = backend.memory();
    if (memory.is_host()) {
      add_masses(params, scratch, scratch_tokens, params.scores);
      return;
    }
    // A study, not a way to be fast: through host memory.
    const std::int64_t seqs = params.kv.num_seqs;
    std::vector<float> tokens(static_cast<std::size_t>(seqs * params.q.num_heads * scratch_tokens));
    std::vector<float> scores(
        static_cast<std::size_t>(seqs * params.kv.num_kv_heads * params.page_stride));
    memory.download(tokens.data(), scratch, tokens.size() * sizeof(float));
    add_masses(params, tokens.data(), scratch_tokens, scores.data());
    memory.upload(params.scores, scores.data(), scores.size() * sizeof(float));
  }

 private:
  /// Both in host memory.
  static void add_masses(const ScorePagesParams& params, const float* tokens,
                         std::int64_t tokens_stride, float* page_scores) {
    const std::int32_t num_kv_heads = params.kv.num_kv_heads;
    const std::int32_t group = params.q.num_heads / num_kv_heads;
    for (std::int32_t i = 0; i < params.seqs.count; ++i) {
      const std::int32_t seq = params.seqs.at(i);
      const std::int32_t n = params.kv.host_len(seq);
      for (std::int32_t kv_head = 0; kv_head < num_kv_heads; ++kv_head) {
        float* scores =
            page_scores + (std::int64_t{seq} * num_kv_heads + kv_head) * params.page_stride;
        std::fill_n(scores, n / params.kv.page_size, 0.0F);
        for (std::int32_t g = 0; g < group; ++g) {
          const std::int64_t row = std::int64_t{seq} * params.q.num_heads + kv_head * group + g;
          add_page_mass(tokens + row * tokens_stride, n, params.kv.page_size, scores);
        }
      }
    }
  }

  static void add_page_mass(const float* row, std::int32_t n, std::int32_t page_size,
                            float* scores) {
    if (n == 0) return;
    const float top = *std::max_element(row, row + n);
    double total = 0;
    for (std::int32_t t = 0; t < n; ++t) total += std::exp(static_cast<double>(row[t] - top));
    for (std::int32_t t = 0; t < n / page_size * page_size; ++t) {
      scores[t / page_size] +=
          static_cast<float>(std::exp(static_cast<double>(row[t] - top)) / total);
    }
  }
};

}  // namespace

std::unique_ptr<Selector> make_selector(const SparsePolicy& policy) {
  if (policy.selector == "full") return std::make_unique<FullSelector>();
  if (policy.selector == "streaming") return std::make_unique<StreamingSelector>();
  if (policy.selector == "quest") {
    return std::make_unique<QuestSelector>(policy.summary_bits == 4 ? SummaryKind::kQuest4
                                                                    : SummaryKind::kQuestBf16);
  }
  if (policy.selector == "centroid") {
    return std::make_unique<CentroidSelector>(SummaryKind::kCentroid);
  }
  if (policy.selector == "half_centroid") {
    return std::make_unique<CentroidSelector>(SummaryKind::kHalfCentroid);
  }
  if (policy.selector == "sub_centroid") {
    return std::make_unique<CentroidSelector>(SummaryKind::kSubCentroid);
  }
  if (policy.selector == "double_sparsity") {
    return std::make_unique<LabelSelector>(policy.num_labels);
  }
  if (policy.selector == "oracle") return std::make_unique<OracleSelector>();
  fail(ErrorCode::kInvalidArgument, "policy", "unknown selector, got '", policy.selector,
       "', accepted dense, full, quest, centroid, half_centroid, sub_centroid, double_sparsity, "
       "streaming, "
       "oracle");
}

}  // namespace twilight
