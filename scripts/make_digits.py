"""Write ``lorakit/examples/digits/{train,heldout}.jsonl`` and ``scan.png``, handwritten digits:
``python scripts/make_digits.py``.

Needs scikit-learn, inside of which they are: 1,797 scans of 8 x 8 pixels (Alpaydin and Kaynak,
Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998; CC BY 4.0). A row
is a question about one scan, a PNG in a data: URL.
"""

from __future__ import annotations

import base64
import io
import json
import random
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

OUT = Path(__file__).resolve().parent.parent / "lorakit" / "examples" / "digits"
NUM_HELD_OUT = 397
QUESTION = "which digit?"


def draw(scan: np.ndarray) -> bytes:
    """A scan, whose ink is 0 to 16, as a PNG."""
    file = io.BytesIO()
    Image.fromarray((255 - scan.reshape(8, 8) * (255 / 16)).round().astype(np.uint8)).save(
        file, "PNG", optimize=True
    )
    return file.getvalue()


def make_row(scan: np.ndarray, digit: int) -> dict[str, object]:
    """A question about one scan."""
    url = f"data:image/png;base64,{base64.b64encode(draw(scan)).decode()}"
    asked = [{"type": "image", "image": url}, {"type": "text", "text": QUESTION}]
    return {
        "messages": [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": str(digit)},
        ]
    }


def main() -> None:
    scans, digits = load_digits(return_X_y=True)
    order = list(range(len(digits)))
    random.Random(7).shuffle(order)
    OUT.mkdir(parents=True, exist_ok=True)
    for name, chosen in (("heldout", order[:NUM_HELD_OUT]), ("train", order[NUM_HELD_OUT:])):
        rows = [json.dumps(make_row(scans[index], int(digits[index]))) for index in chosen]
        (OUT / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
        print(f"{OUT / name}.jsonl: {len(rows)} rows")
    (OUT / "scan.png").write_bytes(draw(scans[order[0]]))


if __name__ == "__main__":
    main()
