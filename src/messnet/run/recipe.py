"""The recipe: one frozen record composed of the stages' own options, read from strict YAML."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import cast

import yaml

from messnet.data.sources import DataOptions
from messnet.errors import RecipeError
from messnet.images.preprocessing import IMAGENET, Normalisation
from messnet.network.exit_points import ExitCost
from messnet.network.head_space import HeadSpace
from messnet.policy.options import EvaluationOptions
from messnet.records.codec import MismatchError, Plain, field_type, from_plain, to_plain
from messnet.records.files import expect_recipe
from messnet.records.names import GraphRuntime, Precision, expect_runtime, precision_named
from messnet.records.written import as_meant, value_of
from messnet.searching.options import SearchOptions
from messnet.training.options import ComputeOptions, DistillOptions, PretrainOptions

_MOST_NODES = 100_000
"""Values in a recipe, aliases written out; those that come with messnet have fewer than 200."""


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The model to convert and where it may exit."""

    name: str = "mobilenetv2_fcn"
    """A zoo name or "module:function"."""
    width: float | None = None
    """Channel multiplier, for zoo models that have one."""
    depth: float | None = None
    """Block multiplier, for zoo models that have one."""
    weights: str | None = None
    """What stage 1 starts from: a safetensors file or torch state dict with all tensors of the model, or torchvision's
    name of weights ("FCN_ResNet50_Weights.COCO_WITH_VOC_LABELS_V1")."""
    backbone_weights: str | None = None
    """What the backbone of stage 1 starts from: a file as for weights, or "package:path", a file of an installed
    package; what fits is loaded by name or by order, and the head stays new."""
    num_exits: int = 6
    """N, the final exit included."""
    exit_cost: ExitCost = "workload"
    """The cost that the exits divide evenly: "workload", or "latency" as measured while profiling."""
    exit_points: tuple[str, ...] | None = None
    """Early exit points by module path, shallow to deep, instead of num_exits even ones; a model that cannot be traced
    is tapped there."""
    head: str | None = None
    """Module path of the segmentation head; None: found by its name."""
    normalisation: Normalisation = IMAGENET
    """What the model's weights expect of images, see there."""

    def __post_init__(self) -> None:
        if self.num_exits < 2:
            raise RecipeError(f"model.num_exits must be at least 2 (one early exit), got {self.num_exits}")
        if self.weights and self.backbone_weights:
            raise RecipeError(
                "model.weights are of the whole model, model.backbone_weights of a part: give one of them"
            )

    @property
    def build_options(self) -> dict[str, float]:
        return {name: value for name in ("width", "depth") if (value := getattr(self, name)) is not None}


@dataclass(frozen=True, kw_only=True)
class DeployOptions:
    """What the run ends in: the fastest instance in each precision of a runtime, measured there beside the model."""

    precisions: tuple[Precision, ...] = ()
    """Such as [f32, int8]; gains and losses are against the model in the first. Empty: nothing is deployed."""
    runtime: GraphRuntime = "onnxruntime"
    max_drop_pp: float = 1.0
    """mIoU that the instances may lose, percentage points."""
    threads: int | None = None
    """Of the processor; None: as many as torch takes."""

    def __post_init__(self) -> None:
        for precision in self.precisions:
            expect_runtime(self.runtime, precision)
        if len({*self.precisions}) < len(self.precisions):
            raise RecipeError(f"deploy.precisions names one of {', '.join(self.precisions)} twice")
        if not math.isfinite(self.max_drop_pp):
            raise RecipeError(f"deploy.max_drop_pp is a number of percentage points, got {self.max_drop_pp}")
        if self.threads is not None and self.threads < 1:
            raise RecipeError(f"deploy.threads must be at least 1, got {self.threads}")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that makes a run, stage by stage."""

    data: DataOptions = DataOptions()
    model: ModelOptions = ModelOptions()
    heads: HeadSpace = HeadSpace()
    pretrain: PretrainOptions = PretrainOptions()
    distill: DistillOptions = DistillOptions()
    evaluate: EvaluationOptions = EvaluationOptions()
    search: SearchOptions = SearchOptions()
    deploy: DeployOptions = DeployOptions()
    compute: ComputeOptions = ComputeOptions()

    def __post_init__(self) -> None:
        if not self.pretrain.iterations and not self.model.weights and ":" not in self.model.name:
            raise RecipeError(
                "pretrain.iterations: 0 keeps the network as it comes, and without model.weights that is an untrained "
                "one: name the weights, or let stage 1 train"
            )

    @property
    def trains_heads_in_stage1(self) -> bool:
        return self.pretrain.iterations > 0 and self.pretrain.scheme != "baseline"

    @property
    def plain_heads_go_on(self) -> bool:
        """Whether plain heads begin stage 2 with the weights of stage 1."""
        return self.distill.plain_heads == "stage1" and self.trains_heads_in_stage1


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, with ``--section.key value`` pairs over it.

    Raises RecipeError, one line, for a missing file, an unknown key or a value of the wrong kind.
    """
    expect_recipe(path)
    if not path.is_file():
        raise RecipeError(f"{path} is a folder: expected a recipe, a YAML file")
    return _recipe(_read_yaml(path), overrides, source=str(path))


def recipe_to_record(recipe: Recipe) -> dict[str, Plain]:
    """Plain values only, as JSON and YAML hold them."""
    return cast("dict[str, Plain]", to_plain(recipe))


def recipe_from_record(record: Mapping[str, object], overrides: Sequence[str] = ()) -> Recipe:
    """The inverse of ``recipe_to_record``. Raises RecipeError for keys that this version does not know."""
    return _recipe(dict(record), overrides, source="the recorded recipe", quiet=True)


def _recipe(content: dict[str, object], overrides: Sequence[str], *, source: str, quiet: bool = False) -> Recipe:
    said = dict(reversed(list(_parse_overrides(overrides))))  # of two equal options the last wins
    # Overrides into copies of the sections: a record that was handed in stays as it is.
    for name, value in said.items():
        *sections, key = name.split(".")
        place = content
        for section in sections:
            inner = place.get(section)
            place[section] = dict(inner) if isinstance(inner, dict) else {}
            place = cast("dict[str, object]", place[section])
        place[key] = value
    _expect_new_names(content, quiet=quiet and not said)
    try:
        return from_plain(content, Recipe, texts=True)  # YAML reads 1e-3, without a dot, as text
    except MismatchError as error:
        of_override = error.place.partition("[")[0] in said
        raise RecipeError(f"--{error}" if of_override else f"{source}: {error}") from error
    except RecipeError as error:
        raise RecipeError(f"{source}: {error}") from error


def _expect_new_names(content: dict[str, object], *, quiet: bool) -> None:
    """Puts the precision's name of today in the place of one of version 0.1; another word is left to be refused."""
    compute = content.get("compute")
    if isinstance(compute, dict) and isinstance(name := compute.get("precision"), str):
        with suppress(RecipeError):
            named = precision_named(name, option="compute.precision", quiet=quiet)
            content["compute"] = {**compute, "precision": named}


def _read_yaml(path: Path) -> dict[str, object]:
    """The sections of a recipe file. YAML reads a class called `no` as false and 0x10 as 16, so what the recipe takes
    as text is kept as it is written."""
    data = path.read_bytes()
    try:
        # Composed, aliases are still references: what they stand for is counted before anything is built of it.
        if _size(yaml.compose(data), {}) > _MOST_NODES:
            raise RecipeError(
                f"{path} has aliases that hold themselves or stand for more than {_MOST_NODES:,} values: write them out"
            )
        values, texts = yaml.safe_load(data), yaml.load(data, yaml.BaseLoader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise RecipeError(f"{path}{line} is not YAML: {error.problem}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise RecipeError(f"{path} is nested deeper than a recipe is: expected sections of keys and values") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        sections = ", ".join(field.name for field in fields(Recipe))
        raise RecipeError(f"{path} must hold sections ({sections}), got {type(values).__name__}")
    return cast("dict[str, object]", as_meant(values, texts, Recipe))


def _size(node: yaml.Node | None, known: dict[int, float]) -> float:
    """How many values a node becomes when its aliases are written out; infinite where an alias holds itself.

    Aliases of aliases double with each line: thirty lines become a billion values, so they are counted before they are
    made. A node that is being counted when it is met again (``known`` says infinite) holds itself.
    """
    if node is None or id(node) in known:
        return 0 if node is None else known[id(node)]
    known[id(node)] = math.inf
    inner = [one for pair in node.value for one in pair] if isinstance(node, yaml.MappingNode) else node.value
    known[id(node)] = 1 + (0 if isinstance(node, yaml.ScalarNode) else sum(_size(one, known) for one in inner))
    return known[id(node)]


def _parse_overrides(tokens: Sequence[str]) -> Iterator[tuple[str, object]]:
    """(dotted name, value) of ``--section.key value ...``, the last first. Raises RecipeError for anything else."""
    # Backwards: the words of an option are known when it is reached.
    words: list[str] = []
    for token in [*reversed(tokens)]:
        if not token.startswith("--"):
            words.insert(0, token)
            continue
        option, assigned, first = token.partition("=")
        name = option.removeprefix("--").replace("-", "_")
        kind = _type_of(name, option)
        yield name, value_of([first, *words] if assigned else words, kind, option)
        words = []
    if words:
        raise RecipeError(f"{words[0]!r} is no option of a recipe: expected --section.key value")


def _type_of(name: str, option: str) -> object:
    known = dict(_names(Recipe))
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        advice = f"did you mean --{near[0]}?" if near else "`messnet recipe` shows all"
        raise RecipeError(f"{option} is no option of a recipe: {advice}")
    return known[name]


def _names(kind: type, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Dotted name and type of every value of a recipe."""
    for field in fields(kind):
        inner = field_type(kind, field.name)
        if is_dataclass(inner):
            yield from _names(cast("type", inner), f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", inner
