"""RULER (arXiv 2404.06654): does a model use its whole context? 13 synthetic tasks for any tokenizer and length.

    tasks.py              the table of tasks, and the examples of one task at one length
    niah.py, variable_tracking.py, word_lists.py, qa.py    the generators
    texts.py              essays, SQuAD and HotpotQA, which the user brings
    prompt.py             what a generator is given and gives
    fitting.py            how many units of text fill a length
    draw.py, words.py     random choices and words, the same everywhere
    metric.py             RULER's scores of generated text
    rows.py               a prompt and its gold answers as token ids
    exactness.py          teacher-forced: the gold answers are the model's first choices, in any layout
    generation.py         by lm-evaluation-harness, as local tasks
    scoring.py, suite.py  examples with their scores; the suite of tools/evaluate.py

A prompt is a text that ends with the prefix of its answer; it and the tokens left for the answer are at most `length`.
"""
