// Makes the LLM of an API-server process.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "api_server/llm/llm.h"
#include "api_server/llm/step_deadline.h"
#include "api_server/llm/worker_processes.h"
#include "common/config/instance.h"
#include "common/transport/tls_files.h"

namespace prometheus {
class Registry;
}

namespace wintserve {

struct LlmOptions {
  // Model
  std::string model_path = {};      // directory: generation_config.json, the tokenizer's files
  std::string tokenizer_path = {};  // directory; empty: model_path
  std::string model_name = {};      // public name

  // Peers
  std::string work_queue_socket = {};   // path of the Unix socket to listen on
  std::string work_queue_address = {};  // "127.0.0.1:8471" to listen on as well; empty: none
  std::string cache_target = {};        // gRPC target of the cache manager
  TlsIdentity queue_tls = {};  // of work_queue_address, and for a cache_target that is a port
  std::string token = {};      // of the instance
  int world_size = 1;          // engine workers

  // Limits; see ServeOptions
  int max_model_len = 2048;
  int max_num_seqs = 16;
  int max_num_batched_tokens = 256;
  int block_size_tokens = 64;
  std::optional<int> num_blocks_override = {};
  int max_queue_requests = 0;
  int64_t max_queue_tokens = 0;
  int max_seqs_per_tenant = 0;
  int max_partial_prefills = 2;
  int max_long_partial_prefills = 1;
  int long_prefill_token_threshold = 0;
  int64_t request_timeout_ms = 0;
  // While there are no engine workers to compute with, since one has died, a request waits so long;
  // then it fails with UNAVAILABLE.
  int64_t fault_hold_ms = 60'000;

  // Engine workers that map the pool and warm up get further within this time, or the one that
  // hangs is ended, and replaced; 0: there is no limit.
  int64_t stall_timeout_ms = 300'000;
  StepDeadlineLimits step_deadline = {};
  // Destroying the LLM leaves the engine workers, with their weights and the pool, to the LLM that
  // follows; false: it tells them to exit.
  bool leaves_workers = false;

  // Features; see ServeOptions
  bool prefix_caching = true;
  bool chunked_prefill = true;
  int async_depth = 1;
  double swap_space_gib = 0;
  int max_top_logprobs = kMaxTopLogprobs;  // -1: no log-probabilities

  // Called once, from the engine's thread, when Readiness().ready has become true.
  std::function<void()> on_ready = {};
  // The cache manager seems to be there without answering: has it started anew if so. From a thread
  // of its own, which may block; the engine goes on meanwhile.
  std::function<void()> on_cache_hang = {};
  // Begins to watch the processes of the engine workers; called once, at the start. Null: nobody
  // can be asked about them; then broken streams and deadlines alone tell that a worker is lost,
  // and nothing that was computed with it is kept.
  WorkerProcessWatcher watch_workers = {};
  // Called once, from the engine's thread, when the instance can serve no more and has to be
  // started anew: a worker does not fit, or no KV pool can be created. `reason` is one line for the
  // operator. Must not block, nor destroy the LLM.
  std::function<void(const std::string& reason)> on_fatal = {};
};

LlmOptions LlmOptionsFor(const Instance& instance);

// Loads the tokenizer and generation_config.json, starts listening for engine workers and returns
// at once: Readiness() says what is still being waited for. A cache manager that is lost later does
// not make it unready: sequences go on in the blocks that they hold, and are computed again once a
// new one has created a pool. An engine worker that is lost makes it unready until another one has
// taken its place; then sequences go on where they were. Workers that an earlier LLM has left
// behind are taken over with their pool. Destroying the LLM tells the workers to exit or leaves
// them (LlmOptions::leaves_workers), ends every open request with UNAVAILABLE (on_update is called
// until then) and joins its threads. NOT_FOUND, INVALID_ARGUMENT: a file of the model, by name, or
// a limit. UNAVAILABLE: an address.
absl::StatusOr<std::unique_ptr<LLM>> CreateLlm(LlmOptions options,
                                               std::shared_ptr<prometheus::Registry> registry);

}  // namespace wintserve
