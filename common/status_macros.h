// RETURN_IF_ERROR and ASSIGN_OR_RETURN for absl::Status and absl::StatusOr.
#pragma once

#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

#define RETURN_IF_ERROR(expression)                                             \
  do {                                                                          \
    if (absl::Status wintserve_status = (expression); !wintserve_status.ok()) { \
      return wintserve_status;                                                  \
    }                                                                           \
  } while (false)

#define WINTSERVE_CONCAT_INNER(a, b) a##b
#define WINTSERVE_CONCAT(a, b) WINTSERVE_CONCAT_INNER(a, b)

// NOLINTBEGIN(bugprone-macro-parentheses): a declaration cannot stand in parentheses.
// ASSIGN_OR_RETURN(auto value, Compute()); a type with a comma needs an alias.
#define ASSIGN_OR_RETURN(declaration, expression) \
  WINTSERVE_ASSIGN_OR_RETURN(WINTSERVE_CONCAT(status_or_, __LINE__), declaration, expression)
#define WINTSERVE_ASSIGN_OR_RETURN(status_or, declaration, expression) \
  auto status_or = (expression);                                       \
  if (!status_or.ok()) return std::move(status_or).status();           \
  declaration = *std::move(status_or)
// NOLINTEND(bugprone-macro-parentheses)
