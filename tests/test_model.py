"""The model on Megatron-Core equals transformers under every layout; weights go in and out bit for bit."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tiny import BOS, SEQ_LENGTH, STRIDE, TINY_LLAMA, VOCAB, WINDOW, Axes, layout_of, load_tiny, reference_rows

from megatron_tw.model.architecture import export_hf_config, parse_architecture, read_architecture
from megatron_tw.model.build import save_hf
from megatron_tw.model.forward import ShortWindowForward, long_nll, long_nll_and_top1, long_sequences, run_schedule
from megatron_tw.model.rotary import rotary_embedding
from megatron_tw.objective.zigzag import unshard
from megatron_tw.parallel.devices import prepare_device

LAYOUTS = [
    Axes(),
    Axes(tp=2),
    Axes(pp=2),
    Axes(cp=2),
    Axes(pp=2, vpp_layers=1),
    Axes(tp=2, cp=2),
    Axes(pp=2, cp=2),
    Axes(cp=4),
    Axes(tp=2, pp=2),
    Axes(tp=4),  # more ranks than key-value heads
]
each_layout = pytest.mark.parametrize("axes", LAYOUTS, ids=lambda axes: axes.name)


def whole_logits(chunks, rows, layout):
    """Logits [rows, N, V / padded] of whole rows on the last stage, put together from all vocabulary and sequence
    shards."""

    def step(iterator, model):
        sequences = next(iterator)
        logits = model(sequences.ids_MS, None, None, labels=None, packed_seq_params=sequences.shard)
        return logits, lambda x: (x.float().sum(), torch.zeros((), dtype=torch.int), x)

    batches = [long_sequences(part, layout) for part in rows.split(1)]
    with torch.no_grad():
        parts = run_schedule(
            chunks,
            step,
            batches,
            local_length=rows.shape[1] // layout.cp_size,
            micro_batch_size=1,
            layout=layout,
            forward_only=True,
        )
    if not parts:
        return None
    local = torch.cat(parts, dim=1).contiguous()
    for group, join in ((layout.tp_group, partial(torch.cat, dim=2)), (layout.cp_group, partial(unshard, dim=0))):
        shards = [torch.empty_like(local) for _ in range(group.size())]
        dist.all_gather(shards, local, group=group)
        local = join(shards)
    return local.transpose(0, 1)


def logits_and_nll(axes: Axes, folder: Path):
    with layout_of(axes) as layout:
        _, chunks = load_tiny(axes, layout, folder)
        rows = torch.from_numpy(reference_rows())
        logits = whole_logits(chunks, rows, layout)
        long = long_nll(chunks, rows, layout, micro_batch_size=2)
        short = {}
        for name, include_first, bos in (
            ("short_nll_with_first", True, BOS),
            ("short_nll_without_first", False, BOS),
            ("short_nll_no_bos", True, None),
        ):
            forward = ShortWindowForward.create(
                SEQ_LENGTH, WINDOW, STRIDE,
                include_first=include_first, bos_id=bos, layout=layout, sequence_parallel=axes.tp > 1,
                scoring_micro_batch=3 if bos is None else None,
            )  # fmt: skip
            short[name] = forward.short_nll(chunks, rows)
        training = [chunk.training for chunk in chunks]
    return logits, long, short, training


def greedy_half() -> torch.Tensor:
    """Rows [2, 256]: of their tokens about half are transformers' first choice, the others are drawn."""
    from transformers import DynamicCache, LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(TINY_LLAMA, dtype=torch.float32)
    rows = torch.from_numpy(reference_rows())[:2].clone()
    greedy = torch.rand(rows.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    cache = DynamicCache()
    with torch.no_grad():
        for position in range(SEQ_LENGTH - 1):
            logits = model(rows[:, position : position + 1], past_key_values=cache).logits[:, -1]
            rows[:, position + 1] = torch.where(greedy[:, position + 1], logits.argmax(-1), rows[:, position + 1])
    return rows


def nll_and_top1(axes: Axes, rows: torch.Tensor):
    with layout_of(axes) as layout:
        _, chunks = load_tiny(axes, layout)
        plain = long_nll(chunks, rows, layout, micro_batch_size=1)
        both = long_nll_and_top1(chunks, rows, layout, micro_batch_size=1)
        assert (plain is None) == (both is None)
        assert plain is None or both is None or torch.equal(plain, both[0])
    return both


def test_the_first_choice_is_transformers_argmax(ranks):
    from transformers import LlamaForCausalLM

    rows = greedy_half()
    with torch.no_grad():
        logits = LlamaForCausalLM.from_pretrained(TINY_LLAMA, dtype=torch.float32)(rows).logits[:, :-1].double()
    expected_nll = -logits.log_softmax(-1).gather(2, rows[:, 1:, None])[..., 0]
    expected = logits.argmax(-1) == rows[:, 1:]
    assert 0.4 < expected.float().mean() < 0.6
    best = logits.topk(2).values
    assert (best[..., 0] - best[..., 1]).min() > 1e-5, "a tie within rounding: no layout can be held to it"
    for axes in (Axes(), Axes(tp=2), Axes(cp=2), Axes(pp=2), Axes(tp=2, cp=2)):
        answers = [both for both in ranks(axes.world_size).run(nll_and_top1, axes, rows) if both is not None]
        assert len(answers) == axes.world_size // axes.pp
        for nll, top1 in answers:
            np.testing.assert_allclose(nll, expected_nll, atol=1e-5, rtol=0, err_msg=axes.name)
            assert torch.equal(top1, expected), axes.name


def reference_logits(folder: Path) -> torch.Tensor:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.from_numpy(reference_rows())).logits


@each_layout
def test_logits_and_nlls_equal_the_references(axes, ranks, reference):
    expected = reference_logits(TINY_LLAMA)
    windows = np.load(reference / "windows.npz")
    answered = 0
    for logits, long, short, training in ranks(axes.world_size).run(logits_and_nll, axes, TINY_LLAMA):
        assert all(training), "the forward-only pass left the model in eval mode"
        if logits is None:
            assert long is None
            assert all(nll is None for nll in short.values())
            continue
        answered += 1
        torch.testing.assert_close(logits[..., :VOCAB], expected, atol=5e-5, rtol=0)
        np.testing.assert_allclose(long, windows["long_nll"], atol=2e-5, rtol=0)
        for name, nll in short.items():
            np.testing.assert_allclose(nll, windows[name], atol=2e-5, rtol=0, err_msg=name)
    assert answered == axes.world_size // axes.pp


@pytest.fixture(scope="module")
def variant_folders(tmp_path_factory) -> dict[str, Path]:
    """Random Llamas as transformers writes them: tied embeddings with llama3 scaling, and one whose files are
    sharded."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256,
        "bos_token_id": BOS,
    }  # fmt: skip
    llama3 = {
        "rope_type": "llama3", "rope_theta": 50000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    folders = {}
    for name, extra, size in (
        ("tied", {"tie_word_embeddings": True, "rope_parameters": llama3}, "1GB"),
        ("sharded", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}, "100KB"),
        ("yarn", {"rope_parameters": yarn}, "1GB"),
    ):
        torch.manual_seed(3)
        folders[name] = tmp_path_factory.mktemp(name)
        LlamaForCausalLM(LlamaConfig(**shape, **extra)).save_pretrained(folders[name], max_shard_size=size)
    return folders


@pytest.mark.parametrize("axes", [Axes(), Axes(tp=2), Axes(pp=2), Axes(tp=2, pp=2)], ids=lambda axes: axes.name)
@pytest.mark.parametrize("variant", ["tied", "sharded", "yarn"])
def test_other_ropes_tied_embeddings_and_sharded_files(axes, variant, variant_folders, ranks):
    folder = variant_folders[variant]
    expected = reference_logits(folder)
    for logits, *_ in ranks(axes.world_size).run(logits_and_nll, axes, folder):
        if logits is not None:
            torch.testing.assert_close(logits[..., :VOCAB], expected, atol=5e-5, rtol=0)


def round_trip(axes: Axes, folder: Path, target: Path, tokenizer: Path):
    with layout_of(axes) as layout:
        architecture, chunks = load_tiny(axes, layout, folder)
        save_hf(chunks, target, architecture, layout, tokenizer_dir=tokenizer, max_position_embeddings=1024)


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize(
    "axes",
    [Axes(), Axes(tp=2), Axes(pp=2, vpp_layers=1), Axes(tp=2, pp=2), Axes(tp=2, cp=2), Axes(tp=4)],
    ids=lambda axes: axes.name,
)
@pytest.mark.parametrize("variant", ["tiny", "tied", "sharded"])
def test_import_then_export_is_bit_exact(axes, variant, variant_folders, ranks, tmp_path):
    source = variant_folders.get(variant, TINY_LLAMA)
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer_config.json").write_text('{"model_max_length": 256}')
    ranks(axes.world_size).run(round_trip, axes, source, tmp_path / "out", tokenizer)
    before, after = read_tensors(source), read_tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    # What transformers makes of the exported folder is the same model with the new length.
    torch.testing.assert_close(reference_logits(tmp_path / "out"), reference_logits(source), atol=0, rtol=0)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["max_position_embeddings"] == 1024
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text()) == {"model_max_length": 1024}


def test_exported_config_is_read_by_both_generations_of_transformers(variant_folders):
    architecture = read_architecture(variant_folders["tied"]).with_rotary_base(7e6)
    exported = export_hf_config(architecture, max_position_embeddings=512, dtype=torch.bfloat16)
    # transformers 4: rope_theta, rope_scaling, torch_dtype. transformers 5: rope_parameters, dtype.
    assert exported["rope_theta"] == 7e6
    assert exported["torch_dtype"] == "bfloat16"
    assert exported["rope_scaling"]["rope_type"] == "llama3"
    assert "rope_theta" not in exported["rope_scaling"]
    assert exported["rope_parameters"]["rope_theta"] == 7e6
    assert exported["dtype"] == "bfloat16"
    old = {key: value for key, value in exported.items() if key not in ("rope_parameters", "dtype")}
    assert parse_architecture(old, "transformers 4").rope == architecture.rope
    assert torch.equal(rotary_embedding(parse_architecture(old, "transformers 4")).inv_freq,
                       rotary_embedding(architecture).inv_freq)  # fmt: skip


def test_an_extension_does_not_move_the_length_that_a_rope_is_scaled_from():
    """transformers takes max_position_embeddings where the rope says none, and an extension writes a longer one."""
    config = json.loads((TINY_LLAMA / "config.json").read_text())
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}
    before = parse_architecture({**config, "rope_parameters": yarn}, "config.json")
    extended = export_hf_config(before, max_position_embeddings=4096, dtype=torch.float32)
    after = parse_architecture(extended, "config.json")
    assert after.max_position_embeddings == 4096
    assert torch.equal(rotary_embedding(after).inv_freq, rotary_embedding(before).inv_freq)
    own = dict(extended["rope_parameters"])
    assert own["original_max_position_embeddings"] == config["max_position_embeddings"]


def transformers_on_a_rank(folder: Path) -> torch.Tensor:
    prepare_device()
    return reference_logits(folder)


def test_transformers_is_untouched_where_megatron_is_adapted(variant_folders, ranks):
    """Both in one process: a model that transformers loads after `prepare_device` is the same as without it."""
    for folder in variant_folders.values():
        (adapted,) = ranks(1).run(transformers_on_a_rank, folder)
        torch.testing.assert_close(adapted, reference_logits(folder), atol=0, rtol=0)
