"""What the command says of bad input is one line, fit for a terminal, whatever the input is called."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from messnet.cli import main


@pytest.mark.parametrize("name", ["\x1b[31mred", "two\nlines", "\u202etxt.exe", "\x07\x9b\x85"])
def test_names_do_nothing_to_a_terminal(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["predict", "a.mess", f"/nowhere/{name}.png"])
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert said.startswith("messnet: ")
    assert said.removesuffix("\n").isprintable()
    assert "/nowhere/" in said


@pytest.mark.parametrize(
    ("words", "missing"),
    [
        ("predict", "TARGET is missing"),
        ("predict a.mess b.png --out", "--out needs a value"),
        ("predict a.mess b.png --tile", "--tile needs 2 values"),
        ("predict a.mess b.png --tile 64", "--tile needs 2 values"),
    ],
)
def test_what_is_missing_has_the_name_of_the_help_page(
    words: str, missing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(words.split())
    assert end.value.code == 2
    assert capsys.readouterr().err == f"messnet: predict: {missing}; `messnet predict --help` explains it\n"
    main(["predict", "--help"])
    assert missing.split()[0] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("init photos --model.name x", "init: --model.name is a value of a recipe"),
        ("predict a.mess b.png --data.resize=64", "`messnet run RECIPE --data.resize VALUE`"),
        ("predict a.mess b.png --devic cpu", "there is no option --devic. Did you mean --device? `messnet predict --h"),
        ("predict a.mess --setting x", "predict: there is no option --setting. `messnet predict --help` lists what"),
    ],
)
def test_an_option_that_a_verb_does_not_have_is_told_where_it_belongs(
    words: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(words.split())
    assert end.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("recipe RECIPE", 0, "pretrain:\n"),
        ("run RECIPE --modle.name x", 2, "--modle.name is no option of a recipe: did you mean --model.name?"),
        ("run RECIPE --pretrain.augment.hflip 2", 2, "hflip lies in [0, 1], not 2"),
    ],
)
def test_a_recipe_is_read_and_refused_without_torch(words: str, code: int, said: str) -> None:
    demo = Path(__file__).parents[2] / "configs" / "demo.yaml"
    # In a process of its own: this one has torch.
    script = (
        "import sys; sys.modules['torch'] = None; from messnet.cli import main\n"
        f"main({words.replace('RECIPE', str(demo)).split()!r})"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert said in done.stdout + done.stderr
