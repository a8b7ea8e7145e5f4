// Vectors of one instruction set: loads, stores, exp, and the two activations of an LSTM.
//
// Included once per instruction set, inside a namespace and with these macros set:
//   VECTOR_BYTES  width of a vector register
//   TILE_ROWS     rows of a register tile of TILE_ROWS x 4 vectors
//   HAS_AVX512    where its intrinsics may be used
//   SHUFFLES      where the compiler has __builtin_shufflevector
// No include guard, and nothing of the standard library that is not already included: what is
// defined here is compiled for this instruction set.

#define INLINE static inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))

// The constants of exp: range, reduction by ln 2 in two parts, and the degree of its Taylor
// polynomial on [-ln2/2, ln2/2] (its remainder is below half a unit in the last place).
template <class Real>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  typedef int32_t Integer;
  static constexpr int kDegree = 7;
  static constexpr int kMantissaBits = 23;
  static constexpr int32_t kExponentBias = 127;
  static constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23
  static constexpr float kLog2E = 1.44269504088896341f;
  static constexpr float kLn2High = 0.693359375f;
  static constexpr float kLn2Low = -2.12194440e-4f;
  static constexpr float kLimit = 87.0f;      // exp(+-87) is finite and normal
  static constexpr float kTanhLimit = 30.0f;  // tanh(15) rounds to 1
};

template <>
struct ExpConstants<double> {
  typedef int64_t Integer;
  static constexpr int kDegree = 13;
  static constexpr int kMantissaBits = 52;
  static constexpr int64_t kExponentBias = 1023;
  static constexpr double kRounder = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLog2E = 1.44269504088896340736;
  static constexpr double kLn2High = 6.93147180369123816490e-01;
  static constexpr double kLn2Low = 1.90821492927058770002e-10;
  static constexpr double kLimit = 708.0;
  static constexpr double kTanhLimit = 80.0;
};

constexpr double factorial(int n) { return n < 2 ? 1.0 : n * factorial(n - 1); }

template <class Real>
struct Simd {
  typedef ExpConstants<Real> Constants;
  static constexpr int64_t kWidth = VECTOR_BYTES / sizeof(Real);
  typedef Real Vector __attribute__((vector_size(VECTOR_BYTES)));
  typedef Real Unaligned __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(Real)), may_alias));
  typedef typename Constants::Integer Integers __attribute__((vector_size(VECTOR_BYTES)));

  INLINE Vector load(const Real *p) { return *reinterpret_cast<const Unaligned *>(p); }
  INLINE void store(Real *p, Vector v) { *reinterpret_cast<Unaligned *>(p) = v; }
  INLINE Vector broadcast(Real x) { return x - Vector{}; }

  // The first `count` lanes; the others load as 0 and are not stored.
  INLINE Vector load(const Real *p, int64_t count) {
    return count >= kWidth ? load(p) : load_some(p, count);
  }
  INLINE void store(Real *p, Vector v, int64_t count) {
    if (count >= kWidth)
      store(p, v);
    else
      store_some(p, v, count);
  }

  // Comparisons with NaN are false, so that NaN passes through.
  INLINE Vector clamp(Vector x, Real limit) {
    x = x > broadcast(limit) ? broadcast(limit) : x;
    return x < broadcast(-limit) ? broadcast(-limit) : x;
  }

  // 2^n and exp(x) - 1 = 2^n * (1 + reduced) - 1, for |x| <= kLimit.
  struct Exponential {
    Vector scale, reduced;
  };
  INLINE Exponential exponential(Vector x) {
    Vector shifted = x * Constants::kLog2E + Constants::kRounder;  // its low bits hold n
    Vector n = shifted - Constants::kRounder;
    Vector r = x - n * Constants::kLn2High;
    r = r - n * Constants::kLn2Low;
    Vector p = broadcast(Real(1.0 / factorial(Constants::kDegree)));
    _Pragma("GCC unroll 16") for (int d = Constants::kDegree - 1; d >= 2; --d) {
      p = p * r + Real(1.0 / factorial(d));
    }
    Integers exponent = (Integers)shifted + Constants::kExponentBias;
    return {(Vector)(exponent << Constants::kMantissaBits), p * (r * r) + r};
  }

  // 1 / d for finite d >= 1.
  INLINE Vector reciprocal(Vector d) {
#ifdef HAS_AVX512
    if constexpr (sizeof(Real) == 4) {
      Vector y = (Vector)_mm512_maskz_rcp14_ps(__mmask16(-1), (__m512)d);
      return y + y * (Real(1) - d * y);  // one step of Newton: 14 bits become 28
    }
#endif
    return Real(1) / d;
  }

  // 1 / (1 + exp(-x))
  INLINE Vector sigmoid(Vector x) {
    Exponential e = exponential(clamp(-x, Constants::kLimit));
    return reciprocal(e.scale * e.reduced + e.scale + Real(1));
  }

  // t / (t + 2) with t = exp(2x) - 1, which loses no digits near 0.
  INLINE Vector tanh(Vector x) {
    Exponential e = exponential(clamp(x + x, Constants::kTanhLimit));
    const Vector t = e.scale * e.reduced + (e.scale - Real(1)), d = t + Real(2);
    const Vector y = reciprocal(d), quotient = t * y;
    // Corrected by its remainder, or a tanh of 1 would be off by a rounding, and maybe above 1.
    return quotient + y * (t - quotient * d);
  }

  // The first `count` lanes, the others 0.
  INLINE Vector first(Vector v, int64_t count) {
    Integers lane;
    _Pragma("GCC unroll 16") for (int l = 0; l < kWidth; ++l) lane[l] = l;
    const Integers end = Integers{} + typename Constants::Integer(min(count, kWidth));
    return lane < end ? v : Vector{};
  }

  // The sum of all lanes, always in the same order.
  INLINE Real sum(Vector v) {
#ifdef SHUFFLES
    return halved<kWidth / 2>(v)[0];
#else
    for (int64_t half = kWidth / 2; half > 0; half /= 2) {
      for (int64_t i = 0; i < half; ++i) v[i] += v[i + half];
    }
    return v[0];
#endif
  }

  // Lane l becomes the sum of the lanes of rows[l], always in the same order.
  INLINE Vector sums(Vector (&rows)[kWidth]) {
#ifdef SHUFFLES
    fold<kWidth / 2>(rows);
    return rows[0];
#else
    Vector result{};
    for (int64_t l = 0; l < kWidth; ++l) result[l] = sum(rows[l]);
    return result;
#endif
  }

#ifdef SHUFFLES
  // rows[r][l] becomes rows[l][r]: blocks of half, a quarter, ... of the width change places.
  INLINE void transpose(Vector (&rows)[kWidth]) { exchange<kWidth / 2>(rows); }
#endif

 private:
#ifdef SHUFFLES
  // The sum of all lanes comes to lie in the first.
  template <int BLOCK>
  INLINE Vector halved(Vector v) {
    typedef std::make_integer_sequence<int, int(kWidth)> Lanes;
    v += second_halves<BLOCK>(v, v, Lanes{});
    if constexpr (BLOCK > 1) return halved<BLOCK / 2>(v);
    return v;
  }
  template <int BLOCK>
  INLINE void fold(Vector (&rows)[kWidth]) {
    typedef std::make_integer_sequence<int, int(kWidth)> Lanes;
    _Pragma("GCC unroll 16") for (int r = 0; r < BLOCK; ++r) {
      const Vector a = rows[r], b = rows[r + BLOCK];
      rows[r] = first_halves<BLOCK>(a, b, Lanes{}) + second_halves<BLOCK>(a, b, Lanes{});
    }
    if constexpr (BLOCK > 1) fold<BLOCK / 2>(rows);
  }
  template <int BLOCK>
  INLINE void exchange(Vector (&rows)[kWidth]) {
    typedef std::make_integer_sequence<int, int(kWidth)> Lanes;
    _Pragma("GCC unroll 16") for (int r = 0; r < kWidth; ++r) {
      if (r & BLOCK) continue;
      const Vector a = rows[r], b = rows[r + BLOCK];
      rows[r] = first_halves<BLOCK>(a, b, Lanes{});
      rows[r + BLOCK] = second_halves<BLOCK>(a, b, Lanes{});
    }
    if constexpr (BLOCK > 1) exchange<BLOCK / 2>(rows);
  }
  template <int BLOCK, int... LANE>
  INLINE Vector first_halves(Vector a, Vector b, std::integer_sequence<int, LANE...>) {
    return __builtin_shufflevector(a, b, (LANE & BLOCK ? LANE - BLOCK + int(kWidth) : LANE)...);
  }
  template <int BLOCK, int... LANE>
  INLINE Vector second_halves(Vector a, Vector b, std::integer_sequence<int, LANE...>) {
    return __builtin_shufflevector(a, b, (LANE & BLOCK ? LANE + int(kWidth) : LANE + BLOCK)...);
  }
#endif

  INLINE Vector load_some(const Real *p, int64_t count) {
#if defined(HAS_AVX512)
    if constexpr (sizeof(Real) == 4)
      return (Vector)_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), p);
    else
      return (Vector)_mm512_maskz_loadu_pd(__mmask8((1u << count) - 1), p);
#else
    Vector v{};
    for (int64_t l = 0; l < count; ++l) v[l] = p[l];
    return v;
#endif
  }
  INLINE void store_some(Real *p, Vector v, int64_t count) {
#if defined(HAS_AVX512)
    if constexpr (sizeof(Real) == 4)
      _mm512_mask_storeu_ps(p, __mmask16((1u << count) - 1), (__m512)v);
    else
      _mm512_mask_storeu_pd(p, __mmask8((1u << count) - 1), (__m512d)v);
#else
    for (int64_t l = 0; l < count; ++l) p[l] = v[l];
#endif
  }
};
