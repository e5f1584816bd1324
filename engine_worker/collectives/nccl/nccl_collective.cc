#include "engine_worker/collectives/nccl/nccl_collective.h"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <limits>
#include <mutex>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/check.h"
#include "common/log.h"
#include "common/status_macros.h"
#include "engine_worker/collectives/nccl/nccl_communicator.h"
#include "engine_worker/collectives/peer_processes.h"
#include "kernels/cuda/collective/peer_memory.h"
#include "kernels/cuda/cuda_status.h"
#include "kernels/cuda/handles.h"

namespace wintserve {
namespace {

using kernels::cuda::DeviceBuffer;
using kernels::cuda::kMaxPeerRanks;
using kernels::cuda::kPeerSlotBytes;
using kernels::cuda::PeerHandle;
using kernels::cuda::PeerMemory;
using kernels::cuda::ToStatus;

using std::chrono::milliseconds;
using std::chrono::steady_clock;

// bench/results/all-reduce-h200-x2.txt: of two ranks, one exchange through the peers' memory is
// faster than NCCL as far as a slot reaches, and parts of it are for some way more.
constexpr int64_t kMaxPeerBytesOfTwo = int64_t{8} << 20;
// All that one rank sends of a sum goes to each of the others in one exchange, to one of them in
// two: with more than two ranks the second is less from some size on. Not measured.
constexpr int64_t kMaxOneShotBytesOfMore = 256 << 10;

// A rank of two took 500 MiB on an H200 with NCCL 2.28; as much again for other versions.
constexpr int64_t kNcclMemoryBytes = int64_t{1} << 30;

// A peer that leaves right after its last operation does not spoil those that this device is about
// to finish.
constexpr milliseconds kFinishPatience(100);
// NCCL's abort waits for graphs that captured it.
constexpr milliseconds kEndPatience(5'000);
constexpr int64_t kLeavePatienceMs = 1'000;
// In a group that has not come about nobody has written to the others.
constexpr int64_t kUnusedLeavePatienceMs = 100;
// What NCCL and the driver say of a peer that dies depends on the moment. The sockets close before
// the process has ended, between them its device memory goes.
constexpr int64_t kBlamePatienceMs = 1'000;

absl::Status Aborted() {
  return absl::UnavailableError("the rank group was aborted, or a rank has left it");
}

// What a rank says of itself when it comes.
struct Introduction {
  int32_t is_well = 1;  // else no group comes about
  int32_t lends_memory = 0;
  PeerHandle memory;
  ProcessPlace process;
  ncclUniqueId id = {};  // of rank 0
};

// The values of all ranks.
template <typename T>
absl::StatusOr<std::vector<T>> Exchange(ShmCollective* control, const T& own) {
  static_assert(std::is_trivially_copyable_v<T>);
  constexpr size_t kWords = (sizeof(T) + sizeof(float) - 1) / sizeof(float);
  std::vector<float> mine(kWords);
  std::memcpy(mine.data(), &own, sizeof(T));
  std::vector<float> gathered(kWords * control->world_size());
  RETURN_IF_ERROR(control->AllGather(mine.data(), kWords, gathered.data()));
  std::vector<T> all(control->world_size());
  for (size_t r = 0; r < all.size(); ++r) {
    std::memcpy(static_cast<void*>(&all[r]), gathered.data() + r * kWords, sizeof(T));
  }
  return all;
}

// Whether every rank says yes.
absl::StatusOr<bool> AllAgree(ShmCollective* control, bool yes) {
  ASSIGN_OR_RETURN(const std::vector<int32_t> all, Exchange<int32_t>(control, yes ? 1 : 0));
  return std::find(all.begin(), all.end(), 0) == all.end();
}

absl::Status NcclStatus(const NcclLibrary& nccl, ncclResult_t result, const char* what) {
  if (result == ncclSuccess) return absl::OkStatus();
  const char* const detail = nccl.GetLastError(nullptr);  // of any communicator
  const std::string text =
      fmt::format("{}: NCCL: {}{}{}", what, nccl.GetErrorString(result),
                  detail == nullptr || *detail == 0 ? "" : ": ", detail == nullptr ? "" : detail);
  return result == ncclSystemError || result == ncclRemoteError || result == ncclInProgress
             ? absl::UnavailableError(text)
             : absl::InternalError(text);
}

int64_t MaxPeerBytes(const NcclGroup& group, int world_size) {
  if (group.max_peer_bytes != NcclGroup::kMeasured) return group.max_peer_bytes;
  return world_size == 2 ? kMaxPeerBytesOfTwo : std::numeric_limits<int64_t>::max();
}

}  // namespace

absl::Status CheckNccl() { return LoadNccl().status(); }

std::string NcclVersion() {
  const absl::StatusOr<const NcclLibrary*> nccl = LoadNccl();
  int version = 0;
  CHECK(nccl.ok() && (*nccl)->GetVersion(&version) == ncclSuccess, "NCCL");
  return fmt::format("{}.{}.{}", version / 10000, version / 100 % 100, version % 100);
}

int64_t NcclGroupMemoryBytes(int world_size) {
  return kernels::cuda::PeerMemoryBytes(world_size) + kNcclMemoryBytes;
}

struct NcclCollective::State {
  State(const NcclLibrary* library, std::unique_ptr<ShmCollective> control_in)
      : nccl(library), control(std::move(control_in)), communicator(library) {}

  const NcclLibrary* const nccl;
  const std::unique_ptr<ShmCollective> control;
  cudaStream_t stream = nullptr;
  int device = 0;
  int64_t max_peer_bytes = 0;
  PeerProcesses processes;
  std::unique_ptr<PeerMemory> peers;  // null: all through NCCL. Written under mutex
  bool is_complete = false;           // every rank has joined: operations may begin
  NcclCommunicator communicator;

  std::atomic<bool> is_cut_short = false;  // from before the device is made to leave anything

  std::mutex mutex;
  std::condition_variable changed;
  // Under mutex.
  bool has_ended = false;
  std::optional<steady_clock::time_point> abort_time;
  std::optional<steady_clock::time_point> cut_time;  // of what had not finished by itself
  std::optional<steady_clock::time_point> end_time;

  // Whether one exchange through the peers' memory takes it.
  bool FitsPeers(int64_t size_bytes) const {
    return peers != nullptr && size_bytes <= std::min(max_peer_bytes, kPeerSlotBytes);
  }
  // Brings up peers, if every rank can.
  absl::Status Meet(const std::function<void()>& before_init);
  absl::Status OpenPeers(std::unique_ptr<PeerMemory> own, const std::vector<Introduction>& ranks);
  void EndOnAbort();
  bool WaitForEnd(milliseconds timeout);
  // Of what an operation failed with: UNAVAILABLE if a peer is to blame.
  absl::Status Blame(const absl::Status& failure) const;
  void LogEnd(steady_clock::time_point begin, steady_clock::time_point drained);
};

absl::Status NcclCollective::State::Meet(const std::function<void()>& before_init) {
  const int rank = control->rank();
  Introduction own;
  absl::Status failure;
  if (rank == 0) {
    failure = NcclStatus(*nccl, nccl->GetUniqueId(&own.id), "making a group");
  }
  std::unique_ptr<PeerMemory> memory;
  if (failure.ok() && max_peer_bytes > 0) {
    absl::StatusOr<std::unique_ptr<PeerMemory>> created =
        PeerMemory::Create(rank, control->world_size());
    if (created.ok()) {
      memory = *std::move(created);
      own.memory = memory->handle();
      own.lends_memory = 1;
    } else if (absl::IsResourceExhausted(created.status())) {
      failure = created.status();
    } else {
      LOG_WARNING("small collectives go through NCCL: {}", std::string(created.status().message()));
    }
  }
  own.is_well = failure.ok() ? 1 : 0;
  own.process = OwnProcessPlace();
  ASSIGN_OR_RETURN(const std::vector<Introduction> ranks, Exchange(control.get(), own));
  RETURN_IF_ERROR(failure);
  std::vector<ProcessPlace> places;
  for (const Introduction& introduction : ranks) places.push_back(introduction.process);
  processes.Watch(places);
  for (size_t r = 0; r < ranks.size(); ++r) {
    if (ranks[r].is_well == 1) continue;
    return absl::UnavailableError(fmt::format("rank {} could not join the group", r));
  }
  RETURN_IF_ERROR(OpenPeers(std::move(memory), ranks));
  if (before_init) before_init();
  const std::optional<ncclResult_t> result =
      communicator.Init(control->world_size(), ranks[0].id, rank);
  if (!result.has_value() || control->is_aborted()) return Aborted();
  const absl::Status status = NcclStatus(*nccl, *result, "joining the group");
  ASSIGN_OR_RETURN(const bool all_joined, AllAgree(control.get(), status.ok()));
  RETURN_IF_ERROR(status);
  return all_joined ? absl::OkStatus()
                    : absl::UnavailableError("another rank could not join the group");
}

absl::Status NcclCollective::State::OpenPeers(std::unique_ptr<PeerMemory> own,
                                              const std::vector<Introduction>& ranks) {
  bool is_open = own != nullptr;
  std::vector<PeerHandle> handles;
  for (const Introduction& introduction : ranks) {
    is_open = is_open && introduction.lends_memory == 1;
    handles.push_back(introduction.memory);
  }
  if (is_open) {
    const absl::Status opened = own->Open(handles);
    if (!opened.ok()) {
      LOG_WARNING("small collectives go through NCCL: {}", std::string(opened.message()));
    }
    is_open = opened.ok();
  }
  ASSIGN_OR_RETURN(const bool all_open, AllAgree(control.get(), is_open));
  if (all_open) {
    std::lock_guard<std::mutex> lock(mutex);
    peers = std::move(own);
    if (is_cut_short.load()) peers->Abort();
  }
  if (!all_open && max_peer_bytes > 0 && control->rank() == 0) {
    LOG_WARNING(
        "the GPUs do not all reach each other's memory: all-reduces go through NCCL alone{}",
        control->world_size() == 2 ? "" : ", and how they round depends on a batch's size");
  }
  return absl::OkStatus();
}

void NcclCollective::State::EndOnAbort() {
  cudaSetDevice(device);
  while (!control->WaitForAbort(/*timeout_ms=*/3'600'000)) {
  }
  const auto aborted = steady_clock::now();
  while (cudaStreamQuery(stream) == cudaErrorNotReady &&
         steady_clock::now() < aborted + kFinishPatience) {
    std::this_thread::sleep_for(milliseconds(1));
  }
  const auto cut = steady_clock::now();
  {
    std::lock_guard<std::mutex> lock(mutex);
    is_cut_short.store(true);
    if (peers != nullptr) peers->Abort();
  }
  communicator.End();
  std::lock_guard<std::mutex> lock(mutex);
  abort_time = aborted;
  cut_time = cut;
  end_time = steady_clock::now();
  has_ended = true;
  changed.notify_all();
}

bool NcclCollective::State::WaitForEnd(milliseconds timeout) {
  std::unique_lock<std::mutex> lock(mutex);
  return changed.wait_for(lock, timeout, [this] { return has_ended; });
}

absl::Status NcclCollective::State::Blame(const absl::Status& failure) const {
  if (failure.ok() || absl::IsUnavailable(failure)) return failure;
  if (!processes.AnyIsGone(kBlamePatienceMs)) return failure;
  return absl::UnavailableError(
      fmt::format("another rank is gone: {}", std::string(failure.message())));
}

void NcclCollective::State::LogEnd(steady_clock::time_point begin,
                                   steady_clock::time_point drained) {
  const auto ms = [](steady_clock::duration time) {
    return std::chrono::duration<double, std::milli>(time).count();
  };
  const auto left = steady_clock::now();
  std::lock_guard<std::mutex> lock(mutex);
  LOG_DEBUG(
      "rank group ended {:.0f} ms after its abort: {:.0f} ms for operations to finish, then {:.0f} "
      "ms in NCCL; left within {:.0f} ms: {:.0f} ms until the device was done, then {:.0f} ms "
      "until the others had let go",
      ms(*end_time - *abort_time), ms(*cut_time - *abort_time), ms(*end_time - *cut_time),
      ms(left - begin), ms(drained - begin), ms(left - drained));
}

absl::StatusOr<std::unique_ptr<NcclCollective>> NcclCollective::Create(
    std::unique_ptr<ShmCollective> control, const NcclGroup& group) {
  CHECK(control->world_size() <= kMaxPeerRanks, "world_size={}", control->world_size());
  ASSIGN_OR_RETURN(const NcclLibrary* const nccl, LoadNccl());
  auto state = std::make_shared<State>(nccl, std::move(control));
  state->stream = group.stream;
  state->max_peer_bytes = MaxPeerBytes(group, state->control->world_size());
  RETURN_IF_ERROR(ToStatus(cudaGetDevice(&state->device), "joining a group"));
  std::unique_ptr<NcclCollective> collective(new NcclCollective(std::move(state)));
  RETURN_IF_ERROR(collective->Join(group.before_init));
  return collective;
}

absl::Status NcclCollective::Join(const std::function<void()>& before_init) {
  RETURN_IF_ERROR(state_->Meet(before_init));
  state_->is_complete = true;
  return WarmUp();
}

NcclCollective::NcclCollective(std::shared_ptr<State> state)
    : state_(std::move(state)), watcher_([state = state_] { state->EndOnAbort(); }) {}

NcclCollective::~NcclCollective() {
  const auto begin = steady_clock::now();
  Abort();
  if (!state_->WaitForEnd(kEndPatience)) {
    LOG_WARNING("a rank group that a graph holds is left to the end of the process");
    watcher_.detach();
    return;
  }
  watcher_.join();
  // Nothing waits any more, but what was launched may still write to the others.
  const absl::Status drained = ToStatus(cudaStreamSynchronize(state_->stream), "leaving a group");
  if (!drained.ok()) LOG_WARNING("{}", std::string(drained.message()));
  const auto drain_time = steady_clock::now();
  if (state_->peers != nullptr) {
    const PeerProcesses& processes = state_->processes;
    state_->control->Leave(state_->is_complete ? kLeavePatienceMs : kUnusedLeavePatienceMs,
                           [&](int rank) { return processes.IsGone(rank); });
  }
  state_->LogEnd(begin, drain_time);
}

// NCCL connects at the first operation of each kind. By then nobody should have to wait for it, and
// its memory should be taken.
absl::Status NcclCollective::WarmUp() {
  constexpr int64_t kBytes = int64_t{4} << 20;
  constexpr int64_t kFloats = kBytes / static_cast<int64_t>(sizeof(float));
  ASSIGN_OR_RETURN(const DeviceBuffer in, DeviceBuffer::Allocate(kBytes));
  ASSIGN_OR_RETURN(const DeviceBuffer out, DeviceBuffer::Allocate(kBytes * world_size()));
  float* const data = in.data<float>();
  RETURN_IF_ERROR(ToStatus(cudaMemsetAsync(data, 0, kBytes, state_->stream), "joining a group"));
  const NcclLibrary& nccl = *state_->nccl;
  const cudaStream_t stream = state_->stream;
  for (const int64_t count : {int64_t{64}, kFloats}) {
    RETURN_IF_ERROR(CallNccl("an all-reduce", [&](ncclComm_t comm) {
      return nccl.AllReduce(data, data, count, ncclFloat, ncclSum, comm, stream);
    }));
    RETURN_IF_ERROR(CallNccl("an all-gather", [&](ncclComm_t comm) {
      return nccl.AllGather(data, out.data(), count, ncclFloat, comm, stream);
    }));
    RETURN_IF_ERROR(CallNccl("a broadcast", [&](ncclComm_t comm) {
      return nccl.Broadcast(data, data, count, ncclFloat, 0, comm, stream);
    }));
  }
  RETURN_IF_ERROR(AllReduceSum(data, 64));
  RETURN_IF_ERROR(ToStatus(cudaStreamSynchronize(stream), "joining a group"));
  return DeviceStatus();
}

int NcclCollective::rank() const { return state_->control->rank(); }
int NcclCollective::world_size() const { return state_->control->world_size(); }
bool NcclCollective::uses_peer_memory() const { return state_->peers != nullptr; }
void NcclCollective::Abort() { state_->control->Abort(); }

template <typename Call>
absl::Status NcclCollective::CallNccl(const char* what, const Call& call) {
  if (state_->control->is_aborted()) return Aborted();
  const std::optional<ncclResult_t> result = state_->communicator.Call(call);
  if (result == ncclSuccess) return absl::OkStatus();
  if (!result.has_value() || state_->control->is_aborted()) {
    Abort();
    return Aborted();
  }
  const absl::Status status = NcclStatus(*state_->nccl, *result, what);
  Abort();
  return state_->Blame(status);
}

absl::Status NcclCollective::AllReduceSum(float* data, int64_t count) {
  if (state_->control->is_aborted()) return Aborted();
  if (count == 0) return absl::OkStatus();
  const int64_t size_bytes = count * static_cast<int64_t>(sizeof(float));
  if (state_->peers != nullptr && size_bytes <= state_->max_peer_bytes) {
    SumThroughPeers(data, count);
    return absl::OkStatus();
  }
  return CallNccl("an all-reduce", [&](ncclComm_t comm) {
    return state_->nccl->AllReduce(data, data, count, ncclFloat, ncclSum, comm, state_->stream);
  });
}

void NcclCollective::SumThroughPeers(float* data, int64_t count) {
  constexpr int64_t kFloatBytes = sizeof(float);
  const kernels::cuda::PeerGroup& group = state_->peers->group();
  const int64_t max_one_shot =
      (world_size() == 2 ? kPeerSlotBytes : kMaxOneShotBytesOfMore) / kFloatBytes;
  if (count <= max_one_shot) {
    kernels::cuda::LaunchPeerAllReduce(group, data, count, state_->stream);
    return;
  }
  const int64_t part = world_size() * kPeerSlotBytes / kFloatBytes;
  for (int64_t begin = 0; begin < count; begin += part) {
    kernels::cuda::LaunchPeerTwoShotAllReduce(group, data + begin, std::min(part, count - begin),
                                              state_->stream);
  }
}

absl::Status NcclCollective::AllGather(const float* in, int64_t count, float* out) {
  if (state_->control->is_aborted()) return Aborted();
  if (count == 0) return absl::OkStatus();
  if (state_->FitsPeers(count * static_cast<int64_t>(sizeof(float)))) {
    kernels::cuda::LaunchPeerAllGather(state_->peers->group(), in, count, out, state_->stream);
    return absl::OkStatus();
  }
  return CallNccl("an all-gather", [&](ncclComm_t comm) {
    return state_->nccl->AllGather(in, out, count, ncclFloat, comm, state_->stream);
  });
}

absl::Status NcclCollective::Broadcast(void* data, int64_t size_bytes) {
  constexpr int64_t kWordBytes = sizeof(float);
  if (state_->control->is_aborted()) return Aborted();
  if (size_bytes == 0) return absl::OkStatus();
  const bool is_words =
      size_bytes % kWordBytes == 0 && reinterpret_cast<uintptr_t>(data) % kWordBytes == 0;
  if (is_words && state_->FitsPeers(size_bytes)) {
    kernels::cuda::LaunchPeerBroadcast(state_->peers->group(), static_cast<float*>(data),
                                       size_bytes / kWordBytes, state_->stream);
    return absl::OkStatus();
  }
  return CallNccl("a broadcast", [&](ncclComm_t comm) {
    return state_->nccl->Broadcast(data, data, size_bytes, ncclChar, 0, comm, state_->stream);
  });
}

absl::Status NcclCollective::DeviceStatus() {
  if (state_->is_cut_short.load()) return Aborted();
  ncclResult_t error = ncclSuccess;
  const std::optional<ncclResult_t> asked = state_->communicator.Call(
      [&](ncclComm_t comm) { return state_->nccl->CommGetAsyncError(comm, &error); });
  if (!asked.has_value()) {
    Abort();
    return Aborted();
  }
  const ncclResult_t result = *asked == ncclSuccess ? error : *asked;
  if (result == ncclSuccess) return absl::OkStatus();
  const absl::Status status = NcclStatus(*state_->nccl, result, "the rank group");
  Abort();
  return status;
}

}  // namespace wintserve
