#include "api_server/http/admission.h"

namespace wintserve {

Admission::Permit Admission::TryEnter() {
  MutexLock lock(&mutex_);
  if (num_open_ >= max_open_) return Permit();
  ++num_open_;
  return Permit(this);
}

void Admission::Leave() {
  MutexLock lock(&mutex_);
  --num_open_;
  changed_.NotifyAll();
}

bool Admission::WaitUntilEmpty(std::chrono::milliseconds timeout) {
  MutexLock lock(&mutex_);
  return changed_.WaitFor(&mutex_, timeout, [&]() REQUIRES(mutex_) { return num_open_ == 0; });
}

}  // namespace wintserve
