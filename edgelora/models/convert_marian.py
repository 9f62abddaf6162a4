"""tokenizer.json of a Marian folder, which has source.spm, target.spm and the vocabulary that both share, vocab.json.

tokenizer.json reads sources as source.spm does, target_tokenizer.json targets as target.spm does; ids are vocab.json's in both.
A piece that a SentencePiece model does not have gets a score that no segmentation takes by choice.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edgelora.errors import ModelError
from edgelora.folder import write_json
from edgelora.writing import TARGET_FILE

SPM, VOCABULARY = ("source.spm", "target.spm"), "vocab.json"
FOREIGN = -1000.0  # the score of a piece that the other language alone has: below that of any unknown character
SPECIAL = ("</s>", "<unk>", "<pad>")


def is_marian(folder: Path) -> bool:
    return all((folder / name).is_file() for name in (*SPM, VOCABULARY))


def convert_marian(source: Path, folder: Path) -> None:
    """Write both tokenizers and tokenizer_config.json. Raises ModelError for a folder with two vocabularies."""
    if (source / "target_vocab.json").is_file():
        raise ModelError(f"{source} has a vocabulary for each language; Marian models with one for both are read")
    vocabulary: dict[str, int] = json.loads((source / VOCABULARY).read_text(encoding="utf-8"))
    for name, out in zip(SPM, ("tokenizer.json", TARGET_FILE), strict=True):
        build(source / name, vocabulary).save(str(folder / out))
    config = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"]}
    write_json(folder / "tokenizer_config.json", {**config, **names})


def build(spm: Path, vocabulary: dict[str, int]) -> Any:
    """Return a SentencePiece model as a tokenizer of `tokenizers`, with the ids of the vocabulary."""
    import sentencepiece.sentencepiece_model_pb2 as formats
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    proto: Any = getattr(formats, "ModelProto")()  # noqa: B009  # made by protobuf when it is imported
    proto.ParseFromString(spm.read_bytes())
    scores = {piece.piece: float(piece.score) for piece in proto.pieces}
    pieces = sorted(vocabulary, key=lambda piece: vocabulary[piece])
    if [vocabulary[piece] for piece in pieces] != list(range(len(pieces))):
        raise ModelError(f"the ids of {spm.with_name(VOCABULARY)} are not 0 to {len(pieces) - 1}")
    scored = [(piece, scores.get(piece, FOREIGN)) for piece in pieces]
    tokenizer = Tokenizer(models.Unigram(scored, unk_id=vocabulary["<unk>"]))
    charsmap = proto.normalizer_spec.precompiled_charsmap
    parts = [normalizers.Precompiled(charsmap)] if charsmap else []
    tokenizer.normalizer = normalizers.Sequence([*parts, normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    codes = [piece for piece in pieces if piece.startswith(">>") and piece.endswith("<<")]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in (*SPECIAL, *codes) if token in vocabulary])
    end = [("</s>", vocabulary["</s>"])]
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=end)
    return tokenizer
