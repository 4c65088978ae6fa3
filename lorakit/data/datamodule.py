"""The one DataModule: a file becomes batches, with exact resume."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import lightning as L
import numpy as np
import torch

from lorakit.data.batch.collate import collate
from lorakit.data.batch.estimate import BatchEstimate
from lorakit.data.batch.mixture import Mixture
from lorakit.data.batch.packing import fill_with_longest
from lorakit.data.batch.stream import BatchStream
from lorakit.data.examples import DatasetReport, Examples, profile
from lorakit.data.images import ImageEncoder
from lorakit.data.read.custom_format import name_of_format
from lorakit.data.read.rows import are_pairs
from lorakit.data.read.sources import Source, open_source, open_sources
from lorakit.data.render.renderer import Renderer
from lorakit.data.render.templates import read_template, use_template
from lorakit.data.specs import (
    SPECS,
    BatchSpec,
    DataSpec,
    ImageSpec,
    RenderingSpec,
    RowSpec,
    takes_fields,
)
from lorakit.errors import ConfigError
from lorakit.types import Batch, Cursor, ModelInput


class LoRADataModule(L.LightningDataModule):
    """Masked causal-LM batches from a file, a folder, a glob or a data set of the hub.

    ``check_rows()`` needs no tokenizer and is called first; ``set_tokenizer`` and
    ``check_tokens()`` come next; Lightning asks for loaders last. Each step finds its own kind of
    bad input, all of it at once, before anything expensive is started.

    Args:
        rows, rendering, batches, images: what to read, and how it becomes batches. Their fields
            are taken as keywords, too, as the config has them: ``LoRADataModule(path=…,
            max_tokens=2048)``.

    Raises:
        ConfigError: a setting cannot be used, or two contradict each other.
    """

    @takes_fields(*SPECS.values())
    def __init__(
        self,
        *,
        rows: RowSpec | None = None,
        rendering: RenderingSpec | None = None,
        batches: BatchSpec | None = None,
        images: ImageSpec | None = None,
        **keywords: Any,
    ) -> None:
        super().__init__()
        given = {"rows": rows, "rendering": rendering, "batches": batches, "images": images}
        specs = {name: spec for name, spec in given.items() if spec is not None}
        self.spec = DataSpec.from_keywords(keywords, **specs)
        self._is_padded = False  # although the spec says packing
        self.tokenizer: Any = None
        self.images: ImageEncoder | None = None
        self.image_token_id: int | None = None
        self.new_tokens: Sequence[int] = ()
        self.report: DatasetReport | None = None
        self.val_report: DatasetReport | None = None
        self._cursor = Cursor()

    # ---- in the order in which they are called

    def check_rows(self) -> None:
        """Read and check every row. Raises DataError with all problems."""
        for source in (self.source, self.val_source):  # asking for them reads them
            assert len(source)
        if self.are_pairs:
            self.spec.check_pairs_fit()
        epochs = self.spec.batches.epochs
        for entry, count in zip(self.spec.rows.mixed or (), self.mixture.counts, strict=False):
            if epochs is not None and count * epochs < 1 - 1e-9:
                raise ConfigError(
                    f"data.sources: {entry.path} has weight {entry.weight:g} and too few rows for"
                    f" it: none is seen in data.epochs={epochs}; raise one of them"
                )

    def set_tokenizer(
        self,
        tokenizer: Any,
        images: ImageEncoder | None = None,
        *,
        image_token_id: int | None = None,
        new_tokens: Sequence[int] = (),
    ) -> None:
        """Use ``tokenizer``, and ``images`` where rows have some, for everything that follows.

        Args:
            image_token_id: what stands for an image, and so may not occur in a text, where the
                model takes images and ``images`` does not say it.
            new_tokens: that were added to it, and are counted.
        """
        self.new_tokens = new_tokens
        self.tokenizer = tokenizer
        self.image_token_id = images.token_id if images else image_token_id
        if template := self.spec.rendering.chat_template:
            use_template(tokenizer, template)
        bounds = self.spec.images
        self.images = images.within(bounds.min_pixels, bounds.max_pixels) if images else None

    def use_tokens_per_batch(self, tokens: int, pack_tokens: int | None = None) -> None:
        """Fill micro-batches by ``tokens`` positions instead of rows, of ``pack_tokens`` each;
        before a loader is asked for.
        """
        batches = replace(self.spec.batches, batch_size=None, tokens_per_batch=tokens)
        batches = replace(batches, pack_tokens=pack_tokens or batches.pack_tokens)
        self.spec = replace(self.spec, batches=batches)  # whose rows may be the longest one's

    def pad_rows(self) -> None:
        """Pad rows in place of packing them, where the model cannot isolate what is packed."""
        self._is_padded = True

    @property
    def is_packed(self) -> bool:
        """Whether a row of a batch holds several examples."""
        return self.spec.batches.packing and not self._is_padded

    @property
    def row_tokens(self) -> int | None:
        """Positions of a packed row; None where rows are padded."""
        return self.spec.row_tokens(are_pairs=self.are_pairs) if self.is_packed else None

    @property
    def has_images(self) -> bool:
        """Whether any row has an image, so that ``set_tokenizer`` must be given what encodes it."""
        return self.source.has_images or self.val_source.has_images

    def check_tokens(self) -> DatasetReport:
        """Render the rows and return their figures. Raises DataError with all problems."""
        self.check_rows()
        self.report = profile(
            self.train_examples,
            self.train_indices,
            self.spec.rows.check_token_rows,
            self.new_tokens,
        )
        if len(self.val_indices):
            self.val_report = profile(
                self.val_examples, self.val_indices, self.spec.rows.check_token_rows
            )
        return self.report

    def setup(self, stage: str | None = None) -> None:
        """Lightning's hook: do what was not done yet."""
        if self.tokenizer is None:
            module = getattr(self.trainer, "lightning_module", None)
            if (tokenizer := getattr(module, "tokenizer", None)) is None:
                raise ConfigError(
                    "LoRADataModule has no tokenizer; call set_tokenizer(tokenizer) first"
                )
            self.set_tokenizer(tokenizer, getattr(module, "images", None))
        if self.report is None:
            self.check_tokens()

    def train_dataloader(self) -> BatchStream:
        """Batches of the whole fit, from where a resumed run stopped."""
        return BatchStream(
            self.train_examples,
            self.mixture,
            pad_token_id=self.pad_token_id,
            **self._filling,
            **self._share,
            accumulate=self.trainer.accumulate_grad_batches if self.trainer else 1,
            num_epochs=self.spec.batches.epochs,
            cursor=self._cursor,
            images=self.images,
        )

    def val_dataloader(self) -> BatchStream | list[Any]:
        """Batches for evaluation, in the order of the rows; empty where there are none."""
        if not len(self.val_indices):
            return []
        batches = self.spec.batches
        size = batches.val_batch_size or batches.rows_per_batch
        return BatchStream(
            self.val_examples,
            Mixture(self.val_indices, replace(self.val_source, weights=()), seed=batches.seed),
            pad_token_id=self.pad_token_id,
            **self._filling | {"batch_size": size, "row_tokens": None, "shuffle": False},
            **self._share,
            images=self.images,
        )

    def longest_batch(self) -> Batch | None:
        """A training batch as full as any, made of the longest row alone, without counting it;
        None where it gives nothing.
        """
        tokens = self.spec.batches.tokens_per_batch
        assert self.report is not None and tokens
        datums = self._make_examples(self.source).datums(self.report.longest_row)
        rows = fill_with_longest(
            datums, batch_tokens=tokens, row_tokens=self.row_tokens, are_pairs=self.are_pairs
        )
        if not rows:
            return None
        batch = collate(rows, self.pad_token_id, self.images, are_pairs=self.are_pairs)
        return replace(batch, window_weight=batch.denominator)

    def val_prompts(self, count: int) -> list[ModelInput]:
        """The first ``count`` evaluation examples, up to where their training begins."""
        prompts = []
        for index in self.val_indices[:count]:
            for datum in self.val_examples.datums(int(index))[:1]:
                first = int(np.flatnonzero(datum.weights)[0])
                prompts.append(datum.model_input.first(first + 1))
        return prompts

    # ---- state

    def transfer_batch_to_device(
        self, batch: Batch, device: torch.device, dataloader_idx: int
    ) -> Batch:
        """Lightning's hook, called when a batch's step begins; remembers how far training is."""
        # not when it is drawn: Lightning prefetches one batch
        if self.trainer and self.trainer.training and batch.cursor is not None:
            self._cursor = batch.cursor
        return batch.to(device)

    def state_dict(self) -> dict[str, Any]:
        """The cursor after the last batch that was trained."""
        return {"cursor": self._cursor.to_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after that batch."""
        self._cursor = Cursor(**state_dict["cursor"])

    # ---- facts

    @cached_property
    def source(self) -> Source:
        """The rows, checked."""
        mixed = self.spec.rows.mixed
        return open_sources(mixed, **self._reading) if mixed else self._open(self.spec.rows.path)

    @cached_property
    def val_source(self) -> Source:
        """The rows for evaluation: of ``val_path``, or the training rows themselves, of which
        ``val_indices`` picks some.
        """
        return self._open(self.spec.rows.val_path) if self.spec.rows.val_path else self.source

    def _open(self, path: str | None) -> Source:
        assert path is not None  # or there are several sources
        return open_source(path, **self._reading)

    @property
    def _reading(self) -> dict[str, Any]:
        rows = self.spec.rows
        return {
            "format": rows.format,
            "columns": rows.columns,
            "on_error": rows.on_error,
            "split": rows.split,
        }

    @cached_property
    def are_pairs(self) -> bool:
        """Whether each row is a pair of a better and a worse answer. Raises ConfigError where
        only some are.
        """
        return are_pairs([*self.source.formats, *self.val_source.formats])

    @cached_property
    def train_examples(self) -> Examples:
        return self._make_examples(self.source)

    @cached_property
    def val_examples(self) -> Examples:
        return self._make_examples(self.val_source)

    @cached_property
    def train_indices(self) -> np.ndarray:
        """Rows to train on."""
        return np.sort(self._split()[self._num_set_aside :])

    @cached_property
    def mixture(self) -> Mixture:
        """Which of them each epoch has."""
        return Mixture(self.train_indices, self.source, seed=self.spec.batches.seed)

    @property
    def source_names(self) -> tuple[str, ...]:
        """The names of the sources; empty where there is only one."""
        return self.source.names

    @property
    def val_source_names(self) -> tuple[str, ...]:
        """The same of the rows for evaluation."""
        return self.val_source.names

    @cached_property
    def val_indices(self) -> np.ndarray:
        """Rows to evaluate on, at most ``val_rows``."""
        rows = self.spec.rows
        if rows.val_path:
            return np.arange(len(self.val_source))[: rows.val_rows]
        return np.sort(self._split()[: self._num_set_aside])[: rows.val_rows]

    @property
    def fingerprint(self) -> str:
        """Digest of the rows, the sizes of their images, and of every setting that decides what
        is trained in which order.
        """
        rows, rendering, batches = self.spec.rows, self.spec.rendering, self.spec.batches
        template, images = rendering.chat_template, self.spec.images
        settings = [
            self.source.fingerprint,
            self.val_source.fingerprint,
            name_of_format(rows.format),
            rendering.train_on,
            rendering.append_eos,
            rendering.stop,
            rendering.max_tokens,
            rendering.on_long,
            rows.on_error,
            self.is_packed,
            self.spec.row_tokens(are_pairs=self.are_pairs) or rendering.max_tokens,
            batches.rows_per_batch,
            batches.tokens_per_batch,
            batches.shuffle,
            batches.seed,
            batches.window_rows,
            rows.val_fraction,
            *((read_template(template),) if template else ()),
            *(bound for bound in (images.min_pixels, images.max_pixels) if bound),
            *self._image_bytes(),
        ]
        return hashlib.sha256(json.dumps(settings, default=list).encode()).hexdigest()[:16]

    def _image_bytes(self) -> list[int]:
        """How large all images are that the reports looked at: rows say only where they are."""
        reports = (self.report, self.val_report)
        return [report.num_image_bytes for report in reports if report and report.num_image_bytes]

    def estimate_num_batches(self) -> int | None:
        """Micro-batches of all epochs, from the rows profiled; None where epochs do not end, see
        ``BatchEstimate``.
        """
        epochs = self.spec.batches.epochs
        if epochs is None or self.report is None:
            return None
        return self._estimate.num_batches(epochs)

    def estimate_padding(self) -> float:
        """Share of the positions of training batches that hold only padding."""
        return self._estimate.padding_share()

    @property
    def _estimate(self) -> BatchEstimate:
        assert self.report is not None
        return BatchEstimate(self.report, self.mixture, **self._filling)

    @property
    def _filling(self) -> dict[str, Any]:
        """How batches of training are filled, and in which order."""
        batches = self.spec.batches
        return {
            "batch_size": batches.rows_per_batch,
            "batch_tokens": batches.tokens_per_batch,
            "row_tokens": self.row_tokens,
            "window_rows": batches.window_rows,
            "shuffle": batches.shuffle,
            "seed": batches.seed,
            "are_pairs": self.are_pairs,
        }

    def _make_examples(self, source: Source) -> Examples:
        spec = self.spec.rendering
        renderer = Renderer(
            self.tokenizer,
            train_on=spec.train_on,
            append_eos=spec.append_eos,
            stop=spec.stop,
            image_token_id=self.image_token_id,
        )
        return Examples(
            source, renderer, spec.max_tokens, spec.on_long, self.spec.rows.on_error, self.images
        )

    def _split(self) -> np.ndarray:
        num_rows = len(self.source)
        if not self._num_set_aside:
            return np.arange(num_rows)
        return np.random.default_rng(self.spec.batches.seed).permutation(num_rows)

    @property
    def _share(self) -> dict[str, Any]:
        """Which process this is; ``sequence_parallel`` of them share each row."""
        if not self.trainer:
            return {}
        sp_size = getattr(getattr(self.trainer, "strategy", None), "sequence_parallel", 1)
        rank, sp_rank = divmod(self.trainer.global_rank, sp_size)
        world_size = self.trainer.world_size // sp_size
        return {"rank": rank, "world_size": world_size, "sp_rank": sp_rank, "sp_size": sp_size}

    @property
    def _num_set_aside(self) -> int:
        share, num_rows = self.spec.rows.val_fraction, len(self.source)
        if not share or self.spec.rows.val_path:
            return 0
        if num_rows < 2:
            raise ConfigError(
                f"data.val_fraction={share} needs at least 2 rows; {self.spec.rows.title} has"
                f" {num_rows}"
            )
        return min(max(1, round(share * num_rows)), num_rows - 1)

    @property
    def pad_token_id(self) -> int:
        """What rows are padded with; it weighs 0, so any token would do."""
        pad, eos = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        return pad if pad is not None else eos if eos is not None else 0
