"""One evaluation as text."""

from pathlib import Path

from megatron_tw.evaluation.compare import compare
from megatron_tw.evaluation.key_tokens import choose_key_tokens
from megatron_tw.evaluation.position import mean_nll, nll_by_position, position_edges
from megatron_tw.evaluation.result import EvaluationResult


def summarize(result: EvaluationResult, name: str, key_tokens: str | None) -> str:
    """NLL overall, by position bucket, and on key tokens: those of the evaluation in folder `key_tokens`, else the
    model's own."""
    mean = mean_nll(result.long_nll, result.valid)
    lines = [f"{name}: {len(result.row_index)} rows of {result.header.seq_length} tokens, NLL {mean:.4f}"]
    edges = position_edges(result.header.seq_length, old_context=result.header.known_context)
    for bucket in nll_by_position(result.long_nll, result.valid, edges):
        figure = "no target" if bucket.nll is None else f"{bucket.nll:.4f}"
        lines.append(f"  positions {bucket.first:>7} - {bucket.last:<7} {figure}")
    if key_tokens is not None or result.short_nll is not None:
        source = EvaluationResult.load(key_tokens) if key_tokens is not None else result
        key = choose_key_tokens(source, Path(key_tokens).name if key_tokens is not None else name)
        model = compare({name: result}, key).models[0]
        assert model.key is not None
        nll = "not a single one" if model.key.nll is None else f"NLL {model.key.nll:.4f}"
        lines.append(f"  key tokens: {nll} ({key.describe()})")
    return "\n".join(lines)
