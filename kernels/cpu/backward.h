// The backward pass. Included once per instruction set, after multiply.h.
//
// From the last step to the first, with m_t = o ⊙ tanh(c_t) and δ for the derivative of the loss:
//
//   δh_t = grad_h_t + δa_{t+1}·W_hh, or grad_h_t + grad_h_n at a sequence's last step
//   δm_t = δh_t, or δh_t·W_hr
//   δc_t = grad_c_t + δc_{t+1} ⊙ f_{t+1} + δm_t ⊙ o ⊙ (1 - tanh²(c_t))
//   δa_i = δc_t ⊙ g ⊙ i(1 - i)      δa_f = δc_t ⊙ c_{t-1} ⊙ f(1 - f)
//   δa_g = δc_t ⊙ i ⊙ (1 - g²)      δa_o = δm_t ⊙ tanh(c_t) ⊙ o(1 - o)
//
// With modifiers, in the names of forward.h: ĉ_t stands for c_t, h' ⊙ recurrent_mask and c' for
// h_{t-1} and c_{t-1}, and
//
//   δh_t = grad_h_t + recurrent_mask ⊙ (δa_{t+1}·W_hh) + z_h_{t+1} ⊙ δh_{t+1}
//   δĥ_t = (1 - z_h_t) ⊙ δh_t       δm_t = δĥ_t, or δĥ_t·W_hr
//   δc_t = grad_c_t + δĉ_{t+1} ⊙ f_{t+1} + z_c_{t+1} ⊙ δc_{t+1}
//   δĉ_t = (1 - z_c_t) ⊙ δc_t + δm_t ⊙ o ⊙ (1 - tanh²(ĉ_t)), or 0 unless |ĉ_t| < cell_clip
//
// where nothing comes from t+1 if that step is a reset. Where c was zoned out, ĉ is computed again.
//
// And from them, for every chunk of steps while its δa are in the cache,
//
//   δx = δa·W_ih,  δW_ih += δaᵀ·x,  δW_hh += δaᵀ·h_{t-1},  δb += Σ δa,  δW_hr += δĥᵀ·m
//
// Groups of rows never wait for each other: each sums the gradients of the weights over its own
// rows, and all add them up at the end. Within a group, members own panels of hidden units in the
// recurrence, and rows of δW and of δx in the products. Every sum has a fixed order.

// Rows of δa that are turned into gradients of weights at once.
constexpr int64_t kChunkRows = 256;
// Elements between tiles of a transposed chunk, into which the last copy of a tile may reach.
constexpr int64_t kPadding = 16;

// What a group of rows keeps of its current chunk.
template <class Real>
struct ChunkBuffers {
  Real *packed_x, *packed_h, *packed_m;
  Real *transposed;    // δaᵀ as [tiles][rows][TILE_ROWS]
  Real *transposed_h;  // δĥᵀ, where there is a projection
  Real *gates[2];      // δa, also of the chunk before, where grad_gates is not given
  Real *whole_h[2];    // likewise δĥ, where there is a projection and whole_grad_h is not given
};

// Sums over the rows of a group; null where they are not wanted.
template <class Real>
struct WeightGradients {
  Real *ih, *hh, *bias, *hr;
};

// Where a row of a step lies.
template <class Real>
struct BackwardRow {
  const Real *later;  // δa, or δp, of the step after, where there is one
  const Real *activations, *c, *c_before;  // the last one is c'
  const Real *grad_h, *grad_c;  // or null
  Real *grad_cell;   // δc
  Real *grad_gates;  // δa
};

template <class Real>
struct BackwardPlan {
  const LstmBackward *arguments;
  const Timeline *timelines;  // one for each group of rows
  Modifiers<Real> modifiers;
  Sequence<Real> activations, c, x, h, grad_h, grad_c, grad_gates, whole_grad_h, grad_x;
  Sequence<Real> grad_product;  // of h'·W_hhᵀ: grad_gates, or what layer_norm.h makes of them
  State<Real> h0, c0, grad_h_n, grad_c_n;
  LstmState grad_h0, grad_c0;
  int64_t inputs, hidden, features;
  bool projected;
  bool normalized;           // layer_norm.h goes on from the δm of whole rows
  Panels hidden_panels;      // W_hh [4H, P]
  Panels projection_panels;  // W_hr [P, H]
  Panels input_panels;       // W_ih [4H, I]
  Panels x_panels, h_panels, m_panels;  // x [rows, I], h_{t-1} [rows, P], m [rows, H] of a chunk
  Real *packed_hh, *packed_hr, *packed_ih;  // null where products read the weights in place
  Real *grad_m;    // [B, H], with a projection or normalized
  Real *zoned_h;   // [B, P], z_h ⊙ δh of the step after, where h is zoned out
  Real *masked_h;  // [members][P], a row of h' ⊙ recurrent_mask, where that is given
  ChunkBuffers<Real> *chunks;      // one for each group of rows
  WeightGradients<Real> *weights;  // one for each group of rows; the first is the output
  BackwardRow<Real> *rows;         // [unit groups][B], of one step, by each member for itself
  Barrier *barriers;               // one for each group of rows, and one for all
};

template <class Real>
class BackwardMember : protected Member {
 protected:
  typedef Simd<Real> S;
  typedef typename S::Vector Vector;
  typedef BackwardPlan<Real> Plan;

 public:
  BackwardMember(const Plan &plan, const Split &split, int64_t member)
      : Member(split, member, plan.barriers),
        plan_(plan),
        timeline_(plan.timelines[row_group_]),
        buffers_(plan.chunks[row_group_]),
        weights_(plan.weights[row_group_]),
        mine_(share(plan.hidden_panels.count())),
        own_cells_(share(plan.projection_panels.count())),
        rows_(own_rows(plan.rows, plan.arguments->batch)) {}

  void run() {
    pack_weights();
    start();
    if (plan_.arguments->modifiers.lengths) clear_idle();
    meet_all();
    const bool products = weights_.ih || weights_.hh || weights_.bias || weights_.hr ||
                          plan_.grad_x.data;
    bool first = true;
    int64_t parity = 0;
    // Steps without a row of this group, where its sequences are short, are none of its work.
    int64_t first_step = 0, last_step = timeline_.steps;
    while (first_step < last_step && !timeline_.active(first_step)) ++first_step;
    while (first_step < last_step && !timeline_.active(last_step - 1)) --last_step;
    for (int64_t end = last_step; end > first_step; parity ^= 1) {
      int64_t begin = end - 1;
      while (begin > first_step && timeline_.active(begin - 1, end) <= kChunkRows) --begin;
      const Chunk chunk = {begin, end, timeline_.active(begin, end), parity};
      for (int64_t k = end - 1; k >= begin; --k) step(k, chunk);
      if (products) {
        pack_chunk(chunk);
        meet();
        multiply_chunk(chunk, first);
      }
      first = false;
      previous_ = chunk;
      end = begin;
    }
    if (first) {
      clear_weights();
    } else {
      initial_hidden(first_step, {0, timeline_.active(first_step)}, previous_, 0);
    }
    if (split_.row_groups > 1) {
      meet_all();
      add_up_weights();
    }
  }

 protected:
  // Steps begin ... end-1; the δa of step k lie behind those of the chunk's earlier steps.
  struct Chunk {
    int64_t begin, end, rows, parity;
  };

  const Plan &plan_;
  const Timeline timeline_;
  const ChunkBuffers<Real> &buffers_;
  const WeightGradients<Real> &weights_;
  const Share mine_, own_cells_;
  BackwardRow<Real> *const rows_;
  Chunk previous_{0, 0, 0, 0};

  int64_t gate_width() const { return 4 * plan_.hidden; }

  // A row of step k of a chunk, in a buffer of the chunk or in the output.
  Real *row_of(const Sequence<Real> &output, Real *const (&buffers)[2], int64_t width,
               const Chunk &chunk, int64_t before, int64_t k, int64_t place) const {
    if (output.data) return output.at(timeline_.time(k), timeline_.row(place));
    return buffers[chunk.parity] + (before + place) * width;
  }

  void pack_weights() {
    pack(plan_.hidden_panels, plan_.arguments->weight_hh, plan_.packed_hh);
    if (plan_.projected) {
      pack(plan_.projection_panels, plan_.arguments->weight_hr, plan_.packed_hr);
    }
    if (plan_.grad_x.data) pack(plan_.input_panels, plan_.arguments->weight_ih, plan_.packed_ih);
  }
  void pack(const Panels &panels, const void *weight, Real *packed) const {
    if (!packed) return;
    const Share mine = share_of_all(panels.count());
    for (int64_t p = mine.begin; p < mine.end; ++p) {
      const Real *in = static_cast<const Real *>(weight);
      for (int64_t k = 0; k < panels.depth; ++k, in += panels.width) {
        pack_row(panels, p, in, packed_row(packed, panels, p, k));
      }
    }
  }

  // Where products read a weight: its panels, or itself.
  static const Real *either(const Real *packed, const void *weight) {
    return packed ? packed : static_cast<const Real *>(weight);
  }

  // δc starts as grad_c_n, in grad_c0, where it stays. So does δh of sequences without a step.
  void start() {
    const int64_t begun = max(timeline_.active(0), timeline_.active(timeline_.steps - 1));
    const Share mine = share(timeline_.count);
    for (int64_t place = mine.begin; place < mine.end; ++place) {
      const int64_t row = timeline_.row(place);
      __builtin_memcpy(cell_gradient(row), plan_.grad_c_n.at(row), plan_.hidden * sizeof(Real));
      if (place < begun) continue;
      __builtin_memcpy(hidden_gradient(row), plan_.grad_h_n.at(row),
                       plan_.features * sizeof(Real));
    }
  }
  Real *cell_gradient(int64_t row) const {
    return static_cast<Real *>(plan_.grad_c0.data) + row * plan_.grad_c0.stride_b;
  }
  Real *hidden_gradient(int64_t row) const {
    return static_cast<Real *>(plan_.grad_h0.data) + row * plan_.grad_h0.stride_b;
  }

  void clear_idle() const {
    timeline_.for_each_idle(unit_group_, split_.unit_groups, [&](int64_t t, int64_t row) {
      plan_.grad_gates.clear(t, row, gate_width());
      plan_.whole_grad_h.clear(t, row, plan_.features);
      plan_.grad_x.clear(t, row, plan_.inputs);
    });
  }

  void step(int64_t k, const Chunk &chunk) {
    hidden_gradients(k, chunk);
    if (plan_.projected) {
      meet();
      cells_behind_projection(k, chunk);
    }
    meet();
  }

  // This member's panels of δĥ, and what becomes of them.
  void hidden_gradients(int64_t k, const Chunk &chunk) {
    const int64_t active = timeline_.active(k), lasting = timeline_.lasting(k);
    const int64_t before = timeline_.active(chunk.begin, k);
    const bool same = k + 1 < chunk.end;
    const Chunk &next = same ? chunk : previous_;
    const int64_t next_before = same ? before + active : 0;
    // Rows that begin with the step after this one get the gradient of their initial state.
    if (k + 1 < timeline_.steps && timeline_.active(k + 1) > active) {
      initial_hidden(k + 1, {active, timeline_.active(k + 1)}, next, next_before);
    }
    look_up_rows(k, chunk, before, next, next_before);
    for (int64_t p = mine_.begin; p < mine_.end; ++p) {
      for_each_tile({0, lasting}, [&](int64_t place, int64_t count) {
        hidden_tile(k, place, count, p, true, chunk, before);
      });
      for_each_tile({lasting, active}, [&](int64_t place, int64_t count) {
        hidden_tile(k, place, count, p, false, chunk, before);
      });
    }
  }

  // Where the rows of a step lie is the same for all panels.
  void look_up_rows(int64_t k, const Chunk &chunk, int64_t before, const Chunk &next,
                    int64_t next_before) {
    const int64_t t = timeline_.time(k), lasting = timeline_.lasting(k);
    for (int64_t place = 0; place < timeline_.active(k); ++place) {
      const int64_t row = timeline_.row(place);
      rows_[place] = {
          place < lasting ? row_of(plan_.grad_product, buffers_.gates, gate_width(), next,
                                   next_before, k + 1, place)
                          : nullptr,
          plan_.activations.at(t, row),
          plan_.c.at(t, row),
          plan_.modifiers.before(plan_.c, plan_.c0, timeline_, k, place),
          plan_.grad_h.data ? plan_.grad_h.at(t, row) : nullptr,
          plan_.grad_c.data ? plan_.grad_c.at(t, row) : nullptr,
          cell_gradient(row),
          row_of(plan_.grad_gates, buffers_.gates, gate_width(), chunk, before, k, place)};
    }
  }

  // δh of one panel of hidden units, for rows that all have a step after this one, or all end.
  NOINLINE void hidden_tile(int64_t k, int64_t place, int64_t count, int64_t p, bool going,
                            const Chunk &chunk, int64_t before) {
    const Sequence<const Real> &zoneout = plan_.modifiers.zoneout_h;
    const Panels &panels = plan_.hidden_panels;
    const int64_t t = timeline_.time(k), first = panels.first_column(p), filled = panels.filled(p);
    constexpr int64_t kTile = 4 * S::kWidth;
    alignas(64) Real sums[TILE_ROWS * kTile];
    if (going) {
      const Real *in[TILE_ROWS];
      Real *out[TILE_ROWS];
      for (int64_t q = 0; q < count; ++q) {
        in[q] = rows_[place + q].later;
        out[q] = sums + q * kTile;
      }
      product<Real>(count, in, panels, p, either(plan_.packed_hh, plan_.arguments->weight_hh), out,
                    false);
    }
    for (int64_t q = 0; q < count; ++q) {
      const BackwardRow<Real> &own = rows_[place + q];
      const int64_t row = timeline_.row(place + q);
      for (int64_t done = 0; done < filled; done += S::kWidth) {
        const int64_t unit = first + done, left = filled - done;
        Vector grad = going ? handed_on(S::load(sums + q * kTile + done, left), k + 1, row, unit,
                                        left)
                            : S::load(plan_.grad_h_n.at(row) + unit, left);
        if (own.grad_h) grad += S::load(own.grad_h + unit, left);
        if (zoneout.data) {
          const Vector kept = S::load(zoneout.at(t, row) + unit, left);
          S::store(plan_.zoned_h + row * plan_.features + unit, kept * grad, left);
          grad *= Real(1) - kept;
        }
        if (plan_.projected) {
          S::store(row_of(plan_.whole_grad_h, buffers_.whole_h, plan_.features, chunk, before, k,
                          place + q) +
                       unit,
                   grad, left);
        } else if (plan_.normalized) {
          S::store(plan_.grad_m + row * plan_.hidden + unit, grad, left);
        } else {
          S::store(sums + q * kTile + done, grad, left);
        }
      }
      if (!plan_.projected && !plan_.normalized) {
        cells(k, place + q, first, filled, sums + q * kTile);
      }
    }
  }

  // What step k hands on of δh to the step before it, or to h0, from one vector of its δa·W_hh.
  INLINE_MEMBER Vector handed_on(Vector product, int64_t k, int64_t row, int64_t unit,
                                 int64_t count) const {
    const Modifiers<Real> &modifiers = plan_.modifiers;
    if (modifiers.reset(timeline_.time(k), row)) return Vector{};
    if (modifiers.recurrent_mask.data) {
      product *= S::load(modifiers.recurrent_mask.at(row) + unit, count);
    }
    if (plan_.zoned_h) product += S::load(plan_.zoned_h + row * plan_.features + unit, count);
    return product;
  }

  // δm = δĥ·W_hr, then δa, unless δm is to be complete first.
  void cells_behind_projection(int64_t k, const Chunk &chunk) {
    const Panels &panels = plan_.projection_panels;
    const int64_t before = timeline_.active(chunk.begin, k);
    for (int64_t p = own_cells_.begin; p < own_cells_.end; ++p) {
      const int64_t first = panels.first_column(p), filled = panels.filled(p);
      for_each_tile({0, timeline_.active(k)}, [&](int64_t place, int64_t count) {
        const Real *in[TILE_ROWS];
        Real *out[TILE_ROWS];
        for (int64_t q = 0; q < count; ++q) {
          in[q] = row_of(plan_.whole_grad_h, buffers_.whole_h, plan_.features, chunk, before, k,
                         place + q);
          out[q] = plan_.grad_m + timeline_.row(place + q) * plan_.hidden + first;
        }
        product<Real>(count, in, panels, p, either(plan_.packed_hr, plan_.arguments->weight_hr),
                      out, false);
        if (plan_.normalized) return;
        for (int64_t q = 0; q < count; ++q) cells(k, place + q, first, filled, out[q]);
      });
    }
  }

  // δc and δa of the hidden units first ... first+count-1 of a row, from their δm.
  void cells(int64_t k, int64_t place, int64_t first, int64_t count, const Real *grad_m) const {
    int64_t done = 0;
    for (; done + S::kWidth < count; done += 2 * S::kWidth) {
      some_cells<2>(k, place, first + done, count - done, grad_m + done);
    }
    if (done < count) some_cells<1>(k, place, first + done, count - done, grad_m + done);
  }
  template <int VECTORS>
  INLINE_MEMBER void some_cells(int64_t k, int64_t place, int64_t unit, int64_t count,
                                const Real *grad_m) const {
    typedef typename S::template Several<VECTORS> Cells;
    const BackwardRow<Real> &row = rows_[place];
    const Cells c = Cells::of([&](int n) {
      return fresh_cell(row.c, row.c_before, row.activations, unit + n * S::kWidth,
                        count - n * S::kWidth);
    });
    const Cells squashed = S::template tanh<VECTORS>(c);
    _Pragma("GCC unroll 4") for (int n = 0; n < VECTORS; ++n) {
      const int64_t own = unit + n * S::kWidth, left = count - n * S::kWidth;
      const Vector o = S::load(row.activations + 3 * plan_.hidden + own, left);
      const Vector grad = S::load(grad_m + n * S::kWidth, left);
      gate_gradients(k, place, own, left, c[n], squashed[n], grad,
                     grad * o * (Real(1) - squashed[n] * squashed[n]), row.grad_gates + own);
    }
  }

  // The same where m = o ⊙ squashed, and from_output is what δĉ gets through squashed.
  INLINE_MEMBER void gate_gradients(int64_t k, int64_t place, int64_t unit, int64_t count,
                                    Vector c, Vector squashed, Vector grad_m, Vector from_output,
                                    Real *out) const {
    const Modifiers<Real> &modifiers = plan_.modifiers;
    const BackwardRow<Real> &own = rows_[place];
    const int64_t hidden = plan_.hidden;
    const Real *activations = own.activations + unit;
    const Vector i = S::load(activations, count), f = S::load(activations + hidden, count);
    const Vector g = S::load(activations + 2 * hidden, count);
    const Vector o = S::load(activations + 3 * hidden, count);
    const Vector earlier = S::load(own.c_before + unit, count);
    Vector grad_c = S::load(own.grad_cell + unit, count), zoned{};
    if (own.grad_c) grad_c += S::load(own.grad_c + unit, count);
    if (modifiers.zoneout_c.data) {
      const Real *zoneout = modifiers.zoneout_c.at(timeline_.time(k), timeline_.row(place));
      const Vector kept = S::load(zoneout + unit, count);
      zoned = kept * grad_c;
      grad_c *= Real(1) - kept;
    }
    grad_c += from_output;
    if (modifiers.clips) {
      const Vector size = c < Vector{} ? -c : c, limit = S::broadcast(modifiers.cell_clip);
      grad_c = size < limit ? grad_c : Vector{};
    }
    const bool reset = modifiers.reset(timeline_.time(k), timeline_.row(place));
    S::store(own.grad_cell + unit, reset ? Vector{} : grad_c * f + zoned, count);
    S::store(out, grad_c * g * i * (Real(1) - i), count);
    S::store(out + hidden, grad_c * earlier * f * (Real(1) - f), count);
    S::store(out + 2 * hidden, grad_c * i * (Real(1) - g * g), count);
    S::store(out + 3 * hidden, grad_m * squashed * o * (Real(1) - o), count);
  }

  // One vector of ĉ, which is computed again where c was zoned out.
  INLINE_MEMBER Vector fresh_cell(const Real *c_row, const Real *c_before, const Real *activations,
                                  int64_t unit, int64_t count) const {
    const Modifiers<Real> &modifiers = plan_.modifiers;
    const int64_t hidden = plan_.hidden;
    if (!modifiers.zoneout_c.data) return S::load(c_row + unit, count);
    activations += unit;
    const Vector i = S::load(activations, count), f = S::load(activations + hidden, count);
    const Vector g = S::load(activations + 2 * hidden, count);
    const Vector c = f * S::load(c_before + unit, count) + i * g;
    return modifiers.clips ? S::clamp(c, modifiers.cell_clip) : c;
  }

  // grad_h0 of rows that begin at step k.
  void initial_hidden(int64_t k, Share rows, const Chunk &chunk, int64_t before) {
    const Panels &panels = plan_.hidden_panels;
    for (int64_t p = mine_.begin; p < mine_.end; ++p) {
      const int64_t first = panels.first_column(p), filled = panels.filled(p);
      for_each_tile(rows, [&](int64_t place, int64_t count) {
        const Real *in[TILE_ROWS];
        Real *out[TILE_ROWS];
        for (int64_t q = 0; q < count; ++q) {
          in[q] =
              row_of(plan_.grad_product, buffers_.gates, gate_width(), chunk, before, k, place + q);
          out[q] = hidden_gradient(timeline_.row(place + q)) + first;
        }
        product<Real>(count, in, panels, p, either(plan_.packed_hh, plan_.arguments->weight_hh),
                      out, false);
        for (int64_t q = 0; q < count; ++q) {
          const int64_t row = timeline_.row(place + q);
          for (int64_t unit = 0; unit < filled; unit += S::kWidth) {
            const Vector grad = S::load(out[q] + unit, filled - unit);
            S::store(out[q] + unit, handed_on(grad, k, row, first + unit, filled - unit),
                     filled - unit);
          }
        }
      });
    }
  }

  // Call each(row of the chunk, k, place) for the rows begin ... end-1 of a chunk.
  template <class Each>
  INLINE_MEMBER void for_each_row(const Chunk &chunk, Share rows, Each each) const {
    int64_t first = 0;
    for (int64_t k = chunk.begin; k < chunk.end; ++k) {
      const int64_t count = timeline_.active(k);
      const int64_t begin = max(rows.begin, first), end = min(rows.end, first + count);
      for (int64_t row = begin; row < end; ++row) each(row, k, row - first);
      first += count;
    }
  }

  // Lay out what the products of a chunk read: x, h_{t-1} and m as panels, δa (and δĥ) transposed.
  void pack_chunk(const Chunk &chunk) {
    if (weights_.ih) {
      pack_rows(chunk, plan_.x_panels, buffers_.packed_x, [&](int64_t k, int64_t place) {
        return plan_.x.at(timeline_.time(k), timeline_.row(place));
      });
    }
    if (weights_.hh) {
      pack_rows(chunk, plan_.h_panels, buffers_.packed_h,
                [&](int64_t k, int64_t place) { return recurrent_row(k, place); });
    }
    if (weights_.hr) pack_cell_outputs(chunk);
    if (weights_.ih || weights_.hh) {
      transpose(chunk, plan_.grad_gates, buffers_.gates, gate_width(), buffers_.transposed);
    }
    if (weights_.hr) {
      transpose(chunk, plan_.whole_grad_h, buffers_.whole_h, plan_.features,
                buffers_.transposed_h);
    }
  }

  // The row that entered W_hh at step k.
  const Real *recurrent_row(int64_t k, int64_t place) const {
    const Real *h = plan_.modifiers.before(plan_.h, plan_.h0, timeline_, k, place);
    if (!plan_.masked_h) return h;
    const Real *mask = plan_.modifiers.recurrent_mask.at(timeline_.row(place));
    Real *out = plan_.masked_h + member_ * plan_.features;
    for (int64_t unit = 0; unit < plan_.features; unit += S::kWidth) {
      const int64_t count = plan_.features - unit;
      S::store(out + unit, S::load(h + unit, count) * S::load(mask + unit, count), count);
    }
    return out;
  }

  template <class Row>
  INLINE_MEMBER void pack_rows(const Chunk &chunk, Panels panels, Real *packed, Row row_at) {
    panels.depth = chunk.rows;
    const Share rows = share(chunk.rows);
    for_each_row(chunk, rows, [&](int64_t row, int64_t k, int64_t place) {
      const Real *in = row_at(k, place);
      for (int64_t p = 0; p < panels.count(); ++p) {
        pack_row(panels, p, in, packed_row(packed, panels, p, row));
      }
    });
  }

  // m = o ⊙ tanh(ĉ), as panels.
  void pack_cell_outputs(const Chunk &chunk) {
    Panels panels = plan_.m_panels;
    panels.depth = chunk.rows;
    const Share rows = share(chunk.rows);
    for_each_row(chunk, rows, [&](int64_t row, int64_t k, int64_t place) {
      const int64_t t = timeline_.time(k), sequence = timeline_.row(place);
      const Real *activations = plan_.activations.at(t, sequence), *c = plan_.c.at(t, sequence);
      const Real *c_before = plan_.modifiers.before(plan_.c, plan_.c0, timeline_, k, place);
      for (int64_t p = 0; p < panels.count(); ++p) {
        const int64_t columns = panels.columns(p), filled = panels.filled(p);
        const int64_t first = panels.first_column(p);
        Real *out = packed_row(buffers_.packed_m, panels, p, row);
        for (int64_t z = 0; z < columns; ++z) {
          const int64_t unit = z * S::kWidth, count = filled - unit;
          const Vector o = S::load(activations + 3 * plan_.hidden + first + unit, count);
          S::store(out + unit,
                   o * S::tanh(fresh_cell(c, c_before, activations, first + unit, count)));
        }
      }
    });
  }
  static Real *packed_row(Real *packed, const Panels &panels, int64_t p, int64_t row) {
    return packed + panels.offset(p) + row * panels.columns(p) * S::kWidth;
  }

  // Rows of a chunk [rows, width] to [tiles][rows][TILE_ROWS], tiles kPadding apart.
  void transpose(const Chunk &chunk, const Sequence<Real> &output, Real *const (&buffers)[2],
                 int64_t width, Real *transposed) {
    const Share tiles = share(divide_up(width, TILE_ROWS));
    const int64_t pitch = chunk.rows * TILE_ROWS + kPadding;
    int64_t row = 0;
    for (int64_t k = chunk.begin; k < chunk.end; ++k) {
      const int64_t before = row, end = row + timeline_.active(k);
      for (int64_t place = 0; row < end; ++place, ++row) {
        const Real *in = row_of(output, buffers, width, chunk, before, k, place);
        Real *out = transposed + tiles.begin * pitch + row * TILE_ROWS;
        for (int64_t tile = tiles.begin; tile < tiles.end; ++tile, out += pitch) {
          const int64_t first = tile * TILE_ROWS;
          if (first + kCopied <= width) {
            // As one vector; what is too much is overwritten by the next row, or is padding.
            __builtin_memcpy(out, in + first, kCopied * sizeof(Real));
          } else {
            for (int64_t q = 0; q < min(TILE_ROWS, width - first); ++q) out[q] = in[first + q];
          }
        }
      }
    }
  }

  void multiply_chunk(const Chunk &chunk, bool first) {
    if (weights_.bias) add_bias(chunk, first);
    if (weights_.ih) {
      add_weight(chunk, plan_.x_panels, buffers_.packed_x, buffers_.transposed, gate_width(),
                 weights_.ih, first);
    }
    if (weights_.hh) {
      add_weight(chunk, plan_.h_panels, buffers_.packed_h, buffers_.transposed, gate_width(),
                 weights_.hh, first);
    }
    if (weights_.hr) {
      add_weight(chunk, plan_.m_panels, buffers_.packed_m, buffers_.transposed_h, plan_.features,
                 weights_.hr, first);
    }
    if (plan_.grad_x.data) multiply_inputs(chunk);
  }

  // weight [width, panels.width] (+)= transposedᵀ · packed
  void add_weight(const Chunk &chunk, Panels panels, const Real *packed, const Real *transposed,
                  int64_t width, Real *weight, bool first) {
    panels.depth = chunk.rows;
    const Share tiles = share(divide_up(width, TILE_ROWS));
    // As many panels at a time as stay in the cache while all tiles pass by.
    const int64_t group = max(1, kCachedBytes / int64_t(sizeof(Real)) /
                                     (panels.wide * S::kWidth * chunk.rows));
    for (int64_t begin = 0; begin < panels.count(); begin += group) {
      const int64_t end = min(begin + group, panels.count());
      for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) {
        const int64_t row = tile * TILE_ROWS, count = min(TILE_ROWS, width - row);
        for (int64_t p = begin; p < end; ++p) {
          const Real *in[TILE_ROWS];
          Real *out[TILE_ROWS];
          for (int64_t q = 0; q < count; ++q) {
            in[q] = transposed + tile * (chunk.rows * TILE_ROWS + kPadding) + q;
            out[q] = weight + (row + q) * panels.width + panels.first_column(p);
          }
          product<Real, TILE_ROWS>(count, in, panels, p, packed, out, !first);
        }
      }
    }
  }

  void add_bias(const Chunk &chunk, bool first) {
    const Share mine = share(divide_up(gate_width(), S::kWidth));
    for (int64_t v = mine.begin; v < mine.end; ++v) {
      const int64_t column = v * S::kWidth, count = gate_width() - column;
      // Sums of steps, of chunks, of all: fewer roundings than one long chain.
      Vector sum{};
      int64_t before = 0;
      for (int64_t k = chunk.begin; k < chunk.end; ++k) {
        const int64_t rows = timeline_.active(k);
        Vector step{};
        for (int64_t place = 0; place < rows; ++place) {
          const Real *in =
              row_of(plan_.grad_gates, buffers_.gates, gate_width(), chunk, before, k, place);
          step += S::load(in + column, count);
        }
        sum += step;
        before += rows;
      }
      if (!first) sum += S::load(weights_.bias + column, count);
      S::store(weights_.bias + column, sum, count);
    }
  }

  // The sums of a group none of whose sequences has a step.
  void clear_weights() {
    clear(weights_.ih, gate_width() * plan_.inputs);
    clear(weights_.hh, gate_width() * plan_.features);
    clear(weights_.bias, gate_width());
    clear(weights_.hr, plan_.features * plan_.hidden);
  }
  void clear(Real *sum, int64_t count) {
    const Share mine = share(count);
    if (sum) __builtin_memset(sum + mine.begin, 0, (mine.end - mine.begin) * sizeof(Real));
  }

  // The sums of all groups, into those of the first.
  void add_up_weights() {
    const int64_t gates = gate_width();
    const WeightGradients<Real> &all = plan_.weights[0];
    for (int64_t g = 1; g < split_.row_groups; ++g) {
      const WeightGradients<Real> &own = plan_.weights[g];
      add_up(all.ih, own.ih, gates * plan_.inputs);
      add_up(all.hh, own.hh, gates * plan_.features);
      add_up(all.bias, own.bias, gates);
      add_up(all.hr, own.hr, plan_.features * plan_.hidden);
    }
  }
  void add_up(Real *sum, const Real *other, int64_t count) {
    if (!sum) return;
    const Share mine = share_of_all(count);
    add_to(sum + mine.begin, other + mine.begin, mine.end - mine.begin);
  }

  // δx = δa·W_ih
  void multiply_inputs(const Chunk &chunk) {
    const Panels &panels = plan_.input_panels;
    const Share rows = share(chunk.rows);
    constexpr int64_t kGroup = 8 * TILE_ROWS;
    const Real *in[kGroup];
    Real *out[kGroup];
    for (int64_t begin = rows.begin; begin < rows.end; begin += kGroup) {
      const int64_t end = min(begin + kGroup, rows.end);
      for_each_row(chunk, {begin, end}, [&](int64_t row, int64_t k, int64_t place) {
        in[row - begin] = row_of(plan_.grad_gates, buffers_.gates, gate_width(), chunk, row - place,
                                 k, place);
        out[row - begin] = plan_.grad_x.at(timeline_.time(k), timeline_.row(place));
      });
      for (int64_t p = 0; p < panels.count(); ++p) {
        for_each_tile({0, end - begin}, [&](int64_t row, int64_t count) {
          Real *columns[TILE_ROWS];
          for (int64_t q = 0; q < count; ++q) {
            columns[q] = out[row + q] + panels.first_column(p);
          }
          product<Real>(count, in + row, panels, p,
                        either(plan_.packed_ih, plan_.arguments->weight_ih), columns, false);
        });
      }
    }
  }

  static constexpr int64_t kCachedBytes = int64_t{512} << 10;
  static constexpr int64_t kCopied = TILE_ROWS > 4 ? 8 : 4;  // TILE_ROWS, up to a power of two
};
