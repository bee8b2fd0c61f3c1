// scan_cpu.cpp: the operations of fastvim.py (its section 3) and their gradients on the CPU.
//
//     g++ -std=c++17 -O3 -march=native -fopenmp -shared -fPIC -Wall -Wextra scan_cpu.cpp -o scan_cpu.so
//
// Plain C functions on raw pointers, called through ctypes: sizes are int64_t, everything is contiguous, channels are
// the last axis. No torch header, no -ffast-math: NaN and infinity travel as they do in PyTorch.
//
// Symbols: B batch, S positions = slots (tokens) of an image, P scan steps (groups), E inner channels, N states,
//          K = 2 directions (0 forward, 1 backward), D embed_dim, W lanes of a vector. T: float or bf16 (dtype 0 or 1).
//
// The walk. A layer flattens the token grid in some order and pools some of its axes. Kernels see this as tables over
// the positions of the flatten order (shared by all images: Bt = 1; or one row per image: Bt = B):
//     token[t]   the slot (row of xz) at position t          group[t]  its scan step; -1: padding, which reads as zero
//     weight[t]  its factor in the mean of its group
//     member, start   group g owns the positions member[start[g]] ... member[start[g + 1] - 1], in ascending order
//
// Four ideas carry everything below; the figures are ns per B S E element on two cores of an AVX-512 Xeon:
//   1. Channels are the vector axis. No operation mixes them except sums, so nothing is ever transposed, and a token at
//      any stride is one pointer. E need not be a multiple of W: the rest runs the same code on vectors of width 1.
//   2. Both convolutions, forward and backward in time, are one pass over tiles of 4 positions and their 3 neighbours
//      on each side; c = silu(conv(x)) is never stored. It is computed again wherever it is needed.
//   3. Work is cut into chunks that depend on the sizes alone. Each chunk sums its share of the parameter gradients by
//      itself, the shares are added in order: the same bits on any number of threads, without atomics.
//   4. The price is exp. One needs 8 instructions, a sigmoid 14; the rest is arranged around them.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))
#define EACH [&](auto lane, At at) __attribute__((always_inline))       // the body of a loop over channels
using i64 = int64_t;

// ---------------------------------------------------------------------------------------------------------------------
// 1. Vectors
//
// The compiler's vector extension gives + - * / < ?: on vectors for every instruction set, and a * b + c becomes one
// instruction. Every function is a template over V = Vec or float, so that the same line serves the rest of E % W.

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

struct bf16 { uint16_t bits; };

template <class To, class From> INLINE To bits(From from)
{
    static_assert(sizeof(To) == sizeof(From), "a change of type, not of bits");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

template <class V> INLINE V load(const float* p) { V v; std::memcpy(&v, p, sizeof v); return v; }
template <class V> INLINE void store(float* p, V v) { std::memcpy(p, &v, sizeof v); }
template <class I> INLINE I load(const int32_t* p) { I v; std::memcpy(&v, p, sizeof v); return v; }
template <class I> INLINE void store(int32_t* p, I v) { std::memcpy(p, &v, sizeof v); }
template <class V> INLINE V fill(float x) { return x - V{}; }           // x - 0 is x for every x, -0 and NaN included

#if defined(FASTVIM_AVX512)                         // GCC 12 does not find these instructions by itself
INLINE VecU widen(VecH h) { return (VecU)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)h); }
#elif defined(__AVX2__)
INLINE VecU widen(VecH h) { return (VecU)_mm256_cvtepu16_epi32((__m128i)h); }
#else
INLINE VecU widen(VecH h) { return __builtin_convertvector(h, VecU); }
#endif
INLINE uint32_t widen(uint16_t h) { return h; }
INLINE VecH narrow(VecU u) { return __builtin_convertvector(u, VecH); }
INLINE uint16_t narrow(uint32_t u) { return uint16_t(u); }

// A bf16 is the upper half of a float.
template <class V> INLINE V load(const bf16* p)
{
    typename Of<V>::H h;
    std::memcpy(&h, p, sizeof h);
    return bits<V>(widen(h) << 16);
}

template <class V> INLINE void store(bf16* p, V v)
{
    using U = typename Of<V>::U;
    U u = bits<U>(v);
    U rounded = u + 0x7fff + (u >> 16 & 1);                             // to nearest, ties to even
    typename Of<V>::H h = narrow((v == v ? rounded : (u | 0x400000)) >> 16);
    std::memcpy(p, &h, sizeof h);
}

#if defined(FASTVIM_AVX512) && defined(__AVX512BF16__)
template <> INLINE void store<Vec>(bf16* p, Vec v)
{
    _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(v));
}
#endif

// 2^f for f in -0.5 .. 0.5, relative error 9e-8, and exactly 1 at 0.
template <class V> INLINE V exp2_fraction(V f)
{
    V p = 1.326472731e-3f * f + 9.671512991e-3f;
    p = p * f + 5.550733581e-2f;
    p = p * f + 2.402224243e-1f;
    p = p * f + 6.931470037e-1f;
    return p * f + 1.f;
}

// 2^t = 2^f 2^r with r = t rounded. 1.5 * 2^23 + t has r in its last bits, from where a shift makes it an exponent.
template <class V> INLINE V exp2(V t)
{
    using U = typename Of<V>::U;
    t = t < -127.f ? fill<V>(-127.f) : t;                               // 2^-127 is 0, 2^128 infinity; NaN stays NaN
    t = t > 128.f ? fill<V>(128.f) : t;
    V shifted = t + 12582912.f;
    V f = t - (shifted - 12582912.f);
    return exp2_fraction(f) * bits<V>((bits<U>(shifted) << 23) + 0x3f800000);
}

// 1 / (1 + 2^t): the sigmoid of -t / log2(e)
template <class V> INLINE V sigmoid2(V t) { return 1.f / (1.f + exp2(t)); }

#if defined(FASTVIM_AVX512)
constexpr __mmask16 ALL = 0xffff;              // GCC 12 warns of the unmasked forms, which are the same instructions

// reduce gives t - round(t), scalef multiplies by a power of two, and both treat infinity and NaN as they should.
template <> INLINE Vec exp2<Vec>(Vec t)
{
    Vec f = _mm512_maskz_reduce_ps(ALL, t, 8);
    return _mm512_maskz_scalef_ps(ALL, exp2_fraction(f), t - f);
}

// 14 bits from a table and one Newton step are cheaper than a division. 1 / infinity is the step's one exception.
template <> INLINE Vec sigmoid2<Vec>(Vec t)
{
    Vec f = _mm512_maskz_reduce_ps(ALL, t, 9);
    Vec p = 1.3426685705780983e-2f * f + 5.2242472767829895e-2f;
    p = p * f + 2.412802129983902e-1f;
    p = p * f + 6.930448412895203e-1f;
    p = p * f + 1.f;
    Vec d = 1.f + _mm512_maskz_scalef_ps(ALL, p, t), r = _mm512_maskz_rcp14_ps(ALL, d), newton = 2.f - d * r;
    return _mm512_maskz_mul_ps(_mm512_cmp_ps_mask(d, fill<Vec>(INFINITY), _CMP_NEQ_UQ), r, newton);
}
#endif

constexpr float LOG2E = 1.44269504088896f, LN2 = 0.693147180559945f;

// log(1 + e^x) = max(x, 0) + log1p(q), q = e^-|x|. log1p(q) / q is a polynomial (2e-7), so that a small q stays exact.
template <class V> INLINE V softplus(V x)
{
    V q = exp2((x > 0.f ? -x : x) * LOG2E);
    V p = -8.539200760e-3f * q + 4.408960417e-2f;
    p = p * q - 1.076816693e-1f;
    p = p * q + 1.774523854e-1f;
    p = p * q - 2.449546158e-1f;
    p = p * q + 3.327547908e-1f;
    p = p * q - 4.999740422e-1f;
    p = p * q + 9.999998212e-1f;
    return (x > 0.f ? x : V{}) + p * q;
}

// A sum over channels: whole vectors, and the rest of E % W.
struct Sum {
    Vec v = Vec{};
    float rest = 0;
    INLINE void add(Vec x) { v += x; }
    INLINE void add(float x) { rest += x; }
    INLINE float total() const
    {
        float s[W];
        store(s, v);
        for (int half = W / 2; half; half /= 2)
            for (int i = 0; i < half; i++) s[i] += s[i + half];
        return s[0] + rest;
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// 2. Loops over channels, threads, memory, tables

// A place in the channel axis. Sets of rows that are read together (weights, sums of gradients) are kept in blocks:
// [E / W][rows][W]. So one pointer and constant offsets reach 12 rows; 12 pointers would not fit into the registers.
struct At {
    i64 e, block;                               // the channel; the first one of its block of W
    INLINE i64 in(i64 rows) const { return block * rows + (e - block); }
};

template <class F> INLINE void channels(i64 from, i64 to, F body)
{
    i64 e = from;
    for (; e + W <= to; e += W) body(Vec(), At{e, e});
    for (; e < to; e++) body(float(), At{e, e - e % W});
}

template <class F> INLINE void channels(i64 E, F body) { channels(0, E, body); }

INLINE i64 whole(i64 E) { return (E + W - 1) / W * W; }                 // E with the last block filled up

// Tasks on all threads, or on this one if there is less to do (in elements) than starting the others would take.
template <class F> void parallel(i64 tasks, i64 elements, F task)
{
#pragma omp parallel for schedule(static) if (tasks > 1 && elements > 16384)
    for (i64 i = 0; i < tasks; i++) task(i);
}

// Memory that a thread keeps from call to call: fresh pages would cost more than the work done in them.
enum { PACK, SUMS, SPLIT, TASK };
template <int WHAT> float* scratch(i64 floats)
{
    static thread_local std::vector<float> memory;
    if (i64(memory.size()) < floats + 16) memory = std::vector<float>(floats + 16);
    return (float*)((uintptr_t(memory.data()) + 63) / 64 * 64);
}

struct Walk {
    i64 B, S, P, E, Bt;
    const int32_t *token, *group;
    const float* weight;
    const int32_t *member, *start;

    Walk image(i64 b) const
    {
        Walk w = *this;
        if (Bt == 1) return w;
        w.token += b * S, w.group += b * S, w.weight += b * S, w.member += b * S, w.start += b * (P + 1);
        return w;
    }
    bool real(i64 t) const { return t >= 0 && t < S && group[t] >= 0; }
};

// Positions t0 <= t < t1 of image b, and the groups g0 <= g < g1 that lie in them, all of them completely, if part < 0.
// Else the groups are spread over the image (2-D pooling to few groups), and the chunk makes partial sum `part`.
struct Chunk { i64 b, t0, t1, g0, g1, part; };

struct Chunks {
    std::vector<Chunk> list;
    std::vector<i64> split;                     // images whose groups are spread, each cut into `parts`
    i64 parts;

    Chunks(const Walk& walk, i64 least, bool may_split)
    {
        const i64 S = walk.S, P = walk.P;
        parts = may_split ? std::min({i64(16), S / (2 * P), S / least}) : 0;
        for (i64 b = 0; b < walk.B; b++) {
            const size_t first = list.size();
            if (b > 0 && walk.Bt == 1) {        // the same cuts as in image 0
                for (size_t i = 0, n = list.size() / b; i < n; i++) {
                    Chunk c = list[i];
                    c.b = b;
                    if (c.part >= 0) c.part += b * parts;
                    list.push_back(c);
                }
                if (list[first].part >= 0) split.push_back(b);
                continue;
            }
            const Walk w = walk.image(b);
            i64 t0 = 0, g0 = 0, reach = -1;
            for (i64 g = 0; g < P; g++) {
                // After group g the first start[g + 1] positions are complete if no group so far reaches beyond them.
                const i64 t1 = w.start[g + 1];
                if (t1 > w.start[g]) reach = std::max<i64>(reach, w.member[t1 - 1]);
                if (reach + 1 == t1 && t1 - t0 >= least && g + 1 < P) {
                    list.push_back({b, t0, t1, g0, g + 1, -1});
                    t0 = t1, g0 = g + 1;
                }
            }
            if (t0 > 0 || parts < 2) {
                list.push_back({b, t0, S, g0, P, -1});
                continue;
            }
            for (i64 i = 0; i < parts; i++)
                list.push_back({b, i * S / parts, (i + 1) * S / parts, 0, P, i64(split.size()) * parts + i});
            split.push_back(b);
        }
    }

    // Adds up the partial sums [split image][part][K][rows] of every split image to its result [K][B][rows].
    void reduce(const float* partial, i64 K, i64 B, i64 rows, float* result) const
    {
        parallel(split.size() * K, i64(split.size()) * parts * K * rows, [&](i64 i) {
            const float* from = partial + (i / K * parts * K + i % K) * rows;
            float* out = result + (i % K * B + split[i / K]) * rows;
            std::copy(from, from + rows, out);
            for (i64 part = 1; part < parts; part++)
                for (i64 j = 0; j < rows; j++) out[j] += from[part * K * rows + j];
        });
    }
};

// Sums of parameter gradients: n tasks in at most 64 slots, each slot adding up its tasks in order, then the slots.
struct Slots {
    i64 n, count, floats;
    float* sums;
    Slots(i64 n, i64 floats)
        : n(n), count(std::min<i64>(n, 64)), floats(floats), sums(scratch<SUMS>((count + !count) * floats)) {}

    template <class F> void run(i64 elements, F task) const             // task(i, float* sums)
    {
        parallel(count, elements, [&](i64 slot) {
            float* mine = sums + slot * floats;
            std::fill(mine, mine + floats, 0.f);
            for (i64 i = slot * n / count; i < (slot + 1) * n / count; i++) task(i, mine);
        });
    }
    const float* total() const
    {
        if (!count) std::fill(sums, sums + floats, 0.f);
        for (i64 slot = 1; slot < count; slot++)
            for (i64 i = 0; i < floats; i++) sums[i] += sums[slot * floats + i];
        return sums;
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// 3. The convolution of a tile

constexpr int TILE = 4;

// Tiles of 4 positions load the weights once and share neighbours: 2.5 rows of x a position instead of 7.
template <class F> INLINE void tiles(i64 t0, i64 t1, F tile)
{
    i64 t = t0;
    for (; t + TILE <= t1; t += TILE) tile(std::integral_constant<int, TILE>(), t);
    for (; t < t1; t++) tile(std::integral_constant<int, 1>(), t);
}

// The parameters as blocked rows. Convolution weights are multiplied by -log2(e): the result is at once the argument
// that sigmoid2 wants, and the factor that c = a sigmoid(a) misses is put into the weight with which c is used.
enum Row { W0 = 0, B0 = 4, W1 = 5, B1 = 9, D0 = 10, D1 = 11, NW = 12, NB = 13, ROWS = 14 };
struct Pack { const float *rows, *zero; };      // zero: a row of 2E zeros

static Pack pack(i64 E, const float* conv_w, const float* conv_b, const float* D, float scale, const float* norm_w,
                 const float* norm_b)
{
    float *rows = scratch<PACK>(whole(E) * (ROWS + 2)), *zero = rows + whole(E) * ROWS;
    std::fill(zero, zero + 2 * whole(E), 0.f);
    for (i64 e = 0; e < E; e++) {
        float* r = rows + At{e, e - e % W}.in(ROWS);
        for (int k = 0; k < 2; k++) {
            for (int j = 0; j < 4; j++) r[(5 * k + j) * W] = -LOG2E * conv_w[(k * E + e) * 4 + j];
            r[(5 * k + 4) * W] = -LOG2E * conv_b[k * E + e];
            r[(D0 + k) * W] = D ? scale * D[k * E + e] : 0;
        }
        r[NW * W] = norm_w ? norm_w[e] : 1;
        r[NB * W] = norm_b ? norm_b[e] : 0;
    }
    return {rows, zero};
}

// The rows of positions t - 3 ... t + U + 2; beyond the ends and for padding a row of zeros.
template <int U, class T> INLINE void neighbours(const Walk& w, const T* xz, const void* zero, i64 t, const T** x)
{
    for (int i = 0; i < U + 6; i++)
        x[i] = w.real(t + i - 3) ? xz + w.token[t + i - 3] * 2 * w.E : (const T*)zero;
}

// t_k = -log2(e) a_k of both directions, where x holds the U + 6 values
template <int U, class V> INLINE void conv(const V* x, const float* row, V* t0, V* t1)
{
    for (int k = 0; k < 2; k++) {
        V w[5], *t = k ? t1 : t0;
        for (int j = 0; j < 5; j++) w[j] = load<V>(row + (5 * k + j) * W);
#pragma GCC unroll 4
        for (int u = 0; u < U; u++) {
            const V *y = x + (k ? u + 6 : u);
            const int step = k ? -1 : 1;
            t[u] = w[3] * y[3 * step] + (w[2] * y[2 * step] + (w[1] * y[step] + (w[0] * y[0] + w[4])));
        }
    }
}

template <int COUNT, class V, class T> INLINE void gather(const T* const* rows, i64 e, V* v)
{
#pragma GCC unroll 16
    for (int i = 0; i < COUNT; i++) v[i] = load<V>(rows[i] + e);
}

// ---------------------------------------------------------------------------------------------------------------------
// 4. conv_pool

template <class T> void conv_pool_(const Walk& walk, bool max, const T* xz, const float* conv_w, const float* conv_b,
                                   float* p, int32_t* argmax)
{
    const i64 B = walk.B, P = walk.P, E = walk.E, PE = P * E;
    const Pack packed = pack(E, conv_w, conv_b, nullptr, 0, nullptr, nullptr);
    const Chunks chunks(walk, 24, !max);
    float* partial = scratch<SPLIT>(i64(chunks.split.size()) * chunks.parts * 2 * PE);
    parallel(chunks.list.size(), B * walk.S * E, [&](i64 i) {
        const Chunk c = chunks.list[i];
        const Walk w = walk.image(c.b);
        const T* image = xz + c.b * w.S * 2 * E;
        float* trash = scratch<TASK>(4 * whole(E));                     // where padding goes
        float* sum[2];
        int32_t* arg[2];
        for (int k = 0; k < 2; k++) {
            const i64 image_k = (k * B + c.b) * PE;
            sum[k] = c.part < 0 ? p + image_k : partial + (c.part * 2 + k) * PE;
            arg[k] = max ? argmax + image_k : nullptr;
            std::fill(sum[k] + c.g0 * E, sum[k] + c.g1 * E, max ? -INFINITY : 0.f);
            if (max) std::fill(arg[k] + c.g0 * E, arg[k] + c.g1 * E, -1);
        }
        tiles(c.t0, c.t1, [&](auto size, i64 t) {
            constexpr int U = decltype(size)::value;
            const T* x[U + 6];
            neighbours<U>(w, image, packed.zero, t, x);
            float *to[2][U], factor[U];
            int32_t* to_arg[2][U];
            bool shared = !max;                                         // all of one group: add once
            for (int u = 0; u < U; u++) {
                const i64 g = w.group[t + u];
                shared &= g >= 0 && g == w.group[t];
                factor[u] = -LN2 * (max ? 1.f : w.weight[t + u]);
                for (int k = 0; k < 2; k++) {
                    to[k][u] = g < 0 ? trash + k * whole(E) : sum[k] + g * E;
                    if (max) to_arg[k][u] = g < 0 ? (int32_t*)trash + (2 + k) * whole(E) : arg[k] + g * E;
                }
            }
            channels(E, EACH {
                using V = decltype(lane);
                using I = typename Of<V>::I;
                V xs[U + 6], c[2][U];
                gather<U + 6>(x, at.e, xs);
                conv<U>(xs, packed.rows + at.in(ROWS), c[0], c[1]);
#pragma GCC unroll 2
                for (int k = 0; k < 2; k++) {
#pragma GCC unroll 4
                    for (int u = 0; u < U; u++) c[k][u] *= sigmoid2(c[k][u]);
                    if (shared) {
                        V s = load<V>(to[k][0] + at.e);
                        for (int u = 0; u < U; u++) s += factor[u] * c[k][u];
                        store(to[k][0] + at.e, s);
                    } else if (!max) {
                        for (int u = 0; u < U; u++)
                            store(to[k][u] + at.e, load<V>(to[k][u] + at.e) + factor[u] * c[k][u]);
                    } else {
                        for (int u = 0; u < U; u++) {
                            V v = factor[u] * c[k][u], best = load<V>(to[k][u] + at.e);
                            I place = load<I>(to_arg[k][u] + at.e);
                            auto better = (v > best) | ((v != v) & (best == best));      // the first one stays
                            store(to[k][u] + at.e, better ? v : best);
                            place = better ? int32_t(t + u) - I{} : place;
                            store(to_arg[k][u] + at.e, place);
                        }
                    }
                }
            });
        });
        for (i64 g = c.g0; max && g < c.g1; g++)
            if (w.start[g] == w.start[g + 1])
                for (int k = 0; k < 2; k++) std::fill(sum[k] + g * E, sum[k] + (g + 1) * E, 0.f);
    });
    chunks.reduce(partial, 2, B, PE, p);
}

// ---------------------------------------------------------------------------------------------------------------------
// 5. expand_gate

// One tile of v = (s0 + s1 + D0 c0 + D1 c1) / 2 and its statistics. xhat = (v - mean) * scale; n = norm_w xhat + norm_b.
template <int U> struct Mixed {
    float *v, mean[U], scale[U];                // v: U rows in scratch, whole(E) apart
};

enum Norm { NONE, RMS, LAYER };

template <int U, class T> INLINE Mixed<U> mix(const Walk& w, Pack packed, const T* const* x, const float* s, i64 image_k,
                                              i64 t, bool skip, Norm norm, float* buffer)
{
    const i64 E = w.E;
    const float *s0[U], *s1[U];
    for (int u = 0; u < U; u++) {
        const i64 g = w.group[t + u];
        s0[u] = g < 0 ? packed.zero : s + g * E;
        s1[u] = g < 0 ? packed.zero : s + image_k + g * E;
    }
    Mixed<U> m;
    m.v = buffer;
    Sum sum[U];
    channels(E, EACH {
        using V = decltype(lane);
        V v[U];
#pragma GCC unroll 4
        for (int u = 0; u < U; u++) v[u] = (load<V>(s0[u] + at.e) + load<V>(s1[u] + at.e)) * 0.5f;
        if (skip) {
            const float* row = packed.rows + at.in(ROWS);
            V xs[U + 6], t0[U], t1[U], d0 = load<V>(row + D0 * W), d1 = load<V>(row + D1 * W);
            gather<U + 6>(x, at.e, xs);
            conv<U>(xs, row, t0, t1);
#pragma GCC unroll 4
            for (int u = 0; u < U; u++) v[u] += d0 * (t0[u] * sigmoid2(t0[u]));
#pragma GCC unroll 4
            for (int u = 0; u < U; u++) v[u] += d1 * (t1[u] * sigmoid2(t1[u]));
        }
#pragma GCC unroll 4
        for (int u = 0; u < U; u++) {
            store(m.v + u * whole(E) + at.e, v[u]);
            sum[u].add(norm == LAYER ? v[u] : v[u] * v[u]);
        }
    });
    // The variance is a second pass over the tile, which lies in the first cache. The mean of squares less the square
    // of the mean would save it, and lose all digits when the mean is large.
    Sum square[U];
    for (int u = 0; u < U; u++) m.mean[u] = norm == LAYER ? sum[u].total() / E : 0;
    if (norm == LAYER)
        channels(E, EACH {
            using V = decltype(lane);
#pragma GCC unroll 4
            for (int u = 0; u < U; u++) {
                V d = load<V>(m.v + u * whole(E) + at.e) - m.mean[u];
                square[u].add(d * d);
            }
        });
    for (int u = 0; u < U; u++)
        m.scale[u] = norm == NONE ? 1 : 1 / std::sqrt((norm == LAYER ? square : sum)[u].total() / E + 1e-5f);
    return m;
}

template <class T> void expand_gate_(const Walk& walk, const T* xz, const float* s, const float* conv_w,
                                     const float* conv_b, const float* D, const float* norm_w, const float* norm_b, T* y)
{
    const i64 B = walk.B, S = walk.S, E = walk.E;
    const Norm norm = norm_b ? LAYER : norm_w ? RMS : NONE;
    const Pack packed = pack(E, conv_w, conv_b, D, -LN2 / 2, norm_w, norm_b);
    const i64 parts = (S + 31) / 32;
    parallel(B * parts, B * S * E, [&](i64 i) {
        const i64 b = i / parts, part = i % parts;
        const Walk w = walk.image(b);
        float* buffer = scratch<TASK>(TILE * whole(E));
        tiles(part * S / parts, (part + 1) * S / parts, [&](auto size, i64 t) {
            constexpr int U = decltype(size)::value;
            const T *x[U + 6], *z[U];
            T* out[U];
            neighbours<U>(w, xz + b * S * 2 * E, packed.zero, t, x);
            const Mixed<U> m = mix<U>(w, packed, x, s + b * w.P * E, B * w.P * E, t, D, norm, buffer);
            for (int u = 0; u < U; u++) {
                z[u] = x[u + 3] + E;
                out[u] = y + (b * S + w.token[t + u]) * E;
            }
            channels(E, EACH {
                using V = decltype(lane);
                const float* row = packed.rows + at.in(ROWS);
                V nw = load<V>(row + NW * W), nb = load<V>(row + NB * W);
#pragma GCC unroll 4
                for (int u = 0; u < U; u++) {
                    V n = (load<V>(m.v + u * whole(E) + at.e) - m.mean[u]) * m.scale[u] * nw + nb;
                    V gate = load<V>(z[u] + at.e);
                    store(out[u] + at.e, n * (gate * sigmoid2(gate * -LOG2E)));
                }
            });
            for (int u = 0; u < U; u++)
                if (w.group[t + u] < 0) std::memset((void*)out[u], 0, E * sizeof(T));
        });
    });
}

template <class T> void expand_gate_backward_(const Walk& walk, const T* xz, const float* s, const float* conv_w,
                                              const float* conv_b, const float* D, const float* norm_w,
                                              const float* norm_b, const T* dy, T* y, T* dxz, T* g, float* ds,
                                              float* dnorm_w, float* dnorm_b)
{
    const i64 B = walk.B, S = walk.S, P = walk.P, E = walk.E, EW = whole(E);
    const Norm norm = norm_b ? LAYER : norm_w ? RMS : NONE;
    const Pack packed = pack(E, conv_w, conv_b, D, -LN2 / 2, norm_w, norm_b);
    const Chunks chunks(walk, 24, true);
    float* partial = scratch<SPLIT>(i64(chunks.split.size()) * chunks.parts * P * E);
    const Slots slots(chunks.list.size(), 2 * EW);
    slots.run(B * S * E, [&](i64 i, float* dnorm) {
        const Chunk c = chunks.list[i];
        const Walk w = walk.image(c.b);
        float *buffer = scratch<TASK>((2 * TILE + 1) * EW), *dxhat = buffer + TILE * EW, *trash = dxhat + TILE * EW;
        float* sum = c.part < 0 ? ds + c.b * P * E : partial + c.part * P * E;
        std::fill(sum + c.g0 * E, sum + c.g1 * E, 0.f);
        tiles(c.t0, c.t1, [&](auto size, i64 t) {
            constexpr int U = decltype(size)::value;
            const T *x[U + 6], *z[U], *dy_[U];
            T *y_[U], *dz_[U], *g_[U];
            float* to[U];
            bool shared = true;
            neighbours<U>(w, xz + c.b * S * 2 * E, packed.zero, t, x);
            const Mixed<U> m = mix<U>(w, packed, x, s + c.b * P * E, B * P * E, t, D, norm, buffer);
            for (int u = 0; u < U; u++) {
                const i64 row = c.b * S + w.token[t + u], group = w.group[t + u];
                shared &= group >= 0 && group == w.group[t];
                z[u] = x[u + 3] + E;
                dy_[u] = group < 0 ? (const T*)packed.zero : dy + row * E;
                y_[u] = y ? y + row * E : nullptr;
                dz_[u] = dxz + row * 2 * E + E;
                g_[u] = g + row * E;
                to[u] = group < 0 ? trash : sum + group * E;
            }
            Sum sum1[U], sum2[U];                                       // of dxhat and of dxhat * xhat
            channels(E, EACH {
                using V = decltype(lane);
                const float* row = packed.rows + at.in(ROWS);
                float* dn_sum = dnorm + at.in(2);
                V nw = load<V>(row + NW * W), nb = load<V>(row + NB * W);
                V dw = load<V>(dn_sum), db = load<V>(dn_sum + W);
#pragma GCC unroll 4
                for (int u = 0; u < U; u++) {
                    V xhat = (load<V>(m.v + u * EW + at.e) - m.mean[u]) * m.scale[u], n = xhat * nw + nb;
                    V gate = load<V>(z[u] + at.e), sigma = sigmoid2(gate * -LOG2E), silu = gate * sigma;
                    V d = load<V>(dy_[u] + at.e), dn = d * silu, dx = dn * nw;
                    if (y) store(y_[u] + at.e, n * silu);
                    store(dz_[u] + at.e, d * n * (silu * (1.f - sigma) + sigma));
                    store(dxhat + u * EW + at.e, dx);
                    dw += dn * xhat;
                    db += dn;
                    sum1[u].add(dx);
                    sum2[u].add(dx * xhat);
                }
                store(dn_sum, dw);
                store(dn_sum + W, db);
            });
            float mean1[U], mean2[U];
            for (int u = 0; u < U; u++) {
                mean1[u] = norm == LAYER ? sum1[u].total() / E : 0;
                mean2[u] = sum2[u].total() / E * m.scale[u];
            }
            channels(E, EACH {
                using V = decltype(lane);
                V dv[U];
#pragma GCC unroll 4
                for (int u = 0; u < U; u++) {
                    dv[u] = load<V>(dxhat + u * EW + at.e);
                    if (norm) dv[u] = (dv[u] - mean1[u] - (load<V>(m.v + u * EW + at.e) - m.mean[u]) * mean2[u])
                                      * m.scale[u];
                    dv[u] *= 0.5f;
                    store(g_[u] + at.e, dv[u]);
                }
                if (shared) {
                    V sum = load<V>(to[0] + at.e);
                    for (int u = 0; u < U; u++) sum += dv[u];
                    store(to[0] + at.e, sum);
                } else {
                    for (int u = 0; u < U; u++) store(to[u] + at.e, load<V>(to[u] + at.e) + dv[u]);
                }
            });
            for (int u = 0; u < U; u++)
                if (w.group[t + u] < 0) {
                    if (y) std::memset((void*)y_[u], 0, E * sizeof(T));
                    std::memset((void*)dz_[u], 0, E * sizeof(T));
                    std::memset((void*)g_[u], 0, E * sizeof(T));
                }
        });
    });
    chunks.reduce(partial, 1, B, P * E, ds);
    const float* total = slots.total();
    for (i64 e = 0; e < E; e++) {
        const float* row = total + At{e, e - e % W}.in(2);
        if (dnorm_w) dnorm_w[e] = row[0];
        if (dnorm_b) dnorm_b[e] = row[W];
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// 6. conv_pool, backwards
//
// da of a position, both directions, enters dx of the 3 positions before it and of the 3 after. A tile at t finishes
// dx[t - 3 .. t + U - 4] and hands six unfinished rows on to the next one, so that each da is computed once.

template <class T> void conv_pool_backward_(const Walk& walk, bool max, const T* xz, const float* conv_w,
                                            const float* conv_b, const float* D, const int32_t* argmax, const float* dp,
                                            const T* g, T* dxz, float* dconv_w, float* dconv_b, float* dD)
{
    const i64 B = walk.B, S = walk.S, P = walk.P, E = walk.E, EW = whole(E), PE = P * E;
    const Pack packed = pack(E, conv_w, conv_b, D, -LN2, nullptr, nullptr);
    const i64 parts = (S + 127) / 128;
    const Slots slots(B * parts, 12 * EW);
    slots.run(B * S * E, [&](i64 i, float* sums) {
        const i64 b = i / parts, t0 = i % parts * S / parts, t1 = (i % parts + 1) * S / parts;
        const i64 first = std::max<i64>(t0 - 3, 0), last = std::min(t1 + 3, S);
        const Walk w = walk.image(b);
        float *carry = scratch<TASK>(19 * EW), *halo_sums = carry + 6 * EW, *trash = halo_sums + 12 * EW;
        std::fill(carry, carry + 6 * EW, 0.f);
        const auto tile = [&](auto size, i64 t, float* sums) {
            constexpr int U = decltype(size)::value;
            const T *x[U + 6], *g_[U];
            const float* dp_[2][U];
            const int32_t* arg[2][U];
            T* dx_[U];
            float factor[U];
            neighbours<U>(w, xz + b * S * 2 * E, packed.zero, t, x);
            for (int u = 0; u < U; u++) {
                const i64 done = t + u - 3, group = w.group[t + u];
                g_[u] = group < 0 ? (const T*)packed.zero : g + (b * S + w.token[t + u]) * E;
                dx_[u] = done < t0 || done >= t1 ? (T*)trash : dxz + (b * S + w.token[done]) * 2 * E;
                factor[u] = -LN2 * (max ? 1.f : w.weight[t + u]);
                for (int k = 0; k < 2; k++) {
                    const i64 row = (k * B + b) * PE + group * E;
                    dp_[k][u] = group < 0 ? packed.zero : dp + row;
                    arg[k][u] = !max ? nullptr : group < 0 ? (const int32_t*)packed.zero : argmax + row;
                }
            }
            channels(E, EACH {
                using V = decltype(lane);
                using I = typename Of<V>::I;
                const float* row = packed.rows + at.in(ROWS);
                float* sum = sums + at.in(12);
                V xs[U + 6], a[2][U], dx[U + 6], gs[U];
                gather<U + 6>(x, at.e, xs);
                conv<U>(xs, row, a[0], a[1]);
                gather<U>(g_, at.e, gs);
#pragma GCC unroll 16
                for (int j = 0; j < U + 6; j++) dx[j] = j < 6 ? load<V>(carry + j * EW + at.e) : V{};
#pragma GCC unroll 2
                for (int k = 0; k < 2; k++) {
                    const V d = load<V>(row + (D0 + k) * W);
                    V gc{}, da_sum{}, da[U];
#pragma GCC unroll 4
                    for (int u = 0; u < U; u++) {
                        V sigma = sigmoid2(a[k][u]), c = a[k][u] * sigma;
                        V dc = load<V>(dp_[k][u] + at.e);
                        if (max) dc = load<I>(arg[k][u] + at.e) == int32_t(t + u) - I{} ? dc : V{};
                        dc *= factor[u];
                        if (D) {
                            dc += d * gs[u];
                            gc += gs[u] * c;
                        }
                        da[u] = dc * (-LN2 * c * (1.f - sigma) + sigma);
                        da_sum += da[u];
                    }
#pragma GCC unroll 4
                    for (int j = 0; j < 4; j++) {
                        V tap = load<V>(row + (5 * k + j) * W), dw = load<V>(sum + (5 * k + j) * W);
#pragma GCC unroll 4
                        for (int u = 0; u < U; u++) {
                            const int from = k ? u + 6 - j : u + j;
                            dx[from] += tap * da[u];
                            dw += xs[from] * da[u];
                        }
                        store(sum + (5 * k + j) * W, dw);
                    }
                    store(sum + (5 * k + 4) * W, load<V>(sum + (5 * k + 4) * W) + da_sum);
                    if (D) store(sum + (10 + k) * W, load<V>(sum + (10 + k) * W) + gc);
                }
                for (int u = 0; u < U; u++) store(dx_[u] + at.e, dx[u]);
#pragma GCC unroll 8
                for (int j = 0; j < 6; j++) store(carry + j * EW + at.e, dx[U + j]);
            });
        };
        // The 3 positions on either side matter to dx here; their share of the parameters belongs to another chunk.
        for (i64 t = first; t < t0; t++) tile(std::integral_constant<int, 1>(), t, halo_sums);
        tiles(t0, t1, [&](auto size, i64 t) { tile(size, t, sums); });
        for (i64 t = t1; t < last; t++) tile(std::integral_constant<int, 1>(), t, halo_sums);
        for (i64 t = std::max(last - 3, t0); t < t1; t++) {
            T* to = dxz + (b * S + w.token[t]) * 2 * E;
            channels(E, EACH { store(to + at.e, load<decltype(lane)>(carry + (t - last + 3) * EW + at.e)); });
        }
        for (i64 t = t0; t < t1; t++)
            if (w.group[t] < 0) std::memset((void*)(dxz + (b * S + w.token[t]) * 2 * E), 0, E * sizeof(T));
    });
    const float* total = slots.total();
    for (i64 e = 0; e < E; e++)
        for (int k = 0; k < 2; k++) {
            const float* row = total + At{e, e - e % W}.in(12);
            for (int j = 0; j < 4; j++) dconv_w[(k * E + e) * 4 + j] = -LOG2E * row[(5 * k + j) * W];
            dconv_b[k * E + e] = -LOG2E * row[(5 * k + 4) * W];
            if (D) dD[k * E + e] = -LN2 * row[(10 + k) * W];
        }
}

// ---------------------------------------------------------------------------------------------------------------------
// 7. selective_scan
//
// The N states of W channels stay in registers (N = 16 with AVX-512) while the scan walks over its P steps. A, as
// blocked rows and times log2(e), is the factor that makes delta the argument of exp2.

constexpr int MAX_N = 64;

// A block's share of A as rows [N][W]
static void pack_A(i64 N, i64 block, i64 count, const float* A, float* rows)
{
    for (i64 i = 0; i < count; i++)
        for (i64 n = 0; n < N; n++) rows[n * W + i] = LOG2E * A[(block + i) * N + n];
}

struct Steps {                                  // one direction of one image
    i64 P, E, ld;
    bool reverse;
    const float *x, *dt, *B, *C, *D, *bias;
    i64 at(i64 i) const { return reverse ? P - 1 - i : i; }
};

template <int NT, class V> INLINE void scan(i64 runtime_N, const Steps& run, i64 e, const float* A, float* s)
{
    const i64 N = NT ? NT : runtime_N;
    const V bias = run.bias ? load<V>(run.bias + e) : V{}, D = run.D ? load<V>(run.D + e) : V{};
    V h[NT ? NT : MAX_N];
    for (i64 n = 0; n < N; n++) h[n] = V{};
    for (i64 i = 0; i < run.P; i++) {
        const i64 p = run.at(i);
        const float *B = run.B + p * run.ld, *C = run.C + p * run.ld;
        V x = load<V>(run.x + p * run.E + e), delta = softplus(load<V>(run.dt + p * run.E + e) + bias), u = delta * x;
        V y = run.D ? D * x : V{};
#pragma GCC unroll 16
        for (i64 n = 0; n < N; n++) {
            h[n] = exp2(delta * load<V>(A + n * W)) * h[n] + u * B[n];
            y += h[n] * C[n];
        }
        store(s + p * run.E + e, y);
    }
}

static Steps steps(i64 k, i64 b, i64 B, i64 P, i64 E, const float* x, const float* dt, const float* Bm, const float* Cm,
                   i64 ld, const float* D, const float* dt_bias)
{
    const i64 image = (k * B + b) * P;
    return {P, E, ld, k == 1, x + image * E, dt + image * E, Bm + image * ld, Cm + image * ld,
            D ? D + k * E : nullptr, dt_bias ? dt_bias + k * E : nullptr};
}

template <int NT> void scan_(i64 K, i64 B, i64 P, i64 E, i64 N, const float* x, const float* dt, const float* A,
                             const float* Bm, const float* Cm, i64 ld, const float* D, const float* dt_bias, float* s)
{
    const i64 blocks = whole(E) / W, images = 8, parts = (B + images - 1) / images;  // 8 images share one packed A
    parallel(K * blocks * parts, K * B * P * E * N / 4, [&](i64 i) {
        const i64 k = i / (blocks * parts), block = i / parts % blocks * W, b0 = i % parts * images;
        float* rows = scratch<TASK>(N * W);
        pack_A(N, block, std::min<i64>(W, E - block), A + k * E * N, rows);
        for (i64 b = b0; b < std::min(b0 + images, B); b++) {
            const Steps run = steps(k, b, B, P, E, x, dt, Bm, Cm, ld, D, dt_bias);
            channels(block, std::min<i64>(block + W, E), EACH {
                scan<NT, decltype(lane)>(N, run, at.e, rows + at.e - at.block, s + (k * B + b) * P * E);
            });
        }
    });
}

// Backwards, the states are needed in reverse order. A first run keeps them every STEP steps only; then, from the last
// stretch of STEP steps to the first, a second run keeps them, and the decays, of that stretch, where they stay in cache.
constexpr i64 STEP = 16;

// What a stretch of steps begins with -> all its states: h[0] is the checkpoint, h[i + 1] the state after step i.
template <int NT, class V, bool KEEP> INLINE void scan_again(i64 runtime_N, const Steps& run, i64 from, i64 to, i64 e,
                                                             const float* A, const float* h0, float* h_out, float* a_out,
                                                             float* delta_out)
{
    const i64 N = NT ? NT : runtime_N;
    const V bias = run.bias ? load<V>(run.bias + e) : V{};
    V h[NT ? NT : MAX_N];
    for (i64 n = 0; n < N; n++) h[n] = load<V>(h0 + n * W);
    for (i64 i = from; i < to; i++) {
        const i64 p = run.at(i);
        const float* B = run.B + p * run.ld;
        V x = load<V>(run.x + p * run.E + e), delta = softplus(load<V>(run.dt + p * run.E + e) + bias), u = delta * x;
        if (KEEP) store(delta_out + (i - from) * W, delta);
#pragma GCC unroll 16
        for (i64 n = 0; n < N; n++) {
            V a = exp2(delta * load<V>(A + n * W));
            h[n] = a * h[n] + u * B[n];
            if (KEEP) {
                store(a_out + ((i - from) * N + n) * W, a);
                store(h_out + ((i - from) * N + n) * W, h[n]);
            }
        }
    }
    if (!KEEP)
        for (i64 n = 0; n < N; n++) store(h_out + n * W, h[n]);
}

template <int NT> void scan_backward_(i64 K, i64 B, i64 P, i64 E, i64 N, const float* x, const float* dt, const float* A,
                                      const float* Bm, const float* Cm, i64 ld, const float* D, const float* dt_bias,
                                      const float* ds, bool shared_ds, float* dx, float* ddt, float* dA, float* dB,
                                      float* dC, float* dD, float* ddt_bias)
{
    const i64 NW_ = N * W, wide = 128, cuts = (E + wide - 1) / wide, stretches = (P + STEP - 1) / STEP;
    const i64 images = (B + 15) / 16, parts = B ? (B + images - 1) / images : 0, KBPN = K * B * P * N;
    const i64 EW = whole(E), per = EW * (N + 2);
    float* sums = scratch<SUMS>((parts + !parts) * K * per);            // [part][K] blocked rows: dA, dD, ddt_bias
    float* partial = cuts > 1 ? scratch<SPLIT>(cuts * 2 * KBPN) : nullptr;
    parallel(K * parts * cuts, K * B * P * E * N, [&](i64 i) {
        const i64 k = i / (parts * cuts), part = i / cuts % parts, cut = i % cuts;
        const i64 e0 = cut * wide, e1 = std::min(e0 + wide, E), width = whole(e1 - e0);
        float* at0 = scratch<TASK>(width * N * (2 + stretches) + NW_ * (4 * STEP + 1) + STEP * W);
        const auto take = [&](i64 n) { at0 += n; return at0 - n; };
        float *rows = take(width * N), *dh = take(width * N), *check = take(stretches * width * N);
        float *lanes = take(2 * STEP * NW_), *h = take((STEP + 1) * NW_), *a = take(STEP * NW_), *delta_ = take(STEP * W);
        float* sum = sums + (part * K + k) * per + e0 * (N + 2);
        std::fill(sum, sum + width * (N + 2), 0.f);
        for (i64 block = e0; block < e1; block += W)
            pack_A(N, block, std::min<i64>(W, e1 - block), A + k * E * N, rows + (block - e0) * N);
        for (i64 b = part * images; b < std::min((part + 1) * images, B); b++) {
            const Steps run = steps(k, b, B, P, E, x, dt, Bm, Cm, ld, D, dt_bias);
            const i64 image = (k * B + b) * P;
            const float* ds_ = ds + (shared_ds ? b * P : image) * E;
            std::fill(dh, dh + width * N, 0.f);
            std::fill(check, check + width * N, 0.f);
            channels(e0, e1, EACH {
                const i64 own = At{at.e - e0, at.block - e0}.in(N);
                for (i64 j = 0; j + 1 < stretches; j++)
                    scan_again<NT, decltype(lane), false>(N, run, j * STEP, (j + 1) * STEP, at.e, rows + own,
                                                          check + j * width * N + own,
                                                          check + (j + 1) * width * N + own, nullptr, nullptr);
            });
            for (i64 j = stretches - 1; j >= 0; j--) {
                const i64 from = j * STEP, to = std::min(from + STEP, P);
                std::fill(lanes, lanes + 2 * STEP * NW_, 0.f);
                channels(e0, e1, EACH {
                    using V = decltype(lane);
                    const i64 own = At{at.e - e0, at.block - e0}.in(N), part_of = at.e - at.block;
                    const float* A_ = rows + own;
                    float *dA_ = sum + At{at.e - e0, at.block - e0}.in(N + 2), *h_ = h + part_of, *a_ = a + part_of;
                    float *lanes_ = lanes + part_of, *dd = delta_ + part_of;
                    for (i64 n = 0; n < N; n++)
                        store(h_ + n * W, load<V>(check + j * width * N + own + n * W));
                    scan_again<NT, V, true>(N, run, from, to, at.e, A_, h_, h_ + NW_, a_, dd);
                    V g[NT ? NT : MAX_N], d_D{}, d_bias{};
                    for (i64 n = 0; n < N; n++) g[n] = load<V>(dh + own + n * W);
                    const V D_ = D ? load<V>(run.D + at.e) : V{}, bias = dt_bias ? load<V>(run.bias + at.e) : V{};
                    for (i64 i = to - 1; i >= from; i--) {
                        const i64 p = run.at(i);
                        const float *Bp = run.B + p * ld, *Cp = run.C + p * ld, *hp = h_ + (i - from) * NW_;
                        const float* ap = a_ + (i - from) * NW_;
                        float* out = lanes_ + (i - from) * 2 * NW_;
                        V xv = load<V>(run.x + p * E + at.e), delta = load<V>(dd + (i - from) * W), u = delta * xv;
                        V dsv = load<V>(ds_ + p * E + at.e), du{}, ddelta{};
#pragma GCC unroll 16
                        for (i64 n = 0; n < N; n++) {
                            store(out + (N + n) * W, load<V>(out + (N + n) * W) + dsv * load<V>(hp + NW_ + n * W));
                            g[n] += dsv * Cp[n];
                            du += g[n] * Bp[n];
                            store(out + n * W, load<V>(out + n * W) + g[n] * u);
                            g[n] *= load<V>(ap + n * W);
                            V q = g[n] * load<V>(hp + n * W);
                            ddelta += q * load<V>(A_ + n * W);
                            store(dA_ + n * W, load<V>(dA_ + n * W) + q * delta);
                        }
                        V z = load<V>(run.dt + p * E + at.e) + bias;
                        V dz = (LN2 * ddelta + du * xv) * sigmoid2(z * -LOG2E), d_x = du * delta;
                        if (D) {
                            d_x += D_ * dsv;
                            d_D += dsv * xv;
                        }
                        d_bias += dz;
                        store(dx + (image + p) * E + at.e, d_x);
                        store(ddt + (image + p) * E + at.e, dz);
                    }
                    for (i64 n = 0; n < N; n++) store(dh + own + n * W, g[n]);
                    store(dA_ + N * W, load<V>(dA_ + N * W) + d_D);
                    store(dA_ + (N + 1) * W, load<V>(dA_ + (N + 1) * W) + d_bias);
                });
                for (i64 i = from; i < to; i++)                         // the lanes of dB and dC, once for all channels
                    for (i64 n = 0; n < 2 * N; n++) {
                        Sum total;
                        total.add(load<Vec>(lanes + ((i - from) * 2 * N + n) * W));
                        const i64 place = (image + run.at(i)) * N + n % N;
                        (partial ? partial + (cut * 2 + n / N) * KBPN : n < N ? dB : dC)[place] = total.total();
                    }
            }
        }
    });
    if (partial)
        parallel(2 * K * B, KBPN * cuts / 4, [&](i64 i) {
            const i64 which = i / (K * B), rows = P * N, at = i % (K * B) * rows;
            float* out = (which ? dC : dB) + at;
            for (i64 cut = 0; cut < cuts; cut++) {
                const float* from = partial + (cut * 2 + which) * KBPN + at;
                for (i64 j = 0; j < rows; j++) out[j] = cut ? out[j] + from[j] : from[j];
            }
        });
    if (!parts) std::fill(sums, sums + K * per, 0.f);
    for (i64 part = 1; part < parts; part++)
        for (i64 j = 0; j < K * per; j++) sums[j] += sums[part * K * per + j];
    for (i64 k = 0; k < K; k++)
        for (i64 e = 0; e < E; e++) {
            const float* row = sums + k * per + At{e, e - e % W}.in(N + 2);
            for (i64 n = 0; n < N; n++) dA[(k * E + e) * N + n] = row[n * W];
            if (dD) dD[k * E + e] = row[N * W];
            if (ddt_bias) ddt_bias[k * E + e] = row[(N + 1) * W];
        }
}

// ---------------------------------------------------------------------------------------------------------------------
// 8. add_norm

// mean and 1 / deviation of a row in cache: LayerNorm, or RMSNorm, whose mean counts as 0
INLINE void statistics(i64 D, const float* r, bool layer, float& mean, float& scale)
{
    Sum sum, square;
    if (layer) channels(D, EACH { sum.add(load<decltype(lane)>(r + at.e)); });
    mean = sum.total() / D;
    channels(D, EACH {
        auto d = load<decltype(lane)>(r + at.e) - mean;
        square.add(d * d);
    });
    scale = 1 / std::sqrt(square.total() / D + 1e-5f);
}

constexpr i64 ROWS_A_TASK = 32;

template <class T> void add_norm_(i64 rows, i64 D, const T* hidden, const float* residual, const float* weight,
                                  const float* bias, T* u, float* out)
{
    parallel((rows + ROWS_A_TASK - 1) / ROWS_A_TASK, rows * D / 2, [&](i64 task) {
        float* own = scratch<TASK>(D);
        for (i64 i = task * ROWS_A_TASK; i < std::min((task + 1) * ROWS_A_TASK, rows); i++) {
            float *r = out ? out + i * D : own, mean, scale;
            channels(D, EACH {
                using V = decltype(lane);
                V v = residual ? load<V>(residual + i * D + at.e) : V{};
                if (hidden) v = residual ? v + load<V>(hidden + i * D + at.e) : load<V>(hidden + i * D + at.e);
                store(r + at.e, v);
            });
            statistics(D, r, bias, mean, scale);
            channels(D, EACH {
                using V = decltype(lane);
                V n = (load<V>(r + at.e) - mean) * scale * load<V>(weight + at.e);
                store(u + i * D + at.e, bias ? n + load<V>(bias + at.e) : n);
            });
        }
    });
}

template <class T> void add_norm_backward_(i64 rows, i64 D, const float* r, const float* weight, bool layer, const T* du,
                                           const float* dout, float* dr, T* dhidden, float* dweight, float* dbias)
{
    const i64 DW = whole(D);
    const Slots slots((rows + ROWS_A_TASK - 1) / ROWS_A_TASK, 2 * DW);
    slots.run(rows * D, [&](i64 task, float* sums) {
        for (i64 i = task * ROWS_A_TASK; i < std::min((task + 1) * ROWS_A_TASK, rows); i++) {
            const float* row = r + i * D;
            float mean, scale;
            statistics(D, row, layer, mean, scale);
            Sum sum1, sum2;
            channels(D, EACH {
                using V = decltype(lane);
                float* sum = sums + at.in(2);
                V xhat = (load<V>(row + at.e) - mean) * scale, d = load<V>(du + i * D + at.e);
                V dxhat = d * load<V>(weight + at.e);
                store(sum, load<V>(sum) + d * xhat);
                store(sum + W, load<V>(sum + W) + d);
                sum1.add(dxhat);
                sum2.add(dxhat * xhat);
            });
            const float mean1 = layer ? sum1.total() / D : 0, mean2 = sum2.total() / D;
            channels(D, EACH {
                using V = decltype(lane);
                V xhat = (load<V>(row + at.e) - mean) * scale;
                V d = (load<V>(du + i * D + at.e) * load<V>(weight + at.e) - mean1 - xhat * mean2) * scale;
                if (dout) d += load<V>(dout + i * D + at.e);
                store(dr + i * D + at.e, d);
                if (dhidden) store(dhidden + i * D + at.e, d);
            });
        }
    });
    const float* total = slots.total();
    for (i64 e = 0; e < D; e++) {
        dweight[e] = total[At{e, e - e % W}.in(2)];
        if (dbias) dbias[e] = total[At{e, e - e % W}.in(2) + W];
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// 9. The C interface

extern "C" {

#define BY_TYPE(call)                                                   \
    if (dtype == 0) {                                                   \
        using T = float;                                                \
        call;                                                           \
    } else {                                                            \
        using T = bf16;                                                 \
        call;                                                           \
    }

void add_norm(i64 dtype, i64 rows, i64 D, const void* hidden, const float* residual, const float* weight,
              const float* bias, void* u, float* out)
{
    BY_TYPE(add_norm_(rows, D, (const T*)hidden, residual, weight, bias, (T*)u, out))
}

void add_norm_backward(i64 dtype, i64 rows, i64 D, const float* r, const float* weight, i64 has_bias, const void* du,
                       const float* dout, float* dr, void* dhidden, float* dweight, float* dbias)
{
    BY_TYPE(add_norm_backward_(rows, D, r, weight, has_bias, (const T*)du, dout, dr, (T*)dhidden, dweight, dbias))
}

void conv_pool(i64 dtype, i64 B, i64 S, i64 P, i64 E, i64 Bt, i64 max, const void* xz, const float* conv_w,
               const float* conv_b, const int32_t* token, const int32_t* group, const float* weight,
               const int32_t* member, const int32_t* start, float* p, int32_t* argmax)
{
    const Walk walk{B, S, P, E, Bt, token, group, weight, member, start};
    BY_TYPE(conv_pool_(walk, max, (const T*)xz, conv_w, conv_b, p, argmax))
}

void selective_scan(i64 K, i64 B, i64 P, i64 E, i64 N, const float* x, const float* dt, const float* A, const float* Bm,
                    const float* Cm, i64 ld, const float* D, const float* dt_bias, float* s)
{
    (N == 16 ? scan_<16> : scan_<0>)(K, B, P, E, N, x, dt, A, Bm, Cm, ld, D, dt_bias, s);
}

void selective_scan_backward(i64 K, i64 B, i64 P, i64 E, i64 N, const float* x, const float* dt, const float* A,
                             const float* Bm, const float* Cm, i64 ld, const float* D, const float* dt_bias,
                             const float* ds, i64 shared_ds, float* dx, float* ddt, float* dA, float* dB, float* dC,
                             float* dD, float* ddt_bias)
{
    (N == 16 ? scan_backward_<16> : scan_backward_<0>)(K, B, P, E, N, x, dt, A, Bm, Cm, ld, D, dt_bias, ds, shared_ds,
                                                       dx, ddt, dA, dB, dC, dD, ddt_bias);
}

void expand_gate(i64 dtype, i64 B, i64 S, i64 P, i64 E, i64 Bt, const void* xz, const float* s, const float* conv_w,
                 const float* conv_b, const float* D, const float* norm_w, const float* norm_b, const int32_t* token,
                 const int32_t* group, void* y)
{
    const Walk walk{B, S, P, E, Bt, token, group, nullptr, nullptr, nullptr};
    BY_TYPE(expand_gate_(walk, (const T*)xz, s, conv_w, conv_b, D, norm_w, norm_b, (T*)y))
}

void expand_gate_backward(i64 dtype, i64 B, i64 S, i64 P, i64 E, i64 Bt, const void* xz, const float* s,
                          const float* conv_w, const float* conv_b, const float* D, const float* norm_w,
                          const float* norm_b, const int32_t* token, const int32_t* group, const int32_t* member,
                          const int32_t* start, const void* dy, void* y, void* dxz, void* g, float* ds, float* dnorm_w,
                          float* dnorm_b)
{
    const Walk walk{B, S, P, E, Bt, token, group, nullptr, member, start};
    BY_TYPE(expand_gate_backward_(walk, (const T*)xz, s, conv_w, conv_b, D, norm_w, norm_b, (const T*)dy, (T*)y,
                                  (T*)dxz, (T*)g, ds, dnorm_w, dnorm_b))
}

void conv_pool_backward(i64 dtype, i64 B, i64 S, i64 P, i64 E, i64 Bt, i64 max, const void* xz, const float* conv_w,
                        const float* conv_b, const float* D, const int32_t* token, const int32_t* group,
                        const float* weight, const int32_t* member, const int32_t* start, const int32_t* argmax,
                        const float* dp, const void* g, void* dxz, float* dconv_w, float* dconv_b, float* dD)
{
    const Walk walk{B, S, P, E, Bt, token, group, weight, member, start};
    BY_TYPE(conv_pool_backward_(walk, max, (const T*)xz, conv_w, conv_b, D, argmax, dp, (const T*)g, (T*)dxz, dconv_w,
                                dconv_b, dD))
}

}  // extern "C"
