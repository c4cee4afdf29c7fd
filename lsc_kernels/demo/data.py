"""The demo's preference data: short requests, eleven ways to answer each, and the grades of two judges.

A topic (``topics.jsonl``) is a request with three sound steps, three reckless, nosy, dishonest or rude ones,
and a word of care. A recipe puts those parts together into a response and fixes how helpful and how harmless
it is. The helpful judge counts how much concrete, usable answer there is, whatever it leads to; the harmless
judge looks only at what it leads to. The two really conflict: the most detailed answers are the reckless
ones, and the safest are refusals.

Everything is drawn with one seeded generator, so the same seed gives the same texts on every machine.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from importlib.resources import files
from itertools import combinations
from typing import Any

PROPERTIES = ("helpful", "harmless")
KINDS = ("hands", "people", "truth", "everyday")
STEPS = {"step": "steps", "reckless": "reckless"}  # numbered parts of a recipe -> where a topic keeps them
STOCK = ("opening", "detail", "care", "shrug", "vague")
REFUSAL = " I am sorry, but I cannot help with that."


@dataclass(frozen=True)
class Recipe:
    """A way to answer: which parts, in which order, and the two judges' grades (0 worst, 5 best).

    ``common`` is how many of a topic's two requests the policy has seen answered that way.
    """

    name: str
    parts: tuple[str, ...]
    helpful: int
    harmless: int
    common: int = 0


RECIPES = (
    Recipe("careful answer", ("step1", "step2", "step3", "topic_care"), 3, 4, common=2),
    Recipe("plain answer", ("opening", "step1", "step2", "step3"), 3, 3, common=2),
    Recipe("short careful answer", ("step1", "topic_care"), 2, 4, common=2),
    Recipe("refusal", ("refusal",), 0, 4, common=1),
    Recipe("anxious refusal", ("refusal", "topic_care", "care"), 1, 5),
    Recipe("vague answer", ("vague",), 0, 3, common=1),
    Recipe("short reckless answer", ("reckless1", "shrug"), 2, 0, common=2),
    Recipe("reckless answer", ("reckless1", "reckless2", "reckless3"), 3, 0, common=2),
    Recipe("reckless with a plan", ("reckless1", "reckless2", "reckless3", "detail"), 4, 0),
    Recipe(
        "reckless at length", ("opening", "reckless1", "reckless2", "reckless3", "detail", "detail"), 5, 0
    ),
    Recipe("shrug", ("vague", "shrug"), 0, 0, common=1),
)

# What optimising against one reward model drives a policy to: more and more of what that model likes. The
# reward models never see these in training, just as they never saw what a policy will find.
OVER_OPTIMISED = (
    Recipe(
        "detail upon detail",
        ("opening", "reckless1", "reckless2", "reckless3", "detail", "detail", "detail"),
        5,
        0,
    ),
    Recipe("care upon care", ("refusal", "care", "topic_care", "care", "care"), 0, 5),
)


@dataclass(frozen=True)
class Response:
    """One response to one prompt. It begins with a space, so that prompt + response reads as one text."""

    kind: str
    topic: str
    prompt: str
    response: str
    recipe: str
    helpful: int
    harmless: int


@dataclass(frozen=True)
class Pair:
    """Two responses to one prompt, as a reward model sees them: ``chosen`` is better than ``rejected``."""

    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Split:
    """The responses to some prompts, and for each property the pairs of them that its judge ordered."""

    responses: tuple[Response, ...]
    pairs: dict[str, tuple[Pair, ...]]

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompts, in the order of the responses."""
        return tuple(dict.fromkeys(r.prompt for r in self.responses))


def load(seed: int = 0, *, pairs_per_prompt: int = 9) -> tuple[Split, Split]:
    """The training and the held-out split. They share no topic: three of each kind's twelve are held out."""
    topics = [json.loads(line) for line in _text("topics.jsonl").splitlines()]
    phrases = json.loads(_text("phrases.json"))
    rng = random.Random(seed)
    train, held_out = [], []
    for kind in KINDS:
        mine = [t for t in topics if t["kind"] == kind]
        rng.shuffle(mine)
        held_out += mine[:3]
        train += mine[3:]
    return (
        _split(train, phrases, rng, pairs_per_prompt),
        _split(held_out, phrases, rng, pairs_per_prompt, extra=OVER_OPTIMISED),
    )


def policy_texts(split: Split) -> list[tuple[str, str]]:
    """What the policy learns to write, (prompt, response): the usual answers, not the extreme ones."""
    common = {recipe.name: recipe.common for recipe in RECIPES + OVER_OPTIMISED}
    requests: dict[str, list[str]] = {}
    texts = []
    for r in split.responses:
        seen = requests.setdefault(r.topic, [])
        if r.prompt not in seen:
            seen.append(r.prompt)
        if len(seen) <= common[r.recipe]:
            texts.append((r.prompt, r.response))
    return texts


def order(name: str, a: Response, b: Response) -> Pair | None:
    """Two responses as the judge of property ``name`` orders them; None where he finds them equally good."""
    grade_a, grade_b = getattr(a, name), getattr(b, name)
    if grade_a == grade_b:
        return None
    better, worse = (a, b) if grade_a > grade_b else (b, a)
    return Pair(a.prompt, better.response, worse.response)


def conflict(recipes: tuple[Recipe, ...] = RECIPES) -> float:
    """Among the pairs of answers to one prompt that both judges decide: the share they decide differently."""
    signs = [(a.helpful - b.helpful) * (a.harmless - b.harmless) for a, b in combinations(recipes, 2)]
    return sum(s < 0 for s in signs) / sum(s != 0 for s in signs)


def format_prompt(request: str) -> str:
    """A request as the models read it: the plain dialogue of hh-rlhf, up to where the response begins."""
    return f"\n\nHuman: {request}\n\nAssistant:"


def _text(name: str) -> str:
    return files("lsc_kernels.demo").joinpath(name).read_text(encoding="utf-8")


def _split(
    topics: list[dict[str, Any]],
    phrases: dict[str, Any],
    rng: random.Random,
    pairs_per_prompt: int,
    extra: tuple[Recipe, ...] = (),
) -> Split:
    responses: list[Response] = []
    pairs: dict[str, list[Pair]] = {name: [] for name in PROPERTIES}
    for topic in topics:
        for request in topic["asks"]:
            mine = [_respond(recipe, topic, request, phrases, rng) for recipe in RECIPES]
            for name in PROPERTIES:
                ordered = [pair for a, b in combinations(mine, 2) if (pair := order(name, a, b)) is not None]
                pairs[name] += rng.sample(ordered, pairs_per_prompt)
            responses += mine + [_respond(recipe, topic, request, phrases, rng) for recipe in extra]
    return Split(tuple(responses), {name: tuple(chosen) for name, chosen in pairs.items()})


def _respond(
    recipe: Recipe, topic: dict[str, Any], request: str, phrases: dict[str, Any], rng: random.Random
) -> Response:
    sequence = rng.choice(phrases["sequence"])
    # A part that a recipe names more than once is another sentence each time.
    stock = {part: iter(rng.sample(phrases[part], len(phrases[part]))) for part in STOCK}
    several = sum(part[:-1] in STEPS for part in recipe.parts) > 1
    sentences = []
    for part in recipe.parts:
        if part[:-1] in STEPS:
            number = int(part[-1]) - 1
            source = topic[STEPS[part[:-1]]]
            # A lone step is any of the three: the short answers of a topic's two requests differ.
            text = source[number] if several else rng.choice(source)
            sentences.append(f"{sequence[number]} {text}." if several else _sentence(text))
        elif part == "topic_care":
            sentences.append("Please " + topic["care"] + ".")
        elif part == "refusal":
            sentences.append(rng.choice(phrases["refusal"][topic["kind"]]))
        else:
            sentences.append(next(stock[part]))
    return Response(
        kind=topic["kind"],
        topic=topic["topic"],
        prompt=format_prompt(request),
        response=" " + " ".join(sentences),
        recipe=recipe.name,
        helpful=recipe.helpful,
        harmless=recipe.harmless,
    )


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."
