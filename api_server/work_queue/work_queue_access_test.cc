// Who gets to the work queue's server, and what a hostile peer can do to it.
#include <fcntl.h>
#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "api_server/work_queue/client/work_queue_client.h"
#include "api_server/work_queue/message_codec.h"
#include "api_server/work_queue/server/work_queue_server.h"
#include "common/captured_log_test_util.h"
#include "common/log_limit.h"
#include "common/temp_dir_test_util.h"
#include "common/transport/raw_call_test_util.h"
#include "common/transport/test_certificates_test_util.h"
#include "common/unique_fd.h"

namespace wintserve {
namespace {

constexpr int64_t kTimeoutMs = 10'000;
const std::string kToken = std::string("\0\xff\x80 token of exactly 32 bytes..", 32);
const WorkerHello kHello = {.worker_id = 100, .rank = 0, .world_size = 1, .weights_digest = 0xabc};

int FreePort() {
  const UniqueFd fd(::socket(AF_INET, SOCK_STREAM, 0));
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof(address);
  EXPECT_EQ(::bind(fd.get(), reinterpret_cast<sockaddr*>(&address), size), 0);
  EXPECT_EQ(::getsockname(fd.get(), reinterpret_cast<sockaddr*>(&address), &size), 0);
  return ntohs(address.sin_port);
}

class WorkQueueAccess : public testing::Test {
 protected:
  void Start(const TlsIdentity& tls = {}) {
    WorkQueueEvents events;
    events.on_hello = [this](const WorkerHello&) { ++num_attached_; };
    events.on_detached = [this](uint32_t, uint64_t, const absl::Status&) { --num_attached_; };
    events.on_ready = [](uint32_t, const ReadyMessage&) {};
    events.on_step_done = [](uint32_t, const StepDone&) {};
    events.on_heartbeat = [](uint32_t, const HeartbeatMessage&) {};
    events.on_pool_detached = [](uint32_t, const PoolDetachedMessage&) {};
    events.on_fault = [](uint32_t, const FaultMessage&) {};
    events.on_refused = [](const std::string&) {};
    port_ = FreePort();
    port_target_ = fmt::format("127.0.0.1:{}", port_);
    auto server = WorkQueueServer::Start({.unix_socket = socket(),
                                          .tcp_address = port_target_,
                                          .tls = tls,
                                          .token = kToken,
                                          .world_size = 1},
                                         std::move(events));
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
  }
  std::string socket() const { return (directory_.path() / "q.sock").string(); }
  std::string unix_target() const { return "unix:" + socket(); }

  // A good worker gets in, and a plan to it.
  void ExpectService() {
    // The rank is free once the end of the stream before has arrived.
    for (int i = 0; i < 500 && num_attached_ > 0; ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    const auto client = WorkQueueClient::Attach(unix_target(), kToken, kHello, kTimeoutMs);
    ASSERT_TRUE(client.ok()) << client.status();
    server_->SendPlan({.group_epoch = 1, .step = 1});
    const auto event = (*client)->Next();
    ASSERT_TRUE(event.ok()) << event.status();
    EXPECT_TRUE(std::holds_alternative<ReceivedPlan>(*event));
  }

  const TempDir directory_;
  int port_ = 0;
  std::string port_target_;
  std::atomic<int> num_attached_ = 0;
  std::unique_ptr<WorkQueueServer> server_;
};

TEST_F(WorkQueueAccess, WithoutTheTokenAPeerLearnsNothing) {
  CapturedLog log;
  Start();
  const std::string hello = EncodeWorkerMessage(HelloMessage{.hello = kHello});
  std::string nearly = TokenMetadataValue(kToken);
  nearly.back() ^= 1;
  for (const std::string& target : {unix_target(), port_target_}) {
    for (const std::string& value : {std::string(), nearly}) {
      for (const char* method :
           {kAttachMethod, "/wintserve.proto.WorkQueue/None",
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"}) {
        for (const std::string& message : {hello, std::string("rubbish"), std::string()}) {
          const RawReply reply =
              Call(target, {.method = method, .token_value = value, .messages = {message}});
          EXPECT_EQ(reply.status.error_code(), grpc::StatusCode::UNAUTHENTICATED) << method;
          EXPECT_EQ(reply.status.error_message(), "the queue demands the instance token") << method;
          EXPECT_EQ(reply.num_messages + reply.num_metadata, 0u) << method;
        }
      }
    }
  }
  EXPECT_EQ(num_attached_, 0);
  ExpectService();
  EXPECT_LE(log.num_lines(), LogLimit::kMaxLinesPerMinute + 1) << log.text();
  EXPECT_EQ(log.text().find(TokenMetadataValue(kToken)), std::string::npos);
}

TEST_F(WorkQueueAccess, AStrangerIsSentAwayBeforeItHasSaidAnything) {
  Start();
  const RawReply reply = Call(port_target_, {.method = kAttachMethod, .half_close = false});
  EXPECT_EQ(reply.status.error_code(), grpc::StatusCode::UNAUTHENTICATED);
}

TEST_F(WorkQueueAccess, HostileMessagesEndTheirStreamAndNothingElse) {
  Start();
  const std::string good = EncodeWorkerMessage(HelloMessage{.hello = kHello});
  const auto channel = grpc::CreateChannel(unix_target(), grpc::InsecureChannelCredentials());
  const RawCall attach = {.method = kAttachMethod, .token_value = TokenMetadataValue(kToken)};
  int num_refused = 0;
  for (const std::string& message : HostileMessages(good, /*seed=*/1, /*count=*/100)) {
    RawCall call = attach;
    call.messages = {message};
    num_refused += !Call(channel, call).status.ok();
    call.messages = {good, message};  // from a worker that has been let in
    Call(channel, call);
  }
  EXPECT_GT(num_refused, 200) << "of 303, some of which are a Hello still";
  ExpectService();
}

TEST_F(WorkQueueAccess, AMessageAboveTheLimitIsRefused) {
  Start();
  RawCall call = {.method = kAttachMethod, .token_value = TokenMetadataValue(kToken)};
  call.messages = {std::string((64 << 20) + 1, 'x')};
  const RawReply reply = Call(unix_target(), call);
  EXPECT_EQ(reply.status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED)
      << reply.status.error_message();
  ExpectService();
}

TEST_F(WorkQueueAccess, MutualTlsCarriesAWorkerOnThePortAndTheSocketNeedsNone) {
  const TestCertificates certificates;
  const auto identity = [&](const std::string& name) {
    const auto loaded = LoadTlsIdentity(
        {certificates.certificate(name), certificates.key(name), certificates.ca()});
    EXPECT_TRUE(loaded.ok()) << loaded.status();
    return loaded.value_or(TlsIdentity());
  };
  Start(identity("server"));
  {
    const auto worker =
        WorkQueueClient::Attach(port_target_, kToken, kHello, kTimeoutMs, identity("client"));
    ASSERT_TRUE(worker.ok()) << worker.status();
    server_->SendPlan({.group_epoch = 1, .step = 1});
    EXPECT_TRUE((*worker)->Next().ok());
  }
  EXPECT_EQ(
      WorkQueueClient::Attach(port_target_, kToken, kHello, /*timeout_ms=*/500).status().code(),
      absl::StatusCode::kUnavailable)
      << "plain text";
  EXPECT_EQ(WorkQueueClient::Attach(port_target_, "wrong", kHello, kTimeoutMs, identity("client"))
                .status()
                .code(),
            absl::StatusCode::kUnauthenticated);
  ExpectService();
}

// gRPC's own listener would never accept again.
TEST_F(WorkQueueAccess, AServerThatWasOutOfDescriptorsAcceptsAgain) {
  Start();
  ExpectService();
  rlimit limit = {};
  ASSERT_EQ(::getrlimit(RLIMIT_NOFILE, &limit), 0);
  {
    const UniqueFd lowest_free(::open("/dev/null", O_RDONLY | O_CLOEXEC));
    const rlimit lower = {static_cast<rlim_t>(lowest_free.get()) + 40, limit.rlim_max};
    ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &lower), 0);
    const UniqueFd tcp(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    const UniqueFd local(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    std::vector<UniqueFd> hogs;
    while (true) {
      UniqueFd hog(::open("/dev/null", O_RDONLY | O_CLOEXEC));
      if (!hog.valid()) break;
      hogs.push_back(std::move(hog));
    }
    sockaddr_in port = {};
    port.sin_family = AF_INET;
    port.sin_port = htons(static_cast<uint16_t>(port_));
    port.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    ASSERT_EQ(::connect(tcp.get(), reinterpret_cast<sockaddr*>(&port), sizeof(port)), 0);
    sockaddr_un path = {};
    path.sun_family = AF_UNIX;
    socket().copy(path.sun_path, sizeof(path.sun_path) - 1);
    ASSERT_EQ(::connect(local.get(), reinterpret_cast<sockaddr*>(&path), sizeof(path)), 0);
    // Time to fail in. What has not failed by then has nothing to come back from.
    std::this_thread::sleep_for(std::chrono::milliseconds(300));
  }
  ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &limit), 0);
  ExpectService();
  EXPECT_EQ(Call(port_target_, {.method = kAttachMethod}).status.error_code(),
            grpc::StatusCode::UNAUTHENTICATED);
}

TEST_F(WorkQueueAccess, TheSocketIsForItsUserAlone) {
  Start();
  struct stat info = {};
  ASSERT_EQ(::stat(socket().c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 07777, 0600u);
}

}  // namespace
}  // namespace wintserve
