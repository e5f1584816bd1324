// What tests of a Worker give it: a configuration, a pool, and memory as the cache manager would.
#pragma once

#include <unistd.h>

#include <cstdint>

#include "absl/status/statusor.h"
#include "api_server/work_queue/messages.h"
#include "common/check.h"
#include "common/mapped_memory.h"
#include "common/shared_memory.h"
#include "tests/fakes/fake_model.h"

namespace wintserve {

inline const ConfigureWorker kConfigure = {
    .group_epoch = 3,
    .world_size = 1,
    .max_slots = 2,
    .max_tokens = 64,
    .max_sequence_tokens = 128,
    .sampled_vocab_size = testing_fakes::FakeModel::kVocabSize};
inline const AttachPool kAttachPool = {.pool_epoch = 4, .memory_socket = "unused", .num_blocks = 8};

// As the cache manager hands it out.
inline absl::StatusOr<SharedMemory> NewMemory(const char* name, int64_t size_bytes) {
  const auto memory = MappedMemory::Create(name, size_bytes);
  CHECK(memory.ok(), "{}", memory.status().ToString());
  SharedMemory shared = {.size_bytes = size_bytes, .parts = {}};
  shared.parts.push_back({UniqueFd(::dup(memory->fd())), size_bytes});
  return shared;
}

inline absl::StatusOr<SharedMemory> NewPool(const AttachPool& attach) {
  return NewMemory("worker_test", int64_t{attach.num_blocks} *
                                      testing_fakes::FakeModel::kBlockTokens * sizeof(int32_t));
}

inline absl::StatusOr<SharedMemory> NewHostTier(const AttachPool& attach) {
  return NewMemory("worker_test", int64_t{attach.num_host_slots} *
                                      testing_fakes::FakeModel::kBlockTokens * sizeof(int32_t));
}

inline absl::StatusOr<SharedMemory> PoolIsGone(const AttachPool&) {
  return absl::NotFoundError("pool_epoch 0x4 is not the pool that is open");
}

}  // namespace wintserve
