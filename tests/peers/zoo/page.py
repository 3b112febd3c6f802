"""`docs/real-code.md`: what each verb makes of each program of the zoo.

`make real-code` writes it of what the tests found; a test compares it with what they
are to find.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping

from peers.zoo.program import Program

PAGE = pathlib.Path(__file__).parents[3] / "docs" / "real-code.md"
HEAD = """\
# Real code

Public functions of packages that others wrote, each called as its documentation does,
in a small program: `tests/peers/zoo`. The page is written by its tests:
`make real-code`. A "yes" is a test that passed, on the newest versions of the packages:

- `flow`: "flows" where `jax.grad` is not zero; "cut" and "unused" where it is exactly
  zero at three random points; nothing is "unknown". Also for each term of a loss.
- `gradients`: by every argument they are those of `jax.grad`, `None` where those are
  structurally zero; by a value inside, those of the program split by hand.
- contracts: `assert_gradient` and `assert_no_gradient` pass where they are to pass, and
  fail where they are to fail.
- `find_nonfinite`: nothing on healthy arguments; a nan in an argument is traced to that
  argument, or the program's own error is told where it raises.
- born inside: a nan that is born inside the program, forward or backward, is located.
- `check_gradients`: passes, in float64 for solvers; where a rule is not the derivative
  of what is computed, as of a solver that ends short, it is named, and `allow=` passes.
- `capture`, `edit`: a value inside is read, left as it is and doubled, as by hand.
- `gradient_stats`: norms are those of `jax.grad`'s.
"""
WORDS = {"passed": "yes", "xfailed": "no", "failed": "wrong"}
HEADS = {"contracts": "contracts", "find_nonfinite, born inside": "born inside"}


def page(
    programs: Mapping[str, Program],
    verbs: Mapping[str, object],
    outcomes: Mapping[tuple[str, str], str],
    known: Mapping[tuple[str, str], str],
) -> str:
    """Return the page; `known` says what happens where an outcome is "xfailed"."""
    heads = [HEADS.get(verb, f"`{verb}`") for verb in verbs]
    lines = [_row("package", "function", *heads), "|---" * (len(heads) + 2) + "|"]
    notes = dict[str, int]()
    for name, program in programs.items():
        cells = []
        for verb in verbs:
            outcome = outcomes.get((name, verb), "not run")
            word = WORDS.get(outcome, outcome)
            note = known.get((name, verb), "")
            if verb == "check_gradients" and program.allow:
                note = f"With `allow={list(program.allow)}`".replace("'", '"') + "."
            if note:
                word += f" ({notes.setdefault(note, len(notes) + 1)})"
            cells.append(word)
        lines.append(_row(program.package, f"`{program.what}`", *cells))
    told = [f"{number}. {note}" for note, number in notes.items()]
    return "\n".join([HEAD, *lines, "", *told]).rstrip() + "\n"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
