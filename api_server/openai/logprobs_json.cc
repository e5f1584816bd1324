#include "api_server/openai/logprobs_json.h"

#include <algorithm>
#include <string>
#include <utility>

namespace wintserve {
namespace {

using Json = nlohmann::ordered_json;

// OpenAI's bound: what is less likely is as good as impossible. JSON knows no infinity.
double Bounded(float logprob) { return std::max(static_cast<double>(logprob), -9999.0); }

Json EntryJson(const LogprobEntry& entry) {
  Json bytes = Json::array();
  for (const char byte : entry.bytes) bytes.push_back(static_cast<uint8_t>(byte));
  return {{"token", entry.text}, {"logprob", Bounded(entry.logprob)}, {"bytes", std::move(bytes)}};
}

Json ChatLogprobs(const std::vector<TokenLogprobs>& tokens) {
  Json content = Json::array();
  for (const TokenLogprobs& token : tokens) {
    Json top = Json::array();
    for (const LogprobEntry& entry : token.top) top.push_back(EntryJson(entry));
    content.push_back(EntryJson(token.token));
    content.back()["top_logprobs"] = std::move(top);
  }
  return {{"content", std::move(content)}, {"refusal", nullptr}};
}

Json EmptyColumns() {
  return {{"tokens", Json::array()},
          {"token_logprobs", Json::array()},
          {"top_logprobs", Json::array()},
          {"text_offset", Json::array()}};
}

void AddToColumns(std::string token, Json logprob, Json top, int offset, Json* columns) {
  (*columns)["tokens"].push_back(std::move(token));
  (*columns)["token_logprobs"].push_back(std::move(logprob));
  (*columns)["top_logprobs"].push_back(std::move(top));
  (*columns)["text_offset"].push_back(offset);
}

// Of tokens that are spelled alike (a byte and its character) the more probable one counts.
void AddToTop(const std::string& token, double logprob, Json* top) {
  const auto [entry, is_new] = top->emplace(token, logprob);
  if (!is_new && *entry < logprob) *entry = logprob;
}

// The dictionaries of the most probable tokens hold the sampled one in any case.
Json CompletionLogprobs(const std::vector<TokenLogprobs>& tokens, int first_offset) {
  Json columns = EmptyColumns();
  for (const TokenLogprobs& token : tokens) {
    Json top = Json::object();
    for (const LogprobEntry& entry : token.top) {
      AddToTop(entry.text, Bounded(entry.logprob), &top);
    }
    const double logprob = Bounded(token.token.logprob);
    AddToTop(token.token.text, logprob, &top);
    AddToColumns(token.token.text, logprob, std::move(top), first_offset + token.text_offset,
                 &columns);
  }
  return columns;
}

// The first num_top of them, or as many as there are.
std::vector<TokenLogprob> TopOf(const PositionLogprobs& position, int num_top) {
  const auto count = std::min(position.top.size(), static_cast<size_t>(num_top));
  return {position.top.begin(), position.top.begin() + static_cast<int64_t>(count)};
}

}  // namespace

Json LogprobsJson(Endpoint endpoint, const std::vector<TokenLogprobs>& tokens, int first_offset) {
  return endpoint == Endpoint::kChat ? ChatLogprobs(tokens)
                                     : CompletionLogprobs(tokens, first_offset);
}

EchoJson EchoLogprobsJson(const PromptLogprobs& prompt, int num_top, const LLM& llm) {
  const std::vector<int> offsets = llm.TextOffsets(prompt.token_ids);
  EchoJson echo = {.logprobs = EmptyColumns(), .num_characters = offsets.back()};
  for (size_t i = 0; i < prompt.token_ids.size(); ++i) {
    std::string token = llm.TokenText(prompt.token_ids[i]);
    if (i == 0) {
      AddToColumns(std::move(token), nullptr, nullptr, offsets[i], &echo.logprobs);
      continue;
    }
    const PositionLogprobs& position = prompt.positions[i - 1];
    Json top = Json::object();
    for (const auto& [id, logprob] : TopOf(position, num_top)) {
      AddToTop(llm.TokenText(id), Bounded(logprob), &top);
    }
    const double logprob = Bounded(position.logprob);
    AddToTop(token, logprob, &top);
    AddToColumns(std::move(token), logprob, std::move(top), offsets[i], &echo.logprobs);
  }
  return echo;
}

void AppendColumns(const Json& more, Json* columns) {
  for (const auto& [name, values] : more.items()) {
    Json& column = (*columns)[name];
    column.insert(column.end(), values.begin(), values.end());
  }
}

Json PromptLogprobsJson(const PromptLogprobs& prompt, int num_top, const LLM& llm) {
  const auto entry = [&llm](int32_t id, float logprob, int rank) -> Json {
    return {{"logprob", Bounded(logprob)}, {"rank", rank}, {"decoded_token", llm.TokenText(id)}};
  };
  Json positions = Json::array({nullptr});
  for (size_t i = 0; i < prompt.positions.size(); ++i) {
    const PositionLogprobs& position = prompt.positions[i];
    const int32_t token = prompt.token_ids[i + 1];
    Json tokens = {{std::to_string(token), entry(token, position.logprob, position.rank)}};
    int rank = 0;
    for (const auto& [id, logprob] : TopOf(position, num_top)) {
      ++rank;
      if (id != token) tokens[std::to_string(id)] = entry(id, logprob, rank);
    }
    positions.push_back(std::move(tokens));
  }
  return positions;
}

}  // namespace wintserve
