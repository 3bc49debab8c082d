#include "workload.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>
#include <vector>

#include "distribution.h"
#include "passkey.h"
#include "set_size.h"
#include "twilight/error.h"

namespace twilight::app {
namespace {

// Statistics of the planted data. Logits are q.k / sqrt(D).
constexpr double kNoiseLogitStd = 0.7;       // of the tokens that do not matter
constexpr double kQueryCorrelation = 0.5;    // cosine between the queries of a group
constexpr double kSegmentCorrelation = 0.5;  // of keys inside a stretch of kSegment tokens
constexpr std::int32_t kSegment = 32;
constexpr double kGroupShared = 0.65;    // part of a head's heavy tokens its group shares
constexpr std::int32_t kLongestRun = 7;  // heavy tokens come in runs of 1 to this many
constexpr double kWeakestBoost = 0.75;   // of the strongest heavy token of a head
// A head's set is support / kSupport tokens, so that its edge lies inside the planted tokens.
constexpr double kSupport = 1.4;
constexpr double kSinkShareMin = 0.1, kSinkShareMax = 0.4;  // attention mass on token 0
// Sizes over heads: log-normal. Published sets of one layer's 32 heads (mean 576, from 4 to 2,778)
// vary by about this much between groups of four and inside them.
constexpr double kGroupLogStd = 1.1, kHeadLogStd = 0.5;
constexpr double kLargestShare = 0.5;  // of N, that one head's set may have

std::uint64_t mix(std::uint64_t z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
  return z ^ (z >> 31);
}

std::uint64_t mix(std::uint64_t a, std::uint64_t b) {
  return mix(a * 0x9e3779b97f4a7c15ULL + b + 0x632be59bd9b4e019ULL);
}

double uniform(Random& random) { return static_cast<double>(random.next() >> 11) * 0x1p-53; }

double normal(Random& random) {
  const double radius = std::sqrt(-2 * std::log(1 - uniform(random)));
  return radius * std::cos(6.283185307179586 * uniform(random));
}

/// Adds scale * noise of mean 0 and variance 1 (a sum of two uniforms); a pure function of `key`.
void add_noise(std::uint64_t key, float scale, std::int32_t count, float* out) {
  constexpr float kUnit = 2.4494897F * 0x1p-16F;  // sqrt(6) over the range of a uniform
  const float unit = scale * kUnit;
  const float centre = -scale * 2.4494897F;
  for (std::int32_t d = 0; d < count; d += 2) {
    const std::uint64_t bits = mix(key + static_cast<std::uint64_t>(d) * 0x9e3779b97f4a7c15ULL);
    const auto low = static_cast<std::int32_t>((bits & 0xffff) + ((bits >> 16) & 0xffff));
    out[d] += unit * static_cast<float>(low) + centre;
    if (d + 1 == count) break;
    const auto high = static_cast<std::int32_t>(((bits >> 32) & 0xffff) + (bits >> 48));
    out[d + 1] += unit * static_cast<float>(high) + centre;
  }
}

/// Inverse of a small symmetric positive matrix [n, n], by Gauss-Jordan.
std::vector<double> inverse(std::vector<double> a, std::size_t n) {
  std::vector<double> out(n * n, 0.0);
  for (std::size_t i = 0; i < n; ++i) out[i * n + i] = 1;
  for (std::size_t col = 0; col < n; ++col) {
    const double pivot = 1 / a[col * n + col];
    for (std::size_t j = 0; j < n; ++j) {
      a[col * n + j] *= pivot;
      out[col * n + j] *= pivot;
    }
    for (std::size_t row = 0; row < n; ++row) {
      if (row == col) continue;
      const double factor = a[row * n + col];
      for (std::size_t j = 0; j < n; ++j) {
        a[row * n + j] -= factor * a[col * n + j];
        out[row * n + j] -= factor * out[col * n + j];
      }
    }
  }
  return out;
}

class PlantedWorkload final : public Workload {
 public:
  explicit PlantedWorkload(const PlantedOptions& options) : options_(options) {
    const LayerShape& shape = options.shape;
    group_ = shape.num_q_heads / shape.num_kv_heads;
    query_.resize(static_cast<std::size_t>(shape.num_q_heads * shape.head_dim));
    duals_.resize(query_.size());
    added_.resize(static_cast<std::size_t>(shape.num_q_heads) *
                  static_cast<std::size_t>(options.num_tokens));
  }

  [[nodiscard]] LayerShape shape() const override { return options_.shape; }
  [[nodiscard]] std::int32_t num_tokens(std::int32_t /*seq*/) const override {
    return options_.num_tokens;
  }
  [[nodiscard]] std::span<const float> query() const override { return query_; }

  void prepare(std::int32_t seq) override {
    seq_ = seq;
    Random random(mix(options_.seed, static_cast<std::uint64_t>(seq)));
    const std::vector<std::int32_t> sizes = draw_sizes(random);
    std::fill(added_.begin(), added_.end(), 0.0F);
    for (std::int32_t head = 0; head < options_.shape.num_kv_heads; ++head) {
      draw_queries(head, random);
      plant(head, sizes, random);
    }
  }

  void tokens(std::int32_t first, std::int32_t count, float* k, float* v) const override {
    const LayerShape& shape = options_.shape;
    for (std::int32_t i = 0; i < count; ++i) {
      for (std::int32_t head = 0; head < shape.num_kv_heads; ++head) {
        const std::int32_t token = first + i;
        const std::int64_t at = (std::int64_t{i} * shape.num_kv_heads + head) * shape.head_dim;
        noise_key(head, token, k + at);
        for (std::int32_t g = 0; g < group_; ++g) {
          const std::size_t q_head = static_cast<std::size_t>(head * group_ + g);
          const float add = added_[q_head * static_cast<std::size_t>(options_.num_tokens) +
                                   static_cast<std::size_t>(token)];
          if (add == 0) continue;
          const float* dual = duals_.data() + q_head * static_cast<std::size_t>(shape.head_dim);
          for (std::int32_t d = 0; d < shape.head_dim; ++d) k[at + d] += add * dual[d];
        }
        std::fill_n(v + at, shape.head_dim, 0.0F);
        add_noise(row_key(2, head, token), 1.0F, shape.head_dim, v + at);
      }
    }
  }

  [[nodiscard]] nlohmann::ordered_json json() const override {
    nlohmann::ordered_json out;
    out["kind"] = "planted";
    out["seed"] = options_.seed;
    out["p"] = options_.p;
    out["budget_target"] = options_.budget;
    out["noise_logit_std"] = kNoiseLogitStd;
    out["query_correlation"] = kQueryCorrelation;
    out["segment_tokens"] = kSegment;
    out["segment_correlation"] = kSegmentCorrelation;
    out["group_shared"] = kGroupShared;
    out["run_tokens_max"] = kLongestRun;
    out["size_log_std_groups"] = kGroupLogStd;
    out["size_log_std_heads"] = kHeadLogStd;
    out["drawn_set_sizes"] = Distribution(drawn_).json();
    out["exact_set_sizes"] = Distribution(reached_).json();
    out["heavy_logit"] = Distribution(boosts_).json();
    out["sink_share"] = Distribution(sinks_).json();
    return out;
  }

  [[nodiscard]] std::string text() const override {
    const Distribution sizes(reached_);
    char line[256];
    std::snprintf(line, sizeof(line),
                  "planted keys, seed %llu; exact p = %g sets of the %zu query heads: mean %.0f "
                  "tokens (%.2f %% of N), min / p10 / median / p90 / max %s",
                  static_cast<unsigned long long>(options_.seed), options_.p, sizes.count,
                  sizes.mean, 100 * sizes.mean / options_.num_tokens, sizes.text(0).c_str());
    return line;
  }

 private:
  [[nodiscard]] std::uint64_t row_key(std::uint64_t kind, std::int32_t head,
                                      std::int32_t row) const {
    const std::uint64_t where =
        mix(static_cast<std::uint64_t>(seq_) * 4 + kind, static_cast<std::uint64_t>(head));
    return mix(options_.seed + where, static_cast<std::uint64_t>(row));
  }

  void noise_key(std::int32_t head, std::int32_t token, float* out) const {
    std::fill_n(out, options_.shape.head_dim, 0.0F);
    add_noise(row_key(0, head, token), static_cast<float>(std::sqrt(1 - kSegmentCorrelation)),
              options_.shape.head_dim, out);
    add_noise(row_key(1, head, token / kSegment),
              static_cast<float>(std::sqrt(kSegmentCorrelation)), options_.shape.head_dim, out);
  }

  /// Set sizes [Hq], mean budget * N as far as the bounds allow.
  std::vector<std::int32_t> draw_sizes(Random& random) {
    const auto heads = static_cast<std::size_t>(options_.shape.num_q_heads);
    const double tokens = options_.num_tokens;
    std::vector<double> sizes(heads);
    double group = 0;
    for (std::size_t i = 0; i < heads; ++i) {
      if (i % static_cast<std::size_t>(group_) == 0) group = kGroupLogStd * normal(random);
      sizes[i] = std::exp(group + kHeadLogStd * normal(random));
    }
    for (int round = 0; round < 8; ++round) {
      const double mean =
          std::accumulate(sizes.begin(), sizes.end(), 0.0) / static_cast<double>(heads);
      for (double& size : sizes) {
        size = std::clamp(size * options_.budget * tokens / mean, 2.0,
                          std::max(2.0, kLargestShare * tokens));
      }
    }
    std::vector<std::int32_t> out;
    for (const double size : sizes) {
      out.push_back(static_cast<std::int32_t>(std::lround(size)));
      drawn_.push_back(out.back());
    }
    return out;
  }

  /// Queries of a group, and the vectors that move the logit of one of them alone.
  void draw_queries(std::int32_t head, Random& random) {
    const auto dim = static_cast<std::size_t>(options_.shape.head_dim);
    const auto group = static_cast<std::size_t>(group_);
    float* const q = query_.data() + static_cast<std::size_t>(head) * group * dim;
    float* const duals = duals_.data() + static_cast<std::size_t>(head) * group * dim;
    std::vector<double> shared(dim);
    for (double& x : shared) x = normal(random);
    for (std::size_t g = 0; g < group; ++g) {
      double norm = 0;
      for (std::size_t d = 0; d < dim; ++d) {
        const double x = std::sqrt(kQueryCorrelation) * shared[d] +
                         std::sqrt(1 - kQueryCorrelation) * normal(random);
        q[g * dim + d] = static_cast<float>(x);
        norm += x * x;
      }
      const double scale = kNoiseLogitStd * std::sqrt(static_cast<double>(dim) / norm);
      for (std::size_t d = 0; d < dim; ++d) {
        q[g * dim + d] = static_cast<float>(scale * static_cast<double>(q[g * dim + d]));
      }
    }
    // logits of x = sum_h a_h dual_h are a, as dual = (Q Q^T / sqrt(D))^-1 Q. The ridge keeps the
    // inverse bounded where D is below the group size.
    std::vector<double> gram(group * group);
    for (std::size_t a = 0; a < group; ++a) {
      for (std::size_t b = 0; b < group; ++b) {
        gram[a * group + b] = std::inner_product(q + a * dim, q + (a + 1) * dim, q + b * dim, 0.0) /
                              std::sqrt(static_cast<double>(dim));
      }
    }
    for (std::size_t a = 0; a < group; ++a) gram[a * group + a] *= 1 + 1e-4;
    const std::vector<double> inverted = inverse(std::move(gram), group);
    for (std::size_t a = 0; a < group; ++a) {
      for (std::size_t d = 0; d < dim; ++d) {
        double sum = 0;
        for (std::size_t b = 0; b < group; ++b) {
          sum += inverted[a * group + b] * static_cast<double>(q[b * dim + d]);
        }
        duals[a * dim + d] = static_cast<float>(sum);
      }
    }
  }

  /// Appends runs of tokens that are not in `taken` yet, until the list has `size`.
  void draw_runs(std::size_t size, Random& random, std::vector<bool>& taken,
                 std::vector<std::int32_t>& list) const {
    const auto n = static_cast<std::uint64_t>(options_.num_tokens);
    while (list.size() < size) {
      const std::uint64_t start = 1 + random.below(n - 1);
      const std::uint64_t end = std::min(n, start + 1 + random.below(kLongestRun));
      for (std::uint64_t t = start; t < end && list.size() < size; ++t) {
        if (taken[t]) continue;
        taken[t] = true;
        list.push_back(static_cast<std::int32_t>(t));
      }
    }
  }

  void plant(std::int32_t head, const std::vector<std::int32_t>& sizes, Random& random) {
    const auto n = static_cast<std::size_t>(options_.num_tokens);
    const auto dim = static_cast<std::size_t>(options_.shape.head_dim);
    const std::size_t first = static_cast<std::size_t>(head * group_);
    const auto support = [&](std::size_t q_head) {
      return std::min(static_cast<std::size_t>(std::ceil(kSupport * sizes[q_head])),
                      (n - 1) * 3 / 4);
    };
    std::size_t most = 0;
    for (std::int32_t g = 0; g < group_; ++g) {
      most = std::max(most, support(first + static_cast<std::size_t>(g)));
    }
    std::vector<bool> in_shared(n, false);
    std::vector<std::int32_t> shared;
    draw_runs(static_cast<std::size_t>(kGroupShared * static_cast<double>(most)), random, in_shared,
              shared);

    std::vector<float> logits(static_cast<std::size_t>(group_) * n);
    std::vector<float> key(dim);
    for (std::size_t t = 0; t < n; ++t) {
      noise_key(head, static_cast<std::int32_t>(t), key.data());
      for (std::size_t g = 0; g < static_cast<std::size_t>(group_); ++g) {
        const float* q = query_.data() + (first + g) * dim;
        float sum = 0;
        for (std::size_t d = 0; d < dim; ++d) sum += q[d] * key[d];
        logits[g * n + t] = sum / std::sqrt(static_cast<float>(dim));
      }
    }
    for (std::size_t g = 0; g < static_cast<std::size_t>(group_); ++g) {
      HeadPlan plan;
      const std::size_t size = support(first + g);
      const auto common = static_cast<std::size_t>(kGroupShared * static_cast<double>(size));
      plan.heavy.assign(shared.begin(), shared.begin() + static_cast<std::ptrdiff_t>(common));
      std::vector<bool> taken(n, false);
      for (const std::int32_t t : plan.heavy) taken[static_cast<std::size_t>(t)] = true;
      draw_runs(size, random, taken, plan.heavy);
      for (std::size_t i = 0; i < size; ++i) {
        plan.profile.push_back(
            static_cast<float>(kWeakestBoost + (1 - kWeakestBoost) * uniform(random)));
      }
      plan.sink_share = kSinkShareMin + (kSinkShareMax - kSinkShareMin) * uniform(random);
      calibrate(std::span(logits).subspan(g * n, n), options_.p, sizes[first + g], plan);
      float* const added = added_.data() + (first + g) * n;
      added[0] = static_cast<float>(plan.sink_logit);
      for (std::size_t i = 0; i < size; ++i) {
        added[plan.heavy[i]] = static_cast<float>(plan.boost) * plan.profile[i];
      }
      reached_.push_back(plan.set_size);
      boosts_.push_back(plan.boost);
      sinks_.push_back(plan.sink_share);
    }
  }

  PlantedOptions options_;
  std::int32_t group_;
  std::int32_t seq_ = 0;
  std::vector<float> query_, duals_;  // [Hq, D]
  std::vector<float> added_;          // [Hq, N] logits added to the noise
  std::vector<double> drawn_, reached_, boosts_, sinks_;
};

void check(const char* name, std::int64_t value, std::int64_t low, std::int64_t high) {
  if (value >= low && value <= high) return;
  throw Error(ErrorCode::kInvalidArgument, std::string("[bench] ") + name + ", got " +
                                               std::to_string(value) + ", accepted " +
                                               std::to_string(low) + " to " + std::to_string(high));
}

}  // namespace

std::unique_ptr<Workload> make_planted(const PlantedOptions& options) {
  const LayerShape& shape = options.shape;
  check("number of KV heads", shape.num_kv_heads, 1, 4096);
  check("number of query heads", shape.num_q_heads, 1, 4096);
  check("head dimension", shape.head_dim, 1, 512);
  check("context in tokens", options.num_tokens, 64, 1 << 30);
  if (shape.num_q_heads % shape.num_kv_heads != 0) {
    throw Error(ErrorCode::kInvalidArgument, "[bench] number of query heads, got " +
                                                 std::to_string(shape.num_q_heads) +
                                                 ", accepted multiples of the " +
                                                 std::to_string(shape.num_kv_heads) + " KV heads");
  }
  if (!(options.budget > 0 && options.budget <= 0.25)) {
    throw Error(ErrorCode::kInvalidArgument, "[bench] --budget, got " +
                                                 std::to_string(options.budget) +
                                                 ", accepted a share above 0 to 0.25");
  }
  return std::make_unique<PlantedWorkload>(options);
}

}  // namespace twilight::app
