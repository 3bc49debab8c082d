#ifndef TWILIGHT_SPARSE_SELECTOR_H_
#define TWILIGHT_SPARSE_SELECTOR_H_

#include <memory>
#include <string_view>

#include "ops/backend.h"
#include "twilight/policy.h"

namespace twilight {

/// A way to choose candidate pages, behind one small interface: which summary plane it needs,
/// whether it ranks pages, and how it scores them. A selector that scores from a plane that exists
/// (or from the keys) is one class in this folder and one line in `make_selector`; one that needs a
/// new record adds its format to quant/index_format.h and its kernel to the backends. Stateless and
/// thread-safe.
class Selector {
 public:
  virtual ~Selector();

  [[nodiscard]] virtual std::string_view name() const = 0;
  [[nodiscard]] virtual SelectMode mode() const = 0;
  /// The summary plane `score` reads.
  [[nodiscard]] virtual SummaryKind summary() const { return SummaryKind::kNone; }
  /// Whether `score` is the backend's own score_pages, so the fused op may be used.
  [[nodiscard]] virtual bool scores_in_backend() const { return false; }
  /// Floats of scratch `score` needs per (sequence, query head, token); 0 for none.
  [[nodiscard]] virtual int scratch_floats_per_token() const { return 0; }
  /// Bytes read per sealed page and KV head to score it.
  [[nodiscard]] virtual std::int64_t bytes_per_page(const PagedKvView& kv) const;

  /// Writes params.scores for the sealed pages of every sequence; higher is better. Only called
  /// when mode() is kByScore. `scratch` has scratch_floats_per_token() * B * Hq * scratch_tokens
  /// floats.
  virtual void score(Backend& backend, const ScorePagesParams& params, float* scratch,
                     std::int64_t scratch_tokens, Workspace workspace) const;
};

/// The selector a policy names. Throws Error(kInvalidArgument) listing the known ones.
[[nodiscard]] std::unique_ptr<Selector> make_selector(const SparsePolicy& policy);

}  // namespace twilight

#endif  // TWILIGHT_SPARSE_SELECTOR_H_
