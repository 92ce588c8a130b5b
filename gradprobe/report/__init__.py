"""Reports of a recorded sweep: terminal tables, charts, one HTML page, JSON and CSV. Nothing here imports torch.

`summary` judges each network, `sentences` puts the verdicts into words, and `terminal`, `export`, `sweep_charts` and
`html` lay them out. `palette` has the colours of the charts, `page_template` the CSS of the page. `live` and
`live_sweep` are the screens of `gradprobe watch`.
"""
