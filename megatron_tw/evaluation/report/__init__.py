"""The page that compares models: from the folders of tools/evaluate.py to sections, and from sections to HTML.

inputs.py       what is read: evaluations, benchmark results, planted answers, rows
intervals.py    confidence intervals
recall.py       recall of planted answers by distance, beside the loss on all other text
benchmarks.py   RULER, LongPPL, short-context tasks; the trade-off between long and short
weights.py      distributions of scores and weights
text.py         a row as text, token by token; where its words stood before
heat_map.py     ... coloured by weight, as HTML
figures.py      figures as SVG for the page and as PNG
sections.py     what is shown of all this, in order
page.py         sections to one HTML page (page.html is its frame)
"""
