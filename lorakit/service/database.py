"""What the service remembers, as tables of a database."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, sessionmaker

from lorakit.errors import CheckpointError

Found = TypeVar("Found", bound="_Table")


class _Table(DeclarativeBase):
    type_annotation_map: ClassVar[dict[Any, Any]] = {dict[str, Any]: sa.JSON}


class TrainingRun(_Table):
    """One adapter that was trained: ``session:train:number``."""

    __tablename__ = "runs"
    id: Mapped[str] = mapped_column(primary_key=True)
    session_id: Mapped[str] = mapped_column(index=True)
    owner: Mapped[str] = mapped_column(index=True)
    base_model: Mapped[str]
    lora: Mapped[dict[str, Any]]  # rank and what is trained, as the client asked
    user_metadata: Mapped[dict[str, Any]]
    created: Mapped[datetime.datetime]
    last_request: Mapped[datetime.datetime]
    tokens: Mapped[int] = mapped_column(default=0)
    seconds: Mapped[float] = mapped_column(default=0.0)


class Checkpoint(_Table):
    """One saved state of a run."""

    __tablename__ = "checkpoints"
    run_id: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    created: Mapped[datetime.datetime]
    size_bytes: Mapped[int]
    expires: Mapped[datetime.datetime | None]
    user_metadata: Mapped[dict[str, Any]]

    @property
    def path(self) -> str:
        """``tinker://run/kind/name``."""
        return f"tinker://{self.run_id}/{self.kind}/{self.name}"


class ApiKey(_Table):
    """A user of the server. The key itself is nowhere."""

    __tablename__ = "keys"
    user: Mapped[str] = mapped_column(primary_key=True)
    digest: Mapped[str]  # SHA-256, in hexadecimal
    created: Mapped[datetime.datetime]


class ClientSession(_Table):
    """What a program of the SDK opened."""

    __tablename__ = "sessions"
    id: Mapped[str] = mapped_column(primary_key=True)
    owner: Mapped[str] = mapped_column(index=True)
    created: Mapped[datetime.datetime]
    ended: Mapped[datetime.datetime | None]
    display_name: Mapped[str | None]
    user_metadata: Mapped[dict[str, Any]]


class SamplerRow(_Table):
    """What a client samples from: a base, or a checkpoint. Of a snapshot, in memory only, the
    path is ``EPHEMERAL``.
    """

    __tablename__ = "samplers"
    id: Mapped[str] = mapped_column(primary_key=True)
    session_id: Mapped[str] = mapped_column(index=True)
    owner: Mapped[str]
    base_model: Mapped[str]
    model_path: Mapped[str | None]


class Result(_Table):
    """What a request came to."""

    __tablename__ = "answers"
    request_id: Mapped[str] = mapped_column(primary_key=True)
    owner: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[str]  # json, or the message that the payload is
    payload: Mapped[bytes]
    finished: Mapped[datetime.datetime] = mapped_column(index=True)


_RESULT = sa.select(Result.kind, Result.payload).where(
    Result.request_id == sa.bindparam("id"), Result.owner == sa.bindparam("owner")
)
_NEW_RESULT = sa.insert(Result).prefix_with("OR REPLACE")


class Database:
    """The database in ``folder``."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._engine = sa.create_engine(f"sqlite:///{(self.folder / 'lorakit.db').absolute()}")
        sa.event.listen(self._engine, "connect", _set_pragmas)
        _Table.metadata.create_all(self._engine)
        # a transaction: committed where the block ends well
        self.session = sessionmaker(self._engine, expire_on_commit=False).begin

    def close(self) -> None:
        self._engine.dispose()

    # ---- runs

    def add_run(self, run: TrainingRun) -> None:
        with self.session() as session:
            session.add(run)

    def run(self, run_id: str, owner: str) -> TrainingRun:
        """Return a run of ``owner``. Raises CheckpointError where there is none of that name."""
        with self.session() as session:
            run = session.get(TrainingRun, run_id)
        if run is None or run.owner != owner:
            raise CheckpointError(f"there is no run {run_id}")
        return run

    def runs(self, owner: str, *, limit: int, offset: int = 0) -> tuple[list[TrainingRun], int]:
        """Return the runs of ``owner``, last first, and how many there are."""
        with self.session() as session:
            own = sa.select(TrainingRun).where(TrainingRun.owner == owner)
            total = session.scalar(sa.select(sa.func.count()).select_from(own.subquery())) or 0
            wanted = own.order_by(TrainingRun.last_request.desc())
            return list(session.scalars(wanted.limit(limit).offset(offset))), total

    def charge(self, run_id: str, *, tokens: int, seconds: float) -> None:
        """Set what a run has cost so far."""
        with self.session() as session:
            spent = {"tokens": tokens, "seconds": seconds, "last_request": now()}
            session.execute(sa.update(TrainingRun).where(TrainingRun.id == run_id).values(spent))

    # ---- what the server keeps

    def add(self, *rows: Any) -> None:
        """Write rows, or new values of those that are there."""
        with self.session() as session:
            for row in rows:
                session.merge(row)

    def get(self, table: type[Found], key: str) -> Found | None:
        """Return the row of ``table`` with this primary key, or None."""
        with self.session() as session:
            return session.get(table, key)

    def select(self, table: type[Found], **equal: Any) -> list[Found]:
        """Return the rows of ``table`` whose columns are ``equal``."""
        with self.session() as session:
            return list(session.scalars(sa.select(table).filter_by(**equal)))

    def result(self, request_id: str, owner: str) -> Any:
        """Return kind and payload of a finished request of ``owner``, or None. Asked for each
        request: a plain row, no object.
        """
        with self._engine.connect() as connection:
            return connection.execute(_RESULT, {"id": request_id, "owner": owner}).first()

    def add_results(self, rows: list[dict[str, Any]]) -> None:
        """Write finished requests, each the values of a Result, all or none."""
        if rows:
            with self._engine.begin() as connection:
                connection.execute(_NEW_RESULT, rows)

    def drop_results_before(self, time: datetime.datetime) -> None:
        """Forget results that were finished before ``time``."""
        with self.session() as session:
            session.execute(sa.delete(Result).where(Result.finished < time))


def now() -> datetime.datetime:
    """The time, in UTC."""
    return datetime.datetime.now(datetime.UTC)


def _set_pragmas(connection: Any, record: Any) -> None:
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "busy_timeout=10000"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()
