// scan.h: the arguments of every operation, in one place. scan_cpu.cpp and scan_cuda.cu implement them, scan_cuda.cpp
// and fastvim_kernels.py call them; Python reads the structures from this text, so no list of arguments is kept twice:
// types, names, and the shapes [..][..] behind pointers, one for each of a line or one for all of them.
//
// All fields are 8 bytes: whole numbers, or pointers to contiguous arrays whose last axis is the channels.
//     void      activations, of the type `dtype`: 0 float32, 1 bfloat16, 2 float16
//     float     everything else
// A pointer may be null where "or null" is said. Functions trust their arguments, allocate nothing that they return,
// overwrite every output, and return 0 or an error, by CUDA's numbers: 1 for a walk that leads out of its image (which
// scan_cpu.cpp looks for), 2 where memory is short.
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
    const int32_t *member, *start;              // [rows][l], [rows][p + 1] positions by step, ascending, holes last:
};                                              //     step g owns member[start[g]] .. member[start[g + 1] - 1]

struct Sizes { int64_t dtype, b, l, p, e; };

// out = residual + hidden;  u = norm(out), LayerNorm if there is a bias, else RMSNorm
struct AddNorm {
    int64_t dtype, rows, d;
    const void *hidden;                         // [rows][d]
    const float *residual, *weight, *bias;      // [rows][d], [d], [d] or null
    void *u;                                    // [rows][d]
    float *out;                                 // [rows][d]
};
struct AddNormBackward {
    int64_t dtype, rows, d, centred;            // centred: LayerNorm
    const float *residual, *weight;             // [rows][d], [d] what add_norm returned as out
    const void *du;                             // [rows][d]
    const float *dout;                          // [rows][d] or null
    float *dresidual;                           // [rows][d] the gradient of residual and, in float32, of hidden
    void *dhidden;                              // [rows][d] the same in 16 bits, or null
    float *dweight, *dbias;                     // [d] dbias or null
};

// c = silu(conv(x)) in both directions;  pooled [k][b][p][e] = mean or maximum of c over each step
struct ConvPool {
    Sizes n;
    Walk walk;
    int64_t max;
    const void *xz;                             // [b][l][2 e]
    const float *conv_weight, *conv_bias;       // [k][e][4], [k][e]
    float *pooled;                              // [k][b][p][e]
    int32_t *argmax;                            // [k][b][p][e] position of the maximum, or null for means
};
struct ConvPoolBackward {
    Sizes n;
    Walk walk;
    int64_t max;
    const void *xz;                             // [b][l][2 e]
    const float *conv_weight, *conv_bias, *D;   // [k][e][4], [k][e], [k][e] or null where the scan has it
    const int32_t *argmax;                      // [k][b][p][e] or null
    const float *dpooled;                       // [k][b][p][e]
    const void *g;                              // [b][l][e] of expand_gate_backward
    void *dxz;                                  // [b][l][2 e] its x half is filled
    float *dconv_weight, *dconv_bias, *dD;      // [k][e][4], [k][e], [k][e] null where D is
};

// delta = softplus(dt + dt_bias);  h_t = exp(delta A) h_{t-1} + delta B_t x_t;  s_t = C_t h_t + D x_t
struct SelectiveScan {
    int64_t k, b, p, e, n, stride;              // stride: floats from one step's row of B and C to the next
    const float *x, *dt, *A;                    // [k][b][p][e], [k][b][p][e], [k][e][n]
    const float *B, *C;                         // [k][b][p][n], the first n of rows that are `stride` long
    const float *D, *dt_bias;                   // [k][e] or null
    float *s;                                   // [k][b][p][e]
};
struct SelectiveScanBackward {
    int64_t k, b, p, e, n, stride, shared;      // shared: ds is the same for all directions, without their axis
    const float *x, *dt, *A;                    // [k][b][p][e], [k][b][p][e], [k][e][n]
    const float *B, *C;                         // [k][b][p][n]
    const float *D, *dt_bias, *ds;              // [k][e], [k][e], [k][b][p][e]
    float *dx, *ddt, *dA;                       // [k][b][p][e], [k][b][p][e], [k][e][n]
    float *dB, *dC, *dD, *ddt_bias;             // [k][b][p][n], [k][b][p][n], [k][e], [k][e] null as D and dt_bias are
};

// y = norm((s_0 + s_1 + D_0 c_0 + D_1 c_1) / 2) silu(z), each position with the s of its step
struct ExpandGate {
    Sizes n;
    Walk walk;
    const void *xz;                             // [b][l][2 e]
    const float *s, *conv_weight, *conv_bias;   // [k][b][p][e], [k][e][4], [k][e]
    const float *D, *norm_weight, *norm_bias;   // [k][e], [e], [e] or null; a norm without bias is RMSNorm, without
    void *y;                                    // [b][l][e]                 weight there is none
};
struct ExpandGateBackward {
    Sizes n;
    Walk walk;
    const void *xz;                             // [b][l][2 e]
    const float *s, *conv_weight, *conv_bias;   // [k][b][p][e], [k][e][4], [k][e]
    const float *D, *norm_weight, *norm_bias;   // [k][e], [e], [e] or null
    const void *dy;                             // [b][l][e]
    void *dxz, *g;                              // [b][l][2 e], [b][l][e] the z half; the gradient of each expanded s
    float *ds, *dnorm_weight, *dnorm_bias;      // [b][p][e], [e], [e]; ds is the same for both directions
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
