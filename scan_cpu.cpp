// scan_cpu.cpp: the operations of scan.h on the CPU.
//
//     g++ -std=c++17 -O3 -march=native -fopenmp -shared -fPIC -Wall -Wextra scan_cpu.cpp -o scan_cpu.so
//
// Plain C functions, called through ctypes. No torch header, no -ffast-math: NaN and infinity travel as they do in
// PyTorch. The argument structures, the walk and the letters of the axes are those of scan.h; besides, W is the lanes
// of a vector, T the type of the activations, float or bf16 (dtype 0 or 1), and dir a direction.
//
// Four ideas carry everything after the naive scan. Figures in comments: FastVim-T, 8 images of 224 px, one core of a
// 3 GHz AVX-512 Xeon, its time divided by two, as two would take; ns per b l e element if nothing else is said.
//   1. Channels are the vector axis. No operation mixes them except sums, so nothing is ever transposed, and a token at
//      any stride is one pointer. e need not be a multiple of W: the rest runs the same code on vectors of width 1.
//   2. Both convolutions, forward and backward in time, are one pass over tiles of 4 positions and their 3 neighbours
//      on each side. c = silu(conv(x)) is never stored: it is computed again wherever it is needed.
//   3. Work is cut into chunks that depend on the sizes alone. Each chunk sums its share of the parameter gradients by
//      itself, the shares are added in order: the same bits on any number of threads, without atomics.
//   4. The price is exp: with AVX-512 8 instructions, a sigmoid 12. The rest is arranged around them.
#include "scan.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <type_traits>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

using i64 = int64_t;

// ---------------------------------------------------------------------------------------------------------------------
// 1. The scan in plain loops: what selective_scan computes. Tests compare both with the recurrence.

extern "C" int selective_scan_naive(const SelectiveScan* a, void*) {
    const i64 k = a->k, b = a->b, p = a->p, e = a->e, n = a->n;
    for (i64 i = 0; i < k * b * e; i++) {
        const i64 direction = i / (b * e), image = i / e % b, channel = i % e, own = direction * e + channel;
        std::vector<float> h(n);                                        // the state, zero at first
        for (i64 t = 0; t < p; t++) {
            const i64 step = direction == 0 ? t : p - 1 - t;            // direction 1 begins at the end
            const i64 row = (direction * b + image) * p + step;
            const float *B = a->B + row * a->stride, *C = a->C + row * a->stride;
            const float x = a->x[row * e + channel];
            const float dt = a->dt[row * e + channel] + (a->dt_bias ? a->dt_bias[own] : 0);
            const float delta = std::max(dt, 0.f) + std::log1p(std::exp(-std::abs(dt)));        // softplus
            float s = a->D ? a->D[own] * x : 0;
            for (i64 j = 0; j < n; j++) {
                const float decay = std::exp(delta * a->A[own * n + j]);                        // equation 2
                h[j] = decay * h[j] + delta * B[j] * x;                                         // equation 3
                s += C[j] * h[j];                                                               // equation 3: y = C h
            }
            a->s[row * e + channel] = s;
        }
    }
    return 0;
}

// ---------------------------------------------------------------------------------------------------------------------
// 2. Vectors
//
// The compiler's vector extension gives + - * / < ?: on vectors for every instruction set, and a * b + c becomes one
// instruction. Functions are templates over V = Vec or float, so that the same line serves the rest of e % W.

#define INLINE inline __attribute__((always_inline))
#define INLINED __attribute__((always_inline))                          // the same for a lambda
#define EACH [&](auto lane, At at) INLINED                              // the body of a loop over channels
#define FULLY _Pragma("GCC unroll 16")                                  // arrays of vectors are registers if unrolled

#if defined(__AVX512F__) && defined(__AVX512DQ__)
#define FASTVIM_AVX512 1
constexpr int W = 16;
#elif defined(__AVX__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
typedef float Vec __attribute__((vector_size(4 * W)));
typedef int32_t VecI __attribute__((vector_size(4 * W)));
typedef uint32_t VecU __attribute__((vector_size(4 * W)));
typedef uint16_t VecH __attribute__((vector_size(2 * W)));

template <class V> struct Of { using I = VecI; using U = VecU; using H = VecH; };
template <> struct Of<float> { using I = int32_t; using U = uint32_t; using H = uint16_t; };

struct bf16 { uint16_t bits; };                 // the upper half of a float

template <class To, class From> INLINE To bits(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "a change of type, not of bits");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

template <class V> INLINE V load(const float* p) { V v; std::memcpy(&v, p, sizeof v); return v; }
template <class I> INLINE I load(const int32_t* p) { I v; std::memcpy(&v, p, sizeof v); return v; }
template <class V> INLINE void store(float* p, V v) { std::memcpy(p, &v, sizeof v); }
template <class I> INLINE void store(int32_t* p, I v) { std::memcpy(p, &v, sizeof v); }
template <class V> INLINE void add_to(float* p, V v) { store(p, load<V>(p) + v); }
template <class V> INLINE V fill(float x) { return x - V{}; }           // x - 0 is x for every x, -0 and NaN included

INLINE uint32_t widen(uint16_t h) { return h; }
INLINE uint16_t narrow(uint32_t u) { return uint16_t(u); }
INLINE VecH narrow(VecU u) { return __builtin_convertvector(u, VecH); }
#if defined(FASTVIM_AVX512)         // GCC 12 turns convertvector into four instructions: bf16 conv_pool 0.36 -> 0.31
INLINE VecU widen(VecH h) { return (VecU)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)h); }
#elif defined(__AVX2__)
INLINE VecU widen(VecH h) { return (VecU)_mm256_cvtepu16_epi32((__m128i)h); }
#else
INLINE VecU widen(VecH h) { return __builtin_convertvector(h, VecU); }
#endif

template <class V> INLINE V load(const bf16* p) {
    typename Of<V>::H h;
    std::memcpy(&h, p, sizeof h);
    return bits<V>(widen(h) << 16);
}

template <class V> INLINE void store(bf16* p, V v) {
    using U = typename Of<V>::U;
    U u = bits<U>(v), rounded = u + 0x7fff + (u >> 16 & 1);             // to nearest, ties to even
    typename Of<V>::H h = narrow((v == v ? rounded : (u | 0x400000)) >> 16);
    std::memcpy(p, &h, sizeof h);
}

#if defined(FASTVIM_AVX512) && defined(__AVX512BF16__)                 // one instruction; denormals become 0
template <> INLINE void store<Vec>(bf16* p, Vec v) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(v)); }
#endif

// A polynomial by Horner's rule, lowest coefficient first
template <class V> INLINE V poly(V, float c) { return fill<V>(c); }
template <class V, class... C> INLINE V poly(V x, float c, C... higher) { return poly(x, higher...) * x + c; }

// 2^f for f in -0.5 .. 0.5, relative error 9e-8, and exactly 1 at 0: a decay near 1 is raised to high powers.
template <class V> INLINE V exp2_fraction(V f) {
    return poly(f, 1.f, 6.931470037e-1f, 2.402224243e-1f, 5.550733581e-2f, 9.671512991e-3f, 1.326472731e-3f);
}

// t in -127 .. 128, at whose ends exp2 gives 0 and infinity; NaN stays NaN
template <class V> INLINE V bounded(V t) {
    t = t < -127.f ? fill<V>(-127.f) : t;
    return t > 128.f ? fill<V>(128.f) : t;
}
#if defined(__AVX__) && !defined(FASTVIM_AVX512)       // two instructions; GCC makes four of the above
template <> INLINE Vec bounded<Vec>(Vec t) {
    return _mm256_min_ps(fill<Vec>(128), _mm256_max_ps(fill<Vec>(-127), t));        // of NaN, the second
}
#endif

// 2^t = 2^f 2^r with r = t rounded. 1.5 * 2^23 + 127 + t has r + 127 in its last bits, from where a shift makes it an
// exponent.
template <class V> INLINE V exp2(V t) {
    using U = typename Of<V>::U;
    t = bounded(t);
    V shifted = t + 12583039.f, f = t - (shifted - 12583039.f);
    return exp2_fraction(f) * bits<V>(bits<U>(shifted) << 23);
}

// 1 / (1 + 2^t): the sigmoid of -t / log2(e)
template <class V> INLINE V sigmoid2(V t) { return 1.f / (1.f + exp2(t)); }

#if defined(FASTVIM_AVX512)
// reduce gives t - round(t), scalef multiplies by a power of two, and both treat infinity and NaN as they should. (The
// masks are full: GCC 12 warns of the forms without, which are the same instructions.)
constexpr __mmask16 ALL = 0xffff;

template <> INLINE Vec exp2<Vec>(Vec t) {
    Vec f = _mm512_maskz_reduce_ps(ALL, t, 8);
    return _mm512_maskz_scalef_ps(ALL, exp2_fraction(f), t - f);
}

// f in 0 .. 1, since scalef rounds down by itself. (A term less, 2.9e-6, made conv_pool 7 % faster, and gradients four
// times less accurate.) 14 bits from a table and a Newton step are cheaper than a division, 9.1 cycles for 10.9; only
// 1 / infinity has to be masked.
template <> INLINE Vec sigmoid2<Vec>(Vec t) {
    Vec f = _mm512_maskz_reduce_ps(ALL, t, 9);
    Vec p = poly(f, 1.f, 6.931511485e-1f, 2.401645808e-1f, 5.580130235e-2f, 9.014210627e-3f, 1.868606761e-3f);
    Vec d = 1.f + _mm512_maskz_scalef_ps(ALL, p, t), r = _mm512_maskz_rcp14_ps(ALL, d);
    return _mm512_maskz_mul_ps(_mm512_cmp_ps_mask(d, fill<Vec>(INFINITY), _CMP_NEQ_UQ), r, 2.f - d * r);
}
#endif

constexpr float LOG2E = 1.44269504088896f, LN2 = 0.693147180559945f;

// log(1 + e^x) = max(x, 0) + log1p(q), q = e^-|x|. log1p(q) / q is a polynomial (2e-7), so that a small q stays exact.
template <class V> INLINE V softplus(V x) {
    V q = exp2((x > 0.f ? -x : x) * LOG2E);
    V p = poly(q, 9.999998212e-1f, -4.999740422e-1f, 3.327547908e-1f, -2.449546158e-1f, 1.774523854e-1f,
               -1.076816693e-1f, 4.408960417e-2f, -8.539200760e-3f);
    return (x > 0.f ? x : V{}) + p * q;
}

// The sum of W floats in memory
INLINE float lane_sum(const float* p) {
    typedef float Quad __attribute__((vector_size(16)));
    Quad q[W / 4];
    std::memcpy(q, p, sizeof q);
    for (int half = W / 8; half; half /= 2)
        for (int i = 0; i < half; i++) q[i] += q[i + half];
    return (q[0][0] + q[0][1]) + (q[0][2] + q[0][3]);
}

// A sum over channels: whole vectors, and the rest of e % W.
struct Sum {
    Vec v = Vec{};
    float rest = 0;
    INLINE void add(Vec x) { v += x; }
    INLINE void add(float x) { rest += x; }
    INLINE float total() const { return lane_sum((const float*)&v) + rest; }
};

// ---------------------------------------------------------------------------------------------------------------------
// 3. Loops over channels, threads, memory, chunks

// A place in the channel axis. Sets of rows that are read together (weights, sums of gradients) are kept in blocks:
// [e / W][rows][W]. So one pointer and constant offsets reach all of them; 14 pointers would not fit into registers.
struct At {
    i64 channel, block;                         // block: the first channel of its block of W
    INLINE operator i64() const { return channel; }
    INLINE i64 in(i64 rows) const { return block * rows + (channel - block); }
    INLINE At from(i64 first) const { return {channel - first, block - first}; }
};

INLINE At place(i64 channel) { return {channel, channel - channel % W}; }
INLINE i64 whole(i64 e) { return (e + W - 1) / W * W; }                 // e with the last block filled up

template <class F> INLINE void channels(i64 from, i64 to, F body) {
    i64 i = from;
    for (; i + W <= to; i += W) body(Vec(), At{i, i});
    for (; i < to; i++) body(float(), place(i));
}
template <class F> INLINE void channels(i64 e, F body) { channels(0, e, body); }

// Tasks on all threads, or on this one if there is less to do (in elements) than starting the others would take. No
// exception may leave a thread; the only one is that memory is short, and the operation returns it as OUT_OF_MEMORY.
template <class F> void parallel(i64 tasks, [[maybe_unused]] i64 elements, F task) {
    bool short_of_memory = false;
#pragma omp parallel for schedule(static) if (tasks > 1 && elements > 16384)
    for (i64 i = 0; i < tasks; i++) {
        try {
            task(i);
        } catch (...) {
#pragma omp atomic write
            short_of_memory = true;
        }
    }
    if (short_of_memory) throw std::bad_alloc();
}
#define OUT_OF_MEMORY catch (...) { return 2; }

template <class F> void parallel(i64 dtype, i64 tasks, i64 elements, F task) {      // task(T(), i)
    if (dtype == 0) parallel(tasks, elements, [&](i64 i) { task(float(), i); });
    else parallel(tasks, elements, [&](i64 i) { task(bf16(), i); });
}

// Memory that a thread keeps from call to call: fresh pages would cost more than the work done in them.
enum { PACK, SUMS, SPLIT, TASK };
template <int WHAT> float* scratch(i64 floats) {
    static thread_local std::vector<float> memory;
    if (i64(memory.size()) < floats + 16) memory = std::vector<float>(floats + 16);
    return (float*)((uintptr_t(memory.data()) + 63) / 64 * 64);
}

// out = the sum of `count` rows of n floats, `stride` apart
static void add_rows(const float* from, i64 count, i64 stride, i64 n, float* out) {
    for (i64 i = 0; i < count; i++)
        for (i64 j = 0; j < n; j++) out[j] = i ? out[j] + from[i * stride + j] : from[j];
    if (!count) std::fill(out, out + n, 0.f);
}

// Sums of parameter gradients: n tasks in at most `most` slots, each slot adding up its tasks in order, then the slots.
struct Slots {
    i64 n, count, floats;
    float* sums;                                // [count + 1][floats], the last row for the total

    Slots(i64 n, i64 floats, i64 most = 64)
        : n(n), count(std::min(n, most)), floats(floats), sums(scratch<SUMS>((count + 1) * floats)) {}
    i64 begin(i64 slot) const { return slot * n / count; }
    template <class F> void run(i64 dtype, i64 elements, F task) const {        // task(T(), i, float* sums)
        parallel(dtype, count, elements, [&](auto type, i64 slot) {
            float* mine = sums + slot * floats;
            std::fill(mine, mine + floats, 0.f);
            for (i64 i = begin(slot); i < begin(slot + 1); i++) task(type, i, mine);
        });
    }
    const float* total() const {
        add_rows(sums, count, floats, floats, sums + count * floats);
        return sums + count * floats;
    }
};

// out[i], out[i + stride] ... = a row of a blocked set, times factor
static void unblock(const float* set, i64 e, i64 rows, i64 row, float* out, i64 stride = 1, float factor = 1) {
    for (i64 i = 0; i < e; i++) out[i * stride] = factor * set[place(i).in(rows) + row * W];
}

// The walk of one image
static Walk image_walk(const Walk& walk, const Sizes& n, i64 image) {
    const i64 row = walk.rows == 1 ? 0 : image, at = row * n.l;
    return {1, walk.token + at, walk.group + at, walk.weight + at, walk.member + at, walk.start + row * (n.p + 1)};
}

// Would following a walk end outside of its image, or visit a token twice?
static bool leads_astray(const Walk& walk, const Sizes& n) {
    std::vector<char> seen(n.l);
    for (i64 image = 0; image < walk.rows; image++) {
        const Walk w = image_walk(walk, n, image);
        std::fill(seen.begin(), seen.end(), 0);
        for (i64 t = 0; t < n.l; t++) {
            const i64 token = w.token[t];
            if (token < 0 || token >= n.l || seen[token] || w.group[t] < -1 || w.group[t] >= n.p) return true;
            seen[token] = 1;
        }
    }
    return false;
}

// Positions t0 <= t < t1 of an image, which hold all members of the steps p0 <= step < p1
struct Chunk { i64 image, t0, t1, p0, p1; };

// All images in chunks of at least 24 positions, cut where every step before is less than every step after
static std::vector<Chunk> cut(const Walk& walk, const Sizes& n) {
    std::vector<Chunk> list;
    std::vector<i64> next(n.l);                 // the least step of a position and all after it
    for (i64 image = 0; image < std::min(walk.rows, n.b); image++) {
        const int32_t* group = image_walk(walk, n, image).group;
        for (i64 t = n.l - 1, least = n.p; t >= 0; t--) {
            if (group[t] >= 0) least = std::min<i64>(least, group[t]);
            next[t] = least;
        }
        i64 t0 = 0, p0 = 0, last = -1;
        for (i64 t = 0; t < n.l; t++) {
            if (t - t0 >= 24 && last < next[t]) {
                list.push_back({image, t0, t, p0, next[t]});
                t0 = t;
                p0 = next[t];
            }
            last = std::max<i64>(last, group[t]);
        }
        list.push_back({image, t0, n.l, p0, n.p});
    }
    const i64 count = i64(list.size());
    for (i64 image = walk.rows; image < n.b; image++)                   // rows == 1: all images walk alike
        for (i64 i = 0; i < count; i++) {
            list.push_back(list[i]);
            list.back().image = image;
        }
    return list;
}

// ---------------------------------------------------------------------------------------------------------------------
// 4. The convolution of a tile

// The parameters as blocked rows. Convolution weights are multiplied by -log2(e): the result is at once the argument
// that sigmoid2 wants, and the -ln2 that t sigmoid2(t) lacks to be silu is put into the weight with which it is used.
enum Row { W0 = 0, B0 = 4, W1 = 5, B1 = 9, D0 = 10, D1 = 11, NW = 12, NB = 13, ROWS = 14 };
struct Packed { const float *rows, *zero; };    // zero: 2 e zeros

static Packed pack(i64 e, const float* conv_weight, const float* conv_bias, const float* D = nullptr, float scale = 0,
                   const float* norm_weight = nullptr, const float* norm_bias = nullptr) {
    float *rows = scratch<PACK>(whole(e) * (ROWS + 2)), *zero = rows + whole(e) * ROWS;
    std::fill(zero, zero + 2 * whole(e), 0.f);
    for (i64 i = 0; i < e; i++) {
        float* row = rows + place(i).in(ROWS);
        for (int dir = 0; dir < 2; dir++) {
            const i64 own = dir * e + i;
            for (int j = 0; j < 4; j++) row[(5 * dir + j) * W] = -LOG2E * conv_weight[own * 4 + j];
            row[(5 * dir + 4) * W] = -LOG2E * conv_bias[own];
            row[(D0 + dir) * W] = D ? scale * D[own] : 0;
        }
        row[NW * W] = norm_weight ? norm_weight[i] : 1;
        row[NB * W] = norm_bias ? norm_bias[i] : 0;
    }
    return {rows, zero};
}

// One image
template <class T> struct View {
    Walk walk;
    Packed packed;
    i64 image, l, e;
    const T* xz;

    template <class Args> View(const Args& a, Packed packed, i64 image)
        : walk(image_walk(a.walk, a.n, image)), packed(packed), image(image), l(a.n.l), e(a.n.e),
          xz((const T*)a.xz + image * l * 2 * e) {}
};

// U positions of an image. A hole has the step -1; it reads as zero, and nothing comes of it.
template <int U, class T> struct Tile {
    const View<T>& view;
    i64 t, step[U], token[U];                   // the first position; steps of the image, tokens of the batch
    const T* x[U + 6];                          // positions t - 3 ... t + U + 2; beyond the ends and for holes zeros
    bool one_step = true;                       // all are of one step, which adds them up at once

    INLINE Tile(const View<T>& view, i64 t) : view(view), t(t) {
        for (int i = 0; i < U + 6; i++) {
            const i64 at = t + i - 3;
            const bool real = at >= 0 && at < view.l && view.walk.group[at] >= 0;
            x[i] = real ? view.xz + 2 * view.e * view.walk.token[at] : (const T*)view.packed.zero;
        }
        for (int u = 0; u < U; u++) {
            step[u] = view.walk.group[t + u];
            token[u] = view.image * view.l + view.walk.token[t + u];
            one_step &= step[u] >= 0 && step[u] == step[0];
        }
    }

    // The rows of the positions in an array over steps or tokens, or for holes another row
    template <class P> INLINE void of_steps(P* rows, P* hole, P** out) const {
        for (int u = 0; u < U; u++) out[u] = step[u] < 0 ? hole : rows + step[u] * view.e;
    }
    template <class P> INLINE void of_tokens(P* rows, P* hole, P** out) const {
        for (int u = 0; u < U; u++) out[u] = step[u] < 0 ? hole : rows + token[u] * view.e;
    }
    INLINE void clear_holes(T* rows, i64 stride) const {
        for (int u = 0; u < U; u++)
            if (step[u] < 0) std::memset((void*)(rows + token[u] * stride), 0, view.e * sizeof(T));
    }
};

// Tiles of 4 positions load the weights once and share neighbours, 2.5 rows of x a position instead of 7: conv_pool
// 0.35 -> 0.26, its gradient 1.17 -> 0.66. (Tiles of 2, 3, 6 and 7: 0.30, 0.28, 0.27, 0.25.)
constexpr int TILE = 4;

template <class T, class F> INLINE void tiles(const View<T>& view, i64 t0, i64 t1, F body) {
    i64 t = t0;
    for (; t + TILE <= t1; t += TILE) body(Tile<TILE, T>(view, t));
    for (; t < t1; t++) body(Tile<1, T>(view, t));
}

template <int COUNT, class V, class T> INLINE void gather(const T* const* rows, i64 at, V* v) {
    FULLY for (int i = 0; i < COUNT; i++) v[i] = load<V>(rows[i] + at);
}

// t = -log2(e) conv(x) of both directions, where x holds the U + 6 values. Direction 1 is the mirror image. (Convolving
// each direction just before its use makes conv_pool_backward slower, 0.64 -> 0.68.)
template <int U, class V> INLINE void conv(const V* x, const float* row, V (*t)[U]) {
    FULLY for (int dir = 0; dir < 2; dir++) {
        const int step = dir ? -1 : 1;
        V w[5];
        FULLY for (int j = 0; j < 5; j++) w[j] = load<V>(row + (5 * dir + j) * W);
        FULLY for (int u = 0; u < U; u++) {
            const V* y = x + (dir ? u + 6 : u);
            t[dir][u] = w[3] * y[3 * step] + (w[2] * y[2 * step] + (w[1] * y[step] + (w[0] * y[0] + w[4])));
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// 5. conv_pool: both directions' silu(conv(x)), pooled. The rows of pooled are the accumulators.

// Where a chunk adds up: rows [p][e] of each direction, and what belongs to a hole
struct Pool { float* sum[2]; int32_t* argmax[2]; float* trash; int32_t* trash_argmax; };

// c of U positions and one direction, added to (or compared with) the rows `to`; one_step: these are one row
template <int U, class V>
INLINE void pool(const V* c, const float* weight, bool one_step, bool max, i64 t, float* const* to,
                 int32_t* const* argmax, At at) {
    using I = typename Of<V>::I;
    if (one_step) {
        V s = load<V>(to[0] + at);
        for (int u = 0; u < U; u++) s += weight[u] * c[u];
        return store(to[0] + at, s);
    }
    FULLY for (int u = 0; u < U; u++) {
        V v = weight[u] * c[u], best = load<V>(to[u] + at);
        if (!max) {
            store(to[u] + at, best + v);
            continue;
        }
        auto better = (v > best) | ((v != v) & (best == best));         // the first of equal ones stays, and the first NaN
        store(to[u] + at, better ? v : best);
        store(argmax[u] + at, better ? int32_t(t + u) - I{} : load<I>(argmax[u] + at));
    }
}

template <int U, class T> INLINE void pool_tile(const Tile<U, T>& tile, const Pool& out, bool max) {
    const float* rows = tile.view.packed.rows;
    const i64 t = tile.t;
    const bool one_step = tile.one_step && !max;
    float *to[2][U], weight[U];
    int32_t* argmax[2][U] = {};
    for (int dir = 0; dir < 2; dir++) {
        tile.of_steps(out.sum[dir], out.trash, to[dir]);
        if (max) tile.of_steps(out.argmax[dir], out.trash_argmax, argmax[dir]);
    }
    for (int u = 0; u < U; u++) weight[u] = -LN2 * (max ? 1.f : tile.view.walk.weight[t + u]);
    channels(tile.view.e, EACH {
        using V = decltype(lane);
        V x[U + 6], c[2][U];
        gather<U + 6>(tile.x, at, x);
        conv<U>(x, rows + at.in(ROWS), c);
        FULLY for (int dir = 0; dir < 2; dir++) {
            FULLY for (int u = 0; u < U; u++) c[dir][u] *= sigmoid2(c[dir][u]);
            pool<U>(c[dir], weight, one_step, max, t, to[dir], argmax[dir], at);
        }
    });
}

template <class T> void pool_chunk(const ConvPool& a, const View<T>& view, const Chunk& c) {
    const i64 e = a.n.e, pe = a.n.p * e, from = c.p0 * e, to = c.p1 * e;
    const bool max = a.max;
    float* trash = scratch<TASK>(2 * whole(e));
    Pool out{{}, {}, trash, (int32_t*)trash + whole(e)};
    for (int dir = 0; dir < 2; dir++) {
        const i64 own = (dir * a.n.b + c.image) * pe;
        out.sum[dir] = a.pooled + own;
        std::fill(out.sum[dir] + from, out.sum[dir] + to, max ? -INFINITY : 0.f);
        if (max) out.argmax[dir] = a.argmax + own;
        if (max) std::fill(out.argmax[dir] + from, out.argmax[dir] + to, -1);
    }
    // A loop for each kind: one that asks for it inside needs more registers: maxima 10 % slower.
    if (max) tiles(view, c.t0, c.t1, [&](const auto& tile) INLINED { pool_tile(tile, out, true); });
    else tiles(view, c.t0, c.t1, [&](const auto& tile) INLINED { pool_tile(tile, out, false); });
    for (i64 step = c.p0; max && step < c.p1; step++)
        if (out.argmax[0][step * e] < 0)                                // nothing was kept of it
            for (float* sum : out.sum) std::fill(sum + step * e, sum + (step + 1) * e, 0.f);
}

extern "C" int conv_pool(const ConvPool* a, void*) try {
    const Sizes n = a->n;
    if (leads_astray(a->walk, n)) return 1;
    const Packed packed = pack(n.e, a->conv_weight, a->conv_bias);
    const std::vector<Chunk> chunks = cut(a->walk, n);
    parallel(n.dtype, chunks.size(), n.b * n.l * n.e, [&](auto type, i64 i) {
        pool_chunk(*a, View<decltype(type)>(*a, packed, chunks[i].image), chunks[i]);
    });
    return 0;
} OUT_OF_MEMORY

// ---------------------------------------------------------------------------------------------------------------------
// 6. expand_gate: v = (s0 + s1 + D0 c0 + D1 c1) / 2, its norm over the channels, times silu(z)

struct Stats { float mean, scale; };

// From the sum of a row, or, for RMSNorm, whose mean counts as 0, of its squares. The variance is a second pass over the
// row, which lies in the first cache. The mean of squares less the square of the mean would save it (3 %), and lose all
// digits when the mean is large.
INLINE Stats statistics(i64 d, const float* row, bool centred, const Sum& sum) {
    if (!centred) return {0, 1 / std::sqrt(sum.total() / d + 1e-5f)};
    const float mean = sum.total() / d;
    Sum square;
    channels(d, EACH {
        auto v = load<decltype(lane)>(row + at) - mean;
        square.add(v * v);
    });
    return {mean, 1 / std::sqrt(square.total() / d + 1e-5f)};
}

enum Norm { NONE, RMS, LAYER };

template <class Args> Norm norm_of(const Args& a) { return a.norm_bias ? LAYER : a.norm_weight ? RMS : NONE; }

// v of a tile and its statistics: the norm is n = norm_weight xhat + norm_bias, xhat = (v - mean) scale.
template <int U> struct Mixed { float* v; Stats of[U]; };               // v: U rows, whole(e) apart

// `out` are OUT rows that the caller writes afterwards. Asking for them here hides that memory has to be read before it
// is written: expand_gate_backward at 2048 px, out of cache, 2.0 -> 1.4. (Elsewhere it did not pay, nor did asking for
// the next tile's x and z.)
template <int OUT, int U, class T, class Args>
INLINE Mixed<U> mix(const Args& a, const Tile<U, T>& tile, float* buffer, T* const* out) {
    const i64 e = tile.view.e, pe = a.n.p * e;
    const float *rows = tile.view.packed.rows, *zero = tile.view.packed.zero, *s0[U], *s1[U];
    const bool skip = a.D;
    const Norm norm = norm_of(a);
    tile.of_steps(a.s + tile.view.image * pe, zero, s0);
    tile.of_steps(a.s + (a.n.b + tile.view.image) * pe, zero, s1);
    Mixed<U> m;
    m.v = buffer;
    Sum sum[U];
    channels(e, EACH {
        using V = decltype(lane);
        const float* row = rows + at.in(ROWS);
        V v[U], x[U + 6], c[2][U];
        for (int i = 0; i < OUT; i++) __builtin_prefetch(out[i] + at, 1);
        FULLY for (int u = 0; u < U; u++) v[u] = (load<V>(s0[u] + at) + load<V>(s1[u] + at)) * 0.5f;
        if (skip) {
            gather<U + 6>(tile.x, at, x);
            conv<U>(x, row, c);
            FULLY for (int dir = 0; dir < 2; dir++) {
                V d = load<V>(row + (D0 + dir) * W);
                FULLY for (int u = 0; u < U; u++) v[u] += d * (c[dir][u] * sigmoid2(c[dir][u]));
            }
        }
        FULLY for (int u = 0; u < U; u++) {
            store(m.v + u * whole(e) + at, v[u]);
            sum[u].add(norm == LAYER ? v[u] : v[u] * v[u]);
        }
    });
    for (int u = 0; u < U; u++)
        m.of[u] = norm ? statistics(e, buffer + u * whole(e), norm == LAYER, sum[u]) : Stats{0, 1};
    return m;
}

template <int U, class T> INLINE void gate_tile(const ExpandGate& a, const Tile<U, T>& tile, float* buffer) {
    const i64 e = tile.view.e, ew = whole(e);
    const float* rows = tile.view.packed.rows;
    T* y[U];
    tile.of_tokens((T*)a.y, (T*)(buffer + TILE * ew), y);
    const Mixed<U> m = mix<0>(a, tile, buffer, y);
    channels(e, EACH {
        using V = decltype(lane);
        const float* row = rows + at.in(ROWS);
        V nw = load<V>(row + NW * W), nb = load<V>(row + NB * W);
        FULLY for (int u = 0; u < U; u++) {
            V n = (load<V>(m.v + u * ew + at) - m.of[u].mean) * m.of[u].scale * nw + nb;
            V z = load<V>(tile.x[u + 3] + e + at);
            store(y[u] + at, n * (z * sigmoid2(z * -LOG2E)));
        }
    });
    tile.clear_holes((T*)a.y, e);
}

extern "C" int expand_gate(const ExpandGate* a, void*) try {
    const Sizes n = a->n;
    if (leads_astray(a->walk, n)) return 1;
    const Packed packed = pack(n.e, a->conv_weight, a->conv_bias, a->D, -LN2 / 2, a->norm_weight, a->norm_bias);
    const i64 parts = (n.l + 31) / 32;
    parallel(n.dtype, n.b * parts, n.b * n.l * n.e, [&](auto type, i64 i) {
        const i64 part = i % parts;
        const View<decltype(type)> view(*a, packed, i / parts);
        float* buffer = scratch<TASK>((TILE + 1) * whole(n.e));
        tiles(view, part * n.l / parts, (part + 1) * n.l / parts,
              [&](const auto& tile) INLINED { gate_tile(*a, tile, buffer); });
    });
    return 0;
} OUT_OF_MEMORY

// Of a tile: v again; then z's gradient and d = dxhat; then the norm, dv = scale (d - mean(d) - xhat mean(d xhat)).
template <int U, class T>
INLINE void gate_tile_backward(const ExpandGateBackward& a, const Tile<U, T>& tile, float* ds, float* dnorm,
                               float* buffer) {
    const i64 e = tile.view.e, ew = whole(e);
    const float* rows = tile.view.packed.rows;
    const Norm norm = norm_of(a);
    float *dxhat = buffer + TILE * ew, *trash = dxhat + TILE * ew, *to[U];
    const T* dy_rows[U];
    T *out[2 * U], **dz = out, **g = out + U;
    tile.of_steps(ds, trash, to);
    tile.of_tokens((const T*)a.dy, (const T*)tile.view.packed.zero, dy_rows);
    for (int u = 0; u < U; u++) {
        dz[u] = (T*)a.dxz + tile.token[u] * 2 * e + e;
        g[u] = (T*)a.g + tile.token[u] * e;
    }
    const Mixed<U> m = mix<2 * U>(a, tile, buffer, out);
    Sum sum1[U], sum2[U];                                               // of d, and of d xhat
    channels(e, EACH {
        using V = decltype(lane);
        const float* row = rows + at.in(ROWS);
        V nw = load<V>(row + NW * W), nb = load<V>(row + NB * W), dw{}, db{};
        FULLY for (int u = 0; u < U; u++) {
            V xhat = (load<V>(m.v + u * ew + at) - m.of[u].mean) * m.of[u].scale, n = xhat * nw + nb;
            V z = load<V>(tile.x[u + 3] + e + at), sigma = sigmoid2(z * -LOG2E), silu = z * sigma;
            V dy = load<V>(dy_rows[u] + at), dn = dy * silu, d = dn * nw;
            store(dz[u] + at, dy * n * (silu * (1.f - sigma) + sigma));
            store(dxhat + u * ew + at, d);
            dw += dn * xhat;
            db += dn;
            sum1[u].add(d);
            sum2[u].add(d * xhat);
        }
        add_to(dnorm + at.in(2), dw);
        add_to(dnorm + at.in(2) + W, db);
    });
    float mean1[U], mean2[U];
    for (int u = 0; u < U; u++) {
        mean1[u] = norm == LAYER ? sum1[u].total() / e : 0;
        mean2[u] = sum2[u].total() / e * m.of[u].scale;
    }
    channels(e, EACH {
        using V = decltype(lane);
        V dv[U], all{};
        FULLY for (int u = 0; u < U; u++) {
            V d = load<V>(dxhat + u * ew + at), v = load<V>(m.v + u * ew + at) - m.of[u].mean;
            dv[u] = (norm ? (d - mean1[u] - v * mean2[u]) * m.of[u].scale : d) * 0.5f;
            all += dv[u];
            store(g[u] + at, dv[u]);
        }
        if (tile.one_step) add_to(to[0] + at, all);
        else
            FULLY for (int u = 0; u < U; u++) add_to(to[u] + at, dv[u]);
    });
    tile.clear_holes((T*)a.dxz + e, 2 * e);
    tile.clear_holes((T*)a.g, e);
}

extern "C" int expand_gate_backward(const ExpandGateBackward* a, void*) try {
    const Sizes n = a->n;
    if (leads_astray(a->walk, n)) return 1;
    const i64 pe = n.p * n.e, ew = whole(n.e);
    const Packed packed = pack(n.e, a->conv_weight, a->conv_bias, a->D, -LN2 / 2, a->norm_weight, a->norm_bias);
    const std::vector<Chunk> chunks = cut(a->walk, n);
    const Slots slots(chunks.size(), 2 * ew);                           // blocked rows: dnorm_weight, dnorm_bias
    slots.run(n.dtype, n.b * n.l * n.e, [&](auto type, i64 i, float* dnorm) {
        const Chunk c = chunks[i];
        const View<decltype(type)> view(*a, packed, c.image);
        float* buffer = scratch<TASK>((2 * TILE + 1) * ew);
        float* ds = a->ds + c.image * pe;
        std::fill(ds + c.p0 * n.e, ds + c.p1 * n.e, 0.f);
        tiles(view, c.t0, c.t1, [&](const auto& tile) INLINED { gate_tile_backward(*a, tile, ds, dnorm, buffer); });
    });
    const float* total = slots.total();
    if (a->dnorm_weight) unblock(total, n.e, 2, 0, a->dnorm_weight);
    if (a->dnorm_bias) unblock(total, n.e, 2, 1, a->dnorm_bias);
    return 0;
} OUT_OF_MEMORY

// ---------------------------------------------------------------------------------------------------------------------
// 7. conv_pool, backwards
//
// da of a position, both directions, enters dx of the 3 positions before it and of the 3 after. A tile at t finishes
// dx[t - 3 .. t + U - 4] and hands six unfinished rows on to the next one, so that each da is computed once.

// Positions t0 <= t < t1 of an image, whose dx a task finishes; carry: the unfinished rows; trash: for those of others
struct Piece { i64 t0, t1; float *carry, *trash; };

template <int U, class T>
INLINE void conv_tile_backward(const ConvPoolBackward& a, const Tile<U, T>& tile, const Piece& piece, float* sums) {
    const View<T>& view = tile.view;
    const i64 e = view.e, ew = whole(e), t = tile.t;
    const bool max = a.max, skip = a.D;
    const float *rows = view.packed.rows, *zero = view.packed.zero, *dp[2][U];
    const int32_t* argmax[2][U] = {};
    const T* g_rows[U];
    T* dx_rows[U];
    float weight[U], *carry = piece.carry;
    tile.of_tokens((const T*)a.g, (const T*)zero, g_rows);
    for (int dir = 0; dir < 2; dir++) {
        const i64 own = (dir * a.n.b + view.image) * a.n.p * e;
        tile.of_steps(a.dpooled + own, zero, dp[dir]);
        if (max) tile.of_steps(a.argmax + own, (const int32_t*)zero, argmax[dir]);
    }
    for (int u = 0; u < U; u++) {
        const i64 done = t + u - 3;
        const bool own = done >= piece.t0 && done < piece.t1;
        dx_rows[u] = own ? (T*)a.dxz + (view.image * view.l + view.walk.token[done]) * 2 * e : (T*)piece.trash;
        weight[u] = -LN2 * (max ? 1.f : view.walk.weight[t + u]);
    }
    channels(e, EACH {
        using V = decltype(lane);
        using I = typename Of<V>::I;
        const float* row = rows + at.in(ROWS);
        float* sum = sums + at.in(12);
        V x[U + 6], dx[U + 6], g[U], a[2][U], da[U];
        gather<U + 6>(tile.x, at, x);
        conv<U>(x, row, a);
        gather<U>(g_rows, at, g);
        FULLY for (int j = 0; j < U + 6; j++) dx[j] = j < 6 ? load<V>(carry + j * ew + at) : V{};
        FULLY for (int dir = 0; dir < 2; dir++) {
            V d = load<V>(row + (D0 + dir) * W), gc{}, da_sum{};
            FULLY for (int u = 0; u < U; u++) {
                V sigma = sigmoid2(a[dir][u]), c = a[dir][u] * sigma, dc = load<V>(dp[dir][u] + at);
                if (max) dc = load<I>(argmax[dir][u] + at) == int32_t(t + u) - I{} ? dc : V{};
                dc *= weight[u];
                if (skip) {
                    dc += d * g[u];
                    gc += g[u] * c;
                }
                da[u] = dc * (-LN2 * c * (1.f - sigma) + sigma);
                da_sum += da[u];
            }
            FULLY for (int j = 0; j < 4; j++) {
                V tap = load<V>(row + (5 * dir + j) * W), dw = load<V>(sum + (5 * dir + j) * W);
                FULLY for (int u = 0; u < U; u++) {
                    const int from = dir ? u + 6 - j : u + j;
                    dx[from] += tap * da[u];
                    dw += x[from] * da[u];
                }
                store(sum + (5 * dir + j) * W, dw);
            }
            add_to(sum + (5 * dir + 4) * W, da_sum);
            if (skip) add_to(sum + (10 + dir) * W, gc);
        }
        FULLY for (int u = 0; u < U; u++) store(dx_rows[u] + at, dx[u]);
        FULLY for (int j = 0; j < 6; j++) store(carry + j * ew + at, dx[U + j]);
    });
}

template <class T>
void conv_piece_backward(const ConvPoolBackward& a, const View<T>& view, i64 t0, i64 t1, float* sums) {
    const i64 e = view.e, ew = whole(e), first = std::max<i64>(t0 - 3, 0), last = std::min(t1 + 3, view.l);
    float *carry = scratch<TASK>(19 * ew), *halo_sums = carry + 6 * ew;
    const Piece piece{t0, t1, carry, halo_sums + 12 * ew};
    T* dx = (T*)a.dxz + view.image * view.l * 2 * e;
    std::fill(carry, carry + 6 * ew, 0.f);
    // The 3 positions on either side matter to dx here; their share of the parameters belongs to another piece.
    for (i64 t = first; t < t0; t++) conv_tile_backward(a, Tile<1, T>(view, t), piece, halo_sums);
    tiles(view, t0, t1, [&](const auto& tile) INLINED { conv_tile_backward(a, tile, piece, sums); });
    for (i64 t = t1; t < last; t++) conv_tile_backward(a, Tile<1, T>(view, t), piece, halo_sums);
    for (i64 t = std::max(last - 3, t0); t < t1; t++)                   // the end of the image: what is still carried
        channels(e, EACH {
            auto rest = load<decltype(lane)>(carry + (t - last + 3) * ew + at);
            store(dx + 2 * e * view.walk.token[t] + at, rest);
        });
    tiles(view, t0, t1, [&](const auto& tile) INLINED { tile.clear_holes((T*)a.dxz, 2 * e); });
}

extern "C" int conv_pool_backward(const ConvPoolBackward* a, void*) try {
    const Sizes n = a->n;
    if (leads_astray(a->walk, n)) return 1;
    const Packed packed = pack(n.e, a->conv_weight, a->conv_bias, a->D, -LN2);
    const i64 e = n.e, parts = (n.l + 127) / 128;
    const Slots slots(n.b * parts, 12 * whole(e));                      // blocked rows: W0 .. B1, then dD
    slots.run(n.dtype, n.b * n.l * e, [&](auto type, i64 i, float* sums) {
        const i64 part = i % parts;
        const View<decltype(type)> view(*a, packed, i / parts);
        conv_piece_backward(*a, view, part * n.l / parts, (part + 1) * n.l / parts, sums);
    });
    const float* total = slots.total();
    for (int dir = 0; dir < 2; dir++) {
        float* dweight = a->dconv_weight + dir * e * 4;
        for (int j = 0; j < 4; j++) unblock(total, e, 12, 5 * dir + j, dweight + j, 4, -LOG2E);
        unblock(total, e, 12, 5 * dir + 4, a->dconv_bias + dir * e, 1, -LOG2E);
        if (a->D) unblock(total, e, 12, 10 + dir, a->dD + dir * e, 1, -LN2);
    }
    return 0;
} OUT_OF_MEMORY

// ---------------------------------------------------------------------------------------------------------------------
// 8. selective_scan
//
// A vector of channels walks over stretches of STEPS steps, and over each stretch GROUP states at a time: the states
// are registers, any n will do, and the exps of all steps are ready to run because delta was computed before. (With 16
// states in registers and one step after the other, every exp waits for the softplus of its step: 8.8 G exp/s instead
// of 11.5, backwards 2.8 instead of 4.5.) GROUP = 1 would be 10.6 and 3.9: states side by side hide each other's
// latencies and share loads and stores.
constexpr i64 STEPS = 16;
constexpr int GROUP = 4;

template <int M> using Count = std::integral_constant<int, M>;

template <class F> INLINE void groups(i64 n, F body) {                  // body(number of states, first one)
    i64 j = 0;
    for (; j + GROUP <= n; j += GROUP) body(Count<GROUP>(), j);
    for (; j < n; j++) body(Count<1>(), j);
}

template <int M, class V> INLINE void load_rows(const float* p, V* v) {
    FULLY for (int m = 0; m < M; m++) v[m] = load<V>(p + m * W);
}

template <int M, class V> INLINE void store_rows(float* p, const V* v) {
    FULLY for (int m = 0; m < M; m++) store(p + m * W, v[m]);
}

// The scan of direction dir of an image. Its step i is row row(i) of the arrays [k][b][p]: from the end if dir = 1.
struct Run {
    i64 p, e, n, first, sign, stride;
    const float *x, *dt, *B, *C, *D, *bias;     // B and C of step 0; D and bias of the direction, or null

    template <class Args> Run(const Args& a, i64 dir, i64 image)
        : p(a.p), e(a.e), n(a.n), first((dir * a.b + image) * p + (dir ? p - 1 : 0)), sign(dir ? -1 : 1),
          stride(sign * a.stride), x(a.x), dt(a.dt), B(a.B + first * a.stride), C(a.C + first * a.stride),
          D(a.D ? a.D + dir * e : nullptr), bias(a.dt_bias ? a.dt_bias + dir * e : nullptr) {}
    i64 row(i64 i) const { return first + i * sign; }

    // The first part of a stretch: delta = softplus(dt + bias) and u = delta x
    template <class V> INLINE void drive(i64 from, i64 count, At at, V* delta, V* u) const {
        for (i64 i = 0; i < count; i++) {
            const i64 place = row(from + i) * e + at;
            V z = load<V>(dt + place);
            delta[i] = softplus(bias ? z + load<V>(bias + at) : z);
            u[i] = delta[i] * load<V>(x + place);
        }
    }

    // States j .. j + M - 1 over a stretch; visit(i, m, decay, h) sees every step.
    template <int M, class V, class F>
    INLINE void advance(i64 j, i64 from, i64 count, const V* A, const V* delta, const V* u, V* h, F visit) const {
        const float* b = B + from * stride + j;
        for (i64 i = 0; i < count; i++)
            FULLY for (int m = 0; m < M; m++) {
                V a = exp2(delta[i] * A[m]);
                h[m] = a * h[m] + u[i] * b[i * stride + m];
                visit(i, m, a, h[m]);
            }
    }

    // All states over a stretch, from the rows h [n][W] to the rows `next`; visit(i, state, h) sees every step.
    template <class V, class F>
    INLINE void advance_all(i64 from, i64 count, const float* A_rows, const V* delta, const V* u, const float* h_rows,
                            float* next, F visit) const {
        groups(n, [&](auto size, i64 j) INLINED {
            constexpr int M = decltype(size)::value;
            V A[M], h[M];
            load_rows<M>(A_rows + j * W, A);
            load_rows<M>(h_rows + j * W, h);
            advance<M>(j, from, count, A, delta, u, h, [&](i64 i, int m, V, V now) { visit(i, j + m, now); });
            store_rows<M>(next + j * W, h);
        });
    }
};

// A's rows of a block of direction dir, [n][W], times log2(e): delta A is then an argument of exp2.
template <class Args> void pack_A(const Args& a, i64 dir, i64 block, float* rows) {
    for (i64 i = block; i < std::min(block + W, a.e); i++)
        for (i64 j = 0; j < a.n; j++) rows[j * W + i - block] = LOG2E * a.A[(dir * a.e + i) * a.n + j];
}

// A stretch of a block of channels; h: its states [n][W]
static void scan_stretch(const Run run, i64 block, i64 from, const float* A, float* h, float* s) {
    const i64 count = std::min(STEPS, run.p - from);
    channels(block, std::min<i64>(block + W, run.e), EACH {
        using V = decltype(lane);
        const i64 own = at - at.block;
        V delta[STEPS], u[STEPS], y[STEPS];
        run.drive(from, count, at, delta, u);
        for (i64 i = 0; i < count; i++)
            y[i] = run.D ? load<V>(run.D + at) * load<V>(run.x + run.row(from + i) * run.e + at) : V{};
        run.advance_all(from, count, A + own, delta, u, h + own, h + own,
                        [&](i64 i, i64 j, V now) { y[i] += now * run.C[(from + i) * run.stride + j]; });
        for (i64 i = 0; i < count; i++) store(s + run.row(from + i) * run.e + at, y[i]);
    });
}

extern "C" int selective_scan(const SelectiveScan* a, void*) try {
    const i64 b = a->b, p = a->p, e = a->e, n = a->n;
    const i64 blocks = whole(e) / W, images = 8, parts = (b + images - 1) / images;     // 8 images share one packed A
    parallel(a->k * blocks * parts, a->k * b * p * e * n / 4, [&](i64 i) {
        const i64 dir = i / (blocks * parts), block = i / parts % blocks * W, from_image = i % parts * images;
        float *A = scratch<TASK>(2 * n * W), *h = A + n * W;
        pack_A(*a, dir, block, A);
        for (i64 image = from_image; image < std::min(from_image + images, b); image++) {
            const Run run(*a, dir, image);
            std::fill(h, h + n * W, 0.f);
            for (i64 from = 0; from < p; from += STEPS) scan_stretch(run, block, from, A, h, a->s);
        }
    });
    return 0;
} OUT_OF_MEMORY

// Backwards, the states are needed in reverse order. A first run keeps them at the beginning of every stretch; then,
// from the last stretch to the first, a second run keeps those of one stretch and GROUP states, in the first cache. dB
// and dC sum over channels: vectors are added up as they are, [n][dB, dC][step][W], and their lanes once at the end.
// A task takes 128 channels, so that one image can use several threads; what tasks share is added up afterwards.
struct Task {
    i64 e0, e1, floats;                         // the channels; floats of a set of their rows [n]
    float *A, *dh, *check, *lanes, *sums;       // blocked rows: [n]; [n]; [n] of each stretch; see above; [n + 2]

    Task(const SelectiveScanBackward& a, i64 dir, i64 e0, i64 e1, i64 stretches, float* sums)
        : e0(e0), e1(e1), floats(whole(e1 - e0) * a.n),
          A(scratch<TASK>(floats * (2 + stretches) + a.n * 2 * STEPS * W)), dh(A + floats), check(dh + floats),
          lanes(check + floats * stretches), sums(sums) {
        std::fill(sums, sums + whole(e1 - e0) * (a.n + 2), 0.f);        // dA, dD, ddt_bias
        for (i64 block = e0; block < e1; block += W) pack_A(a, dir, block, A + (block - e0) * a.n);
    }
};

static void keep_states(const Run run, const Task task, i64 stretch) {
    channels(task.e0, task.e1, EACH {
        using V = decltype(lane);
        const i64 own = at.from(task.e0).in(run.n), from = stretch * STEPS;
        float* h = task.check + stretch * task.floats + own;
        V delta[STEPS], u[STEPS];
        run.drive(from, STEPS, at, delta, u);
        run.advance_all(from, STEPS, task.A + own, delta, u, h, h + task.floats, [](i64, i64, V) {});
    });
}

template <class V> struct Stretch { V delta[STEPS], u[STEPS], dy[STEPS], du[STEPS], ddelta[STEPS]; };

// States j .. j + M - 1 over a stretch, forwards once more and then backwards
template <int M, class V>
INLINE void reverse(const Run& run, const Task& task, At at, i64 j, i64 stretch, i64 count, Stretch<V>& s) {
    const i64 own = at.from(task.e0).in(run.n) + j * W, from = stretch * STEPS;
    const float *B = run.B + from * run.stride + j, *C = run.C + from * run.stride + j;
    float* dA_rows = task.sums + at.from(task.e0).in(run.n + 2) + j * W;
    float *lane_B = task.lanes + j * 2 * STEPS * W + at - at.block, *lane_C = lane_B + M * STEPS * W;
    V A[M], now[M], g[M], dA[M], a[STEPS + 1][M], h[STEPS + 1][M];
    load_rows<M>(task.A + own, A);
    load_rows<M>(task.check + stretch * task.floats + own, now);
    load_rows<M>(task.dh + own, g);
    load_rows<M>(dA_rows, dA);
    for (int m = 0; m < M; m++) {
        h[0][m] = now[m];
        a[count][m] = fill<V>(1.f);
    }
    run.advance<M>(j, from, count, A, s.delta, s.u, now, [&](i64 i, int m, V decay, V state) {
        a[i][m] = decay;
        h[i + 1][m] = state;
    });
    for (i64 i = count - 1; i >= 0; i--)
        FULLY for (int m = 0; m < M; m++) {
            g[m] = a[i + 1][m] * g[m] + s.dy[i] * C[i * run.stride + m];         // the gradient of h[i + 1]
            add_to(lane_C + (i * M + m) * W, s.dy[i] * h[i + 1][m]);
            add_to(lane_B + (i * M + m) * W, g[m] * s.u[i]);
            s.du[i] += g[m] * B[i * run.stride + m];
            V q = a[i][m] * g[m] * h[i][m];
            s.ddelta[i] += q * A[m];
            dA[m] += q * s.delta[i];
        }
    for (int m = 0; m < M; m++) g[m] *= a[0][m];
    store_rows<M>(task.dh + own, g);
    store_rows<M>(dA_rows, dA);
}

static void reverse_stretch(const SelectiveScanBackward& a, const Run run, const Task task, i64 stretch, float* dB,
                            float* dC) {
    const i64 e = run.e, n = run.n, from = stretch * STEPS, count = std::min(STEPS, run.p - from);
    const i64 ds_first = a.shared && run.sign < 0 ? a.b * a.p : 0;      // the row of direction 1 with which ds begins
    std::fill(task.lanes, task.lanes + n * 2 * STEPS * W, 0.f);
    channels(task.e0, task.e1, EACH {
        using V = decltype(lane);
        Stretch<V> s;
        V dD{}, dbias{};
        run.drive(from, count, at, s.delta, s.u);
        for (i64 i = 0; i < count; i++) {
            s.dy[i] = load<V>(a.ds + (run.row(from + i) - ds_first) * e + at);
            s.du[i] = s.ddelta[i] = V{};
        }
        groups(n, [&](auto size, i64 j) INLINED {
            reverse<decltype(size)::value>(run, task, at, j, stretch, count, s);
        });
        for (i64 i = 0; i < count; i++) {
            const i64 place = run.row(from + i) * e + at;
            V x = load<V>(run.x + place), z = load<V>(run.dt + place), dx = s.du[i] * s.delta[i];
            if (run.bias) z += load<V>(run.bias + at);
            V dz = (LN2 * s.ddelta[i] + s.du[i] * x) * sigmoid2(z * -LOG2E);
            if (run.D) dx += load<V>(run.D + at) * s.dy[i];
            dD += s.dy[i] * x;
            dbias += dz;
            store(a.dx + place, dx);
            store(a.ddt + place, dz);
        }
        float* sums = task.sums + at.from(task.e0).in(n + 2);
        add_to(sums + n * W, dD);
        add_to(sums + (n + 1) * W, dbias);
    });
    groups(n, [&](auto size, i64 j) {
        constexpr int M = decltype(size)::value;
        const float *lane_B = task.lanes + j * 2 * STEPS * W, *lane_C = lane_B + M * STEPS * W;
        for (i64 i = 0; i < count * M; i++) {
            const i64 place = run.row(from + i / M) * n + j + i % M;
            dB[place] = lane_sum(lane_B + i * W);
            dC[place] = lane_sum(lane_C + i * W);
        }
    });
}

extern "C" int selective_scan_backward(const SelectiveScanBackward* a, void*) try {
    const i64 k = a->k, b = a->b, p = a->p, e = a->e, n = a->n, kbpn = k * b * p * n;
    const i64 wide = 128, slices = (e + wide - 1) / wide, stretches = (p + STEPS - 1) / STEPS;
    const Slots slots(b, k * whole(e) * (n + 2), 16);                   // images; [k] blocked rows: dA, dD, ddt_bias
    float* partial = scratch<SPLIT>(slices * 2 * kbpn);                 // [slice][dB, dC][k b p][n]
    parallel(k * slots.count * slices, kbpn * e, [&](i64 i) {
        const i64 dir = i / (slots.count * slices), slot = i / slices % slots.count, slice = i % slices;
        const i64 e0 = slice * wide, e1 = std::min(e0 + wide, e);
        float* sums = slots.sums + slot * slots.floats + (dir * whole(e) + e0) * (n + 2);
        float *dB = partial + slice * 2 * kbpn, *dC = dB + kbpn;
        const Task task(*a, dir, e0, e1, stretches, sums);
        for (i64 image = slots.begin(slot); image < slots.begin(slot + 1); image++) {
            const Run run(*a, dir, image);
            std::fill(task.dh, task.dh + 2 * task.floats, 0.f);         // and the first checkpoint
            for (i64 j = 0; j + 1 < stretches; j++) keep_states(run, task, j);
            for (i64 j = stretches - 1; j >= 0; j--) reverse_stretch(*a, run, task, j, dB, dC);
        }
    });
    parallel(2 * k * b, kbpn * slices / 4, [&](i64 i) {
        const i64 which = i / (k * b), at = i % (k * b) * p * n;
        add_rows(partial + which * kbpn + at, slices, 2 * kbpn, p * n, (which ? a->dC : a->dB) + at);
    });
    const float* total = slots.total();
    for (i64 dir = 0; dir < k; dir++) {
        const float* set = total + dir * whole(e) * (n + 2);
        for (i64 j = 0; j < n; j++) unblock(set, e, n + 2, j, a->dA + dir * e * n + j, n);
        if (a->dD) unblock(set, e, n + 2, n, a->dD + dir * e);
        if (a->ddt_bias) unblock(set, e, n + 2, n + 1, a->ddt_bias + dir * e);
    }
    return 0;
} OUT_OF_MEMORY

// ---------------------------------------------------------------------------------------------------------------------
// 9. add_norm: bound by memory. A row is read once and stays in the first cache for mean, variance and norm.

template <class T> void norm_row(const AddNorm& a, i64 i) {
    const i64 d = a.d;
    const T* hidden = (const T*)a.hidden + i * d;
    const float *residual = a.residual + i * d, *weight = a.weight, *bias = a.bias;
    float* out = a.out + i * d;
    T* u = (T*)a.u + i * d;
    Sum sum;
    channels(d, EACH {
        auto v = load<decltype(lane)>(residual + at) + load<decltype(lane)>(hidden + at);
        store(out + at, v);
        sum.add(bias ? v : v * v);
    });
    const Stats s = statistics(d, out, bias, sum);
    channels(d, EACH {
        using V = decltype(lane);
        V n = (load<V>(out + at) - s.mean) * s.scale * load<V>(weight + at);
        store(u + at, bias ? n + load<V>(bias + at) : n);
    });
}

extern "C" int add_norm(const AddNorm* a, void*) try {
    parallel(a->dtype, a->rows, a->rows * a->d / 2, [&](auto type, i64 i) { norm_row<decltype(type)>(*a, i); });
    return 0;
} OUT_OF_MEMORY

template <class T> void norm_row_backward(const AddNormBackward& a, i64 i, float* sums) {
    const i64 d = a.d;
    const bool centred = a.centred;
    const float *row = a.residual + i * d, *weight = a.weight, *dout = a.dout ? a.dout + i * d : nullptr;
    const T* du = (const T*)a.du + i * d;
    float* dresidual = a.dresidual + i * d;
    T* dhidden = a.dhidden ? (T*)a.dhidden + i * d : nullptr;
    Sum sum, sum1, sum2;
    channels(d, EACH {
        auto v = load<decltype(lane)>(row + at);
        sum.add(centred ? v : v * v);
    });
    const Stats s = statistics(d, row, centred, sum);
    channels(d, EACH {
        using V = decltype(lane);
        V xhat = (load<V>(row + at) - s.mean) * s.scale, dn = load<V>(du + at);
        add_to(sums + at.in(2), dn * xhat);
        add_to(sums + at.in(2) + W, dn);
        dn *= load<V>(weight + at);
        sum1.add(dn);
        sum2.add(dn * xhat);
    });
    const float mean1 = centred ? sum1.total() / d : 0, mean2 = sum2.total() / d;
    channels(d, EACH {
        using V = decltype(lane);
        V xhat = (load<V>(row + at) - s.mean) * s.scale, dn = load<V>(du + at);
        V dv = (dn * load<V>(weight + at) - mean1 - xhat * mean2) * s.scale;
        if (dout) dv += load<V>(dout + at);
        store(dresidual + at, dv);
        if (dhidden) store(dhidden + at, dv);
    });
}

extern "C" int add_norm_backward(const AddNormBackward* a, void*) try {
    const i64 d = a->d;
    const Slots slots(a->rows, 2 * whole(d));                           // blocked rows: dweight, dbias
    slots.run(a->dtype, a->rows * d,
              [&](auto type, i64 i, float* sums) { norm_row_backward<decltype(type)>(*a, i, sums); });
    const float* total = slots.total();
    unblock(total, d, 2, 0, a->dweight);
    if (a->dbias) unblock(total, d, 2, 1, a->dbias);
    return 0;
} OUT_OF_MEMORY
