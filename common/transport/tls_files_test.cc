#include "common/transport/tls_files.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <fstream>
#include <string>

#include "common/transport/test_certificates_test_util.h"

namespace wintserve {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::SizeIs;

class TlsFilesTest : public testing::Test {
 protected:
  TlsFiles Good() const {
    return {certificates_.certificate("server"), certificates_.key("server"), certificates_.ca()};
  }
  std::string Write(const std::string& name, const std::string& text) const {
    const std::string path = certificates_.path(name);
    std::ofstream(path) << text;
    return path;
  }
  // What is wrong with the files, by LoadTlsIdentity.
  static std::string ErrorOf(const TlsFiles& files) {
    const auto identity = LoadTlsIdentity(files);
    EXPECT_EQ(identity.status().code(), absl::StatusCode::kInvalidArgument) << identity.status();
    return std::string(identity.status().message());
  }

  static TestCertificates certificates_;
};

TestCertificates TlsFilesTest::certificates_;

TEST_F(TlsFilesTest, AreReadAsTheyAre) {
  std::vector<std::string> warnings;
  const auto mutual = LoadTlsIdentity(Good(), &warnings);
  ASSERT_TRUE(mutual.ok()) << mutual.status();
  EXPECT_TRUE(mutual->enabled());
  EXPECT_TRUE(mutual->is_mutual());
  EXPECT_THAT(mutual->private_key, HasSubstr("PRIVATE KEY"));
  EXPECT_THAT(warnings, IsEmpty());

  TlsFiles files = Good();
  files.ca.clear();
  const auto server_only = LoadTlsIdentity(files);
  ASSERT_TRUE(server_only.ok()) << server_only.status();
  EXPECT_TRUE(server_only->enabled());
  EXPECT_FALSE(server_only->is_mutual());

  const auto none = LoadTlsIdentity({});
  ASSERT_TRUE(none.ok()) << none.status();
  EXPECT_FALSE(none->enabled());
}

TEST_F(TlsFilesTest, AKeyThatEverybodyCanReadIsAWarning) {
  TlsFiles files = Good();
  files.private_key = Write("open.key", LoadTlsIdentity(Good())->private_key);
  ASSERT_EQ(::chmod(files.private_key.c_str(), 0644), 0);
  std::vector<std::string> warnings;
  const auto identity = LoadTlsIdentity(files, &warnings);
  ASSERT_TRUE(identity.ok()) << identity.status();
  EXPECT_THAT(warnings,
              ElementsAre(fmt::format("--queue-tls-key: {}: every user of this machine can read "
                                      "the key (mode 0644); chmod 0600 it",
                                      files.private_key)));
}

TEST_F(TlsFilesTest, MissingFilesAreNamedWithTheirFlag) {
  const std::string missing = certificates_.path("missing.pem");
  TlsFiles files = Good();
  files.certificate = missing;
  EXPECT_EQ(ErrorOf(files), "--queue-tls-cert: " + missing + ": No such file or directory");
  files = Good();
  files.private_key = missing;
  EXPECT_EQ(ErrorOf(files), "--queue-tls-key: " + missing + ": No such file or directory");
  files = Good();
  files.ca = missing;
  EXPECT_EQ(ErrorOf(files), "--queue-tls-ca: " + missing + ": No such file or directory");
  files.ca = certificates_.path("");
  EXPECT_EQ(ErrorOf(files), "--queue-tls-ca: " + files.ca + ": is not a regular file");
}

TEST_F(TlsFilesTest, WhatIsNoPemIsNamed) {
  const std::string rubbish = Write("rubbish.pem", std::string(1000, '\xff'));
  const std::string empty = Write("empty.pem", "");
  for (const std::string& bad : {rubbish, empty}) {
    TlsFiles files = Good();
    files.certificate = bad;
    EXPECT_EQ(ErrorOf(files), "--queue-tls-cert: " + bad + ": holds no PEM certificate");
    files = Good();
    files.private_key = bad;
    EXPECT_EQ(ErrorOf(files), "--queue-tls-key: " + bad + ": holds no PEM private key");
    files = Good();
    files.ca = bad;
    EXPECT_EQ(ErrorOf(files), "--queue-tls-ca: " + bad + ": holds no PEM certificate");
  }
  // Key and certificate in each other's place.
  EXPECT_EQ(ErrorOf({Good().private_key, Good().certificate, ""}),
            "--queue-tls-cert: " + Good().private_key + ": holds no PEM certificate");
}

TEST_F(TlsFilesTest, ADamagedChainIsNotHalfRead) {
  const std::string good = LoadTlsIdentity(Good())->certificate_chain;
  TlsFiles files = Good();
  files.certificate = Write("damaged.pem", good + good.substr(0, good.size() / 2));
  EXPECT_EQ(ErrorOf(files), "--queue-tls-cert: " + files.certificate +
                                ": holds a damaged PEM certificate after a good one");
}

TEST_F(TlsFilesTest, AnotherCertificatesKeyIsRefused) {
  TlsFiles files = Good();
  files.private_key = certificates_.key("client");
  EXPECT_EQ(ErrorOf(files), fmt::format("--queue-tls-key: {}: is not the key of the certificate in "
                                        "{}",
                                        files.private_key, files.certificate));
}

TEST_F(TlsFilesTest, AKeyWithAPassPhraseIsRefusedWithoutAskingForIt) {
  TlsFiles files = Good();
  files.private_key = certificates_.path("encrypted.key");
  certificates_.Run(fmt::format("openssl pkey -in {} -aes128 -passout pass:secret -out {}",
                                Good().private_key, files.private_key));
  EXPECT_EQ(ErrorOf(files), "--queue-tls-key: " + files.private_key +
                                ": the key is encrypted; it must have no pass phrase");
}

TEST_F(TlsFilesTest, ExpiredCertificatesAreNamedWithTheirDate) {
  certificates_.MakeExpired("old");
  TlsFiles files = {certificates_.certificate("old"), certificates_.key("old"), ""};
  EXPECT_THAT(ErrorOf(files),
              HasSubstr(files.certificate + ": the certificate expired on 2001-01-01 00:00 UTC"));
  files = Good();
  files.ca = certificates_.certificate("old");
  EXPECT_THAT(ErrorOf(files),
              HasSubstr("--queue-tls-ca: " + files.ca + ": the certificate expired"));
  // Beside one that is good it does no harm.
  const std::string both = LoadTlsIdentity(Good())->ca_certificates;
  std::ifstream old(files.ca);
  files.ca = Write("bundle.pem", std::string(std::istreambuf_iterator<char>(old), {}) + both);
  EXPECT_TRUE(LoadTlsIdentity(files).ok());
}

TEST_F(TlsFilesTest, AKeyThatIsTooWeakForTlsIsRefused) {
  const TlsFiles files = {certificates_.path("weak.pem"), certificates_.path("weak.key"), ""};
  certificates_.Run(fmt::format(
      "openssl req -x509 -newkey rsa:512 -nodes -days 1 -subj /CN=weak -keyout {} -out {}",
      files.private_key, files.certificate));
  EXPECT_EQ(
      ErrorOf(files),
      fmt::format("--queue-tls-cert: {}: TLS does not accept the certificate: ee key too small",
                  files.certificate));
}

TEST_F(TlsFilesTest, ACertificateForClientsOnlyIsRefused) {
  certificates_.Make("client-only", "extendedKeyUsage=clientAuth");
  EXPECT_THAT(
      ErrorOf({certificates_.certificate("client-only"), certificates_.key("client-only"), ""}),
      HasSubstr("the certificate is not meant for TLS servers"));
}

}  // namespace
}  // namespace wintserve
