"""The blocks that layers are made of. Each owns its parameters (what they are called in a checkpoint, how they are
packed) and its forward pass.

Start with attention.py; products.py says how a block multiplies, with a step's adapters or without.
"""
