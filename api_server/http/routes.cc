#include "api_server/http/routes.h"

#include <fmt/core.h>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_split.h"

namespace wintserve {
namespace {

constexpr Route kRoutes[] = {
    {"/v1/chat/completions", "POST", Action::kChat, true, false},
    {"/v1/completions", "POST", Action::kCompletions, true, false},
    {"/v1/models", "GET, HEAD", Action::kListModels, true, false},
    {"/v1/models/:id", "GET, HEAD", Action::kGetModel, true, false},
    {"/health", "GET, HEAD", Action::kHealth, true, false},
    {"/ready", "GET, HEAD", Action::kHealth, true, false},
    {"/ping", "GET, HEAD, POST", Action::kHealth, true, false},
    {"/live", "GET, HEAD", Action::kLive, true, false},
    {"/version", "GET, HEAD", Action::kVersion, true, false},
    {"/metrics", "GET, HEAD", Action::kMetrics, false, true},
    {"/reset_prefix_cache", "POST", Action::kResetPrefixCache, true, false},
};

constexpr std::string_view kIdPlaceholder = ":id";

absl::string_view AbslView(std::string_view text) { return {text.data(), text.size()}; }

int HexValue(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  return -1;
}

// A percent sign that starts no escape stays as it is.
std::string PercentDecoded(std::string_view text) {
  std::string decoded;
  for (size_t i = 0; i < text.size(); ++i) {
    const bool has_two_more = i + 2 < text.size();
    if (text[i] == '%' && has_two_more && HexValue(text[i + 1]) >= 0 &&
        HexValue(text[i + 2]) >= 0) {
      decoded += static_cast<char>(HexValue(text[i + 1]) * 16 + HexValue(text[i + 2]));
      i += 2;
    } else {
      decoded += text[i];
    }
  }
  return decoded;
}

// "http://host/path?query" or "/path?query" -> "/path".
std::string_view PathOf(std::string_view target) {
  const size_t scheme_end = target.find("://");
  if (scheme_end != std::string_view::npos && target.front() != '/') {
    const size_t path_begin = target.find('/', scheme_end + 3);
    target = path_begin == std::string_view::npos ? "/" : target.substr(path_begin);
  }
  return target.substr(0, target.find_first_of("?#"));
}

bool IsServedOn(const Route& route, Port port) {
  switch (port) {
    case Port::kHttp:
      return route.on_http_port;
    case Port::kMetrics:
      return route.on_metrics_port;
    case Port::kHttpWithMetrics:
      return true;
  }
  return false;
}

bool Matches(const Route& route, const std::string& path, std::string* id) {
  const std::string_view pattern = route.path;
  if (!absl::EndsWith(AbslView(pattern), AbslView(kIdPlaceholder))) return path == pattern;
  const std::string_view prefix = pattern.substr(0, pattern.size() - kIdPlaceholder.size());
  if (!absl::StartsWith(path, AbslView(prefix)) || path.size() == prefix.size()) return false;
  *id = path.substr(prefix.size());
  return true;
}

bool IsAllowed(const Route& route, const std::string& method) {
  for (const absl::string_view allowed : absl::StrSplit(route.allow, ", ")) {
    if (allowed == method) return true;
  }
  return false;
}

bool NeedsKey(const std::string& path) {
  return path == "/v1" || absl::StartsWith(path, "/v1/") || path == "/reset_prefix_cache";
}

bool IsJson(absl::string_view content_type) {
  const absl::string_view media_type =
      absl::StripAsciiWhitespace(content_type.substr(0, content_type.find(';')));
  return absl::EqualsIgnoreCase(media_type, "application/json");
}

Reply Unauthorized() {
  ApiError error;
  error.http_status = 401;
  error.type = "authentication_error";
  error.code = "invalid_api_key";
  error.message = "Authorization: expected \"Bearer KEY\" with a key of this server";
  return ErrorReply(error);
}

Reply MethodNotAllowed(const RequestHead& head, const RouteMatch& match) {
  Reply reply = ErrorReply(405, "method_not_allowed",
                           fmt::format("{} is not allowed on {}; allowed: {}", head.method,
                                       match.label(), match.route->allow));
  reply.headers.emplace_back("Allow", match.route->allow);
  return reply;
}

std::optional<Reply> CheckBodyType(const RequestHead& head) {
  if (!head.content_type.empty() && !IsJson(head.content_type)) {
    return ErrorReply(415, "unsupported_media_type",
                      fmt::format("Content-Type: must be application/json, got {}",
                                  head.content_type.substr(0, 128)));
  }
  if (!head.content_encoding.empty() &&
      !absl::EqualsIgnoreCase(head.content_encoding, "identity")) {
    return ErrorReply(415, "unsupported_media_type",
                      fmt::format("Content-Encoding: must be identity, got {}",
                                  head.content_encoding.substr(0, 128)));
  }
  return std::nullopt;
}

}  // namespace

RouteMatch FindRoute(std::string_view target, Port port) {
  RouteMatch match;
  match.path = PercentDecoded(PathOf(target));
  for (const Route& route : kRoutes) {
    if (!IsServedOn(route, port) || !Matches(route, match.path, &match.id)) continue;
    match.route = &route;
    break;
  }
  return match;
}

std::optional<Reply> CheckHead(const RequestHead& head, const RouteMatch& match,
                               const ApiKeys& keys) {
  if (head.version == 11 && !head.has_host) {
    return ErrorReply(400, "invalid_http", "an HTTP/1.1 request needs a Host header");
  }
  if (!keys.empty() && NeedsKey(match.path) && !keys.Accepts(head.authorization)) {
    return Unauthorized();
  }
  if (match.route == nullptr) {
    return ErrorReply(404, "not_found", fmt::format("no such path: {}", match.path.substr(0, 256)));
  }
  if (!IsAllowed(*match.route, head.method)) return MethodNotAllowed(head, match);
  if (!head.expect.empty() && !head.expects_continue) {
    return ErrorReply(417, "expectation_failed", "Expect: only 100-continue is understood");
  }
  if (TakesBody(match)) return CheckBodyType(head);
  return std::nullopt;
}

}  // namespace wintserve
