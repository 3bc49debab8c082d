#include "model/rope_config.h"

#include <cmath>
#include <numbers>
#include <optional>
#include <string>

#include "core/check.h"

namespace twilight {
namespace {

constexpr double kMaxTheta = 1e12;
constexpr double kMaxFactor = 1e4;
constexpr std::int64_t kMaxPositions = std::int64_t{1} << 24;
constexpr std::string_view kAcceptedTypes = "default, linear or llama3";

// `rope_type`, or its older name `type`; configs that carry both repeat the value.
std::optional<std::string> read_type(const JsonReader& fields) {
  const auto current = fields.string("rope_type");
  const auto older = fields.string("type");
  if (current && older && *current != *older) {
    fields.reject("type", cat("the same as rope_type, ", quote_name(*current)));
  }
  return current ? current : older;
}

void check_full_rotation(const JsonReader& fields) {
  if (fields.number_or("partial_rotary_factor", 0.0, 1.0, 1.0) != 1.0) {
    fields.reject("partial_rotary_factor", "1 (every dimension rotated)", ErrorCode::kUnsupported);
  }
}

void read_scaling(const JsonReader& fields, const std::string& type, RopeConfig& rope) {
  if (type == "default") {
    rope.scaling = RopeScaling::kDefault;
  } else if (type == "linear") {
    rope.scaling = RopeScaling::kLinear;
    rope.factor = fields.number("factor", 1.0, kMaxFactor);
  } else if (type == "llama3") {
    rope.scaling = RopeScaling::kLlama3;
    rope.factor = fields.number("factor", 1.0, kMaxFactor);
    rope.low_freq_factor = fields.number("low_freq_factor", 1e-6, 1e6);
    rope.high_freq_factor = fields.number("high_freq_factor", 1e-6, 1e6);
    if (rope.high_freq_factor <= rope.low_freq_factor) {
      fields.reject("high_freq_factor",
                    cat("a number greater than low_freq_factor, ", rope.low_freq_factor));
    }
    rope.original_max_positions =
        fields.integer("original_max_position_embeddings", 1, kMaxPositions);
  } else {
    fields.reject(fields.has("rope_type") ? "rope_type" : "type", kAcceptedTypes,
                  ErrorCode::kUnsupported);
  }
}

}  // namespace

std::string_view rope_scaling_name(RopeScaling scaling) {
  switch (scaling) {
    case RopeScaling::kDefault:
      return "default";
    case RopeScaling::kLinear:
      return "linear";
    case RopeScaling::kLlama3:
      return "llama3";
  }
  fail(ErrorCode::kInternal, "rope_scaling_name", "unknown value");
}

RopeConfig parse_rope_config(const JsonReader& config) {
  RopeConfig rope;
  rope.theta = config.number_or("rope_theta", 1.0 + 1e-9, kMaxTheta, rope.theta);
  check_full_rotation(config);
  if (config.has("rope_parameters")) {
    if (config.has("rope_scaling")) {
      config.reject("rope_scaling", "null beside rope_parameters");
    }
    const JsonReader fields = config.object("rope_parameters");
    check_full_rotation(fields);
    const double theta = fields.number_or("rope_theta", 1.0 + 1e-9, kMaxTheta, rope.theta);
    if (config.has("rope_theta") && theta != rope.theta) {
      config.reject("rope_theta", cat("the same as rope_parameters.rope_theta, ", theta));
    }
    rope.theta = theta;
    read_scaling(fields, read_type(fields).value_or("default"), rope);
  } else if (config.has("rope_scaling")) {
    const JsonReader fields = config.object("rope_scaling");
    check_full_rotation(fields);
    const auto type = read_type(fields);
    if (!type) fields.reject("rope_type", kAcceptedTypes);
    read_scaling(fields, *type, rope);
  }
  return rope;
}

std::vector<float> rope_inverse_frequencies(const RopeConfig& rope, int head_dim) {
  require(head_dim > 0 && head_dim % 2 == 0, "rope_inverse_frequencies", "head_dim, got ", head_dim,
          ", accepted a positive even number");
  std::vector<float> out(static_cast<std::size_t>(head_dim / 2));
  require(rope.divisors.empty() || rope.divisors.size() == out.size(), "rope_inverse_frequencies",
          "divisors, got ", rope.divisors.size(), ", accepted none or ", out.size());
  const auto original = static_cast<double>(rope.original_max_positions);
  for (std::size_t i = 0; i < out.size(); ++i) {
    double frequency = std::pow(rope.theta, -2.0 * static_cast<double>(i) / head_dim);
    if (rope.scaling == RopeScaling::kLinear) {
      frequency /= rope.factor;
    } else if (!rope.divisors.empty()) {
      frequency /= static_cast<double>(rope.divisors[i]);
    } else if (rope.scaling == RopeScaling::kLlama3) {
      const double turns = original * frequency / (2.0 * std::numbers::pi);
      if (turns < rope.low_freq_factor) {
        frequency /= rope.factor;
      } else if (turns <= rope.high_freq_factor) {
        const double keep =
            (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor);
        frequency = (1.0 - keep) * frequency / rope.factor + keep * frequency;
      }
    }
    out[i] = static_cast<float>(frequency);
  }
  return out;
}

}  // namespace twilight
