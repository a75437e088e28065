// Functions that the kernels share, beyond the wrapper: exp, tanh, reductions, partial vectors. Include after a simd_*.h.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

namespace {

// exp(x) = 2^n exp(r), n = round(x / ln 2): within 1 ulp, 0 below -87.3, saturated above 88, NaN for NaN. Adding 1.5 * 2^23
// (and the exponent bias) leaves n in the lowest bits of a float, which is where both n and 2^n are read from.
inline Vec exp(Vec x) {
  const Vec lowest = broadcast(-87.3f);
  const Vec clamped = min(broadcast(88.0f), max(lowest, x));
  const Vec magic = broadcast(0x1.8p23f + 127.0f);
  const Vec bits = fma(clamped, broadcast(1.44269504f), magic);
  const Vec n = bits - magic;
  Vec r = fma(n, broadcast(-0x1.62e4p-1f), clamped);  // ln 2 in two parts; the first has few enough bits to be exact
  r = fma(n, broadcast(-1.42860677e-6f), r);
  Vec p = broadcast(1.381446706e-3f);  // minimax for (exp(r) - 1 - r) / r^2 on |r| <= ln(2) / 2
  p = fma(p, r, broadcast(8.368780411e-3f));
  p = fma(p, r, broadcast(4.166839421e-2f));
  p = fma(p, r, broadcast(0.1666652011f));
  p = fma(p, r, broadcast(0.4999999341f));
  p = fma(p * r, r, r) + broadcast(1.0f);
  return select(x < lowest, broadcast(0.0f), p * power_of_two(bits));
}

// tanh(x): an odd minimax polynomial near 0, where 1 - 2 / (exp(2|x|) + 1) would cancel, and that formula elsewhere.
inline Vec tanh(Vec x) {
  const Vec one = broadcast(1.0f), size = abs(x), square = x * x;
  Vec q = broadcast(-5.905872469e-3f);
  q = fma(q, square, broadcast(2.080538837e-2f));
  q = fma(q, square, broadcast(-5.378668481e-2f));
  q = fma(q, square, broadcast(0.1333195826f));
  q = fma(q, square, broadcast(-0.3333329927f));
  const Vec near = fma(q * square, x, x);
  const Vec far = one - broadcast(2.0f) / (exp(size + size) + one);
  const Vec away = select(x < broadcast(0.0f), broadcast(0.0f) - far, far);
  return select(size < broadcast(0.6f), near, away);
}

inline float sum_of_lanes(Vec v) {
  v = v + shift<8>(v, v);
  v = v + shift<4>(v, v);
  v = v + shift<2>(v, v);
  return first(v + shift<1>(v, v));
}

inline float max_of_lanes(Vec v) {
  v = max(v, shift<8>(v, v));
  v = max(v, shift<4>(v, v));
  v = max(v, shift<2>(v, v));
  return first(max(v, shift<1>(v, v)));
}

inline Vec load(const double* p) {
  float copy[LANES];
  for (int i = 0; i < LANES; ++i) copy[i] = float(p[i]);
  return load(copy);
}

// out[column][row] = in[row][column], for up to TILE rows and LANES columns.
template <class T>
inline void turn(const T* in, int64_t in_stride, int64_t rows, int64_t columns, T* out, int64_t out_stride) {
  if (sizeof(T) == sizeof(uint16_t) && rows == TILE && columns == LANES) {
    return turn_tile(reinterpret_cast<const uint16_t*>(in), in_stride, reinterpret_cast<uint16_t*>(out), out_stride);
  }
  for (int64_t column = 0; column < columns; ++column) {
    for (int64_t row = 0; row < rows; ++row) out[column * out_stride + row] = in[row * in_stride + column];
  }
}

// `count` elements in the last lanes, 0 in the others; and back.
template <class T>
inline Vec load_last(const T* p, int64_t count) {
  T copy[LANES] = {};
  memcpy(copy + LANES - count, p, size_t(count) * sizeof(T));
  return load(copy);
}

inline void store_last(float* p, Vec v, int64_t count) {
  float copy[LANES];
  store(copy, v);
  memcpy(p, copy + LANES - count, size_t(count) * sizeof(float));
}

}  // namespace
