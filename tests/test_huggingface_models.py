"""Which models the Hugging Face Trainer trains with token weighting, what it refuses by name, and what it allocates."""

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate", reason="the Trainer needs accelerate")

import transformers
from huggingface_runs import (
    DENSE,
    Examples,
    arguments,
    collate_right_padded,
    load_tiny_llama,
    logs_of,
)
from test_losses_cost import AllocatedBytes
from test_readme import add_tokenizer
from tiny import BOS, TINY_LLAMA, VOCAB, make_folder, reference_rows
from torch import nn

from megatron_tw.integrations.huggingface import TokenWeightingConfig, TokenWeightingMixin, TokenWeightingTrainer
from megatron_tw.integrations.huggingface.batches import Rows
from megatron_tw.integrations.huggingface.head import output_head, token_nll
from megatron_tw.integrations.huggingface.trainer import _check_arguments

ROWS = torch.from_numpy(reference_rows())
DATA = Examples([{"input_ids": row, "labels": row} for row in ROWS[:2]])


def labels_of(rows: torch.Tensor) -> torch.Tensor:
    """Shifted, the first ten targets and the last position masked."""
    labels = nn.functional.pad(rows[:, 1:], (0, 1), value=-100).clone()
    labels[:, :10] = -100
    return labels


def tiny_model(kind: str, folder: Any, **changes: Any) -> Any:
    """A random model: of a family of tests/tiny.py, or of any that transformers knows."""
    if kind in ("llama", "mistral", "qwen2", "qwen3", "phi"):
        folder = make_folder(kind, folder / kind, **changes)
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    shapes: dict[str, dict[str, Any]] = {
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256, "bos_token_id": BOS},
        "opt": {"hidden_size": 32, "word_embed_proj_dim": 16, "ffn_dim": 32},
        "gpt_neox": {"rotary_pct": 0.5},
        "mamba": {"state_size": 4},
        "bert": {"is_decoder": True},
    }
    shape = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
             "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256,
             "pad_token_id": 0, "bos_token_id": BOS, "eos_token_id": 2}  # fmt: skip
    if kind == "gpt2":
        shape = {"vocab_size": VOCAB}
    config = transformers.AutoConfig.for_model(kind, **{**shape, **shapes.get(kind, {}), **changes})
    torch.manual_seed(1)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("mistral", {"sliding_window": 16}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("phi", {}),
        ("gpt2", {}),
        ("opt", {}),
        ("gpt_neox", {}),
        ("mamba", {}),
        ("bert", {}),
    ],
)
def test_nll_and_gradients_are_those_of_the_logits(kind, changes, tmp_path):
    """Tied embeddings, a head with bias, sliding windows, a projection before the head, a transform in it."""
    model = tiny_model(kind, tmp_path, **changes)
    rows = ROWS[:2, :64]
    labels, inputs = labels_of(rows), {"input_ids": rows, "use_cache": False}
    weights = torch.rand(rows.shape, generator=torch.Generator().manual_seed(0)).round(decimals=1)

    def gradients(nll: torch.Tensor) -> dict[str, torch.Tensor]:
        model.zero_grad()
        (weights * nll).sum().backward()
        return {
            name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
        }

    logits = model(**inputs).logits
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    expected_gradients = gradients(expected)
    nll = token_nll(model, output_head(model), labels, inputs, check_output=True)
    torch.testing.assert_close(nll, expected, rtol=1e-4, atol=1e-5)
    for name, gradient in gradients(nll).items():
        scale = float(expected_gradients[name].abs().max())
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=0, atol=1e-5 * max(1.0, scale), msg=name)
    assert torch.equal(model(**inputs).logits, logits), "the model is as it was"


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("gemma2", {}, "final_logit_softcapping=30.0"),
        ("cohere", {}, "logit_scale=0.0625"),
        ("granite", {"logits_scaling": 8.0}, "logits_scaling=8.0"),
        ("mixtral", {"output_router_logits": True, "num_local_experts": 2}, "output_router_logits=True"),
    ],
)
def test_models_that_change_their_logits_are_refused_by_name(kind, changes, message, tmp_path):
    with pytest.raises(ValueError, match=f"model: .*{message}"):
        TokenWeightingTrainer(
            model=tiny_model(kind, tmp_path, **changes), args=arguments(tmp_path), token_weighting=DENSE
        )


class Scaled(transformers.LlamaForCausalLM):
    """Halves its logits, and no config says so."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits / 2
        return outputs


class TwoCalls(transformers.LlamaForCausalLM):
    """Predicts the last token a second time."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        super().forward(*args, **kwargs)
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize(("kind", "message"), [(Scaled, "changes its logits after"), (TwoCalls, "called it 2 times")])
def test_an_output_that_is_not_the_heads_is_seen_in_the_first_step(kind, message, tmp_path):
    model = kind(load_tiny_llama().config)
    args = arguments(tmp_path, remove_unused_columns=False)  # the Trainer knows no column of a forward of this kind
    trainer = TokenWeightingTrainer(model=model, args=args, train_dataset=DATA, token_weighting=DENSE)
    before = model.lm_head.weight.detach().clone()
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert torch.equal(model.lm_head.weight, before)
    assert "forward" not in vars(model.lm_head)


def test_a_first_micro_batch_without_labels_hides_nothing(tmp_path):
    """Its NLLs are 0, and half of 0 is 0."""
    masked = {"input_ids": ROWS[0], "labels": torch.full_like(ROWS[0], -100)}
    args = arguments(tmp_path, remove_unused_columns=False, gradient_accumulation_steps=2)
    data = Examples([masked, DATA[1]])
    trainer = TokenWeightingTrainer(
        model=Scaled(load_tiny_llama().config), args=args, train_dataset=data, token_weighting=DENSE
    )
    with pytest.raises(ValueError, match="changes its logits after"):
        trainer.train()


class TakesNoCount(transformers.LlamaForCausalLM):
    """Like many models that come with their own code: no **kwargs, so no count of targets from the Trainer."""

    def forward(self, input_ids: Any, attention_mask: Any = None, labels: Any = None, use_cache: Any = None) -> Any:
        return super().forward(input_ids, attention_mask=attention_mask, labels=labels, use_cache=use_cache)


def test_models_that_take_no_count_accumulate_alike(tmp_path):
    logs = []
    for kind in (transformers.LlamaForCausalLM, TakesNoCount):
        trainer = TokenWeightingTrainer(
            model=kind.from_pretrained(TINY_LLAMA, dtype=torch.float32),
            args=arguments(tmp_path, gradient_accumulation_steps=2),
            train_dataset=DATA,
            token_weighting=DENSE,
        )
        takes_count = trainer.model_accepts_loss_kwargs
        trainer.train()
        assert trainer.model_accepts_loss_kwargs == takes_count == (kind is not TakesNoCount)
        logs.append(logs_of(trainer))
    for name in ("loss", "grad_norm"):
        assert logs[1][name] == pytest.approx(logs[0][name], rel=1e-6), name


def test_families_whose_config_knows_no_bos(tmp_path):
    shape: dict[str, Any] = {"d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32}
    model = transformers.PegasusForCausalLM(
        transformers.PegasusConfig(vocab_size=VOCAB, max_position_embeddings=256, **shape)
    )
    assert not hasattr(model.config, "bos_token_id")
    trainer = TokenWeightingTrainer(model=model, args=arguments(tmp_path), train_dataset=DATA, token_weighting=DENSE)
    trainer.train()
    assert logs_of(trainer)["weight_std"][0] > 0


class OwnHead(nn.Linear):
    pass


def with_own_head() -> Any:
    model = load_tiny_llama()
    model.lm_head = OwnHead(64, VOCAB)
    return model


def with_encoder() -> Any:
    shape: dict[str, Any] = {"d_model": 32, "d_ff": 32, "d_kv": 16, "num_layers": 1, "num_heads": 2}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=VOCAB, **shape))


def with_masked_words() -> Any:
    shape: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    return transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=VOCAB, **shape))


def frozen_by(scorer: Any) -> TokenWeightingConfig:
    return TokenWeightingConfig(scorer="frozen", scorer_hf=scorer, short_window=64)


ARGUMENTS: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("liger", {"use_liger_kernel": True}, {}, "use_liger_kernel: expected it off"),
    ("compile", {"torch_compile": True}, {}, "torch_compile: expected it off"),
    ("smoothing", {"label_smoothing_factor": 0.1}, {}, "label_smoothing_factor: expected it off"),
    ("loss function", {}, {"compute_loss_func": lambda *_, **__: 0}, "compute_loss_func: expected None"),
    ("no settings", {}, {"token_weighting": None}, "token_weighting: expected a TokenWeightingConfig"),
    ("a name as settings", {}, {"token_weighting": "dense"}, "token_weighting: expected a TokenWeightingConfig"),
    ("own head", {}, {"model": with_own_head}, r"model: expected a torch\.nn\.Linear .* got OwnHead"),
    (
        "no head",
        {},
        {"model": lambda: transformers.LlamaForSequenceClassification(load_tiny_llama().config)},
        "model: expected a causal language model with an output projection",
    ),
    (
        "encoder and decoder",
        {},
        {"model": with_encoder},
        "model: expected a causal language model, .* got T5ForConditionalGeneration",
    ),
    (
        "masked words",
        {},
        {"model": with_masked_words},
        "model: expected a causal language model, .* got BertForMaskedLM",
    ),
    (
        "scorer with other logits",
        {},
        {"token_weighting": lambda: frozen_by(tiny_model("granite", None, logits_scaling=8.0))},
        "scorer_hf: GraniteForCausalLM changes its logits",
    ),
    (
        "scorer without weights",
        {},
        {"token_weighting": lambda: frozen_by(load_tiny_llama().to("meta"))},
        "scorer_hf: expected a model with its weights, got one on the device meta",
    ),
    (
        "columns dropped",
        {},
        {"token_weighting": TokenWeightingConfig(scorer="column")},
        "remove_unused_columns: expected False with scorer='column'",
    ),
    (
        "scorer too short",
        {},
        {"token_weighting": TokenWeightingConfig(scorer="frozen", scorer_hf=str(TINY_LLAMA), short_window=512)},
        "short_window: expected at most 256, the context of the scorer",
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "options", "message"), [case[1:] for case in ARGUMENTS], ids=[c[0] for c in ARGUMENTS]
)
def test_arguments_that_do_not_go_together(changes, options, message, tmp_path):
    options = {"token_weighting": DENSE, **options}
    model = options.pop("model", load_tiny_llama)()
    if callable(options["token_weighting"]):
        options["token_weighting"] = options["token_weighting"]()
    with pytest.raises(ValueError, match=message):
        TokenWeightingTrainer(model=model, args=arguments(tmp_path, **changes), **options)


SETTINGS = [
    ({"weighting": "dens"}, "weighting: expected one of uniform, dense"),
    ({"weighting": 3}, "weighting: expected a name or a scheme, got int"),
    ({"weighting_parameters": {"sparsification": 0.2}}, "sparsification: .*dense takes interpolation"),
    ({"weighting_parameters": {"interpolation": 2.0}}, "interpolation: expected a finite number"),
    ({"weighting_schedule": "5: dense"}, "weighting_schedule: expected the first stage at step 0"),
    ({"scorer": "ema"}, "scorer: expected one of unfrozen, frozen, column, got 'ema'"),
    ({"scorer": "frozen"}, "scorer_hf: expected a model with scorer='frozen', got NoneType"),
    ({"scorer_hf": "x"}, "scorer_hf: expected None with scorer='unfrozen', got x"),
    ({"short_window": None}, "short_window: expected the tokens of a short context"),
    ({"short_window": 1}, "short_window: expected 2 to"),
    ({"short_stride": 64}, "short_stride: expected at most 48, got 64"),
    ({"scoring_micro_batch": 0}, "scoring_micro_batch: expected at least 1, got 0|scoring_micro_batch"),
]


@pytest.mark.parametrize(("settings", "message"), SETTINGS, ids=[message.split(":")[0] for _, message in SETTINGS])
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        TokenWeightingConfig(**{"short_window": 64, **settings})


IDS = ROWS[:2, :8]
BATCHES = [
    ({"input_ids": IDS}, "labels: expected .rows, tokens. in every batch, got NoneType"),
    ({"inputs_embeds": IDS.float(), "labels": IDS}, "input_ids: expected .rows, tokens."),
    ({"input_ids": IDS, "labels": IDS[:, 1:]}, "labels: expected the shape of input_ids .2, 8., got .2, 7."),
    ({"input_ids": IDS, "labels": IDS, "attention_mask": IDS.new_ones(2, 1, 8, 8)}, "attention_mask: expected .2, 8."),
    (
        {"input_ids": IDS, "labels": IDS, "attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1]] * 2)},
        "attention_mask: expected ones and then zeros",
    ),
    ({"input_ids": IDS, "labels": IDS, "cu_seq_lens_q": IDS[0]}, "cu_seq_lens_q: expected rows that hold one"),
    ({"input_ids": IDS, "labels": IDS, "short_nll": torch.zeros(2, 7)}, "short_nll: expected .2, 8."),
]


@pytest.mark.parametrize(("batch", "message"), BATCHES, ids=[message[:24] for _, message in BATCHES])
def test_batches_that_are_no_rows(batch, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        Rows.of_batch(batch, torch.device("cpu"))


@pytest.mark.parametrize(
    ("examples", "config", "message"),
    [
        (DATA, TokenWeightingConfig(short_window=256), "short_window: expected less than the 256 tokens of a row"),
        (DATA, TokenWeightingConfig(weighting="exact"), "tau: expected less than the 256 tokens of a row, got 1024"),
        (
            Examples([{**DATA[0], "position_ids": torch.arange(256) % 128}]),
            DENSE,
            "position_ids: expected 0, 1, 2, ... in every row",
        ),
    ],
)  # fmt: skip
def test_rows_that_the_settings_are_not_for(examples, config, message, tmp_path):
    trainer = TokenWeightingTrainer(
        model=load_tiny_llama(), args=arguments(tmp_path), train_dataset=examples, token_weighting=config
    )
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_a_device_without_float64_is_refused():
    args: Any = SimpleNamespace(device=torch.device("mps"), n_gpu=1, remove_unused_columns=True)
    with pytest.raises(ValueError, match="use_cpu: expected True here"):
        _check_arguments(args, DENSE)


def test_the_model_in_training_is_no_frozen_scorer(tmp_path):
    model = load_tiny_llama()
    with pytest.raises(ValueError, match="scorer_hf: expected another model than the one in training"):
        TokenWeightingTrainer(model=model, args=arguments(tmp_path), token_weighting=frozen_by(model))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_frozen_scorer_is_whole_on_every_process_under_fsdp(monkeypatch, tmp_path):
    """Where accelerate's FSDP asks for it, some versions of transformers load weights on the first process alone."""
    asked, load = [], transformers.AutoModelForCausalLM.from_pretrained

    def seen(*args: Any, **kwargs: Any) -> Any:
        asked.append(os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"])
        return load(*args, **kwargs)

    model = load_tiny_llama()
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", seen)
    config = TokenWeightingConfig(scorer="frozen", scorer_hf=str(TINY_LLAMA), short_window=64)
    TokenWeightingTrainer(model=model, args=arguments(tmp_path), token_weighting=config)
    assert asked == ["false"]
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "true"


def padded_with_labels() -> dict[str, torch.Tensor]:
    """As tokenizers pad, with labels that are a copy of the ids."""
    mask = (torch.arange(256) < 200).long()
    ids = torch.where(mask.bool(), ROWS[0], 0)
    return {"input_ids": ids, "labels": ids, "attention_mask": mask}


def test_padding_with_labels_is_refused_where_it_would_be_scored(tmp_path):
    data = Examples([padded_with_labels()])

    def run(config: TokenWeightingConfig, data: Examples = data) -> None:
        args = arguments(tmp_path, remove_unused_columns=False)
        trainer = TokenWeightingTrainer(model=load_tiny_llama(), args=args, train_dataset=data, token_weighting=config)
        trainer.train()

    with pytest.raises(ValueError, match="labels: expected -100 at padding"):
        run(DENSE)
    run(TokenWeightingConfig(weighting="uniform"))
    run(TokenWeightingConfig(scorer="column"), Examples([{**data[0], "short_nll": torch.ones(256)}]))


def test_a_column_that_is_missing(tmp_path):
    config = TokenWeightingConfig(scorer="column")
    args = arguments(tmp_path, remove_unused_columns=False)
    trainer = TokenWeightingTrainer(model=load_tiny_llama(), args=args, train_dataset=DATA, token_weighting=config)
    with pytest.raises(ValueError, match="short_nll: expected this column"):
        trainer.train()


def test_a_nan_stops_the_run_before_the_update(tmp_path):
    model = load_tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[7] = torch.nan
    before = model.lm_head.weight.detach().clone()
    trainer = TokenWeightingTrainer(model=model, args=arguments(tmp_path), train_dataset=DATA, token_weighting=DENSE)
    with pytest.raises(ValueError, match="NLL: 255 targets of step 1 are NaN or infinite; no update was made"):
        trainer.train()
    assert torch.equal(model.lm_head.weight.nan_to_num(), before.nan_to_num())


def test_names_of_rows_do_not_change_with_padding():
    batch = collate_right_padded([{"input_ids": ROWS[row, :length], "labels": ROWS[row, :length]}
                                  for row, length in ((0, 100), (1, 256))])  # fmt: skip
    padded = Rows.of_batch(batch, torch.device("cpu")).row_ids
    alone = Rows.of_batch({"input_ids": ROWS[:1, :100], "labels": ROWS[:1, :100]}, torch.device("cpu")).row_ids
    assert padded[0] == alone[0] != padded[1]
    other = ROWS[:1, :100].flip(1)  # the same tokens in another order
    assert Rows.of_batch({"input_ids": other, "labels": other}, torch.device("cpu")).row_ids != alone


# ---- memory


def peak_of_a_step(trainer: type[transformers.Trainer], output: Any, **options: Any) -> tuple[int, float]:
    """Bytes that a step holds at most beyond what was there before it, and its loss."""
    config = transformers.LlamaConfig(
        vocab_size=8192,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=1,
    )
    torch.manual_seed(0)
    ids = torch.randint(3, 8192, (2048,))
    made = trainer(
        model=transformers.LlamaForCausalLM(config),
        args=arguments(output, max_steps=1, **options.pop("changes", {})),
        train_dataset=Examples([{"input_ids": ids, "labels": ids}]),
        **options,
    )
    with AllocatedBytes() as allocated:
        made.train()
    return allocated.peak, float(logs_of(made)["loss"][0])


def test_logits_never_exist(tmp_path):
    logits = 2048 * 8192 * 4
    weighted = {"token_weighting": TokenWeightingConfig(weighting="dense", short_window=512)}
    stock, _ = peak_of_a_step(transformers.Trainer, tmp_path)
    ours, loss = peak_of_a_step(TokenWeightingTrainer, tmp_path, **weighted)
    again, same_loss = peak_of_a_step(
        TokenWeightingTrainer, tmp_path, **weighted, changes={"activation_checkpointing": True}
    )
    assert stock > 2 * logits
    assert ours < logits / 2
    assert again < ours
    assert same_loss == pytest.approx(loss, rel=1e-6)


# ---- what is built on the Trainer


def test_settings_in_the_class(tmp_path):
    """As axolotl needs them, which makes the trainer itself."""

    class Weighted(TokenWeightingMixin, transformers.Trainer):
        token_weighting = DENSE

    trainer = Weighted(load_tiny_llama(), arguments(tmp_path, max_steps=1), train_dataset=DATA)
    trainer.train()
    assert logs_of(trainer)["weight_std"][0] > 0


@pytest.mark.parametrize("modules_to_save", [None, ["lm_head"]])
def test_lora(modules_to_save, tmp_path):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=modules_to_save)
    logs = []
    for model in (load_tiny_llama(), peft.get_peft_model(load_tiny_llama(), lora)):
        trainer = TokenWeightingTrainer(
            model=model, args=arguments(tmp_path), train_dataset=DATA, token_weighting=DENSE
        )
        trainer.train()
        logs.append(logs_of(trainer))
    assert logs[1]["loss"][0] == pytest.approx(logs[0]["loss"][0], rel=1e-6)
    assert 0 < logs[1]["grad_norm"][0] < logs[0]["grad_norm"][0], "adapters train, and they alone"
    head = model.get_base_model().lm_head
    assert any(parameter.requires_grad for parameter in head.parameters()) == (modules_to_save is not None)


def test_lora_on_the_head_is_refused(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(load_tiny_llama(), peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ValueError, match="leave it out of LoRA"):
        TokenWeightingTrainer(model=model, args=arguments(tmp_path), token_weighting=DENSE)


def test_the_sft_trainer_of_trl(tmp_path):
    """Its own fused loss is not asked; its collator pads on the right."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    add_tokenizer(tmp_path / "tokenizer")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer", pad_token="<pad>")
    rows = [ROWS[0], ROWS[1, :100]]
    settings: dict[str, Any] = {"per_device_train_batch_size": 2}

    class WeightedSFTTrainer(TokenWeightingMixin, trl.SFTTrainer):  # type: ignore[name-defined]
        pass

    plain = TokenWeightingTrainer(
        model=load_tiny_llama(),
        args=arguments(tmp_path, **settings),
        train_dataset=Examples([{"input_ids": row, "labels": row} for row in rows]),
        data_collator=collate_right_padded,
        token_weighting=DENSE,
    )
    sft = WeightedSFTTrainer(
        model=load_tiny_llama(),
        args=arguments(tmp_path, kind=trl.SFTConfig, bf16=False, **settings),
        train_dataset=datasets.Dataset.from_list([{"input_ids": row.tolist()} for row in rows]),
        eval_dataset=datasets.Dataset.from_list([{"input_ids": row.tolist()} for row in rows]),
        processing_class=tokenizer,
        token_weighting=DENSE,
    )
    for trainer in (plain, sft):
        trainer.train()
    for name in ("loss", "weight_std", "grad_norm"):
        assert logs_of(sft)[name] == pytest.approx(logs_of(plain)[name], rel=1e-6), name
    assert sft.evaluate()["eval_loss"] > 0
    for changes, message in (
        ({"packing": True}, "packing: expected rows"),
        ({"loss_type": "dft"}, "loss_type: expected"),
    ):
        args = arguments(tmp_path, kind=trl.SFTConfig, bf16=False, **changes)
        with pytest.raises(ValueError, match=message):
            WeightedSFTTrainer(model=load_tiny_llama(), args=args, train_dataset=DATA, token_weighting=DENSE)
