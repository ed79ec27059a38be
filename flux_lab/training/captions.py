"""What people might type for a scene: many wordings, each with the attributes that it really states.

A caption may leave attributes out, but never an object: "a red cube" describes a scene with one object.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np

from flux_lab.training.world import Scene

ATTRIBUTES = ("size", "material", "color", "shape")  # in the order of the standard wording
KEPT = {"size": 0.5, "material": 0.5, "color": 0.96, "shape": 0.97}  # chance that a caption states it
WORDS = {
    "sphere": ("sphere", "sphere", "ball", "ball", "orb"),
    "cube": ("cube", "cube", "cube", "box", "block"),
    "cylinder": ("cylinder", "cylinder", "tube", "can"),
    "cone": ("cone",),
    "small": ("small", "small", "little", "tiny"),
    "large": ("large", "large", "big", "huge"),
    "matte": ("matte", "matte", "dull"),
    "shiny": ("shiny", "shiny", "glossy", "metal", "metallic", "polished"),
    "purple": ("purple", "purple", "purple", "violet"),
    "teal": ("teal", "teal", "cyan", "turquoise"),
}
THINGS = ("object", "thing")
PLACES = {
    "gray": ("on a gray floor", "on a grey floor", "on the gray floor", "on a gray table", "on gray ground", "on concrete", "on gray"),
    "wooden": ("on a wooden floor", "on a wood floor", "on the wooden floor", "on a wooden table", "on wood", "on a brown floor"),
    "grassy": ("on a grassy floor", "on grass", "on the grass", "on green grass", "on a lawn", "on the lawn", "in a meadow", "on a meadow"),
    "sandy": ("on a sandy floor", "on sand", "on the sand", "on a beach", "on the beach", "in the desert", "in a desert"),
    "dark": ("on a dark floor", "on the dark floor", "on a black floor", "on dark ground", "at night", "in the dark", "in the night"),
}
BETWEEN = {
    "left of": ("to the left of", "to the left of", "left of", "on the left of", "on the left side of"),
    "right of": ("to the right of", "to the right of", "right of", "on the right of", "on the right side of"),
    "in front of": ("in front of", "in front of", "before"),
    "behind": ("behind",),
    "next to": ("next to", "beside", "by"),
}
SIDES = {"left of": ("on the left", "on the right"), "in front of": ("in front", "behind"), "behind": ("behind", "in front")}
SIDES["right of"] = SIDES["left of"][::-1]
OPENINGS = (
    "a photo of",
    "photo of",
    "a picture of",
    "picture of",
    "an image of",
    "a rendering of",
    "a 3d render of",
    "there is",
    "show me",
)


@dataclass(frozen=True)
class StatedObject:
    """The attributes of one object that a text states; None where it leaves one open."""

    shape: str | None = None
    color: str | None = None
    size: str | None = None
    material: str | None = None


@dataclass(frozen=True)
class Stated:
    """What a text states: every object, how the first stands to the second, and the floor.

    The relation is one of world.RELATIONS, "next to" (left or right of), or None.
    """

    objects: tuple[StatedObject, ...]
    relation: str | None = None
    floor: str | None = None

    def to_dict(self) -> dict:
        """Only what is stated."""
        objects = [{name: value for name, value in dataclasses.asdict(each).items() if value} for each in self.objects]
        return {"objects": objects} | {name: value for name in ("relation", "floor") if (value := getattr(self, name))}

    @classmethod
    def from_dict(cls, values: dict) -> "Stated":
        objects = tuple(StatedObject(**each) for each in values["objects"])
        return cls(objects=objects, relation=values.get("relation"), floor=values.get("floor"))


@dataclass(frozen=True)
class Caption:
    text: str
    stated: Stated


def everything(scene: Scene) -> Stated:
    """All of a scene's attributes."""
    objects = tuple(StatedObject(**{name: getattr(each, name) for name in ATTRIBUTES}) for each in scene.objects)
    return Stated(objects=objects, relation=scene.relation, floor=scene.floor)


def with_article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def standard(described: Scene | Stated) -> str:
    """The canonical wording of all that is stated: "a large shiny red sphere to the left of a small cube on a grassy floor"."""
    stated = everything(described) if isinstance(described, Scene) else described
    named = [[each.size, each.material, each.color, each.shape or THINGS[0]] for each in stated.objects]
    between = BETWEEN[stated.relation][0] if stated.relation else "and"
    text = f" {between} ".join(with_article(" ".join(filter(None, words))) for words in named)
    return f"{text} {PLACES[stated.floor][0]}" if stated.floor else text


class Writer:
    """Chooses words at random from one generator."""

    def __init__(self, rng: np.random.Generator):
        self.rng = rng

    def chance(self, share: float) -> bool:
        return self.rng.random() < share

    def pick(self, choices: tuple) -> str:
        return choices[self.rng.integers(len(choices))]

    def word(self, value: str) -> str:
        return self.pick(WORDS.get(value, (value,)))

    def leave_out(self, stated: Stated) -> Stated:
        """A random part of what is true; the same kinds of attribute are kept for both objects half of the time."""
        keep = {name: self.chance(share) for name, share in KEPT.items()}
        objects = []
        for each in stated.objects:
            kept = keep if self.chance(0.5) else {name: self.chance(share) for name, share in KEPT.items()}
            objects.append(StatedObject(**{name: getattr(each, name) if kept[name] else None for name in ATTRIBUTES}))
        floor = stated.floor if self.chance(0.6) else None
        relation = stated.relation if self.chance(0.85) else None
        if relation in ("left of", "right of") and self.chance(0.1):
            relation = "next to"
        return Stated(objects=tuple(objects), relation=relation, floor=floor)

    def name(self, item: StatedObject, article: str) -> str:
        """One object in words, its adjectives now and then in another order; `article` is "a", "the" or nothing."""
        adjectives = [self.word(value) for value in (item.size, item.material, item.color) if value]
        if len(adjectives) > 1 and self.chance(0.2):
            self.rng.shuffle(adjectives)
        words = " ".join([*adjectives, self.word(item.shape) if item.shape else self.pick(THINGS)])
        return with_article(words) if article == "a" else f"{article} {words}".strip()

    def sentence(self, first: str, second: str, relation: str | None) -> str:
        """Two named objects in one phrase."""
        if relation is None:
            return f"{first} {self.pick(('and', 'and', 'with'))} {second}"
        style = self.rng.random()
        if style < 0.65 or relation not in SIDES:
            joint = self.pick(("", "", "", "is ")) if first.startswith("the ") else ""
            return f"{first} {joint}{self.pick(BETWEEN[relation])} {second}"
        here, there = SIDES[relation]
        if relation in ("in front of", "behind"):
            return f"{second} with {first} {self.pick(BETWEEN[relation])} it"
        if style < 0.85:
            return f"{first} {here} and {second} {there}"
        return f"{here} {first}, {there} {second}"

    def text(self, stated: Stated) -> str:
        """A text that states exactly `stated`."""
        article = self.pick(("a", "a", "a", "a", "", "the"))
        names = [self.name(each, article) for each in stated.objects]
        text = names[0] if len(names) == 1 else self.sentence(*names, stated.relation)
        if stated.floor and self.chance(0.15):
            text = f"{self.pick(PLACES[stated.floor])}, {text}"
        else:
            if self.chance(0.2):
                text = f"{self.pick(OPENINGS)} {text}"
            if stated.floor:
                text = f"{text} {self.pick(PLACES[stated.floor])}"
        text = text[0].upper() + text[1:] if self.chance(0.08) else text
        return text + "." if self.chance(0.08) else text


def write(scene: Scene, writer: Writer) -> Caption:
    """One caption; the objects of a pair come in either order."""
    stated = everything(scene.swapped() if scene.relation and writer.chance(0.5) else scene)
    if writer.chance(0.12):
        return Caption(standard(stated), stated)
    stated = stated if writer.chance(0.15) else writer.leave_out(stated)
    return Caption(writer.text(stated), stated)


def captions(scene: Scene, rng: np.random.Generator, count: int) -> list[Caption]:
    """`count` captions of a scene, all true of it."""
    writer = Writer(rng)
    return [write(scene, writer) for _ in range(count)]
