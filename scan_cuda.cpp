// The Python module around scan_cuda.cu: the same functions, with tensors (or None) in place of pointers. The stream is
// PyTorch's current one, scratch memory comes from its caching allocator, an error becomes a Python exception.
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/extension.h>

#include <optional>
#include <string>
#include <type_traits>

using Tensor = std::optional<at::Tensor>;

// The functions of scan_cuda.cu, with their arguments in its order (there also: what they mean).
extern "C" {
using I = int64_t;
using F = const float*;
using X = const int32_t*;
using T = const void*;
int add_norm(I, I, I, T, F, F, F, void*, float*, void*);
int add_norm_backward(I, I, I, F, F, I, T, F, float*, void*, float*, float*, void*);
int conv_pool(I, I, I, I, I, I, I, T, F, F, X, X, F, X, X, float*, int32_t*, void*);
int conv_pool_backward(I, I, I, I, I, I, I, T, F, F, F, X, X, F, X, X, X, F, T, void*, float*, float*, float*, void*);
int selective_scan(I, I, I, I, I, F, F, F, F, F, I, F, F, float*, void*);
int selective_scan_backward(I, I, I, I, I, F, F, F, F, F, I, F, F, F, I, float*, float*, float*, float*, float*, float*,
                            float*, void*);
int expand_gate(I, I, I, I, I, I, T, F, F, F, F, F, F, X, X, void*, void*);
int expand_gate_backward(I, I, I, I, I, I, T, F, F, F, F, F, F, X, X, X, X, T, void*, void*, void*, float*, float*,
                         float*, void*);
void set_allocator(void* (*allocate)(size_t, void*), void (*release)(void*, void*));
void set_rung(I kernel, I rung);
const char* error_name(int error);
}

// A pointer comes from a tensor or None, an integer from an integer.
template <class P> using Argument = std::conditional_t<std::is_pointer_v<P>, Tensor, P>;

template <class P> bool has_type(const at::Tensor& t) {
    using E = std::remove_const_t<std::remove_pointer_t<P>>;
    if constexpr (std::is_void_v<E>)
        return t.scalar_type() == at::kFloat || t.scalar_type() == at::kBFloat16 || t.scalar_type() == at::kHalf;
    else
        return t.scalar_type() == c10::CppTypeToScalarType<E>::value;
}

struct Checker {
    const char* name;
    std::optional<c10::Device> device;      // of the first tensor
    int position = 0;

    template <class P> P operator()(const Argument<P>& value) {
        ++position;
        if constexpr (std::is_pointer_v<P>) {
            if (!value) return nullptr;
            const at::Tensor& t = *value;
            auto require = [&](bool holds, const char* what) {
                TORCH_CHECK(holds, name, ": argument ", position, " must be ", what, ", not ", t.toString(), " on ",
                            t.device());
            };
            require(t.defined() && t.is_cuda(), "a CUDA tensor");
            if (!device) device = t.device();
            require(t.device() == *device, "on the device of the first tensor");
            // B and C of the scan are columns of a wider table: contiguous along n, with the row length given as ld
            const bool scan = std::string(name).find("scan") != std::string::npos;
            require(t.is_contiguous() || (scan && t.dim() > 0 && t.stride(-1) == 1), "contiguous");
            require(has_type<P>(t), std::is_void_v<std::remove_const_t<std::remove_pointer_t<P>>>
                        ? "float32, bfloat16 or float16" : "float32, or int32 if it is a table");
            return static_cast<P>(t.data_ptr());
        } else {
            return value;
        }
    }
};

template <class... P> void define(py::module_& module, const char* name, int (*function)(P...)) {
    // Every function's last argument is the stream: it is dropped from the Python signature.
    [&]<size_t... i>(std::index_sequence<i...>) {
        using All = std::tuple<P...>;
        module.def(name, [=](Argument<std::tuple_element_t<i, All>>... values) {
            Checker check{name};
            std::tuple<std::tuple_element_t<i, All>...> raw{
                check.template operator()<std::tuple_element_t<i, All>>(values)...};        // braces: left to right
            py::gil_scoped_release release;
            const c10::cuda::OptionalCUDAGuard guard(check.device);
            void* stream = c10::cuda::getCurrentCUDAStream().stream();
            const int error = function(std::get<i>(raw)..., stream);
            TORCH_CHECK(error == 0, name, ": ", error_name(error), " (CUDA error ", error, ")");
        });
    }(std::make_index_sequence<sizeof...(P) - 1>());
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
    using c10::cuda::CUDACachingAllocator::raw_alloc_with_stream;
    set_allocator(
        [](size_t bytes, void* stream) -> void* {
            try {
                return raw_alloc_with_stream(bytes, static_cast<cudaStream_t>(stream));
            } catch (const c10::Error&) {   // out of memory: the kernels' side reports it
                return nullptr;
            }
        },
        [](void* pointer, void*) { c10::cuda::CUDACachingAllocator::raw_delete(pointer); });
    define(module, "add_norm", add_norm);
    define(module, "add_norm_backward", add_norm_backward);
    define(module, "conv_pool", conv_pool);
    define(module, "conv_pool_backward", conv_pool_backward);
    define(module, "selective_scan", selective_scan);
    define(module, "selective_scan_backward", selective_scan_backward);
    define(module, "expand_gate", expand_gate);
    define(module, "expand_gate_backward", expand_gate_backward);
    module.def("set_rung", set_rung);
}
