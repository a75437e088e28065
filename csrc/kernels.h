// The arguments of each kernel, and the table of an instruction set's kernels.
//
// Plain data, no torch: ops.cpp fills these structs from tensors, kernels_<isa>.cpp run on them. Every kernel does a
// range of independent pieces (tokens, groups of them, sequences), so any split of the range over threads gives the same bits.
#pragma once

#include <stdint.h>

constexpr int LANES = 16;          // of the vectors all kernels are written in
constexpr int GROUP = 2 * LANES;  // tokens whose column of a strip is one thread's work: a cache line of 16-bit logits
constexpr int TILE = 32;          // entries of a strip that are turned at a time: likewise

struct bf16 {  // 16-bit floats by their bits
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

enum class Dtype { f32, bf16, f16, f64 };

struct Column {  // one number per token, contiguous; absent where data is null
  const void* data = nullptr;
  Dtype dtype = Dtype::f32;
};

// A strip is a range of the vocabulary, from `first` on, by some tokens: logits[entry][token], tokens adjacent.
struct StripStats {
  const void* logits;
  Dtype dtype;
  int64_t entries, tokens, first;
  const int64_t* actions;
  float *top, *total, *weighted, *taken;  // [tokens], what the strips before came to; weighted may be null
  float scale, softcap;                   // softcap 0: none
};

struct StripGrad {
  const void* logits;
  Dtype dtype;
  int64_t entries, tokens, first;
  const int64_t* actions;
  const float *top, *log_total;
  const float *d_action, *d_softmax, *d_entropy, *entropy;  // the last two may be null, together
  void *out, *turned;  // [entry][token], may be logits itself; [token][entry], may be null
  Dtype out_dtype;     // of both; fp32 has none turned
  float scale, softcap;
};

struct StripSelect {
  const void* logits;
  Dtype dtype;
  int64_t entries, tokens, first;
  const int64_t* actions;
  const float *top, *log_total, *d_action, *d_softmax;
  float threshold;
  uint32_t* fractions;     // [tokens], the running sums in 2^-32; updated
  const int64_t* offsets;  // [tokens + 1]: where each token's entries go in the next two
  int32_t* columns;
  float* values;
  int32_t* counts;  // [tokens], entries so far; updated
  float scale, softcap;
};

struct WeightedSums {  // out[row] = sum of values[e] source[index[e]] over begins[row] <= e < ends[row]
  const int64_t *begins, *ends;
  const int32_t* index;
  const float* values;
  const void* source;
  Dtype dtype;
  void* out;
  Dtype out_dtype;
  int64_t width;
};

struct RowDots {  // out[token][e] = left[places[token]] . right[index[token][e]]
  const int64_t* places;  // null: the token itself
  const int32_t* index;
  const void* left;
  Dtype left_dtype;
  const void* right;
  Dtype right_dtype;
  float* out;
  int64_t entries, width;
};

enum class Loss : int64_t { l2, huber, value_clipped, ratio_clipped, double_clipped };

struct Residual {
  const float *logp, *values, *old_logp, *old_values, *advantages, *weights;  // old_* and weights may be null
  float *losses, *d_logp, *d_values;
  float grad_scale, tau, alpha, huber_delta, value_clip, log_ratio_clip;
  Loss loss;
};

// The tokens a scan walks: element j of the columns is position first_row + j in cu_seqlens.
struct Sequences {
  const uint8_t* mask;  // null: all valid
  const int32_t* cu_seqlens;
  int64_t batch, first_row, tokens;
};

struct ReverseScan {
  Sequences sequences;
  Column delta, decay;  // decay absent: constant_decay throughout
  float constant_decay;
  float* out;
};

struct LambdaErrors {
  Sequences sequences;
  Column logp, ref_logp, values, rewards, trace;  // all but values may be absent
  const float* tail;                              // [batch]
  float carry;                                    // beyond the last token, where no sequence ends there
  float* first;                                   // receives the state at the first token; may be null
  float* out;
  float *kept_logp, *kept_values;                 // receive logp and values, 0 at masked tokens; may be null
  float tau, gamma, decay;                        // decay = gamma lambda
};

struct Kernels {
  void (*strip_stats)(const StripStats&, int64_t begin, int64_t end);      // groups of GROUP tokens
  void (*strip_grad)(const StripGrad&, int64_t begin, int64_t end);        // likewise
  void (*strip_select)(const StripSelect&, int64_t begin, int64_t end);    // likewise
  void (*weighted_sums)(const WeightedSums&, int64_t begin, int64_t end);  // rows
  void (*row_dots)(const RowDots&, int64_t begin, int64_t end);            // tokens
  void (*residual)(const Residual&, int64_t begin, int64_t end);           // tokens
  void (*reverse_scan)(const ReverseScan&, int64_t begin, int64_t end);    // sequences that begin at these tokens
  void (*lambda_errors)(const LambdaErrors&, int64_t begin, int64_t end);  // likewise
};

extern const Kernels kernels_portable;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif
