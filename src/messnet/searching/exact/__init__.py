"""The search for optima and the proof that they are: ``solve`` answers a Region of a Problem with an Outcome.

An instance has one to three exits, one head each. With early exits a < b and last exit c it sends the images of a set A
out at a, those of B that are not in A at b, and all others at c; A and B follow from the thresholds at a and b.
Instances of one and two exits are all evaluated. Of three there are too many, so choices of exits and heads are
bounded, and only those whose bound leaves a chance are evaluated. The derivation, in the order in which the modules are
best read:

1. ``enumeration``: all thresholds of one choice of exits by running sums of pixel counts. 2. ``tangent``: a linear form
   that equals the mIoU of one instance and is near that of others. 3. ``bounds``, remainder: how far an mIoU can be
   above the linear form. 4. ``bounds``, price: linear form less price times cost is a sum over images, whose maximum
   bounds a choice of exits by a
   line in the plane of cost and mIoU.
5. ``bounds``, quick bounds of all choices of three exits (1.8 million at 5 early exits x 56 heads). 6. ``cells``:
   tighter bounds by classes of thresholds. 7. ``cells`` and ``enumeration``: evaluation of the choices that are left,
   the most promising first, with the same bounds
   for single thresholds.
8. ``solver`` and ``strips``: the order of all this for one objective and for a whole front; ``candidates`` left when a
   search is stopped give the proved gap.

A bound is used to rule out only; what is answered was evaluated exactly. Bounds are float32 and give away ``MARGIN``.
``arrays`` and ``problem`` hold what is searched, ``least_cost`` a bound on cost alone, ``compiling`` numba or its lack.
"""

from messnet.searching.exact.outcome import Control, Outcome, Region, Tuning
from messnet.searching.exact.problem import Problem
from messnet.searching.exact.solve import solve

__all__ = ["Control", "Outcome", "Problem", "Region", "Tuning", "solve"]
