// A persistent thread pool: run(threads, job) runs a job on every thread, the caller being thread 0. A barrier
// synchronises them inside a job. Created after a fork, never before: threads do not survive it.
#pragma once

#ifdef __linux__
#include <sched.h>
#endif

#include <atomic>
#include <chrono>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <type_traits>
#include <vector>

#include "threads.h"

namespace baton {

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Spins until another thread has made the condition true. Yields after a while: with more threads than
// cores the other thread may need this core.
template <typename Condition>
void spin_until(Condition&& met) {
    for (int turns = 0; !met(); turns++)
        if (turns < 1000)
            pause();
        else
            std::this_thread::yield();
}

// Blocks each thread until all `threads` of a run have arrived. Writes before it are visible after it.
class Barrier {
   public:
    void wait(int threads) {
        unsigned round = rounds.load(std::memory_order_acquire);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
            arrived.store(0, std::memory_order_relaxed);
            rounds.store(round + 1, std::memory_order_release);
        } else {
            spin_until([&] { return rounds.load(std::memory_order_acquire) != round; });
        }
    }

   private:
    alignas(64) std::atomic<int> arrived{0};
    alignas(64) std::atomic<unsigned> rounds{0};
};

class ThreadPool {
   public:
    ThreadPool() = default;
    ThreadPool(const ThreadPool&) = delete;

    ~ThreadPool() {
        stopping = true;
        for (auto& helper : helpers) call(*helper);
        for (auto& helper : helpers) helper->thread.join();
    }

    // Runs job(Worker) on up to `threads` threads (fewer only if the system has no more); the number
    // may differ from run to run. Returns when all are done. A job must not throw. Concurrent calls
    // run one after another.
    template <typename Job>
    void run(int threads, Job&& job) {
        std::lock_guard<std::mutex> turn(busy);
        int others = start(threads - 1);
        see_cores();
        object = const_cast<void*>(static_cast<const void*>(&job));
        function = [](void* it, const Worker& worker) {
            (*static_cast<std::remove_reference_t<Job>*>(it))(worker);
        };
        team = others + 1;
        unfinished.store(others, std::memory_order_relaxed);
        for (int i = 0; i < others; i++) call(*helpers[i]);
        job(Worker{0, team});
        spin_until([&] { return unfinished.load(std::memory_order_acquire) == 0; });
    }

   private:
    struct alignas(64) Helper {
        std::atomic<int> order{0};  // 0, 1, 0, ...: each change starts a job
        std::thread thread;
    };

    static void call(Helper& helper) {
        helper.order.fetch_xor(1, std::memory_order_release);
        helper.order.notify_one();
    }

    int start(int others) {
        while (int(helpers.size()) < others) {
            auto helper = std::make_unique<Helper>();
            try {
                helper->thread = std::thread(&ThreadPool::work, this, helper.get(),
                                             int(helpers.size()) + 1);
            } catch (const std::system_error&) {
                break;  // the system has no more threads; results do not depend on their number
            }
            helpers.push_back(std::move(helper));
        }
        return others < int(helpers.size()) ? others : int(helpers.size());
    }

    void work(Helper* self, int number) {
        unsigned placed = 0;
        Cores mine = {};
        for (int last = 0;;) {
            last = next(self->order, last);
            if (stopping) return;
            if (placed != placing) mine = core_of(number), placed = placing;
            stay_on(mine);
            function(object, Worker{number, team});
            unfinished.fetch_sub(1, std::memory_order_release);
        }
    }

    // The kernel may keep two threads that yield to each other on one core for long, and a product
    // then takes 3 times as long. So each helper is pinned to one of the caller's cores, from the last
    // on; the caller is not pinned. With fewer cores than threads nothing is pinned. Helpers check
    // at every job, because moving the process (run_on of baton/host.py) moves them too.
#ifdef __linux__
    typedef cpu_set_t Cores;

    void see_cores() {
        cpu_set_t now;
        if (sched_getaffinity(0, sizeof now, &now) || CPU_EQUAL(&now, &cores)) return;
        cores = now;
        placing++;
    }

    Cores core_of(int number) const {
        cpu_set_t mine = cores;
        if (team <= CPU_COUNT(&cores)) {
            int left = CPU_COUNT(&cores) - number;
            for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
                if (CPU_ISSET(cpu, &cores) && left-- != 0) CPU_CLR(cpu, &mine);
        }
        return mine;
    }

    static void stay_on(const Cores& mine) {
        cpu_set_t now;
        if (sched_getaffinity(0, sizeof now, &now) || !CPU_EQUAL(&now, &mine))
            sched_setaffinity(0, sizeof mine, &mine);
    }

    cpu_set_t cores = {};
#else
    struct Cores {};
    void see_cores() {}
    Cores core_of(int) const { return {}; }
    static void stay_on(const Cores&) {}
#endif
    unsigned placing = 0;  // counts changes of the caller's cores

    // Jobs follow each other closely while a model decodes: so helpers spin for a while, then sleep.
    static int next(std::atomic<int>& order, int last) {
        auto begun = std::chrono::steady_clock::now();
        do {
            for (int turns = 0; turns < 64; turns++, pause())
                if (int now = order.load(std::memory_order_acquire); now != last) return now;
        } while (std::chrono::steady_clock::now() - begun < std::chrono::microseconds(40));
        order.wait(last, std::memory_order_acquire);
        return order.load(std::memory_order_acquire);
    }

    std::mutex busy;
    std::vector<std::unique_ptr<Helper>> helpers;
    void (*function)(void*, const Worker&) = nullptr;
    void* object = nullptr;
    int team = 1;
    bool stopping = false;
    alignas(64) std::atomic<int> unfinished{0};
};

}  // namespace baton
