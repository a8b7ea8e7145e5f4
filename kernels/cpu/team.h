// Threads that work on one recurrence together: their barrier, their shares, their memory.
#pragma once

#include <sched.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "layout.h"

// A barrier that spins for about as long as a time step takes, then lets others run: two threads of
// one core must not wait for each other's time slice.
class Barrier {
 public:
  void wait(int64_t members) {
    if (members == 1) return;
    const int generation = generation_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == members - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      generation_.store(generation + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; generation_.load(std::memory_order_acquire) == generation; ++spins) {
      if (spins < kSpins)
        relax();
      else
        sched_yield();
    }
  }

 private:
  static constexpr int kSpins = 1000;

  static void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  alignas(64) std::atomic<int64_t> arrived_{0};
  alignas(64) std::atomic<int> generation_{0};
};

// [begin, end) of `count` things for one of `parts`; the first parts get what does not divide.
struct Share {
  int64_t begin, end;
};

inline Share share_of(int64_t count, int64_t part, int64_t parts) {
  const int64_t whole = count / parts, left = count % parts;
  return {part * whole + min(part, left), (part + 1) * whole + min(part + 1, left)};
}

// Hands out pieces of a block of memory; without a block it only counts how much is needed.
class Memory {
 public:
  explicit Memory(char *block = nullptr) : block_(block) {}

  template <class T>
  T *take(int64_t count) {
    T *piece = block_ ? reinterpret_cast<T *>(block_ + used_) : nullptr;
    used_ += (size_t(count) * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    return piece;
  }
  bool counting() const { return !block_; }
  size_t used() const { return used_; }

  static constexpr size_t kAlignment = 64;

 private:
  char *block_;
  size_t used_ = 0;
};

constexpr size_t kHugePage = size_t{1} << 21;

// Ask for huge pages: a large fresh buffer then costs a page fault every 2 MiB, not every 4 KiB. One
// that two buffers share is asked for as well, for its halves.
inline void advise_huge_pages(void *data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (!data || bytes < 2 * kHugePage) return;
  static const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) & ~(page - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(page - 1);
  if (end > begin) madvise(reinterpret_cast<void *>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

// Memory of the calling thread that is kept from call to call, because fresh memory costs more in
// page faults than a small LSTM in arithmetic. More than kKept bytes are given back.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch &) = delete;
  Scratch &operator=(const Scratch &) = delete;
  ~Scratch() { std::free(data_); }

  // At least `bytes` bytes, or null if there is no memory.
  char *acquire(size_t bytes) {
    if (bytes <= size_) return data_;
    std::free(data_);
    const size_t alignment = bytes >= kHugePage ? kHugePage : Memory::kAlignment;
    size_ = (bytes + alignment - 1) / alignment * alignment;
    data_ = static_cast<char *>(std::aligned_alloc(alignment, size_));
    if (!data_) size_ = 0;
    advise_huge_pages(data_, size_);
    return data_;
  }
  void release() {
    if (size_ <= kKept) return;
    std::free(data_);
    data_ = nullptr;
    size_ = 0;
  }

 private:
  static constexpr size_t kKept = size_t{64} << 20;
  char *data_ = nullptr;
  size_t size_ = 0;
};

// How the members of a team divide one recurrence: groups of rows, and within each group the hidden
// units. Groups never wait for each other; the members of a group do, after every step.
struct Split {
  int64_t row_groups, unit_groups;
  int64_t members() const { return row_groups * unit_groups; }
};

// One thread of a team: its place in the split, and whom it meets.
class Member {
 protected:
  // barriers: one for each group of rows, and one for all.
  Member(const Split &split, int64_t member, Barrier *barriers)
      : split_(split),
        member_(member),
        row_group_(member / split.unit_groups),
        unit_group_(member % split.unit_groups),
        barriers_(barriers) {}

  // This member's part of what its group, or the whole team, does together.
  Share share(int64_t count) const { return share_of(count, unit_group_, split_.unit_groups); }
  Share share_of_all(int64_t count) const { return share_of(count, member_, split_.members()); }

  // This member's part of [unit groups][batch], where each keeps the rows of its group for itself.
  template <class Row>
  Row *own_rows(Row *rows, int64_t batch) const {
    return rows + unit_group_ * batch + share_of(batch, row_group_, split_.row_groups).begin;
  }

  void meet() { barriers_[row_group_].wait(split_.unit_groups); }
  void meet_all() { barriers_[split_.row_groups].wait(split_.members()); }

  const Split &split_;
  const int64_t member_, row_group_, unit_group_;

 private:
  Barrier *barriers_;
};
