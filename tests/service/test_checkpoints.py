"""Checkpoints while others read, write over and delete them."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from tiny_models import make_model

from lorakit.errors import CheckpointError
from lorakit.lora.flat_parameters import FlatParameters, plan_layout
from lorakit.lora.spec import LoRASpec
from lorakit.service.checkpoints import LOCAL_OWNER, CheckpointRegistry, SaveOptions
from lorakit.service.database import Database, TrainingRun, now

RUN, PATH = "run:train:0", "tinker://run:train:0/weights/a"


@pytest.fixture(scope="module")
def layout() -> FlatParameters:
    return plan_layout(make_model("llama"), LoRASpec(rank=2))


@pytest.fixture
def saved(tmp_path: Path) -> CheckpointRegistry:
    database, time = Database(tmp_path), now()
    database.add_run(
        TrainingRun(
            id=RUN,
            session_id="run",
            owner=LOCAL_OWNER,
            base_model="tiny",
            lora={},
            user_metadata={},
            created=time,
            last_request=time,
        )
    )
    return CheckpointRegistry(database)


def save(
    saved: CheckpointRegistry, layout: FlatParameters, value: float, ttl_seconds: int | None = None
) -> None:
    vector = torch.full((layout.num_params,), value)
    wanted = SaveOptions("weights", "a", overwrite=True, ttl_seconds=ttl_seconds)
    saved.save(RUN, wanted, layout, vector, {"exp_avg": vector}, {"value": value})


def test_what_is_read_is_not_written_over_meanwhile(
    saved: CheckpointRegistry, layout: FlatParameters
) -> None:
    save(saved, layout, 1.0)
    writer = threading.Thread(target=save, args=(saved, layout, 2.0))
    with saved.opened(PATH, LOCAL_OWNER) as state:
        writer.start()
        writer.join(0.3)
        assert writer.is_alive() and state.facts == {"value": 1.0}
        assert all((tensor == 1.0).all() for tensor in state.adapter.tensors().values())
    writer.join(10)
    with saved.opened(PATH, LOCAL_OWNER) as state:
        assert state.facts == {"value": 2.0}


def test_one_that_was_written_over_does_not_expire_as_the_one_before(
    saved: CheckpointRegistry, layout: FlatParameters
) -> None:
    save(saved, layout, 1.0, ttl_seconds=0)
    save(saved, layout, 2.0)
    saved.delete_expired()
    assert saved.find(PATH, LOCAL_OWNER).expires is None
    saved.set_ttl(PATH, LOCAL_OWNER, 0)
    saved.delete_expired()
    with (
        pytest.raises(CheckpointError, match="there is no checkpoint"),
        saved.opened(PATH, LOCAL_OWNER),
    ):
        pass


def test_another_users_checkpoint_is_none(
    saved: CheckpointRegistry, layout: FlatParameters, tmp_path: Path
) -> None:
    save(saved, layout, 1.0)
    with pytest.raises(CheckpointError, match="no run"):
        saved.base_of(PATH, "another")
    with pytest.raises(CheckpointError, match="no path of a checkpoint"):
        saved.base_of(str(tmp_path), "another")
