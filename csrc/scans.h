// The reverse recurrences over time. Include after a simd_*.h and functions.h.
//
// A sequence is walked from its last valid token to its first, sixteen valid tokens at a time. Within such a block
//
//     S_t = a_t + b_t S_{t+1}
//
// is solved in registers by doubling: after the step of width k every lane has absorbed the 2k tokens from itself on.
// What remains of the future is one scalar, carried from block to block. Blocks are counted in valid tokens from the
// end of the sequence, and sequences never share one, so a sequence gives the same bits wherever it lies, however its
// tokens are spread between masked ones, and on any number of threads; and nothing crosses from one into another.
//
// Masked tokens are taken out first: a window of up to 512 valid tokens is compressed into a buffer in the first-level
// cache and its results are expanded from there. A window without a masked token (most are) is worked on where it lies.
#pragma once

namespace {

constexpr int64_t WINDOW = 32 * LANES;  // valid tokens

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

  Vec solve(Vec a, float beyond) const {
    const Vec zero = broadcast(0.0f);
    a = fma(step1, shift<1>(a, zero), a);
    a = fma(step2, shift<2>(a, zero), a);
    a = fma(step4, shift<4>(a, zero), a);
    a = fma(step8, shift<8>(a, zero), a);
    return fma(total, broadcast(beyond), a);
  }
};

// A block of tokens of a window: `count` from `start` on; lanes beyond them are the identity of the recurrence.
struct Block {
  int64_t start, count;

  Vec read(const float* p, float fill) const {
    return count == LANES ? load(p + start) : load_some(p + start, count, fill);
  }
  Vec decays(const float* p, float constant) const {
    return p ? read(p, 1.0f) : select(first_lanes(int(count)), broadcast(constant), broadcast(1.0f));
  }
  void write(float* p, Vec v) const {
    if (count == LANES) return store(p + start, v);
    store_some(p + start, v, count);
  }
};

// A_t = delta_t + decay_t A_{t+1}.
struct ReverseScanStep {
  static constexpr int COLUMNS = 2;
  const ReverseScan& a;
  const Decays constant;

  explicit ReverseScanStep(const ReverseScan& a_) : a(a_), constant(broadcast(a_.constant_decay)) {}

  const Column& column(int i) const { return i == 0 ? a.delta : a.decay; }
  float* kept(int) const { return nullptr; }
  float* out() const { return a.out; }
  float beyond_sequence(int64_t) const { return 0.0f; }
  float beyond_tokens() const { return 0.0f; }
  void finish(float) const {}

  float operator()(const float* const* in, float* out, Block block, float beyond, bool last) const {
    const Vec delta = block.read(in[0], 0.0f);
    Vec s;
    if (block.count == LANES && !in[1]) {
      s = constant.solve(delta, beyond);
    } else {
      Vec b = block.decays(in[1], a.constant_decay);
      if (last) {  // nothing follows the last token, so whatever its decay holds must not count
        b = select(first_lanes(int(block.count - 1)), b, broadcast(0.0f));
      }
      s = Decays(b).solve(delta, beyond);
    }
    block.write(out, s);
    return first(s);
  }
};

// A_t = u_t + S_{t+1} with S_t = (gamma V_t + b_t u_t) + b_t S_{t+1}, b_t = gamma lambda c_t, u_t = r_t - Q_t:
// S_t is all that token t - 1 needs of its future (portable.lambda_errors derives it).
struct LambdaErrorsStep {
  static constexpr int COLUMNS = 5;
  const LambdaErrors& a;
  const Decays constant;

  explicit LambdaErrorsStep(const LambdaErrors& a_) : a(a_), constant(broadcast(a_.decay)) {}

  const Column& column(int i) const {
    const Column* columns[COLUMNS] = {&a.values, &a.rewards, &a.logp, &a.ref_logp, &a.trace};
    return *columns[i];
  }
  float* kept(int i) const { return i == 0 ? a.kept_values : i == 2 ? a.kept_logp : nullptr; }
  float* out() const { return a.out; }
  float beyond_sequence(int64_t i) const { return a.tail[i]; }
  float beyond_tokens() const { return a.carry; }
  void finish(float s) const {
    if (a.first) *a.first = s;
  }

  float operator()(const float* const* in, float* out, Block block, float beyond, bool) const {
    const Vec zero = broadcast(0.0f), v = block.read(in[0], 0.0f);
    Vec u = (in[1] ? block.read(in[1], 0.0f) : zero) - v;
    if (in[2]) u = u - broadcast(a.tau) * (block.read(in[2], 0.0f) - block.read(in[3], 0.0f));
    Vec s;
    if (block.count == LANES && !in[4]) {
      s = constant.solve(fma(broadcast(a.decay), u, broadcast(a.gamma) * v), beyond);
    } else {
      const Vec within = broadcast(1.0f);
      const Vec b = in[4] ? block.read(in[4], 1.0f) * select(first_lanes(int(block.count)), broadcast(a.decay), within)
                          : block.decays(nullptr, a.decay);
      const Vec local = fma(b, u, broadcast(a.gamma) * v);
      s = Decays(b).solve(select(first_lanes(int(block.count)), local, zero), beyond);
    }
    block.write(out, u + shift<1>(s, broadcast(beyond)));
    return first(s);
  }
};

// First position of the shortest piece [position, end) that holds `want` valid tokens, or `begin`; counts them.
inline int64_t window_start(const uint8_t* mask, int64_t begin, int64_t end, int64_t want, int64_t* valid) {
  int64_t position = end, count = 0;
  while (count < want && position - LANES >= begin) {
    const int64_t more = __builtin_popcount(flags_of(mask + position - LANES));
    if (count + more > want) break;
    position -= LANES;
    count += more;
  }
  while (position > begin && count < want) count += mask[--position] != 0;
  *valid = count;
  return position;
}

inline uint32_t flags_of_some(const uint8_t* mask, int64_t count) {
  if (count >= LANES) return flags_of(mask);
  uint8_t copy[LANES] = {};
  memcpy(copy, mask, size_t(count));
  return flags_of(copy);
}

// Widens the valid tokens of [begin, end) into the `valid` elements at `to`. A null mask means all. Like everything here
// it goes backwards, so that memory is read in one direction throughout.
template <class T>
inline void gather(const T* from, const uint8_t* mask, int64_t begin, int64_t end, int64_t valid, float* to) {
  to += valid;
  for (int64_t stop = end; stop > begin; stop -= LANES) {
    const int64_t count = stop - begin < LANES ? stop - begin : LANES, i = stop - count;
    const Vec v = count == LANES ? load(from + i) : load_some(from + i, count, 0.0f);
    const uint32_t flags = mask ? flags_of_some(mask + i, count) : (1u << count) - 1;
    to -= __builtin_popcount(flags);
    if (flags == 0xffff) {
      store(to, v);
    } else {
      compress(to, v, flags);
    }
  }
}

inline void gather(const Column& column, const uint8_t* mask, int64_t begin, int64_t end, int64_t valid, float* to) {
  switch (column.dtype) {
    case Dtype::f32: return gather(static_cast<const float*>(column.data), mask, begin, end, valid, to);
    case Dtype::bf16: return gather(static_cast<const bf16*>(column.data), mask, begin, end, valid, to);
    case Dtype::f16: return gather(static_cast<const f16*>(column.data), mask, begin, end, valid, to);
    case Dtype::f64: return gather(static_cast<const double*>(column.data), mask, begin, end, valid, to);
  }
}

// The inverse: valid positions of [begin, end) take the `valid` elements at `from`, the others 0.
inline void scatter(const float* from, const uint8_t* mask, int64_t begin, int64_t end, int64_t valid, float* to) {
  from += valid;
  for (int64_t stop = end; stop > begin; stop -= LANES) {
    const int64_t count = stop - begin < LANES ? stop - begin : LANES, i = stop - count;
    const uint32_t flags = mask ? flags_of_some(mask + i, count) : (1u << count) - 1;
    from -= __builtin_popcount(flags);
    const Vec v = flags == 0xffff ? load(from) : expand(from, flags);
    if (count == LANES) {
      store(to + i, v);
    } else {
      store_some(to + i, v, count);
    }
  }
}

// Walks one sequence, or the piece [begin, end) of it; returns the state at its first valid token.
template <class Step>
float walk(const Step& step, const uint8_t* mask, int64_t begin, int64_t end, float state, bool ends_here) {
  constexpr int COLUMNS = Step::COLUMNS;
  float staged[COLUMNS][WINDOW], results[WINDOW];
  bool last = ends_here;
  while (end > begin) {
    int64_t valid = end - begin < WINDOW ? end - begin : WINDOW;
    const int64_t start = mask ? window_start(mask, begin, end, WINDOW, &valid) : end - valid;
    const bool dense = valid == end - start;
    const float* in[COLUMNS];
    for (int c = 0; c < COLUMNS; ++c) {
      const Column& column = step.column(c);
      if (!column.data) {
        in[c] = nullptr;
      } else if (dense && column.dtype == Dtype::f32) {
        in[c] = static_cast<const float*>(column.data) + start;
      } else {
        gather(column, dense ? nullptr : mask, start, end, valid, staged[c]);
        in[c] = staged[c];
      }
    }
    float* out = dense ? step.out() + start : results;
    for (int64_t stop = valid; stop > 0; stop -= LANES) {
      const int64_t count = stop < LANES ? stop : LANES;
      state = step(in, out, Block{stop - count, count}, state, last);
      last = false;
    }
    if (!dense) scatter(results, mask, start, end, valid, step.out());
    for (int c = 0; c < COLUMNS; ++c) {
      if (float* kept = step.kept(c)) scatter(in[c], dense ? nullptr : mask, start, end, valid, kept);
    }
    end = start;
  }
  return state;
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

void reverse_scan(const ReverseScan& a, int64_t begin, int64_t end) {
  walk_all(ReverseScanStep(a), a.sequences, begin, end);
}

void lambda_errors(const LambdaErrors& a, int64_t begin, int64_t end) {
  walk_all(LambdaErrorsStep(a), a.sequences, begin, end);
}

}  // namespace
