#include "model/tokenizer/json_field.h"

#include "core/check.h"

namespace twilight {
namespace {

constexpr std::size_t kShownBytes = 60;

}  // namespace

std::string JsonField::shown() const {
  if (value_->is_object()) return cat("an object of ", value_->size());
  if (value_->is_array()) return cat("an array of ", value_->size());
  std::string text = value_->dump(-1, ' ', true, nlohmann::json::error_handler_t::replace);
  if (text.size() > kShownBytes) text = text.substr(0, kShownBytes) + "...";
  return text;
}

void JsonField::reject(std::string_view accepted) const {
  fail(ErrorCode::kInvalidFile, *file_, "field ", path_.empty() ? "(root)" : path_, ", got ",
       shown(), ", accepted ", accepted);
}

void JsonField::unsupported(std::string_view accepted) const {
  fail(ErrorCode::kUnsupported, *file_, "field ", path_.empty() ? "(root)" : path_, ", got ",
       shown(), ", accepted ", accepted);
}

bool JsonField::has(const char* key) const {
  if (!value_->is_object()) reject("an object");
  const auto found = value_->find(key);
  return found != value_->end() && !found->is_null();
}

JsonField JsonField::at(const char* key) const {
  if (!value_->is_object()) reject("an object");
  const auto found = value_->find(key);
  if (found == value_->end()) reject(cat("an object with the key ", key));
  return {*found, *file_, path_.empty() ? key : cat(path_, '.', key)};
}

std::size_t JsonField::array_size() const {
  if (!value_->is_array()) reject("an array");
  return value_->size();
}

JsonField JsonField::element(std::size_t index) const {
  if (!value_->is_array() || index >= value_->size()) {
    reject(cat("an array of more than ", index, " elements"));
  }
  return {(*value_)[index], *file_, cat(path_, '[', index, ']')};
}

const std::string& JsonField::string() const {
  if (!value_->is_string()) reject("a string");
  return value_->get_ref<const std::string&>();
}

bool JsonField::boolean() const {
  if (!value_->is_boolean()) reject("true, false");
  return value_->get<bool>();
}

bool JsonField::boolean_or(const char* key, bool otherwise) const {
  return has(key) ? at(key).boolean() : otherwise;
}

std::int32_t JsonField::index_below(std::int32_t limit) const {
  if (!value_->is_number_unsigned() ||
      value_->get<std::uint64_t>() >= static_cast<std::uint64_t>(limit)) {
    reject(cat("an integer in [0, ", limit, ")"));
  }
  return static_cast<std::int32_t>(value_->get<std::uint64_t>());
}

}  // namespace twilight
