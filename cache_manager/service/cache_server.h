// The gRPC server of the cache manager (service Cache of proto/cache.proto).
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "cache_manager/service/pool_owner.h"
#include "common/transport/tls_files.h"

namespace wintserve {

struct CacheServerOptions {
  std::string host = "127.0.0.1";
  int port = 0;           // 0: a free one, see CacheServer::port()
  std::string unix_path;  // a socket that a dead cache manager has left there is replaced
  TlsIdentity tls = {};   // of the port
  std::string token;      // of the instance; a call without it is refused before it is read
};

// Carries the messages between streams and a PoolOwner, and ends the grace of a session that broke.
// Each session reads its next request once the replies to the one before are written, so a peer
// that sends without reading costs one message. A reader of events that falls behind is ended. An
// OpenPool that finds too little memory is tried again for 2 s.
class CacheServer {
 public:
  // UNAVAILABLE: cannot listen on the port (the text names --cache-queue-port) or the Unix socket.
  // REQUIRES: owner outlives the server.
  static absl::StatusOr<std::unique_ptr<CacheServer>> Start(const CacheServerOptions& options,
                                                            PoolOwner* owner);
  // Ends every stream, then unlinks the socket.
  ~CacheServer();
  CacheServer(const CacheServer&) = delete;
  CacheServer& operator=(const CacheServer&) = delete;

  int port() const;

 private:
  class Impl;
  explicit CacheServer(std::unique_ptr<Impl> impl);

  std::unique_ptr<Impl> impl_;
};

}  // namespace wintserve
