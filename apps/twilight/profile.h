#ifndef TWILIGHT_APPS_PROFILE_H_
#define TWILIGHT_APPS_PROFILE_H_

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>

#include "twilight/engine.h"

namespace twilight::app {

/// A policy with the p that `calibrate` found for one model, as a file.
struct Profile {
  SparsePolicy policy;
  std::int32_t page_size = 16;
  nlohmann::ordered_json model;  ///< what it was measured on: `profile_model`
};

/// Shape of a model, as far as it decides whether a profile is for it.
[[nodiscard]] nlohmann::ordered_json profile_model(const ModelInfo& info);

/// Every field of a policy, unlike a report's policy_json also those that do not matter to it.
[[nodiscard]] nlohmann::ordered_json policy_fields(const SparsePolicy& policy);

/// The file's content; `calibration` is kept beside it for people.
[[nodiscard]] std::string profile_text(const Profile& profile,
                                       const nlohmann::ordered_json& calibration);

/// Reads a profile file. Throws Error(kNotFound, kIo) where it cannot be read and
/// Error(kInvalidArgument) naming file, field, value and what is accepted.
[[nodiscard]] Profile read_profile(const std::string& path);

/// The profile that lies with a model, which commands use unless told otherwise: twilight.json in
/// its folder, or FILE.gguf.twilight.json beside a GGUF file. Empty where there is none.
[[nodiscard]] std::string find_model_profile(const std::string& model);

/// What a policy of a profile prunes by: "p 0.85, dense layers 0".
[[nodiscard]] std::string profile_line(const SparsePolicy& policy);

/// Throws Error(kInvalidArgument) where the profile read from `path` is for another model or page
/// size.
void check_profile(const std::string& path, const Profile& profile, const ModelInfo& info,
                   std::int32_t page_size);

}  // namespace twilight::app

#endif  // TWILIGHT_APPS_PROFILE_H_
