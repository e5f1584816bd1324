#include "api_server/openai/prompts.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "api_server/openai/api_error.h"
#include "tests/fakes/fake_llm.h"

namespace wintserve {
namespace {

using testing::HasSubstr;

ApiRequest CompletionOf(PromptSource prompt) {
  ApiRequest request;
  request.endpoint = Endpoint::kCompletions;
  request.prompts = {std::move(prompt)};
  return request;
}

TEST(CheckModelName, KnowsEveryNameOfTheModel) {
  const FakeLlm llm;
  const ModelNames names{{"alias"}, /*strict=*/true};
  for (const char* name : {"fake", "models/fake", "alias", "", "default", "null"}) {
    EXPECT_TRUE(CheckModelName(name, llm, names).ok()) << name;
  }
}

TEST(CheckModelName, RefusesOthersOnlyWhenStrict) {
  const FakeLlm llm;
  EXPECT_TRUE(CheckModelName("gpt-4o", llm, {{}, /*strict=*/false}).ok());
  const ApiError error = ToApiError(CheckModelName("gpt-4o", llm, {{}, /*strict=*/true}));
  EXPECT_EQ(error.http_status, 404);
  EXPECT_EQ(error.code, "model_not_found");
  EXPECT_EQ(error.param, "model");
  EXPECT_EQ(error.message, "model: \"gpt-4o\" does not exist; this server serves \"fake\"");
}

TEST(MakeGenerationRequests, RendersAndEncodesMessages) {
  const FakeLlm llm;
  ApiRequest request;
  request.prompts = {ChatMessages{{"user", "hi"}}};
  const auto generations = MakeGenerationRequests(request, llm, "id");
  ASSERT_TRUE(generations.ok()) << generations.status();
  ASSERT_EQ(generations->size(), 1u);
  EXPECT_EQ(llm.Decode(generations->front().prompt_ids), "user:hi\nassistant:");
  EXPECT_EQ(generations->front().id, "id");
}

TEST(MakeGenerationRequests, TakesDefaultsFromTheModelAndClampsHugeLimits) {
  const FakeLlm llm;
  ApiRequest request = CompletionOf("a");
  request.max_tokens = int64_t{1} << 40;
  const auto generations = MakeGenerationRequests(request, llm, "id");
  ASSERT_TRUE(generations.ok());
  EXPECT_EQ(generations->front().temperature, llm.defaults().temperature);
  EXPECT_EQ(generations->front().top_p, llm.defaults().top_p);
  EXPECT_EQ(generations->front().max_tokens, std::numeric_limits<int>::max());
}

TEST(MakeGenerationRequests, PassesOnHowToSchedule) {
  const FakeLlm llm;
  ApiRequest request = CompletionOf("a");
  request.user = "u";
  request.min_tokens = 3;
  request.ignore_eos = true;
  request.priority = -2;
  request.cache_salt = "s";
  request.timeout_ms = 1500;
  const auto generations = MakeGenerationRequests(request, llm, "id");
  ASSERT_TRUE(generations.ok());
  const GenerationRequest& generation = generations->front();
  EXPECT_EQ(generation.tenant, "u");
  EXPECT_EQ(generation.min_tokens, 3);
  EXPECT_TRUE(generation.ignore_eos);
  EXPECT_EQ(generation.priority, -2);
  EXPECT_EQ(generation.cache_salt, "s");
  EXPECT_EQ(generation.timeout_ms, 1500);
}

TEST(MakeGenerationRequests, PassesOnPenaltiesAndTokenRules) {
  const FakeLlm llm;
  ApiRequest request = CompletionOf("a");
  request.min_p = 0.25;
  request.repetition_penalty = 1.5;
  request.presence_penalty = -0.5;
  request.frequency_penalty = 0.75;
  request.logit_bias = {{7, -100.0f}};
  request.bad_words = {"a"};
  request.bad_words_token_ids = {9, 97, 8};
  request.stop_token_ids = {6};
  request.num_top_logprobs = 3;
  const auto generations = MakeGenerationRequests(request, llm, "id");
  ASSERT_TRUE(generations.ok()) << generations.status();
  const GenerationRequest& generation = generations->front();
  EXPECT_EQ(generation.min_p, 0.25f);
  EXPECT_EQ(generation.repetition_penalty, 1.5f);
  EXPECT_EQ(generation.presence_penalty, -0.5f);
  EXPECT_EQ(generation.frequency_penalty, 0.75f);
  EXPECT_THAT(generation.logit_bias, testing::ElementsAre(testing::Pair(7, -100.0f)));
  EXPECT_THAT(generation.banned_token_ids, testing::ElementsAre(8, 9, 97));  // 'a' is 97
  EXPECT_THAT(generation.stop_token_ids, testing::ElementsAre(6));
  EXPECT_EQ(generation.num_top_logprobs, 3);
}

TEST(EchoTexts, AreThePromptsAsTextWhenAskedFor) {
  const FakeLlm llm;
  ApiRequest request = CompletionOf("ab");
  request.prompts.push_back(TokenIds{99, 100});
  auto generations = MakeGenerationRequests(request, llm, "id");
  ASSERT_TRUE(generations.ok());
  EXPECT_TRUE(EchoTexts(request, *generations, llm).empty());
  request.echo = true;
  EXPECT_THAT(EchoTexts(request, *generations, llm), testing::ElementsAre("ab", "cd"));
  // Had the tokenizer put a space in front, the text_offset of its tokens would count it.
  (*generations)[0].prompt_ids = {' ', 'a', 'b'};
  EXPECT_THAT(EchoTexts(request, *generations, llm), testing::ElementsAre("ab", "cd"));
  request.num_top_logprobs = 0;
  EXPECT_THAT(EchoTexts(request, *generations, llm), testing::ElementsAre(" ab", "cd"));
}

TEST(MakeGenerationRequests, PromptLogprobsAreAskedForByEchoOrByName) {
  const FakeLlm llm;
  struct Case {
    bool echo;
    std::optional<int> logprobs;
    std::optional<int> prompt_logprobs;
    std::optional<int> expected;
  };
  for (const Case& c :
       {Case{false, 3, {}, {}}, Case{true, {}, {}, {}}, Case{true, 3, {}, 3}, Case{true, 0, {}, 0},
        Case{false, {}, 2, 2}, Case{false, 5, 2, 2}, Case{true, 5, 2, 5}, Case{true, 1, 2, 2}}) {
    ApiRequest request = CompletionOf("ab");
    request.echo = c.echo;
    request.num_top_logprobs = c.logprobs;
    request.prompt_logprobs = c.prompt_logprobs;
    const auto generations = MakeGenerationRequests(request, llm, "id");
    ASSERT_TRUE(generations.ok());
    EXPECT_EQ(generations->front().num_prompt_top_logprobs, c.expected);
    EXPECT_EQ(generations->front().num_top_logprobs, c.logprobs);
    EXPECT_EQ(generations->front().stop_token_has_logprobs, c.echo && c.logprobs.has_value());
    EXPECT_EQ(request.wants_prompt_logprobs(), c.expected.has_value());
  }
}

TEST(MakeGenerationRequests, LogprobsAreBoundedByWhatTheServerGives) {
  FakeLlm llm;
  llm.SetMaxTopLogprobs(4);
  ApiRequest request = CompletionOf("a");
  request.num_top_logprobs = 4;
  EXPECT_TRUE(MakeGenerationRequests(request, llm, "id").ok());
  request.num_top_logprobs = 5;
  ApiError error = ToApiError(MakeGenerationRequests(request, llm, "id").status());
  EXPECT_EQ(error.param, "logprobs");
  EXPECT_EQ(error.message, "logprobs: must be at most 4 on this server (--max-logprobs), got 5");
  request.num_top_logprobs.reset();
  request.prompt_logprobs = 5;
  error = ToApiError(MakeGenerationRequests(request, llm, "id").status());
  EXPECT_EQ(error.message,
            "prompt_logprobs: must be at most 4 on this server (--max-logprobs), got 5");
  request.num_top_logprobs = 5;
  llm.SetMaxTopLogprobs(-1);
  request.num_top_logprobs = 0;
  error = ToApiError(MakeGenerationRequests(request, llm, "id").status());
  EXPECT_EQ(error.http_status, 400);
  EXPECT_THAT(error.message, HasSubstr("switched off on this server (--no-enable-logprob)"));
}

TEST(MakeGenerationRequests, MakesOneOfEachPrompt) {
  const FakeLlm llm;
  ApiRequest request = CompletionOf("a");
  request.prompts.push_back(TokenIds{98});
  const auto generations = MakeGenerationRequests(request, llm, "id");
  ASSERT_TRUE(generations.ok());
  ASSERT_EQ(generations->size(), 2u);
  EXPECT_EQ((*generations)[1].prompt_ids, TokenIds{98});
  EXPECT_EQ((*generations)[1].id, "id-1");
}

struct BadPrompt {
  const char* name;
  ApiRequest request;
  const char* param;
  const char* code;
  const char* message;
};

TEST(MakeGenerationRequests, BoundTheLogprobsOfPromptsInOneAnswer) {
  FakeLlm llm;
  llm.SetMaxModelLen(1 << 20);
  // 2 * 2,048 tokens with (1 + 5) + (1 + 1) each, in 32 choices: as many as may be.
  ApiRequest request = CompletionOf(std::string(2048, 'a'));
  request.prompts.push_back(std::string(2048, 'b'));
  request.echo = true;
  request.num_top_logprobs = 5;
  request.prompt_logprobs = 1;
  request.num_choices_per_prompt = 32;
  EXPECT_TRUE(MakeGenerationRequests(request, llm, "id").ok());
  request.prompts.push_back("c");
  ApiError error = ToApiError(MakeGenerationRequests(request, llm, "id").status());
  EXPECT_EQ(error.http_status, 400);
  EXPECT_EQ(error.param, "logprobs");
  EXPECT_THAT(
      error.message,
      HasSubstr("must be at most 1048576 log-probabilities in one answer, got 1048832: 8 for "
                "each of 4097 prompt tokens in 32 choices"));
  request.echo = false;
  request.prompt_logprobs = 20;
  error = ToApiError(MakeGenerationRequests(request, llm, "id").status());
  EXPECT_EQ(error.param, "prompt_logprobs");
  request.prompt_logprobs = std::nullopt;
  EXPECT_TRUE(MakeGenerationRequests(request, llm, "id").ok());
}

class BadPrompts : public testing::TestWithParam<BadPrompt> {};

TEST_P(BadPrompts, AreRefused) {
  FakeLlm llm;
  llm.SetMaxModelLen(8);
  const auto generations = MakeGenerationRequests(GetParam().request, llm, "id");
  ASSERT_FALSE(generations.ok());
  const ApiError error = ToApiError(generations.status());
  EXPECT_EQ(error.http_status, 400);
  EXPECT_EQ(error.param, GetParam().param);
  EXPECT_EQ(error.code, GetParam().code);
  EXPECT_THAT(error.message, HasSubstr(GetParam().message));
}

ApiRequest ToolMessage() {
  ApiRequest request;
  request.prompts = {ChatMessages{{"tool", "7"}}};
  return request;
}

ApiRequest TwoPromptsTheSecondEmpty() {
  ApiRequest request = CompletionOf("a");
  request.prompts.push_back("");
  return request;
}

ApiRequest WithMinTokens(int64_t min_tokens) {
  ApiRequest request = CompletionOf("123456");
  request.min_tokens = min_tokens;
  return request;
}

template <typename Spoil>
ApiRequest Spoiled(Spoil spoil) {
  ApiRequest request = CompletionOf("a");
  spoil(&request);
  return request;
}

INSTANTIATE_TEST_SUITE_P(
    TokenRules, BadPrompts,
    testing::Values(
        BadPrompt{"BiasOutsideVocabulary", Spoiled([](auto* r) {
                    r->logit_bias = {{256, 1.0f}};
                  }),
                  "logit_bias.256", "invalid_value",
                  "token id 256 is outside the vocabulary, 0 to 255"},
        BadPrompt{"BannedIdOutsideVocabulary", Spoiled([](auto* r) {
                    r->bad_words_token_ids = {3, 256};
                  }),
                  "bad_words_token_ids[1]", "invalid_value",
                  "token id 256 is outside the vocabulary, 0 to 255"},
        BadPrompt{"StopTokenOutsideVocabulary",
                  Spoiled([](auto* r) { r->stop_token_ids = {1000}; }), "stop_token_ids[0]",
                  "invalid_value", "token id 1000 is outside the vocabulary, 0 to 255"},
        BadPrompt{"BadWordOfTwoTokens", Spoiled([](auto* r) {
                    r->bad_words = {"a", "ab"};
                  }),
                  "bad_words[1]", "invalid_value",
                  "must be one token, with or without a space before it, but \"ab\" is 2 tokens"}),
    [](const auto& info) { return info.param.name; });

INSTANTIATE_TEST_SUITE_P(
    All, BadPrompts,
    testing::Values(
        BadPrompt{"TooLong", CompletionOf("12345678"), "prompt", "context_length_exceeded",
                  "Input text is too long: 8 tokens, but at most 7 are allowed"},
        BadPrompt{"Empty", CompletionOf(""), "prompt", "invalid_value", "at least one token"},
        BadPrompt{"SecondEmpty", TwoPromptsTheSecondEmpty(), "prompt[1]", "invalid_value",
                  "at least one token"},
        BadPrompt{"IdOutsideVocabulary", CompletionOf(TokenIds{1, 256}), "prompt", "invalid_value",
                  "token id 256 is outside the vocabulary, 0 to 255"},
        BadPrompt{"MoreMinTokensThanRoom", WithMinTokens(3), "min_tokens", "invalid_value",
                  "must be at most 2, which a prompt of 6 tokens leaves of max_model_len 8, got 3"},
        BadPrompt{"MinTokensBeyond32Bits", WithMinTokens(int64_t{1} << 40), "min_tokens",
                  "invalid_value", "got 1099511627776"},
        BadPrompt{"RoleWithoutWords", ToolMessage(), "messages", "invalid_value",
                  "no words for the role tool"}),
    [](const auto& info) { return info.param.name; });

TEST(MakeGenerationRequests, AcceptsAPromptThatLeavesOneToken) {
  FakeLlm llm;
  llm.SetMaxModelLen(8);
  EXPECT_TRUE(MakeGenerationRequests(CompletionOf("1234567"), llm, "id").ok());
  EXPECT_TRUE(MakeGenerationRequests(WithMinTokens(2), llm, "id").ok());
}

}  // namespace
}  // namespace wintserve
