"""How grouped products of experts divide their work: tokens of a tile, and shapes of launches."""

from __future__ import annotations

from dataclasses import dataclass

from paged_kernels.experts import ExpertLinear
from paged_kernels.quant_tile import packs

_ROWS = 64  # of the weight: what one instruction of the tensor cores takes
_SHARED_BYTES = 108 * 1024  # of a program: two of them share a multiprocessor
_MAX_STAGES = 6
_FEW_REGISTERS = 128  # of a thread, so that four programs of four warps share a multiprocessor
_SOME_REGISTERS = 168  # so that three do


@dataclass(frozen=True)
class ProductShape:
    """How a grouped product divides its work: tokens of a tile, rows and columns of the weight at once, stages of the
    pipeline, warps; and how many of its programs have room where one of four warps and all stages has.
    """

    tokens: int
    rows: int
    block: int
    stages: int
    num_warps: int
    in_place_of_one: int = 1


def tokens_of_tiles(num_pairs: int, *linears: ExpertLinear) -> int:
    """Of the tiles that matrices of the same experts share. num_pairs: tokens times the experts of each.

    As many as an expert gets on the average, from 16 on: weights are read fast while there are few, and multiplied fast
    when there are many.
    """
    share, formats = num_pairs / len(linears[0].weight), [linear.format for linear in linears]
    whole_bytes = any(format.codes in ("fp8", "int8") for format in formats)
    if share <= (16 if whole_bytes else 8):
        return 16
    if share <= 64:
        return 32 if share <= 32 else 64
    # more tokens beside other numbers on their way would not fit registers
    return 128 if all(format.codes == "plain" for format in formats) else 64


def product_shape(tokens: int, linear: ExpertLinear, *, gated: bool, element_bytes: int = 2) -> ProductShape:
    """tokens: of a tile, 16 to 128; element_bytes: of an activation.

    What measured best on an H200 with the experts of Qwen3-30B-A3B and gpt-oss-20b and 16 to 2,048 tokens at once
    (tests/bench/bench_moe.py); int8 and float32 were only compiled.
    """
    format = linear.format
    if packs(format) and element_bytes == 2 and tokens <= 32:
        block = 64 if format.nibbles else 128
        if tokens == 16:
            return ProductShape(tokens, _ROWS // 2, block, 3, 2, in_place_of_one=4)  # no warp makes another's numbers
        return ProductShape(tokens, _ROWS, block, 3, 2, in_place_of_one=2)
    if format.codes == "plain" and element_bytes == 2 and tokens == 32:
        return ProductShape(tokens, 2 * _ROWS, 64, 3, 8)
    block = 64 if tokens >= 64 or element_bytes == 4 or format.nibbles else 128
    values = tokens * block * element_bytes * (2 if format.nibbles else 1)
    weight_bytes = _ROWS * block * (2 if gated else 1) * linear.weight.element_size()
    stages = int(_SHARED_BYTES // (weight_bytes + values))  # so deep that two programs share a multiprocessor
    return ProductShape(tokens, _ROWS, block, max(2, min(_MAX_STAGES, stages)), 8 if tokens == 128 else 4)


@dataclass(frozen=True)
class WordsShape:
    """How products with experts in words divide their work: tokens of a tile, rows of the weight at once, stages of the
    pipeline, warps, programs that a multiprocessor has room for, parts that a lone token's columns are shared out in,
    and registers of a thread, if there is a limit.
    """

    tokens: int
    rows: int
    stages: int
    num_warps: int
    programs: int
    parts: int = 1
    max_registers: int | None = None


def words_shapes(num_tokens: int, share: float, *, by_fp8: bool) -> tuple[WordsShape, WordsShape]:
    """Of both products of a layer. share: tokens of an expert on the average. Those of fp8 measured best on the same
    H200 with the experts of gpt-oss-20b; the others were only compiled: they spill no registers, and have room on cards
    with 99 KiB of shared memory.
    """
    tokens = 16 if share <= 8 else 32 if share <= 16 else 64
    if not by_fp8:
        return (WordsShape(tokens, _ROWS, 3, 8, 1),) * 2
    if num_tokens == 1:
        return (WordsShape(16, _ROWS, 4, 4, 6, parts=2, max_registers=_FEW_REGISTERS),) * 2
    first, second = (WordsShape(tokens, 2 * _ROWS, 4, 4, 4),) * 2
    if tokens == 16:
        first = second = WordsShape(tokens, 2 * _ROWS, 3, 4, 4, max_registers=_FEW_REGISTERS)
    # half as many items: of four programs for each multiprocessor most have one, and wait for those that have two
    if 2 < share <= 8:
        second = WordsShape(tokens, 2 * _ROWS, 4, 4, 3, max_registers=_SOME_REGISTERS)
    if tokens == 32:
        second = WordsShape(tokens, 2 * _ROWS, 3, 4, 3, max_registers=_SOME_REGISTERS)
    return first, second
