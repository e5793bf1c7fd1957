"""What launches depend on, of cards that are not here: whether kernels overlap, fp8, shared memory."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from triton.runtime.errors import OutOfResources

from paged_backend.config import demo_model_folder
from paged_backend.models.architecture import read_architecture
from paged_backend.models.quantization.online import read_online
from paged_backend.models.quantization.quantization import Quantization
from paged_backend.runner import make_ops
from paged_backend.runner.builder import RunnerBuilder
from paged_backend.runner.placement import Placement
from paged_kernels import cuda_ops
from paged_kernels.cuda_ops import CudaOps
from paged_kernels.device_traits import DeviceTraits, traits_of
from paged_kernels.jit import Kernel

A10, L4, H100 = (DeviceTraits(True, capability, 72) for capability in ((8, 6), (8, 9), (9, 0)))


def test_a_device_is_what_torch_says_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = SimpleNamespace(major=8, minor=9, multi_processor_count=58)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    traits_of.cache_clear()
    assert traits_of(torch.device("cuda:7")) == DeviceTraits(True, (8, 9), 58)
    traits_of.cache_clear()
    cpu = traits_of(torch.device("cpu"))
    assert not cpu.compiles and not cpu.launches_dependents and cpu.has_fp8


def test_what_a_generation_can() -> None:
    assert [traits.launches_dependents for traits in (A10, L4, H100)] == [False, False, True]
    assert [traits.has_fp8 for traits in (A10, L4, H100)] == [False, True, True]


@pytest.mark.parametrize(("traits", "overlaps"), [(L4, False), (H100, True)])
def test_kernels_overlap_where_the_card_can(
    traits: DeviceTraits, overlaps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("cuda_ops", "products", "expert_kernels", "decode_plan"):
        monkeypatch.setattr(f"paged_kernels.{module}.traits_of", lambda device: traits)
    ops = CudaOps(
        num_heads=4, num_kv_heads=2, head_dim=16, sliding_windows=(None,), vocab_size=32, max_sequences=2,
        max_outputs=2, kv_dtype=torch.float32, device=torch.device("cpu"),
    )  # fmt: skip
    heard = []
    monkeypatch.setattr(cuda_ops.norms, "norm", lambda x, norm, launch_pdl: heard.append(launch_pdl))
    ops.norm(torch.zeros(1, 8), None)  # type: ignore[arg-type]
    assert heard == [overlaps] == [ops._products._pdl] == [ops._experts._pdl]


def test_plain_torch_computes_where_the_triton_language_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    place = Placement(torch.device("cuda"), torch.float16, torch.float16)
    for capability, reached in (((7, 5), False), ((8, 0), True)):
        monkeypatch.setattr(make_ops, "traits_of", lambda device, found=capability: DeviceTraits(True, found, 40))
        assert make_ops.kernels_reach(16, place) is reached
        assert not make_ops.kernels_reach(24, place)


@pytest.mark.parametrize("traits", [A10, L4])
def test_without_fp8_its_weights_become_floats_and_others_stay(
    traits: DeviceTraits, monkeypatch: pytest.MonkeyPatch
) -> None:
    fp8, int4 = read_online("fp8"), read_online("int4")
    place = Placement(torch.device("cuda"), torch.bfloat16, torch.bfloat16)
    monkeypatch.setattr(make_ops, "traits_of", lambda device: traits)
    for found, stored in ((fp8, "fp8" if traits.has_fp8 else "plain"), (int4, "int4")):
        architecture = replace(read_architecture(demo_model_folder()), quantization=found)
        quantization = make_ops.with_formats_of(architecture, place, True).quantization
        assert quantization is not None
        assert quantization.format_of(["model.layers.0.mlp.down_proj"], [64], 256).codes == stored
        assert quantization.keeps_nothing is (stored == "plain")
        assert quantization.rounds is traits.has_fp8


def test_a_mixed_checkpoint_keeps_what_the_card_reads_and_the_log_names_the_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fp8, int4 = (read_online(name).rules[-1] for name in ("fp8", "int4"))
    assert fp8.scheme is not None and int4.scheme is not None
    mixed = Quantization("mixed", (replace(fp8, matches=lambda module: module.endswith("o_proj")), int4))
    architecture = replace(read_architecture(demo_model_folder()), quantization=mixed)
    place = Placement(torch.device("cuda"), torch.bfloat16, torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    for traits in (A10, L4):
        monkeypatch.setattr(make_ops, "traits_of", lambda device, found=traits: found)
        kept = make_ops.with_formats_of(architecture, place, True)
        assert kept.quantization is not None and not kept.quantization.keeps_nothing
        builder = SimpleNamespace(_architecture=kept, _place=place)
        said = RunnerBuilder._about_quantization(builder, kept.quantization)  # type: ignore[arg-type]
        lost = f"; {fp8.scheme.words}: dequantised, a card has no kernels for it; "
        assert (lost in said) is not traits.has_fp8 and said.endswith(" saved")


class _Jitted:
    """A kernel that needs 40 KiB of shared memory a stage."""

    def __init__(self, room: int) -> None:
        self.room, self.asked = room, list[int]()

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: object, **constants: Any) -> str:
            stages = constants.get("STAGES", constants.get("num_stages", 3))
            self.asked.append(stages)
            if stages * 40 > self.room:
                raise OutOfResources(stages * 40 * 1024, self.room * 1024, "shared memory")
            return f"compiled with {stages}"

        return launch


@pytest.mark.parametrize("name", ["STAGES", "num_stages"])
def test_a_pipeline_has_as_many_stages_as_there_is_room_for(name: str) -> None:
    jitted = _Jitted(room=99)
    found, constants = Kernel(jitted)._compile_and_launch((1,), (), {"ROWS": 64, name: 4})
    assert found == "compiled with 2" and constants == {"ROWS": 64, name: 2} and jitted.asked == [4, 3, 2]


def test_a_pipeline_that_says_nothing_has_three_stages_at_first() -> None:
    assert Kernel(_Jitted(room=99))._compile_and_launch((1,), (), {})[1] == {"num_stages": 2}


def test_what_has_no_room_at_all_is_an_error() -> None:
    with pytest.raises(OutOfResources, match="shared memory"):
        Kernel(_Jitted(room=20))._compile_and_launch((1,), (), {"STAGES": 3})
