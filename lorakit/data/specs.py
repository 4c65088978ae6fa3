"""The settings of a DataModule: which rows to read, how to render them, how to batch them, and how
large images are. Each key of ``data`` is a field of one of these specs, and has no other home.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeVar, get_type_hints

from lorakit.data.datum import OnLong
from lorakit.data.read.sources import SourceSpec, read_mixed
from lorakit.data.render.renderer import TrainOnWhat
from lorakit.errors import ConfigError

DEFAULT_BATCH_SIZE = 8
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True, kw_only=True)
class RowSpec:
    """Where rows are, and which of them are trained and evaluated.

    Args:
        path: a file, folder, glob, or name; see ``open_source``.
        sources: in place of ``path``, several of them: each a path, a ``SourceSpec``, or a mapping
            of its fields. Loss and share of the trained tokens are logged for each.
        split: of a data set of the hub.
        val_path: rows for evaluation; or ``val_fraction`` of the training rows are set aside by
            the seed.
        val_rows: rows that are evaluated, at most.
        format: a name in ``FORMATS``, or a function of your own that makes a row of a record; None:
            by the columns.
        columns: what the data calls the columns of our formats, by our names: ``{"prompt":
            "question"}``.
        on_error: what happens to rows that cannot be used.
        check_token_rows: rows whose tokens are checked before training; the others are checked as
            they stream.
    """

    path: str | None = None
    sources: Sequence[Any] | None = None
    split: str = "train"
    val_path: str | None = None
    val_fraction: float = 0.0
    val_rows: int | None = None
    format: Any = None
    columns: dict[str, str] | None = None
    on_error: Literal["raise", "skip"] = "raise"
    check_token_rows: int = 20_000

    def __post_init__(self) -> None:
        if self.on_error not in ("raise", "skip"):
            raise ConfigError(f"data.on_error={self.on_error} is unknown; choose raise or skip")
        if self.val_path and self.val_fraction:
            raise ConfigError("data.val_path and data.val_fraction are both set; choose one")
        if not 0 <= self.val_fraction < 1:
            raise ConfigError(
                f"data.val_fraction={self.val_fraction} must be at least 0 and less than 1"
            )
        _check_counts(val_rows=self.val_rows, check_token_rows=self.check_token_rows)
        if (self.path is None) == (self.sources is None):
            raise ConfigError(
                "data.path and data.sources are both set; choose one"
                if self.path
                else "set data.path, or data.sources"
            )
        _ = self.mixed  # refuses what is no source

    @cached_property
    def mixed(self) -> list[SourceSpec] | None:
        """Several sources; None where there is one path."""
        return None if self.sources is None else read_mixed(self.sources)

    @property
    def title(self) -> str:
        """The path, or all paths."""
        return self.path or ", ".join(entry.path for entry in self.mixed or ())


@dataclass(frozen=True, kw_only=True)
class RenderingSpec:
    """How a row becomes tokens and weights.

    Args:
        chat_template: a file with a Jinja template, or the name of a bundled one; None: the
            tokenizer's own.
        train_on: which tokens are trained; see ``TrainOnWhat``.
        append_eos: whether plain rows end with EOS; auto: unless they already end with ``stop``.
        stop: strings at which sampling will stop; plain rows that end with one need no EOS.
        max_tokens: longest example in tokens; ``on_long`` says what happens to longer ones.
    """

    chat_template: str | None = None
    train_on: TrainOnWhat = TrainOnWhat.ALL_ASSISTANT_MESSAGES
    append_eos: bool | str = "auto"
    stop: str | Sequence[str] | None = None
    max_tokens: int = 1024
    on_long: OnLong = OnLong.ERROR

    def __post_init__(self) -> None:
        _check_counts(max_tokens=self.max_tokens)
        _set(self, train_on=_one_of(TrainOnWhat, self.train_on, "data.train_on"))
        _set(self, on_long=_one_of(OnLong, self.on_long, "data.on_long"))


@dataclass(frozen=True, kw_only=True)
class BatchSpec:
    """How examples become batches, and in which order.

    Args:
        packing: ``true`` puts several examples in a row of ``pack_tokens`` positions (default:
            ``max_tokens``; of pairs twice as many).
        batch_size: rows per micro-batch (default 8); a row is a pack, or one example without
            packing.
        tokens_per_batch: in place of ``batch_size``, positions per micro-batch: as many rows as
            fit.
        val_batch_size: rows per evaluation batch; None: as in training.
        epochs: passes over the rows; None repeats them until the trainer's ``max_steps``.
        seed: of the order of rows, and of which are set aside for evaluation.
        window_rows: rows within which packing and length grouping look for partners.
    """

    packing: bool = False
    pack_tokens: int | None = None
    batch_size: int | None = None
    tokens_per_batch: int | None = None
    val_batch_size: int | None = None
    epochs: int | None = 1
    shuffle: bool = True
    seed: int = 0
    window_rows: int = 1024

    def __post_init__(self) -> None:
        names = ("pack_tokens", "batch_size", "tokens_per_batch", "val_batch_size", "epochs")
        _check_counts(**{name: getattr(self, name) for name in (*names, "window_rows")})
        if self.pack_tokens and not self.packing:
            raise ConfigError(
                f"data.pack_tokens={self.pack_tokens} has no effect without data.packing=true"
            )
        if self.batch_size and self.tokens_per_batch:
            raise ConfigError(
                "data.batch_size and data.tokens_per_batch are both set; set one of them to null"
            )

    @property
    def rows_per_batch(self) -> int | None:
        """Rows of a micro-batch; None where its positions decide."""
        return self.batch_size or (None if self.tokens_per_batch else DEFAULT_BATCH_SIZE)


@dataclass(frozen=True, kw_only=True)
class ImageSpec:
    """Bounds on pixels, to which images are scaled at the same ratio; None: the processor's."""

    min_pixels: int | None = None
    max_pixels: int | None = None

    def __post_init__(self) -> None:
        _check_counts(min_pixels=self.min_pixels, max_pixels=self.max_pixels)


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """All four."""

    rows: RowSpec
    rendering: RenderingSpec = field(default_factory=RenderingSpec)
    batches: BatchSpec = field(default_factory=BatchSpec)
    images: ImageSpec = field(default_factory=ImageSpec)

    @classmethod
    def from_keywords(cls, keywords: Mapping[str, Any], **given: Any) -> DataSpec:
        """Sort flat ``keywords``, as the ``data`` group has them, into the specs that are not
        ``given``.

        Raises:
            ConfigError: settings cannot be used; all that are wrong by themselves are named.
            TypeError: no spec takes such a keyword, or the one that does is given.
        """
        left, problems = dict(keywords), []
        for name, kind in SPECS.items():
            if name in given:
                continue
            try:
                own = {key: left.pop(key) for key in field_names(kind) if key in left}
                given[name] = kind(**own)
            except ConfigError as error:
                problems.append(str(error))
        if left:
            raise TypeError(f"unexpected keyword arguments: {', '.join(sorted(left))}")
        if problems:
            raise ConfigError("\n".join(problems))
        made = cls(**given)
        made.check_sizes()
        return made

    def keywords(self) -> dict[str, Any]:
        """The flat keywords of all four, as they were given."""
        return {
            key: getattr(getattr(self, name), key)
            for name, kind in SPECS.items()
            for key in field_names(kind)
        }

    def row_tokens(self, *, are_pairs: bool = False) -> int | None:
        """Positions of a packed row, which holds both answers of a pair; None without packing."""
        if not self.batches.packing:
            return None
        return self.batches.pack_tokens or self.rendering.max_tokens * (2 if are_pairs else 1)

    def check_sizes(self) -> None:
        """Raise ConfigError where a row, or a batch, is smaller than an example may be."""
        batches, shortest = self.batches, self.row_tokens() or self.rendering.max_tokens
        if batches.packing and shortest < self.rendering.max_tokens:
            raise ConfigError(
                f"data.pack_tokens={batches.pack_tokens} is less than"
                f" data.max_tokens={self.rendering.max_tokens}"
            )
        if batches.tokens_per_batch and batches.tokens_per_batch < shortest:
            raise ConfigError(
                f"data.tokens_per_batch={batches.tokens_per_batch} is less than one row of"
                f" {shortest} tokens"
            )

    def check_pairs_fit(self) -> None:
        """Raise ConfigError where a pair may not fit into one packed row, or one batch."""
        both, batches = 2 * self.rendering.max_tokens, self.batches
        sizes = {"pack_tokens": self.row_tokens(are_pairs=True)}
        sizes["tokens_per_batch"] = batches.tokens_per_batch
        for name, size in sizes.items():
            if size and size < both:
                raise ConfigError(
                    f"data.{name}={size} is less than a pair of"
                    f" data.max_tokens={self.rendering.max_tokens} each"
                )


SPECS: dict[str, type[Any]] = {
    "rows": RowSpec,
    "rendering": RenderingSpec,
    "batches": BatchSpec,
    "images": ImageSpec,
}


def field_names(kind: type[Any]) -> list[str]:
    """The names of the fields of a spec."""
    return [one.name for one in dataclasses.fields(kind)]


def takes_fields(*kinds: type[Any]) -> Callable[[Function], Function]:
    """Give a function that ends with ``**keywords`` the signature that it has with the fields of
    ``kinds`` in their place: what reads signatures, the check of settings among them, sees them.
    """

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)
        own = [one for one in signature.parameters.values() if one.kind is not one.VAR_KEYWORD]
        hints: dict[str, Any] = {}
        for kind in kinds:
            hints |= (of_kind := get_type_hints(kind))
            own += [
                one.replace(annotation=of_kind[one.name])
                for one in inspect.signature(kind).parameters.values()
            ]
        decorated: Any = function
        decorated.__signature__ = signature.replace(parameters=own)
        decorated.__annotations__ = {**function.__annotations__, **hints}
        del decorated.__annotations__["keywords"]
        return function

    return decorate


def _check_counts(**counts: int | None) -> None:
    """Raise ConfigError for each of ``counts`` that is given and less than 1."""
    given = {name: count for name, count in counts.items() if count is not None}
    bad = [f"data.{name}={count}" for name, count in given.items() if count < 1]
    if bad:
        raise ConfigError(f"{', '.join(bad)}: must be at least 1")


def _one_of(enum: Any, value: str, key: str) -> Any:
    """The member of ``enum`` that ``value`` names. Raises ConfigError with all of them."""
    try:
        return enum(value)
    except ValueError:
        raise ConfigError(f"{key}={value} is unknown; choose one of {', '.join(enum)}") from None


def _set(spec: Any, **values: Any) -> None:
    for name, value in values.items():
        object.__setattr__(spec, name, value)  # frozen, but still being made
