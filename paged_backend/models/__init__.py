"""From a checkpoint folder to a forward pass.

Start with architecture.py (what config.json says, as plain facts), then decoder.py (the forward pass); weights.py reads
the tensors.
"""
