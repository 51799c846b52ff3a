// exp and tanh of vectors of float32, by the polynomials of Cephes (S. Moshier).
//
// Included once per instruction set, inside that set's namespace, after mixed_linear_cpu_vector.h.

// exp(x) within 1.5 units in the last place for -87.3 <= x <= 88; 0 below; NaN stays NaN.
CLP_INLINE Vec exp(Vec x) {
  const Vec low = splat(-87.3f), high = splat(88.0f), magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds
  Vec t = x < low ? low : x;
  t = t > high ? high : t;
  const Vec shifted = t * 1.44269504088896341f + magic;
  const Vec n = shifted - magic;
  const Vec r = (t - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts: the first times n is exact
  Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const Vec y = p * (r * r) + r + 1.0f;
  const VecUint power = ((VecUint)shifted - (VecUint)magic + 127) << 23;
  return x < low ? splat(0.0f) : y * (Vec)power;
}

// tanh(x) within 2 units in the last place; NaN stays NaN.
CLP_INLINE Vec tanh(Vec x) {
  const VecInt sign = (VecInt)x & (VecInt)splat(-0.0f);
  const Vec size = (Vec)((VecInt)x ^ sign);
  const Vec z = x * x;
  Vec p = z * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const Vec small = p * z * x + x;
  const Vec large = 1.0f - 2.0f / (exp(size + size) + 1.0f);
  return size < splat(0.625f) ? small : (Vec)((VecInt)large | sign);
}
