// The vendor's tokenizer is not in this repository. Set WINTSERVE_VENDOR_TOKENIZER to a directory
// with the tokenizer.model and tokenizer_config.json of an ERNIE-4.5 base or PT release.
#include <gtest/gtest.h>

#include <cstdlib>

#include "api_server/text/golden_test_util.h"

namespace wintserve {
namespace {

using Ids = std::vector<int32_t>;

struct Vector {
  const char* text;
  Ids ids;
};

class VendorTokenizer : public testing::Test {
 protected:
  void SetUp() override {
    const char* dir = std::getenv("WINTSERVE_VENDOR_TOKENIZER");
    if (dir == nullptr) {
      GTEST_SKIP() << "WINTSERVE_VENDOR_TOKENIZER names no directory with the vendor's tokenizer";
    }
    auto loaded = Tokenizer::Load(dir);
    ASSERT_TRUE(loaded.ok()) << loaded.status();
    tokenizer_ = *std::move(loaded);
  }

  Ids EncodeChat(const std::vector<ChatMessage>& messages, bool add_generation_prompt) const {
    const auto prompt = RenderErnieChat(messages, add_generation_prompt, tokenizer_->chat_tokens());
    EXPECT_TRUE(prompt.ok()) << prompt.status();
    return prompt.ok() ? tokenizer_->Encode(*prompt) : Ids();
  }

  std::unique_ptr<Tokenizer> tokenizer_;
};

TEST_F(VendorTokenizer, EncodesAndDecodesTheKnownVectors) {
  const Vector vectors[] = {
      {"", {}},
      {" ", {93919}},
      {"  ", {269}},
      {" Hello", {30802}},
      {"hello", {18830}},
      {"<s>", {1}},
      {"This is a test", {1720, 357, 274, 1167}},
      {"A sample test", {93957, 3983, 1167}},
      {"The following string should be properly encoded: Hello.",
       {700, 1997, 1530, 1189, 390, 10962, 20622, 93963, 30802, 93937}},
      {"But ird and ปี   ird   ด", {2398, 93919, 2080, 326, 93919, 81175, 1111, 2080, 1111, 95676}},
      {"Hey<eos>. \t\t \n\nyou  é  @#😈  🤗!       , 1234 15 5,61",
       {25027, 93953, 92335, 6140, 93919, 22,    22,  93919, 23,    23,  5557,  269,   94039, 269,
        94027, 93993, 253,   172,  165,   149,   269, 253,   172,   177, 164,   94018, 426,   1089,
        93919, 4,     5,     6,    7,     93919, 4,   8,     93919, 8,   93938, 9,     4}},
      {"<s> Hello<s>how", {1, 30802, 1, 7413}},
      {" <s> Hello<s> how", {93919, 1, 30802, 1, 1299}},
      {"lekacy", {17289, 3004}},
      {"Hello wörld 你好 é😀", {16276, 296, 2235, 494, 93919, 5300, 1697, 253, 172, 165, 141}},
      {"User: ", {2969, 93963, 93919}},
      {"\nAssistant: ", {23, 92267, 93963, 93919}},
      {"\nAssistant:\n", {23, 92267, 93963, 23}},
  };
  for (const Vector& vector : vectors) {
    EXPECT_EQ(tokenizer_->Encode(vector.text), vector.ids) << vector.text;
    EXPECT_EQ(tokenizer_->Decode(vector.ids), vector.text);
  }
}

TEST_F(VendorTokenizer, DecodesTheKnownVectors) {
  EXPECT_EQ(tokenizer_->Decode(Ids{93937}), ".");
  EXPECT_EQ(tokenizer_->Decode(Ids{94014, 663}), "ا .");
  EXPECT_EQ(tokenizer_->Decode(Ids{5, 6, 7, 100, 2000}), "234W </");
}

TEST_F(VendorTokenizer, EncodesTheKnownChats) {
  const ChatMessage system = {"system", "You are a helpful chatbot."};
  const ChatMessage user = {"user", "Hello!"};
  const ChatMessage assistant = {"assistant", "Nice to meet you."};
  EXPECT_EQ(EncodeChat({system, user}, false), (Ids{100273, 2520, 524, 274, 20472, 18819, 7074,
                                                    93937, 23, 2969, 93963, 30802, 94018, 23}));
  EXPECT_EQ(EncodeChat({system, user, assistant}, false),
            (Ids{100273, 2520,  524, 274,   20472, 18819, 7074, 93937, 23,  2969,  93963,
                 30802,  94018, 23,  92267, 93963, 47434, 318,  7472,  536, 93937, 100272}));
  EXPECT_EQ(EncodeChat({user}, false), (Ids{100273, 2969, 93963, 30802, 94018, 23}));
  EXPECT_EQ(EncodeChat({user}, true),
            (Ids{100273, 2969, 93963, 30802, 94018, 23, 92267, 93963, 93919}));
  EXPECT_EQ(EncodeChat({system, user, assistant, user}, true),
            (Ids{100273, 2520,   524,   274,   20472, 18819, 7074,  93937, 23,    2969,
                 93963,  30802,  94018, 23,    92267, 93963, 47434, 318,   7472,  536,
                 93937,  100272, 2969,  93963, 30802, 94018, 23,    92267, 93963, 93919}));
}

TEST_F(VendorTokenizer, KnowsItsSizeAndItsEndToken) {
  EXPECT_EQ(tokenizer_->vocab_size(), 100295);
  EXPECT_EQ(tokenizer_->eos_id(), 2);
  EXPECT_EQ(tokenizer_->IdOf("<|begin_of_sentence|>"), 100273);
  EXPECT_EQ(tokenizer_->IdOf("<|end_of_sentence|>"), 100272);
}

}  // namespace
}  // namespace wintserve
