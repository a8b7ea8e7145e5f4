// From arguments to running threads. Included once per instruction set, after forward.h and
// backward.h.

// Rows first, because groups of rows never wait for each other; hidden units where there are too
// few rows, or where the weights would not fit into each core's cache.
template <class Arguments, class Real>
static Split split_for(const Arguments &a, int64_t threads) {
  const int64_t weights = 4 * a.hidden_size * a.features;
  const double step = 2.0 * double(a.batch) * 4.0 * double(a.hidden_size) *
                      double(a.features + a.input_size);
  const double read = kFlopsOfAWeight * 4.0 * double(a.hidden_size) *
                      double(a.features + a.input_size);
  const int64_t worth = int64_t((step * double(a.steps) + read) / kFlopsOfAThread);
  const int64_t most = max(1, min(threads, worth));
  const int64_t blocks = divide_up(a.hidden_size, Simd<Real>::kWidth);
  const int64_t row_groups = max(1, min(most, a.batch / kRowsOfAGroup));
  const int64_t worth_meeting =
      int64_t((step + read / double(a.steps)) / kFlopsOfAMeeting);
  const int64_t unit_groups = max(1, min(min(most, blocks), worth_meeting));
  // A single step reads each weight once: nobody should read it twice.
  if (a.steps > 1 && weights * int64_t(sizeof(Real)) <= kCachedWeights && row_groups > 1) {
    return {row_groups, max(1, min(most / row_groups, unit_groups))};
  }
  return {max(1, min(most / unit_groups, row_groups)), unit_groups};
}

static Timeline timeline_of(int64_t steps, int64_t batch, int64_t reverse,
                            const int64_t *batch_sizes, Memory &memory) {
  int64_t *offsets = batch_sizes ? memory.take<int64_t>(steps) : nullptr;
  int64_t rows = batch_sizes ? 0 : steps * batch;
  for (int64_t t = 0; batch_sizes && t < steps; ++t) {
    if (offsets) offsets[t] = rows;
    rows += batch_sizes[t];
  }
  return {steps, batch, rows, reverse != 0, batch_sizes, offsets};
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
static void advise_rows(const Sequence<Real> &rows, const Timeline &timeline, int64_t width) {
  if (rows.data) advise_huge_pages(rows.data, size_t(timeline.rows * width) * sizeof(Real));
}

template <class Real>
struct Forward {
  typedef LstmForward Arguments;
  typedef ForwardPlan<Real> Plan;
  typedef ForwardMember<Real> Member;

  static Plan lay_out(const Arguments &a, const Split &split, Memory &memory) {
    typedef Simd<Real> S;
    const int64_t blocks = divide_up(a.hidden_size, S::kWidth);
    const Timeline timeline = timeline_of(a.steps, a.batch, a.reverse, a.batch_sizes, memory);
    const Real *zero = zeros<Real>(max(a.hidden_size, a.features), memory);
    const bool projected = a.weight_hr != nullptr;
    const Panels projection = {a.hidden_size, a.features, S::kWidth,
                               Panels::wide_for(a.features, S::kWidth, split.unit_groups)};
    const int64_t tile = 4 * S::kWidth;
    const bool packed = timeline.rows >= kPackedRows;
    const bool packs_late = a.steps == 1;
    const int64_t panels = !packed ? 0 : packs_late ? split.members() : blocks;
    const int64_t staged = a.gates.data || !packed ? 0 : split.row_groups * blocks * kStagedRows;
    Plan plan = {&a,
                 timeline,
                 {a.gates, timeline.offsets},
                 {a.x, timeline.offsets},
                 {a.h, timeline.offsets},
                 {a.c, timeline.offsets},
                 {a.activations, timeline.offsets},
                 {a.h0, zero},
                 {a.c0, zero},
                 a.h_n,
                 a.c_n,
                 a.input_size,
                 a.hidden_size,
                 a.features,
                 projection,
                 packs_late,
                 packed ? memory.take<Real>(panels * (a.input_size + a.features) * tile) : nullptr,
                 memory.take<Real>(panels * tile),
                 projected ? memory.take<Real>(projection.size()) : nullptr,
                 projected ? memory.take<Real>(a.batch * a.hidden_size) : nullptr,
                 memory.take<Real>(staged * tile),
                 barriers(split, memory)};
    if (!memory.counting()) {
      advise_rows(plan.h, timeline, a.features);
      advise_rows(plan.c, timeline, a.hidden_size);
      advise_rows(plan.activations, timeline, 4 * a.hidden_size);
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
    const Timeline timeline = timeline_of(a.steps, a.batch, a.reverse, a.batch_sizes, memory);
    const Real *zero = zeros<Real>(max(a.hidden_size, a.features), memory);
    const bool projected = a.weight_hr != nullptr;
    const int64_t gates = 4 * a.hidden_size;
    const auto panels = [&](int64_t depth, int64_t width, int64_t members) {
      return Panels{depth, width, S::kWidth, Panels::wide_for(width, S::kWidth, members)};
    };
    // A chunk holds at least one step.
    const int64_t rows = max(kChunkRows, divide_up(a.batch, split.row_groups));
    Plan plan = {&a,
                 timeline,
                 {a.activations, timeline.offsets},
                 {a.c, timeline.offsets},
                 {a.x, timeline.offsets},
                 {a.h, timeline.offsets},
                 {a.grad_h, timeline.offsets},
                 {a.grad_c, timeline.offsets},
                 {a.grad_gates, timeline.offsets},
                 {a.whole_grad_h, timeline.offsets},
                 {a.grad_x, timeline.offsets},
                 {a.h0, zero},
                 {a.c0, zero},
                 {a.grad_h_n, zero},
                 {a.grad_c_n, zero},
                 a.grad_h0,
                 a.grad_c0,
                 a.input_size,
                 a.hidden_size,
                 a.features,
                 projected,
                 panels(gates, a.features, split.unit_groups),
                 panels(a.features, a.hidden_size, split.unit_groups),
                 panels(gates, a.input_size, 1),
                 panels(rows, a.input_size, 1),
                 panels(rows, a.features, 1),
                 panels(rows, a.hidden_size, 1),
                 nullptr,
                 nullptr,
                 nullptr,
                 nullptr,
                 memory.take<ChunkBuffers<Real>>(split.row_groups),
                 memory.take<WeightGradients<Real>>(split.row_groups),
                 barriers(split, memory)};
    const auto take_if = [&](bool wanted, int64_t count) {
      return wanted ? memory.take<Real>(count) : nullptr;
    };
    plan.packed_hh = memory.take<Real>(plan.hidden_panels.size());
    plan.packed_hr = take_if(projected, plan.projection_panels.size());
    plan.packed_ih = take_if(a.grad_x.data, plan.input_panels.size());
    plan.grad_m = take_if(projected, a.batch * a.hidden_size);
    const auto transposed = [&](int64_t width) {
      return divide_up(width, TILE_ROWS) * (rows * TILE_ROWS + kPadding);
    };
    for (int64_t group = 0; group < split.row_groups; ++group) {
      ChunkBuffers<Real> chunk = {};
      chunk.packed_x = take_if(a.grad_weight_ih, plan.x_panels.size());
      chunk.packed_h = take_if(a.grad_weight_hh, plan.h_panels.size());
      chunk.packed_m = take_if(a.grad_weight_hr, plan.m_panels.size());
      chunk.transposed = take_if(a.grad_weight_ih || a.grad_weight_hh, transposed(gates));
      chunk.transposed_h = take_if(a.grad_weight_hr, transposed(a.features));
      for (int parity = 0; parity < 2; ++parity) {
        chunk.gates[parity] = take_if(!a.grad_gates.data, rows * gates);
        chunk.whole_h[parity] = take_if(projected && !a.whole_grad_h.data, rows * a.features);
      }
      WeightGradients<Real> sums = {
          static_cast<Real *>(a.grad_weight_ih), static_cast<Real *>(a.grad_weight_hh),
          static_cast<Real *>(a.grad_bias), static_cast<Real *>(a.grad_weight_hr)};
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
      advise_rows(plan.grad_gates, timeline, gates);
      advise_rows(plan.grad_x, timeline, a.input_size);
    }
    return plan;
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

template <class Direction, class Real>
static int32_t run(const typename Direction::Arguments *arguments, int64_t count, int64_t threads,
                   Scratch &scratch) {
  if (threads < count) threads = 1;
  Memory counted;
  counted.take<Split>(count);
  counted.take<typename Direction::Plan>(count);
  int64_t members = 0;
  const auto split_of = [&](int64_t i) {
    return split_for<typename Direction::Arguments, Real>(arguments[i], max(1, threads / count));
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
    if (region.short_of_threads) return run<Direction, Real>(arguments, count, 1, scratch);
  }
  scratch.release();
  return kLstmOk;
}

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
