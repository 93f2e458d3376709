"""The backend in plain PyTorch: runs on every device, the oracle of all others."""
