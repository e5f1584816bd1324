// CreateLlm with its parts handed in, so that a test can bring a tokenizer and a cache manager of
// its own.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "api_server/llm/create_llm.h"
#include "api_server/llm/llm.h"
#include "api_server/text/tokenizer.h"
#include "cache_manager/client/cache_client.h"

namespace wintserve {

// Called from a thread of its own, again after UNAVAILABLE or DEADLINE_EXCEEDED, until it succeeds;
// and anew once a session is lost. Shutting down waits for a call that is under way.
using CacheConnector = std::function<absl::StatusOr<std::unique_ptr<CacheClient>>(
    uint64_t api_epoch, CacheEvents events)>;

// LLM::ResetPrefixCache. Called from any thread.
using CacheFlusher =
    std::function<absl::StatusOr<uint64_t>(const std::optional<std::string>& salt)>;

absl::StatusOr<std::unique_ptr<LLM>> CreateLlmWith(LlmOptions options,
                                                   std::unique_ptr<Tokenizer> tokenizer,
                                                   std::shared_ptr<prometheus::Registry> registry,
                                                   CacheConnector connect_cache,
                                                   CacheFlusher flush_cache);

}  // namespace wintserve
