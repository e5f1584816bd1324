// The sampling kernels on an emulated GPU against the CPU's sampler: where a row is divided among
// the blocks of a cluster, where it is not, with and without its logits in shared memory.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "kernels/cpu/sampling.h"
#include "kernels/cpu/sampling_test_util.h"
#include "kernels/cpu/token_counts.h"
#include "kernels/cuda/emulation/emulated_device.h"
#include "kernels/cuda/sampling/logprob_kernel.cuh"
#include "kernels/cuda/sampling/logprobs_test_util.h"
#include "kernels/cuda/sampling/row_selection.cuh"
#include "kernels/cuda/sampling/sample_kernel.cuh"
#include "kernels/cuda/sampling/sampling_test_util.h"
#include "kernels/plan/sampling_plan.h"

namespace wintserve::kernels::cuda {
namespace {

using cpu::TestRequest;

// What a DeviceArray is on a GPU.
template <typename T>
class HostArray {
 public:
  explicit HostArray(size_t size) : values_(size) {
    if (size > 0) std::memset(static_cast<void*>(values_.data()), 0xff, size * sizeof(T));
  }
  explicit HostArray(const std::vector<T>& values) : values_(values) {}
  T* data() const { return const_cast<T*>(values_.data()); }  // as device memory: not ours to guard
  void Set(const std::vector<T>& values) {
    std::copy(values.begin(), values.end(), values_.begin());
  }
  std::vector<T> Get() const { return values_; }

 private:
  std::vector<T> values_;
};
using HostRows = TestRows<HostArray>;

struct Division {
  const char* name;
  int blocks_per_row;
  int shared_bytes;  // of a block
};

class EmulatedRows : public testing::TestWithParam<Division> {
 protected:
  template <typename Args, typename Kernel>
  void Launch(const Args& args, const Kernel& kernel) {
    const plan::SamplingDevice device = {.num_sms = 1 << 20,
                                         .max_shared_bytes_per_block = GetParam().shared_bytes,
                                         .max_shared_bytes_per_sm = 228 << 10,
                                         .max_blocks_per_row = GetParam().blocks_per_row,
                                         .min_ids_per_block = 1};
    const plan::SamplingPlan plan =
        plan::PlanSampling(args.num_rows, args.vocabulary, kSelectionBytes, device);
    Emulate({.num_blocks = args.num_rows * plan.blocks_per_row,
             .blocks_per_cluster = plan.blocks_per_row,
             .threads_per_block = plan::kSamplingThreads,
             .shared_bytes = plan.shared_bytes(),
             .seed = ++seed_},
            [&] { kernel(args, plan); });
  }

  std::vector<int32_t> Sample(HostRows* rows) {
    Launch(rows->args(),
           [](const SamplingArgs& args, const plan::SamplingPlan& plan) { SampleRow(args, plan); });
    return rows->ids().Get();
  }

  LogprobOutputs ReadLogprobs(const LogprobRequests& requests) {
    return ReadLogprobsOf<HostArray>(requests, [this](const LogprobArgs& all_args) {
      Launch(all_args, [](const LogprobArgs& args, const plan::SamplingPlan& plan) {
        LogprobsOfRow(args, plan);
      });
    });
  }

 private:
  uint32_t seed_ = 0;
};
INSTANTIATE_TEST_SUITE_P(Divisions, EmulatedRows,
                         testing::Values(Division{"OneBlock", 1, 227 << 10},
                                         Division{"OneBlockThatCachesNothing", 1, 0},
                                         Division{"TwoBlocks", 2, 227 << 10},
                                         Division{"EightBlocks", 8, 227 << 10}),
                         [](const auto& info) { return info.param.name; });

TEST_P(EmulatedRows, DrawTheIdsThatTheCpuDraws) {
  std::mt19937 random(1);
  const int num_rows = GetParam().blocks_per_row < 8 ? 24 : 12;  // of 4096 threads each
  for (const int size : {1, 129, 1025, 2500}) {
    // Padding of 1: rows are not aligned to 16 bytes.
    const std::vector<TestRequest> requests = RandomRequests(num_rows, size, &random);
    HostRows rows(requests, /*padding=*/size % 2);
    ExpectCpuIds(requests, Sample(&rows));
    if (HasFailure()) return;
  }
}

TEST_P(EmulatedRows, DrawTheIdsThatTheCpuDrawsFromTheWholeVocabulary) {
  std::mt19937 random(2);
  const std::vector<TestRequest> requests = RandomRequests(12, 103'424, &random);
  HostRows rows(requests, /*padding=*/16);
  ExpectCpuIds(requests, Sample(&rows));
}

TEST_P(EmulatedRows, ReportTheLowestIdWhoseLogitIsNotFinite) {
  for (const int bad : {0, 700, 998}) {
    TestRequest r;
    r.logits = cpu::RandomLogits(1000, 2, 1);
    r.logits[bad] = std::numeric_limits<float>::quiet_NaN();
    r.logits[999] = -std::numeric_limits<float>::infinity();
    HostRows rows({r});
    EXPECT_EQ(Sample(&rows)[0], -1 - bad);
    EXPECT_EQ(rows.last_ids().Get()[rows.SlotOf(0)], 0);
  }
}

TEST_P(EmulatedRows, CountTheTokensThatTheyDraw) {
  TestRequest r;
  r.logits = cpu::RandomLogits(600, 2, 3);
  r.scalars = {.temperature = 0.7f,
               .top_p = 0.9f,
               .penalties = {.repetition = 1.3f, .presence = 0.4f, .frequency = 0.3f}};
  HostRows rows({r});
  cpu::Sampler sampler;
  cpu::TokenCounts counts;
  for (uint32_t step = 0; step < 20; ++step) {
    rows.host_rows()[0].position = step;
    rows.UploadRows();
    cpu::SampleRequest request = r.Request();
    request.position = step;
    request.occurrences = counts.occurrences();
    const auto expected = sampler.Sample(r.logits, request);
    ASSERT_TRUE(expected.ok());
    ASSERT_EQ(Sample(&rows)[0], *expected) << step;
    counts.AddGenerated(*expected);
  }
}

TEST_P(EmulatedRows, ReadTheLogprobsOfGivenIdsThatTheCpuReads) {
  std::mt19937 random(5);
  for (const int size : {1, 1000}) {
    LogprobRequests requests = RandomLogprobRequests(8, size, &random);
    requests.num_top.assign(8, 3);
    const LogprobOutputs got = ReadLogprobsOf<HostArray>(requests, [&](LogprobArgs args) {
      args.rows = nullptr;
      args.num_top = 3;
      Launch(args, [](const LogprobArgs& all_args, const plan::SamplingPlan& plan) {
        LogprobsOfRow(all_args, plan);
      });
    });
    ExpectCpuLogprobs(requests, got);
    if (HasFailure()) return;
  }
}

TEST_P(EmulatedRows, AnIdBeyondTheVocabularyComesAfterAllOthers) {
  const LogprobOutputs got = ReadLogprobs({{cpu::RandomLogits(1000, 2, 1)}, {1000}, {2}});
  EXPECT_EQ(got.logprobs[0], -std::numeric_limits<float>::infinity());
  EXPECT_EQ(got.ranks[0], 1001);
  EXPECT_GE(got.top_ids[1], 0);
}

TEST_P(EmulatedRows, ReadTheLogprobsThatTheCpuReads) {
  std::mt19937 random(4);
  for (const int size : {1, 19, 1000, 4000}) {
    const LogprobRequests requests = RandomLogprobRequests(12, size, &random);
    ExpectCpuLogprobs(requests, ReadLogprobs(requests));
    if (HasFailure()) return;
  }
}

}  // namespace
}  // namespace wintserve::kernels::cuda
