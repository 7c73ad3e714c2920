"""The lint that keeps the language plain."""

import pytest

from tests.language import findings


def test_plain_sentences_pass() -> None:
    assert findings("a.py", '"""Resume a run."""\n\n# Fixed.\nx = "the run resumes"\nposition = file.tell()\n') == []
    assert findings("README.md", "A run resumes from its newest checkpoint.\n") == []


@pytest.mark.parametrize("opening", ["Of", "The same", "That of", "Likewise", "Their", "Its", "And", "Else"])
def test_a_docstring_opens_with_a_line_that_stands_alone(opening: str) -> None:
    code = f'x = 1\n"""{opening} the parameter."""\n\n\ndef f():\n    """{opening}: the parameter."""\n'
    found = findings("a.py", code)
    assert [line.split(": ")[0] for line in found] == ["a.py:2", "a.py:6"]
    assert all(f"opens with {opening!r}" in line for line in found)


def test_a_longer_word_is_no_such_opening() -> None:
    assert findings("a.py", '"""Offload the optimiser."""\n') == []


@pytest.mark.parametrize(
    "code",
    [
        'x = 1\n"""A run\ngoes on."""\n',
        "x = 1\n\n# A run goes on.\n",
        "x = 1\n# A run\n# that went\n# on.\n",
        'x = 1\nraise ValueError(\n    f"{x}: goes on"\n)\n',
    ],
)
def test_banned_words_are_found_with_their_line(code: str) -> None:
    (found,) = findings("a.py", code)
    assert found.startswith("a.py:3: ")
    assert found.endswith("': use continue, resume")


def test_banned_words_are_found_in_other_files() -> None:
    assert findings("README.md", "# A run\n\nsomething you can mend\n") == ["README.md:3: 'mend': use fix"]


def test_a_name_is_no_message() -> None:
    assert findings("a.py", 'tell = {"tell": 1}\n') == []


def test_an_argument_may_have_any_name() -> None:
    assert (
        findings("a.py", 'def f(tell):\n    """Run.\n\n    Args:\n        tell: Called with a line.\n    """\n') == []
    )
