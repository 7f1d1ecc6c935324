"""The kernels compile for GPUs, to their machine code, which takes no GPU: in a process without the interpreter."""
