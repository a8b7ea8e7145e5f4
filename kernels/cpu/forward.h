// The forward pass. Included once per instruction set, after multiply.h.
//
//   a_t = gates_t + h_{t-1}·W_hhᵀ            gates_t = x_t·W_ihᵀ + b_ih + b_hh, or given
//   i, f, o = σ(a_i), σ(a_f), σ(a_o);  g = tanh(a_g)
//   c_t = f ⊙ c_{t-1} + i ⊙ g
//   h_t = o ⊙ tanh(c_t), or (o ⊙ tanh(c_t))·W_hrᵀ
//
// With modifiers, where each is given; h' and c' are h_{t-1} and c_{t-1} or, at a reset, zeros:
//
//   a_t = gates_t + (h' ⊙ recurrent_mask)·W_hhᵀ
//   ĉ_t = clamp(f ⊙ c' + i ⊙ g, -cell_clip, cell_clip)
//   ĥ_t = o ⊙ tanh(ĉ_t), or (o ⊙ tanh(ĉ_t))·W_hrᵀ
//   c_t = z_c ⊙ c' + (1 - z_c) ⊙ ĉ_t         z_c = zoneout_c_t
//   h_t = z_h ⊙ h' + (1 - z_h) ⊙ ĥ_t         z_h = zoneout_h_t
//
// A block is one vector of hidden units. A tile computes the four gates of one block for a few
// sequences: sums of products that stay in registers, and from them c and h, before they leave the
// nearest cache.
// Members of a team own rows (sequences) and blocks; they meet after every step, unless each owns
// all blocks of its rows.
//
// Tensors hold numbers as they are Stored, and Real is what is computed with. Where that is wider,
// h is rounded as it is stored, and enters the next step so; c is not, it has memory of its own.

// What a row brings into a step, and where its results go.
template <class Stored, class Real = typename Factors<Stored>::Real>
struct ForwardRow {
  const Stored *input;      // x, or the gates that are given
  const Stored *recurrent;  // what enters W_hh: h', or h' ⊙ recurrent_mask
  const Stored *h;          // h'
  const Real *c;            // c'
  Stored *new_h;
  Real *new_c;
  Real *cell_output;    // o ⊙ tanh(c), or null without a projection
  Stored *activations;  // or null
};

// What all threads of one recurrence share.
template <class Stored, class Real = typename Factors<Stored>::Real>
struct ForwardPlan {
  const LstmForward *arguments;
  const Timeline *timelines;  // one for each group of rows
  Modifiers<Real> modifiers;
  Sequence<Stored> gates, x, h;
  Sequence<Real> c;  // the same row at every step where it is not kept
  Sequence<Stored> activations;
  State<Stored> h0;
  State<Real> c0;    // where c is wide: its row, which the initial state is copied to
  LstmState h_n, c_n;
  int64_t inputs, hidden, features;
  Panels projection;      // W_hrᵀ [H, P]
  bool packs_late;        // a single step needs each panel once: it is packed just before
  // [blocks][I + P, in words][4][lanes], rows of W_ihᵀ over those of W_hhᵀ; one for each member
  // that packs late; null where weights are read as they are.
  Real *panels;
  Real *bias;             // likewise [..][4][lanes]
  Real *projection_panels;
  Real *cell_output;      // [B, H], o ⊙ tanh(c) of one step, where there is a projection
  Stored *masked;         // [2][B, P], h ⊙ recurrent_mask of two steps, where that is given
  Real *staged;           // x·W_ihᵀ of several steps, where x does not enter with h
  Real *products;         // [B, 4H], h'·W_hhᵀ of one step, where layer_norm.h makes gates of them
  ForwardRow<Stored> *rows;  // [unit groups][B], of one step, by each member for itself
  Barrier *barriers;      // one per group of rows, and one for all
};

// Rows for which x is multiplied at once where single steps have fewer.
constexpr int64_t kStagedRows = 96;
// Rows of a member from which on x enters with h, step by step, if its weights stay in the cache.
constexpr int64_t kFusedRows = 4;
// Rows of a block that are computed at once from weights as they are.
constexpr int64_t kDirectRows = 16;
// A single step is never staged, and a stage holds at least one step.
static_assert(kFusedRows <= kRowsOfAGroup && kFusedRows <= kPackedRows && kFusedRows <= kStagedRows,
              "see above");

template <class Stored>
class ForwardMember : protected Member {
 protected:
  typedef Factors<Stored> F;
  typedef typename F::Real Real;
  typedef Simd<Real> S;
  typedef typename S::Vector Vector;
  typedef ForwardPlan<Stored> Plan;

 public:
  ForwardMember(const Plan &plan, const Split &split, int64_t member)
      : Member(split, member, plan.barriers),
        plan_(plan),
        timeline_(plan.timelines[row_group_]),
        blocks_(share(divide_up(plan.hidden, S::kWidth))) {
    const int64_t blocks = divide_up(plan.hidden, S::kWidth);
    const int64_t rows = timeline_.count;
    const int64_t read = (blocks_.end - blocks_.begin) * depth() * kTile * int64_t(sizeof(Real));
    const bool fused = rows >= kFusedRows && (read <= kCachedWeights || rows >= kStagedRows ||
                                              plan.packs_late);
    source_ = plan.gates.data ? kGiven : fused || !plan.panels ? kFused : kStaged;
    if (plan.products) source_ = kNone;
    stage_ = plan.staged + (row_group_ * blocks + blocks_.begin) * kStagedRows * kTile;
    rows_ = own_rows(plan.rows, plan.arguments->batch);
  }

  void run() {
    prepare();
    meet_all();
    for (int64_t begin = 0, end; begin < timeline_.steps; begin = end) {
      end = source_ == kStaged ? stage(begin) : timeline_.steps;
      for (int64_t k = begin; k < end; ++k) step(k, timeline_.active(begin, k));
    }
    finish();
  }

 protected:
  enum Source { kNone, kGiven, kStaged, kFused };
  static constexpr int64_t kTile = 4 * S::kWidth;
  // Whether c is wider than what is stored; there is no projection then.
  static constexpr bool kWide = !std::is_same<Stored, Real>::value;

  const Plan &plan_;
  const Timeline timeline_;
  const Share blocks_;
  Source source_;
  Real *stage_;
  ForwardRow<Stored> *rows_;

  // The rows of a panel, of words.
  static int64_t words(int64_t numbers) { return divide_up(numbers, F::kEach); }
  int64_t depth() const { return words(plan_.inputs) + words(plan_.features); }
  Real *panel(int64_t block) const {
    return plan_.panels + (plan_.packs_late ? member_ : block) * depth() * kTile;
  }
  Real *bias(int64_t block) const {
    return plan_.bias + (plan_.packs_late ? member_ : block) * kTile;
  }

  void prepare() {
    if (plan_.panels && !plan_.packs_late) {
      const Share mine = share_of_all(divide_up(plan_.hidden, S::kWidth));
      for (int64_t block = mine.begin; block < mine.end; ++block) pack(block);
    }
    pack_projection();
    if constexpr (kWide) widen_initial();
    if (plan_.masked) mask_initial();
    if (plan_.arguments->modifiers.lengths) clear_idle();
  }

  // Lay out the weights of a block, its four gates side by side.
  void pack(int64_t block) {
    const LstmForward &arguments = *plan_.arguments;
    const Stored *sources[2] = {static_cast<const Stored *>(arguments.weight_ih),
                                static_cast<const Stored *>(arguments.weight_hh)};
    const int64_t depths[2] = {plan_.inputs, plan_.features};
    const Stored *biases[2] = {static_cast<const Stored *>(arguments.bias_ih),
                               static_cast<const Stored *>(arguments.bias_hh)};
    const int64_t unit = block * S::kWidth, count = plan_.hidden - unit;
    Real *out = panel(block);
    for (int s = 0; s < 2; out += words(depths[s]) * kTile, ++s) {
      for (int gate = 0; gate < 4; ++gate) {
        const Stored *weight = sources[s] + (gate * plan_.hidden + unit) * depths[s];
        pack_transposed<Stored>(depths[s], out + gate * S::kWidth, kTile, [&](int64_t l) {
          return l < count ? weight + l * depths[s] : nullptr;
        });
      }
    }
    for (int gate = 0; gate < 4; ++gate) {
      Vector sum{};
      for (const Stored *b : biases) {
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

  // x·W_ihᵀ for some steps of this member's rows and blocks, as [block][row][4][lanes].
  // Returns the step behind them.
  int64_t stage(int64_t begin) {
    int64_t end = begin + 1;
    while (end < timeline_.steps && timeline_.active(begin, end + 1) <= kStagedRows) ++end;
    for (int64_t block = blocks_.begin; block < blocks_.end; ++block) {
      Real *out = stage_ + (block - blocks_.begin) * kStagedRows * kTile;
      int64_t k = begin, place = 0;
      for_each_tile({0, timeline_.active(begin, end)}, [&](int64_t first, int64_t count) {
        const Stored *rows[TILE_ROWS];
        Real *outs[TILE_ROWS];
        for (int64_t q = 0; q < count; ++q, ++place) {
          for (; place == timeline_.active(k); ++k) place = 0;
          rows[q] = plan_.x.at(timeline_.time(k), timeline_.row(place));
          outs[q] = out + (first + q) * kTile;
        }
        product_columns<Stored, 4, 1>(count, rows, panel(block), kTile, plan_.inputs, outs, kTile,
                                      false);
      });
    }
    return end;
  }

  // The initial cell states, of this member's rows and blocks.
  void widen_initial() {
    const LstmState &c0 = plan_.arguments->c0;
    const Share units = own_units();
    for (int64_t place = 0; place < timeline_.count; ++place) {
      const int64_t row = timeline_.row(place);
      Real *out = plan_.c.at(0, row);
      if (c0.data) {
        copy(out, static_cast<const Stored *>(c0.data) + row * c0.stride_b, units);
      } else {
        copy(out, plan_.modifiers.zeros, units);
      }
    }
  }

  // What enters W_hh with a recurrent mask: of step k, while step k+1 makes its own. Until a row
  // begins, both hold its initial state.
  Stored *masked(int64_t k, int64_t row) const {
    return plan_.masked + ((k & 1) * plan_.arguments->batch + row) * plan_.features;
  }
  void mask_initial() {
    const Share mine = share(timeline_.count);
    for (int64_t place = mine.begin; place < mine.end; ++place) {
      const int64_t row = timeline_.row(place);
      const Stored *h = plan_.h0.at(row);
      const Real *mask = plan_.modifiers.recurrent_mask.at(row);
      for (int64_t unit = 0; unit < plan_.features; unit += S::kWidth) {
        const int64_t count = plan_.features - unit;
        const Vector product = S::load(h + unit, count) * S::load(mask + unit, count);
        for (int k = 0; k < 2; ++k) S::store(masked(k, row) + unit, product, count);
      }
    }
  }

  void clear_idle() const {
    const bool kept = plan_.arguments->c.data;
    timeline_.for_each_idle(unit_group_, split_.unit_groups, [&](int64_t t, int64_t row) {
      plan_.h.clear(t, row, plan_.features);
      if (kept) plan_.c.clear(t, row, plan_.hidden);
      plan_.activations.clear(t, row, 4 * plan_.hidden);
    });
  }

  void step(int64_t k, int64_t staged_row) {
    if (!timeline_.active(k)) return;
    look_up_rows(k);
    compute_blocks(k, staged_row);
    if constexpr (!kWide) {
      if (plan_.cell_output) {
        meet();
        project(k);
      }
    }
    meet();
  }

  // Where the rows of a step lie is the same for all blocks.
  void look_up_rows(int64_t k) {
    const int64_t t = timeline_.time(k), active = timeline_.active(k);
    const Sequence<Stored> &input = plan_.gates.data ? plan_.gates : plan_.x;
    for (int64_t place = 0; place < active; ++place) {
      const int64_t row = timeline_.row(place);
      const Stored *h = plan_.modifiers.before(plan_.h, plan_.h0, timeline_, k, place);
      const bool masks = plan_.masked && !plan_.modifiers.reset(t, row);
      rows_[place] = {input.at(t, row),
                      masks ? masked(k - 1, row) : h,
                      h,
                      plan_.modifiers.before(plan_.c, plan_.c0, timeline_, k, place),
                      plan_.h.at(t, row),
                      plan_.c.at(t, row),
                      plan_.cell_output ? plan_.cell_output + row * plan_.hidden : nullptr,
                      plan_.activations.data ? plan_.activations.at(t, row) : nullptr};
    }
  }

  // The gates of this member's blocks, and what becomes of them.
  void compute_blocks(int64_t k, int64_t staged_row) {
    const int64_t active = timeline_.active(k);
    for (int64_t block = blocks_.begin; block < blocks_.end; ++block) {
      if (!plan_.panels) {
        for (int64_t place = 0; place < active; place += kDirectRows) {
          direct_tile(k, place, min(kDirectRows, active - place), block);
        }
        continue;
      }
      if (plan_.packs_late) pack(block);
      for_each_tile({0, active}, [&](int64_t place, int64_t count) {
        cell_tile(k, place, count, block, staged_row + place);
      });
    }
  }

  // A few rows of a block, from the products to c and h.
  NOINLINE void cell_tile(int64_t k, int64_t place, int64_t count, int64_t block,
                          int64_t staged_row) {
    const int64_t unit = block * S::kWidth, left = plan_.hidden - unit;
    const Real *weights = panel(block);
    // [rows][4][lanes]. h·W_hhᵀ is summed by itself: added to what x has made, every one of its
    // products would be rounded at the size of that.
    alignas(64) Real from_h[TILE_ROWS * kTile], from_x[TILE_ROWS * kTile];
    const ForwardRow<Stored> *rows = rows_ + place;
    const Stored *in[TILE_ROWS];
    Real *out[TILE_ROWS];
    const Real *staged = from_x;
    for (int64_t q = 0; q < count; ++q) {
      in[q] = rows[q].recurrent;
      out[q] = from_h + q * kTile;
    }
    product_columns<Stored, 4, 1>(count, in, weights + words(plan_.inputs) * kTile, kTile,
                                  plan_.features, out, kTile, false);
    if (source_ == kFused) {
      for (int64_t q = 0; q < count; ++q) {
        in[q] = rows[q].input;
        out[q] = from_x + q * kTile;
      }
      product_columns<Stored, 4, 1>(count, in, weights, kTile, plan_.inputs, out, kTile, false);
    } else {
      staged = stage_ + ((block - blocks_.begin) * kStagedRows + staged_row) * kTile;
    }
    Cell cells[TILE_ROWS];
    for (int64_t q = 0; q < count; ++q) {
      Vector a[4];
      _Pragma("GCC unroll 4") for (int gate = 0; gate < 4; ++gate) {
        a[gate] = S::load(from_h + q * kTile + gate * S::kWidth);
        if (source_ == kGiven) {
          a[gate] += S::load(rows[q].input + gate * plan_.hidden + unit, left);
        } else if (source_ != kNone) {
          a[gate] += S::load(staged + q * kTile + gate * S::kWidth) +
                     S::load(bias(block) + gate * S::kWidth);
        }
      }
      if (source_ == kNone) {
        keep(a, place + q, unit);
      } else {
        cells[q] = activate(a, rows[q], unit, left);
      }
    }
    if (source_ != kNone) finish_cells(cells, k, place, count, unit, left);
  }

  // A few rows of a block from weights as they are, as dot products: where there are too few rows in
  // all to repay packing. The weights of one gate at a time stay in the nearest cache.
  NOINLINE void direct_tile(int64_t k, int64_t place, int64_t count, int64_t block) {
    const int64_t hidden = plan_.hidden;
    const int64_t unit = block * S::kWidth, left = min(S::kWidth, hidden - unit);
    const Stored *biases[2] = {static_cast<const Stored *>(plan_.arguments->bias_ih),
                               static_cast<const Stored *>(plan_.arguments->bias_hh)};
    const ForwardRow<Stored> *rows = rows_ + place;
    alignas(64) Real sums[kDirectRows * kTile];  // [rows][4][lanes]
    for (int gate = 0; gate < 4; ++gate) {
      Real *out = sums + gate * S::kWidth;
      int64_t done = dot_products<4>(rows, 0, count, gate, unit, left, out);
      done = dot_products<2>(rows, done, count, gate, unit, left, out);
      dot_products<1>(rows, done, count, gate, unit, left, out);
    }
    Cell cells[kDirectRows];
    for (int64_t q = 0; q < count; ++q) {
      Vector a[4];
      for (int gate = 0; gate < 4; ++gate) {
        const int64_t first = gate * hidden + unit;
        a[gate] = S::load(sums + q * kTile + gate * S::kWidth);
        for (const Stored *b : biases) {
          if (b) a[gate] += S::load(b + first, left);
        }
        if (source_ == kGiven) a[gate] += S::load(rows[q].input + first, left);
      }
      if (source_ == kNone) {
        keep(a, place + q, unit);
      } else {
        cells[q] = activate(a, rows[q], unit, left);
      }
    }
    if (source_ != kNone) finish_cells(cells, k, place, count, unit, left);
  }

  // x·W_ihᵀ + h·W_hhᵀ for one gate of a block, as [rows][..kTile][lanes]: of rows done ... count-1
  // as many as make groups of ROWS. A group sums up one vector for each of its rows and of so many
  // units that the sums of all fill a vector. Returns the row behind the last group.
  template <int ROWS>
  INLINE_MEMBER int64_t dot_products(const ForwardRow<Stored> *rows, int64_t done, int64_t count,
                                     int gate, int64_t unit, int64_t left, Real *out) const {
    constexpr int64_t kUnits = S::kWidth / ROWS;
    if constexpr (kUnits == 0) return done;
    const int64_t last = done + (count - done) / ROWS * ROWS;
    const int64_t begin = gate * plan_.hidden + unit, end = begin + left;
    for (int64_t u = 0; u < S::kWidth; u += kUnits) {
      for (int64_t row = done; row < last; row += ROWS) {
        const Stored *x[ROWS], *h[ROWS];
        for (int q = 0; q < ROWS; ++q) {
          x[q] = rows[row + q].input;
          h[q] = rows[row + q].recurrent;
        }
        Vector products[S::kWidth] = {};
        if (!plan_.gates.data) {
          multiply_rows<ROWS>(products, x, plan_.arguments->weight_ih, begin + u, end,
                              plan_.inputs);
        }
        multiply_rows<ROWS>(products, h, plan_.arguments->weight_hh, begin + u, end,
                            plan_.features);
        const Vector sums = S::sums(products);
        for (int q = 0; q < ROWS; ++q) {
          __builtin_memcpy(out + (row + q) * kTile + u,
                           reinterpret_cast<const Real *>(&sums) + q * kUnits,
                           kUnits * sizeof(Real));
        }
      }
    }
    return last;
  }

  // products[q * units + u] += vectors[q] * row (first + u) of a matrix [.., depth]; its last row is
  // repeated.
  template <int ROWS>
  INLINE void multiply_rows(Vector (&products)[S::kWidth], const Stored *const (&vectors)[ROWS],
                            const void *matrix, int64_t first, int64_t end, int64_t depth) {
    constexpr int64_t kUnits = S::kWidth / ROWS;
    for (int64_t k = 0; k < depth; k += S::kWidth * F::kEach) {
      const int64_t left = depth - k;
      Vector v[ROWS];
      _Pragma("GCC unroll 4") for (int q = 0; q < ROWS; ++q) v[q] = F::words(vectors[q] + k, left);
      _Pragma("GCC unroll 16") for (int64_t u = 0; u < kUnits; ++u) {
        const Stored *row = static_cast<const Stored *>(matrix) + min(first + u, end - 1) * depth;
        const Vector w = F::words(row + k, left);
        _Pragma("GCC unroll 4") for (int q = 0; q < ROWS; ++q) {
          products[q * kUnits + u] = F::add_products(products[q * kUnits + u], v[q], w);
        }
      }
    }
  }

  // One vector of ĉ_t and o, from one of each gate.
  struct Cell {
    Vector c, o;
  };
  INLINE_MEMBER Cell activate(const Vector (&a)[4], const ForwardRow<Stored> &row, int64_t unit,
                              int64_t count) const {
    const auto gates = S::gates(a);
    const Vector i = gates[0], f = gates[1], g = gates[2], o = gates[3];
    if (row.activations) {
      Stored *out = row.activations + unit;
      _Pragma("GCC unroll 4") for (int gate = 0; gate < 4; ++gate) {
        S::store(out + gate * plan_.hidden, gates[gate], count);
      }
    }
    const Vector c = f * S::load(row.c + unit, count) + i * g;
    const Modifiers<Real> &modifiers = plan_.modifiers;
    return {modifiers.clips ? S::clamp(c, modifiers.cell_clip) : c, o};
  }

  // From ĉ_t and o of some rows to their c_t and h_t, some at a time.
  INLINE_MEMBER void finish_cells(const Cell *cells, int64_t k, int64_t place, int64_t count,
                                  int64_t unit, int64_t left) const {
    int64_t q = 0;
    for (; q + 3 <= count; q += 3) finish_some<3>(cells + q, k, place + q, unit, left);
    for (; q + 2 <= count; q += 2) finish_some<2>(cells + q, k, place + q, unit, left);
    if (q < count) finish_some<1>(cells + q, k, place + q, unit, left);
  }
  template <int ROWS>
  INLINE_MEMBER void finish_some(const Cell *cells, int64_t k, int64_t place, int64_t unit,
                                 int64_t left) const {
    typedef typename S::template Several<ROWS> Rows;
    const Rows squashed = S::template tanh<ROWS>(Rows::of([&](int q) { return cells[q].c; }));
    _Pragma("GCC unroll 3") for (int q = 0; q < ROWS; ++q) {
      store_states(cells[q].c, cells[q].o * squashed[q], k, place + q, unit, left);
    }
  }

  // One vector of c_t, from one of ĉ_t; and what m, the new output of the cell, becomes.
  INLINE_MEMBER void store_states(Vector c, Vector m, int64_t k, int64_t place, int64_t unit,
                                  int64_t count) const {
    const ForwardRow<Stored> &row = rows_[place];
    const Sequence<const Real> &zoneout = plan_.modifiers.zoneout_c;
    if (zoneout.data) {
      c = mixed(S::load(zoneout.at(timeline_.time(k), timeline_.row(place)) + unit, count),
                S::load(row.c + unit, count), c);
    }
    S::store(row.new_c + unit, c, count);
    if (row.cell_output) {
      S::store(row.cell_output + unit, m, count);
    } else {
      store_hidden(m, k, place, unit, count);
    }
  }

  // The products of a row, which are not gates yet.
  INLINE_MEMBER void keep(const Vector (&a)[4], int64_t place, int64_t unit) const {
    const int64_t hidden = plan_.hidden, count = hidden - unit;
    Real *out = plan_.products + timeline_.row(place) * 4 * hidden + unit;
    _Pragma("GCC unroll 4") for (int gate = 0; gate < 4; ++gate) {
      S::store(out + gate * hidden, a[gate], count);
    }
  }

  // One vector of h_t, from one of ĥ_t.
  INLINE_MEMBER void store_hidden(Vector h, int64_t k, int64_t place, int64_t unit,
                                  int64_t count) const {
    const Modifiers<Real> &modifiers = plan_.modifiers;
    const ForwardRow<Stored> &row = rows_[place];
    if (modifiers.zoneout_h.data) {
      const Real *zoneout = modifiers.zoneout_h.at(timeline_.time(k), timeline_.row(place));
      h = mixed(S::load(zoneout + unit, count), S::load(row.h + unit, count), h);
    }
    if (plan_.masked) {
      const Real *mask = modifiers.recurrent_mask.at(timeline_.row(place));
      S::store(masked(k, timeline_.row(place)) + unit, h * S::load(mask + unit, count), count);
    }
    S::store(row.new_h + unit, h, count);
  }
  INLINE Vector mixed(Vector zoneout, Vector earlier, Vector state) {
    return zoneout * earlier + (Real(1) - zoneout) * state;
  }

  // ĥ_t = (o ⊙ tanh(ĉ_t))·W_hrᵀ, and from it h_t.
  void project(int64_t k) {
    const Panels &panels = plan_.projection;
    const Share mine = share(panels.count());
    for (int64_t p = mine.begin; p < mine.end; ++p) {
      const int64_t first = panels.first_column(p), filled = panels.filled(p);
      for_each_tile({0, timeline_.active(k)}, [&](int64_t place, int64_t count) {
        const Real *in[TILE_ROWS];
        Real *out[TILE_ROWS];
        for (int64_t q = 0; q < count; ++q) {
          in[q] = rows_[place + q].cell_output;
          out[q] = rows_[place + q].new_h + first;
        }
        product<Real>(count, in, panels, p, plan_.projection_panels, out, false);
        if (!plan_.masked && !plan_.modifiers.zoneout_h.data) return;
        for (int64_t q = 0; q < count; ++q) {
          for (int64_t unit = 0; unit < filled; unit += S::kWidth) {
            store_hidden(S::load(out[q] + unit, filled - unit), k, place + q, first + unit,
                         filled - unit);
          }
        }
      });
    }
  }

  // The hidden units of this member's blocks.
  Share own_units() const {
    return {blocks_.begin * S::kWidth, min(blocks_.end * S::kWidth, plan_.hidden)};
  }

  // Copy the states after each sequence's last step, or its initial ones if it has none.
  void finish() {
    const Share units = own_units();
    const Share columns = plan_.cell_output ? share(plan_.features) : units;
    int64_t last = timeline_.steps - 1;
    for (int64_t place = 0; place < timeline_.count; ++place) {
      while (last >= 0 && timeline_.active(last) <= place) --last;
      const int64_t t = timeline_.time(last), row = timeline_.row(place);
      copy(static_cast<Stored *>(plan_.h_n.data) + row * plan_.h_n.stride_b,
           last < 0 ? plan_.h0.at(row) : plan_.h.at(t, row), columns);
      copy(static_cast<Stored *>(plan_.c_n.data) + row * plan_.c_n.stride_b,
           last < 0 ? plan_.c0.at(row) : plan_.c.at(t, row), units);
    }
  }

  template <class To, class From>
  static void copy(To *out, const From *in, Share columns) {
    if constexpr (std::is_same<To, From>::value) {
      if (out != in && columns.end > columns.begin) {
        __builtin_memcpy(out + columns.begin, in + columns.begin,
                         (columns.end - columns.begin) * sizeof(To));
      }
    } else {
      for (int64_t unit = columns.begin; unit < columns.end; unit += S::kWidth) {
        const int64_t count = columns.end - unit;
        S::store(out + unit, S::load(in + unit, count), count);
      }
    }
  }
};
