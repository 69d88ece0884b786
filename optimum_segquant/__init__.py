"""SegQuant for Hugging Face diffusers and Optimum, on top of :mod:`modelopt_ext`."""
