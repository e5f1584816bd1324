// What is scored: token ids, and which of them count.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "api_server/text/tokenizer.h"
#include "tools/eval/items.h"

namespace wintserve::eval {

struct ScoredSequence {
  std::string place;         // for errors: "chats.jsonl:12"
  std::vector<int32_t> ids;  // at least two
  // One an id: whether its log-probability, given all ids before it, counts. Never the first one's.
  std::vector<bool> is_scored;
  int64_t num_bytes = 0;  // of text that the scored ids stand for; markers have none

  int64_t NumScored() const;
};

// The documents of a file that are not empty, each encoded as tools::EncodeDocument says, joined
// and cut into windows of `context_tokens` ids. All ids of a window but its first one are scored,
// the markers among them. The last window holds the rest; of a single id there is none. limit: that
// many windows at most, 0: all. INVALID_ARGUMENT: the file (see ReadDocuments), or no document in
// it.
absl::StatusOr<std::vector<ScoredSequence>> ReadWindows(const std::string& path,
                                                        const Tokenizer& tokenizer,
                                                        int context_tokens, int64_t limit);

// A chat up to its last answer, encoded as tools::EncodeChat says, every answer of the assistant
// scored. The last message, if it is an answer, ends with </s>, which is scored, the ones before it
// with the template's separator, which is not. INVALID_ARGUMENT: no answer, an empty one, or a role
// that the template has no words for.
absl::StatusOr<ScoredSequence> EncodeChat(const ChatItem& item, const Tokenizer& tokenizer);

// One sequence for each choice: the prompt, as the user's message of the chat template or (raw) as
// it is, and the choice, encoded alone and scored, without an end. Nothing is put between the two.
absl::StatusOr<std::vector<ScoredSequence>> EncodeChoices(const ChoiceItem& item, bool raw,
                                                          const Tokenizer& tokenizer);

}  // namespace wintserve::eval
