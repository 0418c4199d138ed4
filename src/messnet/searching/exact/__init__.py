"""The search for optima and the proof that they are: ``solve`` answers a Region of a Problem with an Outcome.

An instance has one to three exits, one head each. With early exits a < b and last exit c it sends the images of a set A
out at a, those of B that are not in A at b, and all others at c; A and B follow from the thresholds at a and b.
Instances of one and two exits are all evaluated. Of three there are too many, so choices of exits and heads are
bounded, and only those whose bound leaves a chance are evaluated. The derivation, in the order in which the modules are
best read:

1. ``enumeration``: all thresholds of one choice of exits by running sums of pixel counts.
2. ``tangent``: a linear form that equals the mIoU of one instance and is near that of others.
3. ``bounds``, remainder: how far an mIoU can be above the linear form.
4. ``bounds``, price: linear form less price times cost is a sum over images, whose maximum bounds a choice of exits by
   a line in the plane of cost and mIoU.
5. ``bounds``, quick bounds of all choices of three exits (1.8 million at 5 early exits x 56 heads).
6. ``cells``: tighter bounds by classes of thresholds.
7. ``cells`` and ``enumeration``: evaluation of the choices that are left, the most promising first, with the same
   bounds for single thresholds.
8. ``solver`` and ``strips``: the order of all this for one objective and for a whole front; ``candidates`` left when a
   search is stopped give the proved gap.

A bound is used to rule out only; what is answered was evaluated exactly. Bounds are float32 and give away ``MARGIN``.
``arrays`` and ``problem`` hold what is searched, ``compiling`` numba or its lack.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from messnet.errors import RecipeError
from messnet.searching.answers import Proof, SearchSetting
from messnet.searching.exact import enumeration
from messnet.searching.exact.candidates import evaluate_choice
from messnet.searching.exact.compiling import COMPILED, loops_running
from messnet.searching.exact.outcome import Control, Outcome, Region, Tuning
from messnet.searching.exact.problem import Problem
from messnet.searching.exact.solver import Solver
from messnet.searching.exact.strips import FrontSolver

__all__ = ["Control", "Outcome", "Problem", "Region", "Tuning", "loops_to_compile", "solve"]


def solve(
    problem: Problem,
    region: Region,
    *,
    setting: SearchSetting = "input_dependent",
    control: Control | None = None,
    choice: Sequence[int] | None = None,
    tuning: Tuning | None = None,
) -> Outcome:
    """Searches all instances of the problem's grid, of one exit if ``setting`` is "budgeted".

    Stopped by ``control`` or at Ctrl-C it answers with the best so far and the proved gap. ``choice`` (positions in the
    tables' exits, shallow to deep) leaves the thresholds of one choice of exits to be searched, all of them evaluated.
    Raises RecipeError for a setting in which cost and mIoU are no single figures.
    """
    if setting not in ("budgeted", "input_dependent"):
        raise RecipeError(
            f"cannot search the setting {setting!r} for mIoU against cost: expected 'budgeted' or 'input_dependent'"
        )
    control, tuning = control or Control(), tuning or Tuning()
    with loops_running():
        if choice is None:
            solver = FrontSolver if region.goal == "front" else Solver
            return solver(problem, region, setting, control, tuning).run()
        # Thresholds of one choice of exits alone are few enough to evaluate all: nothing needs to be bounded.
        points = problem.points_of(evaluate_choice(problem, tuple(choice), region.max_cost, region.least_miou), setting)
    front = tuple(one for one in points if one.cost <= region.max_cost and one.miou >= region.least_miou)
    best = (front[::-1] if region.goal == "miou" else front)[: tuning.num_best]
    proof = Proof(num_declared=len(front), num_evaluated=len(front))
    return Outcome(front=front, static=(), best=best, proof=proof, incumbents=())


def loops_to_compile() -> bool:
    """Whether numba still has to compile the inner loops, which takes a minute or more: it has kept nothing on the disk
    that is younger than the source."""
    if not COMPILED:
        return False
    loop = enumeration.try_pairs_before
    kept = Path(loop.stats.cache_path).glob("enumeration.try_pairs_before-*.nbi")  # type: ignore[attr-defined]
    installed = Path(enumeration.__file__).stat().st_mtime
    return not any(file.stat().st_mtime > installed for file in kept)
