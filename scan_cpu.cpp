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
// Four ideas carry everything below. Figures in comments: FastVim-T, 8 images of 224 px, one core of a 3 GHz AVX-512
// Xeon, halved as if for two; ns per B S E element where nothing else is said.
//   1. Channels are the vector axis. No operation mixes them except sums, so nothing is ever transposed, and a token at
//      any stride is one pointer. E need not be a multiple of W: the rest runs the same code on vectors of width 1.
//   2. Both convolutions, forward and backward in time, are one pass over tiles of 4 positions and their 3 neighbours
//      on each side. c = silu(conv(x)) is never stored: it is computed again wherever it is needed.
//   3. Work is cut into chunks that depend on the sizes alone. Each chunk sums its share of the parameter gradients by
//      itself, the shares are added in order: the same bits on any number of threads, without atomics.
//   4. The price is exp: 8 instructions, a sigmoid 12. The rest is arranged around them.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))
#define EACH [&](auto lane, At at) __attribute__((always_inline))       // the body of a loop over channels
#define FULLY _Pragma("GCC unroll 16")                                  // arrays of vectors are registers if unrolled
using i64 = int64_t;

// ---------------------------------------------------------------------------------------------------------------------
// 1. Vectors
//
// The compiler's vector extension gives + - * / < ?: on vectors for every instruction set, and a * b + c becomes one
// instruction. Functions are templates over V = Vec or float, so that the same line serves the rest of E % W.

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

#if defined(FASTVIM_AVX512) && defined(__AVX512BF16__)
template <> INLINE void store<Vec>(bf16* p, Vec v) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(v)); }
#endif

// A polynomial by Horner's rule, lowest coefficient first
template <class V> INLINE V poly(V, float c) { return fill<V>(c); }
template <class V, class... C> INLINE V poly(V x, float c, C... higher) { return poly(x, higher...) * x + c; }

// 2^f for f in -0.5 .. 0.5, relative error 9e-8, and exactly 1 at 0: a decay near 1 is raised to high powers.
template <class V> INLINE V exp2_fraction(V f) {
    return poly(f, 1.f, 6.931470037e-1f, 2.402224243e-1f, 5.550733581e-2f, 9.671512991e-3f, 1.326472731e-3f);
}

// 2^t = 2^f 2^r with r = t rounded. 1.5 * 2^23 + t has r in its last bits, from where a shift makes it an exponent.
template <class V> INLINE V exp2(V t) {
    using U = typename Of<V>::U;
    t = t < -127.f ? fill<V>(-127.f) : t;                               // 2^-127 is 0, 2^128 infinity; NaN stays NaN
    t = t > 128.f ? fill<V>(128.f) : t;
    V shifted = t + 12582912.f, f = t - (shifted - 12582912.f);
    return exp2_fraction(f) * bits<V>((bits<U>(shifted) << 23) + 0x3f800000);
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

// A sum over channels: whole vectors, and the rest of E % W.
struct Sum {
    Vec v = Vec{};
    float rest = 0;
    INLINE void add(Vec x) { v += x; }
    INLINE void add(float x) { rest += x; }
    INLINE float total() const { return lane_sum((const float*)&v) + rest; }
};

// ---------------------------------------------------------------------------------------------------------------------
// 2. Loops over channels, threads, memory, chunks

// A place in the channel axis. Sets of rows that are read together (weights, sums of gradients) are kept in blocks:
// [E / W][rows][W]. So one pointer and constant offsets reach all of them; 14 pointers would not fit into registers.
struct At {
    i64 e, block;                               // the channel; the first one of its block of W
    INLINE i64 in(i64 rows) const { return block * rows + (e - block); }
};

INLINE At place(i64 e) { return {e, e - e % W}; }
INLINE i64 whole(i64 E) { return (E + W - 1) / W * W; }                 // E with the last block filled up

template <class F> INLINE void channels(i64 from, i64 to, F body) {
    i64 e = from;
    for (; e + W <= to; e += W) body(Vec(), At{e, e});
    for (; e < to; e++) body(float(), place(e));
}
template <class F> INLINE void channels(i64 E, F body) { channels(0, E, body); }

// Tasks on all threads, or on this one if there is less to do (in elements) than starting the others would take.
template <class F> void parallel(i64 tasks, [[maybe_unused]] i64 elements, F task) {
#pragma omp parallel for schedule(static) if (tasks > 1 && elements > 16384)
    for (i64 i = 0; i < tasks; i++) task(i);
}

template <class F> void by_type(i64 dtype, F f) { dtype == 0 ? f(float()) : f(bf16()); }

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
    template <class F> void run(i64 elements, F task) const {   // task(i, float* sums)
        parallel(count, elements, [&](i64 slot) {
            float* mine = sums + slot * floats;
            std::fill(mine, mine + floats, 0.f);
            for (i64 i = begin(slot); i < begin(slot + 1); i++) task(i, mine);
        });
    }
    const float* total() const {
        add_rows(sums, count, floats, floats, sums + count * floats);
        return sums + count * floats;
    }
};

struct Walk {
    i64 B, S, P, E, Bt;
    const int32_t *token, *group;
    const float* weight;
    const int32_t *member, *start;

    Walk image(i64 b) const {
        Walk w = *this;
        if (Bt == 1) return w;
        w.token += b * S, w.group += b * S;
        if (weight) w.weight += b * S;
        if (member) w.member += b * S, w.start += b * (P + 1);
        return w;
    }
    bool real(i64 t) const { return t >= 0 && t < S && group[t] >= 0; }
};

// Positions t0 <= t < t1 of image b. If part < 0, the groups g0 <= g < g1 lie in them with all their members. Else the
// groups are spread over the image (2-D pooling to few groups), and the chunk makes a partial sum of all of them.
struct Chunk { i64 b, t0, t1, g0, g1, part; };

struct Chunks {
    std::vector<Chunk> list;
    std::vector<i64> split;                     // images whose groups are spread, each cut into `parts`
    i64 parts;

    Chunks(const Walk& walk, i64 least, bool may_split) {
        const i64 S = walk.S, P = walk.P;
        parts = may_split ? std::min({i64(16), S / (2 * P), S / least}) : 0;
        for (i64 b = 0; b < walk.B; b++) {
            const Walk w = walk.image(b);
            const size_t first = list.size();
            i64 t0 = 0, g0 = 0, reach = -1;
            if (b > 0 && walk.Bt == 1) {        // cuts as in image 0
                for (size_t i = 0; i < first / b; i++) list.push_back(list[i]), list.back().b = b;
            } else {
                for (i64 g = 0; g + 1 < P; g++) {
                    // Groups 0 .. g are the first start[g + 1] positions if none of them reaches beyond.
                    const i64 t1 = w.start[g + 1];
                    if (t1 > w.start[g]) reach = std::max<i64>(reach, w.member[t1 - 1]);
                    if (reach + 1 != t1 || t1 - t0 < least) continue;
                    list.push_back({b, t0, t1, g0, g + 1, -1});
                    t0 = t1, g0 = g + 1;
                }
                if (t0 > 0 || parts < 2) list.push_back({b, t0, S, g0, P, -1});
                else
                    for (i64 i = 0; i < parts; i++) list.push_back({b, i * S / parts, (i + 1) * S / parts, 0, P, i});
            }
            if (list[first].part < 0) continue;
            for (i64 i = 0; i < parts; i++) list[first + i].part = i64(split.size()) * parts + i;
            split.push_back(b);
        }
    }

    // Room for the partial sums [split image][part][K][rows], and their sums, to result [K][B][rows]
    float* partial(i64 K, i64 rows) const { return scratch<SPLIT>(i64(split.size()) * parts * K * rows); }
    void reduce(const float* partial, i64 K, i64 B, i64 rows, float* result) const {
        parallel(split.size() * K, i64(split.size()) * parts * K * rows, [&](i64 i) {
            add_rows(partial + (i / K * parts * K + i % K) * rows, parts, K * rows, rows,
                     result + (i % K * B + split[i / K]) * rows);
        });
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// 3. The convolution of a tile

constexpr int TILE = 4;

// Tiles of 4 positions load the weights once and share neighbours, 2.5 rows of x a position instead of 7: conv_pool
// 0.35 -> 0.26, its gradient 1.17 -> 0.66. (Tiles of 2, 3, 6 and 7: 0.30, 0.28, 0.27, 0.25.)
template <class F> INLINE void tiles(i64 t0, i64 t1, F tile) {
    i64 t = t0;
    for (; t + TILE <= t1; t += TILE) tile(std::integral_constant<int, TILE>(), t);
    for (; t < t1; t++) tile(std::integral_constant<int, 1>(), t);
}

// The parameters as blocked rows. Convolution weights are multiplied by -log2(e): the result is at once the argument
// that sigmoid2 wants, and the -ln2 that t sigmoid2(t) lacks to be silu is put into the weight with which it is used.
enum Row { W0 = 0, B0 = 4, W1 = 5, B1 = 9, D0 = 10, D1 = 11, NW = 12, NB = 13, ROWS = 14 };
struct Pack { const float *rows, *zero; };      // zero: 2E zeros

static Pack pack(i64 E, const float* conv_w, const float* conv_b, const float* D = nullptr, float scale = 0,
                 const float* norm_w = nullptr, const float* norm_b = nullptr) {
    float *rows = scratch<PACK>(whole(E) * (ROWS + 2)), *zero = rows + whole(E) * ROWS;
    std::fill(zero, zero + 2 * whole(E), 0.f);
    for (i64 e = 0; e < E; e++) {
        float* r = rows + place(e).in(ROWS);
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
template <int U, class T> INLINE void neighbours(const Walk& w, const T* xz, const void* zero, i64 t, const T** x) {
    for (int i = 0; i < U + 6; i++)
        x[i] = w.real(t + i - 3) ? xz + w.token[t + i - 3] * 2 * w.E : (const T*)zero;
}

template <int COUNT, class V, class T> INLINE void gather(const T* const* rows, i64 e, V* v) {
    FULLY for (int i = 0; i < COUNT; i++) v[i] = load<V>(rows[i] + e);
}

// t = -log2(e) conv(x) of both directions, where x holds the U + 6 values. Direction 1 is the mirror image. (Convolving
// each direction just before its use makes conv_pool_backward slower, 0.64 -> 0.68.)
template <int U, class V> INLINE void conv(const V* x, const float* row, V (*t)[U]) {
    FULLY for (int k = 0; k < 2; k++) {
        const int step = k ? -1 : 1;
        V w[5];
        FULLY for (int j = 0; j < 5; j++) w[j] = load<V>(row + (5 * k + j) * W);
        FULLY for (int u = 0; u < U; u++) {
            const V* y = x + (k ? u + 6 : u);
            t[k][u] = w[3] * y[3 * step] + (w[2] * y[2 * step] + (w[1] * y[step] + (w[0] * y[0] + w[4])));
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// 4. conv_pool: both directions' silu(conv(x)), pooled. The rows of p are the accumulators.

extern "C" void conv_pool(i64 dtype, i64 B, i64 S, i64 P, i64 E, i64 Bt, i64 max, const void* xz, const float* conv_w,
                          const float* conv_b, const int32_t* token, const int32_t* group, const float* weight,
                          const int32_t* member, const int32_t* start, float* p, int32_t* argmax) {
    const Walk walk{B, S, P, E, Bt, token, group, weight, member, start};
    const Pack packed = pack(E, conv_w, conv_b);
    const Chunks chunks(walk, 24, !max);
    const i64 PE = P * E;
    float* partial = chunks.partial(2, PE);
    by_type(dtype, [&](auto type) {
        using T = decltype(type);
        parallel(chunks.list.size(), B * S * E, [&](i64 i) {
            const Chunk c = chunks.list[i];
            const Walk w = walk.image(c.b);
            float *trash = scratch<TASK>(2 * whole(E)), *sum[2];        // trash: where padding goes
            int32_t* arg[2];
            for (int k = 0; k < 2; k++) {
                sum[k] = c.part < 0 ? p + (k * B + c.b) * PE : partial + (c.part * 2 + k) * PE;
                arg[k] = max ? argmax + (k * B + c.b) * PE : nullptr;
                std::fill(sum[k] + c.g0 * E, sum[k] + c.g1 * E, max ? -INFINITY : 0.f);
                if (max) std::fill(arg[k] + c.g0 * E, arg[k] + c.g1 * E, -1);
            }
            tiles(c.t0, c.t1, [&](auto size, i64 t) {
                constexpr int U = decltype(size)::value;
                const T* x[U + 6];
                float *to[2][U], factor[U];
                int32_t* to_arg[2][U];
                bool shared = !max;                                     // a tile of one group adds once
                neighbours<U>(w, (const T*)xz + c.b * S * 2 * E, packed.zero, t, x);
                for (int u = 0; u < U; u++) {
                    const i64 g = w.group[t + u];
                    shared &= g >= 0 && g == w.group[t];
                    factor[u] = -LN2 * (max ? 1.f : w.weight[t + u]);
                    for (int k = 0; k < 2; k++) {
                        to[k][u] = g < 0 ? trash : sum[k] + g * E;
                        if (max) to_arg[k][u] = g < 0 ? (int32_t*)trash + whole(E) : arg[k] + g * E;
                    }
                }
                channels(E, EACH {
                    using V = decltype(lane);
                    V xs[U + 6], cs[2][U];
                    gather<U + 6>(x, at.e, xs);
                    conv<U>(xs, packed.rows + at.in(ROWS), cs);
                    FULLY for (int k = 0; k < 2; k++) {
                        V* c = cs[k];
                        FULLY for (int u = 0; u < U; u++) c[u] *= sigmoid2(c[u]);
                        if (shared) {
                            V s = load<V>(to[k][0] + at.e);
                            for (int u = 0; u < U; u++) s += factor[u] * c[u];
                            store(to[k][0] + at.e, s);
                            continue;
                        }
                        FULLY for (int u = 0; u < U; u++) {
                            V v = factor[u] * c[u], best = load<V>(to[k][u] + at.e);
                            if (!max) {
                                store(to[k][u] + at.e, best + v);
                                continue;
                            }
                            using I = typename Of<V>::I;
                            auto better = (v > best) | ((v != v) & (best == best));     // of equal ones the first stays
                            store(to[k][u] + at.e, better ? v : best);
                            store(to_arg[k][u] + at.e, better ? int32_t(t + u) - I{} : load<I>(to_arg[k][u] + at.e));
                        }
                    }
                });
            });
            for (i64 g = c.g0; max && g < c.g1; g++)
                for (int k = 0; k < 2 && w.start[g] == w.start[g + 1]; k++)
                    std::fill(sum[k] + g * E, sum[k] + (g + 1) * E, 0.f);
        });
    });
    chunks.reduce(partial, 2, B, PE, p);
}

// ---------------------------------------------------------------------------------------------------------------------
// 5. expand_gate: v = (s0 + s1 + D0 c0 + D1 c1) / 2, its norm over the channels, times silu(z)

// v of a tile and its statistics: the norm is n = norm_w xhat + norm_b, xhat = (v - mean) scale.
template <int U> struct Mixed { float *v, mean[U], scale[U]; };         // v: U rows, whole(E) apart
enum Norm { NONE, RMS, LAYER };

// `out` are OUT rows that the caller writes afterwards. Asking for them here hides that memory has to be read before it
// is written: expand_gate_backward at 2048 px, out of cache, 2.0 -> 1.4. (Elsewhere it did not pay, nor did asking for
// the next tile's x and z.)
template <int U, int OUT, class T>
INLINE Mixed<U> mix(const Walk& w, Pack packed, const T* const* x, const float* s, i64 s1_at, i64 t, bool skip,
                    Norm norm, float* buffer, T* const* out) {
    const i64 E = w.E;
    const float *s0[U], *s1[U];
    for (int u = 0; u < U; u++) {
        const i64 g = w.group[t + u];
        s0[u] = g < 0 ? packed.zero : s + g * E;
        s1[u] = g < 0 ? packed.zero : s + s1_at + g * E;
    }
    Mixed<U> m;
    m.v = buffer;
    Sum sum[U], square[U];
    channels(E, EACH {
        using V = decltype(lane);
        const float* row = packed.rows + at.in(ROWS);
        V v[U], xs[U + 6], c[2][U];
        for (int i = 0; i < OUT; i++) __builtin_prefetch(out[i] + at.e, 1);
        FULLY for (int u = 0; u < U; u++) v[u] = (load<V>(s0[u] + at.e) + load<V>(s1[u] + at.e)) * 0.5f;
        if (skip) {
            gather<U + 6>(x, at.e, xs);
            conv<U>(xs, row, c);
            FULLY for (int k = 0; k < 2; k++) {
                V d = load<V>(row + (D0 + k) * W);
                FULLY for (int u = 0; u < U; u++) v[u] += d * (c[k][u] * sigmoid2(c[k][u]));
            }
        }
        FULLY for (int u = 0; u < U; u++) {
            store(m.v + u * whole(E) + at.e, v[u]);
            sum[u].add(norm == LAYER ? v[u] : v[u] * v[u]);
        }
    });
    for (int u = 0; u < U; u++) m.mean[u] = norm == LAYER ? sum[u].total() / E : 0;
    // The variance is a second pass over the tile, which lies in the first cache. The mean of squares less the square
    // of the mean would save it (3 %), and lose all digits when the mean is large.
    if (norm == LAYER)
        channels(E, EACH {
            FULLY for (int u = 0; u < U; u++) {
                auto d = load<decltype(lane)>(m.v + u * whole(E) + at.e) - m.mean[u];
                square[u].add(d * d);
            }
        });
    for (int u = 0; u < U; u++)
        m.scale[u] = norm == NONE ? 1 : 1 / std::sqrt((norm == LAYER ? square : sum)[u].total() / E + 1e-5f);
    return m;
}

template <class T> void clear(T* row, i64 E) { std::memset((void*)row, 0, E * sizeof(T)); }

extern "C" void expand_gate(i64 dtype, i64 B, i64 S, i64 P, i64 E, i64 Bt, const void* xz, const float* s,
                            const float* conv_w, const float* conv_b, const float* D, const float* norm_w,
                            const float* norm_b, const int32_t* token, const int32_t* group, void* y) {
    const Walk walk{B, S, P, E, Bt, token, group, nullptr, nullptr, nullptr};
    const Norm norm = norm_b ? LAYER : norm_w ? RMS : NONE;
    const Pack packed = pack(E, conv_w, conv_b, D, -LN2 / 2, norm_w, norm_b);
    const i64 parts = (S + 31) / 32;
    by_type(dtype, [&](auto type) {
        using T = decltype(type);
        parallel(B * parts, B * S * E, [&](i64 i) {
            const i64 b = i / parts, part = i % parts;
            const Walk w = walk.image(b);
            float* buffer = scratch<TASK>(TILE * whole(E));
            tiles(part * S / parts, (part + 1) * S / parts, [&](auto size, i64 t) {
                constexpr int U = decltype(size)::value;
                const T *x[U + 6], **here = x + 3;
                neighbours<U>(w, (const T*)xz + b * S * 2 * E, packed.zero, t, x);
                const Mixed<U> m = mix<U, 0, T>(w, packed, x, s + b * P * E, B * P * E, t, D, norm, buffer, nullptr);
                T* out[U];
                for (int u = 0; u < U; u++) out[u] = (T*)y + (b * S + w.token[t + u]) * E;
                channels(E, EACH {
                    using V = decltype(lane);
                    const float* row = packed.rows + at.in(ROWS);
                    V nw = load<V>(row + NW * W), nb = load<V>(row + NB * W);
                    FULLY for (int u = 0; u < U; u++) {
                        V n = (load<V>(m.v + u * whole(E) + at.e) - m.mean[u]) * m.scale[u] * nw + nb;
                        V z = load<V>(here[u] + E + at.e);
                        store(out[u] + at.e, n * (z * sigmoid2(z * -LOG2E)));
                    }
                });
                for (int u = 0; u < U; u++)
                    if (w.group[t + u] < 0) clear(out[u], E);
            });
        });
    });
}

// Of a tile: v again; then z's gradient and d = dxhat; then the norm, dv = scale (d - mean(d) - xhat mean(d xhat)).
extern "C" void expand_gate_backward(i64 dtype, i64 B, i64 S, i64 P, i64 E, i64 Bt, const void* xz, const float* s,
                                     const float* conv_w, const float* conv_b, const float* D, const float* norm_w,
                                     const float* norm_b, const int32_t* token, const int32_t* group,
                                     const int32_t* member, const int32_t* start, const void* dy, void* y, void* dxz,
                                     void* g, float* ds, float* dnorm_w, float* dnorm_b) {
    const Walk walk{B, S, P, E, Bt, token, group, nullptr, member, start};
    const Norm norm = norm_b ? LAYER : norm_w ? RMS : NONE;
    const Pack packed = pack(E, conv_w, conv_b, D, -LN2 / 2, norm_w, norm_b);
    const Chunks chunks(walk, 24, true);
    const i64 EW = whole(E);
    const Slots slots(chunks.list.size(), 2 * EW);                      // blocked rows: dnorm_w, dnorm_b
    float* partial = chunks.partial(1, P * E);
    by_type(dtype, [&](auto type) {
        using T = decltype(type);
        slots.run(B * S * E, [&](i64 i, float* dnorm) {
            const Chunk c = chunks.list[i];
            const Walk w = walk.image(c.b);
            float *buffer = scratch<TASK>((2 * TILE + 1) * EW), *dxhat = buffer + TILE * EW, *trash = dxhat + TILE * EW;
            float* sum = c.part < 0 ? ds + c.b * P * E : partial + c.part * P * E;
            std::fill(sum + c.g0 * E, sum + c.g1 * E, 0.f);
            tiles(c.t0, c.t1, [&](auto size, i64 t) {
                constexpr int U = decltype(size)::value;
                const T *x[U + 6], **here = x + 3, *dy_[U];
                T *y_[U], *out[2 * U], **dz_ = out, **g_ = out + U;
                float* to[U];
                bool shared = true;
                neighbours<U>(w, (const T*)xz + c.b * S * 2 * E, packed.zero, t, x);
                for (int u = 0; u < U; u++) {
                    const i64 row = (c.b * S + w.token[t + u]) * E, group = w.group[t + u];
                    shared &= group >= 0 && group == w.group[t];
                    to[u] = group < 0 ? trash : sum + group * E;
                    dy_[u] = group < 0 ? (const T*)packed.zero : (const T*)dy + row;
                    y_[u] = y ? (T*)y + row : nullptr;
                    dz_[u] = (T*)dxz + 2 * row + E;
                    g_[u] = (T*)g + row;
                }
                const Mixed<U> m = mix<U, 2 * U>(w, packed, x, s + c.b * P * E, B * P * E, t, D, norm, buffer, out);
                Sum sum1[U], sum2[U];                                   // of d, and of d xhat
                channels(E, EACH {
                    using V = decltype(lane);
                    const float* row = packed.rows + at.in(ROWS);
                    V nw = load<V>(row + NW * W), nb = load<V>(row + NB * W), dw{}, db{};
                    FULLY for (int u = 0; u < U; u++) {
                        V xhat = (load<V>(m.v + u * EW + at.e) - m.mean[u]) * m.scale[u], n = xhat * nw + nb;
                        V z = load<V>(here[u] + E + at.e), sigma = sigmoid2(z * -LOG2E), silu = z * sigma;
                        V dy = load<V>(dy_[u] + at.e), dn = dy * silu, d = dn * nw;
                        if (y) store(y_[u] + at.e, n * silu);
                        store(dz_[u] + at.e, dy * n * (silu * (1.f - sigma) + sigma));
                        store(dxhat + u * EW + at.e, d);
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
                    mean1[u] = norm == LAYER ? sum1[u].total() / E : 0;
                    mean2[u] = sum2[u].total() / E * m.scale[u];
                }
                channels(E, EACH {
                    using V = decltype(lane);
                    V dv[U], all{};
                    FULLY for (int u = 0; u < U; u++) {
                        V d = load<V>(dxhat + u * EW + at.e), v = load<V>(m.v + u * EW + at.e) - m.mean[u];
                        dv[u] = (norm ? (d - mean1[u] - v * mean2[u]) * m.scale[u] : d) * 0.5f;
                        all += dv[u];
                        store(g_[u] + at.e, dv[u]);
                    }
                    if (shared) add_to(to[0] + at.e, all);
                    else
                        FULLY for (int u = 0; u < U; u++) add_to(to[u] + at.e, dv[u]);
                });
                for (int u = 0; u < U; u++)
                    if (w.group[t + u] < 0) {
                        if (y) clear(y_[u], E);
                        clear(dz_[u], E);
                        clear(g_[u], E);
                    }
            });
        });
    });
    chunks.reduce(partial, 1, B, P * E, ds);
    const float* total = slots.total();
    for (i64 e = 0; e < E; e++) {
        if (dnorm_w) dnorm_w[e] = total[place(e).in(2)];
        if (dnorm_b) dnorm_b[e] = total[place(e).in(2) + W];
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// 6. conv_pool, backwards
//
// da of a position, both directions, enters dx of the 3 positions before it and of the 3 after. A tile at t finishes
// dx[t - 3 .. t + U - 4] and hands six unfinished rows on to the next one, so that each da is computed once.

extern "C" void conv_pool_backward(i64 dtype, i64 B, i64 S, i64 P, i64 E, i64 Bt, i64 max, const void* xz,
                                   const float* conv_w, const float* conv_b, const float* D, const int32_t* token,
                                   const int32_t* group, const float* weight, const int32_t* member,
                                   const int32_t* start, const int32_t* argmax, const float* dp, const void* g,
                                   void* dxz, float* dconv_w, float* dconv_b, float* dD) {
    const Walk walk{B, S, P, E, Bt, token, group, weight, member, start};
    const Pack packed = pack(E, conv_w, conv_b, D, -LN2);
    const i64 EW = whole(E), parts = (S + 127) / 128;
    const Slots slots(B * parts, 12 * EW);                              // blocked rows: W0 .. B1, then dD
    by_type(dtype, [&](auto type) {
        using T = decltype(type);
        slots.run(B * S * E, [&](i64 i, float* own_sums) {
            const i64 b = i / parts, t0 = i % parts * S / parts, t1 = (i % parts + 1) * S / parts;
            const i64 first = std::max<i64>(t0 - 3, 0), last = std::min(t1 + 3, S);
            const Walk w = walk.image(b);
            T* dx_image = (T*)dxz + b * S * 2 * E;
            float *carry = scratch<TASK>(19 * EW), *halo_sums = carry + 6 * EW, *trash = halo_sums + 12 * EW;
            std::fill(carry, carry + 6 * EW, 0.f);
            const auto tile = [&](auto size, i64 t, float* sums) {
                constexpr int U = decltype(size)::value;
                const T *x[U + 6], *g_[U];
                T* dx_[U];
                const float* dp_[2][U];
                const int32_t* arg[2][U];
                float factor[U];
                neighbours<U>(w, (const T*)xz + b * S * 2 * E, packed.zero, t, x);
                for (int u = 0; u < U; u++) {
                    const i64 done = t + u - 3, group = w.group[t + u];
                    g_[u] = group < 0 ? (const T*)packed.zero : (const T*)g + (b * S + w.token[t + u]) * E;
                    dx_[u] = done < t0 || done >= t1 ? (T*)trash : dx_image + w.token[done] * 2 * E;
                    factor[u] = -LN2 * (max ? 1.f : w.weight[t + u]);
                    for (int k = 0; k < 2; k++) {
                        const i64 row = ((k * B + b) * P + group) * E;
                        dp_[k][u] = group < 0 ? packed.zero : dp + row;
                        arg[k][u] = group < 0 || !max ? (const int32_t*)packed.zero : argmax + row;
                    }
                }
                channels(E, EACH {
                    using V = decltype(lane);
                    using I = typename Of<V>::I;
                    const float* row = packed.rows + at.in(ROWS);
                    float* sum = sums + at.in(12);
                    V xs[U + 6], dx[U + 6], gs[U], a[2][U], da[U];
                    gather<U + 6>(x, at.e, xs);
                    conv<U>(xs, row, a);
                    gather<U>(g_, at.e, gs);
                    FULLY for (int j = 0; j < U + 6; j++) dx[j] = j < 6 ? load<V>(carry + j * EW + at.e) : V{};
                    FULLY for (int k = 0; k < 2; k++) {
                        V d = load<V>(row + (D0 + k) * W), gc{}, da_sum{};
                        FULLY for (int u = 0; u < U; u++) {
                            V sigma = sigmoid2(a[k][u]), c = a[k][u] * sigma, dc = load<V>(dp_[k][u] + at.e);
                            if (max) dc = load<I>(arg[k][u] + at.e) == int32_t(t + u) - I{} ? dc : V{};
                            dc *= factor[u];
                            if (D) {
                                dc += d * gs[u];
                                gc += gs[u] * c;
                            }
                            da[u] = dc * (-LN2 * c * (1.f - sigma) + sigma);
                            da_sum += da[u];
                        }
                        FULLY for (int j = 0; j < 4; j++) {
                            V tap = load<V>(row + (5 * k + j) * W), dw = load<V>(sum + (5 * k + j) * W);
                            FULLY for (int u = 0; u < U; u++) {
                                const int from = k ? u + 6 - j : u + j;
                                dx[from] += tap * da[u];
                                dw += xs[from] * da[u];
                            }
                            store(sum + (5 * k + j) * W, dw);
                        }
                        add_to(sum + (5 * k + 4) * W, da_sum);
                        if (D) add_to(sum + (10 + k) * W, gc);
                    }
                    FULLY for (int u = 0; u < U; u++) store(dx_[u] + at.e, dx[u]);
                    FULLY for (int j = 0; j < 6; j++) store(carry + j * EW + at.e, dx[U + j]);
                });
            };
            // The 3 positions on either side matter to dx here; their share of the parameters belongs to another chunk.
            for (i64 t = first; t < t0; t++) tile(std::integral_constant<int, 1>(), t, halo_sums);
            tiles(t0, t1, [&](auto size, i64 t) { tile(size, t, own_sums); });
            for (i64 t = t1; t < last; t++) tile(std::integral_constant<int, 1>(), t, halo_sums);
            for (i64 t = std::max(last - 3, t0); t < t1; t++)           // the end of the image: what is still carried
                channels(E, EACH {
                    auto rest = load<decltype(lane)>(carry + (t - last + 3) * EW + at.e);
                    store(dx_image + w.token[t] * 2 * E + at.e, rest);
                });
            for (i64 t = t0; t < t1; t++)
                if (w.group[t] < 0) clear(dx_image + w.token[t] * 2 * E, E);
        });
    });
    const float* total = slots.total();
    for (i64 e = 0; e < E; e++)
        for (int k = 0; k < 2; k++) {
            const float* row = total + place(e).in(12);
            for (int j = 0; j < 4; j++) dconv_w[(k * E + e) * 4 + j] = -LOG2E * row[(5 * k + j) * W];
            dconv_b[k * E + e] = -LOG2E * row[(5 * k + 4) * W];
            if (D) dD[k * E + e] = -LN2 * row[(10 + k) * W];
        }
}

// ---------------------------------------------------------------------------------------------------------------------
// 7. selective_scan
//
// A vector of channels walks over stretches of STEP steps, and over each stretch GROUP states at a time: the states are
// registers, any N will do, and the exps of all steps are ready to run because delta was computed before. (With 16
// states in registers and one step after the other, every exp waits for the softplus of its step: 8.8 G exp/s instead
// of 11.5, backwards 2.8 instead of 4.5.) GROUP = 1 would be 10.6 and 3.9: states side by side hide each other's
// latencies and share loads and stores.
constexpr i64 STEP = 16;
constexpr int GROUP = 4;

template <class F> INLINE void states(i64 N, F body) {   // body(number of states, first one)
    i64 n = 0;
    for (; n + GROUP <= N; n += GROUP) body(std::integral_constant<int, GROUP>(), n);
    for (; n < N; n++) body(std::integral_constant<int, 1>(), n);
}

template <int M, class V> INLINE void load_rows(const float* p, V* v) {
    FULLY for (int m = 0; m < M; m++) v[m] = load<V>(p + m * W);
}

template <int M, class V> INLINE void store_rows(float* p, const V* v) {
    FULLY for (int m = 0; m < M; m++) store(p + m * W, v[m]);
}

struct Scan {                                   // the call's arrays, or with of() those of direction k of image b
    i64 K, B, P, E, N, ld;
    const float *x, *dt, *A, *Bm, *Cm, *D, *bias;
    i64 image = 0, stride = 0;

    Scan of(i64 k, i64 b) const {
        Scan r = *this;
        r.image = (k * B + b) * P, r.stride = k ? -ld : ld;
        r.x += r.image * E, r.dt += r.image * E, r.Bm += r.image * ld, r.Cm += r.image * ld;
        if (D) r.D += k * E;
        if (bias) r.bias += k * E;
        return r;
    }
    i64 at(i64 i) const { return stride < 0 ? P - 1 - i : i; }

    // A's rows of a block of direction k, [N][W], times log2(e): delta A is then an argument of exp2.
    void pack_A(i64 k, i64 block, float* rows) const {
        for (i64 e = block; e < std::min(block + W, E); e++)
            for (i64 n = 0; n < N; n++) rows[n * W + e - block] = LOG2E * A[(k * E + e) * N + n];
    }

    // The first part of a stretch: delta = softplus(dt + bias) and u = delta x
    template <class V> INLINE void drive(i64 from, i64 count, i64 e, V* delta, V* u) const {
        for (i64 i = 0; i < count; i++) {
            const i64 row = at(from + i) * E + e;
            V z = load<V>(dt + row);
            delta[i] = softplus(bias ? z + load<V>(bias + e) : z);
            u[i] = delta[i] * load<V>(x + row);
        }
    }

    // States n .. n + M - 1 over a stretch; visit(i, m, decay, h) sees every step.
    template <int M, class V, class F>
    INLINE void advance(i64 n, i64 from, i64 count, const V* A, const V* delta, const V* u, V* h, F visit) const {
        const float* B = Bm + at(from) * ld + n;
        for (i64 i = 0; i < count; i++)
            FULLY for (int m = 0; m < M; m++) {
                V a = exp2(delta[i] * A[m]);
                h[m] = a * h[m] + u[i] * B[i * stride + m];
                visit(i, m, a, h[m]);
            }
    }
};

extern "C" void selective_scan(i64 K, i64 B, i64 P, i64 E, i64 N, const float* x, const float* dt, const float* A,
                               const float* Bm, const float* Cm, i64 ld, const float* D, const float* dt_bias,
                               float* s) {
    const Scan call{K, B, P, E, N, ld, x, dt, A, Bm, Cm, D, dt_bias};
    const i64 blocks = whole(E) / W, images = 8, parts = (B + images - 1) / images;  // 8 images share one packed A
    parallel(K * blocks * parts, K * B * P * E * N / 4, [&](i64 i) {
        const i64 k = i / (blocks * parts), block = i / parts % blocks * W, b0 = i % parts * images;
        float *rows = scratch<TASK>(2 * N * W), *states_ = rows + N * W;
        call.pack_A(k, block, rows);
        for (i64 b = b0; b < std::min(b0 + images, B); b++) {
            const Scan run = call.of(k, b);
            std::fill(states_, states_ + N * W, 0.f);
            for (i64 from = 0; from < P; from += STEP)
                channels(block, std::min<i64>(block + W, E), EACH {
                    using V = decltype(lane);
                    const i64 count = std::min(STEP, P - from);
                    V delta[STEP], u[STEP], y[STEP];
                    run.drive(from, count, at.e, delta, u);
                    for (i64 i = 0; i < count; i++)
                        y[i] = D ? load<V>(run.D + at.e) * load<V>(run.x + run.at(from + i) * E + at.e) : V{};
                    states(N, [&](auto size, i64 n) __attribute__((always_inline)) {
                        constexpr int M = decltype(size)::value;
                        const i64 own = n * W + at.e - at.block;
                        const float* C = run.Cm + run.at(from) * ld + n;
                        V a[M], h[M];
                        load_rows<M>(rows + own, a);
                        load_rows<M>(states_ + own, h);
                        run.advance<M>(n, from, count, a, delta, u, h,
                                       [&](i64 i, int m, V, V now) { y[i] += now * C[i * run.stride + m]; });
                        store_rows<M>(states_ + own, h);
                    });
                    for (i64 i = 0; i < count; i++) store(s + (run.image + run.at(from + i)) * E + at.e, y[i]);
                });
        }
    });
}

// Backwards, the states are needed in reverse order. A first run keeps them at the beginning of every stretch; then,
// from the last stretch to the first, a second run keeps those of one stretch and GROUP states, in the first cache. dB
// and dC sum over channels: vectors are added up as they are, [n][dB, dC][step][W], and their lanes once at the end.
// A task takes 128 channels, so that one image can use several threads; what tasks share is added up afterwards.
extern "C" void selective_scan_backward(i64 K, i64 B, i64 P, i64 E, i64 N, const float* x, const float* dt,
                                        const float* A, const float* Bm, const float* Cm, i64 ld, const float* D,
                                        const float* dt_bias, const float* ds, i64 shared_ds, float* dx, float* ddt,
                                        float* dA, float* dB, float* dC, float* dD, float* ddt_bias) {
    const Scan call{K, B, P, E, N, ld, x, dt, A, Bm, Cm, D, dt_bias};
    const i64 wide = 128, cuts = (E + wide - 1) / wide, stretches = (P + STEP - 1) / STEP, KBPN = K * B * P * N;
    const Slots slots(B, K * whole(E) * (N + 2), 16);                   // images; [K] blocked rows: dA, dD, ddt_bias
    float* partial = scratch<SPLIT>(cuts * 2 * KBPN);
    parallel(K * slots.count * cuts, K * B * P * E * N, [&](i64 task) {
        const i64 k = task / (slots.count * cuts), slot = task / cuts % slots.count, cut = task % cuts;
        const i64 e0 = cut * wide, e1 = std::min(e0 + wide, E), own_states = whole(e1 - e0) * N;
        float *rows = scratch<TASK>(own_states * (2 + stretches) + N * 2 * STEP * W), *dh = rows + own_states;
        float *check = dh + own_states, *lanes = check + own_states * stretches;
        float* sums = slots.sums + slot * slots.floats + (k * whole(E) + e0) * (N + 2);
        std::fill(sums, sums + whole(e1 - e0) * (N + 2), 0.f);
        for (i64 e = e0; e < e1; e += W) call.pack_A(k, e, rows + (e - e0) * N);
        const auto local = [&](At at, i64 rows) { return At{at.e - e0, at.block - e0}.in(rows); };
        for (i64 b = slots.begin(slot); b < slots.begin(slot + 1); b++) {
            const Scan run = call.of(k, b);
            const float* ds_ = ds + (shared_ds ? b * P : run.image) * E;
            std::fill(dh, dh + 2 * own_states, 0.f);                    // and the first checkpoint
            for (i64 j = 0; j + 1 < stretches; j++)
                channels(e0, e1, EACH {
                    using V = decltype(lane);
                    V delta[STEP], u[STEP];
                    run.drive(j * STEP, STEP, at.e, delta, u);
                    states(N, [&](auto size, i64 n) __attribute__((always_inline)) {
                        constexpr int M = decltype(size)::value;
                        const i64 own = local(at, N) + n * W;
                        V a[M], h[M];
                        load_rows<M>(rows + own, a);
                        load_rows<M>(check + j * own_states + own, h);
                        run.advance<M>(n, j * STEP, STEP, a, delta, u, h, [](i64, int, V, V) {});
                        store_rows<M>(check + (j + 1) * own_states + own, h);
                    });
                });
            for (i64 j = stretches - 1; j >= 0; j--) {
                const i64 from = j * STEP, count = std::min(STEP, P - from);
                std::fill(lanes, lanes + N * 2 * STEP * W, 0.f);
                channels(e0, e1, EACH {
                    using V = decltype(lane);
                    V delta[STEP], u[STEP], dy[STEP], du[STEP], ddelta[STEP], d_D{}, d_bias{};
                    float* own_sums = sums + local(at, N + 2);
                    run.drive(from, count, at.e, delta, u);
                    for (i64 i = 0; i < count; i++) {
                        dy[i] = load<V>(ds_ + run.at(from + i) * E + at.e);
                        du[i] = ddelta[i] = V{};
                    }
                    states(N, [&](auto size, i64 n) __attribute__((always_inline)) {
                        constexpr int M = decltype(size)::value;
                        const i64 own = local(at, N) + n * W, row = run.at(from) * ld + n;
                        float *lane_B = lanes + n * 2 * STEP * W + at.e - at.block, *lane_C = lane_B + M * STEP * W;
                        V A_[M], now[M], g[M], dA_[M], a[STEP + 1][M], h[STEP + 1][M];
                        load_rows<M>(rows + own, A_);
                        load_rows<M>(check + j * own_states + own, now);
                        load_rows<M>(dh + own, g);
                        load_rows<M>(own_sums + n * W, dA_);
                        for (int m = 0; m < M; m++) h[0][m] = now[m], a[count][m] = fill<V>(1.f);
                        run.advance<M>(n, from, count, A_, delta, u, now, [&](i64 i, int m, V decay, V state) {
                            a[i][m] = decay;
                            h[i + 1][m] = state;
                        });
                        for (i64 i = count - 1; i >= 0; i--) {
                            const float *B = run.Bm + row + i * run.stride, *C = run.Cm + row + i * run.stride;
                            FULLY for (int m = 0; m < M; m++) {
                                g[m] = a[i + 1][m] * g[m] + dy[i] * C[m];        // the gradient of h[i + 1]
                                add_to(lane_C + (i * M + m) * W, dy[i] * h[i + 1][m]);
                                add_to(lane_B + (i * M + m) * W, g[m] * u[i]);
                                du[i] += g[m] * B[m];
                                V q = a[i][m] * g[m] * h[i][m];
                                ddelta[i] += q * A_[m];
                                dA_[m] += q * delta[i];
                            }
                        }
                        for (int m = 0; m < M; m++) g[m] *= a[0][m];
                        store_rows<M>(dh + own, g);
                        store_rows<M>(own_sums + n * W, dA_);
                    });
                    for (i64 i = 0; i < count; i++) {
                        const i64 place = run.at(from + i) * E + at.e;
                        V x = load<V>(run.x + place), z = load<V>(run.dt + place), d_x = du[i] * delta[i];
                        if (dt_bias) z += load<V>(run.bias + at.e);
                        V dz = (LN2 * ddelta[i] + du[i] * x) * sigmoid2(z * -LOG2E);
                        if (D) d_x += load<V>(run.D + at.e) * dy[i];
                        d_D += dy[i] * x;
                        d_bias += dz;
                        store(dx + run.image * E + place, d_x);
                        store(ddt + run.image * E + place, dz);
                    }
                    add_to(own_sums + N * W, d_D);
                    add_to(own_sums + (N + 1) * W, d_bias);
                });
                states(N, [&](auto size, i64 n) {
                    constexpr int M = decltype(size)::value;
                    for (int which = 0; which < 2; which++)
                        for (i64 i = 0; i < count; i++)
                            for (int m = 0; m < M; m++)
                                partial[(cut * 2 + which) * KBPN + (run.image + run.at(from + i)) * N + n + m] =
                                    lane_sum(lanes + (n * 2 * STEP + which * M * STEP + i * M + m) * W);
                });
            }
        }
    });
    parallel(2 * K * B, KBPN * cuts / 4, [&](i64 i) {
        const i64 which = i / (K * B), at = i % (K * B) * P * N;
        add_rows(partial + which * KBPN + at, cuts, 2 * KBPN, P * N, (which ? dC : dB) + at);
    });
    const float* total = slots.total();
    for (i64 k = 0; k < K; k++)
        for (i64 e = 0; e < E; e++) {
            const float* row = total + k * whole(E) * (N + 2) + place(e).in(N + 2);
            for (i64 n = 0; n < N; n++) dA[(k * E + e) * N + n] = row[n * W];
            if (dD) dD[k * E + e] = row[N * W];
            if (ddt_bias) ddt_bias[k * E + e] = row[(N + 1) * W];
        }
}

// ---------------------------------------------------------------------------------------------------------------------
// 8. add_norm: bound by memory. A row is read once and stays in the first cache for mean, variance and norm.

constexpr i64 ROWS_A_TASK = 32;

struct Stats { float mean, scale; };

// From the sum of a row, or, for RMSNorm, whose mean counts as 0, of its squares
INLINE Stats statistics(i64 D, const float* r, bool layer, const Sum& sum) {
    if (!layer) return {0, 1 / std::sqrt(sum.total() / D + 1e-5f)};
    const float mean = sum.total() / D;
    Sum square;
    channels(D, EACH {
        auto d = load<decltype(lane)>(r + at.e) - mean;
        square.add(d * d);
    });
    return {mean, 1 / std::sqrt(square.total() / D + 1e-5f)};
}

extern "C" void add_norm(i64 dtype, i64 rows, i64 D, const void* hidden, const float* residual, const float* weight,
                         const float* bias, void* u, float* out) {
    by_type(dtype, [&](auto type) {
        using T = decltype(type);
        parallel((rows + ROWS_A_TASK - 1) / ROWS_A_TASK, rows * D / 2, [&](i64 task) {
            float* own = scratch<TASK>(D);
            for (i64 i = task * ROWS_A_TASK; i < std::min((task + 1) * ROWS_A_TASK, rows); i++) {
                const T* add = hidden ? (const T*)hidden + i * D : nullptr;
                float* r = out ? out + i * D : own;
                Sum sum;
                channels(D, EACH {
                    using V = decltype(lane);
                    V v = residual ? load<V>(residual + i * D + at.e) : load<V>(add + at.e);
                    if (residual && hidden) v += load<V>(add + at.e);
                    store(r + at.e, v);
                    sum.add(bias ? v : v * v);
                });
                const Stats s = statistics(D, r, bias, sum);
                channels(D, EACH {
                    using V = decltype(lane);
                    V n = (load<V>(r + at.e) - s.mean) * s.scale * load<V>(weight + at.e);
                    store((T*)u + i * D + at.e, bias ? n + load<V>(bias + at.e) : n);
                });
            }
        });
    });
}

extern "C" void add_norm_backward(i64 dtype, i64 rows, i64 D, const float* r, const float* weight, i64 has_bias,
                                  const void* du, const float* dout, float* dr, void* dhidden, float* dweight,
                                  float* dbias) {
    const Slots slots((rows + ROWS_A_TASK - 1) / ROWS_A_TASK, 2 * whole(D));        // blocked rows: dweight, dbias
    by_type(dtype, [&](auto type) {
        using T = decltype(type);
        slots.run(rows * D, [&](i64 task, float* sums) {
            for (i64 i = task * ROWS_A_TASK; i < std::min((task + 1) * ROWS_A_TASK, rows); i++) {
                const float* row = r + i * D;
                const T* du_ = (const T*)du + i * D;
                Sum sum, sum1, sum2;
                channels(D, EACH {
                    auto v = load<decltype(lane)>(row + at.e);
                    sum.add(has_bias ? v : v * v);
                });
                const Stats s = statistics(D, row, has_bias, sum);
                channels(D, EACH {
                    using V = decltype(lane);
                    V xhat = (load<V>(row + at.e) - s.mean) * s.scale, d = load<V>(du_ + at.e);
                    add_to(sums + at.in(2), d * xhat);
                    add_to(sums + at.in(2) + W, d);
                    d *= load<V>(weight + at.e);
                    sum1.add(d);
                    sum2.add(d * xhat);
                });
                const float mean1 = has_bias ? sum1.total() / D : 0, mean2 = sum2.total() / D;
                channels(D, EACH {
                    using V = decltype(lane);
                    V xhat = (load<V>(row + at.e) - s.mean) * s.scale, d = load<V>(du_ + at.e);
                    d = (d * load<V>(weight + at.e) - mean1 - xhat * mean2) * s.scale;
                    if (dout) d += load<V>(dout + i * D + at.e);
                    store(dr + i * D + at.e, d);
                    if (dhidden) store((T*)dhidden + i * D + at.e, d);
                });
            }
        });
    });
    const float* total = slots.total();
    for (i64 e = 0; e < D; e++) {
        dweight[e] = total[place(e).in(2)];
        if (dbias) dbias[e] = total[place(e).in(2) + W];
    }
}
