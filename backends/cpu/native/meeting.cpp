// Where the ranks of one machine meet: memory that all of them map, in which each leaves messages for the others.
//
// Per rank there is a count of its messages and room for two of them: message n lies in the room n % 2, which is used again
// for message n + 2, that is once all have sent n + 1 and so have read n. Who waits looks at the count a while, then sleeps on
// it. A call gives arrays, each in its message where it fits, else where it lies in the rank's segment; of those each waits for
// the others to have read them. What it says of itself goes along, so that all see whether they make the same call.
#include <linux/futex.h>
#include <poll.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <climits>
#include <cstring>
#include <initializer_list>
#include <string>
#include <string_view>
#include <vector>

#include "bind.hpp"
#include "mix.hpp"
#include "threads.hpp"

namespace py = pybind11;
using namespace py::literals;

namespace porthal {
namespace {

using Clock = std::chrono::steady_clock;
constexpr std::size_t kHead = 1 << 12;  // bytes that a call says of itself at most
constexpr std::size_t kFits = 1 << 16;  // bytes of its arrays in a message
constexpr std::size_t kRoom = kFits + 2 * kHead;  // of a message, with lines begun; longer ones are sent in pieces
constexpr std::size_t kPiece = 1 << 20;  // bytes that one thread copies at once
constexpr int kLooks = 200;            // at a count before sleeping
constexpr auto kSlice = std::chrono::milliseconds(20);  // of sleep, after which it is asked whether the other is alive

struct alignas(64) Desk {
  std::atomic<std::uint32_t> sent;      // the number of messages so far, on which others sleep
  std::atomic<std::uint32_t> sleepers;
  std::uint64_t length[2];  // of the message whose piece lies there
  alignas(64) char room[2][kRoom];
};

// The turn in which a rank was missed first, and below it what `await` says of that rank: so all say the same.
struct alignas(64) Head {
  std::atomic<std::uint64_t> missed;
};

static_assert(std::atomic<std::uint32_t>::is_always_lock_free && std::atomic<std::uint64_t>::is_always_lock_free,
              "processes share them");

long futex(std::atomic<std::uint32_t>& word, int what, std::uint32_t value, const timespec* time) {
  return syscall(SYS_futex, reinterpret_cast<std::uint32_t*>(&word), what, value, time, nullptr, 0);
}

std::size_t whole_lines(std::size_t bytes) { return (bytes + 63) / 64 * 64; }

void copy(char* to, const char* from, std::size_t bytes) {
  parallel_for(bytes, kPiece, [&](std::int64_t begin, std::int64_t end) {
    std::memcpy(to + begin, from + begin, end - begin);
  });
}

// A dense array.
struct Dense : Array {
  Dense(const py::object& given, const char* name) {
    if (!read(given.ptr(), name, *this)) throw py::error_already_set();
    if (!contiguous) refuse(name, "is strided", "a dense array");
    bytes = py::reinterpret_borrow<py::array>(given).nbytes();
  }
  std::size_t bytes;
};
using Arrays = std::initializer_list<const Dense*>;
using Sizes = std::vector<std::size_t>;  // of each rank

void rest() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Meeting {
 public:
  Meeting(int memory, int rank, int ranks, std::size_t segment, std::vector<int> lives)
      : rank_(rank), ranks_(ranks), segment_(segment), lives_(std::move(lives)), bytes_(size(ranks, segment)) {
    void* const at = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, memory, 0);
    if (at == MAP_FAILED) throw std::runtime_error(std::string("the ranks' memory cannot be mapped: ") + std::strerror(errno));
    base_ = static_cast<char*>(at);
  }
  Meeting(const Meeting&) = delete;
  Meeting& operator=(const Meeting&) = delete;
  ~Meeting() { munmap(base_, bytes_); }

  static std::size_t size(int ranks, std::size_t segment) {
    return sizeof(Head) + ranks * sizeof(Desk) + ranks * segment;
  }

  // The messages of all, or the number of the rank that is missing: -1 - rank where it is gone, rank where it is late.
  py::object gather(std::string_view message, double seconds) {
    std::vector<std::string> found;
    int missing;
    {
      py::gil_scoped_release release;
      const auto end = after(seconds);
      const std::size_t first = std::min(message.size(), kRoom);
      std::copy_n(message.data(), first, next());
      if (!(missing = meet(message.size(), end))) missing = collect(message, found, end);
    }
    return told(missing, found);
  }

  // Fill y with what is this rank's of everybody's x: of rank r counts[r] rows of so many bytes, one behind the other, from row
  // starts[r] on; with `chosen` the rows that rank r's chosen[starts[r]] and those behind it name.
  //
  // Here and below: the arrays that are given are dense, and lie in this rank's segment where they do not fit into a message.
  // Returned is None; a rank that is missing, as `gather` has it; or what all say of their calls where not all say `head`.
  py::object pull(std::string_view head, const py::object& given, std::size_t row, const Sizes& starts, const Sizes& counts,
                  const py::object& into, const py::object& chosen, double seconds) {
    const Dense x(given, "x"), y(into, "y"), rows(chosen.is_none() ? given : chosen, "chosen");
    check(starts, counts, row, y);
    auto* to = y.data;
    const auto take = [&](Clock::time_point) {
      for (int rank = 0; rank < ranks_; ++rank) {
        const char* const from = theirs(head, rank, 0);
        if (chosen.is_none()) {
          copy(to, from + starts[rank] * row, counts[rank] * row);
        } else {
          const auto* const wanted = reinterpret_cast<const std::int32_t*>(theirs(head, rank, 1)) + starts[rank];
          parallel_for(counts[rank], rows_per_chunk(row), [&](std::int64_t begin, std::int64_t end) {
            for (std::int64_t i = begin; i < end; ++i) std::memcpy(to + i * row, from + wanted[i] * row, row);
          });
        }
        to += counts[rank] * row;
      }
      return 0;
    };
    if (chosen.is_none()) return call(head, {&x}, seconds, take);
    rows.has(Kind::i32);
    return call(head, {&x, &rows}, seconds, take);
  }

  // y = the sum of everybody's x, in float32 in the order of ranks, rounded once; or of the part of x that is this rank's. A
  // large whole is summed by parts, each of which one rank leaves in its `made`, which is as large, for the others.
  py::object sum(std::string_view head, const py::object& given, const py::object& into, const py::object& space, bool whole,
                 double seconds) {
    const Dense x(given, "x"), y(into, "y"), made(space, "made");
    x.is_float();
    y.has(x.kind);
    const std::size_t item = x.kind == Kind::f32 ? 4 : 2, n = y.bytes / item;
    if (x.bytes != y.bytes * (whole ? 1 : ranks_) || made.bytes != y.bytes) throw py::value_error("y is not as large as x.");
    const auto part = [&](int rank) { return rank == ranks_ ? n : n * rank / ranks_ / 64 * 64; };
    return call(head, {&x}, seconds, [&](Clock::time_point end) {
      std::vector<const char*> from(ranks_);
      for (int rank = 0; rank < ranks_; ++rank) from[rank] = theirs(head, rank, 0) + (whole ? 0 : rank_ * n * item);
      if (!whole || !lent_) return add(x.kind, from, 0, n, y.data);
      add(x.kind, from, part(rank_), part(rank_ + 1), made.data);
      if (const int missing = give(head, {&made}, end)) return missing;
      for (int rank = 0; rank < ranks_; ++rank) {
        const std::size_t begin = part(rank) * item, bytes = part(rank + 1) * item - begin;
        const char* const ready = theirs(head, rank, 0) + begin;
        if (ready != y.data + begin) copy(y.data + begin, ready, bytes);
      }
      return 0;
    });
  }

  // y[t] = the sum over j of weights[t, j] * row, in the order of j in float32, where the rows are pulled as by `pull` and
  // place[m] says for which t*k + j the m-th of them is; others add nothing.
  py::object mix(std::string_view head, const py::object& given, const Sizes& starts, const Sizes& counts,
                 const py::object& place, const py::object& weights, const py::object& into, double seconds) {
    const Dense x(given, "rows"), y(into, "y"), places(place, "place"), shares(weights, "weights");
    x.is_float();
    y.has(x.kind);
    places.has(Kind::i64);
    shares.has(Kind::f32);
    const Matrix out = y.matrix(), gates = shares.matrix(out.rows);
    const std::size_t row = out.columns * (x.kind == Kind::f32 ? 4 : 2);
    x.matrix(kAny, out.columns);
    check(starts, counts, sizeof(std::int64_t), places);
    const std::int64_t choices = gates.columns, all = out.rows * choices;
    std::vector<const char*> rows(all);
    return call(head, {&x}, seconds, [&](Clock::time_point) {
      std::int64_t m = 0;
      for (int rank = 0; rank < ranks_; ++rank)
        for (std::size_t i = 0; i < counts[rank]; ++i) {
          const auto to = places.at<std::int64_t>(m++);
          if (to >= 0 && to < all) rows[to] = theirs(head, rank, 0) + (starts[rank] + i) * row;
        }
      with_float(x.kind, [&](auto tag) {
        using T = decltype(tag);
        const auto& loops = mix_loops(isa()).of(&tag);
        parallel_for(out.rows, rows_per_chunk(choices * row), [&](std::int64_t begin, std::int64_t end) {
          for (std::int64_t t = begin; t < end; ++t)
            loops.mix(reinterpret_cast<const T* const*>(rows.data()) + t * choices, gates.row<float>(t), choices,
                      reinterpret_cast<T*>(y.data + t * row), out.columns);
        });
      });
      return 0;
    });
  }

  // A rank's segment, for as long as this object lives.
  py::array segment(int rank) {
    if (rank < 0 || rank >= ranks_) throw py::index_error("rank is out of range.");
    return py::array_t<std::uint8_t>({segment_}, {1}, reinterpret_cast<std::uint8_t*>(segment_of(rank)), py::cast(this));
  }

 private:
  Desk& at(int rank) const { return reinterpret_cast<Desk*>(base_ + sizeof(Head))[rank]; }
  Head& head() const { return *reinterpret_cast<Head*>(base_); }
  char* segment_of(int rank) const { return base_ + sizeof(Head) + ranks_ * sizeof(Desk) + rank * segment_; }
  const char* room(int rank) const { return at(rank).room[turn_ % 2]; }
  char* next() const { return at(rank_).room[(turn_ + 1) % 2]; }  // where this rank's next message is written
  std::size_t length_of(int rank) const { return at(rank).length[turn_ % 2]; }
  static Clock::time_point after(double seconds) {
    return Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
  }

  // Whether rows of this size, of each rank as many as it says, fit into an array.
  void check(const Sizes& starts, const Sizes& counts, std::size_t row, const Dense& into) const {
    const auto ranks = static_cast<std::size_t>(ranks_);
    if (starts.size() != ranks || counts.size() != ranks) throw py::value_error("expected a start and a count per rank.");
    std::size_t room = into.bytes;
    for (std::size_t rank = 0; rank < ranks; room -= counts[rank++] * row)
      if (counts[rank] * row > room) throw py::value_error(std::string(into.name) + " is too small.");
  }

  // What a call does: give arrays, work on everybody's, and wait until nobody reads this rank's any more.
  template <class Work>
  py::object call(std::string_view head, Arrays arrays, double seconds, Work work) {
    if (head.size() > kHead) throw py::value_error("too much is said of the call.");
    std::vector<std::string> heard;
    int missing;
    {
      py::gil_scoped_release release;
      const auto end = after(seconds);
      missing = give(head, arrays, end);
      if (!missing && !agreed(head))
        missing = collect(head, heard, end);
      else if (!missing && !(missing = work(end)) && lent_)
        missing = meet(0, end);  // nobody may change what another has not read
    }
    return told(missing, heard);
  }

  // One turn: the head, a word per array that says where it lies, and those that fit. As `meet`.
  int give(std::string_view head, Arrays arrays, Clock::time_point end) {
    char* const to = next();
    std::memcpy(to, head.data(), head.size());
    std::size_t word = whole_lines(head.size()), at = word + 64, left = kFits;
    for (const Dense* array : arrays) {
      const std::size_t bytes = array->bytes;
      std::int64_t lies = array->data - segment_of(rank_);
      if (bytes <= left) {
        std::memcpy(to + at, array->data, bytes);
        lies = -static_cast<std::int64_t>(at);
        at = whole_lines(at + bytes);
        left -= bytes;
      } else if (lies < 0 || lies + bytes > segment_) {
        throw py::value_error(std::string(array->name) + " does not lie in the segment.");
      }
      std::memcpy(to + word, &lies, sizeof lies);
      word += sizeof lies;
    }
    const int missing = meet(head.size(), end);
    lent_ = false;
    for (int rank = 0; rank < ranks_ && !missing; ++rank)
      for (std::size_t i = 0; i < arrays.size(); ++i) lent_ |= lies_at(head, rank, i) >= 0;
    return missing;
  }

  bool agreed(std::string_view head) const {
    for (int rank = 0; rank < ranks_; ++rank)
      if (length_of(rank) != head.size() || std::memcmp(room(rank), head.data(), head.size())) return false;
    return true;
  }

  std::int64_t lies_at(std::string_view head, int rank, std::size_t i) const {
    std::int64_t lies;
    std::memcpy(&lies, room(rank) + whole_lines(head.size()) + i * sizeof lies, sizeof lies);
    return lies;
  }
  // The i-th array that a rank gives in this turn.
  const char* theirs(std::string_view head, int rank, std::size_t i) const {
    const std::int64_t lies = lies_at(head, rank, i);
    return lies < 0 ? room(rank) - lies : segment_of(rank) + lies;
  }

  // y[i] = the sum over j of from[j][i], for i from begin on.
  static int add(Kind kind, const std::vector<const char*>& from, std::int64_t begin, std::int64_t end, char* y) {
    const std::vector<float> ones(from.size(), 1.0f);
    with_float(kind, [&](auto tag) {
      using T = decltype(tag);
      const auto& loops = mix_loops(isa()).of(&tag);
      parallel_for(end - begin, kPiece / sizeof(T), [&](std::int64_t low, std::int64_t high) {
        thread_local std::vector<const T*> parts;
        parts.clear();
        for (const char* each : from) parts.push_back(reinterpret_cast<const T*>(each) + begin + low);
        loops.mix(parts.data(), ones.data(), parts.size(), reinterpret_cast<T*>(y) + begin + low, high - low);
      });
    });
    return 0;
  }

  // Everybody's messages, whose first pieces have come; this rank's is `message`.
  int collect(std::string_view message, std::vector<std::string>& found, Clock::time_point end) {
    found.resize(ranks_);
    std::size_t longest = 0;
    for (std::size_t at = 0;;) {
      for (int rank = 0; rank < ranks_; ++rank) {
        const std::size_t all = length_of(rank);
        if (all > at) found[rank].append(room(rank), std::min(all - at, kRoom));
        longest = std::max(longest, all);
      }
      if ((at += kRoom) >= longest) return 0;
      const std::size_t mine = std::min(at, message.size());
      std::copy_n(message.data() + mine, std::min(message.size() - mine, kRoom), next());
      if (const int missing = meet(message.size(), end)) return missing;
    }
  }

  static py::object told(int missing, const std::vector<std::string>& heard) {
    if (missing) return py::int_(missing < 0 ? missing : missing - 1);
    if (heard.empty()) return py::none();
    py::list given(heard.size());
    for (std::size_t rank = 0; rank < heard.size(); ++rank) given[rank] = py::bytes(heard[rank]);
    return std::move(given);
  }

  // One turn: send what was written at `next`, a piece of a message of so many bytes, and wait for those of all. 0, or the rank
  // that is missing as `await` has it.
  int meet(std::size_t length, Clock::time_point end) {
    Desk& mine = at(rank_);
    ++turn_;
    mine.length[turn_ % 2] = length;
    mine.sent.store(turn_, std::memory_order_seq_cst);
    if (mine.sleepers.load(std::memory_order_seq_cst)) futex(mine.sent, FUTEX_WAKE, INT_MAX, nullptr);
    for (int other = 0; other < ranks_; ++other)
      if (const int missing = other == rank_ ? 0 : await(other, end)) return missing;
    return missed();  // one that comes late must not go on alone
  }

  // 0 once the other has sent this turn's message; rank + 1 where one is late, -1 - rank where one is gone.
  int await(int other, Clock::time_point end) {
    Desk& desk = at(other);
    const auto come = [&] { return static_cast<std::int32_t>(desk.sent.load(std::memory_order_acquire) - turn_) >= 0; };
    for (int look = 0; look < kLooks; ++look, rest())
      if (come()) return 0;
    while (!come()) {
      if (const int known = missed()) return known;
      const auto left = end - Clock::now();
      if (left <= Clock::duration::zero()) return miss(other + 1);
      if (gone(other)) return come() ? 0 : miss(-1 - other);
      const auto slice = std::chrono::duration_cast<std::chrono::nanoseconds>(std::min<Clock::duration>(left, kSlice));
      const timespec time{0, static_cast<long>(slice.count())};
      desk.sleepers.fetch_add(1, std::memory_order_seq_cst);
      const std::uint32_t seen = desk.sent.load(std::memory_order_seq_cst);
      if (static_cast<std::int32_t>(seen - turn_) < 0) futex(desk.sent, FUTEX_WAIT, seen, &time);
      desk.sleepers.fetch_sub(1, std::memory_order_seq_cst);
    }
    return 0;
  }

  // Who was missed in this turn or before, in the words of `await`; 0 for none.
  int missed() const {
    const std::uint64_t found = head().missed.load();
    return found && static_cast<std::int32_t>(static_cast<std::uint32_t>(found >> 32) - turn_) <= 0
               ? static_cast<std::int32_t>(static_cast<std::uint32_t>(found)) : 0;
  }

  int miss(int what) {
    std::uint64_t none = 0;
    head().missed.compare_exchange_strong(none, std::uint64_t{turn_} << 32 | static_cast<std::uint32_t>(what));
    return missed();
  }

  bool gone(int other) const {
    pollfd life{lives_[other], POLLIN, 0};
    return lives_[other] >= 0 && poll(&life, 1, 0) > 0;
  }

  const int rank_, ranks_;
  const std::size_t segment_;
  const std::vector<int> lives_;  // a descriptor per rank that can be read once its process has ended; -1 for none
  const std::size_t bytes_;
  char* base_;
  std::uint32_t turn_ = 0;
  bool lent_ = false;  // whether somebody's array lies in a segment in this turn
};

}  // namespace

void bind_meeting(py::module_& m) {
  py::class_<Meeting>(m, "Meeting", py::module_local(), "Memory that the ranks of one machine share; see meeting.cpp.")
      .def(py::init<int, int, int, std::size_t, std::vector<int>>(), "memory"_a, "rank"_a, "ranks"_a, "segment"_a, "lives"_a)
      .def_static("size", &Meeting::size, "ranks"_a, "segment"_a, "Bytes of the memory.")
      .def_property_readonly_static("room", [](const py::object&) { return kFits; })
      .def("gather", &Meeting::gather, "message"_a, "seconds"_a,
           "The messages of all ranks; or a rank that is late, or -1 - that of one that is gone.")
      .def("pull", &Meeting::pull, "head"_a, "x"_a, "row"_a, "starts"_a, "counts"_a, "y"_a, "chosen"_a, "seconds"_a,
           "Fill y with rows of everybody's x.")
      .def("sum", &Meeting::sum, "head"_a, "x"_a, "y"_a, "made"_a, "whole"_a, "seconds"_a, "y = the sum of everybody's x.")
      .def("mix", &Meeting::mix, "head"_a, "rows"_a, "starts"_a, "counts"_a, "place"_a, "weights"_a, "y"_a, "seconds"_a,
           "y = a weighted sum of rows of everybody's.")
      .def("segment", &Meeting::segment, "rank"_a, "A rank's part of the memory, as uint8.");
}

}  // namespace porthal
