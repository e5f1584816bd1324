#include "api_server/openai/api_error.h"

#include <fmt/core.h>

#include <nlohmann/json.hpp>

#include "absl/strings/cord.h"

namespace wintserve {
namespace {

constexpr char kParamPayload[] = "param";
constexpr char kCodePayload[] = "code";

// Debian's absl keeps a string_view of its own.
absl::string_view AbslView(std::string_view text) { return {text.data(), text.size()}; }

std::optional<std::string> Payload(const absl::Status& status, const char* name) {
  const auto payload = status.GetPayload(name);
  if (!payload.has_value()) return std::nullopt;
  return std::string(*payload);
}

nlohmann::ordered_json OrNull(const std::optional<std::string>& text) {
  return text.has_value() ? nlohmann::ordered_json(*text) : nlohmann::ordered_json(nullptr);
}

struct HttpMeaning {
  int http_status;
  const char* type;
};

HttpMeaning MeaningOf(absl::StatusCode code) {
  switch (code) {
    case absl::StatusCode::kInvalidArgument:
      return {400, "invalid_request_error"};
    case absl::StatusCode::kUnauthenticated:
      return {401, "authentication_error"};
    case absl::StatusCode::kNotFound:
      return {404, "invalid_request_error"};
    case absl::StatusCode::kResourceExhausted:
      return {429, "rate_limit_error"};
    case absl::StatusCode::kUnavailable:
      return {503, "server_error"};
    case absl::StatusCode::kDeadlineExceeded:
      return {504, "timeout_error"};
    default:
      return {500, "server_error"};
  }
}

const char* DefaultCode(absl::StatusCode code) {
  switch (code) {
    case absl::StatusCode::kInvalidArgument:
      return "invalid_value";
    case absl::StatusCode::kResourceExhausted:
      return "rate_limit_exceeded";
    case absl::StatusCode::kUnavailable:
      return "service_unavailable";
    case absl::StatusCode::kDeadlineExceeded:
      return "timeout";
    default:
      return "internal_error";
  }
}

}  // namespace

absl::Status InvalidField(std::string_view param, std::string_view message, std::string_view code) {
  return StatusWithCode(absl::StatusCode::kInvalidArgument, code,
                        fmt::format("{}: {}", param, message), param);
}

absl::Status MissingField(std::string_view param) {
  return InvalidField(param, "Field required", "missing_required_parameter");
}

absl::Status StatusWithCode(absl::StatusCode status_code, std::string_view code,
                            std::string_view message, std::string_view param) {
  absl::Status status(status_code, AbslView(message));
  status.SetPayload(kCodePayload, absl::Cord(AbslView(code)));
  if (!param.empty()) status.SetPayload(kParamPayload, absl::Cord(AbslView(param)));
  return status;
}

ApiError ToApiError(const absl::Status& status) {
  const HttpMeaning meaning = MeaningOf(status.code());
  ApiError error;
  error.http_status = meaning.http_status;
  error.type = meaning.type;
  error.message = std::string(status.message());
  error.param = Payload(status, kParamPayload);
  error.code = Payload(status, kCodePayload).value_or(DefaultCode(status.code()));
  return error;
}

std::string ErrorBody(const ApiError& error) {
  const nlohmann::ordered_json body = {{"error",
                                        {{"message", error.message},
                                         {"type", error.type},
                                         {"param", OrNull(error.param)},
                                         {"code", OrNull(error.code)}}}};
  return body.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
}

}  // namespace wintserve
