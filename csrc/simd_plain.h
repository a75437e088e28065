// Parts of vectors and turned tiles for instruction sets without masks: through a copy. Included by their simd_*.h.
#pragma once

namespace {

// The first `count` elements, 0 in the other lanes; nothing beyond them is read or written.
template <class T>
inline Vec load_some(const T* p, int64_t count) {
  T copy[LANES] = {};
  memcpy(copy, p, size_t(count) * sizeof(T));
  return load(copy);
}

template <class T>
inline void store_some(T* p, Vec v, int64_t count) {
  T copy[LANES];
  store(copy, v);
  memcpy(p, copy, size_t(count) * sizeof(T));
}

// out[column][row] = in[row][column], TILE rows of LANES 16-bit numbers.
inline void turn_tile(const uint16_t* in, int64_t in_stride, uint16_t* out, int64_t out_stride) {
  for (int column = 0; column < LANES; ++column) {
    for (int row = 0; row < TILE; ++row) out[column * out_stride + row] = in[row * in_stride + column];
  }
}

}  // namespace
