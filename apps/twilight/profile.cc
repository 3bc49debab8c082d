#include "profile.h"

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <filesystem>
#include <system_error>
#include <type_traits>
#include <vector>

#include "paths.h"
#include "table.h"
#include "twilight/error.h"

namespace twilight::app {
namespace {

using Json = nlohmann::ordered_json;

constexpr const char* kFormat = "twilight profile 1";
constexpr const char* kModelProfile = "twilight.json";

// Every field of a policy but its name, in the order of the file.
template <typename Policy, typename Visit>
void visit_policy(Policy& policy, const Visit& visit) {
  visit("selector", policy.selector);
  if (policy.selector == "double_sparsity") {
    visit("num_labels", policy.num_labels);
    visit("labels", policy.labels);
  }
  visit("candidate_fraction", policy.candidate_fraction);
  visit("min_candidates", policy.min_candidates);
  visit("max_candidates", policy.max_candidates);
  visit("candidate_mass", policy.candidate_mass);
  visit("prune", policy.prune);
  visit("criterion", policy.criterion);
  visit("tail", policy.tail);
  visit("far_tail", policy.far_tail);
  visit("far_floor", policy.far_floor);
  visit("p", policy.p);
  visit("layer_p", policy.layer_p);
  visit("min_tokens", policy.min_tokens);
  visit("key_bits", policy.key_bits);
  visit("summary_bits", policy.summary_bits);
  visit("sink_tokens", policy.sink_tokens);
  visit("recent_pages", policy.recent_pages);
  visit("dense_layers", policy.dense_layers);
  visit("dense_below_tokens", policy.dense_below_tokens);
}

[[noreturn]] void refuse(const std::string& path, const std::string& what,
                         const std::string& accepted) {
  throw Error(ErrorCode::kInvalidArgument,
              "[--profile] " + what + " in " + path + ", accepted " + accepted);
}

// Single-precision numbers as the shortest decimals that read back to them: 0.85, not 0.8500000238.
template <typename Value>
Json written(const Value& value) {
  if constexpr (std::is_same_v<Value, float>) {
    char text[32];
    *std::to_chars(text, text + sizeof(text) - 1, value).ptr = '\0';
    return std::strtod(text, nullptr);
  } else if constexpr (std::is_same_v<Value, std::vector<float>>) {
    Json list = Json::array();
    for (const float each : value) list.push_back(written(each));
    return list;
  } else {
    return value;
  }
}

const Json& field(const Json& object, const char* name, const std::string& path) {
  if (!object.contains(name)) {
    refuse(path, std::string("field ") + name + ", got nothing", "a profile that calibrate wrote");
  }
  return object[name];
}

}  // namespace

Json profile_model(const ModelInfo& info) {
  return {{"architecture", info.architecture}, {"layers", info.num_layers},
          {"query_heads", info.num_q_heads},   {"kv_heads", info.num_kv_heads},
          {"head_dim", info.head_dim},         {"hidden_size", info.hidden_size},
          {"vocab_size", info.vocab_size},     {"parameters", info.parameters}};
}

Json policy_fields(const SparsePolicy& policy) {
  Json out;
  visit_policy(policy, [&](const char* name, const auto& value) { out[name] = written(value); });
  return out;
}

std::string profile_text(const Profile& profile, const Json& calibration) {
  Json out;
  out["format"] = kFormat;
  out["model"] = profile.model;
  out["page_size"] = profile.page_size;
  out["policy"] = policy_fields(profile.policy);
  out["calibration"] = calibration;
  return out.dump(2) + "\n";
}

Profile read_profile(const std::string& path) {
  const Json json = Json::parse(read_text(path), nullptr, /*allow_exceptions=*/false);
  if (!json.is_object() || !json.contains("format") || json["format"] != kFormat) {
    refuse(path, "format, got another kind of file",
           std::string("a file with \"format\": \"") + kFormat + "\"");
  }
  Profile out;
  out.model = field(json, "model", path);
  const Json& policy = field(json, "policy", path);
  if (!policy.is_object()) refuse(path, "policy, got " + policy.dump(), "an object");
  out.policy.name = "profile";
  std::size_t known = 0;
  const auto read = [&](const char* name, auto& value) {
    try {
      field(policy, name, path).get_to(value);
    } catch (const nlohmann::json::exception&) {
      refuse(path, std::string("policy.") + name + ", got " + policy[name].dump(),
             "a value of the kind that calibrate writes");
    }
    ++known;
  };
  visit_policy(out.policy, read);
  if (known != policy.size()) {
    for (const auto& [name, value] : policy.items()) {
      if (!policy_fields(out.policy).contains(name)) {
        refuse(path, "policy." + name + ", got " + value.dump(), "no such field");
      }
    }
  }
  const Json& page_size = field(json, "page_size", path);
  if (!page_size.is_number_integer() || page_size < 1 || page_size > 256) {
    refuse(path, "page_size, got " + page_size.dump(), "1 to 256");
  }
  page_size.get_to(out.page_size);
  try {
    validate_policy(out.policy);
  } catch (const Error& error) {
    throw Error(ErrorCode::kInvalidArgument,
                "[--profile] policy in " + path + " refused: " + error.what());
  }
  return out;
}

std::string find_model_profile(const std::string& model) {
  namespace fs = std::filesystem;
  std::error_code ignored;
  fs::path path = model;
  if (fs::is_directory(path, ignored)) {
    const fs::path in_folder = path / kModelProfile;
    if (fs::exists(in_folder, ignored)) return in_folder.string();
    if (fs::exists(path / "config.json", ignored)) return "";
    // The model may be the folder's one GGUF file.
    std::vector<fs::path> files;
    for (const auto& entry : fs::directory_iterator(path, ignored)) {
      if (entry.path().extension() == ".gguf") files.push_back(entry.path());
    }
    if (files.size() != 1) return "";
    path = files.front();
  }
  path += std::string(".") + kModelProfile;
  return fs::exists(path, ignored) ? path.string() : "";
}

std::string profile_line(const SparsePolicy& policy) {
  std::string out = "p " + digits3(static_cast<double>(policy.p));
  if (!policy.layer_p.empty()) {
    const auto [low, high] = std::minmax_element(policy.layer_p.begin(), policy.layer_p.end());
    out = "p " + digits3(static_cast<double>(*low)) + " to " + digits3(static_cast<double>(*high)) +
          " by layer";
  }
  return out + ", dense layers " + std::to_string(policy.dense_layers);
}

void check_profile(const std::string& path, const Profile& profile, const ModelInfo& info,
                   std::int32_t page_size) {
  const Json ours = profile_model(info);
  for (const auto& [name, value] : ours.items()) {
    const Json theirs = profile.model.is_object() && profile.model.contains(name)
                            ? profile.model[name]
                            : Json("nothing");
    if (theirs != value) {
      std::string message = "[--profile] model, got ";
      message.append(name).append(" ").append(value.dump());
      message.append(", accepted ").append(theirs.dump());
      message.append(" as ").append(path).append(" was calibrated on");
      throw Error(ErrorCode::kInvalidArgument, message);
    }
  }
  const std::int64_t channels =
      std::int64_t{info.num_layers} * info.num_kv_heads * profile.policy.num_labels;
  if (profile.policy.selector == "double_sparsity" &&
      std::ssize(profile.policy.labels) != channels) {
    throw Error(ErrorCode::kInvalidArgument, "[--profile] policy.labels, got " +
                                                 std::to_string(profile.policy.labels.size()) +
                                                 " channels in " + path + ", accepted " +
                                                 std::to_string(channels) + " for this model");
  }
  if (profile.page_size != page_size) {
    throw Error(ErrorCode::kInvalidArgument, "[--profile] page size, got --page-size " +
                                                 std::to_string(page_size) + ", accepted " +
                                                 std::to_string(profile.page_size) + " as " + path +
                                                 " was calibrated with");
  }
}

}  // namespace twilight::app
