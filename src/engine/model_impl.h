#ifndef TWILIGHT_ENGINE_MODEL_IMPL_H_
#define TWILIGHT_ENGINE_MODEL_IMPL_H_

#include <memory>
#include <string>

#include "model/config.h"
#include "model/tokenizer/tokenizer.h"
#include "model/weights.h"
#include "twilight/engine.h"
#include "twilight/error.h"

namespace twilight {

struct Model::Impl {
  ModelConfig config;
  ModelWeights weights;
  std::unique_ptr<Tokenizer> tokenizer;  ///< null where the folder has none
  std::string no_tokenizer;              ///< why, for the error of `text_tokenizer`
  ModelInfo info;

  [[nodiscard]] const Tokenizer& text_tokenizer() const {
    if (tokenizer == nullptr) throw Error(ErrorCode::kNotFound, no_tokenizer);
    return *tokenizer;
  }
};

}  // namespace twilight

#endif  // TWILIGHT_ENGINE_MODEL_IMPL_H_
