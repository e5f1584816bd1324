// Test only: the real HTTP server in front of the fake LLM, for clients written in other languages.
// Prints the port that it got, serves until its standard input ends.
#include <arpa/inet.h>
#include <netinet/in.h>
#include <prometheus/registry.h>
#include <sys/socket.h>

#include <cstdio>
#include <memory>

#include "api_server/http/http_server.h"
#include "common/check.h"
#include "common/log.h"
#include "tests/fakes/fake_llm.h"

namespace wintserve {
namespace {

int ListenOnLoopback(int* port) {
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t length = sizeof(address);
  CHECK(bind(fd, reinterpret_cast<sockaddr*>(&address), length) == 0 && listen(fd, 128) == 0);
  getsockname(fd, reinterpret_cast<sockaddr*>(&address), &length);
  *port = ntohs(address.sin_port);
  return fd;
}

int Main() {
  InitLog("fake_server", "info");
  FakeLlm llm;
  llm.SetPieces({"Hello", " from", " choice {choice}"});
  llm.SetDelayBetweenUpdates(std::chrono::milliseconds(20));
  int port = 0;
  HttpOptions options;
  options.listen_fd = ListenOnLoopback(&port);
  options.api_keys = {"test-key"};
  options.model_names.strict = true;
  auto server =
      HttpServer::Start(std::move(options), &llm, std::make_shared<prometheus::Registry>());
  CHECK(server.ok(), "{}", server.status().ToString());
  LogStartupLines("127.0.0.1", port, port);
  LogStartupComplete();
  std::printf("%d\n", port);
  std::fflush(stdout);
  while (std::getchar() != EOF) {
  }
  return 0;
}

}  // namespace
}  // namespace wintserve

int main() { return wintserve::Main(); }
