#ifndef TWILIGHT_MODEL_GGUF_CONFIG_H_
#define TWILIGHT_MODEL_GGUF_CONFIG_H_

#include "model/config.h"
#include "model/gguf.h"

namespace twilight {

/// Configuration from the metadata and tensor list of a GGUF file; architectures "llama" (Llama and
/// Mistral), "qwen2" and "qwen3". Throws Error(kInvalidFile), or Error(kUnsupported) for what needs
/// another forward pass: `[gguf] path: key, got VALUE, accepted SET`.
[[nodiscard]] ModelConfig gguf_config(const GgufFile& file);

}  // namespace twilight

#endif  // TWILIGHT_MODEL_GGUF_CONFIG_H_
