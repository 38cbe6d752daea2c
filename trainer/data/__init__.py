"""The trainer's data: text, tokens, examples, batches, and the entropies beside which a loss is printed."""

from trainer.data.entropy import Entropies, corpus_entropies
from trainer.data.pipeline import Batches, make_batches
from trainer.data.stream import Corpus, load_corpus
from trainer.data.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "Batches",
    "Corpus",
    "Entropies",
    "Tokenizer",
    "corpus_entropies",
    "load_corpus",
    "load_tokenizer",
    "make_batches",
]
