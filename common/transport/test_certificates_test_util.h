// Certificates for tests, made with the openssl command as docs/SECURITY.md tells users to.
#pragma once

#include <fmt/format.h>
#include <gtest/gtest.h>
#include <stdlib.h>

#include <fstream>
#include <string>

#include "common/temp_dir_test_util.h"

namespace wintserve {

// A directory with a CA ("ca"), and "server" and "client" certificates of it, both for localhost
// and 127.0.0.1; all valid for a day.
class TestCertificates {
 public:
  TestCertificates() {
    MakeCa("ca");
    Make("server");
    Make("client");
  }

  std::string path(const std::string& name) const { return directory_ + "/" + name; }
  std::string certificate(const std::string& name) const { return path(name + ".pem"); }
  std::string key(const std::string& name) const { return path(name + ".key"); }
  std::string ca() const { return certificate("ca"); }

  void Run(const std::string& command) const {
    const std::string quiet = fmt::format("cd {} && {} > log 2>&1", directory_, command);
    if (::system(quiet.c_str()) == 0) return;
    std::ifstream log(path("log"));
    ADD_FAILURE() << command << "\n" << std::string(std::istreambuf_iterator<char>(log), {});
  }

  // Signed by itself; good for a server of 127.0.0.1, too.
  void MakeCa(const std::string& name) const {
    Run(fmt::format(
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 1 "
        "-subj /CN={0} -addext subjectAltName=IP:127.0.0.1 -keyout {0}.key -out {0}.pem",
        name));
  }

  // Signed by `ca`; extension: a line such as "extendedKeyUsage=clientAuth"; hosts: whom it is for.
  void Make(const std::string& name, const std::string& extension = "",
            const std::string& ca = "ca",
            const std::string& hosts = "DNS:localhost,IP:127.0.0.1") const {
    std::ofstream(path(name + ".ext")) << "subjectAltName=" << hosts << "\n" << extension;
    Run(
        fmt::format("openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes "
                    "-subj /CN={0} -keyout {0}.key -out {0}.csr",
                    name));
    Run(
        fmt::format("openssl x509 -req -in {0}.csr -CA {1}.pem -CAkey {1}.key -CAcreateserial "
                    "-days 1 -extfile {0}.ext -out {0}.pem",
                    name, ca));
  }

  // Signed by itself, valid in the year 2000 only.
  void MakeExpired(const std::string& name) const {
    std::ofstream(path("index.txt")).close();
    std::ofstream(path("expired.conf"))
        << "[ca]\ndefault_ca=me\n[me]\ndatabase=index.txt\nnew_certs_dir=.\nrand_serial=yes\n"
           "default_md=sha256\npolicy=any\n[any]\ncommonName=supplied\n";
    Run(
        fmt::format("openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes "
                    "-subj /CN={0} -keyout {0}.key -out {0}.csr",
                    name));
    Run(
        fmt::format("openssl ca -batch -config expired.conf -selfsign -keyfile {0}.key -in {0}.csr "
                    "-startdate 20000101000000Z -enddate 20010101000000Z -notext -out {0}.pem",
                    name));
  }

 private:
  const TempDir temp_dir_;
  const std::string directory_ = temp_dir_.path().string();
};

}  // namespace wintserve
