#ifndef TWILIGHT_MODEL_EXPAND_WEIGHTS_H_
#define TWILIGHT_MODEL_EXPAND_WEIGHTS_H_

#include "core/buffer.h"
#include "core/thread_pool.h"
#include "model/tensor_view.h"

namespace twilight {

/// A quantised tensor's weights as f16, two bytes a weight, for backends whose products take no
/// blocks. Each weight is rounded once, to a relative 2^-11, well below a block's own step. Throws
/// Error(kUnsupported) for a weight beyond f16, naming its tensor, and Error(kOutOfMemory).
[[nodiscard]] Buffer expand_quantised(const TensorView& tensor, ThreadPool& pool);

}  // namespace twilight

#endif  // TWILIGHT_MODEL_EXPAND_WEIGHTS_H_
