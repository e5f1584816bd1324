// POST /v1/chat/completions and /v1/completions.
#pragma once

#include <boost/asio/awaitable.hpp>
#include <string>
#include <utility>  // before Asio's coroutine header, which needs it

#include "api_server/http/connection.h"
#include "api_server/http/server_context.h"

namespace wintserve {

// How an exchange ended: for the log, the metrics and the connection's future.
struct Outcome {
  int status = 200;         // kStatusClientClosed: the client went away first
  bool keep_alive = false;  // the connection can take another request
};

// Answers one generation request whose body has been read. However it ends, nothing that it
// submitted goes on afterwards.
boost::asio::awaitable<Outcome> ServeGeneration(ServerContext& context, Connection& connection,
                                                const RequestHead& head, Endpoint endpoint,
                                                std::string body);

}  // namespace wintserve
