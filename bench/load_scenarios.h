// What the load generator measures; each scenario returns its numbers as JSON (seconds, tokens).
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "bench/stream_client.h"

namespace wintserve::bench {

struct CachedPrefixOptions {
  int prompt_tokens = 4096;
  int block_size_tokens = 64;
  int repeats = 9;
};
// Time to the first token of a prompt never seen, and of one whose blocks but the last are cached.
nlohmann::json MeasureCachedPrefix(const Target& target, const CachedPrefixOptions& options);

struct DecodeOptions {
  int streams = 1;
  int prompt_tokens = 128;
  int output_tokens = 128;
  int repeats = 1;
};
// Streams that begin together, each with a prompt of its own and drawn without a cut: time to first
// token, gaps between tokens and rate while all of them decode.
nlohmann::json MeasureDecode(const Target& target, const DecodeOptions& options);

struct InterferenceOptions {
  int streams = 16;
  int prompt_tokens = 4000;
  double seconds = 20;  // of each phase
};
// Gaps between the tokens of decoding streams, alone and while prompts arrive back to back (one at
// a time, each asking for one token), and the rate of those prompts with and without the streams.
nlohmann::json MeasureInterference(const Target& target, const InterferenceOptions& options);

struct WaitingStreamsOptions {
  int active = 16;
  int waiting = 1000;
  double seconds = 10;  // of each phase
  int rounds = 5;       // pairs of phases; the first of a round has no waiting streams
};
// Rate of the active streams without and with open streams that wait in the server's queue. The
// server has to have exactly `active` slots and a queue for the others.
nlohmann::json MeasureWaitingStreams(const Target& target, const WaitingStreamsOptions& options);

struct TraceOptions {
  int requests = 200;
  double requests_per_second = 2;  // Poisson; 0: all at once
  double duration_seconds = 0;     // instead of `requests`, when not 0
  uint64_t seed = 1;
  int max_prompt_tokens = 1024;
  int max_output_tokens = 512;
  double shared_prefix_share =
      0;                   // of the requests; they begin with one of eight prefixes of 256 tokens
  double abort_share = 0;  // of the requests; the client leaves in the middle
  double whole_share = 0;  // of the requests; they ask for the answer in one piece
  double burst_seconds = 60;
  int burst_requests = 0;  // that come at once, beside the others, every burst_seconds
};
// An open loop with ShareGPT-like lengths.
nlohmann::json MeasureTrace(const Target& target, const TraceOptions& options);

}  // namespace wintserve::bench
