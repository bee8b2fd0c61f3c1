// The Python module around scan_cuda.cu. call(name, fields, device) runs an operation of scan.h on
// PyTorch's current stream of that device: `fields` is the operation's structure as whole numbers,
// which fastvim_kernels.py has checked. Scratch memory comes from PyTorch's caching allocator, and
// an error of CUDA becomes a Python exception.
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/extension.h>

#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <type_traits>
#include <vector>

#include "scan.h"

extern "C" void set_allocator(void* (*allocate)(size_t, void*), void (*release)(void*, void*));

using Fields = std::vector<int64_t>;

struct Operation {
    size_t fields;
    std::function<int(const Fields&, void* stream)> run;
};

// The structure is the function's own: a field too many or too few in it changes the size.
template <class S> Operation operation(int (*function)(const S*, void*)) {
    static_assert(sizeof(S) % 8 == 0 && std::is_trivially_copyable_v<S>);
    return {sizeof(S) / 8, [=](const Fields& fields, void* stream) {
                S arguments;
                std::memcpy(&arguments, fields.data(), sizeof arguments);
                return function(&arguments, stream);
            }};
}

const std::map<std::string, Operation> operations = {
    {"add_norm", operation(add_norm)},
    {"add_norm_backward", operation(add_norm_backward)},
    {"conv_pool", operation(conv_pool)},
    {"conv_pool_backward", operation(conv_pool_backward)},
    {"selective_scan", operation(selective_scan)},
    {"selective_scan_backward", operation(selective_scan_backward)},
    {"expand_gate", operation(expand_gate)},
    {"expand_gate_backward", operation(expand_gate_backward)},
};

void call(const std::string& name, const Fields& fields, int device) {
    const auto found = operations.find(name);
    TORCH_CHECK(found != operations.end(), "scan_cuda has no operation ", name);
    const Operation& operation = found->second;
    TORCH_CHECK(fields.size() == operation.fields, name, " takes ", operation.fields,
                " fields, not ", fields.size());
    const pybind11::gil_scoped_release release;
    const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
    void* stream = c10::cuda::getCurrentCUDAStream().stream();
    const auto error = static_cast<cudaError_t>(operation.run(fields, stream));
    TORCH_CHECK_WITH(OutOfMemoryError, error != cudaErrorMemoryAllocation, name,
                     ": CUDA out of memory for what the kernels need besides their outputs");
    TORCH_CHECK(error == cudaSuccess, name, ": ", cudaGetErrorName(error), ", ",
                cudaGetErrorString(error));
}

void* allocate(size_t bytes, void* stream) {
    try {
        using c10::cuda::CUDACachingAllocator::raw_alloc_with_stream;
        return raw_alloc_with_stream(bytes, static_cast<cudaStream_t>(stream));
    } catch (const c10::OutOfMemoryError&) {    // the kernels' side returns it as CUDA's error
        return nullptr;
    }
}

void release(void* pointer, void* /* stream */) {
    c10::cuda::CUDACachingAllocator::raw_delete(pointer);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
    set_allocator(allocate, release);
    module.def("call", call, "Runs an operation of scan.h on a device's current stream.",
               pybind11::arg("name"), pybind11::arg("fields"), pybind11::arg("device"));
}
