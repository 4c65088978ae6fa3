"""A picture of images that a model was asked about, with its answers."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from lorakit.extras import require
from lorakit.sampling.score import Answer
from lorakit.types import Datum


def draw_answers(
    path: Path,
    datums: Sequence[Datum],
    answers: Sequence[Answer],
    *,
    num_columns: int = 16,
    num_rows: int = 8,
) -> None:
    """Write a picture of scans with the answers below them: all mistakes first, as far as there
    is room, then what is right. Raises ConfigError where matplotlib is missing.
    """
    require("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    order = sorted(range(len(answers)), key=lambda index: answers[index].is_exact)[
        : num_columns * num_rows
    ]
    figure = Figure(
        figsize=(num_columns * 0.7, -(-len(order) // num_columns) * 0.9 + 0.6), layout="constrained"
    )
    FigureCanvasAgg(figure)
    right = sum(answer.is_exact for answer in answers)
    figure.suptitle(
        f"{right} of {len(answers)} right; mistakes first: answered (should be)", fontsize=10
    )
    places = figure.subplots(-(-len(order) // num_columns), num_columns, squeeze=False).flatten()
    for place in places:
        place.axis("off")
    for place, index in zip(places, order, strict=False):
        answer, (chunk,) = answers[index], datums[index].model_input.images
        place.imshow(Image.open(io.BytesIO(chunk.data)), cmap="gray", vmin=0, vmax=255)
        said = (
            answer.sample.text
            if answer.is_exact
            else f"{answer.sample.text[:6]} ({answer.expected})"
        )
        place.set_title(
            said, fontsize=8, color="green" if answer.is_exact else "red", y=-0.35, parse_math=False
        )
    figure.savefig(path, dpi=110)
