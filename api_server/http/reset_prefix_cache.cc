#include "api_server/http/reset_prefix_cache.h"

#include <fmt/core.h>

#include <nlohmann/json.hpp>
#include <optional>
#include <string_view>

#include "api_server/http/on_pool.h"
#include "api_server/openai/json_fields.h"
#include "api_server/openai/request.h"
#include "common/log.h"
#include "common/status_macros.h"

namespace wintserve {
namespace {

constexpr size_t kMaxShownNameBytes = 64;

absl::StatusOr<std::optional<std::string>> ParseSalt(const std::string& body) {
  if (body.empty()) return std::optional<std::string>();
  ASSIGN_OR_RETURN(const nlohmann::json json, ParseJsonObject(body));
  for (const auto& [name, value] : json.items()) {
    // A misspelt name must not reset everything.
    if (name != "cache_salt") {
      return InvalidField(std::string_view(name).substr(0, kMaxShownNameBytes),
                          "only cache_salt is known here");
    }
  }
  if (FindField(json, "cache_salt") == nullptr) return std::optional<std::string>();
  ASSIGN_OR_RETURN(std::string salt, ParseCacheSalt(json));
  return std::optional<std::string>(std::move(salt));
}

}  // namespace

boost::asio::awaitable<Reply> ResetPrefixCache(ServerContext& context, const RequestHead& head,
                                               const std::string& body) {
  absl::StatusOr<std::optional<std::string>> salt = ParseSalt(body);
  if (!salt.ok()) co_return ErrorReply(ToApiError(salt.status()));
  if (salt->has_value() || IsolatesCacheByKey(context)) {
    *salt = CacheSaltOf(context, head, salt->value_or(""));
  }
  const absl::StatusOr<uint64_t> num_blocks =
      co_await OnPool(context.blocking_pool, [&] { return context.llm->ResetPrefixCache(*salt); });
  if (!num_blocks.ok()) {
    LOG_WARNING("the prefix cache was not reset: {}", num_blocks.status().ToString());
    // Whatever the connection to it says is for the log.
    co_return ErrorReply(ToApiError(absl::UnavailableError(
        "the prefix cache was not reset: the cache manager does not answer; try again")));
  }
  LOG_INFO("prefix cache reset{}: {} blocks", salt->has_value() ? " for one salt" : "",
           *num_blocks);
  Reply reply;
  reply.body = fmt::format(R"({{"num_blocks":{}}})", *num_blocks);
  co_return reply;
}

}  // namespace wintserve
