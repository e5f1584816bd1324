#include "engine_worker/weights/safetensors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <csignal>
#include <cstring>
#include <random>
#include <thread>

#include "common/exit_code.h"
#include "engine_worker/weights/checkpoint_writer.h"

namespace wintserve {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;

std::string File(const std::string& header, const std::string& data, uint64_t length_delta = 0) {
  const uint64_t length = header.size() + length_delta;
  std::string bytes(sizeof(length), '\0');
  std::memcpy(bytes.data(), &length, sizeof(length));
  return bytes + header + data;
}

absl::Status OpenBytes(const std::string& bytes) {
  const testing::TempDir dir;
  testing::WriteFile(dir.path() / "model.safetensors", bytes);
  return SafetensorsFile::Open(dir.path() / "model.safetensors").status();
}

constexpr char kTwoTensors[] =
    R"({"__metadata__":{"format":"pt"},"b":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},)"
    R"("a":{"dtype":"BF16","shape":[1,2],"data_offsets":[3,7]}})";

TEST(SafetensorsFile, ListsTensorsWithTypeShapeAndUnalignedData) {
  const testing::TempDir dir;
  testing::WriteFile(dir.path() / "f", File(kTwoTensors, "xyzABCD"));
  const auto file = SafetensorsFile::Open(dir.path() / "f");
  ASSERT_TRUE(file.ok()) << file.status();
  ASSERT_EQ(file->tensors().size(), 2u);
  const TensorView& a = file->tensors().at("a");
  EXPECT_EQ(a.type, TensorType::kBF16);
  EXPECT_THAT(a.shape, ElementsAre(1, 2));
  EXPECT_THAT(a.data, ElementsAre('A', 'B', 'C', 'D'));
  EXPECT_EQ(file->size_bytes(), static_cast<int64_t>(8 + sizeof(kTwoTensors) - 1 + 7));
}

TEST(SafetensorsFile, AcceptsScalarsAndEmptyTensors) {
  EXPECT_TRUE(OpenBytes(File(R"({"s":{"dtype":"F32","shape":[],"data_offsets":[0,4]},)"
                             R"("e":{"dtype":"F32","shape":[0,7],"data_offsets":[0,0]}})",
                             "1234"))
                  .ok());
}

TEST(SafetensorsFile, AMissingFileIsNotFound) {
  const absl::Status status = SafetensorsFile::Open("no/such.safetensors").status();
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(status.message()), HasSubstr("no/such.safetensors"));
}

TEST(SafetensorsFile, ADirectoryIsRefused) {
  const testing::TempDir dir;
  EXPECT_THAT(std::string(SafetensorsFile::Open(dir.path()).status().message()),
              HasSubstr("not a regular file"));
}

struct Corruption {
  const char* name;
  std::string bytes;
  std::vector<const char*> pieces;  // of the error
};

std::string OneTensor(const std::string& entry) { return File("{\"w\":" + entry + "}", "1234"); }

std::string Repeated(const std::string& piece, int count) {
  std::string text;
  for (int i = 0; i < count; ++i) text += piece;
  return text;
}

class CorruptFile : public ::testing::TestWithParam<Corruption> {};

TEST_P(CorruptFile, IsDataLossAndNamesFileAndTensor) {
  const absl::Status status = OpenBytes(GetParam().bytes);
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss) << status;
  const std::string message(status.message());
  EXPECT_THAT(message, HasSubstr("model.safetensors: "));
  for (const char* piece : GetParam().pieces) EXPECT_THAT(message, HasSubstr(piece));
  EXPECT_LT(message.size(), 600u) << "without the file's name it is a line or two";
  EXPECT_THAT(message, Not(HasSubstr("\n")));
}

INSTANTIATE_TEST_SUITE_P(
    All, CorruptFile,
    ::testing::Values(
        Corruption{"Empty", "", {"found 0 bytes"}},
        Corruption{
            "Nested",
            File("{\"w\":" + std::string(1'000'000, '[') + std::string(1'000'000, ']') + "}", ""),
            {"nested deeper than 64 levels"}},
        Corruption{"ShorterThanTheLength", "abc", {"found 3 bytes"}},
        Corruption{
            "HeaderLengthBeyondTheFile", File("{}", "", 1), {"header length of 3", "at most 2"}},
        Corruption{
            "HugeHeaderLength", std::string(64, '\xff'), {"header length of 18446744073709551615"}},
        Corruption{"GarbageHeader", File("garbage!", ""), {"not valid JSON"}},
        Corruption{"HeaderCutShort", File(R"({"w":{"dtype")", ""), {"not valid JSON"}},
        Corruption{"HeaderIsAList", File("[]", ""), {"not a JSON object"}},
        Corruption{"EntryIsANumber", OneTensor("7"), {"tensor w:", "not an object"}},
        Corruption{"ZeroBytesBehindTheHeader",
                   File(std::string("{}\0\0", 4), ""),
                   {"the header is not valid JSON: a zero byte"}},
        Corruption{"NameThatMovesTheCursor",
                   File(R"({"w\u001b[31m\n":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}})", ""),
                   {R"(tensor "w\u001b[31m\n": found a name of 7 bytes)", "printable ASCII"}},
        Corruption{"NameOfAMegabyte",
                   File("{\"" + std::string(1'000'000, 'w') + "\":7}", ""),
                   {"www...: found a name of 1000000 bytes, expected 1 to 512"}},
        Corruption{"NoName", File(R"({"":7})", ""), {"tensor \"\": found a name of 0 bytes"}},
        Corruption{"TypeOfAMegabyte",
                   OneTensor("{\"dtype\":\"" + std::string(1'000'000, 'F') +
                             R"(","shape":[1],"data_offsets":[0,4]})"),
                   {"FFF..., expected one of BOOL, U8, "}},
        Corruption{"ShapeOfAThousandDimensions",
                   OneTensor(R"({"dtype":"F32","data_offsets":[0,4],"shape":[1)" +
                             Repeated(",1", 999) + "]}"),
                   {"1,1..., expected a list of at most 8 whole numbers"}},
        Corruption{"NoShape",
                   OneTensor(R"({"dtype":"F32","data_offsets":[0,4]})"),
                   {"tensor w:", "shape is missing"}},
        Corruption{"UnknownType",
                   OneTensor(R"({"dtype":"F13","shape":[1],"data_offsets":[0,4]})"),
                   {"tensor w:", "found dtype \"F13\""}},
        Corruption{"TypeIsANumber",
                   OneTensor(R"({"dtype":3,"shape":[1],"data_offsets":[0,4]})"),
                   {"tensor w:", "found dtype 3"}},
        Corruption{"NegativeShape",
                   OneTensor(R"({"dtype":"F32","shape":[-1],"data_offsets":[0,4]})"),
                   {"tensor w:", "found shape [-1]"}},
        Corruption{"FractionalShape",
                   OneTensor(R"({"dtype":"F32","shape":[1.0],"data_offsets":[0,4]})"),
                   {"tensor w:", "found shape [1.0]"}},
        Corruption{
            "ShapeBeyond63Bits",
            OneTensor(R"({"dtype":"F32","shape":[9223372036854775808],"data_offsets":[0,4]})"),
            {"tensor w:", "found shape"}},
        Corruption{
            "ShapeProductOverflows",
            OneTensor(R"({"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]})"),
            {"tensor w:", "found 4 bytes", "more than 2^63"}},
        Corruption{"ShapeNeedsMoreBytes",
                   OneTensor(R"({"dtype":"F32","shape":[2],"data_offsets":[0,4]})"),
                   {"tensor w:", "found 4 bytes, expected 8 for F32 [2]"}},
        Corruption{"OffsetsBackwards",
                   OneTensor(R"({"dtype":"F32","shape":[1],"data_offsets":[4,0]})"),
                   {"tensor w:", "found data_offsets [4,0]"}},
        Corruption{"NegativeOffset",
                   OneTensor(R"({"dtype":"F32","shape":[1],"data_offsets":[-4,0]})"),
                   {"tensor w:", "found data_offsets [-4,0]"}},
        Corruption{"ThreeOffsets",
                   OneTensor(R"({"dtype":"F32","shape":[1],"data_offsets":[0,2,4]})"),
                   {"tensor w:", "found data_offsets [0,2,4]"}},
        Corruption{"BeyondTheEnd",
                   OneTensor(R"({"dtype":"F32","shape":[2],"data_offsets":[0,8]})"),
                   {"tensor w:", "beyond the end of the file", "truncated?"}},
        Corruption{"Overlap",
                   File(R"({"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},)"
                        R"("b":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}})",
                        "1234"),
                   {"tensor b:", "at offset 2, expected 3"}},
        Corruption{"Hole",
                   File(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
                        R"("b":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}})",
                        "1234"),
                   {"tensor b:", "at offset 2, expected 1"}},
        Corruption{"TrailingBytes", File(kTwoTensors, "xyzABCDE"), {"found 8 bytes", "expected 7"}},
        Corruption{"ListedTwice",
                   File(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
                        R"("a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})",
                        "1"),
                   {"tensor a is listed twice"}}),
    [](const auto& info) { return info.param.name; });

// By two threads. Large enough for most pages not to be those that parsing the header has read.
void SumAFileThatIsShortened() {
  const testing::TempDir dir;
  const std::string header = R"({"w":{"dtype":"U8","shape":[1000000],"data_offsets":[0,1000000]}})";
  testing::WriteFile(dir.path() / "f", File(header, std::string(1'000'000, '\1')));
  const auto file = SafetensorsFile::Open(dir.path() / "f");
  std::filesystem::resize_file(dir.path() / "f", 4096);
  std::atomic<int> sum = 0;
  const auto add = [&] {
    for (const uint8_t byte : file->tensors().at("w").data) sum += byte;
  };
  std::thread other(add);
  add();
  other.join();
}

TEST(SafetensorsFileDeathTest, AFileThatIsShortenedEndsTheProcessWithOneLineThatNamesIt) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(SumAFileThatIsShortened(), ::testing::ExitedWithCode(kExitCheckpoint),
              "^error: .*/f: a part of it cannot be read: [^\n]*shortened\n$");
}

TEST(SafetensorsFileDeathTest, OtherBusErrorsAreWhatTheyWere) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  const auto raise_with_a_file = [] {
    ::signal(SIGBUS, SIG_DFL);  // a sanitizer has a handler of its own
    const testing::TempDir dir;
    testing::WriteFile(dir.path() / "f", File(kTwoTensors, "xyzABCD"));
    const auto file = SafetensorsFile::Open(dir.path() / "f");
    ::raise(SIGBUS);
  };
  EXPECT_EXIT(raise_with_a_file(), ::testing::KilledBySignal(SIGBUS), "");
}

TEST(SafetensorsFile, EveryTruncationIsRefused) {
  const std::string whole = File(kTwoTensors, "xyzABCD");
  for (size_t length = 0; length < whole.size(); ++length) {
    EXPECT_EQ(OpenBytes(whole.substr(0, length)).code(), absl::StatusCode::kDataLoss) << length;
  }
}

TEST(SafetensorsFile, AnyFlippedByteOfTheHeaderIsAnErrorOrAValidFile) {
  const auto seed = std::random_device{}();
  SCOPED_TRACE(::testing::Message() << "seed=" << seed);
  std::mt19937 rng(seed);
  const testing::TempDir dir;
  const std::string whole = File(kTwoTensors, "xyzABCD");
  for (int round = 0; round < 500; ++round) {
    std::string broken = whole;
    for (int flips = 1 + rng() % 3; flips > 0; --flips) {
      broken[rng() % broken.size()] = static_cast<char>(rng());
    }
    testing::WriteFile(dir.path() / "f", broken);
    const auto file = SafetensorsFile::Open(dir.path() / "f");
    if (!file.ok()) continue;
    for (const auto& [name, view] : file->tensors()) {
      ASSERT_GE(view.data.data(), file->data().data());
      ASSERT_LE(view.data.data() + view.data.size(), file->data().data() + file->data().size());
    }
  }
}

}  // namespace
}  // namespace wintserve
