"""The errors a user can cause.

MessError
 ├── RecipeError     a recipe: unknown key, wrong value, no such file
 ├── DataError       images and masks: missing, unreadable, of the wrong size, ids out of range
 ├── ModelError      a model that cannot be built, traced, cut or loaded
 ├── RunError        a run directory or bundle: another recipe's, incomplete, damaged, newer
 └── InfeasibleError no instance meets the constraints of a search

Each message is one line that says what was expected, what came, and what to do. The command prints it and
exits with code 2; anything else is a bug and keeps its traceback.
"""

__all__ = ["DataError", "InfeasibleError", "MessError", "ModelError", "RecipeError", "RunError"]


class MessError(Exception):
    """Base of every error that the user can mend."""


class RecipeError(MessError):
    """A recipe or an option is not valid."""


class DataError(MessError):
    """Images or masks are missing, unreadable or inconsistent."""


class ModelError(MessError):
    """A model cannot be built, traced, cut or loaded."""


class RunError(MessError):
    """A run directory or bundle belongs to another recipe, is incomplete, damaged or newer."""


class InfeasibleError(MessError):
    """No instance of the search space meets the constraints."""
