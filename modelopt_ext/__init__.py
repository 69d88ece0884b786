"""SegQuant for NVIDIA ModelOpt: import this package to register the method and its presets."""
