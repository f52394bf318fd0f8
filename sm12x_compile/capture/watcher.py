"""What the control flow of a function asks while it runs, and whether the answers hold for other sizes."""

from __future__ import annotations

from typing import Any

import torch

from .pure_code import Opaque


class Watcher:
    """What the control flow of a watched function asked, over all its runs."""

    def __init__(self) -> None:
        self.asked: dict[tuple[str, int], set[tuple[Any, ...]]] = {}
        self.reason: str | None = None

    def truth(self, place: tuple[str, int], value: Any) -> Any:
        """A value whose truth decides where the code goes."""
        if isinstance(value, torch.Tensor):
            self.reason = "its control flow depends on the values of a tensor"
            raise Opaque(self.reason)
        self._note(place, ("truth", value if isinstance(value, (bool, int, float)) else value is None, bool(value)))
        return value

    def compare(self, place: tuple[str, int], kind: str, left: Any, right: Any, result: Any) -> Any:
        """A comparison, wherever it stands."""
        if not isinstance(result, torch.Tensor) and kind not in ("Is", "IsNot"):
            known = all(isinstance(x, (bool, int, float, str, tuple, type(None), torch.dtype)) for x in (left, right))
            self._note(place, (kind, left, right, bool(result)) if known else (kind, bool(result)))
        return result

    def _note(self, place: tuple[str, int], what: tuple[Any, ...]) -> None:
        self.asked.setdefault(place, set()).add(what)

    def unsettled(self) -> str | None:
        """Why the runs so far do not tell how the function behaves for other sizes; None if they do.

        A question is settled if it was answered both ways, if what it asks was the same in every run (the runs vary
        all sizes), or if it asks whether two sizes are equal that both vary.
        """
        for answers in self.asked.values():
            outcomes = {a[-1] for a in answers}
            if len(outcomes) == 2 or len(answers) == 1:
                continue
            first = next(iter(answers))
            if first[0] in ("Eq", "NotEq") and len(first) == 4:
                left, right = ({a[k] for a in answers} for k in (1, 2))
                if len(left) > 1 and len(right) > 1:
                    continue
            return "it treats some sizes in a way that no small experiment reaches"
        return None
