"""How much of what a text states a read picture shows."""

import itertools

from flux_lab.training.captions import ATTRIBUTES, Stated
from flux_lab.training.world import INVERSE


def score(stated: Stated, read: Stated) -> dict[str, bool]:
    """Which of the stated attributes the read scene has; what is not stated is not in the result.

    "count" is always stated. "color", "shape", "size" and "material" are right when they are for every object that states them. Read
    objects are assigned to stated ones as fits best; of equals, so that the shapes agree.
    """
    slots = [*range(len(read.objects)), *[None] * max(0, len(stated.objects) - len(read.objects))]
    trials = [_score_assigned(stated, read, assigned) for assigned in itertools.permutations(slots, len(stated.objects))]
    return max(trials, key=lambda trial: (trial[0], trial[1].get("shape", False)))[1]


def _score_assigned(stated: Stated, read: Stated, assigned: tuple[int | None, ...]) -> tuple[int, dict[str, bool]]:
    """The number of single facts that are right, and the result, when stated object i is read object `assigned[i]`."""
    result, right = {"count": len(stated.objects) == len(read.objects)}, 0
    for name in ATTRIBUTES:
        facts = [
            slot is not None and getattr(read.objects[slot], name) == getattr(each, name)
            for each, slot in zip(stated.objects, assigned, strict=True)
            if getattr(each, name)
        ]
        if facts:
            result[name], right = all(facts), right + sum(facts)
    if stated.relation:
        relation = INVERSE.get(read.relation) if assigned == (1, 0) else read.relation
        result["relation"] = relation in (("left of", "right of") if stated.relation == "next to" else (stated.relation,))
        right += result["relation"]
    if stated.floor:
        result["floor"] = stated.floor == read.floor
    return right, result
