#include "api_server/text/detokenizer.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <random>

#include "api_server/text/golden_test_util.h"
#include "api_server/text/utf8.h"

namespace wintserve {
namespace {

int32_t ByteToken(int byte) {
  const int32_t id = PoetTokenizer().IdOf(fmt::format("<0x{:02X}>", byte));
  EXPECT_GE(id, 0) << byte;
  return id;
}

// What a stream shows in total; every part of it must be valid UTF-8.
std::string Stream(const std::vector<int32_t>& ids) {
  Detokenizer detokenizer(PoetTokenizer());
  std::string text;
  const auto take = [&text](const std::string& part) {
    EXPECT_EQ(part, ReplaceInvalidUtf8(part));
    text += part;
  };
  for (const int32_t id : ids) take(detokenizer.Push(id));
  take(detokenizer.Flush());
  return text;
}

TEST(Detokenizer, HoldsBackAnIncompleteUtf8SequenceUntilItsLastByte) {
  Detokenizer detokenizer(PoetTokenizer());
  EXPECT_EQ(detokenizer.Push(ByteToken(0xE9)), "");
  EXPECT_EQ(detokenizer.Push(ByteToken(0xBE)), "");
  EXPECT_EQ(detokenizer.Push(ByteToken(0x98)), "龘");
  EXPECT_EQ(detokenizer.Flush(), "");
}

TEST(Detokenizer, ShowsAnUnfinishedCharacterAsOneReplacementCharacterAtTheEnd) {
  Detokenizer detokenizer(PoetTokenizer());
  EXPECT_EQ(detokenizer.Push(ByteToken(0xE9)), "");
  EXPECT_EQ(detokenizer.Push(ByteToken(0xBE)), "");
  EXPECT_EQ(detokenizer.Flush(), "\uFFFD");
  EXPECT_EQ(detokenizer.Flush(), "");
}

TEST(Detokenizer, ReplacesBytesAsSoonAsTheyCanNoLongerBecomeACharacter) {
  Detokenizer detokenizer(PoetTokenizer());
  EXPECT_EQ(detokenizer.Push(ByteToken(0xE9)), "");
  EXPECT_EQ(detokenizer.Push(PoetTokenizer().eos_id()), "\uFFFD</s>");
  EXPECT_EQ(detokenizer.Push(ByteToken(0xFF)), "\uFFFD");
}

TEST(Detokenizer, StreamsEveryGoldenTextAsDecodeGivesIt) {
  for (const GoldenText& golden : PoetGoldens().texts) {
    EXPECT_EQ(Stream(golden.ids), golden.decoded);
  }
}

TEST(Detokenizer, GivesWhatDecodeGivesForAnyIds) {
  const unsigned seed = std::random_device{}();
  SCOPED_TRACE(fmt::format("seed={}", seed));
  std::mt19937 rng(seed);
  const int32_t first_byte = PoetTokenizer().IdOf("<0x00>");
  for (int round = 0; round < 2'000; ++round) {
    std::vector<int32_t> ids(rng() % 24);
    for (int32_t& id : ids) {
      // Mostly byte tokens: they are where streaming and decoding could differ. Some ids have no
      // piece at all.
      const bool byte = rng() % 4 != 0;
      id = byte ? first_byte + static_cast<int32_t>(rng() % 256)
                : static_cast<int32_t>(rng() % (PoetTokenizer().vocab_size() + 16)) - 8;
    }
    const std::string decoded = PoetTokenizer().Decode(ids);
    ASSERT_EQ(Stream(ids), decoded) << fmt::format("ids={}", fmt::join(ids, ","));
    ASSERT_EQ(ReplaceInvalidUtf8(decoded), decoded);
  }
}

}  // namespace
}  // namespace wintserve
