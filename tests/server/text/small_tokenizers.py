"""Tokenizers made in a moment: a byte-level BPE and one in the manner of SentencePiece."""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

TEXTS = [
    "The quick brown fox jumps over the lazy dog. It isn't the first time, and it won't be the last.",
    "naïve café, Ærøskøbing, Ελληνικά, русский язык, עברית, हिन्दी",
    "你好。这是一个测试。 日本語のテキスト 한국어 텍스트",
    "😀 👨‍👩‍👧‍👦 👩🏽‍🚀 e\u0301 a\u0308 🇩🇰",
    "def f(x):\n    return x + 1\n\n\tif x: pass",
]


def byte_level(merges: int = 120) -> Tokenizer:
    """A byte-level BPE as of GPT-2, with the special tokens <|end|> (id 0) and <|start|> (id 1)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=258 + merges,
        special_tokens=["<|end|>", "<|start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_tokens([AddedToken("<plain ☃>", normalized=False)])
    return tokenizer


def sentencepiece() -> Tokenizer:
    """Words with a leading '▁', bytes for all else, as of Llama 2; special tokens <s> (1) and </s> (2), <s> added."""
    words = ["▁", "▁▁", "▁Hello", "▁world", "▁the", "a", "b", "é", "!", "he", "llo"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single=["<s>", "$A"], special_tokens=[("<s>", 1)])
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> str:
    """Write tokenizer.json to a folder."""
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder)
