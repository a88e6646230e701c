"""Variable tracking: RULER's vt (definition: NVIDIA/RULER, scripts/data/synthetic/variable_tracking.py).

One chain of five variables in lines of noise, after an example that is solved. A unit is a line of noise.
"""

from itertools import pairwise
from string import ascii_uppercase

from megatron_tw.evaluation.ruler.draw import Draw
from megatron_tw.evaluation.ruler.fitting import fit
from megatron_tw.evaluation.ruler.niah import NOISE
from megatron_tw.evaluation.ruler.prompt import Build, Material, Prompt, complete

HOPS = 4
LETTERS, EXAMPLE_LETTERS = 5, 3
EXAMPLE_TOKENS = 500
LEAST_UNITS = HOPS + 1


def variable_tracking(material: Material) -> Build:
    """The generator. The example's number of lines follows from the tokenizer: as many as make at most 500 tokens, or
    the fewest that hold its chain where those make more."""

    def example(draw: Draw, units: int) -> tuple[str, list[str], list[int]]:
        return _problem(draw, _variables(draw, EXAMPLE_LETTERS), units)

    def tokens_of(units: int) -> int:
        return material.count(example(Draw(material.seed, "vt", "example"), units)[0])

    most = max(EXAMPLE_TOKENS, tokens_of(LEAST_UNITS))
    lines = fit(tokens_of, most, least=LEAST_UNITS, start=None, slack=0).units

    def build(draw: Draw, index: int, units: int) -> Prompt:
        variables = _variables(draw, LETTERS)
        value = draw.digits(5)  # before what depends on the length, so that each length asks for the same
        solved, solution, _ = example(draw, lines)
        text, variables, places = _problem(draw, variables, units, value)
        before = f"{solved} {' '.join(solution)}\n\n"
        # RULER's example has a space between the prompt, which ends with one, and the variables.
        return complete(
            before + text, variables, before=" ", between=" ", places=[len(before) + place for place in places]
        )

    return build


def _variables(draw: Draw, letters: int) -> list[str]:
    names: list[str] = []
    while len(names) < HOPS + 1:
        name = draw.letters(ascii_uppercase, letters)
        names += [] if name in names else [name]
    return names


def _problem(
    draw: Draw, variables: list[str], units: int, value: str | None = None
) -> tuple[str, list[str], list[int]]:
    """The prompt with its prefix of the answer, the chain's variables, and where each is assigned."""
    value = value or draw.digits(5)
    chain = [f"VAR {variables[0]} = {value}"]
    chain += [f"VAR {new} = VAR {old} " for old, new in pairwise(variables)]
    at = sorted(draw.sample(range(units), len(chain)))
    lines: list[str] = []
    for line in range(units):
        lines += [chain[at.index(line)]] if line in at else []
        lines.append(NOISE)
    text = (
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
        + "\n".join(lines)
        + f"\nQuestion: Find all variables that are assigned the value {value} in the text above. Answer: According "
        f"to the chain(s) of variable assignment in the text above, {HOPS + 1} variables are assigned the value "
        f"{value}, they are: "
    )
    return text, variables, [text.index(link) for link in chain]
