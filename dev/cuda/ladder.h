// What both ladders need: launching, arrays on both sides, checking a rung and timing it.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#ifndef FASTVIM_EMULATE                     // tests/cuda_emulator.h has these for g++
#include <cuda_runtime.h>
#define LAUNCH(kernel, blocks, threads, ...) kernel<<<blocks, threads>>>(__VA_ARGS__)
#endif

#define CHECK(call) check(call, #call, __LINE__)

inline void check(cudaError_t error, const char* what, int line) {
    if (error == cudaSuccess) return;
    fprintf(stderr, "line %d: %s: %s\n", line, what, cudaGetErrorString(error));
    exit(2);
}

// The same floats on the CPU and on the GPU, random between low and high at first
struct Array {
    std::vector<float> host;
    float* device = nullptr;

    Array(int64_t n, float low, float high) : host(n) {
        for (float& x : host) x = low + (high - low) * float(rand()) / float(RAND_MAX);
        CHECK(cudaMalloc(&device, n * sizeof(float)));
        CHECK(cudaMemcpy(device, host.data(), n * sizeof(float), cudaMemcpyHostToDevice));
    }
    ~Array() { cudaFree(device); }
    Array(const Array&) = delete;

    void poison() { CHECK(cudaMemset(device, 0xff, host.size() * sizeof(float))); }     // NaN
    void download() {
        const size_t bytes = host.size() * sizeof(float);
        CHECK(cudaMemcpy(host.data(), device, bytes, cudaMemcpyDeviceToHost));
    }
};

// The largest error, relative to the largest value; infinite where a value is missing
inline double error_of(const std::vector<float>& actual, const std::vector<double>& expected) {
    double error = 0, scale = 1e-30;
    for (size_t i = 0; i < expected.size(); ++i) {
        if (!std::isfinite(actual[i])) return INFINITY;
        error = std::fmax(error, std::fabs(actual[i] - expected[i]));
        scale = std::fmax(scale, std::fabs(expected[i]));
    }
    return error / scale;
}

// Runs a rung, compares what it wrote with the CPU's numbers, and prints its time, and its rate if
// `bytes` are what no version can avoid to move. -> are its numbers right?
template <class F>
bool climb(const char* name, Array& output, const std::vector<double>& expected, double bytes,
           F run) {
    output.poison();
    run();
    CHECK(cudaGetLastError());
    output.download();
    const double error = error_of(output.host, expected);
    const int repeats = 20;
    cudaEvent_t begin, end;
    CHECK(cudaEventCreate(&begin));
    CHECK(cudaEventCreate(&end));
    CHECK(cudaEventRecord(begin));
    for (int i = 0; i < repeats; ++i) run();
    CHECK(cudaEventRecord(end));
    CHECK(cudaEventSynchronize(end));
    float ms = 0;
    CHECK(cudaEventElapsedTime(&ms, begin, end));
    CHECK(cudaEventDestroy(begin));
    CHECK(cudaEventDestroy(end));
    const bool right = error < 1e-5;
    const double us = 1e3 * ms / repeats;
    printf("    %-52s error %.0e %s  ", name, error, right ? "   " : "BAD");
    if (us > 0) printf("%9.1f us %7.0f GB/s\n", us, bytes / us / 1e3);
    else printf("  n/a (emulated)\n");
    return right;
}
