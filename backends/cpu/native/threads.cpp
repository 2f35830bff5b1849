#include "threads.hpp"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace porthal {
namespace {

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Calls done() until it is true or about 50 microseconds have passed; says which.
template <class Done>
bool spin_until(Done done) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(50);
  do {
    for (int i = 0; i < 64; ++i) {
      if (done()) return true;
      pause();
    }
  } while (std::chrono::steady_clock::now() < end);
  return false;
}

struct Job {
  detail::Body body;
  void* context;
  std::int64_t count, chunk;
  std::atomic<std::int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error = nullptr;

  void work() {
    try {
      for (;;) {
        const std::int64_t begin = next.fetch_add(chunk, std::memory_order_relaxed);
        if (begin >= count) return;
        body(context, begin, std::min(begin + chunk, count));
      }
    } catch (...) {
      if (!failed.exchange(true)) error = std::current_exception();
    }
  }
};

class Pool {
 public:
  explicit Pool(int threads) {
    try {
      for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { serve(); });
    } catch (...) {
      stop();
      throw;
    }
  }
  ~Pool() { stop(); }

  void run(Job& job) {
    job_.store(&job);
    epoch_.fetch_add(1);
    if (asleep_.load() > 0) {
      { std::lock_guard<std::mutex> lock(sleep_); }
      wake_.notify_all();
    }
    job.work();
    job_.store(nullptr);
    // Only workers that entered are waited for: one that never woke up holds no chunk.
    const auto left = [this] { return inside_.load() == 0; };
    while (!spin_until(left)) std::this_thread::yield();
    if (job.failed) std::rethrow_exception(job.error);
  }

 private:
  void serve() {
    std::uint64_t seen = 0;
    const auto news = [&] { return epoch_.load() != seen || stopping_.load(); };
    while (!stopping_.load()) {
      if (!spin_until(news)) {
        std::unique_lock<std::mutex> lock(sleep_);
        asleep_.fetch_add(1);
        wake_.wait(lock, news);
        asleep_.fetch_sub(1);
      }
      seen = epoch_.load();
      // Announce first, then look: run() clears job_ first and then waits until nobody is inside.
      inside_.fetch_add(1);
      if (Job* job = job_.load()) job->work();
      inside_.fetch_sub(1);
    }
  }

  void stop() {
    stopping_.store(true);
    { std::lock_guard<std::mutex> lock(sleep_); }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
  }

  alignas(64) std::atomic<Job*> job_{nullptr};
  std::atomic<std::uint64_t> epoch_{0};
  std::atomic<bool> stopping_{false};
  alignas(64) std::atomic<int> inside_{0};
  std::atomic<int> asleep_{0};
  std::mutex sleep_;
  std::condition_variable wake_;
  std::vector<std::thread> workers_;
};

// How many processors this process may run on, which taskset and containers restrict.
int processors() {
  for (int room = 1024; room <= 1 << 20; room *= 2) {  // of more than 1024 processors, the kernel wants a larger set
    cpu_set_t* const set = CPU_ALLOC(room);
    if (!set) break;
    const bool known = sched_getaffinity(0, CPU_ALLOC_SIZE(room), set) == 0;
    const int count = known ? CPU_COUNT_S(CPU_ALLOC_SIZE(room), set) : 0;
    CPU_FREE(set);
    if (known) return std::max(1, count);
  }
  return 1;
}

// Never destroyed, so that workers asleep at process exit still have their pool.
struct Shared {
  std::mutex turn;
  std::atomic<int> threads{processors()};
  int started = 0;
  Pool* pool = nullptr;
};

Shared* shared_state = nullptr;

Shared& shared() {
  static const bool once = [] {
    shared_state = new Shared;
    // Threads do not survive fork and locks may be held by them: the child gets a new state of the same size.
    pthread_atfork(nullptr, nullptr, [] {
      const int threads = shared_state->threads;
      shared_state = new Shared;
      shared_state->threads = threads;
    });
    return true;
  }();
  (void)once;
  return *shared_state;
}

}  // namespace

int num_threads() { return shared().threads; }

void set_num_threads(int count) {
  if (count < 1) throw std::invalid_argument("num_threads is " + std::to_string(count) + ", expected at least 1.");
  shared().threads = count;
}

void detail::parallel_for(std::int64_t count, std::int64_t chunk, Body body, void* context) {
  if (count <= 0) return;
  Shared& state = shared();
  std::unique_lock<std::mutex> turn(state.turn, std::defer_lock);
  if (count <= chunk || state.threads == 1 || !turn.try_lock()) return body(context, 0, count);
  const int threads = state.threads;
  if (state.started != threads) {
    delete state.pool;
    state.pool = nullptr;
    state.started = 0;
    state.pool = new Pool(threads);
    state.started = threads;
  }
  Job job{body, context, count, chunk};
  state.pool->run(job);
}

}  // namespace porthal
