"""Quantised checkpoints: which modules are stored how, and their tensors as numbers of one of the formats of
kernels/linear.py.

Start with reading.py (config.json or hf_quant_config.json -> a Quantization); a file each says what a publisher's
format is called and how its tensors lie.
"""
