#include "api_server/openai/responses.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "api_server/openai/api_error.h"
#include "api_server/openai/ids.h"
#include "tests/fakes/fake_llm.h"

namespace wintserve {
namespace {

using testing::ElementsAre;
using testing::MatchesRegex;

ResponseIdentity Identity(Endpoint endpoint) { return {endpoint, "the-id", 1700000000, "m"}; }

const LLM& Llm() {
  static const FakeLlm llm;
  return llm;
}

ApiRequest Request(Endpoint endpoint, size_t num_prompts, int n) {
  ApiRequest request;
  request.endpoint = endpoint;
  request.prompts.assign(num_prompts, PromptSource("p"));
  request.num_choices_per_prompt = n;
  return request;
}

GenerationUpdate Update(std::vector<ChoiceDelta> choices, int num_completion_tokens,
                        bool finished) {
  GenerationUpdate update;
  update.choices = std::move(choices);
  update.num_prompt_tokens = 5;
  update.num_completion_tokens = num_completion_tokens;
  update.num_cached_tokens = 2;
  update.finished = finished;
  return update;
}

TEST(ToApiError, ADeadlineIsATimeoutError) {
  const ApiError error = ToApiError(absl::DeadlineExceededError("its 2 s are up"));
  EXPECT_EQ(error.http_status, 504);
  EXPECT_EQ(ErrorBody(error),
            R"({"error":{"message":"its 2 s are up","type":"timeout_error","param":null,)"
            R"("code":"timeout"}})");
}

TEST(NewResponseIdentity, IdsAreUuidsWithTheEndpointsPrefix) {
  constexpr char kUuid[] = "[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}";
  EXPECT_THAT(NewResponseIdentity(Endpoint::kChat, "m").id,
              MatchesRegex(std::string("chatcmpl-") + kUuid));
  EXPECT_THAT(NewResponseIdentity(Endpoint::kCompletions, "m").id,
              MatchesRegex(std::string("cmpl-") + kUuid));
  EXPECT_NE(NewUuid(), NewUuid());
}

TEST(ResponseAssembler, ChatBodyHasSortedChoicesAndUsage) {
  ResponseAssembler assembler(Identity(Endpoint::kChat), Request(Endpoint::kChat, 1, 2), Llm());
  assembler.Add(0, Update({{1, "春", {}, {}, {}}, {0, "a", {}, {}, {}}}, 2, false));
  EXPECT_FALSE(assembler.finished());
  assembler.Add(
      0, Update({{0, "b", {}, FinishReason::kStop, {}}, {1, "眠", {}, FinishReason::kLength, {}}},
                4, true));
  EXPECT_TRUE(assembler.finished());
  EXPECT_EQ(
      assembler.Body(),
      R"({"id":"the-id","object":"chat.completion","created":1700000000,"model":"m","choices":[)"
      R"({"index":0,"message":{"role":"assistant","content":"ab"},"logprobs":null,)"
      R"("finish_reason":"stop"},)"
      R"({"index":1,"message":{"role":"assistant","content":"春眠"},"logprobs":null,)"
      R"("finish_reason":"length"}],)"
      R"("usage":{"prompt_tokens":5,"completion_tokens":4,"total_tokens":9,)"
      R"("prompt_tokens_details":{"cached_tokens":2}}})");
}

TEST(ResponseAssembler, CompletionChoicesArePromptMajorAndUsageIsTheSum) {
  ResponseAssembler assembler(Identity(Endpoint::kCompletions),
                              Request(Endpoint::kCompletions, 2, 2), Llm());
  const auto finish = FinishReason::kStop;
  assembler.Add(1, Update({{0, "c", {}, finish, {}}, {1, "d", {}, finish, {}}}, 2, true));
  EXPECT_FALSE(assembler.finished());
  assembler.Add(0, Update({{0, "a", {}, finish, {}}, {1, "b", {}, finish, {}}}, 3, true));
  ASSERT_TRUE(assembler.finished());
  const auto body = nlohmann::json::parse(assembler.Body());
  EXPECT_EQ(body["object"], "text_completion");
  ASSERT_EQ(body["choices"].size(), 4u);
  const std::string texts[] = {"a", "b", "c", "d"};
  for (int i = 0; i < 4; ++i) {
    EXPECT_EQ(body["choices"][i]["index"], i);
    EXPECT_EQ(body["choices"][i]["text"], texts[i]);
  }
  EXPECT_EQ(body["usage"]["prompt_tokens"], 10);
  EXPECT_EQ(body["usage"]["completion_tokens"], 5);
  EXPECT_EQ(body["usage"]["prompt_tokens_details"]["cached_tokens"], 4)
      << "two prompts; not once more for each choice";
}

TEST(ResponseAssembler, TheUpdateThatSaysAcceptedAddsNothing) {
  ResponseAssembler assembler(Identity(Endpoint::kChat), Request(Endpoint::kChat, 1, 1), Llm());
  assembler.Add(0, Update({}, 0, false));
  EXPECT_FALSE(assembler.finished());
  assembler.Add(0, Update({{0, "a", {}, FinishReason::kStop, {}}}, 1, true));
  const auto body = nlohmann::json::parse(assembler.Body());
  EXPECT_EQ(body["choices"][0]["message"]["content"], "a");
  EXPECT_EQ(body["usage"]["prompt_tokens"], 5);
}

TokenLogprobs Logprobs(const std::string& text, float logprob, std::vector<LogprobEntry> top,
                       int text_offset = 0) {
  TokenLogprobs logprobs;
  logprobs.token = {5, text, text, logprob};
  logprobs.top = std::move(top);
  logprobs.text_offset = text_offset;
  return logprobs;
}

ApiRequest WithLogprobs(Endpoint endpoint, int num_top_logprobs) {
  ApiRequest request = Request(endpoint, 1, 1);
  request.num_top_logprobs = num_top_logprobs;
  return request;
}

TEST(ResponseAssembler, ChatLogprobsHaveTokenBytesAndTheMostProbable) {
  ResponseAssembler assembler(Identity(Endpoint::kChat), WithLogprobs(Endpoint::kChat, 2), Llm());
  const std::vector<LogprobEntry> top = {{7, "bytes:\\xe6", "\xe6", -0.125f},
                                         {5, "春", "春", -1e30f}};
  assembler.Add(0, Update({{0, "春", {}, {}, {Logprobs("春", -0.5f, top)}}}, 1, false));
  assembler.Add(
      0, Update({{0, "a", {}, FinishReason::kLength, {Logprobs("a", -0.25f, {})}}}, 2, true));
  const auto logprobs = nlohmann::json::parse(assembler.Body())["choices"][0]["logprobs"];
  EXPECT_EQ(logprobs, nlohmann::json::parse(R"({"refusal": null, "content": [
      {"token": "春", "logprob": -0.5, "bytes": [230, 152, 165], "top_logprobs": [
          {"token": "bytes:\\xe6", "logprob": -0.125, "bytes": [230]},
          {"token": "春", "logprob": -9999.0, "bytes": [230, 152, 165]}]},
      {"token": "a", "logprob": -0.25, "bytes": [97], "top_logprobs": []}]})"));
}

TEST(ResponseAssembler, CompletionLogprobsAreColumnsThatHoldTheSampledTokenToo) {
  ResponseAssembler assembler(Identity(Endpoint::kCompletions),
                              WithLogprobs(Endpoint::kCompletions, 1), Llm());
  assembler.Add(0, Update({{0,
                            "ab",
                            {},
                            FinishReason::kStop,
                            {Logprobs("a", -0.5f, {{8, "x", "x", -0.25f}}, 0),
                             Logprobs("b", -0.125f, {{9, "b", "b", -0.125f}}, 1)}}},
                          2, true));
  const auto logprobs = nlohmann::json::parse(assembler.Body())["choices"][0]["logprobs"];
  EXPECT_EQ(logprobs, nlohmann::json::parse(R"({"tokens": ["a", "b"],
      "token_logprobs": [-0.5, -0.125], "top_logprobs": [{"x": -0.25, "a": -0.5}, {"b": -0.125}],
      "text_offset": [0, 1]})"));
}

TEST(ResponseAssembler, OfTokensThatAreSpelledAlikeTheMoreProbableOneIsAmongTheTop) {
  const std::vector<LogprobEntry> top = {{65, "A", "A", -0.25f}, {300, "A", "A", -4}};
  for (const float own : {-0.25f, -4.0f, -8.0f}) {
    SCOPED_TRACE(own);
    ResponseAssembler assembler(Identity(Endpoint::kCompletions),
                                WithLogprobs(Endpoint::kCompletions, 2), Llm());
    assembler.Add(0,
                  Update({{0, "A", {}, FinishReason::kStop, {Logprobs("A", own, top)}}}, 1, true));
    const auto logprobs = nlohmann::json::parse(assembler.Body())["choices"][0]["logprobs"];
    EXPECT_EQ(logprobs["token_logprobs"], nlohmann::json{own});
    EXPECT_EQ(logprobs["top_logprobs"], nlohmann::json::parse(R"([{"A": -0.25}])"));
  }
}

TEST(ResponseAssembler, EchoPutsEachPromptBeforeItsChoices) {
  ApiRequest request = Request(Endpoint::kCompletions, 2, 2);
  request.echo_texts = {"p", "q"};
  ResponseAssembler assembler(Identity(Endpoint::kCompletions), request, Llm());
  const auto finish = FinishReason::kStop;
  for (const size_t prompt : {0, 1}) {
    assembler.Add(prompt, Update({{0, "0", {}, finish, {}}, {1, "1", {}, finish, {}}}, 2, true));
  }
  const auto body = nlohmann::json::parse(assembler.Body());
  const std::string texts[] = {"p0", "p1", "q0", "q1"};
  for (int i = 0; i < 4; ++i) EXPECT_EQ(body["choices"][i]["text"], texts[i]);
}

TEST(StreamAssembler, LogprobsComeWithTheTextOfTheirTokens) {
  StreamAssembler assembler(Identity(Endpoint::kChat), WithLogprobs(Endpoint::kChat, 0), Llm());
  std::vector<std::string> payloads;
  assembler.Add(0, Update({{0, "", {7}, {}, {}}}, 1, false), &payloads);
  assembler.Add(
      0, Update({{0, "ab", {8}, {}, {Logprobs("a", -1, {}), Logprobs("b", -2, {})}}}, 2, false),
      &payloads);
  assembler.Add(0, Update({{0, "", {9}, FinishReason::kStop, {}}}, 3, true), &payloads);
  ASSERT_EQ(payloads.size(), 3u);
  std::vector<nlohmann::json> logprobs;
  for (const std::string& payload : payloads) {
    logprobs.push_back(nlohmann::json::parse(payload)["choices"][0]["logprobs"]);
  }
  EXPECT_TRUE(logprobs[0].is_null());
  ASSERT_EQ(logprobs[1]["content"].size(), 2u);
  EXPECT_EQ(logprobs[1]["content"][1]["logprob"], -2);
  EXPECT_TRUE(logprobs[2].is_null());
}

TEST(StreamAssembler, EchoIsAChunkOfItsOwnBeforeEachChoice) {
  ApiRequest request = Request(Endpoint::kCompletions, 1, 2);
  request.echo_texts = {"p"};
  StreamAssembler assembler(Identity(Endpoint::kCompletions), request, Llm());
  std::vector<std::string> payloads;
  const auto finish = FinishReason::kStop;
  assembler.Add(0, Update({{0, "a", {}, finish, {}}, {1, "b", {}, finish, {}}}, 2, true),
                &payloads);
  std::string texts[2];
  for (const std::string& payload : payloads) {
    const auto choice = nlohmann::json::parse(payload)["choices"][0];
    texts[choice["index"].get<int>()] += choice["text"];
  }
  EXPECT_EQ(texts[0], "pa");
  EXPECT_EQ(texts[1], "pb");
}

// The prompt "pq", where q has the log-probability -0.5 and two more probable tokens were looked
// at.
GenerationUpdate WithPrompt(GenerationUpdate update) {
  update.prompt_logprobs = {.token_ids = {'p', 'q'},
                            .positions = {{-0.5f, 3, {{'x', -0.25f}, {'y', -0.375f}}}}};
  return update;
}

ApiRequest EchoingLogprobs(int num_top_logprobs, int n = 1) {
  ApiRequest request = Request(Endpoint::kCompletions, 1, n);
  request.echo = true;
  request.echo_texts = {"pq"};
  request.num_top_logprobs = num_top_logprobs;
  return request;
}

TEST(ResponseAssembler, EchoedTokensHaveLogprobsBeforeTheSampledOnes) {
  const nlohmann::json top = nlohmann::json::parse(
      R"([{"q": -0.5}, {"q": -0.5, "x": -0.25}, {"q": -0.5, "x": -0.25, "y": -0.375}])");
  for (int num_top = 0; num_top < 3; ++num_top) {
    SCOPED_TRACE(num_top);
    ResponseAssembler assembler(Identity(Endpoint::kCompletions), EchoingLogprobs(num_top, 2),
                                Llm());
    assembler.Add(0, WithPrompt(Update({{0, "a", {}, FinishReason::kStop, {Logprobs("a", -1, {})}}},
                                       1, false)));
    assembler.Add(0, Update({{1, "b", {}, FinishReason::kStop, {Logprobs("b", -2, {})}}}, 2, true));
    const auto choices = nlohmann::json::parse(assembler.Body())["choices"];
    for (int i = 0; i < 2; ++i) {
      const std::string text = i == 0 ? "a" : "b";
      const auto& logprobs = choices[i]["logprobs"];
      EXPECT_EQ(choices[i]["text"], "pq" + text);
      EXPECT_EQ(logprobs["tokens"], (nlohmann::json{"p", "q", text}));
      EXPECT_EQ(logprobs["token_logprobs"], (nlohmann::json{nullptr, -0.5, -1 - i}));
      EXPECT_EQ(logprobs["text_offset"], (nlohmann::json{0, 1, 2}));
      EXPECT_EQ(logprobs["top_logprobs"],
                (nlohmann::json{nullptr, top[num_top], {{text, -1 - i}}}));
      EXPECT_FALSE(choices[i].contains("prompt_logprobs"));
    }
  }
}

TEST(ResponseAssembler, OfEchoedTokensThatAreSpelledAlikeTheMoreProbableOneIsAmongTheTop) {
  ResponseAssembler assembler(Identity(Endpoint::kCompletions), EchoingLogprobs(2), Llm());
  GenerationUpdate update = Update({{0, "", {}, FinishReason::kLength, {}}}, 0, true);
  constexpr int32_t kAlsoQ = 256 + 'q';
  update.prompt_logprobs = {.token_ids = {'p', 'q'},
                            .positions = {{-0.5f, 2, {{kAlsoQ, -0.25f}, {'q', -0.5f}}}}};
  assembler.Add(0, update);
  const auto logprobs = nlohmann::json::parse(assembler.Body())["choices"][0]["logprobs"];
  EXPECT_EQ(logprobs["token_logprobs"], (nlohmann::json{nullptr, -0.5}));
  EXPECT_EQ(logprobs["top_logprobs"], nlohmann::json::parse(R"([null, {"q": -0.25}])"));
}

TEST(ResponseAssembler, PromptLogprobsAreByIdWithRankAndText) {
  for (const Endpoint endpoint : {Endpoint::kChat, Endpoint::kCompletions}) {
    ApiRequest request = Request(endpoint, 1, 1);
    request.prompt_logprobs = 1;
    ResponseAssembler assembler(Identity(endpoint), request, Llm());
    assembler.Add(0, WithPrompt(Update({{0, "a", {}, FinishReason::kStop, {}}}, 1, true)));
    const auto choice = nlohmann::json::parse(assembler.Body())["choices"][0];
    EXPECT_TRUE(choice["logprobs"].is_null());
    EXPECT_EQ(choice["prompt_logprobs"], nlohmann::json::parse(R"([null, {
        "113": {"logprob": -0.5, "rank": 3, "decoded_token": "q"},
        "120": {"logprob": -0.25, "rank": 1, "decoded_token": "x"}}])"));
  }
}

TEST(StreamAssembler, EchoBringsTheLogprobsOfThePromptForEachChoice) {
  StreamAssembler assembler(Identity(Endpoint::kCompletions), EchoingLogprobs(1, 2), Llm());
  std::vector<std::string> payloads;
  assembler.Add(0, WithPrompt(Update({{0, "a", {}, {}, {Logprobs("a", -1, {})}}}, 1, false)),
                &payloads);
  const auto finish = FinishReason::kLength;
  assembler.Add(
      0,
      Update({{0, "b", {}, finish, {Logprobs("b", -2, {}, 1)}}, {1, "", {}, finish, {}}}, 2, true),
      &payloads);
  nlohmann::json tokens[2] = {nlohmann::json::array(), nlohmann::json::array()};
  nlohmann::json offsets[2] = {nlohmann::json::array(), nlohmann::json::array()};
  nlohmann::json values[2] = {nlohmann::json::array(), nlohmann::json::array()};
  std::string texts[2];
  for (const std::string& payload : payloads) {
    const auto choice = nlohmann::json::parse(payload)["choices"][0];
    const int index = choice["index"];
    texts[index] += choice["text"];
    if (choice["logprobs"].is_null()) continue;
    for (const auto& token : choice["logprobs"]["tokens"]) tokens[index].push_back(token);
    for (const auto& offset : choice["logprobs"]["text_offset"]) offsets[index].push_back(offset);
    for (const auto& value : choice["logprobs"]["token_logprobs"]) values[index].push_back(value);
  }
  EXPECT_EQ(texts[0], "pqab");
  EXPECT_EQ(tokens[0], (nlohmann::json{"p", "q", "a", "b"}));
  EXPECT_EQ(offsets[0], (nlohmann::json{0, 1, 2, 3}));
  EXPECT_EQ(values[0], (nlohmann::json{nullptr, -0.5, -1, -2}));
  EXPECT_EQ(texts[1], "pq");
  EXPECT_EQ(tokens[1], (nlohmann::json{"p", "q"}));
}

std::string Chunk(const std::string& choice, const std::string& after = "") {
  return R"({"id":"the-id","object":"chat.completion.chunk","created":1700000000,"model":"m",)"
         R"("choices":[)" +
         choice + "]" + after + "}";
}

TEST(StreamAssembler, FollowsOpenAisOrder) {
  ApiRequest request = Request(Endpoint::kChat, 1, 1);
  request.stream_options.include_usage = true;
  StreamAssembler assembler(Identity(Endpoint::kChat), request, Llm());
  std::vector<std::string> payloads;
  assembler.Add(0, Update({{0, "", {7}, {}, {}}}, 1, false), &payloads);
  assembler.Add(0, Update({{0, "春", {8}, {}, {}}}, 2, false), &payloads);
  assembler.Add(0, Update({{0, "眠", {9}, FinishReason::kStop, {}}}, 3, true), &payloads);
  EXPECT_TRUE(assembler.finished());
  const std::string null_usage = R"(,"usage":null)";
  const auto delta = [](const std::string& content, const std::string& finish) {
    return R"({"index":0,"delta":)" + content + R"(,"logprobs":null,"finish_reason":)" + finish +
           "}";
  };
  EXPECT_THAT(
      payloads,
      ElementsAre(Chunk(delta(R"({"role":"assistant","content":""})", "null"), null_usage),
                  Chunk(delta(R"({"content":"春"})", "null"), null_usage),
                  Chunk(delta(R"({"content":"眠"})", "null"), null_usage),
                  Chunk(delta("{}", R"("stop")"), null_usage),
                  Chunk("", R"(,"usage":{"prompt_tokens":5,"completion_tokens":3,)"
                            R"("total_tokens":8,"prompt_tokens_details":{"cached_tokens":2}})")));
}

TEST(StreamAssembler, TheUpdateThatSaysAcceptedMakesNoChunk) {
  StreamAssembler assembler(Identity(Endpoint::kChat), Request(Endpoint::kChat, 1, 1), Llm());
  std::vector<std::string> payloads;
  assembler.Add(0, Update({}, 0, false), &payloads);
  EXPECT_TRUE(payloads.empty());
  EXPECT_FALSE(assembler.finished());
}

TEST(StreamAssembler, HasNoUsageKeyUnlessAsked) {
  StreamAssembler assembler(Identity(Endpoint::kChat), Request(Endpoint::kChat, 1, 1), Llm());
  std::vector<std::string> payloads;
  assembler.Add(0, Update({{0, "a", {}, FinishReason::kStop, {}}}, 1, true), &payloads);
  ASSERT_EQ(payloads.size(), 3u);
  for (const std::string& payload : payloads) {
    EXPECT_FALSE(nlohmann::json::parse(payload).contains("usage")) << payload;
  }
}

TEST(StreamAssembler, PutsRunningUsageOnEveryChunkWhenAsked) {
  ApiRequest request = Request(Endpoint::kCompletions, 1, 1);
  request.stream_options = {true, true};
  StreamAssembler assembler(Identity(Endpoint::kCompletions), request, Llm());
  std::vector<std::string> payloads;
  assembler.Add(0, Update({{0, "a", {}, {}, {}}}, 1, false), &payloads);
  assembler.Add(0, Update({{0, "b", {}, FinishReason::kStop, {}}}, 2, true), &payloads);
  std::vector<int> completion_tokens;
  for (const std::string& payload : payloads) {
    const auto usage = nlohmann::json::parse(payload)["usage"];
    completion_tokens.push_back(usage["completion_tokens"]);
    EXPECT_EQ(usage["prompt_tokens_details"]["cached_tokens"], 2);
  }
  EXPECT_THAT(completion_tokens, ElementsAre(1, 2, 2, 2));
}

TEST(StreamAssembler, EveryChoiceHasItsOwnRoleChunkInOrderOfIndex) {
  StreamAssembler assembler(Identity(Endpoint::kChat), Request(Endpoint::kChat, 1, 2), Llm());
  std::vector<std::string> payloads;
  assembler.Add(0, Update({{1, "b", {}, {}, {}}, {0, "a", {}, {}, {}}}, 2, false), &payloads);
  std::vector<int> indices;
  indices.reserve(payloads.size());
  for (const std::string& payload : payloads) {
    indices.push_back(nlohmann::json::parse(payload)["choices"][0]["index"]);
  }
  EXPECT_THAT(indices, ElementsAre(0, 0, 1, 1));
}

}  // namespace
}  // namespace wintserve
