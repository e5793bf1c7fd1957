"""What changes logits before a token is drawn: bias, banned words, penalties; against the reference."""

from __future__ import annotations

import torch

from paged_kernels.logit_edits import add_bias, apply_penalties, ban_bad_words
from paged_kernels.reference import reference
from tests.kernels.sampling_cases import DEVICE, LARGE_VOCAB, VOCAB, floats, gpu, ints, randn


def test_bias_adds_up_and_ids_outside_count_for_nothing() -> None:
    logits = randn(3, VOCAB)
    ids, values = ints(5, 5, -1, 199, VOCAB, 0).expand(3, 6).contiguous(), randn(3, 6, seed=2)
    values[1, 0] = -torch.inf
    expected = reference.add_bias(logits, ids, values)
    assert add_bias(logits, ids, values) is logits
    torch.testing.assert_close(logits, expected)
    assert logits[1, 5] == -torch.inf


def test_only_the_token_that_completes_a_bad_word_is_banned() -> None:
    history = ints(1, 2, 3, 4, 0, 0).expand(3, 6).contiguous()
    num_tokens = ints(4, 2, 0)
    words = ints(
        -1, -1, 9,  # alone: always
        -1, 4, 10,  # after 4
        3, 4, 11,  # after 3 4
        1, 2, 12,  # after 1 2
        2, 4, 13,  # never
        -1, -1, -1,  # none
        -1, 0, 14,  # after 0, which no history has
    ).view(1, 7, 3).expand(3, 7, 3).contiguous()  # fmt: skip
    logits = randn(3, VOCAB)
    recent = ints(3, 4, 1, 2, -2, -2).view(3, 2)
    expected = reference.ban_bad_words(logits, words, recent)
    assert torch.equal(ban_bad_words(logits, words, history, num_tokens), expected)
    assert [row.isinf().nonzero().flatten().tolist() for row in logits] == [[9, 10, 11], [9, 12], [9]]


def test_bad_words_of_one_token_need_no_history() -> None:
    logits = ban_bad_words(randn(1, VOCAB), ints(3, -1, VOCAB).view(1, 3, 1), ints(0).view(1, 1), ints(0))
    assert logits.isinf().nonzero().tolist() == [[0, 3]]


def test_penalties_equal_the_reference_and_the_counts_are_zero_again() -> None:
    generator = torch.Generator().manual_seed(0)
    history = torch.randint(0, 40, (5, 1500), generator=generator).to(DEVICE)
    history[0, 3] = -1
    history[1, 4] = VOCAB
    prompt_lens, num_tokens = ints(3, 10, 0, 1400, 5), ints(9, 10, 1, 1500, 200)
    repetition, presence, frequency = (
        floats(1.3, 0.7, 2.0, 1.1, 1.0),
        floats(0.5, -0.5, 0.0, 0.1, 0.0),
        floats(0.2, 0.3, 0.0, -0.1, 0.0),
    )
    logits, counts = randn(5, VOCAB, scale=3), torch.zeros(6, VOCAB, dtype=torch.int32, device=DEVICE)
    expected = penalised(logits, history, prompt_lens, num_tokens, repetition, presence, frequency)
    apply_penalties(logits, history, prompt_lens, num_tokens, repetition, presence, frequency, counts=counts)
    torch.testing.assert_close(logits, expected)
    assert not counts.any()


def penalised(
    logits: torch.Tensor,
    history: torch.Tensor,
    prompt_lens: torch.Tensor,
    num_tokens: torch.Tensor,
    repetition: torch.Tensor,
    presence: torch.Tensor,
    frequency: torch.Tensor,
) -> torch.Tensor:
    """Token by token, in Python."""
    out = logits.clone()
    for row in range(len(logits)):
        prompt, length = int(prompt_lens[row]), int(num_tokens[row])
        tokens = [
            (at, token) for at, token in enumerate(history[row, :length].tolist()) if 0 <= token < logits.shape[1]
        ]
        for token in {token for _, token in tokens}:
            answered = sum(1 for at, other in tokens if other == token and at >= prompt)
            x = float(out[row, token])
            x = x / float(repetition[row]) if x > 0 else x * float(repetition[row])
            out[row, token] = x - float(frequency[row]) * answered - float(presence[row]) * (answered > 0)
    return out


@gpu
def test_penalties_over_a_large_vocabulary_equal_the_reference() -> None:
    generator = torch.Generator().manual_seed(0)
    history = torch.randint(0, 3000, (64, 9000), generator=generator).to(DEVICE)
    num_tokens = torch.randint(1, 9000, (64,), generator=generator).to(DEVICE)
    prompt_lens = (num_tokens * torch.rand(64, generator=generator).to(DEVICE)).long()
    repetition, presence, frequency = (torch.rand(3, 64, generator=generator) + 0.5).to(DEVICE)
    logits, counts = randn(64, LARGE_VOCAB), torch.zeros(64, LARGE_VOCAB, dtype=torch.int32, device=DEVICE)
    expected = reference.apply_penalties(logits, history, prompt_lens, num_tokens, repetition, presence, frequency)
    apply_penalties(logits, history, prompt_lens, num_tokens, repetition, presence, frequency, counts=counts)
    torch.testing.assert_close(logits, expected)
    assert not counts.any()
