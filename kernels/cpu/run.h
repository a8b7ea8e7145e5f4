// From arguments to running threads. Included once per instruction set, after forward.h, backward.h
// and layer_norm.h.

// Rows first, because groups of rows never wait for each other; hidden units where there are too
// few rows, or where the weights would not fit into each core's cache.
template <class Arguments, class Stored>
static Split split_for(const Arguments &a, int64_t threads) {
  const int64_t weights = 4 * a.hidden_size * a.features;
  const double step = 2.0 * double(a.batch) * 4.0 * double(a.hidden_size) *
                      double(a.features + a.input_size);
  const double read = kFlopsOfAWeight * 4.0 * double(a.hidden_size) *
                      double(a.features + a.input_size);
  const int64_t worth = int64_t((step * double(a.steps) + read) / kFlopsOfAThread);
  const int64_t most = max(1, min(threads, worth));
  const int64_t blocks = divide_up(a.hidden_size, Simd<typename Factors<Stored>::Real>::kWidth);
  const int64_t row_groups = max(1, min(most, a.batch / kRowsOfAGroup));
  const int64_t worth_meeting =
      int64_t((step + read / double(a.steps)) / kFlopsOfAMeeting);
  const int64_t unit_groups = max(1, min(min(most, blocks), worth_meeting));
  // A single step reads each weight once: nobody should read it twice.
  if (a.steps > 1 && weights * int64_t(sizeof(Stored)) <= kCachedWeights && row_groups > 1) {
    return {row_groups, max(1, min(most / row_groups, unit_groups))};
  }
  return {max(1, min(most / unit_groups, row_groups)), unit_groups};
}

// The rows of all steps; and of a packed batch, for each step, those of earlier ones.
struct Rows {
  int64_t count;
  const int64_t *offsets;
};

template <class Arguments>
static Rows rows_of(const Arguments &a, Memory &memory) {
  if (!a.batch_sizes) return {a.steps * a.batch, nullptr};
  int64_t *offsets = memory.take<int64_t>(a.steps), rows = 0;
  for (int64_t t = 0; t < a.steps; ++t) {
    if (offsets) offsets[t] = rows;
    rows += a.batch_sizes[t];
  }
  return {rows, offsets};
}

// Sort the rows by their numbers of steps, descending; place(rank) is where a row is written down.
//   at_least: [T+1], gets the number of rows with so many steps or more.
template <class Place>
static void sort_rows(const int64_t *lengths, int64_t batch, int64_t steps, int64_t *at_least,
                      Place place) {
  __builtin_memset(at_least, 0, size_t(steps + 1) * sizeof(int64_t));
  for (int64_t row = 0; row < batch; ++row) ++at_least[lengths[row]];
  for (int64_t n = steps, longer = 0; n >= 0; --n) {
    const int64_t equal = at_least[n];
    at_least[n] = longer;
    longer += equal;
  }
  // Each is the next rank for so many steps now, and at the end what it shall be.
  for (int64_t row = 0; row < batch; ++row) place(at_least[lengths[row]]++) = row;
}

// A timeline for each group of rows. Where lengths differ, rows are dealt out to the groups like
// cards, so that each gets long ones and short ones; else a group's rows lie side by side.
template <class Arguments>
static const Timeline *timelines_of(const Arguments &a, int64_t groups, Memory &memory) {
  const int64_t *lengths = a.modifiers.lengths;
  const bool dealt = lengths || a.batch_sizes;
  Timeline *timelines = memory.take<Timeline>(groups);
  int64_t *rows = dealt ? memory.take<int64_t>(a.batch) : nullptr;
  int64_t *starts = dealt ? memory.take<int64_t>(groups * (a.steps + 1)) : nullptr;
  int64_t *at_least = lengths ? memory.take<int64_t>(a.steps + 1) : nullptr;
  if (memory.counting()) return timelines;
  const auto place = [&](int64_t rank) -> int64_t & {
    return rows[share_of(a.batch, rank % groups, groups).begin + rank / groups];
  };
  if (lengths) sort_rows(lengths, a.batch, a.steps, at_least, place);
  if (a.batch_sizes) {
    for (int64_t row = 0; row < a.batch; ++row) place(row) = row;
  }
  for (int64_t group = 0; group < groups; ++group) {
    const Share own = share_of(a.batch, group, groups);
    Timeline &timeline = timelines[group];
    timeline = {a.steps, a.reverse != 0, own.begin, own.end - own.begin, nullptr, nullptr};
    if (!dealt) continue;
    timeline.rows = rows + own.begin;
    timeline.starts = starts;
    starts[0] = 0;
    for (int64_t k = 0; k < a.steps; ++k) {
      const int64_t t = timeline.time(k);
      const int64_t active = lengths ? at_least[t + 1] : a.batch_sizes[t];
      starts[k + 1] = starts[k] + divide_up(max(0, active - group), groups);
    }
    starts += a.steps + 1;
  }
  return timelines;
}

// Rows, over all steps, that repay a rearrangement of the weights, at least. As dot products the rows of
// a step share what they read of the weights as they are, and lose only the adding up of lanes: less,
// the longer the sums. The weights of a single step are multiplied while they are rearranged, which
// repays it sooner. Both divisors are measured.
template <class Real>
static int64_t packed_rows(const LstmForward &a) {
  if (a.batch == 1) return kPackedRows;
  const int64_t depth = a.input_size + a.features;
  return max(2 * Simd<Real>::kWidth, min(depth / (a.steps == 1 ? 6 : 3), kAlwaysPackedRows));
}

template <class Real>
static const Real *zeros(int64_t count, Memory &memory) {
  Real *row = memory.take<Real>(count);
  if (row) __builtin_memset(row, 0, size_t(count) * sizeof(Real));
  return row;
}

static Barrier *barriers(const Split &split, Memory &memory) {
  Barrier *all = memory.take<Barrier>(split.row_groups + 1);
  if (all) {
    for (int64_t i = 0; i <= split.row_groups; ++i) new (all + i) Barrier;
  }
  return all;
}

// Huge pages for an output of all rows (half of h where there are two directions).
template <class Real>
static void advise_rows(const LstmSequence &output, const Rows &rows, int64_t width) {
  if (output.data) advise_huge_pages(output.data, size_t(rows.count * width) * sizeof(Real));
}

template <class Stored>
struct Forward {
  typedef LstmForward Arguments;
  typedef ForwardPlan<Stored> Plan;
  typedef ForwardMember<Stored> Member;

  static Plan lay_out(const Arguments &a, const Split &split, Memory &memory) {
    typedef Factors<Stored> F;
    typedef typename F::Real Real;
    typedef Simd<Real> S;
    const int64_t blocks = divide_up(a.hidden_size, S::kWidth);
    const Rows rows = rows_of(a, memory);
    const int64_t *offsets = rows.offsets;
    const Real *zero = zeros<Real>(max(a.hidden_size, a.features), memory);
    const bool projected = a.weight_hr != nullptr;
    const bool masks = a.modifiers.recurrent_mask.data;
    const Panels projection = {a.hidden_size, a.features, S::kWidth,
                               Panels::wide_for(a.features, S::kWidth, split.unit_groups)};
    const int64_t tile = 4 * S::kWidth;
    const bool packs_late = a.steps == 1;
    const bool packed = rows.count >= packed_rows<Real>(a);
    const int64_t panels = !packed ? 0 : packs_late ? split.members() : blocks;
    const int64_t staged = a.gates.data || !packed ? 0 : split.row_groups * blocks * kStagedRows;
    const int64_t depth = divide_up(a.input_size, F::kEach) + divide_up(a.features, F::kEach);
    LstmSequence c = a.c.data ? a.c : LstmSequence{a.c_n.data, 0, a.c_n.stride_b};
    LstmState c0 = a.c0;
    if (!std::is_same<Stored, Real>::value) {
      c0 = {memory.take<Real>(a.batch * a.hidden_size), a.hidden_size};
      c = {c0.data, 0, c0.stride_b};
    }
    Plan plan = {&a,
                 timelines_of(a, split.row_groups, memory),
                 {a.modifiers, offsets, zero},
                 {a.gates, offsets},
                 {a.x, offsets},
                 {a.h, offsets},
                 {c, a.c.data ? offsets : nullptr},
                 {a.activations, offsets},
                 {a.h0, reinterpret_cast<const Stored *>(zero)},
                 {c0, zero},
                 a.h_n,
                 a.c_n,
                 a.input_size,
                 a.hidden_size,
                 a.features,
                 projection,
                 packs_late,
                 packed ? memory.take<Real>(panels * depth * tile) : nullptr,
                 memory.take<Real>(panels * tile),
                 projected ? memory.take<Real>(projection.size()) : nullptr,
                 projected ? memory.take<Real>(a.batch * a.hidden_size) : nullptr,
                 masks ? memory.take<Stored>(2 * a.batch * a.features) : nullptr,
                 memory.take<Real>(staged * tile),
                 nullptr,
                 memory.take<ForwardRow<Stored>>(split.unit_groups * a.batch),
                 barriers(split, memory)};
    if (!memory.counting()) {
      advise_rows<Stored>(a.h, rows, a.features);
      advise_rows<Stored>(a.c, rows, a.hidden_size);
      advise_rows<Stored>(a.activations, rows, 4 * a.hidden_size);
    }
    return plan;
  }
};

template <class Real>
struct Backward {
  typedef LstmBackward Arguments;
  typedef BackwardPlan<Real> Plan;
  typedef BackwardMember<Real> Member;

  static Plan lay_out(const Arguments &a, const Split &split, Memory &memory) {
    typedef Simd<Real> S;
    const Rows rows = rows_of(a, memory);
    const int64_t *offsets = rows.offsets;
    const Real *zero = zeros<Real>(max(a.hidden_size, a.features), memory);
    const bool projected = a.weight_hr != nullptr;
    const int64_t gates = 4 * a.hidden_size;
    const auto panels = [&](int64_t depth, int64_t width, int64_t members) {
      return Panels{depth, width, S::kWidth, Panels::wide_for(width, S::kWidth, members)};
    };
    const auto weights = [&](int64_t depth, int64_t width, int64_t members) {
      Panels result = panels(depth, width, members);
      result.in_place = rows.count < kCopiedRows && width % S::kWidth == 0;
      return result;
    };
    // Where it is handed on from step to step, also if nobody wants it in the end.
    const auto state_or_own = [&](const LstmState &given, int64_t width) {
      return given.data ? given : LstmState{memory.take<Real>(a.batch * width), width};
    };
    // A chunk holds at least one step.
    const int64_t chunk_rows = max(kChunkRows, divide_up(a.batch, split.row_groups));
    Plan plan = {&a,
                 timelines_of(a, split.row_groups, memory),
                 {a.modifiers, offsets, zero},
                 {a.activations, offsets},
                 {a.c, offsets},
                 {a.x, offsets},
                 {a.h, offsets},
                 {a.grad_h, offsets},
                 {a.grad_c, offsets},
                 {a.grad_gates, offsets},
                 {a.whole_grad_h, offsets},
                 {a.grad_x, offsets},
                 {a.grad_gates, offsets},
                 {a.h0, zero},
                 {a.c0, zero},
                 {a.grad_h_n, zero},
                 {a.grad_c_n, zero},
                 state_or_own(a.grad_h0, a.features),
                 state_or_own(a.grad_c0, a.hidden_size),
                 a.input_size,
                 a.hidden_size,
                 a.features,
                 projected,
                 false,
                 weights(gates, a.features, split.unit_groups),
                 weights(a.features, a.hidden_size, split.unit_groups),
                 weights(gates, a.input_size, 1),
                 panels(chunk_rows, a.input_size, 1),
                 panels(chunk_rows, a.features, 1),
                 panels(chunk_rows, a.hidden_size, 1),
                 nullptr,
                 nullptr,
                 nullptr,
                 nullptr,
                 nullptr,
                 nullptr,
                 memory.take<ChunkBuffers<Real>>(split.row_groups),
                 memory.take<WeightGradients<Real>>(split.row_groups),
                 memory.take<BackwardRow<Real>>(split.unit_groups * a.batch),
                 barriers(split, memory)};
    const auto take_if = [&](bool wanted, int64_t count) {
      return wanted ? memory.take<Real>(count) : nullptr;
    };
    const auto packed = [&](bool wanted, const Panels &matrix) {
      return take_if(wanted && !matrix.in_place, matrix.size());
    };
    plan.packed_hh = packed(true, plan.hidden_panels);
    plan.packed_hr = packed(projected, plan.projection_panels);
    plan.packed_ih = packed(a.grad_x.data, plan.input_panels);
    plan.grad_m = take_if(projected, a.batch * a.hidden_size);
    plan.zoned_h = take_if(a.modifiers.zoneout_h.data, a.batch * a.features);
    plan.masked_h = take_if(a.modifiers.recurrent_mask.data, split.members() * a.features);
    const auto transposed = [&](int64_t width) {
      return divide_up(width, TILE_ROWS) * (chunk_rows * TILE_ROWS + kPadding);
    };
    for (int64_t group = 0; group < split.row_groups; ++group) {
      ChunkBuffers<Real> chunk = {};
      chunk.packed_x = take_if(a.grad_weight_ih, plan.x_panels.size());
      chunk.packed_h = take_if(a.grad_weight_hh, plan.h_panels.size());
      chunk.packed_m = take_if(a.grad_weight_hr, plan.m_panels.size());
      chunk.transposed = take_if(a.grad_weight_ih || a.grad_weight_hh, transposed(gates));
      chunk.transposed_h = take_if(a.grad_weight_hr, transposed(a.features));
      for (int parity = 0; parity < 2; ++parity) {
        chunk.gates[parity] = take_if(!a.grad_gates.data, chunk_rows * gates);
        chunk.whole_h[parity] =
            take_if(projected && !a.whole_grad_h.data, chunk_rows * a.features);
      }
      WeightGradients<Real> sums = {
          static_cast<Real *>(a.grad_weight_ih), static_cast<Real *>(a.grad_weight_hh),
          static_cast<Real *>(a.grad_bias_ih), static_cast<Real *>(a.grad_weight_hr)};
      if (group > 0) {
        sums = {take_if(sums.ih, gates * a.input_size), take_if(sums.hh, gates * a.features),
                take_if(sums.bias, gates), take_if(sums.hr, a.features * a.hidden_size)};
      }
      if (!memory.counting()) {
        plan.chunks[group] = chunk;
        plan.weights[group] = sums;
      }
    }
    if (!memory.counting()) {
      advise_rows<Real>(a.grad_gates, rows, gates);
      advise_rows<Real>(a.grad_x, rows, a.input_size);
      advise_huge_pages(a.grad_weight_ih, size_t(gates * a.input_size) * sizeof(Real));
      advise_huge_pages(a.grad_weight_hh, size_t(gates * a.features) * sizeof(Real));
    }
    return plan;
  }
};

template <class Real>
struct LayerNormForward {
  typedef LstmLayerNormForward Arguments;
  typedef LayerNormForwardPlan<Real> Plan;
  typedef LayerNormForwardMember<Real> Member;

  static Plan lay_out(const Arguments &a, const Split &split, Memory &memory) {
    ForwardPlan<Real> plain = Forward<Real>::lay_out(a, split, memory);
    plain.products = memory.take<Real>(a.batch * 4 * a.hidden_size);
    const Rows rows = rows_of(a, memory);
    if (!memory.counting()) advise_rows<Real>(a.normalized, rows, 4 * a.hidden_size);
    return {plain, LayerNorm<Real>(a), {a.normalized, rows.offsets}, {a.rstd, rows.offsets}};
  }
};

template <class Real>
struct LayerNormBackward {
  typedef LstmLayerNormBackward Arguments;
  typedef LayerNormBackwardPlan<Real> Plan;
  typedef LayerNormBackwardMember<Real> Member;

  static Plan lay_out(const Arguments &a, const Split &split, Memory &memory) {
    BackwardPlan<Real> plain = Backward<Real>::lay_out(a, split, memory);
    const Rows rows = rows_of(a, memory);
    plain.normalized = true;
    plain.grad_product = {a.grad_product, rows.offsets};
    if (!plain.projected) plain.grad_m = memory.take<Real>(a.batch * a.hidden_size);
    if (!memory.counting()) advise_rows<Real>(a.grad_product, rows, 4 * a.hidden_size);
    return {plain,
            LayerNorm<Real>(a),
            {a.normalized, rows.offsets},
            {a.rstd, rows.offsets},
            {a.grad_z, rows.offsets}};
  }
};

// Recurrences and the threads that run them.
template <class Direction>
struct Region {
  typename Direction::Plan *plans;
  Split *splits;
  int64_t count;
  int64_t threads;  // as planned
  bool short_of_threads;

  // One thread for one recurrence after another, or a team for each.
  void run_alone() const {
    for (int64_t i = 0; i < count; ++i) typename Direction::Member(plans[i], splits[i], 0).run();
  }
  void run(int64_t rank) const {
    for (int64_t i = 0; i < count; rank -= splits[i].members(), ++i) {
      if (rank < splits[i].members()) {
        typename Direction::Member(plans[i], splits[i], rank).run();
        return;
      }
    }
  }

  static void enter(void *data) {
    Region &region = *static_cast<Region *>(data);
    if (openmp.num_threads() == region.threads) {
      region.run(openmp.thread_num());
    } else if (openmp.thread_num() == 0) {
      region.short_of_threads = true;
    }
  }
};

template <class Direction, class Stored>
static int32_t run(const typename Direction::Arguments *arguments, int64_t count, int64_t threads,
                   Scratch &scratch) {
  if (threads < count) threads = 1;
  Memory counted;
  counted.take<Split>(count);
  counted.take<typename Direction::Plan>(count);
  int64_t members = 0;
  const auto split_of = [&](int64_t i) {
    return split_for<typename Direction::Arguments, Stored>(arguments[i], max(1, threads / count));
  };
  for (int64_t i = 0; i < count; ++i) {
    const Split split = split_of(i);
    Direction::lay_out(arguments[i], split, counted);
    members += split.members();
  }
  char *block = scratch.acquire(counted.used());
  if (!block) return kLstmOutOfMemory;
  Memory memory(block);
  Region<Direction> region = {};
  region.splits = memory.take<Split>(count);
  region.plans = memory.take<typename Direction::Plan>(count);
  region.count = count;
  // All threads or one: OpenMP ends those that a smaller team leaves over.
  region.threads = members == 1 ? 1 : threads;
  for (int64_t i = 0; i < count; ++i) {
    region.splits[i] = split_of(i);
    new (region.plans + i)
        typename Direction::Plan(Direction::lay_out(arguments[i], region.splits[i], memory));
  }
  if (region.threads == 1) {
    region.run_alone();
  } else {
    openmp.parallel(&Region<Direction>::enter, &region, unsigned(region.threads), 0);
    // A runtime may give fewer threads than it was asked for.
    if (region.short_of_threads) return run<Direction, Stored>(arguments, count, 1, scratch);
  }
  scratch.release();
  return kLstmOk;
}

#ifdef HAS_AVX512_BF16
static int32_t bfloat16_forward(const LstmForward *recurrences, int64_t count, int64_t threads,
                                Scratch &scratch) {
  return run<Forward<BFloat16>, BFloat16>(recurrences, count, threads, scratch);
}
#else
template <template <class> class Direction, class Arguments>
static int32_t run_dtype(const Arguments *arguments, int64_t count, int64_t dtype, int64_t threads,
                         Scratch &scratch) {
  switch (dtype) {
    case kLstmFloat32:
      return run<Direction<float>, float>(arguments, count, threads, scratch);
    case kLstmFloat64:
      return run<Direction<double>, double>(arguments, count, threads, scratch);
    default:
      return kLstmBadArgument;
  }
}

static int32_t forward(const LstmForward *recurrences, int64_t count, int64_t dtype,
                       int64_t threads, Scratch &scratch) {
  return run_dtype<Forward>(recurrences, count, dtype, threads, scratch);
}

static int32_t backward(const LstmBackward *recurrences, int64_t count, int64_t dtype,
                        int64_t threads, Scratch &scratch) {
  return run_dtype<Backward>(recurrences, count, dtype, threads, scratch);
}

static int32_t layer_norm_forward(const LstmLayerNormForward *recurrences, int64_t count,
                                  int64_t dtype, int64_t threads, Scratch &scratch) {
  return run_dtype<LayerNormForward>(recurrences, count, dtype, threads, scratch);
}

static int32_t layer_norm_backward(const LstmLayerNormBackward *recurrences, int64_t count,
                                   int64_t dtype, int64_t threads, Scratch &scratch) {
  return run_dtype<LayerNormBackward>(recurrences, count, dtype, threads, scratch);
}

// Add `count` numbers, float or double, to as many others.
static void add(void *sums, const void *others, int64_t count, int64_t dtype) {
  if (dtype == kLstmFloat32)
    add_to(static_cast<float *>(sums), static_cast<const float *>(others), count);
  else
    add_to(static_cast<double *>(sums), static_cast<const double *>(others), count);
}
#endif
