// Makes every library of a process see a CPU with AVX2 alone: no AVX-512, VNNI, FP16 or AMX. Settings such as
// ONEDNN_MAX_CPU_ISA reach one library each, and peers ask the CPU themselves.
//
//     cc -O2 -shared -fPIC -o /tmp/as_avx2.so tools/benchmarks/as_avx2.c -ldl
//     LD_PRELOAD=/tmp/as_avx2.so CXX="c++ -march=x86-64-v3" python main.py bench engine ...
//
// Linux on x86-64, where `cpuid_fault` is among the flags of /proc/cpuinfo. The kernel is told to let CPUID fail
// in this process; the handler executes it and clears the bits. Processes that it starts do the same.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#define ARCH_SET_CPUID 0x1012
#define BIT(number) (1u << (number))

typedef int (*Sigaction)(int, const struct sigaction*, struct sigaction*);
typedef sighandler_t (*Signal)(int, sighandler_t);

static int real_sigaction(int number, const struct sigaction* now, struct sigaction* before) {
    return ((Sigaction)dlsym(RTLD_NEXT, "sigaction"))(number, now, before);
}

static void on_fault(int number, siginfo_t* info, void* context) {
    greg_t* regs = ((ucontext_t*)context)->uc_mcontext.gregs;
    const uint8_t* at = (const uint8_t*)regs[REG_RIP];
    if (info->si_code != SI_KERNEL || at[0] != 0x0f || at[1] != 0xa2) {  // another fault: it ends the process
        struct sigaction plain;
        memset(&plain, 0, sizeof plain);
        real_sigaction(number, &plain, 0);
        return;
    }
    uint32_t leaf = regs[REG_RAX], sub = regs[REG_RCX], a = leaf, b, c = sub, d;
    syscall(SYS_arch_prctl, ARCH_SET_CPUID, 1);
    __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    syscall(SYS_arch_prctl, ARCH_SET_CPUID, 0);
    if (leaf == 7 && sub == 0) {
        b &= ~(BIT(16) | BIT(17) | BIT(21) | BIT(26) | BIT(27) | BIT(28) | BIT(30) | BIT(31));  // AVX512*
        c &= ~(BIT(1) | BIT(6) | BIT(11) | BIT(12) | BIT(14));                                   // AVX512*
        d &= ~(BIT(2) | BIT(3) | BIT(8) | BIT(22) | BIT(23) | BIT(24) | BIT(25));  // AVX512*, AMX
    }
    if (leaf == 7 && sub == 1) {
        a &= ~(BIT(4) | BIT(5) | BIT(21) | BIT(23));   // AVX-VNNI, AVX512-BF16, AMX-FP16, AVX-IFMA
        d &= ~(BIT(4) | BIT(5) | BIT(10) | BIT(19));   // AVX-VNNI-INT8, AVX-NE-CONVERT, AVX-VNNI-INT16, AVX10
    }
    if (leaf == 0xd && sub == 0) a &= 7;  // the state that is saved: x87, SSE, AVX
    if (leaf == 0x24) a = b = c = d = 0;  // AVX10
    regs[REG_RAX] = a, regs[REG_RBX] = b, regs[REG_RCX] = c, regs[REG_RDX] = d;
    regs[REG_RIP] += 2;
}

// The handler stays: Python's faulthandler and compilers set their own.
int sigaction(int number, const struct sigaction* now, struct sigaction* before) {
    if (number != SIGSEGV || !now) return real_sigaction(number, now, before);
    if (before) memset(before, 0, sizeof *before);
    return 0;
}

sighandler_t signal(int number, sighandler_t now) {
    if (number == SIGSEGV) return SIG_DFL;
    return ((Signal)dlsym(RTLD_NEXT, "signal"))(number, now);
}

__attribute__((constructor)) static void begin(void) {
    struct sigaction act;
    memset(&act, 0, sizeof act);
    act.sa_sigaction = on_fault;
    act.sa_flags = SA_SIGINFO | SA_NODEFER;
    real_sigaction(SIGSEGV, &act, 0);
    if (syscall(SYS_arch_prctl, ARCH_SET_CPUID, 0)) {
        perror("as_avx2: this kernel or CPU cannot let cpuid fail");
        _exit(1);
    }
}
