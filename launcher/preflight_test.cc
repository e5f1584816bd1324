#include "launcher/preflight.h"

#include <arpa/inet.h>
#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include <fstream>

#include "common/descriptor_shares.h"
#include "common/exit_code.h"
#include "common/temp_dir_test_util.h"

namespace wintserve {
namespace {

using ::testing::HasSubstr;

// Loopback only and ports that the kernel picks, so that runs in parallel do not meet.
ServeOptions AnyPorts() {
  ServeOptions options;
  options.host = "127.0.0.1";
  options.port = 0;
  options.metrics_port = 0;
  return options;
}

// A socket like a queue's: SO_REUSEPORT, SO_REUSEADDR, listening.
int TryListenAsGrpc(int port, UniqueFd* result) {
  UniqueFd fd(::socket(AF_INET, SOCK_STREAM, 0));
  const int on = 1;
  ::setsockopt(fd.get(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
  ::setsockopt(fd.get(), SOL_SOCKET, SO_REUSEPORT, &on, sizeof(on));
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  if (::bind(fd.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)) != 0 ||
      ::listen(fd.get(), 8) != 0) {
    return errno;
  }
  *result = std::move(fd);
  return 0;
}

int TryConnect(int port, UniqueFd* result) {
  UniqueFd fd(::socket(AF_INET, SOCK_STREAM, 0));
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  if (::connect(fd.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)) != 0) {
    return errno;
  }
  *result = std::move(fd);
  return 0;
}

TEST(ReservePorts, PicksAPortForEveryZero) {
  ServeOptions options = AnyPorts();
  ReservedPorts ports;
  const PreflightError error = ReservePorts(true, &options, &ports);
  ASSERT_TRUE(error.ok()) << error.text;
  EXPECT_GT(options.port, 0);
  EXPECT_GT(*options.metrics_port, 0);
  EXPECT_GT(options.engine_worker_queue_port, 0);
  EXPECT_GT(options.cache_queue_port, 0);
  UniqueFd client;
  EXPECT_EQ(TryConnect(options.port, &client), 0) << "HTTP listens before the API server runs";
  EXPECT_EQ(TryConnect(options.cache_queue_port, &client), ECONNREFUSED);
}

TEST(ReservePorts, WithoutHttpOnlyTheQueuePortsAreTaken) {
  ServeOptions options = AnyPorts();
  ReservedPorts ports;
  ASSERT_TRUE(ReservePorts(false, &options, &ports).ok());
  EXPECT_FALSE(ports.http.valid() || ports.metrics.valid());
  EXPECT_GT(options.engine_worker_queue_port, 0);
}

TEST(ReservePorts, TheServerOfAQueueCanBindItAndGetsEveryConnection) {
  ServeOptions options = AnyPorts();
  ReservedPorts ports;
  ASSERT_TRUE(ReservePorts(true, &options, &ports).ok());
  UniqueFd server;
  ASSERT_EQ(TryListenAsGrpc(options.cache_queue_port, &server), 0);
  for (int i = 0; i < 8; ++i) {
    UniqueFd client;
    ASSERT_EQ(TryConnect(options.cache_queue_port, &client), 0);
    const UniqueFd accepted(::accept(server.get(), nullptr, nullptr));
    EXPECT_TRUE(accepted.valid());
  }
}

TEST(ReservePorts, NamesTheFlagOfAPortThatAnotherInstanceHolds) {
  ServeOptions held = AnyPorts();
  ReservedPorts ports;
  ASSERT_TRUE(ReservePorts(true, &held, &ports).ok());
  UniqueFd server;  // one queue is served already, the other only reserved
  ASSERT_EQ(TryListenAsGrpc(held.engine_worker_queue_port, &server), 0);

  struct Case {
    const char* flag;
    int port;
    void (*set)(ServeOptions&, int);
  };
  const Case cases[] = {
      {"--port", held.port, [](ServeOptions& o, int port) { o.port = port; }},
      {"--metrics-port", *held.metrics_port,
       [](ServeOptions& o, int port) { o.metrics_port = port; }},
      {"--engine-worker-queue-port", held.engine_worker_queue_port,
       [](ServeOptions& o, int port) { o.engine_worker_queue_port = port; }},
      {"--cache-queue-port", held.cache_queue_port,
       [](ServeOptions& o, int port) { o.cache_queue_port = port; }},
      {"--port", held.cache_queue_port, [](ServeOptions& o, int port) { o.port = port; }},
      {"--cache-queue-port", held.port,
       [](ServeOptions& o, int port) { o.cache_queue_port = port; }},
  };
  for (const Case& c : cases) {
    ServeOptions options = AnyPorts();
    c.set(options, c.port);
    ReservedPorts mine;
    const PreflightError error = ReservePorts(true, &options, &mine);
    EXPECT_EQ(error.exit_code, kExitUnavailable);
    EXPECT_EQ(error.text, fmt::format("{}: {} is already in use", c.flag, c.port));
  }
}

TEST(ReservePorts, TheQueuePortsAreOnTheirOwnAddress) {
  ServeOptions options = AnyPorts();
  options.queue_host = "127.0.0.2";
  ReservedPorts ports;
  ASSERT_TRUE(ReservePorts(true, &options, &ports).ok());
  for (const UniqueFd* fd : {&ports.engine_worker_queue, &ports.cache_queue}) {
    sockaddr_in address = {};
    socklen_t length = sizeof(address);
    ASSERT_EQ(::getsockname(fd->get(), reinterpret_cast<sockaddr*>(&address), &length), 0);
    EXPECT_EQ(ntohl(address.sin_addr.s_addr), 0x7f000002u);
  }
  options = AnyPorts();
  options.queue_host = "192.0.2.1";  // of no machine: it is for documentation
  ReservedPorts none;
  const PreflightError error = ReservePorts(true, &options, &none);
  EXPECT_EQ(error.exit_code, kExitUnavailable);
  EXPECT_EQ(error.text, "--queue-host: 192.0.2.1 is no address of this machine");
}

TEST(CheckQueueTls, ABadFileIsAUsageError) {
  ServeOptions options;
  std::vector<std::string> warnings;
  EXPECT_TRUE(CheckQueueTls(options, &warnings).ok());
  options.queue_tls_cert = "/nonexistent/cert.pem";
  options.queue_tls_key = "/nonexistent/key.pem";
  const PreflightError error = CheckQueueTls(options, &warnings);
  EXPECT_EQ(error.exit_code, kExitUsage);
  EXPECT_EQ(error.text, "--queue-tls-cert: /nonexistent/cert.pem: No such file or directory");
}

TEST(ReservePorts, APortIsFreeAgainRightAfterItsInstanceAndConnectionsEnded) {
  ServeOptions options = AnyPorts();
  {
    ReservedPorts ports;
    ASSERT_TRUE(ReservePorts(true, &options, &ports).ok());
    UniqueFd server;
    ASSERT_EQ(TryListenAsGrpc(options.cache_queue_port, &server), 0);
    UniqueFd client;
    ASSERT_EQ(TryConnect(options.cache_queue_port, &client), 0);
    UniqueFd accepted(::accept(server.get(), nullptr, nullptr));
    accepted.Reset();  // the server closes first: its port lingers in TIME_WAIT
    char byte;
    EXPECT_EQ(::read(client.get(), &byte, 1), 0);
  }
  ReservedPorts ports;
  const PreflightError error = ReservePorts(true, &options, &ports);
  EXPECT_TRUE(error.ok()) << error.text;
}

TEST(ReservePorts, NamesAHostThatIsNotOurs) {
  ServeOptions options = AnyPorts();
  options.host = "192.0.2.1";  // reserved for documentation
  ReservedPorts ports;
  EXPECT_EQ(ReservePorts(true, &options, &ports).text,
            "--host: 192.0.2.1 is no address of this machine");
}

TEST(RaiseDescriptorLimit, RaisesToTheHardLimitAndWarnsWhenThatIsTooLow) {
  rlimit before = {};
  ASSERT_EQ(::getrlimit(RLIMIT_NOFILE, &before), 0);
  const rlimit low = {.rlim_cur = 64, .rlim_max = before.rlim_max};
  ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &low), 0);
  ServeOptions options;
  options.max_concurrency = 8;
  EXPECT_EQ(RaiseDescriptorLimit(options), "");
  rlimit after = {};
  ASSERT_EQ(::getrlimit(RLIMIT_NOFILE, &after), 0);
  EXPECT_EQ(after.rlim_cur, before.rlim_max);
  if (before.rlim_max < 1'000'000) {
    options.max_concurrency = 1'000'000;
    EXPECT_EQ(RaiseDescriptorLimit(options),
              fmt::format("--max-concurrency 1000000: of the {} open files that the system allows "
                          "(ulimit -Hn), {} are for clients: more cannot stay connected",
                          before.rlim_max, ShareDescriptors(before.rlim_max).http));
  }
  ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &before), 0);
}

TEST(CheckModelAndDevice, SaysWhatIsMissing) {
  const TempDir temp_dir;
  const std::string dir = temp_dir.path().string();
  std::ofstream(dir + "/file") << "";
  struct Case {
    const char* model;
    const char* expected;
  };
  const Case cases[] = {
      {"baidu/ERNIE-4.5-Lite",
       "--model: baidu/ERNIE-4.5-Lite: no such directory; downloading from "
       "a hub is not in this version"},
      {"/no/such/dir", "--model: /no/such/dir: no such directory"},
  };
  for (const Case& c : cases) {
    ServeOptions options;
    options.model = c.model;
    const PreflightError error = CheckModelAndDevice(options);
    EXPECT_EQ(error.exit_code, kExitCheckpoint);
    EXPECT_EQ(error.text, c.expected);
  }
  ServeOptions options;
  options.model = dir + "/file";
  EXPECT_THAT(CheckModelAndDevice(options).text, HasSubstr("is not a directory"));
  options.model = dir;
  EXPECT_THAT(CheckModelAndDevice(options).text, HasSubstr("config.json: No such file"));
  std::ofstream(dir + "/config.json") << "{}";
  EXPECT_TRUE(CheckModelAndDevice(options).ok());
  options.tokenizer = dir + "/missing";
  EXPECT_THAT(CheckModelAndDevice(options).text, ::testing::StartsWith("--tokenizer: "));
}

}  // namespace
}  // namespace wintserve
