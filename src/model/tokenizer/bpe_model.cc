#include "model/tokenizer/bpe_model.h"

#include <algorithm>
#include <cstdio>
#include <tuple>

#include "core/check.h"
#include "model/tokenizer/utf8.h"

namespace twilight {
namespace {

constexpr std::int32_t kNone = -1;
constexpr std::int32_t kGone = -2;

struct Candidate {
  std::int32_t rank;
  std::int32_t position;
  std::int32_t id;
  // Heap order: the lowest rank first, then the leftmost.
  bool operator<(const Candidate& other) const {
    return std::tie(rank, position) > std::tie(other.rank, other.position);
  }
};

}  // namespace

BpeModel::BpeModel(const JsonField& field, bool gaps_part_words)
    : gaps_part_words_(gaps_part_words) {
  if (field.has("type") && field.at("type").string() != "BPE") {
    field.at("type").unsupported("BPE");
  }
  for (const char* affix : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    if (field.has(affix) && !field.at(affix).string().empty()) {
      field.at(affix).unsupported("null or an empty string");
    }
  }
  if (field.has("dropout") && !(field.at("dropout").json() == 0)) {
    field.at("dropout").unsupported("null or 0");
  }
  fuse_unknown_ = field.boolean_or("fuse_unk", false);
  ignore_merges_ = field.boolean_or("ignore_merges", false);
  load_vocabulary(field.at("vocab"));
  load_merges(field.at("merges"));
  load_bytes(field);
  if (field.has("unk_token")) {
    unknown_ = find(field.at("unk_token").string());
    if (!unknown_) field.at("unk_token").reject("null or a token of the vocabulary");
  }
}

void BpeModel::load_vocabulary(const JsonField& field) {
  if (!field.json().is_object()) field.reject("an object of token: id");
  std::int32_t end = 0;
  for (const auto& [token, value] : field.json().items()) {
    if (!value.is_number_unsigned() ||
        value.get<std::uint64_t>() >= static_cast<std::uint64_t>(kMaxTokenId)) {
      field.at(token.c_str()).reject(cat("an integer in [0, ", kMaxTokenId, ")"));
    }
    end = std::max(end, static_cast<std::int32_t>(value.get<std::uint64_t>()) + 1);
  }
  tokens_.resize(static_cast<std::size_t>(end));
  ids_.reserve(field.json().size());
  std::vector<bool> taken(tokens_.size());
  for (const auto& [token, value] : field.json().items()) {
    const auto id = value.get<std::size_t>();
    if (taken[id]) {
      field.reject(cat("one token per id; id ", id, " is given twice"));
    }
    taken[id] = true;
    tokens_[id] = token;
    ids_.emplace(tokens_[id], static_cast<std::int32_t>(id));
  }
  short_characters_.fill(kNone);
  for (const auto& [token, id] : ids_) {
    if (token.empty() || utf8_length(token[0]) != token.size() || token.size() > 2) continue;
    short_characters_[decode_utf8(token.data())] = id;
  }
}

void BpeModel::load_merges(const JsonField& field) {
  const std::size_t count = field.array_size();
  if (count > 0x7FFFFFFF) field.reject("fewer than 2^31 merges");
  merges_.reserve(count);
  std::string joined;
  for (std::size_t rank = 0; rank < count; ++rank) {
    const nlohmann::json& merge = field.json()[rank];
    std::string_view left;
    std::string_view right;
    if (merge.is_string()) {
      const std::string_view both = merge.get_ref<const std::string&>();
      const std::size_t space = both.find(' ');
      if (space == std::string_view::npos || both.find(' ', space + 1) != std::string_view::npos) {
        field.element(rank).reject("two tokens with one space between");
      }
      left = both.substr(0, space);
      right = both.substr(space + 1);
    } else if (merge.is_array() && merge.size() == 2 && merge[0].is_string() &&
               merge[1].is_string()) {
      left = merge[0].get_ref<const std::string&>();
      right = merge[1].get_ref<const std::string&>();
    } else {
      field.element(rank).reject("\"a b\" or [\"a\", \"b\"]");
    }
    joined.assign(left).append(right);
    const auto left_id = find(left);
    const auto right_id = find(right);
    const auto id = find(joined);
    if (!left_id || !right_id || !id) {
      field.element(rank).reject(
          cat("tokens of the vocabulary, also joined; it lacks ",
              nlohmann::json(!left_id    ? std::string(left)
                             : !right_id ? std::string(right)
                                         : joined)
                  .dump(-1, ' ', true, nlohmann::json::error_handler_t::replace)));
    }
    // A pair given twice keeps its later rank, as in the reference implementation.
    merges_[pair_key(*left_id, *right_id)] = {static_cast<std::int32_t>(rank), *id};
  }
}

void BpeModel::load_bytes(const JsonField& field) {
  if (!field.boolean_or("byte_fallback", false)) return;
  byte_ids_.emplace();
  for (unsigned byte = 0; byte < 256; ++byte) {
    char name[8];
    (void)std::snprintf(name, sizeof name, "<0x%02X>", byte);
    (*byte_ids_)[byte] = find(name).value_or(kNone);
  }
}

std::optional<std::int32_t> BpeModel::find(std::string_view token) const {
  const auto found = ids_.find(token);
  if (found == ids_.end()) return std::nullopt;
  return found->second;
}

std::int32_t BpeModel::find_character(std::string_view character) const {
  if (character.size() <= 2) return short_characters_[decode_utf8(character.data())];
  return find(character).value_or(kNone);
}

void BpeModel::start_symbols(std::string_view word, std::vector<std::int32_t>& ids) const {
  bool unknown_pending = false;
  const auto flush_unknown = [&] {
    if (unknown_pending) ids.push_back(*unknown_);
    unknown_pending = false;
  };
  for (std::size_t at = 0; at < word.size();) {
    const std::string_view character = word.substr(at, utf8_length(word[at]));
    at += character.size();
    const std::int32_t id = find_character(character);
    if (id != kNone) {
      flush_unknown();
      ids.push_back(id);
      continue;
    }
    if (byte_ids_ && std::all_of(character.begin(), character.end(), [&](char c) {
          return (*byte_ids_)[static_cast<unsigned char>(c)] != kNone;
        })) {
      // A pending unknown token stays pending here, as in the reference implementation.
      for (char c : character) ids.push_back((*byte_ids_)[static_cast<unsigned char>(c)]);
      continue;
    }
    if (!unknown_) {  // a character without a token and without a stand-in is dropped
      if (gaps_part_words_) ids.push_back(kNone);
      continue;
    }
    if (!fuse_unknown_) flush_unknown();
    unknown_pending = true;
  }
  flush_unknown();
}

void BpeModel::merge(std::vector<std::int32_t>& ids, std::size_t from) const {
  const std::size_t count = ids.size() - from;
  if (count < 2) return;
  std::vector<Symbol> symbols(count);
  std::vector<Candidate> heap;
  heap.reserve(count);
  const auto consider = [&](std::int32_t left, std::int32_t right) {
    const auto found = merges_.find(pair_key(symbols[static_cast<std::size_t>(left)].id,
                                             symbols[static_cast<std::size_t>(right)].id));
    if (found == merges_.end()) return false;
    heap.push_back({found->second.rank, left, found->second.id});
    return true;
  };
  const auto last = static_cast<std::int32_t>(count) - 1;
  for (std::int32_t i = 0; i <= last; ++i) {
    symbols[static_cast<std::size_t>(i)] = {ids[from + static_cast<std::size_t>(i)], i - 1,
                                            i == last ? kNone : i + 1};
    if (i > 0) (void)consider(i - 1, i);
  }
  std::make_heap(heap.begin(), heap.end());
  while (!heap.empty()) {
    std::pop_heap(heap.begin(), heap.end());
    const Candidate top = heap.back();
    heap.pop_back();
    Symbol& left = symbols[static_cast<std::size_t>(top.position)];
    if (left.id == kGone || left.next == kNone) continue;
    Symbol& right = symbols[static_cast<std::size_t>(left.next)];
    // The entry is stale if either neighbour has changed since it was pushed.
    const auto found = merges_.find(pair_key(left.id, right.id));
    if (found == merges_.end() || found->second.id != top.id) continue;
    left.id = top.id;
    left.next = right.next;
    right.id = kGone;
    if (left.next != kNone) {
      symbols[static_cast<std::size_t>(left.next)].previous = top.position;
      if (consider(top.position, left.next)) std::push_heap(heap.begin(), heap.end());
    }
    if (left.previous != kNone && consider(left.previous, top.position)) {
      std::push_heap(heap.begin(), heap.end());
    }
  }
  ids.resize(from);
  for (std::int32_t i = 0; i != kNone; i = symbols[static_cast<std::size_t>(i)].next) {
    ids.push_back(symbols[static_cast<std::size_t>(i)].id);
  }
}

void BpeModel::encode_word(std::string_view word, std::vector<std::int32_t>& ids) const {
  if (ignore_merges_) {
    if (const auto whole = find(word)) {
      ids.push_back(*whole);
      return;
    }
  }
  const std::size_t from = ids.size();
  start_symbols(word, ids);
  merge(ids, from);
  if (gaps_part_words_) {
    ids.erase(std::remove(ids.begin() + static_cast<std::ptrdiff_t>(from), ids.end(), kNone),
              ids.end());
  }
}

}  // namespace twilight
