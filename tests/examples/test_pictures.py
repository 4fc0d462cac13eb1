"""The documentation's pictures: each has its command, is shown somewhere, and is made as the pages say."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    path: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))
}


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pictures_script", ROOT / "scripts" / "pictures.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


pictures = load()


def test_every_picture_is_in_the_table_and_on_a_page() -> None:
    names = {path.stem for path in (ROOT / "docs" / "images").glob("*.png")}
    assert names == set(pictures.PICTURES)
    shown = {name for text in PAGES.values() for name in re.findall(r"images/(\w+)\.png", text)}
    assert names == shown


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_the_documentation_states_the_command(name: str) -> None:
    picture = pictures.PICTURES[name]
    assert bool(picture.commands) != (picture.page is not None)
    # Lines that go on, and any spaces, are one space; in prose the interpreter is left out.
    text = " ".join(" ".join(PAGES.values()).replace("\\\n", " ").split())
    for command in picture.commands:
        stated = command.removeprefix("python ")
        # With nothing after it: an option more would be another picture.
        assert re.search(re.escape(stated) + r"(`| \$| #| ```)", text), command
    if picture.page is not None:
        assert f"(images/{name}.png)" in PAGES[ROOT / picture.page]


def test_the_table_names_files_that_the_programs_write() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert "python examples/demo.py\n" in makefile  # what `make demo` runs is what draws its picture
    for picture in pictures.PICTURES.values():
        if not picture.commands:
            continue
        program, out = picture.commands[-1].split()[1], Path(picture.file)
        text = (ROOT / program).read_text(encoding="utf-8")
        assert out.parts[0] == "results"
        # mk_grid.py and aae.py make the folder's name out of what they are told; aae's pictures are apart.
        if not program.endswith(("mk_grid.py", "aae.py")):
            assert f'"{out.parent.as_posix()}"' in text
            assert f'"{out.name}"' in text or f'"{out.stem}"' in text


def test_a_page_draws_its_own_picture(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        ">>> from matplotlib.figure import Figure\n>>> figure = Figure()\n>>> _ = figure.add_subplot()\n\n"
        "![words](images/first.png)\n>>> del figure\n\n![words](images/second.png)\n"
    )
    pictures.draw_page(page, "first", tmp_path / "out" / "first.png")
    assert (tmp_path / "out" / "first.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="makes no `figure`"):
        pictures.draw_page(page, "second", tmp_path / "second.png")
    with pytest.raises(ValueError, match=r"shows no images/third\.png"):
        pictures.draw_page(page, "third", tmp_path / "third.png")


def test_commands_run_and_what_they_leave_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "docs" / "images").mkdir(parents=True)
    (tmp_path / "make.py").write_text(
        "import sys, pathlib\npathlib.Path(sys.argv[1]).write_text(sys.argv[2])\n"
    )
    table = {
        "good": pictures.Picture(("python make.py a.png 'one two'",), "a.png", 0),
        "bad": pictures.Picture(("python missing.py",), "b.png", 0),
        "old": pictures.Picture(("python make.py c.png 1",), "a.png.other", 0),
    }
    for name, value in {"ROOT": tmp_path, "IMAGES": tmp_path / "docs" / "images", "PICTURES": table}.items():
        monkeypatch.setattr(pictures, name, value)
    assert pictures.main(["good"]) == 0
    assert (tmp_path / "docs" / "images" / "good.png").read_text() == "one two"
    (tmp_path / "a.png").write_text("by hand")
    assert pictures.main(["--copy", "good"]) == 0
    assert (tmp_path / "docs" / "images" / "good.png").read_text() == "by hand"
    # What fails is named, keeps its picture, and does not stop the others.
    assert pictures.main(["bad", "old", "good"]) == 1
    assert "not drawn: bad old" in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "docs" / "images").iterdir()} == {"good.png"}
    with pytest.raises(SystemExit):
        pictures.main(["none"])
    assert "there are good, bad, old" in capsys.readouterr().err


def test_listing_them_runs_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pictures, "make", lambda *_: pytest.fail("drawn"))
    assert pictures.main(["--list"]) == 0
    printed = capsys.readouterr().out
    assert all(f"{name}: " in printed for name in pictures.PICTURES)
