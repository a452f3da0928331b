"""One NVIDIA GPU as a device of the runtime: memory, copies, kernels of our own, and captured sequences of launches.

    driver   the CUDA driver API, its errors in text      kernels  kernels.cu: compiled, kept, launched
    memory   what is allocated and kept, on both sides    decode   a step's launches captured, its token chosen
    array    a buffer on the GPU and its views            buffers  allocation, copies and two streams
                                                          device   `backends.Device`: what is done to rows

The driver's API and the compiler come from cuda-bindings and nvidia-cuda-nvrtc (extra `gpu`); neither is imported
before a device is opened. Why it is not cuda.core: docs/cuda.md.

tests/gpu/test_cuda_device.py passed on an NVIDIA H200 (driver 580, CUDA 13.0), but for its film, which was not at hand;
`reduce`, `similarity` and a decode step's kernels are newer, and no GPU has run them yet.
Without a GPU the same tests run over a driver that executes kernels.cu on the CPU
(tests/runtime/backends/cuda/emulated/driver.cpp), with cuda-bindings 12.9 and 13.5.
"""
