#ifndef TWILIGHT_APPS_FLAGS_H_
#define TWILIGHT_APPS_FLAGS_H_

#include <CLI/CLI.hpp>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

#include "profile.h"
#include "twilight/device.h"
#include "twilight/engine.h"
#include "twilight/error.h"
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
  static constexpr const char* kDefaultPreset = "adaptive";

  std::string attention = kDefaultPreset;
  std::optional<double> p;
  std::optional<double> candidates;
  std::optional<std::int32_t> min_candidates, max_candidates, min_tokens;
  std::optional<std::int32_t> sinks, recent, dense_layers, key_bits, summary_bits;
  std::optional<std::string> selector, criterion, tail;
  std::optional<double> candidate_mass, far_floor;

  std::optional<std::string> dense_below;
  std::optional<std::int32_t> page_tokens;
  std::string profile;  ///< file that `calibrate` wrote, the preset "profile"; "none": no file

  void add(CLI::App& command);
  /// For commands that decode with one attention of their own: they then take the profile that lies
  /// with the model where the user names neither --attention nor --profile.
  void add_model_profile(CLI::App& command);
  /// After `add_model_profile`: looks for the model's profile, also where `attention` lists the
  /// preset "profile". Throws what `read_profile` does.
  void settle(const std::string& model);
  /// Says on standard error that the model's profile is used, unless the output is JSON; for when
  /// nothing is left that the input could be refused for.
  void announce(const CommonFlags& common) const;

  /// For commands that compare the presets of a list: `attention`, or "profile" where there is one
  /// and no list was given. Throws Error(kInvalidArgument) for a profile that is not on the list.
  [[nodiscard]] std::string list() const;
  [[nodiscard]] bool has_profile() const { return !profile.empty() && profile != "none"; }
  /// Adds the profile's path as "profile", if there is one.
  void report(nlohmann::ordered_json& json) const {
    if (has_profile()) json["profile"] = profile;
  }
  /// Tokens a page: --page-size, else the profile's, else 16.
  [[nodiscard]] std::int32_t page_size() const;
  /// Throws Error(kInvalidArgument) where the profile is for another model or page size.
  void check_model(const ModelInfo& info) const;
  /// The policy these flags describe; throws Error(kInvalidArgument) naming the flag's field.
  [[nodiscard]] SparsePolicy policy() const {
    return policy(has_profile() ? "profile" : attention);
  }
  /// The same flags on another preset; "profile" takes that of the profile file.
  [[nodiscard]] SparsePolicy policy(const std::string& preset) const;

 private:
  [[noreturn]] void rethrow(const Error& error) const;
  /// The profile file, read where it is first needed.
  const Profile& loaded() const;

  const CLI::Option* attention_option_ = nullptr;  // gone where a command replaced it by its own
  bool found_ = false;  // the profile lies with the model; the user did not name it
  mutable std::optional<Profile> loaded_;
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
