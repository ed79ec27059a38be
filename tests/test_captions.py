"""Captions say what is true, state what they claim to state, and bind attributes to the right object."""

import re
from collections import Counter

import numpy as np
import pytest

from flux_lab.training import captions, world
from flux_lab.training.captions import ATTRIBUTES, PLACES, WORDS, Caption, Stated, StatedObject, standard
from flux_lab.training.world import Scene, SceneObject

RNG = np.random.default_rng(5)
SCENES = [world.sample_scene(RNG) for _ in range(400)]
WRITTEN = [(scene, caption) for scene in SCENES for caption in captions.captions(scene, RNG, 8)]

VALUES = {
    "shape": (*world.SHAPES,),
    "color": world.COLORS,
    "size": world.SIZES,
    "material": world.MATERIALS,
}
MEANING = {word: (name, value) for name, values in VALUES.items() for value in values for word in WORDS.get(value, (value,))}
SAID = {  # how the first object of a text stands to the second, in sentences with the objects as A and B and without articles
    "left of": [r"A (is )?((to|on) the )?left (side )?of B", r"A on the left and B on the right", r"on the left A, on the right B"],
    "right of": [r"A (is )?((to|on) the )?right (side )?of B", r"A on the right and B on the left", r"on the right A, on the left B"],
    "in front of": [r"A (is )?(in front of|before) B", r"A with B behind it"],
    "behind": [r"A (is )?behind B", r"A with B (in front of|before) it"],
    "next to": [r"A (is )?(next to|beside|by) B"],
    None: [r"A (and|with) B"],
}


def read(text: str) -> tuple[list[dict], str | None, str | None]:
    """Objects, relation of the first to the second, and floor, read from a text by the words in it."""
    text = text.lower().rstrip(".")
    floor = None
    for name, places in PLACES.items():
        for place in sorted(places, key=len, reverse=True):
            if re.search(rf"(^{place}, )|( {place}$)", text):
                floor, text = name, re.sub(rf"(^{place}, )|( {place}$)", "", text)
                break
    text = re.sub(rf"^({'|'.join(captions.OPENINGS)}) ", "", text)
    objects, current, skeleton = [], {}, []
    for word in re.findall(r"[a-z0-9]+|,", text):
        if word in MEANING or word in captions.THINGS:
            if word in MEANING:
                current[MEANING[word][0]] = MEANING[word][1]
            if word in captions.THINGS or MEANING[word][0] == "shape":
                skeleton.append("AB"[len(objects)])
                objects.append(current)
                current = {}
        else:
            skeleton.append(word)
    sentence = re.sub(r"\b(a|an|the) (?=[AB]\b)", "", " ".join(skeleton).replace(" ,", ","))
    if len(objects) == 1:
        return objects, None, floor
    found = [name for name, patterns in SAID.items() if any(re.fullmatch(pattern, sentence) for pattern in patterns)]
    assert len(found) == 1, (text, sentence, found)
    return objects, found[0], floor


def facts(objects: list[dict], relation: str | None, floor: str | None) -> tuple:
    """The same for both orders in which a pair can be told."""
    frozen = [tuple(sorted(each.items())) for each in objects]
    ways = [(tuple(frozen), relation), (tuple(frozen[::-1]), world.INVERSE.get(relation, relation))]
    return min(ways, key=str) if len(frozen) == 2 else ways[0], floor


def told(stated: Stated) -> tuple:
    values = stated.to_dict()
    return facts(values["objects"], stated.relation, stated.floor)


def test_texts_state_exactly_what_they_are_recorded_to_state():
    for _, caption in WRITTEN:
        assert facts(*read(caption.text)) == told(caption.stated), caption.text


@pytest.mark.parametrize(
    ("text", "stated"),
    [
        ("a red cube left of a blue ball", Stated((StatedObject("cube", "red"), StatedObject("sphere", "blue")), "right of")),
        ("a red cube and a blue ball", Stated((StatedObject("cube", "blue"), StatedObject("sphere", "red")))),
        ("a small red cube", Stated((StatedObject("cube", "red"),))),
        ("a red cube", Stated((StatedObject("cube", "red"),), floor="gray")),
    ],
)
def test_the_reading_above_notices_a_wrong_record(text, stated):
    assert facts(*read(text)) != told(stated)


def test_what_is_stated_is_true():
    for scene, caption in WRITTEN:
        stated = caption.stated
        ways = [scene, scene.swapped()] if scene.relation else [scene]
        assert any(true_of(stated, way) for way in ways), caption


def true_of(stated: Stated, scene: Scene) -> bool:
    relations = {None, scene.relation} | ({"next to"} if scene.relation in ("left of", "right of") else set())
    right = all(
        getattr(one, name) in (None, getattr(item, name))
        for one, item in zip(stated.objects, scene.objects, strict=True)
        for name in ATTRIBUTES
    )
    return right and stated.relation in relations and stated.floor in (None, scene.floor)


def test_people_find_their_own_wording():
    words = Counter(word for _, caption in WRITTEN for word in re.findall(r"[a-z0-9]+", caption.text.lower()))
    wanted = "ball sphere orb box cube block tube cylinder cone big large huge little small tiny glossy metal shiny dull matte grass"
    wanted += " lawn meadow wooden wood sand desert beach night dark black"
    wanted += " floor left right front behind before next photo picture there the and cyan violet"
    assert not [word for word in wanted.split() if words[word] < 3]
    texts = {caption.text for _, caption in WRITTEN}
    assert len(texts) > 0.7 * len(WRITTEN)
    assert any(text.startswith("on the grass, ") for text in texts)
    assert any(re.fullmatch(r"a \w+ \w+", text) for text in texts)


def test_one_seed_gives_one_set_of_captions():
    first, second = (captions.captions(SCENES[0], np.random.default_rng(1), 5) for _ in range(2))
    assert first == second
    assert len(first) == 5


def test_the_standard_wording():
    one = SceneObject("sphere", "red", "large", "shiny")
    two = SceneObject("cube", "blue", "small", "matte")
    scene = Scene((one, two), "grassy", "left of")
    assert standard(scene) == "a large shiny red sphere to the left of a small matte blue cube on a grassy floor"
    assert standard(scene.swapped()) == "a small matte blue cube to the right of a large shiny red sphere on a grassy floor"
    assert standard(Stated((StatedObject(color="orange"), StatedObject("cone")))) == "an orange object and a cone"
    assert all(standard(caption.stated) == standard(Stated.from_dict(caption.stated.to_dict())) for _, caption in WRITTEN)


def test_the_standard_wording_of_a_caption_states_the_same():
    for _, caption in WRITTEN:
        assert facts(*read(standard(caption.stated))) == told(caption.stated)
        assert isinstance(caption, Caption)
