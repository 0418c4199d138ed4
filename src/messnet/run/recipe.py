"""The recipe: one frozen record composed of the stages' own options, read from strict YAML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import yaml
from cyclopts import App, CycloptsError, Parameter
from cyclopts.config import Yaml

from messnet.data.sources import DataOptions
from messnet.errors import RecipeError
from messnet.evaluation import EvaluationOptions
from messnet.network.backbone import ExitCost
from messnet.network.exit_head import HeadSpace
from messnet.searching import Grid
from messnet.training import ComputeOptions, DistillOptions, PretrainOptions

__all__ = ["ModelOptions", "Recipe", "SearchOptions", "load_recipe", "recipe_from_record", "recipe_to_record"]


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
    num_exits: int = 6
    """N, the final exit included."""
    exit_cost: ExitCost = "workload"
    """What the exits are to divide evenly: "workload", or "latency" as measured while profiling."""
    exit_points: tuple[str, ...] | None = None
    """Early exit points by module path, shallow to deep, instead of num_exits even ones; a model that cannot be traced
    is tapped there."""
    head: str | None = None
    """Module path of the segmentation head; None: found by its name."""

    def __post_init__(self) -> None:
        if self.num_exits < 2:
            raise RecipeError(f"model.num_exits must be at least 2 (one early exit), got {self.num_exits}")

    @property
    def build_options(self) -> dict[str, float]:
        return {name: value for name in ("width", "depth") if (value := getattr(self, name)) is not None}


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """What ``messnet run`` searches: the best accuracy at no more work than the model, and the least work for each
    drop; all input-dependent, one early cut included."""

    max_drops_pp: tuple[float, ...] = (0.1, 1.0)
    """mIoU that may be lost against the final exit, percentage points."""
    grid: Grid = Grid()
    time_limit: float | None = 300.0
    """Seconds for the front, and for each objective if the front was not proved by then; null: as long as it takes."""
    seed: int = 0
    """Which half of the validation images is selected on."""

    def __post_init__(self) -> None:
        if self.time_limit is not None and not self.time_limit >= 0:
            raise RecipeError(f"search.time_limit must be at least 0 seconds, got {self.time_limit}")


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
    compute: ComputeOptions = ComputeOptions()


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, with ``--section.key value`` pairs over it.

    Raises RecipeError, one line, for a missing file, an unknown key or a value of the wrong kind.
    """
    if not path.is_file():
        raise RecipeError(f"no recipe {path}: expected a YAML file; the ones that come with messnet are in configs/")
    _expect_sections(path)
    app = App(
        default_parameter=Parameter(consume_multiple=True),
        config=Yaml(path, use_commands_as_keys=False),
        help_flags=[],
        version_flags=[],
    )

    @app.default
    def collect(*, recipe: Annotated[Recipe, Parameter(name="*")] = Recipe()) -> Recipe:
        return recipe

    try:
        recipe = app(_joined(overrides), exit_on_error=False, print_error=False, result_action="return_value")
    except (CycloptsError, RecipeError) as error:
        message = " ".join(str(error).split())
        if isinstance(error, CycloptsError) and error.msg and error.argument:  # such a message does not say where
            message = f"{error.argument.name.removeprefix('--')}: {message}"
        raise RecipeError(message if str(path) in message else f"{path}: {message}") from error
    assert isinstance(recipe, Recipe)
    return recipe


def recipe_to_record(recipe: Recipe) -> dict[str, Any]:
    """Plain values only, as JSON and YAML hold them."""
    return {name: _plain(value) for name, value in asdict(recipe).items()}


def recipe_from_record(record: dict[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """The inverse of ``recipe_to_record``. Raises RecipeError for keys that this version does not know."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(yaml.safe_dump(_without_none(record)))
        try:
            return load_recipe(path, overrides)
        except RecipeError as error:
            raise RecipeError(str(error).replace(str(path), "the recorded recipe")) from error


def _joined(overrides: Sequence[str]) -> list[str]:
    """``--key true`` as ``--key=true``: cyclopts takes the former for a flag and a stray word."""
    joined: list[str] = []
    key = ""
    for token in overrides:
        if token.startswith("--"):
            key = token
        if token in ("true", "false") and key:
            if joined[-1] == key:
                joined.pop()
            token = f"{key}={token}"
        joined.append(token)
    return joined


def _expect_sections(path: Path) -> None:
    try:
        content = yaml.safe_load(path.read_bytes())
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise RecipeError(f"{path}{line} is not YAML: {error.problem}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    sections = [field.name for field in fields(Recipe)]
    if content is not None and not isinstance(content, dict):
        raise RecipeError(f"{path} must hold sections ({', '.join(sections)}), got {type(content).__name__}")
    for name, value in (content or {}).items():
        if name in sections and not isinstance(value, dict):
            raise RecipeError(f"section {name!r} of {path} must hold keys and values, got {value!r}")


def _plain(value: Any) -> Any:
    match value:
        case dict():
            return {key: _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case Path():
            return str(value)
        case _:
            return value


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return value
