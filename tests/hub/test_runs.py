"""Which folders are runs, and which SAEs are in them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bigsae.config import TrainConfig, UserError
from bigsae.configfile import to_dict
from bigsae.hub.runs import find_saes, read_rows, run_config

CONFIG = TrainConfig(model="m", dataset="d", hookpoints=("model.layers.1",), output_dir="out", tokens=640)


def write(path: Path, values: object = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({} if values is None else values))


def test_saes_in_the_order_of_their_layers(tmp_path):
    for name in ("layers.10/k_4", "layers.2/k_16", "layers.2/k_4"):
        write(tmp_path / name / "cfg.json")
    write(tmp_path / "layers.3" / "ae.pt")  # dictionary_learning's
    for name in (".pushed/layers.2", "checkpoints/step_3", "wandb/files", "tensorboard/x", "elsewhere"):
        write(tmp_path / name / ("cfg.json" if name != "elsewhere" else "config.json"))
    expected = ["layers.2/k_4", "layers.2/k_16", "layers.3", "layers.10/k_4"]
    assert find_saes(tmp_path) == expected
    assert find_saes(tmp_path / "layers.3") == ["."]
    assert find_saes(tmp_path / "elsewhere") == []


@pytest.mark.parametrize(
    "foreign",
    [
        {"sae": {"k": 32}, "batch_size": 8, "model": "m", "dataset": "d", "run_name": None},  # sparsify
        {"trainer": {"dict_class": "AutoEncoderTopK"}, "buffer": {"ctx_len": 128}},  # dictionary_learning
        {"model_type": "llama"},
        [],
    ],
)
def test_another_tools_config_is_no_run(tmp_path, foreign):
    assert run_config(tmp_path) is None
    write(tmp_path / "config.json", foreign)
    assert run_config(tmp_path) is None
    write(tmp_path / "config.json", to_dict(CONFIG))
    assert run_config(tmp_path) == CONFIG


def test_a_run_of_another_version_or_torn_is_named(tmp_path):
    write(tmp_path / "config.json", to_dict(CONFIG) | {"of_tomorrow": 1})
    with pytest.raises(UserError, match=r"config\.json: unknown option 'of_tomorrow'") as error:
        run_config(tmp_path)
    assert "--config" not in str(error.value)
    (tmp_path / "config.json").write_text('{"model": "m"')
    with pytest.raises(UserError, match=r"config\.json is not JSON"):
        run_config(tmp_path)


def row(number: int, **more: object) -> dict[str, object]:
    return {"step": number, "tokens": 64 * number, "hookpoint": "model.layers.1", "loss": 0.5} | more


def test_the_last_row_may_be_torn(tmp_path):
    assert read_rows(tmp_path) == []
    first, second = json.dumps(row(1)), json.dumps(row(2))
    (tmp_path / "metrics.jsonl").write_text(f'{first}\n{second}\n{{"st')
    assert read_rows(tmp_path) == [row(1), row(2)]
    (tmp_path / "metrics.jsonl").write_text(f'{first}\n{{"st\n{second}\n')
    with pytest.raises(UserError, match="line 2 is not JSON"):
        read_rows(tmp_path)


@pytest.mark.parametrize(
    "line",
    ["[]", "3", "null", "{}", json.dumps(row(-1)), json.dumps(row(2, hookpoint=["x"])), json.dumps(row(2, variant=3)),
     json.dumps(row(2, loss="low")), json.dumps(row(2, loss=None)), json.dumps(row(2, loss=float("nan"))),
     json.dumps(row(2, loss={"a": 1})), json.dumps(row(2, step=1.5)), json.dumps(row(2, fvu=10**400)),
     json.dumps({"step": 1, "hookpoint": "x"})],
)  # fmt: skip
def test_rows_that_are_none(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(f"{json.dumps(row(1))}\n{line}\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 is no row of metrics"):
        read_rows(tmp_path)


def test_rows_that_are_no_text(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be read"):
        read_rows(tmp_path)
