// The reverse recurrences over time. Include after a simd_*.h and functions.h.
//
// A sequence is walked from its last valid token to its first, sixteen valid tokens at a time. Within such a block
//
//     S_t = a_t + b_t S_{t+1}
//
// is solved in registers by doubling: after the step of width k every lane has absorbed the 2k tokens from itself on.
// All that a block needs of later tokens is one scalar, carried from block to block. Blocks are counted in valid tokens from the
// end of the sequence, and sequences never share one, so a sequence gives the same bits wherever it lies, however its
// tokens are spread between masked ones, and on any number of threads; and nothing crosses from one into another.
//
// A block of fewer than sixteen tokens, the first of its sequence, fills the last lanes. No lane depends on one before
// it, so what the lanes before hold is of no consequence and the arithmetic needs no mask.
//
// A piece without masked tokens is worked on where it lies. Otherwise the terms of the recurrence, a, b and what else
// the result is made of, are computed at all positions and those of up to 512 valid tokens compressed into a buffer in
// the first-level cache; the results are expanded from there. Positions all masked are not even read.
//
// Memory is read against its direction, which processors do not foresee well: every read asks for what comes later.
#pragma once

namespace {

constexpr int64_t WINDOW = 32 * LANES;  // valid tokens
constexpr uintptr_t AHEAD = 2048;       // bytes
constexpr uint32_t ALL = (1u << LANES) - 1;

template <class T>
inline void prefetch(const T* p) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) - AHEAD));
}

// The tokens at `count` positions from `at` on, in the last lanes of a vector.
struct Block {
  int64_t at, count;

  Block next() const { return {at + count, LANES}; }

  template <class T>
  Vec read_as(const void* data) const {
    const T* p = static_cast<const T*>(data) + at;
    prefetch(p);
    return count == LANES ? load(p) : load_last(p, count);
  }

  template <bool FP32>
  Vec read(const Column& column) const {
    if (FP32) return read_as<float>(column.data);
    switch (column.dtype) {
      case Dtype::bf16: return read_as<bf16>(column.data);
      case Dtype::f16: return read_as<f16>(column.data);
      case Dtype::f64: return read_as<double>(column.data);
      default: return read_as<float>(column.data);
    }
  }

  void write(float* p, Vec v) const {
    if (count == LANES) return store(p + at, v);
    store_last(p + at, v, count);
  }

  uint32_t flags(const uint8_t* mask) const {  // of the lanes that hold a valid token
    if (count == LANES) return flags_of(mask + at);
    uint8_t copy[LANES] = {};
    memcpy(copy + LANES - count, mask + at, size_t(count));
    return flags_of(copy);
  }
};

// The products of decays that the doubling steps need, and the decay from each lane to beyond the block.
struct Decays {
  Vec step1, step2, step4, step8, total;

  explicit Decays(Vec b) {
    const Vec one = broadcast(1.0f);
    step1 = b;
    step2 = step1 * shift<1>(step1, one);
    step4 = step2 * shift<2>(step2, one);
    step8 = step4 * shift<4>(step4, one);
    total = step8 * shift<8>(step8, one);
  }

  Vec solve(Vec a, Vec beyond) const {
    const Vec zero = broadcast(0.0f);
    a = fma(step1, shift<1>(a, zero), a);
    a = fma(step2, shift<2>(a, zero), a);
    a = fma(step4, shift<4>(a, zero), a);
    a = fma(step8, shift<8>(a, zero), a);
    return fma(total, beyond, a);
  }
};

// A_t = delta_t + decay_t A_{t+1}. Terms: delta and, where VARYING, decay.
template <bool VARYING, bool FP32>
struct ReverseScanStep {
  static constexpr int TERMS = VARYING ? 2 : 1;
  const ReverseScan& a;
  const Decays constant;

  explicit ReverseScanStep(const ReverseScan& a_) : a(a_), constant(broadcast(a_.constant_decay)) {}

  float* out() const { return a.out; }
  float beyond_sequence(int64_t) const { return 0.0f; }
  float beyond_tokens() const { return 0.0f; }
  void finish(float) const {}
  void skip(Block) const {}

  void terms(Block block, uint32_t, Vec* term) const {
    term[0] = block.read<FP32>(a.delta);
    if (VARYING) term[TERMS - 1] = block.read<FP32>(a.decay);
  }

  // Nothing follows the last token of a sequence, so whatever its decay holds, or comes to over a block, must not count.
  Vec solve(const Vec* term, Vec beyond, bool last, Vec* state) const {
    if (!VARYING && !last) return *state = constant.solve(term[0], beyond);
    const Vec b = VARYING ? term[TERMS - 1] : constant.step1;
    return *state = Decays(last ? select(lanes_of(ALL >> 1), b, broadcast(0.0f)) : b).solve(term[0], beyond);
  }
};

// A_t = u_t + S_{t+1} with S_t = (gamma V_t + b_t u_t) + b_t S_{t+1}, b_t = gamma lambda c_t, u_t = r_t - Q_t:
// S_t is all that token t - 1 needs of its future (portable.lambda_errors derives it). Terms: u, gamma V + b u and,
// where VARYING, b.
template <bool VARYING, bool FP32>
struct LambdaErrorsStep {
  static constexpr int TERMS = VARYING ? 3 : 2;
  const LambdaErrors& a;
  const Decays constant;

  explicit LambdaErrorsStep(const LambdaErrors& a_) : a(a_), constant(broadcast(a_.decay)) {}

  float* out() const { return a.out; }
  float beyond_sequence(int64_t i) const { return a.tail[i]; }
  float beyond_tokens() const { return a.carry; }
  void finish(float s) const {
    if (a.first) *a.first = s;
  }
  void skip(Block block) const {
    if (a.kept_values) block.write(a.kept_values, broadcast(0.0f));
    if (a.kept_logp) block.write(a.kept_logp, broadcast(0.0f));
  }

  void terms(Block block, uint32_t flags, Vec* term) const {
    const Vec v = block.read<FP32>(a.values);
    Vec u = a.rewards.data ? block.read<FP32>(a.rewards) - v : broadcast(0.0f) - v;
    if (a.kept_values) keep(a.kept_values, v, block, flags);
    if (a.logp.data) {
      const Vec logp = block.read<FP32>(a.logp);
      u = u - broadcast(a.tau) * (logp - block.read<FP32>(a.ref_logp));
      if (a.kept_logp) keep(a.kept_logp, logp, block, flags);
    }
    const Vec b = VARYING ? broadcast(a.decay) * block.read<FP32>(a.trace) : constant.step1;
    term[0] = u;
    term[1] = fma(b, u, broadcast(a.gamma) * v);
    if (VARYING) term[TERMS - 1] = b;
  }

  Vec solve(const Vec* term, Vec beyond, bool, Vec* state) const {
    *state = (VARYING ? Decays(term[TERMS - 1]) : constant).solve(term[1], beyond);
    return term[0] + shift<1>(*state, beyond);
  }

 private:
  static void keep(float* p, Vec v, Block block, uint32_t flags) {
    block.write(p, flags == ALL ? v : select(lanes_of(flags), v, broadcast(0.0f)));
  }
};

// First position of the shortest piece [position, end) that holds WINDOW valid tokens, or `begin`; counts them.
inline int64_t window_start(const uint8_t* mask, int64_t begin, int64_t end, int64_t* valid) {
  int64_t position = end, count = 0;
  while (position - LANES >= begin) {
    const int64_t more = __builtin_popcount(flags_of(mask + position - LANES));
    if (count + more > WINDOW) break;
    position -= LANES;
    count += more;
  }
  while (position > begin && count < WINDOW) count += mask[--position] != 0;
  *valid = count;
  return position;
}

// The state of a walk: that of the block before (later in time), and how many tokens are in it.
struct Future {
  Vec state;
  int64_t count;
  bool last;  // the next block ends the sequence

  Vec beyond() const { return broadcast(first(state)); }
  float at_first_token() const {
    float lane[LANES];
    store(lane, state);
    return lane[LANES - count];
  }
};

template <class Step>
inline Vec advance(const Step& step, const Vec* term, int64_t count, Future* future) {
  const Vec out = step.solve(term, future->beyond(), future->last, &future->state);
  future->count = count;
  future->last = false;
  return out;
}

// The piece [begin, end) of a sequence, all of it valid.
template <class Step>
void walk_dense(const Step& step, int64_t begin, int64_t end, Future* future) {
  for (int64_t stop = end; stop > begin; stop -= LANES) {
    const int64_t count = stop - begin < LANES ? stop - begin : LANES;
    const Block block{stop - count, count};
    Vec term[Step::TERMS];
    step.terms(block, ALL, term);
    block.write(step.out(), advance(step, term, count, future));
  }
}

// The piece [begin, end) of a sequence, `valid` of whose tokens are.
template <class Step>
void walk_masked(const Step& step, const uint8_t* mask, int64_t begin, int64_t end, int64_t valid, Future* future) {
  constexpr int64_t ROOM = WINDOW + 2 * LANES;  // compress and expand touch a vector beyond what they need
  alignas(64) float staged[Step::TERMS][ROOM], results[ROOM];
  const int64_t empty = (LANES - valid % LANES) % LANES;  // lanes of the first block, so that blocks are aligned
  for (auto& column : staged) store(column, broadcast(0.0f));
  const Block first_block{begin, (end - begin) % LANES ? (end - begin) % LANES : LANES};
  int64_t filled = empty;
  for (Block block = first_block; block.at < end; block = block.next()) {
    const uint32_t flags = block.flags(mask);
    if (!flags) {
      step.skip(block);
      continue;
    }
    Vec term[Step::TERMS];
    step.terms(block, flags, term);
    for (int k = 0; k < Step::TERMS; ++k) compress(staged[k] + filled, term[k], flags);
    filled += __builtin_popcount(flags);
  }
  for (int64_t i = empty + valid - LANES; i >= 0; i -= LANES) {
    Vec term[Step::TERMS];
    for (int k = 0; k < Step::TERMS; ++k) term[k] = load(staged[k] + i);
    store(results + i, advance(step, term, i ? LANES : LANES - empty, future));
  }
  int64_t taken = empty;
  for (Block block = first_block; block.at < end; block = block.next()) {
    const uint32_t flags = block.flags(mask);
    block.write(step.out(), expand(results + taken, flags));
    taken += __builtin_popcount(flags);
  }
}

// Walks one sequence, or the piece [begin, end) of it; returns the state at its first valid token.
template <class Step>
float walk(const Step& step, const uint8_t* mask, int64_t begin, int64_t end, float beyond, bool ends_here) {
  Future future{broadcast(beyond), LANES, ends_here};
  while (end > begin) {
    int64_t start = begin, valid = end - begin;
    if (mask) start = window_start(mask, begin, end, &valid);
    if (valid == end - start) {
      walk_dense(step, start, end, &future);
    } else {
      walk_masked(step, mask, start, end, valid, &future);
    }
    end = start;
  }
  return future.at_first_token();
}

// Index of the sequence that holds a position: the last one that begins at or before it.
inline int64_t sequence_at(const Sequences& s, int64_t position) {
  int64_t low = 0, high = s.batch;  // cu_seqlens[low] <= position < cu_seqlens[high]
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (s.cu_seqlens[middle] <= position ? low : high) = middle;
  }
  return low;
}

// Walks the sequences whose first token here lies in [from, to), the last one first: one sweep through memory.
template <class Step>
void walk_all(const Step& step, const Sequences& s, int64_t from, int64_t to) {
  for (int64_t i = sequence_at(s, s.first_row + to - 1); i >= 0; --i) {
    const int64_t begin = s.cu_seqlens[i] - s.first_row, end = s.cu_seqlens[i + 1] - s.first_row;
    const int64_t here = begin > 0 ? begin : 0;
    if (here < from || end <= 0) break;
    if (here >= to || end <= here) continue;
    const bool ends_here = end <= s.tokens;
    const float beyond = ends_here ? step.beyond_sequence(i) : step.beyond_tokens();
    const float state = walk(step, s.mask, here, ends_here ? end : s.tokens, beyond, ends_here);
    if (here == 0) step.finish(state);
  }
}

// Whether each column is fp32 and whether decays vary is settled once, outside the loops.
template <template <bool, bool> class Step, class Arguments>
void walk_all(const Arguments& a, bool varying, bool fp32, int64_t from, int64_t to) {
  if (varying) {
    if (fp32) return walk_all(Step<true, true>(a), a.sequences, from, to);
    return walk_all(Step<true, false>(a), a.sequences, from, to);
  }
  if (fp32) return walk_all(Step<false, true>(a), a.sequences, from, to);
  return walk_all(Step<false, false>(a), a.sequences, from, to);
}

inline bool is_fp32(const Column& column) { return !column.data || column.dtype == Dtype::f32; }

void reverse_scan(const ReverseScan& a, int64_t begin, int64_t end) {
  walk_all<ReverseScanStep>(a, a.decay.data, is_fp32(a.delta) && is_fp32(a.decay), begin, end);
}

void lambda_errors(const LambdaErrors& a, int64_t begin, int64_t end) {
  const bool fp32 = is_fp32(a.logp) && is_fp32(a.ref_logp) && is_fp32(a.values) && is_fp32(a.rewards) && is_fp32(a.trace);
  walk_all<LambdaErrorsStep>(a, a.trace.data, fp32, begin, end);
}

}  // namespace
