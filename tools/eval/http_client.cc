#include "tools/eval/http_client.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <optional>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/strip.h"
#include "common/json_depth.h"
#include "tools/text/error_text.h"

namespace wintserve::eval {
namespace {

using nlohmann::json;
using Clock = std::chrono::steady_clock;

constexpr int kLargestPauseSeconds = 30;
constexpr size_t kShownBytes = 200;     // of a body that is no message
constexpr size_t kMessageBytes = 2000;  // of a server's own message

// Discarded: no JSON, or so deep that who walks it might run out of stack.
json ParseAnswer(const std::string& body) {
  if (IsNestedTooDeep(body)) return json(json::value_t::discarded);
  return json::parse(body, nullptr, /*allow_exceptions=*/false);
}

// As OpenAI, vLLM, FastDeploy and FastAPI put it; else the body's beginning.
std::string MessageOf(const std::string& body) {
  const json value = ParseAnswer(body);
  if (value.is_object()) {
    const json error = value.value("error", json());
    for (const json* place : {&error, &value}) {
      if (place->is_string()) return tools::OneLine(place->get<std::string>(), kMessageBytes);
      if (!place->is_object()) continue;
      for (const char* name : {"message", "detail"}) {
        const auto found = place->find(name);
        if (found == place->end() || found->is_null()) continue;
        return tools::OneLine(found->is_string() ? found->get<std::string>() : found->dump(),
                              kMessageBytes);
      }
    }
  }
  return body.empty() ? "no message" : tools::OneLine(body, kShownBytes);
}

bool IsWorthRepeating(int status) {
  return status == 429 || status == 502 || status == 503 || status == 504;
}

absl::StatusCode CodeOf(int status) {
  switch (status) {
    case 400:
    case 422:
      return absl::StatusCode::kInvalidArgument;
    case 401:
    case 403:
      return absl::StatusCode::kPermissionDenied;
    case 404:
      return absl::StatusCode::kNotFound;
    default:
      return IsWorthRepeating(status) ? absl::StatusCode::kUnavailable
                                      : absl::StatusCode::kInternal;
  }
}

// Of "http://HOST", "http://HOST:PORT" and a path behind it, which begins at path_begin.
bool IsUrlOfServer(const std::string& url, size_t path_begin) {
  if (url.find_first_of("@?#\\ \t\r\n") != std::string::npos) return false;
  const size_t host_begin = url.find("//") + 2;
  const std::string host = url.substr(host_begin, path_begin - host_begin);
  const size_t colon = absl::EndsWith(host, "]") ? std::string::npos : host.rfind(':');
  if (colon == std::string::npos) return !host.empty();
  int port = 0;
  return colon > 0 && absl::SimpleAtoi(host.substr(colon + 1), &port) && port >= 1 && port <= 65535;
}

// Retry-After as a number of seconds; its other form, a date, is not understood.
std::optional<int> RetryAfterSeconds(const httplib::Response& response) {
  int seconds = 0;
  if (!absl::SimpleAtoi(response.get_header_value("Retry-After"), &seconds)) return std::nullopt;
  return std::max(0, seconds);
}

}  // namespace

absl::StatusOr<HttpClient> HttpClient::Create(const Endpoint& endpoint, StopFlag* stop) {
  Endpoint cleaned = endpoint;
  std::string& url = cleaned.url;
  while (absl::EndsWith(url, "/")) url.pop_back();
  url = std::string(absl::StripSuffix(url, "/v1"));
  const bool is_http = absl::StartsWith(url, "http://");
  if (!is_http && !absl::StartsWith(url, "https://")) {
    return absl::InvalidArgumentError(
        fmt::format("--server: must begin with http:// or https://, got '{}'", endpoint.url));
  }
  const size_t path_begin = std::min(url.find('/', is_http ? 7 : 8), url.size());
  auto client = std::make_unique<httplib::Client>(url.substr(0, path_begin));
  if (!IsUrlOfServer(url, path_begin) || !client->is_valid()) {
    return absl::InvalidArgumentError(fmt::format(
        "--server: '{}' is no URL of a server, as http://HOST:PORT/PATH; a key goes into --api-key",
        endpoint.url));
  }
  client->set_keep_alive(true);
  client->set_tcp_nodelay(true);
  client->set_connection_timeout(std::min(30, cleaned.timeout_seconds));
  client->set_read_timeout(cleaned.timeout_seconds);
  client->set_write_timeout(cleaned.timeout_seconds);
  if (!cleaned.api_key.empty()) client->set_bearer_token_auth(cleaned.api_key);
  std::string prefix = url.substr(path_begin);
  return HttpClient(std::move(cleaned), std::move(prefix), std::move(client), stop);
}

HttpClient::HttpClient(Endpoint endpoint, std::string prefix,
                       std::unique_ptr<httplib::Client> client, StopFlag* stop)
    : endpoint_(std::move(endpoint)),
      prefix_(std::move(prefix)),
      client_(std::move(client)),
      stop_(stop) {}

absl::StatusOr<json> HttpClient::Get(const std::string& path) { return Send("GET", path, ""); }

absl::StatusOr<json> HttpClient::Post(const std::string& path, const json& body) {
  return Send("POST", path, body.dump());
}

absl::StatusOr<json> HttpClient::Send(const char* method, const std::string& path,
                                      const std::string& body) {
  const auto deadline = Clock::now() + std::chrono::seconds(endpoint_.retry_seconds);
  const std::string what = fmt::format("{}{}", endpoint_.url, path);
  for (int pause_seconds = 1;; pause_seconds = std::min(kLargestPauseSeconds, 2 * pause_seconds)) {
    if (stop_->IsSet()) return absl::UnavailableError("stopped");
    httplib::Request request;
    request.method = method;
    request.path = prefix_ + path;
    request.body = body;
    if (!body.empty()) request.set_header("Content-Type", "application/json");
    std::string answer_body;
    request.content_receiver = [&](const char* bytes, size_t size, uint64_t, uint64_t) {
      answer_body.append(bytes, size);
      return answer_body.size() <= endpoint_.max_answer_bytes;
    };
    const httplib::Result result = client_->send(request);
    if (answer_body.size() > endpoint_.max_answer_bytes) {
      return absl::InternalError(
          fmt::format("{}: the answer has more than {} bytes", what, endpoint_.max_answer_bytes));
    }
    absl::Status status;
    int wait_seconds = pause_seconds;
    if (!result) {
      status = absl::UnavailableError(
          fmt::format("{}: no answer ({})", what, httplib::to_string(result.error())));
      if (!endpoint_.retry_connecting) return status;
    } else if (result->status == 200) {
      json answer = ParseAnswer(answer_body);
      if (answer.is_object()) return answer;
      return absl::InternalError(fmt::format(
          "{}: the answer is no JSON object{}: {}", what,
          IsNestedTooDeep(answer_body) ? fmt::format(" of at most {} levels", kMaxJsonDepth)
                                       : std::string(),
          answer_body.empty() ? "nothing" : tools::OneLine(answer_body, kShownBytes)));
    } else {
      status = absl::Status(
          CodeOf(result->status),
          fmt::format("{}: HTTP {}: {}", what, result->status, MessageOf(answer_body)));
      if (!IsWorthRepeating(result->status)) return status;
      wait_seconds = RetryAfterSeconds(*result).value_or(pause_seconds);
    }
    if (Clock::now() + std::chrono::seconds(wait_seconds) > deadline) return status;
    stop_->WaitFor(std::chrono::seconds(wait_seconds));
  }
}

}  // namespace wintserve::eval
