#include "tools/eval/sequences.h"

#include <fmt/format.h>

#include <algorithm>
#include <span>
#include <utility>

#include "common/check.h"
#include "common/status_macros.h"
#include "tools/text/encode_text.h"
#include "tools/text/error_text.h"

namespace wintserve::eval {
namespace {

void Append(const std::vector<int32_t>& ids, bool is_scored, ScoredSequence* sequence) {
  sequence->ids.insert(sequence->ids.end(), ids.begin(), ids.end());
  sequence->is_scored.insert(sequence->is_scored.end(), ids.size(), is_scored);
}

ScoredSequence MakeWindow(const std::string& path, int64_t index, std::span<const int32_t> ids,
                          const Tokenizer& tokenizer) {
  const int32_t begin_id = tools::BeginId(tokenizer);
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
  RETURN_IF_ERROR(ReadDocuments(path, [&](const std::string& text) {
    if (text.empty()) return true;
    const std::vector<int32_t> ids = tools::EncodeDocument(text, tokenizer);
    rest.insert(rest.end(), ids.begin(), ids.end());
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
  absl::StatusOr<std::vector<tools::ChatPart>> parts = tools::EncodeChat(item.messages, tokenizer);
  if (!parts.ok()) return tools::AtPlace(item.place, parts.status());
  // What comes after the last answer says nothing about any.
  while (!parts->empty() && parts->back().answer == tools::ChatPart::kNotAnAnswer)
    parts->pop_back();
  if (parts->empty()) {
    return absl::InvalidArgumentError(
        fmt::format("{}: messages: none has the role 'assistant'", item.place));
  }
  ScoredSequence sequence;
  sequence.place = item.place;
  for (const tools::ChatPart& part : *parts) {
    const bool is_answer = part.answer != tools::ChatPart::kNotAnAnswer;
    Append(part.ids, /*is_scored=*/is_answer, &sequence);
    if (!is_answer) continue;
    const std::string& answer = item.messages[part.answer].content;
    if (answer.empty()) {
      return absl::InvalidArgumentError(fmt::format(
          "{}: messages[{}].content: an answer must not be empty", item.place, part.answer));
    }
    sequence.num_bytes += std::ssize(answer);
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
