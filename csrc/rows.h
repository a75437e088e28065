// The kernels that read rows of logits, and the per-token loss. Include after a simd_*.h and functions.h.
//
// row_stats reads a row once. A block small enough for the first-level cache is widened to fp32 and its maximum taken,
// then its exponentials are summed against the largest logit seen so far; when that grows, the sums are rescaled. So
// there is one exponential per logit. row_grad is one more pass, in place.
#pragma once

namespace {

constexpr int64_t BLOCK = 1024;
constexpr int64_t SUMS = 4;  // independent sums, to keep the adders busy
constexpr float INF = __builtin_inff();
constexpr float QNAN = __builtin_nanf("");

// z = scale * softcap(x), raw logits to the ones that softmax sees.
struct Squash {
  Vec scale, cap, inverse_cap;
  bool capped;

  Squash(float scale_, float softcap)
      : scale(broadcast(scale_)),
        cap(broadcast(softcap)),
        inverse_cap(broadcast(softcap > 0 ? 1 / softcap : 0)),
        capped(softcap > 0) {}

  Vec tanh_of(Vec x) const { return tanh(x * inverse_cap); }
  Vec operator()(Vec x) const { return (capped ? cap * tanh_of(x) : x) * scale; }
};

// Writes z of `count` logits, filled up with -inf to whole rounds of SUMS vectors; returns their maximum, ignoring NaN.
template <class T>
inline float stage(const T* x, int64_t count, const Squash& squash, float* z) {
  Vec top = broadcast(-INF);
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) {
    const Vec v = squash(load(x + i));
    store(z + i, v);
    top = max(v, top);
  }
  if (i < count) {
    const Vec v = select(first_lanes(int(count - i)), squash(load_some(x + i, count - i, 0.0f)), broadcast(-INF));
    store(z + i, v);
    top = max(v, top);
    i += LANES;
  }
  for (; i % (SUMS * LANES) != 0; i += LANES) store(z + i, broadcast(-INF));
  return max_of_lanes(top);
}

template <class T, bool ENTROPY>
void row_stats_of(const RowStats& a, int64_t begin, int64_t end) {
  const Squash squash(a.scale, a.softcap);
  const Vec zero = broadcast(0.0f);
  float z[BLOCK];
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(a.logits) + row * a.stride;
    float top = -INF;
    Vec total[SUMS], weighted[SUMS];  // sum of e = exp(z - top), and of e (z - top) for the entropy
    for (int64_t k = 0; k < SUMS; ++k) total[k] = weighted[k] = zero;
    for (int64_t start = 0; start < a.vocab; start += BLOCK) {
      const int64_t count = a.vocab - start < BLOCK ? a.vocab - start : BLOCK;
      const float highest = stage(x + start, count, squash, z);
      if (highest > top) {
        const Vec change = broadcast(top - highest), factor = exp(change);
        for (int64_t k = 0; k < SUMS; ++k) {
          if (ENTROPY && top > -INF) weighted[k] = factor * fma(change, total[k], weighted[k]);
          total[k] = factor * total[k];
        }
        top = highest;
      }
      const Vec base = broadcast(top > -INF ? top : 0.0f);
      for (int64_t i = 0; i < count; i += SUMS * LANES) {
        for (int64_t k = 0; k < SUMS; ++k) {
          const Vec d = load(z + i + k * LANES) - base;
          const Vec e = exp(d);
          total[k] = total[k] + e;
          if (ENTROPY) weighted[k] = weighted[k] + select(e == zero, zero, e * d);
        }
      }
    }
    const float sum = sum_of_lanes((total[0] + total[1]) + (total[2] + total[3]));
    const float log_sum = logf(sum);
    a.lse[row] = top + log_sum;
    const int64_t action = a.actions[row];
    const bool exists = action >= 0 && action < a.vocab;
    a.logp[row] = exists ? first(squash(load_some(x + action, 1, 0.0f))) - a.lse[row] : QNAN;
    if (ENTROPY) {
      a.entropy[row] = log_sum - sum_of_lanes((weighted[0] + weighted[1]) + (weighted[2] + weighted[3])) / sum;
    }
  }
}

// The gradient by one raw logit; `onehot` is what the taken action adds.
template <bool ENTROPY>
struct LogitGradient {
  Squash squash;
  Vec lse, d_softmax, d_entropy, entropy;

  Vec operator()(Vec x, Vec onehot) const {
    const Vec one = broadcast(1.0f), zero = broadcast(0.0f);
    Vec t = zero, z = x;
    if (squash.capped) {
      t = squash.tanh_of(x);
      z = squash.cap * t;
    }
    const Vec logp = z * squash.scale - lse;
    const Vec p = exp(logp);
    Vec g;
    if (ENTROPY) {
      g = select(p == zero, zero, p * (d_softmax - d_entropy * (logp + entropy)));
    } else {
      g = p * d_softmax;
    }
    g = (g + onehot) * squash.scale;
    return squash.capped ? g * (one - t * t) : g;
  }
};

template <class T, bool ENTROPY>
void row_grad_of(const RowGrad& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    T* x = static_cast<T*>(a.logits) + row * a.stride;
    const int64_t action = a.actions[row];
    const bool exists = action >= 0 && action < a.vocab;
    const LogitGradient<ENTROPY> gradient{
        Squash(a.scale, a.softcap), broadcast(a.lse[row]), broadcast(a.d_softmax[row]),
        broadcast(ENTROPY ? a.d_entropy[row] : 0.0f), broadcast(ENTROPY ? a.entropy[row] : 0.0f)};
    const Vec others = broadcast(exists ? 0.0f : QNAN);
    const Vec taken = exists ? load_some(x + action, 1, 0.0f) : others;
    int64_t i = 0;
    for (; i + LANES <= a.vocab; i += LANES) store(x + i, gradient(load(x + i), others));
    if (i < a.vocab) store_some(x + i, gradient(load_some(x + i, a.vocab - i, 0.0f), others), a.vocab - i);
    if (exists) store_some(x + action, gradient(taken, broadcast(a.d_action[row])), 1);
  }
}

void row_stats(const RowStats& a, int64_t begin, int64_t end) {
  const bool entropy = a.entropy != nullptr;
  switch (a.dtype) {
    case Dtype::bf16: return (entropy ? row_stats_of<bf16, true> : row_stats_of<bf16, false>)(a, begin, end);
    case Dtype::f16: return (entropy ? row_stats_of<f16, true> : row_stats_of<f16, false>)(a, begin, end);
    default: return (entropy ? row_stats_of<float, true> : row_stats_of<float, false>)(a, begin, end);
  }
}

void row_grad(const RowGrad& a, int64_t begin, int64_t end) {
  const bool entropy = a.entropy != nullptr;
  switch (a.dtype) {
    case Dtype::bf16: return (entropy ? row_grad_of<bf16, true> : row_grad_of<bf16, false>)(a, begin, end);
    case Dtype::f16: return (entropy ? row_grad_of<f16, true> : row_grad_of<f16, false>)(a, begin, end);
    default: return (entropy ? row_grad_of<float, true> : row_grad_of<float, false>)(a, begin, end);
  }
}

inline float clip(float x, float limit) { return x > limit ? limit : x < -limit ? -limit : x; }

// reference.klq_residual_loss and its derivatives by logp and V; where two squares tie, the unclipped one wins.
void residual(const Residual& a, int64_t begin, int64_t end) {
  const bool by_value = a.loss == Loss::value_clipped || a.loss == Loss::double_clipped;
  const bool by_ratio = a.loss == Loss::ratio_clipped || a.loss == Loss::double_clipped;
  for (int64_t i = begin; i < end; ++i) {
    const float d = a.old_logp ? a.logp[i] - a.old_logp[i] : 0.0f;
    const float v = a.old_values ? a.values[i] - a.old_values[i] : 0.0f;
    const float weight = a.weights ? a.weights[i] : 1.0f;
    const float target = a.alpha * a.advantages[i], change = a.tau * d + v, e = change - target;
    float loss = e * e, d_logp = a.tau * 2.0f * e, d_value = 2.0f * e;
    if (a.loss == Loss::huber) {
      const float size = fabsf(e);
      loss = size <= a.huber_delta ? 0.5f * e * e : a.huber_delta * (size - 0.5f * a.huber_delta);
      d_value = clip(e, a.huber_delta);
      d_logp = a.tau * d_value;
    }
    if (by_value) {
      const float clipped = clip(change, a.value_clip) - target;
      if (clipped * clipped > loss) {
        loss = clipped * clipped;
        d_logp = d_value = 0.0f;
      }
    }
    if (by_ratio) {
      const float clipped = a.tau * clip(d, a.log_ratio_clip) + v - target;
      if (clipped * clipped > loss) {
        loss = clipped * clipped;
        d_logp = 0.0f;
        d_value = 2.0f * clipped;
      }
    }
    a.losses[i] = loss * weight;
    a.d_logp[i] = d_logp * (weight * a.grad_scale);
    a.d_values[i] = d_value * (weight * a.grad_scale);
  }
}

}  // namespace
