#include "api_server/http/http_server.h"

#include <fmt/core.h>
#include <sys/socket.h>

#include <boost/asio/dispatch.hpp>
#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/steady_timer.hpp>
#include <future>
#include <optional>
#include <thread>

#include "api_server/http/connection.h"
#include "api_server/http/server_context.h"
#include "common/log.h"
#include "common/log_limit.h"
#include "common/status_macros.h"

namespace wintserve {
namespace {

namespace net = boost::asio;
using net::ip::tcp;

constexpr std::chrono::milliseconds kAcceptRetryDelay(100);

int64_t UnixSeconds() {
  return std::chrono::duration_cast<std::chrono::seconds>(
             std::chrono::system_clock::now().time_since_epoch())
      .count();
}

absl::Status CheckListening(int fd, const char* name) {
  int is_listening = 0;
  socklen_t length = sizeof(is_listening);
  if (getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &is_listening, &length) == 0 && is_listening != 0) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(fmt::format("{}: {} is not a listening socket", name, fd));
}

tcp ProtocolOf(int fd) {
  sockaddr_storage address = {};
  socklen_t length = sizeof(address);
  getsockname(fd, reinterpret_cast<sockaddr*>(&address), &length);
  return address.ss_family == AF_INET6 ? tcp::v6() : tcp::v4();
}

// Accepts on one listening socket; sessions go to the IO threads in turn.
class Listener {
 public:
  using OnAccept = std::function<void(tcp::socket, IoThread&)>;

  // Lives on io_threads.front().
  Listener(int fd, std::vector<std::unique_ptr<IoThread>>* io_threads, OnAccept on_accept)
      : io_threads_(*io_threads),
        acceptor_(io_threads_.front()->io, ProtocolOf(fd), fd),
        retry_(io_threads_.front()->io),
        on_accept_(std::move(on_accept)) {}

  void AcceptNext() {
    IoThread& io_thread = *io_threads_[next_++ % io_threads_.size()];
    acceptor_.async_accept(io_thread.io,
                           [this, &io_thread](boost::system::error_code error, tcp::socket socket) {
                             if (!acceptor_.is_open()) return;
                             if (error) return RetryLater(error);
                             on_accept_(std::move(socket), io_thread);
                             AcceptNext();
                           });
  }

  void Close() {
    boost::system::error_code ignored;
    acceptor_.close(ignored);
    retry_.cancel();
  }

 private:
  // Out of descriptors, most likely: the next try would fail at once, for ever.
  void RetryLater(boost::system::error_code error) {
    if (const auto more = error_log_.Admit()) {
      LOG_WARNING("cannot accept a connection: {}{}", error.message(), *more);
    }
    retry_.expires_after(kAcceptRetryDelay);
    retry_.async_wait([this](boost::system::error_code wait_error) {
      if (!wait_error) AcceptNext();
    });
  }

  std::vector<std::unique_ptr<IoThread>>& io_threads_;
  tcp::acceptor acceptor_;
  net::steady_timer retry_;
  const OnAccept on_accept_;
  LogLimit error_log_;
  size_t next_ = 0;
};

class BeastHttpServer final : public HttpServer {
 public:
  BeastHttpServer(HttpOptions options, LLM* llm, std::shared_ptr<prometheus::Registry> registry)
      : context_(std::move(options), llm, std::move(registry)) {
    for (int i = 0; i < context_.options.num_io_threads; ++i) {
      io_threads_.push_back(std::make_unique<IoThread>());
      work_.emplace_back(net::make_work_guard(io_threads_.back()->io));
    }
    const bool has_metrics_port = context_.options.metrics_fd >= 0;
    Listen(context_.options.listen_fd, has_metrics_port ? Port::kHttp : Port::kHttpWithMetrics);
    if (has_metrics_port) Listen(context_.options.metrics_fd, Port::kMetrics);
    for (const auto& io_thread : io_threads_) {
      threads_.emplace_back([io = &io_thread->io] { io->run(); });
    }
  }

  // NOLINTNEXTLINE(bugprone-exception-escape): a lock or join that fails may well end the process.
  ~BeastHttpServer() override { Stop(); }

  void StopAccepting() override {
    if (context_.draining.exchange(true)) return;
    RunOn(*io_threads_.front(), [this] {
      for (const auto& listener : listeners_) listener->Close();
    });
    CloseConnections([](const Connection& connection) { return connection.is_idle(); });
  }

  bool WaitUntilIdle(std::chrono::milliseconds timeout) override {
    return context_.admission.WaitUntilEmpty(timeout);
  }

  void Stop() override {
    if (threads_.empty()) return;
    StopAccepting();
    CloseConnections([](const Connection&) { return true; });
    // Closed sockets fail every operation, so the sessions end by themselves, and run() with them.
    work_.clear();
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
    context_.text_pool.join();
    context_.blocking_pool.join();
  }

 private:
  void Listen(int fd, Port port) {
    listeners_.push_back(std::make_unique<Listener>(
        fd, &io_threads_, [this, port](tcp::socket socket, IoThread& io_thread) {
          StartSession(context_, io_thread, std::move(socket), port);
        }));
    listeners_.back()->AcceptNext();
  }

  // Runs `task` on that thread and waits for it.
  template <typename Task>
  static void RunOn(IoThread& io_thread, Task task) {
    std::promise<void> done;
    net::post(io_thread.io, [&] {
      task();
      done.set_value();
    });
    done.get_future().wait();
  }

  template <typename Predicate>
  void CloseConnections(Predicate should_close) {
    for (const auto& io_thread : io_threads_) {
      RunOn(*io_thread, [&] {
        for (Connection* connection : io_thread->connections) {
          if (should_close(*connection)) connection->Close();
        }
      });
    }
  }

  ServerContext context_;
  std::vector<std::unique_ptr<IoThread>> io_threads_;
  std::vector<net::executor_work_guard<net::io_context::executor_type>> work_;
  std::vector<std::unique_ptr<Listener>> listeners_;
  std::vector<std::thread> threads_;
};

}  // namespace

ServerContext::ServerContext(HttpOptions options_in, LLM* llm_in,
                             std::shared_ptr<prometheus::Registry> registry)
    : options(std::move(options_in)),
      llm(llm_in),
      keys(options.api_keys),
      started_seconds(UnixSeconds()),
      metrics(std::move(registry)),
      admission(options.max_concurrency),
      body_budget(options.max_bodies_bytes),
      text_pool(static_cast<size_t>(options.num_text_threads)) {}

absl::StatusOr<std::unique_ptr<HttpServer>> HttpServer::Start(
    HttpOptions options, LLM* llm, std::shared_ptr<prometheus::Registry> registry) {
  RETURN_IF_ERROR(CheckListening(options.listen_fd, "HTTP socket"));
  if (options.metrics_fd >= 0) {
    RETURN_IF_ERROR(CheckListening(options.metrics_fd, "metrics socket"));
  }
  return std::make_unique<BeastHttpServer>(std::move(options), llm, std::move(registry));
}

void LogStartupLines(const std::string& host, int port, int metrics_port) {
  LOG_INFO("Launching metrics service at http://{}:{}/metrics", host, metrics_port);
  LOG_INFO("Launching chat completion service at http://{}:{}/v1/chat/completions", host, port);
  LOG_INFO("Launching completion service at http://{}:{}/v1/completions", host, port);
}

void LogStartupComplete() { LOG_INFO("Application startup complete."); }

}  // namespace wintserve
