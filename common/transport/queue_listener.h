// A listening socket of a gRPC queue. Includes gRPC: for .cc files only.
#pragma once

#include <grpcpp/grpcpp.h>
#include <sys/types.h>

#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/statusor.h"
#include "common/log_limit.h"
#include "common/transport/tls_files.h"
#include "common/unique_fd.h"

namespace wintserve {

// Accepts in gRPC's place, from a thread of its own: a listener of gRPC 1.51 that fails to accept
// once, for want of descriptors, never accepts again, and it takes any number of connections.
// Beyond max_connections peers wait in the kernel's queue until somebody leaves.
//
// Threading: one thread.
class QueueListener {
 public:
  // address: "HOST:PORT", HOST in digits (IPv4); port 0 is a free one. Shares the port with whoever
  // has bound it with SO_REUSEPORT and does not listen. UNAVAILABLE names the address.
  static absl::StatusOr<std::unique_ptr<QueueListener>> Tcp(const std::string& address,
                                                            int64_t max_connections);
  // For our own user alone, whatever the umask; takes the place of a socket that a dead process has
  // left there. The destructor unlinks it. UNAVAILABLE names the path.
  static absl::StatusOr<std::unique_ptr<QueueListener>> Unix(const std::string& path,
                                                             int64_t max_connections);
  ~QueueListener();
  QueueListener(const QueueListener&) = delete;
  QueueListener& operator=(const QueueListener&) = delete;

  // Before the server starts. tls: of a TCP port.
  void AddTo(grpc::ServerBuilder* builder, const TlsIdentity& tls = {});
  // Once the server has started.
  void Start();
  // Before the server shuts down. Closes the socket; connections stay open. Idempotent.
  void Stop();

  int port() const { return port_; }

 private:
  // One that gRPC has and closes without telling us: it is open while the number stands for the
  // same socket.
  struct Connection {
    int fd = -1;
    ino_t inode = 0;
  };

  QueueListener(UniqueFd listener, int64_t max_connections);

  void Run();
  void HandOver(UniqueFd fd);
  bool HasRoom();
  // True: the listener stops.
  bool WaitBeforeRetry();

  UniqueFd listener_;
  const int64_t max_connections_;
  const UniqueFd stop_;  // eventfd
  int port_ = 0;
  std::string unix_path_;
  std::unique_ptr<grpc::experimental::ExternalConnectionAcceptor> acceptor_;
  std::vector<Connection> connections_;  // the thread's
  LogLimit error_log_;
  std::thread thread_;
};

}  // namespace wintserve
