// A PoolOwner that is spoken to in text-format messages, on a clock of the test's own.
#pragma once

#include <fmt/format.h>
#include <google/protobuf/text_format.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "cache_manager/service/pool_owner.h"

namespace wintserve {

inline constexpr uint64_t kMe = 1;  // session ids
inline constexpr uint64_t kLater = 2;

inline proto::CacheRequest Parse(const std::string& text) {
  proto::CacheRequest request;
  EXPECT_TRUE(google::protobuf::TextFormat::ParseFromString(text, &request)) << text;
  return request;
}

class Watcher : public CacheWatcher {
 public:
  void OnEvent(std::shared_ptr<const proto::CacheEvent> event) override {
    const char* const kind = event->kind() == proto::CacheEvent::KIND_STORED    ? "+"
                             : event->kind() == proto::CacheEvent::KIND_REMOVED ? "-"
                                                                                : "~";
    kinds += fmt::format("{}{} ", kind, event->entry());
  }
  void OnLostEvents() override { ++num_lost; }

  std::string kinds;
  int num_lost = 0;
};

class PoolOwnerTest : public testing::Test {
 protected:
  PoolOwnerTest() {
    auto server =
        MemoryServer::Start(testing::TempDir() + "/owner_" + std::to_string(::getpid()), "token");
    EXPECT_TRUE(server.ok()) << server.status();
    memory_server_ = *std::move(server);
    StartOwner();
  }

  void StartOwner(const std::string& resize_path = "") {
    owner_ = std::make_unique<PoolOwner>(memory_server_.get(), resize_path, make_memory_,
                                         [this] { return now_; });
  }

  std::vector<proto::CacheReply> HandleAll(uint64_t session, const std::string& text) {
    return owner_->Handle(session, Parse(text));
  }
  proto::CacheReply Handle(uint64_t session, const std::string& text) {
    return HandleAll(session, text)[0];
  }
  // The refusal's text; empty: done.
  std::string Refusal(uint64_t session, const std::string& text) {
    return Handle(session, text).refusal().text();
  }
  void Open(uint64_t session = kMe, const std::string& more = "") {
    ASSERT_EQ(Refusal(session, kOpen + more + "}"), "");
  }
  // 4 blocks of 2 tokens.
  static constexpr char kOpen[] =
      "open { api_epoch: 10 num_blocks: 4 block_bytes_by_rank: 4096 block_size_tokens: 2 ";

  // Leases `count` blocks and commits them as tokens 0, 1, 2, …; returns their entries.
  std::vector<uint64_t> Store(uint64_t session, int count, uint64_t step = 0) {
    const auto leased = Handle(session, fmt::format("lease {{ count: {} }}", count));
    EXPECT_EQ(leased.leased().blocks_size(), count) << leased.DebugString();
    std::string commit = fmt::format("commit {{ step: {} ", step);
    for (const auto& block : leased.leased().blocks()) {
      commit += fmt::format("blocks {{ id: {} generation: {} }}", block.id(), block.generation());
    }
    for (int i = 0; i < 2 * count; ++i) commit += fmt::format(" tokens: {}", i);
    const auto committed = Handle(session, commit + "}");
    EXPECT_EQ(committed.refusal().text(), "");
    return {committed.committed().entry().begin(), committed.committed().entry().end()};
  }
  static std::string Release(const std::vector<uint64_t>& entries) {
    std::string text = "release {";
    for (const uint64_t entry : entries) text += fmt::format(" entries: {}", entry);
    return text + "}";
  }

  static std::string CopyDone(const proto::CacheReply& push) {
    std::string text = "copy_done {";
    for (const auto& copy : push.copy_out().copies()) {
      text += fmt::format(" copy_ids: {}", copy.copy_id());
    }
    return text + "}";
  }

  PoolMemoryMaker make_memory_ = &HostPoolMemory::Create;
  PoolOwner::Clock::time_point now_;
  std::unique_ptr<MemoryServer> memory_server_;
  std::unique_ptr<PoolOwner> owner_;
};

}  // namespace wintserve
