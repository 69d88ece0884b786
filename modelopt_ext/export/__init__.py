"""Ways out of PyTorch."""
