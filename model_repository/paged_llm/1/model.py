"""What Triton Server's Python backend loads; everything lives in the package."""

from paged_backend.frontend.triton_io import TritonPythonModel

__all__ = ["TritonPythonModel"]
