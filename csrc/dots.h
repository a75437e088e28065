// Dot products of a token's row with a few rows of a matrix each. Include after a simd_*.h and functions.h.
//
// A few rows at a time share what is read of the token's, each with a vector of sums; the rows after them are asked for
// as these come by.
#pragma once

namespace {

template <class T, class Source>
void dot_rows(const RowDots& a, int64_t token) {
  constexpr int64_t AT_ONCE = 4;
  const T* x = static_cast<const T*>(a.left) + (a.places ? a.places[token] : token) * a.width;
  const Source* source = static_cast<const Source*>(a.right);
  const int32_t* index = a.index + token * a.entries;
  float* out = a.out + token * a.entries;
  const int64_t whole = a.width / LANES * LANES, rest = a.width - whole, last = a.entries - 1;
  for (int64_t e = 0; e < a.entries; e += AT_ONCE) {
    const Source *y[AT_ONCE], *next[AT_ONCE];
    Vec sum[AT_ONCE];
    for (int64_t k = 0; k < AT_ONCE; ++k) {  // beyond the last entry the last one again, which is not stored
      y[k] = source + int64_t(index[e + k < last ? e + k : last]) * a.width;
      next[k] = source + int64_t(index[e + k + AT_ONCE < last ? e + k + AT_ONCE : last]) * a.width;
      sum[k] = broadcast(0.0f);
    }
    for (int64_t i = 0; i < whole; i += LANES) {
      const Vec value = load(x + i);
      for (int64_t k = 0; k < AT_ONCE; ++k) {
        __builtin_prefetch(next[k] + i, 0, 3);
        sum[k] = fma(value, load(y[k] + i), sum[k]);
      }
    }
    if (rest) {
      const Vec value = load_some(x + whole, rest);
      for (int64_t k = 0; k < AT_ONCE; ++k) sum[k] = fma(value, load_some(y[k] + whole, rest), sum[k]);
    }
    for (int64_t k = 0; k < AT_ONCE && e + k <= last; ++k) out[e + k] = sum_of_lanes(sum[k]);
  }
}

template <class T, class Source>
void row_dots_with(const RowDots& a, int64_t begin, int64_t end) {
  for (int64_t token = begin; token < end; ++token) dot_rows<T, Source>(a, token);
}

template <class T>
void row_dots_of(const RowDots& a, int64_t begin, int64_t end) {
  switch (a.right_dtype) {
    case Dtype::bf16: return row_dots_with<T, bf16>(a, begin, end);
    case Dtype::f16: return row_dots_with<T, f16>(a, begin, end);
    default: return row_dots_with<T, float>(a, begin, end);
  }
}

void row_dots(const RowDots& a, int64_t begin, int64_t end) {
  switch (a.left_dtype) {
    case Dtype::bf16: return row_dots_of<bf16>(a, begin, end);
    case Dtype::f16: return row_dots_of<f16>(a, begin, end);
    default: return row_dots_of<float>(a, begin, end);
  }
}

}  // namespace
