"""What a Hugging Face folder may say: config.json and weights are compared both ways, and what does not fit is told
with its file, by every program."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_bad_input import run_tool
from tiny import (
    BOS,
    SEQ_LENGTH,
    TINY_LLAMA,
    Axes,
    layout_of,
    load_tiny,
    make_folder,
    prepare_ready_rows,
    reference_rows,
)

from megatron_tw.model.architecture import parse_architecture, read_architecture
from megatron_tw.model.huggingface import SafetensorsFolder

LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
MISTRAL = {"model_type": "mistral"}
PHI = {"model_type": "phi", "hidden_act": "gelu_new", "layer_norm_eps": 1e-5}

# What is changed in the tiny Llama's config.json (... takes a key away), and what is said.
CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "gpt2"}, "model_type: expected one of llama, mistral, phi, qwen2, qwen3, got 'gpt2'"),
    ({"model_type": "gemma2"}, "got 'gemma2' (its norms and embeddings are scaled otherwise)"),
    ({"model_type": "mixtral"}, "got 'mixtral' (a mixture of experts)"),
    ({"model_type": "qwen3_moe"}, "got 'qwen3_moe' (a mixture of experts)"),
    ({"model_type": "phi3"}, "got 'phi3' (its weights are fused otherwise"),
    ({"model_type": ...}, "model_type: expected one of llama, mistral, phi, qwen2, qwen3, got None"),
    ({"model_type": ["llama"]}, "got ['llama']"),
    ({"hidden_act": "gelu"}, "hidden_act: expected 'silu', got 'gelu'"),
    ({"attention_bias": True}, "attention_bias: expected False, got True"),
    ({"attention_bias": 0}, "attention_bias: expected False, got 0"),
    ({"mlp_bias": True}, "mlp_bias: expected False, got True"),
    ({"quantization_config": {"bits": 4}}, "quantization_config: expected None, got {'bits': 4} (weights are read as"),
    ({"dtype": "int8"}, "dtype: expected one of float32, bfloat16, float16, got 'int8'"),
    ({"dtype": 32}, "dtype: expected one of"),
    ({"vocab_size": ...}, "missing vocab_size"),
    ({"num_hidden_layers": 0}, "num_hidden_layers: expected an integer of 1 or more, got 0"),
    ({"num_hidden_layers": "4"}, "num_hidden_layers: expected an integer of 1 or more, got '4'"),
    ({"num_hidden_layers": True}, "num_hidden_layers: expected an integer of 1 or more, got True"),
    ({"num_hidden_layers": None}, "num_hidden_layers: expected an integer of 1 or more, got None"),
    ({"hidden_size": 64.0}, "hidden_size: expected an integer of 1 or more, got 64.0"),
    ({"intermediate_size": -160}, "intermediate_size: expected an integer of 1 or more, got -160"),
    ({"num_attention_heads": [4]}, "num_attention_heads: expected an integer of 1 or more, got [4]"),
    ({"num_key_value_heads": 3}, "num_key_value_heads: expected a divisor of 4 attention heads, got 3"),
    ({"num_key_value_heads": 0}, "num_key_value_heads: expected an integer of 1 or more, or null, got 0"),
    ({"head_dim": 0}, "head_dim: expected an integer of 1 or more, or null, got 0"),
    ({"head_dim": 15}, "expected an even number of rotated dimensions in a head of 15, got 15"),
    ({"head_dim": None, "hidden_size": 66}, "num_attention_heads: expected a divisor of hidden_size 66, got 4"),
    ({"rms_norm_eps": -1e-5}, "rms_norm_eps: expected a number more than 0, got -1e-05"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps: expected a number more than 0, got nan"),
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings: expected true or false, got 'false'"),
    ({"max_position_embeddings": 0}, "max_position_embeddings: expected an integer of 1 or more, got 0"),
    ({"bos_token_id": "<s>"}, "bos_token_id: expected an id, a list of ids or null, got '<s>'"),
    ({"rope_parameters": [1]}, "rope_parameters: expected an object or null, got [1]"),
    ({"rope_parameters": {"rope_type": "nonsense"}}, "rope_parameters: rope_type: expected one of default, linear,"),
    ({"rope_parameters": {"rope_type": ["yarn"]}}, "rope_type: expected one of default, linear, llama3, yarn, got ['y"),
    ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "got 'dynamic' (its frequencies depend on each inp"),
    ({"rope_parameters": {"rope_type": "longrope"}}, "got 'longrope' (its frequencies depend on each input's length"),
    ({"rope_parameters": {"rope_theta": -1e4}}, "rope_parameters: rope_theta: expected a number more than 0, got -10"),
    ({"rope_parameters": ..., "rope_theta": 0}, "config.json: rope_theta: expected a number more than 0, got 0"),
    ({"rope_theta": 5e5}, "rope_theta 10000.0 contradicts the rope_theta 500000.0 beside it"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling and rope_parameters contradict each other"),
    ({"rope_parameters": {"factor": 2.0}}, "rope_parameters: factor: a key that rope_type default does not have"),
    ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters: missing factor, which rope_type linear needs"),
    ({"rope_parameters": YARN | {"factor": 0.5}}, "rope_parameters: factor: expected 1 or more, got 0.5"),
    ({"rope_parameters": YARN | {"factor": "4"}}, "rope_parameters: factor: expected a number more than 0, got '4'"),
    ({"rope_parameters": YARN | {"truncate": 1}}, "rope_parameters: truncate: expected true or false, or null, got"),
    ({"rope_parameters": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor: expected more than low_freq_factor 1"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: expected none, or 1 in a llama model, got 0.5"),
    ({"extended_from": 8192}, "extended_from: expected an object, got 8192"),
    ({"extended_from": {"rope_theta": 1e4, "original_max_position_embeddings": 0}}, "expected an integer of 1 or m"),
    (MISTRAL | {"sliding_window": 0}, "sliding_window: expected an integer of 1 or more, or null, got 0"),
    (MISTRAL | {"layer_types": ["sliding_attention"]}, "layer_types: expected None"),
    ({"model_type": "qwen2", "use_sliding_window": "no"}, "use_sliding_window: expected true or false, got 'no'"),
    ({"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 1.5}, "sliding_window: expected an integer"),
    (PHI | {"qk_layernorm": True}, "qk_layernorm: expected False, got True"),
    (PHI | {"partial_rotary_factor": 1.5}, "partial_rotary_factor: expected at most 1, got 1.5"),
    (PHI | {"partial_rotary_factor": 0.2}, "expected an even number of rotated dimensions in a head of 16, got 3"),
    (PHI | {"layer_norm_eps": 0}, "layer_norm_eps: expected a number more than 0, got 0"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), CONFIGS, ids=lambda value: str(value)[:60])
def test_config_json(changes, message, tmp_path):
    raw = {**json.loads((TINY_LLAMA / "config.json").read_text()), **changes}
    file = tmp_path / "config.json"
    file.write_text(json.dumps({key: value for key, value in raw.items() if value is not ...}))
    with pytest.raises(ValueError) as caught:
        read_architecture(tmp_path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(file))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", "\x00", '{"model_type": "llama", }'])
def test_config_json_that_is_none(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config.json: (not a JSON file|expected a JSON object)"):
        read_architecture(tmp_path)


@pytest.mark.parametrize(
    ("changes", "span"),
    [
        (MISTRAL, 4096),  # transformers' default
        (MISTRAL | {"sliding_window": None}, None),
        (MISTRAL | {"sliding_window": 100}, 100),
        ({"model_type": "qwen2", "sliding_window": 100}, None),
        ({"model_type": "qwen2", "sliding_window": 100, "use_sliding_window": True, "max_window_layers": 4}, None),
        ({"model_type": "qwen2", "sliding_window": 100, "use_sliding_window": True, "max_window_layers": 3}, 100),
        ({"model_type": "qwen3", "use_sliding_window": True, "max_window_layers": 0}, 4096),
        ({"model_type": "qwen3", "use_sliding_window": True, "layer_types": ["full_attention"] * 4}, None),
        ({"sliding_window": 100}, None),  # a Llama knows no such key
    ],
)
def test_what_a_token_sees(changes, span):
    raw = {**json.loads((TINY_LLAMA / "config.json").read_text()), **changes}
    architecture = parse_architecture(raw, "folder/config.json")
    if span is None:
        architecture.check_length(10**6, "--seq-length")
        return
    architecture.check_length(span, "--seq-length")
    expected = f"--seq-length: expected at most {span}, the sliding_window of folder/config.json, got {span + 1} tokens"
    with pytest.raises(ValueError, match=expected):
        architecture.check_length(span + 1, "--seq-length")


Tensors = dict[str, torch.Tensor]
Q_NORM = "model.layers.0.self_attn.q_norm.weight"
GATE = "model.layers.2.mlp.gate_proj.weight"


def in_file(change: Callable[[Tensors], object]) -> Callable[[Path], None]:
    """The damage that is done by a change to the tensors of model.safetensors."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return damage


def in_config(**changes: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return damage


def in_index(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """The damage that is done by a change to the index of two files."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        files = {name: f"{number % 2}.safetensors" for number, name in enumerate(sorted(tensors))}
        for file in set(files.values()):
            save_file({name: tensors[name] for name in tensors if files[name] == file}, folder / file)
        index: dict[str, Any] = {"weight_map": files}
        change(index)
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return damage


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


WEIGHTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no file": (lambda folder: (folder / "model.safetensors").unlink(), "neither model.safetensors nor model.saf"),
    "truncated": (truncate, "model.safetensors: truncated or not a safetensors file"),
    "file and index": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("{}"),
        "expected model.safetensors or model.safetensors.index.json, found both",
    ),
    "tensor missing": (in_file(lambda x: x.pop(GATE)), f"tensor {GATE} is missing (1 missing in all)"),
    "bias too many": (
        in_file(lambda x: x.update({"model.layers.1.self_attn.q_proj.bias": torch.zeros(64)})),
        "tensor model.layers.1.self_attn.q_proj.bias is none of a llama model with 4 layers",
    ),
    "norm too many": (in_file(lambda x: x.update({Q_NORM: torch.zeros(16)})), f"tensor {Q_NORM} is none of a llama"),
    "fewer layers in config.json": (in_config(num_hidden_layers=3), "tensor model.layers.3.input_layernorm.weight is"),
    "more layers in config.json": (in_config(num_hidden_layers=5), "tensor model.layers.4.input_layernorm.weight is"),
    "another family in config.json": (in_config(model_type="qwen3", head_dim=16), "self_attn.k_norm.weight is missing"),
    "another shape": (in_config(intermediate_size=192), "mlp.gate_proj.weight: expected shape (192, 64), got (160"),
    "integers": (in_file(lambda x: x.update({GATE: x[GATE].to(torch.int8)})), f"{GATE}: expected numbers of F32,"),
    "index of nothing": (in_index(lambda x: x.clear()), "not a safetensors index"),
    "index of numbers": (in_index(lambda x: x["weight_map"].update({GATE: 1})), "weight_map: expected names of files"),
    "index of a list": (in_index(lambda x: x.update(weight_map=[1])), "not a safetensors index"),
    "index without an entry": (in_index(lambda x: x["weight_map"].pop(GATE)), f"tensor {GATE} of"),
    "index with an entry more": (
        in_index(lambda x: x["weight_map"].update({Q_NORM: "0.safetensors"})),
        f"0.safetensors: tensor {Q_NORM} is missing, though model.safetensors.index.json names it",
    ),
    "index of a file that is not there": (
        in_index(lambda x: x["weight_map"].update({GATE: "7.safetensors"})),
        "7.safetensors: not found, though the index names it",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights(name, tmp_path):
    damage, message = WEIGHTS[name]
    folder = shutil.copytree(TINY_LLAMA, tmp_path / "model")
    damage(folder)
    with pytest.raises(ValueError) as caught:
        SafetensorsFolder(folder, read_architecture(folder))
    assert message in str(caught.value)
    assert str(folder) in str(caught.value)


def test_harmless_buffers_are_passed_over(tmp_path):
    """Old versions of transformers saved them."""
    folder = shutil.copytree(TINY_LLAMA, tmp_path / "model")
    in_file(lambda x: x.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}))(folder)
    SafetensorsFolder(folder, read_architecture(folder))


def load(folders: list[Path]) -> list[str]:
    """On a rank: what loading each of them raises."""
    said = []
    with layout_of(Axes(tp=2)) as layout:
        for folder in folders:
            try:
                load_tiny(Axes(tp=2), layout, folder)
                said.append("")
            except ValueError as error:
                said.append(str(error))
    return said


def test_what_only_the_values_say(ranks, tmp_path):
    """NaN, infinity, and an output projection in a folder with tied embeddings (transformers ties them where they are
    equal): seen by the rank whose shard it is in, told by all."""
    same = make_folder("llama", tmp_path / "same", tie_word_embeddings=True)
    head = load_file(same / "model.safetensors")["model.embed_tokens.weight"].clone()
    in_file(lambda x: x.update({"lm_head.weight": head}))(same)
    other, nan, infinite = (shutil.copytree(same, tmp_path / name) for name in ("other", "nan", "infinite"))
    in_file(lambda x: x["lm_head.weight"][-1].add_(1e-3))(other)  # a row of the last tensor-parallel rank
    in_file(lambda x: x[GATE][-1].fill_(torch.nan))(nan)
    in_file(lambda x: x[GATE][0].fill_(torch.inf))(infinite)
    for said in ranks(2).run(load, [same, other, nan, infinite]):
        assert said[0] == ""
        assert said[1].startswith(f"{other}: lm_head.weight is another than model.embed_tokens.weight")
        assert said[2:] == [f"{folder}: NaN or infinity in tensor {GATE}" for folder in (nan, infinite)]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return prepare_ready_rows(reference_rows(), tmp_path_factory.mktemp("rows") / "rows")


def tool_arguments(model: Path, data: Path, output: Path) -> dict[str, list[str]]:
    rows = ["--load-hf", str(model), "--data-path", str(data), "--short-window", "64"]
    return {
        "train": [*rows, "--seq-length", str(SEQ_LENGTH), "--train-iters", "1", "--save", str(output)],
        "evaluate": [*rows, "--seq-length", str(SEQ_LENGTH), "--output", str(output)],
        "score": [*rows, "--output", str(output)],
        "convert": ["--load-hf", str(model), "--save", str(output)],
    }


def test_shards_that_are_not_all_there_are_told_by_every_program(data, ranks, tmp_path):
    """Before anything is made: a download that was cut off."""
    missing, cut = (shutil.copytree(TINY_LLAMA, tmp_path / name) for name in ("missing", "cut"))
    for folder in (missing, cut):
        in_index(lambda index: None)(folder)
    (missing / "1.safetensors").unlink()
    size = (cut / "1.safetensors").stat().st_size
    (cut / "1.safetensors").write_bytes((cut / "1.safetensors").read_bytes()[:-1000])
    for folder, ending in ((missing, "not found, though the index names it"), (cut, f"found {size - 1000:,})")):
        for tool, argv in tool_arguments(folder, data, tmp_path / "out").items():
            status, stderr = ranks(1).run(run_tool, tool, argv)[0]
            assert status == 2, tool
            assert stderr.startswith(f"error: --load-hf: {folder / '1.safetensors'}: "), tool
            assert stderr.endswith(f"{ending}\n"), tool
            assert not (tmp_path / "out").exists(), tool
    assert f"by its header {size:,} bytes" in stderr


def test_nan_is_told_by_every_program(data, ranks, tmp_path):
    folder = shutil.copytree(TINY_LLAMA, tmp_path / "model")
    in_file(lambda x: x[GATE][-1].fill_(torch.nan))(folder)
    for tool, argv in tool_arguments(folder, data, tmp_path / "out").items():
        status, stderr = ranks(1).run(run_tool, tool, argv)[0]
        assert (status, stderr) == (2, f"error: {folder}: NaN or infinity in tensor {GATE}\n"), tool
        assert [path.name for path in tmp_path.iterdir()] == ["model"], tool


def test_rows_longer_than_the_sliding_window(data, ranks, tmp_path):
    folder = make_folder("mistral", tmp_path / "model", sliding_window=48)
    arguments = tool_arguments(folder, data, tmp_path / "out")
    live = ["--weighting", "dense", "--scorer", "frozen", "--scorer-hf", str(folder), "--load-hf", str(TINY_LLAMA)]
    for tool, argv, option, tokens in (
        ("train", arguments["train"], "--seq-length", SEQ_LENGTH),
        ("train", [*arguments["train"], *live, "--bos-id", str(BOS)], "--short-window", 64),
        ("evaluate", arguments["evaluate"], "--seq-length", SEQ_LENGTH),
        ("score", arguments["score"], "--short-window", 64),
    ):
        status, stderr = ranks(1).run(run_tool, tool, argv)[0]
        expected = f"{option}: expected at most 48, the sliding_window of {folder / 'config.json'}, got {tokens} tokens"
        assert status == 2
        assert expected in stderr, tool
        assert len(stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "phi"])
def test_missing_keys_mean_what_they_mean_to_transformers(family):
    """A config.json of the four sizes that nobody leaves out."""
    from transformers import AutoConfig

    sizes = {"vocab_size": 320, "hidden_size": 256, "num_attention_heads": 32, "num_hidden_layers": 2}
    ours = parse_architecture({"model_type": family, "intermediate_size": 96, **sizes}, "config.json")
    theirs = AutoConfig.for_model(family, intermediate_size=96, **sizes)
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    partial = theirs.rope_parameters.get("partial_rotary_factor", 1.0)
    epsilon = theirs.layer_norm_eps if family == "phi" else theirs.rms_norm_eps
    assert ours.num_query_groups == theirs.num_key_value_heads
    assert (ours.head_dim, ours.rotary_dim) == (head_dim, int(head_dim * partial))
    assert ours.norm_epsilon == epsilon
    assert ours.tied_embeddings == theirs.tie_word_embeddings
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.rotary_base == theirs.rope_parameters["rope_theta"]
    assert ours.family.attention_span(ours.hf_config, "") == getattr(theirs, "sliding_window", None)
