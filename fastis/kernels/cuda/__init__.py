"""The backend of compiled CUDA: csrc/cuda."""
