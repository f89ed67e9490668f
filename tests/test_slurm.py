"""scripts/slurm/train.sbatch with a Slurm that only writes down what it is asked for."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser

from bigsae.commands import parse_train_config

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "slurm" / "train.sbatch"

# One task after the other, each as on its node.
SRUN = """#!/usr/bin/env bash
printf '%s\\n' "$@" > "$SPOOL/srun"
while [[ "$1" == --* ]]; do shift; done
for ((node = 0; node < SLURM_NNODES; node++)); do SLURM_NODEID=$node "$@" || code=$?; done
exit "${code:-0}"
"""
SCONTROL = """#!/usr/bin/env bash
printf '%s\\n' "$*" >> "$SPOOL/scontrol"
case "$1 $2" in
    "show hostnames") for ((node = 1; node <= SLURM_NNODES; node++)); do echo "gpu-$node"; done ;;
    "show job") echo "JobId=$4 JobName=bigsae JobState=$JOB_STATE Reason=None" ;;
esac
"""
ACCELERATE = """#!/usr/bin/env bash
{ printf '%s\\n' "$@"; } > "$SPOOL/accelerate.$SLURM_NODEID"
printf '%s' "$OMP_NUM_THREADS" > "$SPOOL/threads"
if [[ -n "$LEAVES" ]]; then echo "$LEAVES" > "$OUT/status.json"; fi
exit "$CODE"
"""


@pytest.fixture
def slurm(tmp_path):
    """A function that submits: the script's exit status and output, run with so many nodes of 8 GPUs."""
    spool, out = tmp_path / "spool", tmp_path / "runs" / "x"
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("accelerate", ACCELERATE)):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    spool.mkdir()
    out.mkdir(parents=True)

    def submit(num_nodes: int, *flags: str, **env: str) -> tuple[int, str]:
        known = {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SPOOL": str(spool), "OUT": str(out), "LEAVES": "",
            "CODE": "0", "JOB_STATE": "RUNNING", "SLURM_NNODES": str(num_nodes), "SLURM_JOB_ID": "812345",
            "SLURM_JOB_NODELIST": f"gpu-[1-{num_nodes}]", "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_GPUS_ON_NODE": "8",
            "SLURM_CPUS_PER_TASK": "64",
        }  # fmt: skip
        # Slurm runs a copy of the script from a folder of its own.
        copy = spool / "slurm_script"
        copy.write_text(SCRIPT.read_text())
        env = {k: v for k, v in (known | env).items() if v != "unset"}
        done = subprocess.run(
            ["bash", str(copy), *flags], env=env, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        return done.returncode, done.stdout + done.stderr

    submit.spool, submit.out = spool, out
    return submit


def command_of(slurm, node: int) -> list[str]:
    return (slurm.spool / f"accelerate.{node}").read_text().splitlines()


TRAINING = (
    "--model", "a model", "--dataset", "d", "--hookpoints", "model.layers.{1,2}", "model.layers.*.mlp",
    "--tokens", "1000000", "--output-dir", "runs/x",
)  # fmt: skip


def test_each_node_gets_its_launcher(slurm):
    """One task a node, each with its own rank, all with the first address; flags arrive as they were given."""
    code, output = slurm(4, *TRAINING)
    assert code == 0, output
    asked = (slurm.spool / "srun").read_text().splitlines()
    assert {"--nodes=4", "--ntasks=4", "--ntasks-per-node=1"} <= set(asked)
    assert (slurm.spool / "threads").read_text() == "8"
    for node in range(4):
        command = command_of(slurm, node)
        assert command[0] == "launch"
        args = launch_command_parser().parse_args(command[1:])
        assert (args.machine_rank, args.num_machines, args.num_processes) == (node, 4, 32)
        assert (args.main_process_ip, args.main_process_port) == ("gpu-1", 20000 + 2345)
        assert (args.rdzv_backend, args.same_network) == ("static", True)
        assert Path(args.config_file).samefile(ROOT / "accelerate_configs" / "hsdp_nnodes.yaml")
        assert args.module and args.training_script == "bigsae.train"
        config = parse_train_config(args.training_script_args)
        assert config.model == "a model" and config.resume
        assert config.hookpoints == ("model.layers.{1,2}", "model.layers.*.mlp")
    assert "requeue" not in (slurm.spool / "scontrol").read_text()


def test_its_settings(slurm):
    code, output = slurm(
        1, *TRAINING, "--resume", PROCESSES_PER_NODE="2", MAIN_PORT="1234", ACCELERATE_CONFIG="/x.yaml",
        OMP_NUM_THREADS="3", SLURM_GPUS_ON_NODE="unset",
    )  # fmt: skip
    assert code == 0, output
    args = launch_command_parser().parse_args(command_of(slurm, 0)[1:])
    assert (args.num_machines, args.num_processes, args.main_process_port) == (1, 2, 1234)
    assert args.config_file == "/x.yaml"
    assert (slurm.spool / "threads").read_text() == "3"
    assert parse_train_config(args.training_script_args).resume


def status(state: str, step: int) -> str:
    return json.dumps({"status": state, "reason": "", "step": step, "tokens": 0}, indent=2)


@pytest.mark.parametrize(
    ("before", "leaves", "code", "job_state", "queued_again"),
    [
        (None, status("preempted", 40), "1", "RUNNING", True),
        (status("preempted", 40), status("preempted", 80), "1", "RUNNING", True),
        # No step further: it would go round for ever.
        (status("preempted", 40), status("preempted", 40), "1", "RUNNING", False),
        (status("preempted", 40), "", "1", "RUNNING", False),
        (None, status("preempted", 40), "1", "CANCELLED", False),
        (None, status("failed", 40), "1", "RUNNING", False),
        (None, status("finished", 40), "0", "RUNNING", False),
    ],
)
def test_a_stopped_run_is_queued_again(slurm, before, leaves, code, job_state, queued_again):
    """After a signal and some work alone; never after scancel, an error, or the end."""
    if before is not None:
        (slurm.out / "status.json").write_text(before)
    returned, output = slurm(2, *TRAINING, LEAVES=leaves, CODE=code, JOB_STATE=job_state)
    assert returned == int(code), output
    assert ("requeue 812345" in (slurm.spool / "scontrol").read_text().splitlines()) == queued_again
    assert ("queued again" in output) == queued_again


def test_the_run_folder_is_found_in_either_spelling(slurm):
    assert slurm(2, *TRAINING[:-2], "--output-dir=runs/x", LEAVES=status("preempted", 1), CODE="1")[0] == 1
    assert "requeue 812345" in (slurm.spool / "scontrol").read_text()


@pytest.mark.parametrize(
    ("flags", "env", "message"),
    [
        (TRAINING[:-2], {}, "--output-dir is missing"),
        (TRAINING, {"SLURM_GPUS_ON_NODE": "unset"}, "set PROCESSES_PER_NODE"),
    ],
)
def test_what_is_missing_is_said_before_anything_starts(slurm, flags, env, message):
    code, output = slurm(2, *flags, **env)
    assert code == 2 and message in output
    assert not (slurm.spool / "srun").exists()


def test_the_directives():
    """Those that the script's promises rest on: started anew, told to stop in time, one launcher a node."""
    directives = [line.split()[1] for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH ")]
    assert {"--requeue", "--signal=TERM@120", "--ntasks-per-node=1", "--open-mode=append"} <= set(directives)


@pytest.mark.parametrize("arguments", [(), ("0",), ("2", "10.0.0.1"), ("0", "--model")])
def test_two_hosts_needs_a_rank_and_an_address(arguments):
    script = str(ROOT / "scripts" / "two_hosts.sh")
    done = subprocess.run(["bash", script, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "usage: two_hosts.sh" in done.stderr
