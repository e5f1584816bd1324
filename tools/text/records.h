// JSONL files: a JSON object a line.
#pragma once

#include <cstddef>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/statusor.h"
#include "api_server/text/chat_template.h"

namespace wintserve::tools {

// Of a line. Far beyond a long book; a file without newlines is found before it fills the memory.
inline constexpr size_t kMaxRecordBytes = 16 << 20;

// Calls take(place, record) with the object of each line, and its place as "FILE:LINE", until it
// returns false. Blank lines are skipped.
// Errors: NOT_FOUND or what else errno says of the file; INVALID_ARGUMENT "FILE:LINE: …" for a line
// that is no object, nested too deep or longer than max_bytes; what `take` returns, with the place
// put in front.
using TakeRecord =
    absl::FunctionRef<absl::StatusOr<bool>(const std::string& place, const nlohmann::json& record)>;
absl::Status ForEachRecord(const std::filesystem::path& path, TakeRecord take,
                           size_t max_bytes = kMaxRecordBytes);

// The errors of these name a field and what it holds: INVALID_ARGUMENT "FIELD: …".
absl::Status WrongField(const std::string& field, std::string_view must, const nlohmann::json& got);
// The pointer is into `object`.
absl::StatusOr<const nlohmann::json*> Field(const nlohmann::json& object, const std::string& name);
absl::StatusOr<std::string> Text(const nlohmann::json& value, const std::string& field);
absl::StatusOr<std::string> TextField(const nlohmann::json& object, const std::string& name);
// "messages": [{"role": …, "content": …}, …], at least one. Whether a template knows the roles is
// not asked.
absl::StatusOr<std::vector<ChatMessage>> MessagesField(const nlohmann::json& object);

}  // namespace wintserve::tools
