#include "engine/row_results.h"

#include <algorithm>

#include "core/check.h"
#include "engine/sampler_impl.h"

namespace twilight {

void RowResults::begin(std::span<DecodeRow> rows) {
  rows_ = rows;
  draws_.assign(rows.size(), {});
  chosen_.assign(rows.size(), -1);
  some_logits_ = false;
  bool chooses = false;
  bool draws = false;
  for (std::size_t i = 0; i < rows.size(); ++i) {
    DecodeRow& row = rows[i];
    require(row.logits.empty() || row.logits.size() == vocab_, "decode",
            "number of logits of a row, got ", row.logits.size(), ", accepted 0 or ", vocab_);
    some_logits_ = some_logits_ || !row.logits.empty();
    row.token = -1;
    if (!row.draw) continue;
    check_draw(*row.draw);
    draws_[i] = row_draw_of(*row.draw);
    chooses = true;
    draws = draws || row.draw->temperature > 0;
  }
  kind_ = draws          ? Kind::kDrawn
          : chooses      ? Kind::kLargest
          : some_logits_ ? Kind::kLogits
                         : Kind::kNothing;
}

void RowResults::upload(std::int32_t first_row, std::int32_t num_rows) {
  if (kind_ != Kind::kDrawn) return;
  transformer_.set_draws(std::span<const RowDraw>(draws_).subspan(
      static_cast<std::size_t>(first_row), static_cast<std::size_t>(num_rows)));
}

void RowResults::run(std::int32_t first_row, std::int32_t num_rows) {
  if (kind_ == Kind::kNothing) return;
  transformer_.run_logits(first_row, num_rows);
  if (kind_ == Kind::kLargest) transformer_.run_argmax(num_rows);
  if (kind_ == Kind::kDrawn) transformer_.run_sample(num_rows);
}

void RowResults::take(bool ran) {
  if (kind_ == Kind::kNothing) return;
  if (host_) {
    take_on_host();
  } else {
    const auto total = static_cast<std::int32_t>(rows_.size());
    for (std::int32_t row = 0; row < total; row += Transformer::kLogitRows) {
      const std::int32_t count = std::min(Transformer::kLogitRows, total - row);
      if (!ran) {
        upload(row, count);
        run(row, count);
      }
      download(row, count);
    }
  }
  for (std::size_t i = 0; i < rows_.size(); ++i) {
    if (rows_[i].draw) rows_[i].token = chosen_[i];
  }
}

bool RowResults::logits_in_one_piece() const {
  for (std::size_t i = 0; i < rows_.size(); ++i) {
    const DecodeRow& row = rows_[i];
    if (row.logits.empty() || row.logits.data() != rows_[0].logits.data() + i * vocab_) {
      return false;
    }
  }
  return true;
}

void RowResults::take_on_host() {
  const bool in_place = logits_in_one_piece();
  if (!in_place) logits_.resize(std::max(logits_.size(), rows_.size() * vocab_));
  float* const all = in_place ? rows_[0].logits.data() : logits_.data();
  transformer_.logits(0, static_cast<std::int32_t>(rows_.size()), {all, rows_.size() * vocab_});
  const auto cols = static_cast<std::int64_t>(vocab_);
  if (kind_ == Kind::kLargest && !some_logits_) {
    backend_.argmax({all, static_cast<std::int32_t>(rows_.size()), cols, chosen_.data()});
    return;
  }
  for (std::size_t i = 0; i < rows_.size(); ++i) {
    const float* const row = all + i * vocab_;
    if (rows_[i].draw) backend_.sample_rows({row, 1, cols, &draws_[i], &chosen_[i]});
    if (!in_place && !rows_[i].logits.empty()) {
      std::copy_n(row, vocab_, rows_[i].logits.data());
    }
  }
}

void RowResults::download(std::int32_t first_row, std::int32_t num_rows) {
  const auto first = static_cast<std::size_t>(first_row);
  const auto count = static_cast<std::size_t>(num_rows);
  if (kind_ != Kind::kLogits) {
    transformer_.read_tokens(std::span(chosen_).subspan(first, count));
  }
  // Rows whose places follow each other come in one go.
  for (std::size_t i = 0; i < count;) {
    const std::span<float> logits = rows_[first + i].logits;
    if (logits.empty()) {
      ++i;
      continue;
    }
    std::size_t end = i + 1;
    while (end < count && rows_[first + end].logits.data() == logits.data() + (end - i) * vocab_) {
      ++end;
    }
    transformer_.read_logits(static_cast<std::int32_t>(i), static_cast<std::int32_t>(end - i),
                             {logits.data(), (end - i) * vocab_});
    i = end;
  }
}

}  // namespace twilight
