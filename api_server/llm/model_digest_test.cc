#include "api_server/llm/model_digest.h"

#include <gtest/gtest.h>
#include <stdlib.h>

#include <filesystem>
#include <fstream>

#include "tests/fakes/fake_tokenizer.h"

namespace wintserve {
namespace {

class OtherTokenizer : public FakeTokenizer {
 public:
  std::string Bytes(int32_t id) const override {
    return id == 150 ? "x" : FakeTokenizer::Bytes(id);
  }
};

TEST(ModelDigest, TellsConfigurationsAndVocabulariesApart) {
  std::string path = (std::filesystem::temp_directory_path() / "digest_XXXXXX").string();
  ASSERT_NE(::mkdtemp(path.data()), nullptr);
  const auto write = [&](const char* text) { std::ofstream(path + "/config.json") << text; };
  const std::string without = ModelDigest(path, FakeTokenizer());
  write("{\"rope_theta\": 10000}");
  const std::string one = ModelDigest(path, FakeTokenizer());
  EXPECT_EQ(one, ModelDigest(path, FakeTokenizer()));
  EXPECT_NE(one, without);
  EXPECT_NE(one, ModelDigest(path, OtherTokenizer()));
  write("{\"rope_theta\": 500000}");
  EXPECT_NE(one, ModelDigest(path, FakeTokenizer()));
  std::filesystem::remove_all(path);
}

}  // namespace
}  // namespace wintserve
