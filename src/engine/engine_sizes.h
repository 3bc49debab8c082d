#ifndef TWILIGHT_ENGINE_ENGINE_SIZES_H_
#define TWILIGHT_ENGINE_ENGINE_SIZES_H_

#include "twilight/device.h"
#include "twilight/engine.h"
#include "twilight/kv_cache.h"

/// What an engine's options come to on a device, for a model.
namespace twilight {

/// Fills in what is left to the engine, but for cache_tokens, and checks ranges. Throws
/// kInvalidArgument.
[[nodiscard]] EngineOptions settle(EngineOptions options, const Device& device,
                                   const ModelInfo& info);

/// Settles cache_tokens: every sequence at full length, or what fits a device whose free memory is
/// known. The model's weights and activations must be in place. Throws kOutOfMemory.
[[nodiscard]] EngineOptions size_cache(EngineOptions options, const Device& device,
                                       const ModelInfo& info);

/// The cache that settled options ask for.
[[nodiscard]] KvCacheOptions cache_options(const EngineOptions& options, const ModelInfo& info);

}  // namespace twilight

#endif  // TWILIGHT_ENGINE_ENGINE_SIZES_H_
