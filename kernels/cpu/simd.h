// Vectors of one instruction set: loads, stores, exp, and the two activations of an LSTM.
//
// Included once per instruction set, inside a namespace and with these macros set:
//   VECTOR_BYTES  width of a vector register
//   TILE_ROWS     rows of a register tile of TILE_ROWS x 4 vectors
//   HAS_AVX512, HAS_AVX2, HAS_AVX512_BF16  where their intrinsics may be used
//   SHUFFLES      where the compiler has __builtin_shufflevector
// No include guard, and nothing of the standard library that is not already included: what is
// defined here is compiled for this instruction set.

#define INLINE static inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))

// The constants of exp: range, reduction by ln 2 in two parts, and the polynomial p of
// exp(r) = 1 + r + r²·p(r), highest power first, with the least relative error on [-ln2/2, ln2/2]
// (by Remez' exchange): 3.1e-9 for float and 3.6e-18 for double, where half a unit in the last
// place is 6.0e-8 and 1.1e-16.
template <class Real>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  typedef int32_t Integer;
  static constexpr int kTerms = 5;
  static constexpr float kPolynomial[kTerms] = {1.38145402e-3f, 8.36874511e-3f, 4.16683908e-2f,
                                                1.66665204e-1f, 4.99999934e-1f};
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
  static constexpr int kTerms = 10;
  static constexpr double kPolynomial[kTerms] = {
      2.50000188331873732e-8, 2.76306302502936000e-7, 2.75575868038953245e-6,
      2.48014929496338692e-5, 1.98412695057737751e-4, 1.38888889437599654e-3,
      8.33333333349497726e-3, 4.16666666665297282e-2, 1.66666666666664115e-1,
      5.00000000000001067e-1};
  static constexpr int kMantissaBits = 52;
  static constexpr int64_t kExponentBias = 1023;
  static constexpr double kRounder = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLog2E = 1.44269504088896340736;
  static constexpr double kLn2High = 6.93147180369123816490e-01;
  static constexpr double kLn2Low = 1.90821492927058770002e-10;
  static constexpr double kLimit = 708.0;
  static constexpr double kTanhLimit = 80.0;
};

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

#ifdef HAS_AVX512_BF16
  // Numbers in bfloat16 widen exactly, and are rounded to the nearest even one; NaN stays NaN, and
  // what is denormal is stored as zero.
  INLINE Vector load(const BFloat16 *p, int64_t count) {
    const __m256i bits = _mm256_maskz_loadu_epi16(first_lanes(count), p);
    return (Vector)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
  }
  INLINE void store(BFloat16 *p, Vector v, int64_t count) {
    const __m256i bits = (__m256i)_mm512_cvtneps_pbh((__m512)v);
    _mm256_mask_storeu_epi16(p, first_lanes(count), bits);
  }
  INLINE __mmask16 first_lanes(int64_t count) {
    return __mmask16(count >= kWidth ? 0xffff : (1u << count) - 1);
  }
#endif

  // NaN passes through: a comparison with it is false, and of the instructions the result is their
  // second argument.
  INLINE Vector clamp(Vector x, Real limit) {
    const Vector most = broadcast(limit), least = broadcast(-limit);
#if defined(HAS_AVX512)
    if constexpr (sizeof(Real) == 4) {
      x = (Vector)_mm512_maskz_min_ps(__mmask16(-1), (__m512)most, (__m512)x);
      return (Vector)_mm512_maskz_max_ps(__mmask16(-1), (__m512)least, (__m512)x);
    } else {
      x = (Vector)_mm512_maskz_min_pd(__mmask8(-1), (__m512d)most, (__m512d)x);
      return (Vector)_mm512_maskz_max_pd(__mmask8(-1), (__m512d)least, (__m512d)x);
    }
#elif defined(HAS_AVX2)
    if constexpr (sizeof(Real) == 4)
      return (Vector)_mm256_max_ps((__m256)least, _mm256_min_ps((__m256)most, (__m256)x));
    else
      return (Vector)_mm256_max_pd((__m256d)least, _mm256_min_pd((__m256d)most, (__m256d)x));
#else
    x = x > most ? most : x;
    return x < least ? least : x;
#endif
  }

  // Vectors to compute the same with: each operation for all of them before the next one, so that
  // none waits for the one before.
  template <int N>
  struct Several {
    Vector vectors[N];

    template <class Value>
    static INLINE_MEMBER Several of(Value value) {
      Several result;
      _Pragma("GCC unroll 8") for (int n = 0; n < N; ++n) result.vectors[n] = value(n);
      return result;
    }
    INLINE_MEMBER Vector operator[](int n) const { return vectors[n]; }
    friend INLINE_MEMBER Several operator-(const Several &a, const Several &b) {
      return of([&](int n) { return a[n] - b[n]; });
    }
    friend INLINE_MEMBER Several operator*(const Several &a, const Several &b) {
      return of([&](int n) { return a[n] * b[n]; });
    }
    friend INLINE_MEMBER Several operator+(const Several &a, Real b) {
      return of([&](int n) { return a[n] + b; });
    }
    friend INLINE_MEMBER Several operator-(const Several &a, Real b) {
      return of([&](int n) { return a[n] - b; });
    }
    friend INLINE_MEMBER Several operator*(const Several &a, Real b) {
      return of([&](int n) { return a[n] * b; });
    }
  };

  // The four gates of a cell: σ of the input, forget and output gate, tanh of the cell input.
  INLINE Several<4> gates(const Vector (&a)[4]) {
    constexpr int kCellInput = 2;
    const Several<4> x = Several<4>::of([&](int n) {
      return n == kCellInput ? doubled(a[n]) : negated(a[n]);
    });
    Several<4> scale, reduced;
    exponential<4>(x, scale, reduced);
    return Several<4>::of([&](int n) {
      return n == kCellInput ? tanh_from(scale[n], reduced[n])
                             : sigmoid_from(scale[n], reduced[n]);
    });
  }

  template <int N>
  INLINE Several<N> tanh(const Several<N> &x) {
    const Several<N> twice = Several<N>::of([&](int n) { return doubled(x[n]); });
    Several<N> scale, reduced;
    exponential<N>(twice, scale, reduced);
    return Several<N>::of([&](int n) { return tanh_from(scale[n], reduced[n]); });
  }
  INLINE Vector tanh(Vector x) {
    return tanh<1>(Several<1>::of([&](int) { return x; }))[0];
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
  // exp(x) = scale * (1 + reduced), scale = 2^n, for |x| <= kLimit.
  template <int N>
  INLINE void exponential(const Several<N> &x, Several<N> &scale, Several<N> &reduced) {
    const Several<N> shifted = x * Constants::kLog2E + Constants::kRounder;  // its low bits hold n
    const Several<N> n = shifted - Constants::kRounder;
    const Several<N> r = x - n * Constants::kLn2High - n * Constants::kLn2Low;
    Several<N> p = r * Constants::kPolynomial[0] + Constants::kPolynomial[1];
    _Pragma("GCC unroll 16") for (int term = 2; term < Constants::kTerms; ++term) {
      p = p * r + Constants::kPolynomial[term];
    }
    _Pragma("GCC unroll 8") for (int i = 0; i < N; ++i) {
      const Integers exponent = (Integers)shifted[i] + Constants::kExponentBias;
      scale.vectors[i] = (Vector)(exponent << Constants::kMantissaBits);
      reduced.vectors[i] = p[i] * (r[i] * r[i]) + r[i];
    }
  }

  // σ(x) = 1 / (1 + exp(-x))
  INLINE Vector negated(Vector x) { return clamp(-x, Constants::kLimit); }
  INLINE Vector sigmoid_from(Vector scale, Vector reduced) {
    return reciprocal(scale * reduced + scale + Real(1));
  }

  // tanh(x) = t / (t + 2) with t = exp(2x) - 1, which loses no digits near 0.
  INLINE Vector doubled(Vector x) { return clamp(x + x, Constants::kTanhLimit); }
  INLINE Vector tanh_from(Vector scale, Vector reduced) {
    const Vector t = scale * reduced + (scale - Real(1)), d = t + Real(2);
    const Vector y = reciprocal(d), quotient = t * y;
    // Corrected by its remainder, or a tanh of 1 would be off by a rounding, and maybe above 1.
    return quotient + y * (t - quotient * d);
  }

  // 1 / d for finite d >= 1.
  INLINE Vector reciprocal(Vector d) {
#ifdef HAS_AVX512
    if constexpr (sizeof(Real) == 4) {
      const Vector y = (Vector)_mm512_maskz_rcp14_ps(__mmask16(-1), (__m512)d);
      return y + y * (Real(1) - d * y);  // one step of Newton: 14 bits become 28
    }
#endif
    return Real(1) / d;
  }

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

// How the numbers of a row are multiplied by those of a panel, both as they are stored, and summed
// as Real. Each lane of a vector takes kEach neighbours of a row at once: a word of a panel.
template <class Stored>
struct Factors {
  typedef Stored Real;
  typedef typename Simd<Real>::Vector Vector;
  static constexpr int64_t kEach = 1;

  // A word in every lane.
  INLINE Vector broadcast(const Stored *p) { return Simd<Real>::broadcast(*p); }
  // A vector of words, from the first `count` numbers; behind them are zeros.
  INLINE Vector words(const Stored *p, int64_t count) { return Simd<Real>::load(p, count); }
  // One of them.
  INLINE Real word(const Stored *p, int64_t) { return *p; }
  INLINE Vector add_products(Vector sum, Vector a, Vector b) { return sum + a * b; }
};

#ifdef HAS_AVX512_BF16
// sum + a0·b0 + a1·b1 in each lane. The instruction rounds to nearest even, whatever the mode, and
// takes what is denormal for zero, of its arguments and of its results.
template <>
struct Factors<BFloat16> {
  typedef float Real;
  typedef Simd<Real>::Vector Vector;
  static constexpr int64_t kEach = 2;

  INLINE Vector broadcast(const BFloat16 *p) {
    int32_t pair;
    __builtin_memcpy(&pair, p, sizeof(pair));
    return (Vector)_mm512_set1_epi32(pair);
  }
  // The last number of a row of odd length, and a zero.
  INLINE Vector broadcast_last(const BFloat16 *p) { return (Vector)_mm512_set1_epi32(p->bits); }
  INLINE Vector words(const BFloat16 *p, int64_t count) {
    constexpr int64_t kNumbers = kEach * Simd<Real>::kWidth;
    const __mmask32 numbers = count >= kNumbers ? ~0u : (1u << count) - 1;
    return (Vector)_mm512_maskz_loadu_epi16(numbers, p);
  }
  INLINE Real word(const BFloat16 *p, int64_t count) {
    Real pair = 0;
    __builtin_memcpy(&pair, p, size_t(min(count, kEach)) * sizeof(BFloat16));
    return pair;
  }
  INLINE Vector add_products(Vector sum, Vector a, Vector b) {
    return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
};
#endif
