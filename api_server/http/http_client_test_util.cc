#include "api_server/http/http_client_test_util.h"

#include <arpa/inet.h>
#include <fmt/core.h>
#include <netinet/in.h>
#include <prometheus/registry.h>
#include <sys/socket.h>

#include <cerrno>

#include "common/check.h"

namespace wintserve {
namespace {

constexpr int kPatienceSeconds = 10;

sockaddr_in Loopback(int port) {
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  address.sin_port = htons(static_cast<uint16_t>(port));
  return address;
}

}  // namespace

UniqueFd ListenOnLoopback(int* port) {
  UniqueFd fd(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_in address = Loopback(0);
  socklen_t length = sizeof(address);
  CHECK(bind(fd.get(), reinterpret_cast<sockaddr*>(&address), length) == 0);
  CHECK(listen(fd.get(), 512) == 0);
  CHECK(getsockname(fd.get(), reinterpret_cast<sockaddr*>(&address), &length) == 0);
  *port = ntohs(address.sin_port);
  return fd;
}

TestServer::TestServer(HttpOptions options, bool own_metrics_port) {
  options.listen_fd = ListenOnLoopback(&port_).Release();
  if (own_metrics_port) options.metrics_fd = ListenOnLoopback(&metrics_port_).Release();
  auto http =
      HttpServer::Start(std::move(options), &llm_, std::make_shared<prometheus::Registry>());
  CHECK(http.ok(), "{}", http.status().ToString());
  http_ = *std::move(http);
}

std::string Response::Header(const std::string& name) const {
  const size_t begin = head.find("\r\n" + name + ": ");
  if (begin == std::string::npos) return "";
  const size_t value = begin + name.size() + 4;
  return head.substr(value, head.find("\r\n", value) - value);
}

RawClient::RawClient(int port, int receive_buffer_bytes)
    : fd_(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
  if (receive_buffer_bytes > 0) {
    setsockopt(fd_.get(), SOL_SOCKET, SO_RCVBUF, &receive_buffer_bytes,
               sizeof(receive_buffer_bytes));
  }
  const timeval timeout = {kPatienceSeconds, 0};
  setsockopt(fd_.get(), SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof(timeout));
  setsockopt(fd_.get(), SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof(timeout));
  const sockaddr_in address = Loopback(port);
  if (connect(fd_.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)) != 0) {
    fd_.Reset();
  }
}

bool RawClient::Send(const std::string& bytes) {
  for (size_t sent = 0; sent < bytes.size();) {
    const ssize_t count = send(fd_.get(), bytes.data() + sent, bytes.size() - sent, MSG_NOSIGNAL);
    if (count <= 0) return false;
    sent += static_cast<size_t>(count);
  }
  return true;
}

bool RawClient::ReadMore() {
  char bytes[16 << 10];
  const ssize_t count = recv(fd_.get(), bytes, sizeof(bytes), 0);
  if (count <= 0) return false;
  buffered_.append(bytes, static_cast<size_t>(count));
  return true;
}

std::string RawClient::ReadUntil(const std::string& text) {
  size_t found;
  while ((found = buffered_.find(text)) == std::string::npos) {
    if (!ReadMore()) return std::exchange(buffered_, "");
  }
  std::string read = buffered_.substr(0, found + text.size());
  buffered_.erase(0, read.size());
  return read;
}

std::string RawClient::ReadToEnd() {
  while (ReadMore()) {
  }
  return std::exchange(buffered_, "");
}

bool RawClient::IsClosed() {
  char byte;
  const ssize_t count = recv(fd_.get(), &byte, 1, 0);
  return buffered_.empty() && (count == 0 || (count < 0 && errno == ECONNRESET));
}

std::optional<Response> RawClient::Receive(bool head_only) {
  Response response;
  response.head = ReadUntil("\r\n\r\n");
  if (!response.head.starts_with("HTTP/1.") || !response.head.ends_with("\r\n\r\n")) {
    return std::nullopt;
  }
  response.head.resize(response.head.size() - 2);
  response.status = std::stoi(response.head.substr(9, 3));
  if (head_only || response.status == 100) return response;
  if (response.Header("Transfer-Encoding") == "chunked") {
    for (;;) {
      const std::string size_line = ReadUntil("\r\n");
      if (!size_line.ends_with("\r\n")) return std::nullopt;
      const size_t size = std::stoul(size_line, nullptr, 16);
      while (buffered_.size() < size + 2) {
        if (!ReadMore()) return std::nullopt;
      }
      response.body += buffered_.substr(0, size);
      buffered_.erase(0, size + 2);
      if (size == 0) return response;
    }
  }
  if (response.Header("Content-Length").empty()) {
    response.body = ReadToEnd();
    return response;
  }
  const size_t size = std::stoul(response.Header("Content-Length"));
  while (buffered_.size() < size) {
    if (!ReadMore()) return std::nullopt;
  }
  response.body = buffered_.substr(0, size);
  buffered_.erase(0, size);
  return response;
}

std::string Get(const std::string& path, const std::string& headers) {
  return fmt::format("GET {} HTTP/1.1\r\nHost: test\r\n{}\r\n", path, headers);
}

std::string Post(const std::string& path, const std::string& body, const std::string& headers) {
  return fmt::format(
      "POST {} HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
      "Content-Length: {}\r\n{}\r\n{}",
      path, body.size(), headers, body);
}

std::string ChatPost(const std::string& fields) {
  return Post("/v1/chat/completions",
              R"({"messages":[{"role":"user","content":"hi"}])" + fields + "}");
}

Response Fetch(int port, const std::string& request) {
  RawClient client(port);
  client.Send(request);
  return client.Receive().value_or(Response());
}

}  // namespace wintserve
