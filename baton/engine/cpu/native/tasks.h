// The tasks of one stage. Each thread has a run of them, side by side as they lie in memory, taken up
// before the stage begins; who is done with its own takes from the end of another's. So nobody waits long for
// a thread that was set aside by the system, or whose core is slower. What a task computes does not
// depend on who does it.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

#include "threads.h"

namespace baton {

class Tasks {
   public:
    // Tasks 0 .. total - 1, for so many threads at most. Nobody may be at them meanwhile.
    void prepare(long total, int threads) {
        if (threads > room) hands = std::make_unique<Hand[]>(threads), room = threads;
        all = total;
    }

    long total() const { return all; }

    // This thread takes up its own. A barrier comes before anybody takes one.
    void begin(const Worker& worker) {
        Range mine = share(all, worker);
        hands[worker.thread].range.store(packed(mine.begin, mine.end), std::memory_order_relaxed);
    }

    // The next one for this thread; -1: it finds none.
    long take(const Worker& worker) {
        long task = take_first(hands[worker.thread]);
        for (int other = 1; task < 0 && other < worker.threads && other <= MOST_ASKED; other++)
            task = take_last(hands[(worker.thread + other) % worker.threads]);
        return task;
    }

   private:
    static constexpr int MOST_ASKED = 8;  // a look at another core's cache takes 0.1 us

    struct alignas(64) Hand {
        std::atomic<uint64_t> range{0};  // begin, end: 32 bits each
    };

    static uint64_t packed(uint64_t begin, uint64_t end) { return begin << 32 | end; }

    static long take_first(Hand& hand) {
        uint64_t now = hand.range.load(std::memory_order_relaxed);
        while ((now >> 32) < (now & 0xffffffff))
            if (hand.range.compare_exchange_weak(now, now + packed(1, 0), std::memory_order_relaxed))
                return long(now >> 32);
        return -1;
    }

    static long take_last(Hand& hand) {
        uint64_t now = hand.range.load(std::memory_order_relaxed);
        while ((now >> 32) < (now & 0xffffffff))
            if (hand.range.compare_exchange_weak(now, now - 1, std::memory_order_relaxed))
                return long(now & 0xffffffff) - 1;
        return -1;
    }

    std::unique_ptr<Hand[]> hands;
    int room = 0;
    long all = 0;
};

}  // namespace baton
