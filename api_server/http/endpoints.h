// The answers that need no generation.
#pragma once

#include "api_server/http/message.h"
#include "api_server/http/server_context.h"

namespace wintserve {

// REQUIRES: match.route != nullptr && !IsGeneration(match).
Reply AnswerWithoutGeneration(const ServerContext& context, const RouteMatch& match);

// 503 that says what is missing.
Reply NotReadyReply(const ReadinessReport& report);

}  // namespace wintserve
