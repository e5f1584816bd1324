// What a hostile peer can do to the cache manager's server.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include "cache_manager/client/session_test_util.h"
#include "common/transport/raw_call_test_util.h"
#include "common/transport/test_certificates_test_util.h"
#include "proto/cache.pb.h"

namespace wintserve {
namespace {

constexpr char kSession[] = "/wintserve.proto.Cache/Session";
constexpr const char* kMethods[] = {kSession, "/wintserve.proto.Cache/Stats",
                                    "/wintserve.proto.Cache/Watch", "/wintserve.proto.Cache/Admin"};

class CacheHostile : public SessionTest {
 protected:
  std::string port_target() const { return "127.0.0.1:" + std::to_string(server_->port()); }

  // A good client has a pool opened and leases of it.
  void ExpectService(uint64_t api_epoch) {
    Recorder recorder;
    const auto client = Connect(&recorder, api_epoch);
    ASSERT_NE(client, nullptr);
    client->OpenPool(SmallPool());
    const auto opened = recorder.Opened();
    ASSERT_TRUE(opened.ok()) << opened.status();
    client->LeaseBlocks(1, 2);
    EXPECT_EQ(recorder.Leased(1).size(), 2u);
    client->Close();
    WaitUntilNothingIsLeased();
  }

  static std::string OpenRequest() {
    proto::CacheRequest request;
    request.set_seq(1);
    request.mutable_open()->set_api_epoch(7);
    request.mutable_open()->set_num_blocks(4);
    request.mutable_open()->add_block_bytes_by_rank(4096);
    request.mutable_open()->set_block_size_tokens(64);
    return request.SerializeAsString();
  }
};

TEST_F(CacheHostile, WithoutTheTokenAPeerLearnsNothingWhateverItSends) {
  std::string nearly = TokenMetadataValue(kToken);
  nearly.back() ^= 1;
  for (const std::string& target : {this->target(), port_target()}) {
    for (const std::string& value : {std::string(), nearly}) {
      for (const std::string method :
           {kMethods[0], kMethods[1], kMethods[2], kMethods[3], "/wintserve.proto.Cache/None",
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"}) {
        for (const bool half_close : {true, false}) {  // false: it is answered before it has spoken
          RawCall call = {.method = method, .token_value = value};
          call.half_close = half_close;
          if (half_close) call.messages = {"rubbish"};
          const RawReply reply = Call(target, call);
          EXPECT_EQ(reply.status.error_code(), grpc::StatusCode::UNAUTHENTICATED) << method;
          EXPECT_EQ(reply.status.error_message(), "the queue demands the instance token") << method;
          EXPECT_EQ(reply.num_messages + reply.num_metadata, 0u) << method;
        }
      }
    }
  }
  ExpectService(1);
}

TEST_F(CacheHostile, HostileMessagesEndTheirCallAndNothingElse) {
  const auto channel = grpc::CreateChannel(target(), grpc::InsecureChannelCredentials());
  for (const char* method : kMethods) {
    if (std::string(method).ends_with("Watch")) continue;  // has no request to speak of
    for (const std::string& message : HostileMessages(OpenRequest(), /*seed=*/2, /*count=*/50)) {
      Call(channel, {.method = method,
                     .token_value = TokenMetadataValue(kToken),
                     .messages = {message, message}});
    }
  }
  WaitUntilNothingIsLeased();  // of an OpenPool that was left whole
  ExpectService(2);
}

TEST_F(CacheHostile, WhatIsNoRequestIsAnError) {
  for (const char* method : {kMethods[1], kMethods[3]}) {
    const RawReply reply = Call(target(), {.method = method,
                                           .token_value = TokenMetadataValue(kToken),
                                           .messages = {"\xff\xff\xff\xff"}});
    EXPECT_EQ(reply.status.error_code(), grpc::StatusCode::INVALID_ARGUMENT) << method;
    const RawReply none =
        Call(target(), {.method = method, .token_value = TokenMetadataValue(kToken)});
    EXPECT_EQ(none.status.error_code(), grpc::StatusCode::INVALID_ARGUMENT) << method;
  }
  const RawReply unknown = Call(target(), {.method = "/wintserve.proto.Cache/None",
                                           .token_value = TokenMetadataValue(kToken)});
  EXPECT_EQ(unknown.status.error_code(), grpc::StatusCode::UNIMPLEMENTED);
}

TEST_F(CacheHostile, AMessageAboveTheLimitIsRefused) {
  for (const char* method : {kMethods[0], kMethods[1]}) {
    const RawReply reply = Call(target(), {.method = method,
                                           .token_value = TokenMetadataValue(kToken),
                                           .messages = {std::string((64 << 20) + 1, 'x')}});
    EXPECT_EQ(reply.status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED)
        << method << " " << reply.status.error_message();
  }
  ExpectService(3);
}

TEST_F(CacheHostile, MutualTlsCarriesASessionOnThePortAndTheSocketNeedsNone) {
  const TestCertificates certificates;
  const auto identity = [&](const std::string& name) {
    const auto loaded = LoadTlsIdentity(
        {certificates.certificate(name), certificates.key(name), certificates.ca()});
    EXPECT_TRUE(loaded.ok()) << loaded.status();
    return loaded.value_or(TlsIdentity());
  };
  server_.reset();
  CacheServerOptions options = Options();
  options.tls = identity("server");
  auto server = CacheServer::Start(options, owner_.get());
  ASSERT_TRUE(server.ok()) << server.status();
  server_ = *std::move(server);
  {
    Recorder recorder;
    const auto client = ConnectCacheClient(port_target(), kToken, kApiEpoch, recorder.Events(),
                                           kTimeoutMs, identity("client"));
    ASSERT_TRUE(client.ok()) << client.status();
    (*client)->OpenPool(SmallPool());
    EXPECT_TRUE(recorder.Opened().ok());
    const auto flushed =
        FlushPrefixCache(port_target(), kToken, std::nullopt, kTimeoutMs, identity("client"));
    EXPECT_TRUE(flushed.ok()) << flushed.status();
    (*client)->Close();
  }
  Recorder recorder;
  EXPECT_EQ(
      ConnectCacheClient(port_target(), kToken, kApiEpoch, recorder.Events(), 500).status().code(),
      absl::StatusCode::kUnavailable)
      << "plain text";
  WaitUntilNothingIsLeased();
  ExpectService(4);
}

TEST_F(CacheHostile, TheSocketIsForItsUserAlone) {
  struct stat info = {};
  ASSERT_EQ(::stat(unix_path_.c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 07777, 0600u);
}

}  // namespace
}  // namespace wintserve
