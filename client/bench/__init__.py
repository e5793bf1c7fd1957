"""`paged bench`: what a running server gives its clients, measured from outside with NVIDIA's perf_analyzer."""
