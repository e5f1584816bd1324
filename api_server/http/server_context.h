// What every connection of one server shares.
#pragma once

#include <atomic>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/thread_pool.hpp>
#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <string>

#include "api_server/http/admission.h"
#include "api_server/http/auth.h"
#include "api_server/http/byte_budget.h"
#include "api_server/http/http_metrics.h"
#include "api_server/http/http_server.h"
#include "api_server/http/routes.h"
#include "common/log_limit.h"

namespace wintserve {

class Connection;

struct ServerContext {
  ServerContext(HttpOptions options_in, LLM* llm_in,
                std::shared_ptr<prometheus::Registry> registry);

  const HttpOptions options;
  LLM* const llm;
  const ApiKeys keys;
  const int64_t started_seconds;  // Unix time; "created" of the models
  HttpMetrics metrics;
  Admission admission;
  ByteBudget body_budget;
  boost::asio::thread_pool text_pool;
  // For calls that block on another process: however long they take, prompts are still encoded.
  boost::asio::thread_pool blocking_pool{1};
  std::atomic<bool> draining{false};  // connections close with their present answer
  LogLimit refusal_log;               // of connections for which there was no room
};

// False: this answer is the last on its connection. Asked when the answer's head is written, since
// the server may have begun to drain while it was made.
inline bool MayKeepAlive(const ServerContext& context, const RequestHead& head) {
  return head.keep_alive && !context.draining;
}

// Requests of different API keys share nothing in the cache.
inline bool IsolatesCacheByKey(const ServerContext& context) {
  return context.options.isolate_cache_by_key && !context.keys.empty();
}

// The salt of a request that asks for `cache_salt` (or none: empty).
inline std::string CacheSaltOf(const ServerContext& context, const RequestHead& head,
                               const std::string& cache_salt) {
  return IsolatesCacheByKey(context)
             ? SaltOfKey(context.keys.DigestOf(head.authorization), cache_salt)
             : cache_salt;
}

// One event loop and the connections that live on it. All but `io` is touched by its thread alone.
struct IoThread {
  boost::asio::io_context io{/*concurrency_hint=*/1};
  std::set<Connection*> connections;
  // Those of them that owe us bytes: the next request, the rest of one, or the close. By the time
  // since when, the longest first.
  std::map<uint64_t, Connection*> waiting;
  uint64_t num_waits = 0;  // so far: the key of the next
};

// Serves the requests of one socket until either side closes. The socket belongs to io_thread.io.
void StartSession(ServerContext& context, IoThread& io_thread, boost::asio::ip::tcp::socket socket,
                  Port port);

}  // namespace wintserve
