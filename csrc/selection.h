// The sampled gradient's choice among the entries of a strip (klq_kernels/vocabulary/sampling.py). Include after strips.h.
//
// With s the share |d| / threshold of an entry, a token's running sum of them is a 32-bit fraction; adding an s below 1
// to it carries where the sum passes a whole number. So one addition and one comparison decide for sixteen tokens, and
// since few entries are kept, what is done with one that is costs little.
#pragma once

namespace {

// TILE entries from `start` on by one group.
template <class T, bool WHOLE>
void tile_select(const StripSelect& a, const SoftCap& soft_cap, const Group& group, int64_t start, int64_t entries) {
  const Vec zero = broadcast(0.0f), scale = broadcast(a.scale);
  const T* logits = static_cast<const T*>(a.logits) + start * a.tokens;
  float share[TILE][GROUP];
  float taken[GROUP];
  for (int64_t k = 0; k < VECTORS; ++k) {
    const Vec top = group.read<WHOLE>(a.top, k), minus_log_total = zero - group.read<WHOLE>(a.log_total, k);
    const Vec by_softmax = group.read<WHOLE>(a.d_softmax, k), rate = abs(by_softmax) * broadcast(1 / a.threshold);
    const LogitGradient<false> gradient{soft_cap, scale, top, minus_log_total, by_softmax, zero, zero};
    const LogitGradient<false> share_of{soft_cap, scale, top, minus_log_total, rate, zero, zero};
    for (int64_t i = 0; i < entries; ++i) {
      const T* row = logits + i * a.tokens;
      if (k == 0) group.prefetch(row, TILE * a.tokens);
      store(share[i] + k * LANES, share_of(group.read<WHOLE>(row, k), zero));
    }
    for (int64_t lane = 0; lane < group.count[k]; ++lane) {  // few of these entries were taken
      const int64_t token = group.first + k * LANES + lane;
      const uint64_t entry = uint64_t(a.actions[token]) - uint64_t(a.first + start);
      if (entry >= uint64_t(entries)) continue;
      float by_logit[LANES];
      store(by_logit, gradient(group.read<WHOLE>(logits + int64_t(entry) * a.tokens, k), broadcast(a.d_action[token])));
      taken[k * LANES + lane] = by_logit[lane];
      share[entry][k * LANES + lane] = INF;  // which no other entry has
    }
  }
  for (int64_t k = 0; k < VECTORS; ++k) {
    if (group.count[k] == 0) continue;
    const int64_t token = group.first + k * LANES;
    const uint32_t lanes = (uint32_t(1) << group.count[k]) - 1;
    uint32_t sums[LANES] = {};
    memcpy(sums, a.fractions + token, size_t(group.count[k]) * sizeof(uint32_t));
    Fraction sum = load_fraction(sums);
    for (int64_t i = 0; i < entries; ++i) {
      uint32_t kept = advance(sum, load(share[i] + k * LANES)) & lanes;
      for (; kept; kept &= kept - 1) {
        const int64_t lane = __builtin_ctz(kept), t = token + lane;
        const float s = share[i][k * LANES + lane];
        const int64_t slot = a.offsets[t] + a.counts[t]++;
        if (slot >= a.offsets[t + 1]) continue;  // counted, so that the caller sees it
        a.columns[slot] = int32_t(a.first + start + i);
        a.values[slot] = s == INF ? taken[k * LANES + lane] : copysignf(s < 1 ? a.threshold : s * a.threshold, a.d_softmax[t]);
      }
    }
    store_fraction(sums, sum);
    memcpy(a.fractions + token, sums, size_t(group.count[k]) * sizeof(uint32_t));
  }
}

template <class T>
void strip_select_of(const StripSelect& a, int64_t begin, int64_t end) {
  const SoftCap soft_cap(a.softcap);
  for (int64_t start = 0; start < a.entries; start += TILE) {
    const int64_t entries = a.entries - start < TILE ? a.entries - start : TILE;
    for (int64_t index = begin; index < end; ++index) {
      const Group group(index, a.tokens);
      (group.whole() ? tile_select<T, true> : tile_select<T, false>)(a, soft_cap, group, start, entries);
    }
  }
}

void strip_select(const StripSelect& a, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case Dtype::bf16: return strip_select_of<bf16>(a, begin, end);
    case Dtype::f16: return strip_select_of<f16>(a, begin, end);
    default: return strip_select_of<float>(a, begin, end);
  }
}

}  // namespace
