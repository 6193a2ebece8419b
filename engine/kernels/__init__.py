"""Launchers of the CUDA kernels in cuda/: one module for each cuda/<name>.cu, same base name."""
