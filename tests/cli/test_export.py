"""`lorakit export`: three formats, what each would drop, the card, and an upload to a hub over
HTTP.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import peft
import preloaded
import pytest
import torch
import yaml
from hub_stand_in import Hub, Writes
from program import REPOSITORY, start
from safetensors.torch import load_file, save_file
from small import SMALL
from transformers import AutoModelForCausalLM

from lorakit.model.load import BUNDLED, load_model

Call = Callable[..., tuple[int, str, str]]
PROBE = torch.tensor([list(range(3, 40))])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of the bundled mixture of experts: one whose adapter vLLM can have, and one on
    the unembedding and a router too.
    """
    folder = tmp_path_factory.mktemp("exported")
    for name, settings in (
        ("it", ()),
        ("wide", ("lora.unembedding=true", "lora.targets=[q_proj,lm_head,*mlp.gate]")),
    ):
        chosen = settings if name == "it" else settings[1:]
        program = [
            "-m",
            "lorakit",
            "train",
            *SMALL,
            "trainer.max_steps=3",
            "checkpoint.every_steps=1",
            f"run={name}",
            "seed=3",
            *chosen,
        ]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
        done = preloaded.run(program, cwd=folder, env=environment)
        assert done.returncode == 0, done.stderr
    return folder / "runs"


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(PROBE).logits


def test_each_format_is_checked_and_means_the_same(
    runs: Path, lorakit: Call, tmp_path: Path
) -> None:
    said = {}
    for form in ("peft", "vllm", "merged"):
        more = ("dtype=float32",) if form == "merged" else ()
        code, said[form], err = lorakit(
            "export", "it", "--runs", str(runs), f"format={form}", f"out={tmp_path / form}", *more
        )
        assert code == 0, err
    found = {
        form: logits(peft.PeftModel.from_pretrained(load_model("tiny"), tmp_path / form))
        for form in ("peft", "vllm")
    }
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    base = logits(load_model("tiny"))
    largest, change = merged.abs().max(), (merged - base).abs().max()
    assert (found["peft"] - found["vllm"]).abs().max() < 1e-4 * largest  # plain PEFT reads both
    # adapters are rounded to bf16, this merge is not
    assert (found["peft"] - merged).abs().max() < 0.1 * change
    assert "logits of plain PEFT with it differ by" in said["peft"]
    # of 4 layers: 4 of attention, 3 of each of 12 experts
    assert "names and shapes of 160 matrices" in said["vllm"]
    card = (tmp_path / "merged/README.md").read_text()
    assert (
        json.loads((runs / "it/run.json").read_text())["data_fingerprint"] in card
        and "The merged weights of" in card
    )
    assert (
        "base_model_relation: finetune" in card
        and "rank: 4" in card
        and "3 optimiser steps" in card
    )
    assert "vLLM itself does not run here" in said["vllm"] and "--max-lora-rank 8 " in said["vllm"]
    assert "read again" in said["merged"]
    assert (
        json.loads((tmp_path / "merged/merge_report.json").read_text())["reloaded_difference"]
        < 1e-4 * largest
    )


def test_vllms_layout_has_a_pair_for_each_matrix_of_each_expert(
    runs: Path, lorakit: Call, tmp_path: Path
) -> None:
    code, _, err = lorakit(
        "export", "it", "--runs", str(runs), "--format", "vllm", "--out", str(tmp_path / "it")
    )
    assert code == 0, err
    shapes = {
        name: tuple(t.shape)
        for name, t in load_file(tmp_path / "it/adapter_model.safetensors").items()
    }
    names = {"q_proj", "k_proj", "v_proj", "o_proj"}
    expected = {f"self_attn.{name}" for name in names}
    expected |= {
        f"mlp.experts.{e}.{name}"
        for e in range(12)
        for name in ("gate_proj", "up_proj", "down_proj")
    }
    layer = {name.split(".lora_")[0] for name in shapes if ".layers.2." in name}
    assert {name.removeprefix("base_model.model.model.layers.2.") for name in layer} == expected
    begin = "base_model.model.model.layers.2.mlp.experts.11"
    assert shapes[f"{begin}.up_proj.lora_A.weight"] == (4, 128) and shapes[
        f"{begin}.up_proj.lora_B.weight"
    ] == (96, 4)
    assert shapes[f"{begin}.down_proj.lora_A.weight"] == (4, 96) and shapes[
        f"{begin}.down_proj.lora_B.weight"
    ] == (128, 4)
    config = json.loads((tmp_path / "it/adapter_config.json").read_text())
    assert (
        set(config["target_modules"]) == names | {"gate_proj", "up_proj", "down_proj"}
        and not config["target_parameters"]
    )


def test_dora_is_exported_for_peft_and_refused_for_vllm(workplace: Path, lorakit: Call) -> None:
    code, _, err = lorakit(
        "train", *SMALL, "trainer.max_steps=2", "run=dora", "lora.dora=true", "lora.experts=false"
    )
    assert code == 0, err
    code, out, err = lorakit("export", "dora", "format=peft")
    assert code == 0 and "logits of plain PEFT with it differ by" in out, err
    code, _, err = lorakit("export", "dora", "format=vllm")
    assert code == 2 and "DoRA, which vLLM does not compute" in err


def test_a_checkpoints_card_has_its_own_figures(runs: Path, lorakit: Call, tmp_path: Path) -> None:
    code, _, err = lorakit(
        "export",
        "it",
        "--runs",
        str(runs),
        "--checkpoint",
        "2",
        f"out={tmp_path / 'two'}",
        "format=vllm",
    )
    assert code == 0, err
    records = [json.loads(line) for line in (runs / "it/history.jsonl").read_text().splitlines()]
    (loss,) = (
        record["train/loss"]
        for record in records
        if record.get("step") == 2 and "train/loss" in record
    )
    card = (tmp_path / "two/README.md").read_text()
    assert (
        "\n2 optimiser steps." in card
        and f"| {loss:.4f} |" in card
        and "--max-lora-rank 8 " in card
    )


def test_what_vllm_would_drop_is_an_error(runs: Path, lorakit: Call) -> None:
    code, _, err = lorakit("export", "wide", "--runs", str(runs), "format=vllm")
    assert (
        code == 2
        and "unembedding, which vLLM does not apply" in err
        and "router, which vLLM" in err
    )
    assert "format=merged leaves nothing out" in err and not (runs / "wide/vllm").exists()


def test_an_adapter_that_is_not_its_models_is_found(runs: Path, tmp_path: Path) -> None:
    from lorakit.errors import AdapterError
    from lorakit.weights.reload import check_layout, reload_in_peft

    folder = tmp_path / "adapter"
    folder.mkdir()
    tensors = load_file(runs / "it/adapter/adapter_model.safetensors")
    (folder / "adapter_config.json").write_bytes(
        (runs / "it/adapter/adapter_config.json").read_bytes()
    )
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    turned = {
        **tensors,
        name: tensors[name].T.contiguous(),
        "base_model.model.x.lora_A.weight": tensors[name],
    }
    turned.pop("base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight")
    save_file(turned, folder / "adapter_model.safetensors")
    with pytest.raises(AdapterError) as found:
        check_layout(folder, load_model("tiny"))
    said = str(found.value)
    assert (
        "layers.0.self_attn.q_proj: A is" in said
        and "x is no matrix" in said
        and "q_proj has lora_B alone" in said
    )
    save_file({**tensors, name: tensors[name] + 0.1}, folder / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="differs by"):
        reload_in_peft(load_model("tiny"), runs / "it/adapter", folder, dtype=torch.bfloat16)


def test_nothing_is_left_where_the_layout_is_not_as_it_should_be(
    runs: Path, lorakit: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorakit.weights import export as layouts

    write = layouts.to_each_expert
    monkeypatch.setattr(
        layouts,
        "to_each_expert",
        lambda *given, **options: {
            key: tensor.T for key, tensor in write(*given, **options).items()
        },
    )
    code, _, err = lorakit(
        "export", "it", "--runs", str(runs), "format=vllm", f"out={tmp_path / 'turned'}"
    )
    assert code == 2 and "is not as its readers expect it" in err and [*tmp_path.iterdir()] == [], (
        err
    )


def test_the_card_says_base_data_settings_and_figures(
    runs: Path, lorakit: Call, tmp_path: Path
) -> None:
    code, _, err = lorakit(
        "export", "it", "--runs", str(runs), f"out={tmp_path / 'it'}", "base-name=you/base"
    )
    assert code == 0, err
    _, head, body = (tmp_path / "it/README.md").read_text().split("---\n", 2)
    facts = yaml.safe_load(head)
    assert (
        facts["base_model"] == "you/base"
        and facts["library_name"] == "peft"
        and facts["base_model_relation"] == "adapter"
    )
    info = json.loads((runs / "it/run.json").read_text())
    assert (
        info["data_fingerprint"] in body and "`pig_latin/train`" in body and "datasets" not in facts
    )
    assert (
        f"| {info['val_loss']:.4f} |" in body and "rank: 4" in body and "3 optimiser steps" in body
    )
    assert str(runs.parent) not in head + body  # nobody's folders
    assert (
        json.loads((tmp_path / "it/adapter_config.json").read_text())["base_model_name_or_path"]
        == "you/base"
    )


def export(
    folder: Path, runs: Path, *arguments: str, hub: Hub, token: str | None = Writes.TOKEN
) -> tuple[int, str, str]:
    environment = {
        **os.environ,
        "HF_HOME": str(folder / "cache"),
        "PYTHONPATH": str(REPOSITORY),
        "HF_HUB_DISABLE_XET": "1",
    }
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN"):
        environment.pop(name, None)
    environment |= {"HF_ENDPOINT": hub.address, **({"HF_TOKEN": token} if token else {})}
    program = ["-m", "lorakit", "export", "it", "--runs", str(runs), *arguments]
    done = preloaded.run(program, cwd=folder, env=environment, timeout=240)
    return done.returncode, done.stdout, done.stderr


def test_an_export_is_pushed_and_can_be_had_from_the_hub(runs: Path, tmp_path: Path) -> None:
    with Hub(tmp_path / "hub").serving() as hub:
        (hub.root / "models").mkdir(parents=True)
        code, out, err = export(tmp_path, runs, "push=me/pig", f"out={tmp_path / 'out'}", hub=hub)
        assert code == 0, err
        assert f"uploaded: {hub.address}/me/pig" in out
        there, here = hub.root / "models/me/pig", tmp_path / "out"
        assert (
            {f.name for f in there.iterdir()}
            == {f.name for f in here.iterdir()}
            >= {"README.md", "adapter_config.json"}
        )
        assert all((there / f.name).read_bytes() == f.read_bytes() for f in here.iterdir())
        assert hub.writes.private == {"me/pig": True} and hub.writes.messages == ["it, as peft"]
        code, _, err = export(
            tmp_path, runs, "push=me/pig", "--public", f"out={tmp_path / 'again'}", hub=hub
        )
        assert code == 2 and "is there and private" in err
        code, _, err = export(
            tmp_path, runs, "push=me/open", "--public", f"out={tmp_path / 'open'}", hub=hub
        )
        assert code == 0 and hub.writes.private["me/open"] is False, err
        code, _, err = export(tmp_path, runs, "push=me/open", f"out={tmp_path / 'no'}", hub=hub)
        assert code == 2 and "is there and public: --public says" in err


def test_no_path_of_this_machine_is_pushed(tmp_path: Path) -> None:
    """The base is a folder: merged weights go without its path, an adapter only with a name for
    it.
    """
    shutil.copytree(BUNDLED["tiny"], tmp_path / "secret/base")
    process = start(
        "train",
        *SMALL,
        "trainer.max_steps=1",
        "run=it",
        f"model.path={tmp_path / 'secret/base'}",
        "data.path=pig_latin/heldout",
        "optim.lr=1e-3",
        cwd=tmp_path,
    )
    assert process.wait() == 0, process.stderr.read()
    with Hub(tmp_path / "hub").serving() as hub:
        (hub.root / "models").mkdir(parents=True)
        code, _, err = export(tmp_path, tmp_path / "runs", "push=me/a", hub=hub)
        assert code == 2 and "--base-name says what they call it" in err
        for form in ("merged", "peft"):
            name = ("base-name=you/base",) if form == "peft" else ()
            code, _, err = export(
                tmp_path, tmp_path / "runs", f"push=me/{form}", f"format={form}", *name, hub=hub
            )
            assert code == 0, err
            for file in (hub.root / "models/me" / form).iterdir():
                assert str(tmp_path).encode() not in file.read_bytes(), file


def test_what_the_hub_refuses_is_one_message_before_any_work(runs: Path, tmp_path: Path) -> None:
    refusals = {
        ("push=you/pig", Writes.TOKEN): "may not write there",
        ("push=me/pig", "hf_bad"): "does not know this token",
        ("push=me/pig", None): "nobody is logged in",
        ("push=pig", Writes.TOKEN): "write USER/NAME",
        ("push=me/a b", Writes.TOKEN): "push=me/a b: ",
    }
    with Hub(tmp_path / "hub").serving() as hub:
        for (push, token), expected in refusals.items():
            code, _, err = export(
                tmp_path, runs, push, f"out={tmp_path / 'no'}", hub=hub, token=token
            )
            assert code == 2 and expected in err and "Traceback" not in err, (push, err)
    assert not (tmp_path / "no").exists()
