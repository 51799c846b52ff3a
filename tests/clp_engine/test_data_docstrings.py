"""The embedded summarisation data set."""

from __future__ import annotations

import pytest

from clp_engine.data import docstrings
from clp_engine.data.docstring_text import is_plain_english, summary_and_body, without_inline_markup
from clp_engine.data.docstrings import collect_pairs, is_test_file, load_docstring_pairs

BODY = "The file is read once when it is opened. Every later call gives the same lines back."
TEMPLATE = '''
class Reader{n}:
    """Read the {word} lines of a file.

    {body}

    Args:
        path: where it is.
    """
'''
NUMBERS = [
    "alpha",
    "beta",
    "gamma",
    "delta",
    "epsilon",
    "zeta",
    "eta",
    "theta",
    "iota",
    "kappa",
    "lambda",
    "mu",
    "nu",
    "xi",
    "omicron",
    "pi",
    "rho",
    "sigma",
    "tau",
    "upsilon",
]


@pytest.fixture
def tree(tmp_path):
    for i, word in enumerate(NUMBERS):
        body = f"The {word} words of {word} are {word} here and {word} stays {word} with {word} for {word}."
        for folder in ("one", "two"):
            path = tmp_path / folder / f"module_{word}.py"
            path.parent.mkdir(exist_ok=True)
            path.write_text(TEMPLATE.format(n=i, word=f"{word} {folder}", body=body.replace("here", folder)))
    (tmp_path / "broken.py").write_text('"""Read it.\n\n' + BODY + '"""\ndef (:')
    (tmp_path / "binary.py").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "hidden.py").write_text(TEMPLATE.format(n=1, word="hidden", body=BODY))
    return tmp_path


def test_body_and_first_line():
    assert summary_and_body(f"Read the lines of a file.\n\n{BODY}\n\nArgs:\n    path: the file.") == (
        "Read the lines of a file.",
        BODY,
    )


@pytest.mark.parametrize(
    "rest",
    [
        "Args:\n    path: a file that is read once when it is opened, and the lines of which are given back.",
        ":param path: the file that is read once when it is opened and the lines of which are given back.",
        ">>> read('the file that is read once when it is opened and the lines of which are given back')",
        "Parameters\n----------\npath : the file that is read once when it is opened and whose lines are given back.",
        "- The file is read once when it is opened, and every later call gives the same lines back.",
        "    The file is read once when it is opened, and every later call gives the same lines back.",
        "x = f(y) * (z + 1) and w[0] == {1: 2} when the file is read once and every line is given back.",
        "Too short to tell.",
        "",
    ],
)
def test_markup_lists_code_and_doctests_are_left_out(rest):
    assert summary_and_body(f"Read the lines of a file.\n\n{rest}") is None


def test_prose_before_a_list_is_kept():
    assert summary_and_body(f"Read the lines of a file.\n\n{BODY}\n- a list\n- of things") == (
        "Read the lines of a file.",
        BODY,
    )


def test_inline_markup_is_taken_off():
    assert without_inline_markup("Give :class:`~a.Reader` and ``path`` to *it*.") == "Give a.Reader and path to it."


def test_plain_english():
    assert is_plain_english("Return the value of max_length for a text.")
    assert not is_plain_english("Return the value of max_length and min_length for it.")
    assert not is_plain_english("return the value.")
    assert not is_plain_english("Return the value")
    assert not is_plain_english("Hyperbolic sine.")


def test_near_duplicates_tests_and_broken_files_are_dropped_and_splits_are_disjoint(tree):
    train, test = (collect_pairs([tree], split, None) for split in ("train", "test"))
    assert 0 < len(train) + len(test) <= 2 * len(NUMBERS)
    assert not {pair["file"] for pair in train} & {pair["file"] for pair in test}
    assert all(is_test_file(pair["file"]) for pair in test)
    assert not any("hidden" in pair["summary"] for pair in train + test)
    sources = [pair["source"] for pair in train + test]
    assert len(set(sources)) == len(sources)


def test_a_copy_of_a_body_in_another_file_is_dropped(tmp_path):
    for name in ("a.py", "b.py", "c.py"):
        (tmp_path / name).write_text(TEMPLATE.format(n=1, word=name[0] + "x", body=BODY))
    assert len(collect_pairs([tmp_path], "train", None)) + len(collect_pairs([tmp_path], "test", None)) == 1


def test_a_limit_is_a_prefix_and_a_second_place_gives_the_same(tree, tmp_path_factory):
    rows = collect_pairs([tree], "train", None)
    assert collect_pairs([tree], "train", 5) == rows[:5]
    other = tmp_path_factory.mktemp("elsewhere")
    for path in sorted(tree.rglob("*.py"), reverse=True):
        target = other / path.relative_to(tree)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    assert collect_pairs([other], "train", None) == rows


def test_rows_of_this_installation():
    test = load_docstring_pairs("test", limit=48)
    train = load_docstring_pairs("train", limit=200)
    assert len(test) == 48
    assert len(train) == 200
    assert not {row["file"] for row in train} & {row["file"] for row in test}
    for row in test + train:
        assert [message["role"] for message in row["prompt"]] == ["system", "user"]
        assert row["source"] in row["prompt"][1]["content"]
        assert 12 <= len(row["source"].split()) <= 32
        assert row["source"].isascii()
        assert row["summary"].isascii()
        assert "`" not in row["source"]


def test_too_few_pairs_name_both_numbers(tree, monkeypatch):
    monkeypatch.setattr(docstrings, "python_roots", lambda: [tree])
    with pytest.raises(ValueError, match=r"docstring pairs found for split 'train', 1000 needed.*Install"):
        load_docstring_pairs("train")
    with pytest.raises(ValueError, match="5000 needed"):
        load_docstring_pairs("train", min_pairs=5000)


@pytest.mark.parametrize(("split", "limit"), [("dev", None), ("train", 0)])
def test_bad_arguments(split, limit):
    with pytest.raises(ValueError, match="must be"):
        load_docstring_pairs(split, limit=limit)
