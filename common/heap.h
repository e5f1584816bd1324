// What the programs do about glibc's heap, so that the memory of a server after weeks is that of
// the requests that are open. Left alone, glibc holds on to freed memory in four ways.
//
// Free pages between pieces in use stay resident. After 1,500 clients at once the API server kept
// 39 MiB for nothing; given back, it has 13.
//
// Each thread keeps up to 7 freed pieces of each of 64 sizes for itself. They fill over hours, up
// to 230 KiB for each of the API server's 20 threads, which looks like a leak.
//
// The heap is up to 8 arenas a core, so that threads seldom wait for each other, and the free end
// of each but the first keeps up to 128 KiB that nothing gives back.
//
// Once a large piece was freed, others of its size come from the heap, up to 32 MiB each, instead
// of from the system. Eight threads that unpacked a model of bfloat16 kept 60 MiB so, of matrices
// of 2 and 4 MiB; given back at once, none.
#pragma once

#include <chrono>
#include <string>
#include <thread>

#include "common/mutex.h"

namespace wintserve {

// Gives the heap's free pages back to the system. Takes well under a millisecond for a small heap;
// other threads that allocate may wait for that long.
void ReturnFreeMemory();

// Pieces of 1 MiB and more come from the system and go back to it as soon as they are freed, in
// this process from now on. For programs that work through large matrices.
void ReturnLargePiecesAtOnce();

// Calls ReturnFreeMemory from time to time, on a thread of its own.
// Threading: construct once the signals that the process waits for are blocked.
class HeapTrimmer {
 public:
  explicit HeapTrimmer(std::chrono::milliseconds period = std::chrono::seconds(10));
  ~HeapTrimmer();
  HeapTrimmer(const HeapTrimmer&) = delete;
  HeapTrimmer& operator=(const HeapTrimmer&) = delete;

 private:
  void Run() EXCLUDES(mutex_);

  const std::chrono::milliseconds period_;
  Mutex mutex_;
  CondVar changed_;
  bool stopping_ GUARDED_BY(mutex_) = false;
  std::thread thread_;
};

// kOne is for a program that does its work under one lock anyway.
enum class HeapArenas { kOne, kGlibcsChoice };

// "GLIBC_TUNABLES=…" for the environment of a program with these arenas, whose threads keep no
// freed pieces; glibc reads it before main. (A step of the scheduler takes no longer without them.)
// `inherited`: the variable's value in our own environment or null; what an operator has set there
// stays in force.
std::string HeapTunables(HeapArenas arenas, const char* inherited);

}  // namespace wintserve
