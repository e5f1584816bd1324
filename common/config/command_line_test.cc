#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>

#include "common/config/command_line_test_util.h"
#include "common/config/flag.h"
#include "common/exit_code.h"

namespace wintserve {
namespace {

using testing::Args;
using ::testing::ElementsAre;
using testing::Environment;
using testing::ExpectOneLineError;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::Parse;
using testing::Serve;
using ::testing::SizeIs;

TEST(CommandLine, TheDocumentedCommandIsServed) {
  const CommandLine command =
      Serve({"--model", "models/poet", "--port", "8180", "--metrics-port", "8181",
             "--engine-worker-queue-port", "8182", "--cache-queue-port", "8183",
             "--tensor-parallel-size", "2", "--max-model-len", "32768", "--use-cudagraph",
             "--enable-prefix-caching", "--enable-chunked-prefill", "--max-num-seqs", "256"});
  ASSERT_EQ(command.error, "");
  EXPECT_EQ(command.verb, Verb::kServe);
  EXPECT_EQ(command.options.port, 8180);
  EXPECT_EQ(command.options.metrics_port, 8181);
  EXPECT_EQ(command.options.engine_worker_queue_port, 8182);
  EXPECT_EQ(command.options.cache_queue_port, 8183);
  EXPECT_EQ(command.options.tensor_parallel_size, 2);
  EXPECT_EQ(command.options.max_model_len, 32768);
  EXPECT_EQ(command.options.max_num_seqs, 256);
  EXPECT_FALSE(command.options.use_cudagraph);
  EXPECT_TRUE(command.options.enable_prefix_caching);
  EXPECT_TRUE(command.options.enable_chunked_prefill);
  EXPECT_THAT(command.notes,
              ElementsAre("--use-cudagraph: there are no CUDA graphs on --device cpu; ignored"));
}

TEST(CommandLine, WithoutFlagsTheDefaultsOfTheCpuHold) {
  const CommandLine command = Serve({});
  ASSERT_EQ(command.error, "");
  EXPECT_EQ(command.options.model, "models/poet");
  EXPECT_EQ(command.options.port, 8000);
  EXPECT_EQ(command.options.max_num_seqs, 16);
  EXPECT_EQ(command.options.max_num_batched_tokens, 256);
  EXPECT_EQ(command.options.drain_timeout_ms, 55'000);
  EXPECT_EQ(command.options.orphan_timeout_ms, 120'000);
  EXPECT_EQ(command.options.stall_timeout_ms, 300'000);
  EXPECT_EQ(command.options.fault_hold_ms, 60'000);
  EXPECT_TRUE(command.options.enable_prefix_caching);
  EXPECT_TRUE(command.options.enable_chunked_prefill);
  EXPECT_EQ(command.options.async_depth, 1);
  EXPECT_EQ(command.options.max_queue_requests, 0);
  EXPECT_EQ(command.options.long_prefill_token_threshold, 0)
      << "the engine knows the model's length";
  EXPECT_THAT(command.notes, IsEmpty());
}

TEST(CommandLine, ReadsEverySpelling) {
  const Args spellings[] = {
      {"--max-num-seqs", "7"}, {"--max-num-seqs=7"},
      {"--max_num_seqs=7"},    {"--max_num_seqs", "7"},
      {"--max-num-s", "7"},  // though --max-num-seqs-per-user begins so too
      {"--max-num_s=7"},       {"--max-num-seqs=9", "--max-num-seqs=7"},
  };
  for (const Args& args : spellings) {
    SCOPED_TRACE(args[0]);
    const CommandLine command = Serve(args);
    EXPECT_EQ(command.error, "");
    EXPECT_EQ(command.options.max_num_seqs, 7);
  }
  EXPECT_EQ(Serve({"-tp", "4"}).options.tensor_parallel_size, 4);
  EXPECT_EQ(Serve({"-tp=4"}).options.tensor_parallel_size, 4);
}

TEST(CommandLine, SwitchesGoBothWaysAndTheLastCounts) {
  struct Case {
    Args args;
    bool expected;
  };
  const Case cases[] = {
      {{"--strict-model-name"}, true},
      {{"--no-strict-model-name"}, false},
      {{"--no_strict_model_name"}, false},
      {{"--strict-model-name=false"}, false},
      {{"--no-strict-model-name", "--strict-model-name"}, true},
      {{"--strict-model-name", "--no-strict-model-name"}, false},
  };
  for (const Case& c : cases) {
    SCOPED_TRACE(c.args.back());
    const CommandLine command = Serve(c.args);
    EXPECT_EQ(command.error, "");
    EXPECT_EQ(command.options.strict_model_name, c.expected);
  }
}

TEST(CommandLine, ApiKeysAddUpAndWinOverTheEnvironment) {
  const Environment environment = {{"FD_API_KEY", "e1,,e2"}};
  EXPECT_THAT(Serve({"--api-key", "a", "--api-key", "b"}, environment).options.api_keys,
              ElementsAre("a", "b"));
  EXPECT_THAT(Serve({}, environment).options.api_keys, ElementsAre("e1", "e2"));
  EXPECT_THAT(Serve({}).options.api_keys, IsEmpty());
}

TEST(CommandLine, TheQueuePortsStayOnLoopbackUnlessTheyAreSafeElsewhere) {
  EXPECT_EQ(Serve({}).options.queue_host, "127.0.0.1");
  EXPECT_EQ(Serve({"--host=0.0.0.0"}).options.queue_host, "127.0.0.1");
  EXPECT_EQ(Serve({"--queue-host=localhost"}).options.queue_host, "127.0.0.1");
  EXPECT_EQ(Serve({"--queue-host=127.9.9.9"}).options.queue_host, "127.9.9.9");
  const CommandLine with_tls =
      Serve({"--queue-host=10.0.0.1", "--queue-tls-cert=c", "--queue-tls-key=k"});
  EXPECT_EQ(with_tls.options.queue_host, "10.0.0.1");
  EXPECT_THAT(with_tls.notes, IsEmpty());

  const CommandLine insecure = Serve({"--queue-host=10.0.0.1", "--insecure-bind"});
  EXPECT_EQ(insecure.options.queue_host, "10.0.0.1");
  EXPECT_THAT(insecure.notes,
              ElementsAre(HasSubstr("--insecure-bind: the queue ports on 10.0.0.1 have no TLS")));
  EXPECT_THAT(Serve({"--insecure-bind"}).notes,
              ElementsAre("--insecure-bind: the queue ports are safe without it; ignored"));
}

TEST(CommandLine, SetsWhatTheFlagSays) {
  EXPECT_THAT(Serve({"--served-model-name", "a, b,c"}).options.served_model_name,
              ElementsAre("a", "b", "c"));
  EXPECT_EQ(Serve({"--host", "localhost"}).options.host, "127.0.0.1");
  EXPECT_EQ(Serve({"--drain-timeout", "1.5"}).options.drain_timeout_ms, 1500);
  EXPECT_EQ(Serve({"--orphan-timeout", "2.5"}).options.orphan_timeout_ms, 2500);
  EXPECT_EQ(Serve({"--stall-timeout", "0.5"}).options.stall_timeout_ms, 500);
  EXPECT_EQ(Serve({"--fault-hold", "0"}).options.fault_hold_ms, 0);
  EXPECT_EQ(Serve({"--timeout-graceful-shutdown", "7"}).options.drain_timeout_ms, 7000);
  EXPECT_EQ(Serve({"--timeout-graceful-shutdown", "0"}).options.drain_timeout_ms, 55'000);
  EXPECT_EQ(
      Serve({"--drain-timeout", "2", "--timeout-graceful-shutdown", "7"}).options.drain_timeout_ms,
      2000);
  EXPECT_EQ(Serve({"--k-order", "natural"}).options.k_order, "natural");
  EXPECT_EQ(Serve({"--cpu-threads", "3"}).options.cpu_threads, 3);
  EXPECT_EQ(Serve({"--quantization", "wint2"}).error, "");
  EXPECT_EQ(Serve({"--quantization", R"({"quantization":"wint2"})"}).error, "");
  EXPECT_FALSE(Serve({"--no-enable-prefix-caching"}).options.enable_prefix_caching);
  EXPECT_FALSE(Serve({"--no-enable-chunked-prefill"}).options.enable_chunked_prefill);
  EXPECT_TRUE(Serve({"--enable-logprob"}).options.enable_logprob);
  EXPECT_FALSE(Serve({"--no-enable-logprob"}).options.enable_logprob);
  EXPECT_EQ(Serve({}).options.max_logprobs, 20);
  EXPECT_EQ(Serve({"--max-logprobs=5"}).options.max_logprobs, 5);
  EXPECT_EQ(Serve({"--max-logprobs=-1"}).options.max_logprobs, 20);
  EXPECT_EQ(Serve({"--max-logprobs=100"}).options.max_logprobs, 20);
  EXPECT_EQ(Serve({"--swap-space", "1.5"}).options.swap_space_gib, 1.5);
  EXPECT_EQ(Serve({"--max-num-partial-prefills=3"}).options.max_num_partial_prefills, 3);
  EXPECT_EQ(Serve({"--max-long-partial-prefills=2"}).options.max_long_partial_prefills, 2);
  EXPECT_EQ(Serve({"--long-prefill-token-threshold=9"}).options.long_prefill_token_threshold, 9);
  EXPECT_EQ(Serve({"--max-queue-tokens=5000000000"}).options.max_queue_tokens, 5'000'000'000);
  EXPECT_EQ(Serve({"--max-num-seqs-per-user=2"}).options.max_num_seqs_per_user, 2);
  EXPECT_EQ(Serve({"--async-depth=0"}).options.async_depth, 0);
  EXPECT_EQ(Serve({"--cache-isolation=key", "--api-key=k"}).options.cache_isolation, "key");
  EXPECT_EQ(Serve({"--request-timeout=2.5"}).options.request_timeout_ms, 2500);
  EXPECT_EQ(Serve({"--request-timeout=0.0001"}).options.request_timeout_ms, 1) << "0 is no limit";
  EXPECT_EQ(Serve({"--client-stall-timeout=0.5"}).options.client_stall_timeout_ms, 500);
}

TEST(CommandLine, DummyWeights) {
  EXPECT_EQ(Serve({}).options.load_format, "auto");
  const CommandLine dummy = Serve({"--load-format=dummy", "--dummy-router-skew", "1.5"});
  EXPECT_EQ(dummy.options.load_format, "dummy");
  EXPECT_EQ(dummy.options.dummy_router_skew, 1.5);
}

TEST(CommandLine, TheQueueBoundHasTwoNames) {
  EXPECT_EQ(Serve({"--max-queue-requests=7"}).options.max_queue_requests, 7);
  EXPECT_EQ(Serve({"--scheduler-max-size=7"}).options.max_queue_requests, 7);
  EXPECT_EQ(Serve({"--scheduler-max-size=-5"}).options.max_queue_requests, 0);
  EXPECT_EQ(Serve({"--max-queue-requests=7", "--scheduler-max-size=9"}).options.max_queue_requests,
            7);
}

TEST(CommandLine, MetricsPortEqualToPortMeansOnPort) {
  EXPECT_FALSE(Serve({"--port=8180", "--metrics-port=8180"}).options.metrics_port.has_value());
  EXPECT_EQ(Serve({"--metrics-port=0"}).options.metrics_port, 0);
  EXPECT_EQ(Serve({"--port=0", "--metrics-port=0"}).options.metrics_port, 0);
}

TEST(CommandLine, AStepHoldsOneTokenOfEverySequence) {
  EXPECT_EQ(Serve({"--max-num-seqs=256"}).error, "");
  EXPECT_EQ(Serve({"--max-num-batched-tokens=16"}).options.max_num_batched_tokens, 16);
}

TEST(CommandLine, WithoutChunkedPrefillTheDefaultsOfOtherServersAreStillTaken) {
  const CommandLine command =
      Serve({"--no-enable-chunked-prefill", "--max-num-partial-prefills=1",
             "--max-long-partial-prefills=1", "--long-prefill-token-threshold=0"});
  EXPECT_EQ(command.error, "");
  EXPECT_FALSE(command.options.enable_chunked_prefill);
}

TEST(CommandLine, OneLineSaysWhatIsWrong) {
  struct Case {
    Args args;
    const char* expected;
  };
  const Case cases[] = {
      {{"--port", "99999999"}, "error: --port: must be 0..65535 (got 99999999)"},
      {{"--port", "99999999999999999999999"}, "error: --port: must be an integer, 0..65535 (got "},
      {{"--port", "-1"}, "error: --port: must be 0..65535 (got -1)"},
      {{"--port", "80x"}, "error: --port: must be an integer, 0..65535 (got 80x)"},
      {{"--port="}, "error: --port: must be an integer, 0..65535 (got nothing)"},
      {{"--port"}, "error: --port: needs a value"},
      {{"--port", "--host", "x"}, "error: --port: needs a value; write --port=VALUE"},
      {{"--prot", "1"}, "error: --prot: unknown flag (did you mean --port?)"},
      {{"--max-mdoel-len", "1"}, "unknown flag (did you mean --max-model-len?)"},
      {{"--xyzzyplugh"}, "error: --xyzzyplugh: unknown flag"},
      {{"--max-num"}, "error: --max-num: could be --max-num-seqs, --max-num-batched-tokens"},
      {{"-p", "1"}, "error: unexpected argument -p; flags begin with --"},
      {{"models/poet"}, "error: unexpected argument models/poet"},
      {{"--"}, "error: unexpected argument --"},
      {{""}, "error: unexpected argument nothing"},
      {{"--help=x"}, "error: --help: takes no value"},
      {{"--no-enable-prefix-caching=true"}, "error: --no-enable-prefix-caching: takes no value"},
      {{"--enable-prefix-caching=maybe"}, "must be true or false (got maybe)"},
      {{"--prompt", "x"}, "error: --prompt: is a flag of `wintserve generate`"},
      {{"--max-model-len", "15"}, "error: --max-model-len: must be 16..1048576 (got 15)"},
      {{"--max-num-seqs", "257"}, "must be 1..256 (got 257)"},
      {{"--max-num-seqs", "0"}, "must be 1..256 (got 0)"},
      {{"--max-num-seqs=8", "--max-num-batched-tokens=7"},
       "error: --max-num-batched-tokens: must be at least --max-num-seqs, 8 (got 7)"},
      {{"--max-num-partial-prefills=0"}, "must be 1..256 (got 0)"},
      {{"--max-long-partial-prefills=3"},
       "error: --max-long-partial-prefills: must be at most --max-num-partial-prefills, 2 (got 3)"},
      {{"--max-model-len=100", "--long-prefill-token-threshold=100"},
       "error: --long-prefill-token-threshold: must be below --max-model-len, 100 (got 100)"},
      {{"--no-enable-chunked-prefill", "--max-num-partial-prefills=4"},
       "error: --max-num-partial-prefills: has nothing to work on with "
       "--no-enable-chunked-prefill; must be 1 or not given (got 4)"},
      {{"--max-num-partial-prefills=2", "--no-enable-chunked-prefill"},
       "error: --max-num-partial-prefills: has nothing to work on"},
      {{"--no-enable-chunked-prefill", "--max-long-partial-prefills=2"},
       "error: --max-long-partial-prefills: has nothing to work on"},
      {{"--no-enable-chunked-prefill", "--long-prefill-token-threshold=512"},
       "error: --long-prefill-token-threshold: has nothing to work on with "
       "--no-enable-chunked-prefill; must be 0 or not given (got 512)"},
      {{"--max-queue-requests=-1"}, "error: --max-queue-requests: must be 0..1000000 (got -1)"},
      {{"--scheduler-max-size=2000000"},
       "error: --scheduler-max-size: must be at most 1000000 (got 2000000)"},
      {{"--max-num-seqs-per-user=257"}, "must be 0..256 (got 257)"},
      {{"--async-depth=2"}, "error: --async-depth: must be 0..1 (got 2)"},
      {{"--cache-isolation=user"}, "error: --cache-isolation: must be one of none, key (got user)"},
      {{"--cache-isolation=key"}, "error: --cache-isolation: key needs at least one --api-key"},
      {{"--api-key="}, "error: --api-key: must not be empty"},
      {{"--api-key", "a", "--api-key", ""}, "error: --api-key: must not be empty"},
      {{"--cache-isolation=key", "--api-key=k", "--no-enable-prefix-caching"},
       "error: --cache-isolation: has nothing to work on with --no-enable-prefix-caching"},
      {{"--swap-space=4", "--no-enable-prefix-caching"},
       "error: --swap-space: has nothing to work on with --no-enable-prefix-caching"},
      {{"--request-timeout=-1"}, "error: --request-timeout: must be 0..86400 (got -1)"},
      {{"--client-stall-timeout=0"}, "error: --client-stall-timeout: must be 0.1..86400 (got 0)"},
      {{"--tensor-parallel-size", "3"}, "error: --tensor-parallel-size: must be 1, 2 or 4 (got 3)"},
      {{"--load-format", "dumy"}, "error: --load-format: must be one of auto, dummy (got dumy)"},
      {{"--dummy-router-skew=2"}, "error: --dummy-router-skew: needs --load-format dummy (got 2)"},
      {{"--load-format=dummy", "--dummy-router-skew=-1"},
       "error: --dummy-router-skew: must be 0..1000 (got -1)"},
      {{"--block-size", "32"}, "error: --block-size: must be 64 (got 32)"},
      {{"--swap-space", "x"}, "error: --swap-space: must be a number, 0..1048576 (got x)"},
      {{"--drain-timeout", "-1"}, "error: --drain-timeout: must be 0..86400 (got -1)"},
      {{"--role=both"}, "error: --role: must be one of all, api, engine (got both)"},
      {{"--role=api"},
       "error: --role: api needs --runtime-dir, the directory that it shares with --role engine"},
      {{"--role=engine"},
       "error: --role: engine needs --runtime-dir, the directory that it shares with --role api"},
      {{"--runtime-dir=/run/x"},
       "error: --runtime-dir: is what --role api and --role engine share; one launcher alone makes "
       "its own"},
      {{"--orphan-timeout", "0"}, "error: --orphan-timeout: must be 1..86400 (got 0)"},
      {{"--stall-timeout", "-1"}, "error: --stall-timeout: must be 0..86400 (got -1)"},
      {{"--fault-hold", "86401"}, "error: --fault-hold: must be 0..86400 (got 86401)"},
      {{"--host", "::1"}, "error: --host: must be an IPv4 address or localhost (got ::1)"},
      {{"--served-model-name", "a,"}, "must be a name, or names separated by commas (got a,)"},
      {{"--quantization", "wint4"}, "error: --quantization: the checkpoint decides; must be wint2"},
      {{"--graph-optimization-config", "{"}, "must be a JSON object (got {)"},
      {{"--graph-optimization-config", R"({"use_cudagraph":1})"}, "must be true or false"},
      {{"--splitwise-role", "prefill"}, "must be mixed (got prefill)"},
      {{"--splitwise-role", "x"}, "must be one of mixed, prefill, decode (got x)"},
      {{"--enable-expert-parallel"}, "error: --enable-expert-parallel: expert parallelism"},
      {{"--data-parallel-size", "2"}, "must be 1 (got 2)"},
      {{"--chat-template", "x"}, "error: --chat-template: templates of your own"},
      {{"--ips", "10.0.0.1,10.0.0.2"}, "error: --ips: an instance runs on one host"},
      {{"--model", "a\nb\xff"}, "error: --model: must be UTF-8"},
      {{"--log-level", "a\nb"}, "(got a b)"},
      {{"--log-level", std::string(5000, 'x')}, "xxx...)"},
      {{"--metrics-port=7000", "--cache-queue-port=7000"},
       "error: --cache-queue-port: must differ from --metrics-port (both 7000)"},
      {{"--engine-worker-queue-port=8000"},
       "error: --engine-worker-queue-port: must differ from --port (both 8000)"},
      {{"--queue-host", "::1"},
       "error: --queue-host: must be an IPv4 address or localhost (got ::1)"},
      {{"--queue-host=0.0.0.0"},
       "error: --queue-host: beyond loopback the queue ports need --queue-tls-cert and "
       "--queue-tls-key (with --queue-tls-ca for mutual TLS), or --insecure-bind (got 0.0.0.0)"},
      {{"--queue-host=10.0.0.1", "--queue-token-file=t"}, "error: --queue-host: beyond loopback"},
      {{"--queue-tls-cert=c"}, "error: --queue-tls-cert: needs --queue-tls-key, too"},
      {{"--queue-tls-key=k"}, "error: --queue-tls-key: needs --queue-tls-cert, too"},
      {{"--queue-tls-ca=a"},
       "error: --queue-tls-ca: needs --queue-tls-cert and --queue-tls-key, too"},
  };
  for (const Case& c : cases) {
    ExpectOneLineError(c.args, c.expected);
  }
}

// Sections 1.1 to 1.3 of what FastDeploy documents, each with a value that asks for nothing
// unusual.
TEST(CommandLine, KnowsEveryDocumentedFlag) {
  const Args flags[] = {
      {"--model=m"},
      {"--port=1"},
      {"--metrics-port=2"},
      {"--engine-worker-queue-port=3"},
      {"--cache-queue-port=4"},
      {"--tensor-parallel-size=1"},
      {"-tp", "1"},
      {"--max-model-len=99"},
      {"--use-cudagraph"},
      {"--enable-prefix-caching"},
      {"--no-enable-prefix-caching"},
      {"--enable-chunked-prefill"},
      {"--max-num-seqs=1"},
      {"--host=0.0.0.0"},
      {"--workers=1"},
      {"--api-key=k"},
      {"--served-model-name=n"},
      {"--max-concurrency=1"},
      {"--max-waiting-time=-1"},
      {"--timeout-graceful-shutdown=0"},
      {"--timeout=0"},
      {"--config=/dev/null"},
      {"--revision=master"},
      {"--tokenizer=t"},
      {"--gpu-memory-utilization=0.9"},
      {"--num-gpu-blocks-override=1"},
      {"--block-size=64"},
      {"--kv-cache-ratio=0.75"},
      {"--swap-space=1"},
      {"--max-num-batched-tokens=512"},
      {"--max-num-partial-prefills=1"},
      {"--max-long-partial-prefills=1"},
      {"--long-prefill-token-threshold=0"},
      {"--static-decode-blocks=2"},
      {"--prealloc-dec-block-slot-num-threshold=12"},
      {"--quantization=wint2"},
      {"--graph-optimization-config={}"},
      {"--guided-decoding-backend=off"},
      {"--guided-decoding-disable-any-whitespace=False"},
      {"--reasoning-parser=ernie-x1"},
      {"--tool-call-parser=ernie-x1"},
      {"--chat-template="},
      {"--enable-logprob"},
      {"--max-logprobs=-1"},
      {"--logprobs-mode=raw_logprobs"},
      {"--seed=1"},
      {"--load-choices=default"},
      {"--use-warmup=1"},
      {"--disable-custom-all-reduce"},
      {"--enable-early-stop"},
      {"--early-stop-config={}"},
      {"--logits-processors=A"},
      {"--lm_head-fp32"},
      {"--speculative-config={}"},
      {"--scheduler-name=local"},
      {"--scheduler-max-size=-1"},
      {"--scheduler-ttl=900"},
      {"--controller-port=-1"},
      {"--ips=10.0.0.1"},
      {"--data-parallel-size=1"},
      {"--local-data-parallel-id=0"},
      {"--enable-mm"},
      {"--enable-mm-output=false"},
      {"--limit-mm-per-prompt={}"},
      {"--mm-processor-kwargs={}"},
      {"--max-encoder-cache=-1"},
      {"--max-processor-cache=-1"},
      {"--disable-chunked-mm-input"},
      {"--tokenizer-base-url=u"},
      {"--tool-parser-plugin=p"},
      {"--model-config-name=config.json"},
      {"--task=generate"},
      {"--runner=auto"},
      {"--convert=auto"},
      {"--dynamic-load-weight"},
      {"--load-strategy=normal"},
      {"--enable-expert-parallel=false"},
      {"--enable-eplb"},
      {"--eplb-config={}"},
      {"--use-internode-ll-two-stage"},
      {"--disable-sequence-parallel-moe"},
      {"--splitwise-role=mixed"},
      {"--cache-transfer-protocol=ipc"},
      {"--pd-comm-port=1"},
      {"--rdma-comm-ports=1,2"},
      {"--router=r"},
      {"--scheduler-host=127.0.0.1"},
      {"--scheduler-port=6379"},
      {"--scheduler-db=0"},
      {"--scheduler-password=p"},
      {"--scheduler-topic=default"},
      {"--scheduler-min-load-score=3"},
      {"--scheduler-load-shards-num=1"},
      {"--scheduler-sync-period=5"},
      {"--scheduler-expire-period=3000"},
      {"--scheduler-release-load-expire-period=600"},
      {"--scheduler-reader-parallel=4"},
      {"--scheduler-writer-parallel=4"},
      {"--scheduler-reader-batch-size=200"},
      {"--scheduler-writer-batch-size=200"},
      {"--enable-output-caching"},
  };
  for (const Args& args : flags) {
    SCOPED_TRACE(args[0]);
    EXPECT_EQ(Serve(args).error, "");
  }
  // Known too, though there is no harmless value.
  EXPECT_THAT(Serve({"--override-pooler-config={}"}).error, HasSubstr("generate text only"));
  EXPECT_THAT(Serve({"--plas-attention-config={}"}).error, HasSubstr("attention is exact"));
}

TEST(CommandLine, AFeatureThatIsNotBuiltSaysSoOnce) {
  EXPECT_THAT(Serve({"--workers=4"}).notes,
              ElementsAre("--workers: one API server process serves every connection; ignored"));
  EXPECT_THAT(Serve({"--workers=4", "--workers", "5"}).notes, SizeIs(1));
  for (const char* harmless : {"--workers=1", "--kv-cache-ratio=0.750", "--max-waiting-time=-1",
                               "--enable-mm=false", "--revision=master"}) {
    EXPECT_THAT(Serve({harmless}).notes, IsEmpty()) << harmless;
  }
}

TEST(CommandLine, TheLogDirectoryIsTheFlagsOrTheEnvironments) {
  EXPECT_EQ(Serve({}).options.log_dir, "");
  EXPECT_EQ(Serve({"--log-dir=a"}).options.log_dir, "a");
  EXPECT_EQ(Serve({}, {{"FD_LOG_DIR", "/log"}}).options.log_dir, "/log");
  EXPECT_EQ(Serve({}, {{"FD_LOG_DIR", ""}}).options.log_dir, "");
  EXPECT_EQ(Serve({"--log-dir=a"}, {{"FD_LOG_DIR", "/log"}}).options.log_dir, "a");
}

TEST(CommandLine, MoreLogprobsThanThereAreSaysSo) {
  EXPECT_THAT(Serve({"--max-logprobs=100"}).notes,
              ElementsAre("--max-logprobs: at most 20 are given; taken as 20"));
  EXPECT_THAT(Serve({"--max-logprobs=-1"}).notes, IsEmpty());
  EXPECT_THAT(Serve({"--max-logprobs=-2"}).error, HasSubstr("-1..16777216 (got -2)"));
  EXPECT_THAT(Serve({"--logprobs-mode=processed_logprobs"}).error,
              HasSubstr("must be raw_logprobs (got processed_logprobs)"));
}

TEST(CommandLine, DefaultsInTheTableAreValid) {
  for (const Flag& flag : FlagTable()) {
    if (flag.default_text.empty()) continue;
    EXPECT_TRUE(ParseFlagValue(flag, flag.default_text).ok()) << flag.name;
  }
}

TEST(CommandLine, EveryVerbKnowsANameOnce) {
  std::set<std::string> serve;
  std::set<std::string> generate;
  for (const Flag& flag : FlagTable()) {
    EXPECT_TRUE(flag.generate_only || serve.insert(flag.name).second) << flag.name;
    EXPECT_TRUE(flag.serve_only || generate.insert(flag.name).second) << flag.name;
    EXPECT_EQ(flag.name.find('_'), std::string::npos) << flag.name;
    EXPECT_NE(flag.help, "") << flag.name;
  }
}

TEST(CommandLine, HelpShowsEveryFlagInGroups) {
  for (const char* verb : {"serve", "generate"}) {
    const CommandLine command = Parse({verb, "--port-is-not-looked-at", "--help"});
    EXPECT_NE(command.error, "") << "a wrong flag is not hidden by --help";
    const CommandLine help = Parse({verb, "--help"});
    EXPECT_EQ(help.exit_code, 0);
    std::set<std::string> expected;
    for (const Flag& flag : FlagTable()) {
      const bool shown = std::string_view(verb) == "serve" ? !flag.generate_only : !flag.serve_only;
      if (shown) expected.insert(flag.name);
    }
    for (const Flag& flag : FlagTable()) {
      const std::string line = "\n  --" + flag.name + (flag.type == FlagType::kSwitch ? "=" : " ");
      EXPECT_EQ(help.print.find(line) != std::string::npos, expected.contains(flag.name))
          << verb << " " << flag.name;
    }
    EXPECT_THAT(help.print, HasSubstr("Limits:\n"));
    EXPECT_THAT(help.print, HasSubstr("--config FILE"));
  }
  EXPECT_THAT(Parse({"serve", "-h"}).print, HasSubstr("Listening:\n"));
}

TEST(CommandLine, VerbsAreExplained) {
  EXPECT_THAT(Parse({}).print, HasSubstr("wintserve generate --prompt TEXT"));
  EXPECT_EQ(Parse({}).exit_code, kExitUsage);
  EXPECT_EQ(Parse({"--help"}).exit_code, kExitOk);
  EXPECT_THAT(Parse({"--version"}).print, ::testing::StartsWith("wintserve "));
  EXPECT_THAT(Parse({"serv"}).error, HasSubstr("serv: unknown verb (did you mean serve?)"));
  EXPECT_THAT(Parse({"--port", "1"}).error, HasSubstr("a verb comes first: wintserve serve"));
}

TEST(CommandLine, TheOtherVerbsAreProgramsThatReadTheirOwnArguments) {
  for (const char* verb : {"quantize", "inspect", "eval"}) {
    SCOPED_TRACE(verb);
    EXPECT_THAT(Parse({"--help"}).print, HasSubstr(std::string("  wintserve ") + verb + " "));
    const CommandLine command = Parse({verb, "--help", "", "--prot=1", "serve"});
    EXPECT_EQ(command.error, "");
    EXPECT_EQ(command.print, "");
    EXPECT_FALSE(command.verb.has_value());
    EXPECT_EQ(command.program, std::string("wintserve-") + verb);
    EXPECT_THAT(command.program_args,
                ElementsAre(std::string("wintserve ") + verb, "--help", "", "--prot=1", "serve"));
  }
}

TEST(CommandLine, AVerbThatDoesNotExistNamesTheOneMeantOrAll) {
  EXPECT_EQ(Parse({"quanitze"}).error, "error: quanitze: unknown verb (did you mean quantize?)");
  EXPECT_EQ(Parse({"quanitze"}).exit_code, kExitUsage);
  EXPECT_EQ(Parse({"convert"}).error,
            "error: convert: unknown verb; there are serve, generate, quantize, inspect, eval");
}

TEST(CommandLine, GenerateTakesTheEngineFlagsAndItsOwn) {
  const CommandLine command =
      Parse({"generate", "--model", "m", "--prompt=--写一首诗", "--temperature", "0.7", "--top-p",
             "0", "--top-k=-1", "--max-tokens", "128", "--seed=-5", "--stop", "a", "--stop=b",
             "--raw", "--print-ids", "-tp", "2"});
  ASSERT_EQ(command.error, "");
  EXPECT_EQ(command.verb, Verb::kGenerate);
  EXPECT_EQ(command.options.tensor_parallel_size, 2);
  EXPECT_EQ(command.options.log_level, "warning");
  EXPECT_THAT(command.notes, IsEmpty()) << "--seed means nothing to serve only";
  EXPECT_EQ(command.generate.ToJson(),
            "{\"chat\":false,\"max_tokens\":128,\"print_ids\":true,\"prompt\":\"--写一首诗\","
            "\"seed\":-5,\"stop\":[\"a\",\"b\"],\"temperature\":0.7,\"top_k\":0,\"top_p\":0.0}");
  EXPECT_EQ(Parse({"generate", "--prompt", "x"}).generate.ToJson(),
            "{\"chat\":true,\"max_tokens\":null,\"print_ids\":false,\"prompt\":\"x\","
            "\"seed\":null,\"stop\":[],\"temperature\":null,\"top_k\":0,\"top_p\":null}");
  EXPECT_EQ(Parse({"generate", "--prompt=x", "--log-level=debug"}).options.log_level, "debug");
  EXPECT_THAT(Parse({"generate"}).error, HasSubstr("--prompt: needs a text"));
  EXPECT_THAT(Parse({"generate", "--prompt=x", "--port=1"}).error,
              HasSubstr("--port: is a flag of `wintserve serve`"));
  EXPECT_THAT(Parse({"generate", "--prompt=x", "--temperature=2.1"}).error,
              HasSubstr("--temperature: must be 0..2 (got 2.1)"));
  EXPECT_THAT(Parse({"generate", "--prompt=x", "--max-tokens=0"}).error,
              HasSubstr("--max-tokens: must be 1..1048576 (got 0)"));
}

}  // namespace
}  // namespace wintserve
