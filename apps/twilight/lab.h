#ifndef TWILIGHT_APPS_LAB_H_
#define TWILIGHT_APPS_LAB_H_

#include <cstdint>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "flags.h"
#include "journal.h"
#include "task.h"
#include "telemetry.h"
#include "twilight/engine.h"

namespace twilight::app {

/// What the accuracy lab's commands share.
struct LabFlags {
  CommonFlags common;
  AttentionFlags attention;
  std::string model;
  std::vector<std::string> texts;
  std::vector<std::int32_t> contexts;
  std::string out, resume;
  bool force = false;
  bool no_audit = false;
  bool dense_question = false;
  std::int32_t audit_every = 8;
  std::vector<double> depths = {0.1, 0.3, 0.5, 0.7, 0.9};
  std::int32_t trials = 8;
  std::uint64_t seed = 1;

  /// Flags of every lab command, but for --attention, --ctx, --out and what depends on the task.
  void add_common(CLI::App& command);
};

/// One way of attention to compare, under a name that no other of the run has.
struct LabPreset {
  std::string label;
  SparsePolicy policy;
};
/// One preset for each name; --dense-below is 0 unless given, since quality is judged on the sparse
/// path whatever this machine's crossover. Throws Error(kInvalidArgument) for a bad name, none, or
/// one given twice.
[[nodiscard]] std::vector<LabPreset> lab_presets(const AttentionFlags& flags,
                                                 const std::vector<std::string>& names);

/// Adds --attention as a list of presets over the one of `AttentionFlags`. A --profile is the
/// preset "profile": the only one where --attention is not given, else it must be on the list.
class PresetList {
 public:
  explicit PresetList(std::vector<std::string> names) : names_(std::move(names)) {}
  void add(CLI::App& command, const std::string& about);
  /// Throws Error(kInvalidArgument) for a profile that is not on the list.
  [[nodiscard]] std::vector<std::string> names(const AttentionFlags& flags) const;

 private:
  std::vector<std::string> names_;
  const CLI::Option* option_ = nullptr;
};

/// Where a measurement stands in the grid.
struct CellPlace {
  std::size_t text = 0;
  std::int32_t context = 0;
  std::size_t depth = 0;  ///< index
  std::int32_t trial = 0;
};

/// What one preset did on one item.
struct Cell {
  double score = 0;  ///< 0 .. 1; of tasks that have one
  std::int64_t questions = 1;
  std::int32_t digits = 0, digits_right = 0;
  std::vector<double> nll;                         ///< of every scored position, nats
  std::vector<std::vector<std::int32_t>> answers;  ///< generated tokens of each question
  DecodeTotals totals;
  Telemetry telemetry;
  double seconds = 0;  ///< of the decode steps that were not audited
  std::int64_t timed_steps = 0;

  [[nodiscard]] nlohmann::ordered_json json() const;
  [[nodiscard]] static Cell from_json(const nlohmann::ordered_json& json);
};

/// Runs a task over a grid of texts, contexts, depths and trials with several presets over one
/// shared prefill an item, and keeps the cells.
class Lab {
 public:
  /// Loads model and texts. Throws Error for what is wrong with the flags before long work.
  Lab(const LabFlags& flags, std::unique_ptr<Task> task, std::vector<LabPreset> presets);

  /// Measures every cell that the --resume file does not have. False where the user interrupted.
  [[nodiscard]] bool run();

  [[nodiscard]] const Task& task() const { return *task_; }
  [[nodiscard]] const Model& model() const { return model_; }
  [[nodiscard]] const Device& device() const { return device_; }
  [[nodiscard]] const std::vector<LabPreset>& presets() const { return presets_; }
  [[nodiscard]] const std::vector<std::string>& text_names() const { return text_names_; }
  [[nodiscard]] const std::vector<double>& depths() const { return depths_; }
  [[nodiscard]] const std::vector<std::int32_t>& contexts() const { return flags_.contexts; }
  [[nodiscard]] std::int32_t trials() const { return trials_; }
  /// Places of the grid, in the order they are reported.
  [[nodiscard]] const std::vector<CellPlace>& places() const { return places_; }
  /// A finished cell; only after run() gave true.
  [[nodiscard]] const Cell& cell(const CellPlace& place, std::size_t preset) const;
  /// Index of the preset that others are compared with: the first dense one; presets().size() where
  /// there is none.
  [[nodiscard]] std::size_t baseline() const;
  /// Model, device, task and grid, for reports.
  [[nodiscard]] nlohmann::ordered_json header() const;

 private:
  [[nodiscard]] nlohmann::ordered_json settings() const;
  [[nodiscard]] std::string identity(const CellPlace& place) const;
  [[nodiscard]] bool read_prompt(const std::vector<std::int32_t>& tokens);
  [[nodiscard]] Cell measure(const TaskItem& item, std::size_t preset);

  LabFlags flags_;
  std::unique_ptr<Task> task_;
  std::vector<LabPreset> presets_;
  std::vector<double> depths_;
  std::int32_t trials_ = 1;
  Device device_;
  Model model_;
  std::vector<std::string> text_names_;
  std::vector<FillerText> texts_;
  Engine engine_;
  std::vector<CellPlace> places_;
  Journal journal_;
  std::map<std::string, Cell> cells_;
  Sequence prompt_;
  std::vector<std::int32_t> read_;  // tokens that prompt_ holds
  std::size_t in_force_ = 0;        // index of the preset that the engine runs
};

}  // namespace twilight::app

#endif  // TWILIGHT_APPS_LAB_H_
