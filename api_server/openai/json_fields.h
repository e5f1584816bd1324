// Typed access to one JSON object of a request. Every error names the field, the value and what is
// allowed. Null is absent, as in OpenAI's and FastDeploy's servers.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"

namespace wintserve {

// The body as an object; the last of duplicate keys wins. INVALID_ARGUMENT with code invalid_json:
// not JSON, trailing text, NaN or Infinity, invalid UTF-8, nested too deep (common/json_depth.h),
// no object.
absl::StatusOr<nlohmann::json> ParseJsonObject(std::string_view body);

// Null pointer: absent or null. REQUIRES: object.is_object().
const nlohmann::json* FindField(const nlohmann::json& object, std::string_view name);

// The value as JSON, at most 64 bytes of it: for error messages.
std::string Quoted(const nlohmann::json& value);

// 5 and 5.0 are integers; 5.5, true and "5" are not.
std::optional<int64_t> AsInteger(const nlohmann::json& value);

absl::StatusOr<std::optional<int64_t>> ReadInteger(const nlohmann::json& object,
                                                   std::string_view name, int64_t min, int64_t max);
absl::StatusOr<std::optional<double>> ReadNumber(const nlohmann::json& object,
                                                 std::string_view name, double min, double max);
// Absent: false.
absl::StatusOr<bool> ReadBool(const nlohmann::json& object, std::string_view name,
                              std::string_view param_prefix = "");
// Absent: empty.
absl::StatusOr<std::string> ReadString(const nlohmann::json& object, std::string_view name);

}  // namespace wintserve
