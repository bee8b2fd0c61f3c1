// FastVim's operations in CUDA: the functions of scan.h, forward and backward. To compile:
//     nvcc -O3 -std=c++17 -ftz=true -c scan_cuda.cu    (-ftz: an exp is one instruction, not four)
// The specification is fastvim.py; scan_cuda.cpp is the Python module around this file.
//
// Lengths are members (w.e, q.n), plain letters count: k direction, t position, g step, n state, ch
// channel, i lane of a vector. Channels are innermost everywhere, so that neighbouring threads take
// neighbouring channels and no tensor is ever transposed. T is the type of the activations; all
// arithmetic and every other tensor is float32.
//
// What makes each kernel fast. dev/cuda builds conv_pool's and the scan's tricks one at a time, for
// timing. No GPU has timed them yet: gains are counted, in bytes moved and in instructions a number
// in bfloat16 (dev/cuda/sass.py; the special functions of silu alone are 2, 3 with the gate).
//     all that walk   how they meet their positions: conv_pool 38 -> 21, its backward 101 -> 63
//         slots in shared memory                   a position's tables are read by one thread
//         eight places for x, unrolled by eight    no moves: they were 1.5 a number
//         rows in words, zeroed before the load    4 -> 1 to unpack one; no selects: 1
//         taps halved beforehand                   silu is 2 instead of 4
//     conv_pool       a warp walks the positions of a step, its neighbours stay in registers
//         both directions in one launch            x is read once instead of twice: memory time / 2
//         four channels a thread                   16-byte loads; look-ups and addresses / 4
//         loads four positions early               four in flight instead of one
//         several warps a step, two stages         2-D pooling and small batches fill the chip
//     selective_scan  a thread owns a channel, its states are registers
//         B and C in shared memory                 read once for 64 channels: their bytes / 64
//         chunks side by side, three phases        chunks times the threads, for twice the exps
//         h again from every eighth step           the backward stores an eighth of the states
//     expand_gate     a block walks rows: expand, skip, convolution, norm and gate in one pass;
//                     57 -> 39, backward 96 -> 68, and no more loops over warps for the sums
//         the row in registers                     s, x and z are read once, y is written once
//         all sums of a row at once, transposed    one barrier where two were; backward three
//         two rows a barrier (forward)             half the barriers, twice the loads in flight
//     add_norm        a warp takes a row           it is read once, and stays in registers
// Tried, and worse: two rows a barrier backward (44 bytes of registers spilled), and reading the
// norm's bias again for each row there (20); z and dy a row early, too (52 in float32). conv_pool
// in 128 registers, for 16 warps an SM and not 12 (32 spilled, 22 instructions).
// Backward kernels recompute what they need from x and sum the parameters' gradients on the way.
//
// No atomics: sums over blocks go through partial sums in scratch memory and a second kernel, in an
// order that depends on sizes alone, so the bits of a result do not depend on timing. Offsets are
// 64-bit; everything is folded into the grid's x.
//
// The tests compile this file with g++ as well (tests/cuda_emulator.h). That asks for: launch()
// instead of <<< >>>, DYNAMIC_SHARED, shuffles with all lanes present, no return of a part of a
// block before a barrier, no inline PTX but in functions that the emulator has too.
#include <algorithm>
#include <climits>
#include <cstring>
#include <type_traits>

#include "scan.h"

#ifndef FASTVIM_EMULATE
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) float name[]

constexpr int64_t SMS = 132;                // an H100's: no query, so the same bits on every chip

__device__ inline float hardware_tanh(float x) {            // __tanhf is CUDA 13's
    asm("tanh.approx.f32 %0, %0;" : "+f"(x));
    return x;
}

// The compiler would move the second factor's extension out of the loop, and multiply 64 bits.
__device__ inline int64_t wide_product(int a, int b) {
    int64_t result;
    asm("mul.wide.s32 %0, %1, %2;" : "=l"(result) : "r"(a), "r"(b));
    return result;
}

template <class X> struct Same { using type = X; };

template <class... P>
int launch(void (*kernel)(P...), int64_t blocks, dim3 threads, int64_t shared_bytes, void* stream,
           typename Same<P>::type... arguments) {
    if (blocks == 0) return cudaSuccess;
    if (blocks > INT_MAX) return cudaErrorInvalidConfiguration;
    void* list[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
    const cudaError_t error = cudaLaunchKernel(kernel, dim3(unsigned(blocks)), threads, list,
                                               shared_bytes, static_cast<cudaStream_t>(stream));
    if (error != cudaSuccess) cudaGetLastError();   // returned here: the next should not find it
    return error;
}
#endif

namespace {

constexpr unsigned ALL = 0xffffffffu;       // the lanes of a full warp
constexpr float EPS = 1e-5f;                // of all norms
constexpr float LOG2_E = 1.44269504f, LN_2 = 0.69314718f;
constexpr int WALKERS = 4;                  // warps of a block, where a warp walks by itself

#define EACH(i, n) _Pragma("unroll") for (int i = 0; i < (n); ++i)
#define EACH_LANE EACH(i, V)

// -------------------------------------------------------------------------------------------------
// Vectors of V neighbouring channels: one load of up to 16 bytes, arithmetic in float32

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
template <class T> __device__ T from_float(float x);
template <> __device__ inline float from_float(float x) { return x; }
template <> __device__ inline __half from_float(float x) { return __float2half_rn(x); }
template <> __device__ inline __nv_bfloat16 from_float(float x) { return __float2bfloat16_rn(x); }

template <int V> struct Vec {
    float v[V];
    __device__ float& operator[](int i) { return v[i]; }
    __device__ const float& operator[](int i) const { return v[i]; }
};

#define VECTOR template <int V> __device__ Vec<V>

VECTOR fill(float x) { Vec<V> r; EACH_LANE r[i] = x; return r; }
VECTOR operator+(Vec<V> a, const Vec<V>& b) { EACH_LANE a[i] += b[i]; return a; }
VECTOR operator*(Vec<V> a, const Vec<V>& b) { EACH_LANE a[i] *= b[i]; return a; }
VECTOR operator*(float a, Vec<V> b) { EACH_LANE b[i] *= a; return b; }
VECTOR operator-(Vec<V> a, float b) { EACH_LANE a[i] -= b; return a; }
VECTOR fma(const Vec<V>& a, const Vec<V>& b, Vec<V> c) {
    EACH_LANE c[i] = fmaf(a[i], b[i], c[i]);
    return c;
}
VECTOR fma(float a, const Vec<V>& b, Vec<V> c) { return fma(fill<V>(a), b, c); }
template <int V> __device__ float total(const Vec<V>& a) {
    float sum = a[V - 1];
    EACH(i, V - 1) sum += a[i];
    return sum;
}
template <int V> __device__ float dot(const Vec<V>& a, const Vec<V>& b) {
    float sum = a[V - 1] * b[V - 1];
    EACH(i, V - 1) sum = fmaf(a[i], b[i], sum);
    return sum;
}

// Row `row` of `width` elements: one instruction, 32 x 32 + 64 bits, as the width is in bytes.
template <class X> __device__ X* row_of(X* p, int row, int width) {
    const char* bytes = reinterpret_cast<const char*>(p);
    return (X*)(bytes + wide_product(row, width * int(sizeof(X))));
}

// V channels as they lie in memory. In words: numbers of 16 bits would be moved one by one.
template <int V, class T> struct alignas(V * sizeof(T)) Pack {
    uint32_t words[V * sizeof(T) / 4];
};

template <int V> __device__ Vec<V> unpack(const Vec<V>& x) { return x; }
template <int V, class T> __device__ Vec<V> unpack(const Pack<V, T>& pack) {
    Vec<V> r;
    T v[V];
    memcpy(v, pack.words, sizeof v);
    EACH_LANE r[i] = to_float(v[i]);
    return r;
}
template <int V> __device__ Vec<V> unpack(const Pack<V, __nv_bfloat16>& pack) {
    Vec<V> r;                               // a shift or a mask, not three instructions a number
    EACH_LANE {
        const uint32_t word = pack.words[i / 2];
        r[i] = __uint_as_float(i % 2 ? word & 0xffff0000u : word << 16);
    }
    return r;
}

template <int V, class T> __device__ Vec<V> load(const T* p) {
    if constexpr (V == 1) return {{to_float(*p)}};
    else return unpack(*reinterpret_cast<const Pack<V, T>*>(p));
}

template <int V, class T> __device__ void store(T* p, const Vec<V>& x) {
    T v[V];
    EACH_LANE v[i] = from_float<T>(x[i]);
    if constexpr (V == 1) {
        *p = v[0];
    } else {
        Pack<V, T> pack;
        memcpy(pack.words, v, sizeof v);
        *reinterpret_cast<Pack<V, T>*>(p) = pack;
    }
}

// The V channels of a thread. WIDE: neighbours, one load of up to 16 bytes. Else, where e or a
// pointer does not allow that, channels `threads` apart, one by one. Lanes beyond the last channel
// load channel 0, which is valid, and store nothing. Pointers are those of a row plus `origin`.
template <int V, bool WIDE> struct Lanes {
    int base, thread, threads, e;

    __device__ int place(int i) const { return WIDE ? thread * V + i : thread + i * threads; }
    __device__ bool live(int i) const { return base + place(WIDE ? 0 : i) < e; }
    __device__ int channel(int i) const { return live(i) ? base + place(i) : 0; }
    __device__ int origin() const { return WIDE ? channel(0) : 0; }
    __device__ int offset(int i) const { return WIDE ? i : channel(i); }

    __device__ Vec<V> only(Vec<V> x) const { EACH_LANE x[i] = live(i) ? x[i] : 0; return x; }
    template <class T> using Row = std::conditional_t<WIDE, Pack<V, T>, Vec<V>>;
    template <class T> __device__ Row<T> read(const T* p) const {
        if constexpr (WIDE) return *reinterpret_cast<const Row<T>*>(p);
        else {
            Vec<V> r;
            EACH_LANE r[i] = to_float(p[channel(i)]);
            return r;
        }
    }
    template <class T> __device__ Vec<V> load(const T* p) const { return unpack(read(p)); }
    template <class T> __device__ void store(T* p, const Vec<V>& x) const {
        if (WIDE && live(0)) ::store(p, x);
        EACH_LANE if (!WIDE && live(i)) p[channel(i)] = from_float<T>(x[i]);
    }
    // A row, or zeros for row -1. In the type of memory: zeroing four numbers of 16 bits is one
    // instruction, and the load is predicated, where four selects followed it.
    template <class T> __device__ Row<T> read_row(const T* p, int row, int width) const {
        Row<T> r{};
        if (row >= 0) r = read(row_of(p, row, width));
        return r;
    }
};

// silu(a) = a sigmoid(a) = h + h tanh(h), h = a / 2. 16-bit activations take the hardware's tanh
// (2^-11 accurate): two instructions a value. float32 pays five, with an exp and a reciprocal. The
// argument is IN times a: taps and biases are multiplied by it once, and not each value.
template <class T> constexpr bool COARSE = !std::is_same<T, float>::value;
template <class T> constexpr float IN = COARSE<T> ? 0.5f : 1;

template <class T> __device__ float sigmoid(float h) {
    if (COARSE<T>) return fmaf(0.5f, hardware_tanh(h), 0.5f);
    return __fdividef(1.0f, 1.0f + __expf(-h));
}

template <class T, int V> __device__ Vec<V> silu(Vec<V> h) {
    EACH_LANE h[i] = COARSE<T> ? fmaf(h[i], hardware_tanh(h[i]), h[i]) : h[i] * sigmoid<T>(h[i]);
    return h;
}

// silu and its derivative sigmoid(a) (1 + a (1 - sigmoid(a)))
template <class T, int V>
__device__ void silu_and_slope(const Vec<V>& h, Vec<V>& value, Vec<V>& slope) {
    value = silu<T>(h);
    EACH_LANE {
        const float s = sigmoid<T>(h[i]);
        slope[i] = fmaf(value[i], 1 - s, s);
    }
}

// -------------------------------------------------------------------------------------------------
// Reductions

// v[i], i < N, in each of 32 lanes -> in lanes i * 32/N and following, as v[0], the sum of v[i]
// over the lanes. An exchange halves the number of values: for N = 4, 6 shuffles where 4 sums in
// turn take 20, and for N = 32, 31 where they take 160.
template <int HALF, int LANES = 16, int N> __device__ void transpose_sum(float (&v)[N]) {
    const bool upper = threadIdx.x & LANES;
    EACH(i, HALF) {
        const float give = upper ? v[i] : v[i + HALF], keep = upper ? v[i + HALF] : v[i];
        v[i] = keep + __shfl_xor_sync(ALL, give, LANES);
    }
    if (HALF == 0) v[0] += __shfl_xor_sync(ALL, v[0], LANES);
    if constexpr (LANES > 1) transpose_sum<HALF / 2, LANES / 2>(v);
}

__device__ inline float warp_sum(float x) {
    float v[1] = {x};
    transpose_sum<0>(v);
    return v[0];
}

// Sums of N values over the block, received by all its threads: transposed sums over warps, a
// barrier, and their sum by all lanes together, which takes the same time for 3 warps as for 12.
// Two buffers in turn: whoever writes one again has passed the barrier of the other, and by then
// everybody has read the first. They begin as zeros, for warps that are not there.
template <int N, int WARPS> struct BlockSum {
    static constexpr int LANES = 32 / N, SIZE = (WARPS * N + 31) / 32 * 32;
    static constexpr int64_t BYTES = 2 * SIZE * sizeof(float);
    float* buffer;                          // shared memory
    int turn = 0;

    __device__ explicit BlockSum(float* buffer) : buffer(buffer) {      // a barrier must follow
        for (int i = threadIdx.x; i < 2 * SIZE; i += blockDim.x) buffer[i] = 0;
    }
    __device__ void operator()(float (&x)[N]) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, value = lane / LANES;
        const int other = lane % LANES;
        float *row = buffer + turn, sum = 0;
        turn ^= SIZE;
        transpose_sum<N / 2>(x);
        if (other == 0) row[warp * N + value] = x[0];
        __syncthreads();
        EACH(i, SIZE / 32) sum += row[i * 32 + other * N + value];
        for (int lanes = LANES / 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(ALL, sum, lanes);
        EACH(i, N) x[i] = __shfl_sync(ALL, sum, i * LANES);
    }
};

// The second stage of every sum over blocks: parts are rows of columns, added up from the first row
// to the last. The columns belong to up to three outputs, one after another.
struct Outputs {
    float* out[3];                          // null: nobody wants it
    int64_t columns[3];
};
constexpr int SUM_ROWS = 16;

__global__ void sum_parts_kernel(Outputs to, const float* parts, int64_t rows, int64_t columns) {
    DYNAMIC_SHARED(shared);                                 // [SUM_ROWS][32]
    int64_t at = int64_t(blockIdx.x) * 32 + threadIdx.x;
    float sum = 0;
    if (at < columns) {
#pragma unroll 8
        for (int64_t r = threadIdx.y; r < rows; r += SUM_ROWS) sum += parts[r * columns + at];
    }
    shared[threadIdx.y * 32 + threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y > 0 || at >= columns) return;
    for (int r = 1; r < SUM_ROWS; ++r) sum += shared[r * 32 + threadIdx.x];
    EACH(i, 3) {
        if (to.out[i] && at >= 0 && at < to.columns[i]) to.out[i][at] = sum;
        at -= to.columns[i];
    }
}

// -------------------------------------------------------------------------------------------------
// Walks

// What a kernel needs to know of a position t: its weight and step, -1 for a hole; the token three
// positions ahead, -1 where there is none or a hole; its own token, -1 outside the image.
struct alignas(16) Slot {
    float weight = 0;
    int step = -1, ahead = -1, token = -1, t = INT_MIN;
};

// Slots are looked up in the tables by one thread each, SLOTS at a time, into shared memory, and
// read there by all: an instruction a position, where four positions took 20 look-ups.
constexpr int SLOTS = 32;                   // a multiple of eight
constexpr int64_t SLOT_BYTES = (SLOTS + 4) * sizeof(Slot);          // four are read early

// The walk of one image
struct ImageWalk : Walk {
    int64_t image;
    int l, p, e;

    __device__ ImageWalk(const Walk& walk, const Sizes& n, int64_t image)
        : Walk(walk), image(image), l(int(n.l)), p(int(n.p)), e(int(n.e)) {
        const int64_t row = rows == 1 ? 0 : image;
        token += row * l;
        group += row * l;
        weight += row * l;
        member += row * l;
        start += row * (p + 1);
    }
    __device__ Slot slot(int t) const {
        Slot s;
        s.t = t;
        if (unsigned(t) < unsigned(l)) s.weight = weight[t], s.step = group[t], s.token = token[t];
        if (unsigned(t + 3) < unsigned(l) && group[t + 3] >= 0) s.ahead = token[t + 3];
        return s;
    }
    // Slots of members, or of positions if there are none, from `first` on, before `end`
    __device__ void look_up(Slot* slots, const int32_t* members, int first, int end, int thread,
                            int threads) const {
        for (int i = thread; i < SLOTS + 4; i += threads) {
            const int at = first + i;
            slots[i] = at < end ? slot(members ? members[at] : at) : Slot();
        }
    }
};

// How steps are dealt out: `steps` of an image make a unit, whose members are cut into `slices`.
struct Cut {
    int64_t steps, slices, units;           // units of an image
};

// One piece of a walk that is cut: steps g0 .. g1 - 1, members m0 .. m1 - 1
struct Work : ImageWalk {
    int g0 = 0, g1 = 0, m0 = 0, m1 = 0;
    int64_t share = 0;                      // number of the piece within its image

    __device__ Work(const Walk& walk, const Sizes& n, const Cut& cut, int64_t item)
        : ImageWalk(walk, n, min(item / (cut.units * cut.slices), n.b - 1)) {
        if (item >= n.b * cut.units * cut.slices) return;   // more walkers than work
        share = item % (cut.units * cut.slices);
        g0 = int(share / cut.slices * cut.steps);
        g1 = int(min(n.p, g0 + cut.steps));
        const int64_t slice = share % cut.slices, first = start[g0], count = start[g1] - first;
        m0 = int(first + count * slice / cut.slices);
        m1 = int(first + count * (slice + 1) / cut.slices);
    }
};

// The x of eight positions. Walks go on by eight, unrolled: position i of them finds its own x in
// x[i + 3] and its neighbours in x[i] .. x[i + 6], modulo eight. Nothing is ever moved (ten places,
// moved on by four, were 24 moves for 16 numbers). Outside the image and in holes x is zero.
template <class T, int V, bool WIDE> struct Window {
    const ImageWalk& w;
    const Lanes<V, WIDE> lanes;
    const T* xz;                            // of the image
    Vec<V> x[8] = {};
    int next = INT_MIN;                     // the position that is expected

    __device__ Window(const ImageWalk& w, const Lanes<V, WIDE>& lanes, const void* xz)
        : w(w), lanes(lanes),
          xz(static_cast<const T*>(xz) + w.image * w.l * 2 * w.e + lanes.origin()) {}

    using Row = typename Lanes<V, WIDE>::template Row<T>;
    __device__ Row read(int token) const { return lanes.read_row(xz, token, 2 * w.e); }
    // Before position i of the eight, t: six neighbours, if it does not follow the one before.
    __device__ void enter(int i, int t) {
        if (t != next) EACH(j, 6) x[(i + j) % 8] = unpack(read(w.slot(t - 6 + j).ahead));
        next = t + 1;
    }
    __device__ void add(int i, const Row& ahead) { x[(i + 6) % 8] = unpack(ahead); }
};

// Both directions' convolutions, times IN. taps[k][j] multiplies the neighbour j steps back (k = 0)
// or ahead.
template <class T, int V> struct Conv {
    Vec<V> taps[2][4], bias[2];

    template <bool WIDE>
    __device__ Conv(const float* weights, const float* biases, const Lanes<V, WIDE>& lanes) {
        EACH(k, 2) EACH_LANE {
            const int row = k * lanes.e + lanes.channel(i);
            Vec<4> four;
            if (WIDE) four = load<4>(weights + row * 4);
            else EACH(j, 4) four[j] = weights[row * 4 + j];
            EACH(j, 4) taps[k][j][i] = IN<T> * four[3 - j];
            bias[k][i] = IN<T> * biases[row];
        }
    }
    __device__ Vec<V> operator()(int k, const Vec<V> (&x)[8], int i) const {
        Vec<V> c = bias[k];
        EACH(j, 4) c = fma(taps[k][j], x[(i + 3 + (k ? j : -j)) % 8], c);
        return c;
    }
};

// -------------------------------------------------------------------------------------------------
// conv_pool: x -> both convolutions -> silu -> mean or maximum over the steps

// The running mean or maximum of V channels
template <int V, bool MAX> struct Pool {
    Vec<V> value;
    int arg[V];

    __device__ void clear() { EACH_LANE value[i] = 0, arg[i] = -1; }
    __device__ void take(int i, float c, int t) {           // the first of equal maxima; NaN wins
        const bool better = arg[i] < 0 || c > value[i] || (c != c && value[i] == value[i]);
        if (!better) return;
        value[i] = c;
        arg[i] = t;
    }
    __device__ void add(const Vec<V>& c, float weight, int t) {
        EACH_LANE if (MAX) take(i, c[i], t); else value[i] = fmaf(weight, c[i], value[i]);
    }
    __device__ void merge(float other, int other_arg) {     // V = 1; of positions that come after
        if (!MAX) value[0] += other;
        else if (other_arg >= 0) take(0, other, other_arg);
    }
};

// A warp is a walker: it visits the members of its steps, for 32 V channels. Where steps are cut
// into slices, each slice writes its own part, and pool_parts_kernel merges them.
template <class T, bool WIDE, bool MAX>
__global__ void __launch_bounds__(32 * WALKERS) conv_pool_kernel(ConvPool a, Cut cut) {
    constexpr int V = 4;
    DYNAMIC_SHARED(shared);                                 // [walker] slots
    Slot* slots = reinterpret_cast<Slot*>(shared) + threadIdx.y * (SLOTS + 4);
    const int64_t tiles = (a.n.e + 32 * V - 1) / (32 * V);
    const int64_t item = blockIdx.x / tiles * WALKERS + threadIdx.y;
    const Work w(a.walk, a.n, cut, item);
    const Lanes<V, WIDE> lanes{int(blockIdx.x % tiles * 32 * V), int(threadIdx.x), 32, w.e};
    const int64_t direction = a.n.b * w.p * w.e, part = w.share % cut.slices * 2 * direction;
    const int64_t first = part + w.image * w.p * w.e + lanes.origin();

    const Conv<T, V> conv(a.conv_weight, a.conv_bias, lanes);
    Window<T, V, WIDE> window(w, lanes, a.xz);
    Pool<V, MAX> pool[2];
    EACH(k, 2) pool[k].clear();
    int g = w.g0;
    auto write = [&]() {                                    // step g is complete
        EACH(k, 2) {
            const int64_t at = first + k * direction + int64_t(g) * w.e;
            lanes.store(a.pooled + at, pool[k].value);
            EACH_LANE if (MAX && lanes.live(i)) a.argmax[at + lanes.offset(i)] = pool[k].arg[i];
            pool[k].clear();
        }
        ++g;
    };
    for (int m = w.m0; m < w.m1; m += SLOTS) {
        __syncwarp();
        w.look_up(slots, w.member, m, w.m1, threadIdx.x, 32);
        __syncwarp();
        typename Window<T, V, WIDE>::Row ahead[4];          // four loads in flight
        EACH(i, 4) ahead[i] = window.read(slots[i].ahead);
        for (int at = 0; at < min(SLOTS, w.m1 - m); at += 8) EACH(i, 8) {
            const Slot slot = slots[at + i];
            if (slot.token < 0) break;                      // the last member is done
            window.enter(i, slot.t);
            window.add(i, ahead[i % 4]);
            ahead[i % 4] = window.read(slots[at + i + 4].ahead);
#pragma unroll 1
            while (g < slot.step) write();                  // empty steps are written as zero
            EACH(k, 2) pool[k].add(silu<T>(conv(k, window.x, i)), slot.weight, slot.t);
        }
    }
#pragma unroll 1
    while (g < w.g1) write();
}

template <bool MAX>
__global__ void pool_parts_kernel(float* pooled, int32_t* argmax, const float* parts,
                                  const int32_t* arg_parts, int64_t rows, int64_t n) {
    const int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at >= n) return;
    Pool<1, MAX> pool;
    pool.clear();
    for (int64_t r = 0; r < rows; ++r)
        pool.merge(parts[r * n + at], MAX ? arg_parts[r * n + at] : 0);
    pooled[at] = pool.value[0];
    if (MAX) argmax[at] = pool.arg[0];
}

// The backward walks positions, not steps. At position t both da[t] become known; da0[t] belongs to
// dx[t-3 .. t] and da1[t] to dx[t .. t+3], so unfinished dx go round in eight places as x does, and
// dx[t-3] is complete. A run of positions starts three early and ends three late.
// Two channels a thread: four would need over 220 registers, and leave too few warps on an SM to
// hide the loads. Sums for the parameters stay in registers until the end of the run; a block adds
// them up into its row of parts, [dconv_weight 2 e 4 | dconv_bias 2 e | dD 2 e].
template <class T, bool WIDE, bool MAX>
__global__ void __launch_bounds__(32 * WALKERS, 3)
conv_pool_backward_kernel(ConvPoolBackward a, float* parts, int run) {
    constexpr int V = 2, U = 4;
    DYNAMIC_SHARED(shared);                 // [walker] slots, then [walker][12][32 V] sums
    Slot* slots = reinterpret_cast<Slot*>(shared) + threadIdx.y * (SLOTS + 4);
    const int64_t tiles = (a.n.e + 32 * V - 1) / (32 * V), tile = blockIdx.x % tiles;
    const int64_t item = blockIdx.x / tiles * WALKERS + threadIdx.y;
    const int64_t runs = (a.n.l + run - 1) / run;
    const bool idle = item >= a.n.b * runs;                 // more walkers than runs
    const ImageWalk w(a.walk, a.n, idle ? 0 : item / runs);
    const int t0 = idle ? 0 : int(item % runs * run), t1 = idle ? 0 : min(w.l, t0 + run);
    const Lanes<V, WIDE> lanes{int(tile * 32 * V), int(threadIdx.x), 32, w.e};
    const int64_t row0 = w.image * w.l, origin = lanes.origin();
    const T* g = static_cast<const T*>(a.g) + row0 * w.e + origin;
    T* dxz = static_cast<T*>(a.dxz) + row0 * 2 * w.e + origin;
    const int64_t direction = a.n.b * w.p * w.e, first = w.image * w.p * w.e + origin;

    // Taps are multiplied by IN, so all gradients of c are divided by it, and its sums multiplied.
    const Conv<T, V> conv(a.conv_weight, a.conv_bias, lanes);
    Vec<V> skip[2], dpooled[2], dtaps[2][4], dbias[2], dD[2], dx[8] = {};
    int arg[2][V], step = -1;                               // the step that dpooled belongs to
    EACH(k, 2) {
        skip[k] = a.D ? 1 / IN<T> * lanes.load(a.D + k * w.e + origin) : fill<V>(0);
        dpooled[k] = dbias[k] = dD[k] = fill<V>(0);
        EACH(j, 4) dtaps[k][j] = fill<V>(0);
        EACH_LANE arg[k][i] = -1;
    }

    Window<T, V, WIDE> window(w, lanes, a.xz);
    const int end = idle ? t0 - 3 : t1 + 3;
    if (!idle) window.enter(0, t0 - 3);
    for (int u = t0 - 3; u < end; u += SLOTS) {
        __syncwarp();
        w.look_up(slots, nullptr, u - 3, end, threadIdx.x, 32);     // slots[0]: of u - 3
        __syncwarp();
        for (int at = 0; at < min(SLOTS, end - u); at += 8) EACH(half, 2) {
            Slot slot[U];
            typename Window<T, V, WIDE>::Row ahead[U], gs[U];
            EACH(i, U) slot[i] = slots[at + half * U + i + 3];
            EACH(i, U) ahead[i] = window.read(slot[i].ahead);
            EACH(i, U) gs[i] = lanes.read_row(g, slot[i].step < 0 ? -1 : slot[i].token, w.e);
            EACH(i, U) {
                const int place = half * U + i, t = u + at + place;
                const bool own = t >= t0 && t < t1;         // else the neighbouring run counts it
                window.add(place, ahead[i]);
                dx[(place + 6) % 8] = fill<V>(0);
                if (slot[i].step >= 0 && slot[i].step != step) {
                    step = slot[i].step;
                    EACH(k, 2) {
                        const int64_t row = first + k * direction + int64_t(step) * w.e;
                        dpooled[k] = 1 / IN<T> * lanes.load(a.dpooled + row);
                        EACH_LANE if (MAX) arg[k][i] = a.argmax[row + lanes.offset(i)];
                    }
                }
                if (slot[i].step >= 0) EACH(k, 2) {
                    const Vec<V> gt = unpack(gs[i]);
                    Vec<V> c, slope, dc = skip[k] * gt;
                    silu_and_slope<T>(conv(k, window.x, place), c, slope);
                    if (!MAX) dc = fma(slot[i].weight, dpooled[k], dc);
                    else EACH_LANE if (arg[k][i] == t) dc[i] += dpooled[k][i];
                    const Vec<V> da = dc * slope;
                    EACH(j, 4) {
                        const int near = (place + 3 + (k ? j : -j)) % 8;
                        dx[near] = fma(conv.taps[k][j], da, dx[near]);
                        if (own) dtaps[k][j] = fma(da, window.x[near], dtaps[k][j]);
                    }
                    if (own) dbias[k] = dbias[k] + da;
                    if (own) dD[k] = fma(gt, c, dD[k]);
                }
                const Slot& done = slots[at + place];
                if (t - 3 >= t0 && t - 3 < t1)
                    lanes.store(row_of(dxz, done.token, 2 * w.e),
                                done.step < 0 ? fill<V>(0) : dx[place]);
            }
        }
    }

    float* sums = shared + WALKERS * SLOT_BYTES / sizeof(float);
    float* mine = sums + threadIdx.y * 12 * 32 * V;
    EACH(k, 2) EACH_LANE {
        const int place = lanes.place(i);
        EACH(j, 4) mine[(k * 4 + 3 - j) * 32 * V + place] = IN<T> * dtaps[k][j][i];
        mine[(8 + k) * 32 * V + place] = IN<T> * dbias[k][i];
        mine[(10 + k) * 32 * V + place] = dD[k][i];
    }
    __syncthreads();
    parts += blockIdx.x / tiles * 12 * w.e;
    for (int i = threadIdx.y * 32 + threadIdx.x; i < 12 * 32 * V; i += 32 * WALKERS) {
        float sum = 0;
        for (int walker = 0; walker < WALKERS; ++walker) sum += sums[walker * 12 * 32 * V + i];
        const int what = i / (32 * V), channel = lanes.base + i % (32 * V);
        const int tap = (what / 4 * w.e + channel) * 4 + what % 4;
        if (channel < w.e) parts[what < 8 ? tap : what * w.e + channel] = sum;
    }
}

// -------------------------------------------------------------------------------------------------
// expand_gate: y = norm((s_0 + s_1 + D_0 c_0 + D_1 c_1) / 2) silu(z)

// A block walks rows, U at a time; a thread has V channels of them in registers. All sums over the
// channels of U rows are taken at once: N of them, 2 U forward and 4 U backward. This is what both
// directions share, A their arguments. What is missing costs nothing to leave in: D is zero then,
// and a norm without mean has `centre` zero.
template <class T, int V, int U, int N, bool WIDE, int THREADS, class A> struct Rows {
    const A& a;
    const ImageWalk& w;
    const Lanes<V, WIDE> lanes;
    Slot* slots;
    BlockSum<N, THREADS / 32> sum;
    Window<T, V, WIDE> window;
    const float *s0, *s1;
    const Conv<T, V> conv;
    Vec<V> skip[2], norm_weight, norm_bias;
    Vec<V> expanded;                        // (s_0 + s_1) / 2 of `step`
    int step = -1;
    const float inverse, centre;            // 1 / e, or 0 without a norm; the same, without a mean
    float pivot = 0;                        // near the mean of the next row
    int begun = 0;

    __device__ Rows(const A& a, const ImageWalk& w, float* shared)
        : a(a), w(w), lanes{0, int(threadIdx.x), int(blockDim.x), w.e},
          slots(reinterpret_cast<Slot*>(shared)), sum(shared + SLOT_BYTES / sizeof(float)),
          window(w, lanes, a.xz), conv(a.conv_weight, a.conv_bias, lanes),
          inverse(a.norm_weight ? 1.0f / w.e : 0), centre(a.norm_bias ? inverse : 0) {
        const int origin = lanes.origin();
        s0 = a.s + w.image * w.p * w.e + origin;
        s1 = s0 + a.n.b * w.p * w.e;
        auto parameter = [&](const float* p, float other) {     // zero for idle lanes
            return lanes.only(p ? lanes.load(p + origin) : fill<V>(other));
        };
        EACH(k, 2) skip[k] = 0.5f * parameter(a.D ? a.D + k * w.e : nullptr, 0);
        norm_weight = parameter(a.norm_weight, 1);
        norm_bias = parameter(a.norm_bias, 0);
        expanded = fill<V>(0);
    }

    __device__ typename Window<T, V, WIDE>::Row read_z(int token) const {
        return lanes.read_row(window.xz, 2 * token + 1, w.e);
    }
    // Position `place` of eight, a position of the step `at`: what is normalised of it
    __device__ Vec<V> mix(int place, const typename Window<T, V, WIDE>::Row& ahead, int at) {
        window.add(place, ahead);
        if (at >= 0 && at != step) {
            step = at;
            const Vec<V> both = lanes.load(row_of(s0, at, w.e)) + lanes.load(row_of(s1, at, w.e));
            expanded = 0.5f * lanes.only(both);
        }
        Vec<V> v = expanded;
        EACH(k, 2) v = fma(skip[k], silu<T>(conv(k, window.x, place)), v);
        return v;
    }
    // v -> (v - mean) scale, from the sums of v and its squares in one pass: nothing cancels where
    // a number near the mean is taken from v first, that of the row before. The first row has none
    // and is summed twice. Backward, of dhat, the gradient of the result, also the mean and that
    // of dhat times the result, as x[0 ..] and x[U ..].
    __device__ void normalise(Vec<V> (&v)[U], const Vec<V>* dhat, float (&scale)[U],
                              float (&x)[N]) {
        float shift = pivot;
        for (;;) {
            EACH(i, U) {
                v[i] = v[i] + lanes.only(fill<V>(-shift));
                x[i] = total(v[i]);
                x[U + i] = dot(v[i], v[i]);
                if (N > 2 * U) x[2 * U + i] = total(dhat[i]);
                if (N > 2 * U) x[3 * U + i] = dot(dhat[i], v[i]);
            }
            sum(x);
            shift = x[U - 1] * centre;
            if (!(fabsf(shift) < 1e30f)) shift = 0;         // a NaN stays in its row
            pivot += shift;
            if (begun) break;
            begun = 1;
        }
        EACH(i, U) {
            const float mean = centre > 0 ? x[i] * centre : 0;      // of infinite sums, too
            const float variance = x[U + i] * inverse - mean * mean;
            scale[i] = inverse > 0 ? rsqrtf(fabsf(variance) + EPS) : 1;
            v[i] = scale[i] * (v[i] - mean);                // zero where a row is constant
            if (N > 2 * U) {
                const float along = scale[i] * (x[3 * U + i] - mean * x[2 * U + i]);
                x[i] = x[2 * U + i] * centre;
                x[U + i] = along * inverse;
            }
        }
    }
};

template <class T, int V, int U, bool WIDE, int THREADS>
__global__ void __launch_bounds__(THREADS, 1) expand_gate_kernel(ExpandGate a, int run) {
    DYNAMIC_SHARED(shared);
    const int64_t runs = (a.n.l + run - 1) / run;
    const ImageWalk w(a.walk, a.n, blockIdx.x / runs);
    const int t0 = int(blockIdx.x % runs * run), t1 = min(w.l, t0 + run);
    Rows<T, V, U, 2 * U, WIDE, THREADS, ExpandGate> rows(a, w, shared);
    T* y = static_cast<T*>(a.y) + w.image * w.l * w.e + rows.lanes.origin();
    rows.window.enter(0, t0);
    for (int t = t0; t < t1; t += SLOTS) {
        __syncthreads();
        w.look_up(rows.slots, nullptr, t, t1, threadIdx.x, blockDim.x);
        __syncthreads();
        for (int at = 0; at < min(SLOTS, t1 - t); at += 8)
#pragma unroll(WIDE ? 8 / U : 1)
        for (int turn = 0; turn < 8 / U; ++turn) {
            if (t + at + turn * U >= t1) break;
            Slot slot[U];
            typename Window<T, V, WIDE>::Row ahead[U], z[U];
            Vec<V> v[U];
            float scale[U], sums[2 * U];
            EACH(i, U) slot[i] = rows.slots[at + turn * U + i];
            EACH(i, U) ahead[i] = rows.window.read(slot[i].ahead);
            EACH(i, U) {                                    // a hole's z is zero, and so is its y
                z[i] = rows.read_z(slot[i].step < 0 ? -1 : slot[i].token);
            }
            EACH(i, U) v[i] = rows.mix(turn * U + i, ahead[i], slot[i].step);
            rows.normalise(v, nullptr, scale, sums);
            EACH(i, U) {
                const Vec<V> normed = fma(v[i], rows.norm_weight, rows.norm_bias);
                const Vec<V> gated = normed * silu<T>(IN<T> * unpack(z[i]));
                if (slot[i].token >= 0) rows.lanes.store(row_of(y, slot[i].token, w.e), gated);
            }
        }
    }
}

// The backward walks the members of steps, so that ds of a step is a sum in registers. Norm of v:
// hat = (v - mean) scale;  dv = scale (dhat - mean(dhat) - hat mean(dhat hat)),  where the first
// mean is LayerNorm's alone. parts: a row per block, [dnorm_weight e | dnorm_bias e]
template <class T, int V, bool WIDE, int THREADS>
__global__ void __launch_bounds__(THREADS, 1)
expand_gate_backward_kernel(ExpandGateBackward a, Cut cut, float* parts) {
    DYNAMIC_SHARED(shared);
    const Work w(a.walk, a.n, cut, blockIdx.x);
    Rows<T, V, 1, 4, WIDE, THREADS, ExpandGateBackward> rows(a, w, shared);
    const Lanes<V, WIDE>& lanes = rows.lanes;
    const int64_t row0 = w.image * w.l, origin = lanes.origin();
    const T* dy = static_cast<const T*>(a.dy) + row0 * w.e + origin;
    T* g = static_cast<T*>(a.g) + row0 * w.e + origin;
    T* dz = static_cast<T*>(a.dxz) + row0 * 2 * w.e + w.e + origin;
    const int64_t slice = w.share % cut.slices;             // with slices, ds is [slice][b][p][e]
    float* ds = a.ds + (slice * a.n.b + w.image) * w.p * w.e + origin;

    // Walkers of steps never meet holes: a share of the positions is looked through for them.
    const int64_t shares = cut.units * cut.slices;
    for (int64_t t = w.share * w.l / shares; t < (w.share + 1) * w.l / shares; ++t) {
        if (w.group[t] >= 0) continue;
        lanes.store(row_of(g, w.token[t], w.e), fill<V>(0));
        lanes.store(row_of(dz, w.token[t], 2 * w.e), fill<V>(0));
    }

    Vec<V> dnorm_weight = fill<V>(0), dnorm_bias = fill<V>(0), sum = fill<V>(0);
    int step = w.g0;
    auto write = [&]() {                                    // the step is complete
        lanes.store(row_of(ds, step, w.e), sum);
        sum = fill<V>(0);
        ++step;
    };
    for (int m = w.m0; m < w.m1; m += SLOTS) {
        __syncthreads();
        w.look_up(rows.slots, w.member, m, w.m1, threadIdx.x, blockDim.x);
        __syncthreads();
        auto ahead = rows.window.read(rows.slots[0].ahead);
        for (int at = 0; at < min(SLOTS, w.m1 - m); at += 8)
#pragma unroll(WIDE ? 8 : 1)
        for (int turn = 0; turn < 8; ++turn) {
            const Slot slot = rows.slots[at + turn];
            if (slot.token < 0) break;                      // the last member is done
            const auto z_row = rows.read_z(slot.token);
            const auto dy_row = lanes.read_row(dy, slot.token, w.e);
            rows.window.enter(turn, slot.t);
            Vec<V> v[1] = {rows.mix(turn, ahead, slot.step)}, gate, slope;
            ahead = rows.window.read(rows.slots[at + turn + 1].ahead);      // a position early
            float scale[1], means[4];
            silu_and_slope<T>(IN<T> * unpack(z_row), gate, slope);
            const Vec<V> through_norm = unpack(dy_row) * gate;
            const Vec<V> through_gate = unpack(dy_row) * slope;
            const Vec<V> dhat = through_norm * rows.norm_weight;
            rows.normalise(v, &dhat, scale, means);
            const Vec<V> hat = v[0], normed = fma(hat, rows.norm_weight, rows.norm_bias);
            const float half = 0.5f * scale[0];
            const Vec<V> rest = fma(-means[1], hat, dhat);
            const Vec<V> dv = half * (rest - means[0]);
            lanes.store(row_of(dz, slot.token, 2 * w.e), through_gate * normed);
            lanes.store(row_of(g, slot.token, w.e), dv);
            dnorm_weight = fma(through_norm, hat, dnorm_weight);
            dnorm_bias = dnorm_bias + through_norm;
#pragma unroll 1
            while (step < slot.step) write();               // empty steps are written as zero
            sum = sum + dv;
        }
    }
    while (step < w.g1) write();
    if (!a.norm_weight) return;
    parts += int64_t(blockIdx.x) * 2 * w.e + origin;
    lanes.store(parts, dnorm_weight);
    lanes.store(parts + w.e, dnorm_bias);
}

// -------------------------------------------------------------------------------------------------
// add_norm: a warp takes a row, and keeps it in registers

// Channels (32 j + lane) V and following are part j of a lane, one of N. Rows of more than eight
// parts stay in local memory.
template <int V, int N> struct Parts {
    int d;
    template <class F> __device__ void each(F f) const {
#pragma unroll(N <= 8 ? N : 1)
        for (int j = 0; j < N; ++j) {
            const int at = (j * 32 + int(threadIdx.x)) * V;
            if (at < d) f(j, at);
        }
    }
    template <class F> __device__ float mean(F f) const {
        float sum = 0;
        each([&](int j, int) { sum += f(j); });
        return warp_sum(sum) / d;
    }
    // x -> (x - mean) scale. Two passes over registers: nothing cancels.
    __device__ float normalise(Vec<V> (&x)[N], bool centred) const {
        const float m = centred ? mean([&](int j) { return total(x[j]); }) : 0;
        each([&](int j, int) { x[j] = x[j] - m; });
        const float scale = rsqrtf(mean([&](int j) { return dot(x[j], x[j]); }) + EPS);
        each([&](int j, int) { x[j] = scale * x[j]; });
        return scale;
    }
};

template <class T, int V, int N> __global__ void add_norm_kernel(AddNorm a) {
    const int64_t row = int64_t(blockIdx.x) * WALKERS + threadIdx.y;
    if (row >= a.rows) return;                              // a whole warp, and no barrier follows
    const Parts<V, N> parts{int(a.d)};
    const T* hidden = static_cast<const T*>(a.hidden) + row * a.d;
    T* u = static_cast<T*>(a.u) + row * a.d;
    Vec<V> x[N];
    parts.each([&](int j, int at) {
        x[j] = load<V>(a.residual + row * a.d + at) + load<V>(hidden + at);
        store(a.out + row * a.d + at, x[j]);
    });
    parts.normalise(x, a.bias);
    parts.each([&](int j, int at) {
        const Vec<V> bias = a.bias ? load<V>(a.bias + at) : fill<V>(0);
        store(u + at, fma(x[j], load<V>(a.weight + at), bias));
    });
}

// The parameters' gradients are summed in shared memory, one copy per warp, and written as the
// block's row of sums, [dweight d | dbias d].
template <class T, int V, int N>
__global__ void add_norm_backward_kernel(AddNormBackward a, float* sums, int run) {
    DYNAMIC_SHARED(shared);                                 // [warp][2][d]
    const int lane = threadIdx.x, d = int(a.d);
    const Parts<V, N> parts{d};
    float *dweight = shared + threadIdx.y * 2 * d, *dbias = dweight + d;
    for (int i = lane; i < 2 * d; i += 32) dweight[i] = 0;
    __syncwarp();
    const int64_t end = min(a.rows, int64_t(blockIdx.x + 1) * run);
    for (int64_t row = int64_t(blockIdx.x) * run + threadIdx.y; row < end; row += blockDim.y) {
        const T* du = static_cast<const T*>(a.du) + row * d;
        Vec<V> hat[N], dhat[N];
        parts.each([&](int j, int at) {
            hat[j] = load<V>(a.residual + row * d + at);
            dhat[j] = load<V>(du + at) * load<V>(a.weight + at);
        });
        const float scale = parts.normalise(hat, a.centred);
        const float dmean = a.centred ? parts.mean([&](int j) { return total(dhat[j]); }) : 0;
        const float dscale = parts.mean([&](int j) { return dot(dhat[j], hat[j]); });
        parts.each([&](int j, int at) {
            const Vec<V> up = load<V>(du + at);
            Vec<V> dr = scale * fma(-dscale, hat[j], dhat[j] - dmean);
            if (a.dout) dr = dr + load<V>(a.dout + row * d + at);
            store(a.dresidual + row * d + at, dr);
            if (a.dhidden) store(static_cast<T*>(a.dhidden) + row * d + at, dr);
            EACH_LANE {
                dweight[at + i] += up[i] * hat[j][i];
                dbias[at + i] += up[i];
            }
        });
    }
    __syncthreads();
    for (int i = threadIdx.y * 32 + lane; i < 2 * d; i += 32 * blockDim.y) {
        float sum = 0;
        for (unsigned warp = 0; warp < blockDim.y; ++warp) sum += shared[warp * 2 * d + i];
        sums[int64_t(blockIdx.x) * 2 * d + i] = sum;
    }
}

// -------------------------------------------------------------------------------------------------
// selective_scan: h_t = exp(delta A) h_{t-1} + delta B x,  s_t = C h_t + D x

constexpr int STATES = 16;                  // of a launch: more states are more launches
constexpr int SEGMENT = 8;                  // steps whose B and C are staged, and loads in flight
constexpr int SCAN_THREADS = 64;
constexpr int64_t SCAN_SHARED = SEGMENT * 2 * STATES * sizeof(float);
constexpr int64_t SCAN_BACKWARD_SHARED =
    SCAN_SHARED + SEGMENT * (STATES + 3) * SCAN_THREADS * sizeof(float);

// A scan, its launch and its scratch memory
struct Scan : SelectiveScan {
    int64_t first = 0;                      // this launch's states are first .. first + 15
    int64_t chunk = 0, chunks = 1;          // steps of a chunk; chunks of the sequence
    float *state = nullptr, *adjoint = nullptr;     // [chunks][k b][16][e], if there are chunks
    float* decay = nullptr;                 // [chunks][k b][e]
    const float* ds = nullptr;              // the backward's: [k][b][p][e], or shared [b][p][e]
    int64_t shared = 0;
};

__device__ inline float softplus(float x) { return x > 20 ? x : log1pf(expf(x)); }

// What a thread knows: its channel, its chunk, and A in registers.
struct Channel {
    int64_t kb, k, ch, chunk;
    int64_t first, last;                    // steps first .. last-1, in the direction of the scan
    bool live;
    float A[STATES], bias;                  // A log2(e), for exp2

    __device__ Channel(const Scan& q) {
        const int64_t tiles = (q.e + SCAN_THREADS - 1) / SCAN_THREADS, rest = blockIdx.x / tiles;
        ch = blockIdx.x % tiles * SCAN_THREADS + threadIdx.x;
        kb = rest % (q.k * q.b);
        k = kb / q.b;
        chunk = rest / (q.k * q.b);
        live = ch < q.e;
        first = chunk * q.chunk;
        last = min(q.p, first + q.chunk);
        bias = live && q.dt_bias ? q.dt_bias[k * q.e + ch] : 0;
        const float* row = q.A + (k * q.e + ch) * q.n + q.first;
        EACH(n, STATES) A[n] = live && q.first + n < q.n ? row[n] * LOG2_E : 0;
    }
    __device__ int64_t row(const Scan& q, int64_t i) const {
        return kb * q.p + (k ? q.p - 1 - i : i);
    }
    // where state n of this chunk is in Scan::state and adjoint
    __device__ int64_t slot(const Scan& q, int n) const {
        return ((chunk * q.k * q.b + kb) * STATES + n) * q.e + ch;
    }
    // p [k][b][p][e] at step i, one instruction from a pointer that stays
    template <class X> __device__ X* step(const Scan& q, X* p, int64_t i) const {
        return row_of(p + row(q, 0) * q.e + ch, int(i), int(k ? -q.e : q.e));
    }
    // x, dt or ds of step i, or zero; a shared ds is that of direction 0 for both
    __device__ float at(const Scan& q, const float* p, int64_t i, int64_t shared = 0) const {
        return live && i < last ? *step(q, p - shared * k * q.b * q.p * q.e, i) : 0;
    }
};

// B and C of SEGMENT steps into shared memory [step][B, C][16], for all channels of the block;
// absent states are zero.
__device__ inline void stage(const Scan& q, const Channel& my, int64_t i, float* shared) {
    __syncthreads();
    for (int j = threadIdx.x; j < SEGMENT * 2 * STATES; j += SCAN_THREADS) {
        const int64_t step = i + j / (2 * STATES), n = q.first + j % STATES;
        const float* from = j / STATES % 2 ? q.C : q.B;
        const bool here = step < my.last && n < q.n;
        shared[j] = here ? from[my.row(q, step) * q.stride + n] : 0;
    }
    __syncthreads();
}

// One pass over a chunk.
//     LOCAL    phase 1: as if the chunk began with h = 0. Leaves its last h and the sum of delta:
//              over the chunk the state decays by exp(A sum(delta)), one number for n products.
//     ADJOINT  also what the backward needs of phase 1: the gradient that the chunk sends to the h
//              before it, R = sum_t (prod_{t' <= t} exp(delta_t' A)) C_t ds_t.
//     neither  phase 3: begins with the h that phase 2 carried here (or 0) and writes s.
// Twelve blocks an SM: the 1,536 blocks of 224 px at batch 128 are one round, with eight they were
// 1.45.
template <bool LOCAL, bool ADJOINT>
__global__ void __launch_bounds__(SCAN_THREADS, LOCAL ? 8 : 12) scan_kernel(Scan q) {
    DYNAMIC_SHARED(bc);
    const Channel my(q);
    const float D = my.live && q.D && !LOCAL ? q.D[my.k * q.e + my.ch] : 0;
    float h[STATES], R[STATES], product[STATES], sum = 0;
    EACH(n, STATES) {
        h[n] = !LOCAL && q.state && my.live ? q.state[my.slot(q, n)] : 0;
        R[n] = 0;
        product[n] = 1;
    }
    for (int64_t i = my.first; i < my.last; i += SEGMENT) {
        float x[SEGMENT], dt[SEGMENT], up[SEGMENT];
        EACH(j, SEGMENT) {                                  // a segment's loads fly together
            x[j] = my.at(q, q.x, i + j);
            dt[j] = my.at(q, q.dt, i + j);
            up[j] = ADJOINT ? my.at(q, q.ds, i + j, q.shared) : 0;
        }
        stage(q, my, i, bc);
        EACH(j, SEGMENT) {
            if (!my.live || i + j >= my.last) break;
            const float *B = bc + j * 2 * STATES, *C = B + STATES;
            const float delta = softplus(dt[j] + my.bias), drive = delta * x[j];
            float s = 0;
            EACH(n, STATES) {
                const float decay = exp2f(delta * my.A[n]);
                h[n] = fmaf(decay, h[n], drive * B[n]);
                if (!LOCAL) s = fmaf(C[n], h[n], s);
                if (ADJOINT) product[n] *= decay;
                if (ADJOINT) R[n] = fmaf(product[n], C[n] * up[j], R[n]);
            }
            sum += delta;
            float* to = my.step(q, q.s, i + j);
            if (!LOCAL) *to = s + (q.first ? *to : D * x[j]);
        }
    }
    if (!LOCAL || !my.live) return;
    EACH(n, STATES) q.state[my.slot(q, n)] = h[n];
    EACH(n, STATES) if (ADJOINT) q.adjoint[my.slot(q, n)] = R[n];
    q.decay[(my.chunk * q.k * q.b + my.kb) * q.e + my.ch] = sum;
}

// Phase 2: from what every chunk adds to what every chunk begins with; the adjoint is `reversed`,
// from the last chunk to the first.
__global__ void carry_kernel(Scan q, float* state, bool reversed) {
    const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    const int64_t ch = i % q.e, n = i / q.e % STATES, kb = i / q.e / STATES, k = kb / q.b;
    if (kb >= q.k * q.b) return;
    const bool here = q.first + n < q.n;
    const float A = here ? q.A[(k * q.e + ch) * q.n + q.first + n] * LOG2_E : 0;
    float carry = 0;
#pragma unroll 4
    for (int64_t j = 0; j < q.chunks; ++j) {
        const int64_t slot = (reversed ? q.chunks - 1 - j : j) * q.k * q.b + kb;
        float* at = state + (slot * STATES + n) * q.e + ch;
        const float own = *at;
        *at = carry;
        carry = fmaf(exp2f(q.decay[slot * q.e + ch] * A), carry, own);
    }
}

// The backward of a chunk: once through it, leaving h at the start of every segment in scratch;
// then segment after segment from the end: its h again, into shared memory, and back through it
// with R.
//     G_t = C_t ds_t + R_{t+1},  R_t = exp(delta A) G_t,  dC = ds h,  dB = delta x G,
//     dA = sum delta G exp(delta A) h_{t-1},  dx = delta sum_n G B,
//     d delta = sum_n G (A exp(delta A) h_{t-1} + B x)
// checkpoint [segments][k b][16][e]; parts [chunks b][dA k e n | dD k e | ddt_bias k e];
// bc_parts [e / 32][dB k b p n | dC k b p n]
__global__ void __launch_bounds__(SCAN_THREADS)
scan_backward_kernel(Scan q, float* dx, float* ddt, float* checkpoint, float* parts,
                     float* bc_parts) {
    DYNAMIC_SHARED(bc);
    using Steps = float[SCAN_THREADS];
    Steps* past = reinterpret_cast<Steps*>(bc + SEGMENT * 2 * STATES);      // [SEGMENT][STATES] h
    Steps *in_x = past + SEGMENT * STATES, *in_dt = in_x + SEGMENT, *in_ds = in_dt + SEGMENT;
    const Channel my(q);
    const int me = threadIdx.x;
    const int64_t kb = q.k * q.b, ke = my.k * q.e + my.ch;
    float h[STATES], R[STATES], dA[STATES], dD = 0, ddt_bias = 0;
    EACH(n, STATES) {
        h[n] = q.state && my.live ? q.state[my.slot(q, n)] : 0;
        R[n] = q.state && my.live ? q.adjoint[my.slot(q, n)] : 0;
        dA[n] = 0;
    }
    auto saved = [&](int64_t i, int n) -> float& {
        return checkpoint[((i / SEGMENT * kb + my.kb) * STATES + n) * q.e + my.ch];
    };
    auto read = [&](int64_t i) {                            // a segment; zero beyond the end
        EACH(j, SEGMENT) {
            in_x[j][me] = my.at(q, q.x, i + j);
            in_dt[j][me] = my.at(q, q.dt, i + j) + my.bias;
            in_ds[j][me] = my.at(q, q.ds, i + j, q.shared);
        }
        stage(q, my, i, bc);
    };
    auto forward = [&](bool record) {
#pragma unroll 1
        for (int j = 0; j < SEGMENT; ++j) {
            const float delta = softplus(in_dt[j][me]), drive = delta * in_x[j][me];
            EACH(n, STATES) {
                if (record) past[j * STATES + n][me] = h[n];
                h[n] = fmaf(exp2f(delta * my.A[n]), h[n], drive * bc[j * 2 * STATES + n]);
            }
        }
    };
    int64_t i = my.first;
    for (; i < my.last; i += SEGMENT) {
        EACH(n, STATES) if (my.live) saved(i, n) = h[n];
        if (i + SEGMENT >= my.last) break;                  // nobody needs the h after the last
        read(i);
        forward(false);
    }
    for (; i >= my.first; i -= SEGMENT) {
        EACH(n, STATES) h[n] = my.live ? saved(i, n) : 0;
        read(i);
        forward(true);
#pragma unroll 1
        for (int j = int(min(my.last - i, int64_t(SEGMENT))) - 1; j >= 0; --j) {
            const float x = in_x[j][me], dt = in_dt[j][me], up = in_ds[j][me];
            const float delta = softplus(dt), drive = delta * x;
            const float *B = bc + j * 2 * STATES, *C = B + STATES;
            float sum_GB = 0, ddelta = 0, v[2 * STATES];
            EACH(n, STATES) {
                const float a = exp2f(delta * my.A[n]), decayed = a * past[j * STATES + n][me];
                const float G = fmaf(C[n], up, R[n]), Gd = G * decayed;
                v[n] = drive * G;
                v[STATES + n] = up * fmaf(drive, B[n], decayed);
                sum_GB = fmaf(G, B[n], sum_GB);
                ddelta = fmaf(my.A[n], Gd, ddelta);
                dA[n] = fmaf(delta, Gd, dA[n]);
                R[n] = a * G;
            }
            const int64_t row = my.row(q, i + j), at = row * q.e + my.ch;
            if (my.live) {
                const float slope = dt > 20 ? 1 : 1 / (1 + expf(-dt));
                const float gradient = fmaf(ddelta, LN_2, sum_GB * x) * slope;
                const float skip = q.D ? q.D[ke] * up : 0;
                dx[at] = fmaf(delta, sum_GB, q.first ? dx[at] : skip);
                ddt[at] = gradient + (q.first ? ddt[at] : 0);
                dD = fmaf(up, x, dD);
                ddt_bias += gradient;
            }
            transpose_sum<16>(v);                           // lane n: dB of state n; 16 + n: dC
            const int64_t lane = me % 32, warp = (my.ch - lane) / 32, n = q.first + lane % STATES;
            if (warp * 32 < q.e && n < q.n)
                bc_parts[((warp * 2 + lane / STATES) * kb * q.p + row) * q.n + n] = v[0];
        }
    }
    if (!my.live) return;
    parts += (my.chunk * q.b + my.kb % q.b) * q.k * q.e * (q.n + 2);
    EACH(n, STATES) if (q.first + n < q.n) parts[ke * q.n + q.first + n] = dA[n];
    float* sums = parts + q.k * q.e * q.n + ke;
    sums[0] = dD;
    sums[q.k * q.e] = ddt_bias + (q.first ? sums[q.k * q.e] : 0);
}

// -------------------------------------------------------------------------------------------------
// The host side: scratch memory, choices, launches

#define TRY(call) do { const int error = (call); if (error) return error; } while (0)

void* (*device_alloc)(size_t bytes, void* stream) = [](size_t bytes, void* stream) -> void* {
    void* pointer = nullptr;
    if (cudaMallocAsync(&pointer, bytes, static_cast<cudaStream_t>(stream))) cudaGetLastError();
    return pointer;
};
void (*device_free)(void* pointer, void* stream) = [](void* pointer, void* stream) {
    cudaFreeAsync(pointer, static_cast<cudaStream_t>(stream));
};

// Floats that live until the end of a function. Kernels of the same stream may still be using them
// then, and that is fine: whoever gets the memory next comes after them.
struct Scratch {
    void* stream;
    float* data = nullptr;
    bool failed = false;
    Scratch(int64_t floats, void* stream) : stream(stream) {
        if (floats == 0) return;
        data = static_cast<float*>(device_alloc(floats * sizeof(float), stream));
        failed = data == nullptr;
    }
    ~Scratch() { if (data) device_free(data, stream); }
    Scratch(const Scratch&) = delete;
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t clamp(int64_t x, int64_t low, int64_t high) { return std::max(low, std::min(x, high)); }

// Several channels are loaded at once where e is a multiple of them and this holds.
template <class... P> bool aligned(P... pointers) {
    bool result = true;
    for (const void* p : {static_cast<const void*>(pointers)...})
        result &= reinterpret_cast<uintptr_t>(p) % 16 == 0;
    return result;
}

template <int X> using Int = std::integral_constant<int, X>;
template <class F> int with_type(int64_t dtype, F f) {
    if (dtype == 0) return f(float());
    if (dtype == 1) return f(__nv_bfloat16());
    if (dtype == 2) return f(__half());
    return cudaErrorInvalidValue;
}
template <class F> int with_type_and_max(int64_t dtype, bool max, F f) {
    return with_type(dtype, [&](auto t) {
        return max ? f(t, std::true_type()) : f(t, std::false_type());
    });
}

int sum_parts(const float* parts, int64_t rows, Outputs to, void* stream) {
    const int64_t columns = to.columns[0] + to.columns[1] + to.columns[2];
    return launch(sum_parts_kernel, ceil_div(columns, 32), dim3(32, SUM_ROWS),
                  SUM_ROWS * 32 * sizeof(float), stream, to, parts, rows, columns);
}

// Long steps and few of them: cut their members into slices, of eight or more. Short steps and
// many: a walker takes several. shortest: the members of a step that is worth cutting.
Cut cut_steps(int64_t walkers, const Sizes& n, int64_t wanted, int64_t shortest) {
    const int64_t length = ceil_div(n.l, n.p);
    if (walkers < wanted / 2 && length >= shortest)
        return {1, clamp(wanted / walkers, 1, length / 8), n.p};
    const int64_t steps = clamp(std::min(walkers / wanted, 64 / length), 1, n.p);
    return {steps, 1, ceil_div(n.p, steps)};
}

// Calls f(V, U, WIDE, THREADS): what Rows need for e channels, and the bound of the block. The last
// is for odd d and for more channels than registers: slow, up to 8192 channels.
template <class F> int choose_rows(int64_t e, bool wide, F f) {
    if (wide && e <= 4 * 384) return f(Int<4>(), Int<2>(), std::true_type(), Int<384>());
    if (wide && e <= 4 * 512) return f(Int<4>(), Int<2>(), std::true_type(), Int<512>());
    if (wide && e <= 4 * 768) return f(Int<4>(), Int<1>(), std::true_type(), Int<768>());
    return f(Int<8>(), Int<1>(), std::false_type(), Int<1024>());
}

// Calls f(type, V, N): how add_norm's Parts hold d channels.
template <class F> int choose_parts(int64_t dtype, int64_t d, bool wide, F f) {
    if (d > 4096) return cudaErrorInvalidConfiguration;
    return with_type(dtype, [&](auto t) {
        if (wide && d <= 256) return f(t, Int<4>(), Int<2>());
        if (wide && d <= 512) return f(t, Int<4>(), Int<4>());
        if (wide && d <= 1024) return f(t, Int<4>(), Int<8>());
        return wide ? f(t, Int<4>(), Int<32>()) : f(t, Int<1>(), Int<128>());
    });
}

// Enough threads for the chip, chunks of whole segments and not below 16 steps.
Scan plan_scan(const SelectiveScan& a) {
    Scan q{a};
    const int64_t threads = std::max<int64_t>(1, q.k * q.b * q.e), wanted = SMS * 1024;
    int64_t chunks = 1;
    if (threads * 2 <= wanted) chunks = clamp(ceil_div(wanted, threads), 1, q.p / 16);
    q.chunk = ceil_div(ceil_div(q.p, std::max<int64_t>(chunks, 1)), SEGMENT) * SEGMENT;
    q.chunks = ceil_div(q.p, q.chunk);
    return q;
}

int64_t scan_blocks(const Scan& q) { return ceil_div(q.e, SCAN_THREADS) * q.k * q.b * q.chunks; }

// Phases 1 and 2 of a scan in chunks
int carry_states(const Scan& q, void* stream) {
    const auto local = q.adjoint ? scan_kernel<true, true> : scan_kernel<true, false>;
    TRY(launch(local, scan_blocks(q), dim3(SCAN_THREADS), SCAN_SHARED, stream, q));
    const int64_t blocks = ceil_div(q.k * q.b * STATES * q.e, 128);
    TRY(launch(carry_kernel, blocks, dim3(128), 0, stream, q, q.state, false));
    if (!q.adjoint) return cudaSuccess;
    return launch(carry_kernel, blocks, dim3(128), 0, stream, q, q.adjoint, true);
}

}  // namespace

// -------------------------------------------------------------------------------------------------
// The interface, in the order of scan.h. Every function returns a cudaError_t, 0 if all is well.

// Where scratch memory comes from, if not from CUDA itself
extern "C" void set_allocator(void* (*allocate)(size_t, void*), void (*release)(void*, void*)) {
    device_alloc = allocate;
    device_free = release;
}

int add_norm(const AddNorm* a, void* stream) {
    const bool wide =
        a->d % 4 == 0 && aligned(a->hidden, a->residual, a->weight, a->bias, a->u, a->out);
    return choose_parts(a->dtype, a->d, wide, [&](auto t, auto V, auto N) {
        return launch(add_norm_kernel<decltype(t), V(), N()>, ceil_div(a->rows, WALKERS),
                      dim3(32, WALKERS), 0, stream, *a);
    });
}

int add_norm_backward(const AddNormBackward* a, void* stream) {
    const int64_t d = a->d, warps = clamp(6144 / d, 1, 8);          // 48 KB of shared memory
    const int64_t run = std::max(warps, ceil_div(a->rows, SMS * 4));
    const int64_t blocks = ceil_div(a->rows, run), shared = warps * 2 * d * sizeof(float);
    const Scratch sums(blocks * 2 * d, stream);
    if (sums.failed) return cudaErrorMemoryAllocation;
    const bool wide = d % 4 == 0 && aligned(a->residual, a->weight, a->du, a->dout, a->dresidual,
                                            a->dhidden);
    TRY(choose_parts(a->dtype, d, wide, [&](auto t, auto V, auto N) {
        return launch(add_norm_backward_kernel<decltype(t), V(), N()>, blocks,
                      dim3(32, unsigned(warps)), shared, stream, *a, sums.data, int(run));
    }));
    return sum_parts(sums.data, blocks, {{a->dweight, a->dbias}, {d, d}}, stream);
}

int conv_pool(const ConvPool* a, void* stream) {
    const auto [dtype, b, l, p, e] = a->n;
    const bool wide = e % 4 == 0 && aligned(a->xz, a->conv_weight, a->pooled, a->argmax);
    const int64_t tiles = ceil_div(e, 128), size = 2 * b * p * e;
    if (b == 0) return cudaSuccess;
    if (e > 8192) return cudaErrorInvalidConfiguration;                 // as expand_gate, later
    const Cut cut = cut_steps(b * p * tiles, a->n, SMS * 16 * 2, 32);   // two rounds of 16 warps
    const int64_t blocks = tiles * ceil_div(b * cut.units * cut.slices, WALKERS);
    const int64_t rows = cut.slices > 1 ? cut.slices : 0;
    const Scratch parts(rows * size, stream), arg_parts(a->max ? rows * size : 0, stream);
    if (parts.failed || arg_parts.failed) return cudaErrorMemoryAllocation;
    ConvPool to = *a;
    if (rows) {
        to.pooled = parts.data;
        to.argmax = reinterpret_cast<int32_t*>(arg_parts.data);
    }
    TRY(with_type_and_max(dtype, a->max, [&](auto t, auto MAX) {
        using T = decltype(t);
        const auto kernel =
            wide ? conv_pool_kernel<T, true, MAX()> : conv_pool_kernel<T, false, MAX()>;
        return launch(kernel, blocks, dim3(32, WALKERS), WALKERS * SLOT_BYTES, stream, to, cut);
    }));
    if (!rows) return cudaSuccess;
    const auto merge = a->max ? pool_parts_kernel<true> : pool_parts_kernel<false>;
    return launch(merge, ceil_div(size, 256), dim3(256), 0, stream, a->pooled, a->argmax, to.pooled,
                  to.argmax, rows, size);
}

int conv_pool_backward(const ConvPoolBackward* a, void* stream) {
    const auto [dtype, b, l, p, e] = a->n;
    const bool wide =
        e % 2 == 0 && aligned(a->xz, a->conv_weight, a->D, a->argmax, a->dpooled, a->g, a->dxz);
    const int64_t tiles = ceil_div(e, 64);
    // Eight rounds of the 12 warps that an SM holds (1.45 rounds took the time of two), where runs
    // stay at 64 positions: each visits six of its neighbours. Below that the chip is filled first.
    const int64_t places = SMS * 12, all = b * l * tiles, shortest = ceil_div(all, places);
    const int64_t run = clamp(ceil_div(all, places * 8), clamp(shortest, 16, 64), l);
    const int64_t rows = ceil_div(b * ceil_div(l, run), WALKERS);
    const Scratch parts(rows * 12 * e, stream);
    if (parts.failed) return cudaErrorMemoryAllocation;
    TRY(with_type_and_max(dtype, a->max, [&](auto t, auto MAX) {
        using T = decltype(t);
        const auto kernel = wide ? conv_pool_backward_kernel<T, true, MAX()>
                                 : conv_pool_backward_kernel<T, false, MAX()>;
        const int64_t shared = WALKERS * (SLOT_BYTES + 12 * 64 * sizeof(float));
        return launch(kernel, tiles * rows, dim3(32, WALKERS), shared, stream, *a, parts.data,
                      int(run));
    }));
    const Outputs to{{a->dconv_weight, a->dconv_bias, a->dD}, {8 * e, 2 * e, 2 * e}};
    return sum_parts(parts.data, rows, to, stream);
}

int selective_scan(const SelectiveScan* a, void* stream) {
    if (a->b == 0) return cudaSuccess;
    Scan q = plan_scan(*a);
    const int64_t states = q.chunks * q.k * q.b * STATES * q.e;
    const Scratch carry(q.chunks > 1 ? states + states / STATES : 0, stream);
    if (carry.failed) return cudaErrorMemoryAllocation;
    q.state = carry.data;
    q.decay = q.state + (q.state ? states : 0);
    for (; q.first < q.n; q.first += STATES) {
        if (q.state) TRY(carry_states(q, stream));
        TRY(launch(scan_kernel<false, false>, scan_blocks(q), dim3(SCAN_THREADS), SCAN_SHARED,
                   stream, q));
    }
    return cudaSuccess;
}

int selective_scan_backward(const SelectiveScanBackward* a, void* stream) {
    Scan q = plan_scan({a->k, a->b, a->p, a->e, a->n, a->stride, a->x, a->dt, a->A, a->B, a->C,
                        a->D, a->dt_bias, nullptr});
    q.ds = a->ds;
    q.shared = a->shared;
    const int64_t states = q.chunks * q.k * q.b * STATES * q.e, rows = q.chunks * q.b;
    const int64_t ke = q.k * q.e, kbpn = q.k * q.b * q.p * q.n, warps = ceil_div(q.e, 32);
    const Scratch carry(q.chunks > 1 ? 2 * states + states / STATES : 0, stream);
    const Scratch checkpoint(ceil_div(q.p, SEGMENT) * q.k * q.b * STATES * q.e, stream);
    const Scratch parts(rows * ke * (q.n + 2), stream), bc_parts(warps * 2 * kbpn, stream);
    if (carry.failed || checkpoint.failed || parts.failed || bc_parts.failed)
        return cudaErrorMemoryAllocation;
    if (carry.data) {
        q.state = carry.data;
        q.adjoint = q.state + states;
        q.decay = q.adjoint + states;
    }
    for (; q.first < q.n; q.first += STATES) {
        if (q.state) TRY(carry_states(q, stream));
        TRY(launch(scan_backward_kernel, scan_blocks(q), dim3(SCAN_THREADS), SCAN_BACKWARD_SHARED,
                   stream, q, a->dx, a->ddt, checkpoint.data, parts.data, bc_parts.data));
    }
    TRY(sum_parts(parts.data, rows, {{a->dA, a->dD, a->ddt_bias}, {ke * q.n, ke, ke}}, stream));
    return sum_parts(bc_parts.data, warps, {{a->dB, a->dC}, {kbpn, kbpn}}, stream);
}

int expand_gate(const ExpandGate* a, void* stream) {
    const auto [dtype, b, l, p, e] = a->n;
    const bool wide = e % 4 == 0 && aligned(a->xz, a->s, a->conv_weight, a->D, a->norm_weight,
                                            a->norm_bias, a->y);
    const int64_t run = clamp(ceil_div(b * l, SMS * 10), 8, 64), blocks = b * ceil_div(l, run);
    return with_type(dtype, [&](auto t) {
        return choose_rows(a->n.e, wide, [&](auto V, auto U, auto WIDE, auto THREADS) {
            const dim3 threads(unsigned(ceil_div(a->n.e, V * 32) * 32));
            return launch(expand_gate_kernel<decltype(t), V(), U(), WIDE(), THREADS()>, blocks,
                          threads, SLOT_BYTES + BlockSum<2 * U(), THREADS() / 32>::BYTES, stream,
                          *a, int(run));
        });
    });
}

int expand_gate_backward(const ExpandGateBackward* a, void* stream) {
    const auto [dtype, b, l, p, e] = a->n;
    const bool wide = e % 4 == 0 && aligned(a->xz, a->s, a->conv_weight, a->D, a->norm_weight,
                                            a->norm_bias, a->dy, a->dxz, a->g, a->ds);
    if (b == 0) return sum_parts(nullptr, 0, {{a->dnorm_weight, a->dnorm_bias}, {e, e}}, stream);
    const Cut cut = cut_steps(b * p, a->n, SMS * 8, 8);
    const int64_t blocks = b * cut.units * cut.slices;
    const Scratch parts(a->norm_weight ? blocks * 2 * e : 0, stream);
    const Scratch slices(cut.slices > 1 ? cut.slices * b * p * e : 0, stream);
    if (parts.failed || slices.failed) return cudaErrorMemoryAllocation;
    ExpandGateBackward to = *a;
    if (slices.data) to.ds = slices.data;
    TRY(with_type(dtype, [&](auto t) {
        return choose_rows(a->n.e, wide, [&](auto V, auto, auto WIDE, auto THREADS) {
            const dim3 threads(unsigned(ceil_div(a->n.e, V * 32) * 32));
            return launch(expand_gate_backward_kernel<decltype(t), V(), WIDE(), THREADS()>, blocks,
                          threads, SLOT_BYTES + BlockSum<4, THREADS() / 32>::BYTES, stream, to,
                          cut, parts.data);
        });
    }));
    if (slices.data) TRY(sum_parts(slices.data, cut.slices, {{a->ds}, {b * p * e}}, stream));
    if (!a->norm_weight) return cudaSuccess;
    return sum_parts(parts.data, blocks, {{a->dnorm_weight, a->dnorm_bias}, {e, e}}, stream);
}
