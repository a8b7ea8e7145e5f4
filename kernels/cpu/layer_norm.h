// Both passes with layer normalization (Ba, Kiros & Hinton 2016, arXiv:1607.06450). Included once
// per instruction set, after forward.h and backward.h.
//
// In the names of those, where they have other equations, and with LN(x) = (x - mean(x))·rstd(x),
// rstd(x) = 1/√(mean((x - mean(x))²) + eps), means over all features of a row:
//
//   p_t = (h' ⊙ recurrent_mask)·W_hhᵀ      n_t = LN(p_t)
//   a_t = gates_t + gain_hh ⊙ n_t
//   z_t = gain_c ⊙ LN(ĉ_t) + bias_c
//   ĥ_t = o ⊙ tanh(z_t), or (o ⊙ tanh(z_t))·W_hrᵀ
//
// And, with LN'(δ) = rstd·(δ - mean(δ) - n·mean(δ ⊙ n)), the gradient of what LN made n of,
//
//   δz_t = δm_t ⊙ o ⊙ (1 - tanh²(z_t))
//   δĉ_t = (1 - z_c_t) ⊙ δc_t + LN'(gain_c ⊙ δz_t), or 0 unless |ĉ_t| < cell_clip
//   δa_o = δm_t ⊙ tanh(z_t) ⊙ o(1 - o)
//   δp_t = LN'(gain_hh ⊙ δa_t)
//   δh_t = grad_h_t + recurrent_mask ⊙ (δp_{t+1}·W_hh) + z_h_{t+1} ⊙ δh_{t+1}
//
// The products are those of forward.h and backward.h, by blocks and panels of hidden units. But a
// mean needs the whole row: the members of a group meet once more in each step, and then each takes
// some rows from end to end. The gradients of weights and gains are left to the caller.

// What normalizes a recurrence; bias_c may be null.
template <class Real>
struct LayerNorm {
  const Real *gain_hh, *gain_c, *bias_c;
  double eps;

  template <class Arguments>
  explicit LayerNorm(const Arguments &a)
      : gain_hh(static_cast<const Real *>(a.gain_hh)),
        gain_c(static_cast<const Real *>(a.gain_c)),
        bias_c(static_cast<const Real *>(a.bias_c)),
        eps(a.eps) {}
  // One vector of z, from one of LN(ĉ).
  INLINE_MEMBER typename Simd<Real>::Vector z(typename Simd<Real>::Vector n, int64_t unit,
                                              int64_t count) const {
    n *= Simd<Real>::load(gain_c + unit, count);
    return bias_c ? n + Simd<Real>::load(bias_c + unit, count) : n;
  }
};

template <class Real>
struct LayerNormForwardPlan : ForwardPlan<Real> {
  LayerNorm<Real> norm;
  Sequence<Real> normalized, rstd;
};

template <class Real>
struct LayerNormBackwardPlan : BackwardPlan<Real> {
  LayerNorm<Real> norm;
  Sequence<Real> normalized, rstd, grad_z;
};

// The sum of all term(unit, count) of a row, in an order that follows from its width alone.
template <class Real, class Term>
INLINE Real sum_of(int64_t width, Term term) {
  typedef Simd<Real> S;
  // Four chains, for the latency of an addition, and for fewer roundings than in one.
  constexpr int64_t kStep = 4 * S::kWidth;
  typename S::Vector sums[4] = {};
  int64_t unit = 0;
  for (; unit + kStep <= width; unit += kStep) {
    _Pragma("GCC unroll 4") for (int z = 0; z < 4; ++z) {
      sums[z] += term(unit + z * S::kWidth, S::kWidth);
    }
  }
  for (; unit < width; unit += S::kWidth) {
    sums[0] += S::first(term(unit, width - unit), width - unit);
  }
  return S::sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// A row is normalized as (x - mean)·rstd.
template <class Real>
struct Moments {
  Real mean, rstd;

  INLINE_MEMBER typename Simd<Real>::Vector normalized(typename Simd<Real>::Vector x) const {
    return (x - mean) * rstd;
  }
};

// In two passes: squares of what is not centred would cancel.
template <class Real>
INLINE Moments<Real> moments_of(const Real *row, int64_t width, double eps) {
  typedef Simd<Real> S;
  const Real mean = sum_of<Real>(width, [&](int64_t unit, int64_t count) {
    return S::load(row + unit, count);
  }) / Real(width);
  const Real squares = sum_of<Real>(width, [&](int64_t unit, int64_t count) {
    const typename S::Vector centred = S::load(row + unit, count) - mean;
    return centred * centred;
  });
  return {mean, Real(1 / __builtin_sqrt(double(squares / Real(width)) + eps))};
}

// LN' of a row of gradients δ.
template <class Real>
struct NormGradient {
  Real rstd, mean, along;  // mean(δ), mean(δ ⊙ n)

  INLINE_MEMBER typename Simd<Real>::Vector of(typename Simd<Real>::Vector grad,
                                               typename Simd<Real>::Vector n) const {
    return rstd * (grad - mean - n * along);
  }
};

template <class Real>
INLINE NormGradient<Real> norm_gradient(const Real *grad, const Real *normalized, int64_t width,
                                        Real rstd) {
  typedef Simd<Real> S;
  const Real total = sum_of<Real>(width, [&](int64_t unit, int64_t count) {
    return S::load(grad + unit, count);
  });
  const Real along = sum_of<Real>(width, [&](int64_t unit, int64_t count) {
    return S::load(grad + unit, count) * S::load(normalized + unit, count);
  });
  return {rstd, total / Real(width), along / Real(width)};
}

template <class Real>
class LayerNormForwardMember : ForwardMember<Real> {
  typedef ForwardMember<Real> Base;
  typedef Simd<Real> S;
  typedef typename S::Vector Vector;
  typedef LayerNormForwardPlan<Real> Plan;
  using Base::timeline_;

 public:
  LayerNormForwardMember(const Plan &plan, const Split &split, int64_t member)
      : Base(plan, split, member), plan_(plan) {}

  void run() {
    this->prepare();
    if (plan_.arguments->modifiers.lengths) clear_idle();
    this->meet_all();
    for (int64_t k = 0; k < timeline_.steps; ++k) step(k);
    this->finish();
  }

 private:
  const Plan &plan_;

  void clear_idle() const {
    timeline_.for_each_idle(
        this->unit_group_, this->split_.unit_groups, [&](int64_t t, int64_t row) {
          plan_.normalized.clear(t, row, 4 * plan_.hidden);
          plan_.rstd.clear(t, row, 1);
        });
  }

  void step(int64_t k) {
    const int64_t active = timeline_.active(k);
    if (!active) return;
    this->look_up_rows(k);
    this->compute_blocks(k, 0);
    this->meet();
    const Share mine = this->share(active);
    for (int64_t place = mine.begin; place < mine.end; ++place) compute_row(k, place);
    if (plan_.cell_output) {
      this->meet();
      this->project(k);
    }
    this->meet();
  }

  // From products to c and h (o ⊙ tanh(z) where there is a projection).
  NOINLINE void compute_row(int64_t k, int64_t place) const {
    const LayerNorm<Real> &norm = plan_.norm;
    const int64_t t = timeline_.time(k), row = timeline_.row(place), hidden = plan_.hidden;
    Real *products = plan_.products + row * 4 * hidden;
    const Moments<Real> p = moments_of(products, 4 * hidden, norm.eps);
    if (plan_.rstd.data) *plan_.rstd.at(t, row) = p.rstd;
    // ĉ and o take the places of the products that became i and o.
    Real *fresh = products, *output_gate = products + 3 * hidden;
    const Real *gates = plan_.gates.at(t, row);
    for (int64_t unit = 0; unit < hidden; unit += S::kWidth) {
      const int64_t count = hidden - unit;
      Vector a[4];
      _Pragma("GCC unroll 4") for (int gate = 0; gate < 4; ++gate) {
        const int64_t feature = gate * hidden + unit;
        const Vector n = p.normalized(S::load(products + feature, count));
        if (plan_.normalized.data) S::store(plan_.normalized.at(t, row) + feature, n, count);
        a[gate] = S::load(gates + feature, count) + S::load(norm.gain_hh + feature, count) * n;
      }
      const typename Base::Cell cell = this->activate(a, this->rows_[place], unit, count);
      S::store(fresh + unit, cell.c, count);
      S::store(output_gate + unit, cell.o, count);
    }
    const Moments<Real> c = moments_of(fresh, hidden, norm.eps);
    for (int64_t unit = 0; unit < hidden; unit += S::kWidth) {
      const int64_t count = hidden - unit;
      const Vector cell = S::load(fresh + unit, count);
      const Vector z = norm.z(c.normalized(cell), unit, count);
      const Vector m = S::load(output_gate + unit, count) * S::tanh(z);
      this->store_states(cell, m, k, place, unit, count);
    }
  }
};

template <class Real>
class LayerNormBackwardMember : BackwardMember<Real> {
  typedef BackwardMember<Real> Base;
  typedef typename Base::Chunk Chunk;
  typedef Simd<Real> S;
  typedef typename S::Vector Vector;
  typedef LayerNormBackwardPlan<Real> Plan;
  using Base::timeline_;

 public:
  LayerNormBackwardMember(const Plan &plan, const Split &split, int64_t member)
      : Base(plan, split, member), plan_(plan) {}

  void run() {
    this->pack_weights();
    this->start();
    if (plan_.arguments->modifiers.lengths) clear_idle();
    this->meet_all();
    const Chunk all = {0, timeline_.steps, timeline_.active(0, timeline_.steps), 0};
    for (int64_t k = timeline_.steps - 1; k >= 0; --k) step(k, all);
    this->initial_hidden(0, {0, timeline_.active(0)}, all, 0);
  }

 private:
  const Plan &plan_;

  void clear_idle() const {
    Base::clear_idle();
    timeline_.for_each_idle(
        this->unit_group_, this->split_.unit_groups, [&](int64_t t, int64_t row) {
          plan_.grad_product.clear(t, row, 4 * plan_.hidden);
          plan_.grad_z.clear(t, row, plan_.hidden);
        });
  }

  void step(int64_t k, const Chunk &all) {
    this->hidden_gradients(k, all);
    this->meet();
    if (plan_.projected) {
      this->cells_behind_projection(k, all);
      this->meet();
    }
    const Share mine = this->share(timeline_.active(k));
    for (int64_t place = mine.begin; place < mine.end; ++place) compute_row(k, place);
    this->meet();
  }

  // From δm to δz, δc, δa and δp.
  NOINLINE void compute_row(int64_t k, int64_t place) const {
    const LayerNorm<Real> &norm = plan_.norm;
    const int64_t t = timeline_.time(k), row = timeline_.row(place), hidden = plan_.hidden;
    const BackwardRow<Real> &own = this->rows_[place];
    const Real *grad_m = plan_.grad_m + row * hidden;
    const Real *output_gate = own.activations + 3 * hidden;
    Real *grad_z = plan_.grad_z.at(t, row), *grad_gates = own.grad_gates;
    // ĉ, LN(ĉ), its gradient and tanh(z), until δa takes their places.
    Real *fresh = grad_gates, *n_c = fresh + hidden, *grad_n = n_c + hidden;
    Real *tanh_z = grad_n + hidden;
    for (int64_t unit = 0; unit < hidden; unit += S::kWidth) {
      const int64_t count = hidden - unit;
      S::store(fresh + unit,
               this->fresh_cell(own.c, own.c_before, own.activations, unit, count), count);
    }
    const Moments<Real> c = moments_of(fresh, hidden, norm.eps);
    for (int64_t unit = 0; unit < hidden; unit += S::kWidth) {
      const int64_t count = hidden - unit;
      const Vector n = c.normalized(S::load(fresh + unit, count));
      const Vector squashed = S::tanh(norm.z(n, unit, count));
      const Vector grad = S::load(grad_m + unit, count) * S::load(output_gate + unit, count) *
                          (Real(1) - squashed * squashed);
      S::store(n_c + unit, n, count);
      S::store(grad_z + unit, grad, count);
      S::store(grad_n + unit, grad * S::load(norm.gain_c + unit, count), count);
      S::store(tanh_z + unit, squashed, count);
    }
    const NormGradient<Real> grad_c = norm_gradient(grad_n, n_c, hidden, c.rstd);
    for (int64_t unit = 0; unit < hidden; unit += S::kWidth) {
      const int64_t count = hidden - unit;
      const Vector grad = S::load(grad_n + unit, count);
      this->gate_gradients(k, place, unit, count, S::load(fresh + unit, count),
                           S::load(tanh_z + unit, count), S::load(grad_m + unit, count),
                           grad_c.of(grad, S::load(n_c + unit, count)), grad_gates + unit);
    }

    const int64_t width = 4 * hidden;
    const Real *normalized = plan_.normalized.at(t, row);
    Real *grad_product = plan_.grad_product.at(t, row);  // δn at first
    for (int64_t feature = 0; feature < width; feature += S::kWidth) {
      const int64_t count = width - feature;
      const Vector grad = S::load(grad_gates + feature, count);
      S::store(grad_product + feature, grad * S::load(norm.gain_hh + feature, count), count);
    }
    const NormGradient<Real> grad_p =
        norm_gradient<Real>(grad_product, normalized, width, *plan_.rstd.at(t, row));
    for (int64_t feature = 0; feature < width; feature += S::kWidth) {
      const int64_t count = width - feature;
      const Vector grad = S::load(grad_product + feature, count);
      S::store(grad_product + feature, grad_p.of(grad, S::load(normalized + feature, count)),
               count);
    }
  }
};
