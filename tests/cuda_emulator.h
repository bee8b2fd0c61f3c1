// Just enough of CUDA to run the kernels of scan_cuda.cu and dev/cuda on a CPU, under the
// sanitizers, without a GPU or its compiler:
//     g++ -std=c++17 -fsanitize=address,undefined -DFASTVIM_EMULATE
//         -include tests/cuda_emulator.h -x c++ scan_cuda.cu
//
// Blocks run one after another. The threads of a block are fibers: each runs until a barrier or a
// shuffle, where it waits for the others; a warp runs until all of it waits at a barrier, before
// the next warp does anything. Dynamic shared memory and scratch memory begin full of NaN. What it
// finds:
//     a barrier or shuffle that not all threads reach,
//         or in different lines of the source                     it stops
//     accesses outside arrays, unaligned vectors,
//         overflow of integers                                    the sanitizers stop it
//     a missing barrier                                           other results in other orders of
//         the threads: compare the bits after emulator_order(0), (1) and (2)
//     memory read before it is written                            NaN results
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <sys/mman.h>
#include <ucontext.h>
#include <vector>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
#define ASAN_UNPOISON_MEMORY_REGION(p, n)
inline void __sanitizer_start_switch_fiber(void**, const void*, size_t) {}
inline void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) {}
#endif

#define __global__ static
#define __device__
#define __host__
#define __shared__ static                   // blocks run one after another, and share this one
#define __launch_bounds__(...)

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
using cudaStream_t = void*;
enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInvalidConfiguration = 9
};
inline const char* cudaGetErrorString(cudaError_t error) {
    return error ? "an emulated CUDA error" : "no error";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaFreeAsync(void* p, cudaStream_t) {
    free(p);
    return cudaSuccess;
}
inline cudaError_t cudaMallocAsync(void** p, size_t bytes, cudaStream_t) {
    *p = malloc(bytes);
    if (!*p) return cudaErrorMemoryAllocation;
    memset(*p, 0xff, bytes);                // 0xffffffff is a NaN
    return cudaSuccess;
}

constexpr int64_t SMS = 4;                  // a small chip: small sizes are cut like large ones

// ---- what only the ladders call: plain memory, and events that know no time

enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };
template <class X> cudaError_t cudaMalloc(X** p, size_t bytes) {
    return cudaMallocAsync(reinterpret_cast<void**>(p), bytes, nullptr);
}
inline cudaError_t cudaFree(void* p) { return cudaFreeAsync(p, nullptr); }
inline cudaError_t cudaMemset(void* p, int value, size_t bytes) {
    memset(p, value, bytes);
    return cudaSuccess;
}
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
    memcpy(to, from, bytes);
    return cudaSuccess;
}
struct cudaEvent_t {};
inline cudaError_t cudaEventCreate(cudaEvent_t*) { return cudaSuccess; }
inline cudaError_t cudaEventRecord(cudaEvent_t) { return cudaSuccess; }
inline cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
inline cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
inline cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t, cudaEvent_t) {
    *ms = 0;
    return cudaSuccess;
}

// ---- numbers

inline uint32_t bits_of(float x) { uint32_t b; return memcpy(&b, &x, 4), b; }
inline float float_of(uint32_t b) { float x; return memcpy(&x, &b, 4), x; }

inline float __uint_as_float(uint32_t b) { return float_of(b); }
inline int64_t wide_product(int a, int b) { return int64_t(a) * b; }

// Rounds to the nearest, ties to even, where `drop` low bits of the mantissa go. NaN stays NaN.
inline uint32_t round_bits(float x, int drop) {
    const uint32_t b = bits_of(x);
    if (std::isnan(x)) return (b | 0x400000u) >> drop;
    return (b + (1u << (drop - 1)) - 1 + (b >> drop & 1)) >> drop;
}

struct __nv_bfloat16 { uint16_t bits; };
inline float __bfloat162float(__nv_bfloat16 x) { return float_of(uint32_t(x.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return {uint16_t(round_bits(x, 16))}; }

struct __half { uint16_t bits; };
inline float __half2float(__half x) {
    const uint32_t sign = uint32_t(x.bits & 0x8000) << 16;
    const uint32_t exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
    if (exponent == 0) return std::copysign(std::ldexp(float(mantissa), -24), float_of(sign));
    return float_of(sign | (exponent == 31 ? 255 : exponent + 112) << 23 | mantissa << 13);
}
inline __half __float2half_rn(float x) {
    const uint32_t sign = bits_of(x) >> 16 & 0x8000;
    const float size = std::fabs(x);
    if (std::isnan(x)) return {uint16_t(sign | 0x7e00)};
    const uint32_t denormal = uint32_t(std::nearbyint(std::ldexp(std::fmin(size, 1), 24)));
    if (size < 6.103515625e-5f) return {uint16_t(sign | denormal)};
    return {uint16_t(sign | std::min(round_bits(size, 13) - (112u << 10), 0x7c00u))};
}

using std::max;
using std::min;
template <class X> X __ldg(const X* p) { return *p; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float a, float b) {
    const bool too_large = std::fabs(b) > 8.507059e37f && !std::isinf(b);
    return too_large ? 0 * a : a / b;
}
inline float hardware_tanh(float x) {       // as coarse as a GPU's
    return float_of(round_bits(std::tanh(x), 13) << 13);
}

// ---- threads

namespace emulator {

constexpr size_t STACK = 128 << 10;
enum State { RUNNING, AT_BARRIER, AT_SHUFFLE, DONE };

struct Fiber {
    ucontext_t context;                     // begins a thread; setjmp and longjmp go on with it
    void* here[5];
    bool begun;
    char* stack = static_cast<char*>(
        mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    void* fake_stack;                       // the address sanitizer's
    dim3 thread;
    State state;
    int line;                               // of the source, where it waits
    unsigned shuffles;
    float given[2];                         // to the other lanes, in turn
};

struct Machine {
    std::vector<Fiber*> fibers;
    void* here[5];
    void* fake_stack = nullptr;
    const void* bottom = nullptr;           // the scheduler's stack, for the sanitizer
    size_t size = 0;
    Fiber* now = nullptr;
    dim3 block, threads, grid;
    float* shared = nullptr;
    std::function<void()> kernel;
    int order = 0;                          // 0 forward, 1 reversed, 2 shuffled
    std::mt19937 random;
    ~Machine() { for (Fiber* f : fibers) delete f; }
};
inline Machine machine;

[[noreturn]] inline void fail(const char* what, const Fiber* f) {
    fprintf(stderr, "cuda_emulator: %s: thread (%u, %u) of block %u, line %d\n", what, f->thread.x,
            f->thread.y, machine.block.x, f->line);
    abort();
}

// The two halves of a switch. The sanitizer is told which stack comes next, and left out of the
// jump.
#define SWITCHES __attribute__((noinline, no_sanitize("address", "undefined")))

[[noreturn]] SWITCHES inline void jump(void** here) {       // alone: GCC forgets a setjmp beside it
    __builtin_longjmp(here, 1);
}

SWITCHES inline void enter(Fiber* f) {      // from the scheduler into a thread
    machine.now = f;
    __sanitizer_start_switch_fiber(&machine.fake_stack, f->stack, STACK);
    if (__builtin_setjmp(machine.here) == 0) {
        if (f->begun) jump(f->here);
        f->begun = true;
        setcontext(&f->context);
    }
    __sanitizer_finish_switch_fiber(machine.fake_stack, nullptr, nullptr);
}

SWITCHES inline void leave(State state, int line) {         // from a thread into the scheduler
    machine.now->state = state, machine.now->line = line;
    void** fake_stack = state == DONE ? nullptr : &machine.now->fake_stack;
    __sanitizer_start_switch_fiber(fake_stack, machine.bottom, machine.size);
    if (__builtin_setjmp(machine.now->here) == 0) jump(machine.here);
    __sanitizer_finish_switch_fiber(machine.now->fake_stack, nullptr, nullptr);
}

inline void main_of_thread() {
    __sanitizer_finish_switch_fiber(nullptr, &machine.bottom, &machine.size);
    machine.kernel();
    leave(DONE, 0);
}

// All of first .. last-1 wait at the same place: they go on. None waits there: nothing to do.
// Otherwise it is an error.
inline void release(size_t first, size_t last, State state, const char* complaint) {
    auto& all = machine.fibers;
    const Fiber* waits = nullptr;
    for (size_t i = first; i < last; ++i)
        if (all[i]->state == state) waits = all[i];
    if (!waits) return;
    for (size_t i = first; i < last; ++i)
        if (all[i]->state != state || all[i]->line != waits->line) fail(complaint, waits);
    for (size_t i = first; i < last; ++i) all[i]->state = RUNNING;
}

inline std::vector<int64_t> sequence(int64_t n) {
    std::vector<int64_t> order(n);
    std::iota(order.begin(), order.end(), 0);
    if (machine.order == 1) std::reverse(order.begin(), order.end());
    if (machine.order == 2) std::shuffle(order.begin(), order.end(), machine.random);
    return order;
}

inline void run_block(size_t n) {
    static ucontext_t blank;
    static const int filled = getcontext(&blank);
    (void)filled;
    for (size_t i = 0; i < n; ++i) {
        if (i == machine.fibers.size()) machine.fibers.push_back(new Fiber);
        Fiber* f = machine.fibers[i];
        const dim3 size = machine.threads;
        f->thread = dim3(i % size.x, i / size.x % size.y, i / size.x / size.y);
        f->state = RUNNING, f->begun = false, f->shuffles = 0, f->fake_stack = nullptr;
        ASAN_UNPOISON_MEMORY_REGION(f->stack, STACK);
        f->context = blank;
        f->context.uc_stack.ss_sp = f->stack;
        f->context.uc_stack.ss_size = STACK;
        f->context.uc_link = nullptr;
        makecontext(&f->context, main_of_thread, 0);
    }
    const std::vector<int64_t> warps = sequence((n + 31) / 32), lanes = sequence(32);
    const auto& all = machine.fibers;
    for (size_t done = 0; done < n;) {
        for (size_t warp : warps) {             // one warp as far as it gets
            const size_t first = warp * 32, last = std::min(first + 32, n);
            auto is_running = [](Fiber* f) { return f->state == RUNNING; };
            while (std::any_of(all.begin() + first, all.begin() + last, is_running)) {
                for (size_t lane : lanes) {
                    const size_t i = first + lane;
                    if (i < last && is_running(all[i])) enter(all[i]);
                }
                if (last - first < 32 && all[first]->state == AT_SHUFFLE)
                    fail("a shuffle in half a warp", all[first]);
                release(first, last, AT_SHUFFLE, "a shuffle with missing threads");
            }
        }
        release(0, n, AT_BARRIER, "a barrier that not all threads reach");
        auto is_done = [](Fiber* f) { return f->state == DONE; };
        done = std::count_if(all.begin(), all.begin() + n, is_done);
    }
}

inline void barrier(int line) { leave(AT_BARRIER, line); }

inline unsigned index_of_thread() {
    const dim3 size = machine.threads, at = machine.now->thread;
    return at.x + size.x * (at.y + size.y * at.z);
}

inline float shuffle(float x, unsigned lane, int line) {    // -> the x of that lane of the warp
    Fiber* me = machine.now;
    const unsigned turn = me->shuffles++ % 2, first = index_of_thread() / 32 * 32;
    me->given[turn] = x;
    leave(AT_SHUFFLE, line);
    return machine.fibers[first + lane % 32]->given[turn];
}

inline float shuffle_xor(float x, int lanes, int line) {
    return shuffle(x, index_of_thread() ^ lanes, line);
}

}  // namespace emulator

#define threadIdx (emulator::machine.now->thread)
#define blockIdx (emulator::machine.block)
#define blockDim (emulator::machine.threads)
#define gridDim (emulator::machine.grid)
#define __syncthreads() emulator::barrier(__LINE__)
#define __syncwarp() emulator::shuffle_xor(0, 0, __LINE__)
#define __shfl_sync(mask, x, lane) emulator::shuffle(x, lane, __LINE__)
#define __shfl_xor_sync(mask, x, lanes) emulator::shuffle_xor(x, lanes, __LINE__)
#define DYNAMIC_SHARED(name) float* name = emulator::machine.shared

extern "C" inline __attribute__((used)) void emulator_order(int order, unsigned seed) {
    emulator::machine.order = order, emulator::machine.random.seed(seed);
}

// Of the ladders: a launch that does not work says so and stops, as <<< >>> does not.
#define LAUNCH(kernel, blocks, threads, ...) \
    if (launch(kernel, blocks, dim3(threads), 0, nullptr, __VA_ARGS__)) abort()

template <class X> struct Same { using type = X; };

template <class... P>
int launch(void (*kernel)(P...), int64_t blocks, dim3 threads, int64_t shared_bytes, void*,
           typename Same<P>::type... arguments) {
    const size_t n = size_t(threads.x) * threads.y * threads.z;
    if (blocks == 0) return cudaSuccess;
    if (blocks > INT32_MAX || n == 0 || n > 1024 || shared_bytes > 48 << 10)
        return cudaErrorInvalidConfiguration;
    auto& m = emulator::machine;
    m.grid = dim3(unsigned(blocks)), m.threads = threads, m.kernel = [=] { kernel(arguments...); };
    for (int64_t i : emulator::sequence(blocks)) {
        m.block = dim3(unsigned(i));
        m.shared = static_cast<float*>(aligned_alloc(16, (shared_bytes + 15) / 16 * 16));
        memset(m.shared, 0xff, shared_bytes);
        emulator::run_block(n);
        free(m.shared);
    }
    return cudaSuccess;
}
