"""A small world of drawn pictures and their captions: the training data of the shipped pipeline.

A scene is a background colour and one or two shapes. Three things can be made of it:

* a picture: ``draw`` renders a batch of scenes with antialiased edges, on any torch device;
* a caption: ``describe`` says something true about the scene in one of many wordings, and leaves things out at random;
* a claim: what a caption commits to, as data. ``parse`` gets it back from the words, so that a picture can be judged
  against its prompt (``score_shapes.py``).

Everything is drawn from a ``random.Random``, so one seed gives one data set on every machine.
Pixel coordinates run right and down; the centre of the upper left pixel is (0.5, 0.5).
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

CANVAS = 64  # pixels, width and height
JITTER = 10  # each colour channel of each thing is off its palette value by up to this much (of 255)
GAP = 2.0  # pixels between the boxes of two shapes, and half of it to the edge of the canvas

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 40),
    "orange": (245, 135, 25),
    "yellow": (245, 225, 60),
    "green": (45, 160, 65),
    "cyan": (80, 210, 225),
    "blue": (40, 75, 200),
    "purple": (125, 50, 165),
    "pink": (245, 150, 195),
    "white": (243, 243, 243),
    "black": (25, 25, 25),
}
SIZES: dict[str, tuple[float, float]] = {"small": (5.0, 6.2), "medium": (7.8, 9.4), "large": (11.2, 12.8)}  # radius, px
SIZE_LIMITS: tuple[float, float] = (7.0, 10.3)  # radius in pixels where medium begins and ends, when a size is read

# Proportions in units of the radius. All shapes of one radius cover roughly the same area.
_SQUARE = 0.9  # half side
_TRIANGLE = 1.4  # circumradius
_DIAMOND = 1.2  # half diagonal
_CROSS = (1.08, 0.38)  # half length and half width of a bar
_STAR = (1.35, 0.61)  # outer and inner radius
_RING = (1.05, 0.55)  # outer and inner radius


@dataclass(frozen=True)
class Outline:
    """What a shape takes up around its centre of mass, in units of its radius (area: of the radius squared)."""

    area: float
    half_width: float
    up: float
    down: float


_FIFTH = math.pi / 5
SHAPES: dict[str, Outline] = {
    "circle": Outline(math.pi, 1.0, 1.0, 1.0),
    "square": Outline(4 * _SQUARE**2, _SQUARE, _SQUARE, _SQUARE),
    "triangle": Outline(3 * math.sqrt(3) / 4 * _TRIANGLE**2, math.sqrt(3) / 2 * _TRIANGLE, _TRIANGLE, _TRIANGLE / 2),
    "diamond": Outline(2 * _DIAMOND**2, _DIAMOND, _DIAMOND, _DIAMOND),
    "cross": Outline(8 * _CROSS[0] * _CROSS[1] - 4 * _CROSS[1] ** 2, _CROSS[0], _CROSS[0], _CROSS[0]),
    "star": Outline(
        5 * _STAR[0] * _STAR[1] * math.sin(_FIFTH),
        _STAR[0] * math.sin(2 * _FIFTH),
        _STAR[0],
        _STAR[0] * math.cos(_FIFTH),
    ),
    "ring": Outline(math.pi * (_RING[0] ** 2 - _RING[1] ** 2), _RING[0], _RING[0], _RING[0]),
}

# Where a lone shape can be said to be: (horizontal third, vertical third), None for anywhere.
PLACES: dict[str, tuple[str | None, str | None]] = {
    "left": ("low", None),
    "right": ("high", None),
    "top": (None, "low"),
    "bottom": (None, "high"),
    "top left": ("low", "low"),
    "top right": ("high", "low"),
    "bottom left": ("low", "high"),
    "bottom right": ("high", "high"),
    "centre": ("mid", "mid"),
}
_THIRDS = {"low": (0.0, 23.0), "mid": (28.0, 36.0), "high": (41.0, float(CANVAS))}  # where a centre is drawn, px
THIRD_LIMITS = (25.5, 38.5)  # where a third ends when a place is read, px

RELATIONS = ("left", "right", "above", "below")  # the first thing seen from the second
RELATION_RATIO = 1.3  # drawn relations: the offset along their axis is this many times the one across


@dataclass(frozen=True)
class Thing:
    """One drawn shape: names, centre of mass and radius in pixels, colour in 0..255."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float
    rgb: tuple[int, int, int]

    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom in pixels."""
        o, r = SHAPES[self.shape], self.radius
        return self.x - o.half_width * r, self.y - o.up * r, self.x + o.half_width * r, self.y + o.down * r


@dataclass(frozen=True)
class Scene:
    """A background and the things on it, which do not touch."""

    background: str
    background_rgb: tuple[int, int, int]
    things: tuple[Thing, ...]


@dataclass(frozen=True)
class ThingClaim:
    """What a caption says about one thing; None where it says nothing."""

    shape: str
    colour: str
    size: str | None = None
    place: str | None = None


@dataclass(frozen=True)
class Claim:
    """What a caption says. ``relation`` is of the first thing to the second, one of ``RELATIONS``."""

    things: tuple[ThingClaim, ...]
    relation: str | None = None
    background: str | None = None


# ---------------------------------------------------------------------------------------------------------------------
# Scenes


def third(v: float) -> str:
    """The third of the canvas that a coordinate in pixels reads as: ``low``, ``mid`` or ``high``."""
    return "low" if v < THIRD_LIMITS[0] else "mid" if v <= THIRD_LIMITS[1] else "high"


def size_of(radius: float) -> str:
    """The size word that a radius in pixels reads as."""
    return "small" if radius < SIZE_LIMITS[0] else "medium" if radius < SIZE_LIMITS[1] else "large"


def relation_of(dx: float, dy: float, ratio: float = 1.0) -> str | None:
    """The relation of a thing that lies (dx, dy) pixels from another, None if neither axis is longer by ``ratio``."""
    if abs(dx) > ratio * abs(dy):
        return "left" if dx < 0 else "right"
    if abs(dy) > ratio * abs(dx):
        return "above" if dy < 0 else "below"
    return None


def _jittered(rng: random.Random, colour: str) -> tuple[int, int, int]:
    r, g, b = (min(255, max(0, c + rng.randint(-JITTER, JITTER))) for c in PALETTE[colour])
    return r, g, b


def _sample_thing(rng: random.Random, colours: Sequence[str], thirds: tuple[str | None, str | None]) -> Thing:
    shape, colour, size = rng.choice(tuple(SHAPES)), rng.choice(colours), rng.choice(tuple(SIZES))
    radius, o = rng.uniform(*SIZES[size]), SHAPES[shape]
    margin = GAP / 2
    spans = (
        (o.half_width * radius + margin, CANVAS - o.half_width * radius - margin),
        (o.up * radius + margin, CANVAS - o.down * radius - margin),
    )
    centre = []
    for (low, high), name in zip(spans, thirds, strict=True):
        bounds = _THIRDS[name] if name else (0.0, float(CANVAS))
        low, high = max(low, bounds[0]), min(high, bounds[1])
        centre.append(rng.uniform(low, high))
    return Thing(shape, colour, size, centre[0], centre[1], radius, _jittered(rng, colour))


def _apart(a: Thing, b: Thing) -> bool:
    (al, at, ar, ab), (bl, bt, br, bb) = a.box(), b.box()
    return al > br + GAP or bl > ar + GAP or at > bb + GAP or bt > ab + GAP


def sample_scene(rng: random.Random) -> Scene:
    """One random scene: a lone shape in two of five, else two shapes that do not touch."""
    background = rng.choice(tuple(PALETTE))
    colours = [c for c in PALETTE if c != background]
    if rng.random() < 0.4:
        thirds = rng.choice(list(PLACES.values())) if rng.random() < 0.75 else (None, None)
        things: tuple[Thing, ...] = (_sample_thing(rng, colours, thirds),)
    else:
        wanted = rng.choice(RELATIONS)
        while True:
            a, b = (_sample_thing(rng, colours, (None, None)) for _ in range(2))
            if _apart(a, b) and relation_of(a.x - b.x, a.y - b.y, RELATION_RATIO) == wanted:
                break
        things = (a, b)
    return Scene(background, _jittered(rng, background), things)


# ---------------------------------------------------------------------------------------------------------------------
# Captions

_SIZE_WORDS = {"small": ("small", "little", "tiny"), "medium": ("medium", "medium-sized"), "large": ("large", "big")}
_COLOUR_WORDS: dict[str, tuple[str, ...]] = {c: (c,) for c in PALETTE} | {
    "purple": ("purple", "violet"),
    "cyan": ("cyan", "turquoise"),
}
_SHAPE_WORDS: dict[str, tuple[str, ...]] = {s: (s,) for s in SHAPES} | {
    "circle": ("circle", "disc"),
    "cross": ("cross", "plus sign"),
}
_RELATION_WORDS = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under", "beneath"),
}
_PLACE_WORDS = {
    "left": ("on the left", "on the left side"),
    "right": ("on the right", "on the right side"),
    "top": ("at the top",),
    "bottom": ("at the bottom",),
    "top left": ("in the top left corner", "at the top left"),
    "top right": ("in the top right corner", "at the top right"),
    "bottom left": ("in the bottom left corner", "at the bottom left"),
    "bottom right": ("in the bottom right corner", "at the bottom right"),
    "centre": ("in the centre", "in the middle", "in the center"),
}
_BACKGROUND_WORDS = ("on {}", "on a {} background", "against {}", "against a {} background")
_PREFIXES = ("a picture of ", "a drawing of ", "an image of ")
_JOINTS = ("and", "with")
_ARTICLES = ("a", "an", "the", "one")

# What one wording may leave unsaid.
_SAY_SIZE, _SAY_PLACE, _SAY_RELATION, _SAY_BACKGROUND = 0.75, 0.75, 0.85, 0.85


def _with_article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def _describe_thing(rng: random.Random, thing: Thing) -> tuple[str, ThingClaim]:
    size = thing.size if rng.random() < _SAY_SIZE else None
    words = [rng.choice(_COLOUR_WORDS[thing.colour]), rng.choice(_SHAPE_WORDS[thing.shape])]
    if size:
        words.insert(0, rng.choice(_SIZE_WORDS[size]))
    return _with_article(" ".join(words)), ThingClaim(thing.shape, thing.colour, size)


def describe(scene: Scene, rng: random.Random) -> tuple[str, Claim]:
    """One true caption of a scene, and what it claims. Wording and omissions are drawn from ``rng``."""
    order = list(scene.things)
    rng.shuffle(order)
    said = [_describe_thing(rng, t) for t in order]
    claims = [c for _, c in said]
    text = said[0][0]
    relation = None
    if len(order) == 1:
        places = [p for p, cells in PLACES.items() if _is_at(order[0], cells)]
        if places and rng.random() < _SAY_PLACE:
            place = rng.choice(places)
            claims[0] = ThingClaim(claims[0].shape, claims[0].colour, claims[0].size, place)
            text += " " + rng.choice(_PLACE_WORDS[place])
    else:
        relation = relation_of(order[0].x - order[1].x, order[0].y - order[1].y, RELATION_RATIO)
        if relation and rng.random() < _SAY_RELATION:
            text += f" {rng.choice(_RELATION_WORDS[relation])} {said[1][0]}"
        else:
            relation = None
            text += f" {rng.choice(_JOINTS)} {said[1][0]}"
    background = None
    if rng.random() < _SAY_BACKGROUND:
        background = scene.background
        colour = rng.choice(_COLOUR_WORDS[background])
        ground = rng.choice(_BACKGROUND_WORDS).format(colour).replace(" a orange", " an orange")
        text = f"{ground}, {text}" if rng.random() < 0.15 else f"{text} {ground}"
    if rng.random() < 0.2 and not text.startswith(("on ", "against ")):
        text = rng.choice(_PREFIXES) + text
    if rng.random() < 0.2:
        text = text[0].upper() + text[1:]
    if rng.random() < 0.1:
        text += "."
    return text, Claim(tuple(claims), relation, background)


def _is_at(thing: Thing, cells: tuple[str | None, str | None]) -> bool:
    for v, name in zip((thing.x, thing.y), cells, strict=True):
        if name and not (_THIRDS[name][0] <= v <= _THIRDS[name][1]):
            return False
    return True


def words() -> tuple[str, ...]:
    """Every word and mark that captions are made of, sorted: what the tokenizers know as whole tokens."""
    texts = [*_PREFIXES, *_BACKGROUND_WORDS, *_JOINTS, *_ARTICLES]
    for table in (_SIZE_WORDS, _COLOUR_WORDS, _SHAPE_WORDS, _RELATION_WORDS, _PLACE_WORDS):
        texts += [phrase for phrases in table.values() for phrase in phrases]
    return tuple(sorted({w for text in texts for w in re.findall(r"[a-z]+", text)} | {",", ".", "-"}))


def _named(group: str, table: dict[str, tuple[str, ...]]) -> str:
    phrases = sorted((p for ps in table.values() for p in ps), key=len, reverse=True)
    return f"(?P<{group}>{'|'.join(map(re.escape, phrases))})"


def _thing_pattern(i: int) -> str:
    size, colour = _named(f"size{i}", _SIZE_WORDS), _named(f"colour{i}", _COLOUR_WORDS)
    shape = _named(f"shape{i}", _SHAPE_WORDS)
    return f"(?:(?:{'|'.join(_ARTICLES)}) )?(?:{size} )?{colour} {shape}"


def _background_pattern(i: int) -> str:
    return f"(?:on|against) (?:an? )?{_named(f'ground{i}', _COLOUR_WORDS)}(?: background)?"


_CAPTION = re.compile(
    f"(?:{_background_pattern(0)} )?(?:{'|'.join(_PREFIXES)})?"
    f"{_thing_pattern(0)}"
    f"(?: {_named('place', _PLACE_WORDS)}| {_named('relation', _RELATION_WORDS)} {_thing_pattern(1)}"
    f"| (?:{'|'.join(_JOINTS)}) {_thing_pattern(2)})?"
    f"(?: {_background_pattern(1)})?"
)


def _canonical(table: dict[str, tuple[str, ...]], phrase: str | None) -> str | None:
    return next((name for name, phrases in table.items() if phrase in phrases), None)


def parse(caption: str) -> Claim:
    """What a caption claims.

    Raises:
        ValueError: if the caption is not of this world's grammar; the message shows what is.
    """
    text = " ".join(re.sub(r"[,.!]", " ", caption.lower()).split())
    found = _CAPTION.fullmatch(text)
    if found is None:
        raise ValueError(
            f"{caption!r} is not a caption of the shapes world. Write for example 'a large red circle left of a small "
            "blue square on green' or 'a tiny yellow star in the top left corner on a black background'. "
            f"Colours: {', '.join(PALETTE)}; shapes: {', '.join(SHAPES)}; sizes: {', '.join(SIZES)}."
        )
    part = found.groupdict()
    things = []
    for i in (0, 1, 2):
        shape, colour = _canonical(_SHAPE_WORDS, part[f"shape{i}"]), _canonical(_COLOUR_WORDS, part[f"colour{i}"])
        if shape and colour:
            size = _canonical(_SIZE_WORDS, part[f"size{i}"])
            place = _canonical(_PLACE_WORDS, part["place"]) if i == 0 else None
            things.append(ThingClaim(shape, colour, size, place))
    return Claim(
        tuple(things),
        _canonical(_RELATION_WORDS, part["relation"]),
        _canonical(_COLOUR_WORDS, part["ground0"] or part["ground1"]),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def signed_distances(x: torch.Tensor, y: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """Distance to the edge of every shape, in pixels, negative inside; exact near straight and round edges.

    Args:
        x, y: offsets from the shape's centre of mass in pixels, float, any shapes that broadcast together.
        radius: in pixels, broadcasting with them.

    Returns:
        (..., len(SHAPES)) in the order of ``SHAPES``.
    """
    x, y, radius = torch.broadcast_tensors(x, y, radius)
    rho, ax, ay = torch.hypot(x, y), x.abs(), y.abs()
    square = torch.maximum(ax, ay) - _SQUARE * radius
    side = math.sqrt(3) / 2
    triangle = torch.maximum(y, side * ax - 0.5 * y) - _TRIANGLE / 2 * radius
    diamond = (ax + ay - _DIAMOND * radius) * math.sqrt(0.5)
    long, wide = _CROSS[0] * radius, _CROSS[1] * radius
    cross = torch.minimum(torch.maximum(ax - long, ay - wide), torch.maximum(ax - wide, ay - long))
    # A star is ten mirror images of one wedge: fold the angle into it, then measure to the wedge's one outer edge.
    angle = torch.atan2(x, -y)
    folded = (angle - 2 * _FIFTH * torch.round(angle / (2 * _FIFTH))).abs()
    along, across = rho * folded.cos(), rho * folded.sin()
    inner_along, inner_across = _STAR[1] * math.cos(_FIFTH), _STAR[1] * math.sin(_FIFTH)
    edge = math.hypot(inner_across, _STAR[0] - inner_along)
    normal = (inner_across / edge, (_STAR[0] - inner_along) / edge)
    star = (along - _STAR[0] * radius) * normal[0] + across * normal[1]
    middle, half = (_RING[0] + _RING[1]) / 2 * radius, (_RING[0] - _RING[1]) / 2 * radius
    ring = (rho - middle).abs() - half
    return torch.stack([rho - radius, square, triangle, diamond, cross, star, ring], dim=-1)


def pack(scenes: Sequence[Scene]) -> torch.Tensor:
    """Scenes as numbers: (len(scenes), 1 + things, 7) float32.

    The first row of a scene is its background, then one row a thing: index of its shape, x, y, radius (pixels), red,
    green, blue (0..1). Scenes with fewer things than others are filled up with circles too small to cover anything.
    """
    names, count = list(SHAPES), max(len(s.things) for s in scenes)
    rows = []
    for scene in scenes:
        row: list[tuple[float, ...]] = [(0.0, 0.0, 0.0, -2.0, *scene.background_rgb)]
        row += [(float(names.index(t.shape)), t.x, t.y, t.radius, *t.rgb) for t in scene.things]
        rows.append(row + [(0.0, 0.0, 0.0, -2.0, 0.0, 0.0, 0.0)] * (count - len(scene.things)))
    packed = torch.tensor(rows, dtype=torch.float32)
    packed[..., 4:] /= 255
    return packed


def render(packed: torch.Tensor) -> torch.Tensor:
    """Draw packed scenes on the device they are on.

    Args:
        packed: (batch, 1 + things, 7), as ``pack`` makes them.

    Returns:
        (batch, 3, CANVAS, CANVAS) float32 in 0..1, edges antialiased over one pixel.
    """
    picture = packed[:, 0, 4:, None, None].expand(-1, 3, CANVAS, CANVAS)
    grid = torch.arange(CANVAS, dtype=torch.float32, device=packed.device) + 0.5
    for i in range(1, packed.shape[1]):
        kind, x, y, radius = (packed[:, i, j, None, None] for j in range(4))
        distances = signed_distances(grid[None, None, :] - x, grid[None, :, None] - y, radius)
        distance = distances.gather(-1, kind.long()[..., None].expand(-1, CANVAS, CANVAS, 1))[..., 0]
        picture = torch.lerp(picture, packed[:, i, 4:, None, None], (0.5 - distance).clamp(0, 1)[:, None])
    return picture


def draw(scenes: Sequence[Scene]) -> torch.Tensor:
    """Draw scenes: (len(scenes), 3, CANVAS, CANVAS) float32 in 0..1, on the CPU."""
    return render(pack(scenes))


def sample(seed: int, count: int) -> tuple[list[Scene], list[str]]:
    """``count`` random scenes and one caption of each; the same for the same seed on every machine."""
    rng = random.Random(seed)
    scenes = [sample_scene(rng) for _ in range(count)]
    return scenes, [describe(s, rng)[0] for s in scenes]
