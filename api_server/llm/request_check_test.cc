#include "api_server/llm/request_check.h"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>

#include "kernels/sampling/sampling_types.h"

namespace wintserve {
namespace {

constexpr RequestLimits kLimits = {
    .max_model_len = 200, .vocab_size = 1000, .max_top_logprobs = 20};

GenerationRequest Request() { return {.id = "test", .prompt_ids = {1, 2, 3}, .max_tokens = 5}; }

struct BadRequest {
  const char* name;
  std::function<void(GenerationRequest*)> spoil;
  const char* error;
};

class BadRequestTest : public testing::TestWithParam<BadRequest> {};

TEST_P(BadRequestTest, IsRefusedByName) {
  GenerationRequest request = Request();
  GetParam().spoil(&request);
  const absl::Status status = CheckRequest(request, kLimits);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(status.message(), GetParam().error);
}

INSTANTIATE_TEST_SUITE_P(
    All, BadRequestTest,
    testing::Values(
        BadRequest{"EmptyPrompt", [](auto* r) { r->prompt_ids.clear(); },
                   "the prompt has no tokens"},
        BadRequest{"PromptTooLong", [](auto* r) { r->prompt_ids.assign(200, 100); },
                   "Input text is too long: 200 tokens, at most 199 (max_model_len 200 leaves room "
                   "for one output token)"},
        BadRequest{"UnknownId", [](auto* r) { r->prompt_ids[1] = 1000; },
                   "the prompt holds token id 1000, must be from 0 to 999"},
        BadRequest{"NegativeId", [](auto* r) { r->prompt_ids[1] = -1; },
                   "the prompt holds token id -1, must be from 0 to 999"},
        BadRequest{"NegativeTemperature", [](auto* r) { r->temperature = -0.5f; },
                   "temperature is -0.5, must be at least 0"},
        BadRequest{"TemperatureNotANumber", [](auto* r) { r->temperature = std::nanf(""); },
                   "temperature is nan, must be at least 0"},
        BadRequest{"TopPAboveOne", [](auto* r) { r->top_p = 1.5f; },
                   "top_p is 1.5, must be from 0 to 1"},
        BadRequest{"TopKBelowMinusOne", [](auto* r) { r->top_k = -2; },
                   "top_k is -2, must be -1 or more"},
        BadRequest{"MinPNotANumber", [](auto* r) { r->min_p = std::nanf(""); },
                   "min_p is nan, must be from 0 to 1"},
        BadRequest{"RepetitionPenaltyZero", [](auto* r) { r->repetition_penalty = 0; },
                   "repetition_penalty is 0, must be above 0"},
        BadRequest{"PresencePenaltyTooLow", [](auto* r) { r->presence_penalty = -2.5f; },
                   "presence_penalty is -2.5, must be from -2 to 2"},
        BadRequest{"FrequencyPenaltyNotANumber",
                   [](auto* r) { r->frequency_penalty = std::nanf(""); },
                   "frequency_penalty is nan, must be from -2 to 2"},
        BadRequest{"BiasOfNoToken",
                   [](auto* r) {
                     r->logit_bias = {{1000, 1.0f}};
                   },
                   "logit_bias holds token id 1000, must be from 0 to 999"},
        BadRequest{"BiasTooLarge",
                   [](auto* r) {
                     r->logit_bias = {{5, 101.0f}};
                   },
                   "logit_bias is 101, must be from -100 to 100"},
        BadRequest{"BannedNoToken", [](auto* r) { r->banned_token_ids = {-1}; },
                   "banned_token_ids holds token id -1, must be from 0 to 999"},
        BadRequest{"StopNoToken", [](auto* r) { r->stop_token_ids = {1000}; },
                   "stop_token_ids holds token id 1000, must be from 0 to 999"},
        BadRequest{"TooManyLogprobs", [](auto* r) { r->num_top_logprobs = 21; },
                   "21 top log-probabilities, must be from 0 to 20"},
        BadRequest{"NoChoice", [](auto* r) { r->num_choices = 0; }, "n is 0, must be at least 1"},
        BadRequest{"TooManyPromptLogprobs", [](auto* r) { r->num_prompt_top_logprobs = 21; },
                   "21 top log-probabilities, must be from 0 to 20"},
        BadRequest{"FewerThanNoTokens", [](auto* r) { r->max_tokens = -1; },
                   "max_tokens is -1, must be at least 0"},
        BadRequest{"NegativeMinTokens", [](auto* r) { r->min_tokens = -1; },
                   "min_tokens is -1, must be from 0 to max_tokens (5)"},
        BadRequest{"MinTokensAboveMaxTokens", [](auto* r) { r->min_tokens = 6; },
                   "min_tokens is 6, must be from 0 to max_tokens (5)"},
        BadRequest{"MinTokensAboveTheModelLength",
                   [](auto* r) {
                     r->max_tokens.reset();
                     r->min_tokens = 198;
                   },
                   "min_tokens is 198, must be from 0 to 197 (max_model_len 200 less 3 prompt "
                   "tokens)"},
        BadRequest{"LongSalt", [](auto* r) { r->cache_salt.assign(129, 'x'); },
                   "cache_salt has 129 bytes, must have at most 128"},
        BadRequest{"SaltWithANewline", [](auto* r) { r->cache_salt = "ab\n"; },
                   "cache_salt holds the byte 0x0a at 2, must be printable ASCII"},
        BadRequest{"SaltThatIsNotAscii", [](auto* r) { r->cache_salt = "\xc3\xa4"; },
                   "cache_salt holds the byte 0xc3 at 0, must be printable ASCII"},
        BadRequest{"NoTime", [](auto* r) { r->timeout_ms = 0; },
                   "timeout is 0 ms, must be at least 1"}),
    [](const auto& info) { return info.param.name; });

TEST(RequestCheck, TakesTheExtremes) {
  GenerationRequest request = Request();
  request.prompt_ids.assign(199, 999);
  request.max_tokens = std::numeric_limits<int>::max();
  request.min_tokens = 1;
  request.cache_salt.assign(128, '~');
  request.timeout_ms = std::numeric_limits<int64_t>::max();
  EXPECT_TRUE(CheckRequest(request, kLimits).ok());
}

TEST(RequestCheck, AZeroOfTopPOrTemperatureIsGreedy) {
  GenerationRequest request = Request();
  request.temperature = 0.7f;
  request.top_p = 0;
  request.top_k = -1;
  const ScheduledRequest scheduled = ToScheduled(request, 4, kLimits, 0);
  EXPECT_EQ(scheduled.id, 4u);
  EXPECT_EQ(scheduled.sampling.temperature, 0);
  EXPECT_EQ(scheduled.sampling.top_p, 1);
  EXPECT_EQ(scheduled.sampling.top_k, 0);
}

TEST(RequestCheck, AnyIdIsBiasedOrBannedUpToTheMostThatAWorkerTakes) {
  RequestLimits limits = kLimits;
  limits.vocab_size = 2000;
  GenerationRequest request = Request();
  for (int32_t id = 0; id < 1000; ++id) request.logit_bias[id] = 1;
  for (int32_t id = 990; id < 1024; ++id) request.banned_token_ids.push_back(id);
  EXPECT_TRUE(CheckRequest(request, limits).ok());
  EXPECT_EQ(ToScheduled(request, 1, limits, 0).sampling.logit_biases.size(),
            size_t{kernels::sampling::kMaxLogitBiases});
  request.banned_token_ids.push_back(1024);
  EXPECT_EQ(CheckRequest(request, limits).message(),
            "1025 tokens have a bias or are banned, at most 1024 may");
  // What the two sides call the same is the same.
  EXPECT_EQ(kMaxAbsLogitBias, kernels::sampling::kMaxAbsLogitBias);
  EXPECT_EQ(kMaxAbsPenalty, kernels::sampling::kMaxAbsPenalty);
  EXPECT_EQ(kMaxTopLogprobs, kernels::sampling::kMaxTopLogprobs);
  EXPECT_EQ(TokenBias::kBanned, kernels::sampling::kBanned);
}

TEST(RequestCheck, PassesOnPenaltiesAndBiasesInRisingOrder) {
  GenerationRequest request = Request();
  request.min_p = 0.25f;
  request.repetition_penalty = 1.5f;
  request.presence_penalty = 0.5f;
  request.frequency_penalty = -0.5f;
  request.logit_bias = {{9, 2.0f}, {4, -3.0f}};
  request.banned_token_ids = {9, 6};  // a ban wins over a bias
  request.stop_token_ids = {3};
  request.num_top_logprobs = 7;
  const ScheduledRequest scheduled = ToScheduled(request, 4, kLimits, 0);
  EXPECT_EQ(scheduled.sampling.min_p, 0.25f);
  EXPECT_EQ(scheduled.sampling.repetition_penalty, 1.5f);
  EXPECT_EQ(scheduled.sampling.presence_penalty, 0.5f);
  EXPECT_EQ(scheduled.sampling.frequency_penalty, -0.5f);
  EXPECT_EQ(scheduled.sampling.logit_biases,
            (std::vector<TokenBias>{{4, -3}, {6, TokenBias::kBanned}, {9, TokenBias::kBanned}}));
  EXPECT_EQ(scheduled.sampling.num_top_logprobs, 7);
  EXPECT_EQ(scheduled.stop_tokens, std::vector<int32_t>{3});
  request.num_top_logprobs.reset();
  EXPECT_EQ(ToScheduled(request, 4, kLimits, 0).sampling.num_top_logprobs, -1);
}

TEST(RequestCheck, LogprobsMayBeSwitchedOff) {
  RequestLimits limits = kLimits;
  limits.max_top_logprobs = -1;
  GenerationRequest request = Request();
  EXPECT_TRUE(CheckRequest(request, limits).ok());
  request.num_top_logprobs = 0;
  EXPECT_EQ(CheckRequest(request, limits).message(),
            "log-probabilities are switched off on this server");
}

TEST(RequestCheck, PassesOnWhatTheSchedulerNeedsToKnow) {
  GenerationRequest request = Request();
  request.max_tokens = 1000;
  request.min_tokens = 4;
  request.ignore_eos = true;
  request.priority = -2;
  request.tenant = "alice";
  request.cache_salt = "salt";
  request.num_choices = 3;
  const ScheduledRequest scheduled = ToScheduled(request, 4, kLimits, 0);
  EXPECT_EQ(scheduled.max_tokens, 197);
  EXPECT_EQ(scheduled.min_tokens, 4);
  EXPECT_TRUE(scheduled.ignore_eos);
  EXPECT_EQ(scheduled.priority, -2);
  EXPECT_EQ(scheduled.tenant, "alice");
  EXPECT_EQ(scheduled.cache_salt, "salt");
  EXPECT_EQ(scheduled.num_choices, 3);
}

TEST(RequestCheck, ADeadlineIsTheTimeoutOrTheServersMaximum) {
  struct Row {
    std::optional<int64_t> timeout_ms;
    int64_t max_timeout_ms;
    std::optional<int64_t> deadline_us;
  };
  for (const Row& row : {Row{{}, 0, {}}, Row{20, 0, 1'000 + 20'000}, Row{{}, 50, 1'000 + 50'000},
                         Row{20, 50, 1'000 + 20'000}, Row{70, 50, 1'000 + 50'000},
                         Row{std::numeric_limits<int64_t>::max(), 0, {}}}) {
    GenerationRequest request = Request();
    request.timeout_ms = row.timeout_ms;
    RequestLimits limits = kLimits;
    limits.max_timeout_ms = row.max_timeout_ms;
    const ScheduledRequest scheduled = ToScheduled(request, 1, limits, 1'000);
    EXPECT_EQ(scheduled.deadline_us, row.deadline_us)
        << row.timeout_ms.value_or(-1) << " " << row.max_timeout_ms;
    EXPECT_EQ(scheduled.timeout_ms * 1'000, row.deadline_us.value_or(1'000) - 1'000);
  }
}

}  // namespace
}  // namespace wintserve
