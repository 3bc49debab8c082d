#ifndef TWILIGHT_APPS_FLAGS_H_
#define TWILIGHT_APPS_FLAGS_H_

#include <CLI/CLI.hpp>
#include <cstdint>
#include <optional>
#include <string>

#include "twilight/device.h"
#include "twilight/engine.h"
#include "twilight/policy.h"

namespace twilight::app {

/// Flags every command has.
struct CommonFlags {
  bool json = false;
  DeviceOptions device;

  void add(CLI::App& command);
};

/// How attention decides what to read. Fields left unset keep the preset's value.
struct AttentionFlags {
  std::string attention = "paper";
  std::optional<double> p;
  std::optional<double> candidates;
  std::optional<std::int32_t> min_candidates, max_candidates, min_tokens;
  std::optional<std::int32_t> sinks, recent, dense_layers, key_bits, summary_bits;
  std::optional<std::string> selector, criterion;
  std::optional<double> candidate_mass;
  std::optional<bool> tail;
  std::optional<std::string> dense_below;
  std::int32_t page_size = 16;

  void add(CLI::App& command);
  /// The policy these flags describe; throws Error(kInvalidArgument) naming the flag's field.
  [[nodiscard]] SparsePolicy policy() const { return policy(attention); }
  /// The same flags on another preset.
  [[nodiscard]] SparsePolicy policy(const std::string& preset) const;
};

struct SamplingFlags {
  SamplingOptions options;

  void add(CLI::App& command);
};

/// Loads a model with a progress bar on a terminal.
[[nodiscard]] Model load_model(const std::string& directory, const CommonFlags& flags);

}  // namespace twilight::app

#endif  // TWILIGHT_APPS_FLAGS_H_
