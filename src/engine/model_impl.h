#ifndef TWILIGHT_ENGINE_MODEL_IMPL_H_
#define TWILIGHT_ENGINE_MODEL_IMPL_H_

#include <memory>
#include <optional>
#include <string>

#include "model/chat_template.h"
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
  std::optional<ChatTemplate> chat;      ///< empty where the checkpoint has none that is known
  std::string no_chat;                   ///< why, for the error of `chat_template`
  ModelInfo info;

  [[nodiscard]] const Tokenizer& text_tokenizer() const {
    if (tokenizer == nullptr) throw Error(ErrorCode::kNotFound, no_tokenizer);
    return *tokenizer;
  }

  /// The checkpoint's own template, or the one of that name.
  [[nodiscard]] ChatTemplate chat_template(std::string_view family) const;
};

}  // namespace twilight

#endif  // TWILIGHT_ENGINE_MODEL_IMPL_H_
