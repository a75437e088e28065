// Sixteen fp32 lanes in plain C++: loops of fixed length that any compiler can vectorise for its own machine.
//
// This file is also the specification of the wrapper: simd_avx2.h and simd_avx512.h offer the same names. Everything is
// in an unnamed namespace because each instruction set compiles its own copy of all of it.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "kernels.h"

namespace {

struct Vec {
  float lane[LANES];
};
struct Lanes {  // one flag per lane
  bool lane[LANES];
};
constexpr int64_t ACCUMULATORS = 4;  // vectors that fit into registers beside what a sum reads

#define KLQ_EACH(expression)                        \
  Vec r;                                            \
  for (int i = 0; i < LANES; ++i) r.lane[i] = expression; \
  return r
#define KLQ_EACH_FLAG(expression)                   \
  Lanes r;                                          \
  for (int i = 0; i < LANES; ++i) r.lane[i] = expression; \
  return r

inline Vec broadcast(float x) { KLQ_EACH(x); }
inline Vec load(const float* p) { KLQ_EACH(p[i]); }
inline void store(float* p, Vec v) { memcpy(p, v.lane, sizeof v.lane); }
inline Vec operator+(Vec a, Vec b) { KLQ_EACH(a.lane[i] + b.lane[i]); }
inline Vec operator-(Vec a, Vec b) { KLQ_EACH(a.lane[i] - b.lane[i]); }
inline Vec operator*(Vec a, Vec b) { KLQ_EACH(a.lane[i] * b.lane[i]); }
inline Vec operator/(Vec a, Vec b) { KLQ_EACH(a.lane[i] / b.lane[i]); }
inline Vec fma(Vec a, Vec b, Vec c) { KLQ_EACH(a.lane[i] * b.lane[i] + c.lane[i]); }
// Where either operand is NaN these give the second one.
inline Vec max(Vec a, Vec b) { KLQ_EACH(a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]); }
inline Vec min(Vec a, Vec b) { KLQ_EACH(a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]); }
inline Vec abs(Vec a) { KLQ_EACH(fabsf(a.lane[i])); }
inline Lanes operator<(Vec a, Vec b) { KLQ_EACH_FLAG(a.lane[i] < b.lane[i]); }
inline Lanes operator==(Vec a, Vec b) { KLQ_EACH_FLAG(a.lane[i] == b.lane[i]); }
inline Vec select(Lanes m, Vec a, Vec b) { KLQ_EACH(m.lane[i] ? a.lane[i] : b.lane[i]); }
inline Lanes lanes_of(uint32_t flags) { KLQ_EACH_FLAG(flags >> i & 1); }

// 2^(k) from a float whose lowest mantissa bits hold k + 127.
inline Vec power_of_two(Vec v) {
  Vec r;
  for (int i = 0; i < LANES; ++i) {
    uint32_t bits;
    memcpy(&bits, &v.lane[i], 4);
    bits <<= 23;
    memcpy(&r.lane[i], &bits, 4);
  }
  return r;
}

// Lane i takes lane i + K; the last K lanes take those of fill.
template <int K>
inline Vec shift(Vec v, Vec fill) {
  KLQ_EACH(i + K < LANES ? v.lane[i + K < LANES ? i + K : 0] : fill.lane[i]);
}

inline float first(Vec v) { return v.lane[0]; }

// Stores the flagged lanes next to each other; up to LANES elements from p on may be overwritten.
inline void compress(float* p, Vec v, uint32_t flags) {
  for (int i = 0; i < LANES; ++i) {
    if (flags >> i & 1) *p++ = v.lane[i];
  }
}

// The inverse: flagged lanes take successive elements, the others 0. May read up to LANES elements.
inline Vec expand(const float* p, uint32_t flags) {
  Vec r;
  for (int i = 0; i < LANES; ++i) r.lane[i] = flags >> i & 1 ? *p++ : 0.0f;
  return r;
}

inline uint32_t flags_of(const uint8_t* bytes) {
  uint32_t flags = 0;
  for (int i = 0; i < LANES; ++i) flags |= uint32_t(bytes[i] != 0) << i;
  return flags;
}

// Sums of numbers below 1 modulo 1, in units of 2^-32.
struct Fraction {
  uint32_t lane[LANES];
};
inline Fraction load_fraction(const uint32_t* p) {
  Fraction r;
  memcpy(r.lane, p, sizeof r.lane);
  return r;
}
inline void store_fraction(uint32_t* p, Fraction f) { memcpy(p, f.lane, sizeof f.lane); }

// Adds the lanes of s (>= 0) that are below 1. Flags where the sum passed 1, and where s is not below it; none for NaN.
inline uint32_t advance(Fraction& f, Vec s) {
  uint32_t flags = 0;
  for (int i = 0; i < LANES; ++i) {
    const bool small = s.lane[i] < 1.0f;
    const uint32_t next = f.lane[i] + (small ? uint32_t(int64_t(s.lane[i] * 0x1p32f + 0.5f)) : 0);
    flags |= uint32_t(next < f.lane[i] || s.lane[i] >= 1.0f) << i;
    f.lane[i] = next;
  }
  return flags;
}

inline float as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t as_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

inline float to_float(bf16 x) { return as_float(uint32_t(x.bits) << 16); }

inline bf16 to_bf16(float x) {  // to nearest, ties to even; NaN stays NaN
  const uint32_t bits = as_bits(x);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return {uint16_t(x != x ? 0x7fc0 : rounded)};
}

inline float to_float(f16 x) {
  // Shifted into place the exponent is 112 too small: one multiplication repairs it, subnormals included.
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = uint32_t(x.bits & 0x7fff) << 13;
  const float scaled = as_float(magnitude) * 0x1p112f;
  return as_float(sign | (magnitude >= 0x0f800000 ? magnitude | 0x7f800000 : as_bits(scaled)));
}

inline f16 to_f16(float x) {
  const uint32_t sign = as_bits(x) >> 16 & 0x8000;
  uint32_t magnitude = as_bits(x) & 0x7fffffff;
  if (magnitude > 0x7f800000) return {uint16_t(sign | 0x7e00)};
  if (magnitude >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // rounds to 65536 or beyond
  if (magnitude < 0x38800000)  // subnormal: adding 1/2 leaves the bits, rightly rounded, at the bottom of the mantissa
    return {uint16_t(sign | (as_bits(as_float(magnitude) + 0.5f) - 0x3f000000))};
  magnitude += 0xc8000fff + (magnitude >> 13 & 1);
  return {uint16_t(sign | magnitude >> 13)};
}

inline Vec load(const bf16* p) { KLQ_EACH(to_float(p[i])); }
inline Vec load(const f16* p) { KLQ_EACH(to_float(p[i])); }
inline void store(bf16* p, Vec v) {
  for (int i = 0; i < LANES; ++i) p[i] = to_bf16(v.lane[i]);
}
inline void store(f16* p, Vec v) {
  for (int i = 0; i < LANES; ++i) p[i] = to_f16(v.lane[i]);
}

#undef KLQ_EACH
#undef KLQ_EACH_FLAG

}  // namespace

#include "simd_plain.h"
