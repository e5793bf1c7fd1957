"""Decoder-only language models: what a checkpoint's config says (architecture), its tensors (weights), its positions (rope), its forward pass (decoder)."""
