"""The texts that the user brings: essays, SQuAD and HotpotQA.

--ruler-essay     a text file, or RULER's PaulGrahamEssays.json ({"text": ...})
--ruler-squad     SQuAD 2.0's dev-v2.0.json
--ruler-hotpotqa  HotpotQA's hotpot_dev_distractor_v1.json
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_tw.evaluation.ruler.prompt import Question, Questions

FROM = {
    "--ruler-essay": "a text, or RULER's PaulGrahamEssays.json, which scripts/data/synthetic/json of "
    "github.com/NVIDIA/RULER makes",
    "--ruler-squad": "SQuAD 2.0's dev-v2.0.json, from rajpurkar.github.io/SQuAD-explorer",
    "--ruler-hotpotqa": "HotpotQA's hotpot_dev_distractor_v1.json, from hotpotqa.github.io",
}
"""What each option wants, and where it is to be had."""


def read_essay(file: Path) -> tuple[str, ...]:
    """The words of the essays.

    Raises:
        ValueError: no text there.
    """
    text = _read("--ruler-essay", file)
    if file.suffix == ".json":
        text = _field(_json("--ruler-essay", file, text), "text", str, f"--ruler-essay {file}")
    words = tuple(text.split())
    if len(words) < 2:
        raise ValueError(f"--ruler-essay {file}: expected a text, got {len(words)} words")
    return words


def read_squad(file: Path) -> Questions:
    """Questions that have an answer, in the order of the file; documents are the paragraphs. An answer without a text
    is none: it stands in whatever is said.

    Raises:
        ValueError: no file of SQuAD's format.
    """
    where = f"--ruler-squad {file}"
    content = _json("--ruler-squad", file, _read("--ruler-squad", file))
    articles = [_field(article, "paragraphs", list, where) for article in _field(content, "data", list, where)]
    documents, place = _numbered(_field(paragraph, "context", str, where) for own in articles for paragraph in own)
    questions = []
    for own in articles:
        of_article = [place[paragraph["context"]] for paragraph in own]
        for paragraph in own:
            gold = place[paragraph["context"]]
            for asked in _field(paragraph, "qas", list, where):
                texts = [_field(answer, "text", str, where) for answer in _field(asked, "answers", list, where)]
                answers = [text for text in texts if text.strip()]
                if asked.get("is_impossible", False) or not answers:
                    continue
                related = tuple(sorted({other for other in of_article if other != gold}))
                query = _field(asked, "question", str, where)
                questions.append(
                    Question(query=query, answers=tuple(dict.fromkeys(answers)), gold=(gold,), related=related)
                )
    return _some(documents, questions, where)


def read_hotpotqa(file: Path) -> Questions:
    """Questions that have an answer; documents are a title and its sentences, ten to a question.

    Raises:
        ValueError: no file of HotpotQA's format.
    """
    where = f"--ruler-hotpotqa {file}"
    content = _json("--ruler-hotpotqa", file, _read("--ruler-hotpotqa", file))
    if not isinstance(content, list):
        raise ValueError(f"{where}: expected a list of questions")
    contexts = [_paragraphs(item, where) for item in content]
    documents, place = _numbered(document for own in contexts for document in own)
    questions = [
        Question(
            query=_field(item, "question", str, where),
            answers=(_field(item, "answer", str, where),),
            gold=tuple(dict.fromkeys(place[document] for document in own)),
        )
        for item, own in zip(content, contexts, strict=True)
        if _field(item, "answer", str, where).strip()
    ]
    return _some(documents, questions, where)


def _paragraphs(item: Any, where: str) -> list[str]:
    documents = []
    for paragraph in _field(item, "context", list, where):
        if not (isinstance(paragraph, list) and len(paragraph) == 2 and isinstance(paragraph[1], list)):
            raise ValueError(f"{where}: context: expected [title, [sentence, ...]], got {json.dumps(paragraph)[:80]}")
        documents.append(f"{paragraph[0]}\n{''.join(map(str, paragraph[1]))}")
    return documents


def _numbered(documents: Iterable[str]) -> tuple[tuple[str, ...], dict[str, int]]:
    """Different documents, sorted, and the place of each."""
    found = tuple(sorted({*documents}))
    return found, {document: place for place, document in enumerate(found)}


def _some(documents: tuple[str, ...], questions: list[Question], where: str) -> Questions:
    if not questions:
        raise ValueError(f"{where}: holds no question that has an answer")
    return Questions(documents=documents, questions=tuple(questions))


def _read(option: str, file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{option} {file}: {error.strerror}; expected {FROM[option]}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{option} {file}: expected UTF-8 text, got byte 0x{error.object[error.start]:02x}") from error


def _json(option: str, file: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{option} {file}: truncated or no JSON: {error}") from error


def _field(content: Any, name: str, kind: type, where: str) -> Any:
    if not isinstance(content, dict) or not isinstance(content.get(name), kind):
        raise ValueError(f'{where}: expected objects with "{name}" ({kind.__name__}), got {json.dumps(content)[:80]}')
    return content[name]
