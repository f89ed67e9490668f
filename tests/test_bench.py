"""scripts/bench.py: what it compares agrees, and it runs where torch alone is installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
SMALL = [
    "--device",
    "cpu",
    "--rounds",
    "2",
    "--warmup",
    "0",
    "--d-in",
    "16",
    "--d-sae",
    "256",
    "--batch",
    "64",
]
# With these away, as on a machine that has torch and triton alone.
WITHOUT = "accelerate transformers nnsight datasets tyro wandb rich sae_lens sparsify dictionary_learning"
CODE = f"""
import runpy, sys
for name in "{WITHOUT}".split():
    sys.modules[name] = None
sys.argv = sys.argv[1:]
sys.path.insert(0, "scripts")
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", CODE, "scripts/bench.py", *arguments], cwd=ROOT, capture_output=True, text=True
    )


def test_steps_and_kernels_need_torch_alone(tmp_path):
    """Of peers that are not there it is said so."""
    done = bench("step", *SMALL, "--k", "4", "--dead-share", "0.1", "--json", str(tmp_path / "step.json"))
    assert done.returncode == 0, done.stderr
    assert "sae-lens: skipped, as it cannot be imported" in done.stdout
    record = json.loads((tmp_path / "step.json").read_text())
    assert set(record["rows"]) == {"encoder matmul alone", "bigsae", "bigsae, 10% dead"}
    assert record["rows"]["bigsae"]["ratio_p20"] > 1
    assert record["versions"]["torch"] == torch.__version__


@pytest.fixture
def step(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from benching import step

    return step


def test_what_differs_is_not_timed(step):
    step.check_errors({"a": 1.0, "b": 1.00005}, 1e-4)
    for wrong in (1.001, float("nan")):
        with pytest.raises(SystemExit, match="b has a squared error of"):
            step.check_errors({"a": 1.0, "b": wrong}, 1e-4)


@pytest.mark.parametrize("arch", ["topk", "batchtopk", "jumprelu"])
def test_peers_step_from_the_same_weights(step, monkeypatch, capsys, arch):
    """SAELens's and sparsify's trainers, as far as they are installed, find what ours finds, and take steps."""
    pytest.importorskip("sae_lens")
    monkeypatch.setattr(sys, "argv", ["bench.py", "step", *SMALL, "--k", "4", "--arch", arch])
    from bench import main

    main()
    printed = capsys.readouterr().out
    assert "squared error" in printed and "sae-lens" in printed
    assert ("eai-sparsify: skipped, as it has no" in printed) == (arch != "topk")


@pytest.mark.slow
def test_ranks_are_timed_against_one(tmp_path):
    arguments = ["--k", "4", "--ranks", "2", "--json", str(tmp_path / "ranks.json")]
    done = subprocess.run(
        [sys.executable, "scripts/bench.py", "step", *SMALL, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "ranks.json").read_text())["rows"]
    assert set(rows) == {"one rank", "data 2 x latent 1", "data 1 x latent 2"}


def test_kernels_are_checked_and_timed(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.setattr(sys, "argv", ["bench.py", "kernels", *SMALL, "--k", "4"])
    from bench import main
    from benching import kernels

    monkeypatch.setattr(kernels, "_PASS_BYTES", 2**16)
    main()
    assert "gradients of both matrices: bigsae" in capsys.readouterr().out


def test_growth_stands_beside_the_model(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from bench import main
    from benching import growth

    monkeypatch.setattr(growth, "_BASE", {"d_in": 16, "d_sae": 256, "k": 4, "batch": 64})
    monkeypatch.setattr(growth, "_SIZES", {"d_sae": (256, 512), "k": (2, 4)})
    out, svg = tmp_path / "growth.json", tmp_path / "growth.svg"
    flags = [
        "--device",
        "cpu",
        "--rounds",
        "2",
        "--most-latents",
        "512",
        "--json",
        str(out),
        "--svg",
        str(svg),
    ]
    main(["growth", *flags])
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 4
    assert all(row["ms_p50"] > 0 and row["model_ms"] > 0 and row["model_bytes"] > 0 for row in rows.values())
    panels = svg.read_text()
    assert panels.count("<circle") == 3 * 2 + 1  # and the legend's
