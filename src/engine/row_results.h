#ifndef TWILIGHT_ENGINE_ROW_RESULTS_H_
#define TWILIGHT_ENGINE_ROW_RESULTS_H_

#include <cstdint>
#include <span>
#include <vector>

#include "model/transformer.h"
#include "twilight/engine.h"

namespace twilight {

/// The end of a decode step: the logits, and tokens chosen from them, of rows that ask for either.
/// A host computes logits where they are asked for; elsewhere they stay in the backend's memory
/// and what is asked for is downloaded. Allocates only when a batch is larger than all before.
class RowResults {
 public:
  /// What ops end the step.
  enum class Kind : std::int32_t { kNothing, kLogits, kLargest, kDrawn };

  /// Both must outlive it.
  RowResults(Backend& backend, Transformer& transformer, std::int32_t vocab_size)
      : backend_(backend),
        transformer_(transformer),
        vocab_(static_cast<std::size_t>(vocab_size)),
        host_(backend.memory().is_host()) {}

  /// Takes the rows of the next step, which must live until `take`. Throws
  /// Error(kInvalidArgument) for a draw out of range or a wrong number of logits.
  void begin(std::span<DecodeRow> rows);
  [[nodiscard]] Kind kind() const { return kind_; }

  /// For up to Transformer::kLogitRows rows off the host: `upload` gives the ops their draws, `run`
  /// only calls ops, so that a backend can record them.
  void upload(std::int32_t first_row, std::int32_t num_rows);
  void run(std::int32_t first_row, std::int32_t num_rows);
  /// Fills the rows, after `run` for all of them where `ran`.
  void take(bool ran);

 private:
  void take_on_host();
  void download(std::int32_t first_row, std::int32_t num_rows);
  [[nodiscard]] bool logits_in_one_piece() const;

  Backend& backend_;
  Transformer& transformer_;
  std::size_t vocab_;
  bool host_;
  std::span<DecodeRow> rows_;
  Kind kind_ = Kind::kNothing;
  bool some_logits_ = false;
  std::vector<RowDraw> draws_;        // of each row; the largest where it has none
  std::vector<std::int32_t> chosen_;  // of each row
  std::vector<float> logits_;         // [rows, vocab], on a host
};

}  // namespace twilight

#endif  // TWILIGHT_ENGINE_ROW_RESULTS_H_
