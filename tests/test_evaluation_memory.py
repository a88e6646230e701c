"""Evaluating a row never holds logits of more than a chunk of it: counted, and seen in the peak of memory."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluations import run_evaluation
from tiny import BOS, make_folder, prepare_ready_rows
from torch import Tensor
from watched import Watch

N, CHUNK, VOCAB = 1024, 64, 4096
ROW_OF_LOGITS = N * VOCAB * 4


class WatchLogits(Watch):
    """logits: tokens of the largest tensor whose last dimension is the vocabulary."""

    logits = 0

    def see(self, tensor: Tensor) -> None:
        super().see(tensor)
        if tensor.dim() > 1 and tensor.shape[-1] == VOCAB:
            self.logits = max(self.logits, tensor.numel() // VOCAB)


def evaluated(options: Sequence[str]) -> dict[str, Any]:
    """On a rank: what an evaluation held."""
    with WatchLogits() as watch:
        run_evaluation(options)
    return {"logits": watch.logits, "peak": watch.peak[0]}


def test_never_more_logits_than_a_chunk(ranks, tmp_path: Path) -> None:
    model = make_folder(
        "llama", tmp_path / "model", vocab_size=VOCAB, max_position_embeddings=N, num_hidden_layers=1, hidden_size=32,
        head_dim=8,
    )  # fmt: skip
    ids_RN = np.random.default_rng(0).integers(3, VOCAB, size=(2, N))
    ids_RN[:, 0] = BOS
    rows = prepare_ready_rows(ids_RN, tmp_path / "rows", vocab_size=VOCAB)
    options = [
        "--tasks=loss,longppl", f"--load-hf={model}", f"--data-path={rows}", f"--seq-length={N}",
        "--short-window=256", "--longppl-context=256", "--longppl-stride=128", "--micro-batch-size=2",
        f"--loss-chunk-tokens={CHUNK}", f"--output={tmp_path / 'out'}",
    ]  # fmt: skip
    (held,) = ranks(1).run(evaluated, options)
    assert held["logits"] == CHUNK
    assert held["peak"] < ROW_OF_LOGITS / 2


def test_prompts_need_no_more(ranks, tmp_path: Path) -> None:
    """RULER's exactness, and tasks of the harness by log-likelihoods."""
    pytest.importorskip("lm_eval")
    from test_harness import make_word_model
    from test_harness_suites import make_data

    model = make_word_model(
        tmp_path / "model", vocab_size=VOCAB, max_position_embeddings=N, num_hidden_layers=1, hidden_size=32, head_dim=8
    )
    options = [
        "--tasks=niah_single_1,longbench2", f"--load-hf={model}", f"--ruler-lengths={N}", "--ruler-samples=2",
        f"--eval-data={make_data(tmp_path / 'data')}", "--eval-limit=1", f"--loss-chunk-tokens={CHUNK}",
        f"--output={tmp_path / 'out'}",
    ]  # fmt: skip
    (held,) = ranks(1).run(evaluated, options)
    assert 0 < held["logits"] <= CHUNK
    assert held["peak"] < ROW_OF_LOGITS / 2
