"""From the NLL of every held-out target to a comparison of models.

    result.py       EvaluationResult: the NLLs of one model on the held-out rows, on disk
    position.py     NLL by position bucket
    key_tokens.py   the targets that need a long context, and LongPPL
    compare.py      models side by side on the same targets; differences with their standard error
    training.py     the metrics.jsonl of training runs
    table.py        comparisons as text
    report/         the page that shows all this

Shapes, at the end of names: R rows, N tokens of a row (`seq_length`), T = N - 1 targets of a row. Target column j is
the token at position j + 1 of its row, and has j + 1 tokens of context.
"""
