"""Lists of words that are to be counted: RULER's cwe and fwe (definitions: NVIDIA/RULER, scripts/data/synthetic,
common_words_extraction.py and freq_words_extraction.py)."""

import math
from string import ascii_lowercase

from megatron_tw.evaluation.ruler.draw import Draw
from megatron_tw.evaluation.ruler.prompt import Build, Material, Prompt, complete
from megatron_tw.evaluation.ruler.words import word_pool

COMMON = 10
LEAST_WORDS = COMMON + 1
SHORT = 4096
"""Below so many tokens the lists are shorter, and words in them repeated less often."""
ZETA_EXPONENT = 2.0
ZETA = math.pi**2 / 6  # of 2
CODED_LETTERS = 6
LEAST_CODED = 100  # from here on the fourth word is rarer than the third, and the fifth than the fourth
FWE_GENERATED = 50


def common_words(material: Material) -> Build:
    """cwe: ten words stand in a numbered list more often than the others, after an example that is solved. A unit is
    a different word of the list."""
    often, seldom = (6, 1) if material.length < SHORT else (30, 3)
    example = (20, 3, 1) if material.length < SHORT else (40, 10, 3)

    def build(draw: Draw, index: int, units: int) -> Prompt:
        solved, solution = _numbered(draw, *example)
        text, common = _numbered(draw, units, often, seldom)
        solution_text = " ".join(f"{number + 1}. {word}" for number, word in enumerate(solution))
        return complete(f"{solved}{solution_text}\n{text}", common, between=" ", numbered=True)

    return build


def _numbered(draw: Draw, num_words: int, often: int, seldom: int) -> tuple[str, list[str]]:
    words = draw.sample(word_pool(num_words), num_words)
    common, others = words[:COMMON], words[COMMON:]
    listed = draw.shuffled(common * often + others * seldom)
    context = " ".join(f"{number + 1}. {word}" for number, word in enumerate(listed))
    text = (
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones "
        f"that appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list? Answer: "
        "The top 10 words that appear most often in the list are:"
    )
    return text, sorted(common, key=listed.index)  # in the order in which they first appear


def frequent_words(material: Material) -> Build:
    """fwe: coded words whose frequencies follow a zeta distribution; the most frequent is "...", and the next three are
    asked for. A unit is a word of the text, before the distribution's tail is cut off."""
    vocabulary = (material.length - FWE_GENERATED) // 50

    def build(draw: Draw, index: int, units: int) -> Prompt:
        words: dict[str, None] = {"...": None}
        while len(words) < max(vocabulary, 5):
            words[draw.letters(ascii_lowercase, CODED_LETTERS)] = None
        coded = []
        for rank, word in enumerate(words, start=1):
            coded += [word] * int(units * rank**-ZETA_EXPONENT / ZETA)
        text = (
            "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
            f"appeared coded words. {' '.join(draw.shuffled(coded))}\nQuestion: Do not provide any explanation. Please "
            "ignore the dots '....'. What are the three most frequently appeared words in the above coded text? "
            "Answer: According to the coded text above, the three most frequently appeared words are:"
        )
        return complete(text, [*words][1:4])

    return build
