// The one error shape of every endpoint, and the Status that carries it through the rooms.
#pragma once

#include <optional>
#include <string>
#include <string_view>

#include "absl/status/status.h"

namespace wintserve {

// {"error": {"message", "type", "param", "code"}} and the HTTP status it travels with.
struct ApiError {
  int http_status = 500;
  std::string message;
  std::string type = "server_error";
  std::optional<std::string> param;  // path of the field: "messages[1].content"
  std::optional<std::string> code;
};

// A refused request field: INVALID_ARGUMENT that remembers param and code, so that ToApiError can
// give them back after any number of RETURN_IF_ERRORs. The message becomes "param: message".
absl::Status InvalidField(std::string_view param, std::string_view message,
                          std::string_view code = "invalid_value");
absl::Status MissingField(std::string_view param);

// Any status with an OpenAI code: (NOT_FOUND, "model_not_found", …). Empty param: none.
absl::Status StatusWithCode(absl::StatusCode status_code, std::string_view code,
                            std::string_view message, std::string_view param = "");

// INVALID_ARGUMENT 400, UNAUTHENTICATED 401, NOT_FOUND 404, RESOURCE_EXHAUSTED 429, UNAVAILABLE
// 503, DEADLINE_EXCEEDED 504, everything else 500. The message is the status's own.
ApiError ToApiError(const absl::Status& status);

// The JSON body. Invalid UTF-8 in the message (a client's bytes, quoted) becomes U+FFFD.
std::string ErrorBody(const ApiError& error);

}  // namespace wintserve
