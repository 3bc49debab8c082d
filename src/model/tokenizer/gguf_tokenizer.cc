#include "model/tokenizer/gguf_tokenizer.h"

#include <nlohmann/json.hpp>
#include <unordered_map>
#include <utility>

#include "core/check.h"
#include "model/gguf_scalar.h"
#include "model/json_reader.h"
#include "model/tokenizer/bpe_tokenizer.h"
#include "model/tokenizer/gguf_pre_tokenizers.h"
#include "model/tokenizer/score_tokenizer.h"
#include "model/tokenizer/utf8.h"

namespace twilight {
namespace {

using Json = nlohmann::json;

constexpr std::string_view kModelKey = "tokenizer.ggml.model";
constexpr std::string_view kPreKey = "tokenizer.ggml.pre";
constexpr std::string_view kTokensKey = "tokenizer.ggml.tokens";
constexpr std::string_view kTypesKey = "tokenizer.ggml.token_type";
constexpr std::string_view kScoresKey = "tokenizer.ggml.scores";
constexpr std::string_view kMergesKey = "tokenizer.ggml.merges";

struct Vocabulary {
  std::vector<std::string_view> tokens;
  std::vector<std::int32_t> types;
};

Vocabulary read_vocabulary(const GgufFile& file) {
  Vocabulary out;
  out.tokens = file.strings(kTokensKey);
  if (out.tokens.empty() || out.tokens.size() > static_cast<std::size_t>(kMaxScoreTokens)) {
    file.reject(kTokensKey, cat("1 to ", kMaxScoreTokens, " strings"));
  }
  for (std::size_t i = 0; i < out.tokens.size(); ++i) {
    if (!is_valid_utf8(out.tokens[i])) {
      fail(ErrorCode::kInvalidFile, kGgufWhere, file.path(), ": ", kTokensKey, '[', i, "], got ",
           quote_name(out.tokens[i]), ", accepted UTF-8");
    }
  }
  out.types = file.integers(kTypesKey, 0, 6);
  if (out.types.empty() && !file.has(kTypesKey)) {
    out.types.assign(out.tokens.size(), static_cast<std::int32_t>(PieceType::kNormal));
  }
  if (out.types.size() != out.tokens.size()) {
    file.reject(kTypesKey, cat("an array of ", out.tokens.size(), ", one for each token"));
  }
  return out;
}

const GgufPreTokenizer& read_pre_tokenizer(const GgufFile& file) {
  const auto name = file.string(kPreKey).value_or("default");
  const GgufPreTokenizer* found = find_gguf_pre_tokenizer(name);
  if (found == nullptr) file.unsupported(kPreKey, gguf_pre_tokenizer_names());
  return *found;
}

std::unique_ptr<Tokenizer> load_bpe(const GgufFile& file, std::optional<std::int32_t> bos_id) {
  const Vocabulary vocabulary = read_vocabulary(file);
  const GgufPreTokenizer& pre = read_pre_tokenizer(file);
  // Of a spelling given twice the last token counts.
  std::unordered_map<std::string_view, std::int32_t> ids;
  for (std::size_t i = 0; i < vocabulary.tokens.size(); ++i) {
    if (!vocabulary.tokens[i].empty()) {
      ids[vocabulary.tokens[i]] = static_cast<std::int32_t>(i);
    }
  }
  Json vocab = Json::object();
  Json added = Json::array();
  for (const auto& [token, id] : ids) {
    vocab[std::string(token)] = static_cast<std::uint32_t>(id);
    const auto type = static_cast<PieceType>(vocabulary.types[static_cast<std::size_t>(id)]);
    if (!is_special_piece(type)) continue;
    added.push_back({{"content", std::string(token)},
                     {"id", static_cast<std::uint32_t>(id)},
                     {"special", true},
                     {"normalized", false}});
  }
  Json merges = Json::array();
  for (const std::string_view merge : file.strings(kMergesKey)) {
    merges.push_back(std::string(merge));
  }
  Json steps = Json::array();
  for (const std::string_view pattern : pre.patterns) {
    steps.push_back({{"type", "Split"},
                     {"pattern", {{"Regex", std::string(pattern)}}},
                     {"behavior", "Isolated"}});
  }
  steps.push_back({{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", false}});
  Json document = {{"pre_tokenizer", {{"type", "Sequence"}, {"pretokenizers", std::move(steps)}}},
                   {"decoder", {{"type", "ByteLevel"}}},
                   {"added_tokens", std::move(added)}};
  document["model"] = {{"ignore_merges", pre.ignore_merges}};
  document["model"]["vocab"] = std::move(vocab);
  document["model"]["merges"] = std::move(merges);
  return make_bpe_tokenizer(document, file.path(), "tokenizer.ggml", true, bos_id);
}

std::unique_ptr<Tokenizer> load_scores(const GgufFile& file, std::optional<std::int32_t> bos_id) {
  const Vocabulary vocabulary = read_vocabulary(file);
  const std::vector<float> scores = file.floats(kScoresKey);
  if (scores.size() != vocabulary.tokens.size()) {
    file.reject(kScoresKey,
                cat("an array of ", vocabulary.tokens.size(), " floats, one for each token"));
  }
  std::vector<ScorePiece> pieces;
  pieces.reserve(scores.size());
  for (std::size_t i = 0; i < scores.size(); ++i) {
    if (scores[i] != scores[i]) file.reject(kScoresKey, "numbers");
    pieces.push_back({std::string(vocabulary.tokens[i]), scores[i],
                      static_cast<PieceType>(vocabulary.types[i])});
  }
  ScoreOptions options;
  options.space_prefix = file.boolean_or("tokenizer.ggml.add_space_prefix", true);
  options.unknown = static_cast<std::int32_t>(file.integer_or(
      "tokenizer.ggml.unknown_token_id", 0, static_cast<std::int64_t>(scores.size()) - 1, 0));
  return make_score_tokenizer(std::move(pieces), options, file.path(), bos_id);
}

}  // namespace

std::unique_ptr<Tokenizer> load_gguf_tokenizer(const GgufFile& file,
                                               std::optional<std::int32_t> bos_id) {
  const auto model = file.string(kModelKey);
  if (!model || *model == "none" || *model == "no_vocab") {
    fail(ErrorCode::kNotFound, kGgufWhere, file.path(), ": ", kModelKey,
         ", got nothing, accepted gpt2 or llama");
  }
  if (*model == "gpt2") return load_bpe(file, bos_id);
  if (*model == "llama") return load_scores(file, bos_id);
  file.unsupported(kModelKey, "gpt2 or llama");
}

bool gguf_adds_bos(const GgufFile& file) {
  bool missing = true;
  if (file.string(kModelKey).value_or("") == "gpt2") missing = read_pre_tokenizer(file).add_bos;
  return file.boolean_or("tokenizer.ggml.add_bos_token", missing);
}

}  // namespace twilight
