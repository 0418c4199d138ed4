"""What a search can be asked for. The fields and their texts are written here once: the function ``search`` builds
these records, and the command takes them as they are, so that every field is an option and its text the option's
help."""

# No ``from __future__ import annotations``: the command resolves the annotations where it adds its options' spelling.
import math
import re
from dataclasses import dataclass
from typing import Literal, cast, get_args

from messnet.errors import RecipeError
from messnet.records.names import CostName, Statistic

AnytimeGoal = Literal["area", "first_cost", "overhead", "miou"]


@dataclass(frozen=True, kw_only=True)
class Limit:
    """A cost that must not be exceeded, on every device asked for."""

    cost: CostName
    at_most: float
    """In the unit of the cost, or, if ``relative``, in costs of the user's whole model."""
    statistic: Statistic = "mean"
    """Over the images: their mean, the costliest one's (the deepest exit taken), or the least cost that 95 % of them do
    not exceed. Parameters and memory belong to the instance and are the same for all."""
    relative: bool = False

    def __post_init__(self) -> None:
        _expect_one_of(self.cost, get_args(CostName), "cost")
        _expect_one_of(self.statistic, get_args(Statistic), "statistic")
        if not self.at_most >= 0:
            raise RecipeError(f"{self.cost} cannot be at most {self.at_most:g}: costs are >= 0")

    @classmethod
    def parse(cls, text: str) -> "Limit":
        """Reads a text such as "parameters<=3e6", "latency_ms.p95<=40" or "macs<=0.5x" (half of the user's model's)."""
        match = re.fullmatch(r"\s*(\w+)(?:\.(\w+))?\s*<=\s*([0-9.eE+-]+)\s*(x?)\s*", text)
        try:
            if match is None:
                raise ValueError
            value = float(match[3])
        except ValueError:
            raise RecipeError(
                f"cannot read the limit {text!r}: expected such as parameters<=3e6, latency_ms.p95<=40 or macs<=0.5x"
            ) from None
        return cls(
            cost=cast(CostName, match[1]),
            at_most=value,
            statistic=cast(Statistic, match[2] or "mean"),
            relative=bool(match[4]),
        )


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What every objective can name, whatever the setting."""

    max_drop_pp: float | None = None
    """Largest drop of mIoU, in percentage points, against your model on the same images: as it was delivered where
    model.weights were given, else as its final exit is now. In the anytime setting it holds for the last result."""
    min_miou: float | None = None
    """Least mIoU, in [0, 1]; in the anytime setting that of the last result."""
    cost: CostName = "macs"
    """The cost that is constrained when mIoU is maximised, or the cost of anytime results."""

    def __post_init__(self) -> None:
        _expect_one_of(self.cost, get_args(CostName), "cost")
        _expect_number(self.max_drop_pp, "max_drop_pp")
        _expect_number(self.min_miou, "min_miou")

    def least_miou(self, baseline_miou: float) -> float:
        """The least mIoU that the terms allow, given that of the user's model on the same images; -inf: any."""
        least = [-math.inf]
        if self.min_miou is not None:
            least.append(self.min_miou)
        if self.max_drop_pp is not None:
            least.append(baseline_miou - self.max_drop_pp / 100)
        return max(least)


@dataclass(frozen=True, kw_only=True)
class Objective(Terms):
    """The least cost, or the best mIoU, subject to every constraint that is not None."""

    minimise: CostName | None = None
    """Look for the instance that costs least. Give minimise or maximise; without either, macs are minimised."""
    maximise: Literal["miou"] | None = None
    """Look for the most accurate instance."""
    statistic: Statistic = "mean"
    """How the cost is counted over the images: their mean, the costliest one's, or what 95 % of them do not exceed."""
    max_cost: float | None = None
    """Largest cost per image, in the unit of the cost (macs: multiply-accumulates, latency_ms: milliseconds); with
    several cost tables it holds on each device."""
    max_cost_ratio: float | None = None
    """Largest cost per image, relative to your whole model; with several cost tables it holds on each device."""
    limits_on: tuple[Limit, ...] = ()
    """A limit on a further cost: parameters<=3e6, latency_ms.p95<=40, macs<=0.5x (of the model's). May be repeated."""
    min_class_iou: tuple[tuple[str, float], ...] = ()
    """Least IoU of a class, such as car=0.6. May be repeated."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.minimise and self.maximise:
            raise RecipeError("give minimise or maximise, not both; bound the other with a constraint")
        _expect_one_of(self.minimise, (None, *get_args(CostName)), "cost")
        if self.maximise not in (None, "miou"):
            raise RecipeError(f"cannot maximise {self.maximise!r}: only 'miou'")
        _expect_one_of(self.statistic, get_args(Statistic), "statistic")
        _expect_number(self.max_cost, "max_cost")
        _expect_number(self.max_cost_ratio, "max_cost_ratio")
        for name, floor in self.min_class_iou:
            if not 0 <= floor <= 1:
                raise RecipeError(f"the IoU of {name} cannot be at least {floor:g}: an IoU is in [0, 1]")

    @property
    def cost_name(self) -> CostName:
        """The cost that is minimised or constrained."""
        return self.cost if self.maximise else self.minimise or "macs"

    @property
    def goal(self) -> Literal["cost", "miou"]:
        return "miou" if self.maximise else "cost"


@dataclass(frozen=True, kw_only=True)
class AnytimeTerms:
    """What only an anytime search can be asked for, subject to every constraint that is not None."""

    goal: AnytimeGoal = "area"
    """What an anytime instance is chosen for: the largest area under the accuracy-cost curve, the cheapest first
    result, the least overhead, or the best last mIoU."""
    horizon: float = 1.5
    """Where the area under the curve ends, in costs of your whole model; > 0."""
    max_first_cost: float | None = None
    """Largest cost of the first result, in the unit of the cost."""
    max_first_ratio: float | None = None
    """Largest cost of the first result, relative to your whole model."""
    min_first_miou: float | None = None
    """Least mIoU of the first result, in [0, 1]."""
    max_overhead: float | None = None
    """Largest cost of running all exits relative to running the last one alone, less 1."""
    min_area: float | None = None
    """Least area under the curve: the mean mIoU of the result at hand, up to the horizon; in [0, 1]."""
    min_exits: int = 2
    """Fewest exits of an anytime instance, the last one included."""


@dataclass(frozen=True, kw_only=True)
class AnytimeObjective(AnytimeTerms, Terms):
    """The best set of exits that all run, each with a result at hand when it is reached."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _expect_one_of(self.goal, get_args(AnytimeGoal), "anytime goal")
        if self.cost not in ("macs", "macs_paper", "latency_ms", "latency_p95_ms"):
            raise RecipeError(
                f"an anytime result does not come after so many {self.cost}: expected workload or latency"
            )
        if not 0 < self.horizon < math.inf:
            raise RecipeError(f"the horizon is {self.horizon:g} costs of the model: expected more than 0")
        if self.min_exits < 1:
            raise RecipeError(f"min_exits is {self.min_exits}, expected at least 1")


@dataclass(frozen=True, kw_only=True)
class Guarantee:
    """With probability >= 1 - delta over the draw of the calibration images, the expected loss is <= epsilon."""

    epsilon: float
    """Largest expected loss per image, see ``guarantee.loss_of``; in (0, 1)."""
    delta: float
    """Largest probability that the promise is wrong; in (0, 1)."""
    num_steps: int = 100
    """Steps of the path, >= 1; those that route alike count once."""

    def __post_init__(self) -> None:
        if not (0 < self.epsilon < 1 and 0 < self.delta < 1):
            raise RecipeError(
                f"a guarantee takes epsilon and delta, both between 0 and 1, such as 0.01 0.1; "
                f"got {self.epsilon:g} {self.delta:g}"
            )
        if self.num_steps < 1:
            raise RecipeError(f"num_steps is {self.num_steps}, expected at least 1")


def _expect_one_of(value: str | None, known: tuple[str | None, ...], what: str) -> None:
    if value not in known:
        raise RecipeError(f"unknown {what} {value!r}: expected one of {', '.join(filter(None, known))}")


def _expect_number(value: float | None, name: str) -> None:
    if value is not None and math.isnan(value):
        raise RecipeError(f"{name} is not a number")
