"""The embedded corpus: real text from any CPython, the same each time, and never silently replaced."""

import json
import sysconfig
from pathlib import Path

import pytest

from dsllama.data.corpus import gather_stdlib_corpus
from dsllama.errors import UserError


@pytest.fixture(scope="module")
def gathered(tmp_path_factory):
    return gather_stdlib_corpus(tmp_path_factory.mktemp("gathered") / "corpus")


def _texts(path):
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_it_holds_each_source_and_topic_once_and_no_tests(gathered):
    from pydoc_data.topics import topics

    texts = _texts(gathered)
    assert sum(len(text.encode()) for text in texts) >= 5_000_000
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    for name in ("argparse.py", "json/decoder.py"):
        assert texts.count((stdlib / name).read_text(encoding="utf-8")) == 1
    assert texts.count(topics["assert"]) == 1
    # A phrase of one topic is found once: the module that holds the topics is not among the sources.
    assert sum(topics["assert"][:200] in text for text in texts) == 1
    assert not any("class IdleConf" in text for text in texts)
    assert all(text.strip() for text in texts)


def test_gathering_anew_gives_the_same_bytes(gathered, tmp_path):
    assert gather_stdlib_corpus(tmp_path).read_bytes() == gathered.read_bytes()


def test_what_is_there_is_kept_even_if_somebody_changed_it(tmp_path):
    (tmp_path / "stdlib.jsonl").write_text('{"text": "mine"}\n')
    assert gather_stdlib_corpus(tmp_path).read_text() == '{"text": "mine"}\n'


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: path.write_bytes(b"PK"), lambda path: None])
def test_a_python_without_sources_is_refused_clearly(make, tmp_path, monkeypatch):
    make(tmp_path / "python311.zip")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "python311.zip")})
    with pytest.raises(UserError, match="zipped or minimal"):
        gather_stdlib_corpus(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/corpus: cannot be written"):
        gather_stdlib_corpus(tmp_path / "file" / "corpus")
