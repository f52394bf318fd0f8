"""The race: on the user's own card, kernels prove that they are right, and then which of them is fastest.

From the call to the verdict:

    spec.py      a call as sizes, strides, dtypes; the bucket of shapes that shares a verdict
    operands.py  random operands for it
    judge.py     whether two results differ by more than rounding
    timing.py    CUDA graphs, or the clock
    contest.py   the race itself, which knows of no device
    compiling.py whether a kernel is only being compiled
    identity.py  what a verdict depends on besides the call
    verdicts.py  verdicts on disk
    entrant.py   a kernel in a race
    races.py     which kernels race while a graph is compiled
    verify.py    a rewritten graph beside the user's own, on the first real inputs
"""

from .contest import Entry, Verdict, contest
from .races import Races, racing
from .spec import CannotRace
from .verdicts import Verdicts

__all__ = ["CannotRace", "Entry", "Races", "Verdict", "Verdicts", "contest", "racing"]
