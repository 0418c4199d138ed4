"""The options of both training stages: the recipe's sections ``pretrain``, ``distill`` and ``compute``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, get_args, get_origin, get_type_hints

from messnet.data.options import AugmentOptions
from messnet.errors import RecipeError

if TYPE_CHECKING:
    from lightning_fabric import Fabric

Schedule = Literal["alternating", "modulo"]
Scheme = Literal["exit_aware", "baseline", "end_to_end"]
OptimizerName = Literal["sgd", "adamw"]
LogKind = Literal["csv", "tensorboard", "both", "none"]
DistillationLoss = Literal["pfd", "kd", "self_distillation", "ce"]


@dataclass(frozen=True, kw_only=True)
class ComputeOptions:
    """The device, the precision and what is shown of a training. No option here changes which images, augmentations or
    weights a training has, so a run that was stopped may go on with others."""

    device: Literal["auto", "cpu", "cuda", "mps", "xpu"] = "auto"
    """"auto" (CUDA if there is any, else the processor), "cpu", "cuda", or where torch has them "mps", Apple's, and
    "xpu", Intel's: both untested."""
    precision: Literal["auto", "f32", "bf16"] = "auto"
    """"bf16" is autocast: weights stay float32. "auto": that on CUDA, else float32; on a CPU depthwise backward passes
    are slower in bf16."""
    cuda_graphs: bool = False
    """True: on CUDA a step of the training is recorded once and replayed, which spares the processor a thousand kernel
    launches a step; most for small networks. Crops need one size. Elsewhere, and with several processes, no change."""
    num_workers: int = 1
    """Processes that load and augment images; 0: the training process itself."""
    devices: int = 1
    """Processes that train together on this machine, each with a device; torchrun says it itself and goes before."""
    log: LogKind = "csv"
    """Where losses and mIoU go, below RUN/logs: "csv", "tensorboard" (needs the extra "log"), "both" or "none"."""
    validate_every: int | None = None
    """Iterations between two looks at validation images; None: with every checkpoint; 0: never."""
    validate_images: int = 16
    """How many, spread evenly over the split: enough to see whether training goes wrong, not to rank."""

    def __post_init__(self) -> None:
        for name, least in (("devices", 1), ("validate_every", 0), ("validate_images", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise RecipeError(f"compute.{name} must be at least {least}, got {value}")

    def fabric(self) -> Fabric:
        """The device and the precision; no other process is started or waited for."""
        from messnet.training.fabric import make_fabric  # seconds, which a recipe that is only read should not take

        return make_fabric(self.device, self.precision, self.devices)

    @property
    def is_parallel(self) -> bool:
        """True where several processes train together."""
        from messnet.training.fabric import is_parallel

        return is_parallel(self.devices)

    def records(self, fabric: Fabric) -> bool:
        """Whether steps are CUDA graphs."""
        return self.cuda_graphs and fabric.device.type == "cuda" and not self.is_parallel

    def launch(self) -> Fabric:
        """``fabric``, with the other processes started (unless torchrun did) and met; once is as good as twice."""
        fabric = self.fabric()
        if self.is_parallel:
            fabric.launch()
        return fabric


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """The options that both stages share; defaults from torchvision's segmentation reference."""

    section: ClassVar[str] = "training"
    least_iterations: ClassVar[int] = 1

    iterations: int = 10_000
    batch_size: int = 16
    """At least 2: normalisation over a globally pooled feature needs two values."""
    learning_rate: float = 0.01
    """For a batch of 16, scaled in proportion to the batch: at batch_size 8 half of it is what the optimiser gets, and
    training says so when it begins. Falls to 0 by the poly 0.9 rule."""
    warmup: int = 0
    """First iterations over which the learning rate rises from 0."""
    optimizer: OptimizerName = "sgd"
    """"sgd", stochastic gradient descent, or "adamw" (Loshchilov and Hutter 2019), which wants a far smaller
    ``learning_rate``, such as 0.0005, and a larger ``weight_decay``, such as 0.01."""
    momentum: float = 0.9
    """In [0, 1): of SGD; of AdamW its beta1, the other one is 0.999."""
    weight_decay: float = 1e-4
    ema: float | None = None
    """Decay per iteration, in (0, 1), of a moving average of the weights, which then is what is validated and handed
    on; 0.999 averages over about the last 1000 iterations. None: the weights themselves."""
    augment: AugmentOptions = AugmentOptions()
    loss_stride: int = 1
    """The loss is taken at every n-th pixel in both directions; 1: all of them. Saves time where heads are light."""
    class_weights: tuple[float, ...] | Literal["auto"] | None = None
    """Weight of each class in the loss; None: all 1; "auto": 1 / log(1.02 + share of the class in the training labels),
    scaled to mean 1 over the pixels (ENet, Paszke et al. 2016). Weights help a short training to find rare classes; a
    long one ends at a higher mIoU without (docs/results.md)."""
    checkpoint_every: int = 200
    """Iterations between two checkpoints, the most that a kill can lose. Where so many take longer than two minutes, a
    checkpoint is saved every two minutes too."""
    seed: int = 0

    def __post_init__(self) -> None:
        least_of = {"iterations": self.least_iterations, "batch_size": 2, "loss_stride": 1, "checkpoint_every": 1}
        for name, least in least_of.items():
            if getattr(self, name) < least:
                raise RecipeError(f"{self.section}.{name} must be at least {least}, got {getattr(self, name)}")
        if not 0 <= self.learning_rate < math.inf:
            raise RecipeError(f"{self.section}.learning_rate must be at least 0 and finite, got {self.learning_rate}")
        # A recipe's words have been checked by the codec; these may come from Python.
        for name, kind in get_type_hints(type(self)).items():
            if get_origin(kind) is Literal and getattr(self, name) not in get_args(kind):
                *choices, last = map(repr, get_args(kind))
                expected = f"{', '.join(choices)} or {last}"
                raise RecipeError(f"{self.section}.{name} must be {expected}, got {getattr(self, name)!r}")
        if not 0 <= self.momentum < 1:
            raise RecipeError(f"{self.section}.momentum must be at least 0 and below 1, got {self.momentum}")
        if self.ema is not None and not 0 < self.ema < 1:
            raise RecipeError(f"{self.section}.ema must be above 0 and below 1, such as 0.999, got {self.ema}")


@dataclass(frozen=True, kw_only=True)
class PretrainOptions(TrainOptions):
    """Stage 1: how the backbone and the final head learn."""

    section = "pretrain"
    least_iterations = 0

    iterations: int = 10_000
    """0 keeps the network as model.weights deliver it, to the bit: only heads are trained then. The first thing to try
    with a trained model."""
    scheme: Scheme = "exit_aware"
    """Which early exits' losses join the final one's: "exit_aware", those of ``schedule``; "baseline", none;
    "end_to_end", all, in every iteration."""
    schedule: Schedule = "alternating"
    """Which early exits are active under "exit_aware". "alternating": one per iteration, in turn. "modulo": exit i when
    i divides the iteration. The paper describes both (docs/method.md#training)."""
    head_learning_rate: float | None = None
    """The learning rate of the final head and the early ones, scaled alike; None: ``learning_rate``. Ten times that
    where the backbone is trained and the head is new, as in DeepLab's recipes (Chen et al., TPAMI 2018)."""
    keep: Literal["last", "best"] = "last"
    """Which weights the stage hands on: the last ones, or of those validated (compute.validate_every) the ones with
    the best mean mIoU over the exits."""
    patience: int | None = None
    """Ends the stage after so many looks at validation images (compute.validate_every) in a row without a better mean
    mIoU over the exits; with ``keep: best``, at the best one. None: never. Stage 2 has none, for no head may depend on
    the others."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patience is not None and self.patience < 1:
            raise RecipeError(f"pretrain.patience must be at least 1, got {self.patience}")
        if self.head_learning_rate is None:
            return
        if not 0 < self.head_learning_rate < math.inf:
            raise RecipeError(f"pretrain.head_learning_rate must be above 0 and finite, got {self.head_learning_rate}")
        if not self.learning_rate > 0:
            raise RecipeError(
                f"pretrain.head_learning_rate needs a pretrain.learning_rate above 0, got {self.learning_rate}"
            )


@dataclass(frozen=True, kw_only=True)
class DistillOptions(TrainOptions):
    """Stage 2, frozen-backbone distillation."""

    section = "distill"
    least_iterations = 0

    iterations: int = 10_000
    """0 keeps the heads that stage 1 trained as they are: with ``plain_heads: stage1`` and no heads but plain ones."""
    plain_heads: Literal["new", "stage1"] = "new"
    """How the plain head of an exit (channel_reduction 1, no extra block, fcn) begins: "new", as all others and as in
    the paper; "stage1", with the weights that stage 1 trained it to, if it trained any: not with pretrain.iterations 0
    or scheme "baseline"."""
    loss: DistillationLoss = "pfd"
    """"pfd": positive filtering distillation; "kd": unfiltered; "self_distillation": from the next deeper exit too;
    "ce": labels alone. (The paper's "exits only" is "ce" after pretrain.scheme "baseline".)"""
    alpha: float = 0.5
    """Weight of the labels against the teachers' distributions, [0, 1]."""
    filter_kl: bool = False
    """Of "pfd": filter the KL term too, so that only pixels that the final exit gets right pass."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.iterations and self.plain_heads == "new":
            raise RecipeError(
                "distill.iterations: 0 trains no head: it goes with distill.plain_heads: stage1, which keeps those of "
                "stage 1"
            )
