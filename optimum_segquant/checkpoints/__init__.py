"""``segquant`` checkpoints: packed Linears in safetensors, described in ``config.json``.

The format is written down in ``segquant.schema.json`` and :mod:`.tensors`.
"""
