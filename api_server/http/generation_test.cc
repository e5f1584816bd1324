// Generation over HTTP: answers, streams, and that nothing goes on for a client that has gone.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "api_server/http/http_client_test_util.h"

namespace wintserve {
namespace {

using nlohmann::json;
using std::chrono::milliseconds;
using testing::HasSubstr;
using testing::Not;
using testing::StartsWith;

constexpr char kStreaming[] = R"(,"stream":true)";

// Replaces what follows each `prefix`, as long as it is made of `characters`.
std::string ReplacedAfter(std::string text, const std::string& prefix, const char* characters,
                          const std::string& with) {
  for (size_t at = 0; (at = text.find(prefix, at)) != std::string::npos;) {
    at += prefix.size();
    const size_t end = std::min(text.find_first_not_of(characters, at), text.size());
    text.replace(at, end - at, with);
  }
  return text;
}

// Without what changes from run to run.
std::string Normalized(std::string text) {
  const size_t date = text.find("Date: ") + 6;
  text.replace(date, text.find('\r', date) - date, "DATE");
  text = ReplacedAfter(text, "cmpl-", "0123456789abcdef-", "ID");
  return ReplacedAfter(text, "\"created\":", "0123456789", "0");
}

// The JSON of every event of a stream but [DONE].
std::vector<json> EventsOf(const std::string& body) {
  std::vector<json> events;
  for (size_t at = 0; (at = body.find("data: {", at)) != std::string::npos;) {
    at += 6;
    events.push_back(json::parse(body.substr(at, body.find("\n\n", at) - at)));
  }
  return events;
}

// Chunk framing of the transcript: sizes depend on the ids, which have a fixed length.
std::string Framed(const std::string& event, size_t real_size) {
  char size[32];
  std::snprintf(size, sizeof(size), "%zx\r\n", real_size);
  return size + event + "\r\n";
}

TEST(Stream, BytesAreExactlyThese) {
  TestServer server;
  server.llm().HoldUpdates();
  RawClient client(server.port());
  client.Send(Post("/v1/chat/completions",
                   R"({"messages":[{"role":"user","content":"hi"}],"stream":true,)"
                   R"("stream_options":{"include_usage":true}})",
                   "x-request-id: golden\r\n"));
  ASSERT_TRUE(server.llm().WaitForSubmitted(1));
  // One round at a time, so that the chunk framing does not depend on timing.
  std::string transcript;
  GenerationUpdate update = TextUpdate(0, "春");
  server.llm().Send(1, update);
  transcript +=
      client.ReadUntil("春\"},\"logprobs\":null,\"finish_reason\":null}],\"usage\":null}\n\n\r\n");
  update = TextUpdate(0, "眠", FinishReason::kStop);
  update.num_prompt_tokens = 3;
  update.num_completion_tokens = 2;
  server.llm().Send(1, update);
  transcript += client.ReadUntil("0\r\n\r\n");

  const auto event = [](const std::string& choices, const std::string& usage) {
    return R"(data: {"id":"chatcmpl-ID","object":"chat.completion.chunk","created":0,)"
           R"("model":"fake","choices":[)" +
           choices + R"(],"usage":)" + usage + "}\n\n";
  };
  const auto choice = [](const std::string& delta, const std::string& finish_reason) {
    return R"({"index":0,"delta":)" + delta + R"(,"logprobs":null,"finish_reason":)" +
           finish_reason + "}";
  };
  // An id is 34 bytes longer than "ID", a time of this century 9 bytes longer than "0".
  constexpr size_t kNormalizedAway = 34 + 9;
  const std::string first = event(choice(R"({"role":"assistant","content":""})", "null"), "null") +
                            event(choice(R"({"content":"春"})", "null"), "null");
  const std::string second =
      event(choice(R"({"content":"眠"})", "null"), "null") +
      event(choice("{}", R"("stop")"), "null") +
      event("", R"({"prompt_tokens":3,"completion_tokens":2,"total_tokens":5,)"
                R"("prompt_tokens_details":{"cached_tokens":0}})") +
      "data: [DONE]\n\n";
  EXPECT_EQ(Normalized(transcript),
            "HTTP/1.1 200 OK\r\n"
            "Date: DATE\r\n"
            "x-request-id: golden\r\n"
            "Content-Type: text/event-stream; charset=utf-8\r\n"
            "Cache-Control: no-cache\r\n"
            "X-Accel-Buffering: no\r\n"
            "Transfer-Encoding: chunked\r\n\r\n" +
                Framed(first, first.size() + 2 * kNormalizedAway) +
                Framed(second, second.size() + 3 * kNormalizedAway) + "0\r\n\r\n");
}

TEST(Stream, ToAnHttp10ClientEndsWithTheConnection) {
  TestServer server;
  RawClient client(server.port());
  client.Send(
      "POST /v1/completions HTTP/1.0\r\nContent-Length: 28\r\n\r\n"
      R"({"prompt":"a","stream":true})");
  const std::string answer = client.ReadToEnd();
  EXPECT_THAT(answer, HasSubstr("Connection: close\r\n\r\ndata: {"));
  EXPECT_THAT(answer, testing::EndsWith("data: [DONE]\n\n"));
}

TEST(Stream, HasItsHeadAndComesToLifeWhileItWaitsInTheQueue) {
  HttpOptions options;
  options.keep_alive_interval = milliseconds(30);
  TestServer server(options);
  server.llm().HoldUpdates();
  RawClient client(server.port());
  client.Send(ChatPost(kStreaming));
  EXPECT_THAT(client.ReadUntil("\r\n\r\n"), StartsWith("HTTP/1.1 200 OK\r\n"));
  EXPECT_THAT(client.ReadUntil(": keep-alive\n\n"), HasSubstr(": keep-alive\n\n"));
  EXPECT_THAT(client.ReadUntil(": keep-alive\n\n"), HasSubstr(": keep-alive\n\n"));
  server.llm().Send(1, TextUpdate(0, "late", FinishReason::kStop));
  EXPECT_THAT(client.ReadUntil("[DONE]"), HasSubstr("late"));
}

TEST(Stream, HasNoHeadBeforeEveryPromptIsInTheQueue) {
  HttpOptions options;
  options.keep_alive_interval = milliseconds(10);
  TestServer server(options);
  server.llm().HoldRequests();
  RawClient client(server.port());
  client.Send(Post("/v1/completions", R"({"prompt":["a","b"],"stream":true})"));
  ASSERT_TRUE(server.llm().WaitForSubmitted(2));
  server.llm().Send(1, AcceptedUpdate());
  server.llm().Send(1, TextUpdate(0, "x"));
  server.llm().Send(2, ErrorUpdate(QueueFullError(3)));
  const Response response = client.Receive().value_or(Response());
  EXPECT_EQ(response.status, 429);
  EXPECT_EQ(response.Header("Retry-After"), "3");
  EXPECT_TRUE(server.llm().WaitForCancelled(1)) << "the prompt that was accepted";
}

TEST(Stream, InterleavesTheChoicesOfAllPrompts) {
  TestServer server;
  server.llm().SetPieces({"<{choice}>"});
  const Response response =
      Fetch(server.port(), Post("/v1/completions", R"({"prompt":["a","b"],"n":2,"stream":true})"));
  std::map<int, std::string> texts;
  std::map<int, std::string> reasons;
  for (const json& event : EventsOf(response.body)) {
    const json& choice = event["choices"][0];
    texts[choice["index"]] += choice["text"];
    if (!choice["finish_reason"].is_null()) reasons[choice["index"]] = choice["finish_reason"];
  }
  EXPECT_EQ(texts, (std::map<int, std::string>{{0, "<0>"}, {1, "<1>"}, {2, "<0>"}, {3, "<1>"}}));
  EXPECT_EQ(reasons.size(), 4u);
}

TEST(Stream, AnErrorInTheMiddleIsAnEventBeforeDone) {
  TestServer server;
  server.llm().HoldUpdates();
  RawClient client(server.port());
  client.Send(ChatPost(kStreaming));
  ASSERT_TRUE(server.llm().WaitForSubmitted(1));
  server.llm().Send(1, TextUpdate(0, "begin"));
  client.ReadUntil("begin");
  server.llm().Send(1, ErrorUpdate(absl::UnavailableError("engine worker 0 died")));
  const std::string rest = client.ReadUntil("0\r\n\r\n");
  EXPECT_THAT(rest, HasSubstr(R"(data: {"error":{"message":"engine worker 0 died","type":)"
                              R"("server_error","param":null,"code":"service_unavailable"}})"
                              "\n\ndata: [DONE]\n\n"));
}

struct Refusal {
  const char* name;
  absl::Status error;
  int status;
  const char* retry_after;
  const char* body;
};

class Refusals : public testing::TestWithParam<Refusal> {};

TEST_P(Refusals, OfTheQueueHaveTheirOwnStatusStreamingOrNot) {
  TestServer server;
  server.llm().SetQueueError(GetParam().error);
  for (const char* fields : {"", kStreaming}) {
    const Response response = Fetch(server.port(), ChatPost(fields));
    EXPECT_EQ(response.status, GetParam().status) << fields;
    EXPECT_EQ(response.Header("Retry-After"), GetParam().retry_after) << fields;
    EXPECT_EQ(response.Header("x-should-retry"), GetParam().status == 504 ? "false" : "") << fields;
    EXPECT_EQ(response.Header("Content-Type"), "application/json") << fields;
    EXPECT_EQ(response.body, GetParam().body) << fields;
  }
}

INSTANTIATE_TEST_SUITE_P(
    All, Refusals,
    testing::Values(Refusal{"Full", QueueFullError(17), 429, "17",
                            R"({"error":{"message":"the queue is full","type":"rate_limit_error",)"
                            R"("param":null,"code":"rate_limit_exceeded"}})"},
                    Refusal{"TimeIsUp", absl::DeadlineExceededError("its 2 s are up"), 504, "",
                            R"({"error":{"message":"its 2 s are up","type":"timeout_error",)"
                            R"("param":null,"code":"timeout"}})"},
                    Refusal{"NobodyServes", absl::UnavailableError("engine worker 0 died"), 503,
                            "1",
                            R"({"error":{"message":"engine worker 0 died","type":"server_error",)"
                            R"("param":null,"code":"service_unavailable"}})"}),
    [](const auto& info) { return info.param.name; });

TEST(Stream, WhoseTimeIsUpEndsWithAnErrorEvent) {
  TestServer server;
  server.llm().HoldUpdates();
  RawClient client(server.port());
  client.Send(ChatPost(kStreaming));
  client.ReadUntil("\r\n\r\n");
  server.llm().Send(1, TextUpdate(0, "begin"));
  client.ReadUntil("begin");
  server.llm().Send(1, ErrorUpdate(absl::DeadlineExceededError("its 2 s are up")));
  EXPECT_THAT(client.ReadUntil("0\r\n\r\n"),
              HasSubstr(R"(data: {"error":{"message":"its 2 s are up","type":"timeout_error",)"
                        R"("param":null,"code":"timeout"}})"
                        "\n\ndata: [DONE]\n\n"));
  EXPECT_THAT(Fetch(server.port(), Get("/metrics")).body,
              HasSubstr(R"(fastdeploy:request_failure_total{reason="timeout"} 1)"));
}

TEST(Generation, HidesOurInternalsButGivesTheRequestId) {
  TestServer server;
  server.llm().SetFinalError(absl::InternalError("secret pointer 0x1234"));
  const Response response = Fetch(server.port(), ChatPost());
  EXPECT_EQ(response.status, 500);
  EXPECT_THAT(response.body, Not(HasSubstr("secret")));
  EXPECT_THAT(response.body, HasSubstr(response.Header("x-request-id")));
}

TEST(Generation, PassesTheRequestOnAndUtf8BothWays) {
  TestServer server;
  server.llm().SetPieces({"处处", "闻啼鸟"});
  const Response response =
      Fetch(server.port(),
            Post("/v1/completions", R"({"prompt":"春眠","max_tokens":5,"temperature":0,"seed":-7,)"
                                    R"("stop":"\n","user":"u","priority":-1,"min_tokens":2,)"
                                    R"("ignore_eos":true,"cache_salt":"s","timeout":1.5})"));
  EXPECT_EQ(json::parse(response.body)["choices"][0]["text"], "处处闻啼鸟");
  EXPECT_THAT(response.body, HasSubstr("处处闻啼鸟"));  // as UTF-8, not as \u escapes
  const GenerationRequest request = server.llm().submitted().at(0);
  EXPECT_EQ(server.llm().Decode(request.prompt_ids), "春眠");
  EXPECT_EQ(request.max_tokens, 5);
  EXPECT_EQ(request.temperature, 0);
  EXPECT_EQ(request.seed, -7);
  EXPECT_THAT(request.stop, testing::ElementsAre("\n"));
  EXPECT_THAT(request.id, StartsWith("cmpl-"));
  EXPECT_EQ(request.tenant, "u");
  EXPECT_EQ(request.priority, -1);
  EXPECT_EQ(request.min_tokens, 2);
  EXPECT_TRUE(request.ignore_eos);
  EXPECT_EQ(request.cache_salt, "s");
  EXPECT_EQ(request.timeout_ms, 1500);
}

std::string WithKey(const std::string& key) { return "Authorization: Bearer " + key + "\r\n"; }

// What the LLM is told about one request of each key, salted with `salt`.
std::vector<GenerationRequest> RequestsOfTwoKeys(bool isolate, const std::string& salt) {
  HttpOptions options;
  options.api_keys = {"first-key", "second-key"};
  options.isolate_cache_by_key = isolate;
  TestServer server(options);
  const std::string body = R"({"prompt":"a","user":"u","cache_salt":")" + salt + "\"}";
  for (const std::string& key : options.api_keys) {
    EXPECT_EQ(Fetch(server.port(), Post("/v1/completions", body, WithKey(key))).status, 200);
  }
  return server.llm().submitted();
}

TEST(Tenant, IsTheKeyWhereThereAreKeysButNeverTheKeyItself) {
  const auto requests = RequestsOfTwoKeys(/*isolate=*/false, "s");
  ASSERT_EQ(requests.size(), 2u);
  EXPECT_THAT(requests[0].tenant, testing::MatchesRegex("[0-9a-f]{64}"));
  EXPECT_NE(requests[0].tenant, requests[1].tenant);
  EXPECT_THAT(requests[0].tenant, Not(HasSubstr("first-key")));
  EXPECT_EQ(requests[0].cache_salt, "s") << "shared between keys";
  EXPECT_EQ(requests[1].cache_salt, "s");
}

TEST(Tenant, SharesNoCacheWhenIsolated) {
  const auto plain = RequestsOfTwoKeys(/*isolate=*/true, "");
  const auto salted = RequestsOfTwoKeys(/*isolate=*/true, "s");
  ASSERT_EQ(plain.size() + salted.size(), 4u);
  const std::set<std::string> salts = {plain[0].cache_salt, plain[1].cache_salt,
                                       salted[0].cache_salt, salted[1].cache_salt};
  EXPECT_EQ(salts.size(), 4u);
  for (const std::string& salt : salts) EXPECT_THAT(salt, testing::MatchesRegex("[0-9a-f]{64}"));
  EXPECT_EQ(salted[0].cache_salt, RequestsOfTwoKeys(true, "s")[0].cache_salt);
}

TEST(Generation, ReportsCachedTokensInEveryUsage) {
  TestServer server;
  server.llm().SetNumCachedTokens(5);
  for (const char* path : {"/v1/chat/completions", "/v1/completions"}) {
    const std::string prompt = R"("messages":[{"role":"user","content":"hi"}],"prompt":"hi")";
    const json body =
        json::parse(Fetch(server.port(), Post(path, "{" + prompt + R"(,"n":2})")).body);
    EXPECT_EQ(body["usage"]["prompt_tokens_details"]["cached_tokens"], 5) << path;
    const std::vector<json> events =
        EventsOf(Fetch(server.port(), Post(path, "{" + prompt +
                                                     R"(,"n":2,"stream":true,"stream_options":)"
                                                     R"({"include_usage":true}})"))
                     .body);
    ASSERT_FALSE(events.empty());
    EXPECT_EQ(events.back()["usage"]["prompt_tokens_details"]["cached_tokens"], 5) << path;
  }
}

TEST(Generation, AcceptsChunkedBodies) {
  TestServer server;
  const Response response = Fetch(
      server.port(),
      "POST /v1/completions HTTP/1.1\r\nHost: t\r\nContent-Type: application/json; "
      "charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{\"pro\r\n9\r\nmpt\":\"a\"}\r\n"
      "0\r\n\r\n");
  EXPECT_EQ(response.status, 200) << response.body;
}

TEST(Generation, RefusesUnknownModelsWhenStrict) {
  HttpOptions options;
  options.model_names.strict = true;
  TestServer server(options);
  EXPECT_EQ(Fetch(server.port(), ChatPost(R"(,"model":"gpt-4o")")).status, 404);
  EXPECT_EQ(Fetch(server.port(), ChatPost(R"(,"model":"null")")).status, 200);
}

TEST(Generation, BeyondTheConcurrencyLimitIs429UntilOneEnds) {
  HttpOptions options;
  options.max_concurrency = 1;
  TestServer server(options);
  server.llm().HoldUpdates();
  RawClient first(server.port());
  first.Send(ChatPost());
  ASSERT_TRUE(server.llm().WaitForSubmitted(1));
  const Response refused = Fetch(server.port(), ChatPost());
  EXPECT_EQ(refused.status, 429);
  EXPECT_EQ(refused.Header("Retry-After"), "1");
  EXPECT_THAT(refused.body, HasSubstr("at most 1 may be open"));
  server.llm().Send(1, TextUpdate(0, "a", FinishReason::kStop));
  EXPECT_EQ(first.Receive().value_or(Response()).status, 200);
  ASSERT_TRUE(server.http().WaitUntilIdle(std::chrono::seconds(10)));
  RawClient second(server.port());
  second.Send(ChatPost());
  EXPECT_TRUE(server.llm().WaitForSubmitted(2));
}

TEST(Generation, TheLlmsRefusalsKeepTheirMeaning) {
  TestServer server;
  server.llm().SetSubmitError(absl::ResourceExhaustedError("too many requests wait"));
  EXPECT_EQ(Fetch(server.port(), ChatPost()).status, 429);
  server.llm().SetSubmitError(absl::UnavailableError("shutting down"));
  EXPECT_EQ(Fetch(server.port(), ChatPost()).status, 503);
}

struct Departure {
  const char* name;
  const char* fields;
  bool after_first_token;
};

class Departures : public testing::TestWithParam<Departure> {};

TEST_P(Departures, CancelTheGenerationAtOnce) {
  TestServer server;
  server.llm().HoldUpdates();
  RawClient client(server.port());
  client.Send(ChatPost(GetParam().fields));
  ASSERT_TRUE(server.llm().WaitForSubmitted(1));
  if (GetParam().after_first_token) {
    server.llm().Send(1, TextUpdate(0, "begin"));
    client.ReadUntil("begin");
  }
  EXPECT_TRUE(server.llm().cancelled().empty());
  client.Close();
  EXPECT_TRUE(server.llm().WaitForCancelled(1));
  EXPECT_TRUE(server.http().WaitUntilIdle(std::chrono::seconds(10)));
  EXPECT_THAT(Fetch(server.port(), Get("/metrics")).body,
              HasSubstr("fastdeploy:request_aborted_total 1"));
}

INSTANTIATE_TEST_SUITE_P(All, Departures,
                         testing::Values(Departure{"StreamBeforeTheFirstToken", kStreaming, false},
                                         Departure{"StreamInTheMiddle", kStreaming, true},
                                         Departure{"NotStreaming", "", false}),
                         [](const auto& info) { return info.param.name; });

TEST(Generation, ADepartureBehindPipelinedBytesIsNoticed) {
  TestServer server;
  server.llm().HoldUpdates();
  RawClient client(server.port());
  client.Send(ChatPost() + Get("/health") + Get("/health"));
  ASSERT_TRUE(server.llm().WaitForSubmitted(1));
  client.Close();
  EXPECT_TRUE(server.llm().WaitForCancelled(1));
}

TEST(Generation, ADepartureCancelsEveryPromptOfTheRequest) {
  TestServer server;
  server.llm().HoldUpdates();
  RawClient client(server.port());
  client.Send(Post("/v1/completions", R"({"prompt":["a","b","c"]})"));
  ASSERT_TRUE(server.llm().WaitForSubmitted(3));
  client.Close();
  EXPECT_TRUE(server.llm().WaitForCancelled(3));
}

TEST(Generation, ServesTwoHundredStreamsAtOnce) {
  constexpr int kNumStreams = 200;
  TestServer server;
  server.llm().SetPieces({"a", "b", "c", "d", "e"});
  server.llm().SetDelayBetweenUpdates(milliseconds(20));
  std::vector<std::unique_ptr<RawClient>> clients;
  for (int i = 0; i < kNumStreams; ++i) {
    clients.push_back(std::make_unique<RawClient>(server.port()));
    ASSERT_TRUE(clients.back()->Send(ChatPost(kStreaming)));
  }
  for (const auto& client : clients) {
    const Response response = client->Receive().value_or(Response());
    EXPECT_EQ(response.status, 200);
    std::string text;
    for (const json& event : EventsOf(response.body)) {
      text += event["choices"][0]["delta"].value("content", "");
    }
    EXPECT_EQ(text, "abcde");
  }
  EXPECT_TRUE(server.llm().cancelled().empty());
}

TEST(Shutdown, StopAcceptingLetsOpenRequestsEndAndThenCloses) {
  TestServer server;
  server.llm().HoldUpdates();
  RawClient idle(server.port());
  idle.Send(Get("/health"));
  idle.Receive();
  RawClient busy(server.port());
  busy.Send(ChatPost());
  ASSERT_TRUE(server.llm().WaitForSubmitted(1));

  server.http().StopAccepting();
  EXPECT_TRUE(idle.IsClosed());
  EXPECT_FALSE(RawClient(server.port()).Send(Get("/health")));
  EXPECT_FALSE(server.http().WaitUntilIdle(milliseconds(20)));
  server.llm().Send(1, TextUpdate(0, "done", FinishReason::kStop));
  const Response response = busy.Receive().value_or(Response());
  EXPECT_EQ(response.status, 200);
  EXPECT_EQ(response.Header("Connection"), "close");
  EXPECT_TRUE(server.http().WaitUntilIdle(std::chrono::seconds(10)));
  EXPECT_TRUE(server.llm().cancelled().empty());
}

TEST(Shutdown, StopCutsStreamsAndCancelsTheirGenerations) {
  TestServer server;
  server.llm().HoldUpdates();
  RawClient streaming(server.port());
  streaming.Send(ChatPost(kStreaming));
  RawClient waiting(server.port());
  waiting.Send(ChatPost());
  ASSERT_TRUE(server.llm().WaitForSubmitted(2));
  server.http().Stop();
  EXPECT_EQ(server.llm().cancelled().size(), 2u);
  EXPECT_TRUE(waiting.IsClosed());
  server.llm().Send(1, TextUpdate(0, "too late", FinishReason::kStop));
}

}  // namespace
}  // namespace wintserve
