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
// sequences in registers, from x and then h, and turns them into c and h without leaving them.
// Members of a team own rows (sequences) and blocks; they meet after every step, unless each owns
// all blocks of its rows.

// What all threads of one recurrence share.
template <class Real>
struct ForwardPlan {
  const LstmForward *arguments;
  const Timeline *timelines;  // one for each group of rows
  Modifiers<Real> modifiers;
  Sequence<Real> gates, x, h;
  Sequence<Real> c;           // c_n at every step where it is not kept
  Sequence<Real> activations;
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
  Real *masked;           // [2][B, P], h ⊙ recurrent_mask of two steps, where that is given
  Real *staged;           // x·W_ihᵀ + b of several steps, where x does not enter with h
  Real *products;         // [B, 4H], h'·W_hhᵀ of one step, where layer_norm.h makes gates of them
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
class ForwardMember : protected Member {
 protected:
  typedef Simd<Real> S;
  typedef typename S::Vector Vector;
  typedef ForwardPlan<Real> Plan;

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

  const Plan &plan_;
  const Timeline timeline_;
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

  void prepare() {
    if (plan_.panels && !plan_.packs_late) {
      const Share mine = share_of_all(divide_up(plan_.hidden, S::kWidth));
      for (int64_t block = mine.begin; block < mine.end; ++block) pack(block);
    }
    pack_projection();
    if (plan_.masked) mask_initial();
    if (plan_.arguments->modifiers.lengths) clear_idle();
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

  // gates = x·W_ihᵀ + b for some steps of this member's rows and blocks, as [block][row][4][lanes].
  // Returns the step behind them.
  int64_t stage(int64_t begin) {
    int64_t end = begin + 1;
    while (end < timeline_.steps && timeline_.active(begin, end + 1) <= kStagedRows) ++end;
    const Panels panels{plan_.inputs, kTile, S::kWidth, 4};
    for (int64_t block = blocks_.begin; block < blocks_.end; ++block) {
      Real *out = stage_ + (block - blocks_.begin) * kStagedRows * kTile;
      int64_t k = begin, place = 0;
      for_each_tile({0, timeline_.active(begin, end)}, [&](int64_t first, int64_t count) {
        const Real *rows[TILE_ROWS];
        Real *outs[TILE_ROWS];
        for (int64_t q = 0; q < count; ++q, ++place) {
          for (; place == timeline_.active(k); ++k) place = 0;
          rows[q] = plan_.x.at(timeline_.time(k), timeline_.row(place));
          outs[q] = out + (first + q) * kTile;
          for (int gate = 0; gate < 4; ++gate) {
            S::store(outs[q] + gate * S::kWidth, S::load(bias(block) + gate * S::kWidth));
          }
        }
        product<Real>(count, rows, panels, 0, panel(block), outs, true);
      });
    }
    return end;
  }

  // What enters W_hh with a recurrent mask: of step k, while step k+1 makes its own. Until a row
  // begins, both hold its initial state.
  Real *masked(int64_t k, int64_t row) const {
    return plan_.masked + ((k & 1) * plan_.arguments->batch + row) * plan_.features;
  }
  void mask_initial() {
    const Share mine = share(timeline_.count);
    for (int64_t place = mine.begin; place < mine.end; ++place) {
      const int64_t row = timeline_.row(place);
      const Real *h = plan_.h0.at(row), *mask = plan_.modifiers.recurrent_mask.at(row);
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
    compute_blocks(k, staged_row);
    if (plan_.cell_output) {
      meet();
      project(k);
    }
    meet();
  }

  // The gates of this member's blocks, and what becomes of them.
  void compute_blocks(int64_t k, int64_t staged_row) {
    const int64_t active = timeline_.active(k);
    for (int64_t block = blocks_.begin; block < blocks_.end; ++block) {
      if (!plan_.panels) {
        for (int64_t place = 0; place < active; ++place) direct_tile(k, place, block);
        continue;
      }
      if (plan_.packs_late) pack(block);
      for_each_tile({0, active}, [&](int64_t place, int64_t count) {
        with_rows(count, [&](auto height) {
          this->template cell_tile<height()>(k, place, block, staged_row + place);
        });
      });
    }
  }

  // The rows of h and c that enter step k.
  const Real *hidden_before(int64_t k, int64_t place) const {
    return plan_.modifiers.before(plan_.h, plan_.h0, timeline_, k, place);
  }
  const Real *cell_before(int64_t k, int64_t place) const {
    return plan_.modifiers.before(plan_.c, plan_.c0, timeline_, k, place);
  }
  // The row that enters W_hh at step k.
  const Real *recurrent_row(int64_t k, int64_t place) const {
    const int64_t row = timeline_.row(place);
    if (!plan_.masked || plan_.modifiers.reset(timeline_.time(k), row)) {
      return hidden_before(k, place);
    }
    return masked(k - 1, row);
  }

  template <int ROWS>
  NOINLINE void cell_tile(int64_t k, int64_t place, int64_t block, int64_t staged_row) {
    const int64_t t = timeline_.time(k);
    const int64_t hidden = plan_.hidden, unit = block * S::kWidth, count = hidden - unit;
    const Real *weights = panel(block);
    // h·W_hhᵀ is summed by itself: added to what x has made, every one of its products would be
    // rounded at the size of that.
    Vector a[ROWS][4], from_x[ROWS][4];
    const Real *rows[ROWS];
    if (source_ == kFused) {
      _Pragma("GCC unroll 4") for (int gate = 0; gate < 4; ++gate) {
        const Vector b = S::load(bias(block) + gate * S::kWidth);
        _Pragma("GCC unroll 8") for (int q = 0; q < ROWS; ++q) a[q][gate] = b;
      }
      _Pragma("GCC unroll 8") for (int q = 0; q < ROWS; ++q) {
        rows[q] = plan_.x.at(t, timeline_.row(place + q));
      }
      accumulate<Real, ROWS, 4>(a, rows, weights, plan_.inputs);
      _Pragma("GCC unroll 8") for (int q = 0; q < ROWS; ++q) {
        _Pragma("GCC unroll 4") for (int gate = 0; gate < 4; ++gate) from_x[q][gate] = a[q][gate];
      }
    }
    _Pragma("GCC unroll 8") for (int q = 0; q < ROWS; ++q) {
      rows[q] = recurrent_row(k, place + q);
      _Pragma("GCC unroll 4") for (int gate = 0; gate < 4; ++gate) a[q][gate] = Vector{};
    }
    accumulate<Real, ROWS, 4>(a, rows, weights + plan_.inputs * kTile, plan_.features);
    if (source_ == kFused) {
      _Pragma("GCC unroll 8") for (int q = 0; q < ROWS; ++q) {
        _Pragma("GCC unroll 4") for (int gate = 0; gate < 4; ++gate) a[q][gate] += from_x[q][gate];
      }
    } else if (source_ == kStaged) {
      const Real *in = stage_ + ((block - blocks_.begin) * kStagedRows + staged_row) * kTile;
      _Pragma("GCC unroll 8") for (int q = 0; q < ROWS; ++q) {
        _Pragma("GCC unroll 4") for (int gate = 0; gate < 4; ++gate) {
          a[q][gate] += S::load(in + (q * 4 + gate) * S::kWidth);
        }
      }
    } else if (source_ == kGiven) {
      _Pragma("GCC unroll 8") for (int q = 0; q < ROWS; ++q) {
        const Real *in = plan_.gates.at(t, timeline_.row(place + q)) + unit;
        _Pragma("GCC unroll 4") for (int gate = 0; gate < 4; ++gate) {
          a[q][gate] += S::load(in + gate * hidden, count);
        }
      }
    }
    update<ROWS>(a, k, place, block);
  }

  // One row of the same from weights as they are, as dot products: where there are too few rows in
  // all to repay packing.
  NOINLINE void direct_tile(int64_t k, int64_t place, int64_t block) {
    const int64_t t = timeline_.time(k), row = timeline_.row(place), hidden = plan_.hidden;
    const int64_t unit = block * S::kWidth, count = min(S::kWidth, hidden - unit);
    const LstmForward &arguments = *plan_.arguments;
    const Real *biases[2] = {static_cast<const Real *>(arguments.bias_ih),
                             static_cast<const Real *>(arguments.bias_hh)};
    const Real *h = recurrent_row(k, place);
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
      if (source_ == kGiven) a[0][gate] += S::load(plan_.gates.at(t, row) + first, count);
    }
    update<1>(a, k, place, block);
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

  // From gates to c and h (o ⊙ tanh(ĉ) where there is a projection).
  template <int ROWS>
  INLINE_MEMBER void update(const Vector (&a)[ROWS][4], int64_t k, int64_t place, int64_t block) {
    if (plan_.products) return keep<ROWS>(a, place, block);
    const int64_t unit = block * S::kWidth, count = plan_.hidden - unit;
    _Pragma("GCC unroll 1") for (int q = 0; q < ROWS; ++q) {
      const Cell cell = activate(a[q], k, place + q, unit, count);
      store_states(cell.c, cell.o * S::tanh(cell.c), k, place + q, unit, count);
    }
  }

  // One vector of ĉ_t and o, from one of each gate.
  struct Cell {
    Vector c, o;
  };
  INLINE_MEMBER Cell activate(const Vector (&a)[4], int64_t k, int64_t place, int64_t unit,
                              int64_t count) const {
    const Modifiers<Real> &modifiers = plan_.modifiers;
    const Vector i = S::sigmoid(a[0]), f = S::sigmoid(a[1]);
    const Vector g = S::tanh(a[2]), o = S::sigmoid(a[3]);
    if (plan_.activations.data) {
      const int64_t hidden = plan_.hidden;
      Real *out = plan_.activations.at(timeline_.time(k), timeline_.row(place)) + unit;
      S::store(out, i, count);
      S::store(out + hidden, f, count);
      S::store(out + 2 * hidden, g, count);
      S::store(out + 3 * hidden, o, count);
    }
    const Vector c = f * S::load(cell_before(k, place) + unit, count) + i * g;
    return {modifiers.clips ? S::clamp(c, modifiers.cell_clip) : c, o};
  }

  // One vector of c_t, from one of ĉ_t; and what m, the new output of the cell, becomes.
  INLINE_MEMBER void store_states(Vector c, Vector m, int64_t k, int64_t place, int64_t unit,
                                  int64_t count) const {
    const Sequence<const Real> &zoneout = plan_.modifiers.zoneout_c;
    const int64_t t = timeline_.time(k), row = timeline_.row(place);
    if (zoneout.data) {
      c = mixed(S::load(zoneout.at(t, row) + unit, count),
                S::load(cell_before(k, place) + unit, count), c);
    }
    S::store(plan_.c.at(t, row) + unit, c, count);
    if (plan_.cell_output) {
      S::store(plan_.cell_output + row * plan_.hidden + unit, m, count);
    } else {
      store_hidden(m, k, place, unit, count);
    }
  }

  // The products of a tile, which are not gates yet.
  template <int ROWS>
  INLINE_MEMBER void keep(const Vector (&a)[ROWS][4], int64_t place, int64_t block) {
    const int64_t hidden = plan_.hidden, unit = block * S::kWidth, count = hidden - unit;
    _Pragma("GCC unroll 8") for (int q = 0; q < ROWS; ++q) {
      Real *out = plan_.products + timeline_.row(place + q) * 4 * hidden + unit;
      _Pragma("GCC unroll 4") for (int gate = 0; gate < 4; ++gate) {
        S::store(out + gate * hidden, a[q][gate], count);
      }
    }
  }

  // One vector of h_t, from one of ĥ_t.
  INLINE_MEMBER void store_hidden(Vector h, int64_t k, int64_t place, int64_t unit,
                                  int64_t count) const {
    const Modifiers<Real> &modifiers = plan_.modifiers;
    const int64_t t = timeline_.time(k), row = timeline_.row(place);
    if (modifiers.zoneout_h.data) {
      h = mixed(S::load(modifiers.zoneout_h.at(t, row) + unit, count),
                S::load(hidden_before(k, place) + unit, count), h);
    }
    if (plan_.masked) {
      S::store(masked(k, row) + unit,
               h * S::load(modifiers.recurrent_mask.at(row) + unit, count), count);
    }
    S::store(plan_.h.at(t, row) + unit, h, count);
  }
  INLINE Vector mixed(Vector zoneout, Vector earlier, Vector state) {
    return zoneout * earlier + (Real(1) - zoneout) * state;
  }

  // ĥ_t = (o ⊙ tanh(ĉ_t))·W_hrᵀ, and from it h_t.
  void project(int64_t k) {
    const int64_t t = timeline_.time(k);
    const Panels &panels = plan_.projection;
    const Share mine = share(panels.count());
    for (int64_t p = mine.begin; p < mine.end; ++p) {
      const int64_t first = panels.first_column(p), filled = panels.filled(p);
      for_each_tile({0, timeline_.active(k)}, [&](int64_t place, int64_t count) {
        const Real *in[TILE_ROWS];
        Real *out[TILE_ROWS];
        for (int64_t q = 0; q < count; ++q) {
          const int64_t row = timeline_.row(place + q);
          in[q] = plan_.cell_output + row * plan_.hidden;
          out[q] = plan_.h.at(t, row) + first;
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

  // Copy the states after each sequence's last step, or its initial ones if it has none.
  void finish() {
    const Share units = {blocks_.begin * S::kWidth, min(blocks_.end * S::kWidth, plan_.hidden)};
    const Share columns = plan_.cell_output ? share(plan_.features) : units;
    int64_t last = timeline_.steps - 1;
    for (int64_t place = 0; place < timeline_.count; ++place) {
      while (last >= 0 && timeline_.active(last) <= place) --last;
      const int64_t t = timeline_.time(last), row = timeline_.row(place);
      copy(static_cast<Real *>(plan_.h_n.data) + row * plan_.h_n.stride_b,
           last < 0 ? plan_.h0.at(row) : plan_.h.at(t, row), columns);
      copy(static_cast<Real *>(plan_.c_n.data) + row * plan_.c_n.stride_b,
           last < 0 ? plan_.c0.at(row) : plan_.c.at(t, row), units);
    }
  }

  static void copy(Real *out, const Real *in, Share columns) {
    if (out != in && columns.end > columns.begin) {
      __builtin_memcpy(out + columns.begin, in + columns.begin,
                       (columns.end - columns.begin) * sizeof(Real));
    }
  }
};
