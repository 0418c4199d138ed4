"""The errors a user can cause.

MessError
 ├── RecipeError     a recipe: unknown key, wrong value, no such file
 ├── DataError       images and masks: missing, unreadable, of the wrong size, ids out of range
 ├── ModelError      a model that cannot be built, traced, cut or loaded
 ├── PredictionError an image for which the network computes nothing that means anything
 ├── RunError        a run directory or bundle: another recipe's, incomplete, damaged, newer
 └── InfeasibleError no instance meets the constraints of a search

Each message is one line that says what was expected, what came, and what to do. The command prints it and
exits with code 2; anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

# Which extra brings what the core does without, by the name under which it is imported.
_EXTRA_OF = {
    "cv2": "train",
    "greenlet": "train",
    "jinja2": "report",
    "lightning": "train",
    "lightning_fabric": "train",
    "markupsafe": "report",
    "matplotlib": "report",
    "numba": "train",
    "onnx": "train",
    "onnxscript": "train",
    "openvino": "openvino",
    "optuna": "bench",
    "pycocotools": "data",
    "safetensors": "train",
    "scipy": "data",
    "segmentation_models_pytorch": "zoo",
    "tensorboard": "log",
    "timm": "zoo",
    "torch": "train",
    "torchvision": "train",
    "transformers": "zoo",
}


class MessError(Exception):
    """Base of every error that the user can mend."""


class RecipeError(MessError):
    """A recipe or an option is not valid."""


class DataError(MessError):
    """Images or masks are missing, unreadable or inconsistent."""


class ModelError(MessError):
    """A model cannot be built, traced, cut or loaded."""


class PredictionError(MessError):
    """A network's logits for an image are NaN or infinite. Of a batch others may be sound: run them one by one."""


class RunError(MessError):
    """A run directory or bundle belongs to another recipe, is incomplete, damaged or newer."""


class InfeasibleError(MessError):
    """No instance of the search space meets the constraints."""


@contextmanager
def needing_extras(**smallest: str) -> Iterator[None]:
    """Around code that imports what the core does without: a package that is not installed becomes a MessError that
    names the extra which brings it. ``smallest`` names another extra for a package, where less than all is enough."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        extra = (_EXTRA_OF | smallest).get(package)
        if extra is None:
            raise
        raise MessError(
            f"this needs the package {package}, which is not installed: pip install 'messnet[{extra}]'"
        ) from error


def one_line(text: str) -> str:
    """``text`` on one line and fit to be shown. What an error quotes may come from a stranger's file, and control
    characters do things to a terminal or turn the direction of writing: each becomes a question mark."""
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join(text.split()))
