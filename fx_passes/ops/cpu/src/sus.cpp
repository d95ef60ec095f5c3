// The C interface. build.py compiles this one file, once per instruction set that a machine offers.
#include <algorithm>

#include "backward.inc"
#include "extras.inc"
#include "sample.inc"

namespace sus {

namespace {

constexpr int64_t KEPT_CHUNKS = 32;  // up to so many chunks of keys, weights are kept for the sampler: 1.7 MB

struct Thread {
  Scratch scratch;
  Sampler sampler;

  Thread(const SusForward& args, int64_t weight_rows) : scratch(args, weight_rows) {}
};

// All tasks of a forward in one parallel region: first those that pack key head 0, then its row blocks, then head 1 ...
// A barrier per head would cost a time slice each on a busy machine. Instead, a row block waits until its head is
// packed, and a head is packed when all row blocks have left the buffer it gets: both wait for earlier tasks only.
class Forward {
 public:
  Forward(const SusForward& args, SusLists& lists);
  void run();

 private:
  void task(int64_t task, int thread);
  void block(int64_t key_head, int64_t task, int thread);

  const SusForward& args_;
  const SusCall& call_;
  SusLists& lists_;
  const int64_t chunks_, seen_chunks_;  // of a key head, and of those the most that a block of rows sees
  const Sampling sampling_;
  const int64_t rows_, blocks_, heads_, per_group_;  // rows_ of a block
  std::vector<std::unique_ptr<Packed>> ring_;  // key head h uses number h modulo the size
  std::vector<std::unique_ptr<Thread>> threads_;
  std::vector<Progress> packed_, done_;  // chunks and row blocks, per key head
  Peaks peaks_;
};

Forward::Forward(const SusForward& args, SusLists& lists)
    : args_(args),
      call_(args.call),
      lists_(lists),
      chunks_(ceil_div(call_.n, CHUNK)),
      seen_chunks_(most_chunks(call_, KEPT_ROWS)),
      sampling_(args.c <= 0 ? NO_SAMPLING : seen_chunks_ <= KEPT_CHUNKS ? FROM_WEIGHTS : FROM_PRODUCTS),
      rows_(sampling_ == FROM_WEIGHTS ? KEPT_ROWS : ROWS),
      blocks_(ceil_div(call_.m, rows_)),
      heads_(call_.batch * call_.groups),
      per_group_(call_.heads / call_.groups),
      packed_(heads_),
      done_(heads_) {
  // So many heads at a time that threads seldom wait, and few copies of K and V.
  const int64_t together = clamp(ceil_div(8 * call_.threads, blocks_ * per_group_) + 1, 1, heads_);
  for (int64_t i = 0; i < together; i++)
    ring_.push_back(std::make_unique<Packed>(call_, sampling_ == FROM_PRODUCTS, args.out != nullptr));
  const int64_t weight_rows = sampling_ == FROM_WEIGHTS ? seen_chunks_ * rows_ : rows_;
  for (int i = 0; i < call_.threads; i++) threads_.push_back(std::make_unique<Thread>(args, weight_rows));
  if (sampling_) lists.blocks.resize(call_.batch * call_.heads * blocks_);
}

void Forward::run() {
  const int64_t tasks = heads_ * (chunks_ + blocks_ * per_group_);
  parallel(call_.threads, tasks, [this](int64_t t, int thread) { task(t, thread); });
  int64_t row = 0, entry = 0;
  for (Block& b : lists_.blocks) {
    b.first_row = row, b.first_entry = entry;
    row += int64_t(b.counts.size());
    entry += int64_t(b.keys.size());
  }
}

void Forward::task(int64_t task, int thread) {
  const int64_t blocks = blocks_ * per_group_, head = task / (chunks_ + blocks), local = task % (chunks_ + blocks);
  const int64_t before = head - int64_t(ring_.size());
  if (local < chunks_) {
    if (before >= 0) done_[before].wait(blocks);
    ring_[head % ring_.size()]->fill(call_, head / call_.groups, head % call_.groups, local, peaks_);
    packed_[head].add();
    return;
  }
  packed_[head].wait(chunks_);
  struct Leave {  // also when memory runs out
    Progress& progress;
    ~Leave() { progress.add(); }
  } leave{done_[head]};
  block(head, local - chunks_, thread);
}

// From the last rows to the first: under a causal mask the last are the longest.
void Forward::block(int64_t key_head, int64_t task, int thread) {
  const int64_t block = blocks_ - 1 - task / per_group_, batch = key_head / call_.groups;
  const int64_t head = key_head % call_.groups * per_group_ + task % per_group_;
  const int64_t first = block * rows_, count = call_.m - first < rows_ ? call_.m - first : rows_;
  if (!lists_.usable) return;
  Thread& at = *threads_[thread];
  Rows rows{args_, *ring_[key_head % ring_.size()], peaks_, batch, head, first, count, sampling_, at.scratch};
  if (!rows.run([&] { at.sampler.start(rows); }, [&](int64_t chunk) { at.sampler.visit(rows, chunk); }))
    lists_.usable = false;
  else if (sampling_) at.sampler.finish(rows, lists_.blocks[(batch * call_.heads + head) * blocks_ + block]);
}

}  // namespace

void forward(const SusForward& args, SusLists& lists) { Forward(args, lists).run(); }

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

int sus_lists_usable(const SusLists* lists) { return lists->usable; }

int64_t sus_lists_count(const SusLists* lists) {
  return lists->blocks.empty() ? 0 : lists->blocks.back().first_entry + int64_t(lists->blocks.back().keys.size());
}

void sus_lists_export(const SusLists* lists, int64_t* offsets, int32_t* keys, float* weights, int32_t threads) {
  const int64_t count = sus_lists_count(lists);
  ask_for_huge_pages(keys, count * sizeof(int32_t));  // the backward reads a few entries of each row at a time
  ask_for_huge_pages(weights, count * sizeof(float));
  *offsets = 0;
  parallel(threads, int64_t(lists->blocks.size()), [&](int64_t i, int) {
    const Block& b = lists->blocks[i];
    std::copy(b.keys.begin(), b.keys.end(), keys + b.first_entry);
    std::copy(b.weights.begin(), b.weights.end(), weights + b.first_entry);
    int64_t *place = offsets + b.first_row, end = b.first_entry;
    for (int32_t count : b.counts) *++place = end += count;
  });
}

void sus_lists_free(SusLists* lists) { delete lists; }

int sus_backward(const SusBackward* args) {
  try {
    return sus::backward(*args) ? 0 : 2;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

int64_t sus_release_memory() { return int64_t(Pool::of_process().release()); }
}
