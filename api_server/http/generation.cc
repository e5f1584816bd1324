#include "api_server/http/generation.h"

#include <fmt/core.h>

#include <algorithm>
#include <boost/asio/as_tuple.hpp>
#include <boost/asio/experimental/awaitable_operators.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/this_coro.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <set>
#include <vector>

#include "api_server/http/endpoints.h"
#include "api_server/http/on_pool.h"
#include "api_server/http/update_channel.h"
#include "api_server/openai/responses.h"
#include "common/log.h"
#include "common/status_macros.h"

namespace wintserve {
namespace {

namespace net = boost::asio;
using net::awaitable;
using net::use_awaitable;

struct PreparedRequest {
  ApiRequest request;
  ResponseIdentity identity;
  std::vector<GenerationRequest> generations;  // one a prompt
};

// Whose request it is, and what it shares with others.
void ApplyServerRules(const ServerContext& context, const RequestHead& head,
                      GenerationRequest* generation) {
  if (!context.keys.empty()) generation->tenant = context.keys.DigestOf(head.authorization);
  generation->cache_salt = CacheSaltOf(context, head, generation->cache_salt);
}

// Parses, renders and encodes: up to a second for a long prompt, so on a pool thread.
absl::StatusOr<PreparedRequest> Prepare(const ServerContext& context, const RequestHead& head,
                                        Endpoint endpoint, const std::string& body) {
  PreparedRequest prepared;
  ASSIGN_OR_RETURN(prepared.request, ParseRequest(endpoint, body));
  RETURN_IF_ERROR(
      CheckModelName(prepared.request.model, *context.llm, context.options.model_names));
  prepared.identity = NewResponseIdentity(endpoint, context.llm->model_name());
  ASSIGN_OR_RETURN(prepared.generations,
                   MakeGenerationRequests(prepared.request, *context.llm, prepared.identity.id));
  prepared.request.echo_texts = EchoTexts(prepared.request, prepared.generations, *context.llm);
  for (GenerationRequest& generation : prepared.generations) {
    ApplyServerRules(context, head, &generation);
  }
  return prepared;
}

// What went wrong inside stays inside; what the client did, or can do about it, is told.
ApiError PublicError(const absl::Status& status, const RequestHead& head) {
  ApiError error = ToApiError(status);
  if (error.http_status < 500 || absl::IsDeadlineExceeded(status)) return error;
  LOG_ERROR("request {} failed: {}", head.request_id, status.ToString());
  if (error.http_status == 500) {
    error.message = fmt::format("The server failed to answer; request id {}", head.request_id);
  }
  return error;
}

Reply PublicErrorReply(const absl::Status& status, const RequestHead& head) {
  const int retry_after_seconds = absl::IsResourceExhausted(status) ? RetryAfterSeconds(status) : 1;
  return ErrorReply(PublicError(status, head), retry_after_seconds);
}

// First error among the updates, or OK.
absl::Status ErrorIn(const std::vector<PromptUpdate>& updates) {
  for (const PromptUpdate& update : updates) RETURN_IF_ERROR(update.update.error);
  return absl::OkStatus();
}

// The generations of one HTTP request, from Submit to the last update. Cancels them when destroyed.
class Generations {
 public:
  Generations(const ServerContext& context, const net::any_io_executor& executor,
              Connection* connection)
      : llm_(context.llm),
        client_stall_timeout_(context.options.client_stall_timeout),
        connection_(connection),
        news_(executor),
        stall_(executor),
        channel_(std::make_shared<UpdateChannel>(executor, context.options.max_pending_stream_bytes,
                                                 [this] { OnNews(); })) {}
  Generations(const Generations&) = delete;
  Generations& operator=(const Generations&) = delete;
  ~Generations() {
    channel_->Close();
    for (const RequestHandle handle : handles_) llm_->Cancel(handle);  // ignored where it finished
  }

  absl::Status Submit(std::vector<GenerationRequest> generations) {
    for (size_t i = 0; i < generations.size(); ++i) {
      ASSIGN_OR_RETURN(
          const RequestHandle handle,
          llm_->Submit(std::move(generations[i]), [channel = channel_, i](GenerationUpdate update) {
            channel->Push(i, std::move(update));
          }));
      handles_.push_back(handle);
    }
    return absl::OkStatus();
  }

  // All updates that have come; waits for the first of them, at most `timeout`. Empty: nothing
  // came.
  awaitable<std::vector<PromptUpdate>> Next(std::chrono::milliseconds timeout) {
    std::vector<PromptUpdate> updates = Take();
    const auto deadline = std::chrono::steady_clock::now() + timeout;
    while (updates.empty() && std::chrono::steady_clock::now() < deadline) {
      news_.expires_at(deadline);
      // Ends at the deadline or by OnNews; when this coroutine is cancelled, the next co_await
      // throws.
      co_await news_.async_wait(net::as_tuple(use_awaitable));
      updates = Take();
      const net::cancellation_state cancellation = co_await net::this_coro::cancellation_state;
      if (cancellation.cancelled() != net::cancellation_type::none) break;
    }
    co_return updates;
  }

  // Waits until every prompt is in the queue, or one has failed. All that has come until then.
  awaitable<std::vector<PromptUpdate>> UntilAccepted() {
    std::vector<PromptUpdate> all;
    std::set<size_t> heard;
    while (heard.size() < handles_.size() && ErrorIn(all).ok()) {
      std::vector<PromptUpdate> updates = co_await Next(kWaitForQueue);
      for (PromptUpdate& update : updates) {
        heard.insert(update.prompt_index);
        all.push_back(std::move(update));
      }
    }
    co_return all;
  }

 private:
  // Only how often an idle wait looks around.
  static constexpr std::chrono::seconds kWaitForQueue{60};

  std::vector<PromptUpdate> Take() {
    if (is_stalled_) stall_.cancel();
    is_stalled_ = false;
    return channel_->Take();
  }

  void OnNews() {
    news_.cancel();
    if (is_stalled_ || !channel_->is_over_limit()) return;
    is_stalled_ = true;
    stall_.expires_after(client_stall_timeout_);
    stall_.async_wait([connection = connection_, weak_channel = std::weak_ptr(channel_)](
                          boost::system::error_code cancelled) {
      // A channel that is over the limit is not closed, so the connection is still there. A write
      // to the slow reader is what the coroutine waits for: closing ends it.
      const auto channel = weak_channel.lock();
      if (!cancelled && channel != nullptr && channel->is_over_limit()) connection->Close();
    });
  }

  LLM* const llm_;
  const std::chrono::milliseconds client_stall_timeout_;
  Connection* const connection_;
  net::steady_timer news_;
  net::steady_timer stall_;  // runs while is_stalled_
  bool is_stalled_ = false;  // more has been pending than may be, since the last Take
  const std::shared_ptr<UpdateChannel> channel_;
  std::vector<RequestHandle> handles_;
};

// Who asks, and by which connection to answer.
struct Exchange {
  ServerContext& context;
  Connection& connection;
  const RequestHead& head;
};

awaitable<Outcome> SendReply(const Exchange& exchange, Reply reply) {
  const bool keep_alive = MayKeepAlive(exchange.context, exchange.head);
  const bool sent = co_await exchange.connection.Send(exchange.head, reply, keep_alive);
  co_return Outcome{sent ? reply.status : kStatusClientClosed, sent && keep_alive};
}

awaitable<Outcome> SendError(const Exchange& exchange, const absl::Status& error) {
  const Outcome outcome = co_await SendReply(exchange, PublicErrorReply(error, exchange.head));
  co_return outcome;
}

awaitable<Outcome> SendWholeAnswer(const Exchange& exchange, const PreparedRequest& prepared,
                                   Generations& generations) {
  ResponseAssembler assembler(prepared.identity, prepared.request, *exchange.context.llm);
  absl::Status error;
  while (error.ok() && !assembler.finished()) {
    const std::vector<PromptUpdate> updates =
        co_await generations.Next(exchange.context.options.keep_alive_interval);
    for (const PromptUpdate& update : updates) assembler.Add(update.prompt_index, update.update);
    error = ErrorIn(updates);
  }
  Reply reply;
  if (error.ok()) {
    // A co_await in a conditional expression is what GCC 12 compiles wrongly.
    if (prepared.request.wants_prompt_logprobs()) {
      reply.body =
          co_await OnPool(exchange.context.text_pool, [&assembler] { return assembler.Body(); });
    } else {
      reply.body = assembler.Body();
    }
  } else {
    reply = PublicErrorReply(error, exchange.head);
  }
  const Outcome outcome = co_await SendReply(exchange, std::move(reply));
  co_return outcome;
}

std::string Event(std::string_view data) { return fmt::format("data: {}\n\n", data); }

// The events of one round of updates; the last of them is [DONE] when the stream is over.
struct StreamRound {
  std::string events;
  int error_status = 0;  // not 0: the stream ends with an error object
  bool is_last = false;
};

// They may be long, and making text of them take long.
bool BringsPromptLogprobs(const std::vector<PromptUpdate>& updates) {
  return std::any_of(updates.begin(), updates.end(), [](const PromptUpdate& update) {
    return update.update.prompt_logprobs.has_value();
  });
}

StreamRound NextRound(const std::vector<PromptUpdate>& updates, const RequestHead& head,
                      StreamAssembler* assembler) {
  StreamRound round;
  std::vector<std::string> payloads;
  for (const PromptUpdate& update : updates) {
    assembler->Add(update.prompt_index, update.update, &payloads);
  }
  if (const absl::Status error = ErrorIn(updates); !error.ok()) {
    const ApiError public_error = PublicError(error, head);
    round.error_status = public_error.http_status;
    payloads.push_back(ErrorBody(public_error));
  }
  round.is_last = round.error_status != 0 || assembler->finished();
  if (round.is_last) payloads.push_back("[DONE]");
  for (const std::string& payload : payloads) round.events += Event(payload);
  if (updates.empty()) round.events = ": keep-alive\n\n";
  return round;
}

Reply StreamHead() {
  Reply reply;
  reply.content_type = "text/event-stream; charset=utf-8";
  reply.headers = {{"Cache-Control", "no-cache"}, {"X-Accel-Buffering", "no"}};
  return reply;
}

awaitable<Outcome> SendStream(const Exchange& exchange, const PreparedRequest& prepared,
                              Generations& generations) {
  const std::chrono::milliseconds interval = exchange.context.options.keep_alive_interval;
  StreamAssembler assembler(prepared.identity, prepared.request, *exchange.context.llm);

  // The head waits for the queue, whose refusal has a status of its own.
  std::vector<PromptUpdate> updates = co_await generations.UntilAccepted();
  if (const absl::Status error = ErrorIn(updates); !error.ok()) {
    const Outcome outcome = co_await SendError(exchange, error);
    co_return outcome;
  }
  const bool keep_alive =
      MayKeepAlive(exchange.context, exchange.head) && exchange.head.version >= 11;
  std::string bytes = SerializeHead(exchange.head, StreamHead(), keep_alive, /*content_length=*/-1);
  for (;;) {
    StreamRound round;
    if (BringsPromptLogprobs(updates)) {
      round = co_await OnPool(exchange.context.text_pool,
                              [&] { return NextRound(updates, exchange.head, &assembler); });
    } else {
      round = NextRound(updates, exchange.head, &assembler);
    }
    // An update that says nothing yet (it is queued, or its text is held back) makes no event.
    if (!round.events.empty()) bytes += Chunk(exchange.head, round.events);
    if (round.is_last) bytes += LastChunk(exchange.head);
    const bool sent = bytes.empty() || co_await exchange.connection.Write(std::move(bytes));
    if (!sent) co_return Outcome{kStatusClientClosed, false};
    if (round.error_status != 0) exchange.context.metrics.CountFailure(round.error_status);
    if (round.is_last) co_return Outcome{200, keep_alive};
    bytes.clear();
    updates = co_await generations.Next(interval);
  }
}

// Submits and answers, unless the client goes first.
awaitable<Outcome> GenerateAndSend(const Exchange& exchange, PreparedRequest& prepared) {
  using net::experimental::awaitable_operators::operator||;
  const net::any_io_executor executor = co_await net::this_coro::executor;
  Generations generations(exchange.context, executor, &exchange.connection);
  const absl::Status submitted = generations.Submit(std::move(prepared.generations));
  if (!submitted.ok()) {
    const Outcome outcome = co_await SendError(exchange, submitted);
    co_return outcome;
  }
  awaitable<Outcome> answer = prepared.request.stream
                                  ? SendStream(exchange, prepared, generations)
                                  : SendWholeAnswer(exchange, prepared, generations);
  const std::variant<std::monostate, Outcome> first =
      co_await (exchange.connection.UntilPeerCloses() || std::move(answer));
  co_return first.index() == 1 ? std::get<1>(first) : Outcome{kStatusClientClosed, false};
}

awaitable<Outcome> Answer(const Exchange& exchange, Endpoint endpoint, std::string body) {
  ServerContext& context = exchange.context;
  const ReadinessReport readiness = context.llm->Readiness();
  if (!readiness.ready && !readiness.is_recovering) {
    const Outcome outcome = co_await SendReply(exchange, NotReadyReply(readiness));
    co_return outcome;
  }
  const Admission::Permit permit = context.admission.TryEnter();
  if (!permit) {
    const absl::Status too_many = absl::ResourceExhaustedError(
        fmt::format("Too many requests: at most {} may be open", context.admission.max_open()));
    const Outcome outcome = co_await SendReply(exchange, ErrorReply(ToApiError(too_many)));
    co_return outcome;
  }
  absl::StatusOr<PreparedRequest> prepared = co_await OnPool(
      context.text_pool, [&] { return Prepare(context, exchange.head, endpoint, body); });
  if (!prepared.ok()) {
    const Outcome outcome = co_await SendError(exchange, prepared.status());
    co_return outcome;
  }
  body = std::string();  // may be large, and the answer may take long
  const Outcome outcome = co_await GenerateAndSend(exchange, *prepared);
  co_return outcome;
}

}  // namespace

awaitable<Outcome> ServeGeneration(ServerContext& context, Connection& connection,
                                   const RequestHead& head, Endpoint endpoint, std::string body) {
  const Exchange exchange{context, connection, head};
  const Outcome outcome = co_await Answer(exchange, endpoint, std::move(body));
  if (outcome.status == kStatusClientClosed) {
    context.metrics.CountAborted();
  } else if (outcome.status >= 400) {
    context.metrics.CountFailure(outcome.status);
  }
  co_return outcome;
}

}  // namespace wintserve
