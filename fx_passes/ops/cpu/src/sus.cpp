// The C interface. build.py compiles this one file, once per instruction set that a machine offers.
#include <algorithm>

#include "backward.inc"
#include "sample.inc"

namespace sus {

namespace {

struct Thread {
  Scratch scratch;
  Sampler sampler;
};

// One row block: tasks run from the last rows to the first, since under a causal mask the last are the longest.
struct Forward {
  const SusForward& args;
  SusLists& lists;
  std::vector<std::unique_ptr<Thread>> threads;
  int64_t blocks = ceil_div(args.call.m, ROWS);
  bool sample = args.c > 0;

  void run(const std::vector<std::unique_ptr<Packed>>& packed, int64_t first_head, int64_t task, int thread) {
    const SusCall& call = args.call;
    const int64_t per_group = call.heads / call.groups, tasks = int64_t(packed.size()) * per_group;
    const int64_t block = blocks - 1 - task / tasks, local = task % tasks / per_group, key_head = first_head + local;
    const int64_t batch = key_head / call.groups;
    const int64_t head = key_head % call.groups * per_group + task % per_group;
    if (!threads[thread]) threads[thread] = std::make_unique<Thread>();
    const int64_t first = block * ROWS, count = call.m - first < ROWS ? call.m - first : ROWS;
    Rows rows{args, *packed[local], batch, head, first, count, threads[thread]->scratch};
    rows.run(sample);
    if (sample) threads[thread]->sampler.run(rows, lists.blocks[(batch * call.heads + head) * blocks + block]);
  }
};

}  // namespace

void forward(const SusForward& args, SusLists& lists) {
  const SusCall& call = args.call;
  Forward work{args, lists, {}};
  work.threads.resize(call.threads);
  const int64_t heads = call.batch * call.groups, chunks = ceil_div(call.n, CHUNK);
  if (work.sample) lists.blocks.resize(call.batch * call.heads * work.blocks);
  // Key heads at a time: enough row blocks that no thread waits long for the last one, and few copies of K and V.
  const int64_t per_head = work.blocks * (call.heads / call.groups);
  const int64_t together = clamp(ceil_div(24 * call.threads, per_head), 1, heads);
  std::vector<std::unique_ptr<Packed>> packed;
  for (int64_t first = 0; first < heads; first += together) {
    const int64_t count = heads - first < together ? heads - first : together;
    packed.resize(count);
    for (auto& p : packed)
      if (!p) p = std::make_unique<Packed>(call, work.sample, args.out != nullptr);
    parallel(call.threads, count * chunks, [&](int64_t t, int) {
      const int64_t head = first + t / chunks;
      packed[t / chunks]->fill(call, head / call.groups, head % call.groups, t % chunks);
    });
    parallel(call.threads, count * per_head, [&](int64_t t, int thread) { work.run(packed, first, t, thread); });
  }
}

}  // namespace sus

extern "C" {

SusLists* sus_forward(const SusForward* args) {
  try {
    auto lists = std::make_unique<SusLists>();
    sus::forward(*args, *lists);
    return lists.release();
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

int64_t sus_lists_count(const SusLists* lists) {
  int64_t count = 0;
  for (const Block& b : lists->blocks) count += int64_t(b.keys.size());
  return count;
}

void sus_lists_export(const SusLists* lists, int64_t* offsets, int32_t* keys, float* weights) {
  int64_t place = 0;
  *offsets = 0;
  for (const Block& b : lists->blocks) {
    std::copy(b.keys.begin(), b.keys.end(), keys + place);
    std::copy(b.weights.begin(), b.weights.end(), weights + place);
    for (int32_t count : b.counts) {
      place += count;
      *++offsets = place;
    }
  }
}

void sus_lists_free(SusLists* lists) { delete lists; }

int sus_backward(const SusBackward* args) {
  try {
    sus::backward(*args);
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}
}
