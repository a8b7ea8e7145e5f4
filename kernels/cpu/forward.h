// The forward pass. Included once per instruction set, after multiply.h.
//
//   a_t = gates_t + h_{t-1}·W_hhᵀ            gates_t = x_t·W_ihᵀ + b_ih + b_hh, or given
//   i, f, o = σ(a_i), σ(a_f), σ(a_o);  g = tanh(a_g)
//   c_t = f ⊙ c_{t-1} + i ⊙ g
//   h_t = o ⊙ tanh(c_t), or (o ⊙ tanh(c_t))·W_hrᵀ
//
// A block is one vector of hidden units. A tile computes the four gates of one block for a few
// sequences in registers, from x and then h, and turns them into c and h without leaving them.
// Members of a team own rows (sequences) and blocks; they meet after every step, unless each owns
// all blocks of its rows.

// What all threads of one recurrence share.
template <class Real>
struct ForwardPlan {
  const LstmForward *arguments;
  Timeline timeline;
  Sequence<Real> gates, x, h, c, activations;
  State<Real> h0, c0;
  LstmState h_n, c_n;
  int64_t inputs, hidden, features;
  Panels projection;      // W_hrᵀ [H, P]
  bool packs_late;        // a single step needs each panel once: it is packed just before
  // [blocks][I + P][4][lanes], rows of W_ihᵀ over those of W_hhᵀ; one for each member that packs late;
  // null where weights are read as they are.
  Real *panels;
  Real *bias;             // likewise [..][4][lanes]
  Real *projection_panels;
  Real *cell_output;      // [B, H], o ⊙ tanh(c) of one step, where there is a projection
  Real *staged;           // x·W_ihᵀ + b of several steps, where x does not enter with h
  Barrier *barriers;      // one per group of rows, and one for all
};

// Rows for which x is multiplied at once where single steps have fewer.
constexpr int64_t kStagedRows = 96;
// Rows of a member from which on x enters with h, step by step, if its weights stay in the cache.
constexpr int64_t kFusedRows = 4;
// A single step is never staged, and a stage holds at least one step.
static_assert(kFusedRows <= kRowsOfAGroup && kFusedRows <= kPackedRows && kFusedRows <= kStagedRows,
              "see above");

template <class Real>
class ForwardMember : Member {
  typedef Simd<Real> S;
  typedef typename S::Vector Vector;
  typedef ForwardPlan<Real> Plan;

 public:
  ForwardMember(const Plan &plan, const Split &split, int64_t member)
      : Member(split, member, plan.timeline.batch, plan.barriers),
        plan_(plan),
        blocks_(share(divide_up(plan.hidden, S::kWidth))) {
    const int64_t blocks = divide_up(plan.hidden, S::kWidth);
    const int64_t rows = rows_.end - rows_.begin;
    const int64_t read = (blocks_.end - blocks_.begin) * depth() * kTile * int64_t(sizeof(Real));
    const bool fused = rows >= kFusedRows && (read <= kCachedWeights || rows >= kStagedRows ||
                                              plan.packs_late);
    source_ = plan.gates.data ? kGiven : fused || !plan.panels ? kFused : kStaged;
    stage_ = plan.staged + (row_group_ * blocks + blocks_.begin) * kStagedRows * kTile;
  }

  void run() {
    const Timeline &timeline = plan_.timeline;
    if (plan_.panels && !plan_.packs_late) {
      const Share mine = share_of_all(divide_up(plan_.hidden, S::kWidth));
      for (int64_t block = mine.begin; block < mine.end; ++block) pack(block);
    }
    pack_projection();
    meet_all();
    const int64_t own = rows_.end - rows_.begin;
    const int64_t chunk = source_ == kStaged ? max(1, kStagedRows / max(1, own)) : timeline.steps;
    for (int64_t begin = 0; begin < timeline.steps; begin += chunk) {
      const int64_t end = min(begin + chunk, timeline.steps);
      if (source_ == kStaged) stage(begin, end);
      for (int64_t k = begin; k < end; ++k) step(k, (k - begin) * own);
    }
    finish();
  }

 private:
  enum Source { kGiven, kStaged, kFused };
  static constexpr int64_t kTile = 4 * S::kWidth;

  const Plan &plan_;
  const Share blocks_;
  Source source_;
  Real *stage_;

  int64_t depth() const { return plan_.inputs + plan_.features; }
  Real *panel(int64_t block) const {
    return plan_.panels + (plan_.packs_late ? member_ : block) * depth() * kTile;
  }
  Real *bias(int64_t block) const {
    return plan_.bias + (plan_.packs_late ? member_ : block) * kTile;
  }
  Share active_rows(int64_t k) const {
    return {rows_.begin, max(rows_.begin, min(rows_.end, plan_.timeline.active(k)))};
  }

  // Lay out the weights of a block, its four gates side by side.
  void pack(int64_t block) {
    const LstmForward &arguments = *plan_.arguments;
    const Real *sources[2] = {static_cast<const Real *>(arguments.weight_ih),
                              static_cast<const Real *>(arguments.weight_hh)};
    const int64_t depths[2] = {plan_.inputs, plan_.features};
    const Real *biases[2] = {static_cast<const Real *>(arguments.bias_ih),
                             static_cast<const Real *>(arguments.bias_hh)};
    const int64_t unit = block * S::kWidth, count = plan_.hidden - unit;
    Real *out = panel(block);
    for (int s = 0; s < 2; out += depths[s] * kTile, ++s) {
      for (int gate = 0; gate < 4; ++gate) {
        const Real *weight = sources[s] + (gate * plan_.hidden + unit) * depths[s];
        pack_transposed<Real>(depths[s], out + gate * S::kWidth, kTile, [&](int64_t l) {
          return l < count ? weight + l * depths[s] : nullptr;
        });
      }
    }
    for (int gate = 0; gate < 4; ++gate) {
      Vector sum{};
      for (const Real *b : biases) {
        if (b) sum += S::load(b + gate * plan_.hidden + unit, count);
      }
      S::store(bias(block) + gate * S::kWidth, sum);
    }
  }

  void pack_projection() {
    if (!plan_.projection_panels) return;
    const Panels &panels = plan_.projection;
    const Real *weight = static_cast<const Real *>(plan_.arguments->weight_hr);
    const Share mine = share_of_all(panels.count());
    for (int64_t p = mine.begin; p < mine.end; ++p) {
      const int64_t columns = panels.columns(p);
      for (int64_t z = 0; z < columns; ++z) {
        const int64_t first = panels.first_column(p) + z * S::kWidth;
        pack_transposed<Real>(
            panels.depth, plan_.projection_panels + panels.offset(p) + z * S::kWidth,
            columns * S::kWidth, [&](int64_t l) {
              return first + l < plan_.features ? weight + (first + l) * plan_.hidden : nullptr;
            });
      }
    }
  }

  // gates = x·W_ihᵀ + b for the steps begin ... end-1 of this member's rows and blocks, as
  // [block][row][4][lanes].
  void stage(int64_t begin, int64_t end) {
    const int64_t own = rows_.end - rows_.begin;
    const Panels panels{plan_.inputs, kTile, S::kWidth, 4};
    for (int64_t block = blocks_.begin; block < blocks_.end; ++block) {
      Real *out = stage_ + (block - blocks_.begin) * kStagedRows * kTile;
      for_each_tile({0, (end - begin) * own}, [&](int64_t first, int64_t count) {
        const Real *rows[TILE_ROWS];
        Real *outs[TILE_ROWS];
        for (int64_t q = 0; q < count; ++q) {
          const int64_t k = begin + (first + q) / own, row = rows_.begin + (first + q) % own;
          // A row that is not active at that step is computed from another one, and not used.
          const int64_t exists = min(row, plan_.timeline.active(k) - 1);
          rows[q] = plan_.x.at(plan_.timeline.time(k), exists);
          outs[q] = out + (first + q) * kTile;
          for (int gate = 0; gate < 4; ++gate) {
            S::store(outs[q] + gate * S::kWidth, S::load(bias(block) + gate * S::kWidth));
          }
        }
        product<Real>(count, rows, panels, 0, panel(block), outs, true);
      });
    }
  }

  void step(int64_t k, int64_t staged_row) {
    const Share rows = active_rows(k);
    for (int64_t block = blocks_.begin; block < blocks_.end; ++block) {
      if (!plan_.panels) {
        for (int64_t row = rows.begin; row < rows.end; ++row) direct_tile(k, row, block);
        continue;
      }
      if (plan_.packs_late) pack(block);
      for_each_tile(rows, [&](int64_t row, int64_t count) {
        with_rows(count, [&](auto height) {
          this->template cell_tile<height()>(k, row, block, staged_row + row - rows_.begin);
        });
      });
    }
    if (plan_.cell_output) {
      meet();
      project(k, rows);
    }
    meet();
  }

  // The row of h (or c) that enters step k.
  const Real *before(const Sequence<Real> &states, const State<Real> &initial, int64_t k,
                     int64_t row) const {
    if (row >= plan_.timeline.continuing(k)) return initial.at(row);
    return states.at(plan_.timeline.time(k - 1), row);
  }
  // c lives in c_n where it is not kept.
  const Real *cell_before(int64_t k, int64_t row) const {
    if (plan_.c.data) return before(plan_.c, plan_.c0, k, row);
    return row >= plan_.timeline.continuing(k) ? plan_.c0.at(row) : cell_n(row);
  }
  Real *cell_n(int64_t row) const {
    return static_cast<Real *>(plan_.c_n.data) + row * plan_.c_n.stride_b;
  }

  template <int ROWS>
  NOINLINE void cell_tile(int64_t k, int64_t row, int64_t block, int64_t staged_row) {
    const int64_t t = plan_.timeline.time(k);
    const int64_t hidden = plan_.hidden, unit = block * S::kWidth, count = hidden - unit;
    const Real *weights = panel(block);
    Vector a[ROWS][4];
    const Real *rows[ROWS];
    if (source_ == kFused) {
      _Pragma("GCC unroll 4") for (int gate = 0; gate < 4; ++gate) {
        const Vector b = S::load(bias(block) + gate * S::kWidth);
        _Pragma("GCC unroll 8") for (int q = 0; q < ROWS; ++q) a[q][gate] = b;
      }
      _Pragma("GCC unroll 8") for (int q = 0; q < ROWS; ++q) rows[q] = plan_.x.at(t, row + q);
      accumulate<Real, ROWS, 4>(a, rows, weights, plan_.inputs);
    } else if (source_ == kStaged) {
      const Real *in = stage_ + ((block - blocks_.begin) * kStagedRows + staged_row) * kTile;
      _Pragma("GCC unroll 8") for (int q = 0; q < ROWS; ++q) {
        _Pragma("GCC unroll 4") for (int gate = 0; gate < 4; ++gate) {
          a[q][gate] = S::load(in + (q * 4 + gate) * S::kWidth);
        }
      }
    } else {
      _Pragma("GCC unroll 8") for (int q = 0; q < ROWS; ++q) {
        const Real *in = plan_.gates.at(t, row + q) + unit;
        _Pragma("GCC unroll 4") for (int gate = 0; gate < 4; ++gate) {
          a[q][gate] = S::load(in + gate * hidden, count);
        }
      }
    }
    _Pragma("GCC unroll 8") for (int q = 0; q < ROWS; ++q) {
      rows[q] = before(plan_.h, plan_.h0, k, row + q);
    }
    accumulate<Real, ROWS, 4>(a, rows, weights + plan_.inputs * kTile, plan_.features);
    update<ROWS>(a, k, row, block);
  }

  // One row of the same from weights as they are, as dot products: where there are too few rows in
  // all to repay packing.
  NOINLINE void direct_tile(int64_t k, int64_t row, int64_t block) {
    const int64_t t = plan_.timeline.time(k), hidden = plan_.hidden;
    const int64_t unit = block * S::kWidth, count = min(S::kWidth, hidden - unit);
    const LstmForward &arguments = *plan_.arguments;
    const Real *biases[2] = {static_cast<const Real *>(arguments.bias_ih),
                             static_cast<const Real *>(arguments.bias_hh)};
    const Real *h = before(plan_.h, plan_.h0, k, row);
    Vector a[1][4];
    for (int gate = 0; gate < 4; ++gate) {
      const int64_t first = gate * hidden + unit;
      Vector products[S::kWidth] = {};
      if (!plan_.gates.data) {
        dot_products(products, plan_.x.at(t, row), arguments.weight_ih, first, count,
                     plan_.inputs);
      }
      dot_products(products, h, arguments.weight_hh, first, count, plan_.features);
      a[0][gate] = S::sums(products);
      for (const Real *b : biases) {
        if (b) a[0][gate] += S::load(b + first, count);
      }
      if (plan_.gates.data) a[0][gate] += S::load(plan_.gates.at(t, row) + first, count);
    }
    update<1>(a, k, row, block);
  }

  // products[u] += vector * row (first + u) of a matrix [.., depth]; rows from `count` on repeat.
  INLINE void dot_products(Vector (&products)[S::kWidth], const Real *vector, const void *matrix,
                           int64_t first, int64_t count, int64_t depth) {
    const Real *rows = static_cast<const Real *>(matrix) + first * depth;
    for (int64_t k = 0; k < depth; k += S::kWidth) {
      const int64_t left = depth - k;
      const Vector v = S::load(vector + k, left);
      _Pragma("GCC unroll 16") for (int64_t u = 0; u < S::kWidth; ++u) {
        products[u] += v * S::load(rows + min(u, count - 1) * depth + k, left);
      }
    }
  }

  // From gates to c and h (m where there is a projection).
  template <int ROWS>
  INLINE_MEMBER void update(const Vector (&a)[ROWS][4], int64_t k, int64_t row, int64_t block) {
    const int64_t t = plan_.timeline.time(k);
    const int64_t hidden = plan_.hidden, unit = block * S::kWidth, count = hidden - unit;
    _Pragma("GCC unroll 1") for (int q = 0; q < ROWS; ++q) {
      const int64_t r = row + q;
      const Vector i = S::sigmoid(a[q][0]), f = S::sigmoid(a[q][1]);
      const Vector g = S::tanh(a[q][2]), o = S::sigmoid(a[q][3]);
      const Vector c = f * S::load(cell_before(k, r) + unit, count) + i * g;
      const Vector m = o * S::tanh(c);
      if (plan_.activations.data) {
        Real *out = plan_.activations.at(t, r) + unit;
        S::store(out, i, count);
        S::store(out + hidden, f, count);
        S::store(out + 2 * hidden, g, count);
        S::store(out + 3 * hidden, o, count);
      }
      S::store((plan_.c.data ? plan_.c.at(t, r) : cell_n(r)) + unit, c, count);
      S::store((plan_.cell_output ? plan_.cell_output + r * hidden : plan_.h.at(t, r)) + unit, m,
               count);
    }
  }

  // h_t = (o ⊙ tanh(c_t))·W_hrᵀ
  void project(int64_t k, Share rows) {
    const int64_t t = plan_.timeline.time(k);
    const Panels &panels = plan_.projection;
    const Share mine = share(panels.count());
    for (int64_t p = mine.begin; p < mine.end; ++p) {
      for_each_tile(rows, [&](int64_t row, int64_t count) {
        const Real *in[TILE_ROWS];
        Real *out[TILE_ROWS];
        for (int64_t q = 0; q < count; ++q) {
          in[q] = plan_.cell_output + (row + q) * plan_.hidden;
          out[q] = plan_.h.at(t, row + q) + panels.first_column(p);
        }
        product<Real>(count, in, panels, p, plan_.projection_panels, out, false);
      });
    }
  }

  // Copy the states after each sequence's last step.
  void finish() {
    const Timeline &timeline = plan_.timeline;
    const Share units = {blocks_.begin * S::kWidth, min(blocks_.end * S::kWidth, plan_.hidden)};
    const Share columns = plan_.cell_output ? share(plan_.features) : units;
    int64_t last = timeline.steps - 1;
    for (int64_t row = rows_.begin; row < rows_.end; ++row) {
      while (timeline.active(last) <= row) --last;
      const int64_t t = timeline.time(last);
      copy(static_cast<Real *>(plan_.h_n.data) + row * plan_.h_n.stride_b, plan_.h.at(t, row),
           columns);
      if (plan_.c.data) copy(cell_n(row), plan_.c.at(t, row), units);
    }
  }

  static void copy(Real *out, const Real *in, Share columns) {
    if (out != in && columns.end > columns.begin) {
      __builtin_memcpy(out + columns.begin, in + columns.begin,
                       (columns.end - columns.begin) * sizeof(Real));
    }
  }
};
