// argmax.h for the test: the shares of all threads, one after another.
#include <vector>

#include "../../baton/engine/cpu/native/argmax.h"

using namespace baton;

extern "C" void find_argmax(const float* rows, long count, long width, long stride, int64_t* ids,
                               int threads) {
    std::vector<char> memory(Argmax::bytes(count, threads));
    Argmax argmax(rows, count, width, stride, memory.data());
    for (int thread = threads - 1; thread >= 0; thread--) argmax.scan(Worker{thread, threads});
    for (int thread = threads - 1; thread >= 0; thread--)
        argmax.reduce(ids, Worker{thread, threads});
}
