#include "api_server/http/endpoints.h"

#include <fmt/core.h>

#include "api_server/openai/responses.h"
#include "common/check.h"

namespace wintserve {
namespace {

Reply JsonReply(std::string body) {
  Reply reply;
  reply.body = std::move(body);
  return reply;
}

Reply GetModel(const ServerContext& context, const std::string& id) {
  absl::StatusOr<std::string> body =
      ModelBody(id, *context.llm, context.options.model_names, context.started_seconds);
  return body.ok() ? JsonReply(*std::move(body)) : ErrorReply(ToApiError(body.status()));
}

Reply Health(const ServerContext& context) {
  const ReadinessReport report = context.llm->Readiness();
  return report.ready ? JsonReply(R"({"status":"ok"})") : NotReadyReply(report);
}

Reply Metrics(const ServerContext& context) {
  Reply reply;
  reply.content_type = "text/plain; version=0.0.4; charset=utf-8";
  reply.body = context.metrics.Text();
  return reply;
}

}  // namespace

Reply NotReadyReply(const ReadinessReport& report) {
  ApiError error;
  error.http_status = 503;
  error.code = "not_ready";
  error.message = fmt::format("The server is not ready: {}", report.reason);
  return ErrorReply(error);
}

Reply AnswerAtOnce(const ServerContext& context, const RouteMatch& match) {
  switch (match.route->action) {
    case Action::kListModels:
      return JsonReply(
          ModelListBody(*context.llm, context.options.model_names, context.started_seconds));
    case Action::kGetModel:
      return GetModel(context, match.id);
    case Action::kHealth:
      return Health(context);
    case Action::kLive:
      return JsonReply(R"({"status":"ok"})");
    case Action::kVersion:
      return JsonReply(R"({"version":")" WINTSERVE_VERSION R"("})");
    case Action::kMetrics:
      return Metrics(context);
    case Action::kChat:
    case Action::kCompletions:
    case Action::kResetPrefixCache:
      break;
  }
  CHECK(false, "{} takes a body", match.label());
  return Reply();
}

}  // namespace wintserve
