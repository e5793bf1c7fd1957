"""Everything that decides the demo model's weights, besides the generator: one dataclass, and the course of the
learning rate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from tools.demo_model.draft_head import HeadShape
from tools.demo_model.model import Shape
from tools.demo_model.optimizer import Rates
from tools.demo_model.shards import ShardPlan

BALANCE_WEIGHT = 0.01  # of the experts' unevenness in the loss; Switch Transformers' value


@dataclass(frozen=True)
class Recipe:
    """Counts of tokens include what does not count in the loss."""

    shape: Shape = field(default_factory=Shape)
    plan: ShardPlan = field(default_factory=ShardPlan)
    rates: Rates = field(default_factory=Rates)
    rows_per_step: int = 32
    token_weights: tuple[float, float, float, float] = (0.0, 0.2, 0.5, 1.0)  # by chat.Weight
    warmup_tokens: int = 20_000_000
    decay_share: float = 0.35  # of all tokens: the rate falls to nothing over them
    tokenizer_conversations: int = 12_000
    validation_rows: int = 64
    seed: int = 0

    def in_small_steps(self) -> Recipe:
        """The same model, on rows and steps small enough for a CPU."""
        plan = replace(self.plan, rows_per_shard=4, row_len=512)
        return replace(self, plan=plan, rows_per_step=2, warmup_tokens=4000, validation_rows=4)

    def of_experts(self, num_experts: int, top_k: int) -> Recipe:
        """A smaller model with experts, whose training is a matter of minutes: it begins sooner and reads short
        conversations for less long.
        """
        plan = replace(self.plan, early_shards=12)
        return replace(self, shape=Shape.of_experts(num_experts, top_k), plan=plan, warmup_tokens=3_000_000)

    @staticmethod
    def agents() -> Recipe:
        """For a model that has learned its conversations, and now learns calls and thoughts beside them."""
        return Recipe(
            plan=ShardPlan(early_shards=0, mixture="agents"),
            rates=Rates(matrix_rate=0.01, other_rate=1.5e-3),
            warmup_tokens=6_000_000,
            decay_share=0.9,
        )

    @staticmethod
    def agents_on_cpu() -> Recipe:
        """The same for a machine that reads a thousandth of the tokens: smaller steps, more of them calls, and nothing
        counts but answers.
        """
        return Recipe(
            plan=ShardPlan(rows_per_shard=16, early_shards=0, mixture="agents, most of it calls"),
            rates=Rates(matrix_rate=0.005, other_rate=7e-4),
            rows_per_step=4,
            token_weights=(0.0, 0.0, 0.5, 1.0),
            warmup_tokens=300_000,
            decay_share=0.9,
            validation_rows=16,
        )

    @staticmethod
    def tiny() -> Recipe:
        """For tests, and for a look at whether it learns on a CPU."""
        return Recipe(
            shape=Shape(hidden_size=128, intermediate_size=384, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=32),
            plan=ShardPlan(rows_per_shard=16, row_len=512, early_shards=1 << 20),
            rows_per_step=4,
            warmup_tokens=60_000,
            tokenizer_conversations=1500,
            validation_rows=16,
        )


@dataclass(frozen=True)
class HeadRecipe:
    """For a head that guesses what the model says. Tokens of answers count, all alike; others not."""

    shape: HeadShape = field(default_factory=HeadShape)
    plan: ShardPlan = field(default_factory=lambda: ShardPlan(rows_per_shard=16, early_shards=0, mixture="agents"))
    rates: Rates = field(default_factory=lambda: Rates(matrix_rate=0.02, other_rate=2e-3))
    rows_per_step: int = 2
    passes: int = 2  # over a shard: to ask the model costs as much as a step
    warmup_tokens: int = 100_000
    decay_share: float = 0.7
    counted_rows: int = 256  # that say which tokens the head may guess
    validation_rows: int = 8
    seed: int = 0


def timed_share(recipe: Recipe | HeadRecipe, num_tokens: int, elapsed: float) -> float:
    """As `rate_share` where the end is a time: `elapsed` is the share of it that has passed."""
    rise = min(1.0, (num_tokens + 1) / recipe.warmup_tokens)
    return max(0.0, min(rise, (1 - elapsed) / recipe.decay_share))


def rate_share(recipe: Recipe, num_tokens: int, total_tokens: int | None) -> float:
    """The share of the peak learning rate after `num_tokens`: up, level, and down in a straight line. As long as the
    total is not known: level.
    """
    rise = min(1.0, (num_tokens + 1) / recipe.warmup_tokens)
    if total_tokens is None:
        return rise
    fall = (total_tokens - num_tokens) / (recipe.decay_share * total_tokens)
    return max(0.0, min(rise, fall))


@dataclass
class Pace:
    """Turns the minutes there are into a number of tokens, once it is known how fast training is."""

    seconds_per_command: float
    total_seconds: float  # of all commands together
    _STARTING_SHARE = 0.04  # kept back for saving and for what slows down

    def total_tokens(
        self, num_tokens: int, tokens_per_second: float, used_before: float, used_now: float, start_seconds: float
    ) -> int:
        """Tokens of the whole training.

        num_tokens: done so far. used_before, used_now: seconds that earlier commands and this one took. start_seconds:
            what a command needs before it trains.
        """
        left = self.total_seconds - used_before - used_now
        left_now = min(left, self.seconds_per_command - used_now)
        later = math.ceil(max(0.0, left - left_now) / self.seconds_per_command - 0.02)
        seconds = max(0.0, left - later * start_seconds) * (1 - self._STARTING_SHARE)
        return num_tokens + int(seconds * tokens_per_second)
