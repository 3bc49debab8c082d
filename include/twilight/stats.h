#ifndef TWILIGHT_STATS_H_
#define TWILIGHT_STATS_H_

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

#include "twilight/export.h"

namespace twilight {

/// What a decode step ran for one sequence in one layer, and why where that is dense.
enum class StepPath : std::int32_t {
  kSparse = 0,
  kDensePolicy,     ///< the policy is dense
  kDenseLayer,      ///< one of the first dense_layers layers
  kDenseShort,      ///< at most dense_below_tokens tokens
  kDenseAllForced,  ///< every token is forced, so sparse would read the same
  kDenseFullMass,   ///< p = 1 over all tokens is dense attention
};

[[nodiscard]] constexpr bool is_dense(StepPath path) { return path != StepPath::kSparse; }
/// "sparse", "policy", "dense layer", "short", "all forced", "p = 1".
[[nodiscard]] TWILIGHT_API std::string_view step_path_name(StepPath path);

/// One sequence in one layer of one step. Vectors have one entry a KV head (Hkv) or query head
/// (Hq); on a dense path counts are N and masses 1.
struct LayerStats {
  StepPath path = StepPath::kDensePolicy;
  std::int32_t num_tokens = 0;           ///< N
  std::vector<std::int32_t> candidates;  ///< [Hkv] candidate tokens
  std::vector<std::int32_t> attended;    ///< [Hkv] distinct tokens attended (union over the group)
  std::vector<std::int32_t> kept;        ///< [Hq] a head's own set, forced tokens included
  std::vector<float> estimated_mass;  ///< [Hq] of the candidates' estimated mass, what is attended
  std::vector<float> true_mass;       ///< [Hq] true share of the full softmax attended; audit only
  std::int64_t bytes_read = 0;        ///< index and K and V
  std::int64_t bytes_dense = 0;       ///< what dense attention reads
};

/// Running sums over steps, layers, sequences and heads.
struct DecodeTotals {
  std::int64_t steps = 0;
  std::int64_t sparse_layers = 0;  ///< (sequence, layer, step) triples on the sparse path
  std::int64_t dense_layers = 0;
  std::int64_t bytes_read = 0;
  std::int64_t bytes_dense = 0;
  // Over the sparse triples only:
  std::int64_t sparse_bytes_read = 0;
  std::int64_t sparse_bytes_dense = 0;
  double candidates_sum = 0, attended_sum = 0;  ///< over (triple, KV head)
  double kept_sum = 0, estimated_mass_sum = 0;  ///< over (triple, query head)
  std::int64_t kv_heads_counted = 0, q_heads_counted = 0;
  double true_mass_sum = 0;
  std::int64_t true_mass_counted = 0;

  void add(const LayerStats& stats);
  void merge(const DecodeTotals& other);

  /// Share of dense bytes read, over all layers; 1 where nothing was counted.
  [[nodiscard]] double bytes_ratio() const { return ratio(bytes_read, bytes_dense, 1); }
  /// The same over the sparse layers alone.
  [[nodiscard]] double sparse_bytes_ratio() const {
    return ratio(sparse_bytes_read, sparse_bytes_dense, 1);
  }
  [[nodiscard]] double candidates_mean() const {
    return ratio(candidates_sum, kv_heads_counted, 0);
  }
  [[nodiscard]] double attended_mean() const { return ratio(attended_sum, kv_heads_counted, 0); }
  [[nodiscard]] double kept_mean() const { return ratio(kept_sum, q_heads_counted, 0); }
  [[nodiscard]] double estimated_mass_mean() const {
    return ratio(estimated_mass_sum, q_heads_counted, 1);
  }
  [[nodiscard]] double true_mass_mean() const { return ratio(true_mass_sum, true_mass_counted, 1); }

 private:
  template <typename A, typename B>
  static double ratio(A part, B whole, double none) {
    return whole == 0 ? none : static_cast<double>(part) / static_cast<double>(whole);
  }
};

inline void DecodeTotals::add(const LayerStats& stats) {
  bytes_read += stats.bytes_read;
  bytes_dense += stats.bytes_dense;
  if (is_dense(stats.path)) {
    ++dense_layers;
    return;
  }
  ++sparse_layers;
  sparse_bytes_read += stats.bytes_read;
  sparse_bytes_dense += stats.bytes_dense;
  for (std::size_t h = 0; h < stats.candidates.size(); ++h) {
    candidates_sum += stats.candidates[h];
    attended_sum += stats.attended[h];
  }
  kv_heads_counted += static_cast<std::int64_t>(stats.candidates.size());
  for (std::size_t h = 0; h < stats.kept.size(); ++h) {
    kept_sum += stats.kept[h];
    estimated_mass_sum += static_cast<double>(stats.estimated_mass[h]);
  }
  q_heads_counted += static_cast<std::int64_t>(stats.kept.size());
  for (const float mass : stats.true_mass) true_mass_sum += static_cast<double>(mass);
  true_mass_counted += static_cast<std::int64_t>(stats.true_mass.size());
}

inline void DecodeTotals::merge(const DecodeTotals& other) {
  steps += other.steps;
  sparse_layers += other.sparse_layers;
  dense_layers += other.dense_layers;
  bytes_read += other.bytes_read;
  bytes_dense += other.bytes_dense;
  sparse_bytes_read += other.sparse_bytes_read;
  sparse_bytes_dense += other.sparse_bytes_dense;
  candidates_sum += other.candidates_sum;
  attended_sum += other.attended_sum;
  kept_sum += other.kept_sum;
  estimated_mass_sum += other.estimated_mass_sum;
  kv_heads_counted += other.kv_heads_counted;
  q_heads_counted += other.q_heads_counted;
  true_mass_sum += other.true_mass_sum;
  true_mass_counted += other.true_mass_counted;
}

}  // namespace twilight

#endif  // TWILIGHT_STATS_H_
