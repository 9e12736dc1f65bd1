"""Real tokenizers, learned from a few words, and text encoders so small that they cost nothing."""

import json

import pytest
import torch
from pipeline_factory import randomized
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

transformers = pytest.importorskip("transformers")  # skips the tests that import this

WORDS = """a photo of the cat on a mat; the dog's 12 cats at 3.50 in the rain, an old red house by
the sea. Two people riding horses; a green bird in a tree, the moon over the mountains at night"""
CAPTIONS = [
    "a photo of a cat",
    None,
    "",
    "The DOG's\t12  cats — naïve café 猫 😀 &amp; <b>",
    "the sea, the sea, the sea, the sea, the sea, the sea, the sea, the sea",
    "a photo of a cat",
    "e\u0301 \u00a0 \x00 ﬁ <|endoftext|> a </s>",
    "two people riding horses over the mountains at night in the rain by an old red house",
]
POSITIONS = 16


def make_clip_tokenizer(words=WORDS):
    """Byte-level pairs with CLIP's own rules and specials."""
    learned = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=letters, end_of_word_suffix="</w>", show_progress=False
    )
    learned.train_from_iterator(words.lower().split(), trainer)
    merges = [tuple(pair) for pair in json.loads(learned.to_str())["model"]["merges"]]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(m) for m in merges)]
    pieces = [*dict.fromkeys(pieces), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=POSITIONS)


def make_t5_tokenizer(length=24):
    """A unigram model of pieces, as T5's SentencePiece: end token, no start token."""
    learned = Tokenizer(models.Unigram())
    learned.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("  ", " ")])
    learned.pre_tokenizer = pre_tokenizers.Metaspace()
    learned.decoder = decoders.Metaspace()
    specials = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=specials, unk_token="<unk>", show_progress=False
    )
    learned.train_from_iterator(WORDS.split(), trainer)
    learned.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=learned,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=length,
    )


def make_clip(folder, **changes):
    """Writes a CLIP text encoder and its tokenizer; width 16, pooled 12."""
    tokenizer = make_clip_tokenizer()
    config = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "max_position_embeddings": POSITIONS,
        "projection_dim": 12,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = transformers.CLIPTextConfig(**config | changes)
    return _write(transformers.CLIPTextModelWithProjection(config), tokenizer, folder)


def make_t5(folder):
    """Writes a T5 encoder and its tokenizer; width 16."""
    tokenizer = make_t5_tokenizer()
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    config = transformers.T5Config(vocab_size=len(tokenizer) + 8, **sizes)
    return _write(transformers.T5EncoderModel(config), tokenizer, folder)


def make_bert(folder, length=12, width=20):
    """Writes a BERT and its tokenizer of whole words: an encoder of no kind known by name."""
    learned = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    learned.normalizer = normalizers.Lowercase()
    learned.pre_tokenizer = pre_tokenizers.Whitespace()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    learned.train_from_iterator(WORDS.split(), trainers.WordLevelTrainer(special_tokens=specials))
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    learned.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=ends
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=learned, pad_token="[PAD]", unk_token="[UNK]", model_max_length=length
    )
    sizes = {"hidden_size": width, "intermediate_size": 24, "num_hidden_layers": 2}
    config = transformers.BertConfig(
        vocab_size=learned.get_vocab_size(), num_attention_heads=2, **sizes
    )
    return _write(transformers.BertModel(config), tokenizer, folder)


def _write(model, tokenizer, folder):
    with torch.no_grad():
        randomized(model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
