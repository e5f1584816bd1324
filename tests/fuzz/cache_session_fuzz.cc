// A hostile client of the cache manager that knows the token: requests of two streams that break,
// end and take over, checked from outside after each. The input is a list of actions. The first
// byte's lowest bit names the stream, the next four bits the action, see enum Action.
#include <algorithm>
#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "cache_manager/memory/host_pool_memory.h"
#include "cache_manager/memory/memory_server.h"
#include "cache_manager/service/pool_owner.h"
#include "common/check.h"
#include "common/status_macros.h"
#include "tests/fuzz/fuzz_target.h"
#include "tests/fuzz/input_dir.h"

namespace wintserve {
namespace {

constexpr uint32_t kMaxBlocks = 64;
// In an input the open pool's is 1.
constexpr uint64_t kFirstEpoch = 1000;

// Every byte string is a list of these. What follows the first byte, each a byte:
//
//   LIST      a count, modulo 8, and as many elements
//   TOKENS    a LIST of tokens, modulo 3
//   BLOCK     its id, modulo 16; with the highest bit of a stale generation, otherwise of the
//             newest one that a reply has named
//   ENTRY     0: none; otherwise one that a reply has named, counted from 1
//   COPY      likewise
//   STEP      modulo 8
enum Action : uint8_t {
  kRawRequest = 0,  // length, and so many bytes of a CacheRequest
  kRawAdmin,        // the same of an AdminRequest
  kBreakStream,     // it is opened anew
  kWait,            // 3 seconds
  kOpen,            // bits, see OpenFrom, and the pool's size
  kPeek,            // bit 0: with a salt; TOKENS
  kMatch,           // bit 0: with a salt, bit 1: allow_restore; TOKENS
  kLease,           // how many, modulo 8
  kCommit,          // bit 0: with a salt; parent ENTRY; BLOCK LIST; TOKENS; STEP
  kRelease,         // ENTRY LIST
  kReturnBlocks,    // BLOCK LIST
  kCopyDone,        // COPY LIST, STEP
  kReconcile,       // LIST of ENTRY and count modulo 4; BLOCK LIST; last COPY
  kFence,
  kDistrustSteps,  // STEP
  kPing,
};
constexpr int kNumActions = kPing + 1;

MemoryServer* SharedMemoryServer() {
  static const InputDir* const dir = new InputDir;
  static MemoryServer* const server = [] {
    auto started = MemoryServer::Start(dir->path() / "memory.sock", "token");
    CHECK(started.ok(), "{}", started.status().ToString());
    return started->release();
  }();
  return server;
}

// As on a machine with little memory.
absl::StatusOr<std::unique_ptr<PoolMemory>> MakeSmallMemory(const PoolSize& size,
                                                            int64_t available_bytes) {
  if (size.num_blocks > kMaxBlocks || size.num_host_slots > kMaxBlocks) {
    return absl::ResourceExhaustedError("more blocks than this test's machine has");
  }
  ASSIGN_OR_RETURN(auto memory, HostPoolMemory::Create(size, available_bytes));
  return memory;
}

class Input {
 public:
  explicit Input(std::string_view bytes) : bytes_(bytes) {}
  bool empty() const { return bytes_.empty(); }
  uint8_t TakeByte() {
    if (bytes_.empty()) return 0;
    const uint8_t byte = static_cast<uint8_t>(bytes_.front());
    bytes_.remove_prefix(1);
    return byte;
  }
  std::string Take(size_t count) {
    std::string taken(bytes_.substr(0, count));
    bytes_.remove_prefix(taken.size());
    return taken;
  }
  template <typename Message>
  bool TakeMessage(Message* message) {
    return message->ParseFromString(Take(TakeByte()));
  }

 private:
  std::string_view bytes_;
};

// What the replies have named, which no guess would find.
class Seen {
 public:
  void Add(const proto::CacheReply& reply) {
    for (const proto::Block& block : reply.leased().blocks()) {
      uint32_t& newest = generations_[block.id()];
      CHECK(block.generation() >= newest, "block {}: generation {} after {}", block.id(),
            block.generation(), newest);
      newest = block.generation();
    }
    for (const auto* pinned : {&reply.matched().device(), &reply.matched().restoring()}) {
      for (const proto::PinnedBlock& one : *pinned) {
        Remember(one.entry(), &entries_);
        generations_[one.block().id()] = one.block().generation();
      }
    }
    for (const uint64_t entry : reply.committed().entry()) Remember(entry, &entries_);
    for (const auto* copies : {&reply.matched().copies(), &reply.copy_out().copies()}) {
      for (const proto::Copy& copy : *copies) Remember(copy.copy_id(), &copies_);
    }
  }

  void TakeBlock(Input* input, proto::Block* block) {
    const uint8_t byte = input->TakeByte();
    block->set_id(byte % 16);
    const bool is_stale = (byte & 0x80) != 0;
    block->set_generation(generations_[block->id()] - (is_stale ? 1 : 0));
  }
  uint64_t TakeEntry(Input* input) const { return Choose(entries_, input->TakeByte()); }
  uint64_t TakeCopy(Input* input) const { return Choose(copies_, input->TakeByte()); }

 private:
  static void Remember(uint64_t id, std::vector<uint64_t>* ids) {
    if (id != 0 && std::find(ids->begin(), ids->end(), id) == ids->end()) ids->push_back(id);
  }
  static uint64_t Choose(const std::vector<uint64_t>& ids, uint8_t byte) {
    if (byte == 0) return 0;
    return byte <= ids.size() ? ids[byte - 1] : byte;
  }

  std::map<uint32_t, uint32_t> generations_;  // by block
  std::vector<uint64_t> entries_;
  std::vector<uint64_t> copies_;
};

template <typename Element>
void TakeList(Input* input, Element take_element) {
  for (int left = input->TakeByte() % 8; left > 0; --left) take_element();
}

void TakeTokens(Input* input, google::protobuf::RepeatedField<uint32_t>* tokens) {
  TakeList(input, [&] { tokens->Add(input->TakeByte() % 3); });
}

// A watcher that falls behind is the server's matter, not the owner's.
class Watcher final : public CacheWatcher {
 public:
  void OnEvent(std::shared_ptr<const proto::CacheEvent> event) override {
    CHECK(event->kind() != proto::CacheEvent::KIND_UNSPECIFIED && event->entry() != 0);
  }
  void OnLostEvents() override {}
};

class Sessions {
 public:
  // Random epochs would make every run look new to the fuzzer.
  Sessions()
      : owner_(
            SharedMemoryServer(), "", &MakeSmallMemory, [this] { return now_; },
            [this] { return kFirstEpoch + num_pools_++; }) {
    for (uint64_t& id : ids_) id = owner_.NewSession();
    CHECK(owner_.Watch(&watcher_).ok());
  }
  ~Sessions() {
    for (const uint64_t id : ids_) owner_.EndSession(id);
    CheckState();
    owner_.Unwatch(&watcher_);
  }

  void Act(Input* input) {
    const uint8_t byte = input->TakeByte();
    uint64_t& id = ids_[byte & 1];
    const Action action = static_cast<Action>((byte >> 1) % kNumActions);
    switch (action) {
      case kRawAdmin: {
        proto::AdminRequest request;
        if (input->TakeMessage(&request)) owner_.Admin(request).IgnoreError();
        break;
      }
      case kBreakStream:
        owner_.SuspendSession(id);
        id = owner_.NewSession();
        break;
      case kWait:
        now_ += std::chrono::seconds(3);
        owner_.EndExpiredSession();
        break;
      default: {
        proto::CacheRequest request;
        if (TakeRequest(action, input, &request)) Request(id, &request);
      }
    }
    CheckState();
  }

 private:
  bool TakeRequest(Action action, Input* input, proto::CacheRequest* request) {
    if (action == kRawRequest) return input->TakeMessage(request);
    request->set_seq(++seq_);
    switch (action) {
      case kOpen:
        TakeOpen(input, request->mutable_open());
        break;
      case kPeek: {
        proto::Peek* const peek = request->mutable_peek();
        if ((input->TakeByte() & 1) != 0) peek->set_salt("s");
        TakeTokens(input, peek->mutable_tokens());
        break;
      }
      case kMatch: {
        proto::Match* const match = request->mutable_match();
        const uint8_t bits = input->TakeByte();
        if ((bits & 1) != 0) match->set_salt("s");
        match->set_allow_restore((bits & 2) != 0);
        TakeTokens(input, match->mutable_tokens());
        break;
      }
      case kLease:
        request->mutable_lease()->set_count(input->TakeByte() % 8);
        break;
      case kCommit: {
        proto::Commit* const commit = request->mutable_commit();
        if ((input->TakeByte() & 1) != 0) commit->set_salt("s");
        commit->set_parent(seen_.TakeEntry(input));
        TakeBlocks(input, commit->mutable_blocks());
        TakeTokens(input, commit->mutable_tokens());
        commit->set_step(TakeStep(input));
        break;
      }
      case kRelease:
        TakeList(input, [&] { request->mutable_release()->add_entries(seen_.TakeEntry(input)); });
        break;
      case kReturnBlocks:
        TakeBlocks(input, request->mutable_return_blocks()->mutable_blocks());
        break;
      case kCopyDone: {
        proto::CopyDone* const done = request->mutable_copy_done();
        TakeList(input, [&] { done->add_copy_ids(seen_.TakeCopy(input)); });
        done->set_step(TakeStep(input));
        break;
      }
      case kReconcile: {
        proto::Reconcile* const held = request->mutable_reconcile();
        TakeList(input, [&] {
          held->add_pinned_entry(seen_.TakeEntry(input));
          held->add_pin_count(input->TakeByte() % 4);
        });
        TakeBlocks(input, held->mutable_leased());
        held->set_last_copy_id(seen_.TakeCopy(input));
        break;
      }
      case kFence:
        request->mutable_fence();
        break;
      case kDistrustSteps:
        request->mutable_distrust_steps()->set_first_step(TakeStep(input));
        break;
      default:
        request->mutable_ping();
    }
    return true;
  }

  static uint64_t TakeStep(Input* input) { return input->TakeByte() % 8; }

  void TakeBlocks(Input* input, google::protobuf::RepeatedPtrField<proto::Block>* blocks) {
    TakeList(input, [&] { seen_.TakeBlock(input, blocks->Add()); });
  }

  static void TakeOpen(Input* input, proto::OpenPool* open) {
    const uint8_t bits = input->TakeByte();
    open->set_api_epoch((bits & 1) != 0 ? 8 : 7);
    open->set_resume_only((bits & 2) != 0);
    if ((bits & 4) != 0) open->set_adopt_pool_epoch(1);
    open->set_root_seed((bits & 8) != 0 ? "n" : "m");
    open->add_block_bytes_by_rank(4096);
    if ((bits & 16) != 0) open->add_block_bytes_by_rank(4096);
    open->set_adopt_any((bits & 32) != 0);
    const uint8_t size = input->TakeByte();
    open->set_num_blocks(size % 16);
    open->set_host_bytes(4096 * ((size >> 4) % 8));
    open->set_block_size_tokens(1 + (size >> 7));
  }

  void Request(uint64_t id, proto::CacheRequest* request) {
    const proto::StatsReply before = owner_.Stats();
    if (request->open().adopt_pool_epoch() == 1) {
      request->mutable_open()->set_adopt_pool_epoch(before.pool_epoch());
    }
    const std::vector<proto::CacheReply> replies = owner_.Handle(id, *request);
    CHECK(!replies.empty() && replies.size() <= 2, "{}", replies.size());
    CHECK(replies[0].reply_case() != proto::CacheReply::REPLY_NOT_SET);
    CHECK(replies[0].seq() == request->seq());
    proto::StatsReply after = owner_.Stats();
    if (after.pool_epoch() != before.pool_epoch()) seen_ = {};
    for (const proto::CacheReply& reply : replies) seen_.Add(reply);
    if (!replies[0].has_refusal()) return;
    const proto::Refusal& refusal = replies[0].refusal();
    CHECK(replies.size() == 1 && refusal.status_code() != 0);
    CHECK(refusal.status_code() != static_cast<uint32_t>(absl::StatusCode::kInternal), "{}",
          refusal.text());
    // It has changed nothing, but that a pool without a session makes room for another one.
    if (request->has_open() && after.pool_epoch() == 0) return;
    after.set_refused_stale(before.refused_stale());
    CHECK(after.SerializeAsString() == before.SerializeAsString(), "{}: {} became {}",
          refusal.text(), before.ShortDebugString(), after.ShortDebugString());
  }

  void CheckState() {
    const absl::Status status = owner_.CheckInvariants();
    CHECK(status.ok(), "{}", status.ToString());
    const proto::StatsReply stats = owner_.Stats();
    const uint32_t sum = stats.num_free() + stats.num_leased() + stats.num_committed_pinned() +
                         stats.num_committed_unpinned() + stats.num_restoring() +
                         stats.num_copying_out() + stats.num_quarantined();
    CHECK(sum == stats.num_blocks(), "{} of {} blocks have a state", sum, stats.num_blocks());
    const uint32_t host = stats.num_host_free() + stats.num_host_filling() +
                          stats.num_host_valid() + stats.num_host_quarantined();
    CHECK(host == stats.num_host_slots(), "{} of {} slots", host, stats.num_host_slots());
  }

  PoolOwner::Clock::time_point now_{};
  uint64_t num_pools_ = 0;
  PoolOwner owner_;
  Watcher watcher_;
  Seen seen_;
  uint64_t seq_ = 0;
  uint64_t ids_[2] = {};
};

}  // namespace

void FuzzInput(std::string_view bytes) {
  Sessions sessions;
  Input input(bytes);
  while (!input.empty()) sessions.Act(&input);
}

}  // namespace wintserve
