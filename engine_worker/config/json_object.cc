#include "engine_worker/config/json_object.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <limits>

#include "common/json_depth.h"
#include "common/status_macros.h"

namespace wintserve {
namespace {

constexpr size_t kMaxShownValue = 80;
constexpr size_t kMaxShownError = 200;

// What the parser says, which quotes the file's own bytes.
std::string ShowParseError(std::string_view what) {
  what.remove_prefix(std::min(what.find("] ") + 2, what.size()));  // "[json.exception...] "
  std::string text(what.substr(0, kMaxShownError));
  std::replace_if(
      text.begin(), text.end(), [](char c) { return c < ' ' || c > '~'; }, '?');
  return text.size() < what.size() ? text + "..." : text;
}

const nlohmann::json& EmptyObject() {
  static const nlohmann::json* const empty = new nlohmann::json(nlohmann::json::object());
  return *empty;
}

}  // namespace

absl::StatusOr<nlohmann::json> ParseJsonObject(std::string_view text) {
  if (IsNestedTooDeep(text)) {
    return absl::InvalidArgumentError(fmt::format("nested deeper than {} levels", kMaxJsonDepth));
  }
  // The parser would take it for the end, and whatever follows for nothing.
  if (text.find('\0') != text.npos)
    return absl::InvalidArgumentError("not valid JSON: a zero byte");
  nlohmann::json root;
  try {
    root = nlohmann::json::parse(text.begin(), text.end());
  } catch (const nlohmann::json::exception& error) {
    return absl::InvalidArgumentError("not valid JSON: " + ShowParseError(error.what()));
  }
  if (!root.is_object()) return absl::InvalidArgumentError("not a JSON object");
  return root;
}

std::string ShowJson(const nlohmann::json& value) {
  std::string text = value.dump(-1, ' ', true, nlohmann::json::error_handler_t::replace);
  if (text.size() > kMaxShownValue) text = text.substr(0, kMaxShownValue) + "...";
  return text;
}

const nlohmann::json* JsonObject::Find(std::string_view key) const {
  const auto it = object_->find(key);
  return it == object_->end() || it->is_null() ? nullptr : &*it;
}

absl::Status JsonObject::Refuse(std::string_view key, std::string_view allowed) const {
  const nlohmann::json* value = Find(key);
  if (value == nullptr) {
    return absl::InvalidArgumentError(
        fmt::format("{}: {}{} is missing; allowed: {}", file_, path_, key, allowed));
  }
  return absl::InvalidArgumentError(
      fmt::format("{}: {}{} is {}; allowed: {}", file_, path_, key, ShowJson(*value), allowed));
}

absl::StatusOr<int> JsonObject::ToInt(std::string_view key, const nlohmann::json& value, int min,
                                      int max) const {
  const bool fits = value.is_number_unsigned()
                        ? value.get<uint64_t>() <= INT32_MAX
                        : value.is_number_integer() && value.get<int64_t>() >= INT32_MIN;
  if (!fits || value.get<int>() < min || value.get<int>() > max) {
    return Refuse(key, fmt::format("a whole number in {} to {}", min, max));
  }
  return value.get<int>();
}

absl::StatusOr<int> JsonObject::Int(std::string_view key, int min, int max) const {
  const nlohmann::json* value = Find(key);
  if (value == nullptr) return Refuse(key, fmt::format("a whole number in {} to {}", min, max));
  return ToInt(key, *value, min, max);
}

absl::StatusOr<int> JsonObject::IntOr(std::string_view key, int min, int max, int fallback) const {
  if (!Has(key)) return fallback;
  return Int(key, min, max);
}

absl::StatusOr<std::vector<int>> JsonObject::IntOrList(std::string_view key, int min,
                                                       int max) const {
  const nlohmann::json* value = Find(key);
  if (value == nullptr || !value->is_array()) {
    ASSIGN_OR_RETURN(const int number, Int(key, min, max));
    return std::vector<int>{number};
  }
  if (value->empty()) return Refuse(key, "a whole number or a list of at least one");
  std::vector<int> numbers;
  for (const nlohmann::json& element : *value) {
    ASSIGN_OR_RETURN(const int number, ToInt(key, element, min, max));
    numbers.push_back(number);
  }
  return numbers;
}

absl::StatusOr<float> JsonObject::PositiveFloat(std::string_view key) const {
  const nlohmann::json* value = Find(key);
  const double number = value != nullptr && value->is_number() ? value->get<double>() : 0;
  constexpr double kMax = std::numeric_limits<float>::max();
  if (!(number <= kMax && static_cast<float>(number) > 0)) {
    return Refuse(key, fmt::format("a number above 0 that a float32 holds, {:.3g} at most", kMax));
  }
  return static_cast<float>(number);
}

absl::StatusOr<float> JsonObject::PositiveFloatOr(std::string_view key, float fallback) const {
  if (!Has(key)) return fallback;
  return PositiveFloat(key);
}

absl::StatusOr<bool> JsonObject::BoolOr(std::string_view key, bool fallback) const {
  const nlohmann::json* value = Find(key);
  if (value == nullptr) return fallback;
  if (!value->is_boolean()) return Refuse(key, "true or false");
  return value->get<bool>();
}

absl::StatusOr<std::string> JsonObject::ChoiceOr(std::string_view key,
                                                 const std::vector<std::string>& allowed,
                                                 const std::string& fallback) const {
  const nlohmann::json* value = Find(key);
  if (value == nullptr) return fallback;
  if (!value->is_string() ||
      std::find(allowed.begin(), allowed.end(), value->get<std::string>()) == allowed.end()) {
    return Refuse(key, fmt::format("\"{}\"", fmt::join(allowed, "\", \"")));
  }
  return value->get<std::string>();
}

absl::StatusOr<JsonObject> JsonObject::ObjectOrEmpty(std::string_view key) const {
  const nlohmann::json* value = Find(key);
  if (value != nullptr && !value->is_object()) return Refuse(key, "an object");
  return JsonObject(value == nullptr ? EmptyObject() : *value, file_,
                    fmt::format("{}{}.", path_, key));
}

absl::StatusOr<std::string> JsonObject::FirstString(std::string_view key) const {
  const nlohmann::json* value = Find(key);
  if (value == nullptr || !value->is_array() || value->empty() || !value->front().is_string()) {
    return Refuse(key, "a list of names");
  }
  return value->front().get<std::string>();
}

}  // namespace wintserve
