"""Reports of a recorded sweep: terminal tables, charts, one HTML page, JSON and CSV. None of them needs torch.

`summary` draws the conclusions once; `words` puts them into sentences; `terminal`, `charts` (with what
`drawing` gives) and `html` lay them out.
"""
