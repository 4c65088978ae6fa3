"""The pictures and questions that the tiny vision-language model is pretrained on: coloured shapes
on a plain ground.

Nothing that is drawn is a digit or a letter, and no shape is made of a digit's strokes: reading
digits is what the demo has to teach. Every question has equally likely answers, so that whoever
does not look cannot do better than chance.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image, ImageDraw

COLORS = {
    "red": (215, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 70, 215),
    "yellow": (235, 205, 40),
    "purple": (140, 50, 175),
    "orange": (240, 130, 30),
}
SHAPES = ("square", "disc", "triangle", "cross", "diamond", "arrow")
COLOR_NAMES = tuple(COLORS)
NUM_LOOKS = 1 + len(COLORS) * len(SHAPES)
NUMBERS = ("no", "one", "two", "three", "four")
CELL = 16  # pixels that one shape has room in
BLANK = (128, 128, 128)
_GRIDS = ((2, 2), (3, 2), (2, 3), (3, 3))


@dataclass(frozen=True)
class Thing:
    """One shape, in a cell of the scene's grid."""

    color: str
    shape: str
    column: int
    row: int


@dataclass(frozen=True)
class Scene:
    """What a picture shows. Columns and rows are cells of ``CELL`` pixels."""

    num_columns: int
    num_rows: int
    things: tuple[Thing, ...]

    def draw(self, rng: random.Random) -> Image.Image:
        """Draw it; ``rng`` decides the ground, the sizes, and where in its cell each shape lies."""
        shade = rng.randint(0, 60) if rng.random() < 0.5 else rng.randint(195, 255)
        ground = tuple(shade + rng.randint(-8, 8) for _ in range(3))
        image = Image.new("RGB", (self.num_columns * CELL, self.num_rows * CELL), ground)
        for thing in self.things:
            _draw_thing(ImageDraw.Draw(image), thing, rng)
        return image

    def looks(self, cell: int) -> list[int]:
        """What lies at each square of ``cell`` pixels, in reading order: 0 is the ground, each
        kind of thing has a number.
        """
        found = {
            (thing.column, thing.row): 1
            + COLOR_NAMES.index(thing.color) * len(SHAPES)
            + SHAPES.index(thing.shape)
            for thing in self.things
        }
        height, width = self.num_rows * CELL // cell, self.num_columns * CELL // cell
        return [
            found.get((x * cell // CELL, y * cell // CELL), 0)
            for y in range(height)
            for x in range(width)
        ]


@dataclass(frozen=True)
class Question:
    """One question about one or two pictures; ``chance`` is what the best answer without looking
    gets.
    """

    kind: str
    text: str
    answer: str
    images: tuple[Image.Image, ...]
    chance: float

    def blanked(self) -> Question:
        """The same question about pictures that show nothing."""
        blank = tuple(Image.new("RGB", image.size, BLANK) for image in self.images)
        return Question(self.kind, self.text, self.answer, blank, self.chance)


def draw_question(rng: random.Random, placing_share: float = 0.4) -> Question:
    """Draw one question of one kind, with its pictures; of so many the answer is a place or a
    picture.
    """
    return rng.choice(_PLACING if rng.random() < placing_share else _NAMING)(rng)


def _draw_thing(draw: ImageDraw.ImageDraw, thing: Thing, rng: random.Random) -> None:
    radius = rng.uniform(5.0, 7.5)
    room = CELL / 2 - radius
    x = thing.column * CELL + CELL / 2 + rng.uniform(-room, room)
    y = thing.row * CELL + CELL / 2 + rng.uniform(-room, room)
    fill = tuple(max(0, min(255, part + rng.randint(-18, 18))) for part in COLORS[thing.color])
    thin = radius * 0.36
    if thing.shape == "square":
        draw.rectangle((x - radius, y - radius, x + radius, y + radius), fill=fill)
    elif thing.shape == "disc":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    elif thing.shape == "cross":
        draw.rectangle((x - radius, y - thin, x + radius, y + thin), fill=fill)
        draw.rectangle((x - thin, y - radius, x + thin, y + radius), fill=fill)
    else:
        corners = {
            "triangle": ((0, -1), (1, 1), (-1, 1)),
            "diamond": ((0, -1), (0.8, 0), (0, 1), (-0.8, 0)),
            "arrow": ((-1, -0.4), (0, -0.4), (0, -1), (1, 0), (0, 1), (0, 0.4), (-1, 0.4)),
        }[thing.shape]
        draw.polygon([(x + radius * dx, y + radius * dy) for dx, dy in corners], fill=fill)


def _draw_cells(rng: random.Random, count: int) -> tuple[int, int, list[tuple[int, int]]]:
    """The size of a scene's grid, and ``count`` of its cells."""
    num_columns, num_rows = rng.choice(_GRIDS)
    cells = [(column, row) for column in range(num_columns) for row in range(num_rows)]
    return num_columns, num_rows, rng.sample(cells, count)


def _scene(rng: random.Random, looks: list[tuple[str, str]]) -> Scene:
    num_columns, num_rows, cells = _draw_cells(rng, len(looks))
    return Scene(
        num_columns,
        num_rows,
        tuple(Thing(*look, *cell) for look, cell in zip(looks, cells, strict=True)),
    )


def _ask_color(rng: random.Random) -> Question:
    shapes = rng.sample(SHAPES, rng.randint(1, 3))
    scene = _scene(rng, [(rng.choice(COLOR_NAMES), shape) for shape in shapes])
    asked = rng.choice(scene.things)
    return Question(
        "color",
        f"What color is the {asked.shape}?",
        asked.color,
        (scene.draw(rng),),
        1 / len(COLORS),
    )


def _ask_shape(rng: random.Random) -> Question:
    colors = rng.sample(COLOR_NAMES, rng.randint(1, 3))
    scene = _scene(rng, [(color, rng.choice(SHAPES)) for color in colors])
    asked = rng.choice(scene.things)
    return Question(
        "shape", f"What shape is {asked.color}?", asked.shape, (scene.draw(rng),), 1 / len(SHAPES)
    )


def _ask_count(rng: random.Random) -> Question:
    count = rng.randint(1, 4)
    scene = _scene(rng, [(rng.choice(COLOR_NAMES), rng.choice(SHAPES)) for _ in range(count)])
    return Question(
        "count", "How many shapes are there?", NUMBERS[count], (scene.draw(rng),), 1 / 4
    )


def _ask_where(rng: random.Random) -> Question:
    """In which corner of a picture one of its shapes lies."""
    num_columns, num_rows = rng.choice(_GRIDS)
    corners = rng.sample(
        [(x, y) for x in (0, num_columns - 1) for y in (0, num_rows - 1)], rng.randint(1, 3)
    )
    shapes = rng.sample(SHAPES, len(corners))
    things = tuple(
        Thing(rng.choice(COLOR_NAMES), *place)
        for place in zip(shapes, *zip(*corners, strict=True), strict=True)
    )
    asked = rng.choice(things)
    answer = f"{'bottom' if asked.row else 'top'} {'right' if asked.column else 'left'}"
    return Question(
        "where",
        f"Where is the {asked.shape}?",
        answer,
        (Scene(num_columns, num_rows, things).draw(rng),),
        1 / 4,
    )


def _ask_which(rng: random.Random) -> Question:
    """Which of two pictures shows a shape."""
    asked = rng.choice(SHAPES)
    others = [shape for shape in SHAPES if shape != asked]
    pictures = [
        _scene(
            rng,
            [(rng.choice(COLOR_NAMES), shape)]
            + [(rng.choice(COLOR_NAMES), other) for other in rng.sample(others, 1)],
        )
        for shape in (asked, rng.choice(others))
    ]
    answer = rng.choice(("first", "second"))
    if answer == "second":
        pictures.reverse()
    images = tuple(picture.draw(rng) for picture in pictures)
    return Question("which", f"Which picture has a {asked}?", answer, images, 1 / 2)


def draw_scene(rng: random.Random, max_things: int = 4) -> Scene:
    """Draw a scene of things of any kind."""
    return _scene(
        rng,
        [(rng.choice(COLOR_NAMES), rng.choice(SHAPES)) for _ in range(rng.randint(1, max_things))],
    )


def draw_clouds(rng: random.Random) -> Image.Image:
    """Draw random spots of light that run into one another: nothing that has a name, and much to
    be seen.
    """
    cells, size = rng.choice((4, 6, 8)), rng.choice((16, 24, 32))
    middle, spread, mode = rng.uniform(60, 200), rng.uniform(20, 90), rng.choice(("L", "RGB"))
    spots = Image.new(mode, (cells, cells))
    spots.putdata([_draw_spot(rng, middle, spread, mode) for _ in range(cells**2)])
    return spots.resize((size, size), Image.Resampling.BICUBIC).convert("RGB")


def _draw_spot(
    rng: random.Random, middle: float, spread: float, mode: str
) -> int | tuple[int, ...]:
    values = tuple(max(0, min(255, round(rng.gauss(middle, spread)))) for _ in mode)
    return values[0] if mode == "L" else values


def draw_description(rng: random.Random, max_things: int = 3) -> Question:
    """Ask for everything in a picture, in reading order: many words about one picture teach to
    see, an answer of one hardly does.
    """
    scene = draw_scene(rng, max_things)
    ordered = sorted(scene.things, key=lambda thing: (thing.row, thing.column))
    answer = ", ".join(f"{thing.color} {thing.shape}" for thing in ordered)
    return Question("describe", "What is there?", answer, (scene.draw(rng),), 0.0)


_NAMING: tuple[Callable[[random.Random], Question], ...] = (_ask_color, _ask_shape, _ask_count)
_PLACING: tuple[Callable[[random.Random], Question], ...] = (_ask_where, _ask_which)
