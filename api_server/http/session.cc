#include <algorithm>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/this_coro.hpp>
#include <boost/beast/http/error.hpp>
#include <chrono>
#include <exception>
#include <utility>  // before Asio's coroutine header, which needs it

#include "api_server/http/connection.h"
#include "api_server/http/endpoints.h"
#include "api_server/http/generation.h"
#include "api_server/http/request_head.h"
#include "api_server/http/reset_prefix_cache.h"
#include "api_server/http/server_context.h"
#include "common/log.h"

namespace wintserve {
namespace {

namespace net = boost::asio;
namespace http = boost::beast::http;
using boost::system::error_code;
using net::awaitable;

// Keeps a connection in its thread's list, so that the server can close it.
class Registration {
 public:
  Registration(std::set<Connection*>* connections, Connection* connection)
      : connections_(connections), connection_(connection) {
    connections_->insert(connection_);
  }
  ~Registration() { connections_->erase(connection_); }
  Registration(const Registration&) = delete;
  Registration& operator=(const Registration&) = delete;

 private:
  std::set<Connection*>* const connections_;
  Connection* const connection_;
};

// Marks a connection as one that waits for its client and may be closed for another one's sake.
class Wait {
 public:
  Wait(IoThread* io_thread, Connection* connection)
      : io_thread_(io_thread), key_(io_thread->num_waits++) {
    io_thread_->waiting.emplace(key_, connection);
  }
  ~Wait() { io_thread_->waiting.erase(key_); }
  Wait(const Wait&) = delete;
  Wait& operator=(const Wait&) = delete;

 private:
  IoThread* const io_thread_;
  const uint64_t key_;
};

class Session {
 public:
  Session(ServerContext& context, IoThread& io_thread, Connection& connection, Port port)
      : context_(context), io_thread_(io_thread), connection_(connection), port_(port) {}

  awaitable<void> Run() {
    // A stream's head may have promised more before the drain began; hence the second look.
    while (!context_.draining) {
      wait_.emplace(&io_thread_, &connection_);
      const bool has_request = co_await connection_.WaitForRequest();
      if (!has_request) break;
      const bool keep_alive = co_await ServeOneRequest();
      if (!keep_alive) break;
    }
    wait_.emplace(&io_thread_, &connection_);
    co_await connection_.LingeringClose();
  }

 private:
  // False: close the connection.
  awaitable<bool> ServeOneRequest() {
    Connection::Parser parser;
    SetLimits(context_.options, &parser);
    error_code error = co_await connection_.ReadHead(parser);
    const auto start = std::chrono::steady_clock::now();
    if (IsHangUp(error)) co_return false;
    const RequestHead head = HeadOf(parser);
    const RouteMatch match = FindRoute(head.target, port_);

    std::optional<Reply> refusal;
    if (error) {
      refusal = MalformedReply(error, context_.options);
    } else {
      refusal = CheckHead(head, match, context_.keys);
    }
    const bool reads_body = !refusal.has_value() && head.has_body;
    ByteBudget::Share share = context_.body_budget.TryTake(reads_body ? AnnouncedBytes(parser) : 0);
    if (!share) refusal = TooManyBodies();
    if (!refusal.has_value() && head.has_body) {
      wait_.emplace(&io_thread_, &connection_);  // it has been heard
      error = co_await ReadBody(head, parser);
      if (IsHangUp(error)) co_return false;
      if (error) refusal = MalformedReply(error, context_.options);
      share.ShrinkTo(static_cast<int64_t>(parser.get().body().size()));
    }
    wait_.reset();
    Outcome outcome;
    if (refusal.has_value()) {
      // A body that nobody will read must not be taken for the next request.
      const bool keep_alive = !error && !head.has_body && MayKeepAlive(context_, head);
      outcome = co_await SendPlain(head, *std::move(refusal), keep_alive);
      if (IsGeneration(match)) context_.metrics.CountFailure(outcome.status);
    } else {
      outcome = co_await Dispatch(head, match, std::move(parser.get().body()));
    }
    Record(head, match, outcome.status, std::chrono::steady_clock::now() - start);
    co_return outcome.keep_alive;
  }

  // What the body may come to.
  int64_t AnnouncedBytes(const Connection::Parser& parser) const {
    const auto length = parser.content_length();
    const auto max_bytes = static_cast<uint64_t>(context_.options.max_body_bytes);
    return static_cast<int64_t>(std::min<uint64_t>(length ? *length : max_bytes, max_bytes));
  }

  static Reply TooManyBodies() {
    ApiError error;
    error.http_status = 503;
    error.code = "too_many_bodies";
    error.message = "The requests that are being read are too large together; try again";
    return ErrorReply(error);
  }

  awaitable<error_code> ReadBody(const RequestHead& head, Connection::Parser& parser) {
    if (head.expects_continue && head.version >= 11) {
      const bool sent = co_await connection_.Write("HTTP/1.1 100 Continue\r\n\r\n");
      if (!sent) co_return http::error::end_of_stream;
    }
    const error_code error = co_await connection_.ReadBody(parser);
    co_return error;
  }

  awaitable<Outcome> Dispatch(const RequestHead& head, const RouteMatch& match, std::string body) {
    Outcome outcome;
    if (IsGeneration(match)) {
      const Endpoint endpoint =
          match.route->action == Action::kChat ? Endpoint::kChat : Endpoint::kCompletions;
      outcome = co_await ServeGeneration(context_, connection_, head, endpoint, std::move(body));
    } else if (match.route->action == Action::kResetPrefixCache) {
      Reply reply = co_await ResetPrefixCache(context_, head, body);
      outcome = co_await SendPlain(head, std::move(reply), MayKeepAlive(context_, head));
    } else {
      outcome =
          co_await SendPlain(head, AnswerAtOnce(context_, match), MayKeepAlive(context_, head));
    }
    co_return outcome;
  }

  awaitable<Outcome> SendPlain(const RequestHead& head, Reply reply, bool keep_alive) {
    const bool sent = co_await connection_.Send(head, reply, keep_alive);
    co_return Outcome{reply.status, sent && keep_alive};
  }

  void Record(const RequestHead& head, const RouteMatch& match, int status,
              std::chrono::steady_clock::duration duration) {
    const double seconds = std::chrono::duration<double>(duration).count();
    context_.metrics.CountRequest(head.method, match.label(), status, seconds);
    if (IsGeneration(match)) {
      LOG_INFO("{} {} {} {} {:.3f}s", head.request_id, head.method, match.label(), status, seconds);
    } else {
      LOG_DEBUG("{} {} {} {:.3f}s", head.request_id, match.label(), status, seconds);
    }
  }

  ServerContext& context_;
  IoThread& io_thread_;
  Connection& connection_;
  const Port port_;
  std::optional<Wait> wait_;
};

// For one more connection of this thread. False: all that are there are being answered.
bool MakeRoom(const ServerContext& context, IoThread& io_thread) {
  const size_t max_connections =
      static_cast<size_t>(context.options.max_connections / context.options.num_io_threads);
  if (io_thread.connections.size() < max_connections) return true;
  if (io_thread.waiting.empty()) return false;
  const auto longest = io_thread.waiting.begin();
  longest->second->Close();  // which its session, a moment later, finds
  io_thread.connections.erase(longest->second);
  io_thread.waiting.erase(longest);
  return true;
}

awaitable<void> RunSession(ServerContext& context, IoThread& io_thread, net::ip::tcp::socket socket,
                           Port port) {
  if (!MakeRoom(context, io_thread)) {
    if (const auto more = context.refusal_log.Admit()) {
      LOG_WARNING("closed a new connection: {} are open, and all are being answered{}",
                  context.options.max_connections, *more);
    }
    co_return;
  }
  Connection connection(std::move(socket), context.options);
  const Registration registration(&io_thread.connections, &connection);
  Session session(context, io_thread, connection, port);
  co_await session.Run();
}

void LogUnexpected(std::exception_ptr exception) {
  if (exception == nullptr) return;
  try {
    std::rethrow_exception(exception);
  } catch (const std::exception& error) {
    LOG_ERROR("a connection ended unexpectedly: {}", error.what());
  }
}

}  // namespace

void StartSession(ServerContext& context, IoThread& io_thread, net::ip::tcp::socket socket,
                  Port port) {
  net::co_spawn(io_thread.io, RunSession(context, io_thread, std::move(socket), port),
                LogUnexpected);
}

}  // namespace wintserve
