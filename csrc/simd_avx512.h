// Sixteen fp32 lanes in one AVX-512 register (F, BW, VL, DQ). simd_portable.h says what each name means.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "kernels.h"

namespace {

struct Vec {
  __m512 v;
};
struct Lanes {
  __mmask16 m;
};
constexpr int64_t ACCUMULATORS = 16;

inline Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v.v); }
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Vec abs(Vec a) { return {_mm512_abs_ps(a.v)}; }
inline Lanes operator<(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
inline Lanes operator==(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
inline Vec select(Lanes m, Vec a, Vec b) { return {_mm512_mask_blend_ps(m.m, b.v, a.v)}; }
inline Lanes lanes_of(uint32_t flags) { return {__mmask16(flags)}; }

inline Vec power_of_two(Vec v) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(v.v), 23))}; }

template <int K>
inline Vec shift(Vec v, Vec fill) {
  return {_mm512_castsi512_ps(_mm512_alignr_epi32(_mm512_castps_si512(fill.v), _mm512_castps_si512(v.v), K))};
}

inline float first(Vec v) { return _mm512_cvtss_f32(v.v); }

inline void compress(float* p, Vec v, uint32_t flags) {  // in a register: compressing to memory is slow on some cores
  _mm512_storeu_ps(p, _mm512_maskz_compress_ps(__mmask16(flags), v.v));
}

inline Vec expand(const float* p, uint32_t flags) {
  return {_mm512_maskz_expand_ps(__mmask16(flags), _mm512_loadu_ps(p))};
}

inline uint32_t flags_of(const uint8_t* bytes) {
  const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
  return _mm_test_epi8_mask(b, b);
}

struct Fraction {
  __m512i v;
};
inline Fraction load_fraction(const uint32_t* p) { return {_mm512_loadu_si512(p)}; }
inline void store_fraction(uint32_t* p, Fraction f) { _mm512_storeu_si512(p, f.v); }

inline uint32_t advance(Fraction& f, Vec s) {
  const __m512 one = _mm512_set1_ps(1.0f);
  const __mmask16 small = _mm512_cmp_ps_mask(s.v, one, _CMP_LT_OQ), large = _mm512_cmp_ps_mask(s.v, one, _CMP_GE_OQ);
  const __m512i steps = _mm512_cvtps_epu32(_mm512_mul_ps(s.v, _mm512_set1_ps(0x1p32f)));
  const __m512i next = _mm512_mask_add_epi32(f.v, small, f.v, steps);
  const __mmask16 passed = _mm512_cmplt_epu32_mask(next, f.v);
  f.v = next;
  return passed | large;
}

inline Vec widened(bf16, __m256i halves) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16))};
}
inline Vec widened(f16, __m256i halves) { return {_mm512_cvtph_ps(halves)}; }

inline __m256i narrowed(bf16, Vec v) {  // to nearest, ties to even; NaN stays NaN
  const __m512i bits = _mm512_castps_si512(v.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(v.v, v.v, _CMP_UNORD_Q);
  const __m512i safe = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(safe, 16));
}
inline __m256i narrowed(f16, Vec v) { return _mm512_cvtps_ph(v.v, _MM_FROUND_TO_NEAREST_INT); }

inline Vec load(const bf16* p) { return widened(bf16{}, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline Vec load(const f16* p) { return widened(f16{}, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline void store(bf16* p, Vec v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrowed(bf16{}, v)); }
inline void store(f16* p, Vec v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrowed(f16{}, v)); }

// The first `count` elements, 0 in the other lanes; nothing beyond them is read or written.
inline __mmask16 first_of(int64_t count) { return __mmask16((1u << count) - 1); }
inline Vec load_some(const float* p, int64_t count) { return {_mm512_maskz_loadu_ps(first_of(count), p)}; }
inline void store_some(float* p, Vec v, int64_t count) { _mm512_mask_storeu_ps(p, first_of(count), v.v); }
template <class Half>
inline Vec load_some(const Half* p, int64_t count) {
  return widened(Half{}, _mm256_maskz_loadu_epi16(first_of(count), p));
}
template <class Half>
inline void store_some(Half* p, Vec v, int64_t count) {
  _mm256_mask_storeu_epi16(p, first_of(count), narrowed(Half{}, v));
}

// Pairs of rows make columns of 32-bit numbers, which are turned in registers, sixteen by sixteen.
inline void turn_tile(const uint16_t* in, int64_t in_stride, uint16_t* out, int64_t out_stride) {
  __m512i a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    const __m256i* even = reinterpret_cast<const __m256i*>(in + 2 * i * in_stride);
    const __m256i* odd = reinterpret_cast<const __m256i*>(in + (2 * i + 1) * in_stride);
    a[i] = _mm512_or_si512(_mm512_cvtepu16_epi32(_mm256_loadu_si256(even)),
                           _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(odd)), 16));
  }
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // a[i + c]: column c of each quarter, of four rows of pairs
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512i low = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x88), high = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x88);
    const __m512i low_odd = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xdd);
    const __m512i high_odd = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xdd);
    _mm512_storeu_si512(out + c * out_stride, _mm512_shuffle_i32x4(low, high, 0x88));
    _mm512_storeu_si512(out + (4 + c) * out_stride, _mm512_shuffle_i32x4(low_odd, high_odd, 0x88));
    _mm512_storeu_si512(out + (8 + c) * out_stride, _mm512_shuffle_i32x4(low, high, 0xdd));
    _mm512_storeu_si512(out + (12 + c) * out_stride, _mm512_shuffle_i32x4(low_odd, high_odd, 0xdd));
  }
}

}  // namespace
