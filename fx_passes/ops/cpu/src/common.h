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

// Aligned memory.
class Buffer {
 public:
  explicit Buffer(size_t floats) : size_((floats * sizeof(float) + PAGE - 1) / PAGE * PAGE) {
    const size_t align = size_ >= HUGE_PAGE ? HUGE_PAGE : PAGE;
    void* p = nullptr;
    if (size_ && posix_memalign(&p, align, size_)) throw std::bad_alloc();
    ask_for_huge_pages(p, size_);
    data_.reset(static_cast<float*>(p));
  }
  float* get() const { return data_.get(); }

 private:
  static constexpr size_t PAGE = 4096;
  struct Free {
    void operator()(float* p) const { free(p); }
  };
  size_t size_;
  std::unique_ptr<float, Free> data_;
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

// The first word of Philox4x32-10, as in fx_passes/ops/draws.py.
inline uint32_t philox(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int i = 0; i < 10; i++) {
    const uint64_t a = uint64_t(c0) * 0xD2511F53u, b = uint64_t(c2) * 0xCD9E8D57u;
    c0 = uint32_t(b >> 32) ^ c1 ^ k0;
    c1 = uint32_t(b);
    c2 = uint32_t(a >> 32) ^ c3 ^ k1;
    c3 = uint32_t(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c0;
}
