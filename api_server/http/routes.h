// Which path means what, and the checks that need only a request's head.
#pragma once

#include <optional>
#include <string>
#include <string_view>

#include "api_server/http/auth.h"
#include "api_server/http/message.h"

namespace wintserve {

enum class Action {
  kChat,
  kCompletions,
  kListModels,
  kGetModel,
  kHealth,
  kLive,
  kVersion,
  kMetrics,
  kResetPrefixCache
};

// Which of the two sockets a client came in by.
enum class Port { kHttp, kHttpWithMetrics, kMetrics };

struct Route {
  const char* path;   // template, also the metrics label; a ":id" at its end matches the rest
  const char* allow;  // methods, as in the Allow header
  Action action;
  bool on_http_port;
  bool on_metrics_port;
};

struct RouteMatch {
  const Route* route = nullptr;  // null: no such path here
  std::string path;              // decoded, without query
  std::string id;                // what ":id" matched
  const char* label() const { return route == nullptr ? "unmatched" : route->path; }
};

// target: the request line's, percent-encoded, in origin or absolute form.
RouteMatch FindRoute(std::string_view target, Port port);

inline bool IsGeneration(const RouteMatch& match) {
  return match.route != nullptr &&
         (match.route->action == Action::kChat || match.route->action == Action::kCompletions);
}

// Its body is JSON.
inline bool TakesBody(const RouteMatch& match) {
  return IsGeneration(match) ||
         (match.route != nullptr && match.route->action == Action::kResetPrefixCache);
}

// What is wrong with the request as far as its head tells: Host, key, path, method, type
// of the body. Nothing: read the body and answer.
std::optional<Reply> CheckHead(const RequestHead& head, const RouteMatch& match,
                               const ApiKeys& keys);

}  // namespace wintserve
