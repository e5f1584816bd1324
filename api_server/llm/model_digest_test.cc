#include "api_server/llm/model_digest.h"

#include <gtest/gtest.h>

#include <fstream>

#include "common/temp_dir_test_util.h"
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
  const TempDir dir;
  const std::string path = dir.path().string();
  const auto write = [&](const char* text) { std::ofstream(path + "/config.json") << text; };
  const std::string without = ModelDigest(path, FakeTokenizer());
  write("{\"rope_theta\": 10000}");
  const std::string one = ModelDigest(path, FakeTokenizer());
  EXPECT_EQ(one, ModelDigest(path, FakeTokenizer()));
  EXPECT_NE(one, without);
  EXPECT_NE(one, ModelDigest(path, OtherTokenizer()));
  write("{\"rope_theta\": 500000}");
  EXPECT_NE(one, ModelDigest(path, FakeTokenizer()));
}

}  // namespace
}  // namespace wintserve
