// FastVim's operations in CUDA, forward and backward. Raw pointers and a stream, no torch header. To compile:
//     nvcc -O3 -std=c++17 -ftz=true -c scan_cuda.cu        (-ftz: an exp is one instruction instead of four)
// The specification is section 3 of fastvim.py; scan_cuda.cpp hands tensors to the extern "C" functions at the end.
//
// B batch, S positions = slots (tokens) of an image, P scan steps (groups), E inner channels, N states, k the
// direction (0 forward, 1 backward), t a position of the flatten order, g a group, e a channel. Channels are innermost
// everywhere, so neighbouring threads take neighbouring channels and no tensor is ever transposed. T is the type of
// the activations (float32, bfloat16, float16); all arithmetic and every other tensor is float32.
//
// Each kernel is a ladder of versions, the rungs that set_rung selects (0 = the best that the shape allows):
//     kernel  rung  what it changes                                       why it should be faster
//     0 conv_pool   one thread walks the positions of a group, for one channel; it keeps its neighbours in registers
//        1          a launch per direction, one channel a thread          coalesced from the start: e is innermost
//        2          both directions in one launch                         x is read once instead of twice
//        3          four channels a thread (16 bytes of float32)          a quarter of the address arithmetic, loads
//                                                                         and table look-ups
//        4          four positions a step                                 four loads in flight, less register shifting
//        5          several walkers a group, reduced in two stages        2-D pooling and small batches fill the chip
//     1 expand_gate expand, skip, norm and gate in one pass: v is never stored
//        1          a block per position, v computed again by each pass   any E; the passes after the first hit L1
//        2          a block walks a run of positions, v in registers      v once a position; x slides along
//        3          four channels a thread                                as above
//        4          two positions a barrier                               half the barriers, twice the loads in flight
//     2 selective_scan
//        1          a thread per channel, one state after another         the recurrence, as written
//        2          16 states in registers, B and C in shared memory      B and C are read once per block
//        3          chunks of the sequence side by side, three phases     long sequences, small batches fill the chip
// Rung 1 of expand_gate and rungs 1, 2 of the scan choose the like versions of their backward kernels; rungs 1 and 3 of
// conv_pool exist in float32 only. No atomics: sums over blocks go through partial sums in scratch memory and a second
// kernel, in an order that depends on sizes alone, so the bits of a result do not depend on timing. Offsets are 64-bit;
// everything is folded into the grid's x.
//
// The tests compile this file with g++ as well (tests/cuda_emulator.h). That asks for: launch() instead of <<< >>>,
// DYNAMIC_SHARED, shuffles with all lanes present, no return before a barrier, no inline PTX.
#include <algorithm>
#include <climits>
#include <cstdint>
#include <cstring>
#include <type_traits>

#ifndef FASTVIM_EMULATE
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define DYNAMIC_SHARED(name) extern __shared__ float name[]

template <class X> struct Same { using type = X; };

template <class... P>
int launch(void (*kernel)(P...), int64_t blocks, dim3 threads, int64_t shared_bytes, cudaStream_t stream,
           typename Same<P>::type... arguments) {
    if (blocks == 0) return cudaSuccess;
    if (blocks > INT_MAX) return cudaErrorInvalidConfiguration;
    void* list[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
    const void* function = reinterpret_cast<const void*>(kernel);
    const cudaError_t error = cudaLaunchKernel(function, dim3(unsigned(blocks)), threads, list, shared_bytes, stream);
    if (error != cudaSuccess) cudaGetLastError();       // returned here: the next caller should not find it again
    return error;
}
#endif

namespace {

constexpr unsigned ALL = 0xffffffffu;       // the lanes of a full warp
constexpr float EPS = 1e-5f;                // of all norms
constexpr float LOG2_E = 1.44269504f, LN_2 = 0.69314718f;
constexpr int WALKERS = 4;                  // warps of a block, where a warp walks by itself

// ---------------------------------------------------------------------------------------------------------------------
// Vectors of V neighbouring channels: one load of up to 16 bytes, arithmetic in float32

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
template <class T> __device__ T from_float(float x);
template <> __device__ inline float from_float<float>(float x) { return x; }
template <> __device__ inline __half from_float<__half>(float x) { return __float2half_rn(x); }
template <> __device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

template <int BYTES> struct Raw;
template <> struct Raw<2> { using type = ushort1; };
template <> struct Raw<4> { using type = uint1; };
template <> struct Raw<8> { using type = uint2; };
template <> struct Raw<16> { using type = uint4; };

template <int V> struct Vec {
    float v[V];
    __device__ float& operator[](int i) { return v[i]; }
    __device__ const float& operator[](int i) const { return v[i]; }
};

#define EACH_LANE _Pragma("unroll") for (int i = 0; i < V; ++i)

template <int V> __device__ Vec<V> fill(float x) { Vec<V> r; EACH_LANE r[i] = x; return r; }
template <int V> __device__ Vec<V> operator+(Vec<V> a, const Vec<V>& b) { EACH_LANE a[i] += b[i]; return a; }
template <int V> __device__ Vec<V> operator*(Vec<V> a, const Vec<V>& b) { EACH_LANE a[i] *= b[i]; return a; }
template <int V> __device__ Vec<V> operator*(float a, Vec<V> b) { EACH_LANE b[i] *= a; return b; }
template <int V> __device__ Vec<V> operator-(Vec<V> a, float b) { EACH_LANE a[i] -= b; return a; }
template <int V> __device__ Vec<V> fma(const Vec<V>& a, const Vec<V>& b, Vec<V> c) {
    EACH_LANE c[i] = fmaf(a[i], b[i], c[i]);
    return c;
}
template <int V> __device__ Vec<V> where(bool condition, Vec<V> a) { EACH_LANE a[i] = condition ? a[i] : 0; return a; }
template <int V> __device__ float total(const Vec<V>& a) { float sum = 0; EACH_LANE sum += a[i]; return sum; }

template <int V, class T> __device__ Vec<V> load(const T* p) {
    using R = typename Raw<V * sizeof(T)>::type;
    const R raw = *reinterpret_cast<const R*>(p);
    T part[V];
    memcpy(part, &raw, sizeof raw);
    Vec<V> r;
    EACH_LANE r[i] = to_float(part[i]);
    return r;
}

// An ordinary assignment of a vector here becomes V single stores; the intrinsic is one.
__device__ inline void store_raw(void* p, const ushort1& raw) { __stwb(static_cast<unsigned short*>(p), raw.x); }
__device__ inline void store_raw(void* p, const uint1& raw) { __stwb(static_cast<unsigned*>(p), raw.x); }
__device__ inline void store_raw(void* p, const uint2& raw) { __stwb(static_cast<uint2*>(p), raw); }
__device__ inline void store_raw(void* p, const uint4& raw) { __stwb(static_cast<uint4*>(p), raw); }

template <int V, class T> __device__ void store(T* p, const Vec<V>& x) {
    T part[V];
    EACH_LANE part[i] = from_float<T>(x[i]);
    typename Raw<V * sizeof(T)>::type raw;
    memcpy(&raw, part, sizeof raw);
    store_raw(p, raw);
}

// silu(x) = x sigmoid(x). The special-function unit does 16 values a clock and SM. float32 pays for an exp and a
// reciprocal; 16-bit activations take the hardware's tanh (2^-11 accurate): sigmoid(x) = (1 + tanh(x / 2)) / 2.
template <class T> __device__ float sigmoid(float x) {
#if !defined(CUDART_VERSION) || CUDART_VERSION >= 13000
    if (!std::is_same<T, float>::value) return fmaf(0.5f, __tanhf(0.5f * x), 0.5f);
#endif
    return __fdividef(1.0f, 1.0f + __expf(-x));
}

template <class T, int V> __device__ Vec<V> silu(Vec<V> a) { EACH_LANE a[i] *= sigmoid<T>(a[i]); return a; }

// silu and its derivative sigmoid(a) (1 + a (1 - sigmoid(a)))
template <class T, int V> __device__ void silu_and_slope(const Vec<V>& a, Vec<V>& value, Vec<V>& slope) {
    EACH_LANE {
        const float s = sigmoid<T>(a[i]);
        value[i] = a[i] * s;
        slope[i] = fmaf(value[i], 1 - s, s);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Reductions

__device__ inline float warp_sum(float x) {
    for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(ALL, x, lanes);
    return x;
}

// Sums over the block, received by all its threads. Two buffers in turn: whoever writes one again has passed the
// barrier of the other, and by then everybody has read the first.
struct BlockSum {
    float* buffer;                          // shared memory, 2 x MOST x 32 floats
    int turn = 0;
    static constexpr int MOST = 4;          // values summed at once

    template <int n> __device__ void operator()(float (&x)[n]) {
        const int warps = blockDim.x / 32, warp = threadIdx.x / 32;
        float* row = buffer + turn * MOST * 32;
        turn ^= 1;
#pragma unroll
        for (int i = 0; i < n; ++i) {
            x[i] = warp_sum(x[i]);
            if (threadIdx.x % 32 == 0) row[i * 32 + warp] = x[i];
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < n; ++i) {
            x[i] = 0;
            for (int j = 0; j < warps; ++j) x[i] += row[i * 32 + j];
        }
    }
    static constexpr int64_t BYTES = 2 * MOST * 32 * sizeof(float);
};

// The second stage of every sum over blocks: parts are rows of columns, added up from the first row to the last. The
// columns belong to up to three outputs: output j takes `width` of every `in_width` columns, as rows of `out_width`.
struct Output {
    float* out;                             // null: nobody wants it
    int64_t columns, in_width = 1, width = 1, out_width = 1;
    bool add = false;                       // to what is there
};
struct Outputs {
    Output o[3];
};
constexpr int SUM_ROWS = 16;

__global__ void sum_parts_kernel(Outputs outputs, const float* parts, int64_t rows, int64_t columns) {
    DYNAMIC_SHARED(shared);                                             // [SUM_ROWS][32]
    int64_t i = int64_t(blockIdx.x) * 32 + threadIdx.x;
    float sum = 0;
    if (i < columns) {
#pragma unroll 8
        for (int64_t r = threadIdx.y; r < rows; r += SUM_ROWS) sum += parts[r * columns + i];
    }
    shared[threadIdx.y * 32 + threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && i < columns) {
        for (int r = 1; r < SUM_ROWS; ++r) sum += shared[r * 32 + threadIdx.x];
        int j = 0;
        while (i >= outputs.o[j].columns) i -= outputs.o[j++].columns;
        const Output o = outputs.o[j];
        const int64_t at = i / o.in_width * o.out_width + i % o.in_width;
        if (o.out && i % o.in_width < o.width) o.out[at] = sum + (o.add ? o.out[at] : 0);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// The plan: how a layer walks the tokens of an image (class Walk in fastvim.py)

struct Plan {
    int64_t B, S, P, E, Bt;
    const int32_t *token, *group;           // [Bt][S] position -> slot; position -> group, -1 for padding
    const float* weight;                    // [Bt][S] factor of a position in its group's mean
    const int32_t *member, *start;          // [Bt][S] positions by group; [Bt][P+1] where each group begins in member

    __device__ Plan image(int64_t b) const {
        Plan w = *this;
        const int64_t row = Bt == 1 ? 0 : b;
        w.token += row * S, w.group += row * S;
        if (weight) w.weight += row * S;    // what an operation has no use for is null
        if (member) w.member += row * S, w.start += row * (P + 1);
        return w;
    }
    // Of U members from m on, none of them from `end` on: how many are neighbouring positions?
    template <int U> __device__ int neighbours(int m, int end) const {
        int n = 1;
#pragma unroll
        for (int i = 1; i < U; ++i) n += n == i && __ldg(member + min(m + i, end - 1)) == __ldg(member + m) + i;
        return n;
    }
};

// What the tables say about position t: its slot and group; group -1 outside the image as for padding.
struct Spot {
    int slot, group;
    __device__ Spot(const Plan& w, int t) {
        const int inside = unsigned(t) < unsigned(w.S) ? t : 0;
        slot = __ldg(w.token + inside), group = __ldg(w.group + inside);
        if (t != inside) group = -1;
    }
    __device__ bool real() const { return group >= 0; }
};

// Row `row` of `width` elements: a 32 x 32 -> 64 bit multiplication, one instruction.
template <class X> __device__ X* row_of(X* p, int row, int width) { return p + int64_t(row) * width; }

// V channels of a row, or zero. No branch: where there is nothing to load, row 0 is loaded and dropped. Branches would
// keep the loads of several positions from being in flight together.
template <int V, class T> __device__ Vec<V> load_if(bool here, const T* p, int row, int width) {
    return where(here, load<V>(row_of(p, here ? row : 0, width)));
}

// The x of position t; xz points at the channel. What lies outside the image and padding read zero.
template <int V, class T> __device__ Vec<V> x_at(const Plan& w, const T* xz, int t) {
    const Spot spot(w, t);
    return load_if<V>(spot.real(), xz, spot.slot, 2 * int(w.E));
}

// U positions t .. t+U-1 with three neighbours on either side, in registers: x[i] is position t - 3 + i.
template <class T, int V, int U> struct Window {
    Vec<V> x[U + 6] = {};
    int first = INT_MIN / 2;

    __device__ void move_to(int t, const Plan& w, const T* xz) {
        const bool next = t == first + U;   // six values are here already; after a jump they are loaded again
        first = t;
#pragma unroll
        for (int i = 0; i < 6; ++i) x[i] = x[i + U];
        if (!next) {
#pragma unroll
            for (int i = 0; i < 6; ++i) x[i] = x_at<V>(w, xz, t - 3 + i);
        }
#pragma unroll
        for (int i = 6; i < U + 6; ++i) x[i] = x_at<V>(w, xz, t - 3 + i);
    }
};

// Both directions' convolutions. w[k][j] multiplies the neighbour j steps back (k = 0) or ahead (k = 1).
template <int V> struct Conv {
    Vec<V> w[2][4], b[2];

    __device__ void load_from(const float* conv_w, const float* conv_b, int64_t E, int64_t e) {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            EACH_LANE {
                const bool here = e + i < E;
                b[k][i] = here ? conv_b[k * E + e + i] : 0;
                const float* taps = conv_w + (k * E + e + i) * 4;
                Vec<4> four = fill<4>(0);
                if (here) four = V > 1 ? load<4>(taps) : Vec<4>{{taps[0], taps[1], taps[2], taps[3]}};
                for (int j = 0; j < 4; ++j) w[k][j][i] = four[3 - j];
            }
        }
    }
    __device__ Vec<V> operator()(int k, const Vec<V>* x) const {        // x points at the position itself
        Vec<V> a = b[k];
#pragma unroll
        for (int j = 0; j < 4; ++j) a = fma(w[k][j], x[k ? j : -j], a);
        return a;
    }
};

// How groups are dealt out to walkers: `groups` groups of an image make a unit, whose members are cut into `slices`.
struct Cut {
    int64_t groups, slices, units;          // units of an image
};
struct Work {
    int64_t b = 0;
    int g0 = 0, g1 = 0, m0 = 0, m1 = 0;     // groups g0 .. g1-1, members m0 .. m1-1 of the image
    int64_t share = 0;                      // number of this piece within its image
};

__device__ inline Work work(const Plan& plan, const Cut& cut, int64_t item) {
    Work r;
    const int64_t unit = item / cut.slices, slice = item % cut.slices;
    if (unit >= plan.B * cut.units) return r;                           // more walkers than work
    r.b = unit / cut.units;
    r.g0 = int(unit % cut.units * cut.groups);
    r.g1 = int(min(plan.P, r.g0 + cut.groups));
    const int32_t* start = plan.image(r.b).start;
    const int64_t first = start[r.g0], n = start[r.g1] - first;
    r.m0 = int(first + n * slice / cut.slices), r.m1 = int(first + n * (slice + 1) / cut.slices);
    r.share = item % (cut.units * cut.slices);
    return r;
}

// ---------------------------------------------------------------------------------------------------------------------
// conv_pool: x -> both convolutions -> silu -> mean or max over the groups. Reads x once, never writes c.

// The running mean or maximum of V channels.
template <int V, bool MAX> struct Pool {
    Vec<V> value;
    int arg[V];

    __device__ void clear() { EACH_LANE value[i] = 0, arg[i] = -1; }
    __device__ void take(int i, float c, int t) {                       // the first of equal maxima; NaN wins
        const bool better = arg[i] < 0 || c > value[i] || (c != c && value[i] == value[i]);
        if (better) value[i] = c, arg[i] = t;
    }
    __device__ void add(const Vec<V>& c, float weight, int t) {
        EACH_LANE if (MAX) take(i, c[i], t); else value[i] = fmaf(weight, c[i], value[i]);
    }
    __device__ void merge(int i, float other, int other_arg) {          // of positions that come after ours
        if (!MAX) value[i] += other;
        else if (other_arg >= 0) take(i, other, other_arg);
    }
};

// A warp is a walker: its lanes are 32 V channels, it visits the members of its groups U at a time. With slices the
// walkers of a block share one group and the first of them adds up.
template <class T, int V, int U, int FIRST, int LAST, bool MAX>
__global__ void __launch_bounds__(32 * WALKERS)
conv_pool_kernel(Plan plan, Cut cut, const T* xz, const float* conv_w, const float* conv_b, float* p, int32_t* argmax) {
    const int64_t tiles = (plan.E + 32 * V - 1) / (32 * V), E = plan.E;
    const int64_t e = (blockIdx.x % tiles * 32 + threadIdx.x) * V;
    const int64_t item = blockIdx.x / tiles * WALKERS + threadIdx.y;
    const Work work = ::work(plan, cut, item);
    const Plan w = plan.image(work.b);
    xz += work.b * w.S * 2 * E + (e < E ? e : 0);                       // idle lanes shadow the first

    Conv<V> conv;
    conv.load_from(conv_w, conv_b, E, e);
    Window<T, V, U> window;
    Pool<V, MAX> pool[2];
    pool[0].clear(), pool[1].clear();
    int g = work.g0;
    const int64_t direction = w.B * w.P * E, first = work.b * w.P * E + e;
    auto write = [&](int64_t part) {                                    // group g is complete
#pragma unroll
        for (int k = FIRST; k < LAST; ++k) {
            const int64_t at = (part * 2 + k) * direction + first;
            if (e < E) {
                store(row_of(p + at, g, int(E)), pool[k].value);
                if (MAX) EACH_LANE row_of(argmax + at, g, int(E))[i] = pool[k].arg[i];
            }
            pool[k].clear();
        }
    };
    for (int m = work.m0, n; m < work.m1; m += n) {
        const int t = __ldg(w.member + m);
        n = w.template neighbours<U>(m, work.m1);
        int group[U];
        float weight[U];
#pragma unroll
        for (int i = 0; i < U; ++i) {
            const int at = i < n ? t + i : t;
            group[i] = __ldg(w.group + at), weight[i] = __ldg(w.weight + at);
        }
        window.move_to(t, w, xz);
#pragma unroll
        for (int i = 0; i < U; ++i) {
            if (i >= n) break;
#pragma unroll 1
            for (; g < group[i]; ++g) write(0);                         // empty groups are written as zero
#pragma unroll
            for (int k = FIRST; k < LAST; ++k) pool[k].add(silu<T>(conv(k, window.x + i + 3)), weight[i], t + i);
        }
    }
    if (cut.slices == 1) {
#pragma unroll 1
        for (; g < work.g1; ++g) write(0);
        return;
    }
    DYNAMIC_SHARED(shared);                                             // [walker][2: value, argmax][k][i][lane]
    auto slot = [&](int walker, int what, int k, int i) {
        return shared + (((walker * 2 + what) * 2 + k) * V + i) * 32 + threadIdx.x;
    };
    for (int k = FIRST; k < LAST; ++k) EACH_LANE {
        *slot(threadIdx.y, 0, k, i) = pool[k].value[i];
        memcpy(slot(threadIdx.y, 1, k, i), &pool[k].arg[i], sizeof(float));
    }
    __syncthreads();
    if (threadIdx.y == 0 && g < work.g1) {
        for (int walker = 1; walker < WALKERS; ++walker)
            for (int k = FIRST; k < LAST; ++k) EACH_LANE {
                int arg;
                memcpy(&arg, slot(walker, 1, k, i), sizeof arg);
                pool[k].merge(i, *slot(walker, 0, k, i), arg);
            }
        write(item % cut.slices / WALKERS);                             // p, or scratch if other blocks have slices too
    }
}

template <bool MAX> __global__ void pool_parts_kernel(float* p, int32_t* argmax, const float* parts,
                                                      const int32_t* arg_parts, int64_t rows, int64_t n) {
    const int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at >= n) return;
    Pool<1, MAX> pool;
    pool.clear();
    for (int64_t r = 0; r < rows; ++r) pool.merge(0, parts[r * n + at], MAX ? arg_parts[r * n + at] : 0);
    p[at] = pool.value[0];
    if (MAX) argmax[at] = pool.arg[0];
}

// The backward walks positions, not groups. At position u both da[u] become known; da0[u] belongs to dx[u-3 .. u] and
// da1[u] to dx[u .. u+3], so unfinished dx slide along with the window of x: after U positions the first U are
// complete. A run of positions starts three early and ends three late. Two channels a thread: four would need over 220
// registers, and leave too few warps on an SM to hide the loads. Sums for the parameters stay in registers until the
// end of the run.
template <class T, int V, int U, bool MAX>
__global__ void __launch_bounds__(32 * WALKERS, 3)
conv_pool_backward_kernel(Plan plan, const T* xz, const float* conv_w, const float* conv_b, const float* D,
                          const int32_t* argmax, const float* dp, const T* g, T* dxz, float* parts, int run) {
    const int64_t tiles = (plan.E + 32 * V - 1) / (32 * V), E = plan.E, runs = (plan.S + run - 1) / run;
    const int64_t tile = blockIdx.x % tiles, e = (tile * 32 + threadIdx.x) * V;
    const int64_t item = blockIdx.x / tiles * WALKERS + threadIdx.y;
    const bool idle = item >= plan.B * runs, live = e < E;              // idle: more walkers than runs
    const int64_t b = idle ? 0 : item / runs;
    const int t0 = idle ? 0 : int(item % runs * run), t1 = idle ? 0 : int(min(plan.S, int64_t(t0) + run));
    const Plan w = plan.image(b);
    const int64_t at_e = live ? e : 0;                                  // idle lanes shadow the first
    xz += b * w.S * 2 * E + at_e, dxz += b * w.S * 2 * E + at_e, g += b * w.S * E + at_e;
    dp += b * w.P * E + at_e, argmax += MAX ? b * w.P * E + at_e : 0;

    Conv<V> conv;
    conv.load_from(conv_w, conv_b, E, e);
    Vec<V> skip[2], pooled[2], dw[2][4], db[2], dD[2], dx[U + 6];
    int arg[2][V], have = -1;                                           // the group that pooled belongs to
#pragma unroll
    for (int k = 0; k < 2; ++k) {
        skip[k] = D && live ? load<V>(D + k * E + e) : fill<V>(0);
        pooled[k] = db[k] = dD[k] = dw[k][0] = dw[k][1] = dw[k][2] = dw[k][3] = fill<V>(0);
        EACH_LANE arg[k][i] = -1;
    }
#pragma unroll
    for (int i = 0; i < U + 6; ++i) dx[i] = fill<V>(0);

    Window<T, V, U> x;
    for (int u = t0 - 3; u < t1 + 3 && t0 < t1; u += U) {
        x.move_to(u, w, xz);                                            // x.x[i], dx[i]: of position u - 3 + i
        Vec<V> gu[U];
        int group[U];
        float weight[U];
#pragma unroll
        for (int i = 0; i < 6; ++i) dx[i] = dx[i + U];
#pragma unroll
        for (int i = 0; i < U; ++i) {
            const Spot spot(w, u + i);
            dx[i + 6] = fill<V>(0);
            gu[i] = load_if<V>(D && spot.real(), g, spot.slot, int(E));
            group[i] = spot.group, weight[i] = __ldg(w.weight + (spot.real() ? u + i : 0));
        }
#pragma unroll
        for (int here = 0; here < U; ++here) {
            const int t = u + here;
            if (group[here] < 0) continue;
            const bool own = t >= t0 && t < t1;                         // else the neighbouring run counts it
            if (group[here] != have) {
                have = group[here];
#pragma unroll
                for (int k = 0; k < 2; ++k) {
                    pooled[k] = load<V>(row_of(dp + k * w.B * w.P * E, have, int(E)));
                    if (MAX) EACH_LANE arg[k][i] = row_of(argmax + k * w.B * w.P * E, have, int(E))[i];
                }
            }
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                Vec<V> c, slope, dc = skip[k] * gu[here];
                silu_and_slope<T>(conv(k, x.x + here + 3), c, slope);
                EACH_LANE dc[i] += MAX ? (arg[k][i] == t ? pooled[k][i] : 0) : weight[here] * pooled[k][i];
                const Vec<V> da = dc * slope, counted = where(own, da);
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const int at = here + 3 + (k ? j : -j);
                    dx[at] = fma(conv.w[k][j], da, dx[at]);
                    dw[k][j] = fma(counted, x.x[at], dw[k][j]);
                }
                db[k] = db[k] + counted;
                if (own) dD[k] = fma(gu[here], c, dD[k]);
            }
        }
#pragma unroll
        for (int i = 0; i < U; ++i) {
            const int t = u - 3 + i;
            const Spot spot(w, t);
            if (live && t >= t0 && t < t1) store(row_of(dxz, spot.slot, 2 * int(E)), where(spot.real(), dx[i]));
        }
    }

    // one row of partial sums per block: [dw 2 E 4 | db 2 E | dD 2 E]
    DYNAMIC_SHARED(shared);                                             // [walker][12][32 V]
    float* mine = shared + threadIdx.y * 12 * 32 * V + threadIdx.x * V;
#pragma unroll
    for (int k = 0; k < 2; ++k) EACH_LANE {
#pragma unroll
        for (int j = 0; j < 4; ++j) mine[(k * 4 + 3 - j) * 32 * V + i] = dw[k][j][i];
        mine[(8 + k) * 32 * V + i] = db[k][i];
        mine[(10 + k) * 32 * V + i] = dD[k][i];
    }
    __syncthreads();
    parts += blockIdx.x / tiles * 12 * E;
    for (int i = threadIdx.y * 32 + threadIdx.x; i < 12 * 32 * V; i += 32 * WALKERS) {
        float sum = 0;
        for (int walker = 0; walker < WALKERS; ++walker) sum += shared[walker * 12 * 32 * V + i];
        const int64_t what = i / (32 * V), channel = tile * 32 * V + i % (32 * V);
        if (channel < E) parts[what < 8 ? (what / 4 * E + channel) * 4 + what % 4 : what * E + channel] = sum;
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// expand_gate: y = norm((s0 + s1 + D0 c0 + D1 c1) / 2) silu(z). Reads x and z once, computes c again, writes y once.

struct Mixer {
    const float *conv_w, *conv_b, *D, *norm_w, *norm_b;                 // D, norm_w, norm_b may be null
};

// Rung 1. A block takes a position (forward) or some groups (backward); its threads loop over the channels, once for
// each sum that the norm needs, and compute v again each time. Works for any E.
template <class T>
__device__ float mixed(const Plan& w, const T* xz, const float* s0, const float* s1, const Mixer& m, int64_t e, int t) {
    float v = s0[w.group[t] * w.E + e] + s1[w.group[t] * w.E + e];
    for (int k = 0; k < 2 && m.D; ++k) {
        float a = m.conv_b[k * w.E + e];
        for (int j = 0; j < 4; ++j)
            a = fmaf(m.conv_w[(k * w.E + e) * 4 + 3 - j], x_at<1>(w, xz + e, k ? t + j : t - j)[0], a);
        v = fmaf(m.D[k * w.E + e], a * sigmoid<T>(a), v);
    }
    return v / 2;
}

template <class F> __device__ float sum_of_channels(BlockSum& sum, int64_t E, F f) {
    float x[1] = {0};
    for (int64_t e = threadIdx.x; e < E; e += blockDim.x) x[0] += f(e);
    sum(x);
    return x[0];
}

template <class T>
__global__ void expand_gate_rows_kernel(Plan plan, const T* xz, const float* s, Mixer m, T* y) {
    DYNAMIC_SHARED(shared);
    BlockSum sum{shared};
    const int64_t b = blockIdx.x / plan.S, E = plan.E;
    const int t = int(blockIdx.x % plan.S);
    const Plan w = plan.image(b);
    const float *s0 = s + b * w.P * E, *s1 = s0 + w.B * w.P * E;
    xz += b * w.S * 2 * E, y += (b * w.S + w.token[t]) * E;
    const bool real = w.group[t] >= 0;
    auto v = [&](int64_t e) { return real ? mixed(w, xz, s0, s1, m, e, t) : 0; };

    const float mean = m.norm_b ? sum_of_channels(sum, E, v) / E : 0;
    auto squared = [&](int64_t e) { return (v(e) - mean) * (v(e) - mean); };
    const float scale = m.norm_w ? rsqrtf(sum_of_channels(sum, E, squared) / E + EPS) : 1;
    for (int64_t e = threadIdx.x; e < E; e += blockDim.x) {
        float n = (v(e) - mean) * scale;
        if (m.norm_w) n = n * m.norm_w[e] + (m.norm_b ? m.norm_b[e] : 0);
        const float z = real ? to_float(xz[w.token[t] * 2 * E + E + e]) : 0;
        y[e] = from_float<T>(real ? n * z * sigmoid<T>(z) : 0);
    }
}

// The walkers of groups never meet padding: its rows are zeroed by shares of the positions.
template <int V, class T>
__device__ void zero_padding(const Plan& w, int64_t share, int64_t shares, T* y, T* dxz, T* g) {
    for (int64_t t = share * w.S / shares; t < (share + 1) * w.S / shares; ++t) {
        if (w.group[t] >= 0) continue;
        for (int64_t e = threadIdx.x * V; e < w.E; e += blockDim.x * V) {
            if (y) store(y + w.token[t] * w.E + e, fill<V>(0));
            store(g + w.token[t] * w.E + e, fill<V>(0));
            store(dxz + w.token[t] * 2 * w.E + w.E + e, fill<V>(0));
        }
    }
}

template <class T>
__global__ void expand_gate_backward_rows_kernel(Plan plan, Cut cut, const T* xz, const float* s, Mixer m, const T* dy,
                                                 T* y, T* dxz, T* g, float* ds, float* parts) {
    DYNAMIC_SHARED(shared);
    BlockSum sum{shared};
    const Work work = ::work(plan, cut, blockIdx.x);
    const int64_t b = work.b, E = plan.E;
    const Plan w = plan.image(b);
    const float *s0 = s + b * w.P * E, *s1 = s0 + w.B * w.P * E;
    xz += b * w.S * 2 * E, dxz += b * w.S * 2 * E, dy += b * w.S * E, g += b * w.S * E, y += y ? b * w.S * E : 0;
    float *dnorm_w = parts + blockIdx.x * 2 * E, *dnorm_b = dnorm_w + E;
    zero_padding<1>(w, work.share, cut.units, y, dxz, g);
    for (int64_t e = threadIdx.x; e < E; e += blockDim.x) {             // a channel's sums belong to one thread
        if (m.norm_w) dnorm_w[e] = dnorm_b[e] = 0;
        for (int64_t group = work.g0; group < work.g1; ++group) ds[(b * w.P + group) * E + e] = 0;
    }
    for (int i = work.m0; i < work.m1; ++i) {
        const int t = w.member[i];
        const int64_t row = w.token[t];
        auto v = [&](int64_t e) { return mixed(w, xz, s0, s1, m, e, t); };
        const float mean = m.norm_b ? sum_of_channels(sum, E, v) / E : 0;
        auto squared = [&](int64_t e) { return (v(e) - mean) * (v(e) - mean); };
        const float scale = m.norm_w ? rsqrtf(sum_of_channels(sum, E, squared) / E + EPS) : 1;
        auto normed = [&](int64_t e) { return (v(e) - mean) * scale; };
        auto dgate = [&](int64_t e) {                                   // gradient of what the gate multiplies
            const float z = to_float(xz[row * 2 * E + E + e]);
            return to_float(dy[row * E + e]) * z * sigmoid<T>(z);
        };
        auto dnormed = [&](int64_t e) { return dgate(e) * (m.norm_w ? m.norm_w[e] : 1); };
        auto along = [&](int64_t e) { return dnormed(e) * normed(e); };
        const float dmean = m.norm_b ? sum_of_channels(sum, E, dnormed) / E : 0;
        const float dscale = m.norm_w ? sum_of_channels(sum, E, along) / E : 0;
        for (int64_t e = threadIdx.x; e < E; e += blockDim.x) {
            Vec<1> gate, slope;
            silu_and_slope<T>(load<1>(xz + row * 2 * E + E + e), gate, slope);
            const float hat = normed(e), n = m.norm_w ? hat * m.norm_w[e] + (m.norm_b ? m.norm_b[e] : 0) : hat;
            const float half = (dnormed(e) - dmean - hat * dscale) * scale / 2;
            if (m.norm_w) dnorm_w[e] += dgate(e) * hat, dnorm_b[e] += dgate(e);
            ds[(b * w.P + w.group[t]) * E + e] += half;
            g[row * E + e] = from_float<T>(half);
            dxz[row * 2 * E + E + e] = from_float<T>(to_float(dy[row * E + e]) * n * slope[0]);
            if (y) y[row * E + e] = from_float<T>(n * gate[0]);
        }
    }
}

// Rungs 2 to 4. A thread owns V channels for the whole run, the block all E: a row lives in registers, the norm is two
// block sums of U rows at once. The part that forward and backward share:
template <class T, int V, int U> struct Rows {
    const Plan w;
    const Mixer m;
    const int E, e, shadow;                 // idle threads shadow the first: what they load is valid, and dropped
    const bool live;
    const float inverse;                    // 1 / E
    const T* xz;                            // of the image, at the thread's channels
    const float *s0, *s1;
    BlockSum sum;
    Conv<V> conv;
    Vec<V> skip[2], norm_w, norm_b, expanded;
    int have = -1;                          // the group that expanded, s0 + s1, belongs to
    Window<T, V, U> window;

    __device__ Rows(const Plan& plan, int64_t b, const Mixer& m, const T* all_xz, const float* s, float* shared)
        : w(plan.image(b)), m(m), E(int(plan.E)), e(threadIdx.x * V), shadow(e < E ? e : 0), live(e < E),
          inverse(1.0f / E), xz(all_xz + b * plan.S * 2 * E + shadow), s0(s + b * plan.P * E + shadow),
          s1(s0 + plan.B * plan.P * E), sum{shared} {
        if (m.D) conv.load_from(m.conv_w, m.conv_b, E, e);
        skip[0] = skip[1] = norm_w = norm_b = expanded = fill<V>(0);
        if (m.D) skip[0] = load<V>(m.D + shadow), skip[1] = load<V>(m.D + E + shadow);
        if (m.norm_w) norm_w = load<V>(m.norm_w + shadow);
        if (m.norm_b) norm_b = load<V>(m.norm_b + shadow);
    }

    // v of U positions from t on, those of the given groups; zero for group -1 and idle threads
    __device__ void mix(Vec<V> (&v)[U], int t, const int (&group)[U]) {
        if (m.D) window.move_to(t, w, xz);
#pragma unroll
        for (int i = 0; i < U; ++i) {
            if (group[i] >= 0 && group[i] != have) {
                have = group[i];
                expanded = load<V>(row_of(s0, have, E)) + load<V>(row_of(s1, have, E));
            }
            v[i] = expanded;
            if (m.D) {
                v[i] = fma(skip[0], silu<T>(conv(0, window.x + i + 3)), v[i]);
                v[i] = fma(skip[1], silu<T>(conv(1, window.x + i + 3)), v[i]);
            }
            v[i] = where(live && group[i] >= 0, 0.5f * v[i]);
        }
    }

    // v -> (v - mean) scale. Mean first, then the squares of what is left: no cancellation.
    __device__ void normalise(Vec<V> (&v)[U], float (&scale)[U]) {
        float x[U];
        if (m.norm_b) {
#pragma unroll
            for (int i = 0; i < U; ++i) x[i] = total(v[i]);
            sum(x);
#pragma unroll
            for (int i = 0; i < U; ++i) v[i] = where(live, v[i] - x[i] * inverse);
        }
#pragma unroll
        for (int i = 0; i < U; ++i) x[i] = total(v[i] * v[i]), scale[i] = 1;
        if (!m.norm_w) return;
        sum(x);
#pragma unroll
        for (int i = 0; i < U; ++i) scale[i] = rsqrtf(x[i] * inverse + EPS), v[i] = scale[i] * v[i];
    }
    __device__ Vec<V> affine(const Vec<V>& hat) const { return m.norm_w ? fma(hat, norm_w, norm_b) : hat; }
};

template <class T, int V, int U, int THREADS>
__global__ void __launch_bounds__(THREADS)
expand_gate_kernel(Plan plan, const T* xz, const float* s, Mixer m, T* y, int run) {
    DYNAMIC_SHARED(shared);
    const int64_t runs = (plan.S + run - 1) / run, b = blockIdx.x / runs;
    const int t0 = int(blockIdx.x % runs * run), t1 = int(min(plan.S, int64_t(t0) + run));
    Rows<T, V, U> rows(plan, b, m, xz, s, shared);
    const int E = rows.E;
    y += b * plan.S * E + rows.e;
    for (int t = t0; t < t1; t += U) {
        Vec<V> v[U], z[U];
        int slot[U], group[U];
        float scale[U];
#pragma unroll
        for (int i = 0; i < U; ++i) {                                   // z sets out before the barriers
            const Spot spot(rows.w, t + i);
            slot[i] = spot.slot, group[i] = t + i < t1 ? spot.group : -1;
            z[i] = load<V>(row_of(rows.xz + E, slot[i], 2 * E));
        }
        rows.mix(v, t, group);
        rows.normalise(v, scale);
#pragma unroll
        for (int i = 0; i < U; ++i)
            if (rows.live && t + i < t1)
                store(row_of(y, slot[i], E), where(group[i] >= 0, rows.affine(v[i]) * silu<T>(z[i])));
    }
}

// The backward walks the members of groups, so that ds of a group is a sum in registers. norm of v:
// hat = (v - mean) scale;  dv = scale (dhat - mean(dhat) - hat mean(dhat hat)),  the first mean for LayerNorm only.
template <class T, int V, int U, int THREADS>
__global__ void __launch_bounds__(THREADS)
expand_gate_backward_kernel(Plan plan, Cut cut, const T* xz, const float* s, Mixer m, const T* dy, T* y, T* dxz, T* g,
                            float* ds, float* parts) {
    DYNAMIC_SHARED(shared);
    const Work work = ::work(plan, cut, blockIdx.x);
    const int64_t b = work.b;
    Rows<T, V, U> rows(plan, b, m, xz, s, shared);
    const Plan& w = rows.w;
    const int E = rows.E;
    dxz += b * w.S * 2 * E, dy += b * w.S * E, g += b * w.S * E, y += y ? b * w.S * E : 0;
    ds += (blockIdx.x % cut.slices * w.B + b) * w.P * E + rows.e;       // with slices, ds is scratch [slice][B][P][E]
    zero_padding<V>(w, work.share, cut.units * cut.slices, y, dxz, g);
    dxz += E + rows.e, dy += rows.shadow, g += rows.e, y += y ? rows.e : 0;

    Vec<V> dnorm_w = fill<V>(0), dnorm_b = fill<V>(0), sum = fill<V>(0);
    int group = work.g0;
    auto write = [&]() {
        if (rows.live) store(row_of(ds, group, E), sum);
        sum = fill<V>(0);
    };
    for (int at = work.m0, n; at < work.m1; at += n) {
        const int t = __ldg(w.member + at);
        n = w.template neighbours<U>(at, work.m1);
        Vec<V> v[U], z[U], dout[U];
        int slot[U], group_of[U];
        float scale[U], means[2 * U];
#pragma unroll
        for (int i = 0; i < U; ++i) {
            const Spot spot(w, t + i);
            slot[i] = spot.slot, group_of[i] = i < n ? spot.group : -1;
            z[i] = load_if<V>(rows.live && i < n, rows.xz + E, slot[i], 2 * E);
            dout[i] = load_if<V>(rows.live && i < n, dy, slot[i], E);
        }
        rows.mix(v, t, group_of);
        rows.normalise(v, scale);
#pragma unroll
        for (int i = 0; i < U; ++i) {                                   // all but dv is known before the last sums
            Vec<V> gate, slope;
            silu_and_slope<T>(z[i], gate, slope);
            const Vec<V> normed = rows.affine(v[i]);
            if (rows.live && i < n) {
                store(row_of(dxz, slot[i], 2 * E), dout[i] * normed * slope);
                if (y) store(row_of(y, slot[i], E), normed * gate);
            }
            dout[i] = dout[i] * gate;
            dnorm_w = fma(dout[i], v[i], dnorm_w), dnorm_b = dnorm_b + dout[i];
            if (m.norm_w) dout[i] = dout[i] * rows.norm_w;
            means[i] = total(dout[i]), means[U + i] = total(dout[i] * v[i]);
        }
        if (m.norm_w) rows.sum(means);
#pragma unroll
        for (int i = 0; i < U; ++i) {
            if (!rows.live || i >= n) continue;
            const float dmean = m.norm_b ? means[i] * rows.inverse : 0;
            const float dscale = m.norm_w ? means[U + i] * rows.inverse : 0;
            const Vec<V> dv = scale[i] * fma(fill<V>(-dscale), v[i], dout[i] - dmean), half = 0.5f * dv;
            store(row_of(g, slot[i], E), half);
#pragma unroll 1
            for (; group < group_of[i]; ++group) write();
            sum = sum + half;
        }
    }
    for (; group < work.g1; ++group) write();
    if (rows.live && m.norm_w) {
        parts += int64_t(blockIdx.x) * 2 * E + rows.e;
        store(parts, dnorm_w), store(parts + E, dnorm_b);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// add_norm: a warp takes a row. Only the first pass over the row reads DRAM; the others find it in L1.

template <int V, class T> __device__ Vec<V> sum_at(const T* hidden, const float* residual, int64_t at) {
    Vec<V> r = fill<V>(0);
    if (residual) r = load<V>(residual + at);
    if (hidden) r = r + load<V>(hidden + at);
    return r;
}

template <class F> __device__ float sum_of_row(int D, int V, F f) {     // f(i): channels i .. i + V - 1
    float sum = 0;
    for (int i = threadIdx.x * V; i < D; i += 32 * V) sum += f(i);
    return warp_sum(sum);
}

template <class T, int V>
__global__ void add_norm_kernel(int64_t n, int D, const T* hidden, const float* residual, const float* weight,
                                const float* bias, T* u, float* out) {
    const int64_t row = int64_t(blockIdx.x) * WALKERS + threadIdx.y;
    if (row >= n) return;                                               // a whole warp, and no barrier follows
    auto r = [&](int i) { return out ? load<V>(out + row * D + i) : sum_at<V>(hidden, residual, row * D + i); };
    if (out)
        for (int i = threadIdx.x * V; i < D; i += 32 * V)
            store(out + row * D + i, sum_at<V>(hidden, residual, row * D + i));      // read again by this thread alone
    const float mean = bias ? sum_of_row(D, V, [&](int i) { return total(r(i)); }) / D : 0;
    auto squares = [&](int i) { const Vec<V> d = r(i) - mean; return total(d * d); };
    const float scale = rsqrtf(sum_of_row(D, V, squares) / D + EPS);
    for (int i = threadIdx.x * V; i < D; i += 32 * V) {
        const Vec<V> hat = scale * (r(i) - mean);
        store(u + row * D + i, fma(hat, load<V>(weight + i), bias ? load<V>(bias + i) : fill<V>(0)));
    }
}

// Columns c0 .. c1-1 of the parameter gradients are summed in shared memory, one copy per warp, and written as the
// block's row of partial sums [dweight D | dbias D].
template <class T, int V>
__global__ void add_norm_backward_kernel(int64_t n, int D, const float* r, const float* weight, bool centred,
                                         const T* du, const float* dout, float* dr, T* dhidden, float* parts, int rows,
                                         int c0, int c1) {
    DYNAMIC_SHARED(shared);                                             // [warp][2][c1 - c0]
    const int lane = threadIdx.x, width = c1 - c0;
    float *dweight = shared + threadIdx.y * 2 * width, *dbias = dweight + width;
    for (int i = lane; i < 2 * width; i += 32) dweight[i] = 0;
    __syncwarp();
    const int64_t end = min(n, int64_t(blockIdx.x + 1) * rows);
    for (int64_t row = int64_t(blockIdx.x) * rows + threadIdx.y; row < end; row += blockDim.y) {
        const int64_t at = row * D;
        auto r_ = [&](int i) { return load<V>(r + at + i); };
        const float mean = centred ? sum_of_row(D, V, [&](int i) { return total(r_(i)); }) / D : 0;
        auto squares = [&](int i) { const Vec<V> d = r_(i) - mean; return total(d * d); };
        const float scale = rsqrtf(sum_of_row(D, V, squares) / D + EPS);
        auto hat = [&](int i) { return scale * (r_(i) - mean); };
        auto dhat = [&](int i) { return load<V>(du + at + i) * load<V>(weight + i); };
        const float dmean = centred ? sum_of_row(D, V, [&](int i) { return total(dhat(i)); }) / D : 0;
        const float dscale = sum_of_row(D, V, [&](int i) { return total(dhat(i) * hat(i)); }) / D;
        for (int i = lane * V; i < D; i += 32 * V) {
            const Vec<V> h = hat(i), up = load<V>(du + at + i);
            Vec<V> d = scale * fma(fill<V>(-dscale), h, dhat(i) - dmean);
            if (dout) d = d + load<V>(dout + at + i);
            store(dr + at + i, d);
            if (dhidden) store(dhidden + at + i, d);
            for (int j = 0; j < V; ++j) {
                const int c = i + j - c0;
                if (c >= 0 && c < width) dweight[c] += up[j] * h[j], dbias[c] += up[j];
            }
        }
    }
    __syncthreads();
    for (int i = threadIdx.y * 32 + lane; i < 2 * width; i += 32 * blockDim.y) {
        float sum = 0;
        for (unsigned warp = 0; warp < blockDim.y; ++warp) sum += shared[warp * 2 * width + i];
        parts[int64_t(blockIdx.x) * 2 * D + (i < width ? c0 + i : D + c0 + i - width)] = sum;
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// selective_scan: h_t = exp(delta A) h_{t-1} + delta B x;  s_t = C h_t + D x. A thread owns a channel.

struct Scan {
    int64_t K, B, P, E, N, ld;
    const float *x, *dt, *A, *Bm, *Cm, *D, *dt_bias;
    int64_t chunk, chunks;                  // steps of a chunk; chunks of the sequence
    int64_t first;                          // states first .. first + 15 are this launch's: more are more launches
};

constexpr int STATES = 16, SEGMENT = 8, SCAN_THREADS = 64;
constexpr int64_t SCAN_SHARED = SEGMENT * 2 * STATES * sizeof(float);
constexpr int64_t SCAN_BACKWARD_SHARED = SCAN_SHARED + SEGMENT * (STATES + 3) * SCAN_THREADS * sizeof(float);

__device__ inline float softplus(float x) { return x > 20 ? x : log1pf(expf(x)); }

// Rung 1, any N, as it is written.
__global__ void scan_naive_kernel(Scan q, float* s) {
    const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, kb = i / q.E, e = i % q.E, k = kb / q.B;
    if (kb >= q.K * q.B) return;
    for (int64_t step = 0; step < q.P; ++step) {
        const int64_t row = kb * q.P + (k ? q.P - 1 - step : step), at = row * q.E + e;
        s[at] = q.D ? q.D[k * q.E + e] * q.x[at] : 0;
    }
    for (int64_t n = 0; n < q.N; ++n) {
        float h = 0;
        for (int64_t step = 0; step < q.P; ++step) {
            const int64_t row = kb * q.P + (k ? q.P - 1 - step : step), at = row * q.E + e;
            const float delta = softplus(q.dt[at] + (q.dt_bias ? q.dt_bias[k * q.E + e] : 0));
            h = expf(delta * q.A[(k * q.E + e) * q.N + n]) * h + delta * q.Bm[row * q.ld + n] * q.x[at];
            s[at] += q.Cm[row * q.ld + n] * h;
        }
    }
}

// What a thread of the faster kernels knows: its channel, its chunk, and A in registers.
struct Channel {
    int64_t kb, k, e, c, first, last;       // steps first .. last-1, counted in the direction of the scan
    bool live;
    float A[STATES], bias;                  // A log2(e), for exp2

    __device__ Channel(const Scan& q) {
        const int64_t tiles = (q.E + SCAN_THREADS - 1) / SCAN_THREADS, rest = blockIdx.x / tiles;
        e = blockIdx.x % tiles * SCAN_THREADS + threadIdx.x;
        kb = rest % (q.K * q.B), k = kb / q.B, c = rest / (q.K * q.B);
        live = e < q.E, first = c * q.chunk, last = min(q.P, first + q.chunk);
        bias = live && q.dt_bias ? q.dt_bias[k * q.E + e] : 0;
        for (int n = 0; n < STATES; ++n)
            A[n] = live && q.first + n < q.N ? q.A[(k * q.E + e) * q.N + q.first + n] * LOG2_E : 0;
    }
    __device__ int64_t row(const Scan& q, int64_t i) const { return kb * q.P + (k ? q.P - 1 - i : i); }
};

// B and C of SEGMENT steps into shared memory [step][B, C][16], for all channels of the block; absent states are zero.
__device__ inline void stage(const Scan& q, const Channel& my, int64_t i, float* shared) {
    __syncthreads();
    for (int j = threadIdx.x; j < SEGMENT * 2 * STATES; j += SCAN_THREADS) {
        const int64_t step = i + j / (2 * STATES), n = q.first + j % STATES;
        const float* from = j / STATES % 2 ? q.Cm : q.Bm;
        shared[j] = step < my.last && n < q.N ? from[my.row(q, step) * q.ld + n] : 0;
    }
    __syncthreads();
}

// One pass over a chunk.
//     LOCAL    phase 1: as if the chunk began with h = 0. Leaves its last h and the sum of delta: over the whole chunk
//              the state decays by exp(A sum(delta)), so one number stands for N products.
//     ADJOINT  also what the backward needs of phase 1: R = sum_t (prod_{t' <= t} exp(delta_t' A)) C_t ds_t, the
//              gradient that the chunk sends to the h before it.
//     neither  phase 3: begins with the h that phase 2 carried here (or 0) and writes s.
// state, adjoint [chunks][K B][16][E], decay [chunks][K B][E]
template <bool LOCAL, bool ADJOINT>
__global__ void __launch_bounds__(SCAN_THREADS)
scan_kernel(Scan q, float* s, const float* ds, bool shared_ds, float* state, float* adjoint, float* decay) {
    DYNAMIC_SHARED(bc);
    const Channel my(q);
    const int64_t slot = my.c * q.K * q.B + my.kb;
    const float D = my.live && q.D && !LOCAL ? q.D[my.k * q.E + my.e] : 0;
    float h[STATES], R[STATES], product[STATES], sum = 0;
#pragma unroll
    for (int n = 0; n < STATES; ++n) {
        h[n] = !LOCAL && state && my.live ? state[(slot * STATES + n) * q.E + my.e] : 0;
        R[n] = 0, product[n] = 1;
    }
    for (int64_t i = my.first; i < my.last; i += SEGMENT) {
        float x[SEGMENT], delta[SEGMENT], up[SEGMENT];
#pragma unroll
        for (int j = 0; j < SEGMENT; ++j) {                             // loads of a segment are in flight together
            const bool here = my.live && i + j < my.last;
            const int64_t row = here ? my.row(q, i + j) : 0;
            x[j] = here ? q.x[row * q.E + my.e] : 0;
            delta[j] = here ? q.dt[row * q.E + my.e] : 0;
            up[j] = ADJOINT && here ? ds[(shared_ds ? row - my.k * q.B * q.P : row) * q.E + my.e] : 0;
        }
        stage(q, my, i, bc);
#pragma unroll
        for (int j = 0; j < SEGMENT; ++j) {
            if (!my.live || i + j >= my.last) break;
            const float *B = bc + j * 2 * STATES, *C = B + STATES;
            const float step = softplus(delta[j] + my.bias), drive = step * x[j];
            float y = 0;
#pragma unroll
            for (int n = 0; n < STATES; ++n) {
                const float a = exp2f(step * my.A[n]);
                h[n] = fmaf(a, h[n], drive * B[n]);
                if (!LOCAL) y = fmaf(C[n], h[n], y);
                if (ADJOINT) product[n] *= a, R[n] = fmaf(product[n], C[n] * up[j], R[n]);
            }
            sum += step;
            if (!LOCAL) {
                const int64_t at = my.row(q, i + j) * q.E + my.e;
                s[at] = y + (q.first ? s[at] : q.D ? D * x[j] : 0);
            }
        }
    }
#pragma unroll
    for (int n = 0; n < STATES && LOCAL && my.live; ++n) {
        state[(slot * STATES + n) * q.E + my.e] = h[n];
        if (ADJOINT) adjoint[(slot * STATES + n) * q.E + my.e] = R[n];
    }
    if (LOCAL && my.live) decay[slot * q.E + my.e] = sum;
}

// Phase 2: from what every chunk adds to what every chunk begins with. The adjoint goes from the last to the first.
__global__ void carry_kernel(Scan q, float* state, const float* decay, bool reversed) {
    const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, e = i % q.E, n = i / q.E % STATES;
    const int64_t kb = i / q.E / STATES, k = kb / q.B;
    if (kb >= q.K * q.B) return;
    const float A = q.first + n < q.N ? q.A[(k * q.E + e) * q.N + q.first + n] * LOG2_E : 0;
    float carry = 0;
#pragma unroll 4
    for (int64_t j = 0; j < q.chunks; ++j) {
        const int64_t slot = (reversed ? q.chunks - 1 - j : j) * q.K * q.B + kb, at = (slot * STATES + n) * q.E + e;
        const float own = state[at];
        state[at] = carry;
        carry = fmaf(exp2f(decay[slot * q.E + e] * A), carry, own);
    }
}

// v[i], i < 32, in each of 32 lanes -> in lane i, as v[0], the sum of v[i] over the lanes. Each exchange halves the
// number of values: 31 shuffles, where 32 separate sums would take 160.
template <int HALF = 16> __device__ void transpose_sum(float (&v)[32]) {
    const bool upper = threadIdx.x & HALF;
#pragma unroll
    for (int i = 0; i < HALF; ++i) {
        const float give = upper ? v[i] : v[i + HALF], keep = upper ? v[i + HALF] : v[i];
        v[i] = keep + __shfl_xor_sync(ALL, give, HALF);
    }
    if constexpr (HALF > 1) transpose_sum<HALF / 2>(v);
}

// The backward of a chunk: once through it, leaving h at the start of every segment in scratch; then segment after
// segment from the end: recompute its h into shared memory, and go back through it with the adjoint R.
//     G_t = C_t ds_t + R_{t+1},  R_t = exp(delta A) G_t;   dC = ds h, dB = delta x G (summed over channels),
//     dA = sum delta G exp(delta A) h_{t-1},  d delta = sum_n G (A exp(delta A) h_{t-1} + B x),  dx = delta sum_n G B
// checkpoint [segments][K B][16][E]; parts [chunks B][dA K E 16 | dD K E | dbias K E]; bc_parts [E / 32][2][K B P][16]
__global__ void __launch_bounds__(SCAN_THREADS)
scan_backward_kernel(Scan q, const float* ds, bool shared_ds, float* dx, float* ddt, const float* state,
                     const float* adjoint, float* checkpoint, float* parts, float* bc_parts) {
    DYNAMIC_SHARED(bc);
    float (*past)[STATES][SCAN_THREADS] = reinterpret_cast<float (*)[STATES][SCAN_THREADS]>(bc + SEGMENT * 2 * STATES);
    float (*in)[SEGMENT][SCAN_THREADS] = reinterpret_cast<float (*)[SEGMENT][SCAN_THREADS]>(past + SEGMENT);
    const Channel my(q);
    const int me = threadIdx.x;
    const int64_t KB = q.K * q.B, slot = my.c * KB + my.kb, KE = q.K * q.E, ke = my.k * q.E + my.e;
    float h[STATES], R[STATES], dA[STATES], dD = 0, dbias = 0;
#pragma unroll
    for (int n = 0; n < STATES; ++n) {
        h[n] = state && my.live ? state[(slot * STATES + n) * q.E + my.e] : 0;
        R[n] = state && my.live ? adjoint[(slot * STATES + n) * q.E + my.e] : 0;
        dA[n] = 0;
    }
    auto keep = [&](int64_t i, int n) -> float& {
        return checkpoint[((i / SEGMENT * KB + my.kb) * STATES + n) * q.E + my.e];
    };
    auto read = [&](int64_t i) {                                        // x, dt, ds of a segment; zero beyond the end
#pragma unroll
        for (int j = 0; j < SEGMENT; ++j) {
            const bool here = my.live && i + j < my.last;
            const int64_t row = here ? my.row(q, i + j) : 0;
            in[0][j][me] = here ? q.x[row * q.E + my.e] : 0;
            in[1][j][me] = here ? q.dt[row * q.E + my.e] + my.bias : 0;
            in[2][j][me] = here ? ds[(shared_ds ? row - my.k * q.B * q.P : row) * q.E + my.e] : 0;
        }
        stage(q, my, i, bc);
    };
    auto forward = [&](bool record) {
#pragma unroll 1
        for (int j = 0; j < SEGMENT; ++j) {
            const float delta = softplus(in[1][j][me]), drive = delta * in[0][j][me];
#pragma unroll
            for (int n = 0; n < STATES; ++n) {
                if (record) past[j][n][me] = h[n];
                h[n] = fmaf(exp2f(delta * my.A[n]), h[n], drive * bc[j * 2 * STATES + n]);
            }
        }
    };
    int64_t i = my.first;
    for (; i < my.last; i += SEGMENT) {
#pragma unroll
        for (int n = 0; n < STATES; ++n) if (my.live) keep(i, n) = h[n];
        if (i + SEGMENT >= my.last) break;                              // nobody needs the h after the last segment
        read(i);
        forward(false);
    }
    for (; i >= my.first; i -= SEGMENT) {
#pragma unroll
        for (int n = 0; n < STATES; ++n) h[n] = my.live ? keep(i, n) : 0;
        read(i);
        forward(true);
#pragma unroll 1
        for (int j = int(min(my.last - i, int64_t(SEGMENT))) - 1; j >= 0; --j) {
            const float x = in[0][j][me], dt = in[1][j][me], up = in[2][j][me];
            const float delta = softplus(dt), drive = delta * x, *B = bc + j * 2 * STATES, *C = B + STATES;
            float sum_GB = 0, ddelta = 0, v[2 * STATES];
#pragma unroll
            for (int n = 0; n < STATES; ++n) {
                const float a = exp2f(delta * my.A[n]), decayed = a * past[j][n][me];
                const float G = fmaf(C[n], up, R[n]), Gd = G * decayed;
                v[n] = drive * G, v[STATES + n] = up * fmaf(drive, B[n], decayed);
                sum_GB = fmaf(G, B[n], sum_GB);
                ddelta = fmaf(my.A[n], Gd, ddelta);
                dA[n] = fmaf(delta, Gd, dA[n]);
                R[n] = a * G;
            }
            const int64_t row = my.row(q, i + j), at = row * q.E + my.e;
            if (my.live) {
                const float slope = dt > 20 ? 1 : 1 / (1 + expf(-dt));
                const float dt_gradient = fmaf(ddelta, LN_2, sum_GB * x) * slope;
                dx[at] = fmaf(delta, sum_GB, q.first ? dx[at] : q.D ? q.D[ke] * up : 0);
                ddt[at] = dt_gradient + (q.first ? ddt[at] : 0);
                dD = fmaf(up, x, dD), dbias += dt_gradient;
            }
            transpose_sum(v);                                           // lane n: dB of state n; lane 16 + n: dC
            const int64_t lane = me % 32, warp = (my.e - lane) / 32;
            if (warp * 32 < q.E)
                bc_parts[((warp * 2 + lane / STATES) * KB * q.P + row) * STATES + lane % STATES] = v[0];
        }
    }
    if (!my.live) return;
    parts += (my.c * q.B + my.kb % q.B) * (STATES + 2) * KE;
#pragma unroll
    for (int n = 0; n < STATES; ++n) parts[ke * STATES + n] = dA[n];
    parts[STATES * KE + ke] = dD;
    parts[(STATES + 1) * KE + ke] = dbias;
}

// ---------------------------------------------------------------------------------------------------------------------
// The host side: scratch memory, choices, launches

using Allocate = void* (*)(size_t bytes, void* stream);
using Release = void (*)(void* pointer, void* stream);
Allocate device_alloc = [](size_t bytes, void* stream) {
    void* pointer = nullptr;
    if (cudaMallocAsync(&pointer, bytes, static_cast<cudaStream_t>(stream)) != cudaSuccess) cudaGetLastError();
    return pointer;
};
Release device_free = [](void* pointer, void* stream) { cudaFreeAsync(pointer, static_cast<cudaStream_t>(stream)); };

int64_t rungs[3];                           // conv_pool, expand_gate, selective_scan; 0: the best

// Floats that live until the end of a function; kernels of the same stream may still be using them, and that is fine.
struct Scratch {
    void* stream;
    float* data;
    Scratch(int64_t floats, void* stream)
        : stream(stream), data(floats ? static_cast<float*>(device_alloc(floats * sizeof(float), stream)) : nullptr) {}
    ~Scratch() { if (data) device_free(data, stream); }
    Scratch(const Scratch&) = delete;
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t clamp(int64_t x, int64_t low, int64_t high) { return std::max(low, std::min(x, high)); }

template <class... P> bool aligned(P... pointers) {
    bool result = true;
    for (const void* p : {static_cast<const void*>(pointers)...}) result &= reinterpret_cast<uintptr_t>(p) % 16 == 0;
    return result;
}

template <class F> int with_type(int64_t dtype, F f) {
    if (dtype == 0) return f(float());
    if (dtype == 1) return f(__nv_bfloat16());
    if (dtype == 2) return f(__half());
    return cudaErrorInvalidValue;
}
template <int X> using Int = std::integral_constant<int, X>;

#define TRY(call) do { const int error = (call); if (error) return error; } while (0)

int sum_parts(const float* parts, int64_t rows, Outputs outputs, cudaStream_t stream) {
    int64_t columns = 0;
    for (Output& o : outputs.o) columns += o.columns;
    return launch(sum_parts_kernel, ceil_div(columns, 32), dim3(32, SUM_ROWS), SUM_ROWS * 32 * sizeof(float), stream,
                  outputs, parts, rows, columns);
}

// Sizes at which an H100 or H200 (132 SMs) is full. Constants, not queries: the same bits on every chip.
constexpr int64_t FULL_WARPS = 132 * 16 * 2;        // of a kernel with 128 registers, twice over

// Long groups and few of them: cut their members into slices. Short groups and many of them: a walker takes several.
Cut cut_groups(int64_t images, const Plan& plan, int64_t walkers_wanted, int64_t slice_unit) {
    const int64_t length = ceil_div(plan.S, plan.P), walkers = images * plan.P;
    Cut cut{1, 1, plan.P};
    if (walkers < walkers_wanted / 2 && length >= 8 * slice_unit)
        cut.slices = slice_unit * clamp(walkers_wanted / (walkers * slice_unit), 1, length / (8 * slice_unit));
    else
        cut.groups = clamp(std::min(walkers / walkers_wanted, 64 / length), 1, plan.P);
    cut.units = ceil_div(plan.P, cut.groups);
    return cut;
}

template <class T, int V, int U, int FIRST, int LAST, bool MAX>
int launch_conv_pool(const Plan& plan, const T* xz, const float* conv_w, const float* conv_b, float* p, int32_t* argmax,
                     bool several_walkers, cudaStream_t stream) {
    const int64_t tiles = ceil_div(plan.E, 32 * V), n = 2 * plan.B * plan.P * plan.E;
    Cut cut{1, 1, plan.P};
    if (several_walkers) cut = cut_groups(plan.B * tiles, plan, FULL_WARPS, WALKERS);
    const int64_t parts = cut.slices / WALKERS, blocks = tiles * ceil_div(plan.B * cut.units * cut.slices, WALKERS);
    const int64_t shared = cut.slices > 1 ? WALKERS * 4 * V * 32 * sizeof(float) : 0;
    const Scratch scratch(parts > 1 ? n * parts * (1 + MAX) : 0, stream);
    float* to = parts > 1 ? scratch.data : p;
    int32_t* to_arg = parts > 1 ? reinterpret_cast<int32_t*>(scratch.data + n * parts) : argmax;
    if (!to) return cudaErrorMemoryAllocation;
    TRY(launch(conv_pool_kernel<T, V, U, FIRST, LAST, MAX>, blocks, dim3(32, WALKERS), shared, stream,
               plan, cut, xz, conv_w, conv_b, to, to_arg));
    if (parts <= 1) return cudaSuccess;
    return launch(pool_parts_kernel<MAX>, ceil_div(n, 256), dim3(256), 0, stream, p, argmax, to, to_arg, parts, n);
}

template <class T, bool MAX>
int choose_conv_pool(const Plan& plan, const T* xz, const float* conv_w, const float* conv_b, float* p, int32_t* argmax,
                     cudaStream_t stream) {
    const int64_t rung = rungs[0] ? rungs[0] : 5;
    const bool wide = plan.E % 4 == 0 && aligned(xz, conv_w, p, argmax);
    auto run = [&](auto V, auto U, auto FIRST, auto LAST) {
        return launch_conv_pool<T, V(), U(), FIRST(), LAST(), MAX>(plan, xz, conv_w, conv_b, p, argmax, rung > 4,
                                                                   stream);
    };
    if constexpr (std::is_same_v<T, float>) {
        if (rung == 1) {
            TRY(run(Int<1>(), Int<1>(), Int<0>(), Int<1>()));
            return run(Int<1>(), Int<1>(), Int<1>(), Int<2>());
        }
        if (rung == 3 && wide) return run(Int<4>(), Int<1>(), Int<0>(), Int<2>());
    }
    if (rung <= 2 || !wide) return run(Int<1>(), Int<1>(), Int<0>(), Int<2>());
    return run(Int<4>(), Int<4>(), Int<0>(), Int<2>());
}

// Calls f(V, U, THREADS) with the channels and rows of a thread and the bound of its block, or returns f's stand-in
// where a row does not fit into the registers of a block.
template <class F, class G> int choose_rows(const Plan& plan, bool wide, F f, G rows_in_memory) {
    const int64_t rung = rungs[1] ? rungs[1] : 4;
    const int64_t threads = ceil_div(plan.E, wide && rung > 2 ? 4 : 1);
    if (rung == 1 || threads > 768) return rows_in_memory();
    if (!wide || rung == 2) return f(Int<1>(), Int<1>(), Int<768>());
    if (rung == 3) return f(Int<4>(), Int<1>(), Int<768>());
    if (threads > 512) return f(Int<4>(), Int<1>(), Int<768>());
    return f(Int<4>(), Int<2>(), Int<512>());
}

// Phases 1 and 2 of a scan in chunks
int carry_states(const Scan& q, bool adjoint, const float* ds, bool shared_ds, float* state, float* decay, float* R,
                 int64_t blocks, cudaStream_t stream) {
    const int64_t carries = ceil_div(q.K * q.B * STATES * q.E, 128);
    TRY(launch(adjoint ? scan_kernel<true, true> : scan_kernel<true, false>, blocks, dim3(SCAN_THREADS),
               SCAN_SHARED, stream, q, nullptr, ds, shared_ds, state, R, decay));
    TRY(launch(carry_kernel, carries, dim3(128), 0, stream, q, state, decay, false));
    return adjoint ? launch(carry_kernel, carries, dim3(128), 0, stream, q, R, decay, true) : int(cudaSuccess);
}

// Enough threads for the chip, chunks of whole segments and not below 16 steps.
void choose_chunks(Scan& q) {
    const int64_t threads = std::max<int64_t>(1, q.K * q.B * q.E), wanted = 132 * 1024;
    const int64_t chunks = rungs[2] == 2 || threads * 2 > wanted ? 1 : clamp(ceil_div(wanted, threads), 1, q.P / 16);
    q.chunk = ceil_div(ceil_div(q.P, std::max<int64_t>(chunks, 1)), SEGMENT) * SEGMENT;
    q.chunks = ceil_div(q.P, q.chunk);
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------------------
// The interface. Every function returns a cudaError_t, 0 if all is well.

extern "C" {

void set_allocator(void* (*allocate)(size_t, void*), void (*release)(void*, void*)) {
    device_alloc = allocate, device_free = release;
}

void set_rung(int64_t kernel, int64_t rung) {           // kernel 0, 1, 2 as in the table at the top; rung 0 the best
    if (kernel >= 0 && kernel < 3) rungs[kernel] = rung;
}

const char* error_name(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

int add_norm(int64_t dtype, int64_t rows, int64_t D, const void* hidden, const float* residual, const float* weight,
             const float* bias, void* u, float* out, void* stream) {
    return with_type(dtype, [&](auto t) {
        using T = decltype(t);
        const bool wide = D % 4 == 0 && aligned(hidden, residual, weight, bias, u, out);
        return launch(wide ? add_norm_kernel<T, 4> : add_norm_kernel<T, 1>, ceil_div(rows, WALKERS), dim3(32, WALKERS),
                      0, cudaStream_t(stream), rows, int(D), (const T*)hidden, residual, weight, bias, (T*)u, out);
    });
}

int add_norm_backward(int64_t dtype, int64_t rows, int64_t D, const float* r, const float* weight, int64_t has_bias,
                      const void* du, const float* dout, float* dr, void* dhidden, float* dweight, float* dbias,
                      void* stream) {
    const int64_t span = std::min<int64_t>(D, 6144), warps = clamp(6144 / D, 1, 8);         // 48 KB of shared memory
    const int64_t run = std::max(warps, ceil_div(rows, 132 * 4)), blocks = ceil_div(rows, run);
    const Scratch parts(blocks * 2 * D, stream);
    if (blocks && !parts.data) return cudaErrorMemoryAllocation;
    for (int64_t c0 = 0; c0 < D; c0 += span) {          // beyond 6144 channels, again for the next columns of dweight
        const int64_t c1 = std::min(D, c0 + span);
        TRY(with_type(dtype, [&](auto t) {
            using T = decltype(t);
            const bool wide = D % 4 == 0 && aligned(r, weight, du, dout, dr, dhidden);
            return launch(wide ? add_norm_backward_kernel<T, 4> : add_norm_backward_kernel<T, 1>, blocks,
                          dim3(32, unsigned(warps)), warps * 2 * (c1 - c0) * sizeof(float), cudaStream_t(stream), rows,
                          int(D), r, weight, has_bias != 0, (const T*)du, dout, dr, (T*)dhidden, parts.data, int(run),
                          int(c0), int(c1));
        }));
    }
    return sum_parts(parts.data, blocks, {{{dweight, D}, {dbias, D}}}, cudaStream_t(stream));
}

int conv_pool(int64_t dtype, int64_t B, int64_t S, int64_t P, int64_t E, int64_t Bt, int64_t max, const void* xz,
              const float* conv_w, const float* conv_b, const int32_t* token, const int32_t* group, const float* weight,
              const int32_t* member, const int32_t* start, float* p, int32_t* argmax, void* stream) {
    const Plan plan{B, S, P, E, Bt, token, group, weight, member, start};
    if (B == 0) return cudaSuccess;
    return with_type(dtype, [&](auto t) {
        using T = decltype(t);
        const auto choose = max ? choose_conv_pool<T, true> : choose_conv_pool<T, false>;
        return choose(plan, (const T*)xz, conv_w, conv_b, p, argmax, cudaStream_t(stream));
    });
}

int selective_scan(int64_t K, int64_t B, int64_t P, int64_t E, int64_t N, const float* x, const float* dt,
                   const float* A, const float* Bm, const float* Cm, int64_t ld, const float* D, const float* dt_bias,
                   float* s, void* stream_) {
    Scan q{K, B, P, E, N, ld, x, dt, A, Bm, Cm, D, dt_bias, P, 1, 0};
    const cudaStream_t stream = cudaStream_t(stream_);
    if (B == 0) return cudaSuccess;
    if (rungs[2] == 1) return launch(scan_naive_kernel, ceil_div(K * B * E, 128), dim3(128), 0, stream, q, s);
    choose_chunks(q);
    const int64_t blocks = ceil_div(E, SCAN_THREADS) * K * B * q.chunks, states = q.chunks * K * B * STATES * E;
    const Scratch scratch(q.chunks > 1 ? states + states / STATES : 0, stream);
    if (q.chunks > 1 && !scratch.data) return cudaErrorMemoryAllocation;
    for (; q.first < N; q.first += STATES) {
        if (q.chunks > 1)
            TRY(carry_states(q, false, nullptr, false, scratch.data, scratch.data + states, nullptr, blocks, stream));
        TRY(launch(scan_kernel<false, false>, blocks, dim3(SCAN_THREADS), SCAN_SHARED, stream, q, s, nullptr, false,
                   scratch.data, nullptr, nullptr));
    }
    return cudaSuccess;
}

int selective_scan_backward(int64_t K, int64_t B, int64_t P, int64_t E, int64_t N, const float* x, const float* dt,
                            const float* A, const float* Bm, const float* Cm, int64_t ld, const float* D,
                            const float* dt_bias, const float* ds, int64_t shared_ds, float* dx, float* ddt, float* dA,
                            float* dB, float* dC, float* dD, float* ddt_bias, void* stream_) {
    Scan q{K, B, P, E, N, ld, x, dt, A, Bm, Cm, D, dt_bias, P, 1, 0};
    const cudaStream_t stream = cudaStream_t(stream_);
    choose_chunks(q);
    const int64_t blocks = ceil_div(E, SCAN_THREADS) * K * B * q.chunks, states = q.chunks * K * B * STATES * E;
    const int64_t rows = q.chunks * B, KE = K * E, KBP = K * B * P, warps = ceil_div(E, 32);
    const Scratch carry(q.chunks > 1 ? 2 * states + states / STATES : 0, stream);
    const Scratch checkpoint(ceil_div(P, SEGMENT) * K * B * STATES * E, stream);
    const Scratch parts(rows * KE * (STATES + 2), stream), bc_parts(warps * 2 * KBP * STATES, stream);
    if (B && (!checkpoint.data || !parts.data || !bc_parts.data || (q.chunks > 1 && !carry.data)))
        return cudaErrorMemoryAllocation;
    float *state = carry.data, *R = state ? state + states : nullptr;
    for (; q.first < N; q.first += STATES) {
        if (q.chunks > 1) TRY(carry_states(q, true, ds, shared_ds != 0, state, R + states, R, blocks, stream));
        TRY(launch(scan_backward_kernel, blocks, dim3(SCAN_THREADS), SCAN_BACKWARD_SHARED, stream, q, ds,
                   shared_ds != 0, dx, ddt, state, R, checkpoint.data, parts.data, bc_parts.data));
        const int64_t width = std::min<int64_t>(STATES, N - q.first);
        TRY(sum_parts(parts.data, rows, {{{dA + q.first, KE * STATES, STATES, width, N}, {q.first ? nullptr : dD, KE},
                                          {ddt_bias, KE, 1, 1, 1, q.first > 0}}}, stream));
        TRY(sum_parts(bc_parts.data, warps, {{{dB + q.first, KBP * STATES, STATES, width, N},
                                              {dC + q.first, KBP * STATES, STATES, width, N}}}, stream));
    }
    return cudaSuccess;
}

int expand_gate(int64_t dtype, int64_t B, int64_t S, int64_t P, int64_t E, int64_t Bt, const void* xz, const float* s,
                const float* conv_w, const float* conv_b, const float* D, const float* norm_w, const float* norm_b,
                const int32_t* token, const int32_t* group, void* y, void* stream_) {
    const Plan plan{B, S, P, E, Bt, token, group, nullptr, nullptr, nullptr};
    const Mixer m{conv_w, conv_b, D, norm_w, norm_b};
    const cudaStream_t stream = cudaStream_t(stream_);
    return with_type(dtype, [&](auto t) {
        using T = decltype(t);
        auto fast = [&](auto V, auto U, auto THREADS) {
            const int run = int(clamp(ceil_div(B * S, 132 * 10), 8, 64)), threads = int(ceil_div(E, V * 32) * 32);
            return launch(expand_gate_kernel<T, V(), U(), THREADS()>, B * ceil_div(S, run), dim3(threads),
                          BlockSum::BYTES, stream, plan, (const T*)xz, s, m, (T*)y, run);
        };
        auto plain = [&] {
            return launch(expand_gate_rows_kernel<T>, B * S, dim3(256), BlockSum::BYTES, stream, plan, (const T*)xz, s,
                          m, (T*)y);
        };
        return choose_rows(plan, E % 4 == 0 && aligned(xz, s, conv_w, D, norm_w, norm_b, y), fast, plain);
    });
}

int expand_gate_backward(int64_t dtype, int64_t B, int64_t S, int64_t P, int64_t E, int64_t Bt, const void* xz,
                         const float* s, const float* conv_w, const float* conv_b, const float* D, const float* norm_w,
                         const float* norm_b, const int32_t* token, const int32_t* group, const int32_t* member,
                         const int32_t* start, const void* dy, void* y, void* dxz, void* g, float* ds, float* dnorm_w,
                         float* dnorm_b, void* stream_) {
    const Plan plan{B, S, P, E, Bt, token, group, nullptr, member, start};
    const Mixer m{conv_w, conv_b, D, norm_w, norm_b};
    const cudaStream_t stream = cudaStream_t(stream_);
    return with_type(dtype, [&](auto t) {
        using T = decltype(t);
        auto run = [&](Cut cut, auto kernel, int threads) {
            const int64_t blocks = B * cut.units * cut.slices, n = B * P * E;
            const int64_t sliced = cut.slices > 1 ? n * cut.slices : 0;
            const Scratch parts(norm_w ? blocks * 2 * E : 0, stream), slices(sliced, stream);
            if ((norm_w && blocks && !parts.data) || (sliced && !slices.data)) return int(cudaErrorMemoryAllocation);
            TRY(launch(kernel, blocks, dim3(threads), BlockSum::BYTES, stream, plan, cut, (const T*)xz, s, m,
                       (const T*)dy, (T*)y, (T*)dxz, (T*)g, sliced ? slices.data : ds, parts.data));
            if (sliced) TRY(sum_parts(slices.data, cut.slices, {{{ds, n}}}, stream));
            return norm_w ? sum_parts(parts.data, blocks, {{{dnorm_w, E}, {dnorm_b, E}}}, stream) : int(cudaSuccess);
        };
        auto fast = [&](auto V, auto, auto THREADS) {
            return run(cut_groups(B, plan, 132 * 8, 1), expand_gate_backward_kernel<T, V(), 1, THREADS()>,
                       int(ceil_div(E, V * 32) * 32));
        };
        auto plain = [&] {
            Cut cut = cut_groups(B, plan, 132 * 8, 1);
            if (cut.slices > 1) cut = {1, 1, P};
            return run(cut, expand_gate_backward_rows_kernel<T>, 256);
        };
        const bool wide = E % 4 == 0 && aligned(xz, s, conv_w, D, norm_w, norm_b, dy, y, dxz, g, ds);
        return choose_rows(plan, wide, fast, plain);
    });
}

int conv_pool_backward(int64_t dtype, int64_t B, int64_t S, int64_t P, int64_t E, int64_t Bt, int64_t max,
                       const void* xz, const float* conv_w, const float* conv_b, const float* D, const int32_t* token,
                       const int32_t* group, const float* weight, const int32_t* member, const int32_t* start,
                       const int32_t* argmax, const float* dp, const void* g, void* dxz, float* dconv_w,
                       float* dconv_b, float* dD, void* stream_) {
    const Plan plan{B, S, P, E, Bt, token, group, weight, member, start};
    const cudaStream_t stream = cudaStream_t(stream_);
    const bool wide = E % 2 == 0 && rungs[0] != 1 && aligned(xz, conv_w, D, argmax, dp, g, dxz);
    const int64_t V = wide ? 2 : 1, tiles = ceil_div(E, 32 * V);
    const int64_t run = clamp(ceil_div(B * S * tiles, 132 * 16), 16, S), rows = ceil_div(B * ceil_div(S, run), WALKERS);
    const Scratch parts(rows * 12 * E, stream);
    if (rows && !parts.data) return cudaErrorMemoryAllocation;
    TRY(with_type(dtype, [&](auto t) {
        using T = decltype(t);
        auto kernel = wide ? max ? conv_pool_backward_kernel<T, 2, 4, true> : conv_pool_backward_kernel<T, 2, 4, false>
                           : max ? conv_pool_backward_kernel<T, 1, 1, true> : conv_pool_backward_kernel<T, 1, 1, false>;
        return launch(kernel, tiles * rows, dim3(32, WALKERS), WALKERS * 12 * 32 * V * sizeof(float), stream, plan,
                      (const T*)xz, conv_w, conv_b, D, argmax, dp, (const T*)g, (T*)dxz, parts.data, int(run));
    }));
    return sum_parts(parts.data, rows, {{{dconv_w, 8 * E}, {dconv_b, 2 * E}, {dD, 2 * E}}}, stream);
}

}  // extern "C"
