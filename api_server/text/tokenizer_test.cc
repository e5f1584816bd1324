#include "api_server/text/tokenizer.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>

#include "api_server/text/golden_test_util.h"
#include "common/read_file.h"

namespace wintserve {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using Ids = std::vector<int32_t>;

TEST(Tokenizer, EncodesEveryGoldenText) {
  ASSERT_EQ(PoetGoldens().texts.size(), 79u);
  for (const GoldenText& golden : PoetGoldens().texts) {
    EXPECT_EQ(PoetTokenizer().Encode(golden.text), golden.ids) << golden.text;
  }
}

TEST(Tokenizer, DecodesEveryGoldenText) {
  for (const GoldenText& golden : PoetGoldens().texts) {
    EXPECT_EQ(PoetTokenizer().Decode(golden.ids), golden.decoded);
  }
  for (const GoldenText& golden : PoetGoldens().decodings) {
    EXPECT_EQ(PoetTokenizer().Decode(golden.ids), golden.text);
  }
}

TEST(Tokenizer, KnowsItsSizeAndItsNamedTokens) {
  EXPECT_EQ(PoetTokenizer().vocab_size(), 8192);
  EXPECT_EQ(PoetTokenizer().eos_id(), 2);
  EXPECT_EQ(PoetTokenizer().IdOf("</s>"), 2);
  EXPECT_EQ(PoetTokenizer().IdOf("<|end_of_sentence|>"), 4);
  EXPECT_EQ(PoetTokenizer().IdOf("▁"), 2364);
  EXPECT_EQ(PoetTokenizer().IdOf("no such token"), -1);
  EXPECT_EQ(PoetTokenizer().chat_tokens().cls_token, "<|begin_of_sentence|>");
  EXPECT_EQ(PoetTokenizer().chat_tokens().sep_token, "<|end_of_sentence|>");
}

TEST(Tokenizer, GivesTheExactBytesOfEachKindOfToken) {
  EXPECT_EQ(PoetTokenizer().Bytes(PoetTokenizer().IdOf("<0xE9>")), "\xE9");
  EXPECT_EQ(PoetTokenizer().Bytes(PoetTokenizer().IdOf("<0x00>")), std::string(1, '\0'));
  EXPECT_EQ(PoetTokenizer().Bytes(PoetTokenizer().IdOf("▁")), " ");
  EXPECT_EQ(PoetTokenizer().Bytes(0), "<unk>");
  EXPECT_EQ(PoetTokenizer().Bytes(2), "</s>");
  for (const int32_t without_piece : {-1, 8192, 103423, INT32_MAX, INT32_MIN}) {
    EXPECT_EQ(PoetTokenizer().Bytes(without_piece), "") << without_piece;
  }
}

TEST(Tokenizer, ReplacesInvalidUtf8BeforeEncoding) {
  EXPECT_EQ(PoetTokenizer().Encode("月\xE9\xBE!"), PoetTokenizer().Encode("月\uFFFD!"));
}

TEST(Tokenizer, EncodesTextWithNulBytes) {
  const std::string text("a\0b", 3);
  EXPECT_EQ(PoetTokenizer().Decode(PoetTokenizer().Encode(text)), text);
}

TEST(Tokenizer, MatchesAddedTokensCaseSensitivelyAndWithoutStripping) {
  const std::string text = " <s> </S>";
  const Ids ids = PoetTokenizer().Encode(text);
  EXPECT_THAT(Ids(ids.begin(), ids.begin() + 3), ElementsAre(2364, 1, 2364));
  EXPECT_THAT(ids, testing::Not(testing::Contains(2)));
  EXPECT_EQ(PoetTokenizer().Decode(ids), text);
}

TEST(Tokenizer, DecodesWhatItEncodedForAnyText) {
  const unsigned seed = std::random_device{}();
  SCOPED_TRACE(fmt::format("seed={}", seed));
  std::mt19937 rng(seed);
  const std::vector<std::string> parts = {" ",    "  ", "\n", "a",       "The",  "月",
                                          "龘",   "😀",  "42", "<s>",     "</s>", "<|begin",
                                          "<unk", "é",  "\t", "<mask:0>"};
  for (int round = 0; round < 2'000; ++round) {
    std::string text;
    for (size_t i = rng() % 12; i > 0; --i) text += parts[rng() % parts.size()];
    ASSERT_EQ(PoetTokenizer().Decode(PoetTokenizer().Encode(text)), text);
  }
}

TEST(Tokenizer, TakesTheLongestAddedTokenWhereSeveralStart) {
  const TokenizerDir dir(R"({"added_tokens_decoder": {"8192": {"content": "<x"},
                             "8193": {"content": "<x>"}, "9000": {"content": "<x><y>"}}})");
  const auto tokenizer = Tokenizer::Load(dir.path());
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  EXPECT_THAT((*tokenizer)->Encode("<x><y><x><x"), ElementsAre(9000, 8193, 8192));
  EXPECT_EQ((*tokenizer)->Decode(Ids{9000, 8193, 8500, 8192}), "<x><y><x><x");
  EXPECT_EQ((*tokenizer)->vocab_size(), 8192);
}

TEST(Tokenizer, ReadsAddedTokensJsonWhereThereIsOne) {
  const TokenizerDir dir(R"({"added_tokens_decoder": {"8192": {"content": "<x>"}}})");
  dir.Write("added_tokens.json", R"({"<x>": 8192, "<LOC_0>": 8193})");
  const auto tokenizer = Tokenizer::Load(dir.path());
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  EXPECT_THAT((*tokenizer)->Encode("<LOC_0><x>"), ElementsAre(8193, 8192));
}

TEST(Tokenizer, KeepsTheUnderlineOfAnAddedToken) {
  const TokenizerDir dir(R"({"added_tokens_decoder": {"8192": {"content": "<▁>"}}})");
  const auto tokenizer = Tokenizer::Load(dir.path());
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  EXPECT_EQ((*tokenizer)->Decode(Ids{8192}), "<▁>");
}

TEST(Tokenizer, SplitsAtControlPiecesEvenIfTheConfigListsNone) {
  const TokenizerDir dir("{}");
  const auto tokenizer = Tokenizer::Load(dir.path());
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  EXPECT_THAT((*tokenizer)->Encode("<s></s><unk>"), ElementsAre(1, 2, 0));
  EXPECT_EQ((*tokenizer)->eos_id(), 2);
}

TEST(Tokenizer, ReadsItsNamedTokensAsTextOrObject) {
  const TokenizerDir dir(R"({"eos_token": {"content": "<|end_of_sentence|>"},
                             "cls_token": "<s>", "sep_token": "<mask:0>"})");
  const auto tokenizer = Tokenizer::Load(dir.path());
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  EXPECT_EQ((*tokenizer)->eos_id(), 4);
  EXPECT_EQ((*tokenizer)->chat_tokens().cls_token, "<s>");
  EXPECT_EQ((*tokenizer)->chat_tokens().sep_token, "<mask:0>");
}

TEST(Tokenizer, AddsTheDummyPrefixToEachStretchIfTheModelAsksForIt) {
  const TokenizerDir dir("{}");
  const auto model = ReadFile("models/poet/tokenizer.model");
  ASSERT_TRUE(model.ok());
  // A serialised message may be continued: ModelProto.normalizer_spec.add_dummy_prefix = true.
  dir.Write("tokenizer.model", *model + std::string("\x1A\x02\x18\x01"));
  const auto tokenizer = Tokenizer::Load(dir.path());
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  Ids expected = PoetTokenizer().Encode(" a");
  expected.push_back(1);
  for (const int32_t id : PoetTokenizer().Encode(" b")) expected.push_back(id);
  EXPECT_EQ((*tokenizer)->Encode("a<s>b"), expected);
}

struct ModelFile {
  const char* name;
  const char* file;
};

class TokenizerModelFile : public testing::TestWithParam<ModelFile> {};

TEST_P(TokenizerModelFile, IsFoundUnderEachOfItsNames) {
  const TokenizerDir dir("{}");
  std::filesystem::rename(dir.path() / "tokenizer.model", dir.path() / GetParam().file);
  EXPECT_TRUE(Tokenizer::Load(dir.path()).ok());
}

INSTANTIATE_TEST_SUITE_P(All, TokenizerModelFile,
                         testing::Values(ModelFile{"Tokenizer", "tokenizer.model"},
                                         ModelFile{"Spm", "spm.model"},
                                         ModelFile{"Ernie", "ernie_token_100k.model"}),
                         [](const auto& info) { return info.param.name; });

struct BadConfig {
  const char* name;
  const char* config;
  const char* error;  // after "DIR/tokenizer_config.json: "
};

class BadTokenizerConfig : public testing::TestWithParam<BadConfig> {};

TEST_P(BadTokenizerConfig, IsRefusedWithTheFileAndTheReason) {
  const TokenizerDir dir(GetParam().config);
  const auto tokenizer = Tokenizer::Load(dir.path());
  ASSERT_TRUE(absl::IsInvalidArgument(tokenizer.status())) << tokenizer.status();
  EXPECT_THAT(std::string(tokenizer.status().message()),
              testing::StartsWith(fmt::format("{}/tokenizer_config.json: {}", dir.path().string(),
                                              GetParam().error)));
}

INSTANTIATE_TEST_SUITE_P(
    All, BadTokenizerConfig,
    testing::Values(
        BadConfig{"NotJson", "{", "not valid JSON: "},
        BadConfig{"NotAnObject", "[1]", "must be a JSON object, is a JSON array"},
        BadConfig{"NamedTokenIsANumber", R"({"eos_token": 2})",
                  "eos_token: must be a string or an object with a string \"content\""},
        BadConfig{"NamedTokenDoesNotExist", R"({"cls_token": "<cls>"})",
                  "cls_token '<cls>' is neither in the SentencePiece model nor an added token"},
        BadConfig{"DecoderIsAList", R"({"added_tokens_decoder": []})",
                  "added_tokens_decoder must be an object from id to token"},
        BadConfig{"IdIsNotANumber", R"({"added_tokens_decoder": {"x": {"content": "<x>"}}})",
                  "added_tokens_decoder: 'x' is not a token id"},
        BadConfig{"ContentIsMissing", R"({"added_tokens_decoder": {"9000": {}}})",
                  "added_tokens_decoder[9000]: must be a string or an object"},
        BadConfig{"ContentIsEmpty", R"({"added_tokens_decoder": {"9000": {"content": ""}}})",
                  "added token 9000 is empty"},
        BadConfig{"IdIsNegative", R"({"added_tokens_decoder": {"-1": {"content": "<x>"}}})",
                  "added token '<x>' has id -1, allowed: 0 to 1048575"},
        BadConfig{"IdIsTooLarge", R"({"added_tokens_decoder": {"1048576": {"content": "<x>"}}})",
                  "added token '<x>' has id 1048576, allowed: 0 to 1048575"},
        BadConfig{"IdIsAnotherPiece", R"({"added_tokens_decoder": {"1": {"content": "<x>"}}})",
                  "added token '<x>' has id 1, which is '<s>' in the SentencePiece model"},
        BadConfig{"PieceHasAnotherId", R"({"added_tokens_decoder": {"9000": {"content": "<s>"}}})",
                  "added token '<s>' has id 9000, but the SentencePiece model has it at 1"},
        BadConfig{"TwoIds",
                  R"({"added_tokens_decoder": {"9000": {"content": "<x>"},
                                               "9001": {"content": "<x>"}}})",
                  "added token '<x>' has the ids 9000 and 9001"}),
    [](const auto& info) { return info.param.name; });

TEST(TokenizerErrors, NameTheAddedTokensFileThatContradictsTheConfig) {
  const TokenizerDir dir(R"({"added_tokens_decoder": {"9000": {"content": "<x>"}}})");
  dir.Write("added_tokens.json", R"({"<y>": 9000})");
  EXPECT_EQ(
      Tokenizer::Load(dir.path()).status().message(),
      fmt::format("{}/added_tokens.json: id 9000 is given to the added tokens '<x>' and '<y>'",
                  dir.path().string()));
}

TEST(TokenizerErrors, NameTheDirectoryThatHasNoModel) {
  const auto tokenizer = Tokenizer::Load("tests/golden");
  EXPECT_TRUE(absl::IsNotFound(tokenizer.status()));
  EXPECT_EQ(tokenizer.status().message(),
            "tests/golden: has none of tokenizer.model, spm.model, ernie_token_100k.model");
}

TEST(TokenizerErrors, NameTheConfigThatIsMissing) {
  const TokenizerDir dir("{}");
  std::filesystem::remove(dir.path() / "tokenizer_config.json");
  const auto tokenizer = Tokenizer::Load(dir.path());
  EXPECT_TRUE(absl::IsNotFound(tokenizer.status()));
  EXPECT_THAT(std::string(tokenizer.status().message()),
              HasSubstr(dir.path().string() + "/tokenizer_config.json"));
}

TEST(TokenizerErrors, NameTheModelThatIsCorrupt) {
  const auto model = ReadFile("models/poet/tokenizer.model");
  ASSERT_TRUE(model.ok());
  const TokenizerDir dir("{}");
  for (const std::string& bytes :
       {std::string(), std::string("not a model"), model->substr(0, model->size() / 2),
        std::string(4096, '\xFF')}) {
    dir.Write("tokenizer.model", bytes);
    const auto tokenizer = Tokenizer::Load(dir.path());
    ASSERT_TRUE(absl::IsInvalidArgument(tokenizer.status())) << tokenizer.status();
    EXPECT_THAT(
        std::string(tokenizer.status().message()),
        testing::StartsWith(dir.path().string() + "/tokenizer.model: not a SentencePiece model: "));
  }
}

}  // namespace
}  // namespace wintserve
