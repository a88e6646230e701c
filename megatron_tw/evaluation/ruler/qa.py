"""Questions among documents: RULER's qa_1 and qa_2 (definition: NVIDIA/RULER, scripts/data/synthetic/qa.py)."""

from megatron_tw.evaluation.ruler.draw import Draw
from megatron_tw.evaluation.ruler.prompt import Build, Material, Prompt, complete

TASK = "Answer the question based on the given documents. Only give me the answer and do not output any other words."


def question_answering(material: Material) -> Build:
    """The generator: example i asks the i-th question of its file. A unit is a document that does not belong to the
    question; those of the same article come first."""
    source = material.questions
    assert source is not None
    documents = source.documents

    def build(draw: Draw, index: int, units: int) -> Prompt:
        question = source.questions[index]
        wanted = len(question.gold) + units
        if wanted >= len(documents):  # all of them, again and again
            chosen = [place % len(documents) for place in range(wanted)]
        elif units <= len(question.related):
            chosen = [*question.gold, *draw.sample(question.related, units)]
        else:
            own = {*question.gold, *question.related}
            others = [place for place in range(len(documents)) if place not in own]
            chosen = [*question.gold, *question.related]
            chosen += draw.sample(others, wanted - len(chosen))
        shown = [
            (f"Document {number + 1}:\n{documents[place]}", place) for number, place in enumerate(draw.shuffled(chosen))
        ]
        text = f"{TASK}\n\nThe following are given documents.\n\n"
        told = None
        for number, (document, place) in enumerate(shown):
            text += "\n\n" if number else ""
            if told is None and place in question.gold:
                told = len(text)
            text += document
        text += f"\n\n{TASK}\n\nQuestion: {question.query} Answer:"
        places = [told] if told is not None and len(question.gold) == 1 else []
        return complete(text, question.answers[:1], references=question.answers, places=places)

    return build
