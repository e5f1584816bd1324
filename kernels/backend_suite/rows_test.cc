// Memory, batches and the operators on single rows.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "common/mapped_memory.h"
#include "common/shared_memory.h"
#include "kernels/backend_suite/suite_test_util.h"
#include "kernels/formats/bf16.h"

namespace wintserve::kernels {
namespace {

using testing::Each;
using testing::ElementsAre;

TEST(Memory, IsZeroedAndKeepsWhatIsCopied) {
  constexpr int64_t kBytes = 1000;
  const auto buffer = Must(TheBackend().Allocate(kBytes));
  std::vector<uint8_t> host(kBytes, 7);
  ASSERT_TRUE(TheBackend().CopyToHost(host.data(), buffer->data(), kBytes).ok());
  EXPECT_THAT(host, Each(0));
  std::iota(host.begin(), host.end(), 0);
  TheBackend().CopyFromHost(buffer->data(), host.data(), kBytes);
  std::vector<uint8_t> back(kBytes);
  ASSERT_TRUE(TheBackend().CopyToHost(back.data(), buffer->data(), kBytes).ok());
  EXPECT_EQ(back, host);
}

TEST(Memory, CopiesRunInTheOrderOfOperatorsAndAreDoneAtTheEvent) {
  constexpr int64_t kBytes = int64_t{1} << 22;
  const auto device = Must(TheBackend().Allocate(kBytes));
  const auto first = Must(TheBackend().AllocateHost(kBytes));
  const auto second = Must(TheBackend().AllocateHost(kBytes));
  const auto back = Must(TheBackend().AllocateHost(kBytes));
  std::memset(first->data(), 1, kBytes);
  std::memset(second->data(), 2, kBytes);
  const auto begin = TheBackend().Record();
  TheBackend().CopyFromHostAsync(device->data(), first->data(), kBytes);
  TheBackend().CopyToHostAsync(back->data(), device->data(), kBytes);
  TheBackend().CopyFromHostAsync(device->data(), second->data(), kBytes);
  const auto end = TheBackend().Record();
  ASSERT_TRUE(begin->Wait().ok());
  ASSERT_TRUE(end->Wait().ok());
  EXPECT_GE(end->MicrosecondsSince(*begin), 0);
  EXPECT_EQ(std::memcmp(back->data(), first->data(), kBytes), 0);
  std::vector<uint8_t> last(kBytes);
  ASSERT_TRUE(TheBackend().CopyToHost(last.data(), device->data(), kBytes).ok());
  EXPECT_EQ(std::memcmp(last.data(), second->data(), kBytes), 0);
}

TEST(Memory, WhatDoesNotFitIsResourceExhausted) {
#ifdef __SANITIZE_ADDRESS__
  GTEST_SKIP() << "the sanitizer ends the process";
#endif
  const auto buffer = TheBackend().Allocate(int64_t{1} << 60);
  EXPECT_EQ(buffer.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(buffer.status().message()), testing::HasSubstr("1152921504606846976"));
}

// A sealed memory of the host, as another process hands it over.
SharedMemory NewHostMemory(const std::vector<int64_t>& part_bytes) {
  SharedMemory shared;
  for (const int64_t bytes : part_bytes) {
    const MappedMemory memory = Must(MappedMemory::Create("rows_test", bytes));
    shared.parts.push_back({UniqueFd(::dup(memory.fd())), bytes});
    shared.size_bytes += bytes;
  }
  return shared;
}

TEST(Memory, OfTheHostIsMappedWithWhatItHoldsAndSharedWithItsOwner) {
  const int64_t page = ::sysconf(_SC_PAGESIZE);
  SharedMemory shared = NewHostMemory({16 * page, 3 * page});
  ASSERT_EQ(::pwrite(shared.parts[1].fd.get(), "held", 4, 0), 4);
  const UniqueFd owners(::dup(shared.parts[0].fd.get()));
  const auto buffer = Must(TheBackend().MapHostMemory(std::move(shared)));
  EXPECT_EQ(buffer->size_bytes(), 19 * page);
  char* const data = static_cast<char*>(buffer->data());
  EXPECT_EQ(std::memcmp(data + 16 * page, "held", 4), 0);
  data[16 * page - 1] = 42;
  char byte = 0;
  ASSERT_EQ(::pread(owners.get(), &byte, 1, 16 * page - 1), 1);
  EXPECT_EQ(byte, 42);
}

TEST(Memory, ThatIsNotOfItsDeviceIsNotMapped) {
  SharedMemory shared = NewHostMemory({4096});
  if (TheBackend().uses_host_memory()) shared.kind = SharedMemory::Kind::kGpu;
  EXPECT_EQ(TheBackend().MapDeviceMemory(std::move(shared)).status().code(),
            absl::StatusCode::kInvalidArgument);
}

// Large copies, and operators that would finish long before them.
TEST(CopyQueue, IsOrderedAgainstOperatorsWhereItIsAsked) {
  constexpr int64_t kFloats = int64_t{1} << 22;
  constexpr int64_t kBytes = kFloats * static_cast<int64_t>(sizeof(float));
  Backend& backend = TheBackend();
  const auto device = Must(backend.Allocate(kBytes));
  const auto other = Must(backend.Allocate(kBytes));
  const auto host = Must(backend.MapHostMemory(NewHostMemory({kBytes})));
  const auto queue = Must(backend.CreateCopyQueue());
  const Rows rows = {static_cast<float*>(device->data()), kFloats};
  const Rows others = {static_cast<float*>(other->data()), kFloats};
  auto* const floats = static_cast<float*>(host->data());
  for (int round = 1; round <= 10; ++round) {
    SCOPED_TRACE(round);
    const std::vector<float> values(kFloats, static_cast<float>(round));
    backend.CopyFromHost(other->data(), values.data(), kBytes);
    // What an operator wrote goes out.
    backend.CopyRows(others, 1, kFloats, rows);
    queue->WaitForOperators();
    queue->CopyToHost(floats, device->data(), kBytes);
    const auto out = queue->Record();
    ASSERT_TRUE(out->Wait().ok());
    EXPECT_TRUE(out->IsDone());
    EXPECT_EQ(std::count(floats, floats + kFloats, static_cast<float>(round)), kFloats);
    // What comes in is what an operator reads.
    std::fill(floats, floats + kFloats, static_cast<float>(-round));
    queue->CopyFromHost(device->data(), floats, kBytes);
    queue->HoldOperators();
    backend.CopyRows(rows, 1, kFloats, others);
    std::vector<float> back(kFloats);
    ASSERT_TRUE(backend.CopyToHost(back.data(), other->data(), kBytes).ok());
    EXPECT_EQ(std::count(back.begin(), back.end(), static_cast<float>(-round)), kFloats);
  }
}

// A table whose row r holds r * 100 + column.
std::unique_ptr<WeightMatrix> NumberedTable(formats::WeightFormat format, int64_t rows,
                                            int64_t columns) {
  formats::HostMatrix table = formats::MakeHostMatrix(format, rows, columns);
  for (int64_t i = 0; i < rows * columns; ++i) {
    const auto value = static_cast<float>(i / columns * 100 + i % columns);
    if (format == formats::WeightFormat::kFloat32) {
      table.values_f32[i] = value;
    } else {
      table.values_bf16[i] = formats::FloatToBfloat16(value);
    }
  }
  return Must(TheBackend().Pack(table, MatrixUse::kEmbedding));
}

TEST(Embed, WidensTheTokensRows) {
  const std::vector<int32_t> block = {0};
  for (const auto format : {formats::WeightFormat::kBfloat16, formats::WeightFormat::kFloat32}) {
    for (const int64_t columns : {7, 8, 384}) {
      const auto table = NumberedTable(format, 10, columns);
      const auto batch = FilledBatch(
          {.tokens = {9, 0, 9}, .rows = {{.position = 5, .length = 3, .block_table = block}}});
      const DeviceRows x(3, columns);
      TheBackend().Embed(*table, *batch, x.rows());
      const HostRows got = x.ToHost();
      for (int t = 0; t < 3; ++t) {
        for (int64_t c = 0; c < columns; ++c) {
          const auto value = static_cast<float>((t == 1 ? 0 : 900) + c);
          EXPECT_EQ(got.at(t, c), format == formats::WeightFormat::kFloat32
                                      ? value
                                      : formats::RoundToBfloat16(value));
        }
      }
    }
  }
}

// The ids of a batch's tokens, read off an embedding.
std::vector<int> TokensOf(const DeviceBatch& batch) {
  const auto table = NumberedTable(formats::WeightFormat::kFloat32, 64, 4);
  const DeviceRows x(batch.num_tokens(), 4);
  TheBackend().Embed(*table, batch, x.rows());
  const HostRows got = x.ToHost();
  std::vector<int> tokens;
  for (int64_t t = 0; t < got.rows; ++t) tokens.push_back(static_cast<int>(got.at(t, 0)) / 100);
  return tokens;
}

TEST(Batch, TokensOfSlotsAreTheIdsThatWereKeptLast) {
  const std::vector<int32_t> block = {0};
  const auto row = [&](int32_t slot, bool want_logits) {
    return BatchRow{
        .position = 3, .length = 1, .block_table = block, .want_logits = want_logits, .slot = slot};
  };
  auto batch = Must(TheBackend().CreateBatch(
      {.max_tokens = 4, .max_rows = 4, .max_blocks_per_row = 1, .num_slots = 6}));
  TheBackend().SetBatch({.tokens = {TokenOfSlot(5), 7}, .rows = {row(5, false), row(2, true)}},
                        batch.get());
  EXPECT_THAT(TokensOf(*batch), ElementsAre(0, 7));  // nothing was kept yet

  // Rows 0 and 2 of the next batch want logits; the middle one has none.
  const Batch sampled = {.tokens = {1, 2, 3}, .rows = {row(5, true), row(0, false), row(2, true)}};
  TheBackend().SetBatch(sampled, batch.get());
  EXPECT_EQ(batch->num_logit_rows(), 2);
  TheBackend().KeepIds(DeviceArray<int32_t>({41, -3}).data(), batch.get());
  TheBackend().SetBatch({.tokens = {TokenOfSlot(2), TokenOfSlot(5), TokenOfSlot(0), 9},
                         .rows = {row(2, false), row(5, true), row(0, true), row(1, false)}},
                        batch.get());
  EXPECT_THAT(TokensOf(*batch), ElementsAre(0, 41, 0, 9));  // a failed draw counts as id 0
  TheBackend().KeepIds(DeviceArray<int32_t>({12, 13}).data(), batch.get());
  TheBackend().SetBatch(
      {.tokens = {TokenOfSlot(0), TokenOfSlot(5)}, .rows = {row(0, false), row(5, false)}},
      batch.get());
  EXPECT_THAT(TokensOf(*batch), ElementsAre(13, 12));
}

TEST(Batch, ManyBatchesInARowKeepWhatOperatorsBeforeThemRead) {
  const std::vector<int32_t> block = {0};
  auto batch = Must(TheBackend().CreateBatch(
      {.max_tokens = 64, .max_rows = 1, .max_blocks_per_row = 1, .num_slots = 1}));
  const auto table = NumberedTable(formats::WeightFormat::kFloat32, 64, 4);
  constexpr int kBatches = 20;  // more than a backend keeps on the way
  std::vector<DeviceRows> outputs;
  outputs.reserve(kBatches);
  for (int i = 0; i < kBatches; ++i) outputs.emplace_back(64, 4);
  for (int i = 0; i < kBatches; ++i) {
    TheBackend().SetBatch({.tokens = std::vector<int32_t>(64, i),
                           .rows = {{.position = 0, .length = 64, .block_table = block}}},
                          batch.get());
    TheBackend().Embed(*table, *batch, outputs[i].rows());
  }
  for (int i = 0; i < kBatches; ++i) {
    const HostRows got = outputs[i].ToHost();
    for (int64_t t = 0; t < 64; ++t) ASSERT_EQ(got.at(t, 0), 100.0f * static_cast<float>(i));
  }
}

TEST(AddRmsNorm, StaysWithinItsBoundAndWritesTheSumBack) {
  std::mt19937 rng(std::random_device{}());
  constexpr float kEpsilonOfNorm = 1e-5f;
  for (const int64_t columns : {1, 7, 16, 64, 100, 384, 2560, 4096, 8192}) {
    SCOPED_TRACE(columns);
    constexpr int64_t kRows = 5;
    const HostRows x = RandomRows(kRows, columns, &rng);
    const HostRows delta = RandomRows(kRows, columns, &rng);
    const HostRows gain = RandomRows(1, columns, &rng);
    const DeviceRows device_x(x);
    const DeviceRows device_delta(delta);
    const DeviceArray<float> device_gain(gain.values);
    const DeviceRows out(kRows, columns);
    TheBackend().AddRmsNorm(device_x.rows(), device_delta.rows(), nullptr, kRows, columns,
                            device_gain.data(), kEpsilonOfNorm, out.rows());
    const HostRows sum = device_x.ToHost();
    const HostRows got = out.ToHost();
    for (int64_t r = 0; r < kRows; ++r) {
      double squares = 0;
      for (int64_t c = 0; c < columns; ++c) {
        ASSERT_EQ(sum.at(r, c), x.at(r, c) + delta.at(r, c));
        squares += double{sum.at(r, c)} * sum.at(r, c);
      }
      // The sum of squares has terms of one sign: off by gamma(columns + 1) at most, the mean and
      // the epsilon add two roundings. The root halves that; then a root, a division and two
      // products.
      const auto gamma = [](double n) { return n * 0x1p-24 / (1 - n * 0x1p-24); };
      const double relative = gamma(static_cast<double>(columns) + 3) / 2 + gamma(4);
      const double factor = 1 / std::sqrt(squares / static_cast<double>(columns) + kEpsilonOfNorm);
      for (int64_t c = 0; c < columns; ++c) {
        const double expected = sum.at(r, c) * factor * gain.at(0, c);
        ExpectWithin({expected, 1.01 * relative * std::fabs(expected)}, got.at(r, c));
      }
    }
  }
}

TEST(AddRmsNorm, RowListChoosesAndPacksRows) {
  std::mt19937 rng(std::random_device{}());
  const HostRows x = RandomRows(5, 384, &rng);
  const DeviceRows device_x(x);
  const DeviceArray<float> gain(RandomRows(1, 384, &rng).values);
  const DeviceRows all(5, 384);
  const DeviceRows chosen(2, 384);
  TheBackend().AddRmsNorm(device_x.rows(), {}, nullptr, 5, 384, gain.data(), 1e-5f, all.rows());
  TheBackend().AddRmsNorm(device_x.rows(), {}, DeviceArray<int32_t>({4, 1}).data(), 2, 384,
                          gain.data(), 1e-5f, chosen.rows());
  const HostRows expected = all.ToHost();
  const HostRows got = chosen.ToHost();
  EXPECT_TRUE(std::equal(got.row(0), got.row(1), expected.row(4)));
  EXPECT_TRUE(std::equal(got.row(1), got.row(2), expected.row(1)));
  EXPECT_EQ(device_x.ToHost().values, x.values);
}

TEST(RopeAngles, AreSinesAndCosinesOfTheFloat32Angle) {
  const std::vector<int32_t> blocks(131072 / kKvBlockTokens);
  Batch tokens;
  for (int32_t p = 0; p < 131072; p = p * 2 + 1) {
    tokens.tokens.push_back(0);
    tokens.rows.push_back({.position = p, .length = 1, .block_table = blocks});
  }
  const auto batch = FilledBatch(tokens);
  for (const int head_dim : {64, 128}) {
    for (const float ratio : {1.0f, 4.0f}) {
      const DeviceRows cos_sin(batch->num_tokens(), head_dim);
      TheBackend().RopeAngles(*batch, head_dim, 500000.0f, ratio, cos_sin.rows());
      const HostRows got = cos_sin.ToHost();
      for (int64_t t = 0; t < got.rows; ++t) {
        for (int j = 0; j < head_dim / 2; ++j) {
          const auto frequency = static_cast<float>(std::pow(500000.0, -2.0 * j / head_dim));
          const float angle = static_cast<float>(tokens.rows[t].position) / ratio * frequency;
          EXPECT_NEAR(got.at(t, j), std::cos(double{angle}), Errors().sine);
          EXPECT_NEAR(got.at(t, head_dim / 2 + j), std::sin(double{angle}), Errors().sine);
        }
      }
    }
  }
}

TEST(CopyRows, MovesARectangleAndNothingElse) {
  std::mt19937 rng(std::random_device{}());
  const HostRows from = RandomRows(6, 40, &rng);
  const HostRows to = RandomRows(6, 24, &rng);
  const DeviceRows device_from(from);
  const DeviceRows device_to(to);
  // Columns 30 … 39 of rows 1 … 4 to columns 3 … 12 of rows 2 … 5.
  TheBackend().CopyRows({device_from.rows().row(1) + 30, device_from.rows().stride}, 4, 10,
                        {device_to.rows().row(2) + 3, device_to.rows().stride});
  const HostRows got = device_to.ToHost();
  for (int64_t r = 0; r < 6; ++r) {
    for (int64_t c = 0; c < 24; ++c) {
      const bool copied = r >= 2 && c >= 3 && c < 13;
      EXPECT_EQ(got.at(r, c), copied ? from.at(r - 1, c + 27) : to.at(r, c)) << r << " " << c;
    }
  }
}

}  // namespace
}  // namespace wintserve::kernels
