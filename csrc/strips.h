// The kernels that read logits: strips of the vocabulary, tokens in the lanes. Include after a simd_*.h and functions.h.
//
// Sums and maxima run down the entries, so they stay in their lanes, and a token's bits do not depend on the others.
// strip_stats reads a logit once: a tile of entries by a group of tokens is widened to fp32 in the first-level cache and
// its maximum taken, then its exponentials are summed against the largest logit seen so far; when that has grown, the
// sums before it are rescaled. So there is one exponential per logit, and what a strip leaves behind (top, total,
// weighted, taken) is all that the next one needs. strip_grad is one more pass. It can also write its result turned
// around, tokens apart and entries adjacent, because the two products that follow want to read it in either order.
//
// Rows of a strip are far apart, often by a power of two. So each cache line of them is touched once, what is needed
// again is kept in a tile of its own, and the next tile's lines are asked for while this one is worked on.
#pragma once

namespace {

constexpr int64_t VECTORS = GROUP / LANES;
constexpr float INF = __builtin_inff();

// c = softcap(x): raw logits to those that softmax sees times 1 / scale. Differences of them are taken before they are
// scaled, where those of close numbers are exact.
struct SoftCap {
  Vec cap, inverse_cap;
  bool capped;

  explicit SoftCap(float softcap)
      : cap(broadcast(softcap)), inverse_cap(broadcast(softcap > 0 ? 1 / softcap : 0)), capped(softcap > 0) {}

  Vec tanh_of(Vec x) const { return tanh(x * inverse_cap); }
  Vec operator()(Vec x) const { return capped ? cap * tanh_of(x) : x; }
};

// The tokens of one group: where they begin, and how many lanes each of their vectors fills.
struct Group {
  int64_t first, count[VECTORS];

  Group(int64_t index, int64_t tokens) : first(index * GROUP) {
    for (int64_t k = 0; k < VECTORS; ++k) {
      const int64_t left = tokens - first - k * LANES;
      count[k] = left < 0 ? 0 : left < LANES ? left : LANES;
    }
  }
  bool whole() const { return count[VECTORS - 1] == LANES; }

  template <class T>
  void prefetch(const T* row, int64_t elements_on) const {
    const uintptr_t there = reinterpret_cast<uintptr_t>(row) + uintptr_t(first + elements_on) * sizeof(T);
    for (size_t byte = 0; byte < GROUP * sizeof(T); byte += 64) {
      __builtin_prefetch(reinterpret_cast<const void*>(there + byte), 0, 2);
    }
  }

  template <bool WHOLE, class T>
  Vec read(const T* row, int64_t k) const {
    return WHOLE ? load(row + first + k * LANES) : load_some(row + first + k * LANES, count[k]);
  }
  template <bool WHOLE, class T>
  void write(T* row, Vec v, int64_t k) const {
    if (WHOLE) return store(row + first + k * LANES, v);
    store_some(row + first + k * LANES, v, count[k]);
  }
};

// TILE entries from `start` on by one group.
template <class T, bool ENTROPY, bool WHOLE>
void tile_stats(const StripStats& a, const SoftCap& soft_cap, const Group& group, int64_t start, int64_t entries) {
  const Vec zero = broadcast(0.0f), nothing = broadcast(-INF), scale = broadcast(a.scale);
  const T* logits = static_cast<const T*>(a.logits) + start * a.tokens;
  float c[TILE][GROUP];
  Vec highest[VECTORS], base[VECTORS], factor[VECTORS], change[VECTORS], sum[VECTORS], weighted[VECTORS];
  for (int64_t k = 0; k < VECTORS; ++k) highest[k] = nothing;
  for (int64_t i = 0; i < entries; ++i) {
    group.prefetch(logits + i * a.tokens, TILE * a.tokens);
    for (int64_t k = 0; k < VECTORS; ++k) {
      const Vec v = soft_cap(group.read<WHOLE>(logits + i * a.tokens, k));
      store(c[i] + k * LANES, v);
      highest[k] = max(v, highest[k]);  // ignores NaN, which the sum then shows
    }
  }
  for (int64_t k = 0; k < VECTORS; ++k) {  // where nothing came before there is nothing to rescale
    const Vec top = group.read<WHOLE>(a.top, k);
    highest[k] = max(top, highest[k]);
    base[k] = select(nothing < highest[k], highest[k], zero);
    change[k] = select(nothing < top, (top - base[k]) * scale, zero);
    factor[k] = exp(change[k]);
    sum[k] = weighted[k] = zero;
  }
  for (int64_t i = 0; i < entries; ++i) {
    for (int64_t k = 0; k < VECTORS; ++k) {
      const Vec d = (load(c[i] + k * LANES) - base[k]) * scale;
      const Vec e = exp(d);
      sum[k] = sum[k] + e;
      if (ENTROPY) weighted[k] = weighted[k] + select(e == zero, zero, e * d);
    }
  }
  for (int64_t k = 0; k < VECTORS; ++k) {
    const Vec total = group.read<WHOLE>(a.total, k);
    group.write<WHOLE>(a.top, highest[k], k);
    group.write<WHOLE>(a.total, fma(factor[k], total, sum[k]), k);
    if (!ENTROPY) continue;
    const Vec before = group.read<WHOLE>(a.weighted, k);
    group.write<WHOLE>(a.weighted, fma(factor[k], fma(change[k], total, before), weighted[k]), k);
  }
}

template <class T, bool ENTROPY>
void strip_stats_of(const StripStats& a, int64_t begin, int64_t end) {
  const SoftCap soft_cap(a.softcap);
  for (int64_t start = 0; start < a.entries; start += TILE) {
    const int64_t entries = a.entries - start < TILE ? a.entries - start : TILE;
    for (int64_t index = begin; index < end; ++index) {
      const Group group(index, a.tokens);
      (group.whole() ? tile_stats<T, ENTROPY, true> : tile_stats<T, ENTROPY, false>)(
          a, soft_cap, group, start, entries);
    }
  }
  const int64_t last = end * GROUP < a.tokens ? end * GROUP : a.tokens;
  for (int64_t token = begin * GROUP; token < last; ++token) {
    const uint64_t entry = uint64_t(a.actions[token]) - uint64_t(a.first);
    if (entry >= uint64_t(a.entries)) continue;
    a.taken[token] = first(soft_cap(load_some(static_cast<const T*>(a.logits) + int64_t(entry) * a.tokens + token, 1)));
  }
}

// The gradient by one raw logit; `onehot` is what the taken action adds.
template <bool ENTROPY>
struct LogitGradient {
  SoftCap soft_cap;
  Vec scale, top, minus_log_total, d_softmax, d_entropy, entropy;

  Vec operator()(Vec x, Vec onehot) const {
    const Vec one = broadcast(1.0f), zero = broadcast(0.0f);
    Vec t = zero, c = x;
    if (soft_cap.capped) {
      t = soft_cap.tanh_of(x);
      c = soft_cap.cap * t;
    }
    const Vec logp = fma(c - top, scale, minus_log_total);
    const Vec p = exp(logp);
    Vec g;
    if (ENTROPY) {
      g = select(p == zero, zero, p * (d_softmax - d_entropy * (logp + entropy))) + onehot;
    } else {
      g = fma(p, d_softmax, onehot);
    }
    g = g * scale;
    return soft_cap.capped ? g * (one - t * t) : g;
  }
};

// TILE entries from `start` on by one group.
template <class T, class Out, bool ENTROPY, bool WHOLE>
void tile_grad(const StripGrad& a, const SoftCap& soft_cap, const Group& group, int64_t start, int64_t entries) {
  const Vec zero = broadcast(0.0f);
  const T* logits = static_cast<const T*>(a.logits) + start * a.tokens;
  Out* out = static_cast<Out*>(a.out) + start * a.tokens + group.first;
  Out tile[TILE][GROUP];
  for (int64_t k = 0; k < VECTORS; ++k) {
    const LogitGradient<ENTROPY> gradient{
        soft_cap, broadcast(a.scale), group.read<WHOLE>(a.top, k), zero - group.read<WHOLE>(a.log_total, k),
        group.read<WHOLE>(a.d_softmax, k), ENTROPY ? group.read<WHOLE>(a.d_entropy, k) : zero,
        ENTROPY ? group.read<WHOLE>(a.entropy, k) : zero};
    for (int64_t i = 0; i < entries; ++i) {
      const T* row = logits + i * a.tokens;
      if (k == 0) group.prefetch(row, TILE * a.tokens);
      store(tile[i] + k * LANES, gradient(group.read<WHOLE>(row, k), zero));
    }
    for (int64_t lane = 0; lane < group.count[k]; ++lane) {  // few of these entries were taken
      const int64_t token = group.first + k * LANES + lane;
      const uint64_t entry = uint64_t(a.actions[token]) - uint64_t(a.first + start);
      if (entry >= uint64_t(entries)) continue;
      const int64_t i = int64_t(entry);
      Out taken[LANES];
      store(taken, gradient(group.read<WHOLE>(logits + i * a.tokens, k), broadcast(a.d_action[token])));
      tile[i][k * LANES + lane] = taken[lane];
    }
  }
  const int64_t tokens = WHOLE ? GROUP : a.tokens - group.first;
  for (int64_t i = 0; i < entries; ++i) memcpy(out + i * a.tokens, tile[i], size_t(tokens) * sizeof(Out));
  if (!a.turned) return;
  Out* turned = static_cast<Out*>(a.turned) + group.first * a.entries + start;
  for (int64_t k = 0; k < VECTORS; ++k) {
    turn(tile[0] + k * LANES, GROUP, entries, group.count[k], turned + k * LANES * a.entries, a.entries);
  }
}

template <class T, class Out, bool ENTROPY>
void strip_grad_of(const StripGrad& a, int64_t begin, int64_t end) {
  const SoftCap soft_cap(a.softcap);
  for (int64_t start = 0; start < a.entries; start += TILE) {
    const int64_t entries = a.entries - start < TILE ? a.entries - start : TILE;
    for (int64_t index = begin; index < end; ++index) {
      const Group group(index, a.tokens);
      (group.whole() ? tile_grad<T, Out, ENTROPY, true> : tile_grad<T, Out, ENTROPY, false>)(
          a, soft_cap, group, start, entries);
    }
  }
}

void strip_stats(const StripStats& a, int64_t begin, int64_t end) {
  const bool entropy = a.weighted != nullptr;
  switch (a.dtype) {
    case Dtype::bf16: return (entropy ? strip_stats_of<bf16, true> : strip_stats_of<bf16, false>)(a, begin, end);
    case Dtype::f16: return (entropy ? strip_stats_of<f16, true> : strip_stats_of<f16, false>)(a, begin, end);
    default: return (entropy ? strip_stats_of<float, true> : strip_stats_of<float, false>)(a, begin, end);
  }
}

// Gradients come in the logits' dtype, or in fp32 where products run in it.
template <class T>
void strip_grad_from(const StripGrad& a, int64_t begin, int64_t end) {
  const bool entropy = a.entropy != nullptr;
  if (a.out_dtype == a.dtype) {
    return (entropy ? strip_grad_of<T, T, true> : strip_grad_of<T, T, false>)(a, begin, end);
  }
  return (entropy ? strip_grad_of<T, float, true> : strip_grad_of<T, float, false>)(a, begin, end);
}

void strip_grad(const StripGrad& a, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case Dtype::bf16: return strip_grad_from<bf16>(a, begin, end);
    case Dtype::f16: return strip_grad_from<f16>(a, begin, end);
    default: return strip_grad_from<float>(a, begin, end);
  }
}

}  // namespace
