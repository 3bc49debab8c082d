#include "lab.h"

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <tuple>

#include "interrupt.h"
#include "lab_cell.h"
#include "paths.h"
#include "profile.h"
#include "progress.h"
#include "twilight/error.h"

namespace twilight::app {
namespace {

using Json = nlohmann::ordered_json;

// Fewer new tokens than this are read without a bar of their own.
constexpr std::size_t kLongPrompt = 8192;
// Two levels of forks, each of which may copy one page.
constexpr std::int32_t kForkPages = 4;

std::string hash_text(std::string_view text) {
  std::uint64_t hash = 0xcbf29ce484222325ULL;  // FNV-1a
  for (const char c : text) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3ULL;
  char hex[20];
  std::snprintf(hex, sizeof(hex), "%016llx", static_cast<unsigned long long>(hash));
  return hex;
}

// Tells checkpoints apart without reading all of them: sizes, and samples of every weight file.
std::string fingerprint(const std::string& folder) {
  namespace fs = std::filesystem;
  constexpr std::int64_t kSample = 4096, kSamples = 16;
  std::vector<fs::path> files;
  std::error_code ignored;
  for (const auto& entry : fs::directory_iterator(folder, ignored)) {
    if (entry.path().extension() == ".safetensors") files.push_back(entry.path());
  }
  std::sort(files.begin(), files.end());
  std::string sampled;
  for (const fs::path& path : files) {
    const auto size = static_cast<std::int64_t>(fs::file_size(path, ignored));
    sampled += path.filename().string() + " " + std::to_string(size) + "\n";
    std::ifstream file(path, std::ios::binary);
    std::string buffer(kSample, '\0');
    for (std::int64_t i = 0; i < kSamples && file; ++i) {
      file.seekg(std::max<std::int64_t>(0, (size - kSample) * i / (kSamples - 1)));
      file.read(buffer.data(), kSample);
      sampled.append(buffer.data(), static_cast<std::size_t>(file.gcount()));
    }
  }
  return hash_text(sampled);
}

EngineOptions engine_options(const LabFlags& flags, const std::vector<LabPreset>& presets) {
  EngineOptions options;
  options.policy = presets.front().policy;
  options.page_size = flags.attention.page_size();
  options.max_context = *std::max_element(flags.contexts.begin(), flags.contexts.end());
  options.cache_tokens = options.max_context + kForkPages * options.page_size;
  return options;
}

std::vector<std::string> names_of(const std::vector<std::string>& texts) {
  return texts.empty() ? std::vector<std::string>{bundled_novel()} : texts;
}

}  // namespace

std::vector<LabPreset> lab_presets(const AttentionFlags& flags,
                                   const std::vector<std::string>& names) {
  if (names.empty()) {
    throw Error(ErrorCode::kInvalidArgument, "[eval] presets, got none, accepted one or more");
  }
  std::vector<LabPreset> list;
  for (const std::string& name : names) {
    for (const LabPreset& other : list) {
      if (other.label == name) {
        throw Error(ErrorCode::kInvalidArgument,
                    "[eval] preset named twice, got '" + name + "', accepted each once");
      }
    }
    list.push_back({name, flags.policy(name)});
    if (!flags.dense_below) list.back().policy.dense_below_tokens = 0;
  }
  return list;
}

void PresetList::add(CLI::App& command, const std::string& about) {
  command.remove_option(command.get_option("--attention"));
  option_ = command.add_option("--attention", names_, about)
                ->delimiter(',')
                ->capture_default_str()
                ->group("Attention");
}

std::vector<std::string> PresetList::names(const AttentionFlags& flags) const {
  if (!flags.has_profile()) return names_;
  if (option_->count() == 0) return {"profile"};
  if (std::find(names_.begin(), names_.end(), "profile") == names_.end()) {
    throw Error(ErrorCode::kInvalidArgument,
                "[--profile] profile beside --attention, got a list without it, accepted a list "
                "with 'profile' in it, or no --attention");
  }
  return names_;
}

Lab::Lab(const LabFlags& flags, std::unique_ptr<Task> task, std::vector<LabPreset> presets)
    : flags_(flags),
      task_(std::move(task)),
      presets_(std::move(presets)),
      depths_(task_->has_depth() ? flags.depths : std::vector<double>{0}),
      trials_(task_->is_drawn() ? flags.trials : 1),
      device_(flags.common.device),
      model_(load_model(flags.model.empty() ? bundled_model() : flags.model, flags.common,
                        flags.attention)),
      text_names_(names_of(flags.texts)),
      engine_(device_, model_, engine_options(flags_, presets_)),
      prompt_(engine_.cache().new_sequence()) {
  if (flags_.no_audit) flags_.audit_every = 0;
  for (const std::string& name : text_names_) texts_.emplace_back(model_, name, read_text(name));
  for (std::size_t text = 0; text < texts_.size(); ++text) {
    for (const std::int32_t context : flags_.contexts) {
      for (std::size_t depth = 0; depth < depths_.size(); ++depth) {
        for (std::int32_t trial = 0; trial < trials_; ++trial) {
          places_.push_back({text, context, depth, trial});
        }
      }
    }
  }
  // What cannot be made is refused before anything is read.
  for (std::size_t text = 0; text < texts_.size(); ++text) {
    for (const std::int32_t context : flags_.contexts) {
      Random random(0);
      (void)task_->make(texts_[text], context, depths_.front(), random);
    }
  }
  if (!flags_.resume.empty()) journal_ = Journal(flags_.resume, settings(), {"trials"});
}

Json Lab::header() const {
  Json out;
  out["task"] = task_->name();
  out.update(task_->settings());
  out["model"] = model_.info().path;
  out["device"] = device_.description();
  flags_.attention.report(out);
  out["texts"] = text_names_;
  out["ctx"] = flags_.contexts;
  if (task_->has_depth()) out["depths"] = depths_;
  if (task_->is_drawn()) out["seed"] = flags_.seed;
  out["audit_every"] = flags_.audit_every;
  return out;
}

Json Lab::settings() const {
  Json out;
  out["format"] = "twilight eval 1";
  out["task"] = task_->name();
  out.update(task_->settings());
  out["model"] = fingerprint(model_.info().path);
  for (const FillerText& text : texts_) out["texts"].push_back(hash_text(text.text()));
  out["ctx"] = flags_.contexts;
  out["depths"] = depths_;
  out["trials"] = trials_;
  out["seed"] = flags_.seed;
  out["page_size"] = flags_.attention.page_size();
  out["audit_every"] = flags_.audit_every;
  out["dense_question"] = flags_.dense_question;
  for (const LabPreset& preset : presets_) out["presets"].push_back(preset.label);
  for (const LabPreset& preset : presets_) {
    out["policy of " + preset.label] = policy_fields(preset.policy);
  }
  return out;
}

std::string Lab::identity(const CellPlace& place) const {
  return "text " + std::to_string(place.text) + ", ctx " + std::to_string(place.context) +
         ", depth " + Json(depths_[place.depth]).dump() + ", trial " + std::to_string(place.trial);
}

bool Lab::read_prompt(const std::vector<std::int32_t>& tokens) {
  const auto common = static_cast<std::size_t>(
      std::mismatch(read_.begin(), read_.end(), tokens.begin(), tokens.end()).first -
      read_.begin());
  // Whole chunks only: a prompt is then always read in the same pieces, whatever was read before
  // it, and its keys are the same to the last bit.
  const auto chunk = static_cast<std::size_t>(engine_.options().prefill_chunk);
  const std::size_t keep = common / chunk * chunk;
  prompt_.truncate(static_cast<std::int32_t>(keep));
  read_.resize(keep);
  if (keep == tokens.size()) return true;
  ProgressBar bar("Reading the text", "tokens",
                  !flags_.common.json && tokens.size() - keep >= kLongPrompt);
  if (engine_.prefill(prompt_, std::span(tokens).subspan(keep), {}, bar.callback()) !=
      Engine::Status::kOk) {
    return false;
  }
  read_ = tokens;
  return true;
}

Cell Lab::measure(const TaskItem& item, std::size_t preset) {
  if (preset != in_force_) {
    engine_.set_policy(presets_[preset].policy);
    in_force_ = preset;
  }
  return run_cell(engine_, prompt_, item, {flags_.audit_every, flags_.dense_question});
}

bool Lab::run() {
  // Deep facts first: the next prompt then shares the text before its own fact with the one before,
  // and only the rest is read again.
  std::vector<CellPlace> order = places_;
  std::stable_sort(order.begin(), order.end(), [&](const CellPlace& a, const CellPlace& b) {
    return std::tie(a.text, a.context, depths_[b.depth], a.trial) <
           std::tie(b.text, b.context, depths_[a.depth], b.trial);
  });
  const auto total = static_cast<std::int64_t>(order.size() * presets_.size());
  std::int64_t done = 0;
  ProgressBar bar("Evaluating " + task_->name(), "runs", !flags_.common.json);
  for (const CellPlace& place : order) {
    const std::string where = identity(place);
    std::vector<std::size_t> missing;
    for (std::size_t i = 0; i < presets_.size(); ++i) {
      const std::string key = where + ", " + presets_[i].label;
      if (const Json* piece = journal_.find(key); piece != nullptr) {
        cells_[key] = Cell::from_json(*piece);
        ++done;
      } else {
        missing.push_back(i);
      }
    }
    if (missing.empty()) continue;
    Random random = item_random(flags_.seed, task_->name() + ": " + where);
    const TaskItem item =
        task_->make(texts_[place.text], place.context, depths_[place.depth], random);
    bar.clear();
    if (!read_prompt(item.prompt)) return false;
    for (const std::size_t i : missing) {
      bar.update(done++, total);
      Cell cell = measure(item, i);
      if (interrupted()) return false;
      const std::string key = where + ", " + presets_[i].label;
      journal_.add(key, cell.json());
      cells_[key] = std::move(cell);
    }
  }
  return true;
}

const Cell& Lab::cell(const CellPlace& place, std::size_t preset) const {
  return cells_.at(identity(place) + ", " + presets_[preset].label);
}

std::size_t Lab::baseline() const {
  for (std::size_t i = 0; i < presets_.size(); ++i) {
    if (presets_[i].policy.is_dense()) return i;
  }
  return presets_.size();
}

}  // namespace twilight::app
