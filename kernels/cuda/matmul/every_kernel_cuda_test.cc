// Every kernel of the weight products once, on products so small that compute-sanitizer's racecheck
// gets through each within seconds, and so shaped that a block has several items and its rings run
// round. The result: the bits of the kernels that PlanProduct chooses.
#include <gtest/gtest.h>

#include <algorithm>
#include <cctype>
#include <ostream>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/cuda/matmul/matmul_cuda_test_util.h"
#include "kernels/plan/random_weights_test_util.h"
#include "kernels/plan/weight_layout.h"

namespace wintserve::kernels::cuda {
namespace {

using formats::KOrder;
using formats::WeightFormat;
using plan::ProductKernel;

// Few, so that a block of them has several items.
constexpr int kMultiprocessors = 3;
// 19 tiles of 16 columns, the last one partly filled.
constexpr int64_t kColumns = 300;

// The first k whose longest resident slice has `slice_chunks` chunks, of several; 0: there is none.
constexpr int64_t ResidentK(int slice_chunks) {
  for (int64_t chunks = 1; plan::IsResident(WeightFormat::kWint2, chunks); ++chunks) {
    const int slices = plan::ResidentSlices(chunks);
    if (slices > 1 && plan::DivideUp(chunks, int64_t{slices}) == slice_chunks) {
      return chunks * plan::kChunkRows;
    }
  }
  return 0;
}

// Two slices of the stream kernel at least; of WINT2 beyond what is resident.
constexpr int64_t StreamK(WeightFormat format) {
  int64_t chunks = 1;
  while (plan::IsResident(format, chunks) || plan::StreamSlices(chunks) < 2) ++chunks;
  return chunks * plan::kChunkRows;
}

template <int kStageChunks>
plan::ProductPlan Cached(const plan::ProductShape& shape, int num_multiprocessors) {
  return plan::CachedPlan(shape, num_multiprocessors, kStageChunks);
}

struct KernelCase {
  std::string name;
  WeightFormat format;
  int64_t k;
  NamedPlanner planner;
  std::vector<int64_t> rows;
};

void PrintTo(const KernelCase& c, std::ostream* os) { *os << c.name; }

std::string NameOf(const char* format, const char* kernel) {
  std::string name = format;
  for (const char* c = kernel; *c != '\0'; ++c) {
    if (std::isalnum(static_cast<unsigned char>(*c)) != 0) name += *c;
  }
  return name;
}

std::vector<KernelCase> Cases() {
  // Up to 8 tokens and what takes two and three tiles of them; tiles that are full and the next.
  const std::vector<int64_t> few = {1, 5, 8, 17};
  const std::vector<int64_t> more = {9, 65};
  const std::vector<int64_t> many = {9, 65, 130};
  const NamedPlanner stream = kForcedPlanners[0];
  std::vector<KernelCase> cases;
  for (int slice_chunks = 1; slice_chunks <= plan::kResidentChunks; ++slice_chunks) {
    cases.push_back({"Wint2Resident" + std::to_string(slice_chunks), WeightFormat::kWint2,
                     ResidentK(slice_chunks), stream, few});
  }
  const int64_t beyond = StreamK(WeightFormat::kWint2);
  cases.push_back({"Wint2Cached1", WeightFormat::kWint2, beyond, {"", Cached<1>}, few});
  cases.push_back({"Wint2Cached2", WeightFormat::kWint2, beyond, {"", Cached<2>}, few});
  cases.push_back({"Wint2Stream2",
                   WeightFormat::kWint2,
                   beyond,
                   {"", ForcedPlan<ProductKernel::kStream, 1, 2, false>},
                   few});
  const struct {
    const char* name;
    WeightFormat format;
  } formats[] = {{"Wint2", WeightFormat::kWint2},
                 {"Wint4", WeightFormat::kWint4},
                 {"Wint8", WeightFormat::kWint8},
                 {"Bfloat16", WeightFormat::kBfloat16}};
  for (const auto& format : formats) {
    for (const NamedPlanner& planner : kForcedPlanners) {
      if (std::string_view(planner.name) == "portable") continue;
      const bool is_stream = planner.planner == stream.planner;
      cases.push_back({NameOf(format.name, planner.name), format.format, StreamK(format.format),
                       planner,
                       is_stream                          ? few
                       : planner.wgmma_planner != nullptr ? many
                                                          : more});
    }
  }
  return cases;
}

class EveryKernel : public testing::TestWithParam<KernelCase> {};

TEST_P(EveryKernel, HasTheBitsOfTheChosenOne) {
  const KernelCase& c = GetParam();
  if (!c.planner.IsOfThisGpu()) GTEST_SKIP() << "compute capability 9.0 only";
  ASSERT_GT(c.k, 0) << "no length of k has such slices";
  std::mt19937 rng(11);
  const TestMatrix w = MakeTestMatrix(
      plan::ExactlyPackedMatrix(c.format, c.k, kColumns, KOrder::kMma64, &rng), false);
  const int64_t most = c.rows.back();
  const DeviceArray<float> x(RandomRows(most * c.k, &rng));
  const auto run = [&](const MatmulOptions& options, int64_t rows) {
    DeviceArray<float> y(rows * kColumns);
    y.Poison(TheStream());
    DeviceArray<uint8_t> workspace(LinearWorkspaceBytes(options, w.device.layout, rows));
    workspace.Poison(TheStream());
    LinearArgs args;
    args.x = {x.data(), c.k};
    args.num_rows = rows;
    args.w = &w.device;
    args.y = {y.data(), kColumns};
    LaunchLinear(options, args, workspace.data(), TheStream());
    return y.Download(TheStream());
  };
  const std::vector<float> expected = run(OptionsFor({"portable", plan::PlanProduct}), most);
  MatmulOptions options = OptionsFor(c.planner);
  options.num_multiprocessors = kMultiprocessors;
  for (const int64_t rows : c.rows) {
    const std::vector<float> got = run(options, rows);
    ASSERT_TRUE(std::equal(got.begin(), got.end(), expected.begin())) << rows << " rows";
  }
}

INSTANTIATE_TEST_SUITE_P(Products, EveryKernel, testing::ValuesIn(Cases()),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace wintserve::kernels::cuda
