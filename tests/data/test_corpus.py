"""The embedded corpus: real text from any CPython, the same each time, and never silently replaced."""

import hashlib
import json
import os
import platform
import shutil
import sysconfig
from pathlib import Path

import pytest

from dsllama.data.corpus import gather_stdlib_corpus
from dsllama.errors import UserError


@pytest.fixture(scope="module")
def gathered(tmp_path_factory):
    return gather_stdlib_corpus(tmp_path_factory.mktemp("gathered") / "corpus")


def _texts(summary):
    with open(summary.path, encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def test_the_summary_says_what_is_in_the_file(gathered):
    texts = _texts(gathered)
    assert gathered.documents == len(texts)
    assert gathered.bytes == sum(len(text.encode()) for text in texts) >= 5_000_000
    assert gathered.sha256 == hashlib.sha256(Path(gathered.path).read_bytes()).hexdigest()
    assert "PSF" in gathered.licence
    assert platform.python_version() in gathered.source
    assert not gathered.reused
    saved = json.loads((Path(gathered.path).parent / "summary.json").read_text())
    assert saved["sha256"] == gathered.sha256


def test_it_holds_each_source_and_topic_once_and_no_tests(gathered):
    from pydoc_data.topics import topics

    texts = _texts(gathered)
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    for name in ("argparse.py", "json/decoder.py"):
        assert texts.count((stdlib / name).read_text(encoding="utf-8")) == 1
    assert texts.count(topics["assert"]) == 1
    # A phrase of one topic is found once: the module that holds the topics is not among the sources.
    assert sum(topics["assert"][:200] in text for text in texts) == 1
    assert not any("class IdleConf" in text for text in texts)
    assert all(text.strip() for text in texts)


def test_gathering_anew_gives_the_same_bytes(gathered, tmp_path):
    assert gather_stdlib_corpus(tmp_path).sha256 == gathered.sha256


def test_a_corpus_that_is_there_is_kept_and_said_to_be(gathered):
    before = os.stat(gathered.path).st_mtime_ns
    again = gather_stdlib_corpus(Path(gathered.path).parent)
    assert again.reused
    assert "kept" in str(again)
    assert again.sha256 == gathered.sha256
    assert os.stat(gathered.path).st_mtime_ns == before


def test_a_corpus_that_somebody_changed_is_not_overwritten(gathered, tmp_path):
    shutil.copytree(Path(gathered.path).parent, tmp_path, dirs_exist_ok=True)
    (tmp_path / "stdlib.jsonl").write_text('{"text": "mine"}\n')
    with pytest.raises(UserError, match="not as it was gathered"):
        gather_stdlib_corpus(tmp_path)
    assert (tmp_path / "stdlib.jsonl").read_text() == '{"text": "mine"}\n'
    assert not list(tmp_path.glob("*.tmp"))


def test_a_corpus_whose_summary_is_missing_gets_it_again(gathered, tmp_path):
    shutil.copytree(Path(gathered.path).parent, tmp_path, dirs_exist_ok=True)
    (tmp_path / "summary.json").unlink()
    assert gather_stdlib_corpus(tmp_path).sha256 == gathered.sha256
    assert (tmp_path / "summary.json").exists()


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: path.write_bytes(b"PK"), lambda path: None])
def test_a_python_without_sources_is_refused_clearly(make, tmp_path):
    make(tmp_path / "python311.zip")
    with pytest.raises(UserError, match="zipped or minimal"):
        gather_stdlib_corpus(tmp_path / "out", stdlib=tmp_path / "python311.zip")
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/corpus: cannot be written"):
        gather_stdlib_corpus(tmp_path / "file" / "corpus")
