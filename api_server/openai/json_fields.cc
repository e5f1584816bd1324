#include "api_server/openai/json_fields.h"

#include <fmt/core.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "api_server/openai/api_error.h"
#include "common/json_depth.h"

namespace wintserve {
namespace {

using nlohmann::json;

constexpr size_t kMaxQuotedBytes = 64;

absl::Status InvalidJson(std::string_view what) {
  return StatusWithCode(absl::StatusCode::kInvalidArgument, "invalid_json",
                        fmt::format("The request body is not a valid JSON object: {}", what));
}

// The library's text without its "[json.exception.parse_error.101] " in front.
std::string_view WithoutLibraryPrefix(std::string_view message) {
  const size_t end = message.find("] ");
  return end == std::string_view::npos ? message : message.substr(end + 2);
}

}  // namespace

absl::StatusOr<json> ParseJsonObject(std::string_view body) {
  if (IsNestedTooDeep(body)) {
    return InvalidJson(fmt::format("it is nested deeper than {} levels", kMaxJsonDepth));
  }
  json value;
  try {
    value = json::parse(body);
  } catch (const json::exception& error) {
    return InvalidJson(WithoutLibraryPrefix(error.what()));
  }
  if (!value.is_object()) {
    return InvalidJson(fmt::format("expected an object, got {}", Quoted(value)));
  }
  return value;
}

const json* FindField(const json& object, std::string_view name) {
  const auto it = object.find(name);
  return it == object.end() || it->is_null() ? nullptr : &*it;
}

std::string Quoted(const json& value) {
  std::string text = value.dump(-1, ' ', false, json::error_handler_t::replace);
  if (text.size() <= kMaxQuotedBytes) return text;
  size_t end = kMaxQuotedBytes;
  while (end > 0 && (static_cast<unsigned char>(text[end]) & 0xc0) == 0x80) --end;
  return text.substr(0, end) + "...";
}

std::optional<int64_t> AsInteger(const json& value) {
  if (value.is_number_unsigned()) {
    const auto number = value.get<uint64_t>();
    if (number > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) return std::nullopt;
    return static_cast<int64_t>(number);
  }
  if (value.is_number_integer()) return value.get<int64_t>();
  if (value.is_number_float()) {
    constexpr double kTwoTo63 = 9223372036854775808.0;
    const double number = value.get<double>();
    if (std::trunc(number) == number && number >= -kTwoTo63 && number < kTwoTo63) {
      return static_cast<int64_t>(number);
    }
  }
  return std::nullopt;
}

absl::StatusOr<std::optional<int64_t>> ReadInteger(const json& object, std::string_view name,
                                                   int64_t min, int64_t max) {
  const json* field = FindField(object, name);
  if (field == nullptr) return std::optional<int64_t>();
  const std::optional<int64_t> value = AsInteger(*field);
  if (value.has_value() && min <= *value && *value <= max) return value;
  return InvalidField(
      name, fmt::format("must be an integer from {} to {}, got {}", min, max, Quoted(*field)));
}

absl::StatusOr<std::optional<double>> ReadNumber(const json& object, std::string_view name,
                                                 double min, double max) {
  const json* field = FindField(object, name);
  if (field == nullptr) return std::optional<double>();
  if (field->is_number()) {
    const double value = field->get<double>();
    if (min <= value && value <= max) return std::optional<double>(value);
  }
  return InvalidField(
      name, fmt::format("must be a number from {} to {}, got {}", min, max, Quoted(*field)));
}

absl::StatusOr<bool> ReadBool(const json& object, std::string_view name,
                              std::string_view param_prefix) {
  const json* field = FindField(object, name);
  if (field == nullptr) return false;
  if (field->is_boolean()) return field->get<bool>();
  return InvalidField(fmt::format("{}{}", param_prefix, name),
                      fmt::format("must be true or false, got {}", Quoted(*field)));
}

absl::StatusOr<std::string> ReadString(const json& object, std::string_view name) {
  const json* field = FindField(object, name);
  if (field == nullptr) return std::string();
  if (field->is_string()) return field->get<std::string>();
  return InvalidField(name, fmt::format("must be a string, got {}", Quoted(*field)));
}

}  // namespace wintserve
