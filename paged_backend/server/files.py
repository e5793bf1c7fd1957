"""What `paged serve` puts on disk and looks for there: a tritonserver, its backend folder, a private model repository,
a checkpoint.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paged_backend.config import EngineConfig, repository_folder
from paged_backend.errors import EngineError
from paged_backend.extras import install_command

TEMPLATE_MODEL = "paged_llm"
_BACKEND_FILES = ("libtriton_python.so", "triton_python_backend_utils.py", "triton_python_backend_stub")
_SYSTEM_BACKENDS = Path("/opt/tritonserver/backends")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_MODEL_NAME = re.compile(r"\w[\w.-]*")
_WHEEL_NAME = "the tritonserver of the nvidia-pytriton wheel"


@dataclass(frozen=True)
class Installation:
    """A tritonserver. `backend_files` become `<backends>/python/`; None: `backends` is its own folder and complete."""

    executable: Path
    backends: Path | None
    backend_files: tuple[Path, ...] | None = None
    libraries: Path | None = None  # goes first on LD_LIBRARY_PATH


def find_installation() -> Installation:
    """The tritonserver on PATH if there is one, else the one in the nvidia-pytriton wheel.

    Raises:
        EngineError: there is none, or the one found cannot run models in this Python environment.
    """
    found = shutil.which("tritonserver")
    return _on_path(Path(found)) if found else _in_wheel()


def _on_path(executable: Path) -> Installation:
    given = os.environ.get("TRITON_BACKENDS")
    candidates = [Path(given)] if given else [executable.resolve().parent.parent / "backends", _SYSTEM_BACKENDS]
    backends = next((folder for folder in candidates if (folder / "python" / "libtriton_python.so").is_file()), None)
    if backends is None:
        where = " or ".join(str(folder) for folder in candidates)
        raise EngineError(
            f"the tritonserver on PATH has no Python backend in {where}: set TRITON_BACKENDS to its backends folder"
        )
    minor = _python_minor_of(backends / "python" / "triton_python_backend_stub")
    if minor is not None and minor != sys.version_info.minor:
        raise EngineError(
            f"the tritonserver on PATH runs models with Python 3.{minor}, but this is Python "
            f"3.{sys.version_info.minor}: use Python 3.{minor}"
        )
    return Installation(executable, backends)


def _python_minor_of(stub: Path) -> int | None:
    """The x of the libpython3.x that the stub is linked to."""
    if not stub.is_file():
        return None
    found = re.search(rb"libpython3(?:-[0-9a-f]+)?\.(\d+)", stub.read_bytes())
    return int(found[1]) if found else None


def _in_wheel() -> Installation:
    spec = importlib.util.find_spec("pytriton")
    if spec is None or spec.origin is None:
        raise EngineError(_how_to_get_one())
    package = Path(spec.origin).parent
    server = package / "tritonserver"
    stub = server / "python_backend_stubs" / f"3.{sys.version_info.minor}" / "triton_python_backend_stub"
    if not stub.is_file():
        raise EngineError(
            f"{_WHEEL_NAME} cannot run models with Python 3.{sys.version_info.minor}: use Python 3.10, 3.11 or 3.12"
        )
    numpy_version = importlib.metadata.version("numpy")
    if int(numpy_version.split(".")[0]) >= 2:
        raise EngineError(f"{_WHEEL_NAME} needs NumPy 1, but NumPy {numpy_version} is installed: pip install 'numpy<2'")
    backend = server / "backends" / "python"
    files = (backend / _BACKEND_FILES[0], backend / _BACKEND_FILES[1], stub)
    return Installation(server / "bin" / "tritonserver", None, files, package.parent / "nvidia_pytriton.libs")


def _how_to_get_one() -> str:
    if sys.version_info < (3, 13):
        return f"no tritonserver on PATH and none installed: {install_command('serve')}"
    return (
        f"no tritonserver on PATH, and the nvidia-pytriton wheel has none for Python 3.{sys.version_info.minor}: "
        "use Python 3.10, 3.11 or 3.12"
    )


def prepare_backends(installation: Installation, folder: Path) -> Path:
    """The backend directory to start `installation` with: its own, or one of links made inside `folder`."""
    if installation.backends is not None:
        return installation.backends
    assert installation.backend_files is not None
    python_backend = folder / "backends" / "python"
    python_backend.mkdir(parents=True)
    for file in installation.backend_files:
        (python_backend / file.name).symlink_to(file)
    return python_backend.parent


def prepare_environment(installation: Installation, folder: Path) -> dict[str, str]:
    """Environment variables for tritonserver: its stubs take their packages from the `python3` that PATH finds first,
    which must be this one.

    Raises:
        EngineError: no `python3` lies beside this interpreter, or the stub lacks a library.
    """
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONHOME", "PYTHONPATH")}
    programs = Path(sys.executable).parent
    python3 = programs / "python3"
    if not python3.exists() or python3.resolve() != Path(sys.executable).resolve():
        raise EngineError(f"no python3 beside {sys.executable}: run paged in a virtual environment (python3 -m venv)")
    environment["PATH"] = os.pathsep.join([str(programs), environment.get("PATH", os.defpath)])
    if installation.libraries is not None:
        assert installation.backend_files is not None
        libraries = [
            str(installation.libraries),
            *_link_libpython(folder),
            *filter(None, [environment.get("LD_LIBRARY_PATH")]),
        ]
        environment["LD_LIBRARY_PATH"] = os.pathsep.join(libraries)
        _require_libraries(installation.executable, environment)
        _require_libraries(installation.backend_files[2], environment)
    return environment


def _link_libpython(folder: Path) -> list[str]:
    """A folder that holds nothing but this interpreter's libpython, if it has one outside the system's folders."""
    name = f"libpython3.{sys.version_info.minor}.so.1.0"
    for place in (sysconfig.get_config_var("LIBDIR"), Path(sys.base_prefix) / "lib"):
        if place and (Path(place) / name).is_file():
            libraries = folder / "lib"
            libraries.mkdir()
            (libraries / name).symlink_to(Path(place) / name)
            return [str(libraries)]
    return []


def _require_libraries(program: Path, environment: Mapping[str, str]) -> None:
    """Asks the dynamic loader (without running `program`) whether every library is there."""
    traced = subprocess.run(
        [program], env={**environment, "LD_TRACE_LOADED_OBJECTS": "1"}, capture_output=True, text=True, check=False
    )
    if re.search(r"version `GLIBC\S+' not found", traced.stdout + traced.stderr):
        raise EngineError(f"{_WHEEL_NAME} needs glibc 2.35 or newer (Debian 12, Ubuntu 22.04)")
    missing = re.findall(r"^\s*(\S+) => not found", traced.stdout, re.MULTILINE)
    if missing:
        package = re.match(r"libpython3\.\d+", missing[0])
        remedy = f" (Debian and Ubuntu: apt install {package[0]})" if package else ""
        raise EngineError(f"{_WHEEL_NAME} needs {missing[0]}, which this machine lacks{remedy}")


def prepare_repository(folder: Path, *, model_name: str, options: Mapping[str, str], instances: int | None) -> Path:
    """A model repository inside `folder`: the shipped model under `model_name`, with `options` as parameters of its
    config.pbtxt.
    """
    try:
        from google.protobuf import text_format
        from tritonclient.grpc import model_config_pb2
    except ImportError:
        raise EngineError("tritonclient is not installed: pip install 'tritonclient[all]'") from None
    if not _MODEL_NAME.fullmatch(model_name):
        raise EngineError(f"model name '{model_name}': letters, digits, '_', '-' and '.' only")
    shipped = repository_folder() / TEMPLATE_MODEL
    config = text_format.Parse((shipped / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
    config.name = model_name
    for name, value in options.items():
        config.parameters[name].string_value = value
    if instances is not None:
        config.instance_group[0].count = instances
    model = folder / "repository" / model_name
    model.mkdir(parents=True)
    (model / "config.pbtxt").write_text(text_format.MessageToString(config))
    (model / "1").symlink_to(shipped / "1")
    return model.parent


def check_checkpoint(config: EngineConfig) -> None:
    """Refuses a checkpoint that cannot be loaded, as far as a look at its folder tells; a hub id is left to the engine.

    Raises:
        EngineError: no such folder, no readable config.json, a max_model_len beyond it, or weight files missing.
    """
    folder = config.model_folder()
    if folder is None:
        if not _HUB_ID.fullmatch(config.model):
            raise EngineError(f"model: there is no folder {config.model}")
        return
    name = f"model '{config.model}'"
    try:
        described = json.loads((folder / "config.json").read_text())
    except FileNotFoundError:
        raise EngineError(f"{name}: no config.json in {folder}") from None
    except (OSError, ValueError) as error:
        raise EngineError(f"{name}: config.json is broken: {error}") from None
    if not isinstance(described, dict):
        raise EngineError(f"{name}: config.json is broken: not an object")
    allowed = _plain_length(described)
    if allowed is not None and config.max_model_len > allowed:
        raise EngineError(f"max_model_len: {config.max_model_len} is more than the checkpoint allows ({allowed})")
    if config.load_format != "dummy":
        _require_weights(folder, name)


def _plain_length(described: Mapping[str, Any]) -> int | None:
    """Longest sequence of a checkpoint whose positions are not scaled; None if only the engine can tell."""
    length = described.get("max_position_embeddings")
    scaling = described.get("rope_scaling") or described.get("rope_parameters") or {}
    nested = isinstance(scaling, dict) and any(isinstance(value, dict) for value in scaling.values())
    is_plain = (
        isinstance(scaling, dict)
        and not nested
        and scaling.get("rope_type", scaling.get("type", "default")) == "default"
    )
    return length if is_plain and isinstance(length, int) and not isinstance(length, bool) else None


def _require_weights(folder: Path, name: str) -> None:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        if not any(folder.glob("*.safetensors")):
            raise EngineError(f"{name}: no safetensors file in {folder}")
        return
    try:
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EngineError(f"{name}: {index.name} is broken: {error!r}") from None
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise EngineError(f"{name}: {len(missing)} of {len(files)} weight files are missing, the first is {missing[0]}")
