"""The one function behind which the proof machinery stands."""

from __future__ import annotations

from collections.abc import Sequence

from messnet.searching.answers import Proof, SearchSetting
from messnet.searching.exact.candidates import evaluate_choice
from messnet.searching.exact.compiling import loops_running
from messnet.searching.exact.outcome import Control, Outcome, Region, Tuning
from messnet.searching.exact.problem import Problem
from messnet.searching.exact.solver import Solver
from messnet.searching.exact.strips import FrontSolver


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
    """
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
