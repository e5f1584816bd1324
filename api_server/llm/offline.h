// The offline command: one request through the same LLM, its text on stdout.
#pragma once

#include <string>

#include "absl/status/status.h"
#include "api_server/llm/llm.h"

namespace wintserve {

// Blocks until the generation has finished. request_json: Instance::generate_json. Text is written
// as it comes, with a final newline; with "print_ids" the ids, one line. REQUIRES:
// llm->Readiness().ready. Ends early, with OK, when nobody reads stdout any more. INVALID_ARGUMENT:
// the prompt does not fit. Otherwise what the LLM or stdout reports.
absl::Status GenerateOffline(LLM* llm, const std::string& request_json);

}  // namespace wintserve
