"""What a report is made of, read and checked before anything is drawn."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_tw.data.rows import TokenRows
from megatron_tw.data.rows_format import TOKENIZER_DIR
from megatron_tw.data.tokenizer import load_tokenizer
from megatron_tw.evaluation.compare import Comparison, compare
from megatron_tw.evaluation.key_tokens import KeyTokens
from megatron_tw.evaluation.report.benchmarks import SAMPLES_FILE, Sample, read_samples
from megatron_tw.evaluation.report.recall import Answers, RecallComparison, compare_recall
from megatron_tw.evaluation.report.text import Row
from megatron_tw.evaluation.result import HEADER_FILE, EvaluationResult
from megatron_tw.evaluation.results import JSON_FILE, Record, Results

if TYPE_CHECKING:
    from megatron_tw.weighting import Scheme


@dataclass(frozen=True, kw_only=True)
class Evaluations:
    """Of all models, by their names in the order of the tables. A folder may lack any of them, not all."""

    folders: Mapping[str, Path]
    results: Mapping[str, EvaluationResult]
    """The loss of every target."""
    benchmarks: Mapping[str, Results]
    samples: Mapping[str, Sequence[Sample]]
    """Of RULER."""

    @property
    def records(self) -> dict[str, tuple[Record, ...]]:
        return {name: results.records for name, results in self.benchmarks.items()}

    def same_examples(self, one: str, other: str) -> bool:
        """Whether two models were given the same prompts of RULER: made with one tokenizer and the same options."""
        ours, theirs = self.benchmarks[one], self.benchmarks[other]
        made = [{key: value for key, value in of.settings.items() if "ruler" in key} for of in (ours, theirs)]
        same_tokenizer = ours.tokenizer_fingerprint == theirs.tokenizer_fingerprint
        return same_tokenizer and ours.tokenizer_fingerprint is not None and made[0] == made[1]

    @staticmethod
    def read(folders: Mapping[str, Path]) -> "Evaluations":
        """Raises ValueError for a folder without an evaluation, or with one that is damaged."""
        results, benchmarks, samples = {}, {}, {}
        for name, folder in folders.items():
            has_results = (folder / JSON_FILE).is_file()
            if (folder / HEADER_FILE).is_file() or not has_results:
                results[name] = EvaluationResult.load(folder)
            if has_results:
                benchmarks[name] = Results.load(folder)
            if (folder / SAMPLES_FILE).is_file():
                samples[name] = read_samples(folder / SAMPLES_FILE)
        return Evaluations(folders=folders, results=results, benchmarks=benchmarks, samples=samples)


@dataclass(frozen=True, kw_only=True)
class Shown:
    """Everything that a report shows; None and empty: that section is left out."""

    title: str
    evaluations: Evaluations
    reference: str
    base: str | None = None
    """The model before the extension, if it is among them."""
    comparison: Comparison | None = None
    recall: RecallComparison | None = None
    schemes: "Mapping[str, Scheme]" = field(default_factory=dict)
    weighed: str | None = None
    """The model whose scores make the weights that are shown."""
    row: int | None = None
    """Index in its evaluation of the row whose text is shown."""
    text: Row | None = None
    gain: float
    max_long_nll: float | None
    metrics: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    options: Mapping[str, str] = field(default_factory=dict)
    """The resolved options of training runs, by the runs' names."""
    commands: str | None = None
    """What was run, as text."""

    def reference_among(self, names: Sequence[str]) -> str:
        """The model that others are compared to where only these have figures."""
        return self.reference if self.reference in names else names[0]


def choose_reference(evaluations: Evaluations, reference: str | None, base: str | None) -> str:
    """The name of the model that others are compared to: `reference`, else "uniform" if there is one, else the first.

    Raises:
        ValueError: no model of that name.
    """
    names = list(evaluations.folders)
    for option, name in (("--reference", reference), ("--base", base)):
        if name is not None and name not in names:
            raise ValueError(f"{option} {name}: expected one of {', '.join(names)}")
    return reference or ("uniform" if "uniform" in names else names[0])


def compare_losses(
    evaluations: Evaluations, key: KeyTokens | None, *, reference: str, base: str | None, old_context: int | None
) -> Comparison | None:
    """None: no model's loss was evaluated. Raises ValueError as `compare` does."""
    results = evaluations.results
    if not results:
        return None
    if reference not in results:
        reference = next(iter(results))
    return compare(results, key, old_context=old_context, reference=reference, base=base if base in results else None)


def read_recall(file: Path | None, evaluations: Evaluations, comparison: Comparison | None) -> RecallComparison | None:
    """Raises ValueError for answers that do not fit, or where no loss was evaluated."""
    if file is None:
        return None
    if comparison is None:
        raise ValueError(f"--answers {file}: expected an evaluation with the loss of every target, got none")
    answers = Answers.load(file).within(evaluations.results[comparison.reference], file)
    return compare_recall(
        evaluations.results, answers, reference=comparison.reference, old_context=comparison.old_context
    )


def read_row(folder: Path, result: EvaluationResult, index: int) -> Row:
    """The text of a row of the dataset that was evaluated; of packed rows, of a document.

    Raises:
        ValueError: another dataset, or one without a tokenizer.
    """
    rows = TokenRows(folder)
    if rows.header.fingerprint != result.header.data_fingerprint:
        raise ValueError(f"--rows {folder}: not the rows that were evaluated (another data fingerprint)")
    if rows.header.tokenizer is None:
        raise ValueError(f"--rows {folder}: made from ready ids: without a tokenizer there is no text to show")
    tokenizer = load_tokenizer(folder / TOKENIZER_DIR)
    if rows.header.packing is None:
        return Row.of(rows[int(result.row_index[index])].tolist(), tokenizer)
    row, start = divmod(int(result.row_index[index]), rows.header.seq_length)  # the document: RowTargets.names
    read = rows.read(row)
    assert read.documents is not None
    tokens = int(dict(read.documents.tolist())[start])
    return Row.of(read.tokens[start : start + tokens].tolist(), tokenizer)


def row_number(result: EvaluationResult, row: int) -> int:
    """Index in the evaluation of a row of the dataset. Raises ValueError where it was not evaluated."""
    found = (result.row_index == row).nonzero()[0]
    if not len(found):
        first, last = int(result.row_index.min()), int(result.row_index.max())
        raise ValueError(f"--heat-map-row: expected an evaluated row ({first} to {last}), got {row}")
    return int(found[0])
