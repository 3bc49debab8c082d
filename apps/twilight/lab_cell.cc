#include "lab_cell.h"

#include <algorithm>
#include <cctype>
#include <chrono>
#include <cmath>
#include <numeric>

#include "interrupt.h"
#include "twilight/error.h"

namespace twilight::app {
namespace {

using Json = nlohmann::ordered_json;

bool is_word(char c) { return std::isalnum(static_cast<unsigned char>(c)) != 0; }

// Fields of DecodeTotals by name, so that writing and reading agree.
template <typename Totals, typename Visit>
void visit_totals(Totals& totals, const Visit& visit) {
  visit("steps", totals.steps);
  visit("sparse_layers", totals.sparse_layers);
  visit("dense_layers", totals.dense_layers);
  visit("bytes_read", totals.bytes_read);
  visit("bytes_dense", totals.bytes_dense);
  visit("sparse_bytes_read", totals.sparse_bytes_read);
  visit("sparse_bytes_dense", totals.sparse_bytes_dense);
  visit("candidates_sum", totals.candidates_sum);
  visit("attended_sum", totals.attended_sum);
  visit("kept_sum", totals.kept_sum);
  visit("estimated_mass_sum", totals.estimated_mass_sum);
  visit("kv_heads_counted", totals.kv_heads_counted);
  visit("q_heads_counted", totals.q_heads_counted);
  visit("true_mass_sum", totals.true_mass_sum);
  visit("true_mass_counted", totals.true_mass_counted);
}

std::int32_t likeliest(std::span<const float> logits) {
  return static_cast<std::int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
}

// Steps through the decode path, timing those that are not audited.
class Stepper {
 public:
  Stepper(Engine& engine, std::int32_t audit_every)
      : engine_(engine),
        audit_(engine, audit_every),
        logits_(static_cast<std::size_t>(engine.model().info().vocab_size)) {}

  void step(Sequence& sequence, std::int32_t token) {
    Sequence* const batch[] = {&sequence};
    const bool timed = !audit_.next_is_audited();
    const auto start = std::chrono::steady_clock::now();
    if (engine_.decode(batch, {&token, 1}, logits_) != Engine::Status::kOk) {
      throw Error(ErrorCode::kInternal, "[eval] the cache ran out of pages");
    }
    if (timed) {
      seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
      ++timed_steps_;
    }
    audit_.after_step();
  }
  [[nodiscard]] std::span<float> logits() { return logits_; }
  void finish(Cell& cell) const {
    cell.telemetry = audit_.telemetry();
    cell.totals = engine_.totals();
    cell.seconds = seconds_;
    cell.timed_steps = timed_steps_;
  }

 private:
  Engine& engine_;
  StepAudit audit_;
  std::vector<float> logits_;
  double seconds_ = 0;
  std::int64_t timed_steps_ = 0;
};

// The answer in the model's own words, up to the end of its line.
std::vector<std::int32_t> generate_answer(const Model& model, Stepper& stepper, Sequence& sequence,
                                          std::int32_t most) {
  std::vector<std::int32_t> answer;
  const std::vector<std::int32_t>& ends = model.info().eos_tokens;
  while (static_cast<std::int32_t>(answer.size()) < most && !interrupted()) {
    const std::int32_t token = likeliest(stepper.logits());
    if (std::find(ends.begin(), ends.end(), token) != ends.end()) break;
    if (model.token_bytes(token).find('\n') != std::string::npos) break;
    answer.push_back(token);
    if (static_cast<std::int32_t>(answer.size()) < most) stepper.step(sequence, token);
  }
  return answer;
}

}  // namespace

bool contains_word(std::string_view answer, std::string_view reference) {
  const auto same = [](char a, char b) {
    return std::tolower(static_cast<unsigned char>(a)) ==
           std::tolower(static_cast<unsigned char>(b));
  };
  for (auto at = answer.begin(); !reference.empty(); ++at) {
    at = std::search(at, answer.end(), reference.begin(), reference.end(), same);
    if (at == answer.end()) return false;
    const auto after = at + static_cast<std::ptrdiff_t>(reference.size());
    if ((at == answer.begin() || !is_word(*(at - 1))) &&
        (after == answer.end() || !is_word(*after))) {
      return true;
    }
  }
  return false;
}

double negative_log_likelihood(std::span<const float> logits, std::int32_t target) {
  const float top = *std::max_element(logits.begin(), logits.end());
  double total = 0;
  for (const float logit : logits) total += std::exp(static_cast<double>(logit - top));
  return std::log(total) - static_cast<double>(logits[static_cast<std::size_t>(target)] - top);
}

double rank_score(std::span<const double> sums, std::int32_t expected) {
  std::vector<std::size_t> order(sums.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
    return sums[a] != sums[b] ? sums[a] > sums[b] : a > b;
  });
  const auto want = static_cast<std::size_t>(expected);
  order.resize(std::min(order.size(), want));
  const auto right = std::count_if(order.begin(), order.end(),
                                   [&](std::size_t candidate) { return candidate < want; });
  return static_cast<double>(right) / static_cast<double>(expected);
}

Cell run_cell(Engine& engine, const Sequence& prompt, const TaskItem& item,
              const CellOptions& options) {
  const Model& model = engine.model();
  Cell cell;
  engine.reset_totals();
  Stepper stepper(engine, options.audit_every);
  Sequence sequence = prompt.fork();
  std::vector<double> sums(item.rank.candidates.size(), 0);
  for (std::size_t i = 0; i < item.path.size(); ++i) {
    if (interrupted()) return cell;
    stepper.step(sequence, item.path[i]);
    if (i < item.targets.size()) {
      cell.nll.push_back(negative_log_likelihood(stepper.logits(), item.targets[i]));
    }
    if (i < item.rank.at.size() && item.rank.at[i] != 0) {
      for (std::size_t c = 0; c < sums.size(); ++c) {
        sums[c] += std::exp(-negative_log_likelihood(stepper.logits(), item.rank.candidates[c]));
      }
    }
  }
  cell.questions = std::max<std::int64_t>(1, static_cast<std::int64_t>(item.questions.size()));
  std::int64_t references = 0, matched = 0;
  for (const Question& question : item.questions) {
    Sequence asked = sequence.fork();
    if (options.dense_question) {
      if (engine.prefill(asked, question.tokens, stepper.logits()) != Engine::Status::kOk) {
        throw Error(ErrorCode::kInternal, "[eval] the cache ran out of pages");
      }
    } else {
      for (const std::int32_t token : question.tokens) {
        if (interrupted()) return cell;
        stepper.step(asked, token);
      }
    }
    if (!question.forced.empty()) {
      for (std::size_t i = 0; i < question.forced.size(); ++i) {
        const std::int32_t written = likeliest(stepper.logits());
        cell.digits += question.digits[i];
        if (written == question.forced[i]) cell.digits_right += question.digits[i];
        if (i + 1 < question.forced.size()) stepper.step(asked, question.forced[i]);
      }
      continue;
    }
    std::vector<std::int32_t> answer =
        generate_answer(model, stepper, asked, question.answer_tokens);
    const std::string text = model.decode(answer);
    for (const std::string& reference : question.references) {
      ++references;
      matched += contains_word(text, reference) ? 1 : 0;
    }
    cell.answers.push_back(std::move(answer));
  }
  if (item.rank.expected > 0) {
    cell.score = rank_score(sums, item.rank.expected);
  } else if (cell.digits > 0) {
    cell.score = static_cast<double>(cell.digits_right) / cell.digits;
  } else if (references > 0) {
    cell.score = static_cast<double>(matched) / static_cast<double>(references);
  }
  stepper.finish(cell);
  return cell;
}

Json Cell::json() const {
  Json out;
  out["score"] = score;
  out["questions"] = questions;
  out["digits"] = digits;
  out["digits_right"] = digits_right;
  out["nll"] = nll;
  out["answers"] = answers;
  Json sums;
  visit_totals(totals, [&](const char* name, const auto& value) { sums[name] = value; });
  out["totals"] = std::move(sums);
  out["telemetry"] = telemetry.json();
  out["seconds"] = seconds;
  out["timed_steps"] = timed_steps;
  return out;
}

Cell Cell::from_json(const Json& json) {
  Cell cell;
  json.at("score").get_to(cell.score);
  json.at("questions").get_to(cell.questions);
  json.at("digits").get_to(cell.digits);
  json.at("digits_right").get_to(cell.digits_right);
  json.at("nll").get_to(cell.nll);
  json.at("answers").get_to(cell.answers);
  visit_totals(cell.totals,
               [&](const char* name, auto& value) { json.at("totals").at(name).get_to(value); });
  cell.telemetry = Telemetry::from_json(json.at("telemetry"));
  json.at("seconds").get_to(cell.seconds);
  json.at("timed_steps").get_to(cell.timed_steps);
  return cell;
}

}  // namespace twilight::app
