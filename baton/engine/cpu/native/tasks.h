// The tasks of one stage: a work-stealing scheduler. Each thread begins with a range of adjacent tasks; an
// idle thread steals from the tail of another's range. So a preempted thread, or a slower core, delays the
// others by one task at most. A task's result does not depend on the thread that runs it.
#pragma once

#include <atomic>
#include <cstdint>

#include "threads.h"

namespace baton {

class Tasks {
   public:
    Tasks() = default;
    Tasks(const Tasks&) = delete;
    ~Tasks() { delete[] queues; }

    // Tasks 0 .. total - 1, for up to `threads` threads. Not while tasks are being taken.
    void prepare(long total, int threads) {
        if (threads > capacity) {
            delete[] queues;
            queues = new WorkQueue[threads];
            capacity = threads;
        }
        all = total;
    }

    long total() const { return all; }

    // Sets this thread's range. A barrier separates it from the first take().
    void begin(const Worker& worker) {
        Range mine = share(all, worker);
        queues[worker.thread].range.store(packed(mine.begin, mine.end), std::memory_order_relaxed);
    }

    // The next task for this thread; -1: none was found.
    long take(const Worker& worker) {
        long task = take_first(queues[worker.thread]);
        for (int other = 1; task < 0 && other < worker.threads && other <= MOST_VICTIMS; other++)
            task = take_last(queues[(worker.thread + other) % worker.threads]);
        return task;
    }

   private:
    static constexpr int MOST_VICTIMS = 8;  // reading another core's cache line takes 0.1 us

    struct alignas(64) WorkQueue {
        std::atomic<uint64_t> range{0};  // begin, end: 32 bits each
    };

    static uint64_t packed(uint64_t begin, uint64_t end) { return begin << 32 | end; }

    static long take_first(WorkQueue& queue) {
        uint64_t now = queue.range.load(std::memory_order_relaxed);
        while ((now >> 32) < (now & 0xffffffff))
            if (queue.range.compare_exchange_weak(now, now + packed(1, 0), std::memory_order_relaxed))
                return long(now >> 32);
        return -1;
    }

    static long take_last(WorkQueue& queue) {
        uint64_t now = queue.range.load(std::memory_order_relaxed);
        while ((now >> 32) < (now & 0xffffffff))
            if (queue.range.compare_exchange_weak(now, now - 1, std::memory_order_relaxed))
                return long(now & 0xffffffff) - 1;
        return -1;
    }

    WorkQueue* queues = nullptr;  // not a unique_ptr: <memory> takes a compiler as long as a product
    int capacity = 0;
    long all = 0;
};

}  // namespace baton
