// Who gets through to a queue's server, over which transport; with a server that has no method at
// all, so that UNIMPLEMENTED says that a call got through.
#include "common/transport/queue_transport.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <chrono>
#include <string>
#include <vector>

#include "common/captured_log_test_util.h"
#include "common/log.h"
#include "common/transport/queue_listener.h"
#include "common/transport/raw_call_test_util.h"
#include "common/transport/test_certificates_test_util.h"
#include "common/unique_fd.h"

namespace wintserve {
namespace {

using std::chrono::steady_clock;
using ::testing::HasSubstr;
using ::testing::Not;

constexpr int64_t kMaxConnections = 1000;
const std::string kToken = std::string("\0\xff\x80 token of exactly 32 bytes..", 32);

class QueueTransportTest : public testing::Test {
 protected:
  ~QueueTransportTest() override {
    listener_.reset();
    if (server_ != nullptr) server_->Shutdown(std::chrono::system_clock::now());
  }

  void Start(const TlsIdentity& tls) {
    auto listener = QueueListener::Tcp("127.0.0.1:0", kMaxConnections);
    ASSERT_TRUE(listener.ok()) << listener.status();
    listener_ = *std::move(listener);
    port_ = listener_->port();
    grpc::ServerBuilder builder;
    LimitStrangers(&builder);
    builder.RegisterCallbackGenericService(&methods_);
    listener_->AddTo(&builder, tls);
    server_ = builder.BuildAndStart();
    ASSERT_NE(server_, nullptr);
    listener_->Start();
  }
  std::string target() const { return "127.0.0.1:" + std::to_string(port_); }

  // What a caller with the right token gets over this transport.
  grpc::StatusCode CodeWith(const TlsIdentity& tls) const {
    return Call(target(), {.method = "/a.B/C", .token_value = TokenMetadataValue(kToken)}, tls)
        .status.error_code();
  }

  // A TCP connection; nothing is said.
  UniqueFd Connect() const {
    UniqueFd fd(::socket(AF_INET, SOCK_STREAM, 0));
    sockaddr_in address = {};
    address.sin_family = AF_INET;
    address.sin_port = htons(static_cast<uint16_t>(port_));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    EXPECT_EQ(::connect(fd.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
    return fd;
  }
  // Whether the server closes the connection before `deadline`; reads what it says until then.
  static bool IsClosedBy(const UniqueFd& fd, steady_clock::time_point deadline) {
    char bytes[4096];
    while (true) {
      const auto left =
          std::chrono::ceil<std::chrono::milliseconds>(deadline - steady_clock::now());
      pollfd wait = {fd.get(), POLLIN, 0};
      if (::poll(&wait, 1, std::max<int>(0, static_cast<int>(left.count()))) <= 0) return false;
      if (::recv(fd.get(), bytes, sizeof(bytes), 0) <= 0) return true;
    }
  }

  static TlsIdentity Identity(const std::string& name, const std::string& ca = "ca") {
    TlsFiles files = {certificates_->certificate(name), certificates_->key(name), ""};
    if (!ca.empty()) files.ca = certificates_->certificate(ca);
    const auto identity = LoadTlsIdentity(files);
    EXPECT_TRUE(identity.ok()) << identity.status();
    return identity.value_or(TlsIdentity());
  }

  static void SetUpTestSuite() {
    certificates_ = new TestCertificates;
    certificates_->MakeCa("other-ca");
    certificates_->Make("other-client", "", "other-ca");
    certificates_->Make("elsewhere", "", "ca", "DNS:elsewhere.example");
  }
  static void TearDownTestSuite() { delete certificates_; }

  static TestCertificates* certificates_;
  UnknownMethods methods_{TokenMetadataValue(kToken)};
  int port_ = 0;
  std::unique_ptr<QueueListener> listener_;
  std::unique_ptr<grpc::Server> server_;
};

TestCertificates* QueueTransportTest::certificates_ = nullptr;

TEST_F(QueueTransportTest, WithoutTheTokenEveryMethodAnswersAlike) {
  Start({});
  const std::string good = TokenMetadataValue(kToken);
  std::string nearly = good;
  nearly.back() ^= 1;
  for (const std::string& value :
       {std::string(), nearly, good.substr(1), good + "0", std::string(64, '0')}) {
    for (const char* method :
         {"/wintserve.proto.Cache/Stats", "/a.B/C", "/", "/grpc.health.v1.Health/Check",
          "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"}) {
      const RawReply reply = Call(target(), {.method = method, .token_value = value});
      EXPECT_EQ(reply.status.error_code(), grpc::StatusCode::UNAUTHENTICATED) << method;
      EXPECT_EQ(reply.status.error_message(), "the queue demands the instance token") << method;
      EXPECT_EQ(reply.status.error_details(), "");
      EXPECT_EQ(reply.num_messages + reply.num_metadata, 0u) << method;
    }
  }
  const RawReply known = Call(target(), {.method = "/a.B/C", .token_value = good});
  EXPECT_EQ(known.status.error_code(), grpc::StatusCode::UNIMPLEMENTED);
  EXPECT_EQ(known.status.error_message(), "there is no method /a.B/C");
}

TEST_F(QueueTransportTest, TlsNeedsAServerThatTheClientKnows) {
  TlsIdentity server = Identity("server", "");
  Start(server);
  EXPECT_EQ(CodeWith(Identity("client")), grpc::StatusCode::UNIMPLEMENTED);
  EXPECT_EQ(CodeWith(Identity("other-client", "other-ca")), grpc::StatusCode::UNAVAILABLE);
  EXPECT_EQ(CodeWith({}), grpc::StatusCode::UNAVAILABLE) << "plain text";
}

TEST_F(QueueTransportTest, ACertificateThatSignsItselfIsEnoughForTls) {
  const TlsIdentity self_signed = Identity("ca", "");
  Start(self_signed);
  EXPECT_EQ(CodeWith(self_signed), grpc::StatusCode::UNIMPLEMENTED);
  EXPECT_EQ(CodeWith(Identity("other-ca", "")), grpc::StatusCode::UNAVAILABLE);
}

TEST_F(QueueTransportTest, TheServersCertificateHasToNameTheHost) {
  Start(Identity("elsewhere"));
  EXPECT_EQ(CodeWith(Identity("client")), grpc::StatusCode::UNAVAILABLE);
}

TEST_F(QueueTransportTest, MutualTlsNeedsACertificateOfTheCaAndTheTokenStillCounts) {
  Start(Identity("server"));
  EXPECT_EQ(CodeWith(Identity("client")), grpc::StatusCode::UNIMPLEMENTED);
  EXPECT_EQ(CodeWith({}), grpc::StatusCode::UNAVAILABLE) << "plain text";
  TlsIdentity nameless;  // knows the CA, shows nothing
  nameless.certificate_chain =
      certificates_->ca().empty() ? "" : Identity("client").ca_certificates;
  EXPECT_EQ(CodeWith(nameless), grpc::StatusCode::UNAVAILABLE);
  TlsIdentity stranger = Identity("other-client", "other-ca");
  stranger.ca_certificates = Identity("client").ca_certificates;
  EXPECT_EQ(CodeWith(stranger), grpc::StatusCode::UNAVAILABLE) << "of another CA";
  EXPECT_EQ(Call(target(), {.method = "/a.B/C"}, Identity("client")).status.error_code(),
            grpc::StatusCode::UNAUTHENTICATED);
}

// Whether the server has TLS.
class SilentPeers : public QueueTransportTest, public testing::WithParamInterface<bool> {};

TEST_P(SilentPeers, AreDroppedAndAFloodOfThemStopsNobody) {
  const bool has_tls = GetParam();
  Start(has_tls ? Identity("server") : TlsIdentity());
  const TlsIdentity client = has_tls ? Identity("client") : TlsIdentity();
  constexpr int kNumConnections = 300;
  std::vector<UniqueFd> silent;
  for (int i = 0; i < kNumConnections; ++i) silent.push_back(Connect());
  for (int i = 0; i < 3; ++i) {  // that say something else
    EXPECT_EQ(::send(silent[i].get(), "GET / HTTP/1.1\r\n\r\n", 18, MSG_NOSIGNAL), 18);
  }
  EXPECT_EQ(CodeWith(client), grpc::StatusCode::UNIMPLEMENTED);
  const auto deadline = steady_clock::now() + std::chrono::seconds(15);
  int num_closed = 0;
  for (const UniqueFd& fd : silent) num_closed += IsClosedBy(fd, deadline);
  EXPECT_EQ(num_closed, kNumConnections);
  EXPECT_EQ(CodeWith(client), grpc::StatusCode::UNIMPLEMENTED);
}

INSTANTIATE_TEST_SUITE_P(Transport, SilentPeers, testing::Bool(),
                         [](const auto& info) { return info.param ? "Tls" : "PlainText"; });

TEST_F(QueueTransportTest, AConnectionWithoutACallIsClosed) {
  Start({});
  const auto channel = grpc::CreateChannel(target(), grpc::InsecureChannelCredentials());
  const RawCall call = {.method = "/a.B/C", .token_value = TokenMetadataValue(kToken)};
  ASSERT_EQ(Call(channel, call).status.error_code(), grpc::StatusCode::UNIMPLEMENTED);
  ASSERT_EQ(channel->GetState(/*try_to_connect=*/false), GRPC_CHANNEL_READY);
  EXPECT_TRUE(channel->WaitForStateChange(
      GRPC_CHANNEL_READY, std::chrono::system_clock::now() + std::chrono::seconds(30)));
  EXPECT_EQ(Call(channel, call).status.error_code(), grpc::StatusCode::UNIMPLEMENTED)
      << "the next call connects again";
}

}  // namespace
}  // namespace wintserve
