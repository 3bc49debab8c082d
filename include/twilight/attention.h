#ifndef TWILIGHT_ATTENTION_H_
#define TWILIGHT_ATTENTION_H_

#include <cstdint>
#include <memory>
#include <span>

#include "twilight/export.h"
#include "twilight/kv_cache.h"
#include "twilight/policy.h"
#include "twilight/stats.h"

namespace twilight {

struct AttentionLimits {
  std::int32_t num_q_heads = 0;  ///< Hq, a multiple of the cache's Hkv
  std::int32_t max_seqs = 1;     ///< B of the largest decode step
  std::int32_t max_tokens = 0;   ///< longest N
};

/// Attention over a KvCache under a policy, for engines that own the rest of the model. A forward
/// pass is
///
///   if (!attention.begin(sequences, 1)) ...            // no pages left: nothing has changed
///   for each layer: attention.append(layer, k, v); attention.decode(layer, q, out);
///
/// All buffers are f32 in the device's memory, rows packed, heads rotated already. `append`,
/// `decode` and `prefill` allocate nothing unless audit is on. Not thread-safe; must not outlive
/// the cache.
class TWILIGHT_API Attention {
 public:
  /// Throws Error(kInvalidArgument) for a bad policy or shape, also where the cache lacks the
  /// policy's index planes.
  Attention(KvCache& cache, const SparsePolicy& policy, const AttentionLimits& limits);
  ~Attention();
  Attention(const Attention&) = delete;
  Attention& operator=(const Attention&) = delete;

  /// Makes room for `tokens_each` more tokens in each sequence. All or nothing: false when pages
  /// run out.
  [[nodiscard]] bool begin(std::span<Sequence* const> sequences, std::int32_t tokens_each);

  /// Writes keys and values [B * tokens_each, Hkv, D] of the tokens announced by `begin`, sequence
  /// after sequence, and indexes the pages they complete.
  void append(std::int32_t layer, const float* k, const float* v);

  /// One query token a sequence: q [B, Hq, D] to out [B, Hq, D]. After `begin(sequences, 1)` and
  /// `append`.
  void decode(std::int32_t layer, const float* q, float* out);

  /// Dense causal attention of a chunk: q [tokens_each, Hq, D] of the one sequence given to
  /// `begin`. `full_precision` uses f32 products where the backend would use bf16.
  void prefill(std::int32_t layer, const float* q, float* out, bool full_precision = false);

  /// Takes back the tokens of the last `begin`, e.g. after an exception.
  void rollback();

  [[nodiscard]] const SparsePolicy& policy() const;
  /// Collects LayerStats in `decode` (cheap); with `audit` also the true kept mass (reads every
  /// key, allocates).
  void collect_stats(bool on, bool audit = false);
  /// [B] of a layer's last `decode`; empty unless collected.
  [[nodiscard]] std::span<const LayerStats> stats(std::int32_t layer) const;

  struct Impl;
  [[nodiscard]] Impl& impl() const { return *impl_; }

 private:
  std::unique_ptr<Impl> impl_;
};

}  // namespace twilight

#endif  // TWILIGHT_ATTENTION_H_
