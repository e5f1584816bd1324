// Work that would hold up an IO thread.
#pragma once

#include <boost/asio/awaitable.hpp>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/thread_pool.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <type_traits>
#include <utility>

namespace wintserve {

// Calls `work` on a thread of `pool`; the caller goes on where it was.
template <typename Work>
boost::asio::awaitable<std::invoke_result_t<Work>> OnPool(boost::asio::thread_pool& pool,
                                                          Work work) {
  auto call = [&work]() -> boost::asio::awaitable<std::invoke_result_t<Work>> { co_return work(); };
  std::invoke_result_t<Work> result =
      co_await boost::asio::co_spawn(pool, std::move(call), boost::asio::use_awaitable);
  co_return result;
}

}  // namespace wintserve
