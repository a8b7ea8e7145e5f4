// A SIMT machine on one thread of the host: CUDA kernels, compiled as plain C++, run in it.
//
// Every CUDA thread is a fiber (a stack of its own, switched to by hand). A fiber runs until it has
// to wait: for the other lanes of its warp, at a barrier, for an mbarrier's phase, for another
// block's flag. Which of the fibers that can go on does so is the schedule's choice, so that each
// schedule is another legal order of events. What the hardware does "some time later" (asynchronous
// copies, stores into another block's shared memory, stores that other blocks see only once they
// are released) happens at once, at random moments or as late as possible, as the options say.
//
// Everything that a kernel must not do, and that can be seen, ends the run with an error that says
// what, who and where. docs/emulator.md has the list, and what cannot be seen.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__x86_64__) && defined(__linux__) && !defined(SIMT_PORTABLE)
#define SIMT_SWITCH_BY_HAND 1
#else
#define SIMT_SWITCH_BY_HAND 0
#include <ucontext.h>
#endif

namespace simt {

constexpr unsigned WARP = 32;
constexpr unsigned MAX_BARRIERS = 16;
constexpr unsigned MAX_CLUSTER = 16;
constexpr size_t MAX_SHARED_BYTES = 227 * 1024;

// ---- what the host says and hears; the same bytes as the structures of emulator.py

enum Schedule : int {
  FIFO,      // who has waited longest goes on
  RANDOM,    // anyone, and now and then in the middle of what they do
  LIFO,      // who came last goes on: some threads run far ahead of others
  PRIORITY,  // the warp of highest priority; priorities are drawn anew now and then
};

// When what is asynchronous happens.
enum Asynchrony : int { EAGER, SOMETIMES, LATE };

struct Options {
  int schedule;
  int asynchrony;
  unsigned seed;
  // How many blocks of a cooperative launch run at the same time; 0: all of them.
  unsigned max_resident_blocks;
};

struct Statistics {
  long long switches;
  long long barriers;
  long long multiplications;
  long long matrix_loads;
  long long bank_conflicts;
  long long copies;
  long long remote_stores;
  long long releases;
};

// What a kernel may do with a range of global memory.
enum Access : int {
  READ_ONLY,  // loads
  WRITABLE,   // stores
  EXCHANGE,   // stores, and loads from the L2 cache: other blocks' stores are seen once released
  FLAGS,      // store_release and wait_acquire
};

struct Range {
  uint64_t address;
  uint64_t bytes;
  int access;
  const char* name;
};

// A launch: `blocks` of them, in clusters; `cooperative`: all at the same time, as far as they fit.
struct Launch {
  unsigned blocks;
  unsigned threads;
  unsigned cluster;
  size_t shared_bytes;
  bool cooperative;
  std::vector<Range> ranges;  // all that may be accessed; none: everything may
};

// Where in the kernel's source something happens: as a default argument, the place of the call.
struct Site {
  const char* file;
  int line;
  static Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return Site{file, line};
  }
  bool operator==(const Site& other) const {
    return line == other.line && (file == other.file || !strcmp(file, other.file));
  }
  bool operator!=(const Site& other) const { return !(*this == other); }
  std::string text() const {
    const char* slash = strrchr(file, '/');
    return std::string(slash ? slash + 1 : file) + ":" + std::to_string(line);
  }
};

// ---- fibers

#if SIMT_SWITCH_BY_HAND

// Keeps what the calling convention says a call keeps, and goes on where the other one stopped.
extern "C" __attribute__((visibility("hidden"))) void simt_switch(void** save, void* load);
asm(R"(.text
.p2align 4
.globl simt_switch
.hidden simt_switch
.type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, . - simt_switch
)");

struct Context {
  void* stack_pointer = nullptr;

  void prepare(unsigned char* stack, size_t bytes, void (*entry)()) {
    void** top = (void**)(stack + bytes);
    *--top = nullptr;  // where `entry` would return to
    *--top = (void*)entry;
    for (int saved_registers = 0; saved_registers < 6; saved_registers++) *--top = nullptr;
    stack_pointer = top;
  }
  static void change(Context& from, Context& to) {
    simt_switch(&from.stack_pointer, to.stack_pointer);
  }
};

#else

struct Context {
  ucontext_t context;

  void prepare(unsigned char* stack, size_t bytes, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = bytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  static void change(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
};

#endif

// Stacks for fibers, kept from launch to launch. The lowest page of each is not accessible, so that
// an overflow is a crash, not another fiber's wrong result.
class Stacks {
 public:
  static constexpr size_t BYTES = 128 << 10;

  unsigned char* get(size_t count) {
    if (count > count_) allocate(count);
    return memory_;
  }

 private:
  unsigned char* memory_ = nullptr;
  size_t count_ = 0;

  void allocate(size_t count) {
    if (memory_) munmap(memory_, count_ * BYTES);
    void* memory = mmap(nullptr, count * BYTES, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    memory_ = nullptr;
    count_ = 0;
    if (memory == MAP_FAILED) throw std::runtime_error("no memory for the stacks of the threads");
    memory_ = (unsigned char*)memory;
    count_ = count;
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    for (size_t i = 0; i < count; i++) mprotect(memory_ + i * BYTES, page, PROT_NONE);
  }
};

// ---- the machine's parts

struct Block;
struct Cluster;

// A copy from global to shared memory under way.
struct Copy {
  uint32_t offset;
  unsigned char bytes[16];
};

struct Thread {
  Context context;
  Block* block = nullptr;
  unsigned index = 0;  // in the block
  const char* doing = "starting";
  Site site{"", 0};
  bool exited = false;
  uint32_t priority = 0;
  std::deque<std::vector<Copy>> committed_copies;
  std::vector<Copy> open_copies;

  unsigned warp() const { return index / WARP; }
  unsigned lane() const { return index % WARP; }
};

// Where lanes meet, to do something together.
struct Warp {
  unsigned arrived = 0;
  const char* doing = nullptr;
  Site site{"", 0};
  void* arguments[WARP];
  Thread* lanes[WARP];
};

struct Barrier {
  unsigned arrived = 0;
  unsigned expected = 0;
  std::vector<Thread*> waiting;
  // Of each warp that has come, where: its lanes must come from the same place.
  std::map<std::pair<Block*, unsigned>, Site> sites;
};

struct Mbarrier {
  unsigned arrivals;  // that end a phase
  unsigned missing;   // arrivals in this phase
  int64_t bytes = 0;  // expected in this phase, less those that have come
  unsigned phase = 0;
  bool fenced = false;  // whether other blocks may know of it
  std::vector<Thread*> waiting;
};

// What is known of a byte of shared memory.
enum ByteState : unsigned char { UNWRITTEN, VALID, IN_FLIGHT };

struct Block {
  unsigned index = 0;  // in the grid
  unsigned rank = 0;   // in the cluster
  unsigned running = 0;
  unsigned stores_from_peers = 0;  // in flight
  unsigned stores_to_peers = 0;
  Cluster* cluster = nullptr;
  std::vector<unsigned char> shared;
  std::vector<unsigned char> states;
  std::vector<Warp> warps;
  Barrier barriers[MAX_BARRIERS];
  std::map<uint32_t, Mbarrier> mbarriers;
};

struct Cluster {
  std::vector<Block*> blocks;
  Barrier barrier;
};

// 16 bytes on their way into a block's shared memory, and to its mbarrier.
struct RemoteStore {
  Block* from;
  Block* block;
  uint32_t offset;
  unsigned char bytes[16];
  uint32_t mbarrier;
};

// A store into the exchange area which only its own block sees so far.
struct BufferedStore {
  Thread* thread;
  uint64_t warps;  // of the block, that have met the thread at a barrier since
  unsigned char* address;
  unsigned size;
  unsigned char bytes[16];

  bool overlaps(const void* other, unsigned bytes_of_other) const {
    const unsigned char* begin = (const unsigned char*)other;
    return address < begin + bytes_of_other && begin < address + size;
  }
};

// Small and quick; drawn from at every choice.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15ull + 0x1234567ull) {
    for (int i = 0; i < 4; i++) next();
  }
  uint32_t next() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return (uint32_t)(state_ >> 32);
  }
  uint32_t below(size_t count) { return (uint32_t)(((uint64_t)next() * count) >> 32); }
  bool one_in(uint32_t count) { return below(count) == 0; }

 private:
  uint64_t state_;
};

// Shared-memory addresses: an own one is BASE + offset (BASE is not 0, so that a forgotten base is
// out of bounds); one of the cluster has a bit of its own and the rank besides.
constexpr uint32_t SHARED_BASE = 1024;
constexpr uint32_t CLUSTER_BIT = 1u << 24;
constexpr unsigned RANK_SHIFT = 18;
constexpr uint32_t OFFSET_MASK = (1u << RANK_SHIFT) - 1;
static_assert(SHARED_BASE + MAX_SHARED_BYTES <= OFFSET_MASK, "offsets do not fit");

class Machine;
inline Machine*& current_machine() {
  static Machine* machine = nullptr;
  return machine;
}

// ---- the machine: some blocks that are resident at the same time, and their threads

class Machine {
 public:
  Statistics statistics{};
  const Options options;
  const Launch& launch;
  Random random;

  Machine(const Launch& l, const Options& o, unsigned first_block, unsigned blocks,
          const std::function<void()>& body, Stacks& stacks)
      : options(o), launch(l), random(o.seed * 1000003ull + first_block), body_(body) {
    blocks_.resize(blocks);
    clusters_.resize(blocks / launch.cluster);
    threads_.resize((size_t)blocks * launch.threads);
    unsigned char* stack = stacks.get(threads_.size());
    for (unsigned i = 0; i < blocks; i++) {
      start_block(blocks_[i], first_block, i, stack + (size_t)i * launch.threads * Stacks::BYTES);
    }
    draw_priorities();
    running_ = threads_.size();
  }

  // Until every thread has returned. Throws what went wrong.
  void run() {
    current_machine() = this;
    current_ = next_thread();
    Context::change(host_, current_->context);
    current_machine() = nullptr;
    if (!error_.empty()) throw std::runtime_error(error_);
    while (!buffered_.empty()) write_buffered(0);
  }

  Thread& thread() { return *current_; }
  Block& block() { return *current_->block; }

  // ---- errors

  [[noreturn]] void fail(const std::string& what) {
    error_ = what;
    Context abandoned;
    Context::change(abandoned, host_);
    abort();
  }

  // An error of the current thread.
  [[noreturn]] void fail_at(const Site& site, const std::string& what) {
    fail(name(*current_) + " at " + site.text() + ": " + what);
  }

  static std::string name(const Thread& thread) {
    return "block " + std::to_string(thread.block->index) + " warp " +
           std::to_string(thread.warp()) + " thread " + std::to_string(thread.index);
  }

  // ---- waiting

  // The current thread stops here, until something that knows of it makes it ready.
  void wait(const char* doing, const Site& site) {
    Thread& me = *current_;
    me.doing = doing;
    me.site = site;
    Thread* next = next_thread();
    if (!next) fail("deadlock: no thread can go on\n" + waiting_threads());
    if (next == &me) return;
    current_ = next;
    statistics.switches++;
    Context::change(me.context, next->context);
  }

  void make_ready(Thread* thread) {
    ready_.push_back(thread);
    if (options.schedule == PRIORITY) std::push_heap(ready_.begin(), ready_.end(), is_below);
  }

  // Lets others go first, if the schedule is one that does so: at points where a thread need not
  // wait, but where another might be quicker on the hardware.
  void perhaps_others_first(const char* doing, const Site& site) {
    if (options.schedule != RANDOM || !random.one_in(64)) return;
    make_ready(current_);
    wait(doing, site);
  }

  // All 32 lanes meet here; the last to come does `work` on the arguments of all.
  template <class Arguments, class Work>
  void warp_together(Arguments& arguments, Work work, const char* doing, const Site& site) {
    Warp& warp = block().warps[current_->warp()];
    if (warp.arrived && (warp.site != site || warp.doing != doing)) {
      fail_at(site, std::string("divergent warp: this lane is at ") + doing + ", others at " +
                        warp.doing + " (" + warp.site.text() + ")");
    }
    warp.doing = doing;
    warp.site = site;
    warp.arguments[current_->lane()] = &arguments;
    warp.lanes[current_->lane()] = current_;
    if (++warp.arrived < WARP) return wait(doing, site);
    warp.arrived = 0;
    work((Arguments**)warp.arguments);
    for (Thread* lane : warp.lanes) {
      if (lane != current_) make_ready(lane);
    }
  }

  // `expected` threads meet at a barrier.
  void meet(Barrier& barrier, unsigned expected, const char* doing, const Site& site) {
    check_arrival(barrier, expected, doing, site);
    if (++barrier.arrived < expected) {
      barrier.waiting.push_back(current_);
      return wait(doing, site);
    }
    statistics.barriers++;
    order_stores_of(barrier);
    barrier.arrived = 0;
    barrier.sites.clear();
    std::vector<Thread*> waiting;
    waiting.swap(barrier.waiting);
    for (Thread* thread : waiting) make_ready(thread);
    // Who comes last is not always the first to go on.
    if (options.schedule == FIFO) return;
    make_ready(current_);
    wait(doing, site);
  }

  // ---- shared memory

  // Where in its block's shared memory an address is. `own` only: not one of the cluster.
  struct Place {
    Block* block;
    uint32_t offset;
    unsigned char* bytes() const { return block->shared.data() + offset; }
    unsigned char* states() const { return block->states.data() + offset; }
  };

  Place own_place(uint32_t address, unsigned bytes, const Site& site) {
    if (address & CLUSTER_BIT) {
      fail_at(site, "an address of the cluster where one of the own block is needed");
    }
    return place_in(block(), address, bytes, site);
  }

  Place cluster_place(uint32_t address, unsigned bytes, const Site& site) {
    if (!(address & CLUSTER_BIT)) {
      fail_at(site, "an address of the own block where one of the cluster is needed");
    }
    const unsigned rank = (address & ~CLUSTER_BIT) >> RANK_SHIFT;
    Block& peer = *block().cluster->blocks[rank];
    if (!peer.running) {
      fail_at(site, "store into the shared memory of block " + std::to_string(peer.index) +
                        ", which has exited");
    }
    return place_in(peer, address & OFFSET_MASK, bytes, site);
  }

  uint32_t map_shared(uint32_t address, uint32_t rank, const Site& site) {
    own_place(address, 1, site);
    if (rank >= launch.cluster) {
      fail_at(site, "no block of rank " + std::to_string(rank) + " in a cluster of " +
                        std::to_string(launch.cluster));
    }
    return CLUSTER_BIT | rank << RANK_SHIFT | address;
  }

  void read_shared(uint32_t address, void* value, unsigned bytes, const Site& site) {
    perhaps_others_first("reading shared memory", site);
    memcpy(value, readable(address, bytes, site), bytes);
  }

  // The bytes to read, checked.
  const unsigned char* readable(uint32_t address, unsigned bytes, const Site& site) {
    const Place place = own_place(address, bytes, site);
    for (unsigned i = 0; i < bytes; i++) {
      const unsigned char state = place.states()[i];
      if (state == VALID) continue;
      fail_at(site, std::string("read of shared memory that ") +
                        (state == UNWRITTEN ? "nobody has written: " : "is being written: ") +
                        describe(place, i));
    }
    return place.bytes();
  }

  void write_shared(uint32_t address, const void* value, unsigned bytes, const Site& site) {
    perhaps_others_first("writing shared memory", site);
    const Place place = own_place(address, bytes, site);
    check_not_in_flight(place, bytes, site);
    memcpy(place.bytes(), value, bytes);
    memset(place.states(), VALID, bytes);
  }

  // ---- asynchronous copies

  // `from` is null for zeros. The source is read at once: no one may write it.
  void start_copy(uint32_t to, const void* from, const Site& site) {
    statistics.copies++;
    const Place place = own_place(to, 16, site);
    check_not_in_flight(place, 16, site);
    Copy copy{place.offset, {}};
    if (from) memcpy(copy.bytes, from, 16);
    // Under way until its wait, even if the bytes are there already: nobody may count on either.
    memset(place.states(), IN_FLIGHT, 16);
    if (happens_now()) memcpy(place.bytes(), copy.bytes, 16);
    current_->open_copies.push_back(copy);
  }

  void commit_copies() {
    current_->committed_copies.push_back(std::move(current_->open_copies));
    current_->open_copies.clear();
  }

  void wait_copies(size_t pending) {
    Thread& me = *current_;
    while (me.committed_copies.size() > pending) {
      for (const Copy& copy : me.committed_copies.front()) {
        memcpy(me.block->shared.data() + copy.offset, copy.bytes, 16);
        memset(me.block->states.data() + copy.offset, VALID, 16);
      }
      me.committed_copies.pop_front();
    }
  }

  // ---- mbarriers

  void init_mbarrier(uint32_t address, unsigned arrivals, const Site& site) {
    const Place place = own_place(address, 8, site);
    check_not_in_flight(place, 8, site);
    if (!arrivals || arrivals >= 1u << 20) fail_at(site, "mbarrier of no or too many arrivals");
    if (block().mbarriers.count(place.offset)) fail_at(site, "mbarrier initialised twice");
    Mbarrier& mbarrier = block().mbarriers[place.offset];
    mbarrier.arrivals = mbarrier.missing = arrivals;
  }

  void fence_mbarriers() {
    for (auto& entry : block().mbarriers) entry.second.fenced = true;
  }

  void arrive(uint32_t address, unsigned expected_bytes, const Site& site) {
    perhaps_others_first("arriving at an mbarrier", site);
    Mbarrier& mbarrier = find_mbarrier(own_place(address, 8, site), site);
    if (!mbarrier.missing) fail_at(site, "more arrivals at an mbarrier than its phase takes");
    mbarrier.bytes += expected_bytes;
    mbarrier.missing--;
    end_phase_if_complete(mbarrier);
  }

  void wait_mbarrier(uint32_t address, unsigned parity, const Site& site) {
    perhaps_others_first("waiting for an mbarrier", site);
    Mbarrier& mbarrier = find_mbarrier(own_place(address, 8, site), site);
    while ((mbarrier.phase & 1) == parity) {
      mbarrier.waiting.push_back(current_);
      wait("waiting for an mbarrier", site);
    }
  }

  // ---- stores into a peer's shared memory

  void store_remote(uint32_t to, const void* value, uint32_t mbarrier_address, const Site& site) {
    perhaps_others_first("storing to a peer", site);
    const Place place = cluster_place(to, 16, site);
    const Place mbarrier_place = cluster_place(mbarrier_address, 8, site);
    if (place.block != mbarrier_place.block) {
      fail_at(site, "data and mbarrier of a remote store are in different blocks");
    }
    if (!find_mbarrier(mbarrier_place, site).fenced) {
      fail_at(site, "remote store to an mbarrier without mbarrier_init_fence");
    }
    check_not_in_flight(place, 16, site);
    statistics.remote_stores++;
    RemoteStore store{current_->block, place.block, place.offset, {}, mbarrier_place.offset};
    memcpy(store.bytes, value, 16);
    // From here on no one can say which value a reader would see.
    memset(place.states(), IN_FLIGHT, 16);
    place.block->stores_from_peers++;
    block().stores_to_peers++;
    if (options.asynchrony == EAGER) {
      land(store);
    } else {
      in_flight_.push_back(store);
    }
  }

  // ---- global memory

  void check_alignment(const void* pointer, unsigned bytes, const char* verb, const Site& site) {
    const uint64_t address = (uint64_t)(uintptr_t)pointer;
    if (address % bytes) {
      fail_at(site, std::string("misaligned ") + verb + " of " + std::to_string(bytes) +
                        " bytes at global address " + hexadecimal(address));
    }
  }

  // Null if everything may be accessed.
  const Range* check_global(const void* pointer, unsigned bytes, const char* verb,
                            const Site& site) {
    check_alignment(pointer, bytes, verb, site);
    const uint64_t address = (uint64_t)(uintptr_t)pointer;
    for (const Range& range : launch.ranges) {
      if (address >= range.address && address + bytes <= range.address + range.bytes) return &range;
    }
    if (launch.ranges.empty()) return nullptr;
    fail_at(site, std::string(verb) + " of " + std::to_string(bytes) +
                      " bytes out of bounds at global address " + hexadecimal(address) + " (" +
                      nearest_range(address) + ")");
  }

  // What nobody writes while the kernel runs.
  const void* readable_global(const void* pointer, unsigned bytes, const Site& site) {
    const Range* range = check_global(pointer, bytes, "load", site);
    if (range && range->access != READ_ONLY) {
      fail_at(site, std::string("load of ") + range->name +
                        ", which this kernel may write, as if nobody wrote it");
    }
    return pointer;
  }

  void read_exchange(const void* pointer, void* value, unsigned bytes, const Site& site) {
    perhaps_others_first("reading what others wrote", site);
    const Range* range = check_global(pointer, bytes, "load", site);
    if (range && range->access == FLAGS) {
      fail_at(site, "flags are read by wait_acquire alone");
    }
    memcpy(value, pointer, bytes);
    for (const BufferedStore& store : buffered_) {
      if (store.thread->block != current_->block || !store.overlaps(pointer, bytes)) continue;
      overlay(store, (const unsigned char*)pointer, (unsigned char*)value, bytes);
    }
  }

  void write_global(void* pointer, const void* value, unsigned bytes, const Site& site) {
    perhaps_others_first("writing global memory", site);
    const Range* range = check_global(pointer, bytes, "store", site);
    if (range && range->access != WRITABLE && range->access != EXCHANGE) {
      const char* use = range->access == FLAGS ? "for store_release" : "read only";
      fail_at(site, std::string("store to ") + range->name + ", which is " + use);
    }
    if (range && range->access == EXCHANGE && options.asynchrony != EAGER) {
      buffer_store((unsigned char*)pointer, value, bytes);
    } else {
      memcpy(pointer, value, bytes);
    }
  }

  // The thread's own stores, and those of its block's threads that it has met at a barrier since,
  // are seen by all before the flag is.
  void release(uint32_t* flag, uint32_t value, const Site& site) {
    perhaps_others_first("releasing", site);
    check_flag(flag, site);
    statistics.releases++;
    for (size_t i = 0; i < buffered_.size();) {
      if (is_known(buffered_[i], *current_)) {
        write_buffered(i);
      } else {
        i++;
      }
    }
    if ((int32_t)(value - *flag) < 0) fail_at(site, "a flag that others wait for goes down");
    *flag = value;
    std::vector<Thread*> waiting;
    waiting.swap(flag_waiters_);
    for (Thread* thread : waiting) make_ready(thread);
  }

  void acquire(const uint32_t* flag, uint32_t value, const Site& site) {
    perhaps_others_first("acquiring", site);
    check_flag(flag, site);
    while ((int32_t)(*flag - value) < 0) {
      flag_waiters_.push_back(current_);
      wait("waiting for a flag", site);
    }
  }

  // The lanes of the current warp have met: each now knows of the others' stores.
  void order_stores_of_warp() {
    for (BufferedStore& store : buffered_) {
      order_store(store, current_->block, 1ull << current_->warp());
    }
  }

 private:
  const std::function<void()>& body_;
  std::vector<Block> blocks_;
  std::vector<Cluster> clusters_;
  std::vector<Thread> threads_;
  std::deque<Thread*> ready_;
  std::vector<Thread*> flag_waiters_;
  std::vector<RemoteStore> in_flight_;
  std::vector<BufferedStore> buffered_;
  Context host_;
  Thread* current_ = nullptr;
  size_t running_ = 0;
  std::string error_;

  // ---- starting and ending

  void start_block(Block& block, unsigned first_block, unsigned i, unsigned char* stack) {
    block.index = first_block + i;
    block.rank = i % launch.cluster;
    block.running = launch.threads;
    block.cluster = &clusters_[i / launch.cluster];
    block.cluster->blocks.push_back(&block);
    // NaN in every floating type: what is read too early does not look like a number.
    block.shared.assign(launch.shared_bytes, 0xff);
    block.states.assign(launch.shared_bytes, UNWRITTEN);
    block.warps.resize(launch.threads / WARP);
    for (unsigned t = 0; t < launch.threads; t++) {
      Thread& thread = threads_[(size_t)i * launch.threads + t];
      thread.block = &block;
      thread.index = t;
      thread.context.prepare(stack + (size_t)t * Stacks::BYTES, Stacks::BYTES, run_thread);
      ready_.push_back(&thread);
    }
  }

  static void run_thread() {
    Machine& machine = *current_machine();
    machine.body_();
    machine.exit_thread();
  }

  [[noreturn]] void exit_thread() {
    Thread& me = *current_;
    me.exited = true;
    if (--me.block->running == 0) check_exit(*me.block);
    if (--running_ == 0) {
      Context::change(me.context, host_);
      abort();
    }
    Thread* next = next_thread();
    if (!next) fail("deadlock: some threads have exited, no other can go on\n" + waiting_threads());
    current_ = next;
    Context::change(me.context, next->context);
    abort();
  }

  // What a block sends, and what others send it, must have come before it may exit.
  void check_exit(Block& block) {
    const std::string exits = "block " + std::to_string(block.index) + " exits ";
    if (block.stores_from_peers) fail(exits + "with remote stores to it in flight");
    if (block.stores_to_peers) fail(exits + "with its remote stores in flight");
    for (auto& entry : block.mbarriers) {
      const Mbarrier& mbarrier = entry.second;
      if (mbarrier.bytes) {
        fail(exits + "with " + std::to_string(mbarrier.bytes) +
             " bytes expected at an mbarrier that have not come (negative: not expected)");
      }
    }
  }

  // ---- choosing

  bool happens_now() {
    return options.asynchrony == EAGER || (options.asynchrony == SOMETIMES && random.one_in(2));
  }

  // Null if no thread can go on.
  Thread* next_thread() {
    if (options.asynchrony == SOMETIMES) something_lands_perhaps();
    while (ready_.empty()) {
      if (!land_one()) return nullptr;
    }
    if (options.schedule == FIFO) {
      Thread* oldest = ready_.front();
      ready_.pop_front();
      return oldest;
    }
    if (options.schedule == RANDOM) {
      std::swap(ready_[random.below(ready_.size())], ready_.back());
    } else if (options.schedule == PRIORITY) {
      if (random.one_in(2048)) draw_priorities();
      std::pop_heap(ready_.begin(), ready_.end(), is_below);
    }
    Thread* chosen = ready_.back();
    ready_.pop_back();
    return chosen;
  }

  // By schedule PRIORITY ready_ is a heap of this order.
  static bool is_below(const Thread* a, const Thread* b) { return a->priority < b->priority; }

  void draw_priorities() {
    for (size_t i = 0; i < threads_.size(); i++) {
      threads_[i].priority = i % WARP ? threads_[i - 1].priority : random.next();
    }
    if (options.schedule == PRIORITY) std::make_heap(ready_.begin(), ready_.end(), is_below);
  }

  // ---- what happens some time later

  void something_lands_perhaps() {
    if (!in_flight_.empty() && random.one_in(64)) land_one();
    if (!buffered_.empty() && random.one_in(64)) write_buffered(random.below(buffered_.size()));
  }

  bool land_one() {
    if (in_flight_.empty()) return false;
    std::swap(in_flight_[random.below(in_flight_.size())], in_flight_.back());
    const RemoteStore store = in_flight_.back();
    in_flight_.pop_back();
    land(store);
    return true;
  }

  void land(const RemoteStore& store) {
    Block& block = *store.block;
    memcpy(block.shared.data() + store.offset, store.bytes, 16);
    memset(block.states.data() + store.offset, VALID, 16);
    block.stores_from_peers--;
    store.from->stores_to_peers--;
    Mbarrier& mbarrier = block.mbarriers.at(store.mbarrier);
    mbarrier.bytes -= 16;
    end_phase_if_complete(mbarrier);
  }

  void end_phase_if_complete(Mbarrier& mbarrier) {
    if (mbarrier.missing || mbarrier.bytes) return;
    mbarrier.missing = mbarrier.arrivals;
    mbarrier.phase++;
    std::vector<Thread*> waiting;
    waiting.swap(mbarrier.waiting);
    for (Thread* thread : waiting) make_ready(thread);
  }

  void buffer_store(unsigned char* address, const void* value, unsigned bytes) {
    // Stores to one place become visible in their order.
    for (size_t i = 0; i < buffered_.size();) {
      if (buffered_[i].overlaps(address, bytes)) {
        write_buffered(i);
      } else {
        i++;
      }
    }
    BufferedStore store{current_, 0, address, bytes, {}};
    memcpy(store.bytes, value, bytes);
    buffered_.push_back(store);
  }

  void write_buffered(size_t i) {
    memcpy(buffered_[i].address, buffered_[i].bytes, buffered_[i].size);
    buffered_.erase(buffered_.begin() + (ptrdiff_t)i);
  }

  static void overlay(const BufferedStore& store, const unsigned char* pointer,
                      unsigned char* value, unsigned bytes) {
    for (unsigned i = 0; i < bytes; i++) {
      if (pointer + i >= store.address && pointer + i < store.address + store.size) {
        value[i] = store.bytes[pointer + i - store.address];
      }
    }
  }

  // ---- which stores a thread knows of: its own, and those that came before a barrier it passed

  static bool is_known(const BufferedStore& store, const Thread& thread) {
    if (store.thread == &thread) return true;
    return store.thread->block == thread.block && (store.warps >> thread.warp() & 1);
  }

  static void order_store(BufferedStore& store, const Block* block, uint64_t warps) {
    if (store.thread->block != block) return;
    const uint64_t know_already = store.warps | 1ull << store.thread->warp();
    if (know_already & warps) store.warps |= warps;
  }

  void order_stores_of(const Barrier& barrier) {
    if (buffered_.empty()) return;
    std::map<Block*, uint64_t> warps;
    for (const auto& entry : barrier.sites) warps[entry.first.first] |= 1ull << entry.first.second;
    for (BufferedStore& store : buffered_) {
      for (const auto& entry : warps) order_store(store, entry.first, entry.second);
    }
  }

  // ---- checks

  void check_arrival(Barrier& barrier, unsigned expected, const char* doing, const Site& site) {
    if (!expected || expected % WARP) {
      fail_at(site, "a barrier of " + std::to_string(expected) + " threads, not whole warps");
    }
    if (barrier.arrived && barrier.expected != expected) {
      fail_at(site, std::string(doing) + ": expects " + std::to_string(expected) +
                        " threads where others expect " + std::to_string(barrier.expected));
    }
    barrier.expected = expected;
    const auto warp = std::make_pair(current_->block, current_->warp());
    const auto found = barrier.sites.emplace(warp, site);
    if (!found.second && found.first->second != site) {
      fail_at(site, std::string("divergent warp: its lanes come to the same barrier here and at ") +
                        found.first->second.text());
    }
  }

  Place place_in(Block& block, uint32_t address, unsigned bytes, const Site& site) {
    const int64_t offset = (int64_t)address - SHARED_BASE;
    if (offset % bytes) {
      fail_at(site, "misaligned access of " + std::to_string(bytes) +
                        " bytes at offset " + std::to_string(offset) + " of shared memory");
    }
    if (offset < 0 || offset + bytes > (int64_t)block.shared.size()) {
      fail_at(site, "shared memory out of bounds: " + std::to_string(bytes) + " bytes at offset " +
                        std::to_string(offset) + " of " + std::to_string(block.shared.size()));
    }
    return Place{&block, (uint32_t)offset};
  }

  void check_not_in_flight(const Place& place, unsigned bytes, const Site& site) {
    for (unsigned i = 0; i < bytes; i++) {
      if (place.states()[i] != IN_FLIGHT) continue;
      fail_at(site, "write to shared memory that is being written: " + describe(place, i));
    }
  }

  static std::string describe(const Place& place, unsigned i) {
    return "offset " + std::to_string(place.offset + i) + " of block " +
           std::to_string(place.block->index);
  }

  Mbarrier& find_mbarrier(const Place& place, const Site& site) {
    const auto found = place.block->mbarriers.find(place.offset);
    if (found == place.block->mbarriers.end()) {
      fail_at(site, "no mbarrier has been initialised at " + describe(place, 0));
    }
    return found->second;
  }

  void check_flag(const void* flag, const Site& site) {
    const Range* range = check_global(flag, 4, "flag", site);
    if (range && range->access != FLAGS) {
      fail_at(site, std::string(range->name) + " used as a flag");
    }
  }

  // ---- texts

  static std::string hexadecimal(uint64_t number) {
    char text[32];
    snprintf(text, sizeof text, "0x%llx", (unsigned long long)number);
    return text;
  }

  std::string nearest_range(uint64_t address) const {
    const Range* nearest = nullptr;
    uint64_t least = UINT64_MAX;
    for (const Range& range : launch.ranges) {
      const uint64_t distance = address < range.address ? range.address - address
                                : address >= range.address + range.bytes
                                    ? address - (range.address + range.bytes)
                                    : 0;
      if (distance < least) nearest = &range, least = distance;
    }
    std::string where = " bytes before ";
    if (address >= nearest->address) {
      const int64_t to_end = (int64_t)(nearest->address + nearest->bytes - address);
      where = to_end > 0 ? " bytes before the end of " : " bytes after the end of ";
      least = (uint64_t)std::abs(to_end);
    }
    return std::to_string(least) + where + nearest->name + ", which has " +
           std::to_string(nearest->bytes) + " bytes at " + hexadecimal(nearest->address);
  }

  // Who waits where: a line for each warp and place.
  std::string waiting_threads() const {
    std::map<std::string, int> counts;
    std::vector<std::string> order;
    for (const Thread& thread : threads_) {
      if (thread.exited) continue;
      const std::string place = "  block " + std::to_string(thread.block->index) + " warp " +
                                std::to_string(thread.warp()) + ": " + thread.doing +
                                (thread.site.line ? " at " + thread.site.text() : "");
      if (!counts[place]++) order.push_back(place);
    }
    constexpr size_t MOST = 40;
    std::string text;
    for (size_t i = 0; i < order.size() && i < MOST; i++) {
      text += order[i] + ", " + std::to_string(counts[order[i]]) + " threads\n";
    }
    if (order.size() > MOST) text += "  and " + std::to_string(order.size() - MOST) + " more\n";
    return text;
  }
};

inline Machine& machine() { return *current_machine(); }

inline void add(Statistics& total, const Statistics& part) {
  total.switches += part.switches;
  total.barriers += part.barriers;
  total.multiplications += part.multiplications;
  total.matrix_loads += part.matrix_loads;
  total.bank_conflicts += part.bank_conflicts;
  total.copies += part.copies;
  total.remote_stores += part.remote_stores;
  total.releases += part.releases;
}

inline void check_launch(const Launch& launch) {
  if (!launch.threads || launch.threads % WARP || launch.threads > 1024) {
    throw std::runtime_error("a block of " + std::to_string(launch.threads) + " threads");
  }
  if (!launch.cluster || launch.cluster > MAX_CLUSTER || launch.blocks % launch.cluster) {
    throw std::runtime_error(std::to_string(launch.blocks) + " blocks in clusters of " +
                             std::to_string(launch.cluster));
  }
  if (launch.shared_bytes > MAX_SHARED_BYTES) {
    throw std::runtime_error(std::to_string(launch.shared_bytes) + " bytes of shared memory");
  }
}

// Runs `body` in every thread of a launch. Throws what went wrong.
inline Statistics run(const Launch& launch, const Options& options,
                      const std::function<void()>& body) {
  check_launch(launch);
  static Stacks stacks;
  unsigned resident = launch.cluster;  // clusters do not know of each other: one at a time
  if (launch.cooperative) resident = launch.blocks;
  if (launch.cooperative && options.max_resident_blocks) resident = options.max_resident_blocks;
  Statistics total{};
  for (unsigned first = 0; first < launch.blocks; first += resident) {
    const unsigned blocks = std::min(resident, launch.blocks - first);
    Machine machine(launch, options, first, blocks, body, stacks);
    machine.run();
    add(total, machine.statistics);
  }
  return total;
}

}  // namespace simt
