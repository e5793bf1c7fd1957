"""What a training command leaves for the next one: weights, moments and how far it was, in parts small enough to be
carried about.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from tools.demo_model.model import DemoModel
from tools.demo_model.optimizer import Optimizer

_PART_BYTES = 15_000_000


@dataclass
class Progress:
    num_tokens: int = 0
    num_steps: int = 0
    shard: int = 0  # the next one to be read
    used_seconds: float = 0.0  # by the commands before this one
    total_tokens: int | None = None

    def after(self, used_seconds: float) -> Progress:
        return replace(self, used_seconds=used_seconds)


def save_state(folder: Path, model: DemoModel, optimizer: Optimizer, progress: Progress, tokenizer: Tokenizer) -> None:
    """progress.json comes last and names the parts: a command that is cut off leaves the state before."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"weight.{name}": weight.detach().cpu() for name, weight in model.named_parameters()} | optimizer.state()
    generation = "even" if progress.shard % 2 == 0 else "odd"
    names = []
    for number, part in enumerate(_parts(tensors)):
        names.append(f"{generation}-{number}.safetensors")
        save_file(part, folder / names[-1])
    tokenizer.save(str(folder / "tokenizer.json"))
    written = folder / "progress.json.part"
    written.write_text(json.dumps({"progress": asdict(progress), "parts": names}))
    written.rename(folder / "progress.json")
    for old in folder.glob("*.safetensors"):
        if old.name not in names:
            old.unlink()


def read_progress(folder: Path) -> Progress:
    return Progress(**json.loads((folder / "progress.json").read_text())["progress"])


def load_state(folder: Path, model: DemoModel, optimizer: Optimizer, progress: Progress) -> None:
    """Puts weights and moments back."""
    names = json.loads((folder / "progress.json").read_text())["parts"]
    tensors = {name: tensor for part in names for name, tensor in load_file(folder / part).items()}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(tensors[f"weight.{name}"])
    optimizer.load(
        {name: tensor for name, tensor in tensors.items() if not name.startswith("weight.")}, progress.num_steps
    )


def _parts(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Shared out so that no part has more than _PART_BYTES, if no tensor has."""
    parts: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        num_bytes = tensor.numel() * tensor.element_size()
        if parts[-1] and size + num_bytes > _PART_BYTES:
            parts.append({})
            size = 0
        parts[-1][name] = tensor.contiguous()
        size += num_bytes
    return parts
