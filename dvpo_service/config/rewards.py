"""``reward``: how responses are scored."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any, Literal, Self

from pydantic import Field, FiniteFloat, model_validator

from dvpo_service.algo.choices import NoiseKind, SpikeSign
from dvpo_service.config.base import NonNegative, NonNegativeFloat, Positive, PositiveFloat, Probability, Section
from dvpo_service.config.code import CodeConfig
from dvpo_service.config.judge import JudgeConfig
from dvpo_service.config.reward_model import RewardModelConfig

DEFAULT = "exact_match"
KINDS = ("function", "judge", "model")  # what a reward can be, one of them each


class NoiseConfig(Section):
    """Noise on rewards, for experiments (docs/algorithm.md, "Noise on the rewards").

    ``flip`` turns an outcome r in [0, 1] into 1 - r with probability ``p``. ``gaussian`` adds a draw from N(0, sd^2).
    ``spike`` adds one with probability ``p``; with ``sign`` up or down it adds or subtracts the draw's size.
    ``student_t`` adds ``scale`` times a draw from Student's t with ``df`` degrees of freedom. ``majority_vote`` scores
    against the group's most frequent answer.
    """

    kind: NoiseKind = "none"
    p: Probability = 0.0
    sd: NonNegativeFloat = 0.0
    sign: SpikeSign = "both"
    df: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 2.0
    scale: NonNegativeFloat = 1.0


def _one_kind(reward: Any, where: str) -> None:
    """Raise ValueError unless exactly one of ``KINDS`` is given."""
    given = [kind for kind in KINDS if getattr(reward, kind) is not None]
    if len(given) != 1:
        has = f"it has {' and '.join(given)}, and null clears one" if given else "it has none"
        raise ValueError(f"{where} needs exactly one of {', '.join(KINDS)}; {has}")


class RewardPart(Section):
    """One of several rewards whose weighted sum is the reward.

    Attributes:
      function: a built-in, or ``module:function`` of your own (docs/rewards.md).
      judge: a model behind an endpoint that scores, in place of ``function``.
      model: a reward model of transformers, in place of both.
      name: in metrics; by default that of the function.
      weight: its factor in the sum; 0 measures it without training on it.
      sources: the ``data_source`` values of the prompts that it scores; all when absent.
      timeout_s: for scoring one prompt's responses; ``reward.timeout_s`` when absent.
    """

    function: str | None = None
    judge: JudgeConfig | None = None
    model: RewardModelConfig | None = None
    name: Annotated[str, Field(min_length=1, max_length=80, pattern=r"^[^/]+$")] = ""
    weight: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    sources: Annotated[list[str], Field(min_length=1)] | None = None
    timeout_s: PositiveFloat | None = None

    @model_validator(mode="before")
    @classmethod
    def _named_by_its_kind(cls, given: Any) -> Any:
        if not isinstance(given, dict) or given.get("name"):
            return given
        function = given.get("function")
        names = [function.rpartition(":")[2]] if isinstance(function, str) else []
        names += [kind for kind in KINDS if given.get(kind) is not None]
        return given | {"name": names[0] if names and names[0] else "reward"}

    @model_validator(mode="after")
    def _is_of_one_kind(self) -> Self:
        _one_kind(self, f"the reward {self.name!r}")
        return self

    def scores(self, source: str) -> bool:
        """Return whether it scores the prompts of a ``data_source``."""
        return self.sources is None or source in self.sources

    @property
    def words(self) -> str:
        """What it is, for display."""
        if self.judge:
            return f"judge {self.judge.model}"
        return f"reward model {self.model.path}" if self.model else str(self.function)

    @property
    def identity(self) -> dict[str, Any]:
        """What decides its score."""
        what: dict[str, Any] = {"function": self.function}
        if self.judge:
            what = {"judge": self.judge.identity}
        if self.model:
            what = {"model": self.model.identity}
        return what | {"weight": self.weight, "sources": self.sources}

    @property
    def batched(self) -> bool:
        """Whether it scores many prompts' responses at once, rather than one prompt's after the other."""
        return self.function is None


class RewardConfig(Section):
    """How responses are scored.

    Attributes:
      function: exact_match, gsm8k, math_verify, code, or ``module:function`` of your own (docs/rewards.md).
      judge: a model behind an endpoint that scores, in place of ``function``.
      model: a reward model of transformers, in place of both.
      rewards: several rewards with weights, in place of these.
      normalise: whether each of ``rewards`` is first brought to mean 0 and standard deviation 1, over the responses to
        its prompt (``group``) or of its batch (``batch``), in training.
      clip: the lowest and the highest reward that training takes, for rewards whose range is known; null for no bounds.
        They hold after noise and before the overlong penalty.
      heartbeat_s: how often an idle worker is asked whether it is alive.
      max_memory_gib: a call that takes more memory than this beyond what its worker holds is a failed sample; null
        sets no bound.
      code: limits of the programs that the function ``code`` runs.
      overlong_buffer: tokens before the length limit over which the reward falls by up to ``overlong_penalty``; 0 is
        off.
      noise_by_source: replaces ``noise`` for the prompts of a ``data_source``, as graders differ in reliability.
    """

    function: str | None = None
    judge: JudgeConfig | None = None
    model: RewardModelConfig | None = None
    rewards: Annotated[list[RewardPart], Field(min_length=1)] | None = None
    normalise: Literal["none", "group", "batch"] = "none"
    clip: tuple[FiniteFloat, FiniteFloat] | None = None
    num_workers: Positive = 1
    timeout_s: PositiveFloat = 30.0
    start_timeout_s: PositiveFloat = 120.0
    heartbeat_s: PositiveFloat = 5.0
    heartbeat_timeout_s: PositiveFloat = 10.0
    max_memory_gib: PositiveFloat | None = 4.0
    code: CodeConfig = CodeConfig()
    overlong_buffer: NonNegative = 0
    overlong_penalty: PositiveFloat = 1.0
    noise: NoiseConfig = NoiseConfig()
    noise_by_source: dict[str, NoiseConfig] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _has_a_default(cls, given: Any) -> Any:
        if isinstance(given, dict) and all(given.get(key) is None for key in (*KINDS, "rewards")):
            return given | {"function": DEFAULT}
        return given

    @model_validator(mode="after")
    def _one_or_several(self) -> Self:
        votes = any(n.kind == "majority_vote" for n in self.noises)
        if votes and (self.function is None and len(self.rewards or []) != 1):
            raise ValueError("majority_vote noise replaces the reward by a vote: it is for one function")
        if self.rewards is None:
            _one_kind(self, "reward")
            return self
        if single := [kind for kind in KINDS if getattr(self, kind) is not None]:
            raise ValueError(
                f"reward.{single[0]} is one reward and reward.rewards a list of them; keep one, null clears the other"
            )
        twice = [name for name, count in Counter(part.name for part in self.rewards).items() if count > 1]
        if twice:
            raise ValueError(f"two of reward.rewards are named {twice[0]!r}; give each a name")
        if all(part.weight == 0 for part in self.rewards):
            raise ValueError("every weight of reward.rewards is 0, so there is nothing to learn; give one a weight")
        return self

    @model_validator(mode="after")
    def _bounds_in_order(self) -> Self:
        if self.clip is not None and not self.clip[0] < self.clip[1]:
            raise ValueError(f"reward.clip={list(self.clip)}: give the lowest reward first, then a higher one")
        return self

    @model_validator(mode="after")
    def _normalises_several(self) -> Self:
        if self.normalise != "none" and self.rewards is None:
            raise ValueError("reward.normalise is for reward.rewards; for one reward see algorithm.adv_estimator")
        return self

    @property
    def parts(self) -> list[RewardPart]:
        """The rewards, of which there may be one."""
        if self.rewards is not None:
            return self.rewards
        return [RewardPart(**{kind: getattr(self, kind) for kind in KINDS})]

    def timeout_of(self, part: RewardPart, responses: int = 1) -> float:
        """Return the seconds that one call for ``part`` may take, to score so many responses to a prompt."""
        if part.timeout_s is not None:
            return part.timeout_s
        if asked := part.judge or part.model:
            return asked.deadline_s
        if part.function == "code":  # whose programs have limits of their own; these must end first
            return self.timeout_s + responses * (self.code.program_s + self.code.wall_s)
        return self.timeout_s

    @property
    def crew(self) -> list[int | None]:
        """The workers: the number of the part whose model it has, or None for one that runs all other rewards."""
        parts = self.parts
        plain: list[int | None] = [None] * (self.num_workers if any(p.model is None for p in parts) else 0)
        return plain + [k for k, part in enumerate(parts) if part.model for _ in range(part.model.num_workers)]

    @property
    def noises(self) -> list[NoiseConfig]:
        """The noise of any source."""
        return [self.noise, *self.noise_by_source.values()]

    @property
    def words(self) -> str:
        """The rewards in words, for display."""
        if self.rewards is None:
            return self.parts[0].words
        return " + ".join(f"{part.weight:g} {part.name}" for part in self.rewards)

    @property
    def noise_words(self) -> str:
        """The kinds of noise in words, for display."""
        return "; ".join([self.noise.kind, *(f"{source}: {n.kind}" for source, n in self.noise_by_source.items())])
