#include "tools/quantizer/encode/code_map.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <string>

#include "kernels/formats/wint2.h"
#include "kernels/plan/code_line.h"

namespace wintserve::quantizer {
namespace {

using ::testing::HasSubstr;

TEST(CodeMap, DefaultsDecodeAlikeOnEveryDevice) {
  ASSERT_FALSE(DefaultCodeMaps().empty());
  for (const CodeMap& map : DefaultCodeMaps()) {
    EXPECT_TRUE(CheckCodeMap(map).ok()) << CheckCodeMap(map);
    EXPECT_EQ(kernels::plan::FindCodeLine(map.code_scale, map.code_zp).num_wrong_bytes, 0);
    for (int byte = 0; byte < kNumBytes; ++byte) {
      const int32_t code =
          formats::Wint2Code(static_cast<uint8_t>(byte), map.code_scale, map.code_zp);
      EXPECT_GE(code, 0);
      EXPECT_LE(code, 32767);
    }
  }
}

TEST(CodeMap, CodebookHasTheValuesThatBytesDecodeTo) {
  for (const CodeMap& map : DefaultCodeMaps()) {
    const Codebook codebook(map);
    for (int byte = 0; byte < kNumBytes; ++byte) {
      const int32_t code =
          formats::Wint2Code(static_cast<uint8_t>(byte), map.code_scale, map.code_zp);
      for (int slot = 0; slot < kWeightsOfByte; ++slot) {
        const int value = formats::Wint2Value(code, slot);
        ASSERT_EQ(codebook.Value(byte, slot), value);
        ASSERT_EQ(codebook.values()[byte][slot], value);
        ASSERT_EQ(codebook.vectors()[byte][slot], static_cast<float>(value));
        ASSERT_EQ(codebook.slots()[slot][byte], static_cast<float>(value));
      }
    }
  }
}

TEST(CodeMap, RefusesMapsThatDevicesDecodeDifferently) {
  const auto message = [](CodeMap map) { return std::string(CheckCodeMap(map).message()); };
  EXPECT_THAT(message({128.5f, 0.0f, 0.06f}), HasSubstr("byte 255 has code 32768"));
  EXPECT_THAT(message({120.0f, -1.0f, 0.06f}), HasSubstr("byte 0 has code -1"));
  EXPECT_THAT(message({std::nanf(""), 0.0f, 0.06f}), HasSubstr("code_scale"));
  EXPECT_THAT(message({120.0f, std::numeric_limits<float>::infinity(), 0.06f}),
              HasSubstr("code_zp"));
  EXPECT_THAT(message({120.0f, 0.0f, 0.0f}), HasSubstr("scale_per_sigma"));
  EXPECT_THAT(message({120.0f, 0.0f, std::nanf("")}), HasSubstr("scale_per_sigma"));
  // A map whose float32 codes no line reproduces: kernels/plan/code_line_test.cc makes them so.
  std::mt19937 rng(2);
  std::uniform_real_distribution<float> scale(110.0f, 120.0f);
  int num_refused = 0;
  for (int i = 0; i < 200000 && num_refused == 0; ++i) {
    const CodeMap map = {scale(rng), 1000.0f + static_cast<float>(i % 64) * 0.25f, 0.06f};
    if (CheckCodeMap(map).ok()) continue;
    ++num_refused;
    EXPECT_THAT(message(map), HasSubstr("integer arithmetic"));
  }
  EXPECT_EQ(num_refused, 1);
}

}  // namespace
}  // namespace wintserve::quantizer
