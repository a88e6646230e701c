"""RULER's generators: each prompt tells what it asks, to whoever reads it; limits, and the same prompts everywhere."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_tw.evaluation.ruler.draw import Draw
from megatron_tw.evaluation.ruler.fitting import Fit, fit
from megatron_tw.evaluation.ruler.metric import string_match_all, string_match_part
from megatron_tw.evaluation.ruler.prompt import Prompt, Question, Questions
from megatron_tw.evaluation.ruler.rows import tokenize
from megatron_tw.evaluation.ruler.tasks import TASKS, Examples, Texts
from megatron_tw.evaluation.ruler.texts import read_essay, read_hotpotqa, read_squad
from megatron_tw.evaluation.ruler.words import WORDS, word_pool

LENGTH = 2048
CITIES = [f"{a}{b}" for a in ("Nor", "Wes", "Sil", "Gra") for b in ("ton", "ville", "mouth", "burg", "by")]


class Words:
    """A tokenizer: a word's letters, a digit, or another character is a token."""

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}
        self.calls = 0

    def encode(self, text: str) -> list[int]:
        self.calls += 1
        return [self.ids.setdefault(part, len(self.ids)) for part in re.findall(r" ?[A-Za-z]+|\s|[^A-Za-z\s]", text)]


class Bytes:
    def encode(self, text: str) -> list[int]:
        return list(text.encode())


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Texts:
    """Made texts in the formats of the published files."""
    folder = tmp_path_factory.mktemp("texts")
    essay = " ".join(f"It was day {day} of the long walk. Nobody spoke, and Dr. Grey slept." for day in range(40))
    (folder / "essay.json").write_text(json.dumps({"text": essay}))
    paragraphs = [f"{city} is a town on a river. Its mayor is called {city.lower()}us the Old." for city in CITIES]
    (folder / "squad.json").write_text(
        json.dumps(
            {
                "data": [
                    {
                        "paragraphs": [
                            {
                                "context": paragraphs[place],
                                "qas": [
                                    {
                                        "question": f"Who is the mayor of {CITIES[place]}?",
                                        "answers": [{"text": f"{CITIES[place].lower()}us"}, {"text": "the Old"}],
                                        "is_impossible": False,
                                    },
                                    {"question": "Why?", "answers": [], "is_impossible": True},
                                ],
                            }
                            for place in range(first, first + 5)
                        ]
                    }
                    for first in range(0, len(CITIES), 5)
                ]
            }
        )
    )
    (folder / "hotpot.json").write_text(
        json.dumps(
            [
                {
                    "question": f"Who is the mayor of {CITIES[place]}?",
                    "answer": f"{CITIES[place].lower()}us",
                    "context": [[CITIES[(place + step) % 20], [paragraphs[(place + step) % 20]]] for step in range(3)],
                }
                for place in range(20)
            ]
        )
    )
    return Texts(
        essay=read_essay(folder / "essay.json"),
        squad=read_squad(folder / "squad.json"),
        hotpotqa=read_hotpotqa(folder / "hotpot.json"),
    )


def needles_of(text: str) -> list[str]:
    """What a reader of a niah prompt answers: the values of the keys in its question, in the order asked."""
    asked = re.findall(r"special magic \w+ for (.*?) mentioned in the provided text\?", text)[-1]
    keys = re.split(r", and |, ", asked)
    told = re.findall(r"One of the special magic \w+ for (\S+) is: (\S+)\.", text)
    return [value for key in keys for other, value in told if other == key]


def chain_of(text: str) -> list[str]:
    problem = text[text.rindex("Memorize and track") :]
    value = re.findall(r"assigned the value (\d+)", problem)[0]
    links = re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", problem)
    found = [value]
    for name, source in links:
        found += [name] if source in found else []
    return found[1:]


def common_of(text: str) -> list[str]:
    problem = text[text.rindex("Below is a numbered list") : text.rindex("Question:")]
    return [word for word, _ in Counter(re.findall(r"\d+\. (\w+)", problem)).most_common(10)]


def frequent_of(text: str) -> list[str]:
    coded = text[text.index("coded words. ") + 13 : text.index("\nQuestion:")].split()
    return [word for word, _ in Counter(coded).most_common(4) if word != "..."]


def mayor_of(text: str) -> list[str]:
    city = re.findall(r"Question: Who is the mayor of (\w+)\?", text)[0]
    return re.findall(rf"{city} is a town on a river\. Its mayor is called (\w+) the Old", text)[:1]


ORACLES: dict[str, Callable[[str], list[str]]] = {
    **{name: needles_of for name in TASKS if name.startswith("niah")},
    "vt": chain_of,
    "cwe": common_of,
    "fwe": frequent_of,
    "qa_1": mayor_of,
    "qa_2": mayor_of,
}


@pytest.mark.parametrize("name", TASKS)
def test_a_reader_of_the_prompts_scores_100_and_one_of_other_prompts_near_0(name: str, texts: Texts) -> None:
    words = Words()
    examples = Examples(name, LENGTH, words, texts)
    prompts = [examples.example(index) for index in range(8)]
    said = [ORACLES[name](prompt.text) for prompt in prompts]
    right = [examples.task.string_match(", ".join(x), prompt.answers) for x, prompt in zip(said, prompts, strict=True)]
    assert right == [1.0] * 8
    shuffled = said[1:] + said[:1]
    wrong = [
        examples.task.string_match(", ".join(x), prompt.answers) for x, prompt in zip(shuffled, prompts, strict=True)
    ]
    assert sum(wrong) / 8 < 0.05
    for prompt, answers in zip(prompts, said, strict=True):
        gold = [prompt.completion[first:last] for first, last in prompt.spans]
        # qa asks for one of its references; words are in the order of the text; all else in the reader's order
        assert sorted(gold) == sorted(answers) if name == "cwe" else gold == answers
        for place, answer in zip(prompt.places, gold, strict=bool(prompt.places)):
            assert answer in prompt.text[place : place + 200]
            assert 0 <= place < len(prompt.text)


@pytest.mark.parametrize("name", TASKS)
def test_prompts_fill_their_length_and_never_exceed_it(name: str, texts: Texts) -> None:
    for length in (1024, 8192):
        words = Words()
        examples = Examples(name, length, words, texts, first_tokens=1)
        examples.example(0)
        words.calls = 0
        for index in range(5):
            tokens = 1 + len(words.encode(examples.example(index).text)) + examples.task.tokens_to_generate
            assert tokens <= length
            assert tokens >= 0.95 * length or name == "niah_multikey_3"  # whose needles are 80 tokens
            assert tokens > length - max(100, 0.05 * length)
        assert words.calls <= 5 * 14  # that of the prompt and its completion, and ours


def test_the_published_texts() -> None:
    """Written out from NVIDIA/RULER's definition, for what a prompt begins and ends with."""
    words = Words()
    single = Examples("niah_single_1", LENGTH, words, Texts()).example(3)
    key = re.findall(r"numbers for (\S+) is:", single.text)[0]
    assert single.text.startswith(
        "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about "
        "the number afterwards.\nThe grass is green. The sky is blue. The sun is yellow. Here we go. There and back "
        "again.\n"
    )
    assert single.text.endswith(
        f"\nWhat is the special magic number for {key} mentioned in the provided text? The special magic number for "
        f"{key} mentioned in the provided text is"
    )
    assert f"\nOne of the special magic numbers for {key} is: {single.answers[0]}.\n" in single.text
    assert single.completion == f" {single.answers[0]}"

    chain = Examples("vt", LENGTH, words, Texts()).example(0)
    example, problem = chain.text.split("\n\nMemorize")
    assert re.search(r"they are:  [A-Z]{3}( [A-Z]{3}){4}$", example)  # solved: with two spaces, as RULER joins it
    assert re.search(r"5 variables are assigned the value \d{5}, they are: $", problem)
    assert re.fullmatch(r" [A-Z]{5}( [A-Z]{5}){4}", chain.completion)

    common = Examples("cwe", LENGTH, words, Texts()).example(0)
    solved, problem = common.text.split("list are:1. ", 1)  # without a space, as RULER joins it
    assert solved.startswith("Below is a numbered list of words. In these words, some appear more often than others.")
    assert len(re.findall(r"\d+\. ", solved)) == 10 * 3 + 10  # 20 words, of which 10 stand there three times
    assert set(Counter(re.findall(r"\d+\. (\w+)", problem[problem.index("Below") :])).values()) == {1, 6}
    assert problem.endswith("Answer: The top 10 words that appear most often in the list are:")
    assert re.fullmatch(r" 1\. \w+ .* 10\. \w+", common.completion)
    long_list = Examples("cwe", 8192, words, Texts()).example(0).text
    long_list = long_list[long_list.rindex("Below") : long_list.rindex("Question")]
    assert set(Counter(re.findall(r"\d+\. (\w+)", long_list)).values()) == {3, 30}

    frequent = Examples("fwe", LENGTH, words, Texts()).example(0)
    assert " ... " in frequent.text
    assert len(frequent.answers) == 3
    assert frequent.text.endswith("the three most frequently appeared words are:")


def test_an_example_of_more_than_500_tokens_has_the_fewest_lines() -> None:
    """With a token for each byte, the example of vt has the five lines that its chain needs."""
    prompt = Examples("vt", 4096, Bytes(), Texts()).example(0)
    example = prompt.text.split("\n\nMemorize")[0]
    assert example.count("The grass is green.") == 5
    assert len(example.encode()) > 500
    assert 3500 < len(prompt.text.encode()) <= 4096


def test_lengths_ask_for_the_same_needles(texts: Texts) -> None:
    for name in TASKS:
        if name not in ("fwe", "cwe"):  # whose words follow from the length
            answers = {Examples(name, length, Words(), texts).example(1).answers for length in (1024, 4096)}
            assert len(answers) == 1, name


def test_the_same_prompts_everywhere(texts: Texts) -> None:
    """Recorded once: another Python, machine or library must make the same."""
    digest = hashlib.sha256()
    for name in TASKS:
        examples = Examples(name, LENGTH, Words(), texts)
        own = [examples.example(index) for index in range(3)]
        assert own[2] == Examples(name, LENGTH, Words(), texts).example(2)  # whatever was made before it
        assert own[2] != Examples(name, LENGTH, Words(), texts, seed=1).example(2) or name.startswith("qa")
        for prompt in own:
            digest.update(f"{name}\n{prompt.text}{prompt.completion}\n".encode())
    assert digest.hexdigest() == "bbc8e5923571d5b525d9de68537024fae7651c6c0cea0da6e7f50bae37931a22"
    draw = Draw(42, "a", 1)
    assert [draw.below(100), draw.digits(3), draw.letters("abc", 4), draw.sample(range(9), 3)] == [
        73,
        "975",
        "acca",
        [4, 5, 3],
    ]
    assert draw.uuid() == "564b5051-2aa3-45e8-b958-6af528087211"


def test_what_is_too_short_is_refused(texts: Texts) -> None:
    with pytest.raises(ValueError, match=r"^vt in 512 tokens: no prompt is that short: expected at least \d+ tokens"):
        Examples("vt", 512, Words(), texts)
    with pytest.raises(ValueError, match=r"^cwe in 512 tokens: no prompt is that short: expected at least \d"):
        Examples("cwe", 512, Words(), texts)
    with pytest.raises(ValueError, match=r"^vt in 1,024 tokens: no prompt is that short: .* got \d"):
        Examples("vt", 1024, Bytes(), texts)  # its example alone has more bytes than 500
    with pytest.raises(ValueError, match=r"^niah_single_1 in 64 tokens: no prompt"):
        Examples("niah_single_1", 64, Words(), texts)
    uneven = Questions(
        documents=("It is red.", "It is " + "very " * 300 + "blue."),
        questions=tuple(Question(query=f"Which {place}?", answers=("it",), gold=(place,)) for place in range(2)),
    )
    examples = Examples("qa_1", 256, Words(), Texts(squad=uneven))
    assert "red" in examples.example(0).text
    examples.check(1)
    too_long = r"^qa_1 in 256 tokens: example 1: expected at least \d+ tokens, got 256"
    for refused in (examples.example, lambda place: examples.check(place + 1)):
        with pytest.raises(ValueError, match=too_long):
            refused(1)
    with pytest.raises(ValueError, match="niah_single_2: needs --ruler-essay"):
        Examples("niah_single_2", LENGTH, Words(), Texts())


def test_fitting_finds_the_most_that_fits_with_few_counts() -> None:
    for fixed, unit, limit in ((70, 27, 896), (70, 27, 130_944), (10, 1.3, 4000), (900, 14, 1000), (0, 80, 1000)):
        counts: list[int] = []

        def tokens_of(units: int, fixed: float = fixed, unit: float = unit, counts: list[int] = counts) -> int:
            counts.append(units)
            return int(fixed + unit * units + 3 * (units % 3))  # not quite even

        found = fit(tokens_of, limit, least=1, start=None, slack=0)
        assert found.tokens <= limit
        assert tokens_of(found.units + 1) > limit or limit - found.tokens <= unit + 6
        assert len(counts) < 12
        counts.clear()
        fit(tokens_of, limit, least=1, start=found, slack=0)
        assert len(counts) == 1
    with pytest.raises(ValueError, match="expected at least 57 tokens, got 40"):
        fit(lambda units: 50 + 7 * units, 40, least=1, start=Fit(9, 100, 7.0), slack=0)


def test_metrics() -> None:
    assert string_match_all("The numbers are 12\nand 34.", ["34", "12", "56", "78"]) == 0.5
    assert string_match_all("AbC", ["abc"]) == 1.0
    assert string_match_part("in denver", ["Denver", "Colorado"]) == 1.0
    assert string_match_part("nowhere", ["Denver", "Colorado"]) == 0.0


def test_rows_know_which_tokens_are_an_answers() -> None:
    words = Words()
    prompt = Prompt(
        text="One of x.\nThe numbers are",
        answers=("12", "ab"),
        completion=" 12, ab",
        spans=((1, 3), (5, 7)),
    )
    row = tokenize(prompt, words, first_ids=(900,))
    names = {number: part for part, number in words.ids.items()} | {900: "<s>"}
    assert [names[number] for number in row.ids[row.prompt_tokens :]] == [" ", "1", "2", ",", " ab"]
    assert row.ids[0] == 900
    said = [[names[number] for number in row.ids[first:last]] for first, last in row.spans]
    assert said == [["1", "2"], [" ab"]]


def test_word_lists() -> None:
    assert len(word_pool(len(WORDS))) == len(WORDS) > 600
    assert len(word_pool(50_000)) > 100_000
    with pytest.raises(ValueError, match="different words: there are"):
        word_pool(10_000_000)


def test_answers_without_a_text_are_none(tmp_path: Path) -> None:
    """Nothing stands in every text, so it would always count as right."""
    file = tmp_path / "texts.json"

    def squad(*answers: list[str]) -> Questions:
        asked = [{"question": "Who?", "answers": [{"text": text} for text in own]} for own in answers]
        file.write_text(json.dumps({"data": [{"paragraphs": [{"context": "It was Ann.", "qas": asked}]}]}))
        return read_squad(file)

    def hotpotqa(*answers: str) -> Questions:
        context = [["It", ["was Ann."]]]
        file.write_text(json.dumps([{"question": "Who?", "answer": own, "context": context} for own in answers]))
        return read_hotpotqa(file)

    assert [question.answers for question in squad(["", "Ann"], [" "], ["Ann"]).questions] == [("Ann",), ("Ann",)]
    assert [question.answers for question in hotpotqa("", "Ann").questions] == [("Ann",)]
    for read in (lambda: squad([""]), lambda: hotpotqa(" ")):
        with pytest.raises(ValueError, match="holds no question that has an answer"):
            read()


@pytest.mark.parametrize(
    ("reader", "content", "message"),
    [
        (read_squad, "{", "--ruler-squad .*bad.json: truncated or no JSON"),
        (read_squad, "{}", '--ruler-squad .*: expected objects with "data"'),
        (read_squad, '{"data": []}', "--ruler-squad .*: holds no question"),
        (read_squad, '{"data": [{"paragraphs": [{"qas": []}]}]}', 'expected objects with "context"'),
        (read_hotpotqa, "{}", "--ruler-hotpotqa .*: expected a list"),
        (read_hotpotqa, '[{"context": [["a"]]}]', r"context: expected \[title, \[sentence"),
        (read_essay, '{"text": 1}', '--ruler-essay .*: expected objects with "text"'),
        (read_essay, None, "--ruler-essay .*: No such file"),
    ],
)
def test_bad_texts_are_named(
    reader: Callable[[Path], object], content: str | None, message: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "bad.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        reader(tmp_path / "bad.json")
