#include <fmt/core.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "api_server/openai/api_error.h"
#include "api_server/openai/json_fields.h"
#include "api_server/openai/request.h"

namespace wintserve {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

constexpr char kNoParam[] = "";

struct BadRequest {
  const char* name;
  Endpoint endpoint;
  std::string body;
  const char* param;
  const char* code;
  const char* message;  // a part of it
};

// A chat request that is right but for `field`.
std::string Chat(const std::string& field) {
  return R"({"messages":[{"role":"user","content":"hi"}],)" + field + "}";
}
std::string Completion(const std::string& field) { return R"({"prompt":"hi",)" + field + "}"; }
std::string Messages(const std::string& messages) { return R"({"messages":)" + messages + "}"; }

class BadRequests : public testing::TestWithParam<BadRequest> {};

TEST_P(BadRequests, GetAnErrorThatNamesTheFieldAndWhatIsAllowed) {
  const absl::StatusOr<ApiRequest> request = ParseRequest(GetParam().endpoint, GetParam().body);
  ASSERT_FALSE(request.ok());
  const ApiError error = ToApiError(request.status());
  EXPECT_EQ(error.http_status, 400);
  EXPECT_EQ(error.type, "invalid_request_error");
  EXPECT_EQ(error.param.value_or(kNoParam), GetParam().param);
  EXPECT_EQ(error.code, GetParam().code);
  EXPECT_THAT(error.message, HasSubstr(GetParam().message));
}

constexpr Endpoint kC = Endpoint::kChat;
constexpr Endpoint kP = Endpoint::kCompletions;
constexpr char kValue[] = "invalid_value";
constexpr char kMissing[] = "missing_required_parameter";
constexpr char kJson[] = "invalid_json";
constexpr char kUnsupported[] = "unsupported_parameter";

std::string TestName(const testing::TestParamInfo<BadRequest>& info) { return info.param.name; }

INSTANTIATE_TEST_SUITE_P(
    Json, BadRequests,
    testing::Values(
        BadRequest{"Empty", kC, "", kNoParam, kJson, "not a valid JSON object"},
        BadRequest{"NotJson", kC, "hello", kNoParam, kJson, "not a valid JSON object"},
        BadRequest{"Truncated", kC, R"({"messages":[)", kNoParam, kJson, "parse error"},
        BadRequest{"TrailingText", kC, R"({"a":1} x)", kNoParam, kJson, "parse error"},
        BadRequest{"NaN", kC, Chat(R"("temperature":NaN)"), kNoParam, kJson, "parse error"},
        BadRequest{"Infinity", kC, Chat(R"("temperature":Infinity)"), kNoParam, kJson,
                   "parse error"},
        BadRequest{"NumberBeyondDouble", kC, Chat(R"("temperature":1e999)"), kNoParam, kJson,
                   "number overflow"},
        BadRequest{"AList", kC, "[1]", kNoParam, kJson, "expected an object, got [1]"},
        BadRequest{"InvalidUtf8", kC, Messages("[{\"role\":\"user\",\"content\":\"\xff\"}]"),
                   kNoParam, kJson, "UTF-8"},
        BadRequest{"LoneSurrogate", kP, R"({"prompt":"\ud800"})", kNoParam, kJson, "surrogate"},
        BadRequest{"NestedTooDeep", kC,
                   R"({"a":)" + std::string(64, '[') + std::string(64, ']') + "}", kNoParam, kJson,
                   "deeper than 64"},
        BadRequest{"HugeNesting", kC, std::string(1 << 20, '['), kNoParam, kJson,
                   "deeper than 64"}),
    TestName);

INSTANTIATE_TEST_SUITE_P(
    Messages, BadRequests,
    testing::Values(
        BadRequest{"Missing", kC, "{}", "messages", kMissing, "Field required"},
        BadRequest{"Null", kC, R"({"messages":null})", "messages", kMissing, "Field required"},
        BadRequest{"AString", kC, Messages(R"("hi")"), "messages", kValue,
                   R"(must be a non-empty list, got "hi")"},
        BadRequest{"EmptyList", kC, Messages("[]"), "messages", kValue, "non-empty"},
        BadRequest{"ElementNotAnObject", kC, Messages(R"(["hi"])"), "messages[0]", kValue,
                   R"(must be an object, got "hi")"},
        BadRequest{"NoRole", kC, Messages(R"([{"content":"hi"}])"), "messages[0].role", kMissing,
                   "Field required"},
        BadRequest{"UnknownRole", kC, Messages(R"([{"role":"robot","content":"hi"}])"),
                   "messages[0].role", kValue,
                   R"(must be one of system, developer, user, assistant, tool, got "robot")"},
        BadRequest{"NoContent", kC, Messages(R"([{"role":"user","content":"a"},{"role":"user"}])"),
                   "messages[1].content", kMissing, "Field required"},
        BadRequest{"NullContentWithoutToolCalls", kC,
                   Messages(R"([{"role":"assistant","content":null}])"), "messages[0].content",
                   kValue, "beside tool_calls"},
        BadRequest{"NumberContent", kC, Messages(R"([{"role":"user","content":5}])"),
                   "messages[0].content", kValue, "got 5"},
        BadRequest{"ImagePart", kC,
                   Messages(R"([{"role":"user","content":[{"type":"image_url"}]}])"),
                   "messages[0].content[0].type", kValue, R"(must be "text", got "image_url")"},
        BadRequest{"PartWithoutText", kC,
                   Messages(R"([{"role":"user","content":[{"type":"text"}]}])"),
                   "messages[0].content[0].text", kMissing, "Field required"},
        BadRequest{"PartNotAnObject", kC, Messages(R"([{"role":"user","content":["hi"]}])"),
                   "messages[0].content[0]", kValue, "must be an object"}),
    TestName);

INSTANTIATE_TEST_SUITE_P(
    Prompt, BadRequests,
    testing::Values(
        BadRequest{"Missing", kP, "{}", "prompt", kMissing, "Field required"},
        BadRequest{"Number", kP, R"({"prompt":5})", "prompt", kValue, "got 5"},
        BadRequest{"EmptyList", kP, R"({"prompt":[]})", "prompt", kValue, "non-empty"},
        BadRequest{"TextThenIds", kP, R"({"prompt":["a",[1]]})", "prompt[1]", kValue,
                   "must be a string like the first element, got [1]"},
        BadRequest{"IdThenText", kP, R"({"prompt":[1,"a"]})", "prompt[1]", kValue,
                   R"(must be a token id (all elements of one type), got "a")"},
        BadRequest{"NegativeId", kP, R"({"prompt":[1,-2]})", "prompt[1]", kValue, "got -2"},
        BadRequest{"FractionalId", kP, R"({"prompt":[[1.5]]})", "prompt[0][0]", kValue, "got 1.5"},
        BadRequest{"BooleanId", kP, R"({"prompt":[true]})", "prompt[0]", kValue, "got true"},
        BadRequest{"TooManyChoices", kP,
                   R"({"n":128,"prompt":["a","a","a","a","a","a","a","a","a"]})", "prompt", kValue,
                   "9 prompts times n=128 are 1152 choices; at most 1024"}),
    TestName);

INSTANTIATE_TEST_SUITE_P(
    Fields, BadRequests,
    testing::Values(
        BadRequest{"ModelNumber", kC, Chat(R"("model":5)"), "model", kValue,
                   "must be a string, got 5"},
        BadRequest{"HotTemperature", kC, Chat(R"("temperature":9)"), "temperature", kValue,
                   "temperature: must be a number from 0 to 2, got 9"},
        BadRequest{"ColdTemperature", kC, Chat(R"("temperature":-0.1)"), "temperature", kValue,
                   "got -0.1"},
        BadRequest{"TemperatureText", kC, Chat(R"("temperature":"1")"), "temperature", kValue,
                   R"(got "1")"},
        BadRequest{"TemperatureBoolean", kC, Chat(R"("temperature":true)"), "temperature", kValue,
                   "got true"},
        BadRequest{"TopPAboveOne", kC, Chat(R"("top_p":1.5)"), "top_p", kValue, "from 0 to 1"},
        BadRequest{"TopKBelowMinusOne", kC, Chat(R"("top_k":-2)"), "top_k", kValue, "from -1"},
        BadRequest{"ZeroMaxTokens", kC, Chat(R"("max_tokens":0)"), "max_tokens", kValue, "from 1"},
        BadRequest{"ZeroMaxTokensWithoutEcho", kP, Completion(R"("max_tokens":0,"echo":false)"),
                   "max_tokens", kValue,
                   R"(max_tokens: 0 is allowed only together with "echo": true)"},
        BadRequest{"ZeroMaxTokensWithEchoInAChat", kC, Chat(R"("max_tokens":0,"echo":true)"),
                   "max_tokens", kValue, "from 1"},
        BadRequest{"FewerThanNoTokens", kP, Completion(R"("max_tokens":-1,"echo":true)"),
                   "max_tokens", kValue, "from 0"},
        BadRequest{"MinTokensOfNone", kP,
                   Completion(R"("max_tokens":0,"echo":true,"min_tokens":1)"), "min_tokens", kValue,
                   "min_tokens: must be at most max_tokens, 0, got 1"},
        BadRequest{"NegativeMaxCompletionTokens", kC, Chat(R"("max_completion_tokens":-1)"),
                   "max_completion_tokens", kValue, "from 1"},
        BadRequest{"FractionalMaxTokens", kP, Completion(R"("max_tokens":5.5)"), "max_tokens",
                   kValue, "must be an integer"},
        BadRequest{"BooleanMaxTokens", kP, Completion(R"("max_tokens":true)"), "max_tokens", kValue,
                   "must be an integer"},
        BadRequest{"SeedBeyond64Bits", kC, Chat(R"("seed":9223372036854775808)"), "seed", kValue,
                   "to 9223372036854775807, got 9223372036854775808"},
        BadRequest{"ZeroN", kC, Chat(R"("n":0)"), "n", kValue, "from 1 to 128"},
        BadRequest{"LargeN", kC, Chat(R"("n":129)"), "n", kValue, "from 1 to 128"},
        BadRequest{"StreamText", kC, Chat(R"("stream":"yes")"), "stream", kValue,
                   "must be true or false"},
        BadRequest{"StreamOptionsWithoutStream", kC,
                   Chat(R"("stream_options":{"include_usage":true})"), "stream_options", kValue,
                   R"("stream": true)"},
        BadRequest{"StreamOptionsList", kC, Chat(R"("stream":true,"stream_options":[])"),
                   "stream_options", kValue, "must be an object"},
        BadRequest{"UsageNumber", kC, Chat(R"("stream":true,"stream_options":{"include_usage":1})"),
                   "stream_options.include_usage", kValue, "true or false"},
        BadRequest{"ContinuousWithoutUsage", kC,
                   Chat(R"("stream":true,"stream_options":{"continuous_usage_stats":true})"),
                   "stream_options.continuous_usage_stats", kValue, "include_usage"},
        BadRequest{"StopNumber", kC, Chat(R"("stop":5)"), "stop", kValue, "got 5"},
        BadRequest{"EmptyStop", kC, Chat(R"("stop":"")"), "stop", kValue, "1 to 256 bytes"},
        BadRequest{"EmptyStopInList", kC, Chat(R"("stop":["a",""])"), "stop[1]", kValue,
                   "1 to 256 bytes"},
        BadRequest{"LongStop", kC, Chat(R"("stop":")" + std::string(257, 'a') + "\""), "stop",
                   kValue, "1 to 256 bytes"},
        BadRequest{
            "SeventeenStops", kC,
            Chat(R"("stop":["a","a","a","a","a","a","a","a","a","a","a","a","a","a","a","a","a"])"),
            "stop", kValue, "at most 16 strings, got 17"}),
    TestName);

INSTANTIATE_TEST_SUITE_P(
    Scheduling, BadRequests,
    testing::Values(
        BadRequest{"PriorityText", kC, Chat(R"("priority":"high")"), "priority", kValue,
                   R"(must be an integer from -2147483648 to 2147483647, got "high")"},
        BadRequest{"PriorityBeyond32Bits", kP, Completion(R"("priority":2147483648)"), "priority",
                   kValue, "got 2147483648"},
        BadRequest{"IgnoreEosNumber", kC, Chat(R"("ignore_eos":1)"), "ignore_eos", kValue,
                   "must be true or false, got 1"},
        BadRequest{"NegativeMinTokens", kC, Chat(R"("min_tokens":-1)"), "min_tokens", kValue,
                   "from 0"},
        BadRequest{"MinAboveMaxTokens", kP, Completion(R"("min_tokens":7,"max_tokens":5)"),
                   "min_tokens", kValue, "min_tokens: must be at most max_tokens, 5, got 7"},
        BadRequest{"MinAboveMaxCompletionTokens", kC,
                   Chat(R"("min_tokens":7,"max_completion_tokens":6)"), "min_tokens", kValue,
                   "at most max_tokens, 6, got 7"},
        BadRequest{"SaltNumber", kC, Chat(R"("cache_salt":5)"), "cache_salt", kValue,
                   "must be a string, got 5"},
        BadRequest{"LongSalt", kC, Chat(R"("cache_salt":")" + std::string(129, 'a') + "\""),
                   "cache_salt", kValue, "at most 128 printable ASCII characters, got \"aaa"},
        BadRequest{"SaltWithLineBreak", kC, Chat(R"("cache_salt":"a\nb")"), "cache_salt", kValue,
                   R"(got "a\nb")"},
        BadRequest{"SaltBeyondAscii", kP, Completion(R"("cache_salt":"盐")"), "cache_salt", kValue,
                   "printable ASCII"},
        BadRequest{"LongUser", kC, Chat(R"("user":")" + std::string(1025, 'u') + "\""), "user",
                   kValue, "user: must be at most 1024 bytes, got 1025: \"uuu"},
        BadRequest{"ZeroTimeout", kC, Chat(R"("timeout":0)"), "timeout", kValue,
                   "timeout: must be a number of seconds above 0, got 0"},
        BadRequest{"NegativeTimeout", kC, Chat(R"("timeout":-0.5)"), "timeout", kValue, "got -0.5"},
        BadRequest{"TimeoutText", kP, Completion(R"("timeout":"5s")"), "timeout", kValue,
                   R"(got "5s")"}),
    TestName);

std::string ManyBiases(int count) {
  std::string biases;
  for (int i = 0; i < count; ++i) biases += fmt::format("{}\"{}\":1", i == 0 ? "" : ",", i);
  return R"("logit_bias":{)" + biases + "}";
}

INSTANTIATE_TEST_SUITE_P(
    TokenRules, BadRequests,
    testing::Values(
        BadRequest{"MinPAboveOne", kC, Chat(R"("min_p":1.5)"), "min_p", kValue,
                   "min_p: must be a number from 0 to 1, got 1.5"},
        BadRequest{"PresenceTooLarge", kC, Chat(R"("presence_penalty":2.5)"), "presence_penalty",
                   kValue, "presence_penalty: must be a number from -2 to 2, got 2.5"},
        BadRequest{"FrequencyText", kP, Completion(R"("frequency_penalty":"1")"),
                   "frequency_penalty", kValue, R"(from -2 to 2, got "1")"},
        BadRequest{"RepetitionZero", kC, Chat(R"("repetition_penalty":0)"), "repetition_penalty",
                   kValue, "repetition_penalty: must be a number above 0, got 0"},
        BadRequest{"RepetitionNegative", kP, Completion(R"("repetition_penalty":-1)"),
                   "repetition_penalty", kValue, "above 0, got -1"},
        BadRequest{"RepetitionBeyondFloat", kC, Chat(R"("repetition_penalty":1e300)"),
                   "repetition_penalty", kValue, "got 1e+300"},
        BadRequest{"RepetitionText", kC, Chat(R"("repetition_penalty":"x")"), "repetition_penalty",
                   kValue, R"(got "x")"},
        BadRequest{"BiasList", kC, Chat(R"("logit_bias":[1])"), "logit_bias", kValue,
                   "must be an object of token ids and numbers from -100 to 100, got [1]"},
        BadRequest{"BiasKeyWord", kC, Chat(R"("logit_bias":{"the":1})"), "logit_bias.the", kValue,
                   R"(the key must be a token id, got "the")"},
        BadRequest{"BiasKeyNegative", kC, Chat(R"("logit_bias":{"-1":1})"), "logit_bias.-1", kValue,
                   R"(got "-1")"},
        BadRequest{"BiasKeyHuge", kC, Chat(R"("logit_bias":{"2147483648":1})"),
                   "logit_bias.2147483648", kValue, "must be a token id"},
        BadRequest{"BiasTwice", kC, Chat(R"("logit_bias":{"7":1,"07":2})"), "logit_bias.7", kValue,
                   "names token 7 a second time"},
        BadRequest{"BiasTooLarge", kP, Completion(R"("logit_bias":{"7":100.5})"), "logit_bias.7",
                   kValue, "must be a number from -100 to 100, got 100.5"},
        BadRequest{"BiasText", kC, Chat(R"("logit_bias":{"7":"1"})"), "logit_bias.7", kValue,
                   R"(got "1")"},
        BadRequest{"TooManyBiases", kC, Chat(ManyBiases(1025)), "logit_bias", kValue,
                   "must hold at most 1024 tokens, got 1025"},
        BadRequest{"BadWordsText", kC, Chat(R"("bad_words":"x")"), "bad_words", kValue,
                   "must be a list of at most 256 strings"},
        BadRequest{"EmptyBadWord", kC, Chat(R"("bad_words":["x",""])"), "bad_words[1]", kValue,
                   "must be a string that is not empty"},
        BadRequest{"BadWordsIdText", kC, Chat(R"("bad_words_token_ids":["5"])"),
                   "bad_words_token_ids[0]", kValue, "must be a token id"},
        BadRequest{"StopTokenIdNegative", kC, Chat(R"("stop_token_ids":[5,-1])"),
                   "stop_token_ids[1]", kValue, "must be a token id"},
        BadRequest{"StopTokenIdsNumber", kP, Completion(R"("stop_token_ids":5)"), "stop_token_ids",
                   kValue, "must be a list of at most 256 token ids, got 5"}),
    TestName);

INSTANTIATE_TEST_SUITE_P(
    Logprobs, BadRequests,
    testing::Values(
        BadRequest{"ChatNumber", kC, Chat(R"("logprobs":3)"), "logprobs", kValue,
                   "logprobs: must be true or false, got 3"},
        BadRequest{"TopWithoutLogprobs", kC, Chat(R"("top_logprobs":3)"), "top_logprobs", kValue,
                   R"(is allowed only together with "logprobs": true, got 3)"},
        BadRequest{"TopBeyond20", kC, Chat(R"("logprobs":true,"top_logprobs":21)"), "top_logprobs",
                   kValue, "must be an integer from 0 to 20, got 21"},
        BadRequest{"NegativeTop", kC, Chat(R"("logprobs":true,"top_logprobs":-1)"), "top_logprobs",
                   kValue, "from 0 to 20, got -1"},
        BadRequest{"CompletionTrue", kP, Completion(R"("logprobs":true)"), "logprobs", kValue,
                   "must be an integer from 0 to 20, got true"},
        BadRequest{"CompletionBeyond20", kP, Completion(R"("logprobs":21)"), "logprobs", kValue,
                   "from 0 to 20, got 21"},
        BadRequest{"PromptBeyond20", kC, Chat(R"("prompt_logprobs":21)"), "prompt_logprobs", kValue,
                   "from 0 to 20, got 21"},
        BadRequest{"WholeVocabulary", kP, Completion(R"("prompt_logprobs":-1)"), "prompt_logprobs",
                   kValue, "from 0 to 20, got -1"},
        BadRequest{"PromptInAStream", kP, Completion(R"("prompt_logprobs":1,"stream":true)"),
                   "prompt_logprobs", kValue, R"(is not available together with "stream": true)"},
        BadRequest{"EchoText", kP, Completion(R"("echo":"yes")"), "echo", kValue,
                   "must be true or false"}),
    TestName);

INSTANTIATE_TEST_SUITE_P(
    Unsupported, BadRequests,
    testing::Values(BadRequest{"Tools", kC, Chat(R"("tools":[{"type":"function"}])"), "tools",
                               kUnsupported, "not supported"},
                    BadRequest{"RequiredTool", kC, Chat(R"("tool_choice":"required")"),
                               "tool_choice", kUnsupported, "not supported"},
                    BadRequest{"Functions", kC, Chat(R"("functions":[{"name":"f"}])"), "functions",
                               kUnsupported, "not supported"},
                    BadRequest{"JsonFormat", kC,
                               Chat(R"("response_format":{"type":"json_object"})"),
                               "response_format", kUnsupported, "not supported"},
                    BadRequest{"AllowedTokenIds", kC, Chat(R"("allowed_token_ids":[5])"),
                               "allowed_token_ids", kUnsupported, "not supported"},
                    BadRequest{"TempScaledLogprobs", kC, Chat(R"("temp_scaled_logprobs":true)"),
                               "temp_scaled_logprobs", kUnsupported, "not supported"},
                    BadRequest{"GuidedRegex", kP, Completion(R"("guided_regex":"a+")"),
                               "guided_regex", kUnsupported, "not supported"},
                    BadRequest{"PromptTokenIds", kC, Chat(R"("prompt_token_ids":[5])"),
                               "prompt_token_ids", kUnsupported, "not supported"},
                    BadRequest{"EchoOfAChat", kC, Chat(R"("echo":true)"), "echo", kUnsupported,
                               "not supported"},
                    BadRequest{"Suffix", kP, Completion(R"("suffix":"end")"), "suffix",
                               kUnsupported, "not supported"},
                    BadRequest{"BestOfMoreThanN", kP, Completion(R"("best_of":2)"), "best_of",
                               kUnsupported, "not supported"}),
    TestName);

ApiRequest Parsed(Endpoint endpoint, const std::string& body) {
  const absl::StatusOr<ApiRequest> request = ParseRequest(endpoint, body);
  EXPECT_TRUE(request.ok()) << request.status();
  return request.ok() ? *request : ApiRequest();
}

TEST(ParseRequest, ReadsEveryField) {
  const ApiRequest request = Parsed(kC, R"({
      "model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 7,
      "temperature": 0.5, "top_p": 0.25, "top_k": 40, "seed": -9223372036854775808,
      "stop": ["a", "b"], "include_stop_str_in_output": true, "n": 3, "stream": true,
      "stream_options": {"include_usage": true, "continuous_usage_stats": true}, "user": "u",
      "min_tokens": 7, "ignore_eos": true, "priority": -3, "cache_salt": "s ~", "timeout": 1.5})");
  EXPECT_EQ(request.model, "m");
  EXPECT_EQ(request.max_tokens, 7);
  EXPECT_EQ(request.temperature, 0.5);
  EXPECT_EQ(request.top_p, 0.25);
  EXPECT_EQ(request.top_k, 40);
  EXPECT_EQ(request.seed, std::numeric_limits<int64_t>::min());
  EXPECT_THAT(request.stop, ElementsAre("a", "b"));
  EXPECT_TRUE(request.include_stop_in_output);
  EXPECT_EQ(request.num_choices_per_prompt, 3);
  EXPECT_TRUE(request.stream);
  EXPECT_TRUE(request.stream_options.include_usage);
  EXPECT_TRUE(request.stream_options.continuous_usage_stats);
  EXPECT_EQ(request.user, "u");
  EXPECT_EQ(request.min_tokens, 7);
  EXPECT_TRUE(request.ignore_eos);
  EXPECT_EQ(request.priority, -3);
  EXPECT_EQ(request.cache_salt, "s ~");
  EXPECT_EQ(request.timeout_ms, 1500);
}

TEST(ParseRequest, ReadsPenaltiesBiasesAndWhatIsBannedOrStops) {
  const ApiRequest request = Parsed(kC, Chat(R"("min_p":0.25,"repetition_penalty":1.5,
      "presence_penalty":-2,"frequency_penalty":2,"logit_bias":{"7":-100,"3":0.5},
      "bad_words":["a","b"],"bad_words_token_ids":[4,5],"stop_token_ids":[6])"));
  EXPECT_EQ(request.min_p, 0.25);
  EXPECT_EQ(request.repetition_penalty, 1.5);
  EXPECT_EQ(request.presence_penalty, -2);
  EXPECT_EQ(request.frequency_penalty, 2);
  EXPECT_THAT(request.logit_bias, ElementsAre(testing::Pair(3, 0.5f), testing::Pair(7, -100.0f)));
  EXPECT_THAT(request.bad_words, ElementsAre("a", "b"));
  EXPECT_THAT(request.bad_words_token_ids, ElementsAre(4, 5));
  EXPECT_THAT(request.stop_token_ids, ElementsAre(6));
  EXPECT_EQ(Parsed(kC, Chat(ManyBiases(1024))).logit_bias.size(), 1024u);
}

TEST(ParseRequest, LogprobsAreABooleanForChatsAndANumberForCompletions) {
  EXPECT_EQ(Parsed(kC, Chat(R"("logprobs":true)")).num_top_logprobs, 0);
  EXPECT_EQ(Parsed(kC, Chat(R"("logprobs":true,"top_logprobs":20)")).num_top_logprobs, 20);
  EXPECT_EQ(Parsed(kC, Chat(R"("logprobs":false,"top_logprobs":0)")).num_top_logprobs,
            std::nullopt);
  EXPECT_EQ(Parsed(kP, Completion(R"("logprobs":0)")).num_top_logprobs, 0);
  EXPECT_EQ(Parsed(kP, Completion(R"("logprobs":5)")).num_top_logprobs, 5);
  EXPECT_EQ(Parsed(kP, Completion(R"("logprobs":false)")).num_top_logprobs, std::nullopt);
  EXPECT_TRUE(Parsed(kP, Completion(R"("echo":true)")).echo);
  const ApiRequest scored = Parsed(kP, Completion(R"("echo":true,"logprobs":2,"max_tokens":0)"));
  EXPECT_TRUE(scored.echoes_logprobs());
  EXPECT_EQ(scored.num_top_logprobs, 2);
  EXPECT_EQ(scored.max_tokens, 0);
  EXPECT_EQ(Parsed(kP, Completion(R"("echo":true,"max_tokens":0)")).max_tokens, 0);
  EXPECT_EQ(Parsed(kC, Chat(R"("prompt_logprobs":0)")).prompt_logprobs, 0);
  EXPECT_EQ(Parsed(kC, Chat(R"("prompt_logprobs":null,"stream":true)")).prompt_logprobs,
            std::nullopt);
}

TEST(ParseRequest, ATimeoutIsNeverRoundedToNoneNorBeyondWhatFits) {
  EXPECT_EQ(Parsed(kC, Chat(R"("timeout":1e-9)")).timeout_ms, 1);
  EXPECT_EQ(Parsed(kC, Chat(R"("timeout":1e300)")).timeout_ms, 1'000'000'000'000);
}

TEST(ParseRequest, TakesNullAndAbsentAlikeAndIgnoresUnknownFields) {
  const ApiRequest request = Parsed(kC, Chat(R"("model":null,"temperature":null,"top_p":null,
      "seed":null,"stop":null,"n":null,"stream":null,"stream_options":null,"user":null,
      "min_tokens":null,"ignore_eos":null,"priority":null,"cache_salt":null,"timeout":null,
      "max_tokens":null,"tools":null,"metadata":{"a":[1]},"some_extension":true)"));
  EXPECT_EQ(request.model, "");
  EXPECT_FALSE(request.temperature.has_value());
  EXPECT_FALSE(request.max_tokens.has_value());
  EXPECT_EQ(request.num_choices_per_prompt, 1);
  EXPECT_FALSE(request.stream);
  EXPECT_EQ(request.min_tokens, 0);
  EXPECT_EQ(request.priority, 0);
  EXPECT_FALSE(request.timeout_ms.has_value());
}

TEST(ParseRequest, AcceptsNeutralValuesOfUnsupportedFields) {
  Parsed(kC, Chat(R"("logprobs":false,"top_logprobs":0,"tools":[],"tool_choice":"auto",
      "response_format":{"type":"text"},"logit_bias":{},"presence_penalty":0,
      "frequency_penalty":0.0,"repetition_penalty":1.0,"min_p":0,"stop_token_ids":[],
      "best_of":1)"));
  Parsed(kC, Chat(R"("tools":[{"type":"function"}],"tool_choice":"none")"));
  Parsed(kP, Completion(R"("logprobs":null,"echo":false,"suffix":"","best_of":2,"n":2)"));
}

TEST(ParseRequest, MaxCompletionTokensWinsOverMaxTokens) {
  EXPECT_EQ(Parsed(kC, Chat(R"("max_tokens":5,"max_completion_tokens":9)")).max_tokens, 9);
  EXPECT_EQ(Parsed(kC, Chat(R"("max_tokens":5)")).max_tokens, 5);
}

TEST(ParseRequest, TakesWholeFloatsForIntegers) {
  EXPECT_EQ(Parsed(kC, Chat(R"("max_tokens":5.0)")).max_tokens, 5);
}

TEST(ParseRequest, TheLastOfDuplicateKeysWins) {
  EXPECT_EQ(Parsed(kC, Chat(R"("max_tokens":5,"max_tokens":6)")).max_tokens, 6);
}

TEST(ParseRequest, ReadsEveryShapeOfMessage) {
  const ApiRequest request = Parsed(kC, Messages(R"([
      {"role": "developer", "content": "rules"},
      {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
      {"role": "assistant", "content": null, "tool_calls": [{}]},
      {"role": "tool", "content": "7"}])"));
  const auto& messages = std::get<ChatMessages>(request.prompts.at(0));
  ASSERT_EQ(messages.size(), 4u);
  EXPECT_EQ(messages[0].role, "system");
  EXPECT_EQ(messages[1].content, "ab");
  EXPECT_EQ(messages[2].content, "");
  EXPECT_EQ(messages[3].role, "tool");
}

template <typename T>
std::vector<T> PromptsOf(const std::string& body) {
  std::vector<T> prompts;
  for (const PromptSource& prompt : Parsed(kP, body).prompts)
    prompts.push_back(std::get<T>(prompt));
  return prompts;
}

TEST(ParseRequest, ReadsEveryShapeOfPrompt) {
  EXPECT_THAT(PromptsOf<std::string>(R"({"prompt":"a"})"), ElementsAre("a"));
  EXPECT_THAT(PromptsOf<std::string>(R"({"prompt":["a","b"]})"), ElementsAre("a", "b"));
  EXPECT_THAT(PromptsOf<TokenIds>(R"({"prompt":[1,2.0]})"), ElementsAre(TokenIds{1, 2}));
  EXPECT_THAT(PromptsOf<TokenIds>(R"({"prompt":[[1],[2,3]]})"),
              ElementsAre(TokenIds{1}, TokenIds{2, 3}));
}

TEST(ParseRequest, AcceptsSixtyFourLevels) {
  const std::string nested = std::string(63, '[') + std::string(63, ']');
  EXPECT_TRUE(ParseJsonObject(R"({"a":)" + nested + "}").ok());
}

TEST(ParseRequest, BracketsInStringsAreNoNesting) {
  Parsed(kP, R"({"prompt":"\")" + std::string(100, '[') + R"("})");
}

TEST(Quoted, CutsLongValuesBetweenCharacters) {
  std::string text = "a";
  for (int i = 0; i < 40; ++i) text += "诗";
  std::string expected = "\"a";
  for (int i = 0; i < 20; ++i) expected += "诗";  // 62 bytes; one more would make 65
  EXPECT_EQ(Quoted(text), expected + "...");
}

}  // namespace
}  // namespace wintserve
