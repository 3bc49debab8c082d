#include "inspect_record.h"

namespace twilight::app {
namespace {

// Column `index` of a step-major table of `width` columns.
template <typename T>
std::vector<T> column(const std::vector<T>& table, std::int32_t width, std::int32_t index) {
  std::vector<T> out;
  for (auto i = static_cast<std::size_t>(index); i < table.size();
       i += static_cast<std::size_t>(width)) {
    out.push_back(table[i]);
  }
  return out;
}

template <typename T>
void append(std::vector<T>& to, const std::vector<T>& from) {
  to.insert(to.end(), from.begin(), from.end());
}

}  // namespace

void record_step(const Engine& engine, InspectData& data) {
  data.layers.resize(static_cast<std::size_t>(engine.model().info().num_layers));
  for (std::size_t i = 0; i < data.layers.size(); ++i) {
    for (const LayerStats& stats : engine.last_stats(static_cast<std::int32_t>(i)).first(1)) {
      InspectLayer& layer = data.layers[i];
      layer.path.push_back(stats.path);
      layer.tokens.push_back(stats.num_tokens);
      append(layer.kept, stats.kept);
      append(layer.estimated_mass, stats.estimated_mass);
      append(layer.true_mass, stats.true_mass);
      append(layer.candidates, stats.candidates);
      append(layer.attended, stats.attended);
    }
  }
}

nlohmann::ordered_json layers_json(const InspectData& data) {
  const std::int32_t group = std::max(data.q_heads / std::max(data.kv_heads, 1), 1);
  nlohmann::ordered_json out = nlohmann::ordered_json::array();
  for (std::size_t i = 0; i < data.layers.size(); ++i) {
    const InspectLayer& layer = data.layers[i];
    nlohmann::ordered_json entry;
    entry["layer"] = i;
    entry["path"] = nlohmann::ordered_json::array();
    for (const StepPath path : layer.path) entry["path"].push_back(step_path_name(path));
    entry["tokens"] = layer.tokens;
    entry["heads"] = nlohmann::ordered_json::array();
    for (std::int32_t head = 0; head < data.q_heads; ++head) {
      nlohmann::ordered_json one;
      one["head"] = head;
      one["kv_head"] = head / group;
      one["kept"] = column(layer.kept, data.q_heads, head);
      one["estimated_mass"] = column(layer.estimated_mass, data.q_heads, head);
      if (!layer.true_mass.empty()) one["true_mass"] = column(layer.true_mass, data.q_heads, head);
      entry["heads"].push_back(std::move(one));
    }
    entry["kv_heads"] = nlohmann::ordered_json::array();
    for (std::int32_t head = 0; head < data.kv_heads; ++head) {
      entry["kv_heads"].push_back({{"kv_head", head},
                                   {"union", column(layer.attended, data.kv_heads, head)},
                                   {"candidates", column(layer.candidates, data.kv_heads, head)}});
    }
    out.push_back(std::move(entry));
  }
  return out;
}

}  // namespace twilight::app
