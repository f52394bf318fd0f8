"""Our Triton kernels. Importing this package needs neither Triton nor a GPU; calling a kernel needs both."""
