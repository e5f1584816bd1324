// Every setting of a serving instance, as parsed from flags and YAML by common/config. Plain data:
// parsed and validated once in a main, logged as "effective config", passed down by const&.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace wintserve {

// What a GPU needs for speed would only make a CPU's steps long.
inline constexpr int kGpuMaxNumSeqs = 128;
inline constexpr int kGpuMaxNumBatchedTokens = 8192;

struct ServeOptions {
  // Model
  std::string model = "models/poet";           // directory
  std::string tokenizer;                       // directory; empty: the model's
  std::vector<std::string> served_model_name;  // first is the public name, the rest aliases
  bool strict_model_name = false;
  std::string k_order = "auto";      // auto | mma64 | natural: row order of WINT2 tensors
  std::string load_format = "auto";  // auto: the checkpoint's files | dummy: weights without files
  double dummy_router_skew = 0;      // of dummy weights; 0: tokens spread over all experts

  // Listening
  std::string host = "0.0.0.0";
  int port = 8000;
  std::optional<int> metrics_port;   // unset: /metrics on `port`
  int engine_worker_queue_port = 0;  // 0: pick a free one
  int cache_queue_port = 0;
  std::string queue_host = "127.0.0.1";  // IPv4 address of the two queue ports
  std::string queue_tls_cert;            // PEM files; empty: no TLS on the queue ports
  std::string queue_tls_key;
  std::string queue_tls_ca;      // empty: clients of the queue ports need no certificate
  std::string queue_token_file;  // empty: the launcher draws the token
  bool insecure_bind = false;    // a queue_host that is not loopback needs no TLS
  std::vector<std::string> api_keys;

  // Parallelism and device
  std::string device = "cpu";    // cpu | cuda
  int tensor_parallel_size = 1;  // 1, 2 or 4
  int cpu_threads = 0;           // of one worker; 0: cores / tensor_parallel_size

  // Limits
  int max_model_len = 2048;          // prompt + output tokens
  int max_num_seqs = 16;             // of a GPU by default kGpuMaxNumSeqs
  int max_num_batched_tokens = 256;  // of a GPU by default kGpuMaxNumBatchedTokens
  int max_concurrency = 512;         // open generation requests; beyond: 429
  int max_queue_requests = 0;        // waiting; beyond: 429; 0: no limit of its own
  int64_t max_queue_tokens = 0;      // prompt tokens of waiting requests; 0: no limit
  int max_num_seqs_per_user = 0;     // running at once for one API key or `user`; 0: no limit
  int max_num_partial_prefills = 2;
  int max_long_partial_prefills = 1;
  int long_prefill_token_threshold = 0;  // 0: 4% of max_model_len
  int64_t request_timeout_ms = 0;        // longest `timeout` of a request, and its default; 0: none

  // Features
  bool enable_prefix_caching = true;
  bool enable_chunked_prefill = true;
  bool enable_logprob = true;
  int max_logprobs = 20;                 // most that a request may ask for
  int async_depth = 1;                   // steps planned ahead; 0: strict
  std::string cache_isolation = "none";  // none | key: prompts of different API keys share no KV
  int64_t client_stall_timeout_ms = 30'000;  // a stream whose client reads nothing for so long ends
  bool use_cudagraph = false;
  int block_size = 64;
  std::string kv_cache_dtype = "auto";   // auto | bfloat16 | int8; on a CPU it is float32
  double gpu_memory_utilization = 0.92;  // of a GPU's memory, for everything
  std::optional<int> num_gpu_blocks_override;
  double swap_space_gib = 0;

  // Operation
  std::string role = "all";  // all | api: the API server alone | engine: everybody else
  std::string runtime_dir;   // of role api and engine: the directory that both launchers share
  std::string log_level = "info";
  std::string log_dir;  // a log file for each process, made if missing; empty: the console only
  int64_t drain_timeout_ms = 55'000;
  int64_t orphan_timeout_ms = 120'000;  // how long engine workers wait for a new API server
  int64_t stall_timeout_ms = 300'000;   // without progress in an engine worker's start; 0: any
  int64_t fault_hold_ms = 60'000;       // how long requests wait for lost ranks; beyond: 503
};

}  // namespace wintserve
