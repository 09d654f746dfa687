// likeliest.h for the test: the shares of all threads, one after another.
#include <vector>

#include "../../baton/engine/cpu/native/likeliest.h"

using namespace baton;

extern "C" void find_likeliest(const float* rows, long count, long width, long stride, int64_t* ids,
                               int threads) {
    std::vector<char> memory(Likeliest::bytes(count, threads));
    Likeliest likeliest(rows, count, width, stride, memory.data());
    for (int thread = threads - 1; thread >= 0; thread--) likeliest.look(Worker{thread, threads});
    for (int thread = threads - 1; thread >= 0; thread--)
        likeliest.settle(ids, Worker{thread, threads});
}
