// Matrix products on register tiles, and the panels they read. Included once per instruction set,
// after simd.h.

// sum[r][z] += Σ_k rows[r][k * STEP] * panel[k][z], begin <= k < end, one after another, or as many
// at once as a word of the panel holds; begin divides by that.
//   pitch: elements from one row of the panel to the next.
template <class Stored, int ROWS, int COLUMNS, int STEP>
INLINE void accumulate(typename Factors<Stored>::Vector (&sum)[ROWS][COLUMNS],
                       const Stored *const (&rows)[ROWS],
                       const typename Factors<Stored>::Real *__restrict panel, int64_t pitch,
                       int64_t begin, int64_t end) {
  typedef Factors<Stored> F;
  typedef Simd<typename F::Real> S;
  typedef typename S::Vector Vector;
  constexpr int64_t kEach = F::kEach;
  int64_t k = begin;
  panel += begin / kEach * pitch;
  if constexpr (ROWS * COLUMNS < 8) {
    // Too few sums to hide the latency of an addition: a second set takes every other k.
    Vector odd[ROWS][COLUMNS] = {};
    for (; k + 2 * kEach <= end; k += 2 * kEach, panel += 2 * pitch) {
      Vector w[2][COLUMNS];
      _Pragma("GCC unroll 4") for (int z = 0; z < COLUMNS; ++z) {
        w[0][z] = S::load(panel + z * S::kWidth);
        w[1][z] = S::load(panel + pitch + z * S::kWidth);
      }
      _Pragma("GCC unroll 8") for (int r = 0; r < ROWS; ++r) {
        const Vector a = F::broadcast(rows[r] + k * STEP);
        const Vector b = F::broadcast(rows[r] + (k + kEach) * STEP);
        _Pragma("GCC unroll 4") for (int z = 0; z < COLUMNS; ++z) {
          sum[r][z] = F::add_products(sum[r][z], a, w[0][z]);
          odd[r][z] = F::add_products(odd[r][z], b, w[1][z]);
        }
      }
    }
    _Pragma("GCC unroll 8") for (int r = 0; r < ROWS; ++r) {
      _Pragma("GCC unroll 4") for (int z = 0; z < COLUMNS; ++z) sum[r][z] += odd[r][z];
    }
  }
  for (; k + kEach <= end; k += kEach, panel += pitch) {
    Vector w[COLUMNS];
    _Pragma("GCC unroll 4") for (int z = 0; z < COLUMNS; ++z) w[z] = S::load(panel + z * S::kWidth);
    _Pragma("GCC unroll 8") for (int r = 0; r < ROWS; ++r) {
      const Vector a = F::broadcast(rows[r] + k * STEP);
      _Pragma("GCC unroll 4") for (int z = 0; z < COLUMNS; ++z) {
        sum[r][z] = F::add_products(sum[r][z], a, w[z]);
      }
    }
  }
  if constexpr (kEach > 1) {
    if (k == end) return;
    _Pragma("GCC unroll 8") for (int r = 0; r < ROWS; ++r) {
      const Vector a = F::broadcast_last(rows[r] + k * STEP);
      _Pragma("GCC unroll 4") for (int z = 0; z < COLUMNS; ++z) {
        sum[r][z] = F::add_products(sum[r][z], a, S::load(panel + z * S::kWidth));
      }
    }
  }
}

// Products of a longer sum are added up in chains of this length, and the chains then: the error of
// a sum grows with the length of its chains.
constexpr int64_t kChain = 256;

// out[r][0 ... filled-1] (+)= rows[r] · panel, sums staying in registers for a chain.
template <class Stored, int ROWS, int COLUMNS, int STEP,
          class Real = typename Factors<Stored>::Real>
NOINLINE static void product_tile(const Stored *const *rows, const Real *panel, int64_t pitch,
                                  int64_t depth, Real *const *out, int64_t filled, bool add) {
  typedef Simd<Real> S;
  const Stored *a[ROWS];
  _Pragma("GCC unroll 8") for (int r = 0; r < ROWS; ++r) a[r] = rows[r];
  int64_t k = 0;
  do {
    typename S::Vector sum[ROWS][COLUMNS] = {};
    accumulate<Stored, ROWS, COLUMNS, STEP>(sum, a, panel, pitch, k, min(k + kChain, depth));
    _Pragma("GCC unroll 8") for (int r = 0; r < ROWS; ++r) {
      _Pragma("GCC unroll 4") for (int z = 0; z < COLUMNS; ++z) {
        const int64_t count = filled - z * S::kWidth;
        if (count <= 0) break;
        Real *p = out[r] + z * S::kWidth;
        S::store(p, add ? sum[r][z] + S::load(p, count) : sum[r][z], count);
      }
    }
    add = true;
    k += kChain;
  } while (k < depth);
}

// Call tile with a tile's height as a compile-time number.
template <class Tile>
INLINE void with_rows(int64_t count, Tile tile) {
  switch (count) {
    case 1:
      return tile(std::integral_constant<int, 1>());
    case 2:
      return tile(std::integral_constant<int, 2>());
    case 3:
      return tile(std::integral_constant<int, 3>());
#if TILE_ROWS > 3
    case 4:
      return tile(std::integral_constant<int, 4>());
    case 5:
      return tile(std::integral_constant<int, 5>());
    case 6:
      return tile(std::integral_constant<int, 6>());
#endif
  }
}

template <class Stored, int COLUMNS, int STEP, class Real = typename Factors<Stored>::Real>
static void product_columns(int64_t count, const Stored *const *rows, const Real *panel,
                            int64_t pitch, int64_t depth, Real *const *out, int64_t filled,
                            bool add) {
  with_rows(count, [&](auto height) {
    product_tile<Stored, height(), COLUMNS, STEP>(rows, panel, pitch, depth, out, filled, add);
  });
}

// One tile of a product: `count` rows, at most TILE_ROWS, times one panel of those at `weights`.
template <class Real, int STEP = 1>
static void product(int64_t count, const Real *const *rows, const Panels &panels, int64_t panel,
                    const Real *weights, Real *const *out, bool add) {
  const auto columns = [&](auto width) {
    product_columns<Real, width(), STEP>(count, rows, weights + panels.offset(panel),
                                         panels.pitch(panel), panels.depth, out,
                                         panels.filled(panel), add);
  };
  switch (panels.columns(panel)) {
    case 4:
      return columns(std::integral_constant<int, 4>());
    case 2:
      return columns(std::integral_constant<int, 2>());
    default:
      return columns(std::integral_constant<int, 1>());
  }
}

// Call tile(first, count) for tiles of about equal height, at most TILE_ROWS.
template <class Tile>
INLINE void for_each_tile(Share rows, Tile tile) {
  const int64_t count = rows.end - rows.begin;
  const int64_t tiles = divide_up(count, TILE_ROWS);
  for (int64_t i = 0; i < tiles; ++i) {
    const Share share = share_of(count, i, tiles);
    tile(rows.begin + share.begin, share.end - share.begin);
  }
}

// One row of a matrix [depth, width], into its row of one panel.
template <class Real>
INLINE void pack_row(const Panels &panels, int64_t panel, const Real *in, Real *out) {
  typedef Simd<Real> S;
  const int64_t columns = panels.columns(panel), filled = panels.filled(panel);
  for (int64_t z = 0; z < columns; ++z) {
    const int64_t first = z * S::kWidth;
    S::store(out + first, S::load(in + panels.first_column(panel) + first, filled - first));
  }
}

// One vector of columns of a panel, whose column l is the row of `depth` numbers at row(l), or
// zeros where that is null.
//   out: [depth, in words][step], its first S::kWidth columns are written.
template <class Stored, class Row, class Real = typename Factors<Stored>::Real>
INLINE void pack_transposed(int64_t depth, Real *out, int64_t step, Row row) {
  typedef Factors<Stored> F;
  typedef Simd<Real> S;
  const int64_t words = divide_up(depth, F::kEach);
#ifdef SHUFFLES
  for (int64_t k = 0; k < words; k += S::kWidth) {
    const int64_t count = min(words - k, S::kWidth), number = k * F::kEach;
    typename S::Vector block[S::kWidth];
    _Pragma("GCC unroll 16") for (int64_t l = 0; l < S::kWidth; ++l) {
      const Stored *in = row(l);
      block[l] = in ? F::words(in + number, depth - number) : typename S::Vector{};
    }
    S::transpose(block);
    if (count == S::kWidth) {
      _Pragma("GCC unroll 16") for (int64_t i = 0; i < S::kWidth; ++i) {
        S::store(out + (k + i) * step, block[i]);
      }
    } else {
      for (int64_t i = 0; i < count; ++i) S::store(out + (k + i) * step, block[i]);
    }
  }
#else
  constexpr int64_t kBlock = 16;  // of a cache line each, so that lines are read once
  for (int64_t begin = 0; begin < words; begin += kBlock) {
    const int64_t end = min(begin + kBlock, words);
    for (int64_t l = 0; l < S::kWidth; ++l) {
      const Stored *in = row(l);
      for (int64_t k = begin; k < end; ++k) {
        const int64_t number = k * F::kEach;
        out[k * step + l] = in ? F::word(in + number, depth - number) : Real(0);
      }
    }
  }
#endif
}

// sums[0 ... count-1] += others
template <class Real>
static void add_to(Real *sums, const Real *others, int64_t count) {
  typedef Simd<Real> S;
  for (int64_t i = 0; i < count; i += S::kWidth) {
    const int64_t left = count - i;
    S::store(sums + i, S::load(sums + i, left) + S::load(others + i, left), left);
  }
}
