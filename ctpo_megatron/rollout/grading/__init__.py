"""Whether two answers are equal: their structure is read and compared here, their mathematics is math-verify's and SymPy's.

`boxes` finds the answer in a text, `latex` brings its notation into one form, `structure` reads lists, tuples, sets, intervals
and matrices, `quantities` reads units and percentages, `numerals` reads numbers exactly, `verdict` compares what was read, and
`mathematics` compares expressions. docs/rewards.md has the rules.
"""
