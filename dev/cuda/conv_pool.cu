// conv_pool, one trick at a time: x -> causal convolution of width 4 in both directions -> silu ->
// mean over the w tokens of each scan step. What it teaches: a memory-bound kernel is as fast as
// its loads are few, wide and early.
//
//     nvcc -O3 conv_pool.cu -o conv_pool && ./conv_pool           # two sizes
//     ./conv_pool 32 64 64 384                                    # b p w e
//
// rung  what it changes                                   why it should be faster
//    1  a launch per direction, a thread per channel      coalesced already: channels are innermost
//    2  both directions in one launch, x in registers     one load a position, not eight
//    3  four channels a thread                            16-byte loads, a quarter of the addresses
//    4  four positions a turn                             four loads in flight, no shifting between
//    5  several walkers a step, added up by a second      2-D pooling and small batches: enough
//       kernel                                            threads to fill the chip
//
// x [b][p w][e], weight [2][e][4], bias [2][e], pooled [2][b][p][e]; e a multiple of 4.
// scan_cuda.cu has the same with any walk, holes, max pooling and 16-bit activations. GB/s count x
// and pooled once: what no version can avoid.
#include "ladder.h"

struct Sizes {
    int b, p, w, e;
    __host__ __device__ int l() const { return p * w; }
};

__device__ float silu(float x) { return x / (1 + __expf(-x)); }

// ---- rung 1

__global__ void conv_pool_naive(Sizes n, const float* x, const float* weight, const float* bias,
                                float* pooled, int k) {
    const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    const int ch = int(i % n.e), g = int(i / n.e % n.p), image = int(i / n.e / n.p);
    if (image >= n.b) return;
    x += int64_t(image) * n.l() * n.e + ch;
    const float* taps = weight + (k * n.e + ch) * 4;
    float sum = 0;
    for (int t = g * n.w; t < (g + 1) * n.w; ++t) {
        float c = bias[k * n.e + ch];
        for (int j = 0; j < 4; ++j) {
            const int at = k ? t + j : t - j;               // the neighbours behind, or those ahead
            if (at >= 0 && at < n.l()) c += taps[3 - j] * x[int64_t(at) * n.e];
        }
        sum += silu(c);
    }
    pooled[int64_t(k) * n.b * n.p * n.e + i] = sum / float(n.w);
}

// ---- rung 2

__device__ float x_at(const Sizes& n, const float* x, int t) {
    return t >= 0 && t < n.l() ? x[int64_t(t) * n.e] : 0;
}

__global__ void conv_pool_both(Sizes n, const float* x, const float* weight, const float* bias,
                               float* pooled) {
    const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    const int ch = int(i % n.e), g = int(i / n.e % n.p), image = int(i / n.e / n.p);
    if (image >= n.b) return;
    x += int64_t(image) * n.l() * n.e + ch;
    float taps[2][4], near[7], sum[2] = {0, 0};             // near[3 + j]: position t + j
    for (int k = 0; k < 2; ++k)
        for (int j = 0; j < 4; ++j) taps[k][j] = weight[(k * n.e + ch) * 4 + 3 - j];
    for (int j = 0; j < 6; ++j) near[j + 1] = x_at(n, x, g * n.w - 3 + j);
    for (int t = g * n.w; t < (g + 1) * n.w; ++t) {
        for (int j = 0; j < 6; ++j) near[j] = near[j + 1];
        near[6] = x_at(n, x, t + 3);                        // the only load of the turn
        for (int k = 0; k < 2; ++k) {
            float c = bias[k * n.e + ch];
            for (int j = 0; j < 4; ++j) c += taps[k][j] * near[k ? 3 + j : 3 - j];
            sum[k] += silu(c);
        }
    }
    const int64_t direction = int64_t(n.b) * n.p * n.e;
    for (int k = 0; k < 2; ++k) pooled[k * direction + i] = sum[k] / float(n.w);
}

// ---- rung 3

struct alignas(16) Four {
    float v[4];
};

__device__ Four four_at(const Sizes& n, const float* x, int t) {
    if (t < 0 || t >= n.l()) return Four{{0, 0, 0, 0}};
    return *reinterpret_cast<const Four*>(x + int64_t(t) * n.e);
}

// taps and near as in rung 2, near at the position itself; adds silu(c) to sum
__device__ void add_silu(Four& sum, Four c, const Four (&taps)[4], const Four* near, bool ahead) {
    for (int j = 0; j < 4; ++j)
        for (int i = 0; i < 4; ++i) c.v[i] += taps[j].v[i] * near[ahead ? j : -j].v[i];
    for (int i = 0; i < 4; ++i) sum.v[i] += silu(c.v[i]);
}

__device__ void load_taps(const Sizes& n, const float* weight, const float* bias, int ch,
                          Four (&taps)[2][4], Four (&biases)[2]) {
    for (int k = 0; k < 2; ++k) {
        for (int i = 0; i < 4; ++i) {
            const Four w = *reinterpret_cast<const Four*>(weight + (k * n.e + ch + i) * 4);
            for (int j = 0; j < 4; ++j) taps[k][j].v[i] = w.v[3 - j];
        }
        biases[k] = *reinterpret_cast<const Four*>(bias + k * n.e + ch);
    }
}

__device__ void store_mean(const Sizes& n, float* pooled, Four sum, int64_t at) {
    for (int i = 0; i < 4; ++i) sum.v[i] /= float(n.w);
    *reinterpret_cast<Four*>(pooled + at) = sum;
}

__global__ void conv_pool_wide(Sizes n, const float* x, const float* weight, const float* bias,
                               float* pooled) {
    const int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * 4;
    const int ch = int(i % n.e), g = int(i / n.e % n.p), image = int(i / n.e / n.p);
    if (image >= n.b) return;
    x += int64_t(image) * n.l() * n.e + ch;
    Four taps[2][4], biases[2], near[7], sum[2] = {};
    load_taps(n, weight, bias, ch, taps, biases);
    for (int j = 0; j < 6; ++j) near[j + 1] = four_at(n, x, g * n.w - 3 + j);
    for (int t = g * n.w; t < (g + 1) * n.w; ++t) {
        for (int j = 0; j < 6; ++j) near[j] = near[j + 1];
        near[6] = four_at(n, x, t + 3);
        for (int k = 0; k < 2; ++k) add_silu(sum[k], biases[k], taps[k], near + 3, k);
    }
    const int64_t direction = int64_t(n.b) * n.p * n.e;
    for (int k = 0; k < 2; ++k) store_mean(n, pooled, sum[k], k * direction + i);
}

// ---- rungs 4 and 5: each of `slices` walkers takes a part of the step's positions, and writes its
// own share of the mean, [slices][2][b][p][e]

__global__ void conv_pool_turns(Sizes n, const float* x, const float* weight, const float* bias,
                                float* parts, int slices) {
    const int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * 4;
    const int64_t direction = int64_t(n.b) * n.p * n.e, at = i % direction;
    const int slice = int(i / direction);
    const int ch = int(at % n.e), g = int(at / n.e % n.p), image = int(at / n.e / n.p);
    if (slice >= slices) return;
    x += int64_t(image) * n.l() * n.e + ch;
    const int first = g * n.w + int(int64_t(n.w) * slice / slices);
    const int last = g * n.w + int(int64_t(n.w) * (slice + 1) / slices);
    Four taps[2][4], biases[2], near[10], sum[2] = {};      // near[3 + j]: position t + j
    load_taps(n, weight, bias, ch, taps, biases);
    for (int j = 0; j < 6; ++j) near[j + 4] = four_at(n, x, first - 3 + j);
    for (int t = first; t < last; t += 4) {
        for (int j = 0; j < 6; ++j) near[j] = near[j + 4];
#pragma unroll
        for (int j = 6; j < 10; ++j) near[j] = four_at(n, x, t - 3 + j);
#pragma unroll
        for (int u = 0; u < 4; ++u) {
            if (t + u >= last) break;
            for (int k = 0; k < 2; ++k) add_silu(sum[k], biases[k], taps[k], near + 3 + u, k);
        }
    }
    for (int k = 0; k < 2; ++k)
        store_mean(n, parts, sum[k], (int64_t(slice) * 2 + k) * direction + at);
}

__global__ void add_parts(const float* parts, float* pooled, int slices, int64_t size) {
    const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= size) return;
    float sum = 0;
    for (int slice = 0; slice < slices; ++slice) sum += parts[slice * size + i];
    pooled[i] = sum;
}

// ---- the specification, and the climb

std::vector<double> conv_pool_cpu(const Sizes& n, const Array& x, const Array& weight,
                                  const Array& bias) {
    std::vector<double> pooled(int64_t(2) * n.b * n.p * n.e);
    for (int64_t i = 0; i < int64_t(pooled.size()); ++i) {
        const int ch = int(i % n.e), g = int(i / n.e % n.p), image = int(i / n.e / n.p % n.b);
        const int k = int(i / n.e / n.p / n.b);
        for (int t = g * n.w; t < (g + 1) * n.w; ++t) {
            double c = bias.host[k * n.e + ch];
            for (int j = 0; j < 4; ++j) {
                const int at = k ? t + j : t - j;
                if (at < 0 || at >= n.l()) continue;
                const double value = x.host[(int64_t(image) * n.l() + at) * n.e + ch];
                c += weight.host[(k * n.e + ch) * 4 + 3 - j] * value;
            }
            pooled[i] += c / (1 + std::exp(-c)) / n.w;
        }
    }
    return pooled;
}

bool climb_all(const Sizes& n) {
    const int64_t size = int64_t(2) * n.b * n.p * n.e;
    const int slices = std::max(1, std::min(n.w / 16, int(400'000 / (size / 8) + 1)));
    const Array x(int64_t(n.b) * n.l() * n.e, -2, 2), weight(n.e * 8, -1, 1), bias(n.e * 2, -1, 1);
    Array pooled(size, 0, 0), parts(size * slices, 0, 0);
    const std::vector<double> expected = conv_pool_cpu(n, x, weight, bias);
    const double bytes = 4.0 * double(x.host.size() + size);
    auto blocks = [](int64_t threads) { return unsigned((threads + 127) / 128); };
    auto rung = [&](const char* name, auto run) {
        return climb(name, pooled, expected, bytes, run);
    };
    printf("conv_pool: b %d, p %d, w %d, e %d\n", n.b, n.p, n.w, n.e);
    const float *in = x.device, *w = weight.device, *b = bias.device;
    bool right = rung("1 a launch per direction", [&] {
        for (int k = 0; k < 2; ++k)
            LAUNCH(conv_pool_naive, blocks(size / 2), 128, n, in, w, b, pooled.device, k);
    });
    right &= rung("2 both directions in one launch", [&] {
        LAUNCH(conv_pool_both, blocks(size / 2), 128, n, in, w, b, pooled.device);
    });
    right &= rung("3 four channels a thread", [&] {
        LAUNCH(conv_pool_wide, blocks(size / 8), 128, n, in, w, b, pooled.device);
    });
    right &= rung("4 four positions a turn", [&] {
        LAUNCH(conv_pool_turns, blocks(size / 8), 128, n, in, w, b, pooled.device, 1);
    });
    const std::string name = "5 " + std::to_string(slices) + " walkers a step, two stages";
    return right & rung(name.c_str(), [&] {
        LAUNCH(conv_pool_turns, blocks(size / 8 * slices), 128, n, in, w, b, parts.device, slices);
        LAUNCH(add_parts, blocks(size), 128, parts.device, pooled.device, slices, size);
    });
}

int main(int argc, char** argv) {
    if (argc == 1) {
        const bool large = climb_all({32, 64, 64, 384});
        const bool few_steps = climb_all({1, 3, 4096, 384});
        return large && few_steps ? 0 : 1;
    }
    if (argc != 5 || atoi(argv[4]) % 4) {
        fprintf(stderr, "usage: %s [b p w e], e a multiple of 4\n", argv[0]);
        return 2;
    }
    return climb_all({atoi(argv[1]), atoi(argv[2]), atoi(argv[3]), atoi(argv[4])}) ? 0 : 1;
}
