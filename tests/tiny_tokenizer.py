"""A tokenizer of single bytes for tiny models, made in a moment."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers


def byte_tokenizer() -> Tokenizer:
    """Every byte is a token; ids 0 to 2 are <pad>, <s> and the end token </s>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([], trainer)
    return tokenizer
