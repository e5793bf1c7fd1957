"""What Triton Server's Python backend loads; everything lives in the package."""

from paged_backend.triton_io import TritonPythonModel

__all__ = ["TritonPythonModel"]
