#ifndef TWILIGHT_MODEL_TOKENIZER_BPE_MODEL_H_
#define TWILIGHT_MODEL_TOKENIZER_BPE_MODEL_H_

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "model/tokenizer/json_field.h"

namespace twilight {

/// Ids of a tokenizer.json lie in [0, kMaxTokenId).
inline constexpr std::int32_t kMaxTokenId = 1 << 22;

/// The `model` of tokenizer.json, type BPE: vocabulary and ranked merges. Immutable after
/// construction, safe to share between threads; not movable, since its tables point into it.
class BpeModel {
 public:
  /// With `gaps_part_words` a character that has no token still keeps its neighbours from merging
  /// (llama.cpp); without, it is as if it were not there.
  explicit BpeModel(const JsonField& field, bool gaps_part_words = false);
  BpeModel(const BpeModel&) = delete;
  BpeModel& operator=(const BpeModel&) = delete;

  /// Appends the tokens of one word of valid UTF-8. O(n log n) in its length.
  void encode_word(std::string_view word, std::vector<std::int32_t>& ids) const;

  [[nodiscard]] std::optional<std::int32_t> find(std::string_view token) const;
  /// Spelling by id, empty for ids that name no token. Its size is one more than the largest id.
  [[nodiscard]] const std::vector<std::string>& tokens() const { return tokens_; }

 private:
  struct Merge {
    std::int32_t rank;
    std::int32_t id;
  };
  // Part of a word in a doubly linked list; id kGone once it is merged into its left neighbour.
  struct Symbol {
    std::int32_t id;
    std::int32_t previous;
    std::int32_t next;
  };
  static std::uint64_t pair_key(std::int32_t left, std::int32_t right) {
    return static_cast<std::uint64_t>(left) << 32 | static_cast<std::uint32_t>(right);
  }

  void load_vocabulary(const JsonField& field);
  void load_merges(const JsonField& field);
  void load_bytes(const JsonField& field);
  void start_symbols(std::string_view word, std::vector<std::int32_t>& ids) const;
  void merge(std::vector<std::int32_t>& ids, std::size_t from) const;
  [[nodiscard]] std::int32_t find_character(std::string_view character) const;

  std::vector<std::string> tokens_;
  std::unordered_map<std::string_view, std::int32_t> ids_;  // keys point into tokens_
  std::unordered_map<std::uint64_t, Merge> merges_;
  std::array<std::int32_t, 0x800> short_characters_;       // by code point; kNone where absent
  std::optional<std::array<std::int32_t, 256>> byte_ids_;  // byte fallback; kNone where absent
  std::optional<std::int32_t> unknown_;
  bool fuse_unknown_ = false;
  bool ignore_merges_ = false;
  bool gaps_part_words_ = false;
};

}  // namespace twilight

#endif  // TWILIGHT_MODEL_TOKENIZER_BPE_MODEL_H_
