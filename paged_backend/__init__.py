"""paged: a Triton Inference Server model that serves large language models from a paged KV pool."""
