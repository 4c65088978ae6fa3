"""Which base model is meant, and how it is held: one object for commands, library and service."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lorakit.model.load import (
    base_name,
    load_config,
    load_image_processor,
    load_model,
    load_skeleton,
    load_tokenizer,
    pieces_of,
)


@dataclass(frozen=True)
class ModelSpec:
    """A base model.

    Args:
        path: a folder in the hub's layout, a name of the hub, or a bundled model.
        revision: branch, tag or commit of a model of the hub.
        dtype: of the frozen base; auto follows the run's precision.
        attention: the implementation in transformers; auto is sdpa, or eager for families that
            sdpa cannot compute.
        trust_remote_code: run code that comes with the model.
        add_tokens: new tokens, whose rows in embedding and unembedding are trained beside the
            adapter.
    """

    path: str
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attention: str = "auto"
    trust_remote_code: bool = False
    add_tokens: Sequence[str] | None = None

    @property
    def name(self) -> str:
        """What an adapter's config calls it."""
        return base_name(self.path)

    @property
    def _source(self) -> dict[str, Any]:
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}

    def load_config(self) -> Any:
        """Return its transformers config."""
        return load_config(self.path, **self._source)

    def load_tokenizer(self) -> Any:
        """Return its tokenizer, with the new tokens."""
        return load_tokenizer(self.path, add_tokens=self.add_tokens, **self._source)

    def load_image_processor(self) -> Any:
        """Return its image processor; None where it takes no images."""
        return load_image_processor(self.path, **self._source)

    def load_skeleton(self) -> Any:
        """Return the model on the meta device: every shape, no weight."""
        return load_skeleton(self.path, add_tokens=self.add_tokens, **self._source)

    def load(self, dtype: str, *, device: str | None = None) -> Any:
        """Return the model, frozen, in ``dtype``: float32, bfloat16 or float16."""
        return load_model(
            self.path,
            dtype=dtype,
            attention=self.attention,
            device=device,
            add_tokens=self.add_tokens,
            **self._source,
        )

    def added_token_ids(self) -> tuple[int, ...]:
        """The ids of the new tokens."""
        if not self.add_tokens:
            return ()
        return tuple(pieces_of(self.path, self.add_tokens, **self._source))
