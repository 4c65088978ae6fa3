"""Whether a device computes what the processor does: asked of those whose kernels are young,
before a run is trusted to them.
"""

from __future__ import annotations

import functools

import torch

from lorakit.data.batch.collate import collate
from lorakit.data.datum import make_datum
from lorakit.lora.inject import inject
from lorakit.lora.spec import LoRASpec
from lorakit.loss.cross_entropy import cross_entropy
from lorakit.model.load import load_model
from lorakit.training.step import compute_loss
from lorakit.types import Batch

TOLERANCE = 1e-3  # of the loss, and of the gradient's length; float32 on both sides gives some 1e-5


@functools.cache
def find_parity_problem(device: str) -> str | None:
    """Return how ``device`` differs from the CPU in loss and gradient of the bundled mixture of
    experts with LoRA, or None.

    Rows are padded in one batch and packed in another, as training has them.
    """
    for name, batch in _batches().items():
        expected_loss, expected = loss_and_gradient("cpu", batch)
        try:
            loss, gradient = loss_and_gradient(device, batch)
        except (RuntimeError, TypeError) as error:
            # an operation that the device lacks, or a number format (TypeError)
            return f"{device} cannot compute {name} rows: {' '.join(str(error).split())[:200]}"
        distance = float((gradient - expected).norm() / expected.norm())
        is_same_loss = abs(loss - expected_loss) <= TOLERANCE * abs(expected_loss)
        if not (is_same_loss and distance <= TOLERANCE):
            return (
                f"{device} computes another loss of {name} rows ({loss:.5f}, the CPU"
                f" {expected_loss:.5f}), or another gradient (off by {distance:.1e})"
            )
    return None


def loss_and_gradient(device: str, batch: Batch) -> tuple[float, torch.Tensor]:
    """The loss of ``batch`` under the bundled model with a random adapter on ``device``, and the
    adapter's gradient as one vector.
    """
    model = inject(load_model("tiny", dtype="float32"), LoRASpec(rank=4))
    generator = torch.Generator().manual_seed(0)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    model = model.to(device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    output = compute_loss(model, batch.to(device), cross_entropy)
    gradients = torch.autograd.grad(output.loss_sum, trained)
    parts = [gradient.cpu().double().flatten() for gradient in gradients]
    return float(output.loss_sum), torch.cat(parts)


def _batches() -> dict[str, Batch]:
    generator = torch.Generator().manual_seed(1)
    lengths = (48, 20, 33, 9)
    datums = [
        make_datum(
            torch.randint(3, 200, (length,), generator=generator).tolist(),
            [float(place % 3 > 0) for place in range(length)],
        )
        for length in lengths
    ]
    return {"padded": collate([[datum] for datum in datums], 0), "packed": collate([datums], 0)}
