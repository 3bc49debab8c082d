#ifndef TWILIGHT_MODEL_ROPE_CONFIG_H_
#define TWILIGHT_MODEL_ROPE_CONFIG_H_

#include <cstdint>
#include <string_view>
#include <vector>

#include "model/json_reader.h"

namespace twilight {

/// How rotary frequencies are stretched for long contexts.
enum class RopeScaling { kDefault, kLinear, kLlama3 };

/// "default", "linear" or "llama3", as in config.json.
[[nodiscard]] std::string_view rope_scaling_name(RopeScaling scaling);

struct RopeConfig {
  RopeScaling scaling = RopeScaling::kDefault;
  double theta = 10000.0;  ///< base of the frequencies, > 1
  double factor = 1.0;     ///< kLinear, kLlama3: stretch of the (low) frequencies, >= 1
  double low_freq_factor =
      1.0;  ///< kLlama3: below this many turns in the original context, stretch
  double high_freq_factor =
      4.0;  ///< kLlama3: above this many turns, keep; greater than the low one
  std::int64_t original_max_positions = 0;  ///< kLlama3: context length before stretching, tokens
  /// kLlama3 of a GGUF file: what each frequency is divided by, [head_dim / 2], in place of the
  /// four values above. Empty otherwise.
  std::vector<float> divisors;
};

/// Reads `rope_theta` with `rope_scaling` (null or an object), or the newer `rope_parameters`
/// object that holds both, from the top level of a config.json. Throws Error(kInvalidFile) or
/// Error(kUnsupported) that names the field.
[[nodiscard]] RopeConfig parse_rope_config(const JsonReader& config);

/// Angle per position of each rotated pair, [head_dim / 2], radians per token, computed in double
/// and rounded once. `head_dim` is even and positive.
///   kDefault  theta^(-2i / D): RoFormer, Su et al., arXiv 2104.09864, section 3.2.2
///   kLinear   divided by `factor`: position interpolation, Chen et al., arXiv 2306.15595, equation
///   4 kLlama3   by wavelength: short ones kept, long ones divided by `factor`, a linear blend in
///   the
///             number of turns between: the Llama 3.1 reference model (Llama 3 herd of models,
///             arXiv 2407.21783, and its published code)
[[nodiscard]] std::vector<float> rope_inverse_frequencies(const RopeConfig& rope, int head_dim);

}  // namespace twilight

#endif  // TWILIGHT_MODEL_ROPE_CONFIG_H_
