"""Big pictures made small: neighbouring steps without a cut drawn as one."""

from __future__ import annotations

import dataclasses

from .model import STATUSES, Edge, Picture, Step


def too_big(picture: Picture, most: int = 300) -> bool:
    """Say whether a picture has more steps than can be read."""
    return len(picture.steps) > most


def merged(picture: Picture, most: int = 60) -> Picture:
    """Draw chains of plain steps as one step each, where there are too many.

    Steps are merged only with such of the same box, that all get a gradient or all
    get none; inputs, outputs, cuts, rules and gates stay. Chains come first; if that
    is not enough, whatever stands together in the code.

    Args:
      picture: what to draw.
      most: a picture with at most as many steps is returned as it is.

    Returns:
      A picture without cycles if there were none before, with its steps renumbered.
      It may still have more than `most` steps.
    """
    if len(picture.steps) <= most:
        return picture
    groups = _chains(picture, past_cuts=False)
    if len(groups) > most:
        groups = _chains(picture, past_cuts=True)
    if len(groups) > most:
        groups = _neighbours(picture, groups)
    return _drawn(picture, groups)


def _chains(picture: Picture, *, past_cuts: bool) -> list[list[Step]]:
    """Put a step into the group that alone feeds it, inputs apart.

    Not `past_cuts`: nothing is put behind a step that also feeds a cut, rule or gate,
    so that the picture tells where along a chain they are.

    No cycle can arise: a path that leaves a group comes back through its first step
    only, and would have been a cycle before.
    """
    feeds: dict[int, set[int]] = {step.id: set() for step in picture.steps}
    kinds = {step.id: step.kind for step in picture.steps}
    ends: set[int] = set()
    for edge in picture.edges:
        if kinds[edge.source] != "input" and edge.source != edge.target:
            feeds[edge.target].add(edge.source)
        if kinds[edge.target] in ("cut", "replace", "gate") and not past_cuts:
            ends.add(edge.source)
    groups: list[list[Step]] = []
    group_of: dict[int, int] = {}
    for step in picture.steps:
        # a step that comes later in the code has no group yet
        sources = {group_of.get(source, -1) for source in feeds[step.id]}
        home = sources.pop() if len(sources) == 1 else -1
        behind = not ends.isdisjoint(feeds[step.id])
        if home < 0 or behind or not _alike(groups[home][0], step):
            home = len(groups)
            groups.append([])
        groups[home].append(step)
        group_of[step.id] = home
    return groups


def _neighbours(picture: Picture, groups: list[list[Step]]) -> list[list[Step]]:
    """Join groups that follow each other, if all edges lead forward.

    Then a path never comes back to a run of groups that it has left.
    """
    place = {step.id: at for at, group in enumerate(groups) for step in group}
    if any(place[edge.source] > place[edge.target] for edge in picture.edges):
        return groups
    joined: list[list[Step]] = []
    for group in groups:
        if joined and _alike(joined[-1][0], group[0]):
            joined[-1].extend(group)
        else:
            joined.append(list(group))
    return joined


def _alike(one: Step, other: Step) -> bool:
    plain = one.kind == "step" and other.kind == "step"
    return plain and one.box == other.box and one.flows == other.flows


def _drawn(picture: Picture, groups: list[list[Step]]) -> Picture:
    number = {step.id: at for at, group in enumerate(groups) for step in group}
    status: dict[tuple[int, int], str] = {}
    for edge in picture.edges:
        pair = number[edge.source], number[edge.target]
        if pair[0] != pair[1]:
            told = (status.get(pair, edge.status), edge.status)
            status[pair] = min(told, key=STATUSES.index)
    return dataclasses.replace(
        picture,
        steps=tuple(_one(at, group) for at, group in enumerate(groups)),
        edges=tuple(Edge(*pair, status=said) for pair, said in status.items()),
    )


def _one(at: int, group: list[Step]) -> Step:
    if len(group) == 1:
        return dataclasses.replace(group[0], id=at)
    first, last = group[0], group[-1]
    same = first.label == last.label
    return Step(
        id=at,
        kind="step",
        label=first.label if same else f"{first.label} ... {last.label}",
        type=last.type,
        detail=f"{len(group)} steps",
        site=first.site,
        box=first.box,
        flows=first.flows,
    )
