// Where the ranks of one machine meet: memory that all of them map, in which each leaves messages for the others.
//
// Per rank there is a count of its messages and room for two of them: message n lies in the room n % 2, which is used again
// for message n + 2, that is once all have sent n + 1 and so have read n. Who waits looks at the count a while, then sleeps on it.
// What fits into such a message is moved by one; of what is larger each says where it lies in its segment, and then waits for
// the others to have read it.
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

#include "isa.hpp"

namespace py = pybind11;
using namespace py::literals;

namespace porthal {
namespace {

using Clock = std::chrono::steady_clock;
constexpr std::size_t kWord = sizeof(std::int64_t);  // says where an array lies that is not in its message
constexpr std::size_t kRoom = (1 << 16) + kWord;  // bytes of a message; longer ones are sent in pieces
constexpr int kLooks = 200;            // at a count before sleeping
constexpr auto kSlice = std::chrono::milliseconds(20);  // of sleep, after which it is asked whether the other is alive

struct alignas(64) Desk {
  std::atomic<std::uint32_t> sent;      // the number of messages so far, on which others sleep
  std::atomic<std::uint32_t> sleepers;
  std::uint64_t length[2];  // of the message whose piece lies there
  alignas(64) char room[2][(kRoom + 63) / 64 * 64];
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
  py::object gather(const py::bytes& message, double seconds) {
    char* data;
    Py_ssize_t length;
    PyBytes_AsStringAndSize(message.ptr(), &data, &length);
    std::vector<std::string> found(ranks_);
    int missing = 0;
    {
      py::gil_scoped_release release;
      const auto end = after(seconds);
      std::size_t longest = 0, at = 0;
      do {
        const std::size_t mine = std::min<std::size_t>(at, length);
        if ((missing = meet({{data + mine, std::min(length - mine, kRoom)}}, length, end))) break;
        for (int rank = 0; rank < ranks_; ++rank) {
          const std::size_t all = length_of(rank);
          if (all > at || !at) found[rank].append(room(rank), std::min(all - at, kRoom));
          longest = std::max(longest, all);
        }
        at += kRoom;
      } while (at < longest);
    }
    if (missing) return py::int_(missing < 0 ? missing : missing - 1);
    py::list given(ranks_);
    for (int rank = 0; rank < ranks_; ++rank) given[rank] = py::bytes(found[rank]);
    return given;
  }

  // Fill y with what is this rank's of everybody's x: of rank r counts[r] rows of so many bytes, from row starts[r] on, one
  // behind the other. x is dense, and lies in this rank's segment where it is more than fits into a message. None, or the
  // rank that is missing as `gather` has it.
  py::object pull(const py::array& x, std::size_t row, const std::vector<std::size_t>& starts,
                  const std::vector<std::size_t>& counts, py::array& y, double seconds) {
    const auto* const data = static_cast<const char*>(x.data());
    auto* to = static_cast<char*>(y.mutable_data());
    const std::size_t bytes = x.nbytes();
    const std::int64_t lies = bytes <= kRoom - kWord ? -1 : data - segment_of(rank_);
    if (lies >= 0 ? lies + bytes > segment_ : bytes > kRoom - kWord) throw py::value_error("x does not lie in the segment.");
    if (!(x.flags() & y.flags() & py::array::c_style)) throw py::value_error("x and y must be dense.");
    std::size_t wanted = 0;
    const auto ranks = static_cast<std::size_t>(ranks_);
    if (starts.size() != ranks || counts.size() != ranks) throw py::value_error("expected a start and a count per rank.");
    for (int rank = 0; rank < ranks_; ++rank) wanted += counts[rank] * row;
    if (wanted > static_cast<std::size_t>(y.nbytes())) throw py::value_error("y is too small.");
    int missing;
    {
      py::gil_scoped_release release;
      missing = meet({{reinterpret_cast<const char*>(&lies), kWord}, {data, lies < 0 ? bytes : 0}}, kRoom, after(seconds));
      bool lent = false;
      for (int rank = 0; rank < ranks_ && !missing; ++rank) {
        std::int64_t theirs;
        std::memcpy(&theirs, room(rank), kWord);
        const char* const from = theirs < 0 ? room(rank) + kWord : segment_of(rank) + theirs;
        std::memcpy(to, from + starts[rank] * row, counts[rank] * row);
        to += counts[rank] * row;
        lent |= theirs >= 0;
      }
      if (!missing && lent) missing = meet({}, 0, after(seconds));  // nobody may change what another has not read
    }
    if (missing) return py::int_(missing < 0 ? missing : missing - 1);
    return py::none();
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
  std::size_t length_of(int rank) const { return at(rank).length[turn_ % 2]; }
  static Clock::time_point after(double seconds) {
    return Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
  }

  using Parts = std::initializer_list<std::string_view>;

  // One turn: send a piece of a message, and wait for those of all. 0, or the rank that is missing as `await` has it.
  int meet(Parts parts, std::size_t length, Clock::time_point end) {
    send(parts, length);
    for (int other = 0; other < ranks_; ++other)
      if (const int missing = other == rank_ ? 0 : await(other, end)) return missing;
    return missed();  // one that comes late must not go on alone
  }

  void send(Parts parts, std::size_t length) {
    Desk& mine = at(rank_);
    ++turn_;
    char* to = mine.room[turn_ % 2];
    for (const std::string_view part : parts) to = std::copy(part.begin(), part.end(), to);
    mine.length[turn_ % 2] = length;
    mine.sent.store(turn_, std::memory_order_seq_cst);
    if (mine.sleepers.load(std::memory_order_seq_cst)) futex(mine.sent, FUTEX_WAKE, INT_MAX, nullptr);
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
};

}  // namespace

void bind_meeting(py::module_& m) {
  py::class_<Meeting>(m, "Meeting", py::module_local(), "Memory that the ranks of one machine share; see meeting.cpp.")
      .def(py::init<int, int, int, std::size_t, std::vector<int>>(), "memory"_a, "rank"_a, "ranks"_a, "segment"_a, "lives"_a)
      .def_static("size", &Meeting::size, "ranks"_a, "segment"_a, "Bytes of the memory.")
      .def_property_readonly_static("room", [](const py::object&) { return kRoom - kWord; })
      .def("gather", &Meeting::gather, "message"_a, "seconds"_a,
           "The messages of all ranks; or a rank that is late, or -1 - that of one that is gone.")
      .def("pull", &Meeting::pull, "x"_a, "row"_a, "starts"_a, "counts"_a, "y"_a, "seconds"_a,
           "Fill y with rows of everybody's x; returns None, or what gather returns of a missing rank.")
      .def("segment", &Meeting::segment, "rank"_a, "A rank's part of the memory, as uint8.");
}

}  // namespace porthal
