// scan.h: the arguments of every operation, in one place. scan_cpu.cpp and scan_cuda.cu implement them, scan_cuda.cpp
// and fastvim_kernels.py call them; Python reads the structures from this text, so no list of arguments is kept twice.
//
// All fields are 8 bytes: whole numbers, or pointers to contiguous arrays whose last axis is the channels.
//     void      activations, of the type `dtype`: 0 float32, 1 bfloat16, 2 float16
//     float     everything else
// A pointer may be null where "or null" is said. Functions trust their arguments, allocate nothing that they return,
// overwrite every output, and return 0 or an error of CUDA.
//
// b images   l tokens (positions of the walk)   p scan steps   e inner channels   n states   d embed_dim
// k the two directions, 0 forward, 1 backward
#pragma once
#include <stdint.h>

// How a layer walks the tokens of an image and which of them a scan step pools.
struct Walk {
    int64_t rows;                               // of the tables: b, or 1 if all images walk alike
    const int32_t *token, *group;               // [rows][l] position -> token; position -> its step, -1 for a hole
    const float *weight;                        // [rows][l] factor of a position in the mean of its step
    const int32_t *member, *start;              // [rows][l] positions by step, ascending, holes last; [rows][p + 1]:
};                                              //     step g owns member[start[g]] .. member[start[g + 1] - 1]

struct Sizes { int64_t dtype, b, l, p, e; };

// out = residual + hidden;  u = norm(out), LayerNorm if there is a bias, else RMSNorm
struct AddNorm {
    int64_t dtype, rows, d;
    const void *hidden;                         // [rows][d] or null: then out is null too
    const float *residual, *weight, *bias;      // [rows][d], [d], [d] or null
    void *u;
    float *out;
};
struct AddNormBackward {
    int64_t dtype, rows, d, centred;            // centred: LayerNorm
    const float *residual, *weight;             // what add_norm returned as out
    const void *du;
    const float *dout;                          // or null
    float *dresidual;                           // the gradient of residual and, in float32, of hidden
    void *dhidden;                              // the same in 16 bits, or null
    float *dweight, *dbias;                     // dbias or null
};

// c = silu(conv(x)) in both directions;  pooled [k][b][p][e] = mean or maximum of c over each step
struct ConvPool {
    Sizes n;
    Walk walk;
    int64_t max;
    const void *xz;                             // [b][l][2 e]
    const float *conv_weight, *conv_bias;       // [k][e][4], [k][e]
    float *pooled;
    int32_t *argmax;                            // [k][b][p][e] position of the maximum, or null for means
};
struct ConvPoolBackward {
    Sizes n;
    Walk walk;
    int64_t max;
    const void *xz;
    const float *conv_weight, *conv_bias, *D;   // D [k][e], or null where the scan has it
    const int32_t *argmax;                      // or null
    const float *dpooled;
    const void *g;                              // [b][l][e] of expand_gate_backward
    void *dxz;                                  // its x half is filled
    float *dconv_weight, *dconv_bias, *dD;      // dD null where D is
};

// delta = softplus(dt + dt_bias);  h_t = exp(delta A) h_{t-1} + delta B_t x_t;  s_t = C_t h_t + D x_t
struct SelectiveScan {
    int64_t k, b, p, e, n, stride;              // stride: floats from one step's row of B and C to the next
    const float *x, *dt, *A, *B, *C;            // [k][b][p][e] twice, [k][e][n], [k][b][p][stride] twice
    const float *D, *dt_bias;                   // [k][e] or null
    float *s;                                   // [k][b][p][e]
};
struct SelectiveScanBackward {
    int64_t k, b, p, e, n, stride, shared;      // shared: ds is [b][p][e], the same for all directions
    const float *x, *dt, *A, *B, *C, *D, *dt_bias, *ds;
    float *dx, *ddt, *dA, *dB, *dC, *dD, *ddt_bias;         // dB, dC [k][b][p][n]; dD, ddt_bias null as D, dt_bias
};

// y = norm((s_0 + s_1 + D_0 c_0 + D_1 c_1) / 2) silu(z), each position with the s of its step
struct ExpandGate {
    Sizes n;
    Walk walk;
    const void *xz;
    const float *s, *conv_weight, *conv_bias;
    const float *D, *norm_weight, *norm_bias;   // or null; a norm without bias is RMSNorm, without weight there is none
    void *y;                                    // [b][l][e]
};
struct ExpandGateBackward {
    Sizes n;
    Walk walk;
    const void *xz;
    const float *s, *conv_weight, *conv_bias, *D, *norm_weight, *norm_bias;
    const void *dy;
    void *dxz, *g;                              // the z half of dxz; g [b][l][e] the gradient of each expanded s
    float *ds, *dnorm_weight, *dnorm_bias;      // ds [b][p][e], the same for both directions
};

extern "C" {
int add_norm(const AddNorm *a, void *stream);
int add_norm_backward(const AddNormBackward *a, void *stream);
int conv_pool(const ConvPool *a, void *stream);
int conv_pool_backward(const ConvPoolBackward *a, void *stream);
int selective_scan(const SelectiveScan *a, void *stream);
int selective_scan_backward(const SelectiveScanBackward *a, void *stream);
int expand_gate(const ExpandGate *a, void *stream);
int expand_gate_backward(const ExpandGateBackward *a, void *stream);
}
