"""Each file of accelerate_configs/ launched as it stands, by accelerate itself: what the ranks then find."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.config.config_args import load_config_from_file

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))

SHOW = """
import json, os
from bigsae.config import LMConfig
from bigsae.lm.layout import resolve_layout
ranks = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
layout = resolve_layout(LMConfig(), *ranks)
names = ("RANK", "LOCAL_RANK", "GROUP_RANK", "CUDA_VISIBLE_DEVICES", "MASTER_ADDR")
found = {name: os.environ.get(name) for name in names}
found["layout"] = [layout.kind, layout.shard_size, layout.replicate_size]
# In one write: what several ranks print in pieces comes mixed.
os.write(1, (json.dumps(found) + "\\n").encode())
"""


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_it(path):
    config: Any = load_config_from_file(str(path))
    assert config.compute_environment.value == "LOCAL_MACHINE"
    assert config.num_processes % config.num_machines == 0
    # Not accelerate's business: two places that decide would be one too many.
    assert str(config.mixed_precision).removeprefix("PrecisionType.").lower() == "no"
    if config.fsdp_config:
        assert config.fsdp_config["fsdp_version"] == 2


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launched(name: str, tmp_path: Path, num_machines: int, *arguments: str) -> list[dict[str, Any]]:
    """What each rank found, by rank; one launcher for each machine, all of them here."""
    script = tmp_path / "show.py"
    script.write_text(SHOW)
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(ROOT / "accelerate_configs" / f"{name}.yaml"), *arguments]
    if num_machines > 1:
        command += ["--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port())]
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "FSDP_"))}
    started = [
        subprocess.Popen(
            [*command, "--machine_rank", str(machine), str(script)],
            env=kept | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for machine in range(num_machines)
    ]
    ranks = []
    for process in started:
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        ranks += [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return sorted(ranks, key=lambda rank: int(rank["RANK"] or 0))


@pytest.mark.parametrize(
    ("name", "num_machines", "num_local", "arguments", "layout"),
    [
        ("single_gpu", 1, 1, (), ["replicate", 1, 1]),
        ("cpu_2", 1, 2, (), ["replicate", 1, 2]),
        ("ddp_8gpu", 1, 8, (), ["replicate", 1, 8]),
        ("fsdp_8gpu", 1, 8, (), ["fsdp", 8, 1]),
        ("hsdp_2nodes", 2, 8, (), ["hsdp", 8, 2]),
        ("hsdp_nnodes", 3, 2, ("--num_machines", "3", "--num_processes", "6"), ["hsdp", 2, 3]),
        ("hsdp_nnodes", 1, 4, ("--num_machines", "1", "--num_processes", "4"), ["fsdp", 4, 1]),
    ],
)
def test_launched_it_gives_the_ranks_and_the_layout(
    tmp_path, name, num_machines, num_local, arguments, layout
):
    """As many ranks as the file says, no GPU needed; machine by machine, each rank with a device number of its own."""
    ranks = launched(name, tmp_path, num_machines, *arguments)
    assert [rank["layout"] for rank in ranks] == [layout] * (num_machines * num_local)
    if len(ranks) > 1:
        expected = [
            (str(machine * num_local + local), str(local), str(machine))
            for machine in range(num_machines)
            for local in range(num_local)
        ]
        assert [(r["RANK"], r["LOCAL_RANK"], r["GROUP_RANK"]) for r in ranks] == expected
        assert {rank["MASTER_ADDR"] for rank in ranks} == {"127.0.0.1"}


def test_every_file_is_launched_here():
    launched_here = test_launched_it_gives_the_ranks_and_the_layout.pytestmark[0].args[1]
    assert {path.stem for path in CONFIGS} == {row[0] for row in launched_here}
