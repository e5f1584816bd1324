// Which engine workers form a rank group, and what has to happen until they form one that computes:
// at the first start and after the death of any of them.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

namespace wintserve {

// What ended a rank group.
enum class FaultCause {
  kExit,        // the launcher reaped a worker
  kStream,      // a worker's stream broke
  kReported,    // a worker sent Fault
  kDeadline,    // a step took too long
  kDivergence,  // the ranks did not do the same
  kStall,       // ranks were to get ready, and got no further
};
inline constexpr FaultCause kFaultCauses[] = {FaultCause::kExit,       FaultCause::kStream,
                                              FaultCause::kReported,   FaultCause::kDeadline,
                                              FaultCause::kDivergence, FaultCause::kStall};
const char* NameOf(FaultCause cause);  // "exit", "stream", …

// A pure state machine of the engine's thread: events in, one action after the other out.
//
//                kConfigure             kAttachPool              kUseGroup
//   GATHERING -------------> CONFIGURED ------------> ATTACHING ----------> IN USE
//       ^       every rank       ^  |    there is         |    every rank     |
//       |       is attached      |  |    a pool           |    is ready       |
//       |                        `--|---------------------+-------------------'
//       |                           | a fault             | a fault    the pool goes
//       |   kLoseGroup              v                     v
//       `----------------------- ABORTING <------------------
//          every rank is fenced     kAbortGroup, kEndWorker
//   (GATHERING: kDistrustGroup)
//
// Every rank group has an epoch of its own. A rank is fenced when nothing of the epoch runs in it
// any more: it has said so (Aborted), its process has been reaped, or the rank says Hello: a worker
// attaches anew after it has left its group, and another process is started after the old one was
// reaped. Without a launcher in reach, one whose stream broke 2 s ago counts as fenced, and what it
// wrote as wrong.
//
// A worker that was told to leave, or whose stream broke, has 5 s until the launcher is asked to
// end it.
//
// How a process of the group has ended may be known only when nothing of the group runs any more:
// it had left, and then it crashed. Its KV is not trusted then, either.
//
// Ranks that disagree twice within 10 minutes do not get better by leaving their group: weights may
// be damaged, or a device. Nobody knows whose, so the launcher ends every rank at once, as at
// fault, and only the end of its process fences it. Without a launcher in reach they leave as ever.
//
// Time: microseconds of any clock that does not go back; the same one for all calls.
class GroupLifecycle {
 public:
  enum class Action {
    kNone,
    kAbortGroup,     // send to rank() that epoch() is over; Aborted follows, or its end
    kEndWorker,      // have the launcher end worker_id() of rank(); at_fault() says how it counts
    kLoseGroup,      // nothing of epoch() runs any more; kv_trusted() says what its KV is worth
    kDistrustGroup,  // after kLoseGroup: now its KV turns out not to be trusted
    kConfigure,      // send epoch() to every rank
    kAttachPool,     // send the pool of SetPool to every rank; OnReady of each follows
    kUseGroup,       // every rank has the pool: plans may be sent
  };
  static constexpr int64_t kPatienceUs = 5'000'000;     // for Aborted, or a new Hello
  static constexpr int64_t kGraceUs = 2'000'000;        // see above
  static constexpr int64_t kVerdictWaitUs = 1'000'000;  // for the notice of an exit, see OnHello
  static constexpr int64_t kDivergenceMemoryUs = 600'000'000;

  // new_epoch: a number that no group has had, not 0.
  GroupLifecycle(uint32_t world_size, std::function<uint64_t()> new_epoch);

  // Whether the launcher tells exits. Until it says so, there is none in reach.
  void OnWatching(bool watching, int64_t now_us);
  bool watching() const { return watching_; }

  // The rank has attached. REQUIRES: it is not attached. It has replaced a process of the group
  // whose end was not told: the notice is waited for, and without one its KV counts as wrong.
  void OnHello(uint32_t rank, uint64_t worker_id, int64_t now_us);
  // The stream of the rank has ended; ignored when its exit was told.
  void OnDisconnected(uint32_t rank, const std::string& reason, int64_t now_us);
  // A process was reaped. kv_trusted: see WorkerExit in proto/supervisor.proto. False: it was not
  // one that has attached and is not gone yet.
  bool OnExit(uint32_t rank, uint64_t worker_id, bool kv_trusted, const std::string& text,
              int64_t now_us);
  // The group cannot go on. Without a group, nothing happens.
  void OnFault(FaultCause cause, bool kv_trusted, const std::string& text, int64_t now_us);
  // False: of another epoch, or not expected; nothing happens.
  bool OnAborted(uint32_t rank, uint64_t group_epoch);
  bool OnReady(uint32_t rank, uint64_t group_epoch, uint64_t pool_epoch);

  // The pool that ranks shall attach to; 0: none now.
  void SetPool(uint64_t pool_epoch);

  // To be called after any event, and at NextDeadlineUs(), until it says kNone.
  Action NextAction(int64_t now_us);
  std::optional<int64_t> NextDeadlineUs() const;

  // Of the last action.
  uint32_t rank() const { return rank_; }
  uint64_t worker_id() const { return ranks_[rank_].worker_id; }
  // Of the rank's last Hello; 0: none has come.
  uint64_t worker_id(uint32_t rank) const { return ranks_[rank].worker_id; }

  uint64_t epoch() const { return epoch_; }  // of the present group, or the last one; 0: none yet
  bool in_use() const { return state_ == State::kInUse; }
  // Whoever has to end now does not only keep others waiting: the ranks have disagreed again, or
  // no rank got further, and those that only waited for another one have left.
  bool at_fault() const {
    return replaces_all_ || (state_ == State::kAborting && fault_cause_ == FaultCause::kStall);
  }
  // Ranks are awaited that were sent the pool.
  bool attaching() const { return state_ == State::kAttaching; }
  // Of the fault that ended the group, until kLoseGroup of the next one: whether all that was
  // written to KV blocks up to the last acknowledged step is right.
  bool kv_trusted() const { return kv_trusted_; }
  // Plans of epoch() may be answered: there is a group, and no fault yet.
  bool has_group() const { return state_ != State::kGathering && state_ != State::kAborting; }
  // The fault that ended the last group that ended; one line for people.
  FaultCause fault_cause() const { return fault_cause_; }
  const std::string& fault() const { return fault_; }
  // Of the first fault since a group was in use; none while one is, and before the first.
  std::optional<int64_t> fault_time_us() const { return fault_time_us_; }
  bool attached(uint32_t rank) const { return ranks_[rank].attached; }
  // No process of the rank is left, as far as can be known.
  bool gone(uint32_t rank) const { return ranks_[rank].gone; }
  // For people; empty when it is not for workers.
  std::string WaitingFor() const;

 private:
  enum class State { kGathering, kConfigured, kAttaching, kInUse, kAborting };
  struct Rank {
    uint64_t worker_id = 0;  // of the last Hello; 0: none has come
    bool attached = false;
    bool gone = true;
    bool in_group = false;                // its process was sent epoch_
    bool fenced = true;                   // of epoch_
    bool told = false;                    // to leave epoch_
    bool ready = false;                   // for epoch_ and attached_pool_
    std::optional<int64_t> lost_us = {};  // its stream broke then, and it is not gone
    std::optional<int64_t> end_us = {};   // it has to end then, if it has not left before
    // A process of the group that another one has replaced before its end was told.
    uint64_t unjudged_id = 0;
    int64_t verdict_us = 0;
    std::string failed_start = {};  // how a process ended that never came to attach since
  };

  Action Act(Action action, uint32_t rank);
  Action NextEnd(int64_t now_us);
  Action NextActionWhileAborting(int64_t now_us);
  void GiveUpWaiting(int64_t now_us);
  void Distrust();
  bool AllJudged() const;
  void Fence(Rank* rank);
  bool All(bool Rank::*flag) const;
  uint32_t Count(bool Rank::*flag) const;

  const std::function<uint64_t()> new_epoch_;
  std::vector<Rank> ranks_;
  State state_ = State::kGathering;
  uint64_t epoch_ = 0;
  uint64_t pool_ = 0;           // as last set
  uint64_t attached_pool_ = 0;  // sent to the ranks of epoch_
  bool watching_ = false;
  bool kv_trusted_ = true;
  bool distrust_due_ = false;             // kDistrustGroup is
  bool replaces_all_ = false;             // of the fault under way: no rank may go on
  std::optional<int64_t> divergence_us_;  // the last one
  FaultCause fault_cause_ = FaultCause::kExit;
  std::string fault_;
  std::optional<int64_t> fault_time_us_;
  uint32_t rank_ = 0;
};

}  // namespace wintserve
