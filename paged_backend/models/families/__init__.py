"""One file for each published architecture: what its config.json makes of the layers. Nowhere else is a family called
by its name.

Start with llama.py; registry.py lists them all, docs/your-own-model.md says what is served.
"""
