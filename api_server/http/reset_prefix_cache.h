// POST /reset_prefix_cache: what is cached now matches no later prompt.
#pragma once

#include <boost/asio/awaitable.hpp>
#include <string>
#include <utility>  // before Asio's coroutine header, which needs it

#include "api_server/http/message.h"
#include "api_server/http/server_context.h"

namespace wintserve {

// body: nothing or {}: all. {"cache_salt": "..."}: what requests with that salt share. Where the
// cache is isolated by key, nobody reaches what other keys have cached: a salt is that of the
// caller's key, as in its requests, and no salt is the salt of its requests without one. The answer
// is {"num_blocks": N}, the cached blocks that match no more; 503 when there is no cache manager.
boost::asio::awaitable<Reply> ResetPrefixCache(ServerContext& context, const RequestHead& head,
                                               const std::string& body);

}  // namespace wintserve
