// The per-token loss and its derivatives. Nothing here needs vectors by hand: compilers see them.
#pragma once

#include <math.h>
#include <stdint.h>

#include "kernels.h"

namespace {

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
