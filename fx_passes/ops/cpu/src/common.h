// Memory, threads and random numbers.
#pragma once

#include <sched.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "api.h"

// Kept entries of one block of rows, ordered by row, then by sub-tile and step.
struct Block {
  std::vector<int32_t> counts;  // per row
  std::vector<int32_t> keys;
  std::vector<float> weights;
  int64_t first_row, first_entry;  // counted over all blocks
};

struct SusLists {
  std::vector<Block> blocks;  // in the order of rows
  std::atomic<bool> usable{true};
};

constexpr size_t HUGE_PAGE = size_t(1) << 21;

// Asks for huge pages where the system gives them on demand: the walks of page tables and, in memory that is new, the
// faults would otherwise take a good part of the backward's time.
inline void ask_for_huge_pages(void* p, size_t bytes) {
#ifdef MADV_HUGEPAGE
  const uintptr_t from = (uintptr_t(p) + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
  const uintptr_t to = (uintptr_t(p) + bytes) / HUGE_PAGE * HUGE_PAGE;
  if (from < to) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#endif
}

// Blocks of memory that calls have left, for the calls of the next layer or step: to have the system clear new pages can
// take longer than a backward that is linear in n. A block is a multiple of HUGE_PAGE. Nobody waits for anybody here: who
// finds the door shut (in a child, perhaps by a thread of the parent) asks the system.
class Pool {
 public:
  struct Memory {
    void* start;
    size_t bytes;
  };

  // Of at least that many bytes, and not much more.
  Memory take(size_t bytes) {
    Memory found{nullptr, bytes};
    locked([&] {
      auto best = kept_.end();
      for (auto it = kept_.begin(); it != kept_.end(); ++it)
        if (it->bytes >= bytes && it->bytes <= bytes + bytes / 4 && (best == kept_.end() || it->bytes < best->bytes))
          best = it;
      if (best == kept_.end()) return;
      found = *best;
      kept_bytes_ -= found.bytes;
      kept_.erase(best);
    });
    if (found.start) return found;
    if (posix_memalign(&found.start, HUGE_PAGE, bytes)) throw std::bad_alloc();
    ask_for_huge_pages(found.start, bytes);
    return found;
  }

  // Keeps it, and lets go what was given longest ago where that is too much.
  void give(Memory memory) {
    const bool kept = memory.bytes <= MOST && locked([&] {
      kept_.push_back(memory);
      kept_bytes_ += memory.bytes;
      shrink(MOST);
    });
    if (!kept) free(memory.start);
  }

  // Lets all of it go, and says how many bytes that were.
  size_t release() {
    size_t bytes = 0;
    locked([&] {
      bytes = kept_bytes_;
      shrink(0);
    });
    return bytes;
  }

  static Pool& of_process() {
    static Pool* pool = new Pool;  // never destroyed: threads may outlive what the end of a process destroys
    return *pool;
  }

 private:
  static constexpr size_t MOST = size_t(512) << 20;

  Pool() { kept_.reserve(MOST / HUGE_PAGE + 1); }  // all that fits: memory may not run out while the door is shut

  template <class F>
  bool locked(const F& f) {
    if (door_.test_and_set(std::memory_order_acquire)) return false;
    f();
    door_.clear(std::memory_order_release);
    return true;
  }

  void shrink(size_t bytes) {
    size_t gone = 0;
    for (; kept_bytes_ > bytes; kept_bytes_ -= kept_[gone++].bytes) free(kept_[gone].start);
    kept_.erase(kept_.begin(), kept_.begin() + gone);
  }

  std::atomic_flag door_ = ATOMIC_FLAG_INIT;
  std::vector<Memory> kept_;  // in the order in which they were given
  size_t kept_bytes_ = 0;
};

// Aligned memory of unknown contents.
class Buffer {
 public:
  explicit Buffer(size_t floats) : memory_{nullptr, floats * sizeof(float)} {
    if (memory_.bytes >= HUGE_PAGE) {
      memory_ = Pool::of_process().take((memory_.bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE);
    } else if (floats && posix_memalign(&memory_.start, PAGE, memory_.bytes)) {
      throw std::bad_alloc();
    }
  }
  ~Buffer() {
    if (memory_.bytes >= HUGE_PAGE) Pool::of_process().give(memory_);
    else free(memory_.start);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  float* get() const { return static_cast<float*>(memory_.start); }

 private:
  static constexpr size_t PAGE = 4096;
  Pool::Memory memory_;
};

// Runs f(task, thread) for all tasks, the next task to whichever thread is free. Results must not depend on the thread.
// One thread runs here without OpenMP: after a fork, libgomp's pool is gone and a parallel region would hang.
template <class F>
void parallel(int threads, int64_t tasks, const F& f) {
#ifdef _OPENMP
  if (threads > 1 && tasks > 1) {
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
#pragma omp parallel num_threads(threads)
    {
      const int thread = omp_get_thread_num();
      while (!failed) {
        const int64_t t = next++;  // whoever takes a task runs it: later ones may wait for it
        if (t >= tasks) break;
        try {
          f(t, thread);
        } catch (const std::bad_alloc&) {
          failed = true;
        }
      }
    }
    if (failed) throw std::bad_alloc();
    return;
  }
#endif
  for (int64_t t = 0; t < tasks; t++) f(t, 0);
}

// A number of finished tasks that later tasks wait for.
class Progress {
 public:
  int64_t add() { return count_.fetch_add(1, std::memory_order_acq_rel) + 1; }
  void wait(int64_t count) const {
    while (count_.load(std::memory_order_acquire) < count) sched_yield();
  }

 private:
  std::atomic<int64_t> count_{0};
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }

constexpr uint32_t PHILOX_M0 = 0xD2511F53, PHILOX_M1 = 0xCD9E8D57, PHILOX_W0 = 0x9E3779B9, PHILOX_W1 = 0xBB67AE85;

// The first word of Philox4x32-10, as in fx_passes/ops/draws.py.
inline uint32_t philox(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int i = 0; i < 10; i++) {
    const uint64_t a = uint64_t(c0) * PHILOX_M0, b = uint64_t(c2) * PHILOX_M1;
    c0 = uint32_t(b >> 32) ^ c1 ^ k0;
    c1 = uint32_t(b);
    c2 = uint32_t(a >> 32) ^ c3 ^ k1;
    c3 = uint32_t(a);
    k0 += PHILOX_W0;
    k1 += PHILOX_W1;
  }
  return c0;
}
