// The public HTTP server: OpenAI routes, health, metrics. Boost.Beast stays behind this header.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "api_server/llm/llm.h"
#include "api_server/openai/prompts.h"

namespace prometheus {
class Registry;
}

namespace wintserve {

struct HttpOptions {
  int listen_fd = -1;                 // bound and listening; the server closes it
  int metrics_fd = -1;                // likewise; -1: /metrics on the HTTP port
  std::vector<std::string> api_keys;  // empty: nobody needs one
  ModelNames model_names;

  int num_io_threads = 2;
  int num_text_threads = 2;   // parsing, rendering, encoding
  int max_concurrency = 512;  // open generation requests; beyond: 429
  // On all ports together. Beyond them a new one takes the place of the one whose client has been
  // silent, or in the middle of its request, for longest. Not below num_io_threads.
  int max_connections = 4096;
  int64_t max_body_bytes = 8 << 20;
  // Bodies of all requests together, each from its head on by the size that it announces (a chunked
  // one by the largest); beyond: 503.
  int64_t max_bodies_bytes = 512 << 20;
  int64_t max_header_bytes = 16 << 10;
  bool isolate_cache_by_key = false;  // prompts of different API keys share no KV
  // What may wait for a slow reader. A stream that has more for client_stall_timeout is cut.
  int64_t max_pending_stream_bytes = 64 << 10;

  std::chrono::milliseconds idle_timeout{75'000};          // between requests of one connection
  std::chrono::milliseconds read_timeout{60'000};          // for a header, and for a body
  std::chrono::milliseconds client_stall_timeout{30'000};  // for a write to get any further
  std::chrono::milliseconds keep_alive_interval{5'000};    // a comment line after so much silence
};

// Owns the sockets, the IO threads and a small pool for text work. Every request that it submitted
// to the LLM is cancelled as soon as its client is gone, or has read nothing for too long.
//
// Threading: Start, StopAccepting, WaitUntilIdle and Stop from one thread; none of them from an IO
// thread.
class HttpServer {
 public:
  // Serves from now on: health probes are answered and generation gets 503 until
  // llm->Readiness().ready. `llm` must outlive the server. INVALID_ARGUMENT: an fd that is not a
  // listening socket.
  static absl::StatusOr<std::unique_ptr<HttpServer>> Start(
      HttpOptions options, LLM* llm, std::shared_ptr<prometheus::Registry> registry);

  virtual ~HttpServer() = default;  // as Stop()

  // Closes the listening sockets and idle connections. Open requests go on; their connections close
  // with the answer. (The kernel refuses new clients once every process has closed its copy of the
  // socket.)
  virtual void StopAccepting() = 0;

  // True as soon as no generation request is open.
  virtual bool WaitUntilIdle(std::chrono::milliseconds timeout) = 0;

  // Cuts what is still open, cancels its generations and joins the threads. Idempotent.
  virtual void Stop() = 0;
};

// FastDeploy's "Launching … service at …" lines, which people grep for. Call when the sockets
// listen. metrics_port: the HTTP port where metrics have no port of their own.
void LogStartupLines(const std::string& host, int port, int metrics_port);
// "Application startup complete.": call when LLM::Readiness().ready, not before.
void LogStartupComplete();

}  // namespace wintserve
