"""How the ranks hold the model: flags, then accelerate's environment."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bigsae.config import LMConfig, UserError
from bigsae.lm.layout import LMLayout, resolve_layout

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_SHARDING_STRATEGY": "FULL_SHARD"}
HYBRID = {**FSDP, "FSDP_VERSION": "1", "FSDP_SHARDING_STRATEGY": "HYBRID_SHARD"}
PARALLELISM = {
    **FSDP,
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2",
    "PARALLELISM_CONFIG_DP_SHARD_SIZE": "4",
    "PARALLELISM_CONFIG_TP_SIZE": "1",
    "PARALLELISM_CONFIG_CP_SIZE": "1",
    "PARALLELISM_CONFIG_SP_SIZE": "1",
}


def shape(layout: LMLayout) -> tuple[str, int, int]:
    return layout.kind, layout.shard_size, layout.replicate_size


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, ("replicate", 1, 8)),
        (FSDP, ("fsdp", 8, 1)),
        ({**FSDP, "FSDP_SHARDING_STRATEGY": "SHARD_GRAD_OP"}, ("fsdp", 8, 1)),
        ({**FSDP, "FSDP_SHARDING_STRATEGY": "NO_SHARD"}, ("replicate", 1, 8)),
        (HYBRID, ("hsdp", 4, 2)),
        ({**HYBRID, "FSDP_SHARDING_STRATEGY": "4"}, ("hsdp", 4, 2)),
        (PARALLELISM, ("hsdp", 4, 2)),
    ],
)
def test_the_environment_decides(env: dict[str, str], expected: tuple) -> None:
    assert shape(resolve_layout(LMConfig(), 8, 4, env)) == expected


@pytest.mark.parametrize(
    ("lm", "expected"),
    [
        (LMConfig(shard_size=1), ("replicate", 1, 8)),
        (LMConfig(shard_size=8), ("fsdp", 8, 1)),
        (LMConfig(shard_size=2), ("hsdp", 2, 4)),
        (LMConfig(replicate_size=2), ("hsdp", 4, 2)),
        (LMConfig(replicate_size=8), ("replicate", 1, 8)),
        (LMConfig(shard_size=4, replicate_size=2), ("hsdp", 4, 2)),
    ],
)
def test_flags_override(lm: LMConfig, expected: tuple) -> None:
    layout = resolve_layout(lm, 8, 4, HYBRID)
    assert shape(layout) == expected
    assert "flags" in str(layout)


@pytest.mark.parametrize(
    ("lm", "env", "problem"),
    [
        (LMConfig(shard_size=3), {}, "there are 8 ranks: set --lm.shard-size"),
        (LMConfig(shard_size=16), {}, "there are 8 ranks"),
        (LMConfig(replicate_size=3), {}, "there are 8 ranks"),
        (LMConfig(shard_size=2, replicate_size=2), {}, "makes 4"),
        (LMConfig(), {**PARALLELISM, "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2"}, "parallelism_config"),
        (LMConfig(), {**PARALLELISM, "PARALLELISM_CONFIG_TP_SIZE": "2"}, "parallelism_config_tp_size 2"),
        (LMConfig(), {"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed"),
    ],
)
def test_what_does_not_add_up_is_refused(lm: LMConfig, env: dict[str, str], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        resolve_layout(lm, 8, 4, env)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("fsdp_config:\n  fsdp_version: 2\n  fsdp_reshard_after_forward: true\n", "fsdp 2 1"),
        (
            "fsdp_config:\n  fsdp_version: 1\n  fsdp_sharding_strategy: HYBRID_SHARD\n"
            "  fsdp_reshard_after_forward: true\n",
            "fsdp 2 1",  # one node: a copy over its two ranks
        ),
        (
            "fsdp_config:\n  fsdp_version: 2\n  fsdp_reshard_after_forward: true\n"
            "parallelism_config:\n  parallelism_config_dp_replicate_size: 2\n  parallelism_config_dp_shard_size: 1\n",
            "replicate 1 2",
        ),
    ],
    ids=["fsdp", "hybrid", "parallelism_config"],
)
def test_accelerate_launch_exports_what_we_read(tmp_path: Path, config: str, expected: str) -> None:
    """With accelerate's own launcher: the variables' names are its, and may change."""
    yaml = tmp_path / "config.yaml"
    yaml.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: FSDP\nmixed_precision: 'no'\nnum_machines: 1\n"
        f"num_processes: 2\nuse_cpu: false\nmain_process_port: 0\n{config}"
    )
    script = tmp_path / "show.py"
    script.write_text(
        "import os\n"
        "from bigsae.config import LMConfig\n"
        "from bigsae.lm.layout import resolve_layout\n"
        "ranks = int(os.environ['WORLD_SIZE']), int(os.environ['LOCAL_WORLD_SIZE'])\n"
        "layout = resolve_layout(LMConfig(), *ranks)\n"
        # In one write: what two ranks print in pieces comes mixed.
        "os.write(1, f'layout: {layout.kind} {layout.shard_size} {layout.replicate_size}\\n'.encode())\n"
    )
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(yaml), str(script)]
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        launch, env={**os.environ, "PYTHONPATH": root}, cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"layout: {expected}") == 2
