"""The verbs over one or more bases: what clients in the process and the server both call. Every
verb returns a future.
"""

from __future__ import annotations

import contextlib
import itertools
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorakit.errors import CheckpointError, ConfigError
from lorakit.lora.spec import LoRASpec
from lorakit.loss.preference import CustomLoss
from lorakit.loss.vocabulary import VocabularyLoss
from lorakit.sampling.request import Request, SampledSequence, read_prompt
from lorakit.service.base import Base
from lorakit.service.checkpoints import LOCAL_OWNER, CheckpointRegistry, SaveOptions
from lorakit.service.database import Checkpoint, Database, TrainingRun, now
from lorakit.service.engine import Engine, Usage
from lorakit.service.executor import Executor, leave
from lorakit.service.forward import (
    custom_request,
    forward_request,
    run_in_two_passes,
    vocabulary_request,
)
from lorakit.service.model import Model, Weights
from lorakit.service.worker import Worker
from lorakit.strategy.world import current_world, raise_on_any_rank
from lorakit.training.precision import resolve_accelerator
from lorakit.types import AdamParams, Datum, ModelInput, SamplingParams
from lorakit.weights.trained_state import read_optimizer


@dataclass
class Service:
    """Bases by name, everything that is trained on them, and what was saved.

    Args:
        models: names that clients use -> folders or names of models; a name that is not here stands
            for itself, if ``any_model``.
        folder: of the database and the checkpoints.
        load: reads a base; its settings are bound to it.
        accelerator: what bases are read to.
        lora: settings of ``LoRASpec`` that clients cannot name: alpha, expert_layout.
    """

    folder: str | Path
    models: Mapping[str, str] = field(default_factory=dict)
    any_model: bool = True
    load: Callable[[str], Base] = Base.load
    accelerator: str = "auto"
    lora: Mapping[str, Any] = field(default_factory=dict)
    worker_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.executor = Executor(self._open_worker, device=resolve_accelerator(self.accelerator))
        if not self.executor.world.is_rank_zero:
            self.executor.follow()
            leave()
        self.database = Database(self.folder)
        self.checkpoints = CheckpointRegistry(self.database)
        self.trained: dict[str, Model] = {}
        self._engines: dict[str, Engine] = {}
        self._numbers = itertools.count()
        self._lock = threading.RLock()

    def engine(self, base_model: str) -> Engine:
        """Return the engine of a base, which is read at its first use. Raises ConfigError."""
        path = self.models.get(base_model)
        if path is None:
            if not self.any_model:
                raise ConfigError(
                    f"base_model {base_model!r} is not served; there are:"
                    f" {', '.join(self.models) or 'none'}"
                )
            path = base_model
        with self._lock:
            if path not in self._engines:
                self._engines[path] = Engine(self.executor, path)
            return self._engines[path]

    def _open_worker(self, path: str) -> Worker:
        return raise_on_any_rank(
            lambda: Worker(self.load(path), current_world(), **self.worker_options)
        )

    def problems(self) -> list[str]:
        """Why engines have ended by themselves."""
        return [
            f"{path}: {engine.problem}"
            for path, engine in list(self._engines.items())
            if engine.problem
        ]

    def close_engines(self) -> None:
        """End the engines; what waits gets an error."""
        self.charge_all()
        for engine in self._engines.values():
            engine.close()
        self.executor.end()

    def close(self) -> None:
        """End the engines, and the database."""
        self.close_engines()
        self.database.close()

    # ---- models

    def create_model(
        self,
        model_id: str,
        base_model: str,
        *,
        rank: int = 32,
        seed: int | None = None,
        train_attn: bool = True,
        train_mlp: bool = True,
        train_unembed: bool = True,
        owner: str = LOCAL_OWNER,
        user_metadata: Mapping[str, str] | None = None,
    ) -> Future[Any]:
        """Make a new adapter on ``base_model``; the future gives its Model."""
        if not (train_attn or train_mlp or train_unembed):
            raise ConfigError(
                "nothing would be trained; switch on train_attn, train_mlp or train_unembed"
            )
        spec = LoRASpec(
            **{**self.lora, "rank": rank},
            attention=train_attn,
            mlp="auto" if train_mlp else False,
            experts="auto" if train_mlp else False,
            unembedding=train_unembed,
        )
        asked = {
            "rank": rank,
            "train_attn": train_attn,
            "train_mlp": train_mlp,
            "train_unembed": train_unembed,
        }
        seed = secrets.randbits(31) if seed is None else seed
        engine = self.engine(base_model)

        model = Model(model_id, owner, base_model, engine, asked)
        return self._add_model(
            model, lambda: engine.do("make", model_id, spec, seed), user_metadata
        )

    def create_model_from(
        self,
        model_id: str,
        path: str,
        *,
        base_model: str | None = None,
        with_optimizer: bool = False,
        owner: str = LOCAL_OWNER,
        user_metadata: Mapping[str, str] | None = None,
    ) -> Future[Any]:
        """Make an adapter that starts from a checkpoint (``tinker://…``), or from a folder of
        any PEFT adapter.
        """
        base_model = base_model or self.checkpoints.base_of(path, owner)
        engine = self.engine(base_model)
        with self.checkpoints.opened(path, owner) as state:
            asked = state.facts.get("lora") or {"rank": int(state.adapter.config.get("r", 0))}
        model = Model(model_id, owner, base_model, engine, asked)

        def make() -> None:
            with self.checkpoints.opened(path, owner) as state:
                layout, vector = engine.base.read_adapter(state.adapter)
                optimizer_state = read_optimizer(state, layout) if with_optimizer else None
            engine.do("make", model_id, layout.spec, vector)
            engine.do(
                "load", model_id, vector, optimizer_state, int(state.facts.get("num_steps", 0))
            )

        return self._add_model(model, make, user_metadata)

    def _add_model(
        self, model: Model, make: Callable[[], None], user_metadata: Mapping[str, str] | None
    ) -> Future[Any]:
        def run() -> Model:
            make()
            time = now()
            self.database.add_run(
                TrainingRun(
                    id=model.id,
                    session_id=model.id.partition(":")[0],
                    owner=model.owner,
                    base_model=model.base_model,
                    lora=model.lora,
                    user_metadata=dict(user_metadata or {}),
                    created=time,
                    last_request=time,
                )
            )
            return model

        self.trained[model.id] = model
        return model.engine.submit(model.id, "create_model", run)

    def drop_model(self, model_id: str) -> None:
        """Free an adapter and its optimiser, after what it was asked before."""
        if (model := self.trained.pop(model_id, None)) is not None:

            def free() -> None:
                model.engine.do("free", model_id)
                self._charge(model)
                model.engine.usage.pop(model_id, None)

            model.engine.submit(model_id, "free", free)

    def usage(self, model: Model) -> Usage:
        """What a model has cost so far."""
        return model.engine.usage[model.id]

    def charge_all(self) -> None:
        """Write down what every model that was asked something since the last time has cost."""
        for model in list(self.trained.values()):
            self._charge(model)

    def _charge(self, model: Model) -> None:
        usage = self.usage(model)
        if usage.calls == usage.calls_charged:
            return
        with contextlib.suppress(Exception):  # what it cost is not worth an error
            calls = usage.calls
            self.database.charge(model.id, tokens=usage.tokens, seconds=usage.seconds)
            usage.calls_charged = calls

    # ---- the verbs

    def forward_backward(
        self,
        model: Model,
        data: Sequence[Datum],
        loss_fn: str,
        loss_fn_config: Mapping[str, Any] | None = None,
        *,
        needs_gradient: bool = True,
    ) -> Future[Any]:
        """Add the gradient of ``loss_fn``, a sum over tokens, to what has accumulated; without
        ``needs_gradient`` only compute it.
        """
        return model.engine.submit_request(
            model.id,
            "forward_backward" if needs_gradient else "forward",
            lambda: forward_request(model, data, loss_fn, loss_fn_config, needs_gradient),
        )

    def forward_backward_custom(
        self, model: Model, data: Sequence[Datum], loss: CustomLoss
    ) -> Future[Any]:
        """The same for the caller's own function of all Datums' log-probabilities.

        What fits one pass goes through the base once; else log-probabilities come first, then the
        gradient with respect to them.
        """
        name, engine = "forward_backward_custom", model.engine
        is_large = len(data) * max(map(len, data), default=0) > engine.worker.runner.max_tokens
        if is_large or self.executor.size > 1:  # a function stays in its process
            return engine.submit(model.id, name, lambda: run_in_two_passes(model, data, loss))
        return engine.submit_request(model.id, name, lambda: custom_request(model, data, loss))

    def forward_backward_vocabulary(
        self, model: Model, data: Sequence[Datum], function: VocabularyLoss
    ) -> Future[Any]:
        """The same for a function of whole distributions, which is given them in chunks. Raises
        ConfigError on several processes.
        """
        if self.executor.size > 1:
            raise ConfigError("a loss of the vocabulary runs in one process")
        return model.engine.submit_request(
            model.id,
            "forward_backward_custom",
            lambda: vocabulary_request(model, data, function),
        )

    def optim_step(self, model: Model, params: AdamParams) -> Future[Any]:
        """Make one step of AdamW with the accumulated gradient; the future gives its figures."""
        return model.engine.submit(
            model.id, "optim_step", lambda: model.engine.do("step", model.id, params)
        )

    def save(self, model: Model, wanted: SaveOptions) -> Future[Any]:
        """Save adapter and, as ``weights``, optimiser; the future gives the Checkpoint."""

        def run() -> Checkpoint:
            training_state = model.made()
            facts = {
                "base_model": model.base_model,
                "lora": model.lora,
                "num_steps": training_state.num_steps,
                "run": model.id,
            }
            has_optimizer = wanted.kind == "weights"
            vector, optimizer = (
                model.engine.do("state", model.id)
                if has_optimizer
                else (training_state.vector, None)
            )
            checkpoint = self.checkpoints.save(
                model.id, wanted, training_state.layout, vector, optimizer, facts
            )
            self._charge(model)
            return checkpoint

        return model.engine.submit(model.id, f"save {wanted.kind}", run)

    def load_state(self, model: Model, path: str, *, with_optimizer: bool) -> Future[Any]:
        """Let a model continue from a checkpoint of the same shape."""

        def run() -> str:
            training_state = model.made()
            with self.checkpoints.opened(path, model.owner) as state:
                layout, vector = model.engine.base.read_adapter(state.adapter)
                optimizer = read_optimizer(state, training_state.layout) if with_optimizer else None
            if (
                layout.file_tensors(vector).keys()
                != training_state.layout.file_tensors(training_state.vector).keys()
            ):
                raise CheckpointError(f"{path} has other matrices than {model.id}")
            if layout.spec.scale != training_state.layout.spec.scale:
                scales = f"{layout.spec.scale:g}, {model.id} {training_state.layout.spec.scale:g}"
                raise CheckpointError(
                    f"{path} has the scale {scales}: alpha or rank differ; make a client from the"
                    " state instead"
                )
            vector = training_state.layout.from_file_tensors(
                layout.file_tensors(vector), source=path
            )
            model.engine.do(
                "load", model.id, vector, optimizer, int(state.facts.get("num_steps", 0))
            )
            return path

        return model.engine.submit(model.id, "load_state", run)

    def snapshot(self, model: Model) -> Future[Any]:
        """The future gives the Weights of a model as they are when its turn comes."""

        def run() -> Weights:
            snapshot_id = f"snapshot {next(self._numbers)}"
            model.engine.do("snapshot", model.id, snapshot_id)
            return Weights(model.base_model, model.engine, snapshot_id)

        return model.engine.submit(model.id, "snapshot", run)

    # ---- sampling

    def weights(
        self, *, base_model: str | None = None, path: str | None = None, owner: str = LOCAL_OWNER
    ) -> Future[Any]:
        """The future gives the Weights of a base, or of a checkpoint (``tinker://…`` or a folder
        of any PEFT adapter).
        """
        if path is None:
            if base_model is None:
                raise ConfigError("name a base_model or a model_path to sample from")
            done: Future[Any] = Future()
            done.set_result(Weights(base_model, self.engine(base_model)))
            return done
        base_model = base_model or self.checkpoints.base_of(path, owner)
        engine = self.engine(base_model)

        def read() -> Weights:
            with self.checkpoints.opened(path, owner) as state:
                layout, vector = engine.base.read_adapter(state.adapter)
            snapshot_id = f"snapshot {next(self._numbers)}"
            engine.do("put_snapshot", snapshot_id, layout.spec, vector)
            return Weights(base_model, engine, snapshot_id)

        return engine.submit(f"read {path}", "read_adapter", read)

    def sample(
        self,
        weights: Weights,
        prompt: ModelInput,
        params: SamplingParams,
        num_samples: int = 1,
        *,
        each: Callable[[SampledSequence], None] | None = None,
        **asked: Any,
    ) -> Future[Any]:
        """The future gives a SampleResponse; until then it keeps the weights.

        Args:
            each: is called with every token, in the engine's thread.
            asked: further fields of ``sampling/request.py:Request``.
        """

        def make() -> Request:
            tokens, shown = read_prompt(prompt, weights.engine.base.images)
            return Request(tokens, params, num_samples, shown=shown, **asked)

        future = weights.engine.sample(weights.snapshot_id, make, each)
        held = [weights]  # by the callback, so that its snapshot stays until the answer
        future.add_done_callback(lambda done: held.clear())
        return future

    def describe_models(self) -> list[dict[str, Any]]:
        """The models that were named, and the longest row that each takes."""
        found = []
        for name, path in self.models.items():
            engine = self._engines.get(path)
            limit = engine.base.max_tokens if engine else None
            is_sampled = engine is None or engine.base.sampling_problem is None
            found.append(
                {
                    "model_name": name,
                    "max_context_length": limit,
                    "trainable": True,
                    "sampleable": is_sampled,
                }
            )
        return found
