"""An lm_eval model over a parallel model: log-likelihood requests by forward passes under TP x PP x CP, dealt out to
the data-parallel replicas.

lm_eval runs on every rank, each time as rank 0 of a world of 1: with a larger world it would call collectives of its
own on the model. All ranks make the same requests in the same order and get the same answers.
"""

from pathlib import Path
from typing import Any

from megatron_tw.evaluation.harness.sequences import as_sequence, rolling_targets, score_sequences
from megatron_tw.evaluation.tasks import Model


def parallel_lm(model: Model, tokenizer_folder: Path, *, max_length: int, name: str) -> Any:
    """An `lm_eval.api.model.TemplateLM` whose requests every rank must make alike.

    max_length: tokens that go into the model at most; longer requests lose their beginning, as with lm_eval's own
    models. name: under which finished passes are kept.
    """
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    from transformers import AutoTokenizer

    class ParallelLM(TemplateLM):
        """See the module."""

        def __init__(self) -> None:
            super().__init__()
            self.tokenizer: Any = AutoTokenizer.from_pretrained(str(tokenizer_folder), local_files_only=True)
            self.max_length = max_length
            self.batch_size = model.config.evaluation.micro_batch_size

        @property
        def rank(self) -> int:
            return 0

        @property
        def world_size(self) -> int:
            return 1

        @property
        def eot_token_id(self) -> int:
            return int(self.tokenizer.eos_token_id)

        @property
        def prefix_token_id(self) -> int:
            bos = self.tokenizer.bos_token_id
            return int(bos) if bos is not None else self.eot_token_id

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            # A text that begins with BOS already gets no second one.
            if add_special_tokens is None and string.startswith(self.tokenizer.decode(self.prefix_token_id)):
                add_special_tokens = False
            special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
            ids: list[int] = self.tokenizer.encode(string, verbose=False, **special)
            return ids

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            sequences = [as_sequence(request, max_length) for request in requests]
            found, greedy = score_sequences(model, sequences, what=name, name=name)
            return list(zip(found.tolist(), greedy.tolist(), strict=True))

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            """Of whole texts: in windows that share one token, each token scored once."""
            sequences, windows_of = [], []
            for (text,) in (request.args for request in requests):
                cut = get_rolling_token_windows(
                    self.tok_encode(text), prefix_token=self.prefix_token_id, max_seq_len=max_length, context_len=1
                )
                windows = rolling_targets([make_disjoint_window(window) for window in cut])
                sequences += windows
                windows_of.append(len(windows))
            found, _ = score_sequences(model, sequences, what=name, name=f"{name}-rolling")
            parts = iter(found.tolist())
            return [sum(next(parts) for _ in range(count)) for count in windows_of]

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            raise ValueError(refusal(model))

    return ParallelLM()


def refusal(model: Model) -> str:
    """Why nothing is generated here, and what to do."""
    return (
        f"{model.source.name}: a parallel model scores and does not generate; export it with "
        "tools/convert_checkpoint.py --load RUN --save-hf DIR, and evaluate with --load-hf DIR"
    )
