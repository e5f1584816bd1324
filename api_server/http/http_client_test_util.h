// For tests: a server with the fake LLM on a loopback port, and a client that sees every byte.
#pragma once

#include <chrono>
#include <memory>
#include <optional>
#include <string>

#include "api_server/http/http_server.h"
#include "common/unique_fd.h"
#include "tests/fakes/fake_llm.h"

namespace wintserve {

// Listens on a free loopback port.
UniqueFd ListenOnLoopback(int* port);

class TestServer {
 public:
  // Puts the sockets into `options`. own_metrics_port: /metrics has a socket of its own.
  explicit TestServer(HttpOptions options = {}, bool own_metrics_port = false);
  FakeLlm& llm() { return llm_; }
  HttpServer& http() { return *http_; }
  int port() const { return port_; }
  int metrics_port() const { return metrics_port_; }

 private:
  FakeLlm llm_;
  int port_ = 0;
  int metrics_port_ = 0;
  std::unique_ptr<HttpServer> http_;
};

struct Response {
  int status = 0;
  std::string head;  // status line and headers, without the empty line
  std::string body;  // chunks joined
  // Value of a header, empty when absent. Names compare as written.
  std::string Header(const std::string& name) const;
};

// Blocking; every read gives up after ten seconds.
class RawClient {
 public:
  // receive_buffer_bytes 0: the system's default.
  explicit RawClient(int port, int receive_buffer_bytes = 0);

  // False: the server has closed.
  bool Send(const std::string& bytes);
  // Empty: the connection ended (or nothing came) before the response was whole.
  std::optional<Response> Receive(bool head_only = false);
  // Reads until `text` has come; returns all up to and with it, or what came before the end.
  std::string ReadUntil(const std::string& text);
  // Takes what has come, up to 16 KiB, and keeps it for the next read. False: the server has
  // closed.
  bool ReadSome() { return ReadMore(); }
  // Everything until the server closes, or nothing comes any more.
  std::string ReadToEnd();
  // Whether the server has closed, or does so while we wait, without another byte.
  bool IsClosed();
  void Close() { fd_.Reset(); }

 private:
  bool ReadMore();
  UniqueFd fd_;
  std::string buffered_;
};

std::string Get(const std::string& path, const std::string& headers = "");
std::string Post(const std::string& path, const std::string& body, const std::string& headers = "");
// A chat request of one user message; `fields` is more JSON: R"(,"stream":true)".
std::string ChatPost(const std::string& fields = "");

// One exchange on a connection of its own.
Response Fetch(int port, const std::string& request);

}  // namespace wintserve
