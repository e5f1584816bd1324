#include "tools/eval/sequences.h"

#include <fmt/format.h>

#include <algorithm>
#include <span>
#include <utility>

#include "common/check.h"
#include "common/status_macros.h"
#include "tools/eval/error_text.h"

namespace wintserve::eval {
namespace {

void Append(const std::vector<int32_t>& ids, bool is_scored, ScoredSequence* sequence) {
  sequence->ids.insert(sequence->ids.end(), ids.begin(), ids.end());
  sequence->is_scored.insert(sequence->is_scored.end(), ids.size(), is_scored);
}

// The id of the marker that begins a text, -1 if there is none.
int32_t BeginId(const Tokenizer& tokenizer) {
  return tokenizer.IdOf(tokenizer.chat_tokens().cls_token);
}

ScoredSequence MakeWindow(const std::string& path, int64_t index, std::span<const int32_t> ids,
                          const Tokenizer& tokenizer) {
  const int32_t begin_id = BeginId(tokenizer);
  ScoredSequence window;
  window.place = fmt::format("{}: window {}", path, index);
  window.ids.assign(ids.begin(), ids.end());
  window.is_scored.assign(ids.size(), true);
  window.is_scored[0] = false;
  for (const int32_t id : ids.subspan(1)) {
    const bool is_marker = id == begin_id || id == tokenizer.eos_id();
    if (!is_marker) window.num_bytes += std::ssize(tokenizer.Bytes(id));
  }
  return window;
}

}  // namespace

int64_t ScoredSequence::NumScored() const {
  return std::count(is_scored.begin(), is_scored.end(), true);
}

absl::StatusOr<std::vector<ScoredSequence>> ReadWindows(const std::string& path,
                                                        const Tokenizer& tokenizer,
                                                        int context_tokens, int64_t limit) {
  CHECK(context_tokens >= 2, "context_tokens={}", context_tokens);
  std::vector<ScoredSequence> windows;
  std::vector<int32_t> rest;
  const auto is_enough = [&] { return limit > 0 && std::ssize(windows) >= limit; };
  const auto add = [&](std::span<const int32_t> ids) {
    windows.push_back(MakeWindow(path, std::ssize(windows), ids, tokenizer));
  };
  const auto window_size = static_cast<size_t>(context_tokens);
  const int32_t begin_id = BeginId(tokenizer);
  RETURN_IF_ERROR(ReadDocuments(path, [&](const std::string& text) {
    const std::vector<int32_t> ids = tokenizer.Encode(text);
    if (begin_id >= 0) rest.push_back(begin_id);
    rest.insert(rest.end(), ids.begin(), ids.end());
    rest.push_back(tokenizer.eos_id());
    size_t begin = 0;
    for (; rest.size() - begin >= window_size && !is_enough(); begin += window_size) {
      add(std::span(rest).subspan(begin, window_size));
    }
    rest.erase(rest.begin(), rest.begin() + static_cast<std::ptrdiff_t>(begin));
    return !is_enough();
  }));
  if (rest.size() >= 2 && !is_enough()) add(rest);
  if (windows.empty()) {
    return absl::InvalidArgumentError(fmt::format("{}: holds no text to score", path));
  }
  return windows;
}

absl::StatusOr<ScoredSequence> EncodeChat(const ChatItem& item, const Tokenizer& tokenizer) {
  ScoredSequence sequence;
  sequence.place = item.place;
  size_t num_encoded = 0;  // bytes of the chat, as it is rendered up to here
  for (size_t i = 0; i < item.messages.size(); ++i) {
    const ChatMessage& message = item.messages[i];
    if (message.role != "assistant") continue;
    const std::vector<ChatMessage> before(item.messages.begin(),
                                          item.messages.begin() + static_cast<std::ptrdiff_t>(i));
    const absl::StatusOr<std::string> prompt =
        RenderErnieChat(before, /*add_generation_prompt=*/true, tokenizer.chat_tokens());
    if (!prompt.ok()) return AtPlace(item.place, prompt.status());
    if (message.content.empty()) {
      return absl::InvalidArgumentError(
          fmt::format("{}: messages[{}].content: an answer must not be empty", item.place, i));
    }
    Append(tokenizer.Encode(prompt->substr(num_encoded)), /*is_scored=*/false, &sequence);
    Append(tokenizer.Encode(message.content), /*is_scored=*/true, &sequence);
    if (i + 1 == item.messages.size()) {
      Append({tokenizer.eos_id()}, /*is_scored=*/true, &sequence);
    }
    sequence.num_bytes += std::ssize(message.content);
    num_encoded = prompt->size() + message.content.size();
  }
  if (sequence.ids.empty()) {
    return absl::InvalidArgumentError(
        fmt::format("{}: messages: none has the role 'assistant'", item.place));
  }
  return sequence;
}

absl::StatusOr<std::vector<ScoredSequence>> EncodeChoices(const ChoiceItem& item, bool raw,
                                                          const Tokenizer& tokenizer) {
  std::string prompt = item.prompt;
  if (!raw) {
    ASSIGN_OR_RETURN(prompt,
                     RenderErnieChat({{"user", item.prompt}},
                                     /*add_generation_prompt=*/true, tokenizer.chat_tokens()));
  }
  const std::vector<int32_t> prompt_ids = tokenizer.Encode(prompt);
  std::vector<ScoredSequence> sequences;
  for (const std::string& choice : item.choices) {
    ScoredSequence& sequence = sequences.emplace_back();
    sequence.place = item.place;
    sequence.num_bytes = std::ssize(choice);
    Append(prompt_ids, /*is_scored=*/false, &sequence);
    Append(tokenizer.Encode(choice), /*is_scored=*/true, &sequence);
  }
  return sequences;
}

}  // namespace wintserve::eval
