"""How diffusers and transformers load and save packed models: the hosts' quantizer interface, implemented."""
