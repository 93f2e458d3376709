"""The losses in Triton."""
