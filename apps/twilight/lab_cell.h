#ifndef TWILIGHT_APPS_LAB_CELL_H_
#define TWILIGHT_APPS_LAB_CELL_H_

#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "lab.h"

namespace twilight::app {

/// Whether `answer` has `reference` as a whole word or number, upper and lower case alike.
[[nodiscard]] bool contains_word(std::string_view answer, std::string_view reference);

/// -log softmax(logits)[target], in nats.
[[nodiscard]] double negative_log_likelihood(std::span<const float> logits, std::int32_t target);

/// Share of the first `expected` candidates among the `expected` best by `sums`; of equal ones the
/// later is the better, so that ties never help.
[[nodiscard]] double rank_score(std::span<const double> sums, std::int32_t expected);

/// Runs one item through the decode path of `engine`, whose policy is in force, from `prompt` on.
/// `stop` is asked between tokens; an empty cell without steps comes back where it says so.
struct CellOptions {
  std::int32_t audit_every = 0;
  bool dense_question = false;
};
[[nodiscard]] Cell run_cell(Engine& engine, const Sequence& prompt, const TaskItem& item,
                            const CellOptions& options);

}  // namespace twilight::app

#endif  // TWILIGHT_APPS_LAB_CELL_H_
