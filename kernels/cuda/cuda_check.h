// Calls of the CUDA runtime that must not fail: our bug, or a device that has gone wrong, after
// which nothing in the process can be trusted. Whoever replaces the worker reads the line that is
// logged. What may fail on a sound machine (no device, no memory, a fault of an earlier kernel that
// a wait reports) is a Status: cuda_status.h.
#pragma once

#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <string>
#include <type_traits>

namespace wintserve::kernels::cuda {

// "cudaErrorIllegalAddress (an illegal memory access was encountered)"
std::string ErrorText(cudaError_t error);

// Logs "file:line: call(arguments) failed on device 0: cudaErrorX (what it means)" and aborts.
[[noreturn]] void CudaCallFailed(const char* file, int line, const char* call,
                                 const std::string& arguments, cudaError_t error);

// An argument as it stands in the message: pointers and handles as addresses, enumerations as
// their numbers.
template <typename T>
std::string ArgumentText(const T& argument) {
  if constexpr (std::is_convertible_v<T, const char*>) {
    return argument == nullptr ? "null" : argument;
  } else if constexpr (std::is_pointer_v<T> || std::is_null_pointer_v<T>) {
    return fmt::format("{}", reinterpret_cast<const void*>(argument));
  } else if constexpr (std::is_enum_v<T>) {
    return fmt::format("{}", static_cast<std::underlying_type_t<T>>(argument));
  } else if constexpr (std::is_arithmetic_v<T>) {
    return fmt::format("{}", argument);
  } else {
    return "{…}";
  }
}

template <typename... Args>
std::string ArgumentsText(const Args&... args) {
  std::string text;
  ((text += (text.empty() ? "" : ", ") + ArgumentText(args)), ...);
  return text;
}

// Calls function(args...) and aborts with all of it unless it returns cudaSuccess.
template <typename Function, typename... Args>
void CallOrDie(const char* file, int line, const char* name, Function function, Args... args) {
  const cudaError_t error = function(args...);
  if (error != cudaSuccess) [[unlikely]] {
    CudaCallFailed(file, line, name, ArgumentsText(args...), error);
  }
}

}  // namespace wintserve::kernels::cuda

// CUDA_CALL(cudaMemcpyAsync, to, from, size_bytes, cudaMemcpyDefault, stream);
#define CUDA_CALL(function, ...)         \
  ::wintserve::kernels::cuda::CallOrDie( \
      __FILE__, __LINE__, #function, [](auto... args) { return function(args...); }, __VA_ARGS__)
