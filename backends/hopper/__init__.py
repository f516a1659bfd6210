"""FC2 on SM 9.0: CuTe DSL kernels that read the prepared weights of the Triton backend."""
