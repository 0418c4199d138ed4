"""The application that the verbs join, and what they share."""

from __future__ import annotations

import io
import json
import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App, CycloptsError, MissingArgumentError, Parameter, Token, UnknownOptionError

from messnet import __version__
from messnet.errors import MessError, needing_extras, one_line
from messnet.records.files import expect_recipe, write_atomically
from messnet.records.names import LabelSize, Precision, RuntimeName, precision_named, runtime_named

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

    from messnet.deployment.session import Session
    from messnet.records.instance import Instance
    from messnet.records.run_directory import RunDirectory
    from messnet.run.recipe import Recipe
    from messnet.run.run import Run


def examples(*commands: str) -> str:
    """For the end of a help page. (cyclopts leaves an "Examples" section of a docstring out.)"""
    return "**Examples**\n\n" + "\n".join(f"    messnet {command}" for command in commands)


app = App(
    name="messnet",
    version=__version__,
    help="Turn a semantic segmentation model into a multi-exit one and deploy it on the device at hand.",
    help_epilogue="""Examples

  messnet run configs/demo.yaml
  messnet run configs/camvid_mobilenetv2.yaml --data.root ../shared/camvid --out runs/camvid
  messnet predict runs/camvid photos/ --out predictions
""",
    default_parameter=Parameter(negative_iterable=()),
    help_format="plaintext",  # markdown, which the verbs' pages are, takes as long to load as all the rest
)

Target = Annotated[Path, Parameter(help="A recipe (YAML), or the directory of a run, which remembers its recipe.")]
Out = Annotated[Path | None, Parameter(help="The run's directory; by default runs/NAME, after the file of the recipe.")]
AsJson = Annotated[bool, Parameter(name="--json", negative="", help="Print the result as JSON.")]
Overrides = Annotated[
    str,
    Parameter(allow_leading_hyphen=True, help="Values over those of the recipe: --pretrain.iterations 500 ..."),
]


def _precision(_: object, tokens: Sequence[Token]) -> Precision:
    return precision_named(tokens[0].value, option=tokens[0].keyword or "precision")


def named_runtime(_: object, tokens: Sequence[Token]) -> RuntimeName:
    return runtime_named(tokens[0].value, option=tokens[0].keyword or "runtime")


PrecisionOption = Annotated[Precision, Parameter(converter=_precision)]
RuntimeOption = Annotated[RuntimeName, Parameter(converter=named_runtime)]


@dataclass(frozen=True, kw_only=True)
class SessionOptions:
    """How a verb opens what is deployed, as ``load`` takes it. The record is the options: its fields, their defaults
    and texts are the command's."""

    instance: str | None = None
    """One of the run's instances; by default the cheapest within 1 pp. A bundle has but one."""
    device: Literal["auto", "cpu", "cuda", "mps", "xpu"] = "auto"
    """Where torch computes: auto is CUDA where there is any. mps and xpu are untested."""
    runtime: RuntimeOption | None = None
    """What computes; by default torch, or for a bundle with graphs onnxruntime where torch is not installed. A run's
    graphs are made anew, which takes seconds an exit; a bundle exported for the runtime has them."""
    precision: PrecisionOption | None = None
    """The number format of weights and activations, where the runtime has it; by default f32, or the only one that a
    bundle has graphs in. int8 takes a bundle that was exported with it."""
    threads: int | None = None
    """Threads of the processor for the network; by default as many as the runtime takes."""
    model: str | None = None
    """module:function that builds the network of a bundle whose model is its maker's own. What a bundle names is not
    imported unless you name it here."""

    def open(self, target: Path, labels: LabelSize = "input", *, full_size: bool = False) -> Session:
        """Raises as ``load`` does."""
        from messnet.deployment.loading import load

        tell_of_translating(self.runtime)
        session = load(target, labels=labels, full_size=full_size, **asdict(self))
        if self.instance is None:
            tell_of_few_images(session.instance, target)
        return session


SessionFlags = Annotated[SessionOptions, Parameter(name="*")]

FEW_IMAGES = 50
"""On 54 images instances for 0.1 pp lost 0.5 pp elsewhere (benchmarks/results/promise_cpu_202611.md)."""

# The verbs that go on where they were stopped when they are given once more.
_RESUMED = {"run", "pretrain", "distill", "evaluate", "search", "deploy", "report"}


def main(tokens: Sequence[str] | None = None) -> None:
    """Runs the command; exits with 0, 1 (a bug, with its traceback), 2 (bad input, one line), 130 (interrupted) or 141
    (who read the output went away, as `| head` does)."""
    try:
        with needing_extras():
            # cyclopts would print its errors in a box and exit with 1: here every fault of the user's is one line and
            # 2.
            app(tokens, exit_on_error=False, print_error=False, result_action="return_value")
        # Here and not when the interpreter ends, where a reader that went away can no longer be answered with 141.
        sys.stdout.flush()
    except (MessError, CycloptsError) as error:
        said = _usage(error) if isinstance(error, MissingArgumentError | UnknownOptionError) else str(error)
        print(f"messnet: {one_line(said)}", file=sys.stderr)
        raise SystemExit(2) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains when it ends
        raise SystemExit(141) from None
    except OSError as error:
        # Without a name it is no file of the user's (a socket, a bug): that keeps its traceback.
        if error.filename is None:
            raise
        reason = f"{error.filename}: {error.strerror}"
        print(f"messnet: {reason}; name another place, or make this one accessible", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        given = list(sys.argv[1:] if tokens is None else map(str, tokens))
        again = f"; `{shlex.join(['messnet', *given])}` goes on from there" if {*given[:1]} & _RESUMED else ""
        print(f"messnet: interrupted; what was finished is kept{again}", file=sys.stderr)
        raise SystemExit(130) from None


def _usage(error: MissingArgumentError | UnknownOptionError) -> str:
    """The missing word under the name that the help page gives it, or the home of an option, and where that page is."""
    verb = " ".join(error.command_chain or ())
    if isinstance(error, UnknownOptionError):
        option = (error.token.keyword or error.token.value).partition("=")[0]
        if "." in option:
            return (
                f"{verb}: {option} is a value of a recipe: write it there, or give it to the verb that takes the "
                f"recipe, such as `messnet run RECIPE {option} VALUE`"
            )
        unknown = str(error).removeprefix("Unknown option: ")
        return f"{verb}: there is no option {unknown} `messnet {verb} --help` lists what there is"
    assert error.argument is not None  # cyclopts has set it where it raises
    count = error.argument.token_count()[0]
    if error.keyword:
        missing = f"{error.keyword} needs {'a value' if count == 1 else f'{count} values'}"
    else:
        is_word = error.argument.field_info.is_positional
        missing = f"{error.argument.name.removeprefix('--').upper() if is_word else error.argument.name} is missing"
    return f"{verb}: {missing}; `messnet {verb} --help` explains it"


def open_target(target: Path, overrides: Sequence[str], out: Path | None) -> Run:
    quieten()
    recipe_of(target, overrides)  # a slip in it is told before torch is loaded
    from messnet.run.opening import open_run

    return open_run(target, overrides, out=out)


def recipe_of(target: Path, overrides: Sequence[str]) -> Recipe:
    expect_recipe(target)
    from messnet.records.run_directory import RunDirectory
    from messnet.run.recipe import load_recipe, recipe_from_record

    if target.is_dir():
        return recipe_from_record(RunDirectory(target).record().recipe, overrides)
    return load_recipe(target, overrides)


def do_stage(stage: str, target: Path, overrides: Sequence[str], out: Path | None, *, quiet: bool = False) -> Run:
    opened = open_target(target, overrides, out)
    # Imports that bring torch stand inside the verbs: --help, and an error in the arguments, come at once without it.
    from messnet.run.stages import run_stage

    say(stage, run_stage(opened, stage), quiet)
    return opened


def say(stage: str, did: bool, quiet: bool) -> None:
    if not quiet:
        print(f"{stage}: {'done' if did else 'already done'}")


def show(*tables: Table | None) -> None:
    """Prints those of the tables that there are."""
    from rich.console import Console

    console = Console()
    for table in filter(None, tables):
        console.print(table)


def print_table(directory: RunDirectory, as_json: bool) -> None:
    """What came of a run: first the sentence to remember, then the tables, then where the page lies."""
    from rich.console import Console

    from messnet.report.classes import class_table, class_terminal_table, missed_by_rows
    from messnet.report.page import class_columns, not_in_table, opening, terminal_table
    from messnet.searching.findings import Findings

    measurements, deployed = directory.measurements.read(), directory.read_deployed()
    if as_json:
        # The record of the report as it always was; that of a deployment beside it.
        more = {"deployed": json.loads(deployed.to_json())} if deployed else {}
        print(json.dumps({**json.loads(measurements.to_json()), **more}, indent=1))
        return
    missing = not_in_table(measurements, Findings.from_json(directory.front.read()))
    sentence = opening(measurements, deployed)
    Console().print(f"\n{sentence}.\n", style="bold", markup=False, highlight=False)
    classes = class_table(class_columns(measurements), measurements.class_names)
    show(terminal_table(measurements, missing), class_terminal_table(classes))
    for sentence in missed_by_rows(measurements):
        print(sentence)
    if deployed:
        print_deployed(directory, False)
    print(f"report: {directory.report.path}")


def print_deployed(directory: RunDirectory, as_json: bool) -> None:
    from messnet.report.deployed import deployed_terminal_table

    deployed, bundle = directory.read_deployed(), directory.bundle
    assert deployed is not None  # who calls this has looked
    if as_json:
        print(deployed.to_json(), end="")
        return
    show(deployed_terminal_table(deployed))
    if bundle.exists():
        print(f"bundle: {bundle}; try it with `messnet predict {bundle} PHOTO`")


def plain_name(name: str) -> str:
    if not name or Path(name).name != name:
        raise MessError(f"--name must be a plain file name, got {name!r}")
    return name


def expect_picture(path: Path) -> None:
    """Before any work is done: raises MessError for the name of a plot whose ending is no kind of picture."""
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in kinds:
        raise MessError(f"--plot {path} is no picture: its name ends in one of {', '.join(sorted(kinds))}")


def save_figure(figure: Figure, path: Path, *, dpi: float) -> None:
    """Written whole or not at all, in the kind that the name ends in."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix[1:].lower(), dpi=dpi)
    write_atomically(path, buffer.getvalue())


def quieten() -> None:
    """Libraries' advice to developers is no news to the user of a command; a minute of silence is."""
    warnings.filterwarnings("ignore", module="lightning.*")
    _tell_of_compiling()


def tell_of_translating(runtime: RuntimeName | None) -> None:
    """A line before torch.compile keeps the user waiting, which it does without a word."""
    if runtime == "torch-compiled":
        print(
            "messnet: torch-compiled translates each part of the network when it first runs, and again for another "
            "size of image: that takes minutes",
            file=sys.stderr,
            flush=True,
        )


def tell_of_few_images(instance: Instance, target: Path) -> None:
    """A line where the instance that is taken by default was chosen on so few images that luck chose too."""
    images = int(instance.selected_on.get("images", FEW_IMAGES))
    if images < FEW_IMAGES:
        print(
            f"messnet: {instance.name}, taken by default, was chosen on {images} images, too few to tell a point of "
            f"mIoU from luck: `messnet evaluate {target} --data FOLDER` scores it on others",
            file=sys.stderr,
        )


@cache
def _tell_of_compiling() -> None:
    """A line before numba compiles the first of the inner loops that no earlier command left on the disk."""
    # Without numba NumPy and graphs do the inner loops, and nothing is compiled.
    if find_spec("numba") is None:
        return
    from numba.core import event
    from tqdm import tqdm

    class Teller(event.Listener):
        told = False

        def on_start(self, event: object) -> None:
            if not self.told:
                line = "messnet: compiling inner loops for this processor, once: up to a minute"
                tqdm.write(line, file=sys.stderr)  # above a bar
            self.told = True  # loops call one another: numba tells of each

        def on_end(self, event: object) -> None:
            pass

    event.register("numba:compile", Teller())  # type: ignore[no-untyped-call]
