"""The page on trainers: its examples run as they are."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "trainers.md"
EXAMPLES = re.findall(r"^## (\w+)\n.*?^```python\n(.*?)^```$", PAGE.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)


def test_each_trainer_has_an_example() -> None:
    assert [name for name, _ in EXAMPLES] == ["Lightning", "transformers", "accelerate"]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(("name", "code"), EXAMPLES, ids=[name for name, _ in EXAMPLES])
def test_example_runs(
    name: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for library in {name.lower(), "accelerate"} if name == "transformers" else {name.lower()}:
        pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, f"docs/trainers.md, {name}", "exec"), {})
    assert re.search("^(No fault|[0-9]+ faults? in )", capsys.readouterr().out, flags=re.MULTILINE)
