// What is checked before any process starts: the model's files, the device, every port.
#pragma once

#include <string>
#include <vector>

#include "common/config/serve_options.h"
#include "common/unique_fd.h"

namespace wintserve {

// One line for stderr, beginning with the flag it is about, and the code to exit with.
struct PreflightError {
  int exit_code = 0;  // 0: no error
  std::string text;

  bool ok() const { return exit_code == 0; }
};

// 66: no such directory, or no config.json in it; 69: a device that this build does not have.
PreflightError CheckModelAndDevice(const ServeOptions& options);

// 64: a file of --queue-tls-cert, -key or -ca that TLS cannot work with. `warnings` gets lines for
// the operator.
PreflightError CheckQueueTls(const ServeOptions& options, std::vector<std::string>* warnings);

// Raises the number of descriptors that this process and its children may open to what the system
// allows. Returns one line for the operator when even that is too few for --max-concurrency, else
// nothing.
std::string RaiseDescriptorLimit(const ServeOptions& options);

// The instance's ports, held from before the first process starts until the last one has gone.
struct ReservedPorts {
  UniqueFd http;     // listening; the API server inherits it
  UniqueFd metrics;  // listening; none when /metrics is on the HTTP port
  // The queues bind their ports themselves, with SO_REUSEPORT. These are bound to the same ports,
  // never listen (so no connection ends here) and keep everybody else out.
  UniqueFd engine_worker_queue;
  UniqueFd cache_queue;
};

// Takes every port of the processes that --role starts; a port 0 in `options` becomes the number
// that was picked. Without `with_http` only the queue ports. 69 names the flag and the port.
PreflightError ReservePorts(bool with_http, ServeOptions* options, ReservedPorts* ports);

}  // namespace wintserve
