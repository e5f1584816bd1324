// The answers that are known at once.
#pragma once

#include "api_server/http/message.h"
#include "api_server/http/server_context.h"

namespace wintserve {

// REQUIRES: match.route != nullptr && !TakesBody(match).
Reply AnswerAtOnce(const ServerContext& context, const RouteMatch& match);

// 503 that says what is missing.
Reply NotReadyReply(const ReadinessReport& report);

}  // namespace wintserve
