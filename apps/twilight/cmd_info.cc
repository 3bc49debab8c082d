#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>

#include "commands.h"
#include "flags.h"
#include "model_json.h"
#include "profile.h"
#include "twilight/kv_cache.h"

namespace twilight::app {
namespace {

struct InfoFlags {
  CommonFlags common;
  std::string model;
};

int run_info(const InfoFlags& flags) {
  const Device device(flags.common.device);
  nlohmann::ordered_json report;
  report["version"] = TWILIGHT_VERSION;
  report["device"] = device.description();
  report["devices"] = nlohmann::ordered_json::object();
  for (const DeviceLine& line : list_devices()) report["devices"][line.name] = line.description;
  report["presets"] = policy_names();
  if (!flags.model.empty()) {
    const Model model = load_model(flags.model, flags.common);
    const ModelInfo& info = model.info();
    KvCacheOptions cache;
    cache.num_layers = info.num_layers;
    cache.num_kv_heads = info.num_kv_heads;
    cache.head_dim = info.head_dim;
    cache.num_pages = 1;
    const auto bytes_per_token = [&](const char* preset) {
      return KvCache(device, cache, make_policy(preset)).bytes_per_page() / cache.page_size;
    };
    report["model"] = {{"path", info.path},
                       {"architecture", info.architecture},
                       {"layers", info.num_layers},
                       {"hidden_size", info.hidden_size},
                       {"intermediate_size", info.intermediate_size},
                       {"query_heads", info.num_q_heads},
                       {"kv_heads", info.num_kv_heads},
                       {"head_dim", info.head_dim},
                       {"vocab_size", info.vocab_size},
                       {"rope", info.rope},
                       {"rope_theta", info.rope_theta},
                       {"parameters", info.parameters},
                       {"weight_bytes", info.weight_bytes},
                       {"tied_embeddings", info.tied_embeddings},
                       {"kv_bytes_per_token", bytes_per_token("dense")},
                       {"kv_and_index_bytes_per_token", bytes_per_token("adaptive")}};
    report["model"].update(format_json(info, device));
    if (const std::string path = find_model_profile(flags.model); !path.empty()) {
      const Profile profile = read_profile(path);
      check_profile(path, profile, info, profile.page_size);
      report["model"]["profile"] = path;
      report["model"]["attention"] = profile_line(profile.policy);
    }
  }
  if (flags.common.json) {
    std::printf("%s\n", report.dump(2).c_str());
    return 0;
  }
  const auto text = [](const nlohmann::ordered_json& value) {
    if (value.is_null()) return std::string("none");
    return value.is_string() ? value.get<std::string>() : value.dump();
  };
  for (const auto& [key, value] : report.items()) {
    if (value.is_object()) {
      std::printf("%s\n", key.c_str());
      for (const auto& [name, entry] : value.items()) {
        if (!entry.is_array()) std::printf("  %-30s %s\n", name.c_str(), text(entry).c_str());
        if (name != "weight_types") continue;
        for (const auto& type : entry) {
          std::printf("  %-30s %s\n", "weights", weight_type_line(type).c_str());
        }
      }
    } else if (value.is_array()) {
      std::string joined;
      for (const auto& entry : value) joined += (joined.empty() ? "" : ", ") + text(entry);
      std::printf("%-32s %s\n", key.c_str(), joined.c_str());
    } else {
      std::printf("%-32s %s\n", key.c_str(), text(value).c_str());
    }
  }
  return 0;
}

}  // namespace

void add_info(CLI::App& app, Action& action) {
  auto flags = std::make_shared<InfoFlags>();
  CLI::App* command = app.add_subcommand("info", "What this build, machine and model are");
  command->footer("Example: twilight info --model models/vesper-19m");
  flags->common.add(*command);
  command->add_option("--model", flags->model, "Checkpoint folder or GGUF file to describe");
  command->callback([flags, &action] { action = [flags] { return run_info(*flags); }; });
}

}  // namespace twilight::app
