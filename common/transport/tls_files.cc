#include "common/transport/tls_files.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <openssl/bio.h>
#include <openssl/err.h>
#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/ssl.h>
#include <openssl/x509.h>
#include <openssl/x509v3.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <memory>

#include "common/status_macros.h"
#include "common/unique_fd.h"

namespace wintserve {
namespace {

constexpr char kCertificateFlag[] = "--queue-tls-cert";
constexpr char kKeyFlag[] = "--queue-tls-key";
constexpr char kCaFlag[] = "--queue-tls-ca";
constexpr off_t kMaxFileBytes = 4 << 20;  // a bundle of every public CA has a quarter of a MiB

struct Free {
  void operator()(BIO* bio) const { ::BIO_free(bio); }
  void operator()(X509* certificate) const { ::X509_free(certificate); }
  void operator()(EVP_PKEY* key) const { ::EVP_PKEY_free(key); }
  void operator()(SSL_CTX* context) const { ::SSL_CTX_free(context); }
};
using Bio = std::unique_ptr<BIO, Free>;
using Certificate = std::unique_ptr<X509, Free>;
using PrivateKey = std::unique_ptr<EVP_PKEY, Free>;
using TlsContext = std::unique_ptr<SSL_CTX, Free>;

// A file that a flag names.
struct NamedFile {
  const char* flag;
  const std::string& path;

  absl::Status Error(const std::string& reason) const {
    return absl::InvalidArgumentError(fmt::format("{}: {}: {}", flag, path, reason));
  }
};

absl::StatusOr<std::string> Read(const NamedFile& file, mode_t* mode) {
  // Opening a pipe would wait for somebody to write.
  const UniqueFd fd(::open(file.path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  struct stat info = {};
  if (!fd.valid() || ::fstat(fd.get(), &info) != 0) return file.Error(std::strerror(errno));
  if (!S_ISREG(info.st_mode)) return file.Error("is not a regular file");
  if (info.st_size > kMaxFileBytes) {
    return file.Error(fmt::format("has {} bytes, at most {}", info.st_size, kMaxFileBytes));
  }
  std::string text(info.st_size, '\0');
  size_t size = 0;
  while (size < text.size()) {
    const ssize_t count = ::read(fd.get(), text.data() + size, text.size() - size);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return file.Error(std::strerror(errno));
    if (count == 0) break;
    size += count;
  }
  text.resize(size);
  *mode = info.st_mode;
  return text;
}

Bio Reader(const std::string& text) {
  return Bio(::BIO_new_mem_buf(text.data(), static_cast<int>(text.size())));
}

absl::StatusOr<std::vector<Certificate>> ParseCertificates(const NamedFile& file,
                                                           const std::string& text) {
  const Bio bio = Reader(text);
  std::vector<Certificate> certificates;
  while (X509* certificate = ::PEM_read_bio_X509(bio.get(), nullptr, nullptr, nullptr)) {
    certificates.emplace_back(certificate);
  }
  // The end of the text is no error.
  const bool is_damaged = ERR_GET_REASON(::ERR_peek_last_error()) != PEM_R_NO_START_LINE;
  ::ERR_clear_error();
  if (certificates.empty() || is_damaged) {
    return file.Error(certificates.empty() ? "holds no PEM certificate"
                                           : "holds a damaged PEM certificate after a good one");
  }
  return certificates;
}

std::string TimeText(const ASN1_TIME* time) {
  tm parts = {};
  if (::ASN1_TIME_to_tm(time, &parts) != 1) return "a time that is none";
  return fmt::format("{:04}-{:02}-{:02} {:02}:{:02} UTC", parts.tm_year + 1900, parts.tm_mon + 1,
                     parts.tm_mday, parts.tm_hour, parts.tm_min);
}

// Why the certificate is not valid now; empty: it is.
std::string WhyNotValidNow(const X509* certificate) {
  const ASN1_TIME* const end = ::X509_get0_notAfter(certificate);
  const ASN1_TIME* const begin = ::X509_get0_notBefore(certificate);
  if (::X509_cmp_current_time(end) <= 0) {
    return fmt::format("the certificate expired on {}", TimeText(end));
  }
  if (::X509_cmp_current_time(begin) >= 0) {
    return fmt::format("the certificate is not valid before {}", TimeText(begin));
  }
  return "";
}

absl::StatusOr<PrivateKey> ParseKey(const NamedFile& file, const std::string& text) {
  bool asked_for_pass_phrase = false;
  const auto refuse = [](char*, int, int, void* asked) {
    *static_cast<bool*>(asked) = true;
    return -1;
  };
  PrivateKey key(
      ::PEM_read_bio_PrivateKey(Reader(text).get(), nullptr, refuse, &asked_for_pass_phrase));
  ::ERR_clear_error();
  if (key != nullptr) return key;
  return file.Error(asked_for_pass_phrase ? "the key is encrypted; it must have no pass phrase"
                                          : "holds no PEM private key");
}

absl::Status CheckOwnCertificate(const NamedFile& file,
                                 const std::vector<Certificate>& certificates) {
  for (const Certificate& certificate : certificates) {
    const std::string reason = WhyNotValidNow(certificate.get());
    if (!reason.empty()) return file.Error(reason);
  }
  if (::X509_check_purpose(certificates[0].get(), X509_PURPOSE_SSL_SERVER, /*ca=*/0) != 1) {
    return file.Error("the certificate is not meant for TLS servers (its key usage)");
  }
  return absl::OkStatus();
}

// Whether a TLS server takes the certificates and the key, which are good by themselves: it
// refuses, for example, keys and digests that are too weak by the system's security level.
absl::Status CheckByTlsLibrary(const NamedFile& file, const std::vector<Certificate>& chain,
                               EVP_PKEY* key) {
  const TlsContext context(::SSL_CTX_new(::TLS_server_method()));
  bool accepted = context != nullptr &&
                  ::SSL_CTX_use_certificate(context.get(), chain[0].get()) == 1 &&
                  ::SSL_CTX_use_PrivateKey(context.get(), key) == 1;
  for (size_t i = 1; accepted && i < chain.size(); ++i) {
    accepted = ::SSL_CTX_add1_chain_cert(context.get(), chain[i].get()) == 1;
  }
  const char* const reason = ::ERR_reason_error_string(::ERR_peek_last_error());
  ::ERR_clear_error();
  if (accepted) return absl::OkStatus();
  return file.Error(fmt::format("TLS does not accept the certificate: {}",
                                reason == nullptr ? "no reason is given" : reason));
}

absl::Status CheckCa(const NamedFile& file, const std::vector<Certificate>& certificates) {
  std::string reason;
  for (const Certificate& certificate : certificates) {
    reason = WhyNotValidNow(certificate.get());
    if (reason.empty()) return absl::OkStatus();
  }
  return file.Error(reason);  // a bundle may hold old ones beside one that is good
}

}  // namespace

absl::StatusOr<TlsIdentity> LoadTlsIdentity(const TlsFiles& files,
                                            std::vector<std::string>* warnings) {
  TlsIdentity identity;
  if (files.certificate.empty()) return identity;
  mode_t mode = 0;
  const NamedFile certificate_file{kCertificateFlag, files.certificate};
  ASSIGN_OR_RETURN(identity.certificate_chain, Read(certificate_file, &mode));
  ASSIGN_OR_RETURN(const std::vector<Certificate> chain,
                   ParseCertificates(certificate_file, identity.certificate_chain));
  RETURN_IF_ERROR(CheckOwnCertificate(certificate_file, chain));

  const NamedFile key_file{kKeyFlag, files.private_key};
  ASSIGN_OR_RETURN(identity.private_key, Read(key_file, &mode));
  ASSIGN_OR_RETURN(const PrivateKey key, ParseKey(key_file, identity.private_key));
  const bool fits = ::X509_check_private_key(chain[0].get(), key.get()) == 1;
  ::ERR_clear_error();
  if (!fits) {
    return key_file.Error(
        fmt::format("is not the key of the certificate in {}", files.certificate));
  }
  RETURN_IF_ERROR(CheckByTlsLibrary(certificate_file, chain, key.get()));
  if ((mode & S_IROTH) != 0 && warnings != nullptr) {
    warnings->push_back(
        fmt::format("{}: {}: every user of this machine can read the key (mode "
                    "{:04o}); chmod 0600 it",
                    kKeyFlag, files.private_key, mode & 07777));
  }

  if (files.ca.empty()) return identity;
  const NamedFile ca_file{kCaFlag, files.ca};
  ASSIGN_OR_RETURN(identity.ca_certificates, Read(ca_file, &mode));
  ASSIGN_OR_RETURN(const std::vector<Certificate> authorities,
                   ParseCertificates(ca_file, identity.ca_certificates));
  RETURN_IF_ERROR(CheckCa(ca_file, authorities));
  return identity;
}

}  // namespace wintserve
