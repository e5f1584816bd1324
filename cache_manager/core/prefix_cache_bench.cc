// What a long prompt costs the cache manager: range(0) blocks of 64 tokens.
#include <benchmark/benchmark.h>

#include <numeric>
#include <vector>

#include "cache_manager/core/prefix_cache.h"

namespace wintserve {
namespace {

constexpr int kBlockSizeTokens = 64;

class StoredPrompt {
 public:
  explicit StoredPrompt(uint32_t num_blocks)
      : cache_({.num_blocks = num_blocks,
                .num_host_slots = num_blocks,
                .block_size_tokens = kBlockSizeTokens,
                .root_seed = "model"}),
        prompt_(num_blocks * kBlockSizeTokens + 1) {
    std::iota(prompt_.begin(), prompt_.end(), 0);
    request_.blocks.resize(num_blocks);
    for (uint32_t i = 0; i < num_blocks; ++i) {
      const auto begin = prompt_.begin() + i * kBlockSizeTokens;
      request_.blocks[i].tokens.assign(begin, begin + kBlockSizeTokens);
    }
  }

  void Lease() {
    const auto leased = *cache_.Lease(static_cast<uint32_t>(request_.blocks.size()));
    for (size_t i = 0; i < leased.size(); ++i) request_.blocks[i].block = leased[i];
  }
  void Commit() {
    entries_.clear();
    const auto result = cache_.Commit(request_);
    for (const CommittedBlock& committed : *result) entries_.push_back(committed.entry);
  }
  void Match() {
    entries_.clear();
    for (const PinnedBlock& hit : cache_.Match("", prompt_, true).device) {
      entries_.push_back(hit.entry);
    }
  }
  void Release() { (void)cache_.Release(entries_); }

 private:
  PrefixCache cache_;
  std::vector<int32_t> prompt_;
  CommitRequest request_;
  std::vector<uint64_t> entries_;
};

// Every lease evicts what the round before has stored.
void BM_LeaseCommitRelease(benchmark::State& state) {
  StoredPrompt prompt(static_cast<uint32_t>(state.range(0)));
  for (auto _ : state) {
    prompt.Lease();
    prompt.Commit();
    prompt.Release();
  }
}
BENCHMARK(BM_LeaseCommitRelease)->Arg(100)->Arg(1600)->Unit(benchmark::kMicrosecond);

void BM_MatchRelease(benchmark::State& state) {
  StoredPrompt prompt(static_cast<uint32_t>(state.range(0)));
  prompt.Lease();
  prompt.Commit();
  prompt.Release();
  for (auto _ : state) {
    prompt.Match();
    prompt.Release();
  }
}
BENCHMARK(BM_MatchRelease)->Arg(100)->Arg(1600)->Unit(benchmark::kMicrosecond);

}  // namespace
}  // namespace wintserve

BENCHMARK_MAIN();
