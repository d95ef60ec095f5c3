// The C interface between Python (bind.py mirrors these structs) and the kernels. Sizes and strides count elements.
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {

struct SusStrides {
  int64_t batch, head, row;  // the last dimension has stride 1
};

struct SusPlaces {
  int64_t batch, head, row, key;  // 0 where it is broadcast
};

enum SusDtype : int32_t { SUS_FLOAT32 = 0, SUS_BFLOAT16 = 1, SUS_FLOAT16 = 2 };

// What forward and backward share: B batch entries, H query heads, G key heads, M queries, N keys.
struct SusCall {
  const void *query, *key, *value;
  SusStrides query_strides, key_strides, value_strides;
  const uint8_t* mask;  // bool per (batch, key), 1 takes part; null is no mask
  int64_t mask_batch, mask_key;
  const uint8_t* places;  // bool per (batch, head, row, key), 1 takes part; null is no mask
  SusPlaces places_strides;
  const float* bias;  // added to the logits; null is no bias
  SusPlaces bias_strides;
  const int64_t *query_ids, *key_ids;  // [.., M] and [.., N], a query sees keys of its number; null is no numbers
  int64_t query_ids_batch, key_ids_batch;  // strides, 0 where they are broadcast
  const int64_t* prefix;  // [..], keys before it are seen whatever `right` says; null is none
  int64_t prefix_batch;
  const float* sinks;  // [H], logits that only the softmax's total knows; null is none
  int64_t batch, heads, groups, m, n;
  int64_t dk, dv;  // widths as computed with: those of the tensors, filled up with zeros to multiples of 16
  int64_t key_width, value_width;
  int64_t left, right;  // row i sees keys i - left .. i + right
  float scale;    // above 0
  int32_t dtype;  // SusDtype
  int32_t threads;
  int32_t ids_ascend;  // whether query_ids and key_ids do: the keys that a row sees are then neighbours
  float softcap;  // logits become softcap * tanh(logits / softcap), before biases; 0 is off
  float dropout_factor;  // 1 / (1 - p) of weights that are not dropped
};

struct SusForward {
  SusCall call;
  double c;  // finite and above 0 samples; 0 does not
  uint64_t seed;
  uint64_t dropout_seed;
  uint32_t stream, dropout_stream;
  uint32_t drop_below;  // words below it drop their weight: p 2^32; 0 is no dropout
  void* out;  // null: another kernel computed it, and this call only samples
  SusStrides out_strides;
  float *maximum, *total;  // [B, H, M]; null: not wanted
};

struct SusBackward {
  SusCall call;
  const void *grad, *out;
  SusStrides grad_strides, out_strides;
  const int64_t* offsets;  // [B * H * M + 1]
  const int32_t* keys;
  const float* weights;  // as the forward left them
  void *query_grad, *key_grad, *value_grad;  // contiguous, of the inputs' dtype
  float* bias_grad;  // contiguous; null: not wanted
  SusPlaces bias_grad_strides;  // 0 where the bias is broadcast
};

// Kept entries of a forward, in compressed rows; the weight of one that dropout drops is negative. `sus_forward` returns null when memory runs out.
struct SusLists;

SusLists* sus_forward(const SusForward*);
int sus_lists_usable(const SusLists*);  // 0: numbers beyond range.inc, and nothing that the forward wrote counts
int64_t sus_lists_count(const SusLists*);
void sus_lists_export(const SusLists*, int64_t* offsets, int32_t* keys, float* weights, int32_t threads);
void sus_lists_free(SusLists*);
int sus_backward(const SusBackward*);  // 0; 1 when memory runs out; 2 for numbers beyond range.inc
int64_t sus_release_memory();          // gives back what calls have left for later ones; its bytes
}
