"""What a GPU would show, as far as a CPU can: whose layers, which precision, which environment, how stages send."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import TINY_LLAMA

from megatron_tw.config import ActivationConfig, ComputeConfig, ParallelConfig
from megatron_tw.model.architecture import read_architecture, transformer_config
from megatron_tw.model.build import lengthen_tokenizer, takes_transformer_engine
from megatron_tw.parallel.devices import ENVIRONMENT, set_environment

PREPARED = """
import os, torch
from megatron_tw.parallel.devices import ENVIRONMENT, prepare_device
prepare_device()
print(*(os.environ[name] for name in ENVIRONMENT))
print(torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
"""


@pytest.mark.parametrize("given", [{}, {"CUDA_DEVICE_MAX_CONNECTIONS": "32"}])
def test_the_environment_is_set_where_nobody_did_and_fp32_is_no_tf32(given: dict[str, str]) -> None:
    inherited = {name: value for name, value in os.environ.items() if name not in ENVIRONMENT}
    image = {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}  # an image's wish
    done = subprocess.run(
        [sys.executable, "-c", PREPARED], env=inherited | image | given, capture_output=True, text=True, check=True
    )
    environment, tf32 = done.stdout.splitlines()
    assert environment == " ".join((ENVIRONMENT | given).values())
    assert tf32 == "False False"


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_the_allocators_settings_stay_under_either_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in (*ENVIRONMENT, "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(name, "backend:native")
    before = dict(os.environ)
    set_environment()
    after = dict(os.environ)
    for variable in ENVIRONMENT.keys() - before.keys():
        monkeypatch.delenv(variable, raising=False)  # gone again after the test
    assert after == before | {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}


@pytest.mark.parametrize(
    ("implementation", "bf16", "available", "expected"),
    [
        ("auto", True, True, True),
        ("auto", False, True, False),
        ("auto", True, False, False),
        ("local", True, True, False),
        ("transformer_engine", True, True, True),
        ("transformer_engine", False, True, "expected --bf16 with it, got fp32"),
        ("transformer_engine", True, False, "not installed here, or there is no GPU"),
    ],
)
def test_whose_layers(implementation, bf16, available, expected) -> None:
    compute = ComputeConfig(transformer_impl=implementation, bf16=bf16)
    if isinstance(expected, bool):
        assert takes_transformer_engine(compute, available=available) == expected
    else:
        with pytest.raises(ValueError, match=f"--transformer-impl transformer_engine: .*{expected}"):
            takes_transformer_engine(compute, available=available)


@pytest.mark.parametrize(("chunks", "overlapped"), [(None, False), (2, True)])
def test_stages_of_an_interleaved_pipeline_send_while_they_compute(chunks: int | None, overlapped: bool) -> None:
    parallel = ParallelConfig(
        pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=1 if chunks else None
    )
    config = transformer_config(
        read_architecture(TINY_LLAMA),
        parallel,
        ComputeConfig(bf16=True),
        ActivationConfig(),
        on_gpu=True,
        num_model_chunks=chunks,
    )
    assert (config.overlap_p2p_comm, config.batch_p2p_comm) == (overlapped, not overlapped)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('{"model_max_length": 8192, "bos_token": "ü"}', {"model_max_length": 32768, "bos_token": "ü"}),
        (
            '{"model_max_length": 1000000000000000019884624838656}',
            {"model_max_length": 1000000000000000019884624838656},
        ),
        ('{"bos_token": "b"}', {"bos_token": "b"}),
        ("not JSON", None),
    ],
)
def test_an_exported_tokenizer_takes_the_new_length(tmp_path: Path, before: str, after: dict | None) -> None:
    lengthen_tokenizer(tmp_path, 32768)  # a folder without one
    (tmp_path / "tokenizer_config.json").write_text(before, encoding="utf-8")
    lengthen_tokenizer(tmp_path, 32768)
    written = (tmp_path / "tokenizer_config.json").read_text(encoding="utf-8")
    assert written == before if after is None else json.loads(written) == after
