// Sixteen fp32 lanes in two AVX2 registers (AVX2, FMA, F16C, BMI2). simd_portable.h says what each name means.
//
// The same number of lanes, with fused multiply-adds in the same places, as AVX-512: the two give the same bits.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "kernels.h"

namespace {

struct Vec {
  __m256 lo, hi;
};
struct Lanes {
  __m256 lo, hi;
};
constexpr int64_t ACCUMULATORS = 4;

inline Vec broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, Vec v) {
  _mm256_storeu_ps(p, v.lo);
  _mm256_storeu_ps(p + 8, v.hi);
}
inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline Vec fma(Vec a, Vec b, Vec c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
inline Vec abs(Vec a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
inline Lanes operator<(Vec a, Vec b) {
  return {_mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ)};
}
inline Lanes operator==(Vec a, Vec b) {
  return {_mm256_cmp_ps(a.lo, b.lo, _CMP_EQ_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_EQ_OQ)};
}
inline Vec select(Lanes m, Vec a, Vec b) {
  return {_mm256_blendv_ps(b.lo, a.lo, m.lo), _mm256_blendv_ps(b.hi, a.hi, m.hi)};
}
inline Lanes lanes_of(uint32_t flags) {
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i lo = _mm256_and_si256(_mm256_set1_epi32(int(flags)), bit);
  const __m256i hi = _mm256_and_si256(_mm256_set1_epi32(int(flags >> 8)), bit);
  return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(lo, bit)), _mm256_castsi256_ps(_mm256_cmpeq_epi32(hi, bit))};
}

inline Vec power_of_two(Vec v) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(v.lo), 23)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(v.hi), 23))};
}

template <int K>  // eight lanes starting K after the first of x, running on into y
inline __m256 window(__m256 x, __m256 y) {
  const __m256 middle = _mm256_permute2f128_ps(x, y, 0x21);
  if (K == 4) return middle;
  return _mm256_castsi256_ps(
      _mm256_alignr_epi8(_mm256_castps_si256(middle), _mm256_castps_si256(x), K == 4 ? 0 : 4 * K));
}

template <int K>
inline Vec shift(Vec v, Vec fill) {
  if (K == 8) return {v.hi, fill.lo};
  return {window<K == 8 ? 4 : K>(v.lo, v.hi), window<K == 8 ? 4 : K>(v.hi, fill.lo)};
}

inline float first(Vec v) { return _mm256_cvtss_f32(v.lo); }

// AVX2 permutes eight lanes by their numbers. The numbers, a byte each, are compressed and expanded by BMI2.
inline uint64_t bytes_of(uint32_t flags) { return _pdep_u64(flags, 0x0101010101010101) * 0xff; }

inline __m256 permuted(__m256 x, uint64_t lanes) {
  return _mm256_permutevar8x32_ps(x, _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(int64_t(lanes))));
}

inline void compress(float* p, Vec v, uint32_t flags) {
  constexpr uint64_t lanes = 0x0706050403020100;
  const uint32_t lo = flags & 0xff, hi = flags >> 8;
  _mm256_storeu_ps(p, permuted(v.lo, _pext_u64(lanes, bytes_of(lo))));
  _mm256_storeu_ps(p + __builtin_popcount(lo), permuted(v.hi, _pext_u64(lanes, bytes_of(hi))));
}

inline Vec expand(const float* p, uint32_t flags) {
  constexpr uint64_t lanes = 0x0706050403020100;
  const uint32_t lo = flags & 0xff, hi = flags >> 8;
  const Vec v = {permuted(_mm256_loadu_ps(p), _pdep_u64(lanes, bytes_of(lo))),
                 permuted(_mm256_loadu_ps(p + __builtin_popcount(lo)), _pdep_u64(lanes, bytes_of(hi)))};
  return select(lanes_of(flags), v, broadcast(0.0f));
}

inline uint32_t flags_of(const uint8_t* bytes) {
  const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
  return ~uint32_t(_mm_movemask_epi8(_mm_cmpeq_epi8(b, _mm_setzero_si128()))) & 0xffff;
}

struct Fraction {
  __m256i lo, hi;
};
inline Fraction load_fraction(const uint32_t* p) {
  const __m256i* half = reinterpret_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(half), _mm256_loadu_si256(half + 1)};
}
inline void store_fraction(uint32_t* p, Fraction f) {
  __m256i* half = reinterpret_cast<__m256i*>(p);
  _mm256_storeu_si256(half, f.lo);
  _mm256_storeu_si256(half + 1, f.hi);
}

// There is no conversion to unsigned numbers, and no comparison of them: half the range is subtracted, and flipped.
inline uint32_t advance(__m256i& f, __m256 s) {
  const __m256 one = _mm256_set1_ps(1.0f), half = _mm256_set1_ps(0x1p31f);
  const __m256i top = _mm256_set1_epi32(INT32_MIN);
  const __m256 x = _mm256_mul_ps(s, _mm256_set1_ps(0x1p32f)), upper = _mm256_cmp_ps(x, half, _CMP_GE_OQ);
  const __m256i lower = _mm256_cvtps_epi32(_mm256_sub_ps(x, _mm256_and_ps(upper, half)));
  const __m256i whole = _mm256_xor_si256(lower, _mm256_and_si256(_mm256_castps_si256(upper), top));
  const __m256i small = _mm256_castps_si256(_mm256_cmp_ps(s, one, _CMP_LT_OQ));
  const __m256i next = _mm256_add_epi32(f, _mm256_and_si256(whole, small));
  const __m256i passed = _mm256_cmpgt_epi32(_mm256_xor_si256(f, top), _mm256_xor_si256(next, top));
  const __m256 flags = _mm256_or_ps(_mm256_castsi256_ps(passed), _mm256_cmp_ps(s, one, _CMP_GE_OQ));
  f = next;
  return uint32_t(_mm256_movemask_ps(flags));
}
inline uint32_t advance(Fraction& f, Vec s) { return advance(f.lo, s.lo) | advance(f.hi, s.hi) << 8; }

inline Vec load(const bf16* p) {
  const __m128i* half = reinterpret_cast<const __m128i*>(p);
  const __m256i lo = _mm256_cvtepu16_epi32(_mm_loadu_si128(half));
  const __m256i hi = _mm256_cvtepu16_epi32(_mm_loadu_si128(half + 1));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(lo, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(hi, 16))};
}

inline Vec load(const f16* p) {
  const __m128i* half = reinterpret_cast<const __m128i*>(p);
  return {_mm256_cvtph_ps(_mm_loadu_si128(half)), _mm256_cvtph_ps(_mm_loadu_si128(half + 1))};
}

inline __m256i rounded_to_bf16(__m256 x) {  // to nearest, ties to even, in the low halves; NaN stays NaN
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan), 16);
}

inline void store(bf16* p, Vec v) {  // packing works within 128-bit halves: put its quarters back in order
  const __m256i packed = _mm256_packus_epi32(rounded_to_bf16(v.lo), rounded_to_bf16(v.hi));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
}

inline void store(f16* p, Vec v) {
  __m128i* half = reinterpret_cast<__m128i*>(p);
  _mm_storeu_si128(half, _mm256_cvtps_ph(v.lo, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(half + 1, _mm256_cvtps_ph(v.hi, _MM_FROUND_TO_NEAREST_INT));
}

}  // namespace

#include "simd_plain.h"
