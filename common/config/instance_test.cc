#include "common/config/instance.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <nlohmann/json.hpp>

#include "common/config/serve_options_json.h"

namespace wintserve {
namespace {

using ::testing::HasSubstr;

// No field keeps its default, so that a field lost on the way shows.
Instance UnusualInstance() {
  Instance instance;
  ServeOptions& options = instance.options;
  options.model = "/models/诗 \"quoted\"";
  options.tokenizer = "/tokenizer";
  options.served_model_name = {"name", "alias"};
  options.strict_model_name = true;
  options.k_order = "natural";
  options.load_format = "dummy";
  options.dummy_router_skew = 1.5;
  options.host = "127.0.0.1";
  options.port = 1;
  options.metrics_port = 2;
  options.engine_worker_queue_port = 3;
  options.cache_queue_port = 4;
  options.queue_host = "10.0.0.1";
  options.queue_tls_cert = "/cert.pem";
  options.queue_tls_key = "/key.pem";
  options.queue_tls_ca = "/ca.pem";
  options.queue_token_file = "/token";
  options.insecure_bind = true;
  options.api_keys = {"key,with=signs"};
  options.device = "cuda";
  options.kv_cache_dtype = "int8";
  options.tensor_parallel_size = 4;
  options.cpu_threads = 5;
  options.max_model_len = 6;
  options.max_num_seqs = 7;
  options.max_num_batched_tokens = 8;
  options.max_concurrency = 9;
  options.max_queue_requests = 12;
  options.max_queue_tokens = int64_t{1} << 33;
  options.max_num_seqs_per_user = 13;
  options.max_num_partial_prefills = 14;
  options.max_long_partial_prefills = 15;
  options.long_prefill_token_threshold = 16;
  options.request_timeout_ms = 17;
  options.enable_prefix_caching = false;
  options.enable_chunked_prefill = false;
  options.enable_logprob = false;
  options.max_logprobs = 19;
  options.async_depth = 0;
  options.cache_isolation = "key";
  options.client_stall_timeout_ms = 18;
  options.use_cudagraph = true;
  options.block_size = 10;
  options.gpu_memory_utilization = 0.75;
  options.num_gpu_blocks_override = 11;
  options.swap_space_gib = 0.1;
  options.role = "engine";
  options.runtime_dir = "/run/shared";
  options.log_level = "debug";
  options.log_dir = "/log";
  options.drain_timeout_ms = int64_t{1} << 40;
  options.orphan_timeout_ms = 20;
  options.stall_timeout_ms = 22;
  options.fault_hold_ms = 21;
  instance.token = std::string("\0\xff\x80 token", 9);
  instance.runtime_dir = "/run/wintserve-1";
  instance.rank = 3;
  instance.worker_id = 0xfedcba9876543210;
  instance.restarted = true;
  instance.http_fd = 4;
  instance.metrics_fd = 5;
  instance.start_fd = 6;
  instance.mode = "generate";
  instance.generate_json = R"({"prompt":"写一首"})";
  return instance;
}

UniqueFd SealedFile(const std::string& text, int seals) {
  UniqueFd fd(::memfd_create("test", MFD_ALLOW_SEALING));
  EXPECT_EQ(::write(fd.get(), text.data(), text.size()), static_cast<ssize_t>(text.size()));
  EXPECT_EQ(::fcntl(fd.get(), F_ADD_SEALS, seals), 0);
  return fd;
}
constexpr int kAllSeals = F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE;

TEST(Instance, EveryFieldSurvivesTheTrip) {
  const Instance sent = UnusualInstance();
  const nlohmann::json options = ServeOptionsToJson(sent.options);
  const nlohmann::json defaults = ServeOptionsToJson(ServeOptions());
  for (const auto& [name, value] : options.items()) {
    EXPECT_NE(value, defaults[name]) << name << " keeps its default: it would not be tested";
  }

  const auto fd = WriteInstance(sent);
  ASSERT_TRUE(fd.ok()) << fd.status();
  const auto got = ReadInstance(fd->get());
  ASSERT_TRUE(got.ok()) << got.status();
  EXPECT_EQ(ServeOptionsToJson(got->options), options);
  EXPECT_EQ(got->token, sent.token);
  EXPECT_EQ(got->runtime_dir, sent.runtime_dir);
  EXPECT_EQ(got->rank, sent.rank);
  EXPECT_EQ(got->worker_id, sent.worker_id);
  EXPECT_EQ(got->restarted, sent.restarted);
  EXPECT_EQ(got->http_fd, sent.http_fd);
  EXPECT_EQ(got->metrics_fd, sent.metrics_fd);
  EXPECT_EQ(got->start_fd, sent.start_fd);
  EXPECT_EQ(got->mode, sent.mode);
  EXPECT_EQ(got->generate_json, sent.generate_json);
}

TEST(Instance, UnsetOptionalsStayUnset) {
  const auto fd = WriteInstance(Instance());
  ASSERT_TRUE(fd.ok()) << fd.status();
  const auto got = ReadInstance(fd->get());
  ASSERT_TRUE(got.ok()) << got.status();
  EXPECT_FALSE(got->options.metrics_port.has_value());
  EXPECT_FALSE(got->options.num_gpu_blocks_override.has_value());
}

TEST(Instance, TheFileIsInheritedAndCannotChange) {
  const auto fd = WriteInstance(Instance());
  ASSERT_TRUE(fd.ok()) << fd.status();
  EXPECT_EQ(::fcntl(fd->get(), F_GETFD) & FD_CLOEXEC, 0);
  EXPECT_EQ(::pwrite(fd->get(), "x", 1, 0), -1);
  EXPECT_EQ(::ftruncate(fd->get(), 0), -1);
}

TEST(Instance, RefusesWhatItDidNotWrite) {
  const auto good_fd = WriteInstance(UnusualInstance());
  ASSERT_TRUE(good_fd.ok());
  std::string good(::lseek(good_fd->get(), 0, SEEK_END), '\0');
  ASSERT_GT(::pread(good_fd->get(), good.data(), good.size(), 0), 0);
  auto changed = [&](auto change) {
    nlohmann::json json = nlohmann::json::parse(good);
    change(json);
    return json.dump();
  };
  struct Case {
    const char* name;
    std::string text;
    int seals;
    const char* expected;
  };
  const Case cases[] = {
      {"empty", "", kAllSeals, "parse error"},
      {"cut in half", good.substr(0, good.size() / 2), kAllSeals, "parse error"},
      {"not sealed", good, 0, "not sealed"},
      {"no options", changed([](auto& j) { j.erase("options"); }), kAllSeals, "options"},
      {"no token", changed([](auto& j) { j.erase("token"); }), kAllSeals, "token"},
      {"option missing", changed([](auto& j) { j["options"].erase("port"); }), kAllSeals,
       "options.port: missing"},
      {"option of another type", changed([](auto& j) { j["options"]["port"] = "x"; }), kAllSeals,
       "options.port: wrong type"},
      {"option of a newer version", changed([](auto& j) { j["options"]["new"] = 1; }), kAllSeals,
       "55 fields, expected 54"},
      {"list of the wrong thing", changed([](auto& j) { j["options"]["api_keys"] = {1}; }),
       kAllSeals, "options.api_keys: wrong type"},
      {"an array", "[]", kAllSeals, "array"},
  };
  for (const Case& c : cases) {
    SCOPED_TRACE(c.name);
    const auto instance = ReadInstance(SealedFile(c.text, c.seals).get());
    EXPECT_EQ(instance.status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(instance.status().ToString(), HasSubstr(c.expected));
  }
  EXPECT_EQ(ReadInstance(-1).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(Instance, ASettingThatIsNotUtf8IsAnErrorNotACrash) {
  Instance instance;
  instance.options.model = "\xff";
  EXPECT_EQ(WriteInstance(instance).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(InstanceFromArgv, ReadsAndClosesTheDescriptor) {
  auto fd = WriteInstance(UnusualInstance());
  ASSERT_TRUE(fd.ok());
  const int number = fd->Release();
  const std::string flag = fmt::format("--instance-fd={}", number);
  const char* argv[] = {"child", flag.c_str(), nullptr};
  const auto instance = InstanceFromArgv(2, argv);
  ASSERT_TRUE(instance.ok()) << instance.status();
  EXPECT_EQ(instance->rank, 3);
  EXPECT_EQ(::fcntl(number, F_GETFD), -1);
}

TEST(InstanceFromArgv, SaysHowTheChildIsStarted) {
  const char* by_hand[] = {"wintserve-api-server", nullptr};
  EXPECT_THAT(InstanceFromArgv(1, by_hand).status().ToString(), HasSubstr("`wintserve serve`"));
  const char* wrong[] = {"child", "--instance-fd=x", nullptr};
  EXPECT_THAT(InstanceFromArgv(2, wrong).status().ToString(), HasSubstr("(got x)"));
}

TEST(EffectiveConfig, ShowsEverySettingButNoKey) {
  const std::string line = EffectiveConfig(UnusualInstance().options);
  EXPECT_THAT(line, HasSubstr("port=1 "));
  EXPECT_THAT(line, HasSubstr("metrics_port=2 "));
  EXPECT_THAT(line, HasSubstr("api_keys=1 "));
  EXPECT_THAT(line, ::testing::Not(HasSubstr("key,with")));
  EXPECT_THAT(line, ::testing::Not(HasSubstr("\n")));
}

}  // namespace
}  // namespace wintserve
