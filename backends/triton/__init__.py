"""FC2 in Triton: a portable tiled kernel for SM 8.0 and up, and kernels for prepared weights."""
