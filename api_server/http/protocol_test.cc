// HTTP itself: what is refused and how, connections, limits, the routes without generation.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <memory>
#include <nlohmann/json.hpp>
#include <random>
#include <sstream>
#include <thread>
#include <vector>

#include "api_server/http/http_client_test_util.h"

namespace wintserve {
namespace {

using nlohmann::json;
using std::chrono::milliseconds;
using testing::HasSubstr;
using testing::StartsWith;

constexpr char kStreaming[] = R"(,"stream":true)";

json ErrorOf(const Response& response) {
  const json body = json::parse(response.body, nullptr, /*allow_exceptions=*/false);
  return body.is_object() && body.contains("error") ? body["error"] : json();
}

struct BadExchange {
  const char* name;
  std::string request;
  int status;
  const char* code;
};

class BadExchanges : public testing::TestWithParam<BadExchange> {};

TEST_P(BadExchanges, GetTheErrorObjectAndLeaveTheServerAlive) {
  HttpOptions options;
  options.max_body_bytes = 1000;
  TestServer server(options);
  const Response response = Fetch(server.port(), GetParam().request);
  EXPECT_EQ(response.status, GetParam().status);
  const json error = ErrorOf(response);
  ASSERT_TRUE(error.is_object()) << response.body;
  EXPECT_EQ(error["code"], GetParam().code);
  EXPECT_TRUE(error["message"].is_string());
  EXPECT_TRUE(error["type"].is_string());
  EXPECT_TRUE(error.contains("param"));
  EXPECT_EQ(Fetch(server.port(), Get("/live")).status, 200);
}

const std::string kChunkedTooLarge =
    "POST /v1/completions HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n400\r\n" +
    std::string(1024, 'a') + "\r\n0\r\n\r\n";

INSTANTIATE_TEST_SUITE_P(
    All, BadExchanges,
    testing::Values(
        BadExchange{"UnknownPath", Get("/nowhere"), 404, "not_found"},
        BadExchange{"TrailingSlash", Get("/v1/models/"), 404, "not_found"},
        BadExchange{"UnknownModel", Get("/v1/models/other"), 404, "model_not_found"},
        BadExchange{"WrongMethod", Get("/v1/chat/completions"), 405, "method_not_allowed"},
        BadExchange{"PostToModels", Post("/v1/models", "{}"), 405, "method_not_allowed"},
        BadExchange{"Options", "OPTIONS /v1/models HTTP/1.1\r\nHost: t\r\n\r\n", 405,
                    "method_not_allowed"},
        BadExchange{"InventedMethod", "BREW /health HTTP/1.1\r\nHost: t\r\n\r\n", 405,
                    "method_not_allowed"},
        BadExchange{"BodyTooLargeByLength", Post("/v1/completions", std::string(1001, 'a')), 413,
                    "body_too_large"},
        BadExchange{"BodyTooLargeInChunks", kChunkedTooLarge, 413, "body_too_large"},
        BadExchange{"FormBody",
                    "POST /v1/completions HTTP/1.1\r\nHost: t\r\nContent-Type: "
                    "application/x-www-form-urlencoded\r\nContent-Length: 1\r\n\r\na",
                    415, "unsupported_media_type"},
        BadExchange{"CompressedBody", Post("/v1/completions", "{}", "Content-Encoding: gzip\r\n"),
                    415, "unsupported_media_type"},
        BadExchange{"HeaderTooLarge", Get("/health", "X: " + std::string(17 << 10, 'a') + "\r\n"),
                    431, "header_too_large"},
        BadExchange{"NotHttp", "hello there\r\n\r\n", 400, "invalid_http"},
        BadExchange{"BadHeaderName", Get("/health", "a b: c\r\n"), 400, "invalid_http"},
        BadExchange{"TwoContentLengths", Post("/v1/completions", "{}", "Content-Length: 5\r\n"),
                    400, "invalid_http"},
        BadExchange{"NegativeContentLength",
                    "POST /v1/completions HTTP/1.1\r\nHost: t\r\nContent-Length: -1\r\n\r\n", 400,
                    "invalid_http"},
        BadExchange{"BadChunkSize",
                    "POST /v1/completions HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: "
                    "chunked\r\n\r\nxyz\r\n",
                    400, "invalid_http"},
        BadExchange{"NoHost", "GET /health HTTP/1.1\r\n\r\n", 400, "invalid_http"},
        BadExchange{"Http2Preface", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505,
                    "http_version_not_supported"},
        BadExchange{"OtherExpectation", Post("/v1/completions", "{}", "Expect: tea\r\n"), 417,
                    "expectation_failed"},
        BadExchange{"ResetByGet", Get("/reset_prefix_cache"), 405, "method_not_allowed"},
        BadExchange{"ResetNotJson", Post("/reset_prefix_cache", "all"), 400, "invalid_json"},
        BadExchange{"ResetWithAMisspeltField", Post("/reset_prefix_cache", R"({"salt":"a"})"), 400,
                    "invalid_value"},
        BadExchange{"ResetWithABadSalt", Post("/reset_prefix_cache", R"({"cache_salt":5})"), 400,
                    "invalid_value"},
        BadExchange{"ResetForm",
                    "POST /reset_prefix_cache HTTP/1.1\r\nHost: t\r\nContent-Type: "
                    "text/plain\r\nContent-Length: 1\r\n\r\na",
                    415, "unsupported_media_type"},
        BadExchange{"EmptyBody", Post("/v1/completions", ""), 400, "invalid_json"},
        BadExchange{"NotJson", Post("/v1/chat/completions", "hello"), 400, "invalid_json"},
        BadExchange{"MissingMessages", Post("/v1/chat/completions", "{}"), 400,
                    "missing_required_parameter"}),
    [](const auto& info) { return info.param.name; });

TEST(Routes, MethodNotAllowedNamesTheAllowedOnes) {
  TestServer server;
  EXPECT_EQ(Fetch(server.port(), Get("/v1/completions")).Header("Allow"), "POST");
  EXPECT_EQ(Fetch(server.port(), Post("/health", "")).Header("Allow"), "GET, HEAD");
}

TEST(Routes, HealthIs503WithTheReasonUntilTheLlmIsReady) {
  TestServer server;
  server.llm().SetReadiness({false, "waiting for engine worker 1 of 2"});
  for (const char* path : {"/health", "/ready", "/ping"}) {
    const Response response = Fetch(server.port(), Get(path));
    EXPECT_EQ(response.status, 503) << path;
    EXPECT_THAT(ErrorOf(response)["message"], HasSubstr("waiting for engine worker 1 of 2"));
  }
  EXPECT_EQ(Fetch(server.port(), Get("/live")).status, 200);
  const Response refused = Fetch(server.port(), ChatPost());
  EXPECT_EQ(refused.status, 503);
  EXPECT_EQ(refused.Header("Retry-After"), "1");
  EXPECT_TRUE(server.llm().submitted().empty());

  server.llm().SetReadiness({true, ""});
  for (const char* path : {"/health", "/ready", "/ping"}) {
    EXPECT_EQ(Fetch(server.port(), Get(path)).status, 200) << path;
  }
  EXPECT_EQ(Fetch(server.port(), Post("/ping", "")).status, 200);
  EXPECT_EQ(Fetch(server.port(), ChatPost()).status, 200);
}

// A process has died and is being replaced: a client that waits is answered, a probe is told.
TEST(Routes, WhileTheLlmRecoversHealthIs503AndRequestsAreTaken) {
  TestServer server;
  server.llm().SetReadiness(
      {.ready = false, .reason = "engine worker 1 was ended by signal 9", .is_recovering = true});
  const Response health = Fetch(server.port(), Get("/health"));
  EXPECT_EQ(health.status, 503);
  EXPECT_THAT(ErrorOf(health)["message"], HasSubstr("engine worker 1 was ended by signal 9"));
  EXPECT_EQ(Fetch(server.port(), ChatPost()).status, 200);
}

TEST(Routes, HeadIsGetWithoutTheBody) {
  TestServer server;
  RawClient client(server.port());
  client.Send("HEAD /health HTTP/1.1\r\nHost: t\r\n\r\n" + Get("/live"));
  const auto head = client.Receive(/*head_only=*/true);
  ASSERT_TRUE(head.has_value());
  EXPECT_EQ(head->status, 200);
  EXPECT_EQ(head->Header("Content-Length"), "15");
  EXPECT_EQ(client.Receive().value_or(Response()).status, 200);
}

TEST(Routes, ModelsHaveTheirPublicNameAliasesAndPath) {
  HttpOptions options;
  options.model_names.aliases = {"other"};
  TestServer server(options);
  const json list = json::parse(Fetch(server.port(), Get("/v1/models")).body);
  EXPECT_EQ(list["object"], "list");
  ASSERT_EQ(list["data"].size(), 2u);
  EXPECT_EQ(list["data"][0]["id"], "fake");
  EXPECT_EQ(list["data"][1]["id"], "other");
  EXPECT_EQ(list["data"][0]["max_model_len"], 2048);
  EXPECT_EQ(Fetch(server.port(), Get("/v1/models/fake")).status, 200);
  EXPECT_EQ(Fetch(server.port(), Get("/v1/models/other?a=b")).status, 200);
  EXPECT_EQ(Fetch(server.port(), Get("/v1/models/models%2Ffake")).status, 200);
  EXPECT_EQ(Fetch(server.port(), Get("http://host/v1/models/models/fake")).status, 200);
}

TEST(Routes, VersionSaysOurs) {
  TestServer server;
  EXPECT_EQ(json::parse(Fetch(server.port(), Get("/version")).body)["version"], WINTSERVE_VERSION);
}

TEST(ResetPrefixCache, DropsOneSaltOrAll) {
  TestServer server;
  server.llm().SetResetAnswer(42);
  const std::string no_body = "POST /reset_prefix_cache HTTP/1.1\r\nHost: t\r\n\r\n";
  for (const std::string& request :
       {no_body, Post("/reset_prefix_cache", ""), Post("/reset_prefix_cache", "{}"),
        Post("/reset_prefix_cache", R"({"cache_salt":null})"),
        Post("/reset_prefix_cache", R"({"cache_salt":"s"})"),
        Post("/reset_prefix_cache", R"({"cache_salt":""})")}) {
    const Response response = Fetch(server.port(), request);
    EXPECT_EQ(response.status, 200);
    EXPECT_EQ(response.body, R"({"num_blocks":42})");
  }
  EXPECT_THAT(server.llm().resets(), testing::ElementsAre(std::nullopt, std::nullopt, std::nullopt,
                                                          std::nullopt, "s", ""));
}

TEST(ResetPrefixCache, QuotesOnlyTheBeginningOfAnUnknownName) {
  TestServer server;
  const std::string body = "{\"" + std::string(100'000, 'x') + "\":1}";
  const Response response = Fetch(server.port(), Post("/reset_prefix_cache", body));
  EXPECT_EQ(response.status, 400);
  EXPECT_EQ(json::parse(response.body)["error"]["message"],
            std::string(64, 'x') + ": only cache_salt is known here");
}

TEST(ResetPrefixCache, MeansTheSaltThatRequestsOfThatKeyHave) {
  HttpOptions options;
  options.api_keys = {"key"};
  options.isolate_cache_by_key = true;
  TestServer server(options);
  const std::string key = "Authorization: Bearer key\r\n";
  const std::string salted = R"("cache_salt":"s")";
  Fetch(server.port(), Post("/v1/completions", R"({"prompt":"a",)" + salted + "}", key));
  EXPECT_EQ(Fetch(server.port(), Post("/reset_prefix_cache", "{" + salted + "}", key)).status, 200);
  ASSERT_EQ(server.llm().submitted().size(), 1u);
  EXPECT_THAT(server.llm().resets(), testing::ElementsAre(server.llm().submitted()[0].cache_salt));
}

TEST(ResetPrefixCache, OfAKeyReachesNoOtherKeysCache) {
  HttpOptions options;
  options.api_keys = {"key", "other"};
  options.isolate_cache_by_key = true;
  TestServer server(options);
  std::vector<std::string> salts;
  for (const std::string key : {"key", "other"}) {
    const std::string header = "Authorization: Bearer " + key + "\r\n";
    Fetch(server.port(), Post("/v1/completions", R"({"prompt":"a"})", header));
    for (const char* body : {"", "{}", R"({"cache_salt":null})", R"({"cache_salt":""})"}) {
      EXPECT_EQ(Fetch(server.port(), Post("/reset_prefix_cache", body, header)).status, 200);
    }
    ASSERT_FALSE(server.llm().submitted().empty());
    salts.insert(salts.end(), 4, server.llm().submitted().back().cache_salt);
  }
  EXPECT_NE(salts.front(), salts.back());
  EXPECT_THAT(server.llm().resets(), testing::ElementsAreArray(salts));
}

TEST(ResetPrefixCache, Is503InPlainWordsWithoutACacheManager) {
  for (const absl::Status& error :
       {absl::UnavailableError("unix:/run/x/cache.sock: failed to connect to all addresses"),
        absl::UnauthenticatedError("unix:/run/x/cache.sock: demands the instance token"),
        absl::InternalError("unix:/run/x/cache.sock: RST_STREAM")}) {
    TestServer server;
    server.llm().SetResetAnswer(error);
    const Response response = Fetch(server.port(), Post("/reset_prefix_cache", ""));
    EXPECT_EQ(response.status, 503);
    EXPECT_EQ(response.Header("Retry-After"), "1");
    EXPECT_EQ(ErrorOf(response)["message"],
              "the prefix cache was not reset: the cache manager does not answer; try again");
  }
}

// Every sample line is "name{labels} number".
void ExpectPrometheusText(const std::string& text) {
  std::istringstream lines(text);
  int num_samples = 0;
  for (std::string line; std::getline(lines, line);) {
    if (line.empty() || line[0] == '#') continue;
    ++num_samples;
    EXPECT_THAT(line, testing::MatchesRegex("[a-zA-Z_:]+(\\{[^}]*\\})? [-+0-9.eInfa]+"));
  }
  EXPECT_GT(num_samples, 0);
}

TEST(Metrics, CountRequestsByRouteTemplate) {
  TestServer server;
  Fetch(server.port(), ChatPost());
  Fetch(server.port(), Get("/v1/models/secret%22name"));
  Fetch(server.port(), "BREW /coffee HTTP/1.1\r\nHost: t\r\n\r\n");
  // Counted after the answer is sent, so another request may be needed to see it.
  std::string text;
  for (int i = 0; i < 100 && text.find("unmatched") == std::string::npos; ++i) {
    const Response response = Fetch(server.port(), Get("/metrics"));
    EXPECT_EQ(response.Header("Content-Type"), "text/plain; version=0.0.4; charset=utf-8");
    text = response.body;
  }
  ExpectPrometheusText(text);
  EXPECT_THAT(
      text,
      HasSubstr(
          R"(http_requests_total{method="POST",path="/v1/chat/completions",status_code="200"} 1)"));
  EXPECT_THAT(
      text,
      HasSubstr(R"(http_requests_total{method="GET",path="/v1/models/:id",status_code="404"} 1)"));
  EXPECT_THAT(
      text,
      HasSubstr(R"(http_requests_total{method="OTHER",path="unmatched",status_code="404"} 1)"));
  EXPECT_THAT(
      text,
      HasSubstr(
          R"(http_request_duration_seconds_count{method="POST",path="/v1/chat/completions"} 1)"));
  EXPECT_THAT(text, testing::Not(HasSubstr("secret")));
}

TEST(Metrics, AreOnTheirOwnPortWhereThereIsOne) {
  TestServer server({}, /*own_metrics_port=*/true);
  EXPECT_EQ(Fetch(server.port(), Get("/metrics")).status, 404);
  EXPECT_EQ(Fetch(server.metrics_port(), Get("/metrics")).status, 200);
  EXPECT_EQ(Fetch(server.metrics_port(), Get("/v1/models")).status, 404);
  EXPECT_EQ(Fetch(server.metrics_port(), Post("/reset_prefix_cache", "")).status, 404);
}

TEST(Auth, GuardsEverythingUnderV1) {
  HttpOptions options;
  options.api_keys = {"first-key", "second-key"};
  TestServer server(options);
  for (const char* header :
       {"", "Authorization: first-key\r\n", "Authorization: Bearer first-ke\r\n",
        "Authorization: Bearer\r\n", "Authorization: Basic first-key\r\n"}) {
    const Response response = Fetch(server.port(), Get("/v1/models", header));
    EXPECT_EQ(response.status, 401) << header;
    EXPECT_EQ(response.Header("WWW-Authenticate"), "Bearer");
    EXPECT_EQ(ErrorOf(response)["code"], "invalid_api_key");
  }
  EXPECT_EQ(Fetch(server.port(), Get("/v1/nowhere")).status, 401);
  EXPECT_EQ(Fetch(server.port(), Get("/%761/models")).status, 401);
  EXPECT_EQ(Fetch(server.port(), ChatPost()).status, 401);
  EXPECT_EQ(Fetch(server.port(), Post("/reset_prefix_cache", "")).status, 401);
  EXPECT_TRUE(server.llm().resets().empty());
  EXPECT_EQ(Fetch(server.port(), Get("/v1/models", "Authorization: Bearer first-key\r\n")).status,
            200);
  EXPECT_EQ(Fetch(server.port(), Get("/v1/models", "Authorization: bearer second-key\r\n")).status,
            200);
  for (const char* path : {"/health", "/ping", "/version", "/metrics", "/live"}) {
    EXPECT_EQ(Fetch(server.port(), Get(path)).status, 200) << path;
  }
}

TEST(RequestId, IsTheClientsWhereItIsSane) {
  TestServer server;
  EXPECT_EQ(Fetch(server.port(), Get("/health", "x-request-id: abc-1\r\n")).Header("x-request-id"),
            "abc-1");
  const std::string too_long(129, 'a');
  EXPECT_EQ(Fetch(server.port(), Get("/health", "x-request-id: " + too_long + "\r\n"))
                .Header("x-request-id")
                .size(),
            36u);
  EXPECT_EQ(Fetch(server.port(), Get("/health")).Header("x-request-id").size(), 36u);
}

TEST(Connections, AreReused) {
  TestServer server;
  RawClient client(server.port());
  for (int i = 0; i < 3; ++i) {
    client.Send(ChatPost());
    EXPECT_EQ(client.Receive().value_or(Response()).status, 200);
    client.Send(ChatPost(kStreaming));
    EXPECT_EQ(client.Receive().value_or(Response()).status, 200);
    client.Send(Get("/nowhere"));
    EXPECT_EQ(client.Receive().value_or(Response()).status, 404);
  }
}

TEST(Connections, AnswerPipelinedRequestsInOrder) {
  TestServer server;
  server.llm().SetDelayBetweenUpdates(milliseconds(20));
  RawClient client(server.port());
  client.Send(ChatPost(kStreaming) + Get("/version") + ChatPost() + Get("/nowhere"));
  EXPECT_THAT(client.Receive().value_or(Response()).body, HasSubstr("[DONE]"));
  EXPECT_THAT(client.Receive().value_or(Response()).body, HasSubstr("version"));
  EXPECT_THAT(client.Receive().value_or(Response()).body, HasSubstr("Hello world"));
  EXPECT_EQ(client.Receive().value_or(Response()).status, 404);
}

TEST(Connections, KeepARequestThatArrivesDuringAnAnswer) {
  TestServer server;
  server.llm().HoldUpdates();
  RawClient client(server.port());
  client.Send(ChatPost());
  ASSERT_TRUE(server.llm().WaitForSubmitted(1));
  const std::string next = Get("/version");
  client.Send(next.substr(0, 10));
  client.Send(next.substr(10));
  server.llm().Send(1, TextUpdate(0, "a", FinishReason::kStop));
  EXPECT_EQ(client.Receive().value_or(Response()).status, 200);
  EXPECT_THAT(client.Receive().value_or(Response()).body, HasSubstr("version"));
}

TEST(Connections, CloseWhenTheClientAsks) {
  TestServer server;
  RawClient client(server.port());
  client.Send(Get("/health", "Connection: close\r\n"));
  EXPECT_THAT(client.ReadToEnd(), HasSubstr("Connection: close"));
}

TEST(Connections, SpeakHttp10) {
  TestServer server;
  RawClient client(server.port());
  client.Send("GET /health HTTP/1.0\r\n\r\n");
  EXPECT_THAT(client.ReadToEnd(), StartsWith("HTTP/1.0 200 OK\r\n"));
  RawClient kept(server.port());
  kept.Send("GET /health HTTP/1.0\r\nConnection: keep-alive\r\n\r\n");
  EXPECT_EQ(kept.Receive().value_or(Response()).Header("Connection"), "keep-alive");
  kept.Send("GET /health HTTP/1.0\r\n\r\n");
  EXPECT_EQ(kept.Receive().value_or(Response()).status, 200);
}

TEST(Connections, GiveAClientThatExpects100TheGoAheadOrTheRefusal) {
  TestServer server;
  const std::string request = ChatPost();
  const size_t body_begin = request.find("\r\n\r\n") + 4;
  const std::string head = request.substr(0, body_begin - 2) + "Expect: 100-continue\r\n\r\n";
  RawClient client(server.port());
  client.Send(head);
  EXPECT_EQ(client.Receive().value_or(Response()).status, 100);
  client.Send(request.substr(body_begin));
  EXPECT_EQ(client.Receive().value_or(Response()).status, 200);

  RawClient refused(server.port());
  refused.Send(
      "POST /nowhere HTTP/1.1\r\nHost: t\r\nContent-Length: 9999\r\n"
      "Expect: 100-continue\r\n\r\n");
  EXPECT_EQ(refused.Receive().value_or(Response()).status, 404);
  EXPECT_TRUE(refused.IsClosed());
}

TEST(Connections, AreClosedWhenAHeaderOrABodyDoesNotCome) {
  HttpOptions options;
  options.read_timeout = milliseconds(100);
  TestServer server(options);
  RawClient half_header(server.port());
  half_header.Send("GET /health HTTP/1.1\r\nHo");
  EXPECT_TRUE(half_header.IsClosed());
  RawClient half_body(server.port());
  half_body.Send("POST /v1/completions HTTP/1.1\r\nHost: t\r\nContent-Length: 10\r\n\r\n{");
  EXPECT_TRUE(half_body.IsClosed());
}

TEST(Connections, BeyondTheLimitTakeThePlaceOfWhoHasSaidNothingForLongest) {
  HttpOptions options;
  options.num_io_threads = 1;
  options.max_connections = 4;
  TestServer server(options);
  server.llm().HoldUpdates();
  RawClient answered(server.port());
  answered.Send(ChatPost());
  ASSERT_TRUE(server.llm().WaitForSubmitted(1));
  RawClient slow_header(server.port());
  slow_header.Send("GET /health HTTP/1.1\r\nHo");
  RawClient slow_body(server.port());
  slow_body.Send("POST /v1/completions HTTP/1.1\r\nHost: t\r\nContent-Length: 10\r\n\r\n{");
  RawClient silent(server.port());
  // Each of these takes the place of one of those, in turn; then of one another.
  std::vector<std::unique_ptr<RawClient>> kept;
  for (int i = 0; i < 20; ++i) {
    kept.push_back(std::make_unique<RawClient>(server.port()));
    kept.back()->Send(Get("/live"));
    EXPECT_EQ(kept.back()->Receive().value_or(Response()).status, 200);
  }
  EXPECT_TRUE(slow_header.IsClosed());
  EXPECT_TRUE(slow_body.IsClosed());
  EXPECT_TRUE(silent.IsClosed());
  EXPECT_TRUE(kept.front()->IsClosed());
  kept.back()->Send(Get("/live"));
  EXPECT_EQ(kept.back()->Receive().value_or(Response()).status, 200);
  server.llm().Send(1, TextUpdate(0, "a", FinishReason::kStop));
  EXPECT_EQ(answered.Receive().value_or(Response()).status, 200);
}

TEST(Connections, BeyondTheLimitAreClosedWhileAllOthersAreBeingAnswered) {
  HttpOptions options;
  options.num_io_threads = 1;
  options.max_connections = 2;
  TestServer server(options);
  server.llm().HoldUpdates();
  RawClient first(server.port());
  RawClient second(server.port());
  first.Send(ChatPost());
  second.Send(ChatPost());
  ASSERT_TRUE(server.llm().WaitForSubmitted(2));
  EXPECT_TRUE(RawClient(server.port()).IsClosed());
  for (RawClient* client : {&first, &second}) {
    server.llm().Send(client == &first ? 1 : 2, TextUpdate(0, "a", FinishReason::kStop));
  }
  EXPECT_EQ(first.Receive().value_or(Response()).status, 200);
  EXPECT_EQ(second.Receive().value_or(Response()).status, 200);
  // A client may have its answer before the server has counted the connection among the idle ones.
  int status = 0;
  for (int attempt = 0; attempt < 500 && status != 200; ++attempt) {
    std::this_thread::sleep_for(std::chrono::milliseconds(10 * (attempt > 0)));
    status = Fetch(server.port(), Get("/live")).status;
  }
  EXPECT_EQ(status, 200) << "a kept one has made room";
}

TEST(Bodies, ThatAreTooLargeTogetherGet503UntilTheOthersAreThrough) {
  HttpOptions options;
  options.max_body_bytes = 1000;
  options.max_bodies_bytes = 1000;
  TestServer server(options);
  server.llm().HoldUpdates();
  const std::string large =
      Post("/v1/completions", R"({"prompt":")" + std::string(600, 'a') + "\"}");
  RawClient first(server.port());
  first.Send(large);
  ASSERT_TRUE(server.llm().WaitForSubmitted(1));
  const Response refused = Fetch(server.port(), large);
  EXPECT_EQ(refused.status, 503);
  EXPECT_EQ(refused.Header("Retry-After"), "1");
  EXPECT_EQ(refused.Header("Connection"), "close");
  EXPECT_EQ(ErrorOf(refused)["code"], "too_many_bodies");
  EXPECT_EQ(Fetch(server.port(), Get("/live")).status, 200) << "has none";
  server.llm().Send(1, TextUpdate(0, "a", FinishReason::kStop));
  EXPECT_EQ(first.Receive().value_or(Response()).status, 200);
  first.Send(Get("/live"));  // answered when the first request is done with
  EXPECT_EQ(first.Receive().value_or(Response()).status, 200);
  RawClient second(server.port());
  second.Send(large);
  EXPECT_TRUE(server.llm().WaitForSubmitted(2));
}

TEST(Bodies, InChunksCountByTheirSizeOnceItIsKnown) {
  HttpOptions options;
  options.max_body_bytes = 1000;
  options.max_bodies_bytes = 1000;
  TestServer server(options);
  server.llm().HoldUpdates();
  RawClient first(server.port());
  first.Send(
      "POST /v1/completions HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n"
      "e\r\n{\"prompt\":\"a\"}\r\n0\r\n\r\n");
  ASSERT_TRUE(server.llm().WaitForSubmitted(1));
  RawClient second(server.port());
  second.Send(Post("/v1/completions", R"({"prompt":")" + std::string(600, 'a') + "\"}"));
  EXPECT_TRUE(server.llm().WaitForSubmitted(2));
}

TEST(Connections, AreClosedAfterTheIdleTimeout) {
  HttpOptions options;
  options.idle_timeout = milliseconds(100);
  TestServer server(options);
  RawClient client(server.port());
  client.Send(Get("/health"));
  EXPECT_EQ(client.Receive().value_or(Response()).status, 200);
  EXPECT_TRUE(client.IsClosed());
}

TEST(Connections, ABodyTwiceTheLimitStillGetsItsAnswer) {
  TestServer server;
  RawClient client(server.port());
  client.Send(Post("/v1/completions", std::string(16 << 20, 'a')));
  EXPECT_EQ(client.Receive().value_or(Response()).status, 413);
}

TEST(Fuzz, RandomBytesGetA4xxOrAClosedConnection) {
  HttpOptions options;
  options.read_timeout = milliseconds(50);
  options.idle_timeout = milliseconds(50);
  TestServer server(options);
  const unsigned seed = std::random_device{}();
  SCOPED_TRACE(testing::Message() << "seed=" << seed);
  std::mt19937 rng(seed);
  const std::string valid = ChatPost(R"(,"max_tokens":5,"stop":["a"],"temperature":0.5)");
  for (int i = 0; i < 150; ++i) {
    std::string bytes = valid;
    if (i % 3 == 0) {  // noise
      bytes.resize(rng() % 2000);
      for (char& c : bytes) c = static_cast<char>(rng());
    } else if (i % 3 == 1) {  // a valid request with damage
      for (unsigned n = 1 + rng() % 8; n > 0; --n) {
        bytes[rng() % bytes.size()] = static_cast<char>(rng());
      }
    } else {  // a valid request cut short, or with bytes lost in the middle
      bytes.erase(rng() % bytes.size(), rng() % bytes.size());
    }
    RawClient client(server.port());
    client.Send(bytes);
    const std::string answer = client.ReadToEnd();
    // Damage may leave a request valid; it must never be an error of ours.
    EXPECT_THAT(answer, testing::AnyOf("", StartsWith("HTTP/1.1 4"), StartsWith("HTTP/1.0 4"),
                                       StartsWith("HTTP/1.1 200"), StartsWith("HTTP/1.1 505"),
                                       StartsWith("HTTP/1.0 200")));
  }
  EXPECT_EQ(Fetch(server.port(), ChatPost()).status, 200);
}

TEST(Start, RefusesAnFdThatDoesNotListen) {
  FakeLlm llm;
  HttpOptions options;
  options.listen_fd = 0;
  const auto server = HttpServer::Start(options, &llm, nullptr);
  ASSERT_FALSE(server.ok());
  EXPECT_THAT(std::string(server.status().message()), HasSubstr("0 is not a listening socket"));
}

}  // namespace
}  // namespace wintserve
