"""The one DataModule: a file becomes batches, with exact resume."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

import lightning as L
import numpy as np
import torch

from lorakit.data.batch.collate import collate
from lorakit.data.batch.estimate import BatchEstimate
from lorakit.data.batch.mixture import Mixture
from lorakit.data.batch.packing import fill_with_longest
from lorakit.data.batch.stream import BatchStream
from lorakit.data.datum import OnLong
from lorakit.data.examples import DatasetReport, Examples, profile
from lorakit.data.images import ImageEncoder
from lorakit.data.read.custom_format import name_of_format
from lorakit.data.read.rows import are_pairs
from lorakit.data.read.sources import Source, open_source, open_sources, read_mixed
from lorakit.data.render.renderer import Renderer, TrainOnWhat
from lorakit.data.render.templates import read_template, use_template
from lorakit.data.settings import check_counts, check_settings, one_of
from lorakit.errors import ConfigError
from lorakit.types import Batch, Cursor, ModelInput

DEFAULT_BATCH_SIZE = 8


class LoRADataModule(L.LightningDataModule):
    """Masked causal-LM batches from a file, a folder, a glob or a data set of the hub.

    ``check_rows()`` needs no tokenizer and is called first; ``set_tokenizer`` and
    ``check_tokens()`` come next; Lightning asks for loaders last. Each step finds its own kind of
    bad input, all of it at once, before anything expensive is started.

    Args:
        path: where the rows are; see ``open_source``.
        sources: in place of ``path``, several of them: each a path, a ``Mixed``, or a mapping of
            its fields. Loss and share of the trained tokens are logged for each.
        val_path: rows for evaluation; or ``val_fraction`` of the training rows are set aside by
            ``seed``.
        format: a name in ``FORMATS``, or a function of your own that makes a row of a record; None:
            by the columns.
        columns: what the data calls the columns of our formats, by our names: ``{"prompt":
            "question"}``.
        chat_template: a file with a Jinja template, or the name of a bundled one; None: the
            tokenizer's own.
        train_on: which tokens are trained; see ``TrainOnWhat``.
        stop: strings at which sampling will stop; plain rows that end with one need no EOS.
        max_tokens: longest example in tokens; ``on_long`` says what happens to longer ones.
        packing: ``true`` puts several examples in a row of ``pack_tokens`` positions (default:
            ``max_tokens``).
        batch_size: rows per micro-batch (default 8); a row is a pack, or one example without
            packing.
        tokens_per_batch: in place of ``batch_size``, positions per micro-batch: as many rows as
            fit.
        epochs: passes over the rows; None goes on until the trainer's ``max_steps``.
        check_token_rows: rows whose tokens are checked before training; the others are checked as
            they stream.
        min_pixels, max_pixels: images are scaled to lie between, at the same ratio; None: as the
            model's processor has it.
    """

    def __init__(
        self,
        *,
        path: str | None = None,
        sources: Sequence[Any] | None = None,
        val_path: str | None = None,
        val_fraction: float = 0.0,
        val_rows: int | None = None,
        format: Any = None,
        columns: dict[str, str] | None = None,
        chat_template: str | None = None,
        split: str = "train",
        train_on: str = TrainOnWhat.ALL_ASSISTANT_MESSAGES,
        append_eos: bool | str = "auto",
        stop: str | Sequence[str] | None = None,
        max_tokens: int = 1024,
        on_long: str = OnLong.ERROR,
        on_error: Literal["raise", "skip"] = "raise",
        packing: bool = False,
        pack_tokens: int | None = None,
        batch_size: int | None = None,
        tokens_per_batch: int | None = None,
        val_batch_size: int | None = None,
        epochs: int | None = 1,
        shuffle: bool = True,
        seed: int = 0,
        window_rows: int = 1024,
        check_token_rows: int = 20_000,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> None:
        super().__init__()
        check_settings(on_error=on_error, val_path=val_path, val_fraction=val_fraction)
        check_counts(
            batch_size=batch_size,
            val_batch_size=val_batch_size,
            tokens_per_batch=tokens_per_batch,
            epochs=epochs,
            val_rows=val_rows,
            window_rows=window_rows,
            check_token_rows=check_token_rows,
            max_tokens=max_tokens,
            pack_tokens=pack_tokens,
            min_pixels=min_pixels,
            max_pixels=max_pixels,
        )
        if (path is None) == (sources is None):
            raise ConfigError(
                "data.path and data.sources are both set; choose one"
                if path
                else "set data.path, or data.sources"
            )
        self.mixed, self.columns = None if sources is None else read_mixed(sources), columns
        # as a title
        self.path = (
            path if path is not None else ", ".join(entry.path for entry in self.mixed or ())
        )
        self.val_path, self.val_fraction, self.val_rows = val_path, val_fraction, val_rows
        self.chat_template = chat_template
        self.format, self.split, self.on_error = format, split, on_error
        self.train_on = one_of(TrainOnWhat, train_on, "data.train_on")
        self.on_long = one_of(OnLong, on_long, "data.on_long")
        self.append_eos, self.stop, self.max_tokens = append_eos, stop, max_tokens
        self.packing, self.pack_tokens, self._given_pack_tokens = (
            packing,
            pack_tokens or max_tokens,
            pack_tokens,
        )
        if pack_tokens and not packing:
            raise ConfigError(
                f"data.pack_tokens={pack_tokens} has no effect without data.packing=true"
            )
        if self.packing and self.pack_tokens < max_tokens:
            raise ConfigError(
                f"data.pack_tokens={pack_tokens} is less than data.max_tokens={max_tokens}"
            )
        if batch_size and tokens_per_batch:
            raise ConfigError(
                "data.batch_size and data.tokens_per_batch are both set; set one of them to null"
            )
        shortest = self.pack_tokens if self.packing else max_tokens
        if tokens_per_batch and tokens_per_batch < shortest:
            raise ConfigError(
                f"data.tokens_per_batch={tokens_per_batch} is less than one row of {shortest}"
                " tokens"
            )
        self.batch_size, self.tokens_per_batch = (
            batch_size or (None if tokens_per_batch else DEFAULT_BATCH_SIZE),
            tokens_per_batch,
        )
        self.given_val_batch_size = val_batch_size
        self.val_batch_size = val_batch_size or self.batch_size
        self.epochs, self.shuffle, self.seed, self.window_rows = epochs, shuffle, seed, window_rows
        self.check_token_rows = check_token_rows
        self.min_pixels, self.max_pixels = min_pixels, max_pixels
        self.tokenizer: Any = None
        self.images: ImageEncoder | None = None
        self.image_token_id: int | None = None
        self.new_tokens: Sequence[int] = ()
        self.report: DatasetReport | None = None
        self.val_report: DatasetReport | None = None
        self._cursor: Cursor | None = None

    # ---- in the order in which they are called

    def check_rows(self) -> None:
        """Read and check every row. Raises DataError with all problems."""
        for source in (self.source, self.val_source):  # asking for them reads them
            assert len(source)
        if self.are_pairs:
            self._make_room_for_pairs()
        for entry, count in zip(self.mixed or (), self.mixture.counts, strict=False):
            if self.epochs is not None and count * self.epochs < 1 - 1e-9:
                raise ConfigError(
                    f"data.sources: {entry.path} has weight {entry.weight:g} and too few rows for"
                    f" it: none is seen in data.epochs={self.epochs}; raise one of them"
                )

    def _make_room_for_pairs(self) -> None:
        """Both answers of a pair lie in one packed row, or in one batch. Raises ConfigError
        where they may not fit.
        """
        both = 2 * self.max_tokens
        if self.packing and self._given_pack_tokens is None:
            self.pack_tokens = both
        if self.packing and self.pack_tokens < both:
            raise ConfigError(
                f"data.pack_tokens={self.pack_tokens} is less than a pair of"
                f" data.max_tokens={self.max_tokens} each"
            )
        if self.tokens_per_batch and self.tokens_per_batch < both:
            raise ConfigError(
                f"data.tokens_per_batch={self.tokens_per_batch} is less than a pair of"
                f" data.max_tokens={self.max_tokens} each"
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
            image_token_id: what stands for an image, and so may not stand in a text, where the
                model takes images and ``images`` does not say it.
            new_tokens: that were added to it, and are counted.
        """
        self.new_tokens = new_tokens
        self.tokenizer, self.image_token_id = (
            tokenizer,
            images.token_id if images else image_token_id,
        )
        if self.chat_template:
            use_template(tokenizer, self.chat_template)
        self.images = images.within(self.min_pixels, self.max_pixels) if images else None

    def use_tokens_per_batch(self, tokens: int, pack_tokens: int | None = None) -> None:
        """Fill micro-batches by ``tokens`` positions instead of rows, of ``pack_tokens`` each;
        before a loader is asked for.
        """
        self.pack_tokens = pack_tokens or self.pack_tokens
        self.batch_size, self.tokens_per_batch = None, tokens
        self.val_batch_size = self.given_val_batch_size

    @property
    def has_images(self) -> bool:
        """Whether any row has an image, so that ``set_tokenizer`` must be given what encodes it."""
        return self.source.has_images or self.val_source.has_images

    def check_tokens(self) -> DatasetReport:
        """Render the rows and return their figures. Raises DataError with all problems."""
        self.check_rows()
        self.report = profile(
            self.train_examples, self.train_indices, self.check_token_rows, self.new_tokens
        )
        if len(self.val_indices):
            self.val_report = profile(self.val_examples, self.val_indices, self.check_token_rows)
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
            batch_size=self.batch_size,
            batch_tokens=self.tokens_per_batch,
            row_tokens=self.pack_tokens if self.packing else None,
            accumulate=self.trainer.accumulate_grad_batches if self.trainer else 1,
            **self._share,
            num_epochs=self.epochs,
            shuffle=self.shuffle,
            seed=self.seed,
            window_rows=self.window_rows,
            cursor=self._cursor,
            images=self.images,
            are_pairs=self.are_pairs,
        )

    def val_dataloader(self) -> BatchStream | list[Any]:
        """Batches for evaluation, in the order of the rows; empty where there are none."""
        if not len(self.val_indices):
            return []
        return BatchStream(
            self.val_examples,
            Mixture(self.val_indices, replace(self.val_source, weights=()), seed=self.seed),
            pad_token_id=self.pad_token_id,
            batch_size=self.val_batch_size,
            batch_tokens=self.tokens_per_batch,
            row_tokens=None,
            **self._share,
            shuffle=False,
            window_rows=self.window_rows,
            images=self.images,
            are_pairs=self.are_pairs,
        )

    def longest_batch(self) -> Batch | None:
        """A training batch as full as any, made of the longest row alone, without counting it;
        None where it gives nothing.
        """
        assert self.report is not None and self.tokens_per_batch
        datums = self._make_examples(self.source).datums(self.report.longest_row)
        row_tokens = self.pack_tokens if self.packing else None
        rows = fill_with_longest(
            datums,
            batch_tokens=self.tokens_per_batch,
            row_tokens=row_tokens,
            are_pairs=self.are_pairs,
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
        """Lightning's hook, called for a batch when its step begins; remembers how far training
        has come.
        """
        if self.trainer and self.trainer.training and batch.cursor is not None:
            self._cursor = batch.cursor
        return batch.to(device)

    def state_dict(self) -> dict[str, Any]:
        """The cursor behind the last batch that was trained."""
        return {"cursor": (self._cursor or Cursor()).to_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on behind that batch."""
        self._cursor = Cursor(**state_dict["cursor"])

    # ---- facts

    @cached_property
    def source(self) -> Source:
        """The rows, checked."""
        options: dict[str, Any] = {
            "format": self.format,
            "columns": self.columns,
            "on_error": self.on_error,
            "split": self.split,
        }
        return (
            open_sources(self.mixed, **options) if self.mixed else open_source(self.path, **options)
        )

    @cached_property
    def val_source(self) -> Source:
        """The rows for evaluation: of ``val_path``, or the training rows themselves, of which
        ``val_indices`` picks some.
        """
        if self.val_path is None:
            return self.source
        return open_source(
            self.val_path,
            format=self.format,
            columns=self.columns,
            on_error=self.on_error,
            split=self.split,
        )

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
        return Mixture(self.train_indices, self.source, seed=self.seed)

    @property
    def source_names(self) -> tuple[str, ...]:
        """The names of several sources; empty where there is one."""
        return self.source.names

    @property
    def val_source_names(self) -> tuple[str, ...]:
        """The same of the rows for evaluation."""
        return self.val_source.names

    @cached_property
    def val_indices(self) -> np.ndarray:
        """Rows to evaluate on, at most ``val_rows``."""
        chosen = (
            np.arange(len(self.val_source))
            if self.val_path
            else np.sort(self._split()[: self._num_set_aside])
        )
        return chosen[: self.val_rows]

    @property
    def fingerprint(self) -> str:
        """Digest of the rows, the sizes of their images, and of every setting that decides what
        is trained in which order.
        """
        settings = [
            self.source.fingerprint,
            self.val_source.fingerprint,
            name_of_format(self.format),
            self.train_on,
            self.append_eos,
            self.stop,
            self.max_tokens,
            self.on_long,
            self.on_error,
            self.packing,
            self.pack_tokens,
            self.batch_size,
            self.tokens_per_batch,
            self.shuffle,
            self.seed,
            self.window_rows,
            self.val_fraction,
            *((read_template(self.chat_template),) if self.chat_template else ()),
            *(bound for bound in (self.min_pixels, self.max_pixels) if bound),
            *self._image_bytes(),
        ]
        return hashlib.sha256(json.dumps(settings, default=list).encode()).hexdigest()[:16]

    def _image_bytes(self) -> list[int]:
        """How large all images are that the reports looked at: rows say only where they lie."""
        reports = (self.report, self.val_report)
        return [report.num_image_bytes for report in reports if report and report.num_image_bytes]

    def estimate_num_batches(self) -> int | None:
        """Micro-batches of all epochs, from the rows surveyed; None where epochs do not end, see
        ``BatchEstimate``.
        """
        if self.epochs is None or self.report is None:
            return None
        return self._estimate.num_batches(self.epochs)

    def estimate_padding(self) -> float:
        """Share of the positions of training batches that hold only padding."""
        return self._estimate.padding_share()

    @property
    def _estimate(self) -> BatchEstimate:
        assert self.report is not None
        return BatchEstimate(
            self.report,
            self.mixture,
            batch_size=self.batch_size,
            batch_tokens=self.tokens_per_batch,
            row_tokens=self.pack_tokens if self.packing else None,
            window_rows=self.window_rows,
            shuffle=self.shuffle,
            seed=self.seed,
            are_pairs=self.are_pairs,
        )

    def _make_examples(self, source: Source) -> Examples:
        renderer = Renderer(
            self.tokenizer,
            train_on=self.train_on,
            append_eos=self.append_eos,
            stop=self.stop,
            image_token_id=self.image_token_id,
        )
        return Examples(source, renderer, self.max_tokens, self.on_long, self.on_error, self.images)

    def _split(self) -> np.ndarray:
        num_rows = len(self.source)
        return (
            np.random.default_rng(self.seed).permutation(num_rows)
            if self._num_set_aside
            else np.arange(num_rows)
        )

    @property
    def _share(self) -> dict[str, Any]:
        """Which of the processes this one is; so many as ``sequence_parallel`` says share each
        row.
        """
        if not self.trainer:
            return {}
        parts = getattr(getattr(self.trainer, "strategy", None), "sequence_parallel", 1)
        (rank, part), world_size = (
            divmod(self.trainer.global_rank, parts),
            self.trainer.world_size // parts,
        )
        return {"rank": rank, "world_size": world_size, "part": part, "parts": parts}

    @property
    def _num_set_aside(self) -> int:
        if not self.val_fraction or self.val_path:
            return 0
        if len(self.source) < 2:
            raise ConfigError(
                f"data.val_fraction={self.val_fraction} needs at least 2 rows; {self.path} has"
                f" {len(self.source)}"
            )
        return min(max(1, round(self.val_fraction * len(self.source))), len(self.source) - 1)

    @property
    def pad_token_id(self) -> int:
        """What rows are padded with; it weighs 0, so any token would do."""
        pad, eos = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        return pad if pad is not None else eos if eos is not None else 0
