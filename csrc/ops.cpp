// The klq_native operators: tensors in, kernels run over torch's threads. klq_kernels/backends/portable.py documents each of them.
//
// Written against torch's stable ABI, so that one build serves every torch from 2.10 on. What would make a kernel touch
// memory that is not the caller's is checked here; what the numbers should be is checked in Python.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <optional>
#if !defined(_WIN32)
#include <pthread.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "kernels.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

constexpr int64_t LOGITS = 32768;  // worth waking a thread for
constexpr int64_t TOKENS = 16384;  // likewise, of per-token columns

// ---- which instruction set --------------------------------------------------------------------------------------

enum Isa : int64_t { PORTABLE, AVX2, AVX512 };

int64_t best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
                    __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return avx512 ? AVX512 : avx2 ? AVX2 : PORTABLE;
#else
  return PORTABLE;
#endif
}

const Kernels* kernels_of(int64_t isa) {
#if defined(__x86_64__)
  if (isa == AVX512) return &kernels_avx512;
  if (isa == AVX2) return &kernels_avx2;
#endif
  return &kernels_portable;
}

std::atomic<const Kernels*> kernels{kernels_of(best_isa())};

int64_t use_isa(int64_t isa) {  // -1: the best this processor has
  const int64_t best = best_isa();
  STD_TORCH_CHECK(isa >= -1 && isa <= best, "use_isa: this processor has instruction sets up to ", best, ", not ", isa);
  const int64_t chosen = isa < 0 ? best : isa;
  kernels = kernels_of(chosen);
  return chosen;
}

// ---- tensors to pointers ----------------------------------------------------------------------------------------

Dtype dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::f16;
    case ScalarType::Double: return Dtype::f64;
    default: STD_TORCH_CHECK(false, name, ": must be a floating-point tensor");
  }
}

template <class T>
T* vector_of(const Tensor& t, int64_t size, ScalarType type, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == type, name, ": has the wrong dtype");
  STD_TORCH_CHECK(t.numel() == size && t.is_contiguous(), name, ": must be contiguous with ", size, " elements");
  return static_cast<T*>(t.data_ptr());
}

float* floats(const Tensor& t, int64_t size, const char* name) {
  return vector_of<float>(t, size, ScalarType::Float, name);
}

float* floats(const Maybe& t, int64_t size, const char* name) { return t ? floats(*t, size, name) : nullptr; }

Column column(const Tensor& t, int64_t size, const char* name) {
  STD_TORCH_CHECK(t.numel() == size && t.is_contiguous(), name, ": must be contiguous with ", size, " elements");
  return {t.data_ptr(), dtype_of(t, name)};
}

Column column(const Maybe& t, int64_t size, const char* name) { return t ? column(*t, size, name) : Column{}; }

Sequences sequences(const Maybe& mask, const Tensor& cu_seqlens, int64_t first_row, int64_t tokens) {
  const int64_t batch = cu_seqlens.numel() - 1;
  STD_TORCH_CHECK(batch >= (tokens > 0) && first_row >= 0, "cu_seqlens: must be [B + 1], and first_row not negative");
  return {mask ? vector_of<uint8_t>(*mask, tokens, ScalarType::Bool, "mask") : nullptr,
          vector_of<int32_t>(cu_seqlens, batch + 1, ScalarType::Int, "cu_seqlens"), batch, first_row, tokens};
}

void* strip_of(const Tensor& t, int64_t rows, int64_t columns, const char* name) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns && t.is_contiguous(), name,
                  ": must be contiguous, [", rows, ", ", columns, "]");
  STD_TORCH_CHECK(dtype_of(t, name) != Dtype::f64, name, ": must be float32, bfloat16 or float16");
  return t.data_ptr();
}

int64_t groups_of(int64_t tokens) { return (tokens + GROUP - 1) / GROUP; }

int64_t groups_worth_a_thread(int64_t entries) { return LOGITS / (GROUP * (entries + 1)) + 1; }

// A sequence is one thread's work, so a single one wakes nobody else.
int64_t tokens_worth_a_thread(const Sequences& s) { return s.batch > 1 ? TOKENS : s.tokens + 1; }

// torch's threads do not survive a fork (waiting for them would hang), so a child process works on its own.
bool forked = false;
#if !defined(_WIN32)
[[maybe_unused]] const int watching = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif

template <class Arguments>
void run(void (*kernel)(const Arguments&, int64_t, int64_t), const Arguments& arguments, int64_t size, int64_t grain) {
  if (size == 0) return;
  if (forked) return kernel(arguments, 0, size);
  torch::stable::parallel_for(
      0, size, grain, [&](int64_t begin, int64_t end) { kernel(arguments, begin, end); });
}

// ---- fresh memory -----------------------------------------------------------------------------------------------

#if defined(__linux__)
constexpr int POPULATE_WRITE = 23;  // MADV_POPULATE_WRITE, Linux 5.14; headers may be older than the kernel
constexpr uintptr_t PAGE = 4096, PIECE = uintptr_t(1) << 21;

struct Memory {
  uintptr_t begin, end;
};

void populate_pieces(const Memory& memory, int64_t from, int64_t to) {
  for (int64_t i = from; i < to; ++i) {
    const uintptr_t begin = memory.begin + uintptr_t(i) * PIECE, left = memory.end - begin;
    madvise(reinterpret_cast<void*>(begin), left < PIECE ? left : PIECE, POPULATE_WRITE);  // a kernel may refuse
  }
}
#endif

// Has the kernel provide the pages of a new buffer, many at a time and on all threads. One by one, as they are first
// written, they take about as long again as the matrix product that writes them.
void populate(Tensor buffer) {
#if defined(__linux__)
  const uintptr_t first = reinterpret_cast<uintptr_t>(buffer.data_ptr());
  const uintptr_t last = first + uintptr_t(buffer.numel()) * buffer.element_size();
  const Memory memory{(first + PAGE - 1) / PAGE * PAGE, last / PAGE * PAGE};
  if (memory.begin >= memory.end) return;
  run(populate_pieces, memory, int64_t((memory.end - memory.begin + PIECE - 1) / PIECE), 1);
#endif
}

// ---- operators --------------------------------------------------------------------------------------------------

void strip_stats(Tensor logits, int64_t first, Tensor actions, Tensor top, Tensor total, Maybe weighted, Tensor taken,
                 double scale, std::optional<double> softcap) {
  STD_TORCH_CHECK(logits.dim() == 2, "logits: must be [entries, tokens]");
  const int64_t entries = logits.size(0), n = logits.size(1);
  const StripStats a{strip_of(logits, entries, n, "logits"), dtype_of(logits, "logits"), entries, n, first,
                     vector_of<int64_t>(actions, n, ScalarType::Long, "actions"), floats(top, n, "top"),
                     floats(total, n, "total"), floats(weighted, n, "weighted"), floats(taken, n, "taken"),
                     float(scale), float(softcap.value_or(0.0))};
  run(kernels.load()->strip_stats, a, groups_of(n), groups_worth_a_thread(entries));
}

void strip_grad(Tensor logits, int64_t first, Tensor actions, Tensor top, Tensor log_total, Tensor d_action,
                Tensor d_softmax, Maybe d_entropy, Maybe entropy, Tensor out, Maybe turned, double scale,
                std::optional<double> softcap) {
  STD_TORCH_CHECK(logits.dim() == 2, "logits: must be [entries, tokens]");
  const int64_t entries = logits.size(0), n = logits.size(1);
  const Dtype dtype = dtype_of(logits, "logits"), out_dtype = dtype_of(out, "out");
  STD_TORCH_CHECK(out_dtype == dtype || out_dtype == Dtype::f32, "out: must be float32 or have the dtype of logits");
  STD_TORCH_CHECK(!turned || dtype_of(*turned, "turned") == out_dtype, "turned: must have the dtype of out");
  const bool with_entropy = d_entropy && entropy;
  const StripGrad a{strip_of(logits, entries, n, "logits"), dtype, entries, n, first,
                    vector_of<int64_t>(actions, n, ScalarType::Long, "actions"), floats(top, n, "top"),
                    floats(log_total, n, "log_total"), floats(d_action, n, "d_action"), floats(d_softmax, n, "d_softmax"),
                    with_entropy ? floats(d_entropy, n, "d_entropy") : nullptr,
                    with_entropy ? floats(entropy, n, "entropy") : nullptr, strip_of(out, entries, n, "out"),
                    turned ? strip_of(*turned, n, entries, "turned") : nullptr, out_dtype, float(scale),
                    float(softcap.value_or(0.0))};
  run(kernels.load()->strip_grad, a, groups_of(n), groups_worth_a_thread(entries));
}

void strip_select(Tensor logits, int64_t first, Tensor actions, Tensor top, Tensor log_total, Tensor d_action,
                  Tensor d_softmax, Tensor threshold, Tensor fractions, Tensor offsets, Tensor columns, Tensor values,
                  Tensor counts, double scale, std::optional<double> softcap) {
  STD_TORCH_CHECK(logits.dim() == 2, "logits: must be [entries, tokens]");
  const int64_t entries = logits.size(0), n = logits.size(1), room = columns.numel();
  const int64_t* places = vector_of<int64_t>(offsets, n + 1, ScalarType::Long, "offsets");
  int32_t* kept = vector_of<int32_t>(counts, n, ScalarType::Int, "counts");
  for (int64_t t = 0; t < n; ++t) {
    STD_TORCH_CHECK(0 <= places[t] && places[t] <= places[t + 1] && places[t + 1] <= room && kept[t] >= 0,
                    "offsets: must ascend from 0 to the size of columns, and counts must not be negative");
  }
  const StripSelect a{strip_of(logits, entries, n, "logits"), dtype_of(logits, "logits"), entries, n, first,
                      vector_of<int64_t>(actions, n, ScalarType::Long, "actions"), floats(top, n, "top"),
                      floats(log_total, n, "log_total"), floats(d_action, n, "d_action"),
                      floats(d_softmax, n, "d_softmax"), *floats(threshold, 1, "threshold"),
                      reinterpret_cast<uint32_t*>(vector_of<int32_t>(fractions, n, ScalarType::Int, "fractions")),
                      places, vector_of<int32_t>(columns, room, ScalarType::Int, "columns"),
                      floats(values, room, "values"), kept, float(scale), float(softcap.value_or(0.0))};
  run(kernels.load()->strip_select, a, groups_of(n), groups_worth_a_thread(entries));
  for (int64_t t = 0; t < n; ++t) {
    STD_TORCH_CHECK(kept[t] <= places[t + 1] - places[t], "offsets: leave a token less room than it has entries");
  }
}

void weighted_sums(Tensor begins, Tensor ends, Tensor index, Tensor values, Tensor source, Tensor out) {
  STD_TORCH_CHECK(source.dim() == 2 && out.dim() == 2, "source, out: must be matrices");
  const int64_t rows = out.size(0), width = out.size(1), size = index.numel(), from = source.size(0);
  const WeightedSums a{vector_of<int64_t>(begins, rows, ScalarType::Long, "begins"),
                       vector_of<int64_t>(ends, rows, ScalarType::Long, "ends"),
                       vector_of<int32_t>(index, size, ScalarType::Int, "index"), floats(values, size, "values"),
                       strip_of(source, from, width, "source"), dtype_of(source, "source"),
                       strip_of(out, rows, width, "out"), dtype_of(out, "out"), width};
  for (int64_t row = 0; row < rows; ++row) {
    STD_TORCH_CHECK(0 <= a.begins[row] && a.begins[row] <= a.ends[row] && a.ends[row] <= size,
                    "begins, ends: must lie within index");
    for (int64_t e = a.begins[row]; e < a.ends[row]; ++e) {
      STD_TORCH_CHECK(0 <= a.index[e] && a.index[e] < from, "index: must name rows of source");
    }
  }
  run(kernels.load()->weighted_sums, a, rows, LOGITS / (width + 1) + 1);
}

void row_dots(Tensor left, Maybe places, Tensor index, Tensor right, Tensor out) {
  STD_TORCH_CHECK(left.dim() == 2 && right.dim() == 2 && index.dim() == 2, "left, right, index: must be matrices");
  const int64_t rows = left.size(0), width = left.size(1), from = right.size(0);
  const int64_t tokens = index.size(0), entries = index.size(1);
  const RowDots a{places ? vector_of<int64_t>(*places, tokens, ScalarType::Long, "places") : nullptr,
                  vector_of<int32_t>(index, tokens * entries, ScalarType::Int, "index"),
                  strip_of(left, rows, width, "left"), dtype_of(left, "left"),
                  strip_of(right, from, width, "right"), dtype_of(right, "right"),
                  floats(out, tokens * entries, "out"), entries, width};
  STD_TORCH_CHECK(a.places || tokens == rows, "index: must have a row for each of left, where there are no places");
  for (int64_t token = 0; token < tokens; ++token) {
    STD_TORCH_CHECK(!a.places || (0 <= a.places[token] && a.places[token] < rows), "places: must name rows of left");
  }
  for (int64_t e = 0; e < tokens * entries; ++e) {
    STD_TORCH_CHECK(0 <= a.index[e] && a.index[e] < from, "index: must name rows of right");
  }
  run(kernels.load()->row_dots, a, tokens, LOGITS / (entries * width + 1) + 1);
}

void klq_residual(Tensor logp, Tensor values, Maybe old_logp, Maybe old_values, Tensor advantages, Maybe weights,
                  Tensor losses, Tensor d_logp, Tensor d_values, Tensor grad_scale, double tau, double alpha,
                  int64_t loss, double huber_delta, double value_clip, double log_ratio_clip) {
  const int64_t n = logp.numel();
  const Residual a{floats(logp, n, "logp"), floats(values, n, "values"), floats(old_logp, n, "old_logp"),
                   floats(old_values, n, "old_values"), floats(advantages, n, "advantages"),
                   floats(weights, n, "weights"), floats(losses, n, "losses"), floats(d_logp, n, "d_logp"),
                   floats(d_values, n, "d_values"), *floats(grad_scale, 1, "grad_scale"), float(tau), float(alpha),
                   float(huber_delta), float(value_clip), float(log_ratio_clip), Loss(loss)};
  run(kernels.load()->residual, a, n, TOKENS);
}

void reverse_scan(Tensor delta, Tensor decay, Maybe mask, Tensor cu_seqlens, Tensor out) {
  const int64_t n = delta.numel();
  ReverseScan a{sequences(mask, cu_seqlens, 0, n), column(delta, n, "delta"), {}, 0.0f, floats(out, n, "out")};
  if (decay.numel() == 1) {
    a.constant_decay = *floats(decay, 1, "decay");
  } else {
    a.decay = column(decay, n, "decay");
  }
  run(kernels.load()->reverse_scan, a, n, tokens_worth_a_thread(a.sequences));
}

void lambda_errors(Maybe logp, Maybe ref_logp, Tensor values, Maybe rewards, Maybe trace, Tensor tail, Maybe mask,
                   Tensor cu_seqlens, Tensor out, double tau, double gamma, double lam, int64_t first_row,
                   Maybe carry, Maybe kept_logp, Maybe kept_values) {
  const int64_t n = values.numel();
  float* carried = floats(carry, 1, "carry");
  const bool with_logp = logp && ref_logp;
  float state = carried ? *carried : 0.0f;
  const LambdaErrors a{sequences(mask, cu_seqlens, first_row, n),
                       with_logp ? column(logp, n, "logp") : Column{},
                       with_logp ? column(ref_logp, n, "ref_logp") : Column{},
                       column(values, n, "values"), column(rewards, n, "rewards"), column(trace, n, "trace"),
                       floats(tail, cu_seqlens.numel() - 1, "tail"),
                       state, &state, floats(out, n, "out"),
                       with_logp ? floats(kept_logp, n, "kept_logp") : nullptr,
                       floats(kept_values, n, "kept_values"), float(tau), float(gamma), float(gamma * lam)};
  run(kernels.load()->lambda_errors, a, n, tokens_worth_a_thread(a.sequences));
  if (carried) *carried = state;
}

}  // namespace

STABLE_TORCH_LIBRARY(klq_native, m) {
  m.def("use_isa(int isa) -> int");
  m.def("populate(Tensor(a!) buffer) -> ()");
  m.def(
      "strip_stats(Tensor logits, int first, Tensor actions, Tensor(a!) top, Tensor(b!) total, Tensor(c!)? weighted, "
      "Tensor(d!) taken, float scale, float? softcap) -> ()");
  m.def(
      "strip_grad(Tensor logits, int first, Tensor actions, Tensor top, Tensor log_total, Tensor d_action, "
      "Tensor d_softmax, Tensor? d_entropy, Tensor? entropy, Tensor(a!) out, Tensor(b!)? turned, float scale, "
      "float? softcap) -> ()");
  m.def(
      "strip_select(Tensor logits, int first, Tensor actions, Tensor top, Tensor log_total, Tensor d_action, "
      "Tensor d_softmax, Tensor threshold, Tensor(a!) fractions, Tensor offsets, Tensor(b!) columns, "
      "Tensor(c!) values, Tensor(d!) counts, float scale, float? softcap) -> ()");
  m.def(
      "weighted_sums(Tensor begins, Tensor ends, Tensor index, Tensor values, Tensor source, Tensor(a!) out) -> ()");
  m.def("row_dots(Tensor left, Tensor? places, Tensor index, Tensor right, Tensor(a!) out) -> ()");
  m.def(
      "klq_residual(Tensor logp, Tensor values, Tensor? old_logp, Tensor? old_values, Tensor advantages, "
      "Tensor? weights, Tensor(a!) losses, Tensor(b!) d_logp, Tensor(c!) d_values, Tensor grad_scale, float tau, "
      "float alpha, int loss, float huber_delta, float value_clip, float log_ratio_clip) -> ()");
  m.def("reverse_scan(Tensor delta, Tensor decay, Tensor? mask, Tensor cu_seqlens, Tensor(a!) out) -> ()");
  m.def(
      "lambda_errors(Tensor? logp, Tensor? ref_logp, Tensor values, Tensor? rewards, Tensor? trace, Tensor tail, "
      "Tensor? mask, Tensor cu_seqlens, Tensor(a!) out, float tau, float gamma, float lam, int first_row, "
      "Tensor(b!)? carry, Tensor(c!)? kept_logp, Tensor(d!)? kept_values) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(klq_native, CompositeExplicitAutograd, m) { m.impl("use_isa", TORCH_BOX(&use_isa)); }

STABLE_TORCH_LIBRARY_IMPL(klq_native, CPU, m) {
  m.impl("populate", TORCH_BOX(&populate));
  m.impl("strip_stats", TORCH_BOX(&strip_stats));
  m.impl("strip_grad", TORCH_BOX(&strip_grad));
  m.impl("strip_select", TORCH_BOX(&strip_select));
  m.impl("weighted_sums", TORCH_BOX(&weighted_sums));
  m.impl("row_dots", TORCH_BOX(&row_dots));
  m.impl("klq_residual", TORCH_BOX(&klq_residual));
  m.impl("reverse_scan", TORCH_BOX(&reverse_scan));
  m.impl("lambda_errors", TORCH_BOX(&lambda_errors));
}
