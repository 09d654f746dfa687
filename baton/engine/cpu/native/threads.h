// The threads of one program run. Each stage is run by every thread, which takes its share of the
// work by its number; barriers separate the stages.
#pragma once

namespace baton {

struct Worker {
    int thread;   // 0 <= thread < threads
    int threads;
};

// Share `number` of `of` equal parts of [0, total), in steps of `grain`.
struct Range {
    long begin, end;
};

inline Range share(long total, const Worker& worker, long grain = 1) {
    long steps = (total + grain - 1) / grain;
    long begin = steps * worker.thread / worker.threads * grain;
    long end = steps * (worker.thread + 1) / worker.threads * grain;
    return {begin < total ? begin : total, end < total ? end : total};
}

}  // namespace baton
