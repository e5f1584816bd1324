#include "tools/text/records.h"

#include <fmt/format.h>

#include <cstdint>
#include <string_view>
#include <utility>

#include "common/json_depth.h"
#include "common/status_macros.h"
#include "tools/text/error_text.h"
#include "tools/text/line_reader.h"

namespace wintserve::tools {
namespace {

using nlohmann::json;

constexpr size_t kShownBytes = 60;

// A value as it stands in an error, cut where it is long.
std::string Shown(const json& value) {
  return OneLine(value.dump(-1, ' ', false, json::error_handler_t::replace), kShownBytes);
}

absl::StatusOr<json> ParseRecord(std::string_view line) {
  if (IsNestedTooDeep(line)) {
    return absl::InvalidArgumentError(fmt::format("nested deeper than {} levels", kMaxJsonDepth));
  }
  json record = json::parse(line, nullptr, /*allow_exceptions=*/false);
  if (!record.is_object()) {
    return absl::InvalidArgumentError(
        fmt::format("must be a JSON object in UTF-8, got {}",
                    Shown(record.is_discarded() ? json(line.substr(0, 2 * kShownBytes)) : record)));
  }
  return record;
}

}  // namespace

absl::Status ForEachRecord(const std::filesystem::path& path, TakeRecord take, size_t max_bytes) {
  ASSIGN_OR_RETURN(LineReader reader, LineReader::Open(path));
  std::string line;
  for (int64_t number = 1;; ++number) {
    ASSIGN_OR_RETURN(const bool has_line, reader.Next(max_bytes + 1, &line));
    if (!has_line) return absl::OkStatus();
    const std::string place = fmt::format("{}:{}", path.string(), number);
    if (line.size() > max_bytes && line.back() != '\n') {
      ASSIGN_OR_RETURN(const size_t rest, reader.SkipLine());
      return absl::InvalidArgumentError(fmt::format("{}: a line of {} bytes; allowed: up to {}",
                                                    place, line.size() + rest, max_bytes));
    }
    if (line.find_first_not_of(" \t\r\n") == std::string::npos) continue;
    if (line.back() == '\n') line.pop_back();
    const absl::StatusOr<json> record = ParseRecord(line);
    if (!record.ok()) return AtPlace(place, record.status());
    const absl::StatusOr<bool> goes_on = take(place, *record);
    if (!goes_on.ok()) return AtPlace(place, goes_on.status());
    if (!*goes_on) return absl::OkStatus();
  }
}

absl::Status WrongField(const std::string& field, std::string_view must, const json& got) {
  return absl::InvalidArgumentError(fmt::format("{}: must be {}, got {}", field, must, Shown(got)));
}

absl::StatusOr<const json*> Field(const json& object, const std::string& name) {
  const auto found = object.find(name);
  if (found == object.end()) {
    return absl::InvalidArgumentError(fmt::format("{}: is missing", name));
  }
  return &*found;
}

absl::StatusOr<std::string> Text(const json& value, const std::string& field) {
  if (!value.is_string()) return WrongField(field, "a text", value);
  return value.get<std::string>();
}

absl::StatusOr<std::string> TextField(const json& object, const std::string& name) {
  ASSIGN_OR_RETURN(const json* value, Field(object, name));
  return Text(*value, name);
}

absl::StatusOr<std::vector<ChatMessage>> MessagesField(const json& object) {
  ASSIGN_OR_RETURN(const json* list, Field(object, "messages"));
  if (!list->is_array() || list->empty())
    return WrongField("messages", "a list of messages", *list);
  std::vector<ChatMessage> messages;
  for (size_t i = 0; i < list->size(); ++i) {
    const json& message = (*list)[i];
    const std::string name = fmt::format("messages[{}]", i);
    if (!message.is_object()) return WrongField(name, "an object", message);
    for (const char* field : {"role", "content"}) {
      if (!message.contains(field)) {
        return absl::InvalidArgumentError(fmt::format("{}.{}: is missing", name, field));
      }
    }
    ASSIGN_OR_RETURN(std::string role, Text(message["role"], name + ".role"));
    ASSIGN_OR_RETURN(std::string content, Text(message["content"], name + ".content"));
    messages.push_back({std::move(role), std::move(content)});
  }
  return messages;
}

}  // namespace wintserve::tools
