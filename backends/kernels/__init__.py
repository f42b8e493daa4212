"""Hand-written Triton kernels for Hopper, and how to launch them."""
