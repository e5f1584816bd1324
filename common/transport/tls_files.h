// The PEM files by which the two ends of a queue port know each other (--queue-tls-cert, -key,
// -ca).
#pragma once

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "common/config/serve_options.h"

namespace wintserve {

struct TlsFiles {
  std::string certificate;  // our own, and after it any intermediate ones; empty: no TLS
  std::string private_key;  // of the first certificate; without a pass phrase
  std::string ca;  // whom the other end's certificate has to come from; empty: no mutual TLS
};

inline TlsFiles QueueTlsFiles(const ServeOptions& options) {
  return {options.queue_tls_cert, options.queue_tls_key, options.queue_tls_ca};
}

// What the files hold, as PEM text. All empty: no TLS.
struct TlsIdentity {
  std::string certificate_chain;
  std::string private_key;
  std::string ca_certificates;

  bool enabled() const { return !certificate_chain.empty(); }
  // Whether both ends show a certificate.
  bool is_mutual() const { return !ca_certificates.empty(); }
};

// Reads the files and checks that a TLS server can work with them: each is a regular file that
// holds PEM, the certificate is valid now and meant for servers, the key is its key and
// strong enough for OpenSSL's security level, the CA file has a certificate that is valid now.
// INVALID_ARGUMENT names flag, file and reason. Without a certificate file the result is empty.
// `warnings` (null: nobody wants them) gets a line for what is unwise, such as a key that every
// user may read. Reads the clock and files; any thread.
absl::StatusOr<TlsIdentity> LoadTlsIdentity(const TlsFiles& files,
                                            std::vector<std::string>* warnings = nullptr);

}  // namespace wintserve
