"""The suite `ruler` of tools/evaluate.py: options and files are checked, then the examples scored in either way."""

from collections.abc import Sequence

from megatron_tw.data.tokenizer import fingerprint_of, load_tokenizer
from megatron_tw.evaluation.ruler.exactness import Forward
from megatron_tw.evaluation.ruler.generation import Generation, check_generation
from megatron_tw.evaluation.ruler.scoring import (
    EXACTNESS,
    first_tokens,
    found,
    open_examples,
    open_texts,
    ruler_exactness,
    scores_of,
)
from megatron_tw.evaluation.tasks import Found, Model, Run, Setting, check_model_length, tokenizer_folder


def prepare_ruler(setting: Setting, names: Sequence[str]) -> Run:
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
        check_generation(options, setting.source)
    folder = tokenizer_folder(setting.source, "ruler")
    if fingerprint_of(folder) is None:
        raise ValueError(f"--tasks ruler: {folder} holds no tokenizer, and the prompts need one")
    tokenizer = load_tokenizer(folder)
    if tokenizer.vocab_size > setting.source.architecture.vocab_size:
        raise ValueError(
            f"--tasks ruler: the tokenizer {tokenizer.name} has a vocabulary of {tokenizer.vocab_size}, the model one "
            f"of {setting.source.architecture.vocab_size}"
        )
    first_ids = first_tokens(setting.config.evaluation.bos_id, tokenizer)
    setting.facts["ruler tokenizer"] = tokenizer.fingerprint
    work = open_examples(options, names, lengths, texts, tokenizer, first_ids)
    if options.ruler_scoring == "generation":
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
        for examples in work.examples:
            flags = ruler_exactness(forward, examples, work, kept=model.kept)
            if flags is not None and model.writes:
                scored.append(scores_of(examples, flags))
        return found(work, scored, EXACTNESS) if model.writes else Found()

    return run
