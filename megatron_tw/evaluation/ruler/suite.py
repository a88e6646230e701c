"""The suite `ruler` of tools/evaluate.py: options and files are checked, then the examples scored in either way."""

from collections.abc import Sequence

from megatron_tw.data.tokenizer import load_tokenizer
from megatron_tw.evaluation.ruler.exactness import Forward
from megatron_tw.evaluation.ruler.generation import Generation, check_first_tokens, check_generation
from megatron_tw.evaluation.ruler.scoring import (
    EXACTNESS,
    first_tokens,
    found,
    open_examples,
    open_texts,
    ruler_exactness,
    scores_of,
)
from megatron_tw.evaluation.tasks import Found, Model, Run, Setting, WithoutModel, check_model_length, tokenizer_folder


def prepare_ruler(setting: Setting, names: Sequence[str]) -> Run | WithoutModel:
    """The suite. See `tasks`.

    Raises:
        ValueError: a text that cannot be read, no tokenizer or that of another model, or a length that is beyond the
            model's or too short for a task.
    """
    options = setting.config.ruler
    lengths = options.ruler_lengths or (setting.longest_input,)
    for length in lengths:
        check_model_length(setting, length, "--ruler-lengths")
        setting.source.architecture.check_length(length, "--ruler-lengths")
    texts = open_texts(options, names)
    if options.ruler_scoring == "generation":
        check_generation(options, setting.config.model, setting.source)
    folder = tokenizer_folder(setting.source, "ruler")
    tokenizer = load_tokenizer(folder)
    first_ids = first_tokens(setting.config.evaluation.bos_id, tokenizer)
    setting.facts["ruler tokenizer"] = tokenizer.fingerprint
    setting.facts.update({f"ruler_{name}": digest for name, digest in texts.digests().items()})
    work = open_examples(options, names, lengths, texts, tokenizer, first_ids)
    if options.ruler_scoring == "generation":
        check_first_tokens(first_ids, tokenizer)
        return Generation(setting, work)

    def run(model: Model) -> Found:
        parallel, layout = model.config.parallel, model.layout
        forward = Forward(
            chunks=model.chunks,
            layout=layout,
            device=model.device,
            sequence_parallel=parallel.uses_sequence_parallel,
            micro_batch_size=model.config.evaluation.micro_batch_size,
        )
        scored = []
        for number, examples in enumerate(work.examples, start=1):
            place = f" ({number} of {len(work.examples)})" if len(work.examples) > 1 else ""
            flags = ruler_exactness(forward, examples, work, kept=model.kept, place=place)
            if flags is not None and model.writes:
                scored.append(scores_of(examples, flags))
        return found(work, scored, EXACTNESS) if model.writes else Found()

    return run
