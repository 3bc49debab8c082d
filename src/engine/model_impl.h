#ifndef TWILIGHT_ENGINE_MODEL_IMPL_H_
#define TWILIGHT_ENGINE_MODEL_IMPL_H_

#include <memory>

#include "model/config.h"
#include "model/tokenizer/tokenizer.h"
#include "model/weights.h"
#include "twilight/engine.h"

namespace twilight {

struct Model::Impl {
  ModelConfig config;
  ModelWeights weights;
  std::unique_ptr<Tokenizer> tokenizer;
  ModelInfo info;
};

}  // namespace twilight

#endif  // TWILIGHT_ENGINE_MODEL_IMPL_H_
