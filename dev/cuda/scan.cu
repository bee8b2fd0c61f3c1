// The selective scan, one trick at a time. What it teaches: a recurrence is not parallel in time,
// but it is in channels and states, and linear, so that pieces of it can run side by side and be
// joined.
//
//     nvcc -O3 -ftz=true scan.cu -o scan && ./scan                # two sizes
//     ./scan 128 64 384                                           # b p e
//
// rung  what it changes                                   why it should be faster
//    1  a thread per channel, one state after another     the recurrence, as it is written
//    2  all 16 states in registers, B and C in shared     x, dt, s move once, not 16 times; B and C
//       memory, 8 steps' loads together                   once for all channels of a block
//    3  chunks of the sequence side by side, in three     long sequences and small batches: chunks
//       phases                                            times the threads, twice the arithmetic
//
//     delta = softplus(dt);  h_t = exp(delta A) h_{t-1} + delta B_t x_t;  s_t = C_t h_t
//
// x, dt, s [b][p][e], A [e][16], B, C [b][p][16]. scan_cuda.cu adds D, the bias of dt, both
// directions, other numbers of states, and the backward. GB/s count x, dt, s, B and C once.
#include "ladder.h"

constexpr int N = 16;                       // states
constexpr int SEGMENT = 8;                  // steps whose loads are in flight together
constexpr int THREADS = 64;

struct Sizes {
    int b, p, e;
};
struct Scan {
    Sizes n;
    const float *x, *dt, *A, *B, *C;
    float* s;
    int chunk;                              // steps of a chunk
    float *state, *decay;                   // [chunks][b][N][e], [chunks][b][e]
};

__device__ float softplus(float x) { return x > 20 ? x : log1pf(expf(x)); }

// ---- rung 1

__global__ void scan_naive(Scan q) {
    const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    const int ch = int(i % q.n.e), image = int(i / q.n.e);
    if (image >= q.n.b) return;
    for (int state = 0; state < N; ++state) {
        float h = 0;
        for (int t = 0; t < q.n.p; ++t) {
            const int64_t row = int64_t(image) * q.n.p + t, at = row * q.n.e + ch;
            const float delta = softplus(q.dt[at]);
            h = expf(delta * q.A[ch * N + state]) * h + delta * q.B[row * N + state] * q.x[at];
            q.s[at] = q.C[row * N + state] * h + (state ? q.s[at] : 0);
        }
    }
}

// ---- rung 2

// B and C of SEGMENT steps from t on, for all channels of the block
__device__ void stage(const Scan& q, int image, int t, int last, float (*B)[N], float (*C)[N]) {
    __syncthreads();                        // nobody reads the last segment's any more
    for (int j = threadIdx.x; j < SEGMENT * N; j += THREADS) {
        const bool here = t + j / N < last;
        const int64_t at = (int64_t(image) * q.n.p + t) * N + j;
        B[j / N][j % N] = here ? q.B[at] : 0;
        C[j / N][j % N] = here ? q.C[at] : 0;
    }
    __syncthreads();
}

__global__ void scan_registers(Scan q) {
    __shared__ float B[SEGMENT][N], C[SEGMENT][N];
    const int tiles = (q.n.e + THREADS - 1) / THREADS;
    const int ch = blockIdx.x % tiles * THREADS + threadIdx.x, image = blockIdx.x / tiles;
    const bool live = ch < q.n.e;           // idle threads still help with B and C
    float h[N], A[N];
    for (int n = 0; n < N; ++n) {
        h[n] = 0;
        A[n] = live ? q.A[ch * N + n] : 0;
    }
    for (int t = 0; t < q.n.p; t += SEGMENT) {
        const int64_t first = (int64_t(image) * q.n.p + t) * q.n.e + ch;
        float x[SEGMENT], dt[SEGMENT];
#pragma unroll
        for (int j = 0; j < SEGMENT; ++j) {
            const bool here = live && t + j < q.n.p;
            x[j] = here ? q.x[first + int64_t(j) * q.n.e] : 0;
            dt[j] = here ? q.dt[first + int64_t(j) * q.n.e] : 0;
        }
        stage(q, image, t, q.n.p, B, C);
#pragma unroll
        for (int j = 0; j < SEGMENT; ++j) {
            if (!live || t + j >= q.n.p) break;
            const float delta = softplus(dt[j]);
            float s = 0;
#pragma unroll
            for (int n = 0; n < N; ++n) {
                h[n] = __expf(delta * A[n]) * h[n] + delta * x[j] * B[j][n];
                s += C[j][n] * h[n];
            }
            q.s[first + int64_t(j) * q.n.e] = s;
        }
    }
}

// ---- rung 3. Phase 1 (LOCAL) runs every chunk as if it began with h = 0, and leaves its last h
// and the sum of delta: over the whole chunk the state decays by exp(A sum(delta)). Phase 2 goes
// from chunk to chunk with these. Phase 3 is phase 1 again, from the right beginning, and writes s.

template <bool LOCAL> __global__ void scan_chunk(Scan q) {
    __shared__ float B[SEGMENT][N], C[SEGMENT][N];
    const int tiles = (q.n.e + THREADS - 1) / THREADS;
    const int ch = blockIdx.x % tiles * THREADS + threadIdx.x;
    const int image = blockIdx.x / tiles % q.n.b, chunk = blockIdx.x / tiles / q.n.b;
    const int begin = chunk * q.chunk, end = min(q.n.p, begin + q.chunk);
    const int64_t slot = int64_t(chunk) * q.n.b + image;
    const bool live = ch < q.n.e;
    float h[N], A[N], sum = 0;
    for (int n = 0; n < N; ++n) {
        h[n] = live && !LOCAL ? q.state[(slot * N + n) * q.n.e + ch] : 0;
        A[n] = live ? q.A[ch * N + n] : 0;
    }
    for (int t = begin; t < end; t += SEGMENT) {
        const int64_t first = (int64_t(image) * q.n.p + t) * q.n.e + ch;
        float x[SEGMENT], dt[SEGMENT];
#pragma unroll
        for (int j = 0; j < SEGMENT; ++j) {
            const bool here = live && t + j < end;
            x[j] = here ? q.x[first + int64_t(j) * q.n.e] : 0;
            dt[j] = here ? q.dt[first + int64_t(j) * q.n.e] : 0;
        }
        stage(q, image, t, end, B, C);
#pragma unroll
        for (int j = 0; j < SEGMENT; ++j) {
            if (!live || t + j >= end) break;
            const float delta = softplus(dt[j]);
            float s = 0;
#pragma unroll
            for (int n = 0; n < N; ++n) {
                h[n] = __expf(delta * A[n]) * h[n] + delta * x[j] * B[j][n];
                if (!LOCAL) s += C[j][n] * h[n];
            }
            sum += delta;
            if (!LOCAL) q.s[first + int64_t(j) * q.n.e] = s;
        }
    }
    if (!LOCAL || !live) return;
    for (int n = 0; n < N; ++n) q.state[(slot * N + n) * q.n.e + ch] = h[n];
    q.decay[slot * q.n.e + ch] = sum;
}

// Phase 2, a thread per state: from what every chunk adds to what every chunk begins with
__global__ void carry(Scan q, int chunks) {
    const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    const int ch = int(i % q.n.e), n = int(i / q.n.e % N), image = int(i / q.n.e / N);
    if (image >= q.n.b) return;
    float h = 0;
    for (int chunk = 0; chunk < chunks; ++chunk) {
        const int64_t slot = int64_t(chunk) * q.n.b + image;
        float* state = q.state + (slot * N + n) * q.n.e + ch;
        const float own = *state;
        *state = h;
        h = __expf(q.decay[slot * q.n.e + ch] * q.A[ch * N + n]) * h + own;
    }
}

// ---- the specification, and the climb

std::vector<double> scan_cpu(const Sizes& n, const Array& x, const Array& dt, const Array& A,
                             const Array& B, const Array& C) {
    std::vector<double> s(x.host.size());
    for (int image = 0; image < n.b; ++image) {
        for (int ch = 0; ch < n.e; ++ch) {
            double h[N] = {};
            for (int t = 0; t < n.p; ++t) {
                const int64_t row = int64_t(image) * n.p + t, at = row * n.e + ch;
                const double delta = std::log1p(std::exp(double(dt.host[at])));
                for (int i = 0; i < N; ++i) {
                    const double drive = delta * B.host[row * N + i] * x.host[at];
                    h[i] = std::exp(delta * A.host[ch * N + i]) * h[i] + drive;
                    s[at] += C.host[row * N + i] * h[i];
                }
            }
        }
    }
    return s;
}

bool climb_all(const Sizes& n) {
    const int64_t rows = int64_t(n.b) * n.p, size = rows * n.e, channels = int64_t(n.b) * n.e;
    const int tiles = (n.e + THREADS - 1) / THREADS;
    const int64_t fill = 132 * 1024 / channels;     // chunks that fill an H100
    const int wanted = int(std::max<int64_t>(1, std::min<int64_t>(n.p / 16, fill)));
    const int segments = (n.p + wanted * SEGMENT - 1) / (wanted * SEGMENT);
    const int chunk = segments * SEGMENT, chunks = (n.p + chunk - 1) / chunk;
    const Array x(size, -1, 1), dt(size, -4, 1), A(n.e * N, -2, 0), B(rows * N, -1, 1);
    const Array C(rows * N, -1, 1);
    const Array state(chunks * channels * N, 0, 0), decay(chunks * channels, 0, 0);
    Array s(size, 0, 0);
    const std::vector<double> expected = scan_cpu(n, x, dt, A, B, C);
    const double bytes = 4.0 * double(3 * size + 2 * rows * N);
    const Scan q{n,        x.device, dt.device,    A.device,    B.device, C.device,
                 s.device, chunk,    state.device, decay.device};
    auto blocks = [](int64_t threads) { return unsigned((threads + 127) / 128); };
    printf("scan: b %d, p %d, e %d\n", n.b, n.p, n.e);
    bool right = climb("1 one state after another", s, expected, bytes, [&] {
        LAUNCH(scan_naive, blocks(channels), 128, q);
    });
    right &= climb("2 states in registers, B and C shared", s, expected, bytes, [&] {
        LAUNCH(scan_registers, unsigned(tiles * n.b), THREADS, q);
    });
    const std::string name = "3 " + std::to_string(chunks) + " chunks side by side";
    return right & climb(name.c_str(), s, expected, bytes, [&] {
        LAUNCH(scan_chunk<true>, unsigned(tiles * n.b * chunks), THREADS, q);
        LAUNCH(carry, blocks(channels * N), 128, q, chunks);
        LAUNCH(scan_chunk<false>, unsigned(tiles * n.b * chunks), THREADS, q);
    });
}

int main(int argc, char** argv) {
    if (argc == 1) {
        const bool large = climb_all({128, 64, 384});
        const bool long_sequence = climb_all({1, 4096, 384});
        return large && long_sequence ? 0 : 1;
    }
    if (argc != 4) {
        fprintf(stderr, "usage: %s [b p e]\n", argv[0]);
        return 2;
    }
    return climb_all({atoi(argv[1]), atoi(argv[2]), atoi(argv[3])}) ? 0 : 1;
}
