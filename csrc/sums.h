// Weighted sums of a few rows of a matrix each. Include after a simd_*.h and functions.h.
//
// A block of columns at a time: its sums stay in registers while the rows that it takes come by, the next of them asked
// for ahead. A row without an entry is written as zeros.
#pragma once

namespace {

template <class T>
inline void prefetch_block(const T* p, int64_t elements) {
  for (int64_t i = 0; i < elements; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(p + i, 0, 3);
}

template <class T, class Out>
void sum_rows(const WeightedSums& a, int64_t row) {
  constexpr int64_t BLOCK = ACCUMULATORS * LANES;
  constexpr int64_t AHEAD_BY = 3;  // entries
  const T* source = static_cast<const T*>(a.source);
  Out* out = static_cast<Out*>(a.out) + row * a.width;
  const int64_t begin = a.begins[row], end = a.ends[row];
  for (int64_t first = 0; first < a.width; first += BLOCK) {
    const int64_t left = a.width - first, whole = left < BLOCK ? left / LANES : ACCUMULATORS;
    const int64_t rest = left < BLOCK ? left % LANES : 0;
    Vec sum[ACCUMULATORS];
    for (int64_t k = 0; k < ACCUMULATORS; ++k) sum[k] = broadcast(0.0f);
    Vec last = broadcast(0.0f);
    for (int64_t e = begin; e < end; ++e) {
      const T* x = source + int64_t(a.index[e]) * a.width + first;
      if (e + AHEAD_BY < end) {
        prefetch_block(source + int64_t(a.index[e + AHEAD_BY]) * a.width + first, left < BLOCK ? left : BLOCK);
      }
      const Vec value = broadcast(a.values[e]);
      if (whole == ACCUMULATORS) {
        for (int64_t k = 0; k < ACCUMULATORS; ++k) sum[k] = fma(value, load(x + k * LANES), sum[k]);
      } else {
        for (int64_t k = 0; k < whole; ++k) sum[k] = fma(value, load(x + k * LANES), sum[k]);
        if (rest) last = fma(value, load_some(x + whole * LANES, rest), last);
      }
    }
    for (int64_t k = 0; k < whole; ++k) store(out + first + k * LANES, sum[k]);
    if (rest) store_some(out + first + whole * LANES, last, rest);
  }
}

template <class T, class Out>
void weighted_sums_of(const WeightedSums& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) sum_rows<T, Out>(a, row);
}

template <class T>
void weighted_sums_from(const WeightedSums& a, int64_t begin, int64_t end) {
  switch (a.out_dtype) {
    case Dtype::bf16: return weighted_sums_of<T, bf16>(a, begin, end);
    case Dtype::f16: return weighted_sums_of<T, f16>(a, begin, end);
    default: return weighted_sums_of<T, float>(a, begin, end);
  }
}

void weighted_sums(const WeightedSums& a, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case Dtype::bf16: return weighted_sums_from<bf16>(a, begin, end);
    case Dtype::f16: return weighted_sums_from<f16>(a, begin, end);
    default: return weighted_sums_from<float>(a, begin, end);
  }
}

}  // namespace
