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
  std::string attention = "adaptive";
  std::optional<double> p;
  std::optional<double> candidates;
  std::optional<std::int32_t> min_candidates, max_candidates, min_tokens;
  std::optional<std::int32_t> sinks, recent, dense_layers, key_bits, summary_bits;
  std::optional<std::string> selector, criterion, tail;
  std::optional<double> candidate_mass, far_floor;

  std::optional<std::string> dense_below;
  std::int32_t page_size = 16;
  std::string profile;  ///< file that `calibrate` wrote; the preset "profile"

  void add(CLI::App& command);
  /// The policy these flags describe; throws Error(kInvalidArgument) naming the flag's field.
  [[nodiscard]] SparsePolicy policy() const {
    return policy(profile.empty() ? attention : "profile");
  }
  /// The same flags on another preset; "profile" takes that of the profile file.
  [[nodiscard]] SparsePolicy policy(const std::string& preset) const;
};

struct SamplingFlags {
  SamplingOptions options;

  void add(CLI::App& command);
};

/// Loads a model with a progress bar on a terminal.
[[nodiscard]] Model load_model(const std::string& directory, const CommonFlags& flags);
/// The same; throws Error(kInvalidArgument) where a profile given is for another model.
[[nodiscard]] Model load_model(const std::string& directory, const CommonFlags& flags,
                               const AttentionFlags& attention);

}  // namespace twilight::app

#endif  // TWILIGHT_APPS_FLAGS_H_
