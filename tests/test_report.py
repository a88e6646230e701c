"""The report: its figures against hand-checked numbers, its text, its sections, and the page in a real browser."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from browser import browser_page, find_browser
from report_inputs import LENGTHS, MODELS, WORD, make_inputs, report_options
from test_data_tokenizer import train_hugging_face, train_sentencepiece
from test_evaluation import result

from megatron_tw.data.tokenizer import load_tokenizer
from megatron_tw.evaluation.compare import Difference
from megatron_tw.evaluation.report.benchmark_sections import benchmark_section, ruler_section
from megatron_tw.evaluation.report.benchmarks import (
    Sample,
    average,
    needle_map,
    read_samples,
    ruler_difference,
    ruler_tables,
    suite_scores,
)
from megatron_tw.evaluation.report.heat_map import choose_row
from megatron_tw.evaluation.report.inputs import Evaluations, Shown
from megatron_tw.evaluation.report.intervals import wilson
from megatron_tw.evaluation.report.page import FRAME
from megatron_tw.evaluation.report.recall import Answers, compare_recall
from megatron_tw.evaluation.report.text import Row, best_span, pieces_of
from megatron_tw.evaluation.report.verdict import Finding, headline, long_findings
from megatron_tw.evaluation.report.weights import parse_weighting, share_above, weight_figures, weights_of
from megatron_tw.evaluation.results import Record, Results
from tools import report

TEXT = f"class Δx:\n\tdef run(self_, {WORD}):\r\n        return 'é😀' + \"€\"  # \ufffd done\n"


@pytest.mark.parametrize("kind", ["huggingface", "sentencepiece"])
def test_tokens_of_one_character_are_one_piece(kind: str, tmp_path: Path) -> None:
    train = train_hugging_face if kind == "huggingface" else train_sentencepiece
    tokenizer = load_tokenizer(train(tmp_path))
    assert tokenizer.kind == kind
    assert tokenizer.bos_id is not None
    ids = [tokenizer.bos_id, *tokenizer.encode(TEXT)]
    assert len(ids) > 1.2 * len(pieces_of(ids, tokenizer))  # characters were in parts
    pieces = pieces_of(ids, tokenizer)
    assert pieces[0].text == "<s>"
    assert "".join(piece.text for piece in pieces[1:]) == TEXT
    assert [piece.first for piece in pieces[1:]] == [piece.last for piece in pieces[:-1]]
    assert pieces[-1].last == len(ids)
    several = {piece.text for piece in pieces if piece.last > piece.first + 1}
    assert {"🙂", "本", "😀"} <= {character for text in several for character in text}


class Letters:
    """A token a piece of text."""

    def __init__(self, *texts: str) -> None:
        self.texts = texts

    def decode(self, ids: object) -> str:
        return "".join(self.texts[i] for i in ids)  # type: ignore[attr-defined]


def test_where_a_word_stood_before() -> None:
    #        0     1    2        3         4    5    6   7    8    9         10        11  12
    texts = ("my", "_", "value", " = 1; ", "value", "s", "(", "a", ")", " my", "_value", ";", " value")
    row = Row.of(range(len(texts)), Letters(*texts))
    assert row.text == "".join(texts)
    assert row.seen_before(10) == 1  # of "my_value", the part after "my"
    assert row.seen_before(9) == 0
    assert row.seen_before(12) == 4  # "values" begins with it; "my_value" only ends with it
    assert row.seen_before(4) is None
    assert row.seen_before(11) is None  # no word
    assert row.seen_before(0) is None
    assert best_span([0, 1, 5, 1, 0, 4, 4, 0], 3) == (4, 7)
    assert best_span([1, 2], 5) == (0, 2)


def test_recall_is_of_whole_answers() -> None:
    top1 = np.array([[1, 1, 1, 0], [1, 0, 1, 1]], bool)
    long = np.array([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])
    uniform = result(long, rows=[4, 9])
    dense = result(long - 1, rows=[4, 9])
    object.__setattr__(uniform, "top1", top1)
    object.__setattr__(dense, "top1", np.ones_like(top1))
    answers = Answers(
        row=np.array([9, 4, 9, 7]), position=np.array([1, 3, 3, 1]), tokens=np.array([2, 2, 2, 1]),
        distance=np.array([2, 3, 9, 3]),
    ).within(uniform, Path("a.npz"))  # fmt: skip
    assert answers.row.tolist() == [1, 0, 1]  # row 7 was not evaluated
    found = compare_recall({"uniform": uniform, "dense": dense}, answers, reference="uniform", old_context=3)
    ours, theirs = found.models[1], found.models[0]
    assert [(b.first, b.last, b.answers, b.share) for b in theirs.buckets] == [
        (2, 2, 1, 0.0),
        (3, 3, 1, 0.0),
        (8, 15, 1, 1.0),
    ]
    assert [bucket.share for bucket in ours.buckets] == [1.0, 1.0, 1.0]
    assert theirs.far is not None
    assert (theirs.far.share, theirs.far.answers, theirs.far.nll) == (0.5, 2, (3 + 4 + 7 + 8) / 4)
    assert (theirs.far.low, theirs.far.high) == wilson(0.5, 2)
    assert ours.far is not None
    assert ours.far.difference is not None
    # Row 0: 1 more of 1; row 1: 0 more of 1. Mean 1/2, residuals 1/2 and -1/2: sqrt(2 * 1/2) / 2.
    assert (ours.far.difference.mean, ours.far.difference.standard_error) == (0.5, 0.5)
    assert ours.other.nll == (0 + 1) / 2  # row 0, targets 0 and 1; all others are answers
    assert ours.other.difference is not None
    assert ours.other.difference.mean == -1.0


def test_wrong_answers_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "answers.npz"
    good = {name: np.array([1, 2]) for name in ("row", "position", "tokens", "distance")}
    for change, match in (
        ({"row": np.array([1.0, 2.0])}, r"row: expected integers \[2\], got float64 \[2\]"),
        ({"tokens": np.array([1])}, r"tokens: expected integers \[2\], got int64 \[1\]"),
        ({"position": np.array([0, 1])}, "position: expected 1 or more, got 0"),
    ):
        np.savez(file, allow_pickle=False, **{**good, **change})
        with pytest.raises(ValueError, match=match):
            Answers.load(file)
    np.savez(file, allow_pickle=False, **good)
    with pytest.raises(ValueError, match="an answer ends at 4 tokens, but rows have 3"):
        Answers.load(file).within(result([[1.0, 2.0]], rows=[1]), file)
    with pytest.raises(ValueError, match="no answer is in the rows that were evaluated"):
        Answers.load(file).within(result([[1.0, 2.0, 3.0]], rows=[5]), file)
    nll = [[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0]]
    evaluated = result(nll, nll, rows=[1, 2])
    evaluated.valid[0, 0] = False  # the answer in row 1
    assert Answers.load(file).within(evaluated, file).row.tolist() == [1]
    evaluated.valid[1, 2] = False  # the end of the one in row 2
    with pytest.raises(ValueError, match="every answer has a target that the rows' loss_mask leaves out"):
        Answers.load(file).within(evaluated, file)
    packed = replace(evaluated, header=replace(evaluated.header, packed=True))
    with pytest.raises(ValueError, match="expected an evaluation of rows of one document, got packed rows"):
        Answers.load(file).within(packed, file)
    exact = parse_weighting(["exact tau=1"])
    with pytest.raises(ValueError, match="takes whole rows, an evaluation of packed rows"):
        weights_of(packed, exact)


def record(
    task: str, value: float | None, *, length: int = 1024, stderr: float | None = None, **more: object
) -> Record:
    samples = 0 if value is None else 25
    return Record(suite="ruler", task=task, length=length, metric="exactness", value=value, stderr=stderr,
                  samples=samples, not_run=None if value is not None else "no text")  # fmt: skip


def test_ruler_averages_are_over_the_tasks_that_all_have() -> None:
    records = {
        "uniform": [record("vt", 0.5, stderr=0.3), record("cwe", 0.7, stderr=0.4), record("qa_1", None)],
        "dense": [record("vt", 0.9), record("qa_1", None)],
    }
    (table,) = ruler_tables(records)
    assert table.tasks == ("vt", "cwe", "qa_1")
    assert table.not_run == {"qa_1": "no text"}
    uniform, dense = average(table, "uniform"), average(table, "dense")
    assert uniform is not None
    assert dense is not None
    assert (uniform.value, uniform.stderr, uniform.tasks) == (0.5, 0.3, 1)  # without cwe, which dense has not
    assert dense.stderr == pytest.approx((0.9 * 0.1 / 25) ** 0.5)

    def samples(scores: list[float]) -> list[Sample]:
        return [Sample(task="vt", length=1024, index=i, depths=(), scores=(s,)) for i, s in enumerate(scores)]

    cwe = [Sample(task="cwe", length=1024, index=i, depths=(), scores=(1.0,)) for i in range(4)]
    found = ruler_difference(
        {"uniform": [*samples([0, 1, 0, 1]), *cwe], "dense": samples([1, 1, 1, 1])}, table, "dense", "uniform"
    )
    assert found is not None
    assert (found.mean, found.rows) == (0.5, 4)
    assert found.standard_error == pytest.approx((4 / 3 * 4 * 0.25) ** 0.5 / 4)  # of the pairs 1, 0, 1, 0
    assert ruler_difference({"dense": samples([1])}, table, "dense", "uniform") is None


def test_the_difference_is_that_of_the_averages() -> None:
    """Three models, of which the first has one task, and one length has more tasks than the other."""
    values = {  # by task and length: of base, uniform, dense
        ("vt", 1024): (0.5, 0.5, 0.75), ("cwe", 1024): (0.25, 0.25, 0.5), ("vt", 4096): (0.0, 0.25, 0.25),
        ("cwe", 4096): (None, 0.0, 1.0), ("fwe", 1024): (None, 0.0, 1.0), ("fwe", 512): (None, 0.0, 1.0),
    }  # fmt: skip
    records: dict[str, list[Record]] = {}
    samples: dict[str, list[Sample]] = {}
    for place, model in enumerate(("base", "uniform", "dense")):
        for (task, length), of_models in values.items():
            value = of_models[place]
            if value is not None:
                records.setdefault(model, []).append(record(task, value, length=length))
                samples.setdefault(model, []).extend(
                    Sample(task=task, length=length, index=i, depths=(), scores=(float(i < 4 * value),))
                    for i in range(4)
                )
    (table,) = ruler_tables(records)
    assert table.common == {1024: ("vt", "cwe"), 4096: ("vt",)}
    uniform, dense = average(table, "uniform"), average(table, "dense")
    assert uniform is not None
    assert dense is not None
    assert (uniform.value, dense.value, dense.samples) == ((0.375 + 0.25) / 2, (0.625 + 0.25) / 2, 75)
    found = ruler_difference(samples, table, "dense", "uniform")
    assert found is not None
    assert found.mean == pytest.approx(dense.value - uniform.value) == pytest.approx(0.125)
    assert found.rows == 12
    # One example in four differs in each task at 1,024, none at 4,096: sqrt(4/3 * 3/4) / 4 each.
    assert found.standard_error == pytest.approx(0.25 / 2**0.5 / 2)
    samples["dense"] = [one for one in samples["dense"] if one.task != "cwe"]
    assert ruler_difference(samples, table, "dense", "uniform") is None


def test_one_sample_has_no_standard_error() -> None:
    records = {
        name: [replace(record(f"task_{i}", value), samples=1) for i in range(40)]
        for name, value in (("uniform", 0.0), ("dense", 1.0))
    }
    (table,) = ruler_tables(records)
    score = average(table, "dense")
    assert score is not None
    assert (score.value, score.stderr, score.samples) == (1.0, None, 40)
    benchmarks = {
        name: Results(model=name, layout="", tokenizer_fingerprint=None, settings={}, records=tuple(of_model))
        for name, of_model in records.items()
    }
    shown = shown_with(benchmarks)
    (found,) = long_findings(shown)
    assert found.kind("dense") == "unclear"
    assert ruler_section(shown) is not None


def test_needles_are_counted_by_depth_and_length() -> None:
    samples = [
        Sample(task="niah_single_1", length=8, index=0, depths=(0.05, 0.97), scores=(1.0, 0.0)),
        Sample(task="niah_single_1", length=8, index=1, depths=(0.0, 1.0), scores=(0.5,)),  # one score for both
        Sample(task="niah_single_1", length=4, index=0, depths=(0.5,), scores=(1.0,)),
        Sample(task="vt", length=4, index=0, depths=(0.2,), scores=(0.0,)),  # no needle
    ]
    found = needle_map("x", samples)
    assert found is not None
    assert found.lengths == (4, 8)
    assert (found.shares[0], found.shares[5], found.shares[9]) == ((None, 0.75), (1.0, None), (None, 0.25))
    assert found.counts[0] == (0, 2)
    assert needle_map("x", samples[3:]) is None


def test_suites_have_their_overall_score_or_a_mean() -> None:
    def mmlu(task: str, value: float) -> Record:
        return Record(suite="mmlu", task=task, metric="acc", value=value, samples=10)

    assert suite_scores({"a": [mmlu("all", 0.3), mmlu("law", 0.9)]}, "mmlu")["a"].value == 0.3
    scores = suite_scores({"a": [mmlu("law", 0.2), mmlu("art", 0.4)], "b": [mmlu("law", 0.6)]}, "mmlu")
    assert (scores["a"].value, scores["b"].value) == (0.2, 0.6)  # law, which both have
    assert suite_scores({"a": []}, "mmlu") == {}


def test_weights_are_told_in_figures() -> None:
    weights = np.array([[0.0, 0.0, 1.0, 3.0]], np.float32)
    found = weight_figures("x", weights, np.ones((1, 4), bool), 4)
    assert (found.largest, found.zero_share, found.top_share, found.beyond_share) == (3.0, 0.5, 0.75, 0.75)
    assert share_above(np.array([1.0, 2.0, 2.0, 3.0]), np.array([0.0, 2.0, 3.0])).tolist() == [1.0, 0.25, 0.0]


def test_the_row_is_the_one_that_gains_most() -> None:
    assert choose_row(result([[5.0, 5.0], [1.0, 1.0], [3.0, 3.0]], [[5.0, 6.0], [1.0, 3.0], [0.0, 3.0]])) == 1


class Elements(HTMLParser):
    """Checks that elements are closed in order."""

    VOID = ("meta", "link", "input", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.ids += [value for name, value in attrs if name == "id" and value]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.ids += [value for name, value in attrs if name == "id" and value]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything, and the report on it."""
    folder = tmp_path_factory.mktemp("report")
    make_inputs(folder)
    report.main(report_options(folder, "--output", str(folder / "report"), "--title", "A <b> title"))
    return folder / "report"


SECTIONS = (
    "verdict",
    "recall",
    "loss",
    "ruler",
    "needles",
    "trade_off",
    "benchmarks",
    "weights",
    "text",
    "training",
    "made",
)


def finding(differences: dict[str, Difference], phrase: str, *, higher_is_better: bool = False) -> Finding:
    return Finding(
        about=phrase, phrase=phrase, reference="uniform", fact="", differences=differences,
        higher_is_better=higher_is_better, values={}, unit="nats",
    )  # fmt: skip


def shown_with(benchmarks: dict[str, Results]) -> Shown:
    """A report on these benchmarks alone."""
    folders = {name: Path(name) for name in benchmarks}
    evaluations = Evaluations(folders=folders, results={}, benchmarks=benchmarks, samples={})
    return Shown(title="", evaluations=evaluations, reference="uniform", gain=2.0, max_long_nll=None)


def test_long_ppl_that_does_not_compare_is_said() -> None:
    def notes(**changes: object) -> str:
        settings = {"longppl_evaluator": "judge", "longppl_context": 4096, "longppl_stride": 1024, "data_path": "rows"}
        found = Record(suite="longppl", task="all", length=512, metric="longppl", value=9.0, samples=400)
        section = benchmark_section(
            shown_with(
                {
                    name: Results(
                        model=name, layout="", tokenizer_fingerprint=None, settings=of_model, records=(found,)
                    )
                    for name, of_model in (("a", settings), ("b", settings | changes))
                }
            )
        )
        assert section is not None
        return " ".join(section.notes)

    assert notes() == ""
    assert notes(longppl_evaluator=None, longppl_stride=512) == (
        "LongPPL was not measured alike, so its figures do not compare: --longppl-evaluator judge (a), none (b); "
        "--longppl-stride 1024 (a), 512 (b)."
    )
    assert "--data-path rows (a), other (b)." in notes(data_path="other")
    assert "--longppl-context 4096 (a), 64 (b)." in notes(longppl_context=64)


def test_what_came_out_is_said_with_its_uncertainty() -> None:
    def nats(mean: float, rows: int = 40) -> Difference:
        return Difference(mean=mean, standard_error=0.1, rows=rows)

    recall = finding({"a": nats(0.3), "b": nats(0.4), "c": nats(-0.3), "d": nats(0.1)}, "at x", higher_is_better=True)
    loss = finding({"a": nats(0.1), "b": nats(-0.1), "c": nats(-0.5), "d": nats(0.5)}, "on y")
    shown = shown_with({})
    assert headline(shown, [recall], [loss]) == [
        "a and b are better than uniform at x; on y there is no clear difference.",
        "c is worse than uniform at x, but is better on y.",
        "d cannot clearly be told from uniform at x, but is worse on y.",
    ]
    assert headline(shown, [recall], [])[0] == "a and b are better than uniform at x."
    assert headline(replace(shown, base="b"), [recall], [])[0] == "a is better than uniform at x."
    said = [(verdict.kind, verdict.text) for verdict in recall.verdicts()]
    assert said[0] == ("better", "a +0.3000 ± 0.1000 nats.")
    assert said[2:] == [("worse", "c -0.3000 ± 0.1000 nats."), ("unclear", "d +0.1000 ± 0.1000 nats.")]
    few = finding({"a": nats(0.9, rows=29)}, "on y").verdicts()
    assert [(one.kind, one.text) for one in few] == [("unclear", "a +0.9000 ± 0.1000 nats (only 29 rows or examples).")]


def test_the_page_shows_everything_and_needs_nothing(made: Path) -> None:
    page = (made / "report.html").read_text(encoding="utf-8")
    elements = Elements()
    elements.feed(page)
    assert elements.open == []
    assert len(elements.ids) == len(set(elements.ids))
    assert tuple(name for name in elements.ids if name in SECTIONS) == SECTIONS
    assert "A &lt;b&gt; title" in page
    assert "&lt; rows &amp;&amp; echo done" in page
    assert not re.search(r"https?:|src=|@import|url\((?!#)", page)
    pictures = {file.stem for file in made.glob("*.png")}
    assert set(re.findall(r'data-name="(\w+)"', page)) == pictures
    assert len(pictures) >= 13
    assert all(len((made / f"{name}.png").read_bytes()) > 5000 for name in pictures)

    content = json.loads((made / "report.json").read_text())
    assert [model["name"] for model in content["models"]] == list(MODELS)
    assert [model["name"] for model in content["recall"]["models"]] == list(MODELS)
    assert len(content["text"]["top_tokens"]) == 10
    assert {verdict["kind"] for verdict in content["verdicts"]} == {"better", "worse", "unclear", "fact"}
    table = (made / "report.csv").read_text().splitlines()
    assert f'ruler,Average exactness by length,base,"{LENGTHS[0]:,}",' in "\n".join(table)


def test_what_was_not_evaluated_is_left_out(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("evaluation.json", "nll.npz", "results.json", "ruler_samples.jsonl"):
        for kind in ("loss", "tasks"):
            if (kind == "loss") == (name in ("evaluation.json", "nll.npz")):
                (tmp_path / kind).mkdir(exist_ok=True)
                (tmp_path / kind / name).write_bytes((made.parent / "eval_dense" / name).read_bytes())
    for kind, expected in (
        ("loss", ("verdict", "loss", "weights", "made")),
        ("tasks", ("ruler", "needles", "benchmarks", "made")),
    ):
        report.main(["--evaluations", f"dense={tmp_path / kind}", "--output", str(tmp_path / f"report_{kind}")])
        elements = Elements()
        elements.feed((tmp_path / f"report_{kind}" / "report.html").read_text(encoding="utf-8"))
        shown = tuple(name for name in elements.ids if name in SECTIONS)
        assert shown == expected
        assert json.loads((tmp_path / f"report_{kind}" / "report.json").read_text())["models"][0]["name"] == "dense"
    assert "key tokens" not in capsys.readouterr().out


def test_the_base_is_known_without_a_loss(made: Path, tmp_path: Path) -> None:
    """The model that --base names is not among those of the headline."""
    for name in MODELS:
        (tmp_path / name).mkdir()
        for file in ("results.json", "ruler_samples.jsonl"):
            (tmp_path / name / file).write_bytes((made.parent / f"eval_{name}" / file).read_bytes())
    options = ["--evaluations", *(f"{name}_model={tmp_path / name}" for name in MODELS), "--reference", "uniform_model"]
    for more, expected in (([], True), (["--base", "base_model"], False)):
        folder = tmp_path / f"report{len(more)}"
        report.main([*options, *more, "--output", str(folder)])
        said = [one["text"] for one in json.loads((folder / "report.json").read_text())["verdicts"] if not one["about"]]
        assert any("base_model" in text for text in said) == expected, said


def test_damaged_samples_are_named(tmp_path: Path) -> None:
    file = tmp_path / "ruler_samples.jsonl"
    good = b'{"task": "vt", "length": 4, "index": 0, "scores": [1]}\n'
    for line, match in (
        (b"\xff\n", "expected UTF-8 text, got byte 0xff"),
        (good.replace(b": 4", b": Infinity"), "line 2: expected a sample with task"),
        (good.replace(b"[1]", b"[" * 100_000), "line 2: expected a sample with task"),
        (good.replace(b"[1]", b"[1e999]"), "line 2: expected scores and depths of 0 to 1"),
    ):
        file.write_bytes(good + line)
        with pytest.raises(ValueError, match=rf"ruler_samples\.jsonl(:|,) {match}"):
            read_samples(file)


def test_an_empty_key_set_is_said_on_the_page(made: Path, tmp_path: Path) -> None:
    options = ["--evaluations", f"dense={made.parent / 'eval_dense'}", "--key-tokens", "dense", "--gain", "50"]
    report.main([*options, "--output", str(tmp_path / "report")])
    assert "No target is a key token" in (tmp_path / "report" / "report.html").read_text()


def luminance(colour: str) -> float:
    """WCAG 2's relative luminance of #rrggbb."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_text_can_be_read_on_every_colour_in_light_and_dark() -> None:
    frame = FRAME.read_text(encoding="utf-8")
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#\w{6})", part)) for part in re.findall(r":root \{(.*?)\}", frame, re.DOTALL)
    )
    assert luminance(light["paper"]) > 0.9
    assert luminance(dark["paper"]) < 0.02
    inks = dict(re.findall(r'^\[data-level="(\d)"\].*; color: var\(--([\w-]+)\)', frame, re.MULTILINE))
    assert len(inks) == 9
    for colours in (light, dark):
        for ground in ("paper", "soft"):
            for ink in ("ink", "muted", "accent", "better", "worse", "unclear"):
                assert contrast(colours[ink], colours[ground]) >= 4.5, (ink, ground)
        for number, ink in inks.items():
            assert contrast(colours[f"level-{number}"], colours[ink]) >= 4.5, number
        for number in range(6):
            assert contrast(colours[f"series-{number}"], colours["paper"]) >= 3, number
        # Heavier is always further from the paper in lightness, so the scale needs no sense of colour.
        steps = [abs(luminance(colours[f"level-{number}"]) - luminance(colours["paper"])) for number in range(1, 10)]
        assert steps == sorted(steps)


@pytest.mark.skipif(find_browser() is None, reason="no Chromium installed: apt-get install chromium")
def test_people_see_it_in_a_browser(made: Path, tmp_path: Path) -> None:
    with browser_page(tmp_path) as page:
        page.look()
        page.open(made / "report.html")
        sizes = page.value("[...document.querySelectorAll('svg.figure')].map(f => [f.clientWidth, f.clientHeight])")
        assert len(sizes) >= 13
        assert all(width > 200 and height > 100 for width, height in sizes)
        assert page.value("getComputedStyle(document.querySelector('main')).backgroundColor") == "rgb(255, 255, 255)"
        assert page.value("[...document.querySelectorAll('svg.figure text')].every(t => t.getBBox().width > 0)")

        # A token's figures, by pointing at it.
        tip = "document.querySelector('.tip').innerText"
        shown = "document.querySelector('.tip').hidden"
        heaviest = json.loads((made / "report.json").read_text())["text"]["top_tokens"][0]
        assert page.value(shown) is True
        page.value("document.querySelector('.token[tabindex=\"0\"]').scrollIntoView({block: 'center'})")
        x, y = page.value(
            "(() => { const box = document.querySelector('.token[tabindex=\"0\"]').getClientRects()[0];"
            " return [(box.left + box.right) / 2, (box.top + box.bottom) / 2] })()"
        )
        page.point_at(x, y)
        assert page.value(shown) is False
        said = page.value(tip)
        for figure in (
            f"{heaviest['position']}",
            f"{heaviest['long_nll']:.3f}",
            f"{heaviest['short_nll']:.3f}",
            "weight, dense",
            "weight, sparse",
            "key token",
        ):
            assert figure in said
        page.point_at(2, 2)
        assert page.value(shown) is True

        # The same by the keyboard alone.
        focused = "document.activeElement.id"
        page.value("document.querySelector('#heat-map input:checked').focus()")
        page.press("Tab")
        first = page.value(focused)
        assert first.startswith("t")
        assert page.value(tip) == said
        page.press("ArrowRight")
        second = page.value(focused)
        assert second not in (first, "")
        assert page.value(tip) != said
        page.press("ArrowLeft")
        assert page.value(focused) == first
        page.press("ArrowUp")
        assert page.value(focused) not in (first, second, "")
        page.press("Escape")
        assert page.value(shown) is True

        # The other weighting colours it otherwise.
        colours = "[...document.querySelectorAll('.token')].map(t => getComputedStyle(t).backgroundColor).join()"
        dense = page.value(colours)
        page.value("document.querySelector('#heat-map input[value=\"1\"]').click()")
        assert page.value(colours) != dense

        page.look(dark=True)
        red, green, blue = map(
            int, re.findall(r"\d+", page.value("getComputedStyle(document.querySelector('main')).backgroundColor"))
        )
        assert max(red, green, blue) < 60
        # No figure has a ground of its own: what its corner shows is the page.
        assert page.value(
            "[...document.querySelectorAll('svg.figure > g > g:first-child > path')]"
            ".every(p => getComputedStyle(p).fill === 'none')"
        )

        page.look(width=390, height=844)
        page.open(made / "report.html")
        assert page.value("document.documentElement.scrollWidth") <= 390
        assert page.value("[...document.querySelectorAll('.wide')].some(e => e.scrollWidth > e.clientWidth)")

        page.look(width=794, media="print", dark=True)
        assert page.value("getComputedStyle(document.querySelector('.tokens')).color") == "rgb(28, 36, 49)"
        assert page.problems == []
        assert {url.split(":")[0] for url in page.requests} == {"file"}
        assert {url.rsplit("/", 1)[-1] for url in page.requests} == {"report.html"}
