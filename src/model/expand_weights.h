#ifndef TWILIGHT_MODEL_EXPAND_WEIGHTS_H_
#define TWILIGHT_MODEL_EXPAND_WEIGHTS_H_

#include "core/thread_pool.h"
#include "model/weights.h"

namespace twilight {

/// The same weights with every quantised tensor as f16 in memory of its own, two bytes a weight,
/// for backends whose products take no blocks. Each weight is rounded once, to a relative 2^-11,
/// well below a block's own step. Other tensors stay where they are. Throws Error(kUnsupported) for
/// a weight beyond f16, naming its tensor, and Error(kOutOfMemory).
[[nodiscard]] ModelWeights expand_quantised(const ModelWeights& weights, ThreadPool& pool);

}  // namespace twilight

#endif  // TWILIGHT_MODEL_EXPAND_WEIGHTS_H_
